"""Archives in the structure of ImageNet's, and the folder that they ought to become."""

import hashlib
import io
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vip.data.imagenet import Expected

Tree = dict[str, str]
"""Checksums of files by their paths."""


def jpeg(seed: int, side: int = 8) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    return file.getvalue()


def pack(files: Mapping[str, bytes], others: Iterable[tarfile.TarInfo] = ()) -> bytes:
    """A tar archive of files and of members without content."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for member in others:
            tar.addfile(member)
    return archive.getvalue()


@dataclass(frozen=True)
class Archives:
    """The two archives, and what they ought to hold."""

    train: Path
    val: Path
    expected: Expected


def write_archives(folder: Path, train: Mapping[str, bytes], val: Mapping[str, bytes], classes: list[str]) -> Archives:
    """Write the archives of named nested archives and of named images; `classes` are those of all validation images."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {"train": folder / "images_train.tar", "val": folder / "images_val.tar"}
    for split, content in (("train", train), ("val", val)):
        paths[split].write_bytes(pack(content))
    checksums = {split: hashlib.md5(path.read_bytes()).hexdigest() for split, path in paths.items()}
    images = sum(len(tarfile.open(fileobj=io.BytesIO(nested)).getnames()) for nested in train.values())
    return Archives(paths["train"], paths["val"], Expected(images, classes, checksums))


def val_name(number: int) -> str:
    return f"ILSVRC2012_val_{number:08}.JPEG"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def extract(archives: Archives, folder: Path) -> Tree:
    """What the archives become, by tarfile's own extraction and a move of each validation image."""
    for path in (archives.train, archives.val):
        with tarfile.open(path) as tar:
            tar.extractall(folder / path.stem, filter="data")
    tree = {}
    for nested in (folder / archives.train.stem).iterdir():
        with tarfile.open(nested) as tar:
            tar.extractall(folder / nested.stem, filter="data")
        tree |= {f"train/{nested.stem}/{p.name}": digest(p) for p in (folder / nested.stem).iterdir()}
    for image in (folder / archives.val.stem).iterdir():
        wnid = archives.expected.val_classes[int(image.stem.rpartition("_")[2]) - 1]
        tree[f"val/{wnid}/{image.name}"] = digest(image)
    return tree


def tree_of(folder: Path) -> Tree:
    """What is in `train/` and `val/`."""
    splits = [folder / split for split in ("train", "val")]
    return {str(p.relative_to(folder)): digest(p) for s in splits for p in s.rglob("*") if not p.is_dir()}
