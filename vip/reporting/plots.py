"""Pictures: matplotlib figures without a display, written as PNG and SVG."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vip.errors import UserError
from vip.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Distinguishable with any colour vision (Okabe and Ito), yellow left out as it is faint on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def new_figure(columns: int = 1, width: float = 6.4, height: float = 4.0) -> tuple["Figure", list[Any]]:
    """A figure with axes side by side.

    Raises:
        UserError: If matplotlib is not installed.
    """
    try:
        from matplotlib import rcParams
        from matplotlib.figure import Figure
    except ImportError as e:
        raise UserError(f"{e}; pip install 'vision-permutator[plots]' draws the pictures.") from e
    rcParams["svg.hashsalt"] = "vip"  # the same figure is the same file
    figure = Figure(figsize=(width * columns, height), layout="constrained")
    axes = list(figure.subplots(1, columns, squeeze=False)[0])
    for ax in axes:
        ax.set_prop_cycle(color=COLORS)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figure(figure: "Figure", path: str | Path) -> list[Path]:
    """Write a figure to `path` with the endings .png and .svg; returns the two files.

    Raises:
        UserError: If they cannot be written.
    """
    path = Path(path)
    files = [path.with_name(f"{path.name}.{ending}") for ending in ("png", "svg")]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(files[0]) as unfinished:
            figure.savefig(unfinished, format="png", dpi=150)
        with replacing(files[1]) as unfinished:
            figure.savefig(unfinished, format="svg", metadata={"Date": None})
    except OSError as e:
        raise UserError(f"Cannot write the picture {path} ({e.strerror}); choose another folder.") from e
    return files
