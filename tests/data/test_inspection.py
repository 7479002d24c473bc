"""What is said of single files, made by hand so that it is known what is wrong with them."""

import io
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from png_files import GREY, GREY_ALPHA, PALETTE, RGB, RGBA, png

from vip.data import inspection
from vip.data.inspection import KINDS, Examined, examine

pytestmark = pytest.mark.filterwarnings("error")


def photograph(width: int = 160, height: int = 120, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def examined(data: bytes, name: str = "n01440764_1.JPEG") -> Examined:
    return examine(SimpleNamespace(reader=[(io.BytesIO(data), 0)], filename=lambda index: name), 0)


def kinds(data: bytes, name: str = "n01440764_1.JPEG") -> set[str]:
    found = examined(data, name)
    assert found.reason == "" and len(found.digest) == 16 and found.size == len(data)
    assert len(set(found.kinds)) == len(found.kinds) and set(found.kinds) <= KINDS.keys()
    return set(found.kinds)


def exif(orientation: int, thumbnail: bytes = b"") -> bytes:
    """EXIF data after the TIFF specification: an orientation, and a thumbnail in a second directory."""
    first = struct.pack("<HHHIII", 1, 0x112, 3, 1, orientation, 26 if thumbnail else 0)
    second = struct.pack("<HHHIIHHIII", 2, 0x201, 4, 1, 56, 0x202, 4, 1, len(thumbnail), 0) if thumbnail else b""
    return b"Exif\0\0II*\0" + struct.pack("<I", 8) + first + second + thumbnail


JPEG = encoded(photograph(), quality=90)
SCAN = JPEG.index(b"\xff\xda") + 14  # behind the header of the scan
PNG = encoded(photograph(), "PNG")
ANIMATION = encoded(photograph(), "GIF", save_all=True, append_images=[photograph(seed=1)], duration=50)
PIXELS_16 = np.arange(64 * 64 * 3, dtype=">u2").tobytes()


# --- kinds


@pytest.mark.parametrize(
    "data, name",
    [
        (JPEG, "a.JPEG"),
        (JPEG, "a.jpg"),
        (encoded(photograph(), "PNG"), "a.PNG"),
        (encoded(photograph(), progressive=True), "a.jpeg"),
        (encoded(photograph().convert("L")), "a.jpg"),
        (encoded(photograph().quantize(16), "PNG"), "a.png"),
        (encoded(photograph(), exif=exif(1)), "a.jpg"),
        (encoded(photograph(), exif=exif(0)), "a.jpg"),
        (encoded(photograph(), exif=exif(1, encoded(photograph(16, 16)))), "a.jpg"),
        (encoded(photograph(32, 128)), "a.jpg"),
        (png(2048, 2048, 1, GREY, np.packbits(np.arange(2048) % 2).tobytes() * 2048), "a.png"),
    ],
    ids=[
        *("JPEG", "jpg", "PNG", "progressive", "grey", "palette", "upright", "orientation unknown", "thumbnail"),
        *("1 to 4", "4 megapixels"),
    ],
)
def test_nothing_is_odd(data: bytes, name: str) -> None:
    assert kinds(data, name) == set()


@pytest.mark.parametrize(
    "data, name, expected",
    [
        (encoded(photograph(), "PNG"), "a.JPEG", {"wrong_ending"}),
        (JPEG, "a.png", {"wrong_ending"}),
        (encoded(photograph(), "BMP"), "a.jpg", {"wrong_ending"}),
        (JPEG, "class/._a.jpg", {"hidden"}),
        (JPEG, ".class/a.jpg", set()),
        (encoded(Image.new("RGB", (64, 64), (1, 2, 3)), "PNG"), "a.png", {"single_colour"}),
        (encoded(Image.new("L", (64, 64), 7), "GIF"), "a.png", {"single_colour", "wrong_ending"}),
        (encoded(photograph(31, 64)), "a.jpg", {"tiny"}),
        (encoded(photograph(129, 32)), "a.jpg", {"narrow"}),
        (encoded(photograph(32, 129)), "a.jpg", {"narrow"}),
        (encoded(photograph().convert("CMYK")), "a.jpg", {"cmyk"}),
        (png(64, 96, 16, GREY, PIXELS_16[: 64 * 96 * 2]), "a.png", {"deep"}),
        (png(64, 64, 16, RGB, PIXELS_16), "a.png", {"deep"}),
        (png(64, 32, 16, GREY_ALPHA, PIXELS_16[: 64 * 32 * 4]), "a.png", {"deep", "transparent"}),
        (encoded(photograph().convert("RGBA"), "PNG"), "a.png", {"transparent"}),
        (png(64, 64, 8, RGBA, PIXELS_16[: 64 * 64 * 4]), "a.png", {"transparent"}),
        (png(64, 32, 8, PALETTE, bytes(range(64)) * 32, bytes(range(192)), b"\x07"), "a.png", {"transparent"}),
        (encoded(photograph(), exif=exif(6)), "a.jpg", {"rotated"}),
        (encoded(photograph(), "PNG", exif=exif(3)[6:]), "a.png", {"rotated"}),
        (ANIMATION[: ANIMATION.rindex(b"\x21\xf9\x04") + 5], "a.png", {"bad_metadata", "wrong_ending"}),
        (png(5000, 4000, 1, GREY, np.packbits(np.arange(5000) % 2).tobytes() * 4000), "a.png", {"huge"}),
    ],
)
def test_oddities(data: bytes, name: str, expected: set[str]) -> None:
    assert kinds(data, name) == expected


@pytest.mark.parametrize(
    "kind, name, more", [("GIF", "a.png", {"wrong_ending"}), ("PNG", "a.png", set()), ("MPO", "a.jpg", set())]
)
def test_several_pictures(kind: str, name: str, more: set[str]) -> None:
    """Animations, and what cameras append to a JPEG, whose ending is right."""
    data = encoded(photograph(), kind, save_all=True, append_images=[photograph(seed=1), photograph(seed=2)])
    assert kinds(data, name) - {"transparent"} == {"several_pictures"} | more


# --- damages that do not show in training


@pytest.mark.parametrize("more", [b"\0", b"\0" * 5000, b"\r\n", b"<html>not found</html>"])
@pytest.mark.parametrize("image", ["JPEG", "PNG"])
def test_trailing_bytes(image: str, more: bytes) -> None:
    assert kinds(encoded(photograph(), image) + more, f"a.{image}") == {"trailing_bytes"}


def test_an_end_that_is_missing() -> None:
    assert "truncated" in examined(JPEG[:-2]).reason  # the last bytes of a JPEG are of its picture
    assert kinds(JPEG[:-2] + bytes(20)) == {"cut_off"}
    data = encoded(photograph(), "PNG")
    assert kinds(data[:-12], "a.png") == {"cut_off"}
    with_thumbnail = encoded(photograph(), exif=exif(1, encoded(photograph(16, 16))))
    assert with_thumbnail.count(b"\xff\xd9") == 2
    assert kinds(with_thumbnail[:-2] + bytes(20)) == {"cut_off"}, "the end of the thumbnail was taken for the end"


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_rest_of_a_repaired_jpeg_is_grey(share: float, mode: str) -> None:
    """As a download that broke off looks once a program has ended it properly."""
    data = encoded(photograph().convert(mode), quality=90)
    scan = data.index(b"\xff\xda")
    assert kinds(data[: int(scan + share * (len(data) - scan))] + b"\xff\xd9") == {"grey_rest"}


def test_grey_that_is_no_damage() -> None:
    values = np.full((64, 64, 3), 128, np.uint8)
    values[:32] = np.asarray(photograph(64, 32))
    assert kinds(encoded(Image.fromarray(values), "PNG"), "a.png") == set(), "no decoder of PNG files fills with grey"
    values[32:] = (255, 255, 255)
    assert kinds(encoded(Image.fromarray(values))) == set()


def test_a_lost_block() -> None:
    assert len(JPEG) > SCAN + 10_000
    middle = (SCAN + len(JPEG)) // 2
    assert "zero_block" in kinds(JPEG[: middle - 2048] + bytes(4096) + JPEG[middle + 2048 :])
    assert "zero_block" not in kinds(JPEG[: middle - 500] + bytes(1000) + JPEG[middle + 500 :])
    assert kinds(JPEG + bytes(9000)) == {"trailing_bytes"}


# --- unreadable files


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "empty"),
        (bytes(5000), "only zero bytes"),
        (b"<html>503 Service Unavailable</html>", "no image"),
        (JPEG[: len(JPEG) // 2], "truncated"),
        (encoded(photograph(), "PNG")[:5000], "truncated"),
        (png(20_000, 20_000, 8, RGB, b""), "pixels"),
        (PNG[:60] + bytes(2000) + PNG[2060:], "broken"),
    ],
    ids=["empty", "zeros", "text", "half a JPEG", "half a PNG", "bomb", "damaged PNG"],
)
def test_unreadable(data: bytes, reason: str) -> None:
    found = examined(data)
    assert reason in found.reason and found.reason and "\n" not in found.reason
    assert found == Examined(len(data), found.reason, b"", ())


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    class Missing:
        def __getitem__(self, index: int) -> None:
            open(tmp_path / "nowhere")

    class CutOff:
        def __getitem__(self, index: int) -> tuple[object, int]:
            whole = io.BytesIO()
            with tarfile.open(fileobj=whole, mode="w") as tar:
                member = tarfile.TarInfo("a.jpg")
                member.size = len(JPEG)
                tar.addfile(member, io.BytesIO(JPEG))
            tar = tarfile.open(fileobj=io.BytesIO(whole.getvalue()[:3000]))
            return tar.extractfile(member), 0

    for reader, reason in ((Missing(), "No such file or directory"), (CutOff(), "unexpected end of data")):
        assert examine(SimpleNamespace(reader=reader, filename=None), 0) == Examined(0, reason)


SAMPLES = [
    ANIMATION,
    JPEG,
    PNG,
    encoded(photograph(), exif=exif(6, encoded(photograph(16, 16)))),
    encoded(photograph(), "TIFF"),
]
MUTATION = st.tuples(st.floats(0, 1), st.integers(0, 400), st.binary(min_size=1, max_size=3))


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(SAMPLES), st.lists(MUTATION, max_size=4), st.floats(0.3, 1))
def test_any_damage_is_survived(data: bytes, mutations: list[tuple[float, int, bytes]], length: float) -> None:
    """Near the beginning, where the metadata is, and anywhere else."""
    for where, offset, new in mutations:
        position = (offset if offset < 300 else int(where * len(data))) % len(data)
        data = data[:position] + new + data[position + len(new) :]
    found = examined(data[: int(length * len(data))])
    assert bool(found.reason) != bool(found.digest) and set(found.kinds) <= KINDS.keys()


# --- digests


@pytest.mark.parametrize("again", [lambda i: encoded(i, "PNG", compress_level=1), lambda i: encoded(i, "BMP")])
def test_the_same_pixels_have_the_same_digest(again: Callable[[Image.Image], bytes]) -> None:
    first = examined(JPEG).digest
    with Image.open(io.BytesIO(JPEG)) as image:
        assert examined(again(image), "other.png").digest == first
        assert examined(encoded(image.convert("RGBA"), "PNG")).digest == first


def test_other_pixels_have_other_digests() -> None:
    values = np.asarray(photograph()).copy()
    digests = {examined(encoded(Image.fromarray(values), "PNG")).digest}
    values[3, 4, 1] ^= 1
    digests.add(examined(encoded(Image.fromarray(values), "PNG")).digest)
    digests.add(examined(encoded(Image.fromarray(values.reshape(160, 120, 3)), "PNG")).digest)
    digests.add(examined(encoded(Image.fromarray(values[::-1].copy()), "PNG")).digest)
    assert len(digests) == 4


def test_truncated_files_would_be_read_if_pillow_were_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest of a broken JPEG is what `grey_rest` looks for."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert set(examined(JPEG[: len(JPEG) // 2]).kinds) == {"cut_off", "grey_rest"}


def test_what_is_readable_is_what_training_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: object) -> None:
        raise inspection.UnreadableImage("not today")

    monkeypatch.setattr(inspection, "decode_image", refuse)
    assert examined(JPEG) == Examined(len(JPEG), "not today")
