"""Label generation: what is in the maps, what is beside them, going on after an end of any kind, and mistakes."""

import errno
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from map_files import random_map
from PIL import Image
from timm.data import create_transform
from torch import nn
from torchvision.datasets import FakeData
from training_command import QUICK, Outcome

import vip.models  # noqa: F401  # registers them
from vip.token_labels.geometry import Region
from vip.token_labels.maps import LabelMap, LabelMaps, MapRecord, write_map
from vip.token_labels.store import open_label_maps
from vip.training.generation import fingerprint

ROOT = Path(__file__).parents[2]
NAMES = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu")
LAYOUTS = ("published", "packed")
PIXELS = dict(mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3), interpolation="bicubic")
FLAGS = ("--mean", "0.5", "0.4", "0.3", "--std", "0.2", "0.25", "0.3", "--interpolation", "bicubic")
HALF = dict(rtol=1e-3, atol=2e-3)  # float16, and a little for the order of sums


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """14 images of 7 classes in train/, of several sizes, so that it matters how they are resized and cropped."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(14):
        path = root / "train" / NAMES[i % 7] / (f"{i}.jpg" if i % 2 else f"{i}.small.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        coarse.resize([(90, 70), (64, 64), (60, 110)][i % 3], Image.Resampling.BICUBIC).save(path)
    return root


@dataclass(frozen=True)
class Teacher:
    """An annotator of `pictures`.

    Attributes:
        name: timm's name.
        options: Other arguments of the model.
        size: Height and width of its input.
        grid: Height and width of its maps.
        agrees: Whether its classifier reads the mean of the tokens.
        features: From the model and what its `forward_features` gives to what is classified, `[B, C, H, W]`.
        classifier: The name of its linear classifier.
    """

    name: str
    size: tuple[int, int]
    grid: tuple[int, int]
    agrees: bool
    features: Callable[[Any, torch.Tensor], torch.Tensor]
    options: dict[str, Any]
    classifier: str

    def __str__(self) -> str:
        return self.name

    def create(self) -> Any:
        torch.manual_seed(0)
        options = self.options if self.name.startswith(("resnet", "test_convnext")) else self.with_size
        model = timm.create_model(self.name, num_classes=len(NAMES), **options).eval()
        nn.init.normal_(model.get_submodule(self.classifier).weight, std=0.3)  # logits that differ between tokens
        nn.init.normal_(model.get_submodule(self.classifier).bias)
        return model

    @property
    def with_size(self) -> dict[str, Any]:
        return {**self.options, "img_size": self.size}

    def save(self, path: Path) -> tuple[object, ...]:
        """Write its weights; returns the flags that name it."""
        torch.save(self.create().state_dict(), path)
        kwargs = [f"{name}={value}".replace(" ", "") for name, value in self.options.items()]
        flags = ("--model", self.name, "--checkpoint", path, "--input-size", 3, *self.size, *FLAGS)
        return (*flags, "--model-kwargs", *kwargs) if kwargs else flags


def channels_first(model: Any, features: torch.Tensor) -> torch.Tensor:
    return features.permute(0, 3, 1, 2)


def on_grid(prefix: int, grid: tuple[int, int]) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    return lambda model, tokens: tokens[:, prefix:].transpose(1, 2).unflatten(2, grid)


SMALL_SWIN = dict(embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))
TEACHERS = [
    Teacher("resnet18", (64, 96), (2, 3), True, lambda model, features: features, {}, "fc"),
    Teacher("vip_nano4_32", (32, 48), (4, 6), True, channels_first, {}, "head"),
    Teacher("swin_tiny_patch4_window7_224", (64, 96), (2, 3), True, channels_first, SMALL_SWIN, "head.fc"),
    # normalizes what is pooled, here a single token, so that the mean of the logits is not that of the image
    Teacher("test_convnext", (64, 96), (2, 3), False, lambda model, x: model.head.norm(x), {}, "head.fc"),
    Teacher("test_vit", (64, 96), (4, 6), False, on_grid(3, (4, 6)), dict(reg_tokens=2), "head"),
    Teacher("lvvit_nano4_32", (32, 48), (8, 12), False, on_grid(1, (8, 12)), {}, "aux_head"),
]
RESNET = TEACHERS[0]


@torch.no_grad()
def dense_logits(teacher: Teacher, model: Any, images: torch.Tensor) -> torch.Tensor:
    """What a convolution with the weights of the classifier says of every token, `[B, K, H, W]`."""
    linear = model.get_submodule(teacher.classifier)
    convolution = nn.Conv2d(linear.in_features, linear.out_features, 1)
    convolution.weight.copy_(linear.weight[:, :, None, None])
    convolution.bias.copy_(linear.bias)
    return convolution(teacher.features(model, model.forward_features(images)))


def load(folder: Path, size: tuple[int, int], crop_pct: float, crop_mode: str) -> dict[str, torch.Tensor]:
    """The images of class folders by the key of their map."""
    transform = create_transform((3, *size), crop_pct=crop_pct, crop_mode=crop_mode, **PIXELS)
    paths = sorted(path for path in folder.rglob("*.*") if path.is_file())
    images = [transform(Image.open(path).convert("RGB")) for path in paths]
    return {f"{p.parent.name}/{p.name.split('.')[0]}": image for p, image in zip(paths, images, strict=True)}


def full(label_map: LabelMap, classes: int) -> torch.Tensor:
    """A map of all classes in their order, `[K, H, W]`."""
    values, indices = label_map
    assert len(values) == classes
    return torch.zeros_like(values).scatter(0, indices.long(), values).float()


def assert_close(ours: LabelMaps, theirs: LabelMaps, **tolerance: float) -> None:
    """The same maps; logits that are nearly equal may stand in another order."""
    assert set(ours.keys()) == set(theirs.keys()) and ours.record == theirs.record
    classes = ours.record.num_classes
    for key in ours.keys():
        a, b = (full(maps.read(key), classes) for maps in (ours, theirs))
        torch.testing.assert_close(a, b, **{**HALF, **tolerance})


@dataclass
class Generate:
    """Runs `vip generate-label`, which must succeed."""

    command: Callable[..., Outcome]
    caplog: pytest.LogCaptureFixture
    log: list[str]

    def __call__(self, *argv: object) -> LabelMaps:
        self.caplog.set_level(logging.INFO)
        self.caplog.clear()
        outcome = self.command("generate-label", "--device", "cpu", "-j", 0, *argv)
        assert outcome.status == 0, outcome.err
        self.log[:] = [record.getMessage() for record in self.caplog.records]
        return open_label_maps(str(argv[1]))

    @property
    def counts(self) -> tuple[int, int]:
        """Maps written, and maps that were there."""
        written, there = re.match(r"(\d+) label maps written, (\d+) were there\.", self.log[-1]).groups()
        return int(written), int(there)

    @property
    def accuracy(self) -> tuple[float, ...]:
        """Top-1 and top-5 of the annotator, and top-1 of the average of its maps."""
        return accuracy_in(self.log[-1])


def accuracy_in(line: str) -> tuple[float, ...]:
    found = re.search(
        r" Annotator(?: on those written)?: top-1 (\S+), top-5 (\S+); average of its maps: top-1 (\S+)$", line
    )
    return tuple(map(float, found.groups()))


@pytest.fixture
def generate(command: Callable[..., Outcome], caplog: pytest.LogCaptureFixture) -> Generate:
    return Generate(command, caplog, [])


@pytest.fixture
def refuses(
    command: Callable[..., Outcome], image_folder: Path, trained_run: Path, tmp_path: Path
) -> Callable[..., str]:
    """Runs `vip generate-label`, good but for what is given; it must end in an error, which is returned."""

    def run(*argv: object, data: object = image_folder, out: object = None, checkpoint: object = trained_run) -> str:
        annotator = [] if checkpoint is None else ["--checkpoint", checkpoint]
        where = [folder for folder in (data, tmp_path / "out" if out is None else out) if folder != ""]
        outcome = command("generate-label", *where, *annotator, "--device", "cpu", "-j", 0, "--top-k", 3, *argv)
        message = outcome.error("vip generate-label")
        assert len(message) < 600
        return message

    return run


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("vip.token_labels.writers", "vip.token_labels.store"):
        monkeypatch.setattr(f"{module}.SHARD_MAPS", 10)


@pytest.fixture
def copy(image_folder: Path, tmp_path: Path) -> Path:
    """An image folder to spoil."""
    return shutil.copytree(image_folder, tmp_path / "copy")


def says(message: str, *words: object) -> None:
    """The message names all of these."""
    missing = [str(word) for word in words if str(word) not in message]
    assert not missing, f"{missing} not in: {message}"


def keys_of(folder: Path) -> set[str]:
    """The keys of the maps of the images in class folders; the map of `x.y.png` is `x`."""
    return {f"{p.parent.name}/{p.name.split('.')[0]}" for p in folder.rglob("*.*") if p.suffix in (".png", ".jpg")}


def state_of(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """Time and content of every file."""
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()}


# --- what the maps hold


@pytest.mark.parametrize("teacher", TEACHERS, ids=str)
def test_maps_hold_the_strongest_outputs_of_the_classifier_as_a_convolution(
    generate: Generate, pictures: Path, tmp_path: Path, teacher: Teacher
) -> None:
    maps = generate(pictures, tmp_path / "out", *teacher.save(tmp_path / "weights.pth"), "--crop-pct", 0.8)
    weights = fingerprint(teacher.create())
    assert maps.record == MapRecord(Region(teacher.size, 0.8, "center"), 7, list(NAMES), teacher.name, weights)
    images = load(pictures / "train", teacher.size, 0.8, "center")
    assert set(maps.keys()) == set(images) == {f"{NAMES[i % 7]}/{i}" for i in range(14)}
    logits = dense_logits(teacher, teacher.create(), torch.stack(list(images.values())))
    for key, expected in zip(images, logits, strict=True):
        values, indices = maps.read(key)
        assert values.shape == indices.shape == (5, *teacher.grid)
        # the five strongest and theirs: together the right ones, whatever the order of two that are nearly equal
        torch.testing.assert_close(values.float(), expected.topk(5, 0).values, **HALF)
        torch.testing.assert_close(values.float(), expected.gather(0, indices.long()), **HALF)
        assert indices.sort(0).values.diff(dim=0).min() > 0, "a class twice"


@pytest.mark.parametrize("teacher", TEACHERS, ids=str)
def test_the_mean_of_a_map_is_what_the_model_says_where_its_head_reads_the_mean(
    generate: Generate, pictures: Path, tmp_path: Path, teacher: Teacher
) -> None:
    flags = (*teacher.save(tmp_path / "weights.pth"), "--top-k", 7, "--crop-mode", "squash", "-b", 5)
    maps = generate(pictures, tmp_path / "out", *flags)
    assert maps.record.region == Region(teacher.size, maps.record.region.crop_pct, "squash")
    images = load(pictures / "train", teacher.size, maps.record.region.crop_pct, "squash")
    model = teacher.create()
    with torch.no_grad():
        own = model(torch.stack(list(images.values())))
    mean = torch.stack([full(maps.read(key), 7).mean((1, 2)) for key in images])
    difference = (mean - own).abs().max() / own.abs().max()
    assert difference < 1e-3 if teacher.agrees else difference > 1e-2
    height, width = teacher.grid
    says("\n".join(generate.log), f"{height}x{width} cells at {teacher.size} pixels", tmp_path / "weights.pth")
    sentences = "averages to its own logits", "but their average is not what it says of the image"
    assert [sum(text in line for line in generate.log) for text in sentences] == [teacher.agrees, not teacher.agrees]

    target = torch.tensor([NAMES.index(key.split("/")[0]) for key in images])
    right = [(scores.topk(k).indices == target[:, None]).any(1).sum() for scores, k in ((own, 1), (own, 5), (mean, 1))]
    assert generate.accuracy == pytest.approx([100 * int(n) / 14 for n in right], abs=1e-3)


def test_files_are_the_published_ones(
    generate: Generate, image_folder: Path, trained_run: Path, tmp_path: Path
) -> None:
    generate(image_folder, tmp_path / "out", "--checkpoint", trained_run, "--top-k", 3)
    files = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert files == {f"{key}.pt" for key in keys_of(image_folder / "train")} | {"label_maps.json"} and len(files) == 37
    content = torch.load(tmp_path / "out" / "red" / "red7.pt", weights_only=True)
    assert type(content) is torch.Tensor and content.dtype is torch.float16 and content.shape == (2, 3, 4, 4)
    assert content[1].sort(0).values.eq(torch.arange(3)[:, None, None]).all() and (content[0].diff(dim=0) <= 0).all()
    assert (tmp_path / "out" / "red" / "red7.pt").stat().st_size < 2000, "the storage of a whole batch"


def test_the_record_says_what_part_of_the_images_the_maps_cover(
    generate: Generate, image_folder: Path, trained_run: Path, tmp_path: Path
) -> None:
    for name, flags, region in (
        ("model's", [], Region((32, 32), 1.0, "center")),
        ("crop", ["--crop-pct", 0.875, "--crop-mode", "border", "--img-size", 48], Region((48, 48), 0.875, "border")),
        ("size", ["--input-size", 3, 32, 64], Region((32, 64), 1.0, "center")),
    ):
        maps = generate(image_folder, tmp_path / name, "--checkpoint", trained_run, "--top-k", 3, *flags)
        assert maps.record.region == region
        assert len(maps.record.weights) == 16
        assert json.loads((tmp_path / name / "label_maps.json").read_text()) == {
            "region": {"img_size": list(region.img_size), "crop_pct": region.crop_pct, "crop_mode": region.crop_mode},
            "num_classes": 3,
            "classes": ["blue", "green", "red"],
            "model": "vip_nano4_32",
            "weights": maps.record.weights,
            "transfer": False,
        }


def test_the_crop_of_the_training_is_taken_over(
    command: Callable[..., Outcome], generate: Generate, image_folder: Path, trained_run: Path, tmp_path: Path
) -> None:
    checkpoint = torch.load(trained_run / "last.pth.tar", weights_only=False)
    checkpoint["args"].update(crop_pct=0.75, crop_mode="squash", img_size=48)
    torch.save(checkpoint, tmp_path / "run.pth.tar")
    maps = generate(image_folder, tmp_path / "out", "--checkpoint", tmp_path / "run.pth.tar", "--top-k", 3)
    assert maps.record.region == Region((48, 48), 0.75, "squash")


def test_classes_of_a_map_are_not_those_of_the_folders(
    generate: Generate, image_folder: Path, trained_run: Path, tmp_path: Path
) -> None:
    (tmp_path / "names.txt").write_text("red\nblue\n")
    flags = ("--checkpoint", trained_run, "--top-k", 3, "--class-map", tmp_path / "names.txt")
    maps = generate(image_folder, tmp_path / "out", *flags)
    assert maps.classes() == {"red", "blue"} and maps.record.classes is None and maps.record.num_classes == 3


def test_what_the_annotator_gets_right_is_what_validation_counts(
    command: Callable[..., Outcome], generate: Generate, pictures: Path, tmp_path: Path
) -> None:
    """On the same images with the same crop."""
    flags = (*RESNET.save(tmp_path / "weights.pth"), "--crop-pct", 0.7)
    generate(pictures, tmp_path / "out", *flags)
    outcome = command("validate", pictures, "--split", "train", *flags, "--device", "cpu", "-j", 0)
    result = json.loads(outcome.out.partition("--result\n")[2])
    assert result["count"] == 14 and 0 < result["correct5"] < 14
    top1, top5, mean = generate.accuracy
    assert top1 == mean == pytest.approx(result["top1"], abs=1e-3) and top5 == pytest.approx(result["top5"], abs=1e-3)
    assert generate.counts == (14, 0)


@pytest.mark.parametrize(
    "flags, tolerance",
    [
        ("--no-prefetcher", 2e-3),
        ("--channels-last", 2e-3),
        ("--torchcompile eager", 2e-3),
        ("-b 1", 2e-3),
        ("-j 2", 2e-3),
        ("--amp --amp-dtype bfloat16", 0.1),
    ],
)
def test_ways_to_compute_the_same(
    generate: Generate, pictures: Path, tmp_path: Path, flags: str, tolerance: float
) -> None:
    teacher = (*RESNET.save(tmp_path / "weights.pth"), "--top-k", 7)
    expected = generate(pictures, tmp_path / "expected", *teacher)
    maps = generate(pictures, tmp_path / "out", *teacher, *flags.split())
    assert_close(maps, expected, rtol=tolerance, atol=tolerance)
    difference = max((full(maps.read(k), 7) - full(expected.read(k), 7)).abs().max() for k in maps.keys())
    assert (difference > 2e-3) == ("bfloat16" in flags), "low precision shows"


def test_averaged_weights(generate: Generate, pictures: Path, tmp_path: Path) -> None:
    model, other = RESNET.create(), RESNET.create()
    with torch.no_grad():
        other.fc.bias += torch.arange(7.0)
    states = {"state_dict": model.state_dict(), "state_dict_ema": other.state_dict()}
    torch.save({**states, "arch": "resnet18"}, tmp_path / "both.pth.tar")
    values = {}
    for flag in ("", "--use-ema", "--no-use-ema"):
        flags = ("--checkpoint", tmp_path / "both.pth.tar", "--input-size", 3, 64, 96, "--top-k", 7, *flag.split())
        maps = generate(pictures, tmp_path / f"out{flag}", *flags)
        values[flag] = full(maps.read("ant/0"), 7)
    assert values[""].equal(values["--use-ema"])  # as where a checkpoint is validated
    difference = values["--use-ema"] - values["--no-use-ema"]
    torch.testing.assert_close(difference, torch.arange(7.0)[:, None, None].expand(7, 2, 3), rtol=0, atol=1e-2)


def test_without_a_checkpoint_the_weights_are_timms(refuses: Callable[..., str]) -> None:
    """As of the published generator; ours has none for its own models."""
    message = refuses("--model", "vip_nano4_32", "--num-classes", 3, checkpoint=None)
    says(message, "Cannot create vip_nano4_32", "pretrained")


def test_transfer_annotates_images_of_other_classes(
    generate: Generate,
    refuses: Callable[..., str],
    command: Callable[..., Outcome],
    image_folder: Path,
    tmp_path: Path,
) -> None:
    """Nothing can be said of accuracy then, and the record names no classes."""
    torch.save(timm.create_model("resnet18", num_classes=2).state_dict(), tmp_path / "two.pth")
    flags = ("--model", "resnet18", "--checkpoint", tmp_path / "two.pth", "--img-size", 64, "--top-k", 2)
    says(refuses(*flags, checkpoint=None), "has 3 classes and the model 2")
    maps = generate(image_folder, tmp_path / "maps", *flags, "--transfer")
    assert generate.log[-1] == "36 label maps written, 0 were there."
    assert maps.record is not None and maps.record.classes is None and maps.record.num_classes == 2
    assert set(maps.keys()) == keys_of(image_folder / "train")
    assert maps.record.transfer
    labels = ("--token-label", "--token-label-data", tmp_path / "maps", *QUICK)
    says(command("train", image_folder, *labels).error("vip train"), "made with --transfer")


def test_random_weights_are_warned_of_and_the_same_in_every_run(
    generate: Generate, pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flags = ("--model", "resnet18", "--no-pretrained", "--num-classes", 7, "--top-k", 7, "--img-size", 64)
    maps = [generate(pictures, tmp_path / name, *flags) for name in ("a", "b")]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and "resnet18 has random weights" in warnings[0] and "--no-pretrained" in warnings[0]
    assert_close(*maps)


# --- which images


def test_the_split(generate: Generate, image_folder: Path, trained_run: Path, copy: Path, tmp_path: Path) -> None:
    (copy / "train").rename(copy / "training")
    train, val = keys_of(image_folder / "train"), keys_of(image_folder / "val")
    for i, (data, flags, expected) in enumerate(
        (
            (image_folder / "train", (), train),
            (image_folder / "val", (), val),
            (image_folder, (), train),
            (image_folder, ("--split", "train"), train),
            (image_folder, ("--split", "validation"), val),
            (image_folder, ("--split", "val"), val),
            (copy, (), train),  # training/ is not overlooked for val/
            (copy, ("--split", "training"), train),
        )
    ):
        maps = generate(data, tmp_path / f"out{i}", "--checkpoint", trained_run, "--top-k", 3, *flags)
        assert set(maps.keys()) == expected
        assert generate.counts == (len(expected), 0)


def test_a_folder_without_training_images(refuses: Callable[..., str], copy: Path, tmp_path: Path) -> None:
    shutil.rmtree(copy / "train")
    says(refuses(data=copy), copy, "no train/", "it holds val/")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ["images.tar", "data/train.tar"])
def test_a_tar_file(
    generate: Generate, image_folder: Path, trained_run: Path, tmp_path: Path, name: str, workers: int
) -> None:
    (tmp_path / "data").mkdir()
    with tarfile.open(tmp_path / name, "w") as tar:
        tar.add(image_folder / "train", "train")
    with tarfile.open(tmp_path / "data" / "val.tar", "w") as tar:
        tar.add(image_folder / "val", "val")
    flags = ("--checkpoint", trained_run, "--top-k", 3, "-j", workers)
    data = tmp_path / name if name == "images.tar" else tmp_path / "data"
    assert_close(generate(data, tmp_path / "tar", *flags), generate(image_folder, tmp_path / "folder", *flags))


def test_unreadable_images_are_skipped_named_and_counted(
    generate: Generate, copy: Path, trained_run: Path, tmp_path: Path
) -> None:
    for name in ("blue/blue0.jpg", "red/red11.png"):
        (copy / "train" / name).write_bytes(b"no image")
    for layout in LAYOUTS:
        flags = ("--checkpoint", trained_run, "--top-k", 3, "--format", layout, "-b", 1)
        maps = generate(copy, tmp_path / layout, *flags)
        assert set(maps.keys()) == keys_of(copy / "train") - {"blue/blue0", "red/red11"}
        assert generate.counts == (34, 0)
        lines = [line for line in generate.log if "no label map" in line]
        assert len(lines) == 1 and lines[0].startswith("2 unreadable images have no label map: ")
        says(lines[0], "blue/blue0.jpg", "red/red11.png")
        named = [line for line in generate.log if "Skipping unreadable image" in line]
        assert len(named) == 2
        generate(copy, tmp_path / layout, *flags)
        assert generate.counts == (0, 34)


# --- going on


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_left_to_do(
    generate: Generate,
    image_folder: Path,
    trained_run: Path,
    tmp_path: Path,
    layout: str,
    workers: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags = ("--checkpoint", trained_run, "--top-k", 3, "--format", layout, "-j", workers)
    generate(image_folder, tmp_path / "out", *flags)
    before = state_of(tmp_path / "out")
    for name in ("write_map", "write_shard"):
        monkeypatch.setattr(f"vip.token_labels.writers.{name}", lambda *args: pytest.fail("written again"))
    for loading in ((), ("--no-prefetcher",)):
        generate(image_folder, tmp_path / "out", *flags, *loading)
        assert generate.log[-1] == "0 label maps written, 36 were there."  # and no accuracy of no images
    assert state_of(tmp_path / "out") == before


def test_what_is_missing_is_made_again_and_the_rest_is_not_touched(
    generate: Generate, image_folder: Path, trained_run: Path, tmp_path: Path
) -> None:
    flags = (image_folder, tmp_path / "out", "--checkpoint", trained_run, "--top-k", 3)
    generate(*flags)
    shutil.copytree(tmp_path / "out", tmp_path / "first")
    before = state_of(tmp_path / "out")
    lost = [tmp_path / "out" / name for name in ("blue/blue0.pt", "red/red3.pt", "red/red10.pt")]
    for path in lost:
        path.unlink()
    for name in (".red3.pt.unfinished", ".red4.pt.unfinished"):  # what a killed process leaves
        (tmp_path / "out" / "red" / name).write_bytes(b"half")
    maps = generate(*flags)
    assert generate.counts == (3, 33) and len(generate.accuracy) == 3
    after = state_of(tmp_path / "out")
    assert after.keys() - before.keys() == {tmp_path / "out" / "red" / ".red4.pt.unfinished"}  # none of ours to remove
    assert [path for path in before if after[path] != before[path]] == sorted(lost)
    assert_close(maps, open_label_maps(tmp_path / "first"))


def test_missing_shards_are_made_again_and_the_rest_is_not_touched(
    generate: Generate, image_folder: Path, trained_run: Path, tmp_path: Path, small_shards: None
) -> None:
    flags = (image_folder, tmp_path / "out", "--checkpoint", trained_run, "--top-k", 3, "--format", "packed")
    generate(*flags)
    shutil.copytree(tmp_path / "out", tmp_path / "first")
    before = state_of(tmp_path / "out")
    assert [p.name for p in before] == ["label_maps.json", *(f"maps-0000{i}.safetensors" for i in range(4))]
    lost = [tmp_path / "out" / f"maps-0000{i}.safetensors" for i in (1, 3)]
    for path in lost:
        path.unlink()
    (tmp_path / "out" / ".maps-00001.safetensors.unfinished").write_bytes(b"half")
    maps = generate(*flags, "-b", 7)  # batches do not end where shards do
    assert generate.counts == (16, 20)
    after = state_of(tmp_path / "out")
    assert after.keys() == before.keys()
    assert [path for path in before if after[path] != before[path]] == lost
    assert_close(maps, open_label_maps(tmp_path / "first"))


def test_both_layouts_hold_the_same(
    generate: Generate, image_folder: Path, trained_run: Path, tmp_path: Path, small_shards: None
) -> None:
    flags = ("--checkpoint", trained_run, "--top-k", 3)
    maps = [generate(image_folder, tmp_path / name, *flags, "--format", name) for name in LAYOUTS]
    assert set(maps[0].keys()) == keys_of(image_folder / "train")
    assert_close(*maps, rtol=0, atol=0)


def test_images_that_were_added(
    generate: Generate, copy: Path, trained_run: Path, tmp_path: Path, small_shards: None
) -> None:
    flags = ("--checkpoint", trained_run, "--top-k", 3)
    for layout in LAYOUTS:
        generate(copy, tmp_path / layout, *flags, "--format", layout)
    shutil.copy(copy / "val" / "red" / "red0.jpg", copy / "train" / "red" / "red99.jpg")  # the last one
    generate(copy, tmp_path / "published", *flags)
    assert generate.counts == (1, 36)
    generate(copy, tmp_path / "packed", *flags, "--format", "packed")
    assert generate.counts == (0, 36)
    says("\n".join(generate.log), "1 images have no map in the shards that are there", "red/red99")
    (tmp_path / "packed" / "maps-00003.safetensors").unlink()
    maps = generate(copy, tmp_path / "packed", *flags, "--format", "packed")
    assert generate.counts == (7, 30) and set(maps.keys()) == keys_of(copy / "train")


@pytest.mark.parametrize("change", ["added", "removed"])
def test_images_that_stand_in_other_shards_than_they_did(
    generate: Generate,
    refuses: Callable[..., str],
    copy: Path,
    trained_run: Path,
    tmp_path: Path,
    small_shards: None,
    change: str,
) -> None:
    generate(copy, tmp_path / "out", "--checkpoint", trained_run, "--top-k", 3, "--format", "packed")
    (tmp_path / "out" / "maps-00003.safetensors").unlink()  # as where generation was interrupted
    before = state_of(tmp_path / "out")
    if change == "added":
        shutil.copy(copy / "val" / "red" / "red0.jpg", copy / "train" / "blue" / "blue99.jpg")
    else:
        (copy / "train" / "blue" / "blue0.jpg").unlink()
    message = refuses("--format", "packed", data=copy)
    says(message, tmp_path / "out", "other images, or in another order", "name another folder")
    assert state_of(tmp_path / "out") == before


def test_packed_by_conversion_is_in_another_order(
    command: Callable[..., Outcome],
    generate: Generate,
    image_folder: Path,
    trained_run: Path,
    tmp_path: Path,
    small_shards: None,
    refuses: Callable[..., str],
) -> None:
    """`blue10` comes before `blue2` in one, and after it in the other."""
    generate(image_folder, tmp_path / "out", "--checkpoint", trained_run, "--top-k", 3)
    packed = tmp_path / "packed"
    assert command("label-maps", "pack", tmp_path / "out", packed).status == 0
    before = state_of(packed)
    (packed / "maps-00003.safetensors").rename(tmp_path / "one shard less")
    says(refuses("--format", "packed", out=packed), packed, "other images, or in another order")
    (tmp_path / "one shard less").rename(packed / "maps-00003.safetensors")
    assert state_of(packed) == before


# A script that a test starts: generate_label.py once for each of the argument lists in a file, in one group of
# processes, with small shards, and killed in the middle of writing its nth file.
SCRIPT = """
import itertools, json, os, runpy, signal, sys
import torch.distributed as dist
import vip.token_labels.writers

writes, fsync, join, leave = itertools.count(1), os.fsync, dist.init_process_group, dist.destroy_process_group


def fsync_or_die(file):
    if next(writes) == int(os.environ.get("KILL_AT", 0)):
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(file)


if __name__ == "__main__":
    os.fsync, vip.token_labels.writers.SHARD_MAPS = fsync_or_die, 10
    dist.init_process_group = lambda *args, **kwargs: dist.is_initialized() or join(*args, **kwargs)
    dist.destroy_process_group = lambda: None
    with open(sys.argv[1]) as file:
        runs = json.load(file)
    for sys.argv[1:] in runs:
        try:
            runpy.run_path("generate_label.py", run_name="__main__")
        except SystemExit as e:
            if e.code:
                raise
    if dist.is_initialized():
        leave()
"""


def start(tmp_path: Path, launcher: Iterable[str], runs: Iterable[Iterable[object]], **environment: str) -> Any:
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "runs.json").write_text(json.dumps([[str(a) for a in arguments] for arguments in runs]))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), **environment}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        env.pop(name, None)
    command = [sys.executable, *launcher, str(tmp_path / "script.py"), str(tmp_path / "runs.json")]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, cwd=ROOT, check=False)


@pytest.mark.parametrize("layout, kill_at, whole", [("published", 20, 12), ("packed", 3, 10)])
def test_a_killed_process_leaves_whole_files_and_another_completes_them(
    command: Callable[..., Outcome],
    generate: Generate,
    image_folder: Path,
    trained_run: Path,
    tmp_path: Path,
    small_shards: None,
    layout: str,
    kill_at: int,
    whole: int,
) -> None:
    flags = ("--checkpoint", trained_run, "--top-k", 3, "--format", layout, "--device", "cpu", "-j", 0, "-b", 8)
    done = start(tmp_path, (), [(image_folder, tmp_path / "out", *flags)], KILL_AT=str(kill_at))
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list((tmp_path / "out").rglob(".*.unfinished")), "nothing was being written"
    there = set(open_label_maps(tmp_path / "out").keys())
    assert whole - 2 <= len(there) < 36
    checked = command("label-maps", "check", tmp_path / "out", "--images", image_folder)
    assert checked.status == 1 and f"{36 - len(there)} missing" in checked.out and "damaged" not in checked.out

    before = state_of(tmp_path / "out")
    maps = generate(image_folder, tmp_path / "out", *flags)
    assert generate.counts == (36 - len(there), len(there))
    after = state_of(tmp_path / "out")
    assert all(after[path] == before[path] for path in before if not path.name.startswith("."))
    assert not list((tmp_path / "out").rglob(".*.unfinished"))
    checked = command("label-maps", "check", tmp_path / "out", "--images", image_folder)
    assert checked.status == 0 and checked.out.endswith("All is well.\n")
    assert_close(maps, generate(image_folder, tmp_path / "at once", *flags))


@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_gives_the_maps_that_one_gives(
    generate: Generate, copy: Path, tmp_path: Path, small_shards: None, processes: int
) -> None:
    """From nothing, and going on after one process; the annotator is wrong at times, and some images unreadable."""
    for name in ("green/green4.jpg", "red/red9.png"):
        (copy / "train" / name).write_bytes(b"no image")
    flags = (
        "--model",
        "vip_nano4_32",
        "--no-pretrained",
        "--num-classes",
        3,
        "--top-k",
        3,
        "-b",
        4,
    )  # random weights, the same in all
    runs, expected = [], {}
    for layout in LAYOUTS:
        expected[layout] = generate(copy, tmp_path / layout, *flags, "--format", layout)
        shutil.copytree(tmp_path / layout, tmp_path / "going on" / layout)
        for name in ("from nothing", "going on"):
            runs.append((copy, tmp_path / name / layout, *flags, "--format", layout, "--device", "cpu", "-j", 0))
    accuracy = generate.accuracy
    assert 0 < accuracy[0] < 100
    lost = random.Random(processes).sample(sorted((tmp_path / "going on" / "published").rglob("*.pt")), 9)
    for path in (*lost, *(tmp_path / "going on" / "packed").glob("maps-0000[12].*")):
        path.unlink()

    launcher = ("-m", "vip.cli.launch", "--standalone", f"--nproc-per-node={processes}")
    done = start(tmp_path, launcher, runs)
    assert done.returncode == 0, done.stderr
    for layout in LAYOUTS:
        for name in ("from nothing", "going on"):
            assert_close(open_label_maps(tmp_path / name / layout), expected[layout])
    lines = done.stderr.splitlines()
    reports = [line for line in lines if " label maps written" in line]
    assert [line.partition(" Annotator")[0] for line in reports] == [
        "34 label maps written, 0 were there.",
        "9 label maps written, 25 were there.",
        "34 label maps written, 0 were there.",
        "19 label maps written, 15 were there.",
    ]
    assert accuracy_in(reports[0]) == accuracy_in(reports[2]) == accuracy, "of the images of all processes"
    unreadable = [line.partition(":")[0] for line in lines if " have no label map" in line]
    assert unreadable == [f"{n} unreadable images have no label map" for n in (2, 2, 2, 1)]
    assert sum("random weights" in line for line in lines) == len(runs)
    assert sum("1 images have no map in the shards that are there" in line for line in lines) == 1


# --- mistakes


def test_folders_that_are_not_given(refuses: Callable[..., str], image_folder: Path) -> None:
    for data, out in (("", ""), (image_folder, "")):
        says(refuses(data=data, out=out), "Name two folders", "the images", "write label maps to")


def test_no_annotator(refuses: Callable[..., str]) -> None:
    says(refuses(checkpoint=None), "annotator", "--checkpoint", "--model NAME --pretrained")


def test_annotators_that_cannot_be_loaded(
    refuses: Callable[..., str], trained_run: Path, tmp_path: Path, pictures: Path
) -> None:
    says(refuses(checkpoint=tmp_path / "none.pth"), "no checkpoint at", tmp_path / "none.pth")
    whole = (trained_run / "last.pth.tar").read_bytes()
    (tmp_path / "half.pth.tar").write_bytes(whole[: len(whole) // 2])
    says(refuses(checkpoint=tmp_path / "half.pth.tar"), tmp_path / "half.pth.tar", "no checkpoint or is damaged")
    says(refuses("--model", "resnet81", checkpoint=None), "resnet81", "resnet18")
    says(refuses("--model", "resnet18"), "resnet18", "use --model vip_nano4_32")
    says(refuses("--use-ema"), "no averaged weights")
    assert not (tmp_path / "out").exists()


def test_classes_that_differ(refuses: Callable[..., str], copy: Path, tmp_path: Path, pictures: Path) -> None:
    says(refuses(data=pictures), pictures, "7 classes", "model 3")
    (copy / "train" / "red").rename(copy / "train" / "crimson")
    says(refuses(data=copy), copy, "other classes", "crimson")
    says(refuses("--model", "resnet18", "--no-pretrained", checkpoint=None), "3 classes", "model 1000")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("below", ["", "maps"])
def test_a_folder_among_the_images_is_not_written_to(refuses: Callable[..., str], copy: Path, below: str) -> None:
    before = state_of(copy)
    says(refuses(data=copy / "train", out=copy / "train" / below), "is among the images", "beside them")
    assert state_of(copy) == before


def test_more_classes_to_keep_than_there_are(refuses: Callable[..., str], tmp_path: Path) -> None:
    says(refuses("--top-k", 5), "--top-k is 5", "3 classes")
    says(refuses("--top-k", 0), "--top-k is 0", "at least 1")
    assert not (tmp_path / "out").exists()


def test_a_model_without_tokens(refuses: Callable[..., str], tmp_path: Path) -> None:
    flags = ("--model", "pit_ti_224", "--no-pretrained", "--num-classes", 3)
    says(refuses(*flags, checkpoint=None), "pit_ti_224 has no tokens to label", "expected [1, C, H, W]")
    assert not (tmp_path / "out").exists()


def test_data_sets_without_file_names(
    refuses: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vip.data.datasets.create_dataset", lambda *args, **kwargs: FakeData(4, (3, 32, 32), 3))
    says(refuses("--dataset", "torch/cifar10"), "names of image files", "an image folder or a tar file")
    assert not (tmp_path / "out").exists()


def test_data_that_is_not_there(refuses: Callable[..., str], image_folder: Path, tmp_path: Path) -> None:
    says(refuses(data=tmp_path / "nowhere"), "no data set at", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    says(refuses(data=tmp_path / "empty"), tmp_path / "empty", "it is empty")
    says(refuses("--split", "test"), image_folder, "no test/")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("below", ["", "a/b"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_in_place_of_a_folder_to_write_to(
    refuses: Callable[..., str], tmp_path: Path, layout: str, below: str
) -> None:
    (tmp_path / "file").write_text("a file")
    message = refuses("--format", layout, out=tmp_path / "file" / below)
    says(message, f"{tmp_path / 'file'} is a file", "expected a folder")
    assert (tmp_path / "file").read_text() == "a file"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_right_to_write(refuses: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    says(refuses(out=tmp_path / "locked" / "maps"), tmp_path / "locked" / "maps", "Permission denied")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_maps_that_were_made_otherwise(
    generate: Generate,
    refuses: Callable[..., str],
    image_folder: Path,
    trained_run: Path,
    tmp_path: Path,
    layout: str,
) -> None:
    flags = ("--checkpoint", trained_run, "--format", layout)
    generate(image_folder, tmp_path / "out", *flags, "--top-k", 3)
    before = state_of(tmp_path / "out")
    (tmp_path / "names.txt").write_text("blue\ngreen\nred\n")
    other = ("--model", "resnet18", "--num-classes", 3, "--input-size", 3, 32, 32)
    resnet = RESNET.create()
    resnet.reset_classifier(3)
    torch.save(resnet.state_dict(), tmp_path / "resnet18.pth")
    torch.save(timm.create_model("vip_nano4_32", num_classes=3).state_dict(), tmp_path / "another.pth")
    for changed, what in (
        (["--crop-pct", 0.9], "region"),
        (["--crop-mode", "squash"], "region"),
        (["--img-size", 48], "region"),
        (["--class-map", tmp_path / "names.txt"], "classes"),
        (["--checkpoint", tmp_path / "resnet18.pth", *other, "--crop-pct", 1], "model"),
        (["--checkpoint", tmp_path / "another.pth", "--model", "vip_nano4_32", "--crop-pct", 1], "weights"),
    ):
        message = refuses("--format", layout, *changed)
        says(message, tmp_path / "out", "made otherwise", f"({what} in label_maps.json)", "name another folder")
    says(refuses("--format", layout, "--top-k", 2), tmp_path / "out", "[3, 4, 4]", "[2, 4, 4]", "name another folder")
    assert state_of(tmp_path / "out") == before


def test_one_layout_in_the_folder_of_the_other(
    generate: Generate, refuses: Callable[..., str], image_folder: Path, trained_run: Path, tmp_path: Path
) -> None:
    for layout, other, words in (
        ("published", "packed", ["published layout", "leave out --format"]),
        ("packed", "published", ["packed maps", "add --format packed"]),
    ):
        out = tmp_path / layout
        generate(image_folder, out, "--checkpoint", trained_run, "--top-k", 3, "--format", layout)
        before = state_of(out)
        says(refuses("--format", other, out=out), out, "name another folder", *words)
        assert state_of(out) == before


@pytest.mark.parametrize("layout", LAYOUTS)
def test_maps_of_another_origin(
    generate: Generate,
    refuses: Callable[..., str],
    image_folder: Path,
    trained_run: Path,
    tmp_path: Path,
    layout: str,
) -> None:
    """Such as the published ones, of which there is no record; ours would say something wrong of them."""
    flags = (tmp_path / "out", "--checkpoint", trained_run, "--top-k", 3, "--format", layout)
    generate(image_folder, *flags)
    (tmp_path / "out" / "label_maps.json").unlink()
    before = state_of(tmp_path / "out")
    says(refuses("--format", layout), tmp_path / "out", "another origin", "label_maps.json", "name another folder")
    assert state_of(tmp_path / "out") == before


def test_a_folder_that_holds_something_else_is_written_to(
    generate: Generate, image_folder: Path, trained_run: Path, tmp_path: Path
) -> None:
    write_map(tmp_path / "out" / "map.pt", random_map())  # in no class folder, so none of the maps
    (tmp_path / "out" / "notes.txt").write_text("notes")
    generate(image_folder, tmp_path / "out", "--checkpoint", trained_run, "--top-k", 3)
    assert generate.counts == (36, 0) and (tmp_path / "out" / "notes.txt").read_text() == "notes"


@pytest.mark.parametrize("content", ["{", "[]", '{"region": {"img_size": [32, 32], "crop_mode": "corner"}}'])
def test_a_damaged_record(refuses: Callable[..., str], tmp_path: Path, content: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "label_maps.json").write_text(content)
    says(refuses(), tmp_path / "out" / "label_maps.json", "is damaged")
    assert (tmp_path / "out" / "label_maps.json").read_text() == content


def test_a_damaged_shard(
    generate: Generate, refuses: Callable[..., str], image_folder: Path, trained_run: Path, tmp_path: Path
) -> None:
    generate(image_folder, tmp_path / "out", "--checkpoint", trained_run, "--top-k", 3, "--format", "packed")
    (tmp_path / "out" / "maps-00000.safetensors").write_bytes(b"half")
    says(refuses("--format", "packed"), tmp_path / "out" / "maps-00000.safetensors", "damaged")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_images_that_would_share_a_map(
    refuses: Callable[..., str], copy: Path, tmp_path: Path, layout: str
) -> None:
    shutil.copy(copy / "train" / "red" / "red0.jpg", copy / "train" / "red" / "red0.cropped.jpg")
    message = refuses("--format", layout, data=copy)
    says(message, "red/red0.jpg", "red/red0.cropped.jpg", "red/red0.pt", "rename one of them")
    assert not (tmp_path / "out").exists()


def test_more_classes_than_the_published_layout_holds(
    generate: Generate,
    refuses: Callable[..., str],
    image_folder: Path,
    trained_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the annotator, whose indices the maps hold, however few a class map leaves of the images."""
    monkeypatch.setattr("vip.training.generation.EXACT_CLASSES", 2)
    (tmp_path / "names.txt").write_text("red\nblue\n")
    for flags in ((), ("--class-map", tmp_path / "names.txt")):
        says(refuses(*flags), "up to 2 exactly", "3 classes", "add --format packed")
        assert not (tmp_path / "out").exists()
    generate(image_folder, tmp_path / "out", "--checkpoint", trained_run, "--top-k", 3, "--format", "packed")


def full_disk(*args: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_full_disk(
    generate: Generate,
    refuses: Callable[..., str],
    image_folder: Path,
    trained_run: Path,
    tmp_path: Path,
    small_shards: None,
    monkeypatch: pytest.MonkeyPatch,
    layout: str,
) -> None:
    """What is there stays, and the same command goes on."""
    import vip.token_labels.writers as writers

    name, room = ("write_map", 20) if layout == "published" else ("write_shard", 2)
    write, written = getattr(writers, name), []

    def fill_the_disk(path: Path, content: Any) -> None:
        if len(written) >= room:
            full_disk()
        written.append(path)
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(writers, name, fill_the_disk)
        message = refuses("--format", layout, "-b", 6)
    says(message, tmp_path / "out", "No space left on device", "repeat the command")
    before = state_of(tmp_path / "out")
    assert before.keys() >= set(written) and len(before) == len(written) + 1
    there = len(list(open_label_maps(tmp_path / "out").keys()))
    assert there == 20

    flags = ("--checkpoint", trained_run, "--top-k", 3, "--format", layout)
    maps = generate(image_folder, tmp_path / "out", *flags)
    assert generate.counts == (36 - there, there)
    after = state_of(tmp_path / "out")
    assert all(after[path] == before[path] for path in before)
    assert set(maps.keys()) == keys_of(image_folder / "train")


def test_a_disk_too_full_for_the_record(
    refuses: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MapRecord, "write", full_disk)
    says(refuses(), tmp_path / "out", "No space left on device")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_that_are_not_finite(refuses: Callable[..., str], pictures: Path, tmp_path: Path, layout: str) -> None:
    model = RESNET.create()
    with torch.no_grad():
        model.fc.bias.fill_(1e6)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    flags = ("--model", "resnet18", "--img-size", 64, "--format", layout)
    message = refuses(*flags, data=pictures, checkpoint=tmp_path / "weights.pth")
    says(message, "not finite in float16", "ant/0.small.png")
    assert [path.name for path in state_of(tmp_path / "out")] == ["label_maps.json"]


def test_too_many_unreadable_images(refuses: Callable[..., str], copy: Path) -> None:
    for name in ("red0.jpg", "red1.png", "red2.jpg"):
        (copy / "train" / "red" / name).write_bytes(b"no image")
    says(refuses("--max-bad-images", 2, data=copy), "3 images cannot be read", "--max-bad-images (now 2)")


def test_other_options_that_are_wrong(refuses: Callable[..., str]) -> None:
    says(refuses("--torchcompile", "speed"), "speed")
    says(refuses("--format", "zipped"), "--format", "zipped")
    says(refuses("--topk", 3), "--topk", "Did you mean --top-k")
    says(refuses("--apex-amp", "--amp-dtype", "bfloat16"), "--apex-amp is float16")
