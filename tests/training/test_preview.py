"""The preview of a training against what the training itself feeds to its model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from map_files import write_maps
from PIL import Image
from training_command import QUICK

from vip.cli.arguments import parse
from vip.errors import UserError
from vip.token_labels.targets import TokenLabels
from vip.training.config import TrainConfig
from vip.training.preview import Preview, preview
from vip.training.runtime import Runtime
from vip.training.trainer import Trainer

TOKENS = ("--token-label", "--mix-token", "0")
COLOURS = {"blue": 2, "green": 1, "red": 0}  # channel in which a class is brightest


def config_of(folder: Path, *flags: object) -> TrainConfig:
    return parse(TrainConfig, [str(flag) for flag in (folder, *QUICK, *flags)], "vip train")[0]


def fed_to_the_model(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, Any]]:
    """The batches of the first epoch as the training step gets them."""
    batches: list[tuple[torch.Tensor, Any]] = []

    def note(state: Any, config: Any, images: torch.Tensor, target: Any, share: float, update: bool) -> torch.Tensor:
        batches.append((images.clone(), target))
        return torch.zeros(())

    monkeypatch.setattr("vip.training.engine.train_step", note)
    trainer = Trainer(config, Runtime(torch.device("cpu")))
    trainer._train_epoch(0, None)
    return batches


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB"), dtype=int).transpose(2, 0, 1)


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--no-prefetcher",),
        ("--mixup", 0, "--cutmix", 0),
        ("--mixup-mode", "elem", "--fast-images", "--smoothing", 0.3),
        ("--aug-repeats", 3, "--mixup", 0),
        (*TOKENS, "--mixup", 0.8, "--cutmix", 1),
    ],
)
def test_what_is_shown_is_what_is_trained_on(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[object, ...]
) -> None:
    config = config_of(image_folder, "--seed", 7, *flags)
    fed = fed_to_the_model(config, monkeypatch)
    images = torch.cat([images for images, _ in fed])[:20]
    shown = preview(config, 20)
    assert len(fed) == 3 and len(shown.pictures) == len(shown.shares) == len(images) == 20
    expected = np.clip((images.numpy() * IMAGENET_STD + IMAGENET_MEAN) * 255, 0, 255)
    found = np.stack([pixels(picture) for picture in shown.pictures])
    assert np.abs(found - expected).max() <= 0.51
    assert shown.class_to_idx == {"blue": 0, "green": 1, "red": 2}
    if not config.token_label:
        for share, target in zip(shown.shares, torch.cat([target for _, target in fed]), strict=False):
            hard = target if target.ndim else F.one_hot(target, 3)
            smooth = config.smoothing if target.ndim else 0
            torch.testing.assert_close(share * (1 - smooth) + smooth / 3 * bool(smooth), hard.float())


IMAGENET_MEAN = np.array([0.485, 0.456, 0.406]).reshape(3, 1, 1)
IMAGENET_STD = np.array([0.229, 0.224, 0.225]).reshape(3, 1, 1)


def test_shares_are_those_of_the_pixels(image_folder: Path) -> None:
    """Noisy images of one colour a class: the share of a class is that of its colour, by mixup as by CutMix."""
    flags = ("--no-aug", "--smoothing", 0.1, "--mixup-prob", 1)
    for mixing in (("--mixup", 1, "--cutmix", 0), ("--mixup", 0, "--cutmix", 1)):
        shown = preview(config_of(image_folder, *flags, *mixing), 24)
        palette = np.array([(30, 60, 200), (40, 180, 50), (210, 40, 30)])
        for picture, share in zip(shown.pictures, shown.shares.numpy(), strict=True):
            assert share.sum() == pytest.approx(1, abs=1e-5) and share.min() > -1e-5
            np.testing.assert_allclose(pixels(picture).mean((1, 2)), share @ palette, atol=6)
        assert ((shown.shares > 0.1).sum(1) == 2).any()


def test_tokens_are_those_of_their_pixels(image_folder: Path) -> None:
    """Without maps a token has the classes of its own pixels, which the colours tell."""
    shown = preview(config_of(image_folder, *TOKENS, "--no-aug", "--cutmix", 1), 24)
    assert shown.tokens is not None and shown.tokens.shape == (24, 4, 4, 3)
    palette = np.array([(30, 60, 200), (40, 180, 50), (210, 40, 30)])
    means = np.stack([pixels(p).reshape(3, 4, 8, 4, 8).mean((2, 4)) for p in shown.pictures])
    np.testing.assert_allclose(means.transpose(0, 2, 3, 1), shown.tokens.numpy() @ palette, atol=12)
    mixed = (shown.tokens.amax((1, 2)) > 0.9).sum(1) == 2
    assert mixed.any(), "no image has tokens of two classes"


def test_label_maps(image_folder: Path, tmp_path: Path) -> None:
    """A map of one cell a token, read without augmentation, comes out as its own softmax."""
    keys = [f"{name}/{name}{i}" for name in COLOURS for i in range(12)]
    maps = write_maps(tmp_path / "maps", keys, classes=3, shape=(3, 4, 4))
    flags = (*TOKENS, "--token-label-data", tmp_path / "maps", "--no-aug")
    shown = preview(config_of(image_folder, *flags), 8)
    assert shown.tokens is not None
    candidates = {}
    for key, label_map in maps.items():
        dense = torch.zeros(3, 4, 4).scatter_add_(0, label_map.indices.long(), label_map.values.float())
        candidates[key] = dense.softmax(0).permute(1, 2, 0)
    for tokens, share in zip(shown.tokens, shown.shares, strict=True):
        fits = [key for key, target in candidates.items() if torch.allclose(tokens, target, atol=2e-3)]
        assert len(fits) == 1 and fits[0].startswith(("blue", "green", "red")[int(share.argmax())])


def test_augmentation_splits_lie_side_by_side(image_folder: Path) -> None:
    flags = ("--mixup", 0, "--cutmix", 0, "--aug-splits", 3, "--reprob", 0)
    plain = preview(config_of(image_folder, *flags[:4], "--reprob", 0, "--aa", "none", "--color-jitter", 0), 4)
    shown = preview(config_of(image_folder, *flags), 12)
    for first in range(0, 12, 3):
        assert len({int(share.argmax()) for share in shown.shares[first : first + 3]}) == 1
    assert [int(s.argmax()) for s in shown.shares[::3]] == [int(s.argmax()) for s in plain.shares]


def test_grayscale_and_other_modes(image_folder: Path) -> None:
    quiet = ("--no-aug", "--mixup", 0, "--cutmix", 0)
    colour = preview(config_of(image_folder, *quiet), 6)
    gray = preview(config_of(image_folder, *quiet, "--in-chans", 1), 6)
    luma = preview(config_of(image_folder, *quiet, "--input-img-mode", "YCbCr"), 6)
    for a, b, c in zip(colour.pictures, gray.pictures, luma.pictures, strict=True):
        assert np.abs(np.asarray(a.convert("L"), int) - np.asarray(b.convert("L"), int)).max() <= 2
        assert np.abs(pixels(a) - pixels(c)).mean() < 2


def test_weights_are_not_looked_for(image_folder: Path, tmp_path: Path) -> None:
    plain = preview(config_of(image_folder), 4)
    for flags in (("--pretrained",), ("--finetune", tmp_path / "a"), ("--resume", tmp_path / "b")):
        assert same(preview(config_of(image_folder, *flags), 4), plain)


def same(a: Preview, b: Preview) -> bool:
    pairs = zip(a.pictures, b.pictures, strict=True)
    return all((pixels(p) == pixels(q)).all() for p, q in pairs) and a.shares.equal(b.shares)


def test_fewer_images_than_asked_for(image_folder: Path) -> None:
    assert len(preview(config_of(image_folder), 100).pictures) == 36


def test_what_training_refuses(image_folder: Path, tmp_path: Path) -> None:
    for flags, words in (
        (("--aug-splits", 2), "--aug-splits"),
        (("--token-label-data", tmp_path), "add --token-label"),
        (("--aa", "nonsense"), "--aa nonsense"),
    ):
        with pytest.raises(UserError, match=words):
            preview(config_of(image_folder, *flags), 4)


def test_labels_of_the_task(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the token labels' task is given is what the preview has made its targets of."""
    config = config_of(image_folder, *TOKENS, "--cutmix", 1)
    (_, first), *_ = fed_to_the_model(config, monkeypatch)
    assert isinstance(first, TokenLabels)
    torch.testing.assert_close(preview(config, 12).shares.argmax(1)[first.own > 0.5], first.target[first.own > 0.5])
