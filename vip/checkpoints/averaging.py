"""The mean of the weights of checkpoints."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from vip.checkpoints.reading import checkpoints_at, dtype_name, is_finite, mapping, open_checkpoint
from vip.checkpoints.writing import Written, bare_layout, check_output, write
from vip.errors import UserError
from vip.training.saver import RECOVERY
from vip.training.weights import StateDict, find_checkpoint, recognise, tensors_checksum


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
    write(output, layout, weights, {"arch": arch} if arch else {})
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
    classes = mapping(checkpoint.content.get("class_to_idx"))
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
            if not is_finite(tensor):
                raise UserError(f"{path} holds numbers that are not finite, in {name!r}; leave it out.")
            if tensor.is_floating_point() or tensor.is_complex():
                wide = tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
                sums[name] = sums[name].add_(wide) if name in sums else wide.clone()
    return {
        name: (sums[name] / len(paths)).to(tensor.dtype) if name in sums else tensor for name, tensor in weights.items()
    }


def _check_same(first: Path, expected: StateDict, path: Path, weights: StateDict) -> None:
    def facts(tensor: torch.Tensor | None) -> str:
        return "missing" if tensor is None else f"{list(tensor.shape)} {dtype_name(tensor)}"

    names = dict.fromkeys([*expected, *weights])
    differ = [name for name in names if facts(expected.get(name)) != facts(weights.get(name))]
    if differ:
        name = differ[0]
        raise UserError(
            f"{first} and {path} differ in {len(differ)} of {len(names)} tensors and have no mean: {name[:100]!r} is "
            f"{facts(expected.get(name))} in the first and {facts(weights.get(name))} in the other."
        )
