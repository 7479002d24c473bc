"""What do pre-trained weights give to a small data set? As a start to fine-tune in several ways, and as a teacher.

Pre-trains a small Vision Permutator on five classes of CIFAR-10, and trains it on a few images of each of the other
five, which it has never seen: from scratch, and from those weights by the recipes of models/finetune, in the same
number of epochs. Then trains it on a few images of the first five, with and without the pre-trained one as a teacher.
What is finished is not repeated, so it can be interrupted.

    python -m studies.transfer CIFAR10 --output output/transfer
"""

import argparse
import csv
import json
import random
import sys
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import vip.cli
from vip.cli.arguments import Parser, at_least
from vip.errors import UserError
from vip.files import replacing

RECIPES = Path(__file__).parents[1] / "models"
SCRATCH = RECIPES / "vip_nano4_32" / "cifar10.yaml"
FULL, PARTIAL, HEAD = (RECIPES / "finetune" / f"{name}.yaml" for name in ("full", "partial", "head"))
TUNED: dict[str, tuple[Path, int]] = {  # recipe and pixels
    "from scratch": (SCRATCH, 32),
    "all weights, with layer decay": (FULL, 32),
    "all but the first stage": (PARTIAL, 32),
    "the head alone": (HEAD, 32),
    "from scratch, 48 pixels": (SCRATCH, 48),
    "all weights, with layer decay, 48 pixels": (FULL, 48),
}
TAUGHT = ("labels alone", "labels and a teacher")
WATCHED = 20  # test images of a class that are validated on after each epoch; the result is of all of them


def main(argv: list[str]) -> None:
    """Run what is not there yet and print the tables."""
    args = _parser().parse_args(argv)
    output = Path(args.output)
    try:
        classes, tested = (_class_names(Path(args.data, split)) for split in ("train", "val"))
    except OSError as e:
        raise UserError(f"Cannot read {e.filename} ({e.strerror}); give an image folder with train/ and val/.") from e
    if classes != tested:
        raise UserError(f"train/ and val/ of {args.data} have other classes: expected the same in both.")
    known, new = classes[: len(classes) // 2], classes[len(classes) // 2 :]
    data, pretrained = output / "data-known", output / "pretrained"
    link_images(args.data, data, known, None, 0)
    train(args, data, pretrained, 0, "--config", SCRATCH, "--epochs", args.pretrain_epochs)
    print(f"Pre-trained: top-1 {validate(args, data / 'test', pretrained)['top1']:.2f}")
    rows = []
    for seed in args.seeds:
        for images in args.images:
            link_images(args.data, output / f"data-{images}-{seed}", new, images, seed)
            link_images(args.data, output / f"data-known-{images}-{seed}", known, images, seed)
            for way in (*TUNED, *TAUGHT):
                row = {"images_a_class": images, "way": way, "seed": seed}
                rows.append(row | train_and_test(args, way, images, seed, pretrained / "last.pth.tar"))
                write_csv(rows, output / "results.csv")
    print(table(rows, TUNED), table(rows, TAUGHT), sep="\n\n")


def _class_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "python -m studies.transfer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="CIFAR-10 as an image folder with train/ and val/")
    parser.add_argument("--images", nargs="+", type=at_least(1), default=[50, 250], help="training images of a class")
    parser.add_argument("--seeds", nargs="+", type=at_least(0), default=[1, 2, 3])
    parser.add_argument(
        "--epochs", type=at_least(1), default=20, help="epochs on the new classes, the same for all ways"
    )
    parser.add_argument("--pretrain-epochs", type=at_least(1), default=12, help="epochs on the known classes")
    parser.add_argument("--workers", type=at_least(0), default=1)
    parser.add_argument("--output", default="output/transfer")
    return parser


def train_and_test(args: argparse.Namespace, way: str, images: int, seed: int, pretrained: Path) -> dict[str, Any]:
    """Train in one way and return the result."""
    recipe, size = TUNED.get(way, (SCRATCH, 32))
    start: tuple[Any, ...] = () if recipe == SCRATCH else ("--finetune", pretrained)
    if way == TAUGHT[1]:
        start = ("--teacher", pretrained)
    data = pretrained.parents[1] / f"data-{'known-' if way in TAUGHT else ''}{images}-{seed}"
    run = data.parent / f"{way.replace(', ', '-').replace(' ', '_')}-{images}-{seed}"
    flags = ("--config", recipe, *start, "--img-size", size, "--epochs", args.epochs, "--batch-size", 32)
    train(args, data, run, seed, *flags)
    return validate(args, data / "test", run)


def link_images(source: str | Path, folder: Path, classes: list[str], images: int | None, seed: int) -> None:
    """Make a data set of links: train/ with so many random images of each class, val/ with a few, test/ with all."""
    for name in classes:
        for split, there, count in (("train", "train", images), ("val", "val", WATCHED), ("test", "val", None)):
            files = sorted(Path(source, there, name).resolve().iterdir())
            if count is not None:
                files = random.Random(f"{seed} {name}").sample(files, min(count, len(files)))
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for file in files:
                link = folder / split / name / file.name
                if not link.is_symlink():
                    link.symlink_to(file)


def run(*command: Any) -> None:
    """Run a `vip` command in this process, what it prints on standard error."""
    print("$ vip", *command, file=sys.stderr, flush=True)
    with redirect_stdout(sys.stderr):
        status = vip.cli.main([str(word) for word in command])
    if status:
        sys.exit(status)


def train(args: argparse.Namespace, data: Path, folder: Path, seed: int, *flags: Any) -> None:
    """Train the model unless it is there."""
    if (folder / "finished").exists():
        return
    run(
        *("train", data, *flags, "--model", "vip_nano4_32", "--warmup-epochs", 1, "--sched-on-updates"),
        *("--seed", seed, "--workers", args.workers, "--device", "cpu", "--checkpoint-hist", 1),
        *("--output", folder.parent, "--experiment", folder.name, "--resume", "auto"),
    )
    (folder / "finished").touch()


def validate(args: argparse.Namespace, data: Path, folder: Path) -> dict[str, Any]:
    """The result of a run's last weights on all test images: picking the best ones would pick by these."""
    results = folder / "results.json"
    if not results.exists():
        with replacing(results) as path:
            flags = ("--results-file", path, "--results-format", "json", "--device", "cpu", "--workers", args.workers)
            run("validate", data, "--checkpoint", folder / "last.pth.tar", *flags)
    (row,) = json.loads(results.read_text())
    return {name: row[name] for name in ("top1", "correct1", "count", "loss")}


def write_csv(rows: list[dict[str, Any]], file: Path) -> None:
    """Write a row a run."""
    with replacing(file) as path, open(path, "w", newline="", encoding="utf-8") as content:
        writer = csv.DictWriter(content, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def table(rows: list[dict[str, Any]], ways: Iterable[str]) -> str:
    """Top-1 of each way and number of images, in Markdown."""
    counts = sorted({row["images_a_class"] for row in rows})
    lines = [f"| | {' | '.join(f'{count} images a class' for count in counts)} |", f"| :--- |{' ---: |' * len(counts)}"]
    for way in ways:
        cells = []
        for count in counts:
            values = [row["top1"] for row in rows if row["way"] == way and row["images_a_class"] == count]
            cells.append(f"{mean(values):.2f}{f' ± {stdev(values):.2f}' if len(values) > 1 else ''}")
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(vip.cli.run("python -m studies.transfer", main))
