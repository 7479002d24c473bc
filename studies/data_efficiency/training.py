"""Training on images that are in memory, and one training of the study."""

import dataclasses
import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import ClassificationTask
from timm.utils import random_seed
from torch import nn
from torchvision.transforms.v2 import CenterCrop, Compose, PILToTensor, Resize

from studies.data_efficiency.models import BASELINE, COMMON, MODELS, PIXELS, SIZES, build, counts
from vip.data.augmentation import create_mixup
from vip.data.config import DatasetConfig
from vip.data.datasets import create_split
from vip.errors import UserError
from vip.reporting.progress import ProgressBar
from vip.training.config import TrainConfig
from vip.training.engine import TrainState, evaluate, train_one_epoch
from vip.training.factory import choose_attention, create_criterion, create_optimizer
from vip.training.runtime import Runtime, setup_precision

COMMON_RECIPE: dict[str, Any] = dict(
    opt="adamw",
    weight_decay=0.05,
    warmup_epochs=1,
    cooldown_epochs=0,
    sched_on_updates=True,
    smoothing=0.1,
    mixup=0.0,
    amp=True,
    amp_dtype="bfloat16",
)


@dataclass(frozen=True)
class Job:
    """One training."""

    model: str
    fraction: float
    seed: int

    @property
    def name(self) -> str:
        """Name of its files."""
        return f"{self.model}-{self.fraction:g}-{self.seed}".replace(" ", "_")


@functools.cache
def images_in_memory(data: str, split: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """A split as uint8 images `[N, 3, 32, 32]` and labels `[N]` on a device."""
    dataset: Any = create_split(DatasetConfig(data=data), split, is_training=False, max_bad_images=0)
    dataset.transform = Compose([Resize(PIXELS), CenterCrop(PIXELS), PILToTensor()])
    images, labels = zip(*(dataset[i] for i in range(len(dataset))), strict=True)
    if max(labels) >= COMMON["num_classes"]:
        raise UserError(f"{data} has {max(labels) + 1} classes, expected the {COMMON['num_classes']} of CIFAR-10.")
    return torch.stack(images).to(device), torch.tensor(labels, device=device)


def share(labels: torch.Tensor, fraction: float, seed: int) -> torch.Tensor:
    """Indices of a random share of each class; of one seed a smaller share is a part of a larger one."""
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label in labels.unique().tolist():
        indices = (labels.cpu() == label).nonzero()[:, 0]
        chosen.append(indices[torch.randperm(len(indices), generator=generator)[: round(fraction * len(indices))]])
    return torch.cat(chosen)


def normalize(images: torch.Tensor) -> torch.Tensor:
    """Images `[N, 3, H, W]` of bytes as the models see them."""
    mean, std = (
        torch.tensor(values, device=images.device)[:, None, None]
        for values in (IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD)
    )
    return (images.float() / 255 - mean) / std


class Batches:
    """An endless shuffled stream of flipped and shifted images, cut into passes of equal length.

    Args:
        images: Images `[N, 3, H, W]` of bytes.
        labels: Their classes `[N]`.
        batch_size: Images of a batch.
        length: Batches of a pass.
        seed: Seed of order and augmentation.
    """

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, batch_size: int, length: int, seed: int) -> None:
        self.images, self.labels, self.batch_size, self.length = images, labels, batch_size, length
        self.generator = torch.Generator().manual_seed(seed)
        self.order = torch.empty(0, dtype=torch.long)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for _ in range(self.length):
            while len(self.order) < self.batch_size:
                self.order = torch.cat([self.order, torch.randperm(len(self.images), generator=self.generator)])
            now, self.order = self.order.split([self.batch_size, len(self.order) - self.batch_size])
            now = now.to(self.images.device)
            yield normalize(self._augment(self.images[now])), self.labels[now]

    def _augment(self, images: torch.Tensor, margin: int = 4) -> torch.Tensor:
        """Flip half of the images, and shift each by up to `margin` pixels over zeros."""
        count, _, height, width = images.shape
        flip, top, left = (torch.randint(n, (count, 1), generator=self.generator) for n in (2, *2 * (2 * margin + 1,)))
        rows = top + torch.arange(height)
        columns = torch.where(flip == 1, torch.arange(width).flip(0), torch.arange(width)) + left
        rows, columns, which = (t.to(images.device) for t in (rows, columns, torch.arange(count)))
        padded = nn.functional.pad(images, (margin,) * 4).permute(0, 2, 3, 1)
        return padded[which[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def train(job: Job, data: str, size_name: str, runtime: Runtime) -> dict[str, Any]:
    """Train a model and test its last weights; returns its result and its curve."""
    size, start = SIZES[size_name], time.perf_counter()
    own = counts(job.model, size_name)
    # an ablation sees as many images as the whole model, to show what its parts give
    same_cost = counts(BASELINE, size_name).macs / own.macs if job.model in MODELS else 1.0
    length = max(1, round(size.images * same_cost / size.batch_size / size.points))
    images, labels = images_in_memory(data, "train", runtime.device)
    chosen = share(labels, job.fraction, job.seed).to(labels.device)
    batches = Batches(images[chosen], labels[chosen], size.batch_size, length, job.seed)

    random_seed(job.seed)
    config = TrainConfig(seed=job.seed, epochs=size.points, log_interval=length, **COMMON_RECIPE, **size.recipe)
    state = _create_state(build(job.model, size).to(runtime.device), config, runtime, length)
    curve = _train_and_test(state, config, runtime, batches, _tests(data, runtime.device))
    return {
        **dataclasses.asdict(job),
        "size": size_name,
        "params": own.params,
        "macs": own.macs,
        "training_images": len(chosen),
        "images_seen": curve[-1]["images"],
        "top1": curve[-1]["top1"],
        "count": len(images_in_memory(data, "val", runtime.device)[1]),
        "seconds": round(time.perf_counter() - start, 1),
        "curve": curve,
    }


def _create_state(model: nn.Module, config: TrainConfig, runtime: Runtime, updates_per_epoch: int) -> TrainState:
    choose_attention(model, config, runtime.device, training=True)
    optimizer = create_optimizer(config, model, config.batch_size)
    scheduler, _ = create_scheduler_v2(optimizer, **scheduler_kwargs(config), updates_per_epoch=updates_per_epoch)
    task = ClassificationTask(model, create_criterion(config), device=runtime.device, verbose=False)
    return TrainState(task, optimizer, scheduler, setup_precision(config, runtime.device))


def _tests(data: str, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    images, labels = images_in_memory(data, "val", device)
    return [(normalize(i), t) for i, t in zip(images.split(500), labels.split(500), strict=True)]


def _train_and_test(
    state: TrainState, config: TrainConfig, runtime: Runtime, batches: Batches, tests: list[Any]
) -> list[dict[str, float]]:
    mixup = create_mixup(config, 10, config.smoothing, collate=False)
    quiet = ProgressBar("", len(batches), len(batches), runtime.device, quiet=True)
    model: Any = state.task.get_eval_model()
    curve: list[dict[str, float]] = []
    for state.epoch in range(config.epochs):
        losses = train_one_epoch(state, batches, config, runtime, quiet, mixup)
        metrics = evaluate(model, tests, runtime, state.precision, quiet)
        seen = (state.epoch + 1) * len(batches) * batches.batch_size
        curve.append({"images": seen, "train_loss": losses["loss"], "loss": metrics.loss, "top1": metrics.top1})
    return curve
