"""Figures, and what happens without matplotlib or a place to write to."""

import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from PIL import Image

from vip.errors import UserError
from vip.reporting.plots import COLORS, new_figure, save_figure


def test_png_and_svg(tmp_path: Path) -> None:
    figure, axes = new_figure(3, width=2, height=1.5)
    assert (
        len(axes) == 3 and [round(ax.get_position().y0, 3) for ax in axes] == [round(axes[0].get_position().y0, 3)] * 3
    )
    for ax in axes:
        ax.plot([1, 2], [3, 4])
    files = save_figure(figure, tmp_path / "new" / "a.b")
    assert files == [tmp_path / "new" / "a.b.png", tmp_path / "new" / "a.b.svg"]
    with Image.open(files[0]) as image:
        assert image.format == "PNG" and image.size == (900, 225)
        assert len(image.convert("RGB").getcolors(10**6)) > 10, "it is blank"
    assert ET.parse(files[1]).getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_the_same_figure_is_the_same_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        figure, (ax,) = new_figure()
        ax.fill_between([1, 2], [0, 1], [2, 3], alpha=0.5)
        ax.plot([1, 2], [1, 2], label="line")
        ax.legend()
        save_figure(figure, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_the_first_lines_differ_in_colour() -> None:
    _, (ax,) = new_figure()
    assert len({ax.plot([0, 1])[0].get_color() for _ in COLORS}) == len(COLORS) == 7


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'vision-permutator\[plots\]'") as caught:
        new_figure()
    assert "matplotlib" in str(caught.value)


def test_nowhere_to_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    (tmp_path / "picture.png").mkdir()
    for path in (tmp_path / "file" / "x", tmp_path / "picture"):
        figure, _ = new_figure()
        with pytest.raises(UserError, match=f"Cannot write the picture {path} .*another folder"):
            save_figure(figure, path)
