"""Contact sheets: what is where, and in which color."""

import colorsys

import numpy as np
import pytest
import torch
from PIL import Image

from vip.reporting.contact_sheet import (
    OTHER_COLOR,
    TOKEN_COLORS,
    choose_colors,
    color_tokens,
    describe_shares,
    draw_contact_sheet,
)

NAMES = ["cat", "dog", "a bird with a name that is much too long for a line"]


def pictures(count: int, size: tuple[int, int] = (32, 24)) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (*size[::-1], 3), dtype=np.uint8)) for _ in range(count)]


@pytest.mark.parametrize(
    "shares, text",
    [
        ([1, 0, 0], "cat"),
        ([0.004, 0.996, 0], "dog"),
        ([0.25, 0.75, 0], "dog (75%)\ncat (25%)"),
        ([0.2, 0.5, 0.3], "dog (50%)\na bird with a name that… (30%)"),
    ],
)
def test_labels(shares: list[float], text: str) -> None:
    assert describe_shares(torch.tensor(shares), NAMES) == text
    assert describe_shares(torch.ones(1), ["the only one"]) == "the only one"


@pytest.mark.parametrize("count", [1, 2, 7, 16, 30])
@pytest.mark.parametrize("with_tokens", [False, True])
def test_every_image_is_drawn_once_under_its_label(count: int, with_tokens: bool) -> None:
    images, shares = pictures(count), torch.eye(3)[torch.arange(count) % 3]
    tokens = torch.full((count, 3, 4, 3), 1 / 3) if with_tokens else None
    figure = draw_contact_sheet(images, shares, ["a", "b", "c"], tokens, "a title")
    drawn = [ax for ax in figure.axes if ax.images]
    assert len(drawn) == count and figure.get_suptitle() == "a title"
    for i, ax in enumerate(drawn):
        tile = np.asarray(ax.images[0].get_array())
        assert (tile[:, :32] == np.asarray(images[i])).all() and ax.get_title() == "abc"[i % 3]
        assert tile.shape == ((24, 65, 3) if with_tokens else (24, 32, 3))
    assert len(figure.axes) - count < figure.axes[0].get_subplotspec().get_gridspec().ncols, "a row is empty"
    assert len(figure.legends) == with_tokens


def test_tokens_have_the_color_of_their_strongest_class() -> None:
    """On black the color that is seen is the class's, darkened by the share of the layer."""
    tokens = torch.tensor([[[0.9, 0.1, 0.0], [0.0, 0.4, 0.6]], [[0.0, 1.0, 0.0], [0.2, 0.5, 0.3]]])
    colors = choose_colors(tokens.argmax(-1))
    assert list(colors) == [1, 0, 2], "the most frequent first"
    black = Image.new("RGB", (30, 18))
    pixels = np.asarray(color_tokens(black, tokens, colors)).reshape(2, 9, 2, 15, 3)
    assert (pixels == pixels[:, :1, :, :1]).all(), "a token has more than one color"
    brightness = {}
    for row in range(2):
        for column in range(2):
            strongest = int(tokens[row, column].argmax())
            expected = np.array([int(colors[strongest][i : i + 2], 16) for i in (1, 3, 5)]) / 255
            found = pixels[row, 0, column, 0] / 255
            assert colorsys.rgb_to_hsv(*found)[0] == pytest.approx(colorsys.rgb_to_hsv(*expected)[0], abs=0.02)
            brightness[row, column] = found.sum() / expected.sum()
    assert brightness[1, 0] > brightness[0, 0] > brightness[0, 1] > brightness[1, 1] > 0.2
    assert brightness[1, 0] < 0.8, "a picture under it could not be seen"


def test_more_classes_than_colors() -> None:
    tokens = torch.eye(14).view(1, 2, 7, 14)
    colors = choose_colors(tokens.argmax(-1))
    assert len(colors) == len(set(colors.values())) == len(TOKEN_COLORS) == len({*TOKEN_COLORS, OTHER_COLOR}) - 1
    white = Image.new("RGB", (70, 20), "white")
    seen = {tuple(p) for p in np.asarray(color_tokens(white, tokens[0], colors))[::10, ::10].reshape(-1, 3).tolist()}
    assert len(seen) == len(TOKEN_COLORS) + 1
    figure = draw_contact_sheet([white], torch.eye(14)[:1], [f"class {i}" for i in range(14)], tokens)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == [*(f"class {i}" for i in colors), "any other"]


def test_the_legend_is_within_the_figure() -> None:
    names = [f"a name of some length {i:02}" for i in range(14)]
    figure = draw_contact_sheet(
        pictures(2), torch.eye(14)[:2], names, torch.eye(14).view(1, 2, 7, 14).repeat(2, 1, 1, 1)
    )
    figure.draw_without_rendering()
    box, page = figure.legends[0].get_window_extent(), figure.bbox
    assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0
    assert all(ax.get_window_extent().y0 >= box.y1 for ax in figure.axes), "it covers a picture"
