"""Loaders: timm's transforms, collation, mixup and prefetcher around samplers of our own choosing.

timm's `create_loader` picks the sampler itself; here the order of training images is the same for any number of
processes (so two processes at batch 16 see what one sees at 32), and evaluation visits every image exactly once.
"""

import atexit
import logging
import multiprocessing.util
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from types import FrameType
from typing import Any

import torch
from timm.data import AugMixDataset, Mixup, create_transform
from timm.data.loader import PrefetchLoader, fast_collate
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate
from torchvision import transforms
from torchvision.datasets import VisionDataset

from vip.data.augmentation import check_cutmix, create_train_transform, erasing_splits
from vip.data.config import LoaderConfig
from vip.data.order import EpochOrder, SeededDataset, SeededLoader
from vip.errors import UserError

_logger = logging.getLogger(__name__)

Collate = Callable[[list[Any]], Any]


class CollateReadable:
    """Collate what could be read of a batch: `ReadableImageDataset` gives `None` for what could not."""

    def __init__(self, collate: Any, input_size: tuple[int, ...]) -> None:
        self.collate = collate
        self.input_size = input_size

    def __call__(self, batch: list[Any]) -> Any:
        """Collate a list of samples; a batch without a readable image has zero rows."""
        batch = [sample for sample in batch if sample is not None]
        if not batch:
            return torch.empty((0, *self.input_size), dtype=torch.uint8), torch.empty(0, dtype=torch.long)
        return self.collate(batch)


def _set_transform(dataset: Any, transform: Any, channels: int) -> None:
    if isinstance(getattr(dataset, "dataset", dataset), VisionDataset):  # torchvision gives images of any mode
        to_mode = transforms.Grayscale(channels) if channels == 1 else transforms.Lambda(_to_rgb)
        first, *splits = transform if isinstance(transform, tuple) else (transform,)
        first = transforms.Compose([to_mode, first])
        transform = (first, *splits) if splits else first
    dataset.transform = transform


def _to_rgb(image: Any) -> Any:
    return image.convert("RGB")


def _prefetch(loader: DataLoader, device: torch.device, data_config: dict[str, Any], **erasing: Any) -> PrefetchLoader:
    return PrefetchLoader(
        loader,
        mean=data_config["mean"],
        std=data_config["std"],
        channels=data_config["input_size"][0],
        device=device,
        **erasing,
    )


def create_train_loader(
    dataset: Dataset,
    config: Any,
    data_config: dict[str, Any],
    batch_size: int,
    mixup: Mixup | None,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 42,
    collate_samples: Callable[[Collate, list[Any]], Any] | None = None,
) -> DataLoader | PrefetchLoader:
    """Create the loader of training batches.

    Args:
        dataset: Training data set.
        config: An `AugmentationConfig` that is also a `LoaderConfig`.
        data_config: What timm resolved for the model: `input_size`, `mean`, `std`, `interpolation`.
        batch_size: Images of a batch of one process.
        mixup: What `create_mixup` gave for collation; used with the prefetcher only.
        device: Device the prefetcher moves batches to.
        rank: Index of this process.
        world_size: Number of processes.
        seed: Seed of the order and the augmentation.
        collate_samples: Collates samples that are more than an image and its class, with the help of a function that
            collates such pairs.

    Raises:
        UserError: If a process gets neither a whole batch nor a pair of images.
    """
    if config.aug_splits > 1:
        if config.no_prefetcher or config.no_aug:
            raise UserError(
                "--aug-splits needs augmentation and the prefetcher: leave out --no-aug and --no-prefetcher."
            )
        dataset = AugMixDataset(dataset, num_splits=config.aug_splits)
    check_cutmix(config, data_config["input_size"])
    _set_transform(dataset, create_train_transform(config, data_config), data_config["input_size"][0])
    collate: Any = default_collate if config.no_prefetcher else mixup or fast_collate
    options: dict[str, Any] = dict(
        drop_last=True,
        collate_fn=partial(collate_samples, collate) if collate_samples else collate,
        **_worker_options(config),
    )
    loader: DataLoader
    if isinstance(dataset, IterableDataset):
        generator = torch.Generator().manual_seed(seed + rank)  # seeds the augmentation in the workers
        loader = DataLoader(dataset, batch_size, generator=generator, **options)
    else:
        order = EpochOrder(dataset, seed, rank, world_size, config.aug_repeats)
        filled = _filled_batch_size(batch_size, len(order), quiet=rank > 0)
        loader = SeededLoader(SeededDataset(dataset), filled, sampler=order, **options)
    if config.no_prefetcher:
        return loader
    return _prefetch(
        loader,
        device,
        data_config,
        re_prob=0.0 if config.no_aug else config.reprob,
        re_mode=config.remode,
        re_count=config.recount,
        re_num_splits=erasing_splits(config),
    )


def _filled_batch_size(batch_size: int, images: int, quiet: bool) -> int:
    """The batch size, or what a data set smaller than one batch can fill: an even number, as mixup pairs images."""
    if images >= batch_size:
        return batch_size
    if images < 2:
        raise UserError(
            f"The training set has {images} image(s) for each process, expected at least 2: add images, or use fewer "
            "processes."
        )
    filled = images - images % 2
    _logger.log(
        logging.DEBUG if quiet else logging.WARNING,
        f"The training set has {images} images for each process, less than --batch-size {batch_size}: an epoch is one "
        f"batch of {filled}.",
    )
    return filled


def _worker_options(config: LoaderConfig) -> dict[str, Any]:
    return dict(
        num_workers=config.workers,
        pin_memory=config.pin_mem,
        persistent_workers=config.workers > 0,
        worker_init_fn=_outlive_the_first_signal,
        timeout=config.loader_timeout if config.workers else 0,
    )


def _outlive_the_first_signal(worker: int) -> None:
    """Let a loader process go on when its whole group is told to leave, as by Slurm.

    The training process then saves and ends it, by a second SIGTERM if need be.
    """
    told = 0

    def on_sigterm(number: int, frame: FrameType | None) -> None:
        nonlocal told
        told += 1
        if told > 1:
            os._exit(0)

    signal.signal(signal.SIGTERM, on_sigterm)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


@contextmanager
def naming_lost_workers(rank: int, *datasets: Any) -> Iterator[None]:
    """Say which file was being read when a loader process died, or none gave a batch in time.

    Args:
        rank: Index of this process.
        *datasets: The data sets that are read.

    Raises:
        UserError: If that happened.
    """
    try:
        yield
    except RuntimeError as e:
        if not re.match(r"DataLoader (worker \(pid|timed out)", str(e)):  # an error in a worker has other words before
            raise
        files = {pid: file for data in datasets for pid, file in getattr(data, "files_being_read", dict)().items()}
        if "timed out" in str(e):
            _kill(files)
            what = f"Process {rank} had no batch for --loader-timeout seconds"
            advice = "Look at the disk and these files, or allow more."
        else:
            told = re.search(r"pid(?:\(s\))? ([\d, ]+)\) ([^.\n]*)", str(e))
            died = told[1].split(", ") if told else []
            files = {pid: file for pid, file in files.items() if str(pid) in died}
            what = f"Process {rank} lost a loader process, which {told[2] if told else 'ended'}"
            advice = "If it ran out of memory, use fewer --workers."
        read = "; ".join(f"loader process {pid} was reading {file}" for pid, file in list(files.items())[:5])
        raise UserError(f"{what}: {read or 'no file was being read'}. {advice}") from e


def _kill(workers: Iterable[int]) -> None:
    """End loader processes that may hang in a system call, and would hang the end of this process."""
    if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would raise another error for each
    for pid in workers:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM if sys.platform == "win32" else signal.SIGKILL)


def _end_loader_processes() -> None:
    """End what still lives when this process ends with an error.

    multiprocessing sends one SIGTERM, which they outlive, and would wait for them for ever.
    """
    _kill([child.pid for child in multiprocessing.active_children() if child.daemon and child.pid])


atexit.register(_end_loader_processes)  # after multiprocessing's own, and so called before it


def create_eval_loader(
    dataset: Dataset,
    config: LoaderConfig,
    data_config: dict[str, Any],
    batch_size: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    tf_preprocessing: bool = False,
    indices: Sequence[int] | None = None,
) -> DataLoader | PrefetchLoader:
    """Create the loader of evaluation batches; together the processes visit every image exactly once, in order.

    Args:
        dataset: Evaluation data set.
        config: Workers and prefetcher.
        data_config: What timm resolved for the model, with `crop_pct` and `crop_mode`.
        batch_size: Images of a batch of one process.
        device: Device the prefetcher moves batches to.
        rank: Index of this process.
        world_size: Number of processes.
        tf_preprocessing: Resize and crop as TensorFlow's published models do.
        indices: The images to visit, all if None.

    Raises:
        UserError: If the batch size is no size, or TensorFlow is asked for and not there.
    """
    if batch_size < 1:
        raise UserError(f"The validation batch size is {batch_size}, expected at least 1.")
    try:
        transform = create_transform(
            data_config["input_size"],
            is_training=False,
            interpolation=data_config["interpolation"],
            mean=data_config["mean"],
            std=data_config["std"],
            crop_pct=data_config["crop_pct"],
            crop_mode=data_config["crop_mode"],
            use_prefetcher=not config.no_prefetcher,
            tf_preprocessing=tf_preprocessing,
        )
    except ImportError as e:
        raise UserError(f"--tf-preprocessing: {e}; pip install tensorflow.") from e
    _set_transform(dataset, transform, data_config["input_size"][0])
    sampler: Iterable | None = None
    if not isinstance(dataset, IterableDataset):
        visited = range(len(dataset)) if indices is None else indices  # type: ignore[arg-type]  # of map-style data sets
        sampler = visited[rank::world_size]
    loader = DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        collate_fn=CollateReadable(
            default_collate if config.no_prefetcher else fast_collate, tuple(data_config["input_size"])
        ),
        **_worker_options(config),
    )
    return loader if config.no_prefetcher else _prefetch(loader, device, data_config)
