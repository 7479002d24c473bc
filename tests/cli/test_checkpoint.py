"""`vip checkpoint`: what it prints, its statuses, and mistakes."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from training_command import QUICK, Outcome

import vip  # noqa: F401  # registers the models

ACTIONS = ("inspect", "verify", "average", "strip", "convert")


@pytest.fixture
def checkpoint(command: Callable[..., Outcome]) -> Callable[..., Outcome]:
    """Runs `vip checkpoint`; whatever it does, it says nothing on standard error but why it failed."""

    def run(*argv: object) -> Outcome:
        outcome = command("checkpoint", *argv)
        assert outcome.status == 2 or outcome.err == ""
        return outcome

    return run


@pytest.fixture
def refuses(command: Callable[..., Outcome]) -> Callable[..., str]:
    """Runs `vip checkpoint`, which must end in an error; returns it."""

    def run(*argv: object) -> str:
        outcome = command("checkpoint", *argv)
        message = outcome.error("vip checkpoint")
        assert len(outcome.err.splitlines()) == 1 and outcome.out == "" and len(message) < 600
        return message

    return run


@pytest.fixture(scope="module")
def averaging_run(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs of `vip_nano4_32` with averaged weights."""
    output = tmp_path_factory.mktemp("averaging")
    argv = ["train", image_folder, *QUICK, "--epochs", "3", "--lr", "1e-3", "--model-ema", "--model-ema-decay", "0.5"]
    assert vip.cli.main([str(a) for a in (*argv, "--output", output, "--experiment", "run")]) == 0
    return output / "run"


@pytest.fixture
def folder(averaging_run: Path, tmp_path: Path) -> Path:
    """A copy of its folder, to be spoilt."""
    return shutil.copytree(averaging_run, tmp_path / "run")


def says(message: str, *words: object) -> None:
    """The message names all of these."""
    missing = [str(word) for word in words if str(word) not in message]
    assert not missing, f"{missing} not in: {message}"


def load(path: Path) -> Any:
    return torch.load(path, weights_only=True)


# --- inspect


def test_inspect_a_run(checkpoint: Callable[..., Outcome], averaging_run: Path) -> None:
    outcome = checkpoint("inspect", averaging_run)
    content, best = load(averaging_run / "model_best.pth.tar"), averaging_run / "model_best.pth.tar"
    rows = dict(line.split(None, 1) for line in outcome.out.splitlines())
    assert outcome.status == 0
    assert rows["file"] == f"{best}: training state, {best.stat().st_size / 1e6:.2f} MB"
    assert rows["model"] == "vip_nano4_32" and rows["classes"] == "3" and rows["input"] == "3x32x32"
    parameters = sum(p.numel() for p in timm.create_model("vip_nano4_32", num_classes=3).parameters())
    assert rows["parameters"] == f"{parameters:,}, in 110 tensors, float32"
    assert rows["weights"] == "averaged, plain" and rows["schedule"] == "cosine"
    assert rows["epoch"].endswith(str(content["epoch"])) and rows["updates"] == str(3 * (content["epoch"] + 1))
    says(rows["optimizer"], "adamw" if "adamw" in rows["optimizer"] else "330 tensors")
    assert set(content) <= set(rows)


def test_inspect_for_machines(checkpoint: Callable[..., Outcome], averaging_run: Path) -> None:
    found = json.loads(checkpoint("inspect", averaging_run / "last.pth.tar", "--json").out)
    content = load(averaging_run / "last.pth.tar")
    assert found["path"] == str(averaging_run / "last.pth.tar")
    assert (found["epoch"], found["batch"], found["updates"]) == (2, 0, 9)
    assert (found["metric"], found["metric_name"]) == (content["metric"], "top1")
    assert found["weights"] == ["averaged", "plain"] and found["training_aids"] == 0
    assert found["learning_rate"] == content["optimizer"]["param_groups"][0]["lr"]
    assert [entry["name"] for entry in found["entries"]] == list(content)


def test_inspect_a_state_within_an_epoch(checkpoint: Callable[..., Outcome], folder: Path) -> None:
    content = load(folder / "last.pth.tar")
    content["position"]["batch"] = 2
    torch.save(content, folder / "recovery.pth.tar")
    assert "epoch       2, and 2 batches of the next\n" in checkpoint("inspect", folder / "recovery.pth.tar").out


def test_what_a_file_says_cannot_reach_the_terminal(checkpoint: Callable[..., Outcome], tmp_path: Path) -> None:
    nasty = "\x1b[2J\x07\r\nverified: yes \udcff \u202e"
    path = tmp_path / os.fsdecode(b"\xff.pth")
    content = {"arch": nasty, nasty: nasty, "state_dict": {nasty: torch.ones(1)}, "optimizer": {}}
    torch.save({**content, "args": {"opt": nasty}}, path)
    for argv in (["inspect", path], ["convert", path, "--output", tmp_path / "a.pth.tar"], ["verify", path]):
        outcome = checkpoint(*argv)
        assert outcome.status == 0 and re.fullmatch(r"[\x20-\x7e\n]+", outcome.out)
        assert "\nverified" not in outcome.out


# --- verify


def test_verify_a_run(checkpoint: Callable[..., Outcome], folder: Path) -> None:
    files = sorted(folder.glob("*.pth.tar"))
    outcome = checkpoint("verify", folder)
    lines = outcome.out.splitlines()
    assert outcome.status == 0 and len(files) >= 4 and lines.pop() == f"{len(files)} of {len(files)} are whole."
    for file, line in zip(files, lines, strict=True):
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        assert line == f"good: {file}: 550 tensors, all finite, its checksum is right, sha256 {sha256}"


def test_verify_goes_on_after_a_bad_one(checkpoint: Callable[..., Outcome], folder: Path) -> None:
    last = folder / "last.pth.tar"
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 1
    last.unlink()  # it may be another name of a good one
    last.write_bytes(data)
    (folder / "a.pth").write_bytes(b"")
    content = load(folder / "checkpoint-0.pth.tar")
    content["state_dict"]["head.bias"][1] = float("nan")
    torch.save(content, folder / "checkpoint-0.pth.tar")
    outcome = checkpoint("verify", folder, folder / "none.pth", folder / "model_best.pth.tar", folder.parent)
    lines = outcome.out.splitlines()
    assert outcome.status == 1 and lines.pop() == f"{len(lines) - 5} of {len(lines)} are whole."
    bad = [line for line in lines if line.startswith("bad: ")]
    assert len(bad) == 5 and all(line.startswith("good: ") for line in set(lines) - set(bad))
    says(bad[0], folder / "a.pth", "it is empty")
    says(bad[1], folder / "checkpoint-0.pth.tar", "not finite", "'state_dict/head.bias'")
    says(bad[2], last, "the record ", "/data/", "is not what was written")
    says(bad[3], "no checkpoint at", folder / "none.pth")
    says(bad[4], folder.parent, "holds no checkpoint")


# --- average


def test_average_a_run(checkpoint: Callable[..., Outcome], averaging_run: Path, tmp_path: Path) -> None:
    files = sorted(averaging_run.glob("checkpoint-*.pth.tar"))
    assert len(files) == 3
    outcome = checkpoint("average", averaging_run, "--output", tmp_path / "mean.pth")
    *lines, last = outcome.out.splitlines()
    metrics = [load(file)["metric"] for file in files]
    assert lines == [f"{file}, epoch {i}, metric {metrics[i]:.6g}" for i, file in enumerate(files)]
    size = (tmp_path / "mean.pth").stat().st_size / 1e6
    assert last == f"mean of 3: averaged weights, 110 tensors, {size:.2f} MB, written to {tmp_path / 'mean.pth'}"
    weights, parts = load(tmp_path / "mean.pth"), [load(file)["state_dict_ema"] for file in files]
    for name, tensor in weights.items():
        expected = sum(part[name].double() for part in parts) / 3
        torch.testing.assert_close(tensor, expected.float(), rtol=1e-6, atol=0)
    timm.create_model("vip_nano4_32", num_classes=3).load_state_dict(weights)


def test_what_was_written_validates(
    checkpoint: Callable[..., Outcome],
    command: Callable[..., Outcome],
    averaging_run: Path,
    image_folder: Path,
    tmp_path: Path,
) -> None:
    """The weights of every layout reach what the checkpoint itself reaches."""

    def result(path: Path, *flags: object) -> Any:
        outcome = command("validate", image_folder, "--checkpoint", path, *QUICK[2:8], *flags)
        row = json.loads(outcome.out.split("--result\n")[1])
        return {name: row[name] for name in ("model", "top1", "top5", "loss")}

    argv = {
        "a.pth": ("strip", averaging_run),
        "a.safetensors": ("strip", averaging_run / "model_best.pth.tar", "--use-ema"),
        "b.safetensors": ("convert", averaging_run),
        "b.pth.tar": ("convert", averaging_run),
        "one.pth": ("average", averaging_run / "model_best.pth.tar"),
    }
    for name, action in argv.items():
        assert checkpoint(*action, "--output", tmp_path / name).status == 0
        assert result(tmp_path / name) == result(averaging_run)
    assert checkpoint("strip", averaging_run, "--no-use-ema", "--output", tmp_path / "c.pth").status == 0
    assert result(tmp_path / "c.pth") == result(averaging_run, "--no-use-ema") != result(averaging_run)
    assert load(tmp_path / "b.pth.tar").keys() == {"epoch", "arch", "metric", "version", "state_dict", "state_dict_ema"}
    safetensors.torch.load_model(timm.create_model("vip_nano4_32", num_classes=3), tmp_path / "b.safetensors")


# --- strip and convert


def test_what_is_left_out_is_said(checkpoint: Callable[..., Outcome], averaging_run: Path, tmp_path: Path) -> None:
    content = load(averaging_run / "last.pth.tar")
    content.update(task_state={"aux_head.bias": torch.ones(2)}, task_state_ema={"aux_head.bias": torch.ones(2)})
    torch.save(content, tmp_path / "source.pth.tar")
    kept = {
        "a.pth": {"state_dict_ema"},
        "a.safetensors": {"state_dict_ema", "epoch", "arch", "metric", "version"},
        "a.pth.tar": {"state_dict_ema", "state_dict", "epoch", "arch", "metric", "version"},
    }
    for name, names in kept.items():
        outcome = checkpoint("convert", tmp_path / "source.pth.tar", "--output", tmp_path / name)
        first, second, third = outcome.out.splitlines()
        both = "averaged and plain" if name == "a.pth.tar" else "averaged"
        size = (tmp_path / name).stat().st_size / 1e6
        tensors = 220 if name == "a.pth.tar" else 110
        assert first == f"{both} weights, {tensors} tensors, {size:.2f} MB, written to {tmp_path / name}"
        assert second == f"left out: {', '.join(entry for entry in content if entry not in names)}"
        says(third, "task_state", "only training has")
    outcome = checkpoint("convert", tmp_path / "a.pth", "--output", tmp_path / "b.pth.tar")
    assert len(outcome.out.splitlines()) == 1 and outcome.out.startswith("weights, 110 tensors, ")


@pytest.mark.parametrize(
    "name, to, layout",
    [
        ("a.pth", "published", "published"),
        ("a.pth.tar", "pth", "bare weights"),
        ("a.pt", "", "bare weights"),
        ("a.pth.tar", "", "published"),
        ("a.safetensors", "safetensors", "safetensors"),
    ],
)
def test_layouts(
    checkpoint: Callable[..., Outcome], averaging_run: Path, tmp_path: Path, name: str, to: str, layout: str
) -> None:
    flags = ["--to", to] if to else []
    assert checkpoint("convert", averaging_run, *flags, "--output", tmp_path / name).status == 0
    assert json.loads(checkpoint("inspect", tmp_path / name, "--json").out)["layout"] == layout


@pytest.mark.parametrize("action", ["average", "strip", "convert"])
def test_nothing_is_written_over_unasked(
    checkpoint: Callable[..., Outcome], refuses: Callable[..., str], averaging_run: Path, tmp_path: Path, action: str
) -> None:
    output = tmp_path / "a.safetensors"
    output.write_text("precious")
    says(refuses(action, averaging_run, "--output", output), output, "is there already", "--overwrite")
    assert output.read_text() == "precious"
    assert checkpoint(action, averaging_run, "--output", output, "--overwrite").status == 0
    assert len(safetensors.torch.load_file(output)) == 110
    assert os.listdir(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize("action", ["average", "strip", "convert"])
def test_outputs_that_cannot_be_written(
    refuses: Callable[..., str], averaging_run: Path, tmp_path: Path, action: str
) -> None:
    (tmp_path / "file").write_text("a file")
    for name in ("none/a.pth", "file/a.pth"):
        says(refuses(action, averaging_run, "--output", tmp_path / name), tmp_path / name, "in no folder")
    says(refuses(action, averaging_run, "--output", tmp_path), tmp_path, "ends in none of")
    says(refuses(action, averaging_run, "--output", tmp_path / f"{'a' * 300}.pth"), "File name too long")
    assert os.listdir(tmp_path) == ["file"]


def test_layouts_and_endings_that_differ(refuses: Callable[..., str], averaging_run: Path, tmp_path: Path) -> None:
    for to, name in (("safetensors", "a.pth"), ("pth", "a.safetensors"), ("published", "a.safetensors")):
        message = refuses("convert", averaging_run, "--to", to, "--output", tmp_path / name)
        says(message, tmp_path / name, f"not that of the layout {to}")


# --- the command line


@pytest.mark.parametrize("action", ACTIONS[:1] + ACTIONS[2:])
def test_inputs_that_are_not_there(refuses: Callable[..., str], tmp_path: Path, action: str) -> None:
    flags = [] if action == "inspect" else ["--output", tmp_path / "out.pth"]
    says(refuses(action, tmp_path / "none.pth", *flags), "no checkpoint at", tmp_path / "none.pth")
    (tmp_path / "empty").mkdir()
    says(refuses(action, tmp_path / "empty", *flags), tmp_path / "empty", "no checkpoint")


@pytest.mark.parametrize(
    "argv, words",
    [
        ("", ["required", "--help"]),
        ("averag", ["averag", "average"]),
        ("inspect", ["required", "path"]),
        ("inspect a b", ["unrecognized arguments: b"]),
        ("verify", ["required", "path"]),
        ("average a", ["required", "--output"]),
        ("average a --output b.pth --last 0", ["--last", "'0'", "number of epochs"]),
        ("average a --output b.pth --best -1", ["--best"]),
        ("average a --output b.pth --last 2 --best 2", ["--best", "not allowed with", "--last"]),
        ("strip a --outputs b", ["--output"]),
        ("convert a --to onnx --output b", ["'onnx'", "safetensors", "published"]),
        ("convert a --use-ema --output b.pth", ["--use-ema"]),
    ],
)
def test_command_lines_that_are_wrong(refuses: Callable[..., str], argv: str, words: list[str]) -> None:
    says(refuses(*argv.split()), *words)


@pytest.mark.parametrize(
    "action, words",
    [
        ("", [*ACTIONS, "look into checkpoints"]),
        ("inspect", ["--json", "its best, else its last"]),
        ("verify", ["status 1 if not", "without running code"]),
        ("average", ["--last", "--best", "--no-use-ema", "default: averaged where there are any", "float64"]),
        ("strip", ["--no-use-ema", "default: averaged where there are any", "--overwrite"]),
        ("convert", ["--to", "published for .pth.tar", "--overwrite"]),
    ],
)
def test_help(command: Callable[..., Outcome], capsys: pytest.CaptureFixture, action: str, words: list[str]) -> None:
    with pytest.raises(SystemExit) as e:
        command("checkpoint", *action.split(), "--help")
    assert e.value.code == 0
    says(" ".join(capsys.readouterr().out.split()), "usage: vip checkpoint", *words)
