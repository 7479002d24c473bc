"""Runs in processes of their own that are killed, and what they leave compared to the bit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]


def same(a: Any, b: Any, place: str = "") -> None:
    """Equal to the bit, or an error that says where not."""
    assert type(a) is type(b), place
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), place
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), place
        for name in a:
            same(a[name], b[name], f"{place}.{name}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), place
        for i, (one, other) in enumerate(zip(a, b, strict=True)):
            same(one, other, f"{place}[{i}]")
    else:
        assert a == b or (a != a and b != b), f"{place}: {a} and {b}"


def assert_same_run(one: Path, other: Path) -> None:
    assert {p.name for p in one.iterdir()} == {p.name for p in other.iterdir()}
    assert (one / "summary.csv").read_bytes() == (other / "summary.csv").read_bytes()
    for path in one.glob("*.pth.tar"):
        contents = [torch.load(folder / path.name, weights_only=True) for folder in (one, other)]
        for content in contents:
            content["args"].update(output="", experiment="")
        same(*contents, place=path.name)


FLAGS = """
    --model vip_nano4_32 --device cpu -j 1 --epochs 3 --warmup-epochs 1 --cooldown-epochs 0 --sched plateau
    --patience-epochs 0 --lr 1e-3 --drop-path 0.2 --model-ema --grad-accum-steps 2 --recovery-interval 1 --resume auto
    --log-interval 1
""".split()


def flags_of(output: Path, name: str, *flags: str) -> list[str]:
    """The flags of a short run with all that is random on, and a schedule that has a state."""
    return [*FLAGS, "--output", str(output), "--experiment", name, *flags]


def run_until(
    line: int, argv: list[str], number: int = signal.SIGKILL, group: bool = False, delay: float = 0, log: Any = None
) -> int:
    """Start a process group and send it a signal some seconds after its log has so many lines of steps.

    Args:
        line: Lines of steps, -1 to let it run.
        argv: Command.
        number: The signal.
        group: Send it to all processes; SIGKILL always is.
        delay: Seconds to wait before.
        log: Open text file for what it says.

    Returns:
        Its exit status.
    """
    env = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, env=env, cwd=ROOT, start_new_session=True)
    assert process.stderr is not None
    for text in process.stderr:
        if log is not None:
            log.write(text)
        line -= text.startswith("Epoch ") and "] lr" in text
        if line == 0:
            time.sleep(delay)
            if group or number == signal.SIGKILL:
                os.killpg(process.pid, number)
            else:
                process.send_signal(number)
            line -= 1
    return process.wait()
