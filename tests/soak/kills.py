"""Kill a training again and again, and compare what it ends with to a run that nobody disturbed, to the bit.

    PYTHONPATH=tests python tests/soak/kills.py --kills 100 --processes 1

Everything random is on: RandAugment, random erasing, mixup, CutMix, stochastic depth, averaged weights, gradient
accumulation, token labels, and the plateau schedule. Exit status 1 if anything differs.
"""

import argparse
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from exact_runs import assert_same_run, flags_of, run_until
from label_maps import write_maps

from vip.data.digits import write_digits
from vip.training.recovery import REQUEUE

STEPS_A_LIFE = 8  # on average
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1)


def main() -> None:
    """Run undisturbed, run killed, compare."""
    parser = argparse.ArgumentParser(description="Kill a training again and again, and compare what it ends with.")
    parser.add_argument("--kills", type=int, default=100, help="about how many (default: 100)")
    parser.add_argument("--processes", type=int, default=1, help="training processes, under torchrun if more than one")
    parser.add_argument("--seed", type=int, default=0, help="seed of when and how")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        soak(Path(folder), args.kills, args.processes, random.Random(args.seed))


def soak(folder: Path, kills: int, processes: int, rng: random.Random) -> None:
    """Train in `folder`, kill and compare."""
    write_digits(folder / "digits")
    maps = write_maps(folder / "digits/train", folder / "maps")
    start = [sys.executable, "train.py"] if processes == 1 else ["./distributed_train.sh", str(processes)]
    epochs = max(2, kills * STEPS_A_LIFE // 89)  # of 1437 images in batches of 16
    flags = ["-b", str(16 // processes), "--epochs", str(epochs), "--recovery-interval", "4", "--token-label"]
    flags += ["--token-label-data", str(maps), "--mixup", "0.8", "--checkpoint-hist", "3"]

    def command(name: str) -> list[str]:
        return [*start, str(folder / "digits"), *flags_of(folder, name, *flags)]

    begin = time.monotonic()
    assert run_until(-1, command("whole")) == 0
    print(f"undisturbed: {epochs} epochs in {time.monotonic() - begin:.0f} s", flush=True)
    begin, ends = time.monotonic(), Counter[str]()
    with open(folder / "log", "w") as log:
        while True:
            number = rng.choice(SIGNALS)
            lines, delay = rng.randint(1, 2 * STEPS_A_LIFE - 1), rng.choice((0, rng.random()))
            status = run_until(lines, command("run"), number, delay=delay, log=log)
            if status == 0:
                break
            expected = -number if number == signal.SIGKILL else REQUEUE
            assert status == expected, f"status {status} after {number.name}: {(folder / 'log').read_text()[-2000:]}"
            ends[number.name] += 1
    how = ", ".join(f"{count} {name}" for name, count in sorted(ends.items()))
    print(f"{ends.total()} kills ({how}) in {time.monotonic() - begin:.0f} s", flush=True)
    assert_same_run(folder / "run", folder / "whole")
    print("every file equal to the bit")


if __name__ == "__main__":
    main()
