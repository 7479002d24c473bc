"""A process, or a file, that is lost ends the run with its name, or the run goes on without a difference."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import timm
import torch
from conftest import write_colours
from exact_runs import ROOT, assert_same_run, flags_of

import vip  # noqa: F401  registers the models

ENV = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in /proc")


def start(*command: object, **env: str) -> subprocess.Popen[str]:
    argv = [str(c) for c in command]
    return subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, env={**ENV, **env}, cwd=ROOT)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def rank_of(pid: int) -> str:
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((v.decode().partition("=")[2] for v in variables if v.startswith(b"RANK=")), "")


def read_until(process: subprocess.Popen[str], text: str, count: int = 1) -> None:
    """Read the log until so many lines hold a text."""
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        count -= text in line
        if not count:
            return
    raise AssertionError("".join(seen))


def signal_rank(launcher: int, rank: int, number: int) -> None:
    [pid] = [pid for pid in children(launcher) if rank_of(pid) == str(rank)]
    os.kill(pid, number)


@needs_proc
@pytest.mark.slow
def test_torchrun_restarts_and_nothing_differs(colours: Path, tmp_path: Path) -> None:
    """One of two processes is killed, twice; the group starts again from what was saved."""
    command = ["./distributed_train.sh", 2, colours]
    assert start(*command, *flags_of(tmp_path, "whole", "-b", "4")).wait() == 0
    run = start(*command, *flags_of(tmp_path, "run", "-b", "4"), MAX_RESTARTS="3")
    for rank, steps in ((1, 2), (0, 3)):
        read_until(run, "] lr", steps)
        signal_rank(run.pid, rank, signal.SIGKILL)
        read_until(run, "Resuming")
    _, log = run.communicate()
    assert run.returncode == 0, log
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_restarts_without_resume_are_refused(colours: Path, tmp_path: Path) -> None:
    run = start("./distributed_train.sh", 1, colours, "--device", "cpu", "--output", tmp_path, MAX_RESTARTS="1")
    _, log = run.communicate()
    assert run.returncode == 2 and "--resume auto" in log and "Traceback" not in log
    assert not list(tmp_path.iterdir())


@needs_proc
@pytest.mark.parametrize("rank", [0, 1])
def test_process_that_hangs_is_named(rank: int, colours: Path, tmp_path: Path) -> None:
    flags = flags_of(tmp_path, "run", "-b", "4", "-j", "0", "--dist-timeout", "20", "--epochs", "100")
    run = start("./distributed_train.sh", 2, colours, *flags)
    read_until(run, "] lr", 3)
    signal_rank(run.pid, rank, signal.SIGSTOP)
    _, log = run.communicate(timeout=240)
    assert run.returncode == 2, log
    says = f"Process {1 - rank} lost the others in epoch "
    assert says in log and f"process {rank}" in log.partition(says)[2].partition("does not answer")[0], log
    assert "--dist-timeout" in log and "Traceback" not in log


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    """A training image that is a pipe: whoever reads it waits for ever."""
    root = write_colours(tmp_path / "data", 8, 4)
    path = root / "train/green/1.png"
    path.unlink()
    os.mkfifo(path)
    return path


@pytest.mark.parametrize("command", ["train", "validate"])
def test_loader_that_stalls_names_the_file(command: str, pipe: Path, tmp_path: Path) -> None:
    data = pipe.parents[2]
    flags = ["--device", "cpu", "--model", "vip_nano4_32", "-b", "4", "-j", "1", "--loader-timeout", "3"]
    if command == "train":
        flags += ["--output", str(tmp_path)]
    else:
        torch.save(timm.create_model("vip_nano4_32", num_classes=4).state_dict(), tmp_path / "weights.pth")
        flags += ["--split", "train", "--checkpoint", str(tmp_path / "weights.pth")]
    run = start(sys.executable, f"{command}.py", data, *flags)
    _, log = run.communicate(timeout=240)
    assert run.returncode == 2
    assert f"was reading {pipe}" in log and "--loader-timeout" in log and "Traceback" not in log


@needs_proc
def test_loader_process_that_dies_names_the_file(pipe: Path, tmp_path: Path) -> None:
    flags = ["--device", "cpu", "--model", "vip_nano4_32", "-b", "4", "-j", "1", "--output", tmp_path]
    run = start(sys.executable, "train.py", pipe.parents[2], *flags)
    writer = None
    while writer is None:
        assert run.poll() is None
        time.sleep(0.1)
        with suppress(OSError):  # while nobody reads
            writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    [worker] = children(run.pid)
    os.kill(worker, signal.SIGKILL)
    _, log = run.communicate(timeout=240)
    os.close(writer)
    assert run.returncode == 2
    assert "Process 0 lost a loader process, which " in log, log
    assert f"loader process {worker} was reading {pipe}" in log and "Traceback" not in log


@needs_proc
def test_error_ends_the_loader_processes_too(colours: Path, tmp_path: Path) -> None:
    """A worker that multiprocessing's one SIGTERM does not end must not keep the run from ending."""
    code = (
        "import resource, signal, sys, vip.cli, vip.cli.train\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, -1))\n"
        "keep = []\n"
        "import torch.utils.data.dataloader as d\n"
        "init = d._MultiProcessingDataLoaderIter.__init__\n"
        "d._MultiProcessingDataLoaderIter.__init__ = lambda self, *a: (keep.append(self), init(self, *a))[1]\n"
        "sys.exit(vip.cli.run('train.py', vip.cli.train.main))\n"
    )
    flags = flags_of(tmp_path, "run", "-b", "8")
    run = start(sys.executable, "-c", code, colours, *flags)
    _, log = run.communicate(timeout=200)
    assert run.returncode == 2 and "Cannot save" in log, log
