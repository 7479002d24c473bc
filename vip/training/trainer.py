"""A training run from configuration to checkpoints."""

import dataclasses
import gc
import logging
import math
import os
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler_factory import scheduler_kwargs
from timm.task import ClassificationTask, TrainingTask
from timm.utils import distribute_bn, random_seed, unwrap_model
from torch import nn
from torch.utils.data import Dataset
from torchvision.utils import save_image

from vip.data.augmentation import create_mixup
from vip.data.datasets import check_same_classes, class_to_idx, create_split, unreadable_files
from vip.data.loaders import create_eval_loader, create_train_loader, naming_lost_workers
from vip.data.order import EpochOrder
from vip.errors import SaveError, UserError
from vip.reporting.logs import log_to_file, setup_logging
from vip.reporting.progress import ProgressBar
from vip.reporting.results import Metrics
from vip.reporting.summary import Summary
from vip.token_labels.dataset import TokenLabelDataset, collate_token_labels, open_token_labels
from vip.token_labels.dense import DenseClassifier
from vip.token_labels.mixing import DenseMixup
from vip.training.config import TrainConfig
from vip.training.engine import TrainState, evaluate, train_one_epoch
from vip.training.factory import (
    check_compile_backend,
    create_criterion,
    create_optimizer,
    create_training_model,
    resolve_data_config,
)
from vip.training.recovery import REQUEUE, Preempted, RecoveryPoints
from vip.training.runtime import (
    Runtime,
    allow_fast_kernels,
    leave_together,
    naming_lost_processes,
    setup_precision,
    setup_runtime,
)
from vip.training.saver import (
    RunSaver,
    checkpoint_bytes,
    find_state,
    load_scheduler_state,
    open_folder,
    progress_of,
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
    state = trainer.state
    workers = naming_lost_workers(runtime.rank, trainer.train_data, trainer.val_data)
    with naming_lost_processes(runtime, lambda: f"epoch {state.epoch}, batch {state.batch + 1}"), workers:
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
        allow_fast_kernels(runtime.device)
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
        common = dict(max_bad_images=config.max_bad_images, in_chans=_in_chans(config), seed=config.seed)
        with self._primary_first(config.dataset_download):
            train_data = create_split(
                config,
                config.train_split,
                is_training=True,
                num_samples=config.train_num_samples,
                batch_size=config.batch_size,
                repeats=config.epoch_repeats,
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
            _logger.info(load_finetune(model, find_checkpoint(finetune)))
        params = sum(p.numel() for p in model.parameters())
        self.arch = str(model.pretrained_cfg["architecture"])  # type: ignore[index]  # a dictionary
        self.data_config = resolve_data_config(model, config)
        _logger.info(f"{config.model}: {params:,} parameters, input {tuple(self.data_config['input_size'])}")

        model = model.to(self.runtime.device)
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
        optimizer = create_optimizer(config, model, images_per_update)
        precision = setup_precision(config, runtime.device)
        if precision.apex_amp is not None:  # patches the model in place
            _, optimizer = precision.apex_amp.initialize(dense or model, optimizer, opt_level="O1")
        _logger.info(f"{runtime.world_size} process(es) on {runtime.device.type}, {precision.description}")

        task: ClassificationTask
        if dense is not None:
            task = TokenLabelTask(dense, config, config.smoothing, runtime.device)
        else:
            task = ClassificationTask(model, create_criterion(config), device=runtime.device, verbose=False)
        if config.model_ema:
            device = torch.device("cpu") if config.model_ema_force_cpu else None
            task.setup_ema(decay=config.model_ema_decay, use_warmup=config.model_ema_warmup, device=device)
        updates = -(-len(self.train_loader) // config.grad_accum_steps)
        scheduler, self.epochs = _create_scheduler(config, optimizer, updates)
        self.state = TrainState(task, optimizer, scheduler, precision)
        self.resumed, checkpoint = self._find_state()
        self.first_sample = 0
        if self.resumed:
            self.first_sample = resume(self.state, checkpoint, self.resumed, config, runtime.world_size)
            if config.resume_elastic:  # in updates of the present size, by which schedules go
                self.state.updates = self.state.epoch * updates + self.state.batch // config.grad_accum_steps
        if self.state.batch and not isinstance(self.train_loader.sampler, EpochOrder):
            _logger.warning("A streamed data set cannot be entered in the middle: the epoch begins anew.")
            self.state.batch, self.state.loss_sum, self.state.samples_before = 0, 0.0, 0
        if config.start_epoch is not None and not (self.resumed and config.resume == "auto"):
            self.state.epoch, self.state.batch, self.state.loss_sum = config.start_epoch, 0, 0.0
            self.first_sample = self.state.samples_before = 0
        if self.state.epoch >= self.epochs:
            message = f"Nothing is left to train: epoch {self.state.epoch} of {self.epochs}; raise --epochs."
            if config.resume != "auto":
                raise UserError(message)
            _logger.warning(message)  # a scheduler may start a run that has ended, which is no mistake
        self.state.updates = self.state.updates or self.state.epoch * updates
        if scheduler is not None and self.state.epoch:
            if config.sched_on_updates:
                scheduler.step_update(self.state.updates)
            elif config.sched != "plateau":
                scheduler.step(self.state.epoch, scheduler.metric)

        self.recovery = RecoveryPoints(config.recovery_interval, config.recovery_minutes, runtime, config.dist_timeout)
        self.eval_model = model
        if config.torchcompile:
            self.eval_model = task.compile(backend=config.torchcompile, mode=config.torchcompile_mode)
        if runtime.distributed:
            device_ids = [runtime.local_rank] if runtime.device.type == "cuda" else None
            task.prepare_distributed(device_ids=device_ids)

    def _find_state(self) -> tuple[str, dict[str, Any]]:
        """The state to continue, which the first process chooses: all have to continue the same one."""
        found: tuple[str, dict[str, Any]] = ("", {})
        if self.runtime.is_primary:
            found = find_state(self.config)
            self.resumed_file = _identity(found[0])
        if not self.runtime.distributed:
            return found
        chosen: list[Any] = [found[0], progress_of(found[1])]
        dist.broadcast_object_list(chosen)
        path, progress = chosen
        if self.runtime.is_primary or not path:
            return found
        if Path(path).exists():
            found = path, read_checkpoint(path)
        if progress_of(found[1]) != progress:
            raise UserError(
                f"Process {self.runtime.rank} does not see the {path} from which process 0 continues: --output has to "
                "be a folder that all nodes share, and no other run may write to."
            )
        return found

    def fit(self) -> None:
        """Train, validate and save, epoch by epoch."""
        state, config = self.state, self.config
        gc.freeze()  # a collection would write to every page that is shared with loader processes, and so copy it
        with self._outputs() as outputs, self.recovery:
            for epoch in range(state.epoch, self.epochs):
                state.epoch = epoch
                train_metrics, images_per_second = self._train_epoch(epoch, outputs)
                metrics = self._evaluate_epoch(epoch)
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
                        outputs.summary.write(epoch, train_metrics, metrics, lr=lr, images_per_second=images_per_second)
                    outputs.saver.save_after_epoch(epoch, metric)
                if epoch + 1 < self.epochs:
                    self.recovery.finish_epoch()
            if outputs is not None:
                outputs.saver.wait()
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
        folder = run_folder(config, self.arch, self.data_config["input_size"][1:], self.resumed)
        args = dataclasses.asdict(config)
        recipe = {**args, "resume": "", "experiment": ""}  # for another run like this one
        kept = min(config.checkpoint_hist, self.epochs - state.epoch) + 2  # and what is saved within an epoch
        continued = bool(self.resumed) and Path(self.resumed).parent == folder
        if not continued:
            refuse_existing_run(folder)
        with open_folder(folder, recipe, checkpoint_bytes(state, kept)):
            self._refuse_other_runs(folder, continued)
            about = {"arch": self.arch, "data_config": self.data_config, "class_to_idx": self.class_to_idx}
            batches = batches_of(config, self.runtime.world_size)
            saver = RunSaver(state, folder, config, {**about, "args": args}, batches)
            if continued:
                saver.continue_from(self.resumed)
            summary = Summary(folder, state.epoch, args, config.log_tensorboard, config.log_wandb, config.wandb_project)
            with closing(summary), closing(saver), log_to_file(folder / "train.log"):
                yield Outputs(folder, saver, summary)

    def _refuse_other_runs(self, folder: Path, continued: bool) -> None:
        """Refuse what another process has written while this one was waiting for the folder."""
        if not continued:
            refuse_existing_run(folder)
        elif _identity(self.resumed) != self.resumed_file:
            raise UserError(f"Another process went on with {folder} while this one was starting: start it again.")

    def _progress(self, title: str, loader: Any) -> ProgressBar:
        batches = len(loader) if hasattr(loader, "__len__") else None
        quiet = not self.runtime.is_primary
        return ProgressBar(title, batches, self.config.log_interval, self.runtime.device, quiet)

    def _train_epoch(self, epoch: int, outputs: "Outputs | None") -> tuple[dict[str, float], float]:
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

        def save() -> None:
            if outputs is not None:
                outputs.saver.save_within_epoch()
                if self.recovery.leaving:
                    outputs.saver.wait()

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
                save,
            )
        _logger.info(
            f"Epoch {epoch}: loss {metrics['loss']:.4f}, learning rate {self.state.lr:.2e}, "
            f"{progress.images_per_second:,.0f} img/s"
        )
        if skipped := unreadable_files(self.train_data):
            _logger.warning(f"{len(skipped)} unreadable training images were replaced: {', '.join(skipped[:5])}")
        if isinstance(self.train_data, TokenLabelDataset) and (alone := self.train_data.files_without_map()):
            _logger.warning(f"{len(alone)} images had no label map but their class alone: {', '.join(alone[:5])}")
        model = self.state.task.get_trainable_module()
        if self.runtime.distributed and config.dist_bn:
            distribute_bn(model, self.runtime.world_size, config.dist_bn == "reduce")
        return metrics, progress.images_per_second

    def _evaluate_epoch(self, epoch: int) -> dict[str, float]:
        metrics = self._evaluate(self.eval_model, f"Validation {epoch}")
        if self.config.model_ema and not self.config.model_ema_force_cpu:
            ema: Any = self.state.task.get_eval_model(ema=True)
            if self.runtime.distributed and self.config.dist_bn:
                distribute_bn(ema, self.runtime.world_size, self.config.dist_bn == "reduce")
            metrics = self._evaluate(ema, f"Validation {epoch} (averaged weights)")
        return metrics.summary()

    def _evaluate(self, model: nn.Module, title: str) -> Metrics:
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
            )
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
            save_image(images, self.folder / name, padding=0, normalize=True)
        except OSError as e:
            raise SaveError(
                f"Cannot write {self.folder / name} ({e.strerror}); make room, or leave out --save-images."
            ) from e


def _identity(path: str) -> tuple[int, int] | None:
    """What tells a file from another one that takes its place; None where there is none."""
    if not os.path.exists(path):
        return None
    status = os.stat(path)
    return status.st_ino, status.st_mtime_ns


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
    for name in ("scale", "ratio"):
        low, high = getattr(config, name)
        if low > high:
            raise UserError(f"--{name} is {low} to {high}, expected the smaller number first.")
    if config.transfer_learning and not (config.transfer_model or config.finetune):
        raise UserError("--transfer-learning needs the weights to start from: --transfer-model PATH.")
    starts = [n for n in ("initial_checkpoint", "finetune") if getattr(config, n)]
    if len(starts) > 1:
        raise UserError("--initial-checkpoint and --finetune both name weights to start from; give one.")


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


_STATE_TYPES = {"epoch": int, "num_updates": int, "optimizer": dict, "lr_scheduler": dict, "position": dict}


def resume(state: TrainState, checkpoint: dict[str, Any], path: str, config: TrainConfig, world_size: int) -> int:
    """Continue from a checkpoint: weights, their average, optimizer, loss scale, schedule and counters.

    Args:
        state: What to restore.
        checkpoint: Content of the checkpoint.
        path: Where it is from, for messages.
        config: What the run is told now.
        world_size: Number of processes now.

    Returns:
        The samples of the epoch that all processes together have had.

    Raises:
        UserError: If it is no training state, or one of another model, or of other batches than `config` asks for.
    """
    if "optimizer" not in checkpoint or "epoch" not in checkpoint:
        raise UserError(f"{path} holds weights and no training state; start from it with --initial-checkpoint.")
    for name, kind in _STATE_TYPES.items():
        if name in checkpoint and type(checkpoint[name]) is not kind:
            found = type(checkpoint[name]).__name__
            raise UserError(f"{path} holds {name} as {found}, expected {kind.__name__}; take another one of the run.")
    task: Any = state.task
    _load_task(task, checkpoint, path)
    if task.has_ema():
        _load_task(task, checkpoint, path, ema=True)
    if not config.no_resume_opt:
        args = checkpoint.get("args") or {}
        opt = args.get("opt") if isinstance(args, dict) else getattr(args, "opt", None)
        if opt and opt != config.opt:
            raise UserError(f"{path} was trained with --opt {opt}, not {config.opt}; add --no-resume-opt to change it.")
        try:
            state.optimizer.load_state_dict(checkpoint["optimizer"])
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
            raise UserError(f"{path} was trained with other parameter groups ({e}); add --no-resume-opt.") from e
        scaler = state.precision.scaler
        if scaler is not None and scaler.state_dict_key in checkpoint:
            scaler.load_state_dict(checkpoint[scaler.state_dict_key])
        if state.scheduler is not None and "lr_scheduler" in checkpoint:
            load_scheduler_state(state.scheduler, checkpoint["lr_scheduler"])
    state.epoch = checkpoint["epoch"] + (checkpoint.get("version", 1) > 1)
    state.updates = checkpoint.get("num_updates", 0)
    position = checkpoint.get("position") or {}
    samples = _continue_epoch(state, position, path, config, world_size) if position else 0
    _logger.info(f"Resuming {path} at epoch {state.epoch}" + (f", sample {samples}" if samples else ""))
    return samples


def batches_of(config: TrainConfig, world_size: int) -> dict[str, int]:
    """What decides which images are in an update."""
    return {
        "processes": world_size,
        "batch_size": config.batch_size,
        "grad_accum_steps": config.grad_accum_steps,
    }


def _continue_epoch(
    state: TrainState, position: dict[str, Any], path: str, config: TrainConfig, world_size: int
) -> int:
    now = batches_of(config, world_size)
    expected = {**dict.fromkeys((*now, "batch", "samples"), int), "loss_sum": float}
    if any(type(position.get(name)) is not kind for name, kind in expected.items()):
        raise UserError(f"{path} does not say where in its epoch it is; take another one of the run.")
    changed = [f"{name} {position[name]} then, {n} now" for name, n in now.items() if position[name] != n]
    if changed and not config.resume_elastic:
        raise UserError(
            f"{path} was trained with other batches ({'; '.join(changed)}): continue with the same ones, or add "
            "--resume-elastic."
        )
    if changed:
        _logger.warning(
            f"Resuming with other batches ({'; '.join(changed)}): the learning rate stays {state.lr:.3g} and is not "
            "rescaled."
        )
        if config.lr_base is not None and state.scheduler is not None:  # which would be scaled to the new batches
            state.scheduler.base_values = [group["initial_lr"] for group in state.optimizer.param_groups]
    state.batch, state.loss_sum = position["batch"], position["loss_sum"]
    if changed:  # the average loss of the epoch is of the batches as they are counted now
        batch, state.samples_before = divmod(position["samples"], config.batch_size * world_size)
        state.loss_sum *= batch / max(state.batch, 1)
        state.batch = batch
    return position["samples"]


def _load_task(task: TrainingTask, checkpoint: dict[str, Any], path: str, ema: bool = False) -> None:
    """Load the weights of inference, and those that only training has."""
    weights = state_dict_of(checkpoint, None if ema else False, path)
    aids = checkpoint.get("task_state_ema" if ema and checkpoint.get("state_dict_ema") else "task_state") or {}
    wanted = getattr(task, "has_training_aid", False)
    if wanted != bool(aids):
        raise UserError(
            f"{path} was trained with{'' if aids else 'out'} --token-label: {'add' if aids else 'leave out'} it to "
            "continue, or begin a run of your own from its weights with --finetune."
        )
    load_weights(unwrap_model(task.get_eval_model(ema=ema)), {**weights, **aids}, path)
