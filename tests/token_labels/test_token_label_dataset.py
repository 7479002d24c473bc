"""Training images with their label maps: what fits together, what does not, and what is done without."""

import logging
import random
import re
import shutil
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from map_files import identical, one_line, random_map, write_maps
from PIL import Image
from timm.data import create_transform
from timm.data.loader import fast_collate
from torch.utils.data import DataLoader, TensorDataset, default_collate

from vip.data.config import DatasetConfig
from vip.data.datasets import create_split
from vip.errors import UserError
from vip.token_labels.config import TokenLabelConfig
from vip.token_labels.dataset import TokenLabelDataset, collate_token_labels, open_token_labels
from vip.token_labels.geometry import Region
from vip.token_labels.maps import EXACT_CLASSES, LabelMap, MapRecord, map_key, write_map
from vip.token_labels.packing import shard_path, write_shard
from vip.token_labels.store import pack
from vip.token_labels.targets import NOWHERE

GRID = (4, 6)
CENTER = Region((1, 1))
CLASSES = ["blue", "green", "red"]


@pytest.fixture
def images(image_folder: Path) -> Any:
    return open_images(image_folder)


@pytest.fixture
def maps(images: Any, tmp_path: Path) -> Path:
    """A map for each image, without a record, as the published set has none."""
    write_maps(tmp_path / "maps", map(map_key, images.filenames()), classes=3)
    return tmp_path / "maps"


def open_images(folder: Path, **options: Any) -> Any:
    return create_split(DatasetConfig(data=str(folder), **options), "train", is_training=True)


def open_labels(images: Any, maps: Path, num_classes: int = 3, **options: Any) -> TokenLabelDataset:
    return open_token_labels(images, TokenLabelConfig(token_label_data=str(maps), **options), num_classes, GRID)


def augmented(dataset: TokenLabelDataset) -> TokenLabelDataset:
    dataset.transform = create_transform((3, 32, 48), is_training=True, auto_augment="rand-m9-mstd0.5-inc1")
    return dataset


def plain(dataset: TokenLabelDataset) -> TokenLabelDataset:
    dataset.transform = create_transform((3, 32, 32), is_training=True, no_aug=True)
    return dataset


def load(dataset: TokenLabelDataset, workers: int = 0, collate: Any = default_collate) -> tuple[torch.Tensor, Any]:
    """All samples as one batch."""
    function = partial(collate_token_labels, collate)
    iterator: Any = iter(DataLoader(dataset, len(dataset) // 2, num_workers=workers, collate_fn=function))
    try:
        batches = list(iterator)
    finally:
        if workers:
            iterator._shutdown_workers()  # which takes ten seconds if it is left to the garbage collector
    labels = {
        name: torch.cat([getattr(labels, name) for _, labels in batches])
        for name in ("target", "map_values", "map_indices", "box", "shown")
    }
    return torch.cat([x for x, _ in batches]), labels


def refused(*args: Any, **options: Any) -> str:
    with pytest.raises(UserError) as e:
        open_labels(*args, **options)
    return one_line(e.value)


def as_packed(maps: Path) -> Path:
    target = maps.with_name("packed")
    pack(maps, target)
    return target


# --- samples


def test_samples(images: Any, maps: Path) -> None:
    dataset = plain(open_labels(images, maps))
    assert len(dataset) == 36 and dataset.files_without_map() == []
    for i in range(len(dataset)):
        image, labels = dataset[i]
        key = map_key(dataset.filename(i))
        assert image.shape == (3, 32, 32)
        assert labels.target.dtype is torch.long and labels.target.ndim == 0
        assert CLASSES[int(labels.target)] == key.partition("/")[0]
        seed = sorted(map(map_key, images.filenames())).index(key)
        assert identical(LabelMap(labels.map_values, labels.map_indices), random_map(seed, classes=3))
        assert labels.box.dtype is labels.shown.dtype is torch.float32
        # a square image of which nothing is cropped shows all of the map
        torch.testing.assert_close(labels.box, torch.tensor([[1.0, 0, 0], [0, 1, 0]]))
        assert labels.shown.equal(torch.ones(GRID))
        assert labels.partner is labels.own is labels.own_tokens is None


@pytest.mark.parametrize("crop", ["aligned", "published"])
def test_both_layouts_give_the_same_samples(images: Any, maps: Path, crop: str) -> None:
    MapRecord(Region((32, 32), 0.875), 3, CLASSES).write(maps)
    samples = []
    for root in (maps, as_packed(maps)):
        dataset = augmented(open_labels(images, root, token_label_crop=crop))
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        samples.append([dataset[i] for i in range(len(dataset))])
    for (image, labels), (packed_image, packed_labels) in zip(*samples, strict=True):
        assert image.equal(packed_image)
        for name in ("target", "map_values", "map_indices", "box", "shown"):
            assert getattr(labels, name).equal(getattr(packed_labels, name)), name
    boxes = torch.stack([labels.box for _, labels in samples[0]])
    assert len(boxes.flatten(1).unique(dim=0)) > 30  # the augmentation is one


def test_loader_processes_give_the_same_samples(images: Any, maps: Path) -> None:
    dataset = plain(open_labels(images, as_packed(maps)))
    alone, together = load(dataset), load(dataset, workers=2)
    assert alone[0].equal(together[0])
    for name, value in alone[1].items():
        assert value.equal(together[1][name]), name


def test_collation(images: Any, maps: Path) -> None:
    dataset = augmented(open_labels(images, maps))
    samples = [dataset[i] for i in (0, 20, 35)]
    batch, labels = collate_token_labels(default_collate, samples)
    assert batch.shape == (3, 3, 32, 48) and labels.target.tolist() == [0, 1, 2]
    assert labels.map_values.shape == labels.map_indices.shape == (3, 5, 4, 4)
    assert labels.box.shape == (3, 2, 3) and labels.shown.shape == (3, *GRID)
    assert labels.partner is labels.own is labels.own_tokens is None
    for i, (image, label) in enumerate(samples):
        assert batch[i].equal(image)
        for name in ("target", "map_values", "map_indices", "box", "shown"):
            assert getattr(labels, name)[i].equal(getattr(label, name))


def test_collation_for_the_prefetcher(images: Any, maps: Path) -> None:
    """timm's prefetcher normalizes on the device: images come as bytes, in NumPy before they are collated."""
    dataset = open_labels(images, maps)
    dataset.transform = create_transform((3, 32, 32), is_training=True, use_prefetcher=True)
    batch, labels = collate_token_labels(fast_collate, [dataset[i] for i in range(4)])
    assert batch.dtype is torch.uint8 and batch.shape == (4, 3, 32, 32) and labels.target.tolist() == [0] * 4


# --- the region of the maps


@pytest.fixture
def wide(tmp_path: Path) -> Any:
    """One image, twice as wide as high."""
    (tmp_path / "wide" / "train" / "a").mkdir(parents=True)
    Image.new("RGB", (64, 32)).save(tmp_path / "wide" / "train" / "a" / "1.png")
    write_maps(tmp_path / "maps", ["a/1"], classes=1)
    return open_images(tmp_path / "wide")


@pytest.mark.parametrize(
    "record, region, row",
    [
        (None, "auto", [2.0, 0, -0.5]),  # the square in the middle is half the image
        (CENTER, "auto", [2.0, 0, -0.5]),
        (Region((1, 1), crop_mode="squash"), "auto", [1.0, 0, 0]),
        (Region((1, 1), 0.5), "auto", [4.0, 0, -1.5]),
        (Region((1, 1), 0.5), "center", [2.0, 0, -0.5]),  # what is asked for goes before what the record says
        (Region((1, 1), 0.5), "image", [1.0, 0, 0]),
        (None, "image", [1.0, 0, 0]),
    ],
)
def test_the_part_of_the_image_that_the_map_covers(
    wide: Any, tmp_path: Path, record: Region | None, region: str, row: list[float]
) -> None:
    if record is not None:
        MapRecord(record, 1, ["a"]).write(tmp_path / "maps")
    dataset = open_labels(wide, tmp_path / "maps", 1, token_label_region=region)
    dataset.transform = create_transform((3, 32, 32), is_training=True, scale=(1, 1), ratio=(2, 2), hflip=0)
    torch.testing.assert_close(dataset[0][1].box[0], torch.tensor(row))


# --- images without a map


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_a_class_stands_in_for_a_missing_map(
    images: Any, maps: Path, workers: int, packed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("blue/blue0", "green/green7", "red/red11"):  # the first, one in the middle, the last
        (maps / f"{name}.pt").unlink()
    dataset = plain(open_labels(images, as_packed(maps) if packed else maps))
    x, labels = load(dataset, workers)
    expected = {"blue/blue0.jpg", "green/green7.png", "red/red11.png"}
    assert set(dataset.files_without_map()) == expected
    for i, name in enumerate(images.filenames()):
        nowhere = labels["box"][i].equal(NOWHERE)
        assert nowhere == (name in expected)
        assert not nowhere or not labels["map_values"][i].any()
    assert len(x) == 36 and labels["target"].tolist() == sorted(12 * [0, 1, 2])
    load(dataset, workers)
    assert len(dataset.files_without_map()) == 3  # counted once
    assert "damaged" not in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_a_class_stands_in_for_a_damaged_map(
    images: Any, maps: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    truncated, empty = maps / "green" / "green7.pt", maps / "blue" / "blue0.pt"
    truncated.write_bytes(truncated.read_bytes()[:-300])
    empty.write_bytes(b"")
    dataset = plain(open_labels(images, maps))
    for _ in range(2):
        x, labels = load(dataset, workers)
        assert len(x) == 36 and labels["box"].eq(NOWHERE).all(2).all(1).sum() == 2
    assert set(dataset.files_without_map()) == {"blue/blue0.jpg", "green/green7.png"}
    if workers == 0:  # each is named once
        assert [re.findall(r"blue0|green7", r.getMessage()) for r in caplog.records if "damaged" in r.getMessage()] == [
            ["blue0"],
            ["green7"],
        ]


def test_a_damaged_map_in_a_shard(images: Any, maps: Path) -> None:
    packed = as_packed(maps)
    content = bytearray(shard_path(packed, 0).read_bytes())
    start = content.index(b"x\x9c")  # of the compressed data of the first map
    content[start + 30 : start + 34] = bytes(4)
    shard_path(packed, 0).write_bytes(content)
    dataset = plain(open_labels(images, packed))
    _, labels = load(dataset)
    assert dataset.files_without_map() == ["blue/blue0.jpg"] and labels["box"][0].equal(NOWHERE)


def test_a_map_that_comes_later_is_used(images: Any, maps: Path) -> None:
    """Nothing is remembered of a failure but that it was one: a file server may have hiccups."""
    file = maps / "blue" / "blue0.pt"
    content = file.read_bytes()
    file.unlink()
    dataset = plain(open_labels(images, maps))
    file.write_bytes(content)
    assert not dataset[0][1].box.equal(NOWHERE)


def test_an_unreadable_image_is_replaced_with_its_map(image_folder: Path, maps: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(image_folder, tmp_path / "copy")
    (copy / "train" / "blue" / "blue0.jpg").write_bytes(b"")
    dataset = plain(open_labels(open_images(copy), maps))
    (image, labels), (other_image, other_labels) = dataset[0], dataset[1]
    assert image.equal(other_image) and labels.map_values.equal(other_labels.map_values)
    assert int(dataset.unreadable.sum()) == 1


# --- what does not fit together


def test_a_missing_folder(images: Any, tmp_path: Path) -> None:
    assert str(tmp_path / "nowhere") in refused(images, tmp_path / "nowhere")


def test_a_folder_without_maps(images: Any, image_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no label maps" in refused(images, tmp_path / "empty")
    assert "no label maps" in refused(images, image_folder / "train")  # of images


def test_the_parent_of_the_right_folder(images: Any, maps: Path) -> None:
    (maps.parent / "more").mkdir()
    shutil.move(maps, maps.parent / "more" / "train")
    assert str(maps.parent / "more") in refused(images, maps.parent / "more")


@pytest.mark.parametrize("packed", [False, True])
def test_class_folders_of_something_else(images: Any, tmp_path: Path, packed: bool) -> None:
    write_maps(tmp_path / "maps", ["cat/1", "dog/2", "red/red0"], classes=3)
    root = as_packed(tmp_path / "maps") if packed else tmp_path / "maps"
    message = refused(images, root)
    assert "2 of 3 class folders: blue, green" in message and "cat, dog, red" in message and str(root) in message


def test_a_class_without_maps(images: Any, maps: Path) -> None:
    shutil.rmtree(maps / "green")
    assert "1 of 3 class folders: green" in refused(images, maps)


def test_maps_of_more_classes_than_the_images_have(images: Any, maps: Path) -> None:
    """A part of the published set will do for a part of the images."""
    write_maps(maps, ["yellow/1"], classes=3)
    assert len(open_labels(images, maps)) == 36


@pytest.mark.parametrize(
    "num_classes, classes, words",
    [
        (4, None, "name 4 classes, the training has 3"),
        (None, ["blue", "green", "white"], "red"),
        (3, ["red", "green", "blue"], "blue"),  # the same names, another order
        (3, ["green", "blue", "red"], "blue"),
        (None, ["blue", "green"], "red"),
        (None, ["blue", "green", "red", "white"], "white"),
        (None, ["black", "blue", "green", "red"], "blue"),
    ],
)
def test_a_record_of_other_classes(
    images: Any, maps: Path, num_classes: int | None, classes: list[str] | None, words: str
) -> None:
    MapRecord(CENTER, num_classes, classes).write(maps)
    message = refused(images, maps)
    assert words in message and str(maps) in message
    assert refused(images, as_packed(maps)) == message.replace(str(maps), str(maps.with_name("packed")))


@pytest.mark.parametrize("num_classes, classes", [(None, None), (3, None), (None, CLASSES), (3, CLASSES), (3, [])])
def test_a_record_that_fits(images: Any, maps: Path, num_classes: int | None, classes: list[str] | None) -> None:
    MapRecord(CENTER, num_classes, classes).write(maps)
    assert len(open_labels(images, maps)) == 36


def test_a_damaged_record(images: Any, maps: Path) -> None:
    (maps / "label_maps.json").write_text("{")
    assert "label_maps.json" in refused(images, maps)


def test_an_index_beyond_the_classes_in_the_first_map(images: Any, maps: Path) -> None:
    write_map(maps / "blue" / "blue0.pt", random_map(classes=4))
    message = refused(images, maps)
    assert str(maps / "blue" / "blue0") in message and "class 3" in message and "3 classes" in message


def test_an_index_beyond_what_float16_holds(images: Any, tmp_path: Path) -> None:
    keys = list(map(map_key, images.filenames()))
    write_shard(shard_path(tmp_path, 0), [(key, random_map(classes=EXACT_CLASSES + 2)) for key in keys])
    assert f"class {EXACT_CLASSES + 1}" in refused(images, tmp_path)
    dataset = plain(open_labels(images, tmp_path, num_classes=EXACT_CLASSES + 2))
    assert int(dataset[0][1].map_indices.max()) == EXACT_CLASSES + 1


def no_label_map(path: Path) -> None:
    torch.save(torch.zeros(2, 5, 4, 4), path)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda path: write_map(path, random_map(classes=8)), ["class 7", "red/red11"]),
        (lambda path: write_map(path, random_map(shape=(5, 4, 5), classes=3)), ["[5, 4, 5]", "[5, 4, 4]", "red11.png"]),
        (lambda path: write_map(path, random_map(shape=(3, 4, 4), classes=3)), ["[3, 4, 4]", "red11.png"]),
        (no_label_map, ["float32", "red11.pt"]),
    ],
    ids=["class", "shape", "top-k", "type"],
)
def test_what_is_found_in_the_course_of_training(
    images: Any, maps: Path, workers: int, spoil: Callable[[Path], None], words: list[str]
) -> None:
    """The message is one line when it comes from a loader process, too."""
    spoil(maps / "red" / "red11.pt")
    dataset = plain(open_labels(images, maps))
    with pytest.raises(UserError) as e:
        load(dataset, workers)
    message = one_line(e.value)
    assert all(word in message for word in words), message


def test_maps_of_two_shapes_in_shards(images: Any, tmp_path: Path) -> None:
    keys = sorted(map(map_key, images.filenames()))
    write_shard(shard_path(tmp_path, 0), [(key, random_map(classes=3)) for key in keys[:20]])
    write_shard(shard_path(tmp_path, 1), [(key, random_map(0, (5, 7, 7), 3)) for key in keys[20:]])
    dataset = plain(open_labels(images, tmp_path))
    with pytest.raises(UserError, match=r"\[5, 7, 7\], others are \[5, 4, 4\]"):
        load(dataset)


def test_no_image_has_a_map(images: Any, tmp_path: Path) -> None:
    write_maps(tmp_path / "maps", ["blue/1", "green/2", "red/3"], classes=3)
    message = refused(images, tmp_path / "maps")
    assert "None of the 36 training images" in message and str(tmp_path / "maps") in message


def test_all_maps_are_damaged(images: Any, maps: Path) -> None:
    for path in maps.rglob("*.pt"):
        path.write_bytes(b"")
    assert "None of the 36 training images" in refused(images, maps)


class Numbers(TensorDataset):
    """A data set without files."""


def test_data_sets_without_file_names(maps: Path, image_folder: Path) -> None:
    for data in (Numbers(torch.zeros(3)), [1, 2, 3], None):
        message = refused(data, maps)
        assert "--token-label-data" in message and "image folder or a tar file" in message


# --- where the images come from


def tar_of(folder: Path, path: Path, prefix: str = "") -> None:
    with tarfile.open(path, "w") as tar:
        for file in sorted(folder.rglob("*.*")):
            tar.add(file, prefix + str(file.relative_to(folder)))


@pytest.mark.parametrize("prefix", ["", "./", "train/"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_tar_file(image_folder: Path, images: Any, maps: Path, tmp_path: Path, prefix: str, workers: int) -> None:
    (tmp_path / "data").mkdir()
    tar_of(image_folder / "train", tmp_path / "data" / "train.tar", prefix)
    (maps / "green" / "green7.pt").unlink()
    in_folder, in_tar = (plain(open_labels(x, maps)) for x in (images, open_images(tmp_path / "data")))
    assert len(in_tar) == 36
    by_key = {map_key(in_folder.filename(i)): in_folder[i] for i in range(36)}
    x, labels = load(in_tar, workers)
    for i in range(36):
        image, expected = by_key[map_key(in_tar.filename(i))]
        assert x[i].equal(image) and labels["target"][i] == expected.target
        assert labels["map_values"][i].equal(expected.map_values) and labels["box"][i].equal(expected.box)
    assert [map_key(name) for name in in_tar.files_without_map()] == ["green/green7"]


def test_a_tar_file_is_checked_like_a_folder(image_folder: Path, maps: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    tar_of(image_folder / "train", tmp_path / "data" / "train.tar")
    images = open_images(tmp_path / "data")
    MapRecord(CENTER, 3, ["red", "green", "blue"]).write(maps)
    assert "blue" in refused(images, maps)
    (maps / "label_maps.json").unlink()
    shutil.rmtree(maps / "green")
    assert "1 of 3 class folders: green" in refused(images, maps)


def test_tar_files_in_a_tar_file(image_folder: Path, maps: Path, tmp_path: Path) -> None:
    """The names of its images have no class folder, and without one a map cannot be found."""
    (tmp_path / "data").mkdir()
    for name in CLASSES:
        tar_of(image_folder / "train" / name, tmp_path / f"{name}.tar")
    with tarfile.open(tmp_path / "data" / "train.tar", "w") as tar:
        for name in CLASSES:
            tar.add(tmp_path / f"{name}.tar", f"{name}.tar")
    images = open_images(tmp_path / "data")
    assert len(images) == 36
    assert "class folder" in refused(images, maps)


def test_a_class_map(images: Any, maps: Path, image_folder: Path, tmp_path: Path) -> None:
    """Indices are the class map's; map files go by folders as ever."""
    (tmp_path / "classes.txt").write_text("red\nblue\ngreen\n")
    dataset = plain(open_labels(open_images(image_folder, class_map=str(tmp_path / "classes.txt")), maps))
    _, labels = load(dataset)
    names = ["red", "blue", "green"]
    assert [names[i] for i in labels["target"]] == [map_key(dataset.filename(i)).partition("/")[0] for i in range(36)]
    MapRecord(CENTER, 3, CLASSES).write(maps)  # an annotator of another order
    assert "other classes" in refused(open_images(image_folder, class_map=str(tmp_path / "classes.txt")), maps)


def test_what_is_logged(images: Any, maps: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        open_labels(images, maps)
    assert f"4x4 cells, 5 classes each, for 4x6 tokens: {maps}" in caplog.text
