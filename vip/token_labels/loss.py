"""The loss of token labeling (section 3.2 of arXiv 2104.10858)."""

import torch
import torch.nn.functional as F
from torch import nn

from vip.token_labels.targets import DenseTargets


class TokenLabelCrossEntropy(nn.Module):
    """`cls_weight * CE(class output) + dense_weight * CE(token outputs)`, with soft targets.

    Args:
        dense_weight: Weight of the mean over tokens.
        cls_weight: Weight of the class output.
        ground_truth: Mix the image's own class into the class target that comes of the label map: half of each where
            their strongest classes agree, a tenth where they do not, as published.
    """

    def __init__(self, dense_weight: float = 1.0, cls_weight: float = 1.0, ground_truth: bool = False) -> None:
        super().__init__()
        self.dense_weight, self.cls_weight, self.ground_truth = dense_weight, cls_weight, ground_truth

    def forward(
        self, cls: torch.Tensor, tokens: torch.Tensor, targets: DenseTargets, swapped: float = 0.0
    ) -> torch.Tensor:
        """Compute the loss.

        Args:
            cls: Class logits `[B, K]`.
            tokens: Token logits `[B, H', W', K]`.
            targets: Their targets.
            swapped: Share of the tokens that MixToken took from the batch in reverse order.
        """
        target = targets.cls
        if self.ground_truth:
            share = 0.9 - 0.4 * (targets.ground_truth.argmax(1, keepdim=True) == target.argmax(1, keepdim=True))
            target = share * target + (1 - share) * targets.ground_truth
        if swapped:
            target = (1 - swapped) * target + swapped * target.flip(0)
        return self.cls_weight * cross_entropy(cls, target) + self.dense_weight * cross_entropy(tokens, targets.tokens)


def cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over all leading dimensions, in float32 or better.

    Like `timm.loss.SoftTargetCrossEntropy`, but a target of another type is neither negated nor converted as a whole.

    Example:
        >>> uniform, target = torch.zeros(2, 14, 14, 8), torch.full((2, 14, 14, 8), 1 / 8)
        >>> cross_entropy(uniform, target)  # log(8)
        tensor(2.0794)
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return -(target * F.log_softmax(logits, dim=-1, dtype=dtype)).sum(-1).mean()
