"""Sets of label maps, whatever their layout: open, convert, check, compare."""

import os
import random
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from vip.errors import UserError
from vip.token_labels.maps import EXACT_CLASSES, DamagedMap, FolderMaps, LabelMap, LabelMaps, write_map
from vip.token_labels.packing import SHARD_MAPS, PackedMaps, shard_path, shards_in, write_shard

Progress = Callable[[list[str]], Iterable[str]]


def open_label_maps(root: str | Path) -> LabelMaps:
    """Open a set of label maps of either layout.

    Raises:
        UserError: If there is none.
    """
    root = Path(root)
    if not os.path.isdir(root):  # false as well for what can be no path, where that of pathlib raises
        raise UserError(
            f"There are no label maps at {root}: give the folder that holds a folder of maps for each class, or packed "
            "maps; `vip generate-label` makes them."
        )
    maps = maps_in(root)
    if next(iter(maps.keys()), None) is None:
        raise UserError(f"{root} holds no label maps: neither class folders with .pt files nor packed maps.")
    return maps


def maps_in(root: Path) -> LabelMaps:
    """The label maps in a folder, of either layout, possibly none."""
    return PackedMaps(root) if shards_in(root) else FolderMaps(root)


def pack(source: str | Path, target: str | Path, progress: Progress = iter) -> int:
    """Pack label maps.

    Args:
        source: Maps of either layout.
        target: A folder that is yet to be, or empty.
        progress: Wraps the list of keys, to show how far it is.

    Returns:
        Number of maps.

    Raises:
        UserError: If a map is damaged, or the target holds something.
    """
    maps = open_label_maps(source)
    keys = list(maps.keys())
    with _new_folder(target) as folder:
        chunk: list[tuple[str, LabelMap]] = []
        number = 0
        for key, label_map in _read_all(maps, progress(keys)):
            chunk.append((key, label_map))
            if len(chunk) == SHARD_MAPS:
                write_shard(shard_path(folder, number), chunk)
                chunk, number = [], number + 1
        if chunk:
            write_shard(shard_path(folder, number), chunk)
        if maps.record is not None:
            maps.record.write(folder)
    return len(keys)


def unpack(source: str | Path, target: str | Path, progress: Progress = iter) -> int:
    """Write label maps in the published layout; arguments and result as of `pack`.

    Raises:
        UserError: As `pack`, or if a map names a class that the published layout cannot hold.
    """
    maps = open_label_maps(source)
    keys = list(maps.keys())
    with _new_folder(target) as folder:
        for key, label_map in _read_all(maps, progress(keys)):
            if (highest := int(label_map.indices.max())) > EXACT_CLASSES:
                raise UserError(
                    f"The label map {maps.root / key} names class {highest}; the published layout holds indices up to "
                    f"{EXACT_CLASSES} exactly, keep these maps packed."
                )
            write_map(folder / f"{key}.pt", label_map)
        if maps.record is not None:
            maps.record.write(folder)
    return len(keys)


def _read_all(maps: LabelMaps, keys: Iterable[str]) -> Iterator[tuple[str, LabelMap]]:
    for key in keys:
        try:
            label_map = maps.read(key)
        except DamagedMap as e:
            raise UserError(f"The label map {maps.root / key} is damaged ({e}); generate it again.") from e
        assert label_map is not None
        yield key, label_map


@contextmanager
def _new_folder(path: str | Path) -> Iterator[Path]:
    """Give a folder to write to, which becomes `path` once everything is in it."""
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} holds something already; name a folder that is yet to be.")
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        yield unfinished
        unfinished.replace(path)
    except OSError as e:
        raise UserError(f"Cannot write to {path} ({e.strerror}); make room, or name another folder.") from e
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@dataclass
class CheckReport:
    """What `check` found.

    Attributes:
        maps: Number of maps that are whole.
        layout: 'published' or 'packed'.
        shapes: Their shapes, one if all is well.
        highest_class: The highest class index.
        bytes: Size of all files.
        damaged: Keys of maps that cannot be read, with the reason.
        missing: Keys of images without a map.
        unused: Keys of maps without an image.
        different: Keys of maps that differ from the other set's.
    """

    maps: int = 0
    layout: str = ""
    shapes: set[tuple[int, ...]] = field(default_factory=set)
    highest_class: int = -1
    bytes: int = 0
    damaged: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether the maps can be trained with as they are."""
        return self.maps > 0 and len(self.shapes) == 1 and not (self.damaged or self.missing or self.different)


def check(
    root: str | Path,
    images: Iterable[str] | None = None,
    other: str | Path | None = None,
    progress: Progress = iter,
) -> CheckReport:
    """Read every map of a set.

    Args:
        root: The maps.
        images: Keys of the images that need one.
        other: Another set that ought to hold the same maps.
        progress: Wraps the list of keys, to show how far it is.

    Raises:
        UserError: If there are no maps, or one is no label map at all.
    """
    maps, others = open_label_maps(root), None if other is None else open_label_maps(other)
    report = CheckReport(layout="packed" if isinstance(maps, PackedMaps) else "published")
    report.bytes = sum(file.stat().st_size for file in _files(root))
    keys = list(maps.keys())
    for key in progress(keys):
        try:
            label_map = maps.read(key)
            assert label_map is not None
        except DamagedMap as e:
            report.damaged.append(f"{key}: {e}")
            continue
        report.maps += 1
        report.shapes.add(tuple(label_map.values.shape))
        report.highest_class = max(report.highest_class, int(label_map.indices.max()))
        if others is not None and not _same(label_map, others, key):
            report.different.append(key)
    if others is not None:
        report.different += sorted(set(others.keys()) - set(keys))
    if images is not None:
        wanted = set(images)
        report.missing, report.unused = sorted(wanted - set(keys)), sorted(set(keys) - wanted)
    return report


def _files(root: str | Path) -> list[Path]:
    return [file for file in Path(root).rglob("*") if file.is_file()]


def _same(label_map: LabelMap, others: LabelMaps, key: str) -> bool:
    try:
        other = others.read(key)
    except DamagedMap:
        return False
    return other is not None and all(a.equal(b) for a, b in zip(label_map, other, strict=True))


@dataclass(frozen=True)
class ReadRate:
    """How fast label maps are read, and what they take."""

    layout: str
    maps: int
    files: int
    bytes: int
    maps_per_second: float


def read_rate(root: str | Path, seconds: float) -> ReadRate:
    """Read maps in random order for a while, in one process.

    Raises:
        UserError: If there are no maps, or one is damaged.
    """
    maps = open_label_maps(root)
    keys = list(maps.keys())
    files = _files(root)
    order = random.Random(0)
    read, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds:
        key = order.choice(keys)
        try:
            maps.read(key)
        except DamagedMap as e:
            raise UserError(f"The label map {maps.root / key} is damaged ({e}); see vip label-maps check.") from e
        read += 1
    layout = "packed" if isinstance(maps, PackedMaps) else "published"
    return ReadRate(layout, len(keys), len(files), sum(file.stat().st_size for file in files), read / spent)
