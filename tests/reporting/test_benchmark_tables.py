"""Tables and pictures of rows that are made up."""

import csv
import io
import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vip.errors import UserError
from vip.reporting.benchmarks import csv_table, draw_benchmark, json_table, markdown_table, write_texts


def phase(
    name: str, speed: float, spread: float, batch: int = 32, ratio: tuple[float, ...] = (), rounds: int = 5
) -> dict[str, Any]:
    values = {
        "batch_size": batch,
        "rounds": rounds,
        "images_per_second": speed,
        "images_per_second_low": speed - spread,
        "images_per_second_high": speed + spread,
        **dict(zip(("ratio", "ratio_low", "ratio_high"), ratio, strict=False)),
        "share_of_matmul_rate": 0.4567,
        "memory_gb": 1.2345,
        "first_step_seconds": 2.5,
    }
    return {f"{name}_{key}": value for key, value in values.items()}


def row(model: str, size: int | None = 224, batch: int = 32, **values: Any) -> dict[str, Any]:
    return {"model": model, "img_size": size, "batch_size": batch, "width": 1.0, **values}


COUNTS = {"params_m": 25.06, "gmacs": 6.914, "activations_m": 45.25}
PUBLISHED = {
    "published_name": "ViP-Small/7",
    "published_top1": 81.5,
    "published_v100_images_per_second": 719.0,
    "published_img_size": 224,
}
ROWS = [
    row("vip_s7", **PUBLISHED, **COUNTS, **phase("inference", 1234.5, 24.69, ratio=(1.0, 1.0, 1.0)))
    | phase("train", 9.87, 0.5, 8, (1.0, 0.9, 1.1)),
    row("mixer_b16_224", **{**PUBLISHED, "published_top1": 78.5, "published_v100_images_per_second": None})
    | COUNTS
    | phase("inference", 617.25, 0.0, ratio=(0.5, 0.48, 0.523))
    | {"train_error": "out of | luck"},
    row("other", None, inference_error="Cannot create other", train_error="Cannot create other"),
    row("half", 64, **COUNTS, **{**phase("train", 10.0, 1.0), "train_memory_gb": None}),
]
TABLE = """\
| model | pixels | batch | parameters | MACs | activations \
| inference img/s | x vip_s7 | of matmul | memory \
| train img/s | x vip_s7 | of matmul | memory | published top-1 | published V100 img/s, batch 32 |
| :--- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| `vip_s7` | 224 | 32 | 25.1M | 6.91G | 45.2M \
| 1,234 (±2%) | 1.00 (1.00-1.00) | 46% | 1.23 GB \
| 9.87 (±5%, batch 8: out of memory with 32) | 1.00 (0.90-1.10) | 46% | 1.23 GB | 81.5 % | 719 |
| `mixer_b16_224` | 224 | 32 | 25.1M | 6.91G | 45.2M \
| 617 (±0%) | 0.50 (0.48-0.52) | 46% | 1.23 GB \
| failed | - | - | - | 78.5 % | - |
| `other` | - | 32 | - | - | - | failed | - | - | - | failed | - | - | - | - | - |
| `half` | 64 | 32 | 25.1M | 6.91G | 45.2M | - | - | - | - | 10 (±10%) | - | 46% | - | - | - |

- `mixer_b16_224` at 224 pixels, batch 32, train: out of | luck
- `other` at its own size, batch 32, inference: Cannot create other
- `other` at its own size, batch 32, train: Cannot create other

bfloat16, 5 rounds of 1 s.

gpu Fast GPU; torch 2.9; load_average 0.0"""
FACTS = {"gpu": "Fast GPU", "torch": "2.9", "cpu_mhz": None, "load_average": 0.0}


def test_markdown() -> None:
    assert markdown_table(ROWS, FACTS, "vip_s7", "bfloat16, 5 rounds of 1 s") == TABLE


def test_a_table_of_one_phase_without_published_rows() -> None:
    rows = [row("a", 32, 4, **COUNTS, **phase("train", 100, 1, 4, (1, 1, 1)))]
    text = markdown_table(rows, {"torch": "2.9"}, "a", "float32")
    assert text.splitlines() == [
        "| model | pixels | batch | parameters | MACs | activations | train img/s | x a | of matmul | memory |",
        "| :--- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| `a` | 32 | 4 | 25.1M | 6.91G | 45.2M | 100 (±1%) | 1.00 (1.00-1.00) | 46% | 1.23 GB |",
        "",
        "float32.",
        "",
        "torch 2.9",
    ]


def cells(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Rows of the Markdown table by column; of columns of the same name, the first."""
    head, _, *lines = markdown_table(rows, {}, "vip_s7", "float32").splitlines()[: 2 + len(rows)]
    split = [[cell.strip() for cell in line.strip("|").split("|")] for line in (head, *lines)]
    return [dict(reversed(list(zip(split[0], line, strict=True)))) for line in split[1:]]


def test_the_batch_tells_rows_of_a_sweep_apart() -> None:
    rows = cells([row("vip_s7", 224, batch, **phase("inference", 100, 1, batch)) for batch in (8, 32, 2048)])
    assert [r["batch"] for r in rows] == ["8", "32", "2,048"]
    failed = [row("vip_s7", 224, batch, inference_error="no luck") for batch in (8, 32)]
    text = markdown_table(failed, {}, "vip_s7", "float32")
    for batch in (8, 32):
        assert f"- `vip_s7` at 224 pixels, batch {batch}, inference: no luck" in text.splitlines()


def test_published_figures_stand_where_they_belong() -> None:
    """Top-1 at the image size it is for, the throughput with its batches of 32 in addition."""
    sizes = [(224, 32), (224, 8), (224, 64), (448, 32), (None, 32)]
    rows = cells([row("vip_s7", size, batch, **PUBLISHED) for size, batch in sizes] + [row("vip_s14", 224, 32)])
    assert [r["published top-1"] for r in rows] == [*["81.5 %"] * 3, "-", "-", "-"]
    assert [r["published V100 img/s, batch 32"] for r in rows] == ["719", *["-"] * 5]


@pytest.mark.parametrize(
    "value, text",
    [(0.0094137, "0.00941"), (0.3651, "0.365"), (6.914, "6.91"), (45.26, "45.3"), (99.97, "100"), (1234.5, "1,234")],
)
def test_three_digits(value: float, text: str) -> None:
    measured = {**phase("inference", 100, 1), "inference_memory_gb": value}
    (r,) = cells([row("vip_s7", params_m=value, gmacs=value, activations_m=value, **measured)])
    assert (r["parameters"], r["MACs"], r["activations"]) == (f"{text}M", f"{text}G", f"{text}M")
    assert r["memory"] == f"{text} GB"


def test_one_round_has_no_spread() -> None:
    one = phase("inference", 100, 0, 8, (0.5, 0.5, 0.5), rounds=1)
    alone, halved = cells([row("a", 224, 8, **one), row("a", 224, 32, **one)])
    assert (alone["inference img/s"], alone["x vip_s7"]) == ("100 (one round)", "0.50")
    assert halved["inference img/s"] == "100 (one round, batch 8: out of memory with 32)"


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(ROWS), min_size=1, max_size=6))
def test_tables_are_rectangular_and_read_back(rows: list[dict[str, Any]]) -> None:
    lines = markdown_table(rows, {}, "vip_s7", "float32").splitlines()[: 2 + len(rows)]
    assert len({line.count("|") for line in lines}) == 1
    read = list(csv.DictReader(io.StringIO(csv_table(rows))))
    names = {name for r in rows for name in r}
    expected = [{n: "" if r.get(n) is None else str(r[n]) for n in names} for r in rows]
    assert read == expected
    assert json.loads(json_table(rows, FACTS, {"rounds": 5})) == {
        "environment": FACTS,
        "options": {"rounds": 5},
        "rows": rows,
    }


def test_writing(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    for _ in range(2):
        files = write_texts(folder, {"table.md": "ä", "results.csv": "a,b\n"})
    assert files == [folder / "table.md", folder / "results.csv"] and sorted(folder.iterdir()) == sorted(files)
    assert (folder / "table.md").read_bytes() == "ä\n".encode() and (folder / "results.csv").read_text() == "a,b\n"
    (tmp_path / "file").write_text("a file")
    for path in (tmp_path / "file", tmp_path / "file" / "x"):
        with pytest.raises(UserError, match=f"Cannot write to {path} .*--output"):
            write_texts(path, {"table.md": ""})
    (folder / "results.json").mkdir()
    with pytest.raises(UserError, match="--output"):
        write_texts(folder, {"results.json": ""})


# --- pictures


def words(file: Path) -> str:
    """Text of an SVG: matplotlib names each of its groups of glyphs in a comment."""
    parser = ET.XMLParser(target=ET.TreeBuilder(insert_comments=True))
    root = ET.parse(file, parser).getroot()
    return "\n".join(str(node.text) for node in root.iter() if node.tag is ET.Comment)


def sweep(sizes: list[int], batches: list[int], **values: Any) -> list[dict[str, Any]]:
    return [
        row(model, size, batch, **COUNTS, **phase("inference", speed * 224 / size, 1, batch), **values)
        for model, speed in (("vip_s7", 100.0), ("mixer_b16_224", 200.0))
        for size in sizes
        for batch in batches
    ]


def test_nothing_to_draw(tmp_path: Path) -> None:
    assert draw_benchmark(sweep([224], [32]), tmp_path / "x") == []
    assert draw_benchmark([ROWS[2]], tmp_path / "x") == [] and not (tmp_path / "x").exists()


def test_accuracy_is_drawn_at_the_image_size_it_was_published_for(tmp_path: Path) -> None:
    names = ["top1-throughput.png", "top1-throughput.svg", "top1-parameters.png", "top1-parameters.svg"]
    files = draw_benchmark(sweep([224], [32], **PUBLISHED), tmp_path)
    assert [file.name for file in files] == names
    assert "ViP-Small/7" in words(files[1]) and "images a second, inference" in words(files[1])
    other = draw_benchmark(sweep([448], [32], **PUBLISHED), tmp_path / "other")
    assert other == [] and not (tmp_path / "other").exists()


@pytest.mark.parametrize("sizes, batches", [([224, 448], [32]), ([224], [8, 32]), ([224, 448], [8, 32])])
def test_growth(tmp_path: Path, sizes: list[int], batches: list[int]) -> None:
    files = draw_benchmark(sweep(sizes, batches), tmp_path)
    expected = ["inference-img-size"] * (len(sizes) > 1) + ["inference-batch-size"] * (len(batches) > 1)
    assert [file.name for file in files] == [f"{name}.{ending}" for name in expected for ending in ("png", "svg")]
    for file in files:
        if file.suffix == ".png":
            assert file.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
            continue
        text = words(file)
        assert "vip_s7" in text and "mixer_b16_224" in text and "peak memory in GB" in text
        others = [f"batch {b}" for b in batches] if "img" in file.name else [f"{size} px" for size in sizes]
        labels = [line.strip() for line in text.splitlines() if "," in line]
        assert labels == [f"{model}, {other}" for model in ("vip_s7", "mixer_b16_224") for other in others]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The figures that are drawn, by name."""
    drawn: dict[str, Any] = {}

    def save_figure(figure: Any, path: Path) -> list[Path]:
        drawn[path.name] = figure
        return []

    monkeypatch.setattr("vip.reporting.benchmarks.save_figure", save_figure)
    return drawn


def lines(ax: Any) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): list(zip(*map(list, line.get_data()), strict=True)) for line in ax.get_lines()}


def test_values_of_growth(figures: dict[str, Any], tmp_path: Path) -> None:
    """At half the speed an image takes twice the time; points are in order whatever that of the rows."""
    draw_benchmark(sweep([448, 224], [32]), tmp_path)
    (time, memory) = figures["inference-img-size"].axes
    assert lines(time) == {
        "vip_s7, batch 32": [(224, pytest.approx(10)), (448, pytest.approx(20))],
        "mixer_b16_224, batch 32": [(224, pytest.approx(5)), (448, pytest.approx(10))],
    }
    assert lines(memory)["vip_s7, batch 32"] == [(224, 1.2345), (448, 1.2345)]
    (legend,) = figures["inference-img-size"].legends
    assert [text.get_text() for text in legend.get_texts()] == list(lines(time))
    assert time.get_xscale() == memory.get_xscale() == "linear" and not time.get_legend()


def test_batches_double_along_the_axis(figures: dict[str, Any], tmp_path: Path) -> None:
    draw_benchmark(sweep([224], [1, 8, 32]), tmp_path)
    for ax in figures["inference-batch-size"].axes:
        assert ax.get_xscale() == "log" and ax.xaxis.get_transform().base == 2
        assert list(ax.get_xticks()) == [1, 8, 32] and not len(ax.get_xticks(minor=True))
        assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "8", "32"]
        assert list(lines(ax)) == ["vip_s7, 224 px", "mixer_b16_224, 224 px"] and ax.get_ylim()[0] == 0


def test_no_two_lines_look_the_same(figures: dict[str, Any], tmp_path: Path) -> None:
    models = [f"model{i}" for i in range(24)]
    draw_benchmark([row(m, s, **phase("inference", 9, 1)) for m in models for s in (32, 64)], tmp_path)
    drawn = figures["inference-img-size"].axes[0].get_lines()
    assert len({(line.get_color(), line.get_marker()) for line in drawn}) == len(models)


def test_accuracy_is_drawn_for_the_largest_batch(figures: dict[str, Any], tmp_path: Path) -> None:
    rows = [row("vip_s7", 224, b, **PUBLISHED, **COUNTS, **phase("inference", 10.0 * b, 1, b)) for b in (8, 32, 16)]
    draw_benchmark(rows, tmp_path)
    assert list(lines(figures["top1-throughput"].axes[0]).values()) == [[(320, 81.5)]]
    assert [len(points) for points in lines(figures["top1-parameters"].axes[0]).values()] == [1]


def test_values_of_accuracy(figures: dict[str, Any], tmp_path: Path) -> None:
    other = {**PUBLISHED, "published_name": "ViP-Medium/7", "published_top1": 82.7}
    mixer = {**PUBLISHED, "published_name": "Mixer-B/16", "published_top1": 78.5}
    rows = [
        row("vip_m7", **other, **COUNTS, **phase("inference", 50, 1)),
        row("vip_s7", **PUBLISHED, **COUNTS, **phase("train", 70, 1)),  # its inference was not measured
        row("vip_x", **PUBLISHED, **COUNTS, **phase("inference", 30, 1)),
        row("mixer_b16_224", **mixer, **COUNTS, **phase("inference", 90, 1)),
    ]
    draw_benchmark(rows, tmp_path)
    (ax,) = figures["top1-throughput"].axes
    assert list(lines(ax).values()) == [[(30, 81.5), (50, 82.7)], [(90, 78.5)]], "a family is a line"
    colours = [line.get_color() for line in ax.get_lines()]
    assert [(text.get_text(), text.xy, text.get_color()) for text in ax.texts] == [
        ("ViP-Small/7", (30, 81.5), colours[0]),
        ("ViP-Medium/7", (50, 82.7), colours[0]),
        ("Mixer-B/16", (90, 78.5), colours[1]),
    ]
    (ax,) = figures["top1-parameters"].axes
    assert [len(points) for points in lines(ax).values()] == [3, 1]


def test_halved_batches_are_drawn_as_what_they_are(figures: dict[str, Any], tmp_path: Path) -> None:
    rows = [row("a", 224, 8, **phase("train", 1, 0, 8)), row("a", 224, 64, **phase("train", 2, 0, 16))]
    draw_benchmark(rows, tmp_path)
    assert [x for x, _ in lines(figures["train-batch-size"].axes[1])["a, 224 px"]] == [8, 16]


def test_failed_rows_and_unknown_memory_are_left_out_of_pictures(tmp_path: Path) -> None:
    rows = sweep([224, 448], [32])
    rows[0]["inference_memory_gb"] = None
    rows[1] = row("vip_s7", 448, inference_error="out of luck")
    assert len(draw_benchmark(rows, tmp_path)) == 2


def test_the_same_rows_are_the_same_pictures(tmp_path: Path) -> None:
    for name in ("a", "b"):
        draw_benchmark(sweep([224, 448], [8, 32], **PUBLISHED), tmp_path / name)
    files = sorted((tmp_path / "a").glob("*.svg"))
    assert len(files) == 4
    for file in files:
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
