"""Command line of the study."""

import argparse
import sys
from pathlib import Path

import studies.data_efficiency
from studies.data_efficiency.models import SIZES
from studies.data_efficiency.results import draw, table, write_csv
from studies.data_efficiency.runs import run_missing
from vip.cli import run
from vip.cli.arguments import Parser, at_least
from vip.training.runtime import setup_runtime


def main(argv: list[str]) -> None:
    """Train what is not there yet, and show all results."""
    args = _parser().parse_args(argv)
    output = Path(args.output or f"output/data-efficiency-{args.size}")
    device = setup_runtime(args.device).device
    results = run_missing(args.data, args.size, device, output, args.jobs)
    write_csv(results, output / "results.csv")
    print(table(results, args.size))
    for name in draw(results, output):
        print(name, file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m studies.data_efficiency",
        description=studies.data_efficiency.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data", help="CIFAR-10 as an image folder with train/ and val/")
    parser.add_argument("--size", choices=SIZES, default="small", help="size of models and trainings")
    parser.add_argument("--jobs", type=at_least(1), default=1, help="trainings at a time")
    parser.add_argument("--device", help="device (default: cuda where there is one, else cpu)")
    parser.add_argument("--output", help="folder of the results (default: output/data-efficiency-SIZE)")
    return parser


if __name__ == "__main__":
    sys.exit(run("studies.data_efficiency", main))
