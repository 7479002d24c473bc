"""`vip push-to-hub`: the folder against the checkpoint, the card against the run, the upload against a stand-in."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from torch import nn
from training_command import QUICK, Outcome

import vip.cli
from vip.export import load_exported
from vip.training.weights import read_checkpoint

FILES = ["README.md", "config.json", "model.safetensors"]


@pytest.fixture(scope="module")
def run(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run at a size, a normalization and a crop that are not the model's own, with averaged weights."""
    output = tmp_path_factory.mktemp("runs")
    said = ("--img-size", 48, "--mean", 0.3, 0.4, 0.5, "--std", 0.1, 0.2, 0.3, "--crop-pct", 0.8, "--model-ema")
    argv = ["train", image_folder, *QUICK, *said, "--lr", "1e-3", "--output", output, "--experiment", "run"]
    assert vip.cli.main([str(a) for a in argv]) == 0
    return output / "run"


def trained(run: Path, weights: str = "state_dict_ema") -> nn.Module:
    """The model of a run, made without this library's own loading."""
    model = timm.create_model("vip_nano4_32", num_classes=3, img_size=48).eval()
    model.load_state_dict(read_checkpoint(run)[weights])
    return model


@pytest.fixture
def folder(command: Callable[..., Outcome], run: Path, tmp_path: Path) -> Path:
    outcome = command("push-to-hub", run, "me/colors", "--dry-run", tmp_path / "folder", "--license", "mit")
    assert outcome.status == 0 and "nothing uploaded" in outcome.out, outcome.err
    return tmp_path / "folder"


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The Hub as timm reads it, with `folder` as me/colors; the files that were asked for."""
    asked = []

    def download(repo_id: str, filename: str, **kwargs: Any) -> str:
        asked.append(filename)
        if repo_id != "me/colors":
            response: Any = SimpleNamespace(headers={}, request=None, status_code=404)
            raise huggingface_hub.errors.RepositoryNotFoundError("404 Client Error.", response=response)
        return str(folder / filename)

    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    return asked


def test_what_is_loaded_is_what_was_trained(run: Path, folder: Path, hub: list[str]) -> None:
    assert sorted(file.name for file in folder.iterdir()) == FILES
    x = torch.randn(4, 3, 48, 48)
    with torch.no_grad():
        expected = trained(run)(x)
        assert not torch.equal(expected, trained(run, "state_dict")(x)), "nothing to tell them apart by"
        for name in (f"local-dir:{folder}", "hf-hub:me/colors"):
            model = timm.create_model(name, pretrained=True).eval()
            assert torch.equal(model(x), expected)
            said = timm.data.resolve_model_data_config(model)
            assert said["input_size"] == (3, 48, 48) and said["crop_pct"] == 0.8 and said["crop_mode"] == "center"
            assert tuple(said["mean"]) == (0.3, 0.4, 0.5) and tuple(said["std"]) == (0.1, 0.2, 0.3)
            assert list(model.pretrained_cfg["label_names"]) == ["blue", "green", "red"]
    assert hub == ["config.json", "model.safetensors"]


def test_the_commands_take_it(
    command: Callable[..., Outcome], run: Path, folder: Path, hub: list[str], image_folder: Path, tmp_path: Path
) -> None:
    def top1(*argv: object) -> dict[str, Any]:
        outcome = command("validate", image_folder, "-j", 0, "-b", 5, *argv)
        assert outcome.status == 0, outcome.err
        row = json.loads(outcome.out.partition("--result\n")[2])
        return {name: row[name] for name in ("top1", "top5", "loss", "param_count", "img_size", "crop_pct")}

    expected = top1("--checkpoint", run)
    assert top1("--model", "hf-hub:me/colors") == top1("--model", f"local-dir:{folder}") == expected
    quick = [word for word in QUICK if word not in ("--model", "vip_nano4_32")]
    argv = (*quick, "--model", "hf-hub:me/colors", "--pretrained", "--output", tmp_path, "--experiment", "again")
    assert command("train", image_folder, *argv).status == 0
    assert read_checkpoint(tmp_path / "again")["arch"] == "vip_nano4_32"


def test_the_names_of_the_classes_are_obeyed(
    command: Callable[..., Outcome], folder: Path, image_folder: Path, tmp_path: Path
) -> None:
    """Folders of other classes would be measured against the wrong outputs."""
    published = ("--model", f"local-dir:{folder}")
    image = image_folder / "val" / "red" / "red0.jpg"
    outcome = command("predict", image, *published)
    assert outcome.status == 0 and all(f" {name}\n" in outcome.out for name in ("blue", "green", "red")), outcome.err

    shutil.copytree(image_folder, tmp_path / "other")
    (tmp_path / "other" / "val" / "blue").rename(tmp_path / "other" / "val" / "violet")
    message = command("validate", tmp_path / "other", "-j", 0, *published).error("vip validate")
    assert "has other classes than the model was trained on" in message

    out = tmp_path / "model.pt"
    argv = ("--pretrained", "--num-classes", 5, "--format", "torchscript", "--out", out)
    assert command("export", *published, *argv).status == 0
    about = load_exported(out, "torchscript")[1]
    assert about["num_classes"] == 5 and "label_names" not in about, "the new head has no names"


def test_plain_weights(command: Callable[..., Outcome], run: Path, tmp_path: Path) -> None:
    assert command("push-to-hub", run, "me/plain", "--no-use-ema", "--dry-run", tmp_path / "plain").status == 0
    model, x = timm.create_model(f"local-dir:{tmp_path / 'plain'}", pretrained=True).eval(), torch.randn(2, 3, 48, 48)
    assert torch.equal(model(x), trained(run, "state_dict")(x))
    card = ModelCard.load(tmp_path / "plain" / "README.md")
    assert card.data.eval_results is None and "Top-1" not in card.text, "of the averaged weights"


# --- the card


def test_the_card_says_what_the_run_does(run: Path, folder: Path, image_folder: Path) -> None:
    card = ModelCard.load(folder / "README.md")
    with open(run / "summary.csv") as file:
        row = next(csv.DictReader(file))
    assert card.data.license == "mit" and card.data.library_name == "timm"
    assert card.data.tags == ["image-classification", "timm", "vision-permutator"]
    results = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert results == {f"top-{k}": round(float(row[f"eval_top{k}"]), 3) for k in (1, 5)}
    parameters = sum(p.numel() for p in trained(run).parameters())
    for words in (
        f"| {parameters:,} |",
        "3 x 48 x 48",
        "- Data: image_folder",
        "Weights of epoch 0, counted from 0, of 1 epochs",
        f"Top-1 {float(row['eval_top1']):.3f} %",
        "crop_pct: 0.8",
        "model_ema: true",
        'timm.create_model("hf-hub:me/colors", pretrained=True)',
        "import vip",
        "@article{hou2021vision",
    ):
        assert words in card.text, words
    assert str(image_folder.parent) not in card.text and str(run.parent) not in card.text, "paths of the machine"
    assert "weight_decay" not in card.text, "a default"


def test_no_license_is_named_unasked(command: Callable[..., Outcome], run: Path, tmp_path: Path) -> None:
    assert command("push-to-hub", run, "me/colors", "--dry-run", tmp_path / "folder").status == 0
    assert "license" not in ModelCard.load(tmp_path / "folder" / "README.md").data.to_dict()
    assert not json.loads((tmp_path / "folder" / "config.json").read_text())["pretrained_cfg"].get("license")


def test_a_checkpoint_alone(command: Callable[..., Outcome], tmp_path: Path) -> None:
    torch.save(timm.create_model("lvvit_nano4_32", num_classes=4).state_dict(), tmp_path / "weights.pth")
    assert command("push-to-hub", tmp_path / "weights.pth", "me/x", "--dry-run", tmp_path / "folder").status == 0
    card = ModelCard.load(tmp_path / "folder" / "README.md")
    assert "`lvvit_nano4_32`" in card.text and "@article{jiang2021all" in card.text
    assert "## Training" not in card.text and card.data.eval_results is None
    assert "label_names" not in json.loads((tmp_path / "folder" / "config.json").read_text())


# --- the upload


@pytest.mark.parametrize("has_card", [False, True])
def test_upload(
    command: Callable[..., Outcome],
    run: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    has_card: bool,
) -> None:
    there, made = tmp_path / "there", []
    there.mkdir()
    if has_card:
        (there / "README.md").write_text("written by hand")

    class Hub:
        def __init__(self, **kwargs: Any) -> None:
            pass

        def create_repo(self, repo_id: str, private: bool, exist_ok: bool) -> SimpleNamespace:
            made.append((repo_id, private, exist_ok))
            return SimpleNamespace(repo_id=repo_id)

        def file_exists(self, repo_id: str, filename: str, revision: str | None = None) -> bool:
            return (there / filename).exists()

        def upload_file(self, *, path_or_fileobj: bytes, path_in_repo: str, repo_id: str) -> None:
            (there / path_in_repo).write_bytes(path_or_fileobj)

        def upload_folder(self, *, repo_id: str, folder_path: str, **kwargs: Any) -> None:
            shutil.copytree(folder_path, there, dirs_exist_ok=True)

    monkeypatch.setattr("vip.checkpoints.hub.HfApi", Hub)
    monkeypatch.setattr("timm.models._hub.HfApi", Hub)
    outcome = command("push-to-hub", run, "me/colors", "--private", "--license", "mit")
    assert outcome.status == 0 and "hf-hub:me/colors" in outcome.out, outcome.err
    assert set(made) == {("me/colors", True, True)}
    assert sorted(file.name for file in there.iterdir()) == FILES
    for name in FILES[has_card:]:
        assert (there / name).read_bytes() == (folder / name).read_bytes()
    assert ("is kept" in outcome.out) == has_card
    assert not has_card or (there / "README.md").read_text() == "written by hand"


def test_an_upload_that_fails(command: Callable[..., Outcome], run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("401 Client Error.\n\nInvalid username or password.")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", fail)
    message = command("push-to-hub", run, "me/colors").error("vip push-to-hub")
    for word in ("me/colors", "401 Client Error", "HF_TOKEN", "--dry-run FOLDER"):
        assert word in message


# --- mistakes


def test_offline(
    command: Callable[..., Outcome], image_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for argv in (("validate", image_folder), ("train", image_folder, "--pretrained", "--output", tmp_path)):
        message = command(*argv, "--device", "cpu", "--model", "hf-hub:nobody/nothing").error(f"vip {argv[0]}")
        for word in ("hf-hub:nobody/nothing", "Hugging Face Hub", "HF_HUB_OFFLINE=1", "local-dir:FOLDER"):
            assert word in message


@pytest.mark.parametrize(
    "name, words",
    [
        ("hf-hub:me/other", ["hf-hub:me/other", "404", "local-dir:FOLDER"]),
        ("local-dir:nowhere", ["local-dir:nowhere", "config.json"]),
        ("me/colors", ["me/colors", "hf-hub:me/colors", "local-dir:me/colors"]),
        ("hub:me/colors", ["hub:me/colors", "hf-hub"]),
        ("hf-hub:", ["hf-hub:", "no model id"]),
    ],
)
def test_names_that_lead_nowhere(
    command: Callable[..., Outcome], hub: list[str], image_folder: Path, name: str, words: list[str]
) -> None:
    message = command("validate", image_folder, "--device", "cpu", "--model", name).error("vip validate")
    assert not [word for word in words if word not in message], message


@pytest.mark.parametrize(
    "argv, words",
    [
        ("", ["required", "checkpoint", "repo"]),
        ("nowhere me/x", ["no checkpoint at nowhere"]),
        ("RUN me/x/y --dry-run new", ["'me/x/y'", "OWNER/NAME"]),
        ("RUN me/x --dry-run .", [". holds something already"]),
        ("RUN me/x --dry-run nowhere/new", ["nowhere/new", "in no folder"]),
        ("RUN me/x --model lvvit_nano4_32 --dry-run new", ["do not fit", "--model vip_nano4_32"]),
    ],
)
def test_command_lines_that_are_wrong(
    command: Callable[..., Outcome],
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    argv: str,
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("a file")
    given = [str(run) if word == "RUN" else word for word in argv.split()]
    message = command("push-to-hub", *given).error("vip push-to-hub")
    assert not [word for word in words if word not in message], message
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_full_disk(
    command: Callable[..., Outcome], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    message = command("push-to-hub", run, "me/x", "--dry-run", tmp_path / "folder").error("vip push-to-hub")
    assert "No space left" in message and not list(tmp_path.iterdir())
