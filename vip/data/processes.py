"""A map in several processes that no item can stop, neither by a crash nor by taking forever."""

import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

ResultT = TypeVar("ResultT")

_FORK = multiprocessing.get_context("fork")  # as torch's loaders do: a million file names are shared, and not sent


@dataclass(frozen=True)
class Lost:
    """In the place of a result: its process ended, or had to be ended.

    Attributes:
        reason: How, for a message.
    """

    reason: str


def map_in_processes(
    function: Callable[[int], ResultT],
    count: int,
    processes: int,
    seconds: float = 60.0,
    chunk: int = 32,
) -> Generator[tuple[int, ResultT | Lost], None, None]:
    """Apply a function to 0, 1, ... `count` - 1 in several processes.

    Processes are given chunks. One that crashes or takes too long is replaced, and its chunk done again one by one,
    so that only what crashes or hangs by itself is lost.

    Args:
        function: May crash and hang; an exception in it is printed and counts as a crash.
        count: Number of items.
        processes: Number of processes.
        seconds: Time for a chunk, and for an item done by itself.
        chunk: Items of a chunk.

    Yields:
        Each number once, in any order, and its result. Closing the iterator ends the processes.
    """
    waiting: deque[Sequence[int]] = deque(range(i, min(i + chunk, count)) for i in range(0, count, chunk))
    workers: list[_Worker[ResultT]] = []
    try:
        while waiting or workers:
            while waiting and len(workers) < processes:
                with _interrupted_later():
                    workers.append(_Worker(function))
                workers[-1].give(waiting.popleft(), seconds)
            wait([worker.connection for worker in workers], max(0, min(w.deadline for w in workers) - time.monotonic()))
            for worker in [worker for worker in workers if worker.is_due()]:
                results = worker.take()
                if not isinstance(results, Lost):
                    yield from zip(worker.items, results, strict=True)
                elif len(worker.items) == 1:
                    yield worker.items[0], results
                else:
                    waiting.extendleft([i] for i in reversed(worker.items))
                if waiting and not isinstance(results, Lost):
                    worker.give(waiting.popleft(), seconds)
                else:
                    workers.remove(worker)
                    worker.end()
    finally:
        for worker in workers:
            worker.end()


class _Worker(Generic[ResultT]):
    """A process that works on a chunk at a time."""

    def __init__(self, function: Callable[[int], ResultT]) -> None:
        self.connection, theirs = _FORK.Pipe()
        self.process = _FORK.Process(target=_work, args=(function, theirs, self.connection), daemon=True)
        self.process.start()
        theirs.close()  # the process now holds the only copy, and reading fails when it ends

    def give(self, items: Sequence[int], seconds: float) -> None:
        self.items, self.seconds, self.deadline = items, seconds, time.monotonic() + seconds
        with suppress(BrokenPipeError):  # that the process has ended is seen when its results are read
            self.connection.send(items)

    def is_due(self) -> bool:
        return self.connection.poll() or time.monotonic() > self.deadline

    def take(self) -> list[ResultT] | Lost:
        if not self.connection.poll():
            return Lost(f"takes longer than {self.seconds:g} seconds")
        try:
            return self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            status = self.process.exitcode or 0
            how = signal.Signals(-status).name if status < 0 else f"status {status}"
            return Lost(f"ends its process ({how})")

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


@contextmanager
def _interrupted_later() -> Iterator[None]:
    """Put Ctrl-C off: during a fork it would be raised in one of Python's own hooks, and be lost there."""
    caught: list[Any] = []
    handler = signal.signal(signal.SIGINT, lambda *args: caught.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if caught and callable(handler):
        handler(*caught[0])


def _work(function: Callable[[int], ResultT], connection: Connection, parents: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, too, which then ends this process
    parents.close()  # or reading would never fail: this process would itself keep the other end open
    while True:
        try:
            items = connection.recv()
        except (EOFError, ConnectionError):  # the parent has ended
            return
        results = [function(i) for i in items]
        with suppress(BrokenPipeError):
            connection.send(results)
