"""Data sets: timm's readers, checked before training starts and forgiving of damaged images."""

import logging
import os
import pickle
import tarfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
from PIL import Image
from timm.data import create_dataset
from timm.data.dataset import ImageDataset
from torch.utils.data import Dataset, get_worker_info

from vip.data.config import DatasetConfig
from vip.data.images import UnreadableImage, decode_image
from vip.errors import UserError

_logger = logging.getLogger(__name__)

_OPEN_ERRORS = (
    AssertionError,
    ImportError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    tarfile.TarError,
)
_PLAIN_DATASETS = ("", "folder", "imagefolder", "image_folder", "tar", "imagetar")  # a folder or a tar file
_NAMED_DATASETS = ("torch", "hfds", "hfids", "tfds", "wds")
_DATASET_ALIASES = {"cifar10": "torch/cifar10", "cifar100": "torch/cifar100"}  # names in the published transfer script
_SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("val", "validation", "valid", "eval", "evaluation"),
}


_MOST_WORKERS = 1024  # of which the files being read are known


class ReadableImageDataset(ImageDataset):
    """timm's `ImageDataset` that survives unreadable images, names each once and stops at a limit.

    In training the next readable image takes the place of an unreadable one, so that batches stay whole; in
    evaluation it is left out (`None`, which `CollateReadable` drops), so that no image counts twice.

    Args:
        dataset: The data set whose reader, target transform and image mode are used.
        is_training: Replace unreadable images instead of leaving them out.
        max_bad_images: Distinct unreadable images from which on reading raises `UserError`.
        decode: Decodes an image file to a mode.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        is_training: bool,
        max_bad_images: int,
        decode: Callable[[IO[bytes], str], Any] = decode_image,
    ) -> None:
        super().__init__(
            None,
            reader=dataset.reader,
            load_bytes=dataset.load_bytes,
            input_img_mode=dataset.input_img_mode,
            target_transform=dataset.target_transform,
        )
        self.is_training = is_training
        self.max_bad_images, self.decode = max_bad_images, decode
        self.unreadable = torch.zeros(len(self), dtype=torch.bool).share_memory_()  # one table for all workers
        self.reading = torch.full((_MOST_WORKERS, 2), -1).share_memory_()  # process and image of each worker

    def _skip(self, index: int, reason: Exception) -> None:
        if self.unreadable[index]:
            return
        self.unreadable[index] = True
        count = int(self.unreadable.sum())
        if count > self.max_bad_images or count == len(self):
            raise UserError(
                f"{count} images cannot be read, the last one {self.filename(index)} ({reason}); repair or remove "
                f"them, or allow more with --max-bad-images (now {self.max_bad_images})."
            )
        _logger.warning(f"Skipping unreadable image {self.filename(index)}: {reason} ({count} so far)")

    def __getitem__(self, index: int) -> tuple[Any, Any] | None:
        worker = get_worker_info()
        note = self.reading.numpy()[worker.id % _MOST_WORKERS] if worker is not None else [0, 0]
        for i in range(len(self)):
            sample = (index + i) % len(self)
            note[:] = os.getpid(), sample
            try:
                file, target = self.reader[sample]
                with file:
                    image = file.read() if self.load_bytes else self.decode(file, self.input_img_mode)
            except (UnreadableImage, OSError) as e:
                self._skip(sample, e)
                if self.is_training:
                    continue
                note[:] = -1, -1
                return None
            if self.target_transform is not None:
                target = self.target_transform(target)
            made = self.make_sample(sample, image, target)
            note[:] = -1, -1
            return made
        raise AssertionError("unreachable: _skip raises when every image is unreadable")

    def files_being_read(self) -> dict[int, str]:
        """The file that each loader process is reading, by the number of the process."""
        return {pid: str(self.filename(index, absolute=True)) for pid, index in self.reading.tolist() if pid >= 0}

    def make_sample(self, index: int, image: Any, target: Any) -> tuple[Any, Any]:
        """Make the sample of a decoded image."""
        return image if self.transform is None else self.transform(image), target


def split_folder(root: str, split: str) -> str:
    """The folder of a split: `root/train`, `root/val`, or a name of one's own; `root` itself for an evaluation split.

    Raises:
        UserError: If there is no such folder; the message says which names were looked for.
    """
    if not os.path.exists(root):
        raise UserError(f"There is no data set at {root}: give a folder that holds train/ and val/.")
    names = next((names for names in _SPLIT_FOLDERS.values() if split in names), (split,))
    for name in (split, *names):
        if os.path.isdir(os.path.join(root, name)):
            return os.path.join(root, name)
        if os.path.isfile(os.path.join(root, f"{name}.tar")):
            return os.path.join(root, f"{name}.tar")
    if os.path.isfile(root):
        return root
    inside = sorted(e.name + "/" * e.is_dir() for e in os.scandir(root))
    other_split = any(f"{n}/" in inside for names in _SPLIT_FOLDERS.values() for n in names)
    if split not in _SPLIT_FOLDERS["validation"] or other_split or not any(n.endswith("/") for n in inside):
        found = f"it holds {', '.join(inside[:5])}{', ...' * (len(inside) > 5)}" if inside else "it is empty"
        raise UserError(f"{root} has no {' or '.join(f'{n}/' for n in dict.fromkeys((*names[:2], split)))}: {found}.")
    return root


def training_split(root: str | None) -> str:
    """The split of the training images: that of its name, unless the folder itself holds the class folders."""
    if not root or not os.path.isdir(root):
        return "train"
    try:
        split_folder(root, "train")
    except UserError:
        with suppress(UserError):
            if split_folder(root, "validation") == root:
                return "validation"
    return "train"


def create_split(
    config: DatasetConfig,
    split: str,
    is_training: bool,
    max_bad_images: int = 100,
    in_chans: int = 3,
    decode: Callable[[IO[bytes], str], Any] = decode_image,
    **kwargs: Any,
) -> Dataset:
    """Create the data set of one split through timm.

    Args:
        config: Where the data is and of what type.
        split: Name of the split.
        is_training: Whether the split is trained on.
        max_bad_images: Unreadable images to tolerate.
        in_chans: Image channels.
        decode: Decodes the files of a folder or tar file.
        **kwargs: Passed to `timm.data.create_dataset`.

    Raises:
        UserError: If the data is missing, has no classes, or an empty one.
    """
    name, plain = _dataset_name(config)
    root = config.data
    if plain:
        root = split_folder(str(root), split)
    try:
        dataset = create_dataset(
            "" if plain else name,
            root=root,
            split=split,
            search_split=not plain,
            class_map=config.class_map or None,  # type: ignore[arg-type]  # timm takes a file name, too
            is_training=is_training,
            download=config.dataset_download,
            input_key=config.input_key or None,
            target_key=config.target_key or None,
            input_img_mode=image_mode(config.input_img_mode, in_chans),
            **kwargs,
        )
    except _OPEN_ERRORS as e:
        reason = _reason(e, root, config.class_map)
        raise UserError(f"Cannot open split {split!r} of {config.dataset or root}: {reason}") from e
    if plain:
        _refuse_empty_classes(str(root), dataset, bool(config.class_map))
    if isinstance(dataset, ImageDataset) and plain:
        dataset = ReadableImageDataset(dataset, is_training, max_bad_images, decode)
    return dataset


def _dataset_name(config: DatasetConfig) -> tuple[str, bool]:
    """What timm calls the type of a data set, and whether that is a folder or tar file."""
    if not config.data and config.dataset.partition("/")[0].lower() not in ("hfds", "hfids", "wds"):
        raise UserError("No data set given: name the folder that holds train/ and val/, as DATA or with --data-dir.")
    name = _DATASET_ALIASES.get(config.dataset.lower(), config.dataset)
    kind = name.lower().partition("/")[0]
    plain = kind in _PLAIN_DATASETS
    if not plain and (kind not in _NAMED_DATASETS or "/" not in name):
        known = ", ".join(f"{name}/NAME" for name in _NAMED_DATASETS)
        raise UserError(f"--dataset {config.dataset} is none of {known}, or nothing for a folder or tar file.")
    if plain and (config.input_key or config.target_key):
        raise UserError("--input-key and --target-key name columns, and a folder or tar file has none: leave them out.")
    return name, plain


def _reason(error: Exception, root: str | None, class_map: str) -> str:
    """Why a data set cannot be opened, in words that name our options."""
    reason = str(error).strip().replace("download=True", "--dataset-download")
    if isinstance(error, ValueError) and str(root).endswith(".tar"):  # what timm makes of an empty list
        reason = "it holds no images, or none of the classes of the --class-map"
    if isinstance(error, ImportError) and error.name:
        reason += f"; pip install {error.name}"
    return reason + (f" (--class-map {class_map})" if class_map else "")


def image_mode(mode: str | None, channels: int) -> str:
    """The mode of images for a model of so many input channels: the one that is asked for, or RGB, or L for one.

    Raises:
        UserError: If it has another number of channels.
    """
    mode = mode or ("L" if channels == 1 else "RGB")
    if (found := Image.getmodebands(mode)) != channels:
        raise UserError(
            f"Images of mode {mode} have {found} channels and the model takes {channels}: give another "
            "--input-img-mode, --in-chans or --input-size."
        )
    return mode


def class_to_idx(dataset: Dataset) -> dict[str, int] | None:
    """Names and indices of the classes of a data set, None where it has no names."""
    source = getattr(dataset, "reader", dataset)
    return getattr(source, "class_to_idx", None) or getattr(source, "class_name_to_idx", None)  # timm's tar reader


def _refuse_empty_classes(root: str, dataset: Dataset, has_class_map: bool) -> None:
    if has_class_map or not os.path.isdir(root):
        return
    known = class_to_idx(dataset) or {}
    if "" in known and len(known) > 1:
        raise UserError(f"{root} holds images beside its class folders; move them into one, or remove them.")
    folders = [e for e in os.scandir(root) if e.is_dir() and not e.name.startswith(".")]
    empty = sorted(e.name for e in folders if e.name not in known and not any(p in known for p in os.listdir(e.path)))
    if empty:
        names = ", ".join(empty[:5]) + ", ..." * (len(empty) > 5)
        raise UserError(f"No images in {len(empty)} class folders of {root}: {names}; fill or remove them.")


def check_same_classes(train: Dataset, val: Dataset) -> None:
    """Refuse a validation split whose classes are not the training split's, which would shift its labels.

    Raises:
        UserError: With the names that differ.
    """
    classes, val_classes = class_to_idx(train), class_to_idx(val)
    if classes is None or val_classes is None or classes == val_classes:
        return
    only_train, only_val = sorted(classes.keys() - val_classes), sorted(val_classes.keys() - classes)
    parts = [
        f"{len(names)} only in {where} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})"
        for names, where in ((only_train, "train"), (only_val, "val"))
        if names
    ]
    raise UserError(
        f"The classes of train and val differ: {' and '.join(parts) or 'same names, other indices'}. Give both splits "
        "the same class folders, or a --class-map."
    )


def unreadable_files(dataset: Dataset) -> list[str]:
    """File names of the images that could not be read so far."""
    table = getattr(dataset, "unreadable", None)
    if table is None:
        return []
    return [str(Path(dataset.filename(i))) for i in table.nonzero().flatten().tolist()]  # type: ignore[attr-defined]
