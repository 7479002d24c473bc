"""The comparison of MLP-like models in the README of the published code.

Top-1 of ViP-Small/7 is 81.5, as its paper, the published log and later versions of that README have it, and not 81.6.
"""

import csv
from dataclasses import dataclass
from importlib.resources import files


@dataclass(frozen=True)
class PublishedRow:
    """A row of the published table.

    Attributes:
        name: Name in the table.
        model: Its name in timm, after `import vip`.
        params_m: Parameters in millions, as published.
        images_per_second: Inference throughput on a V100 with batches of 32, None where none was published.
        img_size: Height and width of the images.
        top1: Accuracy on the validation set of ImageNet-1k in percent.
        paper: Paper of the architecture.
    """

    name: str
    model: str
    params_m: float
    images_per_second: float | None
    img_size: int
    top1: float
    paper: str


def published_rows() -> list[PublishedRow]:
    """The table, in its order."""
    text = files("vip.benchmark").joinpath("published.csv").read_text(encoding="utf-8")
    return [
        PublishedRow(
            row["name"],
            row["model"],
            float(row["params_m"]),
            float(row["v100_images_per_second"]) if row["v100_images_per_second"] else None,
            int(row["img_size"]),
            float(row["top1"]),
            row["paper"],
        )
        for row in csv.DictReader(text.splitlines())
    ]
