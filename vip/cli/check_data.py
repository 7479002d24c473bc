"""`vip check-data`: look a data set over before training on it; status 1 if a training would be spoilt or stopped."""

import argparse
import dataclasses
import json
import os
import statistics
import sys
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path

from tqdm import tqdm

from vip.cli.arguments import Parser, at_least
from vip.data.check import DataReport, ImageNetReport, SplitReport, check
from vip.data.inspection import KINDS
from vip.errors import UserError
from vip.files import replacing
from vip.training.runtime import available_cores


def main(argv: list[str]) -> int:
    """Parse the command line and check; 1 if there are problems."""
    args = _parser().parse_args(argv)
    folder = Path(args.report or "").absolute().parent
    if args.report and (not os.access(folder, os.W_OK) or os.path.isdir(args.report)):
        raise UserError(f"Cannot write {args.report}: give --report a file in a folder that is there.")
    progress = partial(tqdm, unit="image", dynamic_ncols=True, leave=False, disable=not sys.stderr.isatty())
    report = check(args.data, args.workers, progress)
    text = "\n".join(_describe(report, args.workers))
    print(text.encode(errors="backslashreplace").decode(), flush=True)  # file names may be any bytes
    if args.report:
        _write(args.report, report)
    return int(bool(report.problems))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="vip check-data", description=__doc__)
    parser.add_argument("data", help="what vip train takes: a folder with train/ and val/, or with tar files of these")
    parser.add_argument("--report", metavar="FILE", help="JSON file to write, with the names of all files found")
    cores = available_cores()
    parser.add_argument(
        "--workers", "-j", type=at_least(1), metavar="N", default=cores, help="processes (default: the cores)"
    )
    return parser


def _write(path: str, report: DataReport) -> None:
    content = dataclasses.asdict(report)
    del content["seconds"]  # the rest is the same each time
    try:
        with replacing(path) as file:
            file.write_text(json.dumps(content, indent=1) + "\n")
    except OSError as e:
        raise UserError(f"Cannot write {path} ({e.strerror}); make room, or name another file.") from e


def _describe(report: DataReport, workers: int) -> Iterator[str]:
    for split in report.splits.values():
        yield from _describe_split(split)
    if report.imagenet:
        yield from _describe_imagenet(report.imagenet)
    if report.unreadable:
        files = [f"{name} ({reason})" for name, reason in report.unreadable.items()]
        yield f"{len(files):,} unreadable: {_some(files)}"
    for kind, names in report.suspicious.items():
        yield f"{len(names):,} {kind} ({KINDS[kind]}): {_some(names)}"
    for where, groups in report.duplicates.items():
        if groups:
            yield f"{len(groups):,} duplicates {where.replace('_', ' ')}: {_some([' = '.join(g) for g in groups])}"
    images, size = (sum(getattr(split, what) for split in report.splits.values()) for what in ("images", "bytes"))
    yield (
        f"{images:,} images read in {report.seconds:,.1f} s by {workers} process{'es' * (workers > 1)}: "
        f"{images / report.seconds:,.0f} images and {size / report.seconds / 1e6:,.1f} MB a second"
    )
    if report.problems:
        yield from ("This is not well:", *(f"- {problem}" for problem in report.problems))
    else:
        yield "All is well."


def _describe_split(split: SplitReport) -> Iterator[str]:
    counts = list(split.classes.values())
    sizes = f"{min(counts):,} to {max(counts):,} images (median {statistics.median(counts):g})"
    yield f"{split.path}: {split.images:,} images, {split.bytes / 1e6:,.1f} MB, {len(counts):,} classes of {sizes}"
    for what in ("only_here", "empty_classes", "unbalanced"):
        if names := getattr(split, what):
            yield f"  {len(names):,} {what.replace('_', ' ')}: {_some(names)}"
    if split.left_out:
        yield f"  left out: {', '.join(f'{len(names):,} {ending}' for ending, names in split.left_out.items())}"


def _describe_imagenet(imagenet: ImageNetReport) -> Iterator[str]:
    missing, other = imagenet.missing_classes, imagenet.other_classes
    classes = f"{1000 - len(missing):,} of its classes, without {_some(missing)}" if missing else "all of its classes"
    counts = (f"{n:,} of {imagenet.expected[name]:,} {name} images" for name, n in imagenet.images.items())
    yield f"ImageNet: {', '.join(counts)}, {classes}"
    if other:
        yield f"  {len(other):,} classes that it does not have: {_some(other)}"
    for name in imagenet.drawn:
        yield f"  of every class only a part is in {name}"
    for name, unusual in imagenet.unusual.items():
        if unusual:
            sizes = _some([f"{synset} ({count:,})" for synset, count in unusual.items()])
            yield f"  {len(unusual):,} classes of {name} of sizes that it does not have: {sizes}"


def _some(names: Collection[str]) -> str:
    return ", ".join(list(names)[:3]) + ", ..." * (len(names) > 3)
