"""Tables and pictures of benchmarks."""

import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from tempfile import TemporaryFile
from typing import Any

from vip.errors import UserError
from vip.files import replacing
from vip.reporting.plots import COLORS, new_figure, save_figure

Row = dict[str, Any]
PHASES = {"inference": "Inference", "train": "Training"}


def markdown_table(rows: list[Row], environment: dict[str, Any], baseline: str, setting: str) -> str:
    """The rows as a Markdown table, with setting and environment below."""
    columns: list[tuple[str, Any]] = [
        ("model", lambda r: f"`{r['model']}`"),
        ("pixels", lambda r: _number(r["img_size"])),
        ("batch", lambda r: _number(r["batch_size"])),
        *([("width", lambda r: _number(r["width"]))] if any(row["width"] != 1 for row in rows) else []),
        ("parameters", lambda r: _number(r.get("params_m"), unit="M")),
        ("MACs", lambda r: _number(r.get("gmacs"), unit="G")),
        ("activations", lambda r: _number(r.get("activations_m"), unit="M")),
    ]
    for phase in (p for p in PHASES if any(key.startswith(f"{p}_") for row in rows for key in row)):
        columns += [
            (f"{phase} img/s", lambda r, p=phase: _speed(r, p)),
            (f"x {baseline}", lambda r, p=phase: _ratio(r, p)),
            ("of matmul", lambda r, p=phase: _number(r.get(f"{p}_share_of_matmul_rate"), ".0%")),
            ("memory", lambda r, p=phase: _number(r.get(f"{p}_memory_gb"), unit=" GB")),
        ]
    if any("published_top1" in row for row in rows):
        columns += [
            ("published top-1", lambda r: _number(r["published_top1"] if _as_published(r) else None, ".1f", " %")),
            ("published V100 img/s, batch 32", _published_speed),
        ]
    lines = [
        f"| {' | '.join(name for name, _ in columns)} |",
        f"| :--- |{' ---: |' * (len(columns) - 1)}",
        *(f"| {' | '.join(cell(row) for _, cell in columns)} |" for row in rows),
        "",
        *_failures(rows),
        f"{setting}.",
        "",
        "; ".join(f"{name} {value}" for name, value in environment.items() if value is not None),
    ]
    return "\n".join(lines)


def findings_table(findings: Iterable[Any], environment: dict[str, Any], setting: str) -> str:
    """The findings of a suite as a Markdown table, with setting and environment below."""
    lines = ["| what | ratio (range of rounds) | target | met | |", "| :--- | ---: | ---: | :--- | :--- |"]
    for finding in findings:
        found, values = "not measured", finding.ratios
        if values:
            found = f"{median(values):.2f} ({min(values):.2f}-{max(values):.2f})"
        target = f"{'at most' if finding.at_most else 'at least'} {finding.target:g}" if finding.target else "-"
        lines.append(f"| {finding.what} | {found} | {target} | {finding.verdict} | {_cell(finding.remark)} |")
    facts = "; ".join(f"{name} {value}" for name, value in environment.items() if value is not None)
    return "\n".join([*lines, "", f"{setting}.", "", facts])


def plan_table(plans: Iterable[Any]) -> str:
    """What trainings take (plans of `vip.benchmark.plan`) as a Markdown table."""
    names = ["model", "devices", "images an update", "img/s of a device", "an epoch", "training", "device hours"]
    names += ["limited by", "cores a node needs", "sent for an update", "bandwidth that hides it"]
    names += ["learning rate, linear or square-root rule"]
    lines = [f"| {' | '.join(names)} |", f"| :--- |{' ---: |' * (len(names) - 1)}"]
    for plan in plans:
        cells = [f"`{plan.model}`", f"{plan.devices}", f"{plan.update_size:,}", _number(plan.images_per_second)]
        cells += [f"{plan.epoch_seconds / 60:,.1f} min", f"{plan.hours:,.1f} h", f"{plan.hours * plan.devices:,.0f}"]
        cells += [f"loader, {plan.cores:g} cores a device" if plan.loader_limits else "steps"]
        cells += [_number(plan.cores_of_node), f"{plan.sent / 1e6:,.0f} MB", f"{plan.bandwidth / 1e9:,.2g} GB/s"]
        cells += [" or ".join(f"{plan.learning_rate(power):.2g}" for power in (1, 0.5))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def shares_table(shares: dict[str, dict[str, float] | str]) -> str:
    """Where the time of steps goes as a Markdown table; texts say why it is not known."""
    kinds = list(next((own for own in shares.values() if isinstance(own, dict)), [""]))
    lines = [f"| time of a step | {' | '.join(kinds)} |", f"| :--- |{' ---: |' * len(kinds)}"]
    for name, own in shares.items():
        cells = [_cell(own)] if isinstance(own, str) else [f"{own[kind]:.0%}" for kind in kinds]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """What was not written for a table, such as an error."""
    return text.replace("|", "\\|")


def _number(value: float | None, form: str = "", unit: str = "") -> str:
    """A number in a form, or in three digits at least."""
    if value is None:
        return "-"
    return f"{value:{form or (',.0f' if value >= 100 else '.3g')}}{unit}"


def _as_published(row: Row) -> bool:
    """Whether a row is of a published model at the image size its figures are for."""
    return "published_top1" in row and row["img_size"] == row["published_img_size"]


def _published_speed(row: Row) -> str:
    same = _as_published(row) and row.get("inference_batch_size", row["batch_size"]) == 32
    return _number(row["published_v100_images_per_second"] if same else None, ".0f")


def _speed(row: Row, phase: str) -> str:
    """Median images a second, what the rounds differ by, and the batch where it is not the one asked for."""
    if f"{phase}_images_per_second" not in row:
        return "failed" if f"{phase}_error" in row else "-"
    speed, low, high = (row[f"{phase}_images_per_second{end}"] for end in ("", "_low", "_high"))
    batch = row[f"{phase}_batch_size"]
    less = f", batch {batch}: out of memory with {row['batch_size']}" if batch != row["batch_size"] else ""
    spread = f"±{(high - low) / 2 / speed:.0%}" if row[f"{phase}_rounds"] > 1 else "one round"
    return f"{speed:,.{0 if speed >= 10 else 2}f} ({spread}{less})"


def _ratio(row: Row, phase: str) -> str:
    if f"{phase}_ratio" not in row:
        return "-"
    ratio, low, high = (row[f"{phase}_ratio{end}"] for end in ("", "_low", "_high"))
    return f"{ratio:.2f} ({low:.2f}-{high:.2f})" if row[f"{phase}_rounds"] > 1 else f"{ratio:.2f}"


def _failures(rows: list[Row]) -> list[str]:
    failed = [
        f"- `{row['model']}` at {f'{size} pixels' if (size := row['img_size']) else 'its own size'}, batch "
        f"{row['batch_size']}, {phase}: {row[f'{phase}_error']}"
        for row in rows
        for phase in PHASES
        if f"{phase}_error" in row
    ]
    return [*failed, ""] if failed else []


def csv_table(rows: list[Row]) -> str:
    """The rows as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def json_table(rows: list[Row], environment: dict[str, Any], options: dict[str, Any]) -> str:
    """The rows, what they were measured on and how, as JSON."""
    return json.dumps({"environment": environment, "options": options, "rows": rows}, indent=2)


def write_texts(folder: Path, texts: dict[str, str], flag: str = "--output") -> list[Path]:
    """Write texts to files of a folder, which is made.

    Args:
        folder: The folder.
        texts: Texts by the names of their files.
        flag: What chose the folder, and can choose another.

    Raises:
        UserError: If it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):  # what os.access says of root is not so everywhere
            pass
        for name, text in texts.items():
            with replacing(folder / name) as unfinished:
                unfinished.write_text(text if text.endswith("\n") else f"{text}\n", encoding="utf-8")
    except OSError as e:
        raise UserError(f"Cannot write to {folder} ({e.strerror}); make room, or choose another {flag}.") from e
    return [folder / name for name in texts]


def draw_benchmark(rows: list[Row], folder: Path) -> list[Path]:
    """Draw what the rows allow: accuracy over throughput and parameters, growth with image size, batch size and width.

    Raises:
        UserError: If matplotlib is not installed, or the folder cannot be written.
    """
    files = [
        *_draw_accuracy(rows, "inference_images_per_second", "images a second, inference", folder / "top1-throughput"),
        *_draw_accuracy(rows, "params_m", "parameters in millions", folder / "top1-parameters"),
    ]
    return files + draw_growth(rows, folder)


def draw_growth(rows: list[Row], folder: Path) -> list[Path]:
    """Draw growth with image size, batch size and width, of those that the rows have several of.

    Raises:
        UserError: As `draw_benchmark`.
    """
    files = []
    titles = {"img_size": "image size in pixels", "batch_size": "batch size", "width": "channels, as a factor"}
    for name, title in titles.items():
        if any(len({row[name] for row in own}) > 1 for own in _by(rows, lambda row: row["model"]).values()):
            files += _draw_growth(rows, name, title, folder)
    return files


def _draw_accuracy(rows: list[Row], x: str, title: str, path: Path) -> list[Path]:
    """Published accuracy over something measured, at the image size it was published for."""
    largest = max(row["batch_size"] for row in rows)
    points = [row for row in rows if _as_published(row) and row["batch_size"] == largest and row.get(x)]
    if not points:
        return []
    figure, (ax,) = new_figure()
    for own in _by(points, lambda row: row["published_name"].partition("-")[0]).values():
        own.sort(key=lambda row: row[x])
        (line,) = ax.plot([row[x] for row in own], [row["published_top1"] for row in own], marker="o", alpha=0.6)
        for row in own:
            place = (row[x], row["published_top1"])
            style = dict(xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8, color=line.get_color())
            ax.annotate(row["published_name"], place, **style)
    ax.set(xlabel=title, ylabel="published ImageNet top-1 in %")
    ax.margins(x=0.15, y=0.1)
    return save_figure(figure, path)


def _draw_growth(rows: list[Row], name: str, title: str, folder: Path) -> list[Path]:
    """Time of an image and peak memory as the image or the batch grows, for each phase."""
    files = []
    for phase in PHASES:
        if measured := [row for row in rows if row.get(f"{phase}_images_per_second")]:
            figure = _growth_figure(measured, phase, name, title)
            files += save_figure(figure, folder / f"{phase}-{name.replace('_', '-')}")
    return files


def _growth_figure(rows: list[Row], phase: str, name: str, title: str) -> Any:
    figure, axes = new_figure(2)
    measured_as = f"{phase}_batch_size" if name == "batch_size" else name  # it may have been halved
    for i, (label, own) in enumerate(_by(rows, lambda row: _growth_label(row, name)).items()):
        own.sort(key=lambda row: row[measured_as])
        x = [row[measured_as] for row in own]
        style = dict(marker="os^D"[i // len(COLORS) % 4], label=label)  # colours repeat, and then have another marker
        axes[0].plot(x, [1e3 / row[f"{phase}_images_per_second"] for row in own], **style)
        axes[1].plot(x, [row[f"{phase}_memory_gb"] or float("nan") for row in own], **style)
    for ax, quantity in zip(axes, ("milliseconds an image", "peak memory in GB"), strict=True):
        ax.set(xlabel=title, ylabel=quantity, title=PHASES[phase])
        if name == "batch_size":
            ax.set_xscale("log", base=2)
        ax.set_xticks(values := sorted({row[measured_as] for row in rows}), [str(value) for value in values])
        ax.minorticks_off()
        ax.set_ylim(bottom=0)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    return figure


def _growth_label(row: Row, name: str) -> str:
    """What stays while something grows."""
    said = {"img_size": f"{row['img_size']} px", "batch_size": f"batch {row['batch_size']}"}
    said |= {"width": f"width {row['width']:g}"} if row["width"] != 1 else {}
    return ", ".join([row["model"], *(text for key, text in said.items() if key != name)])


def _by(rows: Iterable[Row], key: Any) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups
