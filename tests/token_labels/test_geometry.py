"""Tracked transforms of timm on an image whose colours are the coordinates of its pixels.

What red and green say of a pixel of the result is where it comes from; without blue it is fill.
"""

import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import binary_erosion
from timm.data import create_transform
from timm.data.auto_augment import NAME_TO_OP, AugmentOp, AutoAugment, RandAugment
from timm.data.transforms import MaybePILToTensor, RandomResizedCropAndInterpolation
from torchvision import transforms

from vip.errors import UserError
from vip.token_labels.geometry import (
    Move,
    Region,
    TrackedTransform,
    compose,
    crop_matrix,
    published_box,
    shown_share,
)

GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY", "TranslateXRel", "TranslateYRel")
COLOUR_OPS = {
    *("AutoContrast", "Equalize", "Invert", "Posterize", "PosterizeIncreasing", "PosterizeOriginal", "Solarize"),
    *("SolarizeIncreasing", "SolarizeAdd", "Color", "ColorIncreasing", "Contrast", "ContrastIncreasing", "Brightness"),
    *("BrightnessIncreasing", "Sharpness", "SharpnessIncreasing", "Desaturate", "GaussianBlur", "GaussianBlurRand"),
}
SIZES = [(320, 200), (200, 320), (256, 256), (500, 130)]  # width and height
OUTPUT = (3, 224, 160)
BLACK = (0.0, 0.0, 0.0)  # the mean, which timm's policies fill with


def coordinate_image(width: int, height: int) -> Image.Image:
    """Red is x and green is y, from 20 to 220 so that nothing saturates; blue is full."""
    y, x = np.mgrid[:height, :width]
    pixels = [20 + 200 * (x + 0.5) / width, 20 + 200 * (y + 0.5) / height, np.full((height, width), 255)]
    return Image.fromarray(np.stack(pixels, -1).round().astype(np.uint8))


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def augmentation(**options: Any) -> Any:
    """timm's training transform without what changes colours."""
    transform = create_transform(
        OUTPUT,
        is_training=True,
        **{"vflip": 0.5, "color_jitter": None, "interpolation": "bilinear", "mean": BLACK, "use_prefetcher": True}
        | options,
    )
    for step in getattr(transform, "transforms", ()):
        if isinstance(step, RandAugment):
            step.ops = [op for op in step.ops if op.name in GEOMETRIC]
            step.choice_weights = None
        if isinstance(step, AutoAugment):
            step.policy = [[op for op in ops if op.name in GEOMETRIC] for ops in step.policy]
    return transform


def single(name: str, magnitude: float, **hparams: Any) -> Any:
    """One operation of timm alone."""
    op = AugmentOp(name, prob=1.0, magnitude=magnitude, hparams=dict(img_mean=(0, 0, 0), **hparams))
    return transforms.Compose([RandAugment([op], num_layers=1), MaybePILToTensor()])


def misplaced(pixels: torch.Tensor, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far, in shares of the image's sides, pixels come from elsewhere than a matrix says: `[2, N]`.

    The second result is whether a pixel is part of the image, `[H, W]`. The first leaves out what interpolation mixes
    with fill.
    """
    red, green, blue = pixels.numpy().astype(np.float64)
    shown = blue > 127
    inside = binary_erosion(blue > 250, iterations=3, border_value=1)
    v, u = np.indices(inside.shape) + 0.5
    places = np.stack([u / u.shape[1], v / v.shape[0], np.ones_like(u)])[:, inside]
    return (matrix @ places)[:2] - (np.stack([red, green])[:, inside] - 20) / 200, shown


def share_of(inside: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    return inside.reshape(grid[0], inside.shape[0] // grid[0], grid[1], -1).mean((1, 3))


def assert_tracked(
    pixels: torch.Tensor, moves: list[Move], grid: tuple[int, int], tolerance: float, share_tolerance: float
) -> None:
    """All but a percent of the pixels are from where the moves say."""
    error, shown = misplaced(pixels, compose(moves))
    assert error.size and np.quantile(np.abs(error), 0.99) < tolerance
    difference = shown_share(moves, grid, points=8) - share_of(shown, grid)
    assert np.abs(difference).max() < share_tolerance
    assert abs(difference.mean()) < share_tolerance / 10


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("policy", ["rand-n3-m9-mstd0.5-inc1", "rand-m9-mstd0.5-inc1-tweights", "original", "v0", "3a"])
def test_every_pixel_comes_from_where_the_moves_say(policy: str, size: tuple[int, int]) -> None:
    """Crop, flips and up to three rotations, shears and shifts one after the other, in all interpolations."""
    image = coordinate_image(*size)
    for seed in range(12):
        seed_everything(seed)
        interpolation = ("bilinear", "bicubic", "random")[seed % 3]
        tracked = TrackedTransform(augmentation(auto_augment=policy, interpolation=interpolation))
        assert_tracked(*tracked(image), grid=(28, 20), tolerance=0.018, share_tolerance=0.15)


@pytest.mark.parametrize("magnitude", [3, 10])
@pytest.mark.parametrize("name", GEOMETRIC)
def test_single_operations(name: str, magnitude: float) -> None:
    """To a part of a pixel: half of one would be 0.0125 of the width and 0.0208 of the height.

    Pillow rounds the colours that it interpolates down, which is 0.0025 on the average.
    """
    image = coordinate_image(40, 24)
    signs = set()
    for seed in range(8):
        seed_everything(seed)
        pixels, moves = TrackedTransform(single(name, magnitude, translate_const=15))(image)
        assert [kind for kind, _ in moves] == ["augment"]
        assert_tracked(pixels, moves, grid=(6, 10), tolerance=0.0105, share_tolerance=0.22)
        error, _ = misplaced(pixels, compose(moves))
        assert np.abs(error.mean(1)).max() < 0.005
        signs.add(np.sign((moves[0].matrix - np.diag(np.diag(moves[0].matrix))).ravel()[:6]).tobytes())
    assert len(signs) == 2, "the amount has either sign"


@pytest.mark.parametrize("size", SIZES)
def test_crops_are_exact(size: tuple[int, int]) -> None:
    """The crop that timm draws under the same seed, in shares of the image."""
    width, height = size
    tracked = TrackedTransform(augmentation(hflip=0, vflip=0))
    for seed in range(20):
        seed_everything(seed)
        image = coordinate_image(*size)
        top, left, rows, columns = RandomResizedCropAndInterpolation.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3))
        seed_everything(seed)
        pixels, moves = tracked(image)
        expected = np.array([[columns / width, 0, left / width], [0, rows / height, top / height], [0, 0, 1]])
        np.testing.assert_array_equal(compose(moves), expected)
        error, inside = misplaced(pixels, expected)
        assert inside.all() and np.abs(error).max() < 0.012  # at the edges a resize repeats pixels
        assert (shown_share(moves, (14, 14)) == 1).all()


def test_flips_are_exact() -> None:
    tracked = TrackedTransform(augmentation(scale=(1, 1), ratio=(1.6, 1.6), hflip=1.0, vflip=1.0))
    pixels, moves = tracked(coordinate_image(320, 200))
    assert [kind for kind, _ in moves] == ["crop", "flip", "flip"]
    np.testing.assert_array_equal(compose(moves), [[-1, 0, 1], [0, -1, 1], [0, 0, 1]])
    assert np.abs(misplaced(pixels, compose(moves))[0]).max() < 0.01


def test_the_published_code_exchanges_the_axes_of_the_crop_and_sees_flips_alone() -> None:
    flip = Move("flip", crop_matrix(1, 0, -1, 1))
    turn = Move("augment", np.array([[0.0, -1, 1], [1, 0, 0], [0, 0, 1]]))
    moves = [Move("crop", crop_matrix(left=0.1, top=0.2, width=0.3, height=0.5)), flip, turn]
    np.testing.assert_allclose(published_box(moves), crop_matrix(left=0.2 + 0.5, top=0.1, width=-0.5, height=0.3))


def test_no_augmentation_keeps_the_whole_image() -> None:
    image = coordinate_image(320, 200)
    pixels, moves = TrackedTransform(augmentation(no_aug=True))(image)
    assert moves == []
    assert_tracked(pixels, moves, grid=(14, 10), tolerance=0.005, share_tolerance=1e-9)
    np.testing.assert_array_equal(compose(moves), np.eye(3))


def test_shown_share_looks_at_every_step() -> None:
    """What one shift pushes out and another brings back is fill."""
    there, back = (Move("augment", crop_matrix(x, 0, 1, 1)) for x in (0.5, -0.5))
    np.testing.assert_array_equal(shown_share([there, back], (2, 4)), [[0, 0, 1, 1]] * 2)
    np.testing.assert_array_equal(shown_share([there], (2, 4)), [[1, 1, 0, 0]] * 2)
    np.testing.assert_array_equal(shown_share([], (2, 4)), np.ones((2, 4)))


# ---- evaluation transforms


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("img_size, crop_pct", [((192, 192), 1.0), ((192, 192), 0.8), ((224, 160), 0.9)])
def test_regions_are_what_the_evaluation_transform_shows(
    size: tuple[int, int], crop_mode: str, img_size: tuple[int, int], crop_pct: float
) -> None:
    transform = create_transform(
        (3, *img_size),
        is_training=False,
        crop_pct=crop_pct,
        crop_mode=crop_mode,
        interpolation="bicubic",
        mean=BLACK,
        use_prefetcher=True,
    )
    matrix = Region(img_size, crop_pct, crop_mode).matrix(*size)
    pixels = torch.as_tensor(transform(coordinate_image(*size)))
    error, inside = misplaced(pixels, matrix)
    # timm rounds the resized image and the crop's offset to pixels
    slack = 1.5 / min(img_size) * np.abs(matrix[:2, :2]).sum(1, keepdims=True).clip(1)
    assert (np.quantile(np.abs(error), 0.99, axis=1, keepdims=True) < slack).all()
    grid = (16, 16)
    assert np.abs(shown_share([Move("crop", matrix)], grid, points=8) - share_of(inside, grid)).max() < 0.3
    assert inside.all() or crop_mode == "border"


def test_region_of_the_square_in_the_middle() -> None:
    np.testing.assert_allclose(Region((1, 1)).matrix(400, 200), crop_matrix(0.25, 0, 0.5, 1))
    np.testing.assert_allclose(Region((1, 1), crop_mode="squash").matrix(400, 200), np.eye(3))
    np.testing.assert_allclose(Region((1, 1), crop_mode="border").matrix(400, 200), crop_matrix(0, -0.5, 1, 2))


# ---- which transforms can be tracked


@pytest.mark.parametrize(
    "options", [{"train_crop_mode": "rkrc"}, {"train_crop_mode": "rkrr"}, {"auto_augment": "augmix-m5-w4-d2"}]
)
def test_untrackable_transforms_are_refused(options: dict[str, str]) -> None:
    with pytest.raises(UserError, match="Token labels cannot follow .*--train-crop-mode and --aa augmix"):
        TrackedTransform(augmentation(**options))


def test_every_operation_of_timm_is_known() -> None:
    """An operation that a later timm adds may move pixels: it has to be looked at."""
    assert set(NAME_TO_OP) == COLOUR_OPS | set(GEOMETRIC)


@pytest.mark.parametrize("name", sorted(COLOUR_OPS))
def test_colours_do_not_move_anything(name: str) -> None:
    """A spot in the middle of an image stays there, whatever its colour becomes."""
    pixels = np.full((61, 61, 3), (90, 160, 60), dtype=np.uint8)
    pixels[25:36, 25:36] = (200, 100, 240)
    seed_everything(0)
    result, moves = TrackedTransform(single(name, 6))(Image.fromarray(pixels))
    assert moves == []
    for flipped in (result.flip(1), result.flip(2), result.transpose(1, 2)):
        assert (flipped.int() - result.int()).abs().max() <= 1
    assert result[:, :20].flatten(1).unique(dim=1).shape[1] == 1


def test_steps_for_colours_leave_the_crop_alone() -> None:
    tracked = TrackedTransform(
        create_transform(
            OUTPUT,
            is_training=True,
            color_jitter=0.4,
            color_jitter_prob=0.9,
            grayscale_prob=0.9,
            gaussian_blur_prob=0.9,
            re_prob=1.0,
            hflip=0,
        )
    )
    pixels, moves = tracked(coordinate_image(320, 200))
    assert [kind for kind, _ in moves] == ["crop"]
    assert pixels.shape == OUTPUT and pixels.is_floating_point()


TRANSFORMS: dict[str, Callable[[], Any]] = {
    "rand": lambda: create_transform(OUTPUT, is_training=True, auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.5),
    "original": lambda: create_transform(OUTPUT, is_training=True, auto_augment="original", interpolation="random"),
    "3a": lambda: create_transform(OUTPUT, is_training=True, auto_augment="3a", vflip=0.5, use_prefetcher=True),
    "jitter": lambda: create_transform(OUTPUT, is_training=True, color_jitter=0.4, gaussian_blur_prob=0.5),
    "no-aug": lambda: create_transform(OUTPUT, is_training=True, no_aug=True),
}


def views(transform: Callable[[Image.Image], Any], count: int = 15) -> list[Any]:
    image = coordinate_image(200, 130)
    made = []
    for seed in range(count):
        seed_everything(seed)
        made.append(transform(image))
    return made


@pytest.mark.parametrize("create", TRANSFORMS.values(), ids=list(TRANSFORMS))
def test_tracking_does_not_change_the_images(create: Callable[[], Any]) -> None:
    """The same pixels as timm's own transform makes of the same random numbers."""
    tracked = TrackedTransform(create())
    for ours, theirs in zip(views(lambda image: tracked(image)[0]), views(create()), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_copies_in_loader_processes_track_on_their_own() -> None:
    """A loader's processes that do not fork get the transform pickled."""
    tracked = TrackedTransform(TRANSFORMS["rand"]())
    expected = views(tracked)
    copy = pickle.loads(pickle.dumps(tracked))
    for (image, moves), (other_image, other_moves) in zip(views(copy), expected, strict=True):
        np.testing.assert_array_equal(image, other_image)
        np.testing.assert_array_equal(compose(moves), compose(other_moves))
    assert len({len(moves) for _, moves in expected}) > 1
