import gzip
import hashlib
import logging
import pickle
import shutil
import sys
import tarfile
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image
from timm.data.dataset import ImageDataset
from torch.utils.data import DataLoader

from vip.data.config import DatasetConfig, LoaderConfig
from vip.data.datasets import (
    check_same_classes,
    class_to_idx,
    create_split,
    split_folder,
    unreadable_files,
)
from vip.data.loaders import create_eval_loader
from vip.errors import UserError


def make(root: Path, *names: str) -> Path:
    """Folders, and files for names with an ending."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".tar":
            path.touch()
        elif path.suffix:
            Image.new("RGB", (8, 8)).save(path)
        else:
            path.mkdir()
    return root


def split(root: Path, name: str = "train", training: bool = True, max_bad_images: int = 100, **config: object):
    return create_split(DatasetConfig(data=str(root), **config), name, training, max_bad_images)


def tar(folder: Path, file: Path) -> None:
    with tarfile.open(file, "w") as archive:
        archive.add(folder, arcname="")


# Where the images are


@pytest.mark.parametrize(
    "inside, wanted, found",
    [
        (["train", "val"], "train", "train"),
        (["train", "val"], "validation", "val"),
        (["train", "validation"], "validation", "validation"),
        (["train", "val", "validation"], "validation", "validation"),  # the name itself comes first
        (["train", "val", "validation"], "val", "val"),
        (["training", "eval"], "train", "training"),
        (["training", "eval"], "validation", "eval"),
        (["train", "val", "test"], "test", "test"),
        (["train.tar", "val.tar"], "train", "train.tar"),
        (["train.tar", "val.tar"], "validation", "val.tar"),
        (["train", "train.tar"], "train", "train"),
        (["n01440764", "n01443537"], "validation", "."),  # the validation folder itself
        (["n01440764", "n01443537"], "val", "."),
    ],
)
def test_split_folder(tmp_path: Path, inside: list[str], wanted: str, found: str) -> None:
    make(tmp_path, *inside)
    assert Path(split_folder(str(tmp_path), wanted)) == tmp_path / found


@pytest.mark.parametrize(
    "inside, wanted, message",
    [
        (["val"], "train", "no train/ or training/: it holds val/"),
        (["train"], "validation", "no val/ or validation/: it holds train/"),
        (["a", "b"], "train", "no train/ or training/: it holds a/, b/"),
        (["train", "val"], "test", "no test/: it holds train/, val/"),
        ([f"class{i}" for i in range(9)], "train", "class4/, ..."),
        ([], "train", "it is empty"),
        ([], "validation", "it is empty"),
        (["a.jpg"], "validation", "no val/ or validation/: it holds a.jpg"),
    ],
)
def test_missing_splits_say_what_is_there(tmp_path: Path, inside: list[str], wanted: str, message: str) -> None:
    make(tmp_path, *inside)
    with pytest.raises(UserError) as error:
        split_folder(str(tmp_path), wanted)
    assert message in str(error.value) and str(tmp_path) in str(error.value)


def test_no_such_data(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere.*train/ and val/"):
        split_folder(str(tmp_path / "nowhere"), "train")
    with pytest.raises(UserError, match="No data set given"):
        create_split(DatasetConfig(), "train", True)


def test_data_dir_is_the_positional_argument() -> None:
    assert DatasetConfig(data_dir="a").data == "a"
    assert DatasetConfig(data="b", data_dir="a").data == "b"


def test_folder(image_folder: Path) -> None:
    train = split(image_folder)
    assert len(train) == 36
    assert class_to_idx(train) == {"blue": 0, "green": 1, "red": 2}
    for i in range(len(train)):
        image, target = train[i]
        assert image.mode == "RGB" and image.size == (32, 32)
        strongest = np.asarray(image).mean((0, 1)).argmax()
        assert target == 2 - strongest  # blue, green and red are the channels backwards
        assert Path(train.filename(i)).parent.name == ("blue", "green", "red")[target]


def test_tar_files_are_as_good_as_folders(image_folder: Path, tmp_path: Path) -> None:
    for name in ("train", "val"):
        tar(image_folder / name, tmp_path / f"{name}.tar")
    train, val = split(tmp_path), split(tmp_path, "validation", False)
    folder = split(image_folder)
    assert (len(train), len(val)) == (36, 15)
    assert class_to_idx(train) == class_to_idx(folder)
    check_same_classes(train, val)
    for i in range(len(train)):
        np.testing.assert_array_equal(np.asarray(train[i][0]), np.asarray(folder[i][0]))
        assert train[i][1] == folder[i][1]
    assert len(split(tmp_path / "val.tar", "validation", False)) == 15


@pytest.mark.parametrize("content", ["text", "half", "nothing", "empty archive"])
def test_damaged_tar_file(image_folder: Path, tmp_path: Path, content: str) -> None:
    file = tmp_path / "train.tar"
    tar(make(tmp_path / "none", "readme") if content == "empty archive" else image_folder / "train", file)
    data = file.read_bytes()
    damaged = {"text": b"hello " * 1000, "half": data[: len(data) // 2 + 700], "nothing": b""}
    file.write_bytes(damaged.get(content, data))
    with pytest.raises(UserError, match="Cannot open split 'train' of .*train.tar: .+") as error:
        split(tmp_path)
    assert "unpack" not in str(error.value)


# Classes


def test_empty_class_folders_are_named(image_folder: Path, tmp_path: Path) -> None:
    root = shutil.copytree(image_folder, tmp_path / "data")
    make(root / "train", "violet", "white", ".cache")
    (root / "train" / "white" / "notes.txt").write_text("no image")
    with pytest.raises(UserError, match=r"No images in 2 class folders of .*train: violet, white;"):
        split(root)


def test_images_outside_of_a_class_are_refused(image_folder: Path, tmp_path: Path) -> None:
    root = shutil.copytree(image_folder, tmp_path / "data")
    make(root / "train", "stray.png")
    with pytest.raises(UserError, match="train holds images beside its class folders"):
        split(root)


def test_folders_above_the_class_folders_are_not_empty(tmp_path: Path) -> None:
    make(tmp_path, "train/animals/cat/0.png", "train/animals/dog/0.png", "train/car/0.png")
    assert class_to_idx(split(tmp_path)) == {"car": 0, "cat": 1, "dog": 2}


def test_classes_that_differ(tmp_path: Path) -> None:
    names = [f"train/c{i}/0.png" for i in range(6)] + [f"val/c{i}/0.png" for i in range(1)] + ["val/other/0.png"]
    make(tmp_path, *names)
    with pytest.raises(UserError) as error:
        check_same_classes(split(tmp_path), split(tmp_path, "validation", False))
    assert "5 only in train (c1, c2, c3, ...) and 1 only in val (other)" in str(error.value)


def test_class_map_sets_the_indices(image_folder: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("red\nblue\n")  # green is left out
    train = split(image_folder, class_map=str(names))
    assert len(train) == 24
    assert {Path(train.filename(i)).parent.name: train[i][1] for i in range(24)} == {"red": 0, "blue": 1}
    val = split(image_folder, "validation", False, class_map=str(names))
    check_same_classes(train, val)


@pytest.mark.parametrize(
    "file, content", [("none.txt", None), ("map.csv", b"red\n"), ("map.pkl", b"red"), ("map.txt", b"mauve\n")]
)
def test_bad_class_map(image_folder: Path, tmp_path: Path, file: str, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match="Cannot open split 'train'"):
        split(image_folder, class_map=str(tmp_path / file))


# Unreadable images


@pytest.fixture
def damaged(image_folder: Path, tmp_path: Path) -> Path:
    """A copy of the image folder in which two training and two validation images cannot be read."""
    root = shutil.copytree(image_folder, tmp_path / "damaged")
    for name in ("train/blue/blue0.jpg", "val/green/green1.png"):
        (root / name).write_bytes((root / name).read_bytes()[:-200])
    (root / "train/blue/blue1.png").write_bytes(b"")
    (root / "val/green/green0.jpg").unlink()
    (root / "val/green/green0.jpg").symlink_to("nowhere.jpg")
    return root


def test_training_replaces_unreadable_images(damaged: Path, caplog: pytest.LogCaptureFixture) -> None:
    train = split(damaged)
    for _ in range(2):
        samples = [train[i] for i in range(len(train))]
    files = [train.filename(i) for i in range(3)]
    assert files == ["blue/blue0.jpg", "blue/blue1.png", "blue/blue2.jpg"]
    assert len(samples) == 36 and samples[0][0].tobytes() == samples[1][0].tobytes() == samples[2][0].tobytes()
    lines = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(lines) == 2 and "blue/blue0.jpg" in lines[0] and "blue/blue1.png" in lines[1], "each is named once"
    assert unreadable_files(train) == files[:2]


def test_an_unreadable_last_image_is_replaced_by_the_first(damaged: Path) -> None:
    (damaged / "train/red/red11.png").write_bytes(b"x")
    train = split(damaged)
    assert train[35][0].tobytes() == train[2][0].tobytes()


def test_evaluation_leaves_unreadable_images_out(damaged: Path) -> None:
    val = split(damaged, "validation", False)
    missing = [val.filename(i) for i in range(len(val)) if val[i] is None]
    assert missing == ["green/green0.jpg", "green/green1.png"] == unreadable_files(val)


@pytest.mark.parametrize("training", [True, False])
def test_limit_of_unreadable_images(damaged: Path, training: bool) -> None:
    name = "train" if training else "validation"
    data = split(damaged, name, training, max_bad_images=2)
    assert len([data[i] for i in range(len(data))]) == len(data)
    data = split(damaged, name, training, max_bad_images=1)
    with pytest.raises(UserError, match="2 images cannot be read.*(blue1.png|green1.png).*--max-bad-images") as error:
        [data[i] for i in range(len(data))]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("training", [True, False])
def test_nothing_but_unreadable_images(tmp_path: Path, training: bool) -> None:
    make(tmp_path, "train/a/0.png", "train/b/0.png")
    for file in tmp_path.rglob("*.png"):
        file.write_bytes(b"")
    data = split(tmp_path, "train", training)
    with pytest.raises(UserError, match="2 images cannot be read"):
        [data[i] for i in range(2)]


def test_loader_processes_count_together(damaged: Path, caplog: pytest.LogCaptureFixture) -> None:
    val = split(damaged, "validation", False)
    loader = create_eval_loader(val, LoaderConfig(workers=2), EVAL_CONFIG, 4, torch.device("cpu"))
    for _ in range(2):
        assert sum(len(images) for images, _ in loader) == 13
    assert unreadable_files(val) == ["green/green0.jpg", "green/green1.png"]


def test_limit_reached_in_a_loader_process_is_one_line(damaged: Path) -> None:
    train = split(damaged, max_bad_images=0)
    train.transform = lambda image: torch.zeros(1)
    batches = iter(DataLoader(train, 4, num_workers=1))
    with pytest.raises(UserError, match=r"^1 images cannot be read, the last one blue/blue0.jpg") as error:
        next(batches)
    assert "\n" not in str(error.value)
    batches._shutdown_workers()  # garbage collection would take 5 seconds to end them


EVAL_CONFIG = dict(
    input_size=(3, 32, 32),
    interpolation="bilinear",
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    crop_pct=1.0,
    crop_mode="center",
)


def test_tensorflow_preprocessing_gets_the_bytes_of_the_file(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Transform:
        def __init__(self, **kwargs: object) -> None:
            pass

        def __call__(self, data: bytes) -> np.ndarray:
            assert isinstance(data, bytes)
            return np.full((3, 32, 32), len(data) % 256, np.uint8)

    monkeypatch.setitem(
        sys.modules, "timm.data.tf_preprocessing", types.SimpleNamespace(TfPreprocessTransform=Transform)
    )
    config = DatasetConfig(data=str(image_folder))
    val = create_split(config, "validation", False, load_bytes=True)
    assert isinstance(val, ImageDataset)
    loader = create_eval_loader(
        val, LoaderConfig(workers=0), EVAL_CONFIG, 15, torch.device("cpu"), tf_preprocessing=True
    )
    ((images, _),) = loader
    sizes = [(image_folder / "val" / val.filename(i)).stat().st_size % 256 for i in range(15)]
    assert (images[:, 0, 0, 0] * 255).round().int().tolist() == sizes


def test_tensorflow_preprocessing_without_tensorflow(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm.data.tf_preprocessing", None)
    val = split(image_folder, "validation", False)
    with pytest.raises(UserError, match="--tf-preprocessing.*pip install tensorflow"):
        create_eval_loader(val, LoaderConfig(workers=0), EVAL_CONFIG, 15, torch.device("cpu"), tf_preprocessing=True)


# Data sets that are no folders


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, np.ndarray]:
    """What `torch/cifar10` finds after a download, with 20 training and 10 test images, and the test images."""
    folder = tmp_path / torchvision.datasets.CIFAR10.base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)
    pixels = {"data_batch_1": rng.integers(0, 256, (20, 3, 32, 32), dtype=np.uint8)}
    pixels["test_batch"] = rng.integers(0, 256, (10, 3, 32, 32), dtype=np.uint8)
    for name, images in pixels.items():
        content = {"data": images.reshape(len(images), -1), "labels": [i % 10 for i in range(len(images))]}
        (folder / name).write_bytes(pickle.dumps(content))
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    cls = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cls, "train_list", [["data_batch_1", md5(folder / "data_batch_1")]])
    monkeypatch.setattr(cls, "test_list", [["test_batch", md5(folder / "test_batch")]])
    monkeypatch.setattr(
        cls, "meta", {"filename": "batches.meta", "key": "label_names", "md5": md5(folder / "batches.meta")}
    )
    return tmp_path, pixels["test_batch"]


def test_torch_cifar10(cifar10: tuple[Path, np.ndarray]) -> None:
    root, pixels = cifar10
    train, val = (split(root, name, False, dataset="torch/cifar10") for name in ("train", "validation"))
    assert (len(train), len(val)) == (20, 10)
    assert class_to_idx(train) == class_to_idx(val) and len(class_to_idx(val) or ()) == 10
    check_same_classes(train, val)
    ((images, targets),) = create_eval_loader(val, LoaderConfig(workers=0), EVAL_CONFIG, 10, torch.device("cpu"))
    np.testing.assert_array_equal((images * 255).round().numpy(), pixels)
    assert targets.tolist() == list(range(10))
    assert unreadable_files(val) == []


def test_torch_mnist_becomes_what_the_model_wants(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    digits = np.random.default_rng(0).integers(0, 256, (6, 28, 28), dtype=np.uint8)
    for part in ("train", "t10k"):
        for name, values in (("images-idx3", digits), ("labels-idx1", np.arange(6, dtype=np.uint8))):
            header = b"\0\0\x08" + bytes([values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
            (raw / f"{part}-{name}-ubyte").write_bytes(header + values.tobytes())
            with gzip.open(raw / f"{part}-{name}-ubyte.gz", "wb") as file:
                file.write(header + values.tobytes())
    val = split(tmp_path, "validation", False, dataset="torch/mnist")
    for channels in (1, 3):
        config = {**EVAL_CONFIG, "input_size": (channels, 28, 28), "mean": (0.0,) * channels, "std": (1.0,) * channels}
        ((images, _),) = create_eval_loader(val, LoaderConfig(workers=0), config, 6, torch.device("cpu"))
        np.testing.assert_array_equal((images * 255).round().numpy(), digits[:, None].repeat(channels, 1))


def test_torch_image_folder_finds_its_split(image_folder: Path) -> None:
    train = split(image_folder, dataset="torch/image_folder")
    assert len(train) == 36 and class_to_idx(train) == {"blue": 0, "green": 1, "red": 2}


@pytest.mark.parametrize(
    "dataset, module, advice",
    [
        ("hfds/somebody/images", "datasets", "pip install datasets"),
        ("hfids/somebody/images", "datasets", "pip install datasets"),
        ("tfds/mnist", "tensorflow", "pip install tensorflow"),
        ("wds/images", "webdataset", "install webdataset"),
    ],
)
def test_data_sets_whose_library_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: str, module: str, advice: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    for name in [n for n in sys.modules if n.startswith("timm.data.readers.reader_") and n.endswith("ds")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UserError, match=f"Cannot open split 'train' of {dataset}: .*{advice}"):
        split(tmp_path, dataset=dataset)


def test_torch_data_that_is_not_there_yet(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Cannot open split 'train' of torch/cifar10: .*--dataset-download"):
        split(tmp_path, dataset="torch/cifar10")
    with pytest.raises(UserError, match="Unknown torchvision dataset nonsense"):
        split(tmp_path, dataset="torch/nonsense")
