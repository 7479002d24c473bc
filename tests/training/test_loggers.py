"""Loggers that are extras."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import quick

from vip.errors import UserError
from vip.training.trainer import train


def test_weights_and_biases_gets_the_configuration_and_a_row_an_epoch(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A stand-in with the functions of wandb that are used, as it needs an account."""
    calls: dict[str, Any] = {"rows": []}

    def init(**options: Any) -> SimpleNamespace:
        calls["init"] = options
        return SimpleNamespace(
            log=lambda values, step: calls["rows"].append((step, values)), finish=lambda: calls.update(finished=True)
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    train(quick(colours, tmp_path, log_wandb=True, wandb_project="colours"))
    assert calls["init"]["project"] == "colours" and calls["init"]["config"]["model"] == "vip_nano4_32"
    assert [step for step, _ in calls["rows"]] == [0, 1] and calls["finished"]
    assert {"train/loss", "eval/top1", "lr", "images_per_second"} <= set(calls["rows"][0][1])


def test_missing_logger_is_said_in_one_line(colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"vision-permutator\[logging\]"):
        train(quick(colours, tmp_path, log_wandb=True))


def test_tensorboard_reads_what_was_written(colours: Path, tmp_path: Path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(quick(colours, tmp_path, log_tensorboard=True))
    events = event_accumulator.EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert [event.step for event in events.Scalars("eval/top1")] == [0, 1]


def test_apex_optimizers_say_what_they_need(colours: Path, tmp_path: Path):
    with pytest.raises(UserError, match="(?i)fusedadamw.*apex"):
        train(quick(colours, tmp_path, opt="fusedadamw"))
