"""The per-epoch log of a run, and how it compares with a published one."""

import csv
import dataclasses
import math
import os
from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

import vip
from vip.errors import UserError

WINDOW = 5  # epochs; the published top-1 jumps by 0.1 points from epoch to epoch
POINTS, EPOCHS = 0.5, 2.0  # a difference below either is not worth worrying about


_SCHEDULES_WITH_COOLDOWN = ("cosine", "tanh", "poly", "wsd", "rsqrt")


@dataclass(frozen=True)
class EpochLog:
    """Rows of a `summary.csv` or a published log.

    Attributes:
        path: Where it was read.
        rows: One mapping of column to number for each epoch, in order.
        options: Options of the run or recipe beside it, empty if there are none.
    """

    path: Path
    rows: list[dict[str, float]]
    options: dict[str, Any]

    @property
    def epochs(self) -> int:
        """Epochs when it is complete: those of its options, or else those it has.

        Raises:
            UserError: If its options are damaged.
        """
        planned = self._count("epochs")
        if planned and self.options.get("sched", "cosine") in _SCHEDULES_WITH_COOLDOWN:
            planned += self._count("cooldown_epochs")
        if planned and self.options.get("warmup_prefix"):
            planned += self._count("warmup_epochs")
        return max(planned, len(self.rows))

    def _count(self, option: str) -> int:
        value = self.options.get(option) or 0
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise UserError(f"{option} in the options beside {self.path} is {value!r}, expected a number of epochs.")
        return value

    @property
    def classes(self) -> int | None:
        """Classes of the training set, None if neither options nor data tell."""
        if isinstance(classes := self.options.get("num_classes"), int):
            return classes
        data = self.options.get("data") or self.options.get("data_dir")
        folders = [Path(str(data)) / name for name in ("train", "training")] if data else []
        folder = next((folder for folder in folders if folder.is_dir() and os.access(folder, os.R_OK)), None)
        return sum(path.is_dir() for path in folder.iterdir()) if folder else None

    @property
    def best_epoch(self) -> int:
        """The first epoch of the highest top-1.

        Raises:
            UserError: As `column`.
        """
        top1 = self.column("eval_top1")
        return max(range(len(top1)), key=top1.__getitem__)

    def column(self, name: str) -> list[float]:
        """All values of a column.

        Raises:
            UserError: If there is no such column, or not a number in it.
        """
        if name not in self.rows[0]:
            raise UserError(f"{self.path} has no column {name}, only {', '.join(self.rows[0])}.")
        values = [row[name] for row in self.rows]
        for epoch, value in enumerate(values):
            if not math.isfinite(value):
                raise UserError(f"{name} is {value} in epoch {epoch} of {self.path}: the run has diverged.")
        return values


def read_run(path: str | Path) -> EpochLog:
    """Read a run's folder, a folder of the model zoo, or a CSV file alone.

    Raises:
        UserError: If there is no log or it is damaged.
    """
    folder = Path(path)
    names = ("summary.csv", "published_log.csv")
    # of what can be no path, these are false where pathlib's raise
    file = next((path for path in (folder, *(folder / n for n in names)) if os.path.isfile(path)), None)
    if file is None:
        if not os.path.isdir(folder):
            raise UserError(f"{folder} does not exist; name the folder of a run, such as output/train/<run>.")
        raise UserError(
            f"{folder} holds neither the summary.csv of a run that has finished an epoch nor the published_log.csv of "
            "models/vip_s7, models/vip_m7 or models/vip_l7."
        )
    rows = _read_rows(file)
    if not rows:
        raise UserError(f"{file} has no epoch yet.")
    if [row.get("epoch") for row in rows] != list(range(len(rows))):
        raise UserError(f"The epochs in {file} are not 0, 1, 2, ...; remove rows that are there twice.")
    options = next((file.parent / n for n in ("args.yaml", "recipe.yaml") if (file.parent / n).is_file()), None)
    return EpochLog(file, rows, _read_options(options) if options else {})


def with_speed(run: EpochLog) -> EpochLog:
    """The run with the columns of its `speed.csv` too, in those epochs that are there.

    Raises:
        UserError: If the file is damaged.
    """
    file = run.path.with_name("speed.csv")
    if not file.is_file():  # older runs have none, and resumed ones none of their first epochs
        return run
    speed = {row.get("epoch"): row for row in _read_rows(file)}
    return dataclasses.replace(run, rows=[{**speed.get(row["epoch"], {}), **row} for row in run.rows])


def find_published(run: EpochLog) -> EpochLog | None:
    """The published log of a run's model in a checkout, None if there is none or the run is not of ImageNet's classes.

    Raises:
        UserError: If it is damaged.
    """
    model = run.options.get("model")
    if not isinstance(model, str) or run.classes not in (None, 1000):
        return None
    zoo = Path(vip.__file__).parents[1] / "models"
    file = next((path for path in zoo.glob("*/published_log.csv") if path.parent.name == model), None)
    return read_run(file) if file else None


def _read_rows(file: Path) -> list[dict[str, float]]:
    try:
        table = list(csv.DictReader(file.read_text(encoding="utf-8-sig").splitlines()))  # spreadsheets write the mark
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise UserError(f"Cannot read {file} ({e}).") from e
    rows: list[dict[str, float]] = []
    for number, row in enumerate(table, 2):
        try:
            rows.append({name: float(value) for name, value in row.items()})
        except (TypeError, ValueError) as e:
            raise UserError(
                f"Line {number} of {file} is no row of numbers under its header: {list(row.values())}."
            ) from e
    return rows


def _read_options(file: Path) -> dict[str, Any]:
    try:
        options = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as e:  # days that no calendar has are a ValueError
        raise UserError(f"Cannot read {file}: {e}") from e
    return options if isinstance(options, dict) else {}


@dataclass(frozen=True)
class Standing:
    """Where a run stands against a published log.

    Attributes:
        epoch: Last epoch of the run.
        published_epoch: Where the published run was at the same share of its schedule.
        top1: Its top-1 in percent.
        published_top1: The published top-1 at that point.
        difference: Mean difference in points over the last epochs of the run.
        window: How many those are.
        epochs_ahead: How many published epochs later the published run reached the run's level; negative if earlier.
        verdict: 'on track', 'ahead' or 'behind'.
    """

    epoch: int
    published_epoch: float
    top1: float
    published_top1: float
    difference: float
    window: int
    epochs_ahead: float
    verdict: str


def compare(run: EpochLog, published: EpochLog) -> Standing:
    """Hold a run against a published log, epoch by epoch, or at equal shares of schedules of different lengths.

    A run without options beside it is taken to have the published schedule.

    The run is behind, or ahead, where its mean over the last epochs is off by more than half a point, and by more than
    the published run changed within two epochs.
    """
    own, theirs = run.column("eval_top1"), published.column("eval_top1")
    scale = (len(theirs) - 1) / max(run.epochs - 1, 1) if run.options.get("epochs") else 1.0
    window = min(WINDOW, len(own))
    at = [epoch * scale for epoch in range(len(own) - window, len(own))]
    level, expected = mean(own[-window:]), mean(_at(theirs, x) for x in at)
    reached = _first_at(theirs, level)
    ahead = reached - _first_at(theirs, expected)
    off = abs(level - expected) > POINTS and abs(ahead) > EPOCHS
    return Standing(
        epoch=len(own) - 1,
        published_epoch=at[-1],
        top1=own[-1],
        published_top1=_at(theirs, at[-1]),
        difference=level - expected,
        window=window,
        epochs_ahead=ahead,
        verdict="on track" if not off else "ahead" if level > expected else "behind",
    )


def _at(values: list[float], x: float) -> float:
    """Linear interpolation at a position from 0 on, the last value beyond the end."""
    left = min(int(x), len(values) - 1)
    right = min(left + 1, len(values) - 1)
    return values[left] + (values[right] - values[left]) * (x - int(x))


def _first_at(values: list[float], level: float) -> float:
    """Where the best value so far first reached a level, infinite if it never did."""
    best = list(accumulate(values, max))
    right = bisect_left(best, level)
    if right == 0:
        return 0.0
    if right == len(best):
        return math.inf
    return right - 1 + (level - best[right - 1]) / (best[right] - best[right - 1])


def differing_options(run: EpochLog, published: EpochLog) -> list[str]:
    """Options of the recipe that the run has otherwise, as 'name value (recipe: value)'."""
    return [
        f"{name} {run.options[name]} (recipe: {value})"
        for name, value in published.options.items()
        if name in run.options and run.options[name] != value and name not in ("workers", "seed")
    ]
