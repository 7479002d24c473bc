"""The scripts for Slurm, with an `srun` and an `scontrol` that run everything on this machine."""

import csv
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_command import QUICK

from vip.training.recovery import REQUEUE

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "scripts" / "slurm").glob("*.sbatch"))
EPOCHS = 8

SRUN = f"""#!{sys.executable}
import itertools, os, signal, subprocess, sys
command = list(itertools.dropwhile(lambda word: word.startswith("--"), sys.argv[1:]))
tasks = [subprocess.Popen(command) for _ in range(int(os.environ["SLURM_JOB_NUM_NODES"]))]
signal.signal(signal.SIGUSR1, lambda *_: [task.send_signal(signal.SIGUSR1) for task in tasks])
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """#!/bin/sh
echo "$@" >> "$CALLS"
[ "$1" != show ] || echo localhost
"""


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The environment of a job."""
    for name, content in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    variables = dict(JOB_ID="1234", JOB_NUM_NODES="1", GPUS_ON_NODE="1", SUBMIT_DIR=str(ROOT), JOB_NODELIST="node[1-2]")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environment |= {f"SLURM_{name}": value for name, value in variables.items()}
    environment |= {"CALLS": str(tmp_path / "calls"), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    return environment | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def start(script: str, environment: dict[str, str], *arguments: object) -> subprocess.Popen[str]:
    """What Slurm starts: a copy of the script, from a folder of its own."""
    copy = Path(environment["CALLS"]).parent / "slurm_script"
    copy.write_bytes((ROOT / "scripts" / "slurm" / script).read_bytes())
    argv = ["bash", str(copy), *map(str, arguments)]
    return subprocess.Popen(argv, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True, env=environment)


def preempt(script: str, cluster: dict[str, str], *arguments: object) -> tuple[Path, str]:
    """Start a job and tell it to leave after the first epoch; gives the summary of its run, and its log."""
    folder = Path(cluster["CALLS"]).parent
    summary = folder / "run" / "summary.csv"
    job = start(script, cluster, "run", *arguments, *QUICK, "--epochs", EPOCHS, "--output", folder)
    deadline = time.monotonic() + 300
    while not summary.exists() and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    log = job.communicate(timeout=300)[0]
    assert job.returncode == REQUEUE, log
    assert (folder / "calls").read_text().splitlines()[-1] == "requeue 1234"
    assert 0 < len(epochs(summary)) < EPOCHS
    return summary, log


@pytest.mark.slow
def test_a_job_that_is_preempted_goes_on(cluster: dict[str, str], image_folder: Path) -> None:
    summary, _ = preempt("train.sbatch", cluster, image_folder)
    seen = summary.read_bytes()
    job = start(
        "train.sbatch", cluster, "run", image_folder, *QUICK, "--epochs", EPOCHS, "--output", summary.parents[1]
    )
    log = job.communicate(timeout=300)[0]
    assert job.returncode == 0, log
    assert summary.read_bytes().startswith(seen)
    assert epochs(summary) == list(range(EPOCHS))
    assert Path(cluster["CALLS"]).read_text().count("requeue") == 1


@pytest.mark.slow
def test_two_nodes_are_preempted_together(cluster: dict[str, str], image_folder: Path) -> None:
    _, log = preempt("train_multinode.sbatch", cluster | {"SLURM_JOB_NUM_NODES": "2"}, image_folder)
    assert "2 process(es)" in log


def epochs(summary: Path) -> list[int]:
    with open(summary, newline="") as file:
        return [int(row["epoch"]) for row in csv.DictReader(file)]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_job_is_told_before_it_ends_and_may_start_again(script: Path) -> None:
    options = re.findall(r"^#SBATCH (\S+)$", script.read_text(), re.MULTILINE)
    assert {"--signal=B:USR1@120", "--requeue", "--open-mode=append", "--ntasks-per-node=1"} <= set(options)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_job_without_data_is_a_mistake(script: Path, cluster: dict[str, str]) -> None:
    job = start(script.name, cluster, "run")
    assert job.communicate(timeout=60)[0].startswith("usage: sbatch ")
    assert job.returncode == 2
