"""The benchmark as a whole: its rows, their figures, the files and the mistakes of a command line."""

import csv
import io
import json
import os
import shlex
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any

import pytest
import timm
import torch
from training_command import Outcome

import vip.cli
from vip.benchmark import environment, runner
from vip.benchmark.config import BenchmarkConfig
from vip.benchmark.contenders import Case, Contender
from vip.benchmark.counts import Counts, count
from vip.benchmark.measure import Turns
from vip.errors import UserError

CPU = torch.device("cpu")
QUICK = ("--device", "cpu", "--rounds", 2, "--seconds", 0.001, "--warmup", 1)
MODELS = ("test_vit", "vip_nano4_32")
COUNTED = {"model", "img_size", "batch_size", "width", "params_m", "gmacs", "activations_m"}
FIGURES = {
    *("batch_size", "rounds", "images_per_second", "images_per_second_low", "images_per_second_high"),
    *("ratio", "ratio_low", "ratio_high", "share_of_matmul_rate", "memory_gb", "first_step_seconds"),
}


@pytest.fixture
def quick_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """A smaller matrix product than the real one, which takes most of the time of a quick benchmark."""
    a = torch.randn(64, 64)
    monkeypatch.setattr(runner, "matmul_step", lambda dtype, device: (lambda: a @ a, 64**3))


# --- what is measured


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What a sweep over image sizes and batch sizes prints, and its folder."""
    folder = tmp_path_factory.mktemp("benchmark") / "new" / "folder"
    sweep = ("--models", *MODELS, "--img-size", 32, 64, "-b", 1, 2, "--baseline", "vip_nano4_32")
    argv = ["benchmark", *sweep, *QUICK, "--format", "json", "--output", folder]
    with redirect_stdout(io.StringIO()) as out:
        assert vip.cli.main([str(a) for a in argv]) == 0
    return out.getvalue(), folder


@pytest.fixture
def rows(measured: tuple[str, Path]) -> list[dict[str, Any]]:
    return json.loads(measured[0])["rows"]


def test_a_sweep_has_a_row_for_each_combination(rows: list[dict[str, Any]]) -> None:
    assert [(row["img_size"], row["batch_size"], row["model"]) for row in rows] == [
        (size, batch, model) for size in (32, 64) for batch in (1, 2) for model in MODELS
    ]
    names = COUNTED | {f"{phase}_{name}" for phase in ("inference", "train") for name in FIGURES}
    for row in rows:
        assert row.keys() == names
        assert all(value > 0 for name, value in row.items() if name != "model")
        assert row["inference_rounds"] == row["train_rounds"] == 2


def test_figures_agree_with_each_other(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        model = timm.create_model(row["model"], img_size=row["img_size"])
        counts = count(model, (3, row["img_size"], row["img_size"]))
        assert row["params_m"] == sum(p.numel() for p in model.parameters()) / 1e6
        assert (row["gmacs"], row["activations_m"]) == (counts.macs / 1e9, counts.activations / 1e6)
        for phase in ("inference", "train"):
            speed = [row[f"{phase}_images_per_second{end}"] for end in ("_low", "", "_high")]
            ratio = [row[f"{phase}_ratio{end}"] for end in ("_low", "", "_high")]
            assert speed == sorted(speed) and ratio == sorted(ratio)
            assert row[f"{phase}_batch_size"] == row["batch_size"]
            assert row[f"{phase}_memory_gb"] > row["params_m"] * 4e6 / 1e9
            if row["model"] == "vip_nano4_32":
                assert ratio == [1, 1, 1]
        assert row["train_memory_gb"] > 3 * row["params_m"] * 4e6 / 1e9 > 0
        assert row["train_images_per_second_low"] < row["inference_images_per_second_high"]


def test_shares_of_the_product_rate(rows: list[dict[str, Any]]) -> None:
    """All rows of a phase were held against the same product, of three times as many in training."""
    for phase, products in (("inference", 1), ("train", 3)):
        rates = [
            row[f"{phase}_images_per_second"] * row["gmacs"] * products / row[f"{phase}_share_of_matmul_rate"]
            for row in rows
        ]
        assert rates == pytest.approx([rates[0]] * len(rates))
        assert 0.1 < rates[0] < 100_000  # billions of products a second, from a slow core to many fast ones


def test_files(measured: tuple[str, Path], rows: list[dict[str, Any]]) -> None:
    printed, folder = measured
    pictures = [f"{phase}-{name}" for phase in ("inference", "train") for name in ("batch-size", "img-size")]
    assert sorted(file.name for file in folder.iterdir()) == sorted(
        ["results.csv", "results.json", "table.md", *(f"{p}.{ending}" for p in pictures for ending in ("png", "svg"))]
    )
    assert json.loads((folder / "results.json").read_text()) == json.loads(printed)
    table = list(csv.DictReader((folder / "results.csv").read_text().splitlines()))
    assert [{name: str(value) for name, value in row.items()} for row in rows] == table
    text = (folder / "table.md").read_text()
    for size in (32, 64):
        for batch in (1, 2):
            assert text.count(f"| `test_vit` | {size} | {batch} |") == 1
    assert "\n\nfloat32, 2 rounds of 0.001 s, training with adamw.\n\ndate " in text
    for name in pictures:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        root = ET.parse(folder / f"{name}.svg").getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"


def test_what_it_ran_on_and_how(measured: tuple[str, Path]) -> None:
    result = json.loads(measured[0])
    facts = result["environment"]
    assert (facts["torch"], facts["timm"]) == (torch.__version__, timm.__version__)
    assert facts["cpu_threads_of_torch"] == torch.get_num_threads() and facts["cpu_cores"] == os.cpu_count()
    assert not any(name.startswith("gpu") for name in facts) and "cpu_mhz" in facts
    options = result["options"]
    assert options["models"] == list(MODELS) and options["img_size"] == [32, 64] and options["rounds"] == 2
    assert options.keys() == vars(BenchmarkConfig()).keys()


# --- figures by hand


def simulate(
    monkeypatch: pytest.MonkeyPatch,
    seconds: Mapping[str, list[float]],
    batches: Mapping[str, int] = MappingProxyType({}),
    errors: Mapping[str, str] = MappingProxyType({}),
    **options: Any,
) -> dict[str, dict[str, Any]]:
    """Rows of models whose times are given, of a million products an image; a matrix product is 2e9 in a second."""

    def prepare(case: Case, phase: str, config: BenchmarkConfig, device: torch.device) -> Contender:
        if not seconds[case.model]:
            raise UserError(f"{case.model} does not fit\ninto anything")
        batch = batches.get(case.model, case.batch_size)
        return Contender(lambda: None, Counts(2_000_000, 1_000_000, 3_000_000), (3, 16, 24), batch, 5 * 10**8, 0.25)

    def take_turns(steps: Mapping[Any, Any], *args: Any) -> dict[Any, Turns]:
        taken = {}
        for name in steps:
            model = name.model if isinstance(name, Case) else runner.MATMUL
            taken[name] = Turns([0.5] if model == runner.MATMUL else seconds[model], errors.get(model, ""))
        return taken

    monkeypatch.setattr(runner, "prepare", prepare)
    monkeypatch.setattr(runner, "take_turns", take_turns)
    monkeypatch.setattr(runner, "matmul_step", lambda dtype, device: (lambda: None, 10**9))
    config = BenchmarkConfig(batch_size=[8], **{"bench": "inference", **options})
    return {row["model"]: row for row in runner.run(config, list(seconds), next(iter(seconds)), CPU)}


def test_median_range_and_ratio_of_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third round was slow for both, which speeds show and ratios do not."""
    rows = simulate(monkeypatch, {"a": [1.0, 1.25, 8.0], "b": [2.0, 2.5, 16.0]})
    assert rows["b"] == {
        **{
            "model": "b",
            "img_size": 24,
            "batch_size": 8,
            "width": 1.0,
            "params_m": 2.0,
            "gmacs": 0.001,
            "activations_m": 3.0,
        },
        **{"inference_batch_size": 8, "inference_memory_gb": 0.5, "inference_first_step_seconds": 0.25},
        **{"inference_images_per_second": 8 / 2.5, "inference_images_per_second_low": 0.5},
        **{"inference_images_per_second_high": 4.0, "inference_ratio": 0.5, "inference_ratio_low": 0.5},
        **{
            "inference_rounds": 3,
            "inference_ratio_high": 0.5,
            "inference_share_of_matmul_rate": pytest.approx(3.2e6 / 2e9),
        },
    }
    assert [rows["a"][f"inference_ratio{end}"] for end in ("", "_low", "_high")] == [1, 1, 1]


def test_ratios_are_of_the_same_round(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"a": [1.0, 2.0, 4.0], "b": [3.0, 1.0, 2.0]}
    row = simulate(monkeypatch, times)["b"]
    ratios = [a / b for a, b in zip(times["a"], times["b"], strict=True)]
    assert row["inference_ratio"] == median(ratios)
    assert (row["inference_ratio_low"], row["inference_ratio_high"]) == (min(ratios), max(ratios))


def test_a_step_of_training_is_three_products(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {p: simulate(monkeypatch, {"a": [1.0]}, bench=p)["a"] for p in ("inference", "train")}
    shares = [rows[phase][f"{phase}_share_of_matmul_rate"] for phase in ("inference", "train")]
    assert shares == pytest.approx([8e6 / 2e9, 3 * 8e6 / 2e9])


def test_a_smaller_batch_counts_as_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = simulate(monkeypatch, {"a": [1.0], "b": [1.0]}, batches={"b": 2})
    assert rows["b"]["inference_images_per_second"] == 2 and rows["b"]["inference_ratio"] == 0.25
    assert rows["b"]["batch_size"] == 8 and rows["b"]["inference_batch_size"] == 2


def test_rows_that_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before or among the turns; others are measured, without a ratio where it is the baseline that failed."""
    rows = simulate(monkeypatch, {"base": [], "late": [1.0], "b": [2.0]}, errors={"late": "lost"}, bench="both")
    for phase in ("inference", "train"):
        assert rows["base"][f"{phase}_error"] == "base does not fit into anything"
        assert rows["late"][f"{phase}_error"] == "lost" and f"{phase}_images_per_second" not in rows["late"]
        assert rows["b"][f"{phase}_images_per_second"] == 4.0
    assert not any("ratio" in name for row in rows.values() for name in row)


def test_the_matrix_product_has_its_memory_before_the_models_take_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []

    def prepare(case: Case, *args: Any) -> Contender:
        taken.append(case.model)
        return Contender(lambda: None, Counts(1, 1, 1), (3, 8, 8), 1, None, 0.1)

    def matmul_step(*args: Any) -> tuple[Callable[[], None], int]:
        taken.append("product")
        return lambda: None, 1

    monkeypatch.setattr(runner, "prepare", prepare)
    monkeypatch.setattr(runner, "matmul_step", matmul_step)
    options = dict(bench="inference", rounds=1, seconds=0.0, batch_size=[1])
    runner.run(BenchmarkConfig(**options), ["a", "b"], "a", CPU)
    assert taken == ["product", "a", "b"]


def test_rows_of_published_models(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = simulate(monkeypatch, {"vip_s7": [1.0], "mixer_b16_224": [1.0], "vip_s14": [1.0]})
    published = {name: value for name, value in rows["vip_s7"].items() if name.startswith("published")}
    assert published == {
        "published_name": "ViP-Small/7",
        "published_top1": 81.5,
        "published_v100_images_per_second": 719,
        "published_img_size": 224,
    }
    assert rows["mixer_b16_224"]["published_v100_images_per_second"] is None
    assert not any(name.startswith("published") for name in rows["vip_s14"])


def test_the_setting_in_words() -> None:
    config = BenchmarkConfig(precision="float32", bench="inference", rounds=3, seconds=0.5)
    assert config.setting == "float32, 3 rounds of 0.5 s"
    assert BenchmarkConfig(rounds=1).turns == "1 round of 1 s"
    config = BenchmarkConfig(precision="bfloat16", bench="both", opt="sgd", channels_last=True, torchcompile="inductor")
    assert config.setting.startswith("bfloat16, ")
    assert config.setting.endswith(" s, channels last, torch.compile (inductor, default), training with sgd")


# --- out of memory in a turn


def run_with_room_for(
    monkeypatch: pytest.MonkeyPatch,
    room: int,
    models: list[str],
    batch: int,
    message: str = "not enough memory",
    lost_at: int = 0,
) -> tuple[dict[str, dict[str, Any]], list[tuple[str, int]]]:
    """Rows and preparations of steps of which `big` finds no room beside the others for more than so many images."""
    prepared: list[tuple[str, int]] = []

    def prepare(case: Case, *args: Any) -> Contender:
        prepared.append((case.model, case.batch_size))
        if case.model == "big" and case.batch_size == lost_at:
            raise UserError("big does not fit")

        def step() -> None:
            if case.model == "big" and case.batch_size > room:
                raise RuntimeError(message)

        return Contender(step, Counts(1, 1, 1), (3, 8, 8), case.batch_size, None, 0.1)

    monkeypatch.setattr(runner, "prepare", prepare)
    monkeypatch.setattr(runner, "matmul_step", lambda dtype, device: (lambda: None, 1))
    options: dict[str, Any] = dict(bench="inference", rounds=2, seconds=0.0, batch_size=[batch])
    rows = runner.run(BenchmarkConfig(**options), models, models[0], CPU)
    return {row["model"]: row for row in rows}, prepared


@pytest.mark.parametrize("room, batches", [(8, [8]), (7, [8, 4]), (1, [8, 4, 2, 1])])
def test_out_of_memory_beside_the_others(monkeypatch: pytest.MonkeyPatch, room: int, batches: list[int]) -> None:
    """The one that lacks it is measured with half its batch, and all have turns of the same rounds again."""
    rows, prepared = run_with_room_for(monkeypatch, room, ["small", "big"], 8)
    assert prepared == [("small", 8), *(("big", batch) for batch in batches)]
    assert (rows["big"]["batch_size"], rows["big"]["inference_batch_size"]) == (8, batches[-1])
    assert rows["small"]["inference_batch_size"] == 8
    for row in rows.values():
        assert row["inference_rounds"] == 2 and row["inference_ratio"] > 0 and "inference_error" not in row


def test_no_room_for_a_single_image_in_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, prepared = run_with_room_for(monkeypatch, 0, ["small", "big"], 4)
    assert [batch for model, batch in prepared if model == "big"] == [4, 2, 1]
    assert rows["big"]["inference_error"] == "not enough memory" and rows["small"]["inference_rounds"] == 2


def test_no_room_when_prepared_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the others it may not even be prepared with half its batch; these are worth having nevertheless."""
    rows, _ = run_with_room_for(monkeypatch, 1, ["small", "big"], 8, lost_at=4)
    assert rows["big"]["inference_error"] == "big does not fit" and rows["small"]["inference_rounds"] == 2


def test_other_errors_in_a_turn_are_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, prepared = run_with_room_for(monkeypatch, 1, ["small", "big"], 4, "lost")
    assert prepared == [("small", 4), ("big", 4)] and rows["big"]["inference_error"] == "lost"


# --- the command


def test_a_model_that_does_not_take_an_image_size(
    command: Callable[..., Outcome], quick_product: None, tmp_path: Path
) -> None:
    models = ("vip_nano4_32", "test_resnet")
    outcome = command("benchmark", "--models", *models, "--img-size", 40, 33, *QUICK, "-b", 1, "--output", tmp_path)
    assert outcome.status == 1 and "Traceback" not in outcome.err
    rows = {(r["model"], r["img_size"]): r for r in json.loads((tmp_path / "results.json").read_text())["rows"]}
    for phase in ("inference", "train"):
        error = rows.pop(("vip_nano4_32", 33)) if phase == "train" else rows[("vip_nano4_32", 33)]
        assert "33 does not work" in error[f"{phase}_error"] and "32 and 40" in error[f"{phase}_error"]
        failure = f"- `vip_nano4_32` at 33 pixels, batch 1, {phase}: Cannot create vip_nano4_32: Image height 33"
        assert failure in outcome.out
    assert len(rows) == 3 and not any(name.endswith("_error") for row in rows.values() for name in row)
    assert "train_ratio" in rows[("test_resnet", 40)] and "train_ratio" not in rows[("test_resnet", 33)]


@pytest.mark.parametrize("bench, form", [("inference", "markdown"), ("train", "csv"), ("inference", "json")])
def test_formats(command: Callable[..., Outcome], quick_product: None, tmp_path: Path, bench: str, form: str) -> None:
    argv = ("--models", "vip_nano4_32", "-b", 1, "--bench", bench, "--format", form, "--output", tmp_path)
    outcome = command("benchmark", *argv, *QUICK)
    assert outcome.status == 0
    file = tmp_path / {"markdown": "table.md", "csv": "results.csv", "json": "results.json"}[form]
    assert outcome.out.strip() == file.read_text().strip()
    other = "train" if bench == "inference" else "inference"
    if form == "csv":
        (row,) = csv.DictReader(io.StringIO(outcome.out.strip()))
    elif form == "json":
        (row,) = json.loads(outcome.out)["rows"]
    else:
        assert f"| {bench} img/s |" in outcome.out and f"{other} img/s" not in outcome.out
        return
    assert row["model"] == "vip_nano4_32" and float(row[f"{bench}_ratio"]) == 1
    assert not any(name.startswith(other) for name in row)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.csv", "results.json", "table.md"]


def test_default_folder(
    command: Callable[..., Outcome], quick_product: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command("benchmark", "--models", "vip_nano4_32", "-b", 1, "--bench", "inference", *QUICK).status == 0
    (folder,) = (tmp_path / "output" / "benchmark").iterdir()
    assert (folder / "table.md").is_file()


@pytest.mark.parametrize(
    "argv, words",
    [
        ("--models nosuch", ["'nosuch'"]),
        ("--models vip_s8", ["'vip_s8'", "vip_s7"]),
        ("--models vip_s7 nosuch*", ["--models", "'nosuch*'"]),
        ("--table published --models vip_s7", ["--table", "--models", "one"]),
        ("--table other", ["--table", "'other'", "published"]),
        ("--models vip_nano4_32 --baseline vip_s7", ["--baseline vip_s7", "vip_nano4_32"]),
        ("--baseline vip_ti7", ["--baseline vip_ti7", "vip_s7"]),
        ("--models vip_nano4_32 --torchcompile nosuch", ["--torchcompile nosuch", "inductor"]),
        ("--models vip_nano4_32 --memory-budget 0.5", ["--memory-budget", "--torchcompile: add it"]),
        ("--models vip_nano4_32 --torchcompile-mode max-autotune", ["--torchcompile-mode", "--torchcompile: add it"]),
        ("--models vip_nano4_32 --opt nosuch", ["nosuch", "--opt"]),
        ("--models vip_nano4_32 --device nosuch", ["'nosuch'", "--device", "cpu"]),
        ("--precision int8", ["--precision", "'int8'", "bfloat16"]),
        ("--bench forward", ["--bench", "'forward'", "inference"]),
        ("--format xml", ["--format", "'xml'", "json"]),
        ("--modles vip_s7", ["--modles", "Did you mean --models"]),
        ("vip_s7", ["vip_s7", "flag"]),
        ("--rounds 0", ["--rounds is 0", "at least 1"]),
        ("--warmup 0", ["--warmup is 0", "at least 1"]),
        ("--seconds -1", ["--seconds is -1", "0 to 3600"]),
        ("--seconds nan", ["--seconds is nan", "0 to 3600"]),
        ("-b 0", ["--batch-size is 0", "at least 1"]),
        ("--img-size 224 0", ["--img-size is 0", "at least 1"]),
    ],
)
def test_mistakes(
    command: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: str, words: list[str]
) -> None:
    """Each is one line, before anything is measured or written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "prepare", lambda *args: pytest.fail("it measures"))
    outcome = command("benchmark", *argv.split())
    message = outcome.error("vip benchmark")
    assert [word for word in words if word not in message] == [], message
    assert len(outcome.err.splitlines()) == 1 and not outcome.out and not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(command: Callable[..., Outcome]) -> None:
    assert "--device cpu" in command("benchmark", "--device", "cuda").error("vip benchmark")


def test_a_folder_that_cannot_be_written(command: Callable[..., Outcome], quick_product: None, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    argv = ("--models", "vip_nano4_32", "-b", 1, "--bench", "inference", "--output", tmp_path / "file" / "x")
    message = command("benchmark", *argv, *QUICK).error("vip benchmark")
    assert str(tmp_path / "file" / "x") in message and "Not a directory" in message and "--output" in message


def test_a_folder_that_cannot_be_written_costs_no_time(
    command: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "prepare", lambda *args: pytest.fail("it measures"))
    (tmp_path / "file").write_text("a file")
    outcome = command("benchmark", "--models", "vip_nano4_32", "--output", tmp_path / "file" / "x", *QUICK)
    assert "--output" in outcome.error("vip benchmark")


def test_an_endless_turn(command: Callable[..., Outcome], quick_product: None, tmp_path: Path) -> None:
    argv = ("--models", "vip_nano4_32", "-b", 1, "--bench", "inference", *QUICK, "--output", tmp_path)
    assert "--seconds" in command("benchmark", *argv, "--seconds", "inf").error("vip benchmark")


def test_an_interrupt(command: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "prepare", prepare)
    outcome = command("benchmark", "--models", "vip_nano4_32", "--output", tmp_path / "x", "--device", "cpu")
    assert (outcome.status, outcome.out) == (130, "") and "Traceback" not in outcome.err


# --- names


def test_patterns() -> None:
    assert runner.choose_models(BenchmarkConfig(models=["vip_?7", "vip_nano4_32", "vip_s7", "vip_s1*"])) == [
        *("vip_l7", "vip_m7", "vip_s7", "vip_nano4_32", "vip_s14")
    ]
    published = runner.choose_models(BenchmarkConfig(table="published"))
    assert published == runner.choose_models(BenchmarkConfig()) and len(published) == 10


def test_baseline() -> None:
    assert runner.choose_baseline(BenchmarkConfig(), ["vip_m7", "vip_s7"]) == "vip_s7"
    assert runner.choose_baseline(BenchmarkConfig(), ["vip_m7", "vip_l7"]) == "vip_m7"
    assert runner.choose_baseline(BenchmarkConfig(baseline="vip_l7"), ["vip_s7", "vip_l7"]) == "vip_l7"


def test_patterns_with_tags() -> None:
    """Of names with the tag of their weights, where the pattern has one."""
    assert runner.choose_models(BenchmarkConfig(models=["test_vit2*"])) == ["test_vit2"]
    assert runner.choose_models(BenchmarkConfig(models=["test_vit2.*"])) == ["test_vit2.r160_in1k"]


# --- the machine


def test_an_optimizer_is_looked_at_where_it_is_used() -> None:
    runner.check_setting(BenchmarkConfig(bench="inference", opt="nosuch"))
    with pytest.raises(UserError, match="nosuch"):
        runner.check_setting(BenchmarkConfig(bench="train", opt="nosuch"))


def test_clocks_are_read_apart_from_what_does_not_change() -> None:
    assert "cpu_mhz" in environment.clocks(CPU) and not environment.clocks(CPU).keys() & environment.environment(CPU)


@pytest.mark.parametrize(("precision", "name"), [("bf16", "oneDNN"), ("none", "MKL")])
def test_who_multiplies_is_told(
    precision: str, name: str, matmul_setting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where torch refuses to say how precisely, as it does once that was set for one library."""
    matmul_setting.fp32_precision = precision
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert environment.environment(CPU)["float32_products"] == name


def test_the_command_can_be_pasted(monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["benchmark", "--models", "vip_*", "two words"]
    monkeypatch.setattr(sys, "argv", ["/usr/bin/vip", *argv])
    assert shlex.split(environment.environment(CPU)["command"]) == ["vip", *argv]


def test_clocks_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a tool that prints what nvidia-smi would; without one there are none."""
    if sys.platform == "win32":
        pytest.skip("the tool is a shell script")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment._gpu_clocks("GPU-1") == {}
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\necho "1980 MHz, 1980 MHz, 2619 MHz, 700.00 W, 31"\n')
    tool.chmod(0o755)
    assert environment._gpu_clocks("GPU-1") == {
        "gpu_clocks.sm": "1980 MHz",
        "gpu_clocks.max.sm": "1980 MHz",
        "gpu_clocks.mem": "2619 MHz",
        "gpu_power.limit": "700.00 W",
        "gpu_temperature.gpu": "31",
    }
    tool.write_text("#!/bin/sh\necho no devices\nexit 9\n")
    assert environment._gpu_clocks("GPU-1") == {}


def test_processor() -> None:
    text = "Architecture:   x86_64\nModel name:     Some Processor @ 2.0GHz\nBIOS Model name: other\n"
    assert environment._lscpu(text, "Model name") == "Some Processor @ 2.0GHz"
    assert environment._lscpu(text, "Model") is None and environment._lscpu(None, "Model name") is None
