"""Train for an hour or more, killed every few minutes, and watch memory, open files and throughput.

    PYTHONPATH=tests python tests/soak/load.py --minutes 65 --kill-every 240 --output output/soak

Writes every observation to CSV files and prints a table. Linux alone: memory is read from /proc.
"""

import argparse
import csv
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import timm
import torch
from exact_runs import ROOT
from label_maps import write_maps

import vip  # noqa: F401  # registers the models
from vip.data.digits import write_digits

FLAGS = """
    --model vip_nano4_32 --device cpu -b 32 -j 2 --epochs 100000 --warmup-epochs 1 --sched plateau --lr 1e-3
    --drop 0.1 --drop-path 0.2 --model-ema --grad-accum-steps 2 --clip-grad 1 --mixup 0.8 --cutmix 1.0 --token-label
    --amp --amp-dtype bfloat16 --recovery-interval 20 --checkpoint-hist 3 --log-tensorboard --save-images --resume auto
""".split()
SETTLED = 60.0  # seconds of a process that are its start and not its course


@dataclass
class Watch:
    """What was seen of one run after another."""

    begin: float = field(default_factory=time.monotonic)
    processes: list[tuple[float, float, int, str, int, int]] = field(default_factory=list)
    epochs: list[tuple[float, float, float, int]] = field(default_factory=list)
    references: list[tuple[float, float]] = field(default_factory=list)

    def observe(self, pid: int, life: int, born: float) -> None:
        """Note memory and open files of a process and of its loader processes."""
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        now = time.monotonic()
        for role, each in (("training", str(pid)), *(("loader", child) for child in children)):
            rollup = Path(f"/proc/{each}/smaps_rollup").read_text()
            own = sum(int(size) for size in re.findall(r"^Private_(?:Clean|Dirty):\s+(\d+)", rollup, re.MULTILINE))
            files = len(list(Path(f"/proc/{each}/fd").iterdir()))
            self.processes.append((now - self.begin, now - born, life, role, own, files))

    def read_log(self, lines: Iterable[str], life: int, pid: int) -> None:
        """Note the throughput of each whole epoch of a process but its first, and the CPU time since the one before."""
        before = 0.0
        for line in lines:
            if found := re.match(r"Epoch \d+: loss .* ([\d,]+) img/s", line):
                try:
                    used = cpu_seconds(pid)
                except OSError:  # it was killed just now
                    return
                if before:
                    rate = float(found[1].replace(",", ""))
                    self.epochs.append((time.monotonic() - self.begin, rate, used - before, life))
                before = used


def reference() -> Callable[[], float]:
    """CPU seconds of a few training steps of the same model, always the same: what the machine gives at the moment."""
    torch.set_num_threads(1)
    model, images = timm.create_model("vip_nano4_32").to(torch.bfloat16), torch.randn(32, 3, 32, 32).to(torch.bfloat16)

    def steps() -> float:
        begin = time.process_time()
        for _ in range(4):
            model(images).sum().backward()
        return time.process_time() - begin

    steps()
    return steps


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and of its loader processes."""
    ticks = 0
    for each in (str(pid), *Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
        fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Run, kill, watch, report."""
    parser = argparse.ArgumentParser(description="Train for long, killed every few minutes, and watch what it uses.")
    parser.add_argument("--minutes", type=float, default=65)
    parser.add_argument("--kill-every", type=float, default=240, metavar="SECONDS", help="on average (default: 240)")
    parser.add_argument("--output", type=Path, default=Path("output/soak"))
    args = parser.parse_args()
    write_digits(args.output / "digits")
    maps = write_maps(args.output / "digits/train", args.output / "maps")
    command = [sys.executable, "train.py", str(args.output / "digits"), *FLAGS, "--token-label-data", str(maps)]
    command += ["--output", str(args.output.resolve()), "--experiment", f"run-{int(time.time())}"]
    rng, watch, kills, steps = random.Random(0), Watch(), 0, reference()
    while (left := 60 * args.minutes - (time.monotonic() - watch.begin)) > 0:
        live_once(command, min(left, args.kill_every * rng.uniform(0.5, 1.5)), rng, watch, kills, steps)
        kills += 1
    print(report(watch, kills, args.output))


def live_once(
    command: list[str], seconds: float, rng: random.Random, watch: Watch, life: int, steps: Callable[[], float]
) -> None:
    """Start the training, watch it and the machine for so long, and end it by a signal."""
    born = time.monotonic()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True)
    assert process.stderr is not None
    reader = threading.Thread(target=watch.read_log, args=(process.stderr, life, process.pid))
    reader.start()
    while time.monotonic() - born < seconds:
        time.sleep(5)
        assert process.poll() is None, f"the training ended with status {process.returncode}"
        watch.observe(process.pid, life, born)
        watch.references.append((time.monotonic() - watch.begin, steps()))
    process.send_signal(rng.choice((signal.SIGKILL, signal.SIGTERM)))
    process.wait()
    reader.join()


def report(watch: Watch, kills: int, output: Path) -> str:
    """The table of first and last ten minutes; observations go to files."""
    for name, header, rows in (
        ("processes.csv", ("seconds", "age", "life", "role", "private_kb", "open_files"), watch.processes),
        ("epochs.csv", ("seconds", "images_per_second", "cpu_seconds", "life"), watch.epochs),
        ("references.csv", ("seconds", "cpu_seconds"), watch.references),
    ):
        with open(output / name, "w", newline="") as file:
            csv.writer(file).writerows([header, *rows])
    settled = [row for row in watch.processes if row[1] > SETTLED]
    lines = [f"{watch.epochs[-1][0] / 60:.0f} minutes, {kills} kills, {len(watch.epochs)} whole epochs", ""]
    lines += ["| what | first ten minutes | last ten minutes | change |", "| :--- | ---: | ---: | ---: |"]
    lines.append(_row("images a second", watch.epochs, lambda row: row[1]))
    lines.append(_row("CPU seconds an epoch, validated and saved", watch.epochs, lambda row: row[2]))
    lines.append(
        _row("CPU ms of the same training steps in another process", watch.references, lambda row: 1e3 * row[1])
    )
    relative = [(row[0], row[2] / _near(watch.references, row[0])) for row in watch.epochs]
    lines.append(_row("an epoch in such steps", relative, lambda row: row[1]))
    for role in ("training", "loader"):
        rows = [row for row in settled if row[3] == role]
        lines.append(_row(f"{role} process: MB", rows, lambda row: row[4] / 1000))
        lines.append(_row(f"{role} process: open files", rows, lambda row: row[5]))
    for role in ("training", "loader"):
        growth = [_growth([row for row in settled if row[2] == life and row[3] == role]) for life in range(kills)]
        if known := [value for value in growth if value is not None]:
            median, most = statistics.median(known), max(known)
            lines.append(
                f"\n{role} process, MB more at the end of a life than a minute after its start: median {median:.1f}, "
                f"most {most:.1f}"
            )
    return "\n".join(lines)


def _near(references: list[tuple[float, float]], moment: float) -> float:
    """The reference within half a minute of a moment."""
    return statistics.median(seconds for when, seconds in references if abs(when - moment) < 30)


def _row(what: str, rows: list, value: Callable[[tuple], float]) -> str:
    end = rows[-1][0]
    first = statistics.median(value(row) for row in rows if row[0] < 600)
    last = statistics.median(value(row) for row in rows if row[0] > end - 600)
    return f"| {what} | {first:,.1f} | {last:,.1f} | {100 * (last / first - 1):+.1f} % |"


def _growth(rows: list) -> float | None:
    if len(rows) < 8:
        return None
    sizes, few = [row[4] for row in rows], max(2, len(rows) // 4)
    return (statistics.median(sizes[-few:]) - statistics.median(sizes[:few])) / 1000


if __name__ == "__main__":
    main()
