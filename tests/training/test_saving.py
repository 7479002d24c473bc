"""Saving: off the training thread, whole or not at all, and what happens where it fails."""

import logging
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import quick

import vip.training.trainer as trainer_module
from vip.errors import UserError
from vip.reporting.logs import log_to_file
from vip.reporting.summary import Summary
from vip.training.recovery import RecoveryPoints
from vip.training.saver import open_folder
from vip.training.trainer import Trainer, train

resource_limits = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limits of file sizes")


@contextmanager
def quota(size: int) -> Iterator[None]:
    """No file of this process can grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def at_epoch(monkeypatch: pytest.MonkeyPatch, actions: dict[int, Callable[[], object]]) -> None:
    """Do something before the validation of an epoch."""
    real = Trainer._evaluate_epoch

    def evaluate(self: Trainer, epoch: int, outputs: Any) -> dict[str, float]:
        actions.get(epoch, lambda: None)()
        return real(self, epoch, outputs)

    monkeypatch.setattr(Trainer, "_evaluate_epoch", evaluate)


def epoch_of(path: Path) -> int:
    return torch.load(path, weights_only=True)["epoch"]


@resource_limits
def test_full_disk_stops_with_a_message_and_the_state_before(colours: Path, tmp_path: Path, monkeypatch) -> None:
    with quota(2**40):
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        at_epoch(monkeypatch, {1: lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit))})
        with pytest.raises(
            UserError, match=rf"Cannot save to {tmp_path / 'run'} \(File too large\); what was saved before is intact"
        ):
            train(quick(colours, tmp_path, epochs=3))
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert not {name for name in files if "unfinished" in name or "tmp" in name}
    assert all(epoch_of(path) == 0 for path in (tmp_path / "run").glob("*.pth.tar"))
    monkeypatch.undo()
    train(quick(colours, tmp_path, epochs=3, resume="auto"))
    assert epoch_of(tmp_path / "run/last.pth.tar") == 2


@resource_limits
def test_full_disk_lets_the_run_go_on_when_asked_to(colours: Path, tmp_path: Path, monkeypatch, caplog) -> None:
    train(quick(colours, tmp_path, epochs=4, experiment="whole"))
    with quota(2**40):
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        sizes = {1: 100, 2: 100_000, 3: 2**40}
        actions = {e: partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, limit)) for e, size in sizes.items()}
        at_epoch(monkeypatch, actions)
        train(quick(colours, tmp_path, epochs=4, on_save_error="continue"))
    warnings = [record.getMessage() for record in caplog.records if "the next save tries again" in record.getMessage()]
    assert sum("Cannot save" in text for text in warnings) == 2 and len(warnings) >= 3, "two checkpoints and a result"
    weights = [
        torch.load(tmp_path / name / "last.pth.tar", weights_only=True)["state_dict"] for name in ("run", "whole")
    ]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    epochs = [line.partition(",")[0] for line in (tmp_path / "run/summary.csv").read_text().splitlines()]
    assert epochs == ["epoch", "0", "1", "2", "3"], "also those that could not be written at first"


@pytest.mark.parametrize("choice", ["stop", "continue"])
def test_vanished_folder(choice: str, colours: Path, tmp_path: Path, monkeypatch, caplog) -> None:
    at_epoch(monkeypatch, {1: lambda: shutil.rmtree(tmp_path / "run")})
    config = quick(colours, tmp_path, epochs=3, on_save_error=choice)
    with pytest.raises(UserError, match="No such file or directory.*; the folder is gone|Cannot write the results"):
        train(config)  # a run whose last save failed has not succeeded
    assert ("the next save tries again" in caplog.text) == (choice == "continue")
    assert caplog.text.count("the next save tries again") == (3 if choice == "continue" else 0), "it trained on"


def test_failed_save_is_noticed_before_the_next(colours: Path, tmp_path: Path, monkeypatch) -> None:
    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    steps = []
    real = RecoveryPoints.due
    monkeypatch.setattr(RecoveryPoints, "due", lambda self, batch: steps.append(batch) or real(self, batch))
    monkeypatch.setattr("vip.files.torch.save", fail)
    monkeypatch.setattr("vip.training.saver.RunSaver.save_after_epoch", lambda *args: pytest.fail("too late"))
    with pytest.raises(UserError, match="No space left"):
        train(quick(colours, tmp_path, batch_size=2, recovery_interval=3))
    assert len(steps) < 20


def test_training_goes_on_while_a_copy_is_written(colours: Path, tmp_path: Path, monkeypatch) -> None:
    """A save is held back while the weights change: it writes those of its own moment."""
    trainer = Trainer(quick(colours, tmp_path, model_ema=True), trainer_module.setup_runtime("cpu"))
    go, real = threading.Event(), torch.save

    def save(*args: Any) -> None:
        assert go.wait(30) and threading.current_thread() is not threading.main_thread()
        real(*args)

    monkeypatch.setattr("vip.files.torch.save", save)
    weights = trainer.state.task.get_trainable_module().state_dict()
    before = {name: value.clone() for name, value in weights.items()}
    with trainer._outputs() as outputs:
        assert outputs is not None
        outputs.saver.save_within_epoch()
        with torch.no_grad():
            for value in weights.values():
                value.zero_()
        assert not (tmp_path / "run/recovery.pth.tar").exists()
        go.set()
        outputs.saver.wait()
    saved = torch.load(tmp_path / "run/recovery.pth.tar", weights_only=True)
    assert saved["state_dict"].keys() == before.keys() and saved["state_dict"]._metadata
    assert all(torch.equal(value, before[name]) for name, value in saved["state_dict"].items())


LOCK = (
    "import fcntl as l, sys; f = open(sys.argv[1], 'ab'); l.lockf(f, l.LOCK_EX); print('locked', flush=True); input()"
)


@resource_limits
def test_second_run_in_a_folder_waits_and_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    with open_folder(folder, {}, 0):
        pass
    argv = [sys.executable, "-c", LOCK, str(folder / ".lock")]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match=f"Another process works in {folder}"), open_folder(folder, {}, 0, 0.1):
            pass
        threading.Timer(1, other.kill).start()
        with open_folder(folder, {}, 0):  # as soon as the other has ended
            pass


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".last.pth.tar.unfinished").write_bytes(b"half")
    with open_folder(folder, {"lr": 1}, 0):
        pass
    assert {path.name for path in folder.iterdir()} == {".lock", "args.yaml"}


@pytest.mark.parametrize("moment", ["update_summary", "trim_summary"])
def test_summary_is_never_half_written(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = Summary(tmp_path, 0, {})
    for epoch in range(3):
        summary.write(epoch, {"loss": 1.0}, {"top1": 2.0})
    before = (tmp_path / "summary.csv").read_bytes()

    def half(*args: Any, **kwargs: Any) -> None:
        path = next(arg for arg in args if isinstance(arg, str))
        Path(path).write_text("epo")
        raise KeyboardInterrupt

    monkeypatch.setattr(f"vip.reporting.summary.{moment}", half)
    with pytest.raises(KeyboardInterrupt):
        Summary(tmp_path, 2, {}).write(2, {"loss": 1.0}, {"top1": 2.0})
    after = (tmp_path / "summary.csv").read_bytes()
    assert after == (before if moment == "trim_summary" else before[: before.rindex(b"\n2,") + 1])


@resource_limits
def test_log_that_cannot_be_written_says_so_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with log_to_file(tmp_path / "train.log"), quota(10):
        for _ in range(3):
            logging.getLogger("vip").warning("a line that is longer than that")
    said = capsys.readouterr().err
    assert said.count("Cannot write") == 1 and "Traceback" not in said
