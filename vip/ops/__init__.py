"""Kernels for what torch computes with detours, and where they take its place.

They are for NVIDIA GPUs with 16-bit matrix units (compute capability 8.0 and later) and numbers of 16 bits. There, by
the operations and bytes that they take, a matrix product of a mixing layer costs about what a copy of its operand does,
and torch makes two around it. What the kernels gain has not been measured yet. Elsewhere, and without Triton, torch
computes the same; `set_kernels(False)` or VIP_KERNELS=0 in the environment has it compute everything.
"""

import os
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F

__all__ = ["as_autocast", "axis_mix", "set_kernels", "use_kernels", "use_weighted_mix", "weighted_mix"]

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
def axis_mix(x: torch.Tensor, weight: torch.Tensor, axis: int) -> torch.Tensor:
    """Mix `[B, H, W, N, S]` along its height (axis 1) or width (axis 2) by a `[L * S, L * S]` matrix.

    See `vip.ops.kernels.axis_mix`; under autocast in its type.
    """
    from . import kernels  # only where there is Triton

    dtype = _computing_type(x)
    return kernels.axis_mix(x.to(dtype), weight.to(dtype), axis)


@torch.jit.unused
def weighted_mix(x: torch.Tensor, layer: Any) -> torch.Tensor:
    """Weighted sum of the three branches of a Permute-MLP, none of which is in memory by itself but that of channels.

    The weights of the branches need their means over the tokens. The branches are linear, so that these are what they
    give for means over the tokens, and known before any token is mixed; what is mixed is added already weighed.

    Args:
        x: `[B, H, W, N, S]`.
        layer: The `vip.models.PermuteMlp`.

    Returns:
        `[B, H, W, N * S]`.
    """
    from . import kernels

    dtype, size = _computing_type(x), x.shape[4]
    weight_h = layer.mlp_h.weight_for(x.shape[1] * size).to(dtype)
    weight_w = layer.mlp_w.weight_for(x.shape[2] * size).to(dtype)
    x = x.to(dtype)
    column, row = x.mean(2), x.mean(1)  # [B, H, N, S] and [B, W, N, S]
    pooled = _mean_of_mixed(column, weight_h) + _mean_of_mixed(row, weight_w)
    pooled = pooled + layer.mlp_c(row.mean(1).flatten(1)).reshape(pooled.shape)
    a_h, a_w, a_c = layer.branch_weights(pooled).to(dtype).unbind(0)
    mixed = kernels.axis_mix_add(x, weight_h, 1, a_h, layer.mlp_c(x.flatten(3)).reshape(x.shape), a_c)
    return kernels.axis_mix_add(x, weight_w, 2, a_w, mixed).flatten(3)


def _mean_of_mixed(line: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens of lines `[B, L, N, S]` once they are mixed, `[B, N, S]`."""
    mean_row = weight.unflatten(0, (line.shape[1], -1)).mean(0)  # [S, L * S]
    return F.linear(line.transpose(1, 2).flatten(2), mean_row)
