"""The folder a run leaves behind: checkpoints in timm's layout, its configuration, and whether there is room for it."""

import logging
import os
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from timm.models import safe_model_name
from timm.utils import CheckpointSaver
from timm.utils.checkpoint_saver import load_checkpoint_metadata

from vip.errors import UserError
from vip.files import replacing
from vip.training.config import TrainConfig
from vip.training.engine import TrainState
from vip.training.weights import find_checkpoint, read_checkpoint

_logger = logging.getLogger(__name__)

RECOVERY = "recovery.pth.tar"  # the state within an epoch


def run_folder(config: TrainConfig, arch: str, image_size: tuple[int, ...]) -> Path:
    """The folder of a run: that of `--experiment`, that of the run it resumes, or a new one."""
    root = Path(config.output or "output/train")
    if config.experiment:
        return root / config.experiment
    if config.resume and (folder := Path(resume_path(config)).parent / "args.yaml").exists():
        return folder.parent
    size = "x".join(str(s) for s in dict.fromkeys(image_size))
    return root / f"{datetime.now():%Y%m%d-%H%M%S}-{safe_model_name(arch)}-{size}"


def resume_path(config: TrainConfig) -> str:
    """The checkpoint to resume: of a folder the newest state; `auto`: of `--experiment`, if that run has begun.

    Raises:
        UserError: If `auto` is given without `--experiment`, or there is no such checkpoint.
    """
    if config.resume != "auto":
        if not os.path.isdir(config.resume):
            return str(find_checkpoint(config.resume)) if config.resume else ""
        return _newest_state(Path(config.resume)) or str(find_checkpoint(config.resume))
    if not config.experiment:
        raise UserError("--resume auto looks in the folder of the run: name it with --experiment.")
    return _newest_state(Path(config.output or "output/train") / config.experiment)


def _newest_state(folder: Path) -> str:
    """The newest checkpoint of a run that is whole, empty if the run has none yet."""
    names = [folder / RECOVERY, folder / "last.pth.tar", *folder.glob("checkpoint-*.pth.tar")]
    states = sorted((path for path in names if path.exists()), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in states:
        try:
            read_checkpoint(str(path))
            return str(path)
        except UserError as e:
            _logger.warning(f"{e} The state before it is taken.")
    if states:
        raise UserError(f"No checkpoint in {folder} can be read; begin the run again in another --experiment.")
    return ""


def refuse_existing_run(folder: Path) -> None:
    """Refuse to start a run over the checkpoints of another.

    Raises:
        UserError: If the folder holds a run.
    """
    if (folder / "last.pth.tar").exists() or (folder / RECOVERY).exists():
        raise UserError(
            f"{folder} holds a run already: continue it with --resume auto, or choose another --experiment."
        )


def prepare_folder(folder: Path, config: dict[str, Any], needed_bytes: int) -> None:
    """Create the folder of a run and write its `args.yaml`.

    Args:
        folder: Folder of the run.
        config: What `args.yaml` is to hold.
        needed_bytes: Room that the checkpoints will take.

    Raises:
        UserError: If it cannot be written, or the disk has too little room.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / "args.yaml") as path:
            path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        free = shutil.disk_usage(folder).free
    except OSError as e:
        raise UserError(f"Cannot write to {folder} ({e.strerror}); choose another place with --output.") from e
    if free < needed_bytes:
        raise UserError(
            f"The checkpoints of this run need {needed_bytes / 1e9:.2f} GB and {folder} has {free / 1e9:.2f} GB free; "
            "make room, choose another --output, or keep fewer with --checkpoint-hist."
        )


def checkpoint_bytes(state: TrainState, copies: int) -> int:
    """Room that `copies` checkpoints will take: weights, their average, and two moments of the optimizer."""
    model = sum(t.numel() * t.element_size() for t in state.task.get_checkpoint_state()["state_dict"].values())
    return model * (3 + state.task.has_ema()) * copies


_PLATEAU_STATE = ("best", "last_epoch", "num_bad_epochs", "cooldown_counter")


def scheduler_state(scheduler: Any) -> dict[str, Any]:
    """The state of a timm scheduler, with all of the plateau schedule's, of which timm keeps a part."""
    inner = getattr(scheduler, "lr_scheduler", None)
    if inner is None:
        return scheduler.state_dict()
    return {**{name: getattr(inner, name) for name in _PLATEAU_STATE}, "restore_lr": scheduler.restore_lr}


def load_scheduler_state(scheduler: Any, content: dict[str, Any]) -> None:
    """Restore what a schedule remembers: the plateau's counters; the others follow from epoch and update."""
    if (inner := getattr(scheduler, "lr_scheduler", None)) is not None:
        for name in _PLATEAU_STATE:
            setattr(inner, name, content.get(name, getattr(inner, name)))
        scheduler.restore_lr = content.get("restore_lr")
    else:
        scheduler.metric = content.get("metric")  # nothing but its next checkpoint needs it


class RunSaver(CheckpointSaver):
    """timm's checkpoint bookkeeping around files that are whole or not there.

    Args:
        state: What to save.
        folder: Folder of the run.
        config: Name of the model, eval metric and number of checkpoints to keep.
        about: Entries of a checkpoint that do not change: `arch`, `args` and what else describes the run.
        batches: `processes`, `batch_size` and `grad_accum_steps`.
    """

    def __init__(
        self, state: TrainState, folder: Path, config: TrainConfig, about: dict[str, Any], batches: dict[str, int]
    ) -> None:
        super().__init__(
            state.task,
            state.optimizer,
            checkpoint_dir=str(folder),
            recovery_dir=str(folder),
            decreasing=config.eval_metric == "loss",
            max_history=config.checkpoint_hist,
        )
        self.state, self.about, self.batches = state, about, batches
        self.recovery_path = folder / RECOVERY

    def save_within_epoch(self) -> None:
        """Save the state after a batch, in the place of the last one saved so."""
        self._save(str(self.recovery_path), self.state.epoch - 1)

    def save_checkpoint(self, epoch: int, metric: float | None = None) -> tuple[float | None, int | None]:
        """Save the state after an epoch as timm does; what was saved within it is not needed any more."""
        best = super().save_checkpoint(epoch, metric)
        self.recovery_path.unlink(missing_ok=True)
        return best

    def continue_from(self, path: str) -> None:
        """Take up the bookkeeping of a run, and finish it where the run was stopped in the middle of it."""
        self.load_state_dict_from_checkpoint(path)
        if Path(path).name == RECOVERY:
            return
        epoch, metric = load_checkpoint_metadata(path).get("saver", {}).get("pending", (None, None))
        if epoch is None:
            return
        if self._checkpoint_path(epoch) not in [file for file, _ in self.checkpoint_files]:
            super().save_checkpoint(epoch, metric)
        elif self.best_epoch == epoch:
            self._duplicate(self._checkpoint_path(epoch), str(Path(self.checkpoint_dir) / "model_best.pth.tar"))
        self.recovery_path.unlink(missing_ok=True)

    def _save(self, save_path: str, epoch: int, metric: float | None = None) -> None:
        state = self.state
        content = {
            "epoch": epoch,
            "version": 2,  # timm's layout in which `epoch` is the one that ended
            **self.about,
            **state.task.get_checkpoint_state(),
            **(state.task.get_checkpoint_state(ema=True) if state.task.has_ema() else {}),
            "optimizer": state.optimizer.state_dict(),
            "num_updates": state.updates,
            "position": {
                **self.batches,
                "batch": state.batch,
                "samples": state.samples_before + state.batch * self.batches["batch_size"] * self.batches["processes"],
                "loss_sum": state.loss_sum,
            },
            "saver": self.state_dict(epoch, metric),
        }
        if state.scheduler is not None:
            content["lr_scheduler"] = scheduler_state(state.scheduler)
        if state.precision.scaler is not None:
            content[state.precision.scaler.state_dict_key] = state.precision.scaler.state_dict()
        if metric is not None:
            content["metric"] = metric
        try:
            with replacing(save_path) as path:
                torch.save(content, path)
        except (OSError, RuntimeError) as e:  # torch reports a full disk as a RuntimeError
            reason = getattr(e, "strerror", None) or str(e).splitlines()[0]
            raise UserError(f"Cannot write {save_path} ({reason}); the checkpoints before it are intact.") from e

    def _replace(self, src: str, dst: str) -> None:
        os.replace(src, dst)  # timm removes dst first, and a crash in between would lose it

    def _duplicate(self, src: str, dst: str) -> None:
        with replacing(dst) as path:
            path.unlink(missing_ok=True)
            try:
                os.link(src, path)
            except OSError:  # file systems without hard links
                shutil.copyfile(src, path)
