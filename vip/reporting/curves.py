"""The pictures of a report: curves of runs, accuracy of classes, calibration."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vip.errors import printable
from vip.reporting.analysis import BINS, Calibration, ClassAccuracy
from vip.reporting.plots import COLORS, new_figure, save_figure
from vip.reporting.runs import EpochLog

WIDTH, HEIGHT = 5.2, 3.4  # inches, at which the letters can be read in half a window and on a phone
LONGEST_NAME = 32
_INK = {"light": "#000000", "dark": "#f0f0f0"}
_PAPER = {"light": "#ffffff", "dark": "#1c1f24"}  # of the page's cards


@dataclass(frozen=True)
class Curve:
    """A run as it is drawn.

    Attributes:
        name: What it is called, unlike all others of a report.
        run: Its epochs, with their speed.
        published: Whether it is one that others are held against, drawn dashed.
        color: One of `COLORS`, which come again after the last.
        marker: matplotlib's marker, another one when they do; published logs have none.
    """

    name: str
    run: EpochLog
    published: bool
    color: str
    marker: str

    def values(self, column: str, epochs: int) -> list[float]:
        """A column over the first epochs, NaN where it says nothing; empty where it says nothing at all."""
        values = [row.get(column, math.nan) for row in self.run.rows[:epochs]]
        return values if any(map(math.isfinite, values)) else []


@dataclass(frozen=True)
class Quantity:
    """A column of a run's logs, which is a picture: its file, title and unit, and whether the best epoch is marked."""

    column: str
    file: str
    title: str
    unit: str
    marks_best: bool = False


QUANTITIES = (
    Quantity("eval_top1", "top-1", "Validation top-1", "top-1 in %", True),
    Quantity("eval_loss", "validation-loss", "Validation loss", "validation loss", True),
    Quantity("train_loss", "training-loss", "Training loss", "training loss", True),
    Quantity("lr", "learning-rate", "Learning rate", "learning rate"),
    Quantity("train_images_per_second", "throughput", "Throughput of training", "images a second"),
    Quantity("train_memory_gb", "memory", "Peak memory of training", "GB"),
)


@dataclass(frozen=True)
class Picture:
    """A picture in two files, one for each color scheme, and in words."""

    light: Path
    dark: Path
    title: str
    alt: str


def make_curves(runs: Sequence[EpochLog], published: Sequence[EpochLog], names: Sequence[str]) -> list[Curve]:
    """Give each run, and then each published log, its name and its looks."""
    count = len(COLORS)
    return [
        Curve(name, run, i >= len(runs), COLORS[i % count], "os^D"[i // count % 4] if i < len(runs) else "")
        for i, (run, name) in enumerate(zip([*runs, *published], names, strict=True))
    ]


def draw_curves(curves: Sequence[Curve], folder: Path) -> list[Picture]:
    """Draw each quantity that a run has, over the epochs.

    A published log is drawn for twice as long as the longest run has come, so that young runs can still be seen.

    Raises:
        UserError: If matplotlib is not installed, or the folder cannot be written.
    """
    longest = max(len(curve.run.rows) for curve in curves if not curve.published)
    epochs = max(2 * longest, 10)
    pictures = []
    for quantity in QUANTITIES:
        if drawn := [curve for curve in curves if curve.values(quantity.column, epochs)]:
            ends = [f"{c.name} {_last(c.values(quantity.column, epochs)):.4g}" for c in drawn]
            alt = f"{quantity.title} in each epoch, at the end of the curves: {'; '.join(ends)}."
            draw = _drawing_of(quantity, drawn, epochs)
            pictures.append(_save_in_both_schemes(draw, folder / quantity.file, quantity.title, alt))
    return pictures


def _last(values: list[float]) -> float:
    return next(value for value in reversed(values) if math.isfinite(value))


def _drawing_of(quantity: Quantity, curves: Sequence[Curve], epochs: int) -> Callable[[str], Any]:
    def draw(scheme: str) -> Any:
        rows = len(curves) // 2 + 1  # of the legend
        figure, (ax,) = new_figure(width=WIDTH, height=HEIGHT + 0.2 * rows)
        stars: list[Any] = []
        for curve in curves:
            values = curve.values(quantity.column, epochs)
            style = dict(color=_ink(curve.color, scheme), linestyle="--" if curve.published else "-", linewidth=1.5)
            marker = dict(marker=curve.marker, markersize=3, markevery=max(1, len(values) // 12))
            ax.plot(range(len(values)), values, **style, **marker)
            best = curve.run.best_epoch
            if quantity.marks_best and best < len(values):
                star = dict(marker="*", markersize=12, markeredgecolor=_INK[scheme], linestyle="", zorder=3)
                stars = ax.plot(best, values[best], color=style["color"], **star)
        ax.set(xlabel="epoch", ylabel=quantity.unit)
        ax.xaxis.get_major_locator().set_params(integer=True)
        if not quantity.marks_best:
            ax.set_ylim(0, 1.05 * ax.get_ylim()[1])
        handles = [line for line in ax.get_lines() if line.get_marker() != "*"] + stars
        labels = [text_for_pictures(curve.name) for curve in curves] + ["best top-1"] * len(stars)
        figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
        return figure

    return draw


def draw_classes(classes: Sequence[ClassAccuracy], path: Path) -> Picture:
    """Draw the accuracy of each class as a bar, the lowest on top.

    Raises:
        UserError: As `draw_curves`.
    """

    def draw(scheme: str) -> Any:
        figure, (ax,) = new_figure(width=WIDTH, height=0.8 + 0.26 * len(classes))
        bars = ax.barh(range(len(classes)), [each.percent for each in classes], color=COLORS[0])
        ax.bar_label(bars, [f"{each.percent:.1f}" for each in classes], padding=3, fontsize=8)
        ax.set_yticks(range(len(classes)), [text_for_pictures(each.name) for each in classes], fontsize=8)
        ax.invert_yaxis()
        ax.set(xlabel="top-1 of the class in %", xlim=(0, 108), xticks=range(0, 101, 20))
        ax.grid(visible=False, axis="y")
        return figure

    text = "; ".join(f"{each.name} {each.percent:.1f} %" for each in classes)
    return _save_in_both_schemes(draw, path, "Accuracy of each class", f"Accuracy of each class: {text}.")


def draw_calibration(found: Calibration, folder: Path, ending: str) -> list[Picture]:
    """Draw how often a model is right when it is sure by so much, and how often it is sure by so much.

    Raises:
        UserError: As `draw_curves`.
    """
    edges = np.linspace(0, 1, BINS + 1)

    def reliability(scheme: str) -> Any:
        figure, (ax,) = new_figure(width=WIDTH, height=HEIGHT)
        ax.bar(edges[:-1], found.accuracy, 1 / BINS, align="edge", color=COLORS[0], edgecolor=_PAPER[scheme])
        style = dict(color=COLORS[1], marker="o", markersize=4, linestyle="", clip_on=False, zorder=3)
        ax.plot(found.confidence, found.accuracy, **style, label="mean confidence of a bin")
        ax.plot([0, 1], [0, 1], color=_ink("#000000", scheme), linestyle="--", linewidth=1, label="calibrated")
        ax.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02))
        figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=8)
        return figure

    def confidence(scheme: str) -> Any:
        figure, (ax,) = new_figure(width=WIDTH, height=HEIGHT)
        share = 100 * found.count / found.count.sum()
        ax.bar(edges[:-1], share, 1 / BINS, align="edge", color=COLORS[0], edgecolor=_PAPER[scheme])
        ax.set(xlabel="confidence", ylabel="% of the images", xlim=(0, 1))
        return figure

    bins = [
        f"{a:.0%} right of {n} images at a mean confidence of {c:.0%}"
        for a, n, c in zip(found.accuracy, found.count, found.confidence, strict=True)
        if n
    ]
    alt = f"Expected calibration error {100 * found.error:.2f} %, from low to high confidence: {'; '.join(bins)}."
    titles = "Reliability: how often it is right", "Confidence: how sure it is"
    low = 100 * float(found.count[: BINS // 2].sum() / found.count.sum())
    alt_of_confidence = f"Share of the images in each bin of confidence; {low:.1f} % are in the lower {BINS // 2} bins."
    return [
        _save_in_both_schemes(reliability, folder / f"reliability{ending}", titles[0], alt),
        _save_in_both_schemes(confidence, folder / f"confidence{ending}", titles[1], alt_of_confidence),
    ]


def text_for_pictures(name: str) -> str:
    """A name as matplotlib is to draw it: not as a formula, not hidden for its underscore, and not too long."""
    text = printable(name)
    if len(text) > LONGEST_NAME:
        text = f"{text[: LONGEST_NAME // 2]}…{text[-LONGEST_NAME // 2 + 1 :]}"
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def _ink(color: str, scheme: str) -> str:
    """Black is white where it is dark."""
    return _INK[scheme] if color == "#000000" else color


def _save_in_both_schemes(draw: Callable[[str], Any], path: Path, title: str, alt: str) -> Picture:
    with _scheme("light"):
        (light,) = save_figure(draw("light"), path, ["png"])
    with _scheme("dark"):
        (dark,) = save_figure(draw("dark"), path.with_name(f"{path.name}-dark"), ["png"])
    return Picture(light, dark, title, alt)


@contextmanager
def _scheme(scheme: str) -> Iterator[None]:
    """Draw on the page's color; names in scripts that the font has not are boxes, which the page has in letters."""
    from matplotlib import style

    colors = {f"{name}.facecolor": _PAPER[scheme] for name in ("figure", "axes", "savefig")}
    base: list[Any] = [] if scheme == "light" else ["dark_background", {"grid.color": "#8a939d"}]
    with style.context([*base, colors]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        yield
