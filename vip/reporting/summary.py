"""Per-epoch results of a run: timm's `summary.csv`, its speed, and TensorBoard and Weights & Biases on request."""

import csv
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from timm.utils import trim_summary, update_summary

from vip.errors import SaveError, UserError
from vip.files import replacing


class Summary:
    """Writes a row an epoch.

    Args:
        folder: Folder of the run.
        start_epoch: Rows from this epoch on are removed: they are about to be written again.
        config: Shown by Weights & Biases.
        tensorboard: Write TensorBoard files into the folder.
        wandb: Log to Weights & Biases.
        wandb_project: Its project.

    Raises:
        UserError: If a logger that is asked for is not installed.
    """

    def __init__(
        self,
        folder: Path,
        start_epoch: int,
        config: dict[str, Any],
        tensorboard: bool = False,
        wandb: bool = False,
        wandb_project: str | None = None,
    ) -> None:
        self.metrics = _EpochFile(folder / "summary.csv", start_epoch)
        self.speed = _EpochFile(
            folder / "speed.csv", start_epoch
        )  # by itself, as what it holds is never the same again
        self.tensorboard = self.wandb = None
        try:
            if tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self.tensorboard = SummaryWriter(str(folder), purge_step=start_epoch)
            if wandb:
                import wandb as wandb_module

                self.wandb = wandb_module.init(
                    project=wandb_project, name=folder.name, dir=str(folder), config=config, resume="allow"
                )
        except ImportError as e:
            raise UserError(f"{e}; pip install 'vision-permutator[logging]', or log less.") from e

    def write(
        self,
        epoch: int,
        train: dict[str, float],
        evaluation: dict[str, float],
        lr: float | None = None,
        speed: dict[str, float] | None = None,
    ) -> None:
        """Write the results of an epoch, and its speed.

        Raises:
            SaveError: If they cannot be written.
        """
        self.metrics.write(epoch, train, evaluation, lr)
        if speed:
            self.speed.write(epoch, speed, {}, None)
        values = {
            **{f"train/{k}": v for k, v in train.items()},
            **{f"eval/{k}": v for k, v in evaluation.items()},
            **({} if lr is None else {"lr": lr}),
            **(speed or {}),
        }
        if self.tensorboard is not None:
            with self.metrics.errors():
                for name, value in values.items():
                    self.tensorboard.add_scalar(name, value, epoch)
                self.tensorboard.flush()
        if self.wandb is not None:
            self.wandb.log(values, step=epoch)

    def close(self) -> None:
        """Finish the loggers."""
        if self.tensorboard is not None:
            with suppress(OSError):  # of which the write before has told
                self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()


class _EpochFile:
    """A CSV file with a row for each epoch, those from `start_epoch` on removed, which is never there half written."""

    def __init__(self, path: Path, start_epoch: int) -> None:
        self.path = path
        self.unwritten: list[tuple[Any, ...]] = []  # where an epoch before could not be written
        if path.exists():
            self._rewrite(lambda file: trim_summary(file, start_epoch))

    def write(self, epoch: int, train: dict[str, float], evaluation: dict[str, float], lr: float | None) -> None:
        self.unwritten.append((epoch, train, evaluation, lr))
        self._rewrite(self._add_rows)
        self.unwritten.clear()

    def _add_rows(self, file: str) -> None:
        for epoch, train, evaluation, lr in self.unwritten:
            update_summary(epoch, train, evaluation, file, lr=lr)

    def _rewrite(self, change: Callable[[str], None]) -> None:
        """Change a copy of the file, which takes its place; timm would write into it."""
        with self.errors(), replacing(self.path) as unfinished:
            unfinished.write_bytes(self.path.read_bytes() if self.path.exists() else b"")
            change(str(unfinished))

    @contextmanager
    def errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, csv.Error) as e:  # the latter two where the file holds something else
            reason = getattr(e, "strerror", None) or e
            raise SaveError(f"Cannot write the results to {self.path.parent} ({reason}).") from e
