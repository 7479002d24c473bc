"""Mixtures of images with dense labels: mixup, CutMix, MixToken."""

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.data.mixup import rand_bbox

from vip.token_labels.targets import Grid, TokenLabels


class DenseMixup:
    """timm's mixup and CutMix of a batch, recorded for each token.

    The token targets are cut where the pixels were: what timm does to the images is repeated, with the same random
    numbers, on a picture of which image each pixel is from, and that picture is averaged over each token. The last
    image of an odd batch stays unmixed.

    Args:
        mixup: timm's mixup.
        grid: Height and width of the token grid.
        published: Mix all tokens by the share of the whole image, as the published code does.
    """

    def __init__(self, mixup: Mixup, grid: Grid, published: bool = False) -> None:
        self.mixup, self.grid, self.published = mixup, grid, published

    def __call__(self, images: torch.Tensor, labels: TokenLabels | torch.Tensor) -> tuple[torch.Tensor, TokenLabels]:
        """Mix images in place.

        Args:
            images: `[B, C, H, W]`.
            labels: Their labels, or their class indices `[B]`.
        """
        if isinstance(labels, torch.Tensor):
            labels = TokenLabels(labels)
        pairs = len(images) // 2
        owner = torch.zeros((2 * pairs, 1, *images.shape[-2:]), device=images.device)
        owner[:pairs] = 1
        state = np.random.get_state()
        self._mix(images[: 2 * pairs], labels)
        np.random.set_state(state)
        self._mix(owner, labels)
        own = torch.ones((len(images), *images.shape[-2:]), device=images.device)
        own[:pairs], own[pairs : 2 * pairs] = owner[:pairs, 0], 1 - owner[pairs:, 0]

        labels.partner = torch.arange(len(images), device=images.device)
        labels.partner[: 2 * pairs] = labels.partner[: 2 * pairs].flip(0)
        labels.own = own.mean((1, 2))
        labels.own_tokens = F.adaptive_avg_pool2d(own[:, None], self.grid)[:, 0]
        if self.published:
            labels.own_tokens = labels.own[:, None, None].expand_as(labels.own_tokens)
        return images, labels

    def _mix(self, images: torch.Tensor, labels: TokenLabels) -> None:
        if len(images):
            mixed, _ = self.mixup(images, labels.target[: len(images)])
            assert mixed is images, "timm's mixup works in place"


def draw_mix_tokens(grid: Grid, alpha: float) -> torch.Tensor | None:
    """Draw the box of MixToken (section 3.3 of arXiv 2104.10858), one for a batch.

    Args:
        grid: Height and width of the token grid.
        alpha: The share of tokens that stay is drawn from Beta(alpha, alpha); 0 for no MixToken.

    Returns:
        Boolean mask `[H', W']` of the tokens to swap, on the CPU; None where the box is empty.
    """
    if not alpha:
        return None
    top, bottom, left, right = rand_bbox(grid, np.random.beta(alpha, alpha))
    mask = torch.zeros(grid, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask if mask.any() else None
