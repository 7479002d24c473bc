"""The folder a run leaves behind: checkpoints in timm's layout, its configuration, and whether there is room for it."""

import os
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from timm.models import safe_model_name
from timm.utils import CheckpointSaver

from vip.errors import UserError
from vip.files import replacing
from vip.training.config import TrainConfig
from vip.training.engine import TrainState
from vip.training.weights import find_checkpoint


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
    """The checkpoint to resume; `auto` means the last one of `--experiment`, or none if the run has not begun.

    Raises:
        UserError: If `auto` is given without `--experiment`, or there is no such checkpoint.
    """
    if config.resume != "auto":
        last = Path(config.resume) / "last.pth.tar"  # of a folder, the state to continue is the last and not the best
        return str(find_checkpoint(last if last.is_file() else config.resume)) if config.resume else ""
    if not config.experiment:
        raise UserError("--resume auto looks in the folder of the run: name it with --experiment.")
    last = Path(config.output or "output/train") / config.experiment / "last.pth.tar"
    return str(last) if last.exists() else ""


def refuse_existing_run(folder: Path) -> None:
    """Refuse to start a run over the checkpoints of another.

    Raises:
        UserError: If the folder holds a run.
    """
    if (folder / "last.pth.tar").exists():
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


class RunSaver(CheckpointSaver):
    """timm's checkpoint bookkeeping around files that are whole or not there.

    Args:
        state: What to save.
        folder: Folder of the run.
        config: Name of the model, eval metric and number of checkpoints to keep.
        about: Entries of a checkpoint that do not change: `arch`, `args` and what else describes the run.
    """

    def __init__(self, state: TrainState, folder: Path, config: TrainConfig, about: dict[str, Any]) -> None:
        super().__init__(
            state.task,
            state.optimizer,
            checkpoint_dir=str(folder),
            recovery_dir=str(folder),
            decreasing=config.eval_metric == "loss",
            max_history=config.checkpoint_hist,
        )
        self.state, self.about = state, about

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
            "saver": self.state_dict(epoch, metric),
        }
        if state.scheduler is not None:
            content["lr_scheduler"] = state.scheduler.state_dict()
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
