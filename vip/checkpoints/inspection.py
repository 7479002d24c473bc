"""Looking into a checkpoint, and whether it is whole."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from vip.checkpoints.reading import (
    Checkpoint,
    dtype_name,
    is_finite,
    label,
    mapping,
    number,
    open_checkpoint,
    tensors_in,
    text,
)
from vip.errors import UserError
from vip.files import check_records
from vip.training.weights import (
    CHECKSUM,
    count_classes,
    find_checkpoint,
)


@dataclass(frozen=True)
class Entry:
    """An entry of a checkpoint: its name, what it holds in a few words, and the bytes of its tensors."""

    name: str
    holds: str
    bytes: int


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds and says of itself; None where it says nothing.

    Attributes:
        layout: 'training state', 'published', 'bare weights' or 'safetensors'.
        recognised: The model was told from the shapes of the weights.
        parameters: Numbers in the weights, without the statistics of BatchNorm.
        weights: 'averaged' and 'plain', in the order in which they are chosen; empty where a file does not say.
        training_aids: Tensors that only training has.
        epoch: The epoch that ended.
        batch: Batches that were done of the next one.
    """

    path: str
    layout: str
    bytes: int
    model: str | None
    recognised: bool
    parameters: int
    tensors: int
    dtypes: list[str]
    classes: int | None
    input_size: list[float] | None
    weights: list[str]
    training_aids: int
    epoch: float | None
    batch: float | None
    updates: float | None
    metric: float | None
    metric_name: str | None
    optimizer: str | None
    learning_rate: float | None
    schedule: str | None
    entries: list[Entry]


@dataclass(frozen=True)
class Verdict:
    """What there is to say of a checkpoint that is whole.

    Attributes:
        tensors: Tensors that were looked at.
        has_checksum: Whether there was a checksum to check.
        sha256: Of the file.
    """

    tensors: int
    has_checksum: bool
    sha256: str


def inspect(path: str | Path) -> Contents:
    """Tell what a checkpoint holds.

    Args:
        path: A file, or the folder of a run: its best checkpoint, else its last.

    Raises:
        UserError: If it cannot be read or holds no weights.
    """
    checkpoint = open_checkpoint(find_checkpoint(path))
    content, args, weights = checkpoint.content, checkpoint.args, checkpoint.weights(None)
    known = checkpoint.model()
    model = known or checkpoint.model(weights)
    aids = (tensors_in(content.get(name)) for name in ("task_state", "task_state_ema"))
    return Contents(
        path=str(checkpoint.path),
        layout=_layout(checkpoint),
        bytes=checkpoint.path.stat().st_size,
        model=model or text(content.get("arch")),
        recognised=known is None and model is not None,
        parameters=sum(tensor.numel() for name, tensor in weights.items() if not _is_statistic(name)),
        tensors=len(weights),
        dtypes=sorted({dtype_name(tensor) for tensor in weights.values()}),
        classes=(count_classes(model, weights) if model else None) or len(mapping(content.get("class_to_idx"))) or None,
        input_size=_input_size(mapping(content.get("data_config")), args),
        weights=list(checkpoint.sets),
        training_aids=sum(1 for found in aids for _ in found),
        epoch=checkpoint.number("epoch"),
        batch=number(mapping(content.get("position")).get("batch")),
        updates=checkpoint.number("num_updates"),
        metric=checkpoint.number("metric"),
        metric_name=text(args.get("eval_metric")),
        optimizer=text(args.get("opt")),
        learning_rate=_learning_rate(mapping(content.get("optimizer"))),
        schedule=text(args.get("sched")),
        entries=[_describe(name, value) for name, value in content.items()],
    )


def _layout(checkpoint: Checkpoint) -> str:
    if checkpoint.path.suffix == ".safetensors":
        return "safetensors"
    return "training state" if "optimizer" in checkpoint.content else "published" if checkpoint.sets else "bare weights"


def _learning_rate(optimizer: dict[str, Any]) -> float | None:
    """The highest of its parameter groups."""
    groups = optimizer.get("param_groups")
    rates = [number(mapping(group).get("lr")) for group in groups] if isinstance(groups, list) else []
    return max((rate for rate in rates if rate is not None), default=None)


def _is_statistic(name: str) -> bool:
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


def _input_size(data_config: dict[str, Any], args: dict[str, Any]) -> list[float] | None:
    side, channels = args.get("img_size"), number(args.get("in_chans"))
    for size in (data_config.get("input_size"), args.get("input_size"), (channels or 3, side, side)):
        if isinstance(size, list | tuple) and len(size) == 3 and all(number(n) is not None for n in size):
            return list(size)
    return None


def _describe(name: Any, value: Any) -> Entry:
    sizes = [tensor.numel() * tensor.element_size() for _, tensor in tensors_in(value)]
    if sizes:
        holds = f"{len(sizes)} tensors"
    elif value is None or isinstance(value, bool) or number(value) is not None:
        holds = str(value)
    elif isinstance(value, str):
        holds = value[:60]
    else:
        inside = mapping(value) or value
        count = len(inside) if isinstance(inside, dict | list | tuple | set | bytes) else 1
        holds = f"{type(value).__name__} of {count}"
    return Entry(label(name), holds, sum(sizes))


def verify(path: Path) -> Verdict:
    """Check that a checkpoint is whole: its checksums, that it loads without running code, that all is finite.

    Raises:
        UserError: If it is not; the message says what is wrong.
    """
    checkpoint = open_checkpoint(path)
    checkpoint.weights(None)
    count = 0
    for name, tensor in tensors_in(checkpoint.content):
        count += 1
        if not is_finite(tensor):
            raise UserError(f"{path} holds numbers that are not finite, in {name!r}; take an earlier one of the run.")
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            has_checksum = CHECKSUM in (file.metadata() or {})
    else:
        has_checksum = check_records(path)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return Verdict(count, has_checksum, digest.hexdigest())
