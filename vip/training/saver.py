"""The folder a run leaves behind: checkpoints in timm's layout, its configuration, and whether there is room for it."""

import copy
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from timm.models import safe_model_name
from timm.utils import CheckpointSaver
from timm.utils.checkpoint_saver import load_checkpoint_metadata

from vip.errors import SaveError, UserError
from vip.files import locked, replacing, save
from vip.training.config import TrainConfig
from vip.training.engine import TrainState

_logger = logging.getLogger(__name__)

RECOVERY = "recovery.pth.tar"  # the state within an epoch


def run_folder(config: TrainConfig, arch: str, image_size: tuple[int, ...], resumed: str) -> Path:
    """The folder of a run: that of `--experiment`, that of the run it resumes, or a new one."""
    root = Path(config.output or "output/train")
    if config.experiment:
        return root / config.experiment
    if resumed and (folder := Path(resumed).parent / "args.yaml").exists():
        return folder.parent
    size = "x".join(str(s) for s in dict.fromkeys(image_size))
    return root / f"{datetime.now():%Y%m%d-%H%M%S}-{safe_model_name(arch)}-{size}"


def refuse_existing_run(folder: Path) -> None:
    """Refuse to start a run over the checkpoints of another.

    Raises:
        UserError: If the folder holds a run.
    """
    # of what can be no path, these are false where pathlib's raise
    if any(os.path.exists(folder / name) for name in ("last.pth.tar", RECOVERY)):
        raise UserError(
            f"{folder} holds a run already: continue it with --resume auto, or choose another --experiment."
        )


@contextmanager
def open_folder(folder: Path, config: dict[str, Any], needed_bytes: int, patience: float = 30) -> Iterator[None]:
    """Create the folder of a run, keep other processes out of it, and write its `args.yaml`.

    Args:
        folder: Folder of the run.
        config: What `args.yaml` is to hold.
        needed_bytes: Room that the checkpoints will take.
        patience: Seconds to wait for another process to leave the folder: one that was told to may need a while.

    Raises:
        UserError: If it cannot be written, another process does, or the disk has too little room.
    """
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder, patience))
            for unfinished in folder.glob(".*.unfinished"):  # of a process that was killed
                unfinished.unlink(missing_ok=True)
            with replacing(folder / "args.yaml") as path:
                path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
            free = shutil.disk_usage(folder).free
        except OSError as e:
            raise UserError(f"Cannot write to {folder} ({e.strerror}); choose another place with --output.") from e
        there = {path.stat().st_ino: path.stat().st_size for path in folder.glob("*.pth.tar")}
        needed_bytes -= sum(there.values())  # they take the places of others
        if free < needed_bytes:
            raise UserError(
                f"The checkpoints of this run need {needed_bytes / 1e9:.2f} GB and {folder} has {free / 1e9:.2f} GB "
                "free; make room, choose another --output, or keep fewer with --checkpoint-hist."
            )
        yield


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


@contextmanager
def save_errors(on_save_error: str) -> Iterator[None]:
    """Let a run go on after a `SaveError` where `--on-save-error` is `continue`."""
    try:
        yield
    except SaveError as e:
        if on_save_error == "stop":
            raise
        _logger.warning(f"{e} As --on-save-error says, the next save tries again.")


def _copied(value: Any) -> Any:
    """The same with tensors of its own on the CPU, to be written while training changes the original."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        new = copy.copy(value)  # a state dict has attributes, too
        new.update((key, _copied(item)) for key, item in value.items())
        return new
    if isinstance(value, list | tuple):
        return type(value)(_copied(item) for item in value)
    return value


def _check_bookkeeping(kept: Any) -> tuple[int, float | None]:
    """Epoch and metric of the save; raises unless all files it names are numbered checkpoints, which may be removed."""
    for name, metric in kept["checkpoint_files"]:
        if not re.fullmatch(r"checkpoint-\d+\.pth\.tar", name) or not isinstance(metric, float | None):
            raise ValueError
    epoch, metric = kept["pending"]
    if not isinstance(epoch, int) or not isinstance(metric, float | None):
        raise TypeError
    if not isinstance(kept["best_epoch"], int | None) or not isinstance(kept["best_metric"], float | None):
        raise TypeError
    return epoch, metric


class RunSaver(CheckpointSaver):
    """timm's checkpoint bookkeeping around files that are whole or not there, written while training goes on.

    A save copies the state, which is what training waits for; one thread writes the copies in their order.

    Args:
        state: What to save.
        folder: Folder of the run.
        config: Name of the model, eval metric, number of checkpoints to keep, and what to do when a save fails.
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
        self.on_save_error = config.on_save_error
        self.recovery_path = folder / RECOVERY
        self.content: dict[str, Any] = {}  # what is being written
        self.thread = ThreadPoolExecutor(1, "saver")
        self.writing: Future | None = None

    def save_within_epoch(self) -> None:
        """Save the state after a batch, in the place of the last one saved so."""
        ended = self.state.epoch - 1
        self._begin(f"batch {self.state.batch}", lambda: self._save(str(self.recovery_path), ended))

    def save_after_epoch(self, epoch: int, metric: float) -> None:
        """Save the state after an epoch as timm does; what was saved within it is not needed any more."""

        def write() -> None:
            self.save_checkpoint(epoch, metric)
            self.recovery_path.unlink(missing_ok=True)

        self._begin(f"epoch {epoch}", write)

    def _begin(self, what: str, write: Callable[[], None]) -> None:
        start = time.perf_counter()
        self.wait()  # for the save before: there is never more than one copy
        content = self._state()
        waited = time.perf_counter() - start

        def work() -> None:
            self.content = content
            try:
                with self._write_errors():
                    write()
            finally:
                self.content = {}
            _logger.debug(f"Saved after {what}: training waited {waited:.2f} s for {time.perf_counter() - start:.2f} s")

        self.writing = self.thread.submit(work)

    def wait(self) -> None:
        """Wait for what is being written.

        Raises:
            SaveError: If it failed and the run is to stop.
        """
        writing, self.writing = self.writing, None
        if writing is not None:
            with save_errors(self.on_save_error):
                writing.result()

    def finish(self) -> None:
        """Wait for the last save of the run, after which there is none that could make up for it.

        Raises:
            SaveError: If it failed.
        """
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Wait for what is being written, and end; raises as `wait` does."""
        try:
            self.wait()
        finally:
            self.thread.shutdown()

    def check(self) -> None:
        """Notice a save that has failed, without waiting for one that is under way; raises as `wait` does."""
        if self.writing is not None and self.writing.done():
            self.wait()

    def continue_from(self, path: str) -> None:
        """Take up the bookkeeping of a run, and finish it where the run was stopped in the middle of it."""
        kept = load_checkpoint_metadata(path).get("saver")
        if kept is None:
            return  # of another program
        try:
            epoch, metric = _check_bookkeeping(kept)
        except (KeyError, TypeError, ValueError) as e:
            raise UserError(
                f"{path} lists the checkpoints of its run in no way of ours; use it with --finetune."
            ) from e
        self.load_state_dict(kept)
        if Path(path).name == RECOVERY:
            return
        if metric is None:
            return
        if self._checkpoint_path(epoch) not in [file for file, _ in self.checkpoint_files]:
            self.save_after_epoch(epoch, metric)
            self.wait()
        with self._write_errors():
            if self.best_epoch == epoch:
                self._duplicate(self._checkpoint_path(epoch), str(Path(self.checkpoint_dir) / "model_best.pth.tar"))
            self.recovery_path.unlink(missing_ok=True)

    @contextmanager
    def _write_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            left = "what was saved before is intact" if os.path.isdir(self.checkpoint_dir) else "the folder is gone"
            raise SaveError(f"Cannot save to {self.checkpoint_dir} ({e.strerror or e}); {left}.") from e

    def _state(self) -> dict[str, Any]:
        state = self.state
        content = {
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
        }
        if state.scheduler is not None:
            content["lr_scheduler"] = scheduler_state(state.scheduler)
        if state.precision.scaler is not None:
            content[state.precision.scaler.state_dict_key] = state.precision.scaler.state_dict()
        return _copied(content)

    def _save(self, save_path: str, epoch: int, metric: float | None = None) -> None:
        content = {"epoch": epoch, **self.content, "saver": self.state_dict(epoch, metric)}
        if metric is not None:
            content["metric"] = metric
        save(content, save_path)

    def _replace(self, src: str, dst: str) -> None:
        os.replace(src, dst)  # timm removes dst first, and a crash in between would lose it

    def _duplicate(self, src: str, dst: str) -> None:
        with replacing(dst) as path:
            path.unlink(missing_ok=True)
            try:
                os.link(src, path)
            except OSError:  # file systems without hard links
                shutil.copyfile(src, path)
