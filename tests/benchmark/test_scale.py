"""What trainings take, against sums by hand; growth with image, batch and width on small models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from training_command import Outcome

from vip.benchmark import runner, scale
from vip.benchmark.config import BenchmarkConfig
from vip.benchmark.plan import Plan
from vip.reporting.benchmarks import plan_table


def test_a_plan_by_hand() -> None:
    plan = Plan("m", 25_000_000, 8, 256, 1000.0, 250.0, 16, (2e-3, 2048))
    assert plan.update_size == 2048 and plan.cores_of_node == 32 and not plan.loader_limits
    assert plan.epoch_seconds == pytest.approx((1_281_167 + 50_000 / 3) / 8000)
    assert plan.hours == pytest.approx(300 * 162.23 / 3600, rel=1e-3)
    assert plan.sent == 2 * 7 / 8 * 100e6
    assert plan.bandwidth == pytest.approx(175e6 / (0.256 * 2 / 3))
    assert plan.learning_rate(1) == plan.learning_rate(0.5) == 2e-3


@pytest.mark.parametrize("name", scale.TRAINED)
def test_rates_are_those_of_the_recipes(name: str) -> None:
    recipe = yaml.safe_load((Path(__file__).parents[2] / "models" / name / "recipe.yaml").read_text())
    assert scale.TRAINED[name] == (recipe["lr"], 8 * recipe["batch_size"])


def test_the_slower_of_loader_and_steps_decides() -> None:
    plan = Plan("m", 1, 64, 256, 1000.0, 100.0, 4, (2e-3, 2048))
    assert plan.loader_limits and plan.cores_of_node == 80
    assert plan.epoch_seconds == pytest.approx((1_281_167 + 50_000 / 3) / (64 * 400))
    assert plan.learning_rate(1) == pytest.approx(1.6e-2) and plan.learning_rate(0.5) == pytest.approx(2e-3 * 8**0.5)
    row = plan_table([plan]).splitlines()[2]
    assert "| loader, 4 cores a device |" in row and "| 16,384 |" in row and "| 0.016 or 0.0057 |" in row


def test_what_all_reduce_sends_is_what_a_ring_sends() -> None:
    """Each device passes on every part of the gradients but one, first to sum and then to spread them."""
    devices, params = 8, 800
    sent = sum(params // devices * 4 for _ in range(devices - 1)) * 2
    assert Plan("m", params, devices, 1, 1.0, 1.0, 1, (1e-3, 1)).sent == sent


@pytest.mark.parametrize("width", [0.5, 2.0])
def test_width_is_a_factor_of_the_channels(width: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "matmul_step", lambda dtype, device: (lambda: None, 1))
    config = BenchmarkConfig(rounds=1, seconds=0.0, warmup=1, batch_size=[1], bench="inference", width=[1.0, width])
    base, other = runner.run(config, ["vip_nano4_32"], "vip_nano4_32", torch.device("cpu"))
    assert (base["width"], other["width"]) == (1.0, width)
    # matrices have the square of the factor, biases and norms the factor itself
    powers = sorted((width, width**2))
    assert powers[0] < other["params_m"] / base["params_m"] < powers[1]


def test_models_without_stages_have_no_width(command: Callable[..., Outcome], tmp_path: Path) -> None:
    flags = ("--device", "cpu", "--rounds", 1, "--seconds", 0, "--warmup", 1, "-b", 1, "--output", tmp_path)
    outcome = command("benchmark", "--models", "test_vit", "--width", 2, *flags)
    assert outcome.status == 1 and "embed_dims" in outcome.out and "Traceback" not in outcome.err


def test_the_suite_draws_and_plans(
    command: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = scale.run

    def small(config: BenchmarkConfig, models: list[str], baseline: str, device: torch.device) -> Any:
        config.img_size = [size // 7 for size in config.img_size]
        rows = run(config, ["vip_nano4_32"], "vip_nano4_32", device)
        return [{**row, "model": "vip_s7"} for row in rows]

    monkeypatch.setattr(scale, "run", small)
    monkeypatch.setattr(runner, "matmul_step", lambda dtype, device: (lambda: None, 1))
    monkeypatch.setattr(scale, "data_path_seconds", lambda rounds: ({"fast": [0.01]}, 1.0))
    out = tmp_path / "scale.md"
    flags = ("--device", "cpu", "--rounds", 1, "--seconds", 0, "--warmup", 1, "-b", 4)
    outcome = command("benchmark", "--suite", "scale", "--out", out, *flags)
    assert outcome.status == 0, outcome.err
    text = out.read_text()
    assert all(f"Growth with `{name}`" in text for name in ("img_size", "batch_size", "width"))
    assert text.count("| `vip_s7` | 8 | 32 |") == 1 and text.count("| `vip_s7` | 64 | 256 |") == 1
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn == {
        f"{phase}-{name}.png" for phase in ("inference", "train") for name in ("img-size", "batch-size", "width")
    }
