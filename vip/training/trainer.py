"""A training run from configuration to checkpoints."""

import dataclasses
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler_factory import scheduler_kwargs
from timm.task import ClassificationTask, FeatureDistillationTask, TrainingTask
from timm.utils import distribute_bn, random_seed
from torch import nn
from torch.utils.data import Dataset
from torchvision.utils import save_image

from vip.data.augmentation import create_mixup, import_fast_images
from vip.data.datasets import check_same_classes, class_to_idx, create_split, unreadable_files
from vip.data.images import decode_image
from vip.data.loaders import create_eval_loader, create_train_loader, naming_lost_workers
from vip.data.order import EpochOrder
from vip.errors import SaveError, UserError
from vip.files import replacing
from vip.reporting.logs import log_to_file, setup_logging
from vip.reporting.progress import ProgressBar, memory_gb
from vip.reporting.results import Metrics
from vip.reporting.summary import Summary
from vip.token_labels.dataset import TokenLabelDataset, collate_token_labels, open_token_labels
from vip.token_labels.dense import DenseClassifier
from vip.token_labels.mixing import DenseMixup
from vip.training.config import DistillationConfig, TrainConfig
from vip.training.distillation import create_distillation, create_teacher
from vip.training.engine import TrainState, evaluate, train_one_epoch
from vip.training.factory import (
    check_compile_backend,
    choose_attention,
    compile_task,
    create_criterion,
    create_optimizer,
    create_training_model,
    resolve_data_config,
)
from vip.training.freezing import freeze
from vip.training.recovery import REQUEUE, Preempted, RecoveryPoints, leaving_at_once
from vip.training.resume import agree_on_state, batches_of, identity, resume
from vip.training.runtime import (
    Runtime,
    leave_together,
    naming_lost_processes,
    setup_precision,
    setup_runtime,
    sparing_shared_pages,
)
from vip.training.saver import (
    RunSaver,
    checkpoint_bytes,
    open_folder,
    refuse_existing_run,
    run_folder,
    save_errors,
)
from vip.training.task import TokenLabelTask
from vip.training.weights import find_checkpoint, load_finetune, load_weights, read_checkpoint, state_dict_of

_logger = logging.getLogger(__name__)


def train(config: TrainConfig) -> None:
    """Run a training, or only the validation that `--eval-checkpoint` asks for.

    Raises:
        UserError: For anything the user can mend.
    """
    runtime = setup_runtime(config.device, config.dist_backend, config.workers, config.dist_timeout)
    setup_logging(runtime.is_primary)
    try:
        with leaving_at_once():  # until training catches the signals
            _run(config, runtime)
    except Preempted as e:
        if runtime.is_primary:
            _logger.warning(str(e))
        leave_together(runtime)
        sys.exit(REQUEUE)
    except torch.OutOfMemoryError as e:
        raise UserError(
            f"The device is out of memory at --batch-size {config.batch_size}: use a smaller one (with "
            f"--grad-accum-steps for the same update), --amp, or --grad-checkpointing. {str(e).splitlines()[0]}"
        ) from e
    leave_together(runtime)


def _run(config: TrainConfig, runtime: Runtime) -> None:
    with naming_lost_processes(runtime, lambda: "the set-up"):
        trainer = Trainer(config, runtime)
    workers = naming_lost_workers(runtime.rank, trainer.train_data, trainer.val_data)
    with naming_lost_processes(runtime, trainer.place), workers:
        if config.eval_checkpoint:
            trainer.validate_checkpoint(config.eval_checkpoint)
        else:
            trainer.fit()


class Trainer:
    """Everything a run consists of.

    Attributes:
        state: What training changes: task, optimizer, schedule, counters.
        train_loader: Training batches.
        eval_loader: Validation batches.
        eval_model: The model as validation calls it, without DDP around it.
    """

    def __init__(self, config: TrainConfig, runtime: Runtime) -> None:
        self.config, self.runtime = config, runtime
        _check(config)
        random_seed(config.seed, runtime.rank)

        train_data, val_data = self._open_data()
        self.class_to_idx = class_to_idx(train_data)
        num_classes = self._num_classes()
        model: Any = self._build_model(num_classes)
        dense = self._build_dense(model) if config.token_label and not config.eval_checkpoint else None
        self._build_loaders(train_data, val_data, num_classes or int(model.num_classes), dense)
        self._build_state(model, dense)

    def _open_data(self) -> tuple[Dataset, Dataset]:
        config = self.config
        common: dict[str, Any] = dict(
            max_bad_images=config.max_bad_images, in_chans=_in_chans(config), seed=config.seed
        )
        with self._primary_first(config.dataset_download):
            train_data = create_split(
                config,
                config.train_split,
                is_training=True,
                num_samples=config.train_num_samples,
                batch_size=config.batch_size,
                repeats=config.epoch_repeats,
                decode=import_fast_images().decode_fast if config.fast_images else decode_image,
                **common,
            )
            val_data = create_split(
                config,
                config.val_split,
                is_training=False,
                num_samples=config.val_num_samples,
                batch_size=config.batch_size,
                **common,
            )
        check_same_classes(train_data, val_data)
        return train_data, val_data

    @contextmanager
    def _primary_first(self, needed: bool) -> Iterator[None]:
        """Let the primary process go first, so that a download happens once."""
        wait = needed and self.runtime.distributed
        if wait and not self.runtime.is_primary:
            dist.barrier()
        yield
        if wait and self.runtime.is_primary:
            dist.barrier()

    def _num_classes(self) -> int | None:
        wanted, found = self.config.num_classes, max((self.class_to_idx or {"": -1}).values()) + 1
        if wanted and found and (wanted < found or (wanted != found and not self.config.class_map)):
            raise UserError(
                f"--num-classes {wanted}, but the training set has {found} classes; leave it out or give a --class-map."
            )
        return wanted or found or None

    def _build_model(self, num_classes: int | None) -> nn.Module:
        config = self.config
        model = create_training_model(config, num_classes)
        finetune = config.finetune or (config.transfer_model if config.transfer_learning else "")
        if config.initial_checkpoint:
            path = find_checkpoint(config.initial_checkpoint)
            load_weights(model, state_dict_of(read_checkpoint(path), None, path), path)
        elif finetune:
            _logger.info(load_finetune(model, find_checkpoint(finetune), self.class_to_idx))
        freeze(model, config.freeze)
        params = sum(p.numel() for p in model.parameters())
        self.arch = str(model.pretrained_cfg["architecture"])  # type: ignore[index]  # a dictionary
        self.data_config = resolve_data_config(model, config)
        _logger.info(f"{config.model}: {params:,} parameters, input {tuple(self.data_config['input_size'])}")
        if config.freeze:
            frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
            _logger.info(f"{frozen:,} of them are frozen")

        model = model.to(self.runtime.device)
        choose_attention(model, config, self.runtime.device, training=True)
        if config.channels_last:
            model = model.to(memory_format=torch.channels_last)
        if config.sync_bn and self.runtime.distributed and self.runtime.device.type == "cuda":
            model = convert_sync_batchnorm(model)
        elif config.sync_bn:
            _logger.warning("--sync-bn needs several processes on GPUs: BatchNorm stays as it is.")
        return torch.jit.script(model) if config.torchscript else model

    def _build_dense(self, model: nn.Module) -> DenseClassifier:
        """The model with an auxiliary head over its tokens."""
        size, dense = self.config.token_label_size, DenseClassifier(model, self.data_config["input_size"])
        if size is not None and (size, size) != dense.grid:
            grid = "x".join(str(n) for n in dense.grid)
            raise UserError(
                f"--token-label-size is {size}, but {self.config.model} has {grid} tokens at "
                f"{tuple(self.data_config['input_size'][1:])} pixels; leave it out, or choose another --img-size."
            )
        return dense

    def _build_loaders(self, train_data: Any, val_data: Any, num_classes: int, dense: DenseClassifier | None) -> None:
        config, runtime = self.config, self.runtime
        collate = not config.no_prefetcher and dense is None
        self.mixup: Any = create_mixup(config, num_classes, config.smoothing, collate)
        self.mix_batch: Any = None if collate else self.mixup
        if dense is not None and self.mixup is not None:
            self.mix_batch = DenseMixup(self.mixup, dense.grid, config.token_label_mix == "published")
        if dense is not None and config.token_label_data:
            train_data = open_token_labels(train_data, config, num_classes, dense.grid)
        self.train_data, self.val_data = train_data, val_data
        place = runtime.device, runtime.rank, runtime.world_size
        self.train_loader: Any = create_train_loader(
            train_data,
            config,
            self.data_config,
            config.batch_size,
            self.mixup if collate else None,
            *place,
            seed=config.seed,
            collate_samples=collate_token_labels if isinstance(train_data, TokenLabelDataset) else None,
        )
        self.eval_loader = create_eval_loader(val_data, config, self.data_config, config.eval_batch_size, *place)

    def _build_state(self, model: nn.Module, dense: DenseClassifier | None) -> None:
        config, runtime = self.config, self.runtime
        images_per_update = config.batch_size * runtime.world_size * config.grad_accum_steps
        task = self._create_task(model, dense)
        # which also learns to project the student's features onto the teacher's
        learner: Any = task.get_trainable_module() if isinstance(task, FeatureDistillationTask) else model
        optimizer = create_optimizer(config, learner, images_per_update)
        precision = setup_precision(config, runtime.device)
        if precision.apex_amp is not None:  # patches the model in place
            _, optimizer = precision.apex_amp.initialize(dense or model, optimizer, opt_level="O1")
        _logger.info(f"{runtime.world_size} process(es) on {runtime.device.type}, {precision.description}")

        if config.model_ema:
            device = torch.device("cpu") if config.model_ema_force_cpu else None
            task.setup_ema(decay=config.model_ema_decay, use_warmup=config.model_ema_warmup, device=device)
        self.batches = len(self.train_loader)
        updates = -(-self.batches // config.grad_accum_steps)
        scheduler, self.epochs = _create_scheduler(config, optimizer, updates)
        self.state = TrainState(task, optimizer, scheduler, precision)
        self._resume(updates)
        self.recovery = RecoveryPoints(config.recovery_interval, config.recovery_minutes, runtime, config.dist_timeout)
        self.eval_model = model
        if config.torchcompile:
            self.eval_model = compile_task(task, config)
        if runtime.distributed:
            device_ids = [runtime.local_rank] if runtime.device.type == "cuda" else None
            task.prepare_distributed(device_ids=device_ids, gradient_as_bucket_view=True)  # spares a copy of them

    def _create_task(self, model: nn.Module, dense: DenseClassifier | None) -> TrainingTask:
        config, device = self.config, self.runtime.device
        if dense is not None:
            return TokenLabelTask(dense, config, config.smoothing, device)
        if config.teacher and not config.eval_checkpoint:
            teacher = create_teacher(config, self.train_data, model, self.data_config)
            return create_distillation(config, model, teacher, create_criterion(config), device)
        return ClassificationTask(model, create_criterion(config), device=device, verbose=False)

    def _resume(self, updates: int) -> None:
        """Go to where the run is to begin or continue, in epochs of so many updates."""
        config, state = self.config, self.state
        self.found = agree_on_state(config, self.runtime)
        self.first_sample = 0
        if self.found.path:
            self.first_sample = resume(state, self.found.content, self.found.path, config, self.runtime.world_size)
            self.found.content.clear()  # it may be large
            if config.resume_elastic:  # in updates of the present size, by which schedules go
                state.updates = state.epoch * updates + state.batch // config.grad_accum_steps
        order = self.train_loader.sampler
        if isinstance(order, EpochOrder) and self.first_sample > len(order.order):
            raise UserError(
                f"{self.found.path} is {self.first_sample:,} samples into its epoch, and the training set has "
                f"{len(order.order):,}: it is of other data."
            )
        if state.batch and not isinstance(order, EpochOrder):
            _logger.warning("A streamed data set cannot be entered in the middle: the epoch begins anew.")
            state.begin_epoch()
        if config.start_epoch is not None and not (self.found.path and config.resume == "auto"):
            state.epoch, self.first_sample = config.start_epoch, 0
            state.begin_epoch()
        if state.epoch >= self.epochs:
            message = f"Nothing is left to train: epoch {state.epoch} of {self.epochs}; raise --epochs."
            if config.resume != "auto":
                raise UserError(message)
            _logger.warning(message)  # a scheduler may start a run that has ended, which is no mistake
        state.updates = state.updates or state.epoch * updates
        if state.scheduler is not None and state.epoch:
            if config.sched_on_updates:
                state.scheduler.step_update(state.updates)
            elif config.sched != "plateau":
                state.scheduler.step(state.epoch, state.scheduler.metric)

    def place(self) -> str:
        """Where the run is, for messages."""
        batch = self.state.batch + 1
        return f"epoch {self.state.epoch}, {f'batch {batch}' if batch <= self.batches else 'its validation'}"

    def fit(self) -> None:
        """Train, validate and save, epoch by epoch."""
        state, config = self.state, self.config
        with self.recovery, self._outputs() as outputs, sparing_shared_pages():
            for epoch in range(state.epoch, self.epochs):
                state.epoch = epoch
                train_metrics, speed = self._train_epoch(epoch, outputs)
                metrics = self._evaluate_epoch(epoch, outputs)
                state.begin_epoch()
                lr, metric = state.lr, metrics[config.eval_metric]
                if not math.isfinite(metrics["loss"]):
                    raise UserError(
                        f"The validation loss became {metrics['loss']} after epoch {epoch} (learning rate {lr:.3g}). "
                        "Earlier checkpoints are intact: --resume the last of them with a lower --lr or --clip-grad 1."
                    )
                if state.scheduler is not None:
                    state.scheduler.step(epoch + 1, metric)
                if outputs is not None:
                    with save_errors(config.on_save_error):
                        outputs.summary.write(epoch, train_metrics, metrics, lr, speed)
                    outputs.saver.save_after_epoch(epoch, metric)
                if epoch + 1 < self.epochs:
                    self.recovery.leave_if_any_is_told()
            if outputs is not None:
                outputs.saver.finish()
                if outputs.saver.best_metric is not None:
                    best = f"{outputs.saver.best_metric:.3f} in epoch {outputs.saver.best_epoch}"
                    _logger.info(f"Best {config.eval_metric} {best}")
                _logger.info(f"Results are in {outputs.folder}")

    @contextmanager
    def _outputs(self) -> Iterator["Outputs | None"]:
        """What the primary process writes; None in the others."""
        if not self.runtime.is_primary:
            yield None
            return
        config, state = self.config, self.state
        folder = run_folder(config, self.arch, self.data_config["input_size"][1:], self.found.path)
        args = dataclasses.asdict(config)
        recipe = {**args, "resume": "", "experiment": ""}  # for another run like this one
        kept = min(config.checkpoint_hist, self.epochs - state.epoch) + 2  # and what is saved within an epoch
        continued = bool(self.found.path) and Path(self.found.path).parent == folder
        if not continued:
            refuse_existing_run(folder)
        with open_folder(folder, recipe, checkpoint_bytes(state, kept)):
            self._refuse_other_runs(folder, continued)
            about = {"arch": self.arch, "data_config": self.data_config, "class_to_idx": self.class_to_idx}
            batches = batches_of(config, self.runtime.world_size)
            saver = RunSaver(state, folder, config, {**about, "args": args}, batches)
            if continued:
                saver.continue_from(self.found.path)
            summary = Summary(folder, state.epoch, args, config.log_tensorboard, config.log_wandb, config.wandb_project)
            with closing(summary), closing(saver), log_to_file(folder / "train.log"):
                yield Outputs(folder, saver, summary)

    def _refuse_other_runs(self, folder: Path, continued: bool) -> None:
        """Refuse what another process has written while this one was waiting for the folder."""
        if not continued:
            refuse_existing_run(folder)
        elif identity(self.found.path) != self.found.identity:
            raise UserError(f"Another process went on with {folder} while this one was starting: start it again.")

    def _progress(self, title: str, loader: Any) -> ProgressBar:
        batches = len(loader) if hasattr(loader, "__len__") else None
        quiet = not self.runtime.is_primary
        return ProgressBar(title, batches, self.config.log_interval, self.runtime.device, quiet)

    def _train_epoch(self, epoch: int, outputs: "Outputs | None") -> tuple[dict[str, float], dict[str, float]]:
        config = self.config
        order = self.train_loader.sampler
        if isinstance(order, EpochOrder):
            order.set_epoch(epoch, self.first_sample)
            self.first_sample = 0
        if hasattr(self.train_data, "set_epoch"):
            self.train_data.set_epoch(epoch)
        self.recovery.begin_epoch(self.state.batch)
        if config.mixup_off_epoch and epoch >= config.mixup_off_epoch and self.mixup is not None:
            self.mixup.mixup_enabled = False

        def on_batch(i: int, images: torch.Tensor) -> None:
            if outputs is None:
                return
            outputs.saver.check()
            if config.save_images and i % config.log_interval == 0:
                with save_errors(config.on_save_error):
                    outputs.save_images(images, f"train-batch-{epoch}-{i}.jpg")

        with self._progress(f"Epoch {epoch}/{self.epochs - 1}", self.train_loader) as progress:
            metrics = train_one_epoch(
                self.state,
                self.train_loader,
                config,
                self.runtime,
                progress,
                self.mix_batch,
                on_batch,
                self.recovery,
                lambda: self._save_within_epoch(outputs),
            )
        _logger.info(
            f"Epoch {epoch}: loss {metrics['loss']:.4f}, learning rate {self.state.lr:.2e}, "
            f"{progress.images_per_second:,.0f} img/s"
        )
        if skipped := unreadable_files(self.train_data):
            _logger.warning(f"{len(skipped)} unreadable training images were replaced: {', '.join(skipped[:5])}")
        if isinstance(self.train_data, TokenLabelDataset) and (alone := self.train_data.files_without_map()):
            _logger.warning(f"{len(alone)} images had no label map but their class alone: {', '.join(alone[:5])}")
        return metrics, {"images_per_second": progress.images_per_second, "memory_gb": memory_gb(self.runtime.device)}

    def _save_within_epoch(self, outputs: "Outputs | None") -> None:
        if outputs is not None:
            outputs.saver.save_within_epoch()
            if self.recovery.leaving:
                outputs.saver.wait()

    def _evaluate_epoch(self, epoch: int, outputs: "Outputs | None") -> dict[str, float]:
        def save() -> None:
            self._save_within_epoch(outputs)

        metrics = self._evaluate(self.eval_model, f"Validation {epoch}", save)
        if self.config.model_ema and not self.config.model_ema_force_cpu:
            ema: Any = self.state.task.get_eval_model(ema=True)
            if self.runtime.distributed:  # the statistics that are saved, and so there after a restart
                distribute_bn(ema, self.runtime.world_size, reduce=False)
            metrics = self._evaluate(ema, f"Validation {epoch} (averaged weights)", save)
        return metrics.summary()

    def _evaluate(self, model: nn.Module, title: str, save: Callable[[], None] | None = None) -> Metrics:
        config = self.config
        with self._progress(title, self.eval_loader) as progress:
            metrics = evaluate(
                model,
                self.eval_loader,
                self.runtime,
                self.state.precision,
                progress,
                channels_last=config.channels_last,
                tta=config.tta,
                stop=lambda: self.recovery.caught > 0,
            )
        self.recovery.leave_if_any_is_told(save)
        if skipped := unreadable_files(self.val_data):
            _logger.warning(f"{len(skipped)} unreadable validation images were left out: {', '.join(skipped[:5])}")
        _logger.info(
            f"{title}: top-1 {metrics.top1:.3f} ({metrics.correct1} of {metrics.count}), top-5 {metrics.top5:.3f}, "
            f"loss {metrics.loss:.4f}, {progress.images_per_second * self.runtime.world_size:,.0f} img/s"
        )
        return metrics

    def validate_checkpoint(self, path: str) -> Metrics:
        """Load a checkpoint and evaluate it on the validation split."""
        file = find_checkpoint(path)
        model = self.eval_model
        load_weights(getattr(model, "_orig_mod", model), state_dict_of(read_checkpoint(file), None, file), file)
        return self._evaluate(model, f"Validation of {file}")


@dataclasses.dataclass(frozen=True)
class Outputs:
    """What a run writes to."""

    folder: Path
    saver: RunSaver
    summary: Summary

    def save_images(self, images: torch.Tensor, name: str) -> None:
        """Save a batch of images as a picture; raises `SaveError`."""
        try:
            with replacing(self.folder / name) as path:
                save_image(images, path, format="jpeg", padding=0, normalize=True)
        except OSError as e:
            raise SaveError(
                f"Cannot write {self.folder / name} ({e.strerror}); make room, or leave out --save-images."
            ) from e


def _in_chans(config: TrainConfig) -> int:
    return config.input_size[0] if config.input_size else config.in_chans or 3


def _check(config: TrainConfig) -> None:
    """Refuse options that contradict each other."""
    check_compile_backend(config.torchcompile)
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) and config.resume != "auto":
        raise UserError(
            "torchrun would begin the run anew where it restarts it: add --experiment NAME --resume auto, or leave out "
            "--max-restarts (MAX_RESTARTS)."
        )
    if config.mixup_active and config.batch_size % 2 and not config.token_label:
        raise UserError(
            f"Mixup and CutMix pair the images of a batch, and --batch-size {config.batch_size} is odd; use an even "
            "one, or --mixup 0 --cutmix 0."
        )
    if config.token_label_data and not config.token_label:
        raise UserError("--token-label-data is for training with token labels: add --token-label.")
    for option in ("jsd_loss", "bce_loss", "aug_splits", "torchscript"):
        if config.token_label and getattr(config, option):  # other losses, and forward alone
            raise UserError(
                f"--{option.replace('_', '-')} does not go with --token-label, which has a loss of its own."
            )
    _check_distillation(config)
    if config.token_label and config.dense_weight == config.cls_weight == 0:
        raise UserError("--dense-weight and --cls-weight are both 0: nothing would be learned.")
    if config.mixup_active and config.aug_splits > 1:
        raise UserError("--aug-splits does not go with mixup and CutMix: add --mixup 0 --cutmix 0.")
    if config.aug_splits == 1:
        raise UserError(f"--aug-splits is {config.aug_splits}, expected 0 or at least 2.")
    if 0 < config.aug_repeats < 1:
        raise UserError(f"--aug-repeats is {config.aug_repeats}, expected 0 or at least 1.")
    if config.lr_noise is not None and len(config.lr_noise) not in (1, 2):
        raise UserError(f"--lr-noise has {len(config.lr_noise)} numbers, expected one or two.")
    if config.decay_rate > 1 and config.sched in ("step", "multistep", "plateau"):
        raise UserError(f"--decay-rate is {config.decay_rate}, expected at most 1 with --sched {config.sched}.")
    if config.torchscript and config.torchcompile:
        raise UserError("--torchscript does not go with --torchcompile: give one.")
    if config.memory_budget is not None and config.torchcompile != "inductor":
        raise UserError("--memory-budget is for --torchcompile inductor: add it, or use --grad-checkpointing.")
    for name in ("scale", "ratio"):
        low, high = getattr(config, name)
        if low > high:
            raise UserError(f"--{name} is {low} to {high}, expected the smaller number first.")
    if config.transfer_learning and not (config.transfer_model or config.finetune):
        raise UserError("--transfer-learning needs the weights to start from: --transfer-model PATH.")
    starts = [n for n in ("initial_checkpoint", "finetune") if getattr(config, n)]
    if len(starts) > 1:
        raise UserError("--initial-checkpoint and --finetune both name weights to start from; give one.")


def _check_distillation(config: TrainConfig) -> None:
    for option in ("token_label", "jsd_loss", "aug_splits", "torchscript"):
        if config.teacher and getattr(config, option):
            raise UserError(f"--{option.replace('_', '-')} does not go with --teacher: give one of them.")
    for field in dataclasses.fields(DistillationConfig):
        if not config.teacher and getattr(config, field.name) != field.default:
            raise UserError(f"--{field.name.replace('_', '-')} is for distillation: add --teacher.")
    if config.distill_type == "feature" and config.distill_temperature != DistillationConfig().distill_temperature:
        raise UserError("--distill-temperature is of logits, and --distill-type feature compares none: leave it out.")
    if config.distill_type == "feature" and config.transfer_learning:
        raise UserError("--distill-type feature does not go with --transfer-learning: use --layer-decay.")


def _create_scheduler(config: TrainConfig, optimizer: torch.optim.Optimizer, updates: int) -> tuple[Any, int]:
    try:
        scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(config), updates_per_epoch=updates)
        if scheduler is not None and config.sched != "plateau":
            scheduler._get_lr(epochs * updates if config.sched_on_updates else epochs)  # some can fail at their end
        return scheduler, epochs
    except (ArithmeticError, AssertionError, ValueError) as e:
        raise UserError(
            f"--sched {config.sched} is not possible ({e}): see --epochs, --warmup-epochs, --cooldown-epochs, "
            "--decay-epochs and --lr-cycle-mul."
        ) from e
