"""The architectures of the study at equal sizes, and ablations of the Vision Permutator."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.layers import GatedMlp
from timm.models import named_apply
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock, SpatialGatingBlock
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vip.benchmark.counts import Counts, count
from vip.models.external_attention_mlp import Block as ExternalAttentionBlock
from vip.models.layers import init_linear
from vip.models.vision_permutator import PermuteMlp, VisionPermutator

PIXELS, PATCH = 32, 4
BASELINE = "ViP"
COMMON: dict[str, Any] = dict(img_size=PIXELS, patch_size=PATCH, num_classes=10)


@dataclass(frozen=True)
class Size:
    """How large a study is.

    Attributes:
        shapes: Channels and blocks of each architecture, for equal parameters.
        images: Training images of the baseline model; other models see as many as cost the same.
        batch_size: Images of an update.
        points: Points of a curve.
        recipe: Options of training.
    """

    shapes: dict[str, tuple[int, int]]
    images: int
    batch_size: int
    points: int
    recipe: dict[str, Any]


SIZES = {
    "small": Size(
        {"ViP": (64, 4), "Mixer": (64, 5), "gMLP": (68, 4), "ResMLP": (64, 5), "EAMLP": (52, 4), "ViT": (60, 4)},
        images=75_000,
        batch_size=64,
        points=4,
        recipe=dict(lr=2e-3, cutmix=0.0),
    ),
    "full": Size(
        {"ViP": (128, 8), "Mixer": (136, 9), "gMLP": (140, 8), "ResMLP": (160, 7), "EAMLP": (108, 8), "ViT": (124, 8)},
        images=1_500_000,
        batch_size=512,
        points=10,
        recipe=dict(lr=2e-3, cutmix=1.0, mixup_prob=0.5),
    ),
}


class AblatedPermuteMlp(PermuteMlp):
    """A Permute-MLP with some of its branches, with or without their weights.

    Args:
        dim: Channels.
        segments: Channel segments.
        grid_size: Tokens along height and width.
        branches: Names of the branches, of h, w and c.
        reweight: Weigh the branches; otherwise they are added.
    """

    def __init__(self, dim: int, segments: int, grid_size: tuple[int, int], branches: str, reweight: bool) -> None:
        super().__init__(dim, segments, grid_size)
        assert branches == "hwc" or not reweight, "the published weights are of three branches"
        self.branches = branches
        for name in set("hwc") - set(branches):
            delattr(self, f"mlp_{name}")
        if not reweight:
            del self.reweight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Mix `[B, H, W, C]`."""
        outputs = [self._mix(x, name) for name in self.branches]
        total = torch.stack(outputs).sum(0)
        if not hasattr(self, "reweight"):
            return self.proj_drop(self.proj(total))
        weights = self.reweight(total.mean((1, 2))).reshape(len(x), -1, len(outputs)).softmax(-1)
        weighted = torch.stack(outputs, -1) * weights[:, None, None]
        return self.proj_drop(self.proj(weighted.sum(-1)))

    def _mix(self, x: torch.Tensor, name: str) -> torch.Tensor:
        if name == "c":
            return self.mlp_c(x)
        rows = x.transpose(1, 2) if name == "h" else x  # [B, other axis, axis to mix, C]
        B, other, length, C = rows.shape
        segments = rows.reshape(B, other, length, self.segments, -1).transpose(2, 3)
        mixed = getattr(self, f"mlp_{name}")(segments.flatten(3)).reshape(segments.shape)
        out = mixed.transpose(2, 3).reshape(B, other, length, C)
        return out.transpose(1, 2) if name == "h" else out


def vision_permutator(dim: int, depth: int, segments: int = PIXELS // PATCH) -> VisionPermutator:
    """A Vision Permutator of one stage, with as many segments as tokens on an axis, as published."""
    return VisionPermutator(layers=(depth,), embed_dims=(dim,), segments=(segments,), transitions=(), **COMMON)


def ablated_permutator(dim: int, depth: int, branches: str = "hwc", reweight: bool = True) -> VisionPermutator:
    """A Vision Permutator with other token mixing."""
    model = vision_permutator(dim, depth)
    stage: Any = model.network[0]
    for block in stage:
        block.attn = AblatedPermuteMlp(dim, block.attn.segments, model.patch_embed.grid_size, branches, reweight)
    named_apply(init_linear, model)
    return model


def mlp_mixer(dim: int, depth: int, **kwargs: Any) -> MlpMixer:
    """A model of timm's MLP-Mixer family."""
    return MlpMixer(embed_dim=dim, num_blocks=depth, **COMMON, **kwargs)


def vision_transformer(dim: int, depth: int, **kwargs: Any) -> VisionTransformer:
    """A model of timm's ViT family, with mean pooling as the MLP-like models have it."""
    return VisionTransformer(embed_dim=dim, depth=depth, class_token=False, global_pool="avg", **COMMON, **kwargs)


# Architectures: channels and blocks to a model, with the MLP ratios and blocks of the published ones.
MODELS: dict[str, Callable[[int, int], nn.Module]] = {
    "ViP": vision_permutator,
    "Mixer": mlp_mixer,
    "gMLP": partial(mlp_mixer, mlp_ratio=6, block_layer=SpatialGatingBlock, mlp_layer=GatedMlp),
    "ResMLP": partial(mlp_mixer, mlp_ratio=4, block_layer=partial(ResBlock, init_values=0.1), norm_layer=Affine),
    # one patch embedding for all: the published tokens-to-token stem would leave 2x2 tokens of these images
    "EAMLP": partial(vision_transformer, num_heads=1, mlp_ratio=3, block_fn=ExternalAttentionBlock),
    "ViT": partial(vision_transformer, num_heads=2),
}
ABLATIONS: dict[str, Callable[[int, int], nn.Module]] = {
    "no re-weighting": partial(ablated_permutator, reweight=False),
    "height only": partial(ablated_permutator, branches="h", reweight=False),
    "width only": partial(ablated_permutator, branches="w", reweight=False),
    "channel only": partial(ablated_permutator, branches="c", reweight=False),
    "fewer segments (4 of 8)": partial(vision_permutator, segments=4),
}


def build(model: str, size: Size) -> nn.Module:
    """An architecture or ablation at a size."""
    return {**MODELS, **ABLATIONS}[model](*size.shapes[model if model in MODELS else BASELINE])


@functools.cache
def counts(model: str, size_name: str) -> Counts:
    """Parameters and operations of a model."""
    return count(build(model, SIZES[size_name]), (3, PIXELS, PIXELS))
