import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import AugmentOp

from vip.data.augmentation import create_train_transform
from vip.errors import UserError
from vip.training.config import TrainConfig

DATA_CONFIG = dict(input_size=(3, 32, 32), interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.fixture
def photograph() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8))


@pytest.fixture(autouse=True)
def seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def posterized(image: Image.Image, name: str, magnitude: float) -> np.ndarray:
    return np.asarray(AugmentOp(name, prob=1.0, magnitude=magnitude)(image))


@pytest.mark.parametrize("magnitude, bits", [(0, 4), (3, 3), (5, 2), (8, 1), (10, 0)])
def test_posterize_increasing_keeps_fewer_bits_down_to_none(
    photograph: Image.Image, magnitude: float, bits: int
) -> None:
    """timm's PosterizeIncreasing keeps 4 - int(magnitude / 10 * 4) bits; 0 bits are black."""
    expected = np.asarray(photograph) & (0xFF << (8 - bits) & 0xFF)
    np.testing.assert_array_equal(posterized(photograph, "PosterizeIncreasing", magnitude), expected)


def test_posterize_original_keeps_4_to_8_bits(photograph: Image.Image) -> None:
    for magnitude, bits in ((0, 4), (5, 6), (10, 8)):
        expected = np.asarray(photograph) & (0xFF << (8 - bits) & 0xFF)
        np.testing.assert_array_equal(posterized(photograph, "PosterizeOriginal", magnitude), expected)


def test_posterize_increasing_works_at_every_random_magnitude(photograph: Image.Image) -> None:
    op = AugmentOp("PosterizeIncreasing", prob=1.0, magnitude=9, hparams=dict(magnitude_std=5))
    seen = {len(np.unique(np.asarray(op(photograph)))) for _ in range(300)}
    assert seen == {1, 2, 4, 8, 16}  # shades left by 0 to 4 bits


POLICIES = ("rand-m9-mstd0.5-inc1", "rand-m10-n4-inc1", "original", "originalr", "v0", "3a", "augmix-m9-w3-d2")


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_work_under_the_installed_pillow(policy: str, photograph: Image.Image) -> None:
    transform = create_train_transform(TrainConfig(aa=policy), DATA_CONFIG)
    views = [transform(photograph) for _ in range(60)]
    assert {(view.shape, view.dtype) for view in views} == {((3, 32, 32), torch.uint8)}
    assert len({view.numpy().tobytes() for view in views}) > 50


@pytest.mark.parametrize("policy", ["foo", "rand-zz9", "rand-m9-foo1", "augmix-foo9"])
def test_unknown_policy(policy: str) -> None:
    with pytest.raises(UserError, match=rf"--aa {policy} is no augmentation policy.*rand-m9-mstd0.5-inc1") as error:
        create_train_transform(TrainConfig(aa=policy), DATA_CONFIG)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("policy", [None, "", "none"])
def test_no_policy_leaves_colours_alone(policy: str | None, photograph: Image.Image) -> None:
    config = TrainConfig(aa=policy, scale=[1, 1], ratio=[1.2, 1.2], color_jitter=0.0, hflip=0.0, vflip=0.0)
    data_config = {**DATA_CONFIG, "input_size": (3, 40, 48)}
    np.testing.assert_array_equal(
        create_train_transform(config, data_config)(photograph), np.asarray(photograph).transpose(2, 0, 1)
    )


def test_options_reach_the_transform(photograph: Image.Image) -> None:
    """A vertical flip of the whole image in gray, nothing else."""
    config = TrainConfig(aa="none", scale=[1, 1], ratio=[1.2, 1.2], hflip=0.0, vflip=1.0, grayscale_prob=1.0)
    config.color_jitter = 0.0
    view = create_train_transform(config, {**DATA_CONFIG, "input_size": (3, 40, 48)})(photograph)
    luma = np.asarray(photograph)[::-1] @ np.array([0.299, 0.587, 0.114])
    assert np.abs(view.numpy() - luma).max() <= 1


def test_no_aug_is_the_same_every_time(photograph: Image.Image) -> None:
    transform = create_train_transform(TrainConfig(no_aug=True), DATA_CONFIG)
    assert len({transform(photograph).numpy().tobytes() for _ in range(20)}) == 1
