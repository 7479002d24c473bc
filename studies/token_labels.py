#!/usr/bin/env python3
"""Does token labeling help? Students with and without it, under the same recipes and seeds.

Trains a teacher, makes label maps with it, trains each student with and without them for each seed, validates all of
them in processes of their own, and prints the comparison. What is finished is not repeated, so it can be interrupted.

    python studies/token_labels.py data/digits --recipe models/vip_nano4_32/digits.yaml --students vip_nano4_32
"""

import argparse
import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import vip.cli
from vip.cli.arguments import Parser, at_least
from vip.files import replacing

WAYS = ("class labels", "token labels")


def main(argv: list[str]) -> None:
    """Run what is not there yet and print the table."""
    args = _parser().parse_args(argv)
    output = Path(args.output)
    teacher = Path(args.teacher) if args.teacher else output / "teacher"
    if not args.teacher:
        _train(args, teacher, args.teacher_model, 0, *_epochs(args.teacher_epochs))
    maps = output / "label_maps"
    _run("generate-label", args.data, maps, "--checkpoint", teacher, "--crop-pct", 1.0, "--workers", args.workers)
    rows = [{"model": "teacher", "labels": WAYS[0], "seed": "", **_validate(args, teacher)}]
    for model in args.students:
        for seed in args.seeds:
            for labels in WAYS:
                run = output / f"{model}-{labels.partition(' ')[0]}-{seed}"
                # the recipe and not the defaults of --token-label decides what both have in common
                dense = ("--token-label", "--token-label-data", maps) if labels == WAYS[1] else ()
                _train(args, run, model, seed, *_epochs(args.epochs), *dense)
                rows.append({"model": model, "labels": labels, "seed": seed, **_validate(args, run)})
    with replacing(output / "results.csv") as path, open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    print(_table(rows, args.students))


def _parser() -> argparse.ArgumentParser:
    parser = Parser("token_labels.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="image folder with train/ and val/")
    parser.add_argument("--recipe", required=True, help="recipe of the teacher and of all students")
    parser.add_argument("--students", nargs="+", required=True, help="models to compare")
    parser.add_argument("--seeds", nargs="+", type=at_least(0), default=[42])
    parser.add_argument("--epochs", type=at_least(1), help="epochs of a student (default: the recipe's)")
    parser.add_argument("--teacher", help="checkpoint or folder of a run (default: train one)")
    parser.add_argument("--teacher-model", default="vip_nano4_32")
    parser.add_argument("--teacher-epochs", type=at_least(1), help="epochs of the teacher (default: the recipe's)")
    parser.add_argument("--workers", type=at_least(0), default=1)
    parser.add_argument("--output", default="output/token-labels")
    return parser


def _epochs(epochs: int | None) -> tuple[Any, ...]:
    """Options of a number of epochs other than the recipe's, with a schedule that suits a few of them."""
    return () if epochs is None else ("--epochs", epochs, "--warmup-epochs", max(1, epochs // 10), "--sched-on-updates")


def _run(*command: Any) -> str:
    """Run a `vip` command; its log goes to the terminal, what it prints is returned."""
    argv = [sys.executable, "-m", "vip", *map(str, command)]
    print("$ vip", *argv[3:], file=sys.stderr, flush=True)
    result = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        sys.exit(result.returncode)
    return result.stdout


def _train(args: argparse.Namespace, run: Path, model: str, seed: int, *options: Any) -> None:
    if (run / "finished").exists():
        return
    _run(
        *("train", args.data, "--config", args.recipe, "--model", model, "--seed", seed, "--workers", args.workers),
        *("--output", run.parent, "--experiment", run.name, "--resume", "auto", *options),
    )
    (run / "finished").touch()


def _validate(args: argparse.Namespace, run: Path) -> dict[str, Any]:
    """The result of a run's last checkpoint: picking the best one would pick it by the images it is tested on."""
    checkpoint = run / "last.pth.tar" if run.is_dir() else run
    results = Path(args.output) / f"{run.name}.json"
    if not results.exists():
        partial = results.with_suffix(".unfinished")
        _run(
            *("validate", os.path.join(args.data, "val"), "--checkpoint", checkpoint, "--workers", args.workers),
            *("--results-file", partial, "--results-format", "json"),
        )
        partial.replace(results)
    (row,) = json.loads(results.read_text())
    return {name: row[name] for name in ("top1", "correct1", "count", "loss")}


def _table(rows: list[dict[str, Any]], students: list[str]) -> str:
    lines = [
        f"Teacher: top-1 {rows[0]['top1']:.2f} ({rows[0]['correct1']} of {rows[0]['count']})",
        "",
        "| student | labels | top-1 of each seed | mean | spread (standard deviation) | loss |",
        "| :--- | :--- | :--- | ---: | ---: | ---: |",
    ]
    for model in students:
        top1 = {}
        for labels in WAYS:
            own = [row for row in rows if row["model"] == model and row["labels"] == labels]
            top1[labels] = values = [row["top1"] for row in own]
            lines.append(
                f"| `{model}` | {labels} | {', '.join(f'{v:.2f}' for v in values)} | {mean(values):.2f} "
                f"| {_spread(values)} | {mean(row['loss'] for row in own):.3f} |"
            )
        gains = [b - a for a, b in zip(top1[WAYS[0]], top1[WAYS[1]], strict=True)]
        gained = ", ".join(f"{gain:+.2f}" for gain in gains)
        lines.append(f"| `{model}` | difference | {gained} | {mean(gains):+.2f} | {_spread(gains)} | |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{stdev(values):.2f}" if len(values) > 1 else ""


if __name__ == "__main__":
    sys.exit(vip.cli.run("token_labels.py", main))
