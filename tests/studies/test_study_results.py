"""Table, file and pictures of made-up results of the data-efficiency study."""

import csv
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pytest

from studies.data_efficiency import results as module
from studies.data_efficiency.models import ABLATIONS, BASELINE, MODELS
from studies.data_efficiency.results import draw, of, table, write_csv
from studies.data_efficiency.runs import FRACTIONS, SEEDS, jobs

NAMES = [*MODELS, *ABLATIONS]


def top1(model: str, fraction: float, seed: int) -> float:
    return 90 - 3 * NAMES.index(model) - 20 * (1 - fraction) + (seed - 1) * (1 + fraction) / 2


def results() -> list[dict[str, Any]]:
    return [
        {
            **{"model": j.model, "fraction": j.fraction, "seed": j.seed, "params": 123456, "macs": 7_650_000},
            **{"training_images": 50, "images_seen": 75_000, "top1": top1(j.model, j.fraction, j.seed), "count": 9},
            "seconds": 1.5,
            "curve": [
                {
                    "images": 37_500 * (i + 1),
                    "train_loss": 2.0,
                    "loss": 1.0,
                    "top1": top1(j.model, j.fraction, j.seed) - 1 + i,
                }
                for i in range(2)
            ],
        }
        for j in jobs()
    ]


def test_table() -> None:
    lines = table(results(), "small").splitlines()
    assert lines[0] == "Top-1 in percent, mean ± standard deviation of 3 seeds (size small)."
    first = lines.index("| ViP | 123,456 | 7.7 | 75,000 | 90.00 ± 1.00 | 76.00 ± 0.65 | 72.00 ± 0.55 | 18.00 ± 0.45 |")
    assert lines[first - 2].count("|") == lines[first - 1].count("|") == 9
    second = lines.index("| ViP | 123,456 | 7.7 | 75,000 | 90.00 ± 1.00 |  |")
    assert "| no re-weighting | 123,456 | 7.7 | 75,000 | 72.00 ± 1.00 | -18.00 ± 0.00 |" in lines
    assert [line.split(" | ")[0].strip("| ") for line in lines[first : first + 6]] == list(MODELS)
    assert [line.split(" | ")[0].strip("| ") for line in lines[second:]] == [BASELINE, *ABLATIONS]
    for line, model in zip(lines[first : first + 6], MODELS, strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")][4:]
        for cell, fraction in zip(cells[:3], FRACTIONS, strict=True):
            values = [top1(model, fraction, seed) for seed in SEEDS]
            assert cell == f"{mean(values):.2f} ± {stdev(values):.2f}"


def test_a_better_ablation_has_a_plus() -> None:
    made_up = results()
    for r in of(made_up, "height only", 1.0):
        r["top1"] = 91.5 + 2 * r["seed"]
    assert "| 93.50 ± 2.00 | +3.50 ± 1.00 |" in table(made_up, "small")


def test_file(tmp_path: Path) -> None:
    made_up = results()
    write_csv(made_up, tmp_path / "results.csv")
    with open(tmp_path / "results.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    expected = [
        [r["model"], str(r["fraction"]), str(r["seed"]), str(point["images"]), str(point["top1"])]
        for r in made_up
        for point in r["curve"]
    ]
    assert [[row[name] for name in ("model", "fraction", "seed", "images", "top1")] for row in rows] == expected
    assert None not in rows[0] and "curve" not in rows[0] and rows[0]["macs"] == "7650000"


def test_pictures(tmp_path: Path) -> None:
    files = draw(results(), tmp_path)
    assert [file.name for file in files] == [
        f"{name}.{ending}" for name in ("curves", "shares", "ablations") for ending in ("png", "svg")
    ]
    draw(results(), tmp_path / "again")
    for file in files:
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_what_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: dict[str, Any] = {}

    def save_figure(figure: Any, path: Path) -> list[Path]:
        figures[path.name] = figure
        return []

    monkeypatch.setattr(module, "save_figure", save_figure)
    draw(results(), tmp_path)
    for ax, fraction in zip(figures["curves"].axes, FRACTIONS, strict=True):
        assert ax.get_title() == f"{round(100 * fraction)}% of CIFAR-10"
        for line, model in zip(ax.get_lines(), MODELS, strict=True):
            final = mean(top1(model, fraction, seed) for seed in SEEDS)
            assert list(line.get_xdata()) == pytest.approx([50, 100])
            assert line.get_label() == model and list(line.get_ydata()) == pytest.approx([final - 1, final])
    (ax,) = figures["shares"].axes
    for line, model in zip(ax.get_lines(), MODELS, strict=True):
        assert list(line.get_xdata()) == pytest.approx([100, 30, 10])
        expected = [mean(top1(model, fraction, seed) for seed in SEEDS) for fraction in FRACTIONS]
        assert list(line.get_ydata()) == pytest.approx(expected)
    (ax,) = figures["ablations"].axes
    means = [mean(top1(m, 1.0, seed) for seed in SEEDS) for m in (BASELINE, *ABLATIONS)]
    (points,) = [line for line in ax.get_lines() if line.get_marker() == "o"]
    assert list(points.get_xdata()) == pytest.approx(means)
    assert list(points.get_ydata(orig=True)) == [BASELINE, *ABLATIONS]
    (bars,) = ax.collections
    halves = [float(np.ptp(segment[:, 0])) / 2 for segment in bars.get_segments()]
    assert halves == pytest.approx([stdev(top1(m, 1.0, seed) for seed in SEEDS) for m in (BASELINE, *ABLATIONS)])
