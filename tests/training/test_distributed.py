"""Several processes against one, through the scripts that a user starts."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from label_maps import write_maps

ROOT = Path(__file__).parents[2]
OPTIONS = (
    "--model vip_nano4_32 --device cpu -j 0 --epochs 2 --warmup-epochs 0 --cooldown-epochs 0 --lr 1e-3 --no-aug "
    "--mixup 0 --cutmix 0 --drop-path 0 --smoothing 0 --log-interval 1"
).split()


def start(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        env.pop(name, None)
    return subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, timeout=300, env=env, cwd=ROOT, check=False
    )


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "summary.csv", newline="") as file:
        return list(csv.DictReader(file))


def losses(folder: Path) -> list[float]:
    """The loss of each batch as the log has it, and of each epoch at full precision."""
    lines = (folder / "train.log").read_text().splitlines()
    steps = [float(line.partition("loss ")[2].partition(",")[0]) for line in lines if " Epoch " in line]
    return steps + [float(row["train_loss"]) for row in rows(folder)]


def train_alone(colours: Path, output: Path, *flags: object) -> Path:
    done = start(sys.executable, "train.py", colours, *OPTIONS, *flags, "--output", output, "--experiment", "run")
    assert done.returncode == 0, done.stderr
    return output / "run"


@pytest.fixture(scope="module")
def one_process(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_alone(colours, tmp_path_factory.mktemp("one"), "-b", 16)


def assert_same_run(ours: Path, theirs: Path) -> None:
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-5, abs=1e-4)
    for row, other in zip(rows(ours), rows(theirs), strict=True):
        assert float(row["train_loss"]) == pytest.approx(float(other["train_loss"]), rel=1e-5)
        assert float(row["eval_loss"]) == pytest.approx(float(other["eval_loss"]), rel=1e-5)
        assert row["eval_top1"] == other["eval_top1"]


@pytest.mark.parametrize("extra", ["", "--torchcompile eager"])
def test_two_processes_train_as_one_does(colours: Path, one_process: Path, tmp_path: Path, extra: str):
    flags = ("-b", 8, *extra.split(), "--output", tmp_path, "--experiment", "run")
    done = start(ROOT / "distributed_train.sh", 2, colours, *OPTIONS, *flags)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "run", one_process)


def test_two_processes_accumulate_and_average_weights_as_one_does(colours: Path, tmp_path: Path):
    flags = ("--grad-accum-steps", 2, "--model-ema", "--model-ema-decay", 0.5)
    alone = train_alone(colours, tmp_path / "one", "-b", 8, *flags)
    together = ("-b", 4, *flags, "--output", tmp_path / "two", "--experiment", "run")
    done = start(ROOT / "distributed_train.sh", 2, colours, *OPTIONS, *together)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "two" / "run", alone)


def test_two_processes_train_with_token_labels_as_one_does(colours: Path, tmp_path: Path):
    maps = write_maps(colours / "train", tmp_path / "maps")
    flags = ("--token-label", "--token-label-data", maps, "--token-label-size", 4, "--token-label-region", "image")
    flags += ("--mix-token", 0, "--model-ema", "--model-ema-decay", 0.5)  # each process would draw boxes of its own
    alone = train_alone(colours, tmp_path / "one", "-b", 16, *flags)
    together = ("-b", 8, *flags, "--output", tmp_path / "two", "--experiment", "run")
    done = start(ROOT / "distributed_train.sh", 2, colours, *OPTIONS, *together)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "two" / "run", alone)


def test_published_token_labeling_command_runs_with_fewer_processes(colours: Path, tmp_path: Path):
    """The command for LV-ViT of the published README, on a small model, batch and number of epochs."""
    maps = write_maps(colours / "train", tmp_path / "maps")
    published = ("--apex-amp", "--drop-path", 0.1, "--token-label", "--token-label-data", maps, "--model-ema")
    small = ("--model", "lvvit_nano4_32", "-b", 8, "--img-size", 32, "--token-label-size", 8, "--epochs", 2, "-j", 1)
    short = ("--warmup-epochs", 0, "--cooldown-epochs", 0, "--output", tmp_path / "output")
    done = start(ROOT / "distributed_train.sh", 2, colours, *published, *small, *short)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Label maps of 6x6 cells, 2 classes each, for 8x8 tokens") == 1
    (folder,) = (tmp_path / "output").iterdir()
    checked = start("bash", ROOT / "eval.sh", colours / "val", folder, "--device", "cpu", "-j", 0)
    assert checked.returncode == 0 and "lvvit_nano4_32: top-1" in checked.stdout


@pytest.mark.parametrize("processes", [2, 3])
def test_validation_counts_every_image_once(colours: Path, one_process: Path, processes: int):
    launch = (sys.executable, "-m", "vip.cli.launch", "--standalone", f"--nproc-per-node={processes}")
    arguments = (colours, "--checkpoint", one_process / "last.pth.tar", "--device", "cpu", "-j", 0, "-b", 4)
    alone = start(sys.executable, "validate.py", *arguments)
    together = start(*launch, "validate.py", *arguments)
    assert alone.returncode == together.returncode == 0, together.stderr
    expected, result = (json.loads(done.stdout.partition("--result\n")[2]) for done in (alone, together))
    assert result["count"] == expected["count"] == 13
    assert (result["correct1"], result["correct5"]) == (expected["correct1"], expected["correct5"])
    assert result["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_published_command_line_runs_with_fewer_processes(colours: Path, tmp_path: Path):
    """The published S/7 recipe and the flags of the published launcher, on a small model."""
    published = (
        "-b 8 --opt adamw --epochs 1 --sched cosine --img-size 32 --drop-path 0.1 --lr 2e-3 --weight-decay 0.05 "
        "--remode pixel --reprob 0.25 --aa rand-m9-mstd0.5-inc1 --smoothing 0.1 --mixup 0.8 --cutmix 1.0 "
        "--warmup-lr 1e-6 --warmup-epochs 20 --apex-amp --model-ema --cooldown-epochs 0 -j 0"
    ).split()
    done = start(ROOT / "distributed_train.sh", 2, colours, "--model", "vip_nano4_32", *published, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("float16 mixed precision with dynamic loss scaling by torch") == 1
    (folder,) = tmp_path.iterdir()
    assert folder.name.endswith("-vip_nano4_32-32")
    checked = start("bash", ROOT / "eval.sh", colours / "val", folder, "--device", "cpu", "-j", 0)
    assert checked.returncode == 0 and "vip_nano4_32: top-1" in checked.stdout


def test_mistakes_end_the_group_without_a_traceback(tmp_path: Path):
    done = start(ROOT / "distributed_train.sh", 2, tmp_path / "nowhere", *OPTIONS)
    assert done.returncode == 2
    assert done.stderr.count("There is no data set at") == 1
    assert "Traceback" not in done.stderr


def test_launcher_says_how_it_is_used():
    for arguments in ((), ("two", "data"), ("4",)):
        done = start(ROOT / "distributed_train.sh", *arguments)
        assert done.returncode == 2 and done.stderr.startswith("usage:")
    assert start("bash", ROOT / "eval.sh", "data").returncode == 2
    missing = start(ROOT / "distributed_train.sh", 1, "data", NNODES="2")
    assert missing.returncode != 0 and "NODE_RANK" in missing.stderr


def test_python_without_torch_is_said_in_one_line(tmp_path: Path):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')  # no site-packages
    bare.chmod(0o755)
    for script, arguments in (("distributed_train.sh", (1, "data")), ("eval.sh", ("data", "checkpoint"))):
        for python in (bare, tmp_path / "missing"):
            done = start("bash", ROOT / script, *arguments, PYTHON=str(python))
            assert done.returncode == 2
            assert done.stderr.count("\n") == 1 and "has no torch and timm" in done.stderr


def test_two_nodes_meet_by_address(colours: Path, tmp_path: Path):
    """Two launchers on one machine stand for two nodes."""
    command = [str(ROOT / "distributed_train.sh"), "1", str(colours), *OPTIONS, "-b", "8", "--epochs", "1"]
    env = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "NNODES": "2", "MASTER_ADDR": "127.0.0.1"}
    env["MASTER_PORT"] = str(20000 + os.getpid() % 20000)
    nodes = [
        subprocess.Popen(
            [*command, "--output", str(tmp_path), "--experiment", "run"],
            env={**env, "NODE_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for rank in range(2)
    ]
    errors = [node.communicate(timeout=300)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], errors
    assert "2 process(es) on cpu" in errors[0]
    assert len(rows(tmp_path / "run")) == 1
