"""`vip export`: files against the models they were made of, in programs other than the one that wrote them."""

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform
from torch import nn
from training_command import QUICK, Outcome

import vip.cli
from vip import ops
from vip.errors import UserError
from vip.export import FORMATS, export_model, load_exported
from vip.training.weights import read_checkpoint

QUICK_FORMATS = ("onnx", "torch-export", "torchscript")
SMALL = {
    "vip_nano4_32": {},
    "lvvit_t": dict(img_size=32, depth=2, embed_dim=48, num_heads=3),
    "eamlp_7": dict(img_size=32, depth=2, embed_dim=48, num_heads=3),
    "test_vit": {},
    "test_resnet": {},
}


def small(name: str = "vip_nano4_32") -> nn.Module:
    """A small model whose norms, scales and biases are not those of a new one."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **SMALL[name]).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def images(count: int, model: nn.Module) -> torch.Tensor:
    torch.manual_seed(count)
    side = 160 if model.pretrained_cfg["architecture"].startswith("test_") else 32  # timm's own models for tests
    return torch.randn(count, 3, side, side)


def ending(format: str) -> str:
    return FORMATS[format].endings[0]


@pytest.fixture(scope="module")
def run(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run at a size, a normalization and a crop that are not the model's own."""
    output = tmp_path_factory.mktemp("runs")
    said = ("--img-size", 48, "--mean", 0.3, 0.4, 0.5, "--std", 0.1, 0.2, 0.3, "--crop-pct", 0.8)
    argv = ["train", image_folder, *QUICK, *said, "--interpolation", "bilinear", "--lr", "1e-3", "--model-ema"]
    assert vip.cli.main([str(a) for a in (*argv, "--output", output, "--experiment", "run")]) == 0
    return output / "run"


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The run in each format."""
    folder = tmp_path_factory.mktemp("exported")
    paths = {format: folder / f"{format}{ending(format)}" for format in QUICK_FORMATS}
    for format, path in paths.items():
        assert vip.cli.main(["export", str(run), "--format", format, "--out", str(path)]) == 0
    return paths


def trained(run: Path, weights: str = "state_dict_ema") -> nn.Module:
    """The model of a run, made without this library's own loading."""
    model = timm.create_model("vip_nano4_32", num_classes=3, img_size=48).eval()
    model.load_state_dict(read_checkpoint(run)[weights])
    return model


SAID = {
    "architecture": "vip_nano4_32",
    "num_classes": 3,
    "label_names": ["blue", "green", "red"],
    "input_size": [3, 48, 48],
    "mean": [0.3, 0.4, 0.5],
    "std": [0.1, 0.2, 0.3],
    "crop_pct": 0.8,
    "crop_mode": "center",
    "interpolation": "bilinear",
    "normalizes": False,
}


# --- what files compute


@pytest.mark.parametrize(
    "name", ["lvvit_t", *(pytest.param(name, marks=pytest.mark.slow) for name in SMALL if name != "lvvit_t")]
)
def test_onnx_computes_what_the_model_does(tmp_path: Path, name: str) -> None:
    model, path = small(name), tmp_path / "model.onnx"
    assert export_model(model, path, "onnx") < 1e-5
    onnx.checker.check_model(path, full_check=True)
    assert [(opset.domain, opset.version) for opset in onnx.load(path).opset_import if not opset.domain] == [("", 18)]
    session = onnxruntime.InferenceSession(path)
    assert [i.shape[0] for i in (*session.get_inputs(), *session.get_outputs())] == ["batch", "batch"]
    for count in (1, 2, 5):
        x = images(count, model)
        (found,) = session.run(["logits"], {"images": x.numpy()})
        with torch.no_grad():
            expected = model(x).numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def read_by_torch(path: Path, format: str) -> Callable[[torch.Tensor], torch.Tensor]:
    if format == "torchscript":
        return torch.jit.load(path)
    return torch.export.load(path).module() if format == "torch-export" else torch._inductor.aoti_load_package(path)


@pytest.mark.parametrize("name", ["lvvit_t", "eamlp_7", pytest.param("test_vit", marks=pytest.mark.slow)])
@pytest.mark.parametrize("format", ["torch-export", "torchscript"])
def test_torch_computes_what_the_model_does(tmp_path: Path, format: str, name: str) -> None:
    model, path = small(name), tmp_path / f"model{ending(format)}"
    export_model(model, path, format)
    run = read_by_torch(path, format)
    for count in (1, 5):
        x = images(count, model)
        torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_aotinductor(tmp_path: Path) -> None:
    model, path = small(), tmp_path / "model.pt2"
    assert export_model(model, path, "aotinductor", {**SAID, "input_size": [3, 32, 32]}) < 1e-5
    package = read_by_torch(path, "aotinductor")
    for count in (1, 5):
        x = images(count, model)
        torch.testing.assert_close(package(x), model(x), rtol=1e-4, atol=1e-4)
    assert json.loads(package.get_metadata()["preprocessing.json"]) == {**SAID, "input_size": [3, 32, 32]}
    assert load_exported(path, "aotinductor")[1]["label_names"] == SAID["label_names"]


@pytest.mark.parametrize("format", QUICK_FORMATS)
def test_files_that_normalize_take_values_from_0_to_1(tmp_path: Path, format: str) -> None:
    model, path = small("eamlp_7"), tmp_path / f"model{ending(format)}"
    export_model(model, path, format, normalize=True)
    run, about = load_exported(path, format)
    assert about["normalizes"]
    x = torch.rand(3, 3, 32, 32)
    mean, std = (torch.tensor(about[name]).reshape(3, 1, 1) for name in ("mean", "std"))
    torch.testing.assert_close(run(x), model((x - mean) / std), rtol=1e-4, atol=1e-4)


def test_a_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = small().train()
    model.head.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    enabled = ops._enabled
    export_model(model, tmp_path / "model.pt", "torchscript")
    assert [module.training for module in model.modules()] == modes and len(set(modes)) == 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert ops._enabled == enabled


# --- what files say


@pytest.mark.parametrize("format", QUICK_FORMATS)
def test_the_checkpoint_is_obeyed(exported: dict[str, Path], run: Path, format: str) -> None:
    path = exported[format]
    found, about = load_exported(path, format)
    assert about == SAID
    x = torch.randn(4, 3, 48, 48)
    averaged, plain = trained(run)(x), trained(run, "state_dict")(x)
    torch.testing.assert_close(found(x), averaged, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(averaged, plain, rtol=1e-4, atol=1e-4), "nothing to tell them apart by"
    extra: dict = {"preprocessing.json": ""}
    if format == "onnx":
        text = onnx.load(path).metadata_props[0].value
    elif format == "torchscript":
        torch.jit.load(path, _extra_files=extra)
        text = extra["preprocessing.json"]
    else:
        torch.export.load(path, extra_files=extra)
        text = extra["preprocessing.json"]
    assert json.loads(text) == SAID


def test_the_documented_way_to_use_a_file(
    exported: dict[str, Path],
    run: Path,
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(exported["onnx"], "model.onnx")
    image = Image.open(image_folder / "val" / "red" / "red0.jpg")
    image.save("image.jpg")
    capsys.readouterr()
    document = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    names: dict = {}
    exec(compile(document.partition("```python\n")[2].partition("```")[0], "export.md", "exec"), names)
    wanted = {name: SAID[name] for name in ("input_size", "mean", "std", "crop_pct", "crop_mode", "interpolation")}
    x = create_transform(**wanted)(Image.open("image.jpg"))[None]
    with torch.no_grad():
        expected = trained(run)(x)
    np.testing.assert_allclose(names["logits"], expected.numpy(), rtol=1e-4, atol=1e-4)
    assert capsys.readouterr().out.strip() == SAID["label_names"][expected.argmax()]


def test_plain_weights_and_another_size(command: Callable[..., Outcome], run: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    argv = ("export", run, "--format", "torchscript", "--out", path)
    outcome = command(*argv, "--no-use-ema")
    assert outcome.status == 0
    assert "input 3x48x48 normalized, 3 classes" in outcome.out and "batches of 1 and 3" in outcome.out
    x = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(torch.jit.load(path)(x), trained(run, "state_dict")(x), rtol=1e-4, atol=1e-4)
    assert "is there already" in command(*argv).error("vip export")
    assert command(*argv, "--overwrite", "--img-size", 32).status == 0
    assert torch.jit.load(path)(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    assert load_exported(path, "torchscript")[1] == {**SAID, "input_size": [3, 32, 32]}


def test_without_a_checkpoint(command: Callable[..., Outcome], tmp_path: Path) -> None:
    argv = ("--model", "vip_nano4_32", "--num-classes", 4, "--format", "torchscript", "--out", tmp_path / "model.pt")
    outcome = command("export", *argv, "--no-check")
    assert outcome.status == 0 and "random weights" in outcome.out and "differs" not in outcome.out
    about = load_exported(tmp_path / "model.pt", "torchscript")[1]
    assert about["num_classes"] == 4 and "label_names" not in about


# --- what must not come about


@pytest.mark.parametrize("before", [None, b"an older file"])
@pytest.mark.parametrize("off", [1e-3, float("nan")])
def test_a_file_that_computes_something_else_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, off: float, before: bytes | None
) -> None:
    path, correct = tmp_path / "model.pt", FORMATS["torchscript"]

    def read(file: Path) -> tuple[Callable[[torch.Tensor], torch.Tensor], str]:
        run, text = correct.read(file)
        return lambda x: run(x) + off * (len(x) == 3) * run(x).abs().max(), text

    monkeypatch.setitem(FORMATS, "torchscript", dataclasses.replace(correct, read=read))
    if before:
        path.write_bytes(before)
    with pytest.raises(UserError, match=f"differs from the model by {off:.1e} of its largest output.*not kept"):
        export_model(small(), path, "torchscript")
    assert [file.read_bytes() for file in tmp_path.iterdir()] == ([before] if before else [])


class _FixedBatch(nn.Module):
    num_classes = 4

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.reshape(2, 12))  # whatever the batch is


class _DataDependent(_FixedBatch):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.flatten(1)) if float(x.sum()) > 0 else self.layer(-x.flatten(1))


@pytest.mark.parametrize("format, kind", [("onnx", _DataDependent), ("torch-export", _FixedBatch)])
def test_models_that_cannot_be_exported(tmp_path: Path, format: str, kind: type[nn.Module]) -> None:
    about = {"architecture": kind.__name__, "input_size": [3, 2, 2]}
    with pytest.raises(UserError, match=f"{kind.__name__} cannot be exported as {format}: ") as e:
        export_model(kind(), tmp_path / f"model{ending(format)}", format, about)
    assert len(str(e.value)) < 500 and "\n" not in str(e.value) and not list(tmp_path.iterdir())


def test_a_missing_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"onnx needs .*onnxscript.*vision-permutator\[export\]"):
        export_model(small(), tmp_path / "model.onnx", "onnx")
    assert not list(tmp_path.iterdir())


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(FORMATS, "onnx", dataclasses.replace(FORMATS["onnx"], write=fail))
    with pytest.raises(UserError, match="Cannot write .*model.onnx .No space left"):
        export_model(small(), tmp_path / "model.onnx", "onnx")


@pytest.mark.parametrize("format", FORMATS)
def test_files_that_are_none(tmp_path: Path, format: str) -> None:
    path = tmp_path / f"model{ending(format)}"
    with pytest.raises(UserError, match="Cannot read|is no"):
        load_exported(path, format)
    for content in (b"", b"PK\x03\x04 damaged", b"\x08\x08 no model"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"model{ending(format)} is no {format} file"):
            load_exported(path, format)


@pytest.mark.parametrize(
    "argv, words",
    [
        ("", ["required", "--format", "--out"]),
        ("--format onnx --out model.onnx", ["Nothing to export", "--model NAME"]),
        ("run --format coreml --out model.onnx", ["coreml", "torchscript"]),
        ("run --format onnx --out model.pt", ["model.pt does not end in .onnx"]),
        ("run --format onnx --out nowhere/model.onnx", ["nowhere/model.onnx is in no folder"]),
        ("nowhere --format onnx --out model.onnx", ["no checkpoint at nowhere"]),
        ("nowhere --pretrained --format onnx --out model.onnx", ["--pretrained and a checkpoint"]),
        ("--model vip_nano4_23 --format onnx --out model.onnx", ["vip_nano4_23", "vip_nano4_32"]),
        ("--model local-dir:nowhere --pretrained --format onnx --out model.onnx", ["local-dir:nowhere", "config.json"]),
        ("--model vip_nano4_32 --img-size 33 --format onnx --out model.onnx", ["vip_nano4_32", "33"]),
    ],
)
def test_command_lines_that_are_wrong(
    command: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: str, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    message = command("export", *argv.split()).error("vip export")
    assert not [word for word in words if word not in message], message
    assert not list(tmp_path.iterdir())
