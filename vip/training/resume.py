"""Continuing a run from a checkpoint: which one, and everything that is restored from it."""

import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from timm.task import TrainingTask
from timm.utils import unwrap_model

from vip.errors import UserError
from vip.training.config import TrainConfig
from vip.training.engine import TrainState
from vip.training.runtime import Runtime
from vip.training.saver import RECOVERY, load_scheduler_state
from vip.training.weights import find_checkpoint, load_weights, read_checkpoint, state_dict_of

_logger = logging.getLogger(__name__)


class FoundState(NamedTuple):
    """A training state to continue, if there is one.

    Attributes:
        path: The checkpoint, empty if there is none.
        content: What it holds.
        identity: What tells the file from another one that takes its place.
    """

    path: str = ""
    content: dict[str, Any] = {}
    identity: tuple[int, int] | None = None


def agree_on_state(config: TrainConfig, runtime: Runtime) -> FoundState:
    """`find_state` by the first process, whose choice all of them take: they have to continue the same state.

    Raises:
        UserError: If there is no such state, or a process does not see it.
    """
    found = FoundState()
    if runtime.is_primary:
        path, content = find_state(config)
        found = FoundState(path, content, identity(path))
    if not runtime.distributed:
        return found
    chosen: list[Any] = [found.path, progress_of(found.content)]
    dist.broadcast_object_list(chosen)
    path, progress = chosen
    if runtime.is_primary or not path:
        return found
    if Path(path).exists():
        found = FoundState(path, read_checkpoint(path))
    if progress_of(found.content) != progress:
        raise UserError(
            f"Process {runtime.rank} does not see the {path} from which process 0 continues: --output has to be a "
            "folder that all nodes share, and no other run may write to."
        )
    return found


def find_state(config: TrainConfig) -> tuple[str, dict[str, Any]]:
    """The checkpoint to resume and its content: of a folder the newest state; `auto`: of `--experiment`, if it began.

    Returns:
        Path and content, both empty where there is nothing to resume.

    Raises:
        UserError: If `auto` is given without `--experiment`, or there is no such checkpoint.
    """
    if not config.resume:
        return "", {}
    if config.resume == "auto" and not config.experiment:
        raise UserError("--resume auto looks in the folder of the run: name it with --experiment.")
    auto = config.resume == "auto"
    path = Path(config.output or "output/train", config.experiment) if auto else Path(config.resume)
    if os.path.isdir(path):  # false as well for what can be no path, where that of pathlib raises
        found = _newest_state(path)
        if found[0]:
            return found
    if auto:
        return "", {}
    path = find_checkpoint(path)
    return str(path), read_checkpoint(path)


def _newest_state(folder: Path) -> tuple[str, dict[str, Any]]:
    """The checkpoint of a run that is whole and furthest, whatever times the files have; empty if it has none yet."""
    numbered = sorted(folder.glob("checkpoint-*.pth.tar"), key=lambda path: (len(path.name), path.name), reverse=True)
    damaged = False
    for names in ([folder / RECOVERY, folder / "last.pth.tar"], *([path] for path in numbered)):
        found = []
        for path in names:
            try:
                found += [(str(path), read_checkpoint(path))] if path.exists() else []
            except UserError as e:
                damaged = True
                _logger.warning(f"{e} The state before it is taken.")
        if found:
            return max(found, key=lambda state: progress_of(state[1]))
    if damaged:
        raise UserError(f"No checkpoint in {folder} can be read; begin the run again in another --experiment.")
    return "", {}


def progress_of(checkpoint: dict[str, Any]) -> tuple[int, int]:
    """How far a training state is: epochs that ended, and samples of the next."""
    epoch, position = checkpoint.get("epoch"), checkpoint.get("position")
    samples = position.get("samples") if isinstance(position, dict) else 0
    return epoch if isinstance(epoch, int) else -1, samples if isinstance(samples, int) else 0


def identity(path: str) -> tuple[int, int] | None:
    """What tells a file from another one that takes its place; None where there is none."""
    if not os.path.exists(path):
        return None
    status = os.stat(path)
    return status.st_ino, status.st_mtime_ns


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
    if checkpoint["epoch"] < -1 or checkpoint.get("num_updates", 0) < 0:  # -1 within the first epoch
        raise UserError(f"{path} is of an epoch before the first; take another one of the run.")
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
            state.optimizer.load_state_dict(_taking_its_own_steps(checkpoint["optimizer"], state.optimizer))
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


def _taking_its_own_steps(saved: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's saved state, without how the saved one computed: a loss scale asks what this one was made for."""
    groups = saved["param_groups"]
    if len(groups) == len(optimizer.param_groups):
        ways = [{way: own[way] for way in ("fused", "foreach") if way in own} for own in optimizer.param_groups]
        groups = [group | way for group, way in zip(groups, ways, strict=True)]
    return {**saved, "param_groups": groups}


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
    samples, images = position["samples"], config.batch_size * world_size
    if changed:  # the average loss of the epoch is of the batches as they are counted now
        state.batch = samples // images
        state.loss_sum *= state.batch / max(position["batch"], 1)
    state.samples_before = samples - state.batch * images
    if min(state.batch, state.samples_before) < 0:
        raise UserError(f"{path} says of its place in the epoch what cannot be; take another one of the run.")
    return samples


def _load_task(task: TrainingTask, checkpoint: dict[str, Any], path: str, ema: bool = False) -> None:
    """Load the weights of inference, and those that only training has."""
    weights = state_dict_of(checkpoint, None if ema else False, path)
    aids = checkpoint.get("task_state_ema" if ema and checkpoint.get("state_dict_ema") else "task_state") or {}
    projects = bool(task.get_task_state())  # of feature distillation alone
    if (getattr(task, "has_training_aid", False) or projects) != bool(aids):
        option = "--distill-type feature" if projects or "projection" in aids else "--token-label"
        raise UserError(
            f"{path} was trained with{'' if aids else 'out'} {option}: {'add' if aids else 'leave out'} it to "
            "continue, or begin a run of your own from its weights with --finetune."
        )
    heads = {} if projects else aids
    load_weights(unwrap_model(task.get_eval_model(ema=ema)), {**weights, **heads}, path)
    try:
        task.load_task_state(aids, ema=ema)
    except (AttributeError, RuntimeError, TypeError) as e:
        raise UserError(f"{path} was trained with a teacher of other features: continue with that one.") from e
