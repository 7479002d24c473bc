"""Kernels for what torch computes with detours in inference, and where they take its place.

They are for NVIDIA GPUs with 16-bit matrix units (compute capability 8.0 and later) and numbers of 16 bits. There a
matrix product of a mixing layer costs about what a copy of its operand does, and torch makes two around it. Elsewhere,
without Triton and where a model learns, torch computes the same: kernels that keep each branch for its gradient were
slower on an H200 than what torch.compile makes of copies and products (docs/performance.md). `set_kernels(False)` or
VIP_KERNELS=0 in the environment has torch compute everything.
"""

import os
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["as_autocast", "is_plain", "set_kernels", "use_kernels", "use_weighted_mix", "weighted_mix"]

HALVES = (torch.float16, torch.bfloat16)
# addresses are 32 bits, and those of the means of lines twice as many at most
MOST_ELEMENTS = 2**30 - 1
# of fewer, a GPU has computed everything before Python, which takes longer over kernels than over torch's, has asked
# for more; where torch.compile asks, there is no such wait. Some 20 images of ViP's first stage
LEAST_IN_EAGER = 2**22

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
        and x.numel() <= MOST_ELEMENTS
        and (torch.compiler.is_compiling() or x.numel() >= LEAST_IN_EAGER)
    )


@torch.jit.unused
def use_weighted_mix(x: torch.Tensor, layer: Any, kinds: tuple[type, ...]) -> bool:
    """Whether `weighted_mix` is to mix `[B, H, W, N, S]`: where no derivative has to know a branch by itself.

    And where the layers, whose weights it takes, are of the kinds that they were: one that was replaced, adapted,
    quantized or hooked into computes by itself.
    """
    if not use_kernels(x) or forward_ad._current_level >= 0:  # torch has no public name for it
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *layer.parameters())):
        return False
    return all(is_plain(module, *kinds) for module in (layer.mlp_h, layer.mlp_w, layer.mlp_c, layer.proj))


def is_plain(layer: Any, *kinds: type) -> bool:
    """Whether a layer is of these kinds and computes what its weight says: not derived, pruned, quantized or hooked."""
    if type(layer) not in kinds or layer._forward_hooks or layer._forward_pre_hooks:
        return False
    return not is_traceable_wrapper_subclass(layer.weight)


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
    packed, image = kernels.use_packed(x), x
    if packed:
        lines, mean, image = kernels.pack_lines(x)
    else:
        lines, mean = kernels.line_means(x)
    # the mean of lines that are mixed is what their mean gives by the mean of the weight's rows
    mean_row = torch.cat([w.unflatten(0, (-1, size)).mean(0) for w in (weight_h, weight_w)], 1)
    pooled = F.linear(lines.flatten(2), mean_row) + layer.mlp_c(mean.flatten(1)).reshape(mean.shape)
    a = layer.branch_weights(pooled).to(dtype)
    weight_c, weight_proj = layer.mlp_c.weight, layer.proj.weight
    if packed:  # what is linear takes and gives channels in any order of its weights
        a = a.transpose(4, 5)
        weight_c, weight_proj = _other_way(weight_c, 0, size), _other_way(weight_proj, 1, size)
    a_h, a_w, a_c = a.unbind(0)
    mixed = F.linear(x.flatten(3), weight_c).reshape(image.shape)
    mixed = kernels.axis_mix_add(image, weight_h, 1, a_h, mixed, a_c, packed)
    mixed = kernels.axis_mix_add(image, weight_w, 2, a_w, mixed, None, packed)
    return F.linear(mixed.flatten(3), weight_proj, layer.proj.bias)


def _other_way(weight: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    """A weight whose channels `[N, S]` along an axis are `[S, N]`."""
    return weight.unflatten(axis, (-1, size)).transpose(axis, axis + 1).flatten(axis, axis + 1)
