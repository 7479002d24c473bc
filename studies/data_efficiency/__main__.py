"""Command line of the study."""

import argparse
import sys
from pathlib import Path

import studies.data_efficiency
from studies.data_efficiency.models import SIZES
from studies.data_efficiency.results import draw, table, write_csv
from studies.data_efficiency.runs import run_missing
from vip.errors import UserError
from vip.training.runtime import setup_runtime


def main() -> None:
    """Train what is not there yet, and show all results."""
    args = _arguments()
    output = Path(args.output or f"output/data-efficiency-{args.size}")
    try:
        device = setup_runtime(args.device).device
        results = run_missing(args.data, args.size, device, output, args.jobs)
        write_csv(results, output / "results.csv")
        print(table(results, args.size))
        for name in draw(results, output):
            print(name, file=sys.stderr)
    except UserError as e:
        sys.exit(f"Error: {e}")
    except KeyboardInterrupt:
        sys.exit(130)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m studies.data_efficiency",
        description=studies.data_efficiency.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data", help="CIFAR-10 as an image folder with train/ and val/")
    parser.add_argument("--size", choices=SIZES, default="small", help="size of models and trainings")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    parser.add_argument("--device", help="device (default: cuda where there is one, else cpu)")
    parser.add_argument("--output", help="folder of the results (default: output/data-efficiency-SIZE)")
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f"--jobs is {args.jobs}, expected at least 1")
    return args


if __name__ == "__main__":
    main()
