"""The page of a report: one HTML file that holds its pictures, needs no script and asks for nothing from outside."""

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from jinja2 import Environment, StrictUndefined

from vip.errors import printable
from vip.reporting.analysis import (
    BINS,
    ClassAccuracy,
    Confusion,
    accuracy_of_classes,
    calibration,
    most_confused,
    topk_percent,
)
from vip.reporting.benchmarks import write_texts
from vip.reporting.curves import Curve, Picture, draw_calibration, draw_classes, draw_curves, make_curves
from vip.reporting.plots import new_figure
from vip.reporting.predictions import Predictions, read_predictions
from vip.reporting.runs import EpochLog, with_speed
from vip.version import __version__

MOST_BARS = 30  # classes beyond are told by the worst and the best
MOST_ROWS = 10


@dataclass(frozen=True)
class Validation:
    """What a validation of a run has shown."""

    run: str
    predictions: Predictions
    top1: float
    top5: float | None
    error: float
    classes: list[ClassAccuracy]
    confusions: list[Confusion]
    pictures: list[Picture]


def write_report(runs: Sequence[EpochLog], published: Sequence[EpochLog], remarks: Sequence[str], folder: Path) -> Path:
    """Write `report.html` and its pictures.

    Args:
        runs: Runs to lay over each other. Those with a `predictions.npz` in their folder get a section of their own.
        published: Logs that are drawn dashed beside them.
        remarks: Where the runs stand against these, a paragraph each.
        folder: Folder to write to, which is made.

    Returns:
        The page.

    Raises:
        UserError: If matplotlib is not installed, a file of a run is damaged, or the folder cannot be written.
    """
    new_figure()  # what is missing is to be known before the folder is made
    names = _names(runs, published)
    sources = [(name, run.path.with_name("predictions.npz")) for name, run in zip(names, runs, strict=False)]
    found = {name: read_predictions(path) for name, path in sources if path.is_file()}
    write_texts(folder, {})
    curves = make_curves([with_speed(run) for run in runs], published, names)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"printable": printable, "data_uri": _data_uri, "speed": _speed, "memory": _memory}
    text = environment.from_string(_PAGE).render(
        title=", ".join(names[: len(runs)]) if len(runs) <= 3 else f"{len(runs)} runs",
        curves=curves,
        pictures=draw_curves(curves, folder),
        remarks=remarks,
        validations=[
            _look_at(name, predictions, folder, f"-{i}" if len(found) > 1 else "")
            for i, (name, predictions) in enumerate(found.items(), 1)
        ],
        most_bars=MOST_BARS,
        most_rows=MOST_ROWS,
        bins=BINS,
        style=_STYLE,
        version=__version__,
    )
    return write_texts(folder, {"report.html": text})[0]


def _names(runs: Sequence[EpochLog], published: Sequence[EpochLog]) -> list[str]:
    """A name for each: that of its folder, its path where others have the same, and a number where that does not do."""
    short = [run.path.absolute().parent.name for run in runs]
    short += [f"published {log.path.absolute().parent.name}" for log in published]
    paths = [str(log.path.parent) for log in (*runs, *published)]
    names = [name if short.count(name) == 1 else path for name, path in zip(short, paths, strict=True)]
    numbers = [f" ({names[: i + 1].count(name)})" if names.count(name) > 1 else "" for i, name in enumerate(names)]
    return [printable(name + number) for name, number in zip(names, numbers, strict=True)]


def _look_at(name: str, predictions: Predictions, folder: Path, ending: str) -> Validation:
    classes, found = accuracy_of_classes(predictions), calibration(predictions)
    bars = [draw_classes(classes, folder / f"classes{ending}")] if len(classes) <= MOST_BARS else []
    return Validation(
        run=name,
        predictions=predictions,
        top1=topk_percent(predictions, 1),
        top5=topk_percent(predictions, 5) if predictions.top.shape[1] >= 5 else None,
        error=100 * found.error,
        classes=classes,
        confusions=most_confused(predictions, MOST_ROWS),
        pictures=[*bars, *draw_calibration(found, folder, ending)],
    )


def _data_uri(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _speed(curve: Curve) -> str:
    """Median over the epochs."""
    values = [v for v in curve.values("train_images_per_second", len(curve.run.rows)) if math.isfinite(v)]
    return f"{median(values):,.0f}" if values else "–"


def _memory(curve: Curve) -> str:
    values = [v for v in curve.values("train_memory_gb", len(curve.run.rows)) if math.isfinite(v)]
    return f"{max(values):.2f} GB" if values else "–"


_STYLE = """
:root { color-scheme: light dark; --page: #f3f5f7; --card: #fff; --ink: #1b1f24; --dim: #57606a; --line: #d5dbe1; }
@media (prefers-color-scheme: dark) {
  :root { --page: #111316; --card: #1c1f24; --ink: #f0f0f0; --dim: #a3adb8; --line: #383e46; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
header, main, footer { max-width: 84rem; margin: 0 auto; padding: 0.5rem clamp(0.75rem, 3vw, 2rem); }
h1 { margin: 0.5rem 0 0; font-size: 1.75rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 1.75rem 0 0.75rem; font-size: 1.3rem; overflow-wrap: anywhere; }
h3 { margin: 0 0 0.5rem; font-size: 1rem; }
p { margin: 0.5rem 0; overflow-wrap: anywhere; }
header p, footer, .dim, figcaption { color: var(--dim); }
footer { font-size: 0.85rem; }
.card, figure { background: var(--card); border: 1px solid var(--line); border-radius: 0.6rem; padding: 1rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 25rem), 1fr)); gap: 1rem; }
.grid, .card + .card { margin-top: 1rem; }
.grid > .card { margin-top: 0; }
figure { margin: 0; min-width: 0; }
figcaption { font-weight: 600; margin-bottom: 0.5rem; }
img { display: block; width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 0.35rem 0 0.35rem 0.75rem; border-bottom: 1px solid var(--line); }
th, td { text-align: right; white-space: nowrap; }
th { font-weight: 600; }
tr:last-child > * { border-bottom: 0; }
.name { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 4.5rem; }
th:first-child, td:first-child { padding-left: 0; }
#runs + .card .name { min-width: 8rem; }
.dash { display: inline-block; width: 1.4rem; border-top: 0.25rem solid; margin-right: 0.5rem; vertical-align: middle; }
.dash.published { border-top-style: dashed; }
.tiles { display: flex; flex-wrap: wrap; gap: 0.5rem 2.5rem; margin: 0; }
.tiles dt { color: var(--dim); font-size: 0.85rem; }
.tiles dd { margin: 0; font-size: 1.4rem; font-weight: 600; }
"""

# Black, the last of the colors, is the ink of the page, which is white where it is dark.
_PAGE = """
{% macro pictures_of(pictures) %}
{% for picture in pictures %}
<figure>
<figcaption>{{ picture.title }}</figcaption>
<picture>
<source media="(prefers-color-scheme: dark)" srcset="{{ picture.dark | data_uri }}">
<img src="{{ picture.light | data_uri }}" alt="{{ picture.alt | printable }}">
</picture>
</figure>
{% endfor %}
{% endmacro %}
{% macro table_of(title, classes) %}
<div class="card">
<h3>{{ title }}</h3>
<div class="scroll" tabindex="0" role="region" aria-label="{{ title }}">
<table>
<thead><tr><th scope="col" class="name">class</th><th scope="col">top-1</th><th scope="col">images</th></tr></thead>
<tbody>
{% for each in classes %}
<tr><th scope="row" class="name">{{ each.name | printable }}</th>
<td>{{ "%.1f" | format(each.percent) }} %</td><td>{{ "{:,}".format(each.images) }}</td></tr>
{% endfor %}
</tbody>
</table>
</div>
</div>
{% endmacro %}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Report of {{ title }}</title>
<style>{{ style | safe }}</style>
</head>
<body>
<header>
<h1>Report of {{ title }}</h1>
<p>Top-1 in percent of the validation images. A star marks the epoch of the best top-1
{%- if curves | selectattr("published") | list %}; published logs are dashed{% endif %}.</p>
</header>
<main>
<section aria-labelledby="runs">
<h2 id="runs">Runs</h2>
<div class="card scroll" tabindex="0" role="region" aria-labelledby="runs">
<table>
<thead><tr>
<th scope="col" class="name">run</th><th scope="col" class="name">model</th><th scope="col">epochs</th>
<th scope="col">best top-1</th><th scope="col">in epoch</th><th scope="col">last top-1</th>
<th scope="col">training loss</th><th scope="col">images a second</th><th scope="col">peak memory</th>
</tr></thead>
<tbody>
{% for curve in curves %}
{% set run = curve.run %}
{% set top1 = run.column("eval_top1") %}
<tr><th scope="row" class="name"><span class="dash{{ " published" if curve.published }}"
{%- if curve.color != "#000000" %} style="border-color: {{ curve.color }}"{% endif %}></span>{{ curve.name }}</th>
<td class="name">{{ run.options.get("model", "–") | string | printable }}</td>
<td>{{ run.rows | length }} of {{ run.epochs }}</td>
<td>{{ "%.2f" | format(top1[run.best_epoch]) }}</td><td>{{ run.best_epoch }}</td>
<td>{{ "%.2f" | format(top1[-1]) }}</td>
<td>{{ "%.4f" | format(run.rows[-1].train_loss) if "train_loss" in run.rows[-1] else "–" }}</td>
<td>{{ curve | speed }}</td><td>{{ curve | memory }}</td></tr>
{% endfor %}
</tbody>
</table>
</div>
</section>
{% if remarks %}
<section aria-labelledby="standing">
<h2 id="standing">Against the published log</h2>
<div class="card">
{% for remark in remarks %}
<p>{{ remark | replace("\n", " ") | printable }}</p>
{% endfor %}
</div>
</section>
{% endif %}
<section aria-labelledby="curves">
<h2 id="curves">Curves</h2>
<div class="grid">
{{ pictures_of(pictures) }}
</div>
</section>
{% for validation in validations %}
{% set classes = validation.classes %}
<section aria-labelledby="validation-{{ loop.index }}">
<h2 id="validation-{{ loop.index }}">Validation of {{ validation.run }}</h2>
<div class="card">
<dl class="tiles">
<div><dt>images</dt><dd>{{ "{:,}".format(validation.predictions.target | length) }}</dd></div>
<div><dt>classes</dt><dd>{{ "{:,}".format(classes | length) }}</dd></div>
<div><dt>top-1</dt><dd>{{ "%.2f" | format(validation.top1) }} %</dd></div>
{% if validation.top5 is not none %}
<div><dt>top-5</dt><dd>{{ "%.2f" | format(validation.top5) }} %</dd></div>
{% endif %}
<div><dt>expected calibration error</dt><dd>{{ "%.2f" | format(validation.error) }} %</dd></div>
</dl>
<p class="dim">{{ validation.predictions.model | printable }} of {{ validation.predictions.checkpoint | printable }}.
The calibration error is over {{ bins }} bins of equal width.</p>
</div>
<div class="grid">
{{ pictures_of(validation.pictures) }}
{% if classes | length > most_bars %}
{{ table_of("Worst classes", classes[:most_rows]) }}
{{ table_of("Best classes", (classes | reverse | list)[:most_rows]) }}
{% else %}
{{ table_of("Classes, the worst first", classes) }}
{% endif %}
<div class="card">
<h3>Most confused</h3>
{% if validation.confusions %}
<div class="scroll" tabindex="0" role="region" aria-label="Most confused">
<table>
<thead><tr><th scope="col" class="name">true</th><th scope="col" class="name">predicted</th>
<th scope="col">images</th><th scope="col">of the class</th></tr></thead>
<tbody>
{% for each in validation.confusions %}
<tr><td class="name">{{ each.target | printable }}</td><td class="name">{{ each.predicted | printable }}</td>
<td>{{ "{:,}".format(each.count) }}</td><td>{{ "%.1f" | format(each.percent) }} %</td></tr>
{% endfor %}
</tbody>
</table>
</div>
{% else %}
<p>No image was taken for one of another class.</p>
{% endif %}
</div>
</div>
</section>
{% endfor %}
</main>
<footer>Written by vip {{ version }}. The pictures lie beside this page, for light and for dark pages.</footer>
</body>
</html>
""".lstrip()
