"""Tables and pictures of the study."""

import csv
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from studies.data_efficiency.models import ABLATIONS, BASELINE, MODELS
from studies.data_efficiency.runs import FRACTIONS, SEEDS
from vip.files import replacing
from vip.reporting.plots import new_figure, save_figure

Results = list[dict[str, Any]]


def of(results: Results, model: str, fraction: float) -> Results:
    """The results of all seeds of a model."""
    return [r for r in results if r["model"] == model and r["fraction"] == fraction]


def write_csv(results: Results, path: Path) -> None:
    """Write the curves, a row a point."""
    rows = [
        {**{name: value for name, value in result.items() if name not in ("curve", "top1", "images_seen")}, **point}
        for result in results
        for point in result["curve"]
    ]
    with replacing(path) as unfinished, open(unfinished, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def table(results: Results, size: str) -> str:
    """Top-1 of each architecture on each share, and of each ablation, in Markdown."""
    shares = " | ".join(f"{fraction:.0%} of the data" for fraction in FRACTIONS)
    lines = [
        f"Top-1 in percent, mean ± standard deviation of {len(SEEDS)} seeds (size {size}).",
        "",
        f"| architecture | parameters | MMACs | images seen | {shares} | lost from 100% to 10% |",
        f"| :--- | ---: | ---: | ---: |{' ---: |' * len(FRACTIONS)} ---: |",
    ]
    for model in MODELS:
        per_share = [[r["top1"] for r in of(results, model, fraction)] for fraction in FRACTIONS]
        lost = [first - last for first, last in zip(per_share[0], per_share[-1], strict=True)]
        cells = " | ".join(_spread(values) for values in (*per_share, lost))
        lines.append(f"| {model} | {_cost(of(results, model, 1.0)[0])} | {cells} |")
    lines += ["", "| ablation of ViP | parameters | MMACs | images seen | 100% of the data | difference |"]
    lines.append("| :--- | ---: | ---: | ---: | ---: | ---: |")
    whole = [r["top1"] for r in of(results, BASELINE, 1.0)]
    for model in (BASELINE, *ABLATIONS):
        own = of(results, model, 1.0)
        differences = [r["top1"] - top1 for r, top1 in zip(own, whole, strict=True)]
        difference = "" if model == BASELINE else _spread(differences, "+")
        lines.append(f"| {model} | {_cost(own[0])} | {_spread([r['top1'] for r in own])} | {difference} |")
    return "\n".join(lines)


def _cost(result: dict[str, Any]) -> str:
    return f"{result['params']:,} | {result['macs'] / 1e6:.1f} | {result['images_seen']:,}"


def _spread(values: list[float], sign: str = "") -> str:
    return f"{mean(values):{sign}.2f} ± {stdev(values):.2f}"


def draw(results: Results, folder: Path) -> list[Path]:
    """Draw curves, accuracy over the share of the data, and ablations; returns the files."""
    return [*_draw_curves(results, folder), *_draw_shares(results, folder), *_draw_ablations(results, folder)]


def _draw_curves(results: Results, folder: Path) -> list[Path]:
    figure, axes = new_figure(len(FRACTIONS), width=4.4)
    for ax, fraction in zip(axes, FRACTIONS, strict=True):
        for model in MODELS:
            curves = [r["curve"] for r in of(results, model, fraction)]
            x = [point["images"] / curves[0][-1]["images"] * 100 for point in curves[0]]
            _band(ax, x, [[point["top1"] for point in curve] for curve in curves], model)
        ax.set(title=f"{fraction:.0%} of CIFAR-10", xlabel="training compute in %", ylabel="top-1 in %")
    limits = [limit for ax in axes for limit in ax.get_ylim()]
    for ax in axes:
        ax.set_ylim(min(limits), max(limits))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    return save_figure(figure, folder / "curves")


def _draw_shares(results: Results, folder: Path) -> list[Path]:
    figure, (ax,) = new_figure()
    x = [fraction * 100 for fraction in FRACTIONS]
    for model in MODELS:
        values = [[r["top1"] for r in of(results, model, fraction)] for fraction in FRACTIONS]
        _band(ax, x, list(zip(*values, strict=True)), model)
    ax.set(xscale="log", xlabel="share of CIFAR-10 in %", ylabel="top-1 in %")
    ax.set_xticks(x, [f"{value:g}" for value in x])
    ax.minorticks_off()
    ax.legend()
    return save_figure(figure, folder / "shares")


def _draw_ablations(results: Results, folder: Path) -> list[Path]:
    figure, (ax,) = new_figure()
    names = [BASELINE, *ABLATIONS]
    values = [[r["top1"] for r in of(results, name, 1.0)] for name in names]
    ax.errorbar([mean(v) for v in values], names, xerr=[stdev(v) for v in values], fmt="o", capsize=3)
    ax.invert_yaxis()
    ax.set(xlabel="top-1 in %")
    return save_figure(figure, folder / "ablations")


def _band(ax: Any, x: list[float], runs: list[Iterable[float]], label: str) -> None:
    """A line through the means, and a band of one standard deviation."""
    points = [(mean(values), stdev(values)) for values in zip(*runs, strict=True)]
    (line,) = ax.plot(x, [m for m, _ in points], marker="o", markersize=3, label=label)
    ax.fill_between(x, *zip(*((m - s, m + s) for m, s in points), strict=True), color=line.get_color(), alpha=0.15)
