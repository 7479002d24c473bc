"""When a run saves within an epoch, and how it leaves when it is told to."""

import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from vip.training.runtime import Runtime

_logger = logging.getLogger(__name__)

REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, start it again
SIGNALS = ("SIGTERM", "SIGUSR1")  # what Slurm sends before it takes a node away; Windows has no SIGUSR1


class Preempted(Exception):
    """The run was told to leave, and has saved its state; the message is for the user."""


class RecoveryPoints:
    """Decides after which updates a run saves its state, the same way in all processes.

    As a context manager it catches the signals that tell a run to leave.

    Args:
        interval: Batches between saves, 0 for none.
        minutes: Minutes between saves, 0 for none.
        runtime: This process among the others.
        timeout: Seconds to wait for their votes.

    Attributes:
        leaving: Name of the signal that told one of the processes to leave, once all of them know.
    """

    def __init__(self, interval: int, minutes: float, runtime: Runtime, timeout: float = 1800) -> None:
        self.interval, self.minutes, self.runtime = interval, minutes, runtime
        self.leaving = ""
        self.caught = 0  # index in SIGNALS, from 1
        self.saved_at, self.saved_batch = time.monotonic(), 0
        self.vote: tuple[torch.Tensor, Any] | None = None
        # votes are of numbers on the host, and must not wait for a GPU
        self.group: Any = None
        if runtime.distributed:
            self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))

    def __enter__(self) -> "RecoveryPoints":
        self.handlers = _catch_signals(self._catch)
        return self

    def __exit__(self, *error: object) -> None:
        _restore(self.handlers)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self.caught = SIGNALS.index(signal.Signals(number).name) + 1

    def begin_epoch(self, batch: int) -> None:
        """Count batches from here."""
        self.saved_batch = batch

    def due(self, batch: int) -> bool:
        """Whether to save now that `batch` batches of the epoch are done; all processes have to ask at the same ones.

        Processes agree by a vote that each opens at one update and reads at the next, so that none waits for it.
        """
        late, caught = self._wishes() if self.group is None else self._read_vote()
        if caught:
            self.leaving = SIGNALS[caught - 1]
        counted = self.interval > 0 and batch // self.interval > self.saved_batch // self.interval
        save = bool(late or counted or caught)
        if save:
            self.saved_at, self.saved_batch = time.monotonic(), batch
        if self.group is not None:  # after the clock is set anew, or the next vote would ask for the same save again
            ballot = torch.tensor(self._wishes())
            self.vote = ballot, dist.all_reduce(ballot, dist.ReduceOp.MAX, group=self.group, async_op=True)
        return save

    def _wishes(self) -> tuple[int, int]:
        """Whether this process would save by its clock, and which signal it has caught."""
        late = bool(self.minutes) and time.monotonic() - self.saved_at > 60 * self.minutes
        return int(late), self.caught

    def _read_vote(self) -> tuple[int, int]:
        if self.vote is None:
            return 0, 0
        ballot, work = self.vote
        work.wait()
        return int(ballot[0]), int(ballot[1])

    def leave_if_told(self) -> None:
        """Leave where the processes have agreed to.

        Raises:
            Preempted: If one of them was told to.
        """
        if self.leaving:
            raise Preempted(f"Stopped by {self.leaving}; continue with --resume auto.")

    def leave_if_any_is_told(self, save: Callable[[], None] | None = None) -> None:
        """Leave if a process was told to since the last update, as during a validation; all processes have to ask.

        Args:
            save: Saves the state first, where the last save is not of it.

        Raises:
            Preempted: If one was.
        """
        caught = self.caught
        if self.group is not None:
            ballot = torch.tensor([caught])
            dist.all_reduce(ballot, dist.ReduceOp.MAX, group=self.group)
            caught = int(ballot)
        if caught:
            self.leaving = SIGNALS[caught - 1]
            if save is not None:
                save()
        self.leave_if_told()


@contextmanager
def leaving_at_once() -> Iterator[None]:
    """Leave with status `REQUEUE` when told to, where there is nothing to save yet."""

    def leave(number: int, frame: FrameType | None) -> None:
        _logger.warning(f"Stopped by {signal.Signals(number).name} while nothing was trained; start it again.")
        sys.exit(REQUEUE)  # unlike other exceptions, nothing that reads a file takes it for damage

    handlers = _catch_signals(leave)
    try:
        yield
    finally:
        _restore(handlers)


def _catch_signals(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Handle the signals that tell a run to leave; returns the handlers there were."""
    if threading.current_thread() is not threading.main_thread():
        return {}  # Python lets no other thread catch signals
    return {number: signal.signal(number, handler) for name in SIGNALS if (number := getattr(signal, name, None))}


def _restore(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
