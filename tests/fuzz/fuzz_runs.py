"""Commands run in this process, held to a time, and what their outcome says."""

import contextlib
import dataclasses
import faulthandler
import io
import logging
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
from fuzzed_options import Drawn
from timm.layers import set_fast_norm

import vip.cli
from vip.training import trainer
from vip.training.recovery import RecoveryPoints

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 0))  # of each kind in a long run, drawn anew; 0 for the few of the suite
SECONDS = 120  # that one input may take


class Tallies:
    """A plugin of pytest that prints a row of a table for each kind of input after a long run.

    Attributes:
        counts: Of outcomes, by kind.
    """

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = {}

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for kind, counts in self.counts.items() if EXAMPLES else ():
            numbers = (counts.total(), counts["accepted"], counts["refused"])
            terminalreporter.write_line(f"| {kind} | {' | '.join(f'{n:,}' for n in numbers)} |")


def tally(config: pytest.Config, kind: str) -> Counter[str]:
    """The counts of a kind."""
    plugins = config.pluginmanager
    tallies = plugins.get_plugin("fuzz") or Tallies()
    if not plugins.has_plugin("fuzz"):
        plugins.register(tallies, "fuzz")
    return tallies.counts.setdefault(kind, Counter())


class Hang(BaseException):
    """An input that takes too long; nothing in the library catches it."""


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    """Raise `Hang` after a while; where native code keeps Python from it, end the process with a traceback."""

    def give_up(number: int, frame: Any) -> None:
        raise Hang(f"not done after {SECONDS} s")

    handler = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(SECONDS)
    faulthandler.dump_traceback_later(2 * SECONDS, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        faulthandler.cancel_dump_traceback_later()


def leave_after_an_epoch(recovery: RecoveryPoints, save: Callable[[], None] | None = None) -> None:
    """In the place of `leave_if_any_is_told`: the run is told to after its first epoch, however many are left."""
    if save is None:  # which a validation gives
        recovery.leaving = "SIGTERM"
    recovery.leave_if_told()


@contextlib.contextmanager
def counting_epochs() -> Iterator[Counter[str]]:
    """Count epochs, wait for no disk, and put back what runs change in this process."""
    done: Counter[str] = Counter()
    train_one_epoch = trainer.train_one_epoch

    def counted(*args: Any, **kwargs: Any) -> Any:
        result = train_one_epoch(*args, **kwargs)
        done["epochs"] += 1
        return result

    threshold = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            mock.patch.object(trainer, "train_one_epoch", counted),
            mock.patch.object(RecoveryPoints, "leave_if_any_is_told", leave_after_an_epoch),
            mock.patch("os.fsync", lambda descriptor: None),
        ):
            yield done
    finally:
        logging.disable(threshold)
        set_fast_norm(False)


def run(words: Sequence[str]) -> tuple[int, str, str, int]:
    """Run a command; its status, what it printed to both streams, and the epochs it trained."""
    out, err = io.StringIO(), io.StringIO()
    with counting_epochs() as done, time_limit(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = vip.cli.main(list(words))
        except SystemExit as e:  # of a run that is told to leave
            status = e.code if isinstance(e.code, int) else 1
    return status, out.getvalue(), err.getvalue(), done["epochs"]


def error_line(err: str) -> str:
    """The message of the one line that says what is wrong; anything else fails."""
    lines = err.splitlines()
    errors = [line for line in lines if re.match(r"vip [a-z-]+: error: ", line)]
    assert len(errors) == 1 and lines[-1:] == errors, f"not one line: {err[-2000:]!r}"
    message = errors[0].partition(": error: ")[2]
    assert message and len(message) < 2000, f"{len(message)} characters: {message[:300]!r}"
    return message


def check_that_it_names_an_option(message: str, drawn: Sequence[Drawn], config_class: type) -> None:
    """Check that an error names an option of the command, or says what was given for one of them."""
    names = "|".join(field.name.replace("_", "[-_]") for field in dataclasses.fields(config_class))
    if re.search(rf"(?<![\w-])(--({names})(?![\w-])|({names}) in )", message):
        return
    values = [v for option in drawn for v in (option.value if isinstance(option.value, list) else [option.value])]
    said = [repr(v) in message or (len(str(v)) > 1 and str(v) in message) for v in values]
    assert any(said), f"names no option: {message}"
