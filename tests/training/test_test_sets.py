"""Test sets of ImageNet models, and what was predicted of each image, against timm's own pipeline."""

import json
import pkgutil
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, resolve_data_config

import vip  # noqa: F401  # registers the models
from vip.cli import main
from vip.errors import UserError
from vip.reporting.predictions import read_predictions

SYNSETS = ImageNetInfo().label_names()
INFO = files("timm.data") / "_info"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Path]:
    torch.manual_seed(0)
    model = timm.create_model("vip_nano4_32", num_classes=1000).eval()
    path = tmp_path_factory.mktemp("model") / "weights.pth"
    torch.save(model.state_dict(), path)
    return model, path


def make(folder: Path, names: list[str]) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = []
    for name in names:
        (folder / name).mkdir(parents=True)
        paths.append(folder / name / "ILSVRC2012_val_1.png")
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(paths[-1])
    return paths


def validate(*arguments: object) -> int:
    return main(["validate", *map(str, arguments), "-j", "0", "--device", "cpu", "-b", "64"])


def logits(model: torch.nn.Module, paths: list[Path]) -> torch.Tensor:
    transform = create_transform(**resolve_data_config({}, model=model))
    with torch.inference_mode():
        return model(torch.stack([transform(Image.open(path)) for path in paths]))


@pytest.mark.parametrize("name", ["imagenet-a", "imagenet-r", "imagenet-sketch", "imagenet-v2"])
def test_only_the_classes_of_the_test_set_count(
    name: str, model: tuple[torch.nn.Module, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folders = {
        "imagenet-sketch": SYNSETS,
        "imagenet-v2": [str(i) for i in range(1000)],
    }.get(name) or (INFO / f"{name.replace('-', '_')}_synsets.txt").read_text().split()
    network, weights = model
    paths = make(tmp_path / "images", folders)
    predicted = tmp_path / "predictions.npz"
    flags = ("--checkpoint", weights, "--test-set", name, "--predictions", predicted)
    assert validate(tmp_path / "images", *flags) == 0
    result = json.loads(capsys.readouterr().out.partition("--result\n")[2])
    scores = logits(network, paths)
    kept = range(1000) if len(folders) == 1000 else [SYNSETS.index(folder) for folder in folders]
    top = scores[:, list(kept)].topk(5).indices
    right = (top == torch.arange(len(folders))[:, None]).sum(0)
    assert result["count"] == len(folders)
    assert (result["correct1"], result["correct5"]) == (int(right[0]), int(right.sum()))
    found = read_predictions(predicted)
    np.testing.assert_array_equal(found.top, top.numpy())
    np.testing.assert_array_equal(found.target, np.arange(len(folders)))
    np.testing.assert_allclose(found.probability, scores[:, list(kept)].softmax(1).topk(5).values, rtol=1e-3)
    assert found.classes == folders and found.model == "vip_nano4_32"


def test_real_labels_are_timms(
    model: tuple[torch.nn.Module, Path], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the first 1000 images, all of them links to two files; some have no label at all."""
    network, weights = model
    sources = make(tmp_path / "sources", ["a", "b"])
    real = json.loads((INFO / "imagenet_real_labels.json").read_text())[:1000]
    timms = pkgutil.get_data
    monkeypatch.setattr(
        pkgutil, "get_data", lambda *n: json.dumps(real).encode() if n[1].endswith("real_labels.json") else timms(*n)
    )
    top = logits(network, sources).topk(5).indices.tolist()
    (tmp_path / "val").mkdir()
    classes = [tmp_path / "val" / synset for synset in SYNSETS]
    for folder in classes:
        folder.mkdir()
    for i in range(1000):
        (classes[i % 1000] / f"ILSVRC2012_val_{i + 1:08}.JPEG").hardlink_to(sources[i % 2])
    assert validate(tmp_path, "--checkpoint", weights, "--test-set", "imagenet-real") == 0
    result = json.loads(capsys.readouterr().out.partition("--result\n")[2])
    labelled = [(set(labels), top[i % 2]) for i, labels in enumerate(real) if labels]
    assert result["count"] == len(labelled) < 1000
    assert result["correct1"] == sum(t[0] in labels for labels, t in labelled)
    assert result["correct5"] == sum(bool(labels & set(t)) for labels, t in labelled)


@pytest.mark.parametrize(
    ("folders", "flags", "words"),
    [
        (SYNSETS[:3], "--test-set imagenet-a", ["200 folders", "n01440764 is none of them"]),
        (["7", "8"], "--test-set imagenet-v2", ["1000 folders, 0 to 999", "there are 2"]),
        (["a", "b"], "--test-set imagenet-a --valid-labels x", ["leave out --valid-labels"]),
        (["a", "b"], "--test-set imagenet-b", ["imagenet-b", "imagenet-a"]),
        (["a", "b"], "--num-classes 10 --test-set imagenet-r", ["1000 classes", "10"]),
        (["a", "b"], "--test-set imagenet-real --predictions x.npz", ["one right class", "ReaL labels", "leave one"]),
        (["a", "b"], "--real-labels x.json --predictions x.npz", ["one right class", "ReaL labels", "leave one"]),
        (["a", "b"], "--predictions nowhere/x.npz", ["nowhere/x.npz", "folder that is there"]),
    ],
)
def test_mistakes(
    folders: list[str],
    flags: str,
    words: list[str],
    model: tuple[torch.nn.Module, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    make(tmp_path, folders)
    weights = model[1]
    if "--num-classes" in flags:
        weights = tmp_path / "ten.pth"
        torch.save(timm.create_model("vip_nano4_32", num_classes=10).state_dict(), weights)
    assert validate(tmp_path, "--checkpoint", weights, *flags.split()) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words) and "Traceback" not in said, said


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04",
        b"no archive at all",
        dict(target=np.zeros(3, int)),
        dict(target=np.zeros(3, int), top=np.zeros((2, 1), int), probability=np.zeros((2, 1))),
        dict(target=np.full(2, 7), top=np.zeros((2, 1), int), probability=np.zeros((2, 1))),
        dict(target=np.array([{}, {}]), top=np.zeros((2, 1), int), probability=np.zeros((2, 1))),
        dict(target=np.zeros(2, int), top=np.zeros((2, 1), int), probability=np.array([["1"], ["a"]])),
        np.zeros(3),
    ],
)
def test_damaged_predictions_are_refused(content: bytes | dict | np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "predictions.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, np.ndarray):
        with open(path, "wb") as file:  # np.save would add an ending
            np.save(file, content)
    else:
        np.savez(path, **{"classes": np.array(["a", "b"]), "model": "m", "checkpoint": "c"} | content)
    with pytest.raises(UserError, match="predictions|classes"):
        read_predictions(path)
