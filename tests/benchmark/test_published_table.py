"""The published comparison, spelled out here once more."""

import pytest
import timm
import torch

import vip  # noqa: F401  # registers the models
from vip.benchmark.published import PublishedRow, published_rows

TABLE = """
    EAMLP-14      30M   711  224  78.9
    gMLP-S        20M   -    224  79.6
    ResMLP-S24    30M   715  224  79.4
    ViP-Small/7   25M   719  224  81.5
    EAMLP-19      55M   464  224  79.4
    Mixer-B/16    59M   -    224  78.5
    ViP-Medium/7  55M   418  224  82.7
    gMLP-B        73M   -    224  81.6
    ResMLP-B24    116M  231  224  81.0
    ViP-Large/7   88M   298  224  83.2
"""
PAPERS = {"EAMLP": "2105.02358", "gMLP": "2105.08050", "ResMLP": "2105.03404", "ViP": "2106.12368"}


def test_rows() -> None:
    rows = [
        [r.name, f"{r.params_m:g}M", f"{r.images_per_second or '-'}".removesuffix(".0"), str(r.img_size), str(r.top1)]
        for r in published_rows()
    ]
    assert rows == [line.split() for line in TABLE.strip().splitlines()]


@pytest.mark.parametrize("row", published_rows(), ids=lambda row: row.model)
def test_models_exist_and_have_the_published_size(row: PublishedRow) -> None:
    assert row.paper == "arXiv:" + {**PAPERS, "Mixer": "2105.01601"}[row.name.partition("-")[0]]
    assert timm.is_model(row.model)
    with torch.device("meta"):
        model = timm.create_model(row.model)
    assert model.pretrained_cfg["input_size"] == (3, row.img_size, row.img_size)
    assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - row.params_m) <= 1
