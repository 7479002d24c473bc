"""Which images arguments stand for."""

import errno
import io
import os
from pathlib import Path

import pytest
from timm.data import get_img_extensions

from vip.errors import UserError
from vip.prediction.inputs import find_images

NOTHING = io.BytesIO()


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder `photos`, in the working directory."""
    for name in ("1.png", "10.png", "2.JPG", "below/deep/3.jpeg", "below/4.webp", "notes.txt", "[x].png"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "photos"


def test_files_in_their_order_and_as_often_as_given(photos: Path) -> None:
    given = ["photos/2.JPG", "photos/1.png", "photos/notes.txt", "photos/2.JPG", str(photos / "1.png")]
    assert find_images(given, NOTHING) == given


def test_folders(photos: Path) -> None:
    found = find_images(["photos", "photos/below/4.webp", "photos/below"], NOTHING)
    below, rest = found[-1], found[:-2]
    assert below == "photos/below/deep/3.jpeg" and found[-2] == "photos/below/4.webp"
    expected = {
        str(p.relative_to(photos.parent)) for p in photos.rglob("*") if p.suffix.lower() in get_img_extensions()
    }
    assert set(rest) == expected and len(rest) == len(expected) == 5
    numbered = [path for path in rest if path.count("/") == 1 and "[" not in path]
    assert numbered == ["photos/1.png", "photos/2.JPG", "photos/10.png"]


def test_patterns(photos: Path) -> None:
    assert find_images(["photos/*.png"], NOTHING) == ["photos/1.png", "photos/10.png", "photos/[x].png"]
    assert find_images(["photos/**/*.webp"], NOTHING) == ["photos/below/4.webp"]
    assert find_images(["photos/[x].png"], NOTHING) == ["photos/[x].png"], "a file of that name comes first"
    assert find_images(["photos/bel*"], NOTHING) == ["photos/below/deep/3.jpeg"]


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"a.png\nb c.png\n", ["a.png", "b c.png"]),
        (b"a.png\r\n\r\nb.png", ["a.png", "b.png"]),
        (b"a\nb.png\0c.png\0", ["a\nb.png", "c.png"]),
        (b"\xff.png\n*.png\n-\n", [os.fsdecode(b"\xff.png"), "*.png", "-"]),
    ],
)
def test_lists(content: bytes, expected: list[str], photos: Path) -> None:
    assert find_images(["photos/1.png", "-"], io.BytesIO(content)) == ["photos/1.png", *expected]


@pytest.mark.parametrize(
    "argument, words",
    [
        ("photos/3.png", "There is no image at photos/3.png"),
        ("photos/*.gif", "No file matches photos/\\*.gif"),
        ("https://example.org/a.png", "is an address, expected a file: download"),
        ("S3://bucket/a.png", "is an address"),
        ("empty", "empty holds no images \\(.png, .jpg, .jpeg\\)"),
        ("-", "No image given"),
    ],
)
def test_what_stands_for_nothing(photos: Path, argument: str, words: str) -> None:
    Path("empty").mkdir()
    with pytest.raises(UserError, match=words):
        find_images([argument], io.BytesIO(b"\n"))


def test_nothing_given() -> None:
    with pytest.raises(UserError, match="No image given"):
        find_images([], NOTHING)


def test_folders_that_cannot_be_read(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def fail(path: str) -> object:
        if str(path).endswith("deep"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scandir(path)

    monkeypatch.setattr("vip.data.check.os.scandir", fail)
    with pytest.raises(UserError, match="Cannot read the folder photos/below/deep \\(Permission denied\\)"):
        find_images(["photos"], NOTHING)


def test_links_to_a_folder_above(photos: Path) -> None:
    (photos / "below" / "loop").symlink_to(photos)
    with pytest.raises(UserError, match="links to a folder that it is in"):
        find_images(["photos"], NOTHING)
