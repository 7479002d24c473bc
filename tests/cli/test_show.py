"""`vip show`: what it writes and prints, and mistakes."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from map_files import write_maps
from PIL import Image
from training_command import Outcome

import vip.cli.show as show

NANO = ("--model", "vip_nano4_32", "--device", "cpu", "-b", "12")


def assert_picture(path: Path, least_colors: int = 50) -> None:
    with Image.open(path) as image:
        assert image.format == "PNG" and min(image.size) > 200
        assert len(image.convert("RGB").getcolors(2**24)) > least_colors, "it is blank"


def test_batch(
    command: Callable[..., Outcome], image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command("show", "batch", image_folder, *NANO) == Outcome(0, "batch.png\n", "")
    assert_picture(Path("batch.png"))
    for out, flags in (("a.png", ()), ("b.png", ("--seed", 1)), ("new/c.png", ("--images", 4))):
        assert command("show", "batch", image_folder, *NANO, "--out", out, *flags).out == f"{out}\n"
    files = [Path(name).read_bytes() for name in ("batch.png", "a.png", "b.png", "new/c.png")]
    assert files[0] == files[1] and len(set(files)) == 3, "the picture is a function of the seed and the images"
    assert sorted(p.name for p in tmp_path.rglob("*.*")) == ["a.png", "b.png", "batch.png", "c.png"]


def test_batch_of_any_model_with_token_labels(
    command: Callable[..., Outcome], image_folder: Path, tmp_path: Path
) -> None:
    keys = [f"{name}/{name}{i}" for name in ("blue", "green", "red") for i in range(12)]
    write_maps(tmp_path / "maps", keys, classes=3)
    (tmp_path / "recipe.yaml").write_text("model: test_resnet\nbatch_size: 12\ntoken_label: true\nmixup: 0.8\n")
    flags = ("--config", tmp_path / "recipe.yaml", "--token-label-data", tmp_path / "maps", "--img-size", "64")
    outcome = command("show", "batch", image_folder, *flags, "--device", "cpu", "--out", tmp_path / "a.png")
    assert outcome == Outcome(0, f"{tmp_path / 'a.png'}\n", "")
    assert_picture(tmp_path / "a.png")


def test_model(command: Callable[..., Outcome], trained_run: Path, image_folder: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copy(trained_run / "model_best.pth.tar", tmp_path)
    files = [tmp_path / "model_best-mixing.png", tmp_path / "model_best-branches.png"]
    assert command("show", "model", checkpoint) == Outcome(0, f"{files[0]}\n{files[1]}\n", "")
    for file in files:
        assert_picture(file)
    assert {p.name for p in tmp_path.iterdir()} == {"model_best.pth.tar", *(file.name for file in files)}
    outcome = command("show", "model", trained_run, "--data", image_folder, "--out", tmp_path / "b", "--full")
    others = [tmp_path / "b" / file.name for file in files]
    assert outcome == Outcome(0, f"{others[0]}\n{others[1]}\n", "")
    assert all(a.read_bytes() != b.read_bytes() for a, b in zip(files, others, strict=True))
    assert not list(trained_run.glob("*.png"))


def test_images_from_all_classes_are_weighed(
    command: Callable[..., Outcome],
    trained_run: Path,
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    titles, seen = [], []

    def note(names: object, weights: torch.Tensor, title: str) -> object:
        titles.append(title)
        return draw(names, weights, title)

    def keep(batch: torch.Tensor) -> torch.Tensor:
        seen.append(batch)
        return batch

    draw, weigh = show.draw_branch_weights, show.branch_weights
    monkeypatch.setattr(show, "draw_branch_weights", note)
    monkeypatch.setattr(
        show, "branch_weights", lambda model, batches: weigh(model, [seen.append(b) or b for b in batches])
    )
    argv = ("show", "model", trained_run, "--out", tmp_path, "--images", 3)
    assert command(*argv, "--data", image_folder).status == command(*argv).status == 0
    assert f"mean over 3 images of {image_folder}" in titles[0]
    assert "mean over 3 standard-normal inputs" in titles[1]
    assert seen[0].mean((2, 3)).argmax(1).tolist() == [2, 1, 0], "blue, green and red"
    assert seen[1].std() == pytest.approx(1, abs=0.05) and abs(seen[1].mean()) < 0.05


def test_mistakes(command: Callable[..., Outcome], trained_run: Path, image_folder: Path, tmp_path: Path) -> None:
    resnet = timm.create_model("test_resnet", num_classes=3)
    torch.save({"state_dict": resnet.state_dict(), "arch": "test_resnet"}, tmp_path / "resnet.pth.tar")
    (tmp_path / "damaged.pth.tar").write_bytes(b"nothing")
    (tmp_path / "file").write_text("a file")
    batch, model = ("batch", image_folder, *NANO), ("model", trained_run)
    for argv, words in (
        ((), "what"),
        (("picture",), "'picture'"),
        (("batch",), "No data set given"),
        (("batch", tmp_path / "nowhere", *NANO), "no data set at"),
        ((*batch, "--out", "a.jpg"), "a.jpg, expected a file name that ends in .png"),
        ((*batch, "--out", tmp_path / "file" / "a.png"), "Cannot write the picture"),
        ((*batch, "--images", "0"), "--images is 0, expected 1 to 400"),
        ((*batch, "--model", "vip_s8"), "vip_s8"),
        ((*batch, "--imags", "3"), "--images"),
        (("model",), "CKPT"),
        (("model", tmp_path / "nowhere"), "no checkpoint at"),
        (("model", tmp_path / "damaged.pth.tar"), "damaged.pth.tar"),
        (("model", tmp_path / "resnet.pth.tar"), "has no Permute-MLP"),
        ((*model, "--model", "vip_s7"), "vip_s7"),
        ((*model, "--images", "0"), "--images: '0', expected a whole number of at least 1"),
        ((*model, "--data", tmp_path / "nowhere"), "no data set at"),
        ((*model, "--out", tmp_path / "file"), "Cannot write the picture"),
    ):
        outcome = command("show", *argv)
        assert words in outcome.error("vip show"), argv
        assert len(outcome.err.splitlines()) == 1 and not outcome.out


def test_without_matplotlib(
    command: Callable[..., Outcome], image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "[plots]" in command("show", "batch", image_folder).error("vip show")


@pytest.mark.parametrize(
    "what, words", [(None, ("batch", "model")), ("batch", ("--images", "--token-label")), ("model", ("--full",))]
)
def test_help(
    command: Callable[..., Outcome], capsys: pytest.CaptureFixture, what: str | None, words: tuple[str, ...]
) -> None:
    with pytest.raises(SystemExit) as e:
        command("show", *([what] if what else []), "--help")
    text = capsys.readouterr().out
    assert e.value.code == 0 and "usage: vip show" in text and all(word in text for word in words)


def test_names_that_are_no_plain_text(command: Callable[..., Outcome], image_folder: Path, tmp_path: Path) -> None:
    """Neither mathematics nor what a terminal would obey, whatever folders are called."""
    for split in ("train", "val"):
        for source, target in (("blue", "$x^{$"), ("green", "a\nb"), ("red", os.fsdecode(b"\xff"))):
            shutil.copytree(image_folder / split / source, tmp_path / "$a$ data" / split / target)
    out = tmp_path / os.fsdecode(b"\xff$")
    data = tmp_path / "$a$ data"
    outcome = command("show", "batch", data, *NANO, "--token-label", "--out", out / "a.png")
    assert outcome == Outcome(0, f"{tmp_path}/\\udcff$/a.png\n", "")
    assert_picture(out / "a.png")
