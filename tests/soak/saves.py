"""How long training waits for a checkpoint, and how long the checkpoint takes to be on disk.

    python tests/soak/saves.py --models vip_s7 vip_l7 --output output/saves

On a GPU the first is the copy to the host.
"""

import argparse
import statistics
import time
from pathlib import Path

import timm
import torch
from timm.task import ClassificationTask

from vip.training.config import TrainConfig
from vip.training.engine import TrainState
from vip.training.runtime import setup_precision
from vip.training.saver import RunSaver


def main() -> None:
    """Print a row a model."""
    parser = argparse.ArgumentParser(description="How long training waits for a checkpoint.")
    parser.add_argument("--models", nargs="+", default=["vip_s7"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--saves", type=int, default=5, help="of which the first does not count (default: 5)")
    parser.add_argument("--output", type=Path, default=Path("output/saves"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    print("| model | checkpoint MB | training waits s | on disk after s |\n| :--- | ---: | ---: | ---: |")
    for name in args.models:
        saver = RunSaver(
            trained_state(name, args.device), args.output, TrainConfig(), {}, {"batch_size": 1, "processes": 1}
        )
        times = [time_save(saver) for _ in range(args.saves)][1:]
        waits, written = (statistics.median(column) for column in zip(*times, strict=True))
        print(f"| {name} | {saver.recovery_path.stat().st_size / 1e6:.0f} | {waits:.3f} | {written:.2f} |", flush=True)
        saver.close()


def trained_state(name: str, device: str) -> TrainState:
    """A model after one step of AdamW, with averaged weights."""
    model = timm.create_model(name).to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(1, 3, 224, 224, device=device)).sum().backward()
    optimizer.step()
    task = ClassificationTask(model, torch.nn.CrossEntropyLoss(), device=torch.device(device), verbose=False)
    task.setup_ema(decay=0.9999)
    return TrainState(task, optimizer, None, setup_precision(TrainConfig(), torch.device(device)))


def time_save(saver: RunSaver) -> tuple[float, float]:
    """Seconds until training may go on, and until the file is on disk."""
    begin = time.perf_counter()
    saver.save_within_epoch()
    waited = time.perf_counter() - begin
    saver.wait()
    return waited, time.perf_counter() - begin


if __name__ == "__main__":
    main()
