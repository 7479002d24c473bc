"""`vip checkpoint`: look into checkpoints, verify, average, strip and convert them."""

import argparse
import dataclasses
import json
from pathlib import Path

from vip.checkpoints.averaging import average
from vip.checkpoints.inspection import Contents, inspect, verify
from vip.checkpoints.reading import LAYOUTS, checkpoints_at
from vip.checkpoints.writing import Written, bare_layout, convert, layout_of
from vip.cli.arguments import Parser
from vip.errors import UserError


def main(argv: list[str]) -> int:
    """Parse the command line and do it; 1 if a checkpoint that was to be verified is bad."""
    args = _parser().parse_args(argv)
    try:
        return _do(args)
    except OSError as e:
        raise UserError(f"Cannot read or write {e.filename} ({e.strerror or e}).") from e


def _do(args: argparse.Namespace) -> int:
    if args.action == "inspect":
        contents = inspect(args.path)
        _print(json.dumps(dataclasses.asdict(contents), indent=4) if args.json else _describe(contents))
    elif args.action == "verify":
        return _verify(args.path)
    elif args.action == "average":
        sources, written = average(args.path, args.output, args.use_ema, args.last, args.best, args.overwrite)
        for source in sources:
            epoch = "" if source.epoch is None else f", epoch {source.epoch}"
            _print(f"{source.path}{epoch}{'' if source.metric is None else f', metric {source.metric:.6g}'}")
        _print(f"mean of {len(sources)}: {_report(written, args.output)}")
    else:
        layout = bare_layout(args.output) if args.action == "strip" else args.to or layout_of(args.output)
        _print(_report(convert(args.path, args.output, layout, args.use_ema, args.overwrite), args.output))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="vip checkpoint", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    one, many = "a checkpoint, or the folder of a run: its best, else its last", "checkpoints, or the folder of a run"

    action = actions.add_parser("inspect", help="tell what a checkpoint holds", description="Tell what it holds.")
    action.add_argument("path", help=one)
    action.add_argument("--json", action="store_true", help="for machines")

    text = (
        "Check that checkpoints are whole: their checksums, that they load without running code, that all numbers are "
    )
    action = actions.add_parser(
        "verify", help="check that they are whole", description=f"{text}finite; status 1 if not."
    )
    action.add_argument("path", nargs="+", help=f"{many}, which stands for all that it holds")

    text = "Write the mean of weights, each counted once, in float64; integers are those of the newest."
    action = actions.add_parser("average", help="average weights", description=text)
    action.add_argument("path", nargs="+", help=f"{many}, which stands for the epochs that it holds")
    chosen = action.add_mutually_exclusive_group()
    chosen.add_argument("--last", type=_count, metavar="K", help="the newest K epochs (default: all)")
    chosen.add_argument("--best", type=_count, metavar="K", help="the best K epochs by the metric of training")
    _add_output(action, use_ema=True)

    text = "Write the weights alone; .safetensors or what torch.load reads, by the ending."
    action = actions.add_parser("strip", help="write the weights alone", description=text)
    action.add_argument("path", help=one)
    _add_output(action, use_ema=True)

    text = "Write weights in another layout: safetensors, bare weights (pth), or as the published training scripts did."
    action = actions.add_parser("convert", help="write weights in another layout", description=text)
    action.add_argument("path", help=one)
    endings = ", ".join(f"{layout} for {' and '.join(endings)}" for layout, endings in LAYOUTS.items())
    action.add_argument("--to", choices=tuple(LAYOUTS), help=f"layout (default: by the ending, {endings})")
    _add_output(action, use_ema=False)
    return parser


def _add_output(action: argparse.ArgumentParser, use_ema: bool) -> None:
    action.add_argument("--output", type=Path, required=True, metavar="FILE", help="file to write")
    action.add_argument("--overwrite", action="store_true", help="replace FILE if it is there")
    action.set_defaults(use_ema=None)
    if use_ema:
        text = "take the averaged weights, or the plain ones (default: averaged where there are any)"
        action.add_argument("--use-ema", action=argparse.BooleanOptionalAction, help=text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of epochs")
    return int(text)


def _verify(paths: list[str]) -> int:
    good = total = 0
    for given in paths:
        try:
            files = checkpoints_at(given)
        except UserError as e:
            files = []
            total += 1
            _print(f"bad: {e}")
        for file in files:
            total += 1
            try:
                verdict = verify(file)
            except UserError as e:
                _print(f"bad: {e}")
            else:
                good += 1
                checksum = "its checksum is right" if verdict.has_checksum else "it has no checksum"
                _print(f"good: {file}: {verdict.tensors} tensors, all finite, {checksum}, sha256 {verdict.sha256}")
    _print(f"{good} of {total} are whole.")
    return int(good < total)


def _report(written: Written, output: Path) -> str:
    lines = [
        f"{written.weights} weights, ".lstrip()
        + f"{written.tensors} tensors, {_size(written.bytes)}, written to {output}"
    ]
    if written.left_out:
        lines.append(f"left out: {', '.join(map(_plain, written.left_out))}")
    if any(name.startswith("task_state") for name in written.left_out):
        lines.append("(task_state is what only training has, such as the auxiliary head of token labeling)")
    return "\n".join(lines)


def _describe(contents: Contents) -> str:
    c = contents
    dtypes, size = ", ".join(c.dtypes), "x".join(str(n) for n in c.input_size or ())
    rows = {
        "file": f"{c.path}: {c.layout}, {_size(c.bytes)}",
        "model": _plain(c.model) + " (recognised by its shapes)" * c.recognised,
        "parameters": f"{c.parameters:,}, in {c.tensors} tensors, {dtypes}",
        "classes": _plain(c.classes),
        "input": size or "-",
        "weights": (", ".join(c.weights) or "one set")
        + f", {c.training_aids} tensors of training alone" * bool(c.training_aids),
        "epoch": _plain(c.epoch) + f", and {c.batch} batches of the next" * bool(c.batch),
        "updates": _plain(c.updates),
        "metric": "-" if c.metric is None else f"{c.metric:.6g} {c.metric_name or ''}".rstrip(),
        "optimizer": _plain(c.optimizer) + (f", learning rate {c.learning_rate:.3g}" if c.learning_rate else ""),
        "schedule": _plain(c.schedule),
    }
    lines = [f"{name:11} {text}" for name, text in rows.items()]
    names = [_plain(entry.name) for entry in c.entries]
    for name, entry in zip(names, c.entries, strict=True):
        size = f", {_size(entry.bytes)}" if entry.bytes else ""
        lines.append(f"  {name:{max(map(len, names))}}  {_plain(entry.holds)}{size}")
    return "\n".join(lines)


def _plain(value: object) -> str:
    """As it may be printed on a terminal, whatever a file says."""
    return "-" if value is None else repr(value)[1:-1] if isinstance(value, str) else str(value)


def _print(text: str) -> None:
    print(text.encode(errors="backslashreplace").decode())  # file names may be any bytes


def _size(count: int) -> str:
    return f"{count / 1e6:,.2f} MB"
