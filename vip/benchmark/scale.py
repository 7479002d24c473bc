"""How a model's time and memory grow, and what trainings take on many devices."""

import dataclasses
from collections.abc import Iterator
from statistics import median
from typing import Any

import torch

from vip.benchmark.config import BenchmarkConfig
from vip.benchmark.pipeline import data_path_seconds
from vip.benchmark.plan import Plan
from vip.benchmark.runner import run
from vip.training.runtime import available_cores

MODEL = "vip_s7"
# learning rate and images of an update, as in the recipes of models/
TRAINED = {name: (2e-3, 2048) for name in ("vip_s7", "vip_m7", "vip_l7", "vip_s14")} | {"lvvit_s": (1.6e-3, 1024)}


def growth_rows(config: BenchmarkConfig, device: torch.device) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """What grows (the image, the batch, the channels), and the rows of `vip_s7` as it does.

    Args:
        config: Precision, rounds, seconds and warm-up; the largest batch, the first of `batch_size`.
        device: Device.
    """
    largest = config.batch_size[0]
    batches = [largest // 2**i for i in range(4, -1, -1) if largest >> i]
    sweeps: dict[str, dict[str, Any]] = {
        "img_size": {"img_size": [224, 280, 336, 448], "batch_size": [max(1, largest // 4)]},
        "batch_size": {"batch_size": batches},
        "width": {"width": [0.5, 1.0, 1.5, 2.0], "batch_size": [max(1, largest // 4)]},
    }
    for name, sweep in sweeps.items():
        yield name, run(dataclasses.replace(config, **sweep), [MODEL], MODEL, device)


def make_plans(config: BenchmarkConfig, device: torch.device) -> list[Plan]:
    """Plans of 300 epochs on 8 and on 64 devices like this one, from the rates of a step and of a core measured here.

    Args:
        config: As for `growth_rows`.
        device: Device.
    """
    config = dataclasses.replace(config, bench="train")
    rows = [row for row in run(config, list(TRAINED), MODEL, device) if "train_images_per_second" in row]
    per_core = 1 / median(data_path_seconds(config.rounds)[0]["fast"])
    cores = available_cores() / (torch.cuda.device_count() if device.type == "cuda" else 1)
    return [
        Plan(
            row["model"],
            round(row["params_m"] * 1e6),
            devices,
            row["train_batch_size"],
            row["train_images_per_second"],
            per_core,
            cores,
            TRAINED[row["model"]],
        )
        for devices in (8, 64)
        for row in rows
    ]
