"""The validation command: recognition, labels, tables and files."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import CLASSES, quick

from vip.cli import main as vip
from vip.training.trainer import train
from vip.training.weights import read_checkpoint


@pytest.fixture(scope="module")
def run(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("output")
    train(quick(colours, output, epochs=3, model_ema=True, model_ema_decay=0.9, img_size=48))
    return output / "run"


@pytest.fixture
def validate(capsys: pytest.CaptureFixture):
    def call(*arguments: object) -> tuple[int, object, str]:
        capsys.readouterr()
        status = vip(["validate", *map(str, arguments), "-j", "0", "--device", "cpu"])
        captured = capsys.readouterr()
        _, found, result = captured.out.partition("--result\n")
        return status, json.loads(result) if found else None, captured.out + captured.err

    return call


def test_bare_weights_of_another_size_are_recognised(colours: Path, run: Path, tmp_path: Path, validate):
    torch.save(read_checkpoint(run / "last.pth.tar")["state_dict"], tmp_path / "bare.pth")
    status, result, text = validate(colours / "val", "--checkpoint", tmp_path / "bare.pth", "--img-size", 48)
    _, reference, _ = validate(colours, "--checkpoint", run / "last.pth.tar", "--no-use-ema")
    assert status == 0
    assert result["model"] == "vip_nano4_32" and result["img_size"] == reference["img_size"] == 48
    assert result["loss"] == pytest.approx(reference["loss"], rel=1e-5)


def test_averaged_weights_are_used_where_there_are_any(colours: Path, run: Path, validate):
    results = {
        flag: validate(colours, "--checkpoint", run, *flag.split())[1]["loss"]
        for flag in ("", "--use-ema", "--no-use-ema")
    }
    assert results[""] == results["--use-ema"] != results["--no-use-ema"]


def test_counts_agree_with_sklearn(colours: Path, run: Path, validate, monkeypatch: pytest.MonkeyPatch):
    from sklearn.metrics import top_k_accuracy_score

    from vip.training import validation

    outputs: list[torch.Tensor] = []
    original = validation.evaluate
    monkeypatch.setattr(
        validation,
        "evaluate",
        lambda *a, **k: original(*a, **{**k, "on_output": lambda o, _: outputs.append(o.clone())}),
    )
    _, result, _ = validate(colours, "--checkpoint", run, "-b", 4)
    target = [CLASSES.index(p.parent.name) for p in sorted((colours / "val").rglob("*.png"), key=_natural)]
    scores = torch.cat(outputs).numpy()
    assert result["count"] == len(target) == 13
    assert result["correct1"] == round(top_k_accuracy_score(target, scores, k=1, labels=range(4)) * 13)
    assert result["correct5"] == 13  # there are four classes


def _natural(path: Path) -> tuple[str, int]:
    return path.parent.name, int(path.stem)


def test_table_of_several_goes_on_past_one_that_fails(colours: Path, run: Path, tmp_path: Path, validate):
    for i in range(2):
        shutil.copy(run / "last.pth.tar", tmp_path / f"good{i}.pth.tar")
    (tmp_path / "broken.pth.tar").write_bytes(b"no checkpoint")
    for file in ("table.csv", "table.json"):
        status, result, text = validate(
            colours, "--checkpoint", tmp_path / "*.pth.tar", "--results-file", tmp_path / "deep" / file
        )
        assert status == 1
        assert len(result) == 3 and sum("error" in row for row in result) == 1
        assert text.count("| vip_nano4_32 |") == 2 and "is no checkpoint or is damaged" in text
    with open(tmp_path / "deep/table.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [float(row["top1"]) for row in table[:2]] == [row["top1"] for row in result if "top1" in row]
    assert [r["checkpoint"] for r in json.loads((tmp_path / "deep/table.json").read_text())[:2]]


def test_only_valid_labels_can_be_predicted(colours: Path, run: Path, tmp_path: Path, validate):
    part = tmp_path / "part"
    for name in (CLASSES[1], CLASSES[3]):
        shutil.copytree(colours / "val" / name, part / name)
    (tmp_path / "labels.txt").write_text("1\n3\n")
    status, result, _ = validate(part, "--checkpoint", run, "--valid-labels", tmp_path / "labels.txt")
    assert status == 0 and result["count"] == 6 and result["correct5"] == 6
    (tmp_path / "labels.txt").write_text("one\n")
    status, _, text = validate(part, "--checkpoint", run, "--valid-labels", tmp_path / "labels.txt")
    assert status == 2 and "one a line" in text


def test_real_labels_count_any_of_several_as_right(colours: Path, tmp_path: Path, validate):
    """The ReaL labels are a list, by the number in the name of ImageNet's validation images; empty: not counted."""
    for i, path in enumerate(sorted((colours / "val").rglob("*.png"), key=_natural)):
        for split in ("train", "val"):
            target = tmp_path / split / str(i % 6) / f"ILSVRC2012_val_{i + 1:08}.JPEG"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    train(quick(tmp_path, tmp_path, epochs=1, batch_size=8))
    for labels, count in ((list(range(6)), 13), ([], 1)):
        (tmp_path / "real.json").write_text(json.dumps([labels] * 12 + [list(range(6))]))
        arguments = ("--checkpoint", tmp_path / "run", "--real-labels", tmp_path / "real.json")
        status, result, _ = validate(tmp_path, *arguments)
        assert status == 0
        assert result["count"] == result["correct1"] == result["correct5"] == count


def test_layout_and_precision_of_the_training_are_taken_over(colours: Path, tmp_path: Path):
    from vip.training.config import ValidateConfig
    from vip.training.validation import _complete

    train(quick(colours, tmp_path, epochs=1, channels_last=True, amp=True, amp_dtype="bfloat16", tta=2))
    checkpoint = read_checkpoint(tmp_path / "run")
    taken = _complete(ValidateConfig(), checkpoint, set())
    assert (taken.channels_last, taken.amp, taken.amp_dtype, taken.tta, taken.batch_size) == (
        True,
        True,
        "bfloat16",
        2,
        16,
    )
    own = _complete(ValidateConfig(amp=False, batch_size=7), checkpoint, {"amp", "batch_size"})
    assert (own.amp, own.amp_dtype, own.batch_size) == (False, "float16", 7)


def test_flags_win_over_what_the_checkpoint_says(colours: Path, run: Path, validate):
    _, result, _ = validate(colours, "--checkpoint", run, "--img-size", 32, "--crop-pct", 0.5, "--tta", 2)
    assert (result["img_size"], result["crop_pct"]) == (32, 0.5)


@pytest.mark.parametrize("flags", ["--torchscript", "--torchcompile eager", "--channels-last", "--no-prefetcher"])
def test_ways_to_run_a_model_agree(colours: Path, run: Path, validate, flags: str):
    _, reference, _ = validate(colours, "--checkpoint", run)
    status, result, text = validate(colours, "--checkpoint", run, *flags.split())
    assert status == 0, text
    assert result["loss"] == pytest.approx(reference["loss"], rel=1e-4)


def test_nothing_to_validate_is_said_in_one_line(colours: Path, validate):
    for arguments in ((colours,), (colours, "--model", "vip_s7"), (colours, "--checkpoint", "no*such")):
        status, _, text = validate(*arguments)
        assert status == 2 and text.count("\n") == 1, text


def test_preprocessing_of_a_tag_is_what_training_resolved(colours: Path, tmp_path: Path, validate):
    """resnet18's default tag has another crop and interpolation than this one."""
    train(quick(colours, tmp_path, epochs=1, model="resnet18.tv_in1k", input_size=[3, 32, 32]))
    _, result, _ = validate(colours, "--checkpoint", tmp_path / "run")
    with open(tmp_path / "run/summary.csv", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    assert (result["crop_pct"], result["interpolation"]) == (0.875, "bilinear")
    assert (str(result["top1"]), str(result["loss"])) == (last["eval_top1"], last["eval_loss"])
