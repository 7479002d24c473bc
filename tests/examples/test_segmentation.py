"""Segmentation end to end: what the scenes hold, where the weights come from, and what is measured."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import vip.cli
from examples.segmentation import train as example
from examples.segmentation.data import CLASSES, digits, scene, scenes
from vip.data.digits import write_digits

MODELS = ["vip_nano4_32", "lvvit_nano4_32"]


def test_boxes_hold_the_pixels_of_their_digits() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        image, mask, boxes, labels = scene(rng, digits(training=True), (64, 96))
        assert image.shape == (3, 64, 96) and mask.shape == (64, 96) and 1 <= len(boxes) == len(labels) <= 4
        claimed = torch.zeros_like(mask)
        for (x0, y0, x1, y1), label in zip(boxes.int().tolist(), labels.tolist(), strict=True):
            inside = mask[y0:y1, x0:x1] == label
            assert inside.any(0)[[0, -1]].all() and inside.any(1)[[0, -1]].all(), "the box is too large"
            claimed[y0:y1, x0:x1][inside] = label
        assert torch.equal(claimed, mask), "there is ink outside of the boxes"


def test_held_out_digits_are_those_of_the_pretraining(tmp_path: Path) -> None:
    """Else an encoder that was trained on the digits of `vip make-digits` has seen what it is tested on."""
    write_digits(tmp_path / "digits")
    for training, split in ((True, "train"), (False, "val")):
        values, labels = digits(training)
        written = sorted(
            (int(path.parent.name) + 1, np.asarray(Image.open(path)).tobytes())
            for path in (tmp_path / "digits" / split).glob("*/*.png")
        )
        pixels = (values * 255).round().byte().numpy()
        assert sorted((int(y), p.tobytes()) for y, p in zip(labels, pixels, strict=True)) == written


def test_scenes_are_the_same_ones_at_every_call() -> None:
    first, again, held_out = scenes(4, 64, True), scenes(4, 64, True), scenes(4, 64, False)
    assert all(map(torch.equal, first.tensors, again.tensors))
    assert not torch.equal(first.tensors[1], held_out.tensors[1])


def test_mean_iou_is_that_of_the_definition() -> None:
    rng = np.random.default_rng(0)
    predicted, mask = rng.integers(0, 4, (2, 3, 8, 8))
    ious = []
    for c in range(len(CLASSES)):  # most of them are in neither, and count as none
        union = ((predicted == c) | (mask == c)).sum()
        ious.append(((predicted == c) & (mask == c)).sum() / union if union else 0)
    expected = pytest.approx(np.mean(ious))
    assert example.mean_iou(torch.from_numpy(predicted), torch.from_numpy(mask)) == expected


@pytest.mark.parametrize("name", MODELS)
def test_encoder_is_taken_from_a_classifier_of_another_size(name: str, tmp_path: Path) -> None:
    trained = timm.create_model(name, num_classes=10).eval()
    torch.save({"state_dict": trained.state_dict(), "arch": name}, tmp_path / "last.pth.tar")
    model = example.Segmenter(name, 64, tmp_path / "last.pth.tar").eval()
    trained.set_input_size(64)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = trained.forward_intermediates(x, indices=model.encoder.out_indices, intermediates_only=True)
        for got, features in zip(model.encoder(x), expected, strict=True):
            torch.testing.assert_close(got, features)
        assert model(x).shape == (2, len(CLASSES), 64, 64)


@pytest.mark.parametrize("name", MODELS)
def test_segmentation_learns_a_few_scenes(name: str) -> None:
    torch.manual_seed(0)
    model, few = example.Segmenter(name, 32), scenes(16, 32, training=True)
    background = example.mean_iou(torch.zeros_like(few.tensors[1]), few.tensors[1])
    example.train(model, few, 12, 3e-3)
    assert example.mean_iou(example.predict(model, few.tensors[0]), few.tensors[1]) > 2 * background
    assert all(p.grad is not None for p in model.parameters())


def test_what_the_command_leaves(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    argv = ["--scenes", "8", "--epochs", "1", "--img-size", "32", "--output", str(tmp_path / "a" / "b")]
    assert vip.cli.run("segmentation", example.main, argv) == 0
    out = capsys.readouterr().out
    assert "mIoU of vip_nano4_32: " in out and "of background everywhere: " in out
    model = example.Segmenter("vip_nano4_32", 32)
    model.load_state_dict(torch.load(tmp_path / "a" / "b" / "model.pth.tar")["state_dict"])
    assert Image.open(tmp_path / "a" / "b" / "predictions.png").size == (12 * 64, 3 * 64)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--model", "vip_nano4_23"], ["vip_nano4_23", "vip_nano4_32"]),
        (["--img-size", "36"], ["36", "32 and 40"]),
        (["--checkpoint", "nowhere"], ["no checkpoint at nowhere"]),
        (["--checkpoint", "vit"], ["vit", "do not fit vip_nano4_32"]),
        (["--img-size", "16"], ["16", "32"]),
        (["--scenes", "4"], ["--scenes", "8"]),
        (["--epochs", "0"], ["--epochs"]),
    ],
    ids=str,
)
def test_mistakes_are_one_line(
    argv: list[str], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(timm.create_model("lvvit_nano4_32").state_dict(), "vit")
    assert vip.cli.run("segmentation", example.main, [*argv, "--output", "out"]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and all(word in error for word in words), error
    assert not (tmp_path / "out").exists()
