"""Contact sheets: training images with their labels, and with what token labels say of each part of them."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from vip.errors import printable
from vip.reporting.plots import COLORS, add_title, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Distinguishable over photographs: all but black, and four more.
TOKEN_COLORS = (*COLORS[:-1], "#F0E442", "#6A3D9A", "#B2DF8A", "#8C2D04")
OTHER_COLOR = "#888888"
_MOST_OPAQUE = 0.7  # of a token that is surely of its class; the picture is to be seen through it
_LONGEST_NAME = 24


def draw_contact_sheet(
    pictures: Sequence[Image.Image],
    shares: torch.Tensor,
    names: Sequence[str],
    tokens: torch.Tensor | None = None,
    title: str = "",
) -> "Figure":
    """Draw images with their labels; with token labels beside each image the strongest class of each of its tokens.

    Args:
        pictures: Images of one size.
        shares: Shares `[N, K]` of the classes in each image.
        names: Names of the classes.
        tokens: Probabilities `[N, H', W', K]` of the classes of each token.
        title: Title of the sheet.

    Raises:
        UserError: If matplotlib is not installed.
    """
    colors = {} if tokens is None else choose_colors(tokens.argmax(-1))
    tiles = list(pictures)
    if tokens is not None:
        tiles = [_side_by_side(p, color_tokens(p, t, colors)) for p, t in zip(pictures, tokens, strict=True)]
    width, height = tiles[0].size
    columns = _choose_columns(len(tiles), height / width)
    rows = -(-len(tiles) // columns)
    inches = max(1.8, height / 150)  # a dot of the picture for each pixel, or more
    figure, axes = new_figure(columns, inches * width / height, inches + 0.4, rows)
    for ax in axes:
        ax.set_axis_off()
    for ax, tile, share in zip(axes, tiles, shares, strict=False):
        ax.imshow(tile)
        ax.set_title(describe_shares(share, names), fontsize=8, parse_math=False)
    add_title(figure, title)
    if colors:
        _add_legend(figure, colors, names)
    return figure


def describe_shares(shares: torch.Tensor, names: Sequence[str]) -> str:
    """The class of an image, or a line for each of the two largest of several with its share.

    Args:
        shares: Shares `[K]`.
        names: Names of the K classes.
    """
    top = shares.topk(min(2, len(shares)))
    mixed = [(share, i) for share, i in zip(top.values.tolist(), top.indices.tolist(), strict=True) if share >= 0.005]
    if len(mixed) == 1:
        return _short(names[mixed[0][1]])
    return "\n".join(f"{_short(names[i])} ({share:.0%})" for share, i in mixed)


def choose_colors(classes: torch.Tensor) -> dict[int, str]:
    """Colors for the most frequent of classes, the most frequent first; others have none."""
    found, counts = classes.unique(return_counts=True)
    order = counts.argsort(descending=True, stable=True)
    return dict(zip(found[order].tolist(), TOKEN_COLORS, strict=False))


def color_tokens(picture: Image.Image, tokens: torch.Tensor, colors: dict[int, str]) -> Image.Image:
    """Lay the color of its strongest class over each token, the fainter the less probable it is.

    Args:
        picture: An image.
        tokens: Probabilities `[H', W', K]`.
        colors: Colors of classes; all others are gray.
    """
    from matplotlib.colors import to_rgba

    probability, strongest = tokens.max(-1)
    rgba = np.array([[to_rgba(colors.get(i, OTHER_COLOR)) for i in row] for row in strongest.tolist()])
    rgba[..., 3] = _MOST_OPAQUE * probability.numpy()
    layer = Image.fromarray((rgba * 255).round().astype(np.uint8)).resize(picture.size, Image.Resampling.NEAREST)
    return Image.alpha_composite(picture.convert("RGBA"), layer).convert("RGB")


def _choose_columns(tiles: int, ratio: float) -> int:
    """Columns of a sheet that is about square and has no more empty places than need be; `ratio` is height to width."""
    least = math.ceil(math.sqrt(tiles * ratio))
    return min(range(least, least + 3), key=lambda columns: -tiles % columns)


def _side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    gap = max(1, left.width // 50)
    tile = Image.new("RGB", (2 * left.width + gap, left.height), "white")
    tile.paste(left, (0, 0))
    tile.paste(right, (left.width + gap, 0))
    return tile


def _add_legend(figure: "Figure", colors: dict[int, str], names: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(color=color, label=_short(names[i])) for i, color in colors.items()]
    if len(colors) == len(TOKEN_COLORS) < len(names):
        patches.append(Patch(color=OTHER_COLOR, label="any other"))
    title = "strongest class of each token; the fainter, the less probable"
    inches = 0.55 + 0.055 * max(len(str(patch.get_label())) for patch in patches)  # of an entry
    columns = max(1, min(len(patches), int(figure.get_figwidth() / inches)))
    style = dict(ncols=columns, fontsize=8, title_fontsize=8, title=title, frameon=False)
    figure.set_figheight(figure.get_figheight() + 0.4 + 0.2 * -(-len(patches) // columns))
    legend = figure.legend(handles=patches, loc="outside lower center", **style)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _short(name: str) -> str:
    name = printable(name)
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"
