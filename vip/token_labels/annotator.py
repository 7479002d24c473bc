"""A trained classifier that labels every token."""

from typing import Any, NamedTuple

import torch
from torch import nn

from vip.errors import UserError
from vip.token_labels.dense import find_tokens


class Annotation(NamedTuple):
    """What an annotator says of a batch."""

    logits: torch.Tensor  # of the image, [B, K]
    mean_logits: torch.Tensor  # of its tokens, averaged, [B, K]
    values: torch.Tensor  # the k strongest logits of each token, [B, k, H', W']
    indices: torch.Tensor  # their classes


class Annotator(nn.Module):
    """A classifier whose head is applied to every token, as a 1x1 convolution would be.

    A model with an auxiliary head over its tokens uses that one.

    Args:
        model: A timm model.
        input_size: Channels, height and width of its input.
        top_k: Classes to keep of each token.

    Raises:
        UserError: If the model has no tokens, or fewer classes.
    """

    def __init__(self, model: Any, input_size: tuple[int, ...], top_k: int = 5) -> None:
        super().__init__()
        if model.num_classes < top_k:
            raise UserError(f"--top-k is {top_k}, but the annotator has {model.num_classes} classes: give no more.")
        self.layout = find_tokens(model, input_size)
        self.model, self.top_k = model.eval(), top_k

    def forward(self, x: torch.Tensor) -> Annotation:
        """Annotate images `[B, C, H, W]`."""
        features = self.model.forward_features(x)
        dense = self.dense_logits(features).float()
        values, indices = (top.permute(0, 3, 1, 2) for top in dense.topk(self.top_k, -1))
        return Annotation(self.model.forward_head(features).float(), dense.mean((1, 2)), values, indices)

    def dense_logits(self, features: torch.Tensor) -> torch.Tensor:
        """The logits `[B, H', W', K]` of every token of features."""
        if getattr(self.model, "aux_head", None) is not None:
            return self.model.aux_head(self.layout.tokens(features))
        single = self.layout.single_tokens(features, getattr(self.model, "global_pool", ""))
        return self.model.forward_head(single).reshape(len(features), *self.layout.grid, -1)


@torch.no_grad()
def averages(annotator: Annotator, input_size: tuple[int, ...]) -> bool:
    """Whether the logits of the tokens average to those of the image, as they do where the head reads their mean.

    Args:
        annotator: The annotator, on its device.
        input_size: Channels, height and width of its input.

    Raises:
        UserError: If its logits are not finite.
    """
    parameter = next(annotator.parameters())
    noise = torch.randn((2, *input_size), generator=torch.Generator().manual_seed(0))
    annotation = annotator(noise.to(parameter.device, parameter.dtype))
    if not annotation.logits.isfinite().all():
        raise UserError("The model's logits of random images are not finite: take another checkpoint.")
    difference = (annotation.mean_logits - annotation.logits).abs().max()
    return bool(difference <= 1e-3 * annotation.logits.abs().max())
