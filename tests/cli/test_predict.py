"""`vip predict`: what it prints and writes, its statuses, and mistakes."""

import csv
import errno
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from training_command import Outcome

from vip.prediction.predictor import load_predictor
from vip.training.weights import read_checkpoint

Predict = Callable[..., Outcome]


@pytest.fixture
def predict(command: Callable[..., Outcome], trained_run: Path) -> Predict:
    """Runs `vip predict` with a good checkpoint unless another is given."""

    def run(*argv: object, checkpoint: object = trained_run) -> Outcome:
        start = [] if checkpoint is None else ["--checkpoint", checkpoint]
        return command("predict", *argv, *start, "--device", "cpu")

    return run


@pytest.fixture
def images(image_folder: Path) -> list[Path]:
    """Five images of each of three colors."""
    return sorted((image_folder / "val").glob("*/*"))


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    (tmp_path / "broken.png").write_text("no image")
    return tmp_path / "broken.png"


def says(message: str, *words: object) -> None:
    """The message names all of these."""
    missing = [str(word) for word in words if str(word) not in message]
    assert not missing, f"{missing} not in: {message}"


def own_words(err: str) -> list[str]:
    """Lines on standard error without the one that says what a checkpoint is."""
    return [line for line in err.splitlines() if not line.endswith("holds vip_nano4_32")]


# --- output


def test_all_formats_say_the_same(predict: Predict, images: list[Path], broken: Path, trained_run: Path) -> None:
    given = [images[3], broken, images[9], images[3]]
    expected = list(load_predictor(trained_run, device="cpu").predict(given, top_k=2))
    table, lines, rows = (predict(*given, "--top-k", 2, "--format", form) for form in ("table", "json", "csv"))
    for outcome in (table, lines, rows):
        assert outcome.status == 1
        assert own_words(outcome.err) == [f"{broken}: no image, or of an unknown format"]
    objects = [json.loads(line) for line in lines.out.splitlines()]
    for found, prediction in zip(objects, expected, strict=True):
        assert found["image"] == str(prediction.image) and found["heatmap"] is None
        assert found["error"] == (prediction.error or None)
        for score, known in zip(found["classes"], prediction.classes, strict=True):
            assert (score["index"], score["name"]) == (known.index, known.name)
            assert score["probability"] == pytest.approx(known.probability, abs=1e-6)
    assert [row["image"] for row in csv.DictReader(io.StringIO(rows.out))] == [
        str(path) for path, times in zip(given, (2, 1, 2, 2), strict=True) for _ in range(times)
    ]
    flat = [(score["index"], score["name"], score["probability"]) for found in objects for score in found["classes"]]
    scores = [row for row in csv.DictReader(io.StringIO(rows.out)) if not row["error"]]
    assert [(int(row["class"]), row["name"], float(row["probability"])) for row in scores] == flat
    assert [row["rank"] for row in scores] == ["1", "2"] * 3
    printed = [line.split() for line in table.out.splitlines() if " % " in line]
    assert printed == [[f"{100 * p:.2f}", "%", str(index), name] for index, name, p in flat]
    assert [line for line in table.out.splitlines() if not line.startswith(" ")] == [str(path) for path in given]


def test_folders_and_the_names_of_their_classes(predict: Predict, image_folder: Path) -> None:
    outcome = predict(image_folder / "val", image_folder / "train" / "red", "--format", "json")
    rows = [json.loads(line) for line in outcome.out.splitlines()]
    assert outcome.status == 0 and not own_words(outcome.err) and len(rows) == 15 + 12
    assert all({score["name"] for score in row["classes"]} == {"blue", "green", "red"} for row in rows)
    assert all(sum(score["probability"] for score in row["classes"]) == pytest.approx(1) for row in rows)


def test_a_list_on_standard_input(predict: Predict, images: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for separator in ("\n", "\0"):
        content = separator.join([*map(str, images[:3]), "nowhere.png", ""]).encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        outcome = predict("-", images[4], "--format", "json")
        rows = [json.loads(line) for line in outcome.out.splitlines()]
        assert [row["image"] for row in rows] == [*map(str, images[:3]), "nowhere.png", str(images[4])]
        assert rows[3]["error"] == "No such file or directory" and outcome.status == 1
        assert own_words(outcome.err) == ["nowhere.png: No such file or directory"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_names_of_odd_bytes(predict: Predict, images: list[Path], tmp_path: Path) -> None:
    names = [b"\xff\xfe.png", b"\x1b[31m\n.png", "é.png".encode()]
    paths = [os.fsdecode(bytes(tmp_path) + b"/" + name) for name in names]
    for path in paths:
        Image.open(images[0]).save(path, "PNG")
    broken = os.fsdecode(bytes(tmp_path) + b"/\xff\x1b.png")
    Path(broken).touch()
    table = predict(*paths, broken)
    assert table.status == 1 and "\x1b" not in table.out + table.err and "Traceback" not in table.err
    says(table.out, r"\udcff\udcfe.png", r"\x1b[31m\n.png", "é.png")
    says(table.err, r"\udcff\x1b.png: no image")
    lines = predict(*paths, broken, "--format", "json").out.splitlines()
    assert [json.loads(line)["image"] for line in lines] == [*paths, broken]
    rows = predict(
        *paths, broken, "--format", "csv", "--top-k", 1, "--out", tmp_path / "rows.csv", "--heatmap", tmp_path / "maps"
    )
    with open(tmp_path / "rows.csv", newline="", encoding="utf-8") as file:
        found = [row["image"] for row in csv.DictReader(file)]
    assert rows.status == 1 and found == [p.encode(errors="backslashreplace").decode() for p in [*paths, broken]]
    assert len(list((tmp_path / "maps").iterdir())) == 3


def test_an_output_file_is_whole_or_not_there(
    predict: Predict, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "predictions.json"
    outcome = predict(*images, "--format", "json", "--out", out)
    assert outcome.status == 0 and outcome.out == ""
    before = out.read_bytes()
    assert len(before.splitlines()) == len(images)
    monkeypatch.setattr("vip.prediction.predictor.Predictor._predict", fail_at_second_call())
    assert "not finite" in predict(*images, "-b", 2, "--format", "json", "--out", out).error("vip predict")
    assert out.read_bytes() == before and list(tmp_path.iterdir()) == [out]


def test_rows_do_not_wait_for_the_end(predict: Predict, images: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """What has been printed when the second batch begins, where standard output is a pipe."""
    from vip.prediction.predictor import Predictor

    pipe, seen, original = io.BytesIO(), [], Predictor._predict
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(pipe, encoding="utf-8"))

    def see(self: Predictor, *args: object) -> object:
        seen.append(pipe.getvalue().count(b"\n"))
        return original(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Predictor, "_predict", see)
    assert predict(*images[:6], "-b", 2, "--format", "json").status == 0
    assert seen == [0, 2, 4]


def test_what_is_read_is_not_written_over(predict: Predict, images: list[Path], tmp_path: Path) -> None:
    image, before = images[0], images[0].read_bytes()
    (tmp_path / "link.png").symlink_to(image)
    for argv in ((image, "--out", image), (images[0].parent, "--out", tmp_path / "link.png")):
        says(predict(*argv).error("vip predict"), "would take the place of what is read", "another file")
    assert image.read_bytes() == before
    model = tmp_path / "model.pth"
    model.write_text("weights")
    says(predict(image, "--out", model, checkpoint=model).error("vip predict"), "would take the place")
    assert model.read_text() == "weights"


def fail_at_second_call() -> Callable[..., object]:
    from vip.errors import UserError
    from vip.prediction.predictor import Predictor

    original, calls = Predictor._predict, []

    def predict(self: Predictor, *args: object) -> object:
        calls.append(args)
        if len(calls) > 1:
            raise UserError("The model's logits are not finite.")
        return original(self, *args)  # type: ignore[arg-type]

    return predict


def test_averaged_weights_as_validate_takes_them(predict: Predict, images: list[Path], trained_run: Path) -> None:
    error = predict(images[0], "--use-ema").error("vip predict")
    says(error, "has no averaged weights", "--use-ema")
    assert predict(images[0], "--no-use-ema").status == 0


# --- models without a checkpoint


def test_a_model_by_name(predict: Predict, images: list[Path], caplog: pytest.LogCaptureFixture) -> None:
    argv = ("--model", "vip_nano4_32", "--no-pretrained", "--num-classes", 7, "--format", "json")
    outcome = predict(images[0], *argv, checkpoint=None)
    scores = json.loads(outcome.out)["classes"]
    assert outcome.status == 0 and all(score["name"] == f"class {score['index']}" for score in scores)
    says(caplog.text, "random weights", "leave out --no-pretrained")


def test_a_model_without_weights(predict: Predict, images: list[Path]) -> None:
    for argv in ((), ("--pretrained",)):
        error = predict(images[0], "--model", "vip_nano4_32", *argv, checkpoint=None).error("vip predict")
        says(error, "Cannot create vip_nano4_32")


def test_imagenet_names(predict: Predict, images: list[Path], tmp_path: Path) -> None:
    import timm

    model = timm.create_model("vip_nano4_32", num_classes=1000)
    with torch.no_grad():
        model.head.bias[281] = 100
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    outcome = predict(images[0], "--top-k", 1, checkpoint=tmp_path / "bare.pth")
    assert outcome.out.splitlines()[1].split(maxsplit=3) == ["100.00", "%", "281", "tabby, tabby cat"]


# --- heat maps


def test_heat_maps(predict: Predict, image_folder: Path, tmp_path: Path, broken: Path) -> None:
    val = image_folder / "val"
    outcome = predict(val, "--format", "json", "--heatmap", tmp_path / "new" / "maps")
    rows = [json.loads(line) for line in outcome.out.splitlines()]
    assert outcome.status == 0 and len(rows) == 15
    for row in rows:
        expected = tmp_path / "new" / "maps" / Path(row["image"]).relative_to(val).with_suffix(".png")
        assert row["heatmap"] == str(expected)
        with Image.open(expected) as picture:
            assert picture.size == (32, 32) and picture.mode == "RGB"
    assert len(list((tmp_path / "new").rglob("*.png"))) == 15
    outcome = predict(broken, "--format", "json", "--heatmap", tmp_path / "none")
    assert outcome.status == 1 and json.loads(outcome.out)["heatmap"] is None and not (tmp_path / "none").exists()


def test_heat_maps_of_a_class(predict: Predict, images: list[Path], tmp_path: Path) -> None:
    for wanted in ("red", "2", "green"):
        assert predict(images[0], "--heatmap", tmp_path / wanted, "--heatmap-class", wanted).status == 0
    pictures = {name: next((tmp_path / name).glob("*.png")).read_bytes() for name in ("red", "2", "green")}
    assert pictures["red"] == pictures["2"] != pictures["green"]


def test_heat_maps_that_cannot_be(predict: Predict, images: list[Path], tmp_path: Path) -> None:
    def error(*argv: object, **options: object) -> str:
        return predict(images[0], *argv, **options).error("vip predict")

    maps = tmp_path / "maps"
    says(error("--heatmap-class", "red"), "--heatmap-class is for heat maps", "add --heatmap FOLDER")
    says(error("--heatmap", maps, "--heatmap-class", "rod"), "No class is called 'rod'", "Did you mean red")
    says(error("--heatmap", maps, "--heatmap-class", "3"), "No class is called '3'", "There are 3")
    says(error("--heatmap", images[0].parent), "would lie among the images", "name another folder")
    says(error("--heatmap", images[1]), "Cannot write", images[1], "another folder")
    named = ("--model", "vit_tiny_patch16_224", "--no-pretrained", "--img-size", 32)
    says(error("--heatmap", maps, *named, checkpoint=None), "does not read the mean of its tokens", "vip_*")
    assert not maps.exists()


# --- mistakes


def test_mistakes(predict: Predict, images: list[Path], tmp_path: Path) -> None:
    def error(*argv: object, **options: object) -> str:
        message = predict(*argv, **options).error("vip predict")
        assert len(message) < 600
        return message

    (tmp_path / "empty").mkdir()
    says(error(), "No image given", "name files")
    says(error(tmp_path / "nowhere.png"), "There is no image at", tmp_path / "nowhere.png")
    says(error(images[0], tmp_path / "empty"), tmp_path / "empty", "holds no images")
    says(error(tmp_path / "*.gif"), "No file matches", "*.gif")
    says(error("https://example.org/a.png"), "is an address", "download it first")
    says(error(images[0], checkpoint=None), "Nothing to predict with", "--checkpoint PATH", "--model NAME")
    says(error(images[0], checkpoint=images[0]), "is no checkpoint or is damaged")
    says(error(images[0], checkpoint=tmp_path / "nowhere"), "There is no checkpoint at")
    says(error(images[0], "--top-k", 0), "--top-k is 0, expected at least 1")
    says(error(images[0], "--format", "xml"), "--format", "xml", "json")
    says(error(images[0], "-j", 0), "--workers is 0, expected at least 1")
    says(error(images[0], "--out", tmp_path), "Cannot write", "--out a file")
    says(error(images[0], "--out", tmp_path / "no" / "file.csv"), "Cannot write", "folder that is there")
    says(error(images[0], "--topk", 3), "--topk", "Did you mean --top-k")
    says(error(images[0], "--img-size", 33), "33 does not work", "32 and 40")
    says(error(images[0], "--model", "vip_s7"), "do not fit vip_s7", "use --model vip_nano4_32")
    says(
        error(images[0], "--model-kwargs", "num_classes=0", "--no-pretrained", "-m", "resnet10t", checkpoint=None),
        "no classes to",
    )


def test_a_full_disk(predict: Predict, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("vip.prediction.heatmaps.Image.Image.save", fail)
        error = predict(images[0], "--heatmap", tmp_path / "maps").error("vip predict")
    says(error, tmp_path / "maps", "No space left on device", "make room")
    monkeypatch.setattr("vip.files.os.fsync", fail)
    error = predict(images[0], "--out", tmp_path / "out.csv").error("vip predict")
    says(error, tmp_path / "out.csv", "No space left on device", "make room")
    assert not (tmp_path / "out.csv").exists()


def test_out_of_memory(predict: Predict, images: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    monkeypatch.setattr("vip.prediction.predictor.Predictor._predict", fail)
    error = predict(images[0], "-b", 32).error("vip predict")
    says(error, "Tried to allocate 2 GiB", "smaller --batch-size than 32")


def test_class_names_cannot_control_the_terminal(
    predict: Predict, images: list[Path], trained_run: Path, tmp_path: Path
) -> None:
    content = read_checkpoint(trained_run)
    content["class_to_idx"] = {"\x1b[2J": 0, "a\nb": 1, "名": 2}
    torch.save({k: v for k, v in content.items() if k != "optimizer"}, tmp_path / "odd.pth.tar")
    outcome = predict(images[0], checkpoint=tmp_path / "odd.pth.tar")
    assert outcome.status == 0 and "\x1b" not in outcome.out
    assert sorted(line.split()[-1] for line in outcome.out.splitlines()[1:]) == sorted([r"\x1b[2J", r"a\nb", "名"])
