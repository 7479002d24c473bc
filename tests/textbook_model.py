"""Models as their papers spell them out, in torch: the oracle of what is faster, and the baseline of its benchmark."""

import torch
from torch import nn

from vip.models.lv_vit import ConvPatchEmbed
from vip.models.vision_permutator import PermuteMlp, VisionPermutator


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


class TextbookVisionPermutator(VisionPermutator):
    """Patches of images as they lie in memory, by default channel by channel."""

    def _embed(self, x: torch.Tensor) -> torch.Tensor:
        return self.patch_embed(x)


class TextbookConvPatchEmbed(ConvPatchEmbed):
    """Section 4.1 of arXiv 2104.10858: convolutions of 7, 3 and 3 pixels and one of a patch, of images as they lie."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens `[B, H, W, C]` of images `[B, C, H, W]`."""
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = norm(conv(x)).relu()
        return self.proj(x).permute(0, 2, 3, 1)


_TEXTBOOK = {
    ConvPatchEmbed: TextbookConvPatchEmbed,
    PermuteMlp: TextbookPermuteMlp,
    VisionPermutator: TextbookVisionPermutator,
}


def textbook(model: nn.Module) -> nn.Module:
    """Change a model in place to compute as its paper writes it, also attention: without fused kernels."""
    for module in model.modules():
        module.__class__ = _TEXTBOOK.get(type(module), type(module))
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model
