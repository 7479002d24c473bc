"""Any timm model as a classifier of tokens: where its tokens are, and an auxiliary head over them."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import get_device_dtype
from torch import nn

from vip.errors import UserError
from vip.models.layers import mix_tokens
from vip.token_labels.targets import Grid


@dataclass(frozen=True)
class TokenLayout:
    """Where the tokens are in what a model's `forward_features` gives.

    Attributes:
        kind: 'NCHW', 'NHWC' or 'NLC'.
        grid: Height and width of the token grid.
        channels: Channels of a token.
        prefix: Class and register tokens before the others, of 'NLC'.
    """

    kind: str
    grid: Grid
    channels: int
    prefix: int = 0

    def tokens(self, features: torch.Tensor) -> torch.Tensor:
        """The tokens `[B, H', W', C]` in features."""
        if self.kind == "NCHW":
            return features.permute(0, 2, 3, 1)
        if self.kind == "NLC":
            return features[:, self.prefix :].unflatten(1, self.grid)
        return features

    def single_tokens(self, features: torch.Tensor, pool: str) -> torch.Tensor:
        """Every token as the features of an image of one token, `[B * H' * W', ...]`.

        Args:
            features: What `forward_features` gave.
            pool: The model's `global_pool`: a head that reads class tokens gets each token in the place of all of them.
        """
        tokens = self.tokens(features).flatten(0, 2)
        if self.kind == "NCHW":
            return tokens[:, :, None, None]
        if self.kind == "NHWC":
            return tokens[:, None, None]
        return tokens[:, None].expand(-1, max(self.prefix, 1) if pool == "token" else self.prefix + 1, -1)


@torch.no_grad()
def find_tokens(model: Any, input_size: tuple[int, ...]) -> TokenLayout:
    """Find the tokens in a model's features by running it on one black image.

    Args:
        model: A timm model.
        input_size: Channels, height and width of its input.

    Raises:
        UserError: If its features are neither a map nor tokens on a grid.
    """
    name = getattr(model, "pretrained_cfg", {}).get("architecture") or type(model).__name__
    was_training, device_and_type = model.training, get_device_dtype(model)
    model.eval()
    try:
        features = model.forward_features(torch.zeros((1, *input_size), **device_and_type))
    except (RuntimeError, AssertionError, ValueError, TypeError) as e:
        size = "x".join(str(n) for n in input_size[-2:])
        raise UserError(f"{name} does not work at {size} pixels: {str(e).splitlines()[0]}") from e
    finally:
        model.train(was_training)
    shape = tuple(features.shape) if isinstance(features, torch.Tensor) else ()
    channels = getattr(model, "num_features", None)
    if len(shape) == 4:
        last = getattr(model, "output_fmt", "NCHW") == "NHWC" or shape[1] != channels
        if shape[-1 if last else 1] == channels:
            return TokenLayout("NHWC", shape[1:3], channels) if last else TokenLayout("NCHW", shape[2:], channels)
    if len(shape) == 3 and shape[-1] == channels:
        prefix = _count_prefix(model)
        if grid := _find_grid(shape[1] - prefix, input_size[-2:]):
            return TokenLayout("NLC", grid, channels, prefix)
    raise UserError(
        f"{name} has no tokens to label: its features are {list(shape) or type(features).__name__} at "
        f"{input_size[-2]}x{input_size[-1]} pixels, expected [1, C, H, W], [1, H, W, C] or [1, N, C] with N on a "
        f"grid of the image's proportions and C = {channels}."
    )


def _count_prefix(model: Any) -> int:
    if hasattr(model, "num_prefix_tokens"):
        return model.num_prefix_tokens
    return int(getattr(model, "cls_token", None) is not None)


def _find_grid(tokens: int, size: tuple[int, ...]) -> Grid | None:
    """The grid of this many tokens with the proportions of the image, None if there is none."""
    height = round(math.sqrt(tokens * size[0] / size[1]))
    width = round(math.sqrt(tokens * size[1] / size[0]))
    return (height, width) if tokens > 0 and height * width == tokens else None


class DenseClassifier(nn.Module):
    """A model whose forward pass gives what token labels supervise.

    A model with `forward_dense` is asked for it. In any other `aux_head` reads the tokens, and MixToken swaps the
    pixels under them.

    Args:
        model: A timm model; it gets an `aux_head` if it has none.
        input_size: Channels, height and width of its input.

    Raises:
        UserError: If the model has no tokens.

    Attributes:
        has_training_aid: Whether the auxiliary head was made here, so that inference does not need it.
    """

    def __init__(self, model: Any, input_size: tuple[int, ...]) -> None:
        super().__init__()
        self.layout = find_tokens(model, input_size)
        self.has_training_aid = getattr(model, "aux_head", None) is None
        if self.has_training_aid:
            if not model.num_classes:
                raise UserError("Token labels need classes: the model was created without any.")
            model.aux_head = nn.Linear(self.layout.channels, model.num_classes, **get_device_dtype(model))
            nn.init.normal_(model.aux_head.weight, std=0.02)
            nn.init.zeros_(model.aux_head.bias)
        self.model = model

    @property
    def grid(self) -> Grid:
        """Height and width of the token grid."""
        return self.layout.grid

    def forward(self, x: torch.Tensor, mix: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Images to class logits `[B, K]` and token logits `[B, H', W', K]`.

        Args:
            x: Images `[B, C, H, W]`.
            mix: Boolean mask `[H', W']` of the tokens that MixToken swaps with those of the batch in reverse order.
        """
        if hasattr(self.model, "forward_dense"):
            return self.model.forward_dense(x, mix)
        if mix is not None:
            pixels = nn.functional.interpolate(mix[None, None].to(x.dtype), x.shape[-2:])[0, 0].bool()
            x = torch.where(pixels, x.flip(0), x)
        features = self.model.forward_features(x)
        aux = self.model.aux_head(self.layout.tokens(features))
        return self.model.forward_head(features), aux if mix is None else mix_tokens(aux, mix)
