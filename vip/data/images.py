"""Decoding of image files as they come: any mode and depth, damaged or hostile."""

import warnings
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError

# Pillow's own limit for "certainly an attack", twice its limit for a warning: about 179 megapixels.
MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 89_478_485)


class UnreadableImage(Exception):
    """An image file that cannot be decoded; the message is the reason."""


def decode_image(file: IO[bytes], mode: str = "RGB") -> Image.Image:
    """Decode an image file to a PIL image.

    Gray, palette and CMYK images are converted to `mode`, 16-bit gray is scaled to 8 bits (PIL alone would clip it).

    Args:
        file: Open binary file.
        mode: PIL mode of the result.

    Raises:
        UnreadableImage: If the file is damaged or no image, or has more than `MAX_PIXELS` pixels.
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
        raise UnreadableImage(f"{type(e).__name__}: {e}") from e


def _decode(file: IO[bytes], mode: str) -> Image.Image:
    image: Image.Image = Image.open(file)
    if image.width * image.height > MAX_PIXELS:
        raise UnreadableImage(f"{image.width}x{image.height} pixels, more than {MAX_PIXELS} are refused")
    if image.mode.startswith("I"):
        pixels = np.asarray(image)
        # Mode I is 32 bits wide and holds whatever depth the file had.
        pixels = pixels / np.float32(257) if image.mode != "I" or pixels.max() > 255 else pixels
        image = Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))
    return image.convert(mode)
