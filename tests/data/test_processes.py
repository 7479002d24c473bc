"""A map in processes that crash, hang and are interrupted."""

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vip.data.processes import Lost, map_in_processes


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    yield
    assert multiprocessing.active_children() == []


def square_unless(what: Callable[[], object], *numbers: int) -> Callable[[int], int]:
    def function(number: int) -> int:
        if number in numbers:
            what()
        return number * number

    return function


def crash() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(1000)


def alive(pid: int) -> bool:
    """Whether a process still runs; one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 100), st.integers(1, 4), st.integers(1, 40))
def test_every_number_once(count: int, processes: int, chunk: int) -> None:
    results = list(map_in_processes(lambda number: number * number, count, processes, chunk=chunk))
    assert len(results) == count and dict(results) == {number: number * number for number in range(count)}


def test_the_work_is_shared() -> None:
    def work(number: int) -> int:
        time.sleep(0.05)
        return os.getpid()

    pids = [pid for _, pid in map_in_processes(work, 24, 3, chunk=2)]
    assert len(set(pids)) == 3 and os.getpid() not in pids


def test_results_larger_than_a_pipe() -> None:
    results = dict(map_in_processes(lambda number: bytes([number]) * 2**20, 12, 3, chunk=4))
    assert all(results[number] == bytes([number]) * 2**20 for number in range(12))


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 40), st.sets(st.integers(0, 39), max_size=4), st.integers(1, 3), st.integers(1, 16))
def test_only_what_crashes_is_lost(count: int, bad: set[int], processes: int, chunk: int) -> None:
    results = list(map_in_processes(square_unless(crash, *bad), count, processes, chunk=chunk))
    expected = {i: Lost("ends its process (SIGKILL)") if i in bad else i * i for i in range(count)}
    assert len(results) == count and dict(results) == expected


def test_a_process_that_ends_by_itself() -> None:
    results = dict(map_in_processes(square_unless(lambda: os._exit(3), 5), 20, 2, chunk=4))
    assert results == {i: Lost("ends its process (status 3)") if i == 5 else i * i for i in range(20)}


def test_an_exception_is_printed(capfd: pytest.CaptureFixture) -> None:
    results = dict(map_in_processes(square_unless(lambda: 1 / 0, 5), 20, 2, chunk=1))
    assert results == {i: Lost("ends its process (status 1)") if i == 5 else i * i for i in range(20)}
    assert capfd.readouterr().err.count("ZeroDivisionError") == 1


def test_only_what_hangs_is_lost() -> None:
    start = time.monotonic()
    results = dict(map_in_processes(square_unless(hang, 3, 17), 20, 2, seconds=2, chunk=8))
    assert results == {i: Lost("takes longer than 2 seconds") if i in (3, 17) else i * i for i in range(20)}
    assert time.monotonic() - start < 20


def test_a_chunk_that_takes_too_long_is_done_one_by_one() -> None:
    """The limit is one for an item, so many slow ones are no mistake."""

    def slow(number: int) -> int:
        time.sleep(0.2)
        return number

    assert dict(map_in_processes(slow, 8, 1, seconds=1, chunk=8)) == {i: i for i in range(8)}


def test_a_slow_reader_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results that lie there finished are taken, however long ago their time was up."""
    iterator = map_in_processes(lambda number: (tmp_path / str(number)).touch(), 3, 3, chunk=1)
    first, _ = next(iterator)
    wait_until(lambda: len(list(tmp_path.iterdir())) == 3)
    time.sleep(0.5)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 1000)
    assert dict(iterator) == {number: None for number in range(3) if number != first}


def test_closing_ends_busy_processes_at_once() -> None:
    iterator = map_in_processes(square_unless(hang, 1, 2), 3, 3, chunk=1)
    assert next(iterator) == (0, 0)
    children = multiprocessing.active_children()
    assert len(children) >= 2
    start = time.monotonic()
    iterator.close()
    assert time.monotonic() - start < 5 and not any(child.is_alive() for child in children)


def test_processes_end_with_a_killed_parent(tmp_path: Path) -> None:
    def work(number: int) -> None:
        (tmp_path / str(os.getpid())).touch()
        time.sleep(0.05)

    parent = multiprocessing.get_context("fork").Process(target=lambda: list(map_in_processes(work, 10**5, 3)))
    parent.start()
    wait_until(lambda: len(list(tmp_path.iterdir())) == 3)
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert all(map(alive, pids))
    os.kill(parent.pid or 0, signal.SIGKILL)
    parent.join()
    with contextlib.suppress(AssertionError):
        wait_until(lambda: not any(map(alive, pids)))
    left = [pid for pid in pids if alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left
