"""Heat maps against sums over tokens, timm's transforms and matplotlib."""

import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform

import vip  # noqa: F401  registers the models
from vip.errors import UserError
from vip.prediction.heatmaps import Heatmap, TokenActivation, colors, name_pictures

CONFIG = {"input_size": (3, 64, 64), "mean": (0.3, 0.5, 0.2), "std": (0.4, 0.2, 0.3)}


def random_model(name: str, **options: object) -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **options).eval()
    torch.nn.init.normal_(model.get_classifier().weight, std=0.5)
    torch.nn.init.normal_(model.get_classifier().bias)
    return model


@pytest.fixture
def batch() -> torch.Tensor:
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "name, options",
    [
        ("vip_nano4_32", {"img_size": 64}),
        ("resnet10t", {}),
        ("gmlp_ti16_224", {"img_size": 64}),
        ("vit_tiny_patch16_224", {"img_size": 64, "global_pool": "avg", "fc_norm": False}),
    ],
)
def test_tokens_take_the_logit_apart(name: str, options: dict[str, object], batch: torch.Tensor) -> None:
    model = random_model(name, **options)
    with torch.no_grad():
        logits = model(batch)
    for index in range(7):
        maps = TokenActivation(model, CONFIG)(batch, torch.full((3,), index))
        assert [heatmap.class_index for heatmap in maps] == [index] * 3
        means = [heatmap.activation.mean(dtype=np.float64) for heatmap in maps]
        np.testing.assert_allclose(means, logits[:, index], rtol=1e-4, atol=1e-4)
        assert all(heatmap.activation.size > 1 and heatmap.activation.std() > 1e-3 for heatmap in maps)


def test_each_token_of_a_permutator(batch: torch.Tensor) -> None:
    model = random_model("vip_nano4_32", img_size=64)
    with torch.no_grad():
        tokens = model.forward_features(batch).double().numpy()
    weight, bias = (p.detach().double().numpy() for p in (model.head.weight, model.head.bias))
    wanted = [2, 0, 6]
    for image, heatmap in enumerate(TokenActivation(model, CONFIG)(batch, torch.tensor(wanted))):
        height, width = heatmap.activation.shape
        for y in range(height):
            for x in range(width):
                logit = sum(weight[wanted[image]] * tokens[image, y, x]) + bias[wanted[image]]
                assert heatmap.activation[y, x] == pytest.approx(logit, rel=1e-4, abs=1e-4)


def test_rows_and_columns_are_those_of_the_image() -> None:
    model = random_model("resnet10t")
    batch = torch.zeros(2, 3, 64, 64)
    quiet, loud = torch.zeros_like(batch), torch.zeros_like(batch)
    loud[0, :, :16, 48:] = 5  # top right
    loud[1, :, 48:, :16] = 5  # bottom left
    before, after = (
        TokenActivation(model, CONFIG)(images, torch.zeros(2, dtype=torch.long)) for images in (quiet, loud)
    )
    moved = [abs(b.activation - a.activation) for b, a in zip(before, after, strict=True)]
    assert np.unravel_index(moved[0].argmax(), moved[0].shape) == (0, 1)
    assert np.unravel_index(moved[1].argmax(), moved[1].shape) == (1, 0)


def test_an_auxiliary_head_is_asked(batch: torch.Tensor) -> None:
    model = random_model("lvvit_nano4_32", img_size=64)
    torch.nn.init.normal_(model.aux_head.weight, std=0.5)
    with torch.no_grad():
        _, dense = model.forward_dense(batch)
    for index in range(7):
        for image, heatmap in enumerate(TokenActivation(model, CONFIG)(batch, torch.full((3,), index))):
            np.testing.assert_allclose(heatmap.activation, dense[image, :, :, index], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("vit_tiny_patch16_224", {"img_size": 64}, "does not read the mean"),
        ("convnext_atto", {}, "does not read the mean"),
        ("resnet10t", {"global_pool": "max"}, "does not read the mean"),
        ("lvvit_nano4_32", {"img_size": 64, "aux_head": False}, "does not read the mean"),
        ("vit_tiny_patch16_224", {"img_size": (64, 96), "dynamic_img_size": False}, "does not work at 64x64"),
    ],
)
def test_models_whose_tokens_have_no_share(name: str, options: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words) as refused:
        TokenActivation(random_model(name, **options), CONFIG)
    assert "heat maps work for" in str(refused.value) and "vip_*" in str(refused.value)


def test_a_model_without_classes() -> None:
    with pytest.raises(UserError, match="has no classes"):
        TokenActivation(timm.create_model("vip_nano4_32", img_size=64, num_classes=0).eval(), CONFIG)
    broken = timm.create_model("vip_nano4_32", img_size=64, num_classes=10).eval()
    torch.nn.init.constant_(broken.head.bias, float("nan"))
    with pytest.raises(UserError, match="not finite: take another checkpoint"):
        TokenActivation(broken, CONFIG)


# --- pictures


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pixels_are_those_that_the_model_saw(mode: str) -> None:
    channels = len(mode)
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    config = {name: value[:channels] if name != "input_size" else (channels, 64, 64) for name, value in CONFIG.items()}
    normalized = create_transform(**config)(image)[None]
    expected = create_transform(**config, use_prefetcher=True)(image)  # uint8, channels first
    model = random_model("vip_nano4_32", img_size=64, in_chans=channels)
    (heatmap,) = TokenActivation(model, config, mode)(normalized, torch.tensor([0]))
    np.testing.assert_array_equal(heatmap.pixels, np.asarray(expected).transpose(1, 2, 0))
    heatmap.overlay()


def test_colors_are_turbo() -> None:
    values = np.linspace(0, 1, 1000)
    expected = matplotlib.colormaps["turbo"](values)[:, :3] * 255
    assert np.abs(colors(values) - expected).max() <= 8
    assert colors(np.zeros((4, 5))).shape == (4, 5, 3)


@pytest.mark.parametrize("y, x", [(0, 0), (0, 2), (1, 1)])
def test_the_highest_token_is_red_and_the_others_are_blue(y: int, x: int) -> None:
    activation = np.full((2, 3), -3, np.float32)
    activation[y, x] = 5
    overlay = Heatmap(np.full((40, 60, 3), 100, np.uint8), activation, 0).overlay()
    assert overlay.size == (60, 40)
    red, _, blue = np.asarray(overlay, np.int64).reshape(2, 20, 3, 20, 3)[:, 10, :, 10].transpose(2, 0, 1)
    assert np.unravel_index((red - blue).argmax(), (2, 3)) == (y, x)
    assert (red > blue).sum() == 1 and (red < blue).sum() == 5


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "CMYK", "HSV"])
def test_no_opacity_is_the_image_in_gray(mode: str) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)).convert(mode)
    pixels = np.asarray(image).reshape(20, 30, -1)
    overlay = Heatmap(pixels, np.eye(2, dtype=np.float32), 0, mode).overlay(0)
    np.testing.assert_array_equal(np.asarray(overlay), np.asarray(image.convert("L").convert("RGB")))


def test_tokens_that_all_say_the_same() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        overlay = Heatmap(np.zeros((8, 8, 3), np.uint8), np.full((2, 2), 7, np.float32), 0).overlay(1)
    assert (np.asarray(overlay) == colors(np.zeros(1))).all()


# --- files


def test_files_are_named_after_the_images(tmp_path: Path) -> None:
    images = [f"{tmp_path}/{name}" for name in ("a/1.png", "b/1.png", "b/c/2.jpg", "a/1.png")]
    named = name_pictures([*images, f"{tmp_path}/a/../a/1.png"], "maps")
    assert [str(named[image]) for image in images] == ["maps/a/1.png", "maps/b/1.png", "maps/b/c/2.png", "maps/a/1.png"]
    assert named[f"{tmp_path}/a/../a/1.png"] == named[images[0]], "the same file has two"
    assert name_pictures([f"{tmp_path}/only.jpeg"], "maps") == {f"{tmp_path}/only.jpeg": Path("maps/only.png")}


def test_no_two_files_are_named_alike() -> None:
    names = ["x.png", "x.jpg", "X.png", "x-2.png", "x", "x.tar.gz", "y/x.png", "é.png", ".hidden", "-2.png"]
    named = name_pictures(names, "maps")
    targets = [str(path).casefold() for path in named.values()]
    assert list(named) == names and len(set(targets)) == len(names)
    assert all(target.startswith("maps/") and target.endswith(".png") and ".." not in target for target in targets)


def test_no_image_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    for images, folder in (
        (["a.png", "b.png"], tmp_path),
        (["a.jpg"], tmp_path / "link"),  # there may be an a.png
        (["a/b.jpg", "c.jpg"], tmp_path / "x" / ".."),
        (["b.jpg", "a/b.jpg"], tmp_path / "a"),
    ):
        with pytest.raises(UserError, match="would lie among the images: name another folder"):
            name_pictures([f"{tmp_path}/{image}" for image in images], folder)
    assert name_pictures([f"{tmp_path}/a/b.jpg"], tmp_path)
