"""Which images are meant: files, folders, patterns, and lists of files."""

import glob
import os
import re
from collections.abc import Iterable
from typing import IO

from timm.data import get_img_extensions
from timm.data.readers.reader_image_folder import find_images_and_targets

from vip.data.check import refuse_loops
from vip.errors import UserError


def find_images(arguments: Iterable[str], listed: IO[bytes]) -> list[str]:
    """The image files that arguments stand for, in their order and as often as they are named.

    Args:
        arguments: Files, folders (all images below them, by timm's endings), glob patterns, and - for a list.
        listed: The list, a file a line or separated by NUL bytes, which is read to its end.

    Raises:
        UserError: If an argument stands for nothing, or there is no image at all. What a list names is not looked for.
    """
    images = [image for argument in arguments for image in _expand(argument, listed)]
    if not images:
        raise UserError("No image given: name files, folders, quoted patterns, or - for a list on standard input.")
    return images


def _expand(argument: str, listed: IO[bytes]) -> list[str]:
    if argument == "-":
        content = listed.read()
        lines = content.split(b"\0") if b"\0" in content else [line.rstrip(b"\r") for line in content.split(b"\n")]
        return [os.fsdecode(line) for line in lines if line]
    if os.path.isdir(argument):
        return _images_in(argument)
    if os.path.exists(argument):
        return [argument]
    if re.match(r"[a-z][a-z0-9+.-]+://", argument, re.IGNORECASE):
        raise UserError(f"{argument} is an address, expected a file: download it first.")
    if not glob.has_magic(argument):
        raise UserError(f"There is no image at {argument}.")
    found = sorted(glob.glob(argument, recursive=True))
    if not found:
        raise UserError(f"No file matches {argument}.")
    return [image for path in found for image in (_images_in(path) if os.path.isdir(path) else [path])]


def _images_in(folder: str) -> list[str]:
    try:
        refuse_loops(folder)
    except OSError as e:
        raise UserError(f"Cannot read the folder {e.filename} ({e.strerror}): name images elsewhere.") from e
    images = [path for path, _ in find_images_and_targets(folder)[0]]
    if not images:
        raise UserError(
            f"The folder {folder} holds no images ({', '.join(get_img_extensions())}); name others by a pattern."
        )
    return images
