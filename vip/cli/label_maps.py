"""`vip label-maps`: convert, check and time label maps."""

import argparse
import sys
from functools import partial

from tqdm import tqdm

from vip.cli.arguments import Parser
from vip.data.config import DatasetConfig
from vip.data.datasets import ReadableImageDataset, create_split, training_split
from vip.errors import UserError
from vip.token_labels.maps import map_keys
from vip.token_labels.store import CheckReport, check, pack, read_rate, unpack


def main(argv: list[str]) -> int:
    """Parse the command line and do it; 1 if a check found something."""
    args = _parser().parse_args(argv)
    progress = partial(tqdm, unit="map", dynamic_ncols=True, leave=False, disable=not sys.stderr.isatty())
    if args.action == "check":
        report = check(args.folder, _image_keys(args.images) if args.images else None, args.same_as, progress)
        print(_describe(report))
        return int(not report.good)
    if args.action == "benchmark":
        print("| label maps | layout | maps | bytes a map | files | maps a second |")
        print("| :--- | :--- | ---: | ---: | ---: | ---: |")
        for folder in args.folder:
            rate = read_rate(folder, args.seconds)
            print(
                f"| {folder} | {rate.layout} | {rate.maps} | {rate.bytes / rate.maps:,.0f} | {rate.files} "
                f"| {rate.maps_per_second:,.0f} |"
            )
        return 0
    convert = pack if args.action == "pack" else unpack
    try:
        count = convert(args.source, args.target, progress)
    except OSError as e:
        raise UserError(f"Cannot write to {args.target} ({e.strerror}); make room, or name another folder.") from e
    print(f"{count} label maps written to {args.target}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="vip label-maps", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    for name, text in (("pack", "write a few large files"), ("unpack", "write a file an image, as published")):
        action = actions.add_parser(name, help=text, description=f"Convert label maps: {text}.")
        action.add_argument("source", help="folder of label maps of either layout")
        action.add_argument("target", help="folder to write, which is yet to be")
    action = actions.add_parser("check", help="read every map", description="Read every map; status 1 if one is bad.")
    action.add_argument("folder", help="folder of label maps of either layout")
    action.add_argument("--images", metavar="TRAIN_DIR", help="folder of images that each need a map")
    action.add_argument("--same-as", metavar="DIR", help="another folder that ought to hold the same maps")
    action = actions.add_parser("benchmark", help="time reading", description="Time reading maps in random order.")
    action.add_argument("folder", nargs="+", help="folders of label maps")
    action.add_argument("--seconds", type=float, default=5, help="time for each folder (default: 5)")
    return parser


def _image_keys(folder: str) -> list[str]:
    images = create_split(DatasetConfig(data=folder), training_split(folder), is_training=False)
    assert isinstance(images, ReadableImageDataset)
    return map_keys(images.filenames())


def _describe(report: CheckReport) -> str:
    shapes = ", ".join("x".join(map(str, shape)) for shape in sorted(report.shapes))
    lines = [
        f"{report.maps} label maps, {report.layout} layout, shape {shapes or 'unknown'}, classes up to "
        f"{report.highest_class}, {report.bytes / max(report.maps, 1):,.0f} bytes each"
    ]
    for what in ("damaged", "missing", "unused", "different"):
        if keys := getattr(report, what):
            lines.append(f"{len(keys)} {what}: {', '.join(keys[:5])}{', ...' * (len(keys) > 5)}")
    if len(report.shapes) > 1:
        lines.append("The shapes differ: generate all maps at one --img-size.")
    return "\n".join([*lines, "All is well." if report.good else "This is not well."])
