"""Decoding against images written out byte by byte, so that no decoder is compared with itself."""

import io
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from png_files import GREY, GREY_ALPHA, PALETTE, RGB, RGBA, png

from vip.data import images
from vip.data.images import UnreadableImage, decode_image

pytestmark = pytest.mark.filterwarnings("error")


def pixels(data: bytes, mode: str = "RGB") -> np.ndarray:
    image = decode_image(io.BytesIO(data), mode)
    assert image.mode == mode
    return np.asarray(image)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def grey_as_rgb(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=2)


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


def test_16_bit_grey_is_scaled_and_not_clipped() -> None:
    values = np.linspace(0, 65535, 16 * 16).astype(">u2").reshape(16, 16)
    expected = np.round(values.astype(np.float64) * 255 / 65535).astype(np.uint8)
    assert len(np.unique(expected)) > 200  # clipped, nearly all would be 255
    np.testing.assert_array_equal(pixels(png(16, 16, 16, GREY, values.tobytes())), grey_as_rgb(expected))
    np.testing.assert_array_equal(pixels(png(16, 16, 16, GREY, values.tobytes()), "L"), expected)


def test_dark_16_bit_grey_stays_dark() -> None:
    values = np.full((4, 4), 200, ">u2")
    assert pixels(png(4, 4, 16, GREY, values.tobytes())).max() == 1


def test_32_bit_grey_of_any_depth() -> None:
    deep = np.array([[0, 257, 65535, 1_000_000]], np.int32)
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(deep), "TIFF"), "L"), [[0, 1, 255, 255]])
    shallow = np.array([[0, 1, 128, 255]], np.int32)
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(shallow), "TIFF"), "L"), shallow)


def test_8_bit_grey(random: np.random.Generator) -> None:
    values = random.integers(0, 256, (5, 7), dtype=np.uint8)
    np.testing.assert_array_equal(pixels(png(7, 5, 8, GREY, values.tobytes())), grey_as_rgb(values))


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_few_bits_of_grey_span_black_to_white(depth: int) -> None:
    row = np.arange(2**depth).repeat(8)  # whole bytes
    bits = ((row[:, None] >> np.arange(depth)[::-1]) & 1).astype(np.uint8)
    expected = np.round(row * 255 / (2**depth - 1)).astype(np.uint8)[None]
    np.testing.assert_array_equal(
        pixels(png(len(row), 1, depth, GREY, np.packbits(bits).tobytes())), grey_as_rgb(expected)
    )


@pytest.mark.parametrize("transparent", [b"", b"\x00", bytes(range(0, 256, 16))])
def test_palette_with_and_without_transparency(
    random: np.random.Generator, transparent: bytes, recwarn: pytest.WarningsRecorder
) -> None:
    palette = random.integers(0, 256, (16, 3), dtype=np.uint8)
    indices = random.integers(0, 16, (6, 9), dtype=np.uint8)
    data = png(9, 6, 8, PALETTE, indices.tobytes(), palette.tobytes(), transparent)
    np.testing.assert_array_equal(pixels(data), palette[indices])
    assert not recwarn.list


def test_alpha_is_dropped(random: np.random.Generator) -> None:
    grey_alpha = random.integers(0, 256, (6, 9, 2), dtype=np.uint8)
    np.testing.assert_array_equal(
        pixels(png(9, 6, 8, GREY_ALPHA, grey_alpha.tobytes())), grey_as_rgb(grey_alpha[..., 0])
    )
    rgba = random.integers(0, 256, (6, 9, 4), dtype=np.uint8)
    np.testing.assert_array_equal(pixels(png(9, 6, 8, RGBA, rgba.tobytes())), rgba[..., :3])


def test_16_bit_colour_keeps_its_range(random: np.random.Generator) -> None:
    values = random.integers(0, 65536, (6, 9, 3)).astype(">u2")
    expected = values.astype(np.float64) * 255 / 65535
    assert np.abs(pixels(png(9, 6, 16, RGB, values.tobytes())) - expected).max() <= 1


@pytest.mark.parametrize(
    "inks, expected",
    [
        ((255, 0, 0, 0), (0, 255, 255)),
        ((0, 255, 0, 0), (255, 0, 255)),
        ((0, 0, 255, 0), (255, 255, 0)),
        ((0, 0, 0, 255), (0, 0, 0)),
        ((0, 0, 0, 0), (255, 255, 255)),
        ((51, 102, 153, 64), (153, 115, 76)),  # (255 - ink) * (255 - black) / 255
    ],
)
def test_cmyk_jpeg(inks: tuple[int, ...], expected: tuple[int, ...]) -> None:
    data = encoded(Image.new("CMYK", (16, 16), inks), "JPEG", quality=100)
    assert Image.open(io.BytesIO(data)).mode == "CMYK"
    assert np.abs(pixels(data).reshape(-1, 3).astype(int) - expected).max() <= 3


def test_grey_jpeg() -> None:
    data = encoded(Image.linear_gradient("L"), "JPEG", quality=100)
    assert np.abs(pixels(data).astype(int) - grey_as_rgb(np.arange(256)[:, None].repeat(256, 1))).max() <= 2


def photograph(size: int = 64) -> Image.Image:
    rng = np.random.default_rng(1)
    return Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "data",
    [
        encoded(photograph(), "JPEG")[:-500],
        encoded(photograph(), "JPEG")[:300],
        encoded(photograph(), "PNG")[:-500],
        b"",
        b"\xff\xd8\xff\xe0",
        b"not a picture, whatever its name says\n" * 10,
        b"\0" * 5000,
    ],
    ids=["half a JPEG", "head of a JPEG", "half a PNG", "zero bytes", "JPEG magic", "text", "zeros"],
)
def test_damaged_files_are_unreadable(data: bytes) -> None:
    with pytest.raises(UnreadableImage) as error:
        decode_image(io.BytesIO(data))
    assert str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("side", [14_000, 2**31 - 1])
@pytest.mark.parametrize("limit_of_pillow", [True, False])
def test_decompression_bomb_is_refused_before_it_is_unpacked(
    side: int, limit_of_pillow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not limit_of_pillow:  # some programs switch it off
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    bomb = png(side, side, 8, RGB, b"")
    assert len(bomb) < 200
    start = time.perf_counter()
    with pytest.raises(UnreadableImage, match="(?i)pixels"):
        decode_image(io.BytesIO(bomb))
    assert time.perf_counter() - start < 1


def test_100_megapixels_are_read_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    row = np.packbits(np.arange(10_000) % 2).tobytes()
    data = png(10_000, 10_000, 1, GREY, row * 10_000)
    image = decode_image(io.BytesIO(data))
    assert image.size == (10_000, 10_000) and image.mode == "RGB"
    assert [image.getpixel((x, 9_999)) for x in (0, 1, 9_999)] == [(0,) * 3, (255,) * 3, (255,) * 3]
    assert not recwarn.list


SAMPLES = [
    encoded(photograph(24), "JPEG"),
    encoded(photograph(24), "JPEG", progressive=True),
    encoded(photograph(24).convert("CMYK"), "JPEG"),
    encoded(photograph(24), "PNG"),
    encoded(photograph(24).quantize(16), "PNG", transparency=3),
    png(8, 8, 16, GREY, bytes(range(128))),
]
MUTATION = st.tuples(st.integers(0, 2**16), st.binary(min_size=0, max_size=3), st.booleans())


def readable_or_not(data: bytes) -> None:
    """Either an RGB image or `UnreadableImage`; anything else fails."""
    try:
        image = decode_image(io.BytesIO(data))
    except UnreadableImage as e:
        assert "\n" not in str(e)
    else:
        assert image.mode == "RGB" and image.getpixel((0, 0)) is not None


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the tests what a mutated header may ask for."""
    monkeypatch.setattr(images, "MAX_PIXELS", 10**6)


FUZZ = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(st.sampled_from(SAMPLES), st.lists(MUTATION, max_size=5), st.integers(0, 4000))
def test_mutated_files(small_limit: None, data: bytes, mutations: list[tuple[int, bytes, bool]], length: int) -> None:
    for position, replacement, insert in mutations:
        position %= len(data)
        data = data[:position] + replacement + data[position + (0 if insert else len(replacement)) :]
    readable_or_not(data[:length])


@FUZZ
@given(
    st.integers(0, 40),
    st.integers(1, 40),
    st.sampled_from([1, 2, 4, 8, 16, 3]),
    st.sampled_from([GREY, RGB, PALETTE, GREY_ALPHA, RGBA, 5]),
    st.binary(min_size=1, max_size=200),
    st.binary(max_size=60),
    st.binary(max_size=20),
)
def test_made_up_headers(
    small_limit: None, width: int, height: int, depth: int, kind: int, rows: bytes, palette: bytes, alpha: bytes
) -> None:
    readable_or_not(png(width, height, depth, kind, rows, palette, alpha))
