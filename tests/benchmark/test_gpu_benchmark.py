"""`vip benchmark` on a GPU: device events, memory and clocks. `pytest -m gpu -s` prints the tables."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from training_command import Outcome

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_published_table(command: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = command(
        "benchmark",
        "--table",
        "published",
        "--precision",
        "bfloat16",
        "-b",
        "128",
        "--rounds",
        "5",
        "--output",
        tmp_path,
    )
    print(outcome.out)
    assert outcome.status == 0
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["environment"]["gpu"] and content["environment"]["gpu_clocks.sm"]
    for row in content["rows"]:
        for phase, held in (("inference", 2), ("train", 12)):  # bytes of a parameter: bfloat16; float32 and two moments
            assert 0.01 < row[f"{phase}_share_of_matmul_rate"] < 1
            assert row["params_m"] * held / 1e3 < row[f"{phase}_memory_gb"] < 100
            assert row[f"{phase}_images_per_second_low"] > 100


def test_batch_is_halved_until_it_fits(command: Callable[..., Outcome], tmp_path: Path) -> None:
    torch.cuda.set_per_process_memory_fraction(8e9 / torch.cuda.get_device_properties(0).total_memory)
    try:
        outcome = command(
            *("benchmark", "--models", "vip_s7", "--bench", "train", "-b", "4096", "--rounds", "1", "--seconds", "0"),
            *("--format", "json", "--output", tmp_path),
        )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    (row,) = json.loads(outcome.out)["rows"]
    assert row["train_batch_size"] < row["batch_size"] == 4096 and row["train_memory_gb"] < 8
