"""Models as their papers spell them out, in torch: the oracle of what is faster, and the baseline of its benchmark."""

import torch
from torch import nn

from vip.models.vision_permutator import PermuteMlp


class TextbookPermuteMlp(PermuteMlp):
    """Section 3.2 of arXiv 2106.12368: permute, linear, permute back, then weigh by the sum of the branches."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Mix `[B, H, W, C]`."""
        B, H, W, C = x.shape
        N, S = self.segments, C // self.segments
        x_bhwns = x.reshape(B, H, W, N, S)
        h = self.mlp_h(x_bhwns.permute(0, 3, 2, 1, 4).reshape(B, N, W, H * S))
        h = h.reshape(B, N, W, H, S).permute(0, 3, 2, 1, 4).reshape(B, H, W, C)
        w = self.mlp_w(x_bhwns.permute(0, 1, 3, 2, 4).reshape(B, H, N, W * S))
        w = w.reshape(B, H, N, W, S).permute(0, 1, 3, 2, 4).reshape(B, H, W, C)
        c = self.mlp_c(x)
        a = self.reweight((h + w + c).flatten(1, 2).mean(1)).reshape(B, C, 3).permute(2, 0, 1).softmax(0)
        a = a[:, :, None, None]
        return self.proj_drop(self.proj(h * a[0] + w * a[1] + c * a[2]))


def textbook(model: nn.Module) -> nn.Module:
    """Change a model in place to compute as its paper writes it: Permute-MLPs, and attention without fused kernels."""
    for module in model.modules():
        if type(module) is PermuteMlp:
            module.__class__ = TextbookPermuteMlp
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model
