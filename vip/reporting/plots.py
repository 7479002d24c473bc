"""Pictures: matplotlib figures without a display, written as PNG and SVG."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vip.errors import UserError, printable
from vip.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Distinguishable with any colour vision (Okabe and Ito), yellow left out as it is faint on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


_FORMATS: dict[str, dict[str, Any]] = {"png": dict(dpi=150), "svg": dict(metadata={"Date": None})}


def new_figure(columns: int = 1, width: float = 6.4, height: float = 4.0, rows: int = 1) -> tuple["Figure", list[Any]]:
    """A figure with axes side by side, row after row; width and height are those of one, in inches.

    Raises:
        UserError: If matplotlib is not installed.
    """
    try:
        from matplotlib import rcParams
        from matplotlib.figure import Figure
    except ImportError as e:
        raise UserError(f"{e}; pip install 'vision-permutator[plots]' draws the pictures.") from e
    rcParams["svg.hashsalt"] = "vip"  # the same figure is the same file
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes:
        ax.set_prop_cycle(color=COLORS)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def add_title(figure: "Figure", text: str) -> None:
    """Put a title over a figure, in as many lines as its width needs."""
    lines = textwrap.fill(printable(text), int(12 * figure.get_figwidth()))
    figure.suptitle(lines, fontsize=9, parse_math=False)  # which a file may be called


def save_figure(figure: "Figure", path: str | Path, endings: Sequence[str] = ("png", "svg")) -> list[Path]:
    """Write a figure to `path` with each of the endings; returns the files.

    Raises:
        UserError: If they cannot be written.
    """
    path = Path(path)
    files = [path.with_name(f"{path.name}.{ending}") for ending in endings]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for file, ending in zip(files, endings, strict=True):
            with replacing(file) as unfinished:
                figure.savefig(unfinished, format=ending, **_FORMATS[ending])
    except OSError as e:
        raise UserError(f"Cannot write the picture {path} ({e.strerror}); choose another folder.") from e
    return files
