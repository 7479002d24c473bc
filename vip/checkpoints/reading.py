"""Checkpoints of any layout, as they are read."""

import argparse
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import safe_open

from vip.errors import UserError
from vip.training.weights import (
    CHECKSUM,
    StateDict,
    find_checkpoint,
    read_checkpoint,
    recognise,
    state_dict_of,
    weight_sets,
)

LAYOUTS = {  # of files, and their usual endings
    "safetensors": (".safetensors",),
    "pth": (".pth", ".pt"),
    "published": (".pth.tar",),
}
_COPIES = 10  # more than this many times the size of their file no honest tensors have, even where they share memory


def tensors_in(content: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors at any depth, each once, under names such as `optimizer/state/3/exp_avg`."""
    seen, waiting = set(), [("", content)]
    while waiting:
        name, value = waiting.pop()
        if id(value) in seen:  # a file can refer to itself
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            yield name, value
        inside = mapping(value) or (dict(enumerate(value)) if isinstance(value, list | tuple) else {})
        for key, item in inside.items():
            waiting.append((f"{name}/{label(key)}".lstrip("/")[-200:], item))


def mapping(value: Any) -> dict[Any, Any]:
    """A dictionary, or what is in a namespace (timm's `args` are one); empty for anything else."""
    if isinstance(value, argparse.Namespace):
        return vars(value)
    return value if isinstance(value, dict) else {}


def number(value: Any) -> float | None:
    """The value if it is a number, and one that can be shown."""
    return value if isinstance(value, int | float) and abs(value) < 1e18 else None  # nan is not


def label(key: Any) -> str:
    """A key of a dictionary in a few characters."""
    return key[:100] if isinstance(key, str) else type(key).__name__ if number(key) is None else str(key)


def text(value: Any) -> str | None:
    """The value if it is a text."""
    return value if isinstance(value, str) else None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read.

    Attributes:
        path: The file.
        content: Its entries; weights that are bare, or in a safetensors file, are its `state_dict`.
        sets: Which entries hold weights, 'averaged' before 'plain'; none in a file of one set, which may be either.
    """

    path: Path
    content: dict[str, Any]
    sets: dict[str, str]

    def weights(self, use_ema: bool | None) -> StateDict:
        """As `state_dict_of`, without gradients."""
        weights = state_dict_of(self.content, use_ema, self.path)
        _check_size(self.path, weights.values())
        return {name: tensor.detach() for name, tensor in weights.items()}

    @property
    def args(self) -> dict[str, Any]:
        """The options of the training."""
        return mapping(self.content.get("args"))

    def model(self, weights: StateDict | None = None) -> str | None:
        """The model by its name, else by the shapes of `weights`."""
        arch = text(self.content.get("arch"))
        return arch if arch and timm.is_model(arch) else recognise(weights) if weights else None

    def number(self, name: str) -> float | None:
        """An entry that is a number."""
        return number(self.content.get(name))


def open_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint of any layout.

    Raises:
        UserError: If it is missing, damaged, or holds other tensors than its file has values for.
    """
    content = read_checkpoint(path)
    for name, tensor in tensors_in(content):
        if not _is_dense(tensor):
            raise UserError(f"{path} holds {name!r}, which is no dense tensor of numbers; save it as one.")
    _check_size(path, (tensor for _, tensor in tensors_in(content)))
    if path.suffix == ".safetensors":
        return Checkpoint(path, {**_metadata(path), "state_dict": content}, {})
    sets = weight_sets(content)
    return Checkpoint(path, content if sets else {"state_dict": content}, sets)


def _check_size(path: Path, tensors: Iterable[torch.Tensor]) -> None:
    """Refuse numbers that are stored once and stand for many, before anything is computed with them."""
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if total > _COPIES * path.stat().st_size:
        raise UserError(f"{path} is refused: its tensors would take {total:,} bytes, which it does not hold.")


def _is_dense(tensor: torch.Tensor) -> bool:
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        return False
    try:
        is_finite(tensor.new_empty(0))
    except RuntimeError:  # types such as four bits a number, with which torch does not compute
        return False
    return True


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all numbers of a tensor are finite."""
    wide = tensor.is_floating_point() and tensor.element_size() == 1  # old torch only converts these
    return bool(torch.isfinite(tensor.float() if wide else tensor).all())


def _metadata(path: Path) -> dict[str, Any]:
    """What a safetensors file says beside its tensors."""
    with safe_open(path, framework="pt") as file:
        found: dict[str, Any] = dict(file.metadata() or {})
    for name, kind in (("epoch", int), ("metric", float)):
        with suppress(KeyError, ValueError):
            found[name] = kind(found[name])
    return {name: value for name, value in found.items() if name not in ("format", CHECKSUM)}


def dtype_name(tensor: torch.Tensor) -> str:
    """As torch names the type, without `torch.`."""
    return str(tensor.dtype).removeprefix("torch.")


def checkpoints_at(path: str | Path) -> list[Path]:
    """A file, or all checkpoints of a folder.

    Raises:
        UserError: If there is none.
    """
    path = Path(path)
    if not path.is_dir():
        return [find_checkpoint(path)]
    endings = tuple(ending for endings in LAYOUTS.values() for ending in endings)
    files = sorted(file for file in path.iterdir() if file.name.endswith(endings) and not file.name.startswith("."))
    if not files:
        raise UserError(f"The folder {path} holds no checkpoint ({', '.join(endings)}).")
    return files
