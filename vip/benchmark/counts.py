"""Parameters, multiply-accumulates and activations of a model, counted while torch's meta device runs it."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry


@dataclass(frozen=True)
class Counts:
    """Size of a model, and what one image costs.

    Attributes:
        params: Parameters.
        macs: Multiply-accumulates of matrix products and convolutions, half of what torch's FLOP counter says.
        activations: Elements that those operations put out, as in arXiv 2003.13678.
    """

    params: int
    macs: int
    activations: int


class _ActivationCounter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if getattr(func, "_overloadpacket", None) in flop_registry:
            first = out[0] if isinstance(out, tuple) else out  # attention also returns what its backward pass needs
            self.count += first.numel()
        return out


@torch.no_grad()
def count(model: nn.Module, input_size: tuple[int, ...]) -> Counts:
    """Count what one image of `input_size` (channels, height, width) costs in evaluation; `model` is left alone."""
    params = sum(p.numel() for p in model.parameters())
    shell = copy.deepcopy(model).to("meta").eval().requires_grad_(False)  # the counter would hook gradients
    image = torch.zeros(1, *input_size, device="meta")
    with FlopCounterMode(display=False) as flops, _ActivationCounter() as activations:
        shell(image)
    return Counts(params, flops.get_total_flops() // 2, activations.count)
