"""Mixtures of images with dense labels, against timm's mixup and against images of one value each."""

from typing import Any

import numpy as np
import pytest
import torch
from timm.data import Mixup
from timm.data.mixup import rand_bbox

from vip.token_labels.mixing import DenseMixup, draw_mix_tokens
from vip.token_labels.targets import TokenLabels, dense_targets

MODES = ("batch", "pair", "elem")
KINDS: dict[str, dict[str, Any]] = {
    "mixup": dict(mixup_alpha=0.8, cutmix_alpha=0.0),
    "cutmix": dict(mixup_alpha=0.0, cutmix_alpha=1.0),
    "both": dict(mixup_alpha=0.8, cutmix_alpha=1.0, switch_prob=0.5),
    "sometimes": dict(mixup_alpha=0.8, cutmix_alpha=1.0, prob=0.5),
    "minmax": dict(mixup_alpha=0.0, cutmix_minmax=(0.2, 0.8)),
}
GRID = (3, 5)
SIZE = (24, 30)  # 8 x 6 pixels a token


def create(kind: str = "both", mode: str = "batch", **options: Any) -> Mixup:
    return Mixup(**KINDS[kind], mode=mode, num_classes=10, label_smoothing=0.1, **options)


def one_value_each(count: int) -> torch.Tensor:
    """Image number i is i everywhere."""
    return torch.arange(count, dtype=torch.float32).view(-1, 1, 1, 1).repeat(1, 3, *SIZE)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_images_and_class_targets_are_timms(kind: str, mode: str) -> None:
    """The same numbers from the same seed, and as many random numbers drawn."""
    for seed in range(8):
        images, target = torch.rand(6, 3, *SIZE), torch.arange(6)
        np.random.seed(seed)
        expected, expected_target = create(kind, mode)(images.clone(), target)
        drawn_next = np.random.rand()
        np.random.seed(seed)
        mixed, labels = DenseMixup(create(kind, mode), GRID)(images, TokenLabels(target))
        assert np.random.rand() == drawn_next
        assert mixed is images
        torch.testing.assert_close(mixed, expected, rtol=0, atol=0)
        torch.testing.assert_close(dense_targets(labels, 10, GRID, 0.1).ground_truth, expected_target)


@pytest.mark.parametrize("count", [2, 6, 7])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_shares_are_those_of_the_pixels(kind: str, mode: str, count: int) -> None:
    """Each value of a mixed image tells how much of it is the image's own."""
    mix, varied = DenseMixup(create(kind, mode), GRID), False
    for seed in range(8):
        np.random.seed(seed)
        images, labels = mix(one_value_each(count), torch.arange(count))
        assert labels.own.shape == (count,) and labels.own_tokens.shape == (count, *GRID)
        for i, partner in enumerate(labels.partner.tolist()):
            assert partner == (i if i == 2 * (count // 2) else 2 * (count // 2) - 1 - i)
            own = (images[i, 0] - partner) / (i - partner) if i != partner else torch.ones(SIZE)
            assert labels.own[i].item() == pytest.approx(own.mean().item(), abs=1e-5)
            for row, column in np.ndindex(*GRID):
                token = own[8 * row : 8 * row + 8, 6 * column : 6 * column + 6]
                assert labels.own_tokens[i, row, column].item() == pytest.approx(token.mean().item(), abs=1e-5)
            varied |= len(labels.own_tokens[i].unique()) > 2
    assert varied == (kind != "mixup"), "mixup mixes all tokens alike, CutMix does not"


@pytest.mark.parametrize("mode", MODES)
def test_the_last_image_of_an_odd_batch_stays_as_it_is(mode: str) -> None:
    np.random.seed(0)
    images, labels = DenseMixup(create("mixup", mode), GRID)(one_value_each(5), torch.arange(5))
    assert (images[4] == 4).all() and (images[0] != 0).all()
    assert labels.own[4] == 1 and (labels.own_tokens[4] == 1).all()
    made = dense_targets(labels, 10, GRID)
    assert made.ground_truth[4, 4] == 1 and (made.tokens[4, :, :, 4] == 1).all()


@pytest.mark.parametrize("mode", MODES)
def test_a_single_image_stays_as_it_is(mode: str) -> None:
    images, labels = DenseMixup(create("both", mode), GRID)(one_value_each(1), torch.tensor([3]))
    assert (images == 0).all()
    assert (labels.own == 1).all() and (labels.own_tokens == 1).all() and labels.partner.tolist() == [0]
    assert (dense_targets(labels, 10, GRID).tokens[..., 3] == 1).all()


def test_an_empty_batch() -> None:
    images, labels = DenseMixup(create(), GRID)(one_value_each(0), torch.arange(0))
    assert images.shape[0] == labels.own.shape[0] == labels.own_tokens.shape[0] == 0


@pytest.mark.parametrize("mode", MODES)
def test_switched_off(mode: str) -> None:
    """As training does for its last epochs."""
    mix = DenseMixup(create("both", mode), GRID)
    mix.mixup.mixup_enabled = False
    images, labels = mix(one_value_each(4), torch.arange(4))
    assert images.equal(one_value_each(4)) and (labels.own_tokens == 1).all() and (labels.own == 1).all()


def test_published_mixing_takes_one_share_for_all_tokens() -> None:
    np.random.seed(0)
    _, labels = DenseMixup(create("cutmix"), GRID, published=True)(one_value_each(4), torch.arange(4))
    assert 0.1 < labels.own[0] < 0.9
    assert labels.own_tokens.equal(labels.own[:, None, None].expand(-1, *GRID))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_shares_are_exact_for_images_of_low_precision(dtype: torch.dtype) -> None:
    np.random.seed(1)
    _, exact = DenseMixup(create("both", "elem"), GRID)(one_value_each(4), torch.arange(4))
    np.random.seed(1)
    images, labels = DenseMixup(create("both", "elem"), GRID)(one_value_each(4).to(dtype), torch.arange(4))
    assert images.dtype is dtype and labels.own.equal(exact.own) and labels.own_tokens.equal(exact.own_tokens)


# ---- MixToken


@pytest.mark.parametrize("grid", [(14, 14), (5, 9)])
def test_mix_token_boxes_are_cutmix_boxes_of_the_token_grid(grid: tuple[int, int]) -> None:
    for seed in range(200):
        np.random.seed(seed)
        top, bottom, left, right = rand_bbox(grid, np.random.beta(1.0, 1.0))
        np.random.seed(seed)
        mask = draw_mix_tokens(grid, 1.0)
        if (bottom - top) * (right - left) == 0:
            assert mask is None
        else:
            assert mask.shape == grid and mask.dtype is torch.bool
            assert mask[top:bottom, left:right].all() and mask.sum() == (bottom - top) * (right - left)


def test_mix_token_share() -> None:
    """Half of the tokens for Beta(1, 1), less what boxes lose at the borders: integrated, 0.28 on a fine grid.

    A box with sides a share s of the grid's, its middle uniform, keeps s - s²/4 of the grid along each axis, and s² is
    uniform: E[(s - s²/4)²] = 1/2 - 1/5 + 1/48 = 0.32. On fewer tokens, rounding down takes more of it.
    """
    np.random.seed(0)
    masks = [draw_mix_tokens((64, 64), 1.0) for _ in range(3000)]
    share = np.mean([0.0 if mask is None else mask.float().mean().item() for mask in masks])
    assert share == pytest.approx(1 / 2 - 1 / 5 + 1 / 48, abs=0.02)


def test_no_mix_token() -> None:
    state = np.random.get_state()[1].copy()
    assert draw_mix_tokens((14, 14), 0.0) is None
    np.testing.assert_array_equal(np.random.get_state()[1], state)
