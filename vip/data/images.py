"""Decoding of image files as they come: any mode and depth, damaged or hostile."""

import warnings
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError, features

# Pillow's own limit for "certainly an attack", twice its limit for a warning: about 179 megapixels.
MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 89_478_485)
# Resizing the shorter side of a strip to that of a crop makes the longer one as much longer.
MAX_ASPECT = 256
# Pillow's other formats are no photographs; EPS it would hand to Ghostscript, which runs the program that EPS is.
FORMATS = (
    "JPEG",
    "PNG",
    "GIF",
    "BMP",
    "WEBP",
    "TIFF",
    "JPEG2000",
    "PPM",
    *(["AVIF"] if "avif" in features.modules else []),
)


class UnreadableImage(Exception):
    """An image file that cannot be decoded; the message is the reason."""


def decode_image(file: IO[bytes], mode: str = "RGB") -> Image.Image:
    """Decode an image file to a PIL image.

    Gray, palette and CMYK images are converted to `mode`, 16-bit gray is scaled to 8 bits (PIL alone would clip it).

    Args:
        file: Open binary file.
        mode: PIL mode of the result.

    Raises:
        UnreadableImage: If the file is damaged, is of none of the `FORMATS`, has more than `MAX_PIXELS` pixels, or is
            longer than `MAX_ASPECT` times its width.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow reads is fine: 100 megapixels, odd palettes, bad EXIF data
            return _decode(file, mode)
    except UnreadableImage:
        raise
    except UnidentifiedImageError as e:
        raise UnreadableImage("no image, or of an unknown format") from e
    except Exception as e:  # a damaged file makes decoders raise nearly anything; all of it means: unreadable
        raise UnreadableImage(f"{type(e).__name__}: {' '.join(str(e).split())[:200]}") from e


def check_size(width: int, height: int) -> None:
    """Refuse an image by its size, before it is decoded.

    Raises:
        UnreadableImage: If it is too large or too long.
    """
    size = f"{width}x{height} pixels"
    if width * height > MAX_PIXELS:
        raise UnreadableImage(f"{size}, more than {MAX_PIXELS} are refused")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise UnreadableImage(f"{size}, strips of more than {MAX_ASPECT} to 1 are refused")


def _decode(file: IO[bytes], mode: str) -> Image.Image:
    image: Image.Image = Image.open(file, formats=FORMATS)
    check_size(*image.size)
    if image.mode.startswith("I"):
        pixels = np.asarray(image, np.float32)  # of which large images leave room for no more copies
        # Mode I is 32 bits wide and holds whatever depth the file had.
        if image.mode != "I" or pixels.max() > 255:
            pixels /= 257
        image = Image.fromarray(pixels.clip(0, 255, out=pixels).round(out=pixels).astype(np.uint8))
    return image.convert(mode)
