"""The operations of `--fast-images` against Pillow's, on images of any size."""

import copy
import random
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis.extra import numpy as arrays
from PIL import Image
from timm.data.auto_augment import LEVEL_TO_ARG, AugmentOp, RandAugment
from torchvision.transforms import Compose
from torchvision.transforms.functional import pil_to_tensor

from vip.data.fast_images import accelerate
from vip.data.fast_ops import to_pillow
from vip.data.moves import MOVES

# Of which the levels are rounded in another way, by one at most.
NEARLY = ("Contrast", "Color", "Sharpness", "Desaturate")


def images() -> st.SearchStrategy[torch.Tensor]:
    """Gray and color images: noise, few levels, and one."""
    shapes = st.tuples(st.sampled_from((1, 3)), st.integers(1, 12), st.integers(1, 12))
    levels = st.sampled_from(((0, 255), (77, 77), (100, 103))).flatmap(lambda ends: st.integers(*ends))
    noise = st.builds(
        lambda shape, seed: np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8),
        shapes,
        st.integers(0, 99),
    )
    return (noise | arrays.arrays(np.uint8, shapes, elements=levels)).map(torch.from_numpy)


def both(name: str, magnitude: float, image: torch.Tensor, seed: int, **hparams: Any) -> tuple[np.ndarray, np.ndarray]:
    """What timm's operation and the fast one make of an image, with the same random numbers."""
    op = AugmentOp(name, prob=1.0, magnitude=magnitude, hparams=dict(magnitude_max=30) | hparams)
    fast = accelerate(Compose([RandAugment([copy.copy(op)], num_layers=1)]))
    before = image.clone()
    random.seed(seed)
    expected, state = pil_to_tensor(op(to_pillow(image))), random.getstate()
    random.seed(seed)
    made = fast(image)
    assert random.getstate() == state, "as many random numbers were drawn"
    assert made.dtype == torch.uint8 and made.shape == image.shape
    assert torch.equal(image, before), "not in place"
    return expected.numpy().astype(int), made.numpy().astype(int)


@pytest.mark.parametrize("name", sorted(LEVEL_TO_ARG.keys() - MOVES.keys()))
@given(image=images(), magnitude=st.floats(0, 10), seed=st.integers(0, 99))
@settings(max_examples=60)
def test_colors_are_those_of_pillow(name: str, image: torch.Tensor, magnitude: float, seed: int) -> None:
    expected, made = both(name, magnitude, image, seed)
    assert abs(made - expected).max() <= name.startswith(NEARLY)


def photograph(width: int, height: int, mode: str) -> torch.Tensor:
    """Smooth shapes, where filters of one kind agree."""
    rng = np.random.default_rng(width * height)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 10, width // 10, 3), dtype=np.uint8))
    return pil_to_tensor(coarse.resize((width, height), Image.Resampling.BICUBIC).convert(mode))


@pytest.mark.parametrize("magnitude", [0.0, 0.8, 4.4, 9.0])
@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize("interpolation", ["NEAREST", "BILINEAR", "BICUBIC", "random"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_moves_are_those_of_pillow(name: str, magnitude: float, interpolation: str, mode: str) -> None:
    options: Any = {} if interpolation == "random" else {"interpolation": Image.Resampling[interpolation]}
    fill: Any = (124, 116, 104) if mode == "RGB" else 124
    for seed in range(4):
        expected, moved = both(
            name, magnitude, photograph(160, 120, mode), seed, img_mean=fill, translate_const=50, **options
        )
        difference = abs(moved - expected)
        assert difference.mean() < 1, "of 256"
        assert (difference > 16).mean() < 0.02, "along the edges, which are blended with what fills up"


@pytest.mark.parametrize("name", [name for name in MOVES if name.startswith("Translate")])
@given(image=images(), magnitude=st.floats(0, 30), seed=st.integers(0, 3))
@settings(max_examples=60)
def test_bicubic_shifts_are_those_of_pillow(name: str, image: torch.Tensor, magnitude: float, seed: int) -> None:
    fill: Any = (124, 116, 104) if len(image) == 3 else 124
    options: Any = dict(img_mean=fill, interpolation=Image.Resampling.BICUBIC, translate_const=10)
    expected, moved = both(name, magnitude, image, seed, **options)
    assert abs(moved - expected).max() <= 1


@pytest.mark.parametrize("name", MOVES)
@given(image=images(), magnitude=st.floats(0, 30), seed=st.integers(0, 3))
@settings(max_examples=30)
def test_small_images_are_moved_too(name: str, image: torch.Tensor, magnitude: float, seed: int) -> None:
    flat = torch.full_like(image, 77)
    fill: Any = (77, 77, 77) if len(image) == 3 else 77
    _, moved = both(name, magnitude, flat, seed, img_mean=fill, translate_const=10)
    assert abs(moved - 77).max() <= 1
