"""What a user can get wrong, each answered in one line that names it and says what to do."""

import io
import json
import logging
import os
import pickle
import re
import shutil
import zipfile
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from png_files import GREY, PALETTE, RGB, png
from training_command import QUICK, Outcome

import vip
from vip.errors import UserError
from vip.training.weights import read_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")

Refused = Callable[..., str]


@pytest.fixture
def train(command: Callable[..., Outcome], image_folder: Path, tmp_path: Path) -> Callable[..., Outcome]:
    """Runs `vip train` on the image folder, or on `data`."""

    def run(*argv: object, data: Path | None = image_folder) -> Outcome:
        where = [] if data is None else [data]
        return command("train", *where, *QUICK, "--output", tmp_path / "output", *argv)

    return run


@pytest.fixture
def train_refuses(train: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Refused:
    """Runs `vip train`, which must end in an error before the first epoch, and returns the message."""

    def epoch(*args: object) -> None:
        pytest.fail("it was found only after training had begun")

    monkeypatch.setattr("vip.training.trainer.train_one_epoch", epoch)

    def run(*argv: object, **options: Any) -> str:
        message = train(*argv, **options).error("vip train")
        assert len(message) < 600
        return message

    return run


@pytest.fixture
def validate_refuses(command: Callable[..., Outcome], image_folder: Path, trained_run: Path, tmp_path: Path) -> Refused:
    """Runs `vip validate` on a good checkpoint unless another is given; it must end in an error, which is returned."""

    def run(*argv: object, data: Path | None = image_folder, checkpoint: object = trained_run) -> str:
        where = [] if data is None else [data]
        start = [] if checkpoint is None else ["--checkpoint", checkpoint]
        message = command("validate", *where, *start, "--device", "cpu", "-j", "0", *argv).error("vip validate")
        assert len(message) < 600
        return message

    return run


@pytest.fixture
def copy(image_folder: Path, tmp_path: Path) -> Path:
    """An image folder to spoil."""
    return shutil.copytree(image_folder, tmp_path / "copy")


def says(message: str, *words: object) -> None:
    """The message names all of these."""
    missing = [str(word) for word in words if str(word) not in message]
    assert not missing, f"{missing} not in: {message}"


# The data set


def test_no_data_given(train_refuses: Refused, validate_refuses: Refused) -> None:
    says(train_refuses(data=None), "No data set given", "train/")
    says(validate_refuses(data=None), "No data set given", "val/")


def test_no_such_folder(train_refuses: Refused, validate_refuses: Refused, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    says(train_refuses(data=nowhere), nowhere, "give a folder that holds train/ and val/")
    says(validate_refuses(data=nowhere), nowhere, "give a folder that holds train/ and val/")


def test_no_train_folder(train_refuses: Refused, copy: Path) -> None:
    shutil.rmtree(copy / "train")
    says(train_refuses(data=copy), copy, "no train/", "it holds val/")


def test_no_val_folder(train_refuses: Refused, validate_refuses: Refused, copy: Path) -> None:
    shutil.rmtree(copy / "val")
    says(train_refuses(data=copy), copy, "no val/", "it holds train/")
    says(validate_refuses(data=copy), copy, "no val/", "it holds train/")


def test_the_train_folder_in_place_of_its_parent(train_refuses: Refused, copy: Path) -> None:
    says(train_refuses(data=copy / "train"), "no train/", "it holds blue/, green/, red/")


def test_empty_folder(train_refuses: Refused, validate_refuses: Refused, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    says(train_refuses(data=tmp_path / "empty"), tmp_path / "empty", "it is empty")
    says(validate_refuses(data=tmp_path / "empty"), tmp_path / "empty", "it is empty")


def test_a_file_in_place_of_a_folder(train_refuses: Refused, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no data set")
    says(train_refuses(data=tmp_path / "notes.txt"), tmp_path / "notes.txt", "0 images")


def test_empty_class_folder(train_refuses: Refused, validate_refuses: Refused, copy: Path) -> None:
    (copy / "val" / "violet").mkdir()
    says(validate_refuses(data=copy), copy / "val", "No images", "violet", "fill or remove")
    says(train_refuses(data=copy), copy / "val", "No images", "violet", "fill or remove")
    (copy / "train" / "violet").mkdir()
    says(train_refuses(data=copy), copy / "train", "No images", "violet", "fill or remove")


def test_classes_that_differ(train_refuses: Refused, validate_refuses: Refused, copy: Path) -> None:
    (copy / "val" / "red").rename(copy / "val" / "crimson")
    says(train_refuses(data=copy), "1 only in train (red)", "1 only in val (crimson)", "--class-map")
    says(validate_refuses(data=copy), copy, "other classes", "crimson")


def test_a_class_too_few_or_too_many(train_refuses: Refused, validate_refuses: Refused, copy: Path) -> None:
    (copy / "val" / "red").rename(copy.parent / "red")
    says(train_refuses(data=copy), "1 only in train (red)")
    says(validate_refuses(data=copy), copy, "2 classes", "model 3")
    shutil.copytree(copy.parent / "red", copy / "val" / "red")
    shutil.copytree(copy.parent / "red", copy / "val" / "white")
    says(train_refuses(data=copy), "1 only in val (white)")
    says(validate_refuses(data=copy), copy, "4 classes", "model 3")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--class-map", "none.txt"], ["none.txt"]),
        (["--dataset", "hfds/somebody/images"], ["hfds/somebody/images", "pip install datasets"]),
        (["--dataset", "torch/cifar10"], ["torch/cifar10", "--dataset-download"]),
        (["--dataset", "cifar10"], ["cifar10", "--dataset-download"]),
        (["--dataset", "troch/cifar10"], ["troch/cifar10", "torch/NAME"]),
        (["--dataset", "torch/imagenot"], ["torch/imagenot", "imagenot"]),
    ],
)
def test_data_sets_that_cannot_be_opened(
    train_refuses: Refused, validate_refuses: Refused, flags: list[str], words: list[str], request: Any
) -> None:
    if "hfds" in str(flags):
        request.getfixturevalue("monkeypatch").setitem(__import__("sys").modules, "datasets", None)
    says(train_refuses(*flags), *words)
    says(validate_refuses(*flags), *words)


def test_splits_that_are_not_there(train_refuses: Refused, validate_refuses: Refused) -> None:
    says(train_refuses("--train-split", "all"), "no all/", "train/, val/")
    says(train_refuses("--val-split", "test"), "no test/", "train/, val/")
    says(validate_refuses("--split", "test"), "no test/", "train/, val/")


# Images


def save(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="module")
def odd_images() -> dict[str, bytes]:
    """Images of unusual kinds, all of which can be read."""
    rng = np.random.default_rng(0)
    colours = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    return {
        "16-bit.png": png(32, 32, 16, GREY, rng.bytes(2 * 32 * 32)),
        "gray.jpg": save(colours.convert("L"), "JPEG"),
        "cmyk.jpg": save(colours.convert("CMYK"), "JPEG"),
        "palette.png": png(32, 32, 8, PALETTE, rng.bytes(32 * 32), rng.bytes(768), rng.bytes(10)),
        "alpha.png": save(colours.convert("RGBA"), "PNG"),
        "100-megapixel.png": png(10_000, 10_000, 1, GREY, b"\x0f" * (1250 * 10_000)),
    }


@pytest.fixture(scope="module")
def damaged_images() -> dict[str, bytes]:
    """Images that cannot be read."""
    rng = np.random.default_rng(0)
    photograph = save(Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)), "JPEG")
    return {
        "truncated.jpg": photograph[: len(photograph) // 2],
        "zero-byte.jpg": b"",
        "text.jpg": b"This is no image.\n",
        "bomb.png": png(40_000, 40_000, 8, RGB, b""),
    }


def test_odd_images_are_used_and_damaged_ones_named_counted_and_skipped(
    train: Callable[..., Outcome],
    command: Callable[..., Outcome],
    copy: Path,
    tmp_path: Path,
    odd_images: dict[str, bytes],
    damaged_images: dict[str, bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    for split in ("train", "val"):
        for name, content in {**odd_images, **damaged_images}.items():
            (copy / split / "red" / name).write_bytes(content)
    assert train("--experiment", "odd", "-b", "46", data=copy).status == 0  # every image in one batch
    lines = [record.getMessage() for record in caplog.records]
    assert named(lines) == sorted(2 * list(damaged_images))  # once in each split
    assert any("4 unreadable training images" in line for line in lines)
    assert any("4 unreadable validation images" in line for line in lines)

    caplog.clear()
    outcome = command("validate", copy, "--checkpoint", tmp_path / "output" / "odd", "--device", "cpu", "-j", "0")
    assert outcome.status == 0
    assert json.loads(outcome.out.split("--result\n")[1])["count"] == 15 + len(odd_images)
    lines = [record.getMessage() for record in caplog.records]
    assert named(lines) == sorted(damaged_images)
    assert any("4 unreadable images were left out" in line for line in lines)


def named(lines: list[str]) -> list[str]:
    return sorted(re.findall(r"Skipping unreadable image red/(\S+):", "\n".join(lines)))


def test_too_many_damaged_images(
    train: Callable[..., Outcome], validate_refuses: Refused, copy: Path, damaged_images: dict[str, bytes]
) -> None:
    for name, content in damaged_images.items():
        (copy / "train" / "red" / name).write_bytes(content)
        (copy / "val" / "red" / name).write_bytes(content)
    words = ("4 images cannot be read", "the last one red/", "--max-bad-images (now 3)")
    says(train("--max-bad-images", "3", data=copy).error("vip train"), *words)
    says(validate_refuses("--max-bad-images", "3", data=copy), *words)


def test_nothing_but_damaged_images(train: Callable[..., Outcome], copy: Path) -> None:
    for file in (copy / "train").rglob("*.*"):
        file.write_bytes(b"")
    says(train(data=copy).error("vip train"), "36 images cannot be read", "repair or remove")


# Checkpoints


STARTS = ("--resume", "--initial-checkpoint", "--finetune", "--eval-checkpoint")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, trained_run: Path) -> Path:
    """A folder of files that are no checkpoint, or not the one that is wanted."""
    folder = tmp_path_factory.mktemp("checkpoints")
    whole = (trained_run / "last.pth.tar").read_bytes()
    damaged = {
        "empty": b"",
        "text": b"These are no weights.\n" * 100,
        "zeros": bytes(10_000),
        "truncated": whole[: len(whole) // 2],
        "header": whole[:100],
        "overwritten": whole[:1000] + bytes(5000) + whole[6000:],
        "pickled list": pickle.dumps([1, 2, 3]),
    }
    for name, content in damaged.items():
        (folder / f"{name}.pth.tar").write_bytes(content)
    (folder / "text.safetensors").write_text("These are no weights.\n")
    for name, content in {"list": [1, 2], "nothing": {}, "no weights": {"epoch": 3}, "numbers": {"a": 1}}.items():
        torch.save(content, folder / f"{name}.pth.tar")
    for name, classes in (("vip_nano4_32", 10), ("vip_nano4_32", 3), ("vip_ti7", 3), ("resnet10t", 3)):
        torch.save(timm.create_model(name, num_classes=classes).state_dict(), folder / f"{name}-{classes}.pth")
    return folder


DAMAGED = ("empty", "text", "zeros", "truncated", "header", "overwritten")


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("flag", STARTS)
def test_damaged_checkpoint_to_train_from(train_refuses: Refused, checkpoints: Path, flag: str, name: str) -> None:
    path = checkpoints / f"{name}.pth.tar"
    says(train_refuses(flag, path), path, "no checkpoint or is damaged")


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_checkpoint_to_validate(validate_refuses: Refused, checkpoints: Path, name: str) -> None:
    path = checkpoints / f"{name}.pth.tar"
    says(validate_refuses(checkpoint=path), path, "no checkpoint or is damaged")


@pytest.mark.parametrize("name", ["text.safetensors", *(f"{n}.pth.tar" for n in ("list", "nothing", "no weights"))])
def test_files_without_weights(train_refuses: Refused, validate_refuses: Refused, checkpoints: Path, name: str) -> None:
    for flag in STARTS[1:]:
        says(train_refuses(flag, checkpoints / name), checkpoints / name)
    says(validate_refuses(checkpoint=checkpoints / name), checkpoints / name)


def test_checkpoints_that_are_not_there(train_refuses: Refused, validate_refuses: Refused, tmp_path: Path) -> None:
    for flag in STARTS:
        says(train_refuses(flag, tmp_path / "none.pth"), "no checkpoint at", tmp_path / "none.pth")
    says(validate_refuses(checkpoint=tmp_path / "none.pth"), "no checkpoint at", tmp_path / "none.pth")
    (tmp_path / "folder").mkdir()
    says(validate_refuses(checkpoint=tmp_path / "folder"), tmp_path / "folder", "name the file")
    says(validate_refuses(checkpoint=tmp_path / "*.pth"), "No file matches", tmp_path / "*.pth")


SMALL_CHECKPOINT = io.BytesIO()
torch.save({"state_dict": {"head.weight": torch.ones(2)}, "epoch": 1}, SMALL_CHECKPOINT)
LEGACY_CHECKPOINT = io.BytesIO()
torch.save({"state_dict": {"a": torch.ones(2)}}, LEGACY_CHECKPOINT, _use_new_zipfile_serialization=False)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from([SMALL_CHECKPOINT.getvalue(), LEGACY_CHECKPOINT.getvalue()]),
    st.lists(st.tuples(st.integers(0, 2000), st.binary(max_size=4)), max_size=3),
    st.integers(0, 3000),
)
def test_mutated_checkpoints_are_read_or_refused(
    tmp_path: Path, data: bytes, mutations: list[tuple[int, bytes]], length: int
) -> None:
    for position, replacement in mutations:
        position %= len(data)
        data = data[:position] + replacement + data[position + len(replacement) :]
    path = tmp_path / "mutated.pth"
    path.write_bytes(data[:length])
    try:
        assert isinstance(read_checkpoint(path), dict)
    except UserError as e:
        assert str(path) in str(e) and "\n" not in str(e)


def test_mutated_pickles_inside_whole_archives(tmp_path: Path) -> None:
    """The archive is intact and its pickle is not, which gets further than a broken archive."""
    with zipfile.ZipFile(SMALL_CHECKPOINT) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    (name,) = (name for name in files if name.endswith("data.pkl"))
    refused = 0
    for position in range(len(files[name])):
        changed = bytearray(files[name])
        changed[position] ^= 0x55
        path = tmp_path / "changed.pth"
        with zipfile.ZipFile(path, "w") as archive:
            for other, content in files.items():
                archive.writestr(other, bytes(changed) if other == name else content)
        try:
            assert isinstance(read_checkpoint(path), dict)
        except UserError as e:
            refused += 1
            assert str(path) in str(e) and "\n" not in str(e)
    assert refused > len(files[name]) // 4


@pytest.mark.parametrize("flag", STARTS[1:])
def test_checkpoint_of_another_model(train_refuses: Refused, checkpoints: Path, flag: str) -> None:
    ours, foreign = checkpoints / "vip_ti7-3.pth", checkpoints / "resnet10t-3.pth"
    message = train_refuses(flag, ours)
    says(message, ours, "vip_nano4_32", "of another shape", "use --model vip_ti7")
    assert message.count(".weight") == 1, "one example, not all names"
    message = train_refuses(flag, foreign)
    says(message, foreign, "vip_nano4_32", "missing", "unknown")


def test_resuming_another_model(train_refuses: Refused, trained_run: Path) -> None:
    message = train_refuses("--resume", trained_run / "last.pth.tar", "--model", "vip_ti7", "--img-size", "28")
    says(message, "last.pth.tar", "vip_ti7", "use --model vip_nano4_32")


def test_validating_another_model(validate_refuses: Refused, checkpoints: Path, trained_run: Path) -> None:
    says(validate_refuses("--model", "vip_ti7"), trained_run, "vip_ti7", "use --model vip_nano4_32")
    foreign = checkpoints / "resnet10t-3.pth"
    says(validate_refuses("--model", "vip_nano4_32", checkpoint=foreign), foreign, "missing", "unknown")
    says(validate_refuses(checkpoint=foreign), foreign, "--model")


def test_weights_are_no_state_to_resume(train_refuses: Refused, checkpoints: Path) -> None:
    path = checkpoints / "vip_nano4_32-3.pth"
    says(train_refuses("--resume", path), path, "no training state", "--initial-checkpoint")


def test_resuming_with_another_optimizer(train_refuses: Refused, trained_run: Path) -> None:
    message = train_refuses("--resume", trained_run / "last.pth.tar", "--opt", "sgd")
    says(message, "last.pth.tar", "--no-resume-opt")


def test_resume_auto_without_a_name(train_refuses: Refused) -> None:
    says(train_refuses("--resume"), "--resume auto", "--experiment")


def test_averaged_weights_that_are_not_there(validate_refuses: Refused, trained_run: Path) -> None:
    says(validate_refuses("--use-ema"), trained_run, "no averaged weights", "--use-ema")


def test_two_starts_at_once(train_refuses: Refused, checkpoints: Path) -> None:
    path = checkpoints / "vip_nano4_32-3.pth"
    says(train_refuses("--initial-checkpoint", path, "--finetune", path), "--initial-checkpoint and --finetune")
    says(train_refuses("--transfer-learning"), "--transfer-model")


# The number of classes


def test_number_of_classes_of_the_data(train_refuses: Refused) -> None:
    says(train_refuses("--num-classes", "7"), "--num-classes 7", "3 classes")


@pytest.mark.parametrize("mixing", [(), ("--mixup", "0", "--cutmix", "0")])
def test_more_classes_in_the_map_than_in_the_model(train_refuses: Refused, tmp_path: Path, mixing: Any) -> None:
    (tmp_path / "names.txt").write_text("red\ngreen\nblue\n")
    message = train_refuses("--class-map", tmp_path / "names.txt", "--num-classes", "2", *mixing)
    says(message, "--num-classes 2", "3 classes")


def test_number_of_classes_of_a_checkpoint(
    train_refuses: Refused, validate_refuses: Refused, checkpoints: Path
) -> None:
    three, ten = checkpoints / "vip_nano4_32-3.pth", checkpoints / "vip_nano4_32-10.pth"
    for flag in ("--initial-checkpoint", "--eval-checkpoint"):
        says(train_refuses(flag, ten), ten, "10 classes, the model 3", "--num-classes 10", "--finetune")
    says(validate_refuses(checkpoint=ten), "3 classes", "model 10", "--class-map")
    says(validate_refuses("--num-classes", "3", checkpoint=ten), ten, "10 classes, the model 3", "--num-classes 10")
    says(validate_refuses("--num-classes", "10", checkpoint=three), three, "3 classes, the model 10")


def test_valid_labels_that_the_model_does_not_have(validate_refuses: Refused, tmp_path: Path) -> None:
    for lines, words in (("0\n1\n", ["2 classes", "has 3"]), ("0\n1\n99\n", ["valid.txt", "3"])):
        (tmp_path / "valid.txt").write_text(lines)
        says(validate_refuses("--valid-labels", tmp_path / "valid.txt"), *words)


def test_class_map_with_more_classes_than_the_checkpoint(validate_refuses: Refused, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("white\nred\ngreen\nblue\n")
    says(validate_refuses("--class-map", tmp_path / "names.txt"), "4 classes", "3")


# Models, sizes, batches and other options


@pytest.mark.parametrize(
    "name, nearest", [("vip_s77", "vip_s7"), ("vip_nano", "vip_nano4_32"), ("resnet188", "resnet18")]
)
def test_unknown_model(train_refuses: Refused, validate_refuses: Refused, name: str, nearest: str) -> None:
    says(train_refuses("--model", name), f"'{name}'", f"Did you mean {nearest}")
    says(validate_refuses("--model", name), f"'{name}'", f"Did you mean {nearest}")
    says(validate_refuses("--model", name, checkpoint=None), f"'{name}'", f"Did you mean {nearest}")


def test_nothing_to_validate(validate_refuses: Refused) -> None:
    says(validate_refuses(checkpoint=None), "--checkpoint PATH", "--model NAME --pretrained")
    says(validate_refuses("--model", "vip_*x", checkpoint=None), "vip_*x")
    says(validate_refuses("--model", "vip_nano4_32", checkpoint=None), "vip_nano4_32", "no pretrained weights")


def test_odd_batch_with_mixup(train_refuses: Refused) -> None:
    says(train_refuses("-b", "9"), "--batch-size 9 is odd", "--mixup 0 --cutmix 0")


def test_image_size_no_stage_divides(train_refuses: Refused, validate_refuses: Refused) -> None:
    for refuses in (train_refuses, validate_refuses):
        says(refuses("--img-size", "30"), "30", "24", "32")


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--opt adamq", ["adamq", "Did you mean"]),
        ("--sched cosin", ["--sched", "'cosin'", "cosine"]),
        ("--aa foo", ["--aa foo", "rand-m9-mstd0.5-inc1"]),
        ("--train-interpolation smooth", ["--train-interpolation", "'smooth'", "bicubic"]),
        ("--interpolation smooth", ["--interpolation", "'smooth'", "bicubic"]),
        ("--scale 0.5", ["--scale", "2"]),
        ("--cutmix-minmax 0.5", ["--cutmix-minmax", "2"]),
        ("--color-jitter 1e300 --aa none", ["--color-jitter is 1e+300", "0 to 100"]),
        ("--input-size 3 32", ["--input-size", "3"]),
        ("--mean 0.5 0.5", ["mean", "3 values", "2"]),
        ("--opt-betas 0.5", ["adamw"]),
        ("--opt-kwargs none=1", ["adamw", "none"]),
        ("--model-kwargs none=1", ["vip_nano4_32", "none"]),
        ("--gp middle", ["vip_nano4_32", "middle"]),
        ("--drop-block 0.1", ["vip_nano4_32", "drop_block"]),
        ("--lr fast", ["--lr", "'fast'"]),
        ("--epoch 3", ["--epoch", "--epochs"]),
        ("--epochs 0", ["--epochs is 0", "at least 1"]),
        ("-b 0", ["--batch-size is 0", "at least 1"]),
        ("-vb 0", ["0", "at least 1"]),
        ("-j -1", ["--workers is -1"]),
        ("--jsd", ["--aug-splits"]),
        ("--aug-splits 1", ["--aug-splits is 1"]),
        ("--aug-splits 3", ["--mixup 0 --cutmix 0"]),
        ("--aug-splits 3 --mixup 0 --cutmix 0 --no-prefetcher", ["--no-prefetcher"]),
        ("--device toaster", ["'toaster'", "cpu"]),
        ("--torchcompile speed", ["speed"]),
        ("--config none.yaml", ["none.yaml"]),
        (f"--resume {'x' * 300}", ["no checkpoint at xxx"]),
        (f"--output {'x' * 300}", ["Cannot write to xxx"]),
        ("--log-wandb", ["wandb", "pip install"]),
    ],
)
def test_options_that_are_wrong(
    train_refuses: Refused, flags: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if flags == "--log-wandb":
        monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    says(train_refuses(*flags.split()), *words)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("-b 0", ["0", "at least 1"]),
        ("--log-freq 0", ["--log-freq", "0"]),
        ("--interpolation smooth", ["--interpolation", "'smooth'", "bicubic"]),
        ("--num-gpu 99", ["--num-gpu 99"]),
        ("--real-labels none.json", ["--real-labels none.json"]),
        ("--valid-labels none.txt", ["--valid-labels none.txt", "class indices"]),
        ("--torchcompile speed", ["speed"]),
        ("--checkpoints x", ["--checkpoints", "Did you mean --checkpoint"]),
        ("--in-chans 1", ["patch_embed.proj.weight"]),
        ("--model-kwargs mlp_ratio=0", ["mlp.fc1.weight", "--model-kwargs"]),
    ],
)
def test_options_of_validation_that_are_wrong(validate_refuses: Refused, flags: str, words: list[str]) -> None:
    says(validate_refuses(*flags.split()), *words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(train_refuses: Refused, validate_refuses: Refused) -> None:
    for refuses in (train_refuses, validate_refuses):
        says(refuses("--device", "cuda"), "--device cuda", "--device cpu")


# The output


def test_output_below_a_file(train_refuses: Refused, validate_refuses: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    says(train_refuses("--output", tmp_path / "file" / "runs"), tmp_path / "file" / "runs", "--output")
    message = validate_refuses("--results-file", tmp_path / "file" / "results.csv")
    says(message, tmp_path / "file" / "results.csv", "--results-file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_output_without_the_right_to_write(train_refuses: Refused, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    says(train_refuses("--output", tmp_path / "locked" / "runs"), tmp_path / "locked" / "runs", "--output")


def test_disk_too_small(train_refuses: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**6, 10**6))
    message = train_refuses("--experiment", "small")
    says(message, tmp_path / "output" / "small", "0.00 GB free", "--output", "--checkpoint-hist")


def test_disk_just_large_enough(train: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked for is about what is used: more than the files take, less than twice that."""
    asked = []
    usage = namedtuple("usage", "total used free")

    def room(path: Path) -> Any:
        asked.append(path)
        return usage(10**9, 0, limit)

    monkeypatch.setattr(shutil, "disk_usage", room)
    limit = 10**9
    assert train("--experiment", "large").status == 0 and asked
    files = {f.stat().st_ino: f.stat().st_size for f in (tmp_path / "output" / "large").glob("*.pth.tar")}
    limit = sum(files.values()) - 1
    assert "GB free" in train("--experiment", "too-small").error("vip train")


def test_a_run_is_not_written_over(train_refuses: Refused, trained_run: Path) -> None:
    before = {file: file.read_bytes() for file in trained_run.iterdir()}
    message = train_refuses("--output", trained_run.parent, "--experiment", trained_run.name)
    says(message, trained_run, "--resume auto", "--experiment")
    assert {file: file.read_bytes() for file in trained_run.iterdir()} == before


def test_errors_leave_no_checkpoint_behind(train_refuses: Refused, tmp_path: Path) -> None:
    train_refuses("--num-classes", "2")
    assert not (tmp_path / "output").exists()


def test_eval_checkpoint_validates_and_writes_nothing(
    train: Callable[..., Outcome],
    command: Callable[..., Outcome],
    image_folder: Path,
    trained_run: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    for flag in ("--eval-checkpoint", "--eval_checkpoint"):
        caplog.clear()
        assert train(flag, trained_run).status == 0
        (line,) = (r.getMessage() for r in caplog.records if "top-1" in r.getMessage())
        outcome = command("validate", image_folder, "--checkpoint", trained_run, "--device", "cpu", "-j", "0")
        row = json.loads(outcome.out.split("--result\n")[1])
        assert f"top-1 {row['top1']:.3f} ({row['correct1']} of 15)" in line
    assert not (tmp_path / "output").exists()


def test_the_version_is_there_for_reports() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.?\w+)?", vip.__version__)
