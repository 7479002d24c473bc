"""`vip report`: where runs stand, alone and against a published log."""

import csv
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from timm.scheduler import create_scheduler_v2
from training_command import Outcome

from vip.errors import UserError
from vip.reporting.runs import EpochLog, compare, read_run

ZOO = Path(__file__).parents[2] / "models"
PUBLISHED = [
    float(row["eval_top1"]) for row in csv.DictReader((ZOO / "vip_s7/published_log.csv").read_text().splitlines())
]
MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Writes the folder of a run with these accuracies, and the recipe of ViP-Small/7 with these changes as options."""

    def make(top1: list[float], name: str = "run", **changes: object) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        rows = [f"{epoch},{7 - epoch / 100},{5 - value / 20},{value},{value},0.001" for epoch, value in enumerate(top1)]
        header = "epoch,train_loss,eval_loss,eval_top1,eval_top5,lr"
        (folder / "summary.csv").write_text("\n".join([header, *rows, ""]))
        recipe = yaml.safe_load((ZOO / "vip_s7/recipe.yaml").read_text())
        (folder / "args.yaml").write_text(yaml.safe_dump({**recipe, **changes}))
        return folder

    return make


@pytest.fixture
def table(command: Callable[..., Outcome]) -> Callable[..., Outcome]:
    """Runs `vip report --table-only`, which writes nothing."""
    return partial(command, "report", "--table-only")


def standing(run: Path):
    return compare(read_run(run), read_run(ZOO / "vip_s7"))


@pytest.mark.parametrize("epochs", [1, 3, 12, 40, 200, 310])
def test_the_published_run_is_on_its_own_track(make_run: MakeRun, epochs: int) -> None:
    result = standing(make_run(PUBLISHED[:epochs]))
    assert (result.verdict, result.epoch, result.window) == ("on track", epochs - 1, min(epochs, 5))
    assert result.top1 == result.published_top1 == PUBLISHED[epochs - 1]
    assert result.difference == 0 and abs(result.epochs_ahead) < 0.01


@pytest.mark.parametrize(
    "epochs, points, verdict",
    [
        (100, 0.4, "on track"),
        (100, -0.4, "on track"),
        (100, -1.0, "behind"),
        (100, 1.0, "ahead"),
        (310, -0.6, "behind"),
        (310, 0.6, "ahead"),  # more than the published run ever had
        (12, -3.0, "on track"),  # in the warm-up three points are one epoch
        (12, -12.0, "behind"),
    ],
)
def test_a_difference_in_points(make_run: MakeRun, epochs: int, points: float, verdict: str) -> None:
    result = standing(make_run([value + points for value in PUBLISHED[:epochs]]))
    assert result.verdict == verdict
    assert result.difference == pytest.approx(points)


@pytest.mark.parametrize("late", [1, 4, 8])
def test_a_run_that_lags_by_whole_epochs(make_run: MakeRun, late: int) -> None:
    """Where the log rises without a break, a run that does everything `late` epochs later is that far behind."""
    result = standing(make_run([0.1] * late + PUBLISHED[: 18 - late]))
    rising = PUBLISHED[18 - late - 5 : 18 - late]
    assert rising == sorted(rising)
    assert result.epochs_ahead == pytest.approx(-late, abs=0.6)
    assert result.verdict == ("on track" if late < 2 else "behind")


def test_another_length_is_compared_at_equal_shares(make_run: MakeRun) -> None:
    """A run of 100 epochs, against NumPy's interpolation of the published 310."""
    shares = np.interp(np.linspace(0, 309, 100), np.arange(310), PUBLISHED)
    result = standing(make_run(list(shares[:60]), epochs=90, cooldown_epochs=10))
    assert result.published_epoch == pytest.approx(59 * 309 / 99)
    assert result.published_top1 == pytest.approx(shares[59]) and result.difference == pytest.approx(0, abs=1e-9)
    assert result.verdict == "on track"


def test_text(make_run: MakeRun, table: Callable[..., Outcome]) -> None:
    run = make_run([value - 1 for value in PUBLISHED[:100]], batch_size=128, workers=3)
    outcome = table(run, "--against", ZOO / "vip_s7")
    assert outcome.status == 0
    assert f"| {run} | vip_s7 | 100 of 310 | 6.0100 | {PUBLISHED[99] - 1:.3f} |" in outcome.out
    assert f"{run}: behind.\nEpoch 99 of 0 to 309: top-1 {PUBLISHED[99] - 1:.3f} %;" in outcome.out
    assert "ended with 81.498 % (best 81.518 %)" in outcome.out
    assert re.search(
        r"Over the last 5 epochs -1.00 points, as the published run was \d+\.\d epochs earlier", outcome.out
    )
    assert "If the difference stays, it ends at 80.5 %." in outcome.out
    assert "Unlike the recipe: batch_size 128 (recipe: 256)." in outcome.out


def test_several_runs(make_run: MakeRun, table: Callable[..., Outcome]) -> None:
    first, second = make_run([10.0, 30.0, 20.0]), make_run([5.0], "other", model="vip_m7", epochs=3, cooldown_epochs=0)
    out = table(first, second).out
    assert f"| {first} | vip_s7 | 3 of 310 | 6.9800 | 20.000 | 30.000 | 1 |" in out
    assert f"| {second} | vip_m7 | 1 of 3 | 7.0000 | 5.000 | 5.000 | 0 |" in out
    assert "track" not in out
    out = table(second, "--against", ZOO / "vip_s7").out
    assert "The run trains vip_m7, the published one vip_s7." in out and "Unlike" not in out
    assert "The run is 3 epochs and not 310: compared at equal shares of the schedule." in out


@pytest.mark.filterwarnings("ignore:PlateauLRScheduler")
@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize(
    "sched, cooldown",
    [
        *(("cosine", 0), ("cosine", 10), ("tanh", 10), ("poly", 10), ("plateau", 0), ("plateau", 10), ("step", 0)),
        pytest.param("step", 10),
    ],
)
def test_epochs_are_those_that_the_schedule_has(make_run: MakeRun, sched: str, cooldown: int, prefix: bool) -> None:
    """As timm counts them."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1)
    options = dict(warmup_epochs=7, warmup_prefix=prefix, cooldown_epochs=cooldown)
    _, epochs = create_scheduler_v2(optimizer, sched, 300, **options)
    assert read_run(make_run([1.0], sched=sched, **options)).epochs == epochs


@pytest.mark.parametrize("option", ["epochs", "cooldown_epochs", "warmup_epochs"])
@pytest.mark.parametrize("value", ["abc", {"a": 1}, [3], -1, 2.5])
def test_damaged_options(make_run: MakeRun, table: Callable[..., Outcome], option: str, value: object) -> None:
    run = make_run([1.0, 2.0], warmup_prefix=True, **{option: value})
    for argv in ([run], [run, "--against", ZOO / "vip_s7"]):
        message = table(*argv).error("vip report")
        assert f"{option} in the options beside {run / 'summary.csv'} is {value!r}" in message


@pytest.mark.parametrize(
    "points, changes, end",
    [
        (5.0, {}, "86.5 %"),
        (18.0, {}, "99.5 %"),
        (20.0, {}, None),  # above 100 %
        (5.0, {"epochs": 100}, None),
        (5.0, {"epochs": 600}, None),
    ],
)
def test_extrapolation(
    make_run: MakeRun, table: Callable[..., Outcome], points: float, changes: dict[str, int], end: str | None
) -> None:
    run = make_run([value + points for value in PUBLISHED[:60]], **changes)
    out = table(run, "--against", ZOO / "vip_s7").out
    assert f"If the difference stays, it ends at {end}." in out if end else "If the difference" not in out


def test_without_options(make_run: MakeRun, table: Callable[..., Outcome]) -> None:
    """Of a log alone, the schedule is taken for the published one, and nothing is said of a recipe."""
    run = make_run(PUBLISHED[:60])
    (run / "args.yaml").unlink()
    result = standing(run)
    assert (result.published_epoch, result.difference, result.verdict) == (59, 0, "on track")
    out = table(run, "--against", ZOO / "vip_s7").out
    assert "No options are beside it: taken to have the published 310 epochs." in out
    assert "equal shares" not in out and "recipe" not in out and "do not compare" not in out
    out = table(make_run(PUBLISHED[:60], "other"), "--against", ZOO / "vip_s7").out
    assert "No options" not in out


@pytest.mark.parametrize("split", ["train", "training", None])
def test_other_classes(make_run: MakeRun, table: Callable[..., Outcome], tmp_path: Path, split: str | None) -> None:
    """Their number is that of the options, or else of the folders that the run was trained on."""
    for i in range(7 if split else 0):
        (tmp_path / "data" / str(split) / f"class{i}").mkdir(parents=True)
    options = {"data": str(tmp_path / "data")} if split else {"num_classes": 7}
    out = table(make_run([1.0], **options), "--against", ZOO / "vip_s7").out
    assert "The run has 7 classes, the published one the 1000 of ImageNet: they do not compare." in out
    for i, options in enumerate([{"num_classes": 1000}, {"data": str(tmp_path / "gone")}, {}]):
        out = table(make_run([1.0], f"other{i}", **options), "--against", ZOO / "vip_s7").out
        assert "do not compare" not in out


@pytest.mark.parametrize("model", ["vip_s7", "vip_m7", "vip_l7"])
def test_every_published_log_can_be_held_against(make_run: MakeRun, table: Callable[..., Outcome], model: str) -> None:
    outcome = table(ZOO / model, "--against", ZOO / model)
    assert outcome.status == 0 and f"{ZOO / model}: on track." in outcome.out
    assert "Unlike" not in outcome.out and "If the difference" not in outcome.out


@pytest.mark.parametrize(
    "content, said",
    [
        ("", "has no epoch yet"),
        ("epoch,eval_top1\n", "has no epoch yet"),
        ("epoch,eval_top1\n0,10\n1,\n", "Line 3"),
        ("epoch,eval_top1\n0,10\n1\n", "Line 3"),
        ("epoch,eval_top1\n0,10\n1,2,3\n", "Line 3"),
        ("epoch,eval_top1\n0,10\n1,ten\n", "Line 3"),
        ("epoch,eval_top1\n0,10\n0,11\n", "not 0, 1, 2"),
        ("epoch,eval_top1\n0,10\n1,nan\n", "nan in epoch 1"),
        ("epoch,eval_loss\n0,10\n", "no column eval_top1, only epoch, eval_loss"),
        ("\udcff", "Cannot read"),
        (f"epoch,eval_top1\n0,{'1' * 200_000}\n", "Cannot read"),
    ],
)
def test_damaged_logs(tmp_path: Path, content: str, said: str, table: Callable[..., Outcome]) -> None:
    (tmp_path / "summary.csv").write_bytes(content.encode("utf-8", "surrogateescape"))
    message = table(tmp_path).error("vip report")
    assert said in message and str(tmp_path) in message


def test_no_log(tmp_path: Path, table: Callable[..., Outcome], make_run: MakeRun) -> None:
    assert "does not exist" in table(tmp_path / "nowhere").error("vip report")
    assert "does not exist" in table(tmp_path / ("a" * 300)).error("vip report")
    assert "neither the summary.csv" in table(tmp_path).error("vip report")
    message = table(make_run([1.0]), "--against", ZOO / "vip_s14").error("vip report")
    assert "vip_s14 holds neither" in message and "models/vip_s7" in message
    run = make_run([1.0], "bad")
    for content in ("a: [", "a: 2001-99-99", "a: " + "[" * 3000, "\0"):
        (run / "args.yaml").write_text(content)
        with pytest.raises(UserError, match="Cannot read"):
            read_run(run)


def test_logs_that_a_spreadsheet_has_saved(make_run: MakeRun) -> None:
    run = make_run([10.0, 30.0])
    expected = read_run(run)
    (run / "summary.csv").write_text((run / "summary.csv").read_text(), encoding="utf-8-sig")
    assert read_run(run) == expected


# --- the page


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[Path], list[Path], list[str], Path]]:
    """What the command would write: paths of runs and of published logs, remarks, and the folder."""
    calls = []

    def write_report(runs: list[EpochLog], published: list[EpochLog], remarks: list[str], folder: Path) -> Path:
        calls.append(([run.path for run in runs], [log.path for log in published], remarks, folder))
        return folder / "report.html"

    monkeypatch.setattr("vip.cli.report.write_report", write_report)
    return calls


def test_the_page_is_named_last(make_run: MakeRun, command: Callable[..., Outcome], tmp_path: Path) -> None:
    run = make_run([10.0, 30.0, 20.0], model="vip_nano4_32")
    outcome = command("report", run)
    page = run / "report" / "report.html"
    assert outcome.out.splitlines()[-1] == str(page) and outcome.err == "" and outcome.status == 0
    assert "30.00" in page.read_text() and "dashed." not in page.read_text()
    assert (run / "report" / "top-1.png").read_bytes().startswith(b"\x89PNG")
    assert outcome.out.splitlines()[:-2] == command("report", run, "--table-only").out.splitlines()


def test_published_logs_are_found(
    make_run: MakeRun, command: Callable[..., Outcome], tmp_path: Path, written: list
) -> None:
    small, other = make_run([1.0, 2.0]), make_run([1.0], "other", model="vip_m7")
    again, none = make_run([1.0], "again"), make_run([1.0], "none", model="../models/vip_s7")
    digits = make_run([1.0], "digits", num_classes=10)
    s7, m7, l7 = (ZOO / model / "published_log.csv" for model in ("vip_s7", "vip_m7", "vip_l7"))
    for runs, published, count in (
        ([small, other, again], [s7, m7], 3),
        ([none, digits], [], 0),
        ([small, ZOO / "vip_s7"], [], 2),  # it is there already
        ([small, other, "--against", ZOO / "vip_l7"], [l7], 2),
    ):
        outcome = command("report", *runs, "--output", tmp_path / "page")
        assert outcome.out.endswith(f"\n{tmp_path / 'page' / 'report.html'}\n")
        _, found, remarks, folder = written.pop()
        assert (found, folder) == (published, tmp_path / "page")
        assert all(("--against" in runs) == (remark in outcome.out) for remark in remarks)
        assert len(remarks) == count


def test_without_matplotlib(
    make_run: MakeRun, command: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table is printed all the same."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run = make_run([10.0])
    outcome = command("report", run)
    assert "pip install 'vision-permutator[plots]'" in outcome.error("vip report")
    assert outcome.out == command("report", run, "--table-only").out and "10.000" in outcome.out
    assert not (run / "report").exists()


def test_pages_that_cannot_be_written(make_run: MakeRun, command: Callable[..., Outcome], tmp_path: Path) -> None:
    run = make_run([10.0])
    (tmp_path / "file").write_text("a file")
    for output in (tmp_path / "file", tmp_path / "file" / "out"):
        outcome = command("report", run, "--output", output)
        assert f"Cannot write to {output}" in outcome.error("vip report") and "--output" in outcome.err
        assert "| 10.000 |" in outcome.out
    assert "not allowed with" in command("report", run, "--table-only", "--output", "x").error("vip report")
    assert (tmp_path / "file").read_text() == "a file"


@pytest.mark.parametrize("file", ["predictions.npz", "speed.csv"])
def test_damaged_files_beside_a_log(make_run: MakeRun, command: Callable[..., Outcome], file: str) -> None:
    run = make_run([10.0])
    (run / file).write_text("epoch,train_memory_gb\n0,much\n")
    outcome = command("report", run)
    assert str(run / file) in outcome.error("vip report") and "| 10.000 |" in outcome.out
    assert command("report", run, "--table-only").status == 0
    (run / "speed.csv").write_text("")  # what is empty says nothing
    (run / "predictions.npz").unlink(missing_ok=True)
    (run / "args.yaml").unlink()
    assert command("report", run).status == 0
