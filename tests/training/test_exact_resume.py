"""A run that is stopped, however, ends with the bits it would have ended with."""

import os
import random
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import quick
from exact_runs import assert_same_run, flags_of, run_until
from label_maps import write_maps

import vip.training.engine as engine
import vip.training.trainer as trainer
from vip.errors import UserError
from vip.training.recovery import REQUEUE, RecoveryPoints
from vip.training.runtime import Runtime
from vip.training.saver import RunSaver
from vip.training.trainer import train

RANDOM: dict[str, Any] = dict(
    no_aug=False, aa="rand-m9-mstd0.5-inc1", reprob=0.5, mixup=0.8, cutmix=1.0, smoothing=0.1, drop=0.1, drop_path=0.2,
    model_ema=True, model_ema_decay=0.9, batch_size=4, epochs=3, resume="auto", recovery_interval=1,
)  # fmt: skip
WAYS: dict[str, dict[str, Any]] = {
    "plateau": dict(sched="plateau", patience_epochs=0, grad_accum_steps=2),
    "noise": dict(lr_noise=[0.2, 0.9], sched_on_updates=True, opt="lamb", recovery_interval=2),
    "repeats": dict(aug_repeats=3.0, amp=True, amp_dtype="bfloat16", clip_grad=1.0),
    "float16": dict(amp=True, workers=1, checkpoint_hist=1),
    "token labels": dict(token_label=True, token_label_region="image"),
    "teacher": dict(teacher="of another kind", distill_type="feature", freeze=["patch_embed"]),
}


class Killed(BaseException):
    """As sudden as SIGKILL: nothing catches it."""


@contextmanager
def stopped_at(step: int, monkeypatch: pytest.MonkeyPatch, number: int = 0) -> Iterator[None]:
    """Kill this process, or send it a signal, after so many training steps."""
    real, done = engine.train_step, 0

    def train_step(*args: Any, **kwargs: Any) -> Any:
        nonlocal done
        done += 1
        if done == step and not number:
            raise Killed
        if done == step:
            os.kill(os.getpid(), number)
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "train_step", train_step)
        yield


@pytest.fixture(scope="module", params=WAYS)
def way(request: pytest.FixtureRequest, colours: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    """A way to train, and a run of it that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    options = {**RANDOM, **WAYS[request.param]}
    if "token_label" in options:
        options["token_label_data"] = str(write_maps(colours / "train", folder / "maps"))
    if "teacher" in options:
        options["teacher"] = str(folder / "teacher.pth.tar")
        model = timm.create_model("test_resnet", num_classes=4)
        torch.save({"arch": "test_resnet", "state_dict": model.state_dict()}, options["teacher"])
    train(quick(colours, folder, **options))
    return options, folder / "run"


@pytest.mark.parametrize("seed", range(1))
def test_killed_several_times(way: tuple[dict, Path], seed: int, colours: Path, tmp_path: Path, monkeypatch) -> None:
    options, whole = way
    rng = random.Random(seed)
    config = quick(colours, tmp_path, **options)
    kills = 0
    while kills < 4:
        with stopped_at(rng.randint(1, 12), monkeypatch):
            try:
                train(config)
                break
            except Killed:
                kills += 1
    else:
        train(config)
    assert kills
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_told_to_leave(name: str, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    options = {**RANDOM, **WAYS["plateau"], "recovery_interval": 0, "recovery_minutes": 0.0}
    train(quick(colours, tmp_path, **options, experiment="whole"))
    config = quick(colours, tmp_path, **options)
    handler = signal.getsignal(getattr(signal, name))
    with stopped_at(15, monkeypatch, getattr(signal, name)), pytest.raises(SystemExit) as left:
        train(config)
    assert left.value.code == REQUEUE and f"Stopped by {name}" in caplog.text
    assert signal.getsignal(getattr(signal, name)) == handler
    assert (tmp_path / "run/recovery.pth.tar").exists()
    train(config)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("validation", [1, 4], ids=["plain weights", "averaged weights of the next epoch"])
def test_told_to_leave_while_validating(validation: int, colours: Path, tmp_path: Path, monkeypatch, caplog) -> None:
    """It leaves before the next batch, and the validation is made anew; training is not."""
    options = {**RANDOM, "recovery_interval": 0, "recovery_minutes": 0.0, "validation_batch_size": 4}
    train(quick(colours, tmp_path, **options, experiment="whole"))
    config = quick(colours, tmp_path, **options)
    real, left, asked = engine.evaluate, validation, 0

    def evaluate(*args: Any, stop: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1

        def stop_or_signal() -> bool:
            nonlocal asked
            asked += left == 0
            if asked == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return stop()

        return real(*args, stop=stop_or_signal, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr("vip.training.trainer.evaluate", evaluate)
        train(config)
    assert ended.value.code == REQUEUE and asked == 2
    summary = tmp_path / "run/summary.csv"
    assert (len(summary.read_text().splitlines()) if summary.exists() else 0) == (0 if validation < 3 else 2)
    with stopped_at(1, monkeypatch), pytest.raises(Killed):  # in the epoch after
        caplog.set_level("INFO")
        train(config)
    assert f"at epoch {(validation - 1) // 2}, sample 40" in caplog.text
    train(config)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("where", ["create_split", "open_folder"], ids=["the set-up", "between set-up and training"])
def test_told_to_leave_before_training(where: str, colours: Path, tmp_path: Path, monkeypatch, caplog) -> None:
    config, real = quick(colours, tmp_path), getattr(trainer, where)

    def tell(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGUSR1)
        return real(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(trainer, where, tell)
        train(config)
    assert ended.value.code == REQUEUE and "Stopped by SIGUSR1" in caplog.text
    train(quick(colours, tmp_path, resume="auto"))


@contextmanager
def killed_in(method: str, call: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kill this process at a call of one of the saver's methods."""
    real, left = getattr(RunSaver, method), call

    def kill(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            raise Killed
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(RunSaver, method, kill)
        yield


@pytest.mark.parametrize("moment", ["_duplicate", "_track_checkpoint", "_replace"])
def test_killed_while_saving(moment: str, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**RANDOM, "checkpoint_hist": 2}
    train(quick(colours, tmp_path, **options, experiment="whole"))
    config = quick(colours, tmp_path, **options)
    for call in (1, 2, 3):
        with killed_in(moment, call, monkeypatch):
            try:
                train(config)
            except Killed:
                pass
    train(config)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("moment", ["_duplicate", "_track_checkpoint"])
def test_killed_while_saving_the_last_epoch(moment: str, colours: Path, tmp_path: Path, monkeypatch) -> None:
    options = {**RANDOM, "epochs": 1}
    train(quick(colours, tmp_path, **options, experiment="whole"))
    config = quick(colours, tmp_path, **options)
    with killed_in(moment, 1, monkeypatch), pytest.raises(Killed):
        train(config)
    train(config)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    train(config)  # a scheduler may start what has ended
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_state_is_chosen_by_what_it_holds(colours: Path, tmp_path: Path, caplog) -> None:
    """Copies of a folder have other times."""
    config = quick(colours, tmp_path, **{**RANDOM, "epochs": 3})
    train(config)
    os.utime(tmp_path / "run/checkpoint-0.pth.tar", (2**33, 2**33))
    train(config)
    assert "Nothing is left to train: epoch 3" in caplog.text


@pytest.mark.parametrize(
    "hostile",
    [
        {"checkpoint_files": [("../victim.txt", 0.0)] * 20},
        {"checkpoint_files": [("/victim.txt", 0.0)] * 20},
        {"pending": ("/../../victim.txt", 99.0)},
    ],
    ids=["relative", "absolute", "pending"],
)
def test_files_that_a_checkpoint_names_are_its_own(hostile: dict, colours: Path, tmp_path: Path) -> None:
    """timm removes what a checkpoint lists as older ones."""
    train(quick(colours, tmp_path, **{**RANDOM, "epochs": 1}))
    victim, last = tmp_path / "victim.txt", tmp_path / "run/last.pth.tar"
    victim.write_text("precious")
    content = torch.load(last, weights_only=True)
    content["saver"].update(hostile)
    torch.save(content, last)
    with pytest.raises(UserError, match="lists the checkpoints of its run"):
        train(quick(colours, tmp_path, **{**RANDOM, "epochs": 2}))
    assert victim.read_text() == "precious"


def test_damaged_state_falls_back_to_the_one_before(colours: Path, tmp_path: Path, monkeypatch, caplog) -> None:
    train(quick(colours, tmp_path, **RANDOM, experiment="whole"))
    config = quick(colours, tmp_path, **RANDOM)
    with stopped_at(15, monkeypatch), pytest.raises(Killed):
        train(config)
    recovery = tmp_path / "run/recovery.pth.tar"
    recovery.write_bytes(recovery.read_bytes()[:-5000])
    train(config)
    assert f"{recovery}" in caplog.text and "The state before it is taken." in caplog.text
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_nothing_whole_is_left(colours: Path, tmp_path: Path) -> None:
    config = quick(colours, tmp_path, **{**RANDOM, "epochs": 1})
    train(config)
    for path in (tmp_path / "run").glob("*.pth.tar"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="No checkpoint in .* can be read"):
        train(config)


def test_other_batches_need_to_be_asked_for(colours: Path, tmp_path: Path, monkeypatch, caplog) -> None:
    """40 images in batches of 4: killed after 16 images, the run goes on in batches of 8, 3 to the epoch's end."""
    with stopped_at(5, monkeypatch), pytest.raises(Killed):
        train(quick(colours, tmp_path, **RANDOM))
    other: dict[str, Any] = {**RANDOM, "batch_size": 8}
    with pytest.raises(UserError, match=r"batch_size 4 then, 8 now.*--resume-elastic"):
        train(quick(colours, tmp_path, **other))
    caplog.set_level("INFO")
    caplog.clear()
    train(quick(colours, tmp_path, **other, resume_elastic=True, log_interval=1))
    assert "batch_size 4 then, 8 now" in caplog.text and "not rescaled" in caplog.text
    assert "at epoch 0, sample 16" in caplog.text
    steps = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Epoch 0/2 [")]
    assert [step.partition("]")[0] for step in steps] == ["Epoch 0/2 [1/3", "Epoch 0/2 [2/3", "Epoch 0/2 [3/3"]


@pytest.mark.parametrize("options", [{"lr_base": 1e-3}, {"sched_on_updates": True}], ids=["lr-base", "updates"])
def test_other_batches_rescale_nothing(options: dict, colours: Path, tmp_path: Path, monkeypatch, caplog) -> None:
    """The rate after the change is what the schedule has for that part of the epoch, at the base of before."""
    common: dict[str, Any] = {**RANDOM, **options, "lr_noise": None, "epochs": 4}
    caplog.set_level("INFO")
    with stopped_at(26, monkeypatch), pytest.raises(Killed):  # in the middle of the third epoch
        train(quick(colours, tmp_path, **common, log_interval=1))
    before = rates(caplog)[-1]
    caplog.clear()
    with stopped_at(3, monkeypatch), pytest.raises(Killed):
        train(quick(colours, tmp_path, **{**common, "batch_size": 8}, resume_elastic=True, log_interval=1))
    assert rates(caplog)[0] == pytest.approx(before, rel=0.15)


def rates(caplog: pytest.LogCaptureFixture) -> list[float]:
    lines = [r.getMessage() for r in caplog.records if "] lr " in r.getMessage()]
    return [float(line.partition("] lr ")[2].partition(",")[0]) for line in lines]


def test_other_batches_forget_no_sample(colours: Path, tmp_path: Path, monkeypatch, caplog) -> None:
    """After 12 of 40 images in batches of 4, one batch of 8 is the 20th image, and not the 16th."""
    with stopped_at(4, monkeypatch), pytest.raises(Killed):
        train(quick(colours, tmp_path, **RANDOM))
    other: dict[str, Any] = {**RANDOM, "batch_size": 8, "resume_elastic": True}
    with stopped_at(2, monkeypatch), pytest.raises(Killed):
        train(quick(colours, tmp_path, **other))
    position = torch.load(tmp_path / "run/recovery.pth.tar", weights_only=True)["position"]
    assert (position["samples"], position["batch"]) == (20, 2)
    caplog.set_level("INFO")
    with stopped_at(2, monkeypatch), pytest.raises(Killed):
        train(quick(colours, tmp_path, **other))
    assert "at epoch 0, sample 20" in caplog.text
    position = torch.load(tmp_path / "run/recovery.pth.tar", weights_only=True)["position"]
    assert (position["samples"], position["batch"]) == (28, 3), "also where the batches were the same as before"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 10**15}, "of other data"),
        ({"samples": -8, "batch": -1}, "what cannot be"),
        ({"batch": 3}, "what cannot be"),
        ({"epoch": -5}, "before the first"),
    ],
    ids=str,
)
def test_places_that_cannot_be(changes: dict, message: str, colours: Path, tmp_path: Path, monkeypatch) -> None:
    with stopped_at(2, monkeypatch), pytest.raises(Killed):
        train(quick(colours, tmp_path, **RANDOM))
    path = tmp_path / "run/recovery.pth.tar"
    content = torch.load(path, weights_only=True)
    content["position"].update({name: value for name, value in changes.items() if name != "epoch"})
    torch.save({**content, "epoch": changes.get("epoch", -1)}, path)
    with pytest.raises(UserError, match=message):
        train(quick(colours, tmp_path, **RANDOM))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["", "reduce"])
def test_batch_norm_of_two_processes(mode: str, colours: Path, tmp_path: Path) -> None:
    """Each process has statistics of its own, and the state is the first one's; stopped before a validation, too."""
    flags = ["-b", "4", "--model", "test_resnet", "--img-size", "32", "--recovery-interval", "2", "--epochs", "2"]
    flags += ["--dist-bn", mode, "--model-ema-decay", "0.9"]
    start = ["./distributed_train.sh", "2", str(colours)]
    assert run_until(-1, [*start, *flags_of(tmp_path, "whole", *flags)]) == 0
    argv = [*start, *flags_of(tmp_path, "run", *flags)]
    assert [run_until(line, argv, signal.SIGTERM) for line in (3, 2)] == [REQUEUE, REQUEUE]
    assert run_until(-1, argv) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_processes_vote_once_for_each_save(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that is late at the third update, and a vote that is read one update later."""
    now = [0.0]
    monkeypatch.setattr("vip.training.recovery.time.monotonic", lambda: now[0])
    monkeypatch.setattr("vip.training.recovery.dist.new_group", lambda **kwargs: "group")

    class Work:
        def wait(self) -> None:
            pass

    monkeypatch.setattr("vip.training.recovery.dist.all_reduce", lambda *args, **kwargs: Work())
    points = RecoveryPoints(0, 1.0, Runtime(torch.device("cpu"), world_size=2))
    due = []
    for batch in range(1, 9):
        now[0] += 25
        due.append(points.due(batch))
    assert due == [False, False, False, True, False, False, False, True]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_loader_processes_outlive_a_signal_to_the_whole_group(number: int, colours: Path, tmp_path: Path) -> None:
    argv = [sys.executable, "train.py", str(colours), *flags_of(tmp_path, "run", "-b", "8")]
    assert run_until(2, argv, number, group=True) == REQUEUE
    assert (tmp_path / "run/recovery.pth.tar").exists()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_sigkill(processes: int, colours: Path, tmp_path: Path) -> None:
    """Whole process groups are killed at random steps, alone and under torchrun."""
    start = [sys.executable, "train.py"] if processes == 1 else ["./distributed_train.sh", str(processes)]
    maps = write_maps(colours / "train", tmp_path / "maps")
    flags = ["-b", str(8 // processes), "--token-label", "--token-label-data", str(maps), "--mixup", "0.8"]
    assert run_until(-1, [*start, str(colours), *flags_of(tmp_path, "whole", *flags)]) == 0
    rng = random.Random(processes)
    argv = [*start, str(colours), *flags_of(tmp_path, "run", *flags)]
    statuses = [run_until(rng.randint(1, 6), argv, number) for number in (signal.SIGKILL, signal.SIGTERM)]
    assert statuses == [-signal.SIGKILL, REQUEUE]
    assert run_until(-1, argv) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")
