"""Results of validations: rows, tables and files."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

from vip.errors import UserError
from vip.files import replacing


@dataclass(frozen=True)
class Metrics:
    """Result of an evaluation over all processes."""

    loss: float
    top1: float
    top5: float
    count: int
    correct1: int
    correct5: int

    def summary(self) -> dict[str, float]:
        """The metrics that timm's summary names."""
        return {"loss": self.loss, "top1": self.top1, "top5": self.top5}


def result_row(
    model: str,
    source: str,
    metrics: Metrics,
    param_count: int,
    data_config: dict[str, Any],
    images_per_second: float,
) -> dict[str, Any]:
    """A row under the names of timm's results, with counts beside."""
    height, width = data_config["input_size"][1:]
    return {
        "model": model,
        "checkpoint": source,
        "top1": metrics.top1,
        "top1_err": 100 - metrics.top1,
        "top5": metrics.top5,
        "top5_err": 100 - metrics.top5,
        "count": metrics.count,
        "correct1": metrics.correct1,
        "correct5": metrics.correct5,
        "loss": metrics.loss,
        "images_per_second": round(images_per_second, 1),
        "param_count": param_count / 1e6,
        "img_size": height if height == width else [height, width],
        "crop_pct": data_config["crop_pct"],
        "interpolation": data_config["interpolation"],
    }


def format_result(row: dict[str, Any]) -> str:
    """A row in words, with a 95 % confidence interval (Wilson) of the accuracy."""
    interval = binomtest(row["correct1"], row["count"]).proportion_ci(method="wilson") if row["count"] else None
    between = f", 95 % interval {interval.low:.2%} to {interval.high:.2%}" if interval else ""
    return (
        f"{row['model']}: top-1 {row['top1']:.3f} ({row['correct1']} of {row['count']}{between}), "
        f"top-5 {row['top5']:.3f} ({row['correct5']} of {row['count']}), loss {row['loss']:.4f}, "
        f"{row['images_per_second']:,.0f} img/s, {row['param_count']:.2f} M parameters"
    )


def format_table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table."""
    lines = [
        "| checkpoint | model | top-1 | top-5 | images | loss | img/s |",
        "| :--- | :--- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['model']} | failed: {row['error']} | | | | | |")
        else:
            lines.append(
                f"| {row['checkpoint']} | {row['model']} | {row['top1']:.3f} | {row['top5']:.3f} | {row['count']} "
                f"| {row['loss']:.4f} | {row['images_per_second']:,.0f} |"
            )
    return "\n".join(lines)


def write_results(path: str, file_format: str, rows: list[dict[str, Any]]) -> None:
    """Write rows to a CSV or JSON file, best first.

    Args:
        path: File to write.
        file_format: 'csv', 'json', or '' to go by the ending.
        rows: What `result_row` gave.

    Raises:
        UserError: If it cannot be written.
    """
    rows = sorted(rows, key=lambda row: row.get("top1", -1), reverse=True)
    as_json = file_format == "json" or (not file_format and path.endswith(".json"))
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as unfinished, open(unfinished, "w", newline="", encoding="utf-8") as file:
            if as_json:
                json.dump(rows, file, indent=4)
            else:
                writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
                writer.writeheader()
                writer.writerows(rows)
    except OSError as e:
        raise UserError(f"Cannot write the results to {path} ({e.strerror}); choose another --results-file.") from e
