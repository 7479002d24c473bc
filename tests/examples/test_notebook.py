"""The notebook, run as a reader would run it, in an empty folder."""

import json
import resource
from pathlib import Path

import nbformat
import numpy as np
import onnxruntime
import pytest
import timm
import torch
from nbclient import NotebookClient
from PIL import Image
from timm.data import create_transform

import vip  # noqa: F401

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the notebook was run in; what it shows is in `shown.json`."""
    folder = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        client.execute()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    assert 1 < seconds < 180, "it promises a few minutes, on a processor that has nothing else to do"
    (folder / "shown.json").write_text(json.dumps([cell.get("outputs", []) for cell in notebook.cells]))
    return folder


def shown_text(folder: Path) -> str:
    outputs = [o for cell in json.loads((folder / "shown.json").read_text()) for o in cell]
    return "".join(o.get("text", "") for o in outputs if o.get("name") == "stdout")


def test_it_is_stored_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.cell_type == "markdown" or (cell.outputs == [] and cell.execution_count is None)
    for cell in notebook.cells:
        for link in [part.partition(")")[0] for part in cell.source.split("](")[1:]]:
            assert "://" in link or (NOTEBOOK.parent / link).exists(), link


@pytest.mark.slow
def test_the_model_has_learned(folder: Path) -> None:
    text = shown_text(folder)
    result = json.loads(text.partition("--result\n")[2].partition("\n}")[0] + "}")
    assert result["top1"] > 90
    outputs = [o for cell in json.loads((folder / "shown.json").read_text()) for o in cell]
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 4, "batch, curves, heat maps, branches"


@pytest.mark.slow
def test_the_heat_maps(folder: Path) -> None:
    """They are bright where the model's own tokens speak for the class."""
    with Image.open(folder / "heatmaps.png") as picture:
        assert len(picture.convert("RGB").getcolors(10**7)) > 1000
    from vip.prediction.predictor import load_predictor

    predictor = load_predictor(folder / "runs" / "digits", device="cpu")
    path = sorted((folder / "digits" / "val" / "3").glob("*.png"))[0]
    (prediction,) = predictor.predict([path], heatmaps=True)
    model, transform = predictor.model, create_transform(**predictor.data_config)
    with torch.inference_mode():
        tokens = model.forward_features(transform(Image.open(path).convert("RGB"))[None])
        expected = (tokens @ model.head.weight.T + model.head.bias)[0, ..., prediction.classes[0].index]
    assert prediction.heatmap is not None
    np.testing.assert_allclose(prediction.heatmap.activation, expected.numpy(), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_the_export_agrees_with_the_checkpoint(folder: Path) -> None:
    """ONNX Runtime against timm's model with the weights of the checkpoint, over a hundred images."""
    content = torch.load(folder / "runs" / "digits" / "model_best.pth.tar", weights_only=True)
    model = timm.create_model("vip_nano4_32", num_classes=10).eval()
    model.load_state_dict(content["state_dict"])
    session = onnxruntime.InferenceSession(folder / "digits.onnx")
    about = json.loads(session.get_modelmeta().custom_metadata_map["preprocessing.json"])
    assert about["label_names"] == [str(digit) for digit in range(10)]
    transform = create_transform(
        tuple(about["input_size"]), mean=about["mean"], std=about["std"], crop_pct=about["crop_pct"]
    )
    paths = sorted(folder.glob("digits/val/*/*.png"))[::4]
    images = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])
    (found,) = session.run(None, {"images": images.numpy()})
    with torch.inference_mode():
        expected = model(images).numpy()
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    right = [about["label_names"][i] == path.parent.name for i, path in zip(found.argmax(1), paths, strict=True)]
    assert len(right) == 90 and np.mean(right) > 0.85
