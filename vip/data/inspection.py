"""What can be said of one image file: whether it can be read, what its pixels are, and what is odd about it."""

import hashlib
import io
import os
import re
import tarfile
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

from PIL import ExifTags, Image, ImageFile

from vip.data.images import UnreadableImage, decode_image

KINDS = {
    "wrong_ending": "another format than the ending says",
    "cut_off": "no end mark, though all rows are there",
    "grey_rest": "mid-grey at the lower right, as which JPEG decoders show missing data",
    "zero_block": "4,096 zero bytes or more within the data of a JPEG",
    "trailing_bytes": "bytes after the end of the image",
    "single_colour": "one colour all over",
    "tiny": "a side under 32 pixels",
    "narrow": "one side over 4 times the other",
    "huge": "over 16 megapixels, slow to decode",
    "cmyk": "CMYK, converted to RGB",
    "deep": "over 8 bits a channel, scaled to 8",
    "transparent": "transparency, which is dropped",
    "several_pictures": "more than one picture, the first is used",
    "rotated": "an EXIF orientation, which training ignores",
    "bad_metadata": "EXIF data or further pictures that cannot be read, unused in training",
    "hidden": "a name with a dot in front, read all the same",
}

_END_MARKS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}


class Examined(NamedTuple):
    """What became of one file: its size, and why it cannot be read, or a digest of its pixels and its `KINDS`."""

    size: int
    reason: str = ""
    digest: bytes = b""
    kinds: tuple[str, ...] = ()


def examine(images: Any, index: int) -> Examined:
    """Read an image of a data set as training does, and look at what training does not see."""
    try:
        file, _ = images.reader[index]
        with file:
            data = file.read()
    except (OSError, tarfile.TarError) as e:
        return Examined(0, getattr(e, "strerror", None) or str(e))
    try:
        image = decode_image(io.BytesIO(data))
    except UnreadableImage as e:
        return Examined(len(data), str(e) if data.strip(b"\0") else "only zero bytes" if data else "empty")
    digest = hashlib.blake2b(str(image.size).encode(), digest_size=16)
    digest.update(image.tobytes())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as `decode_image` does
        header = Image.open(io.BytesIO(data))
        kinds = (
            *_damages(header, data, image),
            *_oddities_of_name(images.filename(index), header),
            *_oddities_of_pixels(image),
            *_oddities_of_content(header),
        )
    return Examined(len(data), "", digest.digest(), kinds)


def _damages(header: ImageFile.ImageFile, data: bytes, image: Image.Image) -> Iterator[str]:
    mark = _END_MARKS.get(header.format or "")
    if mark is None:
        return
    assert header.fp is not None
    begin = header.fp.tell()  # behind the metadata, which may hold a thumbnail with an end of its own
    end = data.find(mark, begin)
    if end < 0:
        yield "cut_off"
    elif end + len(mark) < len(data):
        yield "trailing_bytes"
    if header.format == "JPEG":
        if data.find(bytes(4096), begin, end if end >= 0 else len(data)) >= 0:
            yield "zero_block"
        colours = image.crop((image.width // 2, image.height - 1, *image.size)).getcolors(1)  # None if there are more
        if colours and colours[0][1] == (128, 128, 128):
            yield "grey_rest"


def _oddities_of_name(name: str, header: ImageFile.ImageFile) -> Iterator[str]:
    name = os.path.basename(name)
    if name.startswith("."):
        yield "hidden"
    expected = Image.registered_extensions().get(os.path.splitext(name)[1].lower())
    if (header.format or "").replace("MPO", "JPEG") != expected:  # a JPEG with further pictures behind it
        yield "wrong_ending"


def _oddities_of_pixels(image: Image.Image) -> Iterator[str]:
    if image.getcolors(1):
        yield "single_colour"
    short, long = sorted(image.size)
    if short < 32:
        yield "tiny"
    if long > 4 * short:
        yield "narrow"
    if short * long > 16e6:
        yield "huge"


def _oddities_of_content(header: ImageFile.ImageFile) -> Iterator[str]:
    if header.mode == "CMYK":
        yield "cmyk"
    if header.mode[0] in "IF" or re.search(";16[BLN]", str(header.tile)):  # Pillow itself makes 16-bit colours 8-bit
        yield "deep"
    if "transparency" in header.info or header.mode.lower().endswith("a"):
        yield "transparent"
    try:
        if getattr(header, "n_frames", 1) > 1:
            yield "several_pictures"
        if "exif" in header.info and header.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9):
            yield "rotated"
    except Exception:  # damaged metadata makes Pillow raise nearly anything
        yield "bad_metadata"
