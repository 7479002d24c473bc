"""`vip report`: what runs have reached, and whether one is on the track of a published one."""

import math
from pathlib import Path

from vip.cli.arguments import Parser
from vip.reporting.page import write_report
from vip.reporting.runs import POINTS, EpochLog, Standing, compare, differing_options, find_published, read_run


def main(argv: list[str]) -> None:
    """Parse the command line, print the table, and write the page."""
    parser = Parser(prog="vip report", description=__doc__)
    parser.add_argument("run", nargs="+", help="folder of a run, finished or not")
    parser.add_argument("--against", metavar="MODEL", help="folder with a published log: models/vip_s7")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--output", metavar="FOLDER", help="where to write the page (default: report/ in the first run)")
    what.add_argument("--table-only", action="store_true", help="print the table and write no page")
    args = parser.parse_args(argv)
    runs = [read_run(path) for path in args.run]
    print(runs_table(runs))
    against = read_run(args.against) if args.against else None
    standings = []
    for run in runs:
        if published := against or find_published(run):
            standings.append((published, describe(run, published, compare(run, published))))
    if against:
        print(*(f"\n{text}" for _, text in standings), sep="\n")
    if args.table_only:
        return
    own = {run.path.absolute() for run in runs}
    logs = {log.path.absolute(): log for log, _ in standings if log.path.absolute() not in own}
    folder = Path(args.output) if args.output else runs[0].path.parent / "report"
    print(f"\n{write_report(runs, list(logs.values()), [text for _, text in standings], folder)}")


def runs_table(runs: list[EpochLog]) -> str:
    """A Markdown table with a row for each run."""
    lines = [
        "| run | model | epochs | train loss | top-1 | best top-1 | best epoch |",
        "| :--- | :--- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for run in runs:
        top1 = run.column("eval_top1")
        best = run.best_epoch
        lines.append(
            f"| {run.path.parent} | {run.options.get('model', '-')} | {len(top1)} of {run.epochs} "
            f"| {run.rows[-1].get('train_loss', math.nan):.4f} | {top1[-1]:.3f} | {top1[best]:.3f} | {best} |"
        )
    return "\n".join(lines)


def describe(run: EpochLog, published: EpochLog, standing: Standing) -> str:
    """Where a run stands, in sentences."""
    theirs = published.column("eval_top1")
    lines = [
        f"{run.path.parent}: {standing.verdict}.",
        f"Epoch {standing.epoch} of 0 to {run.epochs - 1}: top-1 {standing.top1:.3f} %; {published.path.parent} had "
        f"{standing.published_top1:.3f} % in epoch {standing.published_epoch:.4g} and ended with {theirs[-1]:.3f} % "
        f"(best {max(theirs):.3f} %).",
        f"Over the last {standing.window} epochs {standing.difference:+.2f} points, {_shift(standing.epochs_ahead)}. "
        f"Up to {POINTS} points, or what the published run gains in two epochs, count as on track.",
    ]
    same_schedule = not run.options.get("epochs") or run.epochs == len(theirs)
    end = theirs[-1] + standing.difference
    if standing.epoch + 1 < len(theirs) and same_schedule and end <= 100:
        lines.append(f"If the difference stays, it ends at {end:.1f} %.")
    if not run.options.get("epochs"):
        lines.append(f"No options are beside it: taken to have the published {len(theirs)} epochs.")
    elif not same_schedule:
        lines.append(f"The run is {run.epochs} epochs and not {len(theirs)}: compared at equal shares of the schedule.")
    model, expected = run.options.get("model"), published.options.get("model")
    if model and expected and model != expected:
        lines.append(f"The run trains {model}, the published one {expected}.")
    if (classes := run.classes) not in (None, 1000):
        lines.append(f"The run has {classes} classes, the published one the 1000 of ImageNet: they do not compare.")
    if model == expected and (others := differing_options(run, published)):
        lines.append(f"Unlike the recipe: {', '.join(others)}.")
    return "\n".join(lines)


def _shift(epochs: float) -> str:
    if math.isinf(epochs):
        return "beyond what the published run ever reached"
    if abs(epochs) < 0.5:
        return "level with it"
    return f"as the published run was {abs(epochs):.1f} epochs {'later' if epochs > 0 else 'earlier'}"
