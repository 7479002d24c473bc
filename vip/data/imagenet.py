"""ImageNet-1k as an image folder, from its two archives.

Classes are written to a folder `.unfinished`, the disks are synced, and the classes move to their places.
So a class folder in its place is whole, however the program was stopped, and also after a power failure where `os.sync`
waits for the disks, as on Linux. One sync for many files takes the place of one for each.
"""

import hashlib
import json
import os
import re
import shutil
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import IO, Any

import numpy as np
from timm.data import ImageNetInfo
from torchvision.datasets.imagenet import ARCHIVE_META

from vip.errors import UserError
from vip.files import locked, replacing

Progress = Callable[..., Iterable[Any]]

_CHUNK = 2**20  # a checksum's progress is shown in MiB
_SYNC_BYTES = 2**28  # of images between two syncs; as much is unpacked again after a kill
_END = bytes(2 * tarfile.BLOCKSIZE)  # of every tar archive


@dataclass(frozen=True)
class Expected:
    """What the archives ought to hold.

    Attributes:
        train_images: Number of training images.
        val_classes: WordNet ID of the class of each validation image, in the order of their file names.
        checksums: MD5 of the archive of each split, in hexadecimal.
    """

    train_images: int
    val_classes: Sequence[str]
    checksums: Mapping[str, str]

    def members(self, split: str) -> dict[str, str]:
        """The class of each file that the archive of a split may hold."""
        if split == "train":
            return {f"{wnid}.tar": wnid for wnid in self.val_classes}
        return {f"ILSVRC2012_val_{i:08}.JPEG": wnid for i, wnid in enumerate(self.val_classes, 1)}


def ilsvrc2012() -> Expected:
    """What the archives that image-net.org gives hold."""
    wnids = ImageNetInfo().label_names()
    with files("vip.data").joinpath("imagenet_val_labels.txt").open(encoding="utf-8") as file:
        labels = np.loadtxt(file, dtype=int).ravel()
    checksums = {split: ARCHIVE_META[split][1] for split in ("train", "val")}
    return Expected(1_281_167, [wnids[i] for i in labels], checksums)


@dataclass
class Report:
    """What is in the folder after `prepare`.

    Attributes:
        classes: Number of classes of each split.
        images: Number of images of each split.
        unpacked: Number of classes of each split that were unpacked now.
        wrong: Class folders that hold another number of files than their archive.
        unusual: Numbers in which the archives differ from what is expected.
    """

    classes: Counter[str] = field(default_factory=Counter)
    images: Counter[str] = field(default_factory=Counter)
    unpacked: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    unusual: list[str] = field(default_factory=list)


def _silently(items: Iterable[Any], **labels: str) -> Iterable[Any]:
    return items


def prepare(
    train_tar: str | Path,
    val_tar: str | Path,
    out: str | Path,
    expected: Expected,
    checksum: bool = True,
    progress: Progress = _silently,
) -> Report:
    """Make `out/train` and `out/val` with a folder a class; what is there of an earlier call is not made again.

    Args:
        train_tar: Archive of an archive for each class.
        val_tar: Archive of the validation images.
        out: Folder to make or to complete.
        expected: What the archives ought to hold.
        checksum: Compare the archives' checksums, unless they have not changed since this was done.
        progress: Wraps a list or range with `desc` and `unit` as `tqdm` does, to show how far it is.

    Raises:
        UserError: If an archive cannot be read, is not the expected one or holds what it should not, `out` holds
            something else, or the disk is full.
    """
    folder = Path(out)
    with _opened(train_tar) as train, _opened(val_tar) as val:
        try:
            # the small one first: what is wrong with it shows soon
            archives = [_Archive("val", val, folder, expected), _Archive("train", train, folder, expected)]
            folder.mkdir(parents=True, exist_ok=True)
            with locked(folder):
                for archive in archives:
                    archive.take_folder()
                _refuse_small_disk(archives)
                if checksum:
                    for archive in archives:
                        _verify(archive, expected.checksums[archive.split], progress)
                report = Report()
                for archive in archives:
                    report.unpacked[archive.split] = _unpack(archive, progress)
                for archive in archives:
                    _count(archive, report, progress)
                    report.unusual += _unusual(archive, expected)
                return report
        except OSError as e:
            raise UserError(
                f"Cannot unpack to {out} ({e.strerror or e}); mend that, or make room, and run the same again: it goes "
                "on where it stopped."
            ) from e


@contextmanager
def _opened(path: str | Path) -> Iterator[IO[bytes]]:
    try:
        file = open(path, "rb")
    except OSError as e:
        raise UserError(f"Cannot read the archive {path} ({e.strerror}); expected TRAIN_TAR VAL_TAR OUT.") from e
    with file:
        yield file


def _list_members(
    file: IO[bytes], title: str, is_expected: Callable[[str], bool], example: str
) -> tuple[tarfile.TarFile, list[tarfile.TarInfo]]:
    """Open an archive and read its headers to the end, before anything of it is unpacked.

    Raises:
        UserError: If it is damaged or empty, or holds anything but plain files of expected names, each once.
    """
    names: set[str] = set()
    try:
        tar = tarfile.open(fileobj=file, mode="r:")
        for member in tar:
            if not member.isreg() or member.issparse():
                problem = "no plain file"
            else:
                problem = "twice" if member.name in names else "" if is_expected(member.name) else "unexpected"
            if problem:
                raise UserError(
                    f"{title} holds {member.name!r:.100} ({problem}) and is not unpacked; expected plain files such "
                    f"as {example}, each once."
                )
            names.add(member.name)
        file.seek(tar.offset)  # tarfile takes a damaged header for the end
        if file.read(len(_END)) != _END:
            raise tarfile.ReadError("it does not end as archives do")
        if not names:
            raise tarfile.ReadError("it is empty")
    except (tarfile.TarError, OSError, ValueError, OverflowError) as e:  # forged sizes lead anywhere
        raise UserError(f"{title} is cut off, damaged or no tar archive ({e}); download it again.") from e
    return tar, tar.getmembers()


class _Archive:
    """An archive of which the headers were read, and the folder it goes to.

    Attributes:
        split: 'train' or 'val'.
        path: Its place.
        file: The open file.
        classes: Its members by class: in 'train' the archive of the images, in 'val' the images.
        folder: Where the class folders go.
        record: What is known of the archive.

    Raises:
        UserError: If it is not the archive of the split.
    """

    def __init__(self, split: str, file: IO[bytes], out: Path, expected: Expected) -> None:
        self.split, self.path, self.file, self.folder = split, file.name, file, out / split
        self.unfinished = self.folder / ".unfinished"
        other = {"train": "val", "val": "train"}[split]
        names, other_names = expected.members(split), expected.members(other)

        def is_expected(name: str) -> bool:
            if name in other_names:
                raise UserError(
                    f"{self.path} holds {name} as the archive of {other} does, and is given as that of {split}; the "
                    "order is TRAIN_TAR VAL_TAR OUT."
                )
            return name in names

        self.tar, members = _list_members(file, self.path, is_expected, next(iter(names)))
        self.classes: dict[str, list[tarfile.TarInfo]] = defaultdict(list)
        for member in members:
            self.classes[names[member.name]].append(member)
        stat = os.fstat(file.fileno())
        self._record_path = out / f"{split}.json"
        self.record = _Record.read(self._record_path, stat.st_size, stat.st_mtime_ns)

    def save_record(self) -> None:
        """Keep what is known of the archive for the next run."""
        with replacing(self._record_path) as unfinished:
            unfinished.write_text(json.dumps(asdict(self.record)), encoding="utf-8")

    def images(self, wnid: str) -> tuple[tarfile.TarFile, list[tarfile.TarInfo]]:
        """The images of a class, and the archive that they are in.

        Raises:
            UserError: If that one is damaged or holds anything else.
        """
        members = self.classes[wnid]
        if self.split == "val":
            return self.tar, members
        nested = self.tar.extractfile(members[0])
        assert nested is not None  # as of a folder
        image = re.compile(rf"{wnid}_[0-9]+\.JPEG")
        title = f"{members[0].name} in {self.path}"
        return _list_members(nested, title, lambda name: bool(image.fullmatch(name)), f"{wnid}_1.JPEG")

    def missing(self) -> list[str]:
        """The classes that are yet to be unpacked."""
        return [wnid for wnid in self.classes if not (self.folder / wnid).exists()]

    def take_folder(self) -> None:
        """Make the folder, or remove what a killed run left in it.

        Raises:
            UserError: If it holds anything but classes of the archive.
        """
        self.folder.mkdir(exist_ok=True)
        entries = {entry.name: entry for entry in os.scandir(self.folder)}
        unfinished = entries.pop(self.unfinished.name, None)
        others = sorted(n for n, e in entries.items() if n not in self.classes or not e.is_dir(follow_symlinks=False))
        if others:
            names = ", ".join(others[:5]) + ", ..." * (len(others) > 5)
            raise UserError(f"{self.folder} holds {names}, which {self.path} does not; remove it, or name another OUT.")
        if unfinished:
            shutil.rmtree(unfinished)


@dataclass
class _Record:
    """What is known of an archive of a size and time of modification: its checksum, and the images of its classes."""

    size: int
    mtime_ns: int
    md5: str = ""
    images: dict[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, size: int, mtime_ns: int) -> "_Record":
        """Read a record; an empty one if there is none, or only that of another archive.

        Raises:
            UserError: If it is damaged.
        """
        try:
            record = cls(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return cls(size, mtime_ns)
        except (ValueError, TypeError) as e:
            raise UserError(f"Cannot read {path} ({e}); remove it, and run the same again.") from e
        return record if (record.size, record.mtime_ns) == (size, mtime_ns) else cls(size, mtime_ns)


def _refuse_small_disk(archives: list[_Archive]) -> None:
    needed: Counter[int] = Counter()  # by disk: a split may be a link to another one
    for archive in archives:
        disk = archive.folder.stat().st_dev
        needed[disk] += sum(member.size for wnid in archive.missing() for member in archive.classes[wnid])
        free = shutil.disk_usage(archive.folder).free
        if needed[disk] > free:
            raise UserError(
                f"The images need {needed[disk] / 1e9:.2f} GB more and {archive.folder} has {free / 1e9:.2f} GB free; "
                "make room, or name another OUT."
            )


def _verify(archive: _Archive, expected: str, progress: Progress) -> None:
    """Compare the checksum of an archive with the expected one, unless this was done before."""
    if archive.record.md5 == expected:
        return
    md5 = hashlib.md5(usedforsecurity=False)
    archive.file.seek(0)
    for _ in progress(range(-(-archive.record.size // _CHUNK)), desc=f"checksum of {archive.split}", unit="MiB"):
        md5.update(archive.file.read(_CHUNK))
    if md5.hexdigest() != expected:
        raise UserError(
            f"{archive.path} has the MD5 checksum {md5.hexdigest()}, expected {expected}: download it again, or give "
            "--no-checksum if it was packed by someone else."
        )
    archive.record.md5 = expected
    archive.save_record()


def _unpack(archive: _Archive, progress: Progress) -> int:
    """Unpack the classes that are missing; returns their number."""
    missing = archive.missing()
    written: dict[str, int] = {}  # images of the classes that are not in their places
    try:
        for wnid in progress(missing, desc=f"unpacking {archive.split}", unit="class"):
            written[wnid] = _write_class(archive, wnid)
            size = sum(member.size for name in written for member in archive.classes[name])
            if size >= _SYNC_BYTES or wnid == missing[-1]:
                if hasattr(os, "sync"):  # which Windows has not
                    os.sync()
                for name in written:
                    (archive.unfinished / name).rename(archive.folder / name)
                archive.record.images |= written
                archive.save_record()
                written = {}
    except tarfile.TarError as e:
        raise UserError(f"{archive.path} changed while it was read ({e}); run the same again.") from e
    finally:
        shutil.rmtree(archive.unfinished, ignore_errors=True)  # the next run would, too, but its room is wanted now
    return len(missing)


def _write_class(archive: _Archive, wnid: str) -> int:
    """Write the images of a class where they are unfinished; returns their number."""
    tar, images = archive.images(wnid)
    folder = archive.unfinished / wnid
    folder.mkdir(parents=True)
    for image in images:
        source = tar.extractfile(image)
        assert source is not None  # as of a folder
        with source, open(folder / image.name, "xb") as target:
            shutil.copyfileobj(source, target)
    return len(images)


def _count(archive: _Archive, report: Report, progress: Progress) -> None:
    """Compare the number of files of each class folder with that of its archive."""
    split, images = archive.split, archive.record.images
    report.classes[split] = len(archive.classes)
    for wnid in progress(list(archive.classes), desc=f"counting {split}", unit="class"):
        if wnid not in images:
            images[wnid] = len(archive.images(wnid)[1])
        found = len(os.listdir(archive.folder / wnid))
        report.images[split] += found
        if found != images[wnid]:
            report.wrong.append(f"{archive.folder / wnid} holds {found:,} files, its archive {images[wnid]:,}")
    archive.save_record()


def _unusual(archive: _Archive, expected: Expected) -> Iterator[str]:
    """The numbers of an archive that are not the expected ones."""
    images, per_class = archive.record.images, Counter(expected.val_classes)
    wanted_images = expected.train_images if archive.split == "train" else len(expected.val_classes)
    for what, number, wanted in (
        ("classes", len(images), len(per_class)),
        ("images", sum(images.values()), wanted_images),
    ):
        if number != wanted:
            yield f"{archive.path} holds {number:,} {what}, expected {wanted:,}"
    if archive.split == "val":
        odd = [f"{wnid} ({number})" for wnid, number in images.items() if number != per_class[wnid]]
        if odd:
            names = ", ".join(odd[:5]) + ", ..." * (len(odd) > 5)
            yield f"{archive.path} holds another number of images than expected of {len(odd):,} classes: {names}"
