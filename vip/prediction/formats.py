"""Predictions as text: a table to read, JSON lines, or CSV."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

from vip.errors import printable
from vip.prediction.predictor import Prediction

CSV_COLUMNS = ("image", "rank", "class", "name", "probability", "heatmap", "error")


def as_table(prediction: Prediction, picture: Path | None = None) -> str:
    """A line of the image's name, and one of each class with its probability in percent, index and name."""
    lines = [printable(str(prediction.image))]
    if prediction.error:
        lines.append(f"  not read: {printable(prediction.error)}")
    lines += [f"  {100 * c.probability:6.2f} %  {c.index:5}  {printable(c.name)}" for c in prediction.classes]
    return "\n".join(lines) + "\n"


def as_json(prediction: Prediction, picture: Path | None = None) -> str:
    """One JSON object, in one line."""
    content = {
        "image": str(prediction.image),
        "classes": [vars(score) for score in prediction.classes],
        "heatmap": picture and str(picture),
        "error": prediction.error or None,
    }
    return json.dumps(content) + "\n"


def as_csv(prediction: Prediction, picture: Path | None = None) -> str:
    """A row for each class, of the `CSV_COLUMNS`; one row without a class for an image that cannot be read."""
    image, shown = str(prediction.image), str(picture or "")
    rows: list[tuple] = [
        (image, rank, score.index, score.name, score.probability, shown, "")
        for rank, score in enumerate(prediction.classes, 1)
    ]
    return _csv(rows or [(image, "", "", "", "", shown, prediction.error)])


def _csv(rows: list[tuple]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


WRITERS: dict[str, Callable[[Prediction, Path | None], str]] = {"table": as_table, "json": as_json, "csv": as_csv}
HEADINGS = {"table": "", "json": "", "csv": _csv([CSV_COLUMNS])}
