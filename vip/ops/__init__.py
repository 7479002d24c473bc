"""Kernels for what torch computes with detours in inference, and where they take its place.

They are for NVIDIA GPUs with 16-bit matrix units (compute capability 8.0 and later) and numbers of 16 bits. There a
matrix product of a mixing layer costs about what a copy of its operand does, and torch makes two around it. Elsewhere,
without Triton and where a model learns, torch computes the same: kernels that keep each branch for its gradient were
slower on an H200 than what torch.compile makes of copies and products (docs/performance.md). `set_kernels(False)` or
VIP_KERNELS=0 in the environment has torch compute everything.
"""

import os
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["as_autocast", "mean_rows", "set_kernels", "use_kernels", "use_weighted_mix", "weighted_mix"]

HALVES = (torch.float16, torch.bfloat16)

_HAS_TRITON = find_spec("triton") is not None
_BY_DEFAULT = os.environ.get("VIP_KERNELS", "1") != "0"
_enabled = _BY_DEFAULT


def set_kernels(enable: bool | None) -> None:
    """Use the kernels where they are for, or have torch compute everything; None: as the environment says."""
    global _enabled
    _enabled = _BY_DEFAULT if enable is None else enable


@torch.jit.unused  # what scripts call is torch's
def use_kernels(x: torch.Tensor) -> bool:
    """Whether the kernels are to mix a tensor `[B, H, W, N, S]`."""
    if not isinstance(x, torch.Tensor) or torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():
        return False  # what tracers make, torch.fx's among them, knows torch's operators only
    if not (_enabled and _HAS_TRITON and x.is_cuda) or torch.version.cuda is None:
        return False
    return (
        _computing_type(x) in HALVES
        and torch.cuda.get_device_properties(x.device).major >= 8
        and x.shape[-1] % 2 == 0  # two numbers of 16 bits are the least that is read at once
        and x.numel() < 2**31  # whose addresses are 32 bits
    )


@torch.jit.unused
def use_weighted_mix(x: torch.Tensor, parameters: Iterable[torch.Tensor]) -> bool:
    """Whether `weighted_mix` is to mix `[B, H, W, N, S]`: where no gradient has to know a branch by itself."""
    if not use_kernels(x):
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in (x, *parameters)))


@torch.jit.unused
def as_autocast(x: torch.Tensor) -> torch.Tensor:
    """Cast what autocast's norms give on a GPU, float32, to what its products take, for all that read it at once."""
    return x.to(_computing_type(x)) if isinstance(x, torch.Tensor) and x.is_cuda else x


def _computing_type(x: torch.Tensor) -> torch.dtype:
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):  # which leaves float64 as it is
        return x.dtype
    return torch.get_autocast_dtype(kind)


@torch.jit.unused
def weighted_mix(x: torch.Tensor, layer: Any) -> torch.Tensor:
    """A Permute-MLP, none of whose branches is in memory by itself but that of channels.

    The weights of the branches need their means over the tokens. The branches are linear, so that these are what they
    give for means over the tokens, and known before any token is mixed; what is mixed is added already weighed.

    Args:
        x: `[B, H, W, N, S]`.
        layer: The `vip.models.PermuteMlp`.

    Returns:
        `[B, H, W, N * S]`.
    """
    from . import kernels  # only where there is Triton

    dtype, size = _computing_type(x), x.shape[4]
    weight_h = layer.mlp_h.weight_for(x.shape[1] * size).to(dtype)
    weight_w = layer.mlp_w.weight_for(x.shape[2] * size).to(dtype)
    x = x.to(dtype)
    packed = kernels.use_packed(x) and type(layer.mlp_c) is type(layer.proj) is nn.Linear
    lines, mean, *other_way = kernels.pack_lines(x) if packed else kernels.line_means(x)
    mean_row = mean_rows(weight_h, weight_w, size) if layer.mean_row is None else layer.mean_row.to(dtype)
    pooled = F.linear(lines.flatten(2), mean_row) + layer.mlp_c(mean.flatten(1)).reshape(mean.shape)
    a = layer.branch_weights(pooled).to(dtype)
    if not packed:
        c = layer.mlp_c(x.flatten(3)).reshape(x.shape)
        return layer.proj(_add_axes(x, c, (weight_h, weight_w), a, False))
    # what is linear takes and gives channels in any order of its weights
    c = F.linear(x.flatten(3), _other_way(layer.mlp_c.weight, 0, size)).reshape(other_way[0].shape)
    mixed = _add_axes(other_way[0], c, (weight_h, weight_w), a.transpose(4, 5), True)
    return F.linear(mixed, _other_way(layer.proj.weight, 1, size), layer.proj.bias)


def mean_rows(weight_h: torch.Tensor, weight_w: torch.Tensor, size: int) -> torch.Tensor:
    """What gives the mean of lines that are mixed for the mean of the lines, those of both axes side by side.

    Args:
        weight_h: Mixing matrix of the height, `[H * S, H * S]`.
        weight_w: That of the width.
        size: S, channels of a segment.

    Returns:
        `[S, (H + W) * S]`.
    """
    return torch.cat([weight.unflatten(0, (-1, size)).mean(0) for weight in (weight_h, weight_w)], 1)


def _add_axes(x: Any, c: torch.Tensor, weights: Any, a: torch.Tensor, packed: bool) -> torch.Tensor:
    from . import kernels

    a_h, a_w, a_c = a.unbind(0)
    mixed = kernels.axis_mix_add(x, weights[0], 1, a_h, c, a_c, packed)
    return kernels.axis_mix_add(x, weights[1], 2, a_w, mixed, None, packed).flatten(3)


def _other_way(weight: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    """A weight whose channels `[N, S]` along an axis are `[S, N]`."""
    return weight.unflatten(axis, (-1, size)).transpose(axis, axis + 1).flatten(axis, axis + 1)
