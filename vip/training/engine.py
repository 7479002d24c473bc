"""The loops: one step, one epoch, one evaluation. Nothing in a training step waits for the device."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from timm.task import ClassificationEvaluator, TrainingTask
from timm.utils import dispatch_clip_grad, distribute_bn
from torch import nn

from vip.data.order import STEP, derive_seed, seed_generators
from vip.errors import UserError
from vip.reporting.results import Metrics
from vip.training.config import TrainConfig
from vip.training.freezing import hold_frozen
from vip.training.recovery import RecoveryPoints
from vip.training.runtime import Precision, Runtime, all_reduce_sum


class Progress(Protocol):
    """Receives what a loop has to tell."""

    def update(self, images: int, **values: float) -> None:
        """Report a batch, with values where there are new ones."""

    def wants_values(self, batch: int) -> bool:
        """Whether values of this batch would be shown; computing them makes the device wait."""


@dataclass
class TrainState:
    """What training changes: weights and their average in the task, optimizer, schedule, loss scale, and counters."""

    task: TrainingTask
    optimizer: torch.optim.Optimizer
    scheduler: Any
    precision: Precision
    epoch: int = 0
    updates: int = 0
    batch: int = 0  # batches of the epoch that are done, and the sum of their losses
    loss_sum: float = 0.0
    samples_before: int = 0  # of the epoch, in batches of another size, before those

    def begin_epoch(self) -> None:
        """Count batches and their losses anew."""
        self.batch, self.loss_sum, self.samples_before = 0, 0.0, 0

    @property
    def lr(self) -> float:
        """Learning rate, averaged over the parameter groups as timm's logs have it."""
        return sum(group["lr"] for group in self.optimizer.param_groups) / len(self.optimizer.param_groups)


class LossLog:
    """Collects losses on the device, to be read once in a while instead of at every step."""

    def __init__(self, runtime: Runtime, epoch: int, total: float = 0.0, batches: int = 0) -> None:
        self.runtime, self.epoch = runtime, epoch
        self.pending: list[tuple[torch.Tensor, float]] = []
        self.total, self.batches = total, batches

    def add(self, loss: torch.Tensor, lr: float) -> None:
        """Remember the loss of a batch and the learning rate it was computed at."""
        self.pending.append((loss.detach().float(), lr))

    def read(self, loss_scale: float | None = None) -> float:
        """Read what was added since the last call; returns the newest loss, averaged over all processes.

        Raises:
            UserError: If a loss was not finite.
        """
        losses = all_reduce_sum(torch.stack([loss for loss, _ in self.pending]), self.runtime)
        values = [value / self.runtime.world_size for value in losses.tolist()]
        for i, (value, (_, lr)) in enumerate(zip(values, self.pending, strict=True)):
            if not math.isfinite(value):
                scale = "" if loss_scale is None else f", loss scale {loss_scale:g}"
                raise UserError(
                    f"The loss became {value} in epoch {self.epoch} at batch {self.batches + i + 1} (learning rate "
                    f"{lr:.3g}{scale}). Nothing was saved since; earlier checkpoints are intact. Start again, or "
                    "--resume the last of them, with a lower --lr, with --clip-grad 1, or with --amp-dtype bfloat16."
                )
        for value in values:  # one by one: the sum must not depend on when it was read
            self.total += value
        self.batches += len(values)
        self.pending.clear()
        return values[-1]

    @property
    def average(self) -> float:
        """Average of all losses read."""
        return self.total / max(self.batches, 1)


def train_step(state: TrainState, config: TrainConfig, images: Any, target: Any, share: float, update: bool) -> Any:
    """Forward and backward pass of a batch and, if `update`, the optimizer step.

    Args:
        state: What training changes.
        config: Clipping.
        images: Batch on the device.
        target: Its targets.
        share: Weight of this batch in its update.
        update: Whether the batch completes an update; otherwise gradients add up without an all-reduce.

    Returns:
        The loss, on the device.
    """
    task, optimizer, scaler = state.task, state.optimizer, state.precision.scaler
    second_order = getattr(optimizer, "is_second_order", False)
    parameters = task.get_clip_parameters(exclude_head=config.clip_mode == "agc")
    clip = dict(clip_grad=config.clip_grad, clip_mode=config.clip_mode, parameters=parameters)
    with nullcontext() if update else task.no_sync():
        with state.precision.autocast():
            loss = task(images, target)["loss"]
        if scaler is not None:
            scaler(loss * share, optimizer, create_graph=second_order, need_update=update, **clip)
        else:
            (loss * share).backward(create_graph=second_order)
    if update:
        if scaler is None:
            if config.clip_grad is not None:
                dispatch_clip_grad(parameters, config.clip_grad, mode=config.clip_mode)
            optimizer.step()
        optimizer.zero_grad()
        state.updates += 1
        task.update_ema(step=state.updates)
        if state.scheduler is not None:
            state.scheduler.step_update(num_updates=state.updates)
    return loss


def train_one_epoch(
    state: TrainState,
    loader: Any,
    config: TrainConfig,
    runtime: Runtime,
    progress: Progress,
    mixup: Callable | None = None,
    on_batch: Callable[[int, torch.Tensor], None] | None = None,
    recovery: RecoveryPoints | None = None,
    save: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Train for one pass over the loader, which begins with the batch that `state` has reached.

    Args:
        state: What training changes.
        loader: Batches of images and targets.
        config: Gradient accumulation, clipping, memory layout, log interval.
        runtime: Device and processes.
        progress: Receives loss and learning rate every `log_interval` batches.
        mixup: Mixes a batch on the device, where the loader does not mix itself.
        on_batch: Called with each batch's number and images.
        recovery: Says after which updates to save.
        save: Saves the state, which all processes call, if all losses were finite.

    Returns:
        `loss`, the average over the epoch and all processes; `state` is at the end of the epoch.

    Raises:
        UserError: If the loss is not finite.
        Preempted: If a process was told to leave; the state is saved.
    """
    state.task.train()
    if config.freeze:
        hold_frozen(state.task)
    losses = LossLog(runtime, state.epoch, state.loss_sum, state.batch)
    batches, accum = state.batch + len(loader), config.grad_accum_steps
    for i, (images, target) in enumerate(loader, state.batch):
        state.batch = i
        # what a step draws is a function of its place, so that no generator has a state to keep
        seed_generators(derive_seed(config.seed, state.epoch, STEP, i, runtime.rank))
        images, target = images.to(runtime.device, non_blocking=True), target.to(runtime.device, non_blocking=True)
        if mixup is not None:
            images, target = mixup(images, target)
        if config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        if on_batch is not None:
            on_batch(i, images)
        last_of_update = min(i - i % accum + accum, batches) - 1  # the last update of an epoch may have fewer batches
        share = 1 / (last_of_update - (i - i % accum) + 1)
        lr = state.lr
        loss = train_step(state, config, images, target, share, update=i == last_of_update)
        losses.add(loss, lr)
        if i + 1 == batches and runtime.distributed:  # before the state is saved; only that of the first process is
            distribute_bn(state.task.get_trainable_module(), runtime.world_size, config.dist_bn == "reduce")
        recover = recovery is not None and i == last_of_update and recovery.due(i + 1)
        values = {"lr": lr}
        if recover or (i + 1) % config.log_interval == 0 or i + 1 == batches:
            values.update(loss=losses.read(state.precision.loss_scale), average=losses.average)
        elif progress.wants_values(i):
            values["loss"] = loss.item()  # of this process alone: the others do not look at a terminal
        progress.update(len(images) * runtime.world_size, **values)
        if recover and recovery is not None and save is not None:
            state.batch, state.loss_sum = i + 1, losses.total
            save()
            recovery.leave_if_told()
    state.batch, state.loss_sum = batches, losses.total
    return {"loss": losses.average}


def infer(model: Callable[[torch.Tensor], Any], images: torch.Tensor, channels_last: bool, tta: int) -> Any:
    """What a model gives for images; if `tta` is 2, the average of its logits for them and for their mirror images."""
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    output = model(images)
    if tta == 2:
        output = (output.clone() + model(images.flip(-1))) / 2  # CUDA graphs write over what they gave
    return output


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Any,
    runtime: Runtime,
    precision: Precision,
    progress: Progress,
    *,
    channels_last: bool = False,
    tta: int = 0,
    label_subset: torch.Tensor | None = None,
    on_output: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Metrics:
    """Evaluate a classifier; every image of the loaders of all processes counts once.

    Args:
        model: Images to logits; without DDP around it, as processes may have different numbers of batches.
        loader: Batches of images and class indices.
        runtime: Device and processes.
        precision: Autocast.
        progress: Receives running accuracies.
        channels_last: Memory layout of the images.
        tta: 2 averages the logits of an image and of its mirror image.
        label_subset: Indices of the only logits to keep.
        on_output: Called with the logits and the classes of each batch.
        stop: Asked before each batch whether to leave out the rest.
    """
    model.eval()
    evaluator = ClassificationEvaluator(runtime.device)
    for i, (images, target) in enumerate(loader):
        if stop is not None and stop():
            break
        if not len(images):
            continue
        images, target = images.to(runtime.device, non_blocking=True), target.to(runtime.device, non_blocking=True)
        with precision.autocast():
            output = infer(model, images, channels_last, tta)
        if isinstance(output, tuple | list):
            output = output[0]
        if label_subset is not None:
            output = output[:, label_subset]
        if on_output is not None:
            on_output(output, target)
        evaluator.update(output, target)
        progress.update(len(images), **(evaluator.summary() if progress.wants_values(i) else {}))
    return gather_metrics(evaluator, runtime)


def gather_metrics(evaluator: ClassificationEvaluator, runtime: Runtime) -> Metrics:
    """The result of the evaluators of all processes."""
    all_reduce_sum(evaluator.loss_sum, runtime)
    count, correct1, correct5 = (int(n) for n in all_reduce_sum(evaluator.counts, runtime).tolist())
    return Metrics(**evaluator.summary(), count=count, correct1=correct1, correct5=correct5)
