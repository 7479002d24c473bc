"""Weights, inputs and figures of the golden vectors in `golden/`, by a rule that any framework can follow."""

import json
import zlib
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

GOLDEN = Path(__file__).parent / "golden"


def read(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal numbers that depend on the name and the shape alone, float32 numbers held as float64."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32).astype(np.float64))


def parameter(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    v = draw(name, shape)
    if name.rpartition(".")[2] in ("pos_embed", "cls_token"):
        return 0.02 * v
    if len(shape) == 1:
        return 1 + 0.1 * v if name.endswith("weight") else 0.1 * v
    return v / prod(shape[1:]) ** 0.5


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Fill a model in place; parameters that do not train and other buffers keep their values."""
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.copy_(parameter(name, tuple(p.shape)))
    for name, b in model.named_buffers():
        if name.endswith("running_mean"):
            b.copy_(0.1 * draw(name, tuple(b.shape)))
        elif name.endswith("running_var"):
            b.copy_(1 + 0.1 * draw(name, tuple(b.shape)).abs())


def measure(model: nn.Module, input_shape: tuple[int, ...] = (2, 3, 224, 224)) -> dict[str, Any]:
    """Fill a float64 model and measure what the vectors hold, under their keys."""
    fill(model)
    model.eval()
    logits = model(draw("input", tuple(input_shape)))
    loss = F.cross_entropy(logits, torch.tensor([1, 2]))
    loss.backward()
    return {
        "state_dict": [[name, list(t.shape)] for name, t in model.state_dict().items()],
        "params": sum(p.numel() for p in model.parameters()),
        "logits_first16": logits[:, :16].tolist(),
        "logits_norm": logits.norm(dim=1).tolist(),
        "argmax": logits.argmax(dim=1).tolist(),
        "ce_loss_labels_1_2": loss.item(),
        "grad_norm": {name: p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None},
    }
