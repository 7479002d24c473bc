"""What several architectures share."""

import logging
import math
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import resample_abs_pos_embed
from timm.models import clean_state_dict
from torch import nn

_logger = logging.getLogger(__name__)


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """Lay images `[B, C, H, W]` out channels last: so convolutions are fastest, and what they give lies in a row.

    The layout of a convolution's input is that of its output, here tokens side by side, as all blocks read them.
    """
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # torch.func.vmap knows no memory formats


def check_img_size(img_size: tuple[int, ...], patch_size: tuple[int, int]) -> None:
    """Refuse an image that the patches do not divide.

    Raises:
        ValueError: With the nearest sizes that work.
    """
    if len(img_size) != 2:
        raise ValueError(f"Expected a height and a width, got image size {img_size}.")
    for axis, size, patch in zip(("height", "width"), img_size, patch_size, strict=True):
        if size < patch or size % patch:
            lower = max(size // patch, 1) * patch
            raise ValueError(
                f"Image {axis} {size} does not work: patches of {patch} need a multiple of it. The nearest sizes "
                f"that work are {lower} and {lower + patch}."
            )


def resample_pos_embed(model: Any, state_dict: dict[str, Any], prefix: str) -> None:
    """Resample the position embedding of a state dict that is about to be loaded to the model's token grid.

    Args:
        model: The model: `pos_embed`, `num_prefix_tokens` and `patch_embed.grid_size` are its own.
        state_dict: Changed in place.
        prefix: Of the model's names in it.
    """
    key = prefix + "pos_embed"
    pos_embed = state_dict.get(key)
    if pos_embed is None or pos_embed.ndim != 3 or pos_embed.shape == model.pos_embed.shape:
        return
    tokens = pos_embed.shape[1] - model.num_prefix_tokens
    if math.isqrt(max(tokens, 0)) ** 2 == tokens:  # the grid it was made for is not stored; only a square can be told
        _logger.info(f"Resampling {key} to {model.patch_embed.grid_size} tokens.")
        state_dict[key] = resample_abs_pos_embed(
            pos_embed, model.patch_embed.grid_size, num_prefix_tokens=model.num_prefix_tokens
        )


def mix_tokens(x: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
    """MixToken: swap the tokens under a mask with those of the batch in reverse order (arXiv 2104.10858, section 3.3).

    Args:
        x: Tokens `[B, H, W, C]`.
        mix: Boolean mask `[h, w]`; each of its elements covers the same number of tokens.
    """
    rows, columns = x.shape[1] // mix.shape[0], x.shape[2] // mix.shape[1]
    mix = mix.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return torch.where(mix[None, :, :, None], x.flip(0), x)


def init_linear(module: nn.Module, name: str) -> None:
    """Initialize a linear layer as all published models here do: normal of std 0.02, zero bias.

    They truncate it at -2 and 2, a hundred standard deviations away. No normal draw comes near, but the inverse of the
    error function that draws a truncated one rounds a weight in 27 million to -2.
    """
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
    """Unwrap published checkpoints: `state_dict` or `model` entries, DDP and compile prefixes.

    Other resolutions need nothing here: the layers concerned resample at every load.
    """
    return clean_state_dict(state_dict.get("state_dict", state_dict.get("model", state_dict)))


def imagenet_cfg(url: str = "", **kwargs: Any) -> dict[str, Any]:
    """Timm's configuration of a model of fixed input size for ImageNet-1k, normalized as usual."""
    return {
        "url": url,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "classifier": "head",
        "license": "apache-2.0",
        **kwargs,
    }
