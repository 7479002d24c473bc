"""Whether an image folder can be trained on: classes, counts, unreadable and suspicious files, duplicates."""

import os
import statistics
import tarfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
from timm.data import create_dataset, is_img_extension

from vip.data.config import DatasetConfig
from vip.data.datasets import check_same_classes, class_to_idx, create_split, split_folder
from vip.data.imagenet import ilsvrc2012
from vip.data.inspection import KINDS, Examined, examine
from vip.data.processes import Lost, map_in_processes
from vip.errors import UserError

Progress = Callable[..., Iterable[Any]]

_IMAGENET_CLASS_SIZES = {"train": range(732, 1301), "val": range(50, 51)}  # arXiv:1409.0575, table 2


@dataclass
class SplitReport:
    """What one split holds.

    Attributes:
        path: Its folder or tar file.
        images: Number of images, readable or not.
        bytes: Their size.
        classes: Images of each class, in the order of the class indices.
        only_here: Classes that the other split does not have.
        empty_classes: Class folders without an image.
        unbalanced: Classes with under a quarter or over four times as many images as the median class.
        left_out: Files that are not read, by their ending; those with a dot in front under 'hidden'.
    """

    path: str
    images: int
    bytes: int
    classes: dict[str, int]
    only_here: list[str]
    empty_classes: list[str]
    unbalanced: list[str]
    left_out: dict[str, list[str]]


@dataclass
class ImageNetReport:
    """How a data set compares with ImageNet-1k, of which most of its class names are.

    Attributes:
        missing_classes: Classes of ImageNet that are in neither split.
        other_classes: Classes that ImageNet does not have.
        images: Images of ImageNet's classes in each split.
        expected: Images that each split of ImageNet has.
        drawn: Splits with fewer images in every class than ImageNet's smallest has: drawn from it, and not damaged.
        unusual: Classes of other splits with numbers of images that no class of ImageNet has.
    """

    missing_classes: list[str]
    other_classes: list[str]
    images: dict[str, int]
    expected: dict[str, int]
    drawn: list[str]
    unusual: dict[str, dict[str, int]]


@dataclass
class DataReport:
    """What `check` found. Files are named relative to the data, every list of them is sorted.

    Attributes:
        splits: What is in 'train' and 'val'.
        unreadable: Files that cannot be read, with the reasons.
        suspicious: Files of each of the `KINDS`.
        duplicates: Groups of files that decode to the same pixels: 'across_splits', 'within_train', 'within_val', and,
            whatever the splits, 'across_classes'.
        imagenet: The comparison with ImageNet-1k, None for other data.
        problems: What would spoil or stop a training.
        seconds: Time that reading took.
    """

    splits: dict[str, SplitReport]
    unreadable: dict[str, str]
    suspicious: dict[str, list[str]]
    duplicates: dict[str, list[list[str]]]
    imagenet: ImageNetReport | None
    problems: list[str]
    seconds: float


def check(
    data: str, processes: int, progress: Progress = lambda items, total: items, seconds: float = 60.0
) -> DataReport:
    """Read every image of a data set, and compare what is there with what training needs.

    Args:
        data: What `vip train` takes: a folder that holds train/ and val/, or tar files of these names.
        processes: Number of processes that read.
        progress: Wraps an iterable of `total` items, to show how far it is.
        seconds: Time for an image; one that takes longer counts as unreadable.

    Raises:
        UserError: If a split is missing or holds no images.
    """
    splits = _Splits(data)
    reports = {split.name: split.report() for split in splits}
    for name, other in (("train", "val"), ("val", "train")):
        reports[name].only_here = sorted(reports[name].classes.keys() - reports[other].classes)
    report = DataReport(reports, {}, {kind: [] for kind in KINDS}, {}, _compare_with_imagenet(reports), [], 0)
    digests = np.zeros(len(splits), "S16")
    start = time.perf_counter()
    with closing(map_in_processes(splits.examine, len(splits), processes, seconds)) as results:
        for index, found in progress(results, total=len(splits)):
            if isinstance(found, Lost):
                found = Examined(0, found.reason)
            reports[splits.locate(index)[0].name].bytes += found.size
            digests[index] = found.digest
            if found.reason:
                report.unreadable[splits.path(index)] = found.reason
            for kind in found.kinds:
                report.suspicious[kind].append(splits.path(index))
    report.seconds = time.perf_counter() - start
    report.unreadable = dict(sorted(report.unreadable.items()))
    report.suspicious = {kind: sorted(names) for kind, names in report.suspicious.items() if names}
    report.duplicates = _duplicates(splits, digests)
    report.problems = [*splits.problems(), *_problems(report)]
    return report


class _Split:
    """One split as training opens it."""

    def __init__(self, data: str, name: str) -> None:
        self.data, self.name = data, name
        split = {"val": "validation"}.get(name, name)
        self.root = split_folder(data, split)
        if os.path.isdir(self.root):
            refuse_loops(self.root)
        self.problems: list[str] = []
        try:
            self.images: Any = create_split(DatasetConfig(data=data), split, is_training=False)
        except UserError as e:
            if not os.path.isdir(self.root) or not any(_is_image(file) for file in _files(self.root)):
                raise
            self.images = create_dataset("", self.root, search_split=False)  # to see what else is wrong
            self.problems.append(str(e))
        reader = self.images.reader
        self.targets = np.array(reader.targets if hasattr(reader, "targets") else [i for _, i in reader.samples])
        self.classes = list(class_to_idx(self.images) or {})
        if self.classes == [""]:
            self.problems.append(f"{self.root} holds images and no class folders; make a folder for each class.")

    def path(self, name: str) -> str:
        """Name of a file of this split, relative to the data."""
        return os.path.normpath(os.path.join(os.path.relpath(self.root, self.data), name))

    def report(self) -> SplitReport:
        counts = np.bincount(self.targets, minlength=len(self.classes)).tolist()
        classes = dict(zip(self.classes, counts, strict=True))
        median = statistics.median(counts)
        unbalanced = sorted(name for name, count in classes.items() if not median / 4 <= count <= median * 4)
        left_out = defaultdict(list)
        filled = set()
        for name in _files(self.root):
            base = os.path.basename(name)
            if _is_image(name):
                filled.add(name.split(os.sep)[0])
            else:
                ending = os.path.splitext(base)[1].lower() or "no ending"
                left_out["hidden" if base.startswith(".") else ending].append(self.path(name))
        folders = os.scandir(self.root) if os.path.isdir(self.root) else ()
        empty = sorted(e.name for e in folders if e.is_dir() and not e.name.startswith(".") and e.name not in filled)
        sorted_left_out = {ending: sorted(names) for ending, names in sorted(left_out.items())}
        return SplitReport(self.root, len(self.images), 0, classes, [], empty, unbalanced, sorted_left_out)


class _Splits:
    """Both splits, their images numbered through."""

    def __init__(self, data: str) -> None:
        self.train, self.val = _Split(data, "train"), _Split(data, "val")
        if self.train.root == self.val.root:
            raise UserError(f"{data} would be both train and val; give a folder that holds train/ and val/.")

    def __iter__(self) -> Iterator[_Split]:
        return iter((self.train, self.val))

    def __len__(self) -> int:
        return len(self.train.images) + len(self.val.images)

    def locate(self, index: int) -> tuple[_Split, int]:
        split = self.train if index < len(self.train.images) else self.val
        return split, index - (split is self.val) * len(self.train.images)

    def path(self, index: int) -> str:
        split, i = self.locate(index)
        return split.path(split.images.filename(i))

    def class_name(self, index: int) -> str:
        split, i = self.locate(index)
        return split.classes[split.targets[i]]

    def examine(self, index: int) -> Examined:
        split, i = self.locate(index)
        path = split.images.filename(i, absolute=True)
        if os.path.exists(path) and not os.path.isfile(path):  # reading a pipe would wait for ever
            return Examined(0, "no regular file")
        return examine(split.images, i)

    def problems(self) -> Iterator[str]:
        yield from (*self.train.problems, *self.val.problems)
        try:
            check_same_classes(self.train.images, self.val.images)
        except UserError as e:
            yield str(e)


def _files(root: str) -> Iterator[str]:
    """Names of all files of a folder or tar file, relative to it."""
    if os.path.isfile(root):
        with tarfile.open(root) as tar:
            yield from (member.name for member in tar if member.isfile())
        return
    for folder, _, names in os.walk(root, followlinks=True):  # follows links as timm's reader does
        below = os.path.relpath(folder, root) if folder != root else ""
        yield from (os.path.join(below, name) for name in names)


def refuse_loops(folder: str, above: frozenset[str] = frozenset()) -> None:
    """Refuse a folder that links to one above it: timm's reader would follow it for ever.

    Raises:
        UserError: With the link.
    """
    real = os.path.realpath(folder)
    if real in above:
        raise UserError(f"{folder} links to a folder that it is in: remove the link.")
    with os.scandir(folder) as entries:
        below = [entry.path for entry in entries if entry.is_dir()]
    for path in below:
        refuse_loops(path, above | {real})


def _is_image(name: str) -> bool:
    """Whether timm's readers take a file of this name."""
    return is_img_extension(os.path.splitext(name)[1].lower())


def _duplicates(splits: _Splits, digests: np.ndarray) -> dict[str, list[list[str]]]:
    _, groups, sizes = np.unique(digests, return_inverse=True, return_counts=True)
    same = defaultdict(list)
    for index in np.flatnonzero((sizes[groups] > 1) & (digests != b"")).tolist():
        same[groups[index]].append(index)
    found: dict[str, list[list[str]]] = {
        "across_splits": [],
        "within_train": [],
        "within_val": [],
        "across_classes": [],
    }
    for indices in same.values():
        files = {split.name: [splits.path(i) for i in indices if splits.locate(i)[0] is split] for split in splits}
        together = [*files["train"], *files["val"]]
        if files["train"] and files["val"]:
            found["across_splits"].append(together)
        for name in files:
            if len(files[name]) > 1:
                found[f"within_{name}"].append(files[name])
        if len({splits.class_name(i) for i in indices}) > 1:
            found["across_classes"].append(together)
    return {kind: sorted(map(sorted, groups)) for kind, groups in found.items()}


def _compare_with_imagenet(splits: dict[str, SplitReport]) -> ImageNetReport | None:
    expected = ilsvrc2012()
    synsets = set(expected.val_classes)
    names = {name for split in splits.values() for name in split.classes}
    if len(names & synsets) <= len(names) / 2:
        return None
    counts = {
        name: {synset: split.classes.get(synset, 0) for synset in sorted(names & synsets)}
        for name, split in splits.items()
    }
    drawn = [name for name in counts if max(counts[name].values()) < min(_IMAGENET_CLASS_SIZES[name])]
    return ImageNetReport(
        missing_classes=sorted(synsets - names),
        other_classes=sorted(names - synsets),
        images={name: sum(counts[name].values()) for name in counts},
        expected={"train": expected.train_images, "val": len(expected.val_classes)},
        drawn=drawn,
        unusual={
            name: {synset: n for synset, n in counts[name].items() if n not in _IMAGENET_CLASS_SIZES[name]}
            for name in counts
            if name not in drawn
        },
    )


def _problems(report: DataReport) -> Iterator[str]:
    """What would spoil a training, though it would not stop it."""
    if report.unreadable:
        yield f"{len(report.unreadable):,} files cannot be read; repair or remove them."
    if groups := report.duplicates["across_splits"]:
        yield f"{len(groups):,} images are in train and in val; remove them from train."
    imagenet = report.imagenet
    if imagenet is None or imagenet.missing_classes:
        return  # other data, or some of the classes
    for name, unusual in imagenet.unusual.items():
        images, expected = imagenet.images[name], imagenet.expected[name]
        if images != expected or unusual:
            sizes = f", and {len(unusual):,} classes of sizes that it does not have" if unusual else ""
            yield (
                f"{report.splits[name].path} holds {images:,} images where ImageNet has {expected:,}{sizes}; see vip "
                "prepare-imagenet."
            )
