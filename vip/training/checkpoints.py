"""What is done with checkpoints after training: looking into them, verifying, averaging and converting them."""

import argparse
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError, safe_open

from vip.errors import UserError
from vip.files import check_records, replacing, save
from vip.training.saver import RECOVERY
from vip.training.weights import (
    CHECKSUM,
    ENTRIES,
    StateDict,
    count_classes,
    find_checkpoint,
    read_checkpoint,
    recognise,
    state_dict_of,
    tensors_checksum,
    weight_sets,
)

LAYOUTS = {  # of files, and their usual endings
    "safetensors": (".safetensors",),
    "pth": (".pth", ".pt"),
    "published": (".pth.tar",),
}
_COPIES = 10  # more than this many times the size of their file no honest tensors have, even where they share memory


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


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        weights: 'averaged', 'plain', both, or empty where the source does not say.
        tensors: Tensors in the file.
        bytes: Size of the file.
        left_out: Entries of the source that the file does not have.
    """

    weights: str
    tensors: int
    bytes: int
    left_out: list[str]


@dataclass(frozen=True)
class Source:
    """A checkpoint that may be averaged."""

    path: Path
    model: str | None
    epoch: float | None
    metric: float | None
    lower_is_better: bool
    weights: str
    classes: dict[str, int]
    checksum: str


def _tensors(content: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors at any depth, each once, under names such as `optimizer/state/3/exp_avg`."""
    seen, waiting = set(), [("", content)]
    while waiting:
        name, value = waiting.pop()
        if id(value) in seen:  # a file can refer to itself
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            yield name, value
        inside = _mapping(value) or (dict(enumerate(value)) if isinstance(value, list | tuple) else {})
        for key, item in inside.items():
            waiting.append((f"{name}/{_label(key)}".lstrip("/")[-200:], item))


def _mapping(value: Any) -> dict[Any, Any]:
    """A dictionary, or what is in a namespace (timm's `args` are one); empty for anything else."""
    if isinstance(value, argparse.Namespace):
        return vars(value)
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and abs(value) < 1e18 else None  # nan is not


def _label(key: Any) -> str:
    return key[:100] if isinstance(key, str) else type(key).__name__ if _number(key) is None else str(key)


def _text(value: Any) -> str | None:
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
        return _mapping(self.content.get("args"))

    def model(self, weights: StateDict | None = None) -> str | None:
        """The model by its name, else by the shapes of `weights`."""
        arch = _text(self.content.get("arch"))
        return arch if arch and timm.is_model(arch) else recognise(weights) if weights else None

    def number(self, name: str) -> float | None:
        """An entry that is a number."""
        return _number(self.content.get(name))


def open_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint of any layout.

    Raises:
        UserError: If it is missing, damaged, or holds other tensors than its file has values for.
    """
    content = read_checkpoint(path)
    for name, tensor in _tensors(content):
        if not _is_dense(tensor):
            raise UserError(f"{path} holds {name!r}, which is no dense tensor of numbers; save it as one.")
    _check_size(path, (tensor for _, tensor in _tensors(content)))
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
        _is_finite(tensor.new_empty(0))
    except RuntimeError:  # types such as four bits a number, with which torch does not compute
        return False
    return True


def _is_finite(tensor: torch.Tensor) -> bool:
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


# --- looking into one


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
    aids = (_tensors(content.get(name)) for name in ("task_state", "task_state_ema"))
    return Contents(
        path=str(checkpoint.path),
        layout=_layout(checkpoint),
        bytes=checkpoint.path.stat().st_size,
        model=model or _text(content.get("arch")),
        recognised=known is None and model is not None,
        parameters=sum(tensor.numel() for name, tensor in weights.items() if not _is_statistic(name)),
        tensors=len(weights),
        dtypes=sorted({_dtype(tensor) for tensor in weights.values()}),
        classes=(count_classes(model, weights) if model else None)
        or len(_mapping(content.get("class_to_idx")))
        or None,
        input_size=_input_size(_mapping(content.get("data_config")), args),
        weights=list(checkpoint.sets),
        training_aids=sum(1 for found in aids for _ in found),
        epoch=checkpoint.number("epoch"),
        batch=_number(_mapping(content.get("position")).get("batch")),
        updates=checkpoint.number("num_updates"),
        metric=checkpoint.number("metric"),
        metric_name=_text(args.get("eval_metric")),
        optimizer=_text(args.get("opt")),
        learning_rate=_learning_rate(_mapping(content.get("optimizer"))),
        schedule=_text(args.get("sched")),
        entries=[_describe(name, value) for name, value in content.items()],
    )


def _layout(checkpoint: Checkpoint) -> str:
    if checkpoint.path.suffix == ".safetensors":
        return "safetensors"
    return "training state" if "optimizer" in checkpoint.content else "published" if checkpoint.sets else "bare weights"


def _learning_rate(optimizer: dict[str, Any]) -> float | None:
    """The highest of its parameter groups."""
    groups = optimizer.get("param_groups")
    rates = [_number(_mapping(group).get("lr")) for group in groups] if isinstance(groups, list) else []
    return max((rate for rate in rates if rate is not None), default=None)


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _is_statistic(name: str) -> bool:
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


def _input_size(data_config: dict[str, Any], args: dict[str, Any]) -> list[float] | None:
    side, channels = args.get("img_size"), _number(args.get("in_chans"))
    for size in (data_config.get("input_size"), args.get("input_size"), (channels or 3, side, side)):
        if isinstance(size, list | tuple) and len(size) == 3 and all(_number(n) is not None for n in size):
            return list(size)
    return None


def _describe(name: Any, value: Any) -> Entry:
    sizes = [tensor.numel() * tensor.element_size() for _, tensor in _tensors(value)]
    if sizes:
        holds = f"{len(sizes)} tensors"
    elif value is None or isinstance(value, bool) or _number(value) is not None:
        holds = str(value)
    elif isinstance(value, str):
        holds = value[:60]
    else:
        inside = _mapping(value) or value
        count = len(inside) if isinstance(inside, dict | list | tuple | set | bytes) else 1
        holds = f"{type(value).__name__} of {count}"
    return Entry(_label(name), holds, sum(sizes))


# --- verifying


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


def verify(path: Path) -> Verdict:
    """Check that a checkpoint is whole: its checksums, that it loads without running code, that all is finite.

    Raises:
        UserError: If it is not; the message says what is wrong.
    """
    checkpoint = open_checkpoint(path)
    checkpoint.weights(None)
    count = 0
    for name, tensor in _tensors(checkpoint.content):
        count += 1
        if not _is_finite(tensor):
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


# --- averaging


def average(
    paths: Sequence[str | Path],
    output: Path,
    use_ema: bool | None = None,
    last: int | None = None,
    best: int | None = None,
    overwrite: bool = False,
) -> tuple[list[Source], Written]:
    """Write the mean of the weights of checkpoints, in float64; integers are those of the newest.

    Args:
        paths: Files, or the folder of a run, which stands for the epochs that it holds.
        output: File to write, bare weights or by its ending safetensors.
        use_ema: Take the averaged weights; None: where there are any.
        last: Take the newest so many.
        best: Take the best so many by the metric that training ranked them by; of equals the earlier.
        overwrite: Replace the output.

    Returns:
        What was averaged, oldest first, and what was written.

    Raises:
        UserError: If they cannot be averaged, or the output cannot be written.
    """
    layout = bare_layout(output)
    check_output(output, layout, overwrite)
    sources = _choose(_distinct([_source(path, use_ema) for path in _candidates(paths)]), last, best)
    if len({source.weights for source in sources} - {""}) > 1:
        without = next(source.path for source in sources if source.weights == "plain")
        raise UserError(f"{without} has no averaged weights and others have: take the plain ones of all, --no-use-ema.")
    if len({tuple(sorted(source.classes.items())) for source in sources if source.classes}) > 1:
        raise UserError("These checkpoints are of different classes, or number them differently; they have no mean.")
    weights = _mean([source.path for source in sources], use_ema)
    arch = None if layout == "pth" else sources[-1].model or recognise(weights)
    _write(output, layout, weights, {"arch": arch} if arch else {})
    return sources, Written(sources[-1].weights, len(weights), output.stat().st_size, [])


def _candidates(paths: Sequence[str | Path]) -> list[Path]:
    if len(paths) == 1 and Path(paths[0]).is_dir():
        return [path for path in checkpoints_at(paths[0]) if path.name != RECOVERY]
    for path in paths:
        if Path(path).is_dir():
            raise UserError(f"{path} is a folder: give the folder of one run, or files.")
    return [find_checkpoint(path) for path in paths]


def _source(path: Path, use_ema: bool | None) -> Source:
    checkpoint = open_checkpoint(path)
    classes = _mapping(checkpoint.content.get("class_to_idx"))
    return Source(
        path=path,
        model=checkpoint.model(),
        epoch=checkpoint.number("epoch"),
        metric=checkpoint.number("metric"),
        lower_is_better=checkpoint.args.get("eval_metric") == "loss",
        weights="plain" if use_ema is False and checkpoint.sets else next(iter(checkpoint.sets), ""),
        classes={str(name): index for name, index in classes.items() if isinstance(index, int)},
        checksum=tensors_checksum(checkpoint.weights(use_ema)),
    )


def _distinct(sources: list[Source]) -> list[Source]:
    """Each weights once (a run has its last and its best epoch under two names), oldest first."""
    distinct: dict[str, Source] = {}
    for source in sorted(sources, key=lambda source: source.path.name.startswith(("last.", "model_best."))):
        distinct.setdefault(source.checksum, source)
    found = list(distinct.values())
    if all(source.epoch is not None for source in found):
        found.sort(key=lambda source: source.epoch or 0)
    return found


def _choose(sources: list[Source], last: int | None, best: int | None) -> list[Source]:
    wanted = last or best
    if wanted is None:
        return sources
    for source in sources:
        if (source.epoch if last else source.metric) is None:
            raise UserError(
                f"{source.path} does not say its {'epoch' if last else 'metric'}: name the files to average."
            )
    if wanted > len(sources):
        raise UserError(
            f"{wanted} epochs are asked for and there are {len(sources)}; runs keep the --checkpoint-hist best."
        )
    if last:
        return sources[-last:]
    sign = 1 if sources[-1].lower_is_better else -1
    ranked = sorted(sources, key=lambda source: sign * (source.metric or 0))
    return [source for source in sources if source in ranked[:best]]


def _mean(paths: list[Path], use_ema: bool | None) -> StateDict:
    sums: StateDict = {}
    weights: StateDict = {}
    for path in paths:
        before, weights = weights, open_checkpoint(path).weights(use_ema)
        if before:
            _check_same(paths[0], before, path, weights)
        for name, tensor in weights.items():
            if not _is_finite(tensor):
                raise UserError(f"{path} holds numbers that are not finite, in {name!r}; leave it out.")
            if tensor.is_floating_point() or tensor.is_complex():
                wide = tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
                sums[name] = sums[name].add_(wide) if name in sums else wide.clone()
    return {
        name: (sums[name] / len(paths)).to(tensor.dtype) if name in sums else tensor for name, tensor in weights.items()
    }


def _check_same(first: Path, expected: StateDict, path: Path, weights: StateDict) -> None:
    def facts(tensor: torch.Tensor | None) -> str:
        return "missing" if tensor is None else f"{list(tensor.shape)} {_dtype(tensor)}"

    names = dict.fromkeys([*expected, *weights])
    differ = [name for name in names if facts(expected.get(name)) != facts(weights.get(name))]
    if differ:
        name = differ[0]
        raise UserError(
            f"{first} and {path} differ in {len(differ)} of {len(names)} tensors and have no mean: {name[:100]!r} is "
            f"{facts(expected.get(name))} in the first and {facts(weights.get(name))} in the other."
        )


# --- writing


def layout_of(output: Path) -> str:
    """The layout that the ending of a file stands for.

    Raises:
        UserError: If it stands for none.
    """
    for layout in reversed(LAYOUTS):
        if output.name.endswith(LAYOUTS[layout]):
            return layout
    endings = ", ".join(ending for endings in LAYOUTS.values() for ending in endings)
    raise UserError(f"{output} ends in none of {endings}; name it so that its ending says what it holds.")


def bare_layout(output: Path) -> str:
    """The layout that the ending of a file of bare weights stands for."""
    return "safetensors" if layout_of(output) == "safetensors" else "pth"


def check_output(output: Path, layout: str, overwrite: bool) -> None:
    """Refuse an output before anything is read.

    Raises:
        UserError: If it is there, is below no folder, or has the ending of another layout.
    """
    if (layout == "safetensors") != (layout_of(output) == "safetensors"):
        raise UserError(f"{output} would be read by its ending, which is not that of the layout {layout}; rename it.")
    if output.is_dir() or not output.parent.is_dir():
        raise UserError(f"{output} is {'a folder' if output.is_dir() else 'in no folder'}; name a file in a folder.")
    if output.exists() and not overwrite:
        raise UserError(f"{output} is there already: name another --output, or add --overwrite.")


def convert(
    path: str | Path, output: Path, layout: str, use_ema: bool | None = None, overwrite: bool = False
) -> Written:
    """Write the weights of a checkpoint in another layout.

    Args:
        path: A file, or the folder of a run: its best checkpoint, else its last.
        output: File to write.
        layout: One of `LAYOUTS`: the published layout has plain and averaged weights, the others have one of them.
        use_ema: Take the averaged weights; None: where there are any.
        overwrite: Replace the output.

    Raises:
        UserError: If the checkpoint cannot be read, or the output cannot be written.
    """
    check_output(output, layout, overwrite)
    source = open_checkpoint(find_checkpoint(path))
    weights = source.weights(use_ema)
    arch = None if layout == "pth" else source.model(weights) or _text(source.content.get("arch"))
    told = {"epoch": source.number("epoch"), "arch": arch, "metric": source.number("metric")}
    facts: dict[str, Any] = {name: value for name, value in told.items() if value is not None}
    facts["version"] = 2  # in which `epoch` is the one that ended
    sets = source.sets or {"plain": "state_dict"}
    if layout == "published":
        states = {ENTRIES[kind][0]: source.weights(kind == "averaged") for kind in sets}
        _write(output, layout, {**facts, **states}, {})
    else:
        kind = "plain" if use_ema is False else next(iter(sets))
        sets = {kind: sets[kind]}
        _write(output, layout, weights, facts)
    kept = {*sets.values(), *({} if layout == "pth" else facts)}
    left_out = [_label(name) for name in source.content if name not in kept]
    kinds = " and ".join(sets) if source.sets else ""
    return Written(kinds, len(weights) * len(sets), output.stat().st_size, left_out)


def _write(output: Path, layout: str, content: dict[str, Any], facts: dict[str, Any]) -> None:
    try:
        if layout != "safetensors":
            return save(content, output)
        if "__metadata__" in content:  # of which safetensors would make a file that it cannot read
            raise ValueError("no tensor in safetensors can be called __metadata__")
        # the format has no shared memory
        tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in content.items()}
        metadata = {"format": "pt", **{name: str(value) for name, value in facts.items()}}
        data = safetensors.torch.save(tensors, {**metadata, CHECKSUM: tensors_checksum(tensors)})
        with replacing(output) as path:
            path.write_bytes(data)  # safetensors would make a file that other users cannot read
    except (OSError, RuntimeError, KeyError, ValueError, SafetensorError) as e:  # torch and safetensors raise them all
        reason = getattr(e, "strerror", None) or str(e).partition("\n")[0]
        raise UserError(f"Cannot write {output} ({reason}).") from e
