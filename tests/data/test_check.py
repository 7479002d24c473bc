"""The check of a data set against folders of which it is known what is in them."""

import dataclasses
import hashlib
import io
import os
import shutil
import tarfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import write_images
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import ImageNetInfo

from vip.data import check as module
from vip.data import inspection
from vip.data.check import DataReport, SplitReport, check
from vip.data.config import DatasetConfig
from vip.data.datasets import create_split, unreadable_files
from vip.data.imagenet import Expected
from vip.errors import UserError


def jpeg(seed: int) -> bytes:
    """An image of its own."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 48, 3), np.uint8)).save(file, "JPEG")
    return file.getvalue()


def saved_again(data: bytes, **options: object) -> bytes:
    """The same pixels as a PNG."""
    file = io.BytesIO()
    Image.open(io.BytesIO(data)).save(file, "PNG", **options)
    return file.getvalue()


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def content(report: DataReport) -> dict:
    return {name: value for name, value in dataclasses.asdict(report).items() if name != "seconds"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two classes of three training images and two validation images, no two alike."""
    root = tmp_path / "data"
    for seed in range(10):
        split = "train" if seed < 6 else "val"
        write(root / split / f"class{seed % 2}" / f"{seed}.jpg", jpeg(seed))
    return root


def test_all_is_well(image_folder: Path) -> None:
    report = check(str(image_folder), 2)
    files = defaultdict(list)
    for folder, _, names in os.walk(image_folder):
        files[Path(folder).relative_to(image_folder).parts[:1]] += [Path(folder) / name for name in names]
    for name in ("train", "val"):
        found = files[name,]
        counts = Counter(path.parent.name for path in found)
        size = sum(path.stat().st_size for path in found)
        assert report.splits[name] == SplitReport(
            str(image_folder / name), len(found), size, dict(sorted(counts.items())), [], [], [], {}
        )
    assert report.unreadable == report.suspicious == {} and report.problems == [] and report.imagenet is None
    assert not any(report.duplicates.values()) and report.seconds > 0


def test_the_report_does_not_depend_on_the_processes(data: Path) -> None:
    write(data / "train" / "class0" / "again.png", jpeg(6))
    for i in range(70):
        write(data / "train" / "class1" / f"more{i}.jpg", jpeg(100 + i // 2) + b"more")
        write(data / "train" / "class0" / f"bad{i}.jpg", b"")
    first, *others = (content(check(str(data), processes)) for processes in (1, 2, 5))
    assert len(first["unreadable"]) == 70 and list(first["unreadable"]) == sorted(first["unreadable"])
    trailing = first["suspicious"]["trailing_bytes"]
    assert len(trailing) == 70 and trailing == sorted(trailing)
    assert len(first["duplicates"]["within_train"]) == 35
    assert all(repr(other) == repr(first) for other in others)


def test_progress_is_shown(data: Path) -> None:
    seen = []

    def progress(items: object, total: int) -> object:
        seen.append(total)
        for item in items:  # type: ignore[attr-defined]
            seen.append(item[0])
            yield item

    check(str(data), 1, progress)
    assert seen[0] == 10 and sorted(seen[1:]) == list(range(10))


# --- every kind of file, in any mixture


@dataclasses.dataclass(frozen=True)
class File:
    """A file of a known state: `what` is a number of pixels to have, or damaged, or left out."""

    split: str
    label: str
    what: str
    seed: int

    def name(self, i: int) -> str:
        endings = {"left out": ".webp", "hidden": ".tmp", "png": ".png", "loud ending": ".JPEG"}
        return f"{'.' * (self.what == 'hidden')}{i}{endings.get(self.what, '.jpg')}"

    def data(self) -> bytes:
        whole = jpeg(self.seed)
        return {
            "empty": b"",
            "zeros": bytes(100),
            "truncated": whole[:-200],
            "text": b"text " * 20,
            "png": saved_again(whole, compress_level=self.seed % 10),
            "disguised": saved_again(whole),
            "trailing": whole + b"more",
        }.get(self.what, whole)


UNREADABLE = ("empty", "zeros", "truncated", "text")
LEFT_OUT = ("left out", "hidden")
FILES = st.builds(
    File,
    st.sampled_from(["train", "val"]),
    st.sampled_from(["a", "b"]),
    st.sampled_from([*UNREADABLE, *LEFT_OUT, "jpg", "loud ending", "png", "disguised", "trailing"]),
    st.integers(0, 9),
)


@settings(max_examples=12, deadline=None)
@given(st.lists(FILES, max_size=30), st.integers(1, 3))
def test_any_tree(tmp_path_factory: pytest.TempPathFactory, files: list[File], processes: int) -> None:
    files = files + [
        File(split, label, "jpg", 10 + i)
        for i, (split, label) in enumerate(zip(["train", "train", "val", "val"], "abab", strict=True))
    ]
    root = tmp_path_factory.mktemp("tree")
    states = {}
    for i, file in enumerate(files):
        path = f"{file.split}/{file.label}/{file.name(i)}"
        write(root / path, file.data())
        states[path] = file
    report = check(str(root), processes)

    def named(*what: str) -> list[str]:
        return sorted(path for path, file in states.items() if file.what in what)

    assert list(report.unreadable) == named(*UNREADABLE)
    kinds = {"wrong_ending": named("disguised"), "trailing_bytes": named("trailing")}
    assert report.suspicious == {kind: paths for kind, paths in kinds.items() if paths}
    for name, split in report.splits.items():
        own = {path: file for path, file in states.items() if file.split == name}
        assert split.images == sum(split.classes.values()) == sum(file.what not in LEFT_OUT for file in own.values())
        assert split.bytes == sum(
            (root / path).stat().st_size for path, file in own.items() if file.what not in LEFT_OUT
        )
        left_out = {".webp": named("left out"), "hidden": named("hidden")}
        assert split.left_out == {e: mine for e, paths in left_out.items() if (mine := [p for p in paths if p in own])}
    same = defaultdict(list)
    for path, file in sorted(states.items()):
        if file.what not in (*UNREADABLE, *LEFT_OUT):
            same[file.seed].append(path)
    groups = [[[p for p in paths if p[0] == first] for first in "tv"] for paths in same.values()]
    assert report.duplicates == {
        "across_splits": sorted(train + val for train, val in groups if train and val),
        "within_train": sorted(train for train, _ in groups if len(train) > 1),
        "within_val": sorted(val for _, val in groups if len(val) > 1),
        "across_classes": sorted(
            p for p in same.values() if {"/a/", "/b/"} <= {f"/{path.split('/')[1]}/" for path in p}
        ),
    }
    assert len(report.problems) == bool(report.unreadable) + bool(report.duplicates["across_splits"])
    shutil.rmtree(root)


def test_unreadable_is_what_training_says(data: Path) -> None:
    for i, bad in enumerate((b"", b"text", jpeg(0)[:-200], jpeg(0)[:100], bytes(1000))):
        write(data / "train" / f"class{i % 2}" / f"bad{i}.jpg", bad)
    (data / "train" / "class0" / "link.jpg").symlink_to("nowhere")
    images = create_split(DatasetConfig(data=str(data)), "train", is_training=False)
    assert sum(images[i] is None for i in range(len(images))) == 6  # type: ignore[arg-type]
    report = check(str(data), 2)
    assert sorted(report.unreadable) == sorted(f"train/{name}" for name in unreadable_files(images))
    assert report.unreadable["train/class0/link.jpg"] == "No such file or directory"
    assert report.problems == ["6 files cannot be read; repair or remove them."]


def test_names_of_any_bytes(data: Path) -> None:
    names = [os.fsdecode(b"train/class0/\xff\xfe.jpg"), "train/class0/a\nb.jpg", "train/class1/größe.jpg"]
    for name in names:
        write(data / name, b"")
    assert list(check(str(data), 2).unreadable) == sorted(names)


# --- crashes and decoders that hang


def decoder_that(what: Callable[[], object], marked: bytes) -> Callable:
    decode = inspection.decode_image

    def decode_or_not(file: io.BytesIO, *args: object) -> Image.Image:
        if file.getvalue().endswith(marked):
            what()
        return decode(file, *args)  # type: ignore[arg-type]

    return decode_or_not


@pytest.mark.parametrize(
    "what, reason, seconds",
    [
        (lambda: os._exit(1), "ends its process (status 1)", 60),
        (lambda: os.kill(os.getpid(), 9), "ends its process (SIGKILL)", 60),
        (lambda: time.sleep(1000), "takes longer than 2 seconds", 2),
    ],
    ids=["exit", "killed", "hangs"],
)
def test_decoders_that_end_or_keep_their_process(
    data: Path, monkeypatch: pytest.MonkeyPatch, what: Callable[[], object], reason: str, seconds: float
) -> None:
    monkeypatch.setattr(inspection, "decode_image", decoder_that(what, b"MARK"))
    write(data / "train" / "class0" / "bad.jpg", jpeg(20) + b"MARK")
    write(data / "val" / "class1" / "bad.jpg", jpeg(21) + b"MARK")
    write(data / "val" / "class1" / "copy.jpg", jpeg(1))
    report = check(str(data), 2, seconds=seconds)
    assert report.unreadable == {"train/class0/bad.jpg": reason, "val/class1/bad.jpg": reason}
    assert report.duplicates["across_splits"] == [["train/class1/1.jpg", "val/class1/copy.jpg"]]
    assert report.problems[0] == "2 files cannot be read; repair or remove them."


def test_a_pipe_in_the_place_of_an_image(data: Path) -> None:
    os.mkfifo(data / "train" / "class0" / "pipe.jpg")
    assert check(str(data), 2).unreadable == {"train/class0/pipe.jpg": "no regular file"}


# --- classes


def test_classes_that_differ(data: Path) -> None:
    for name in ("only_train/z.jpg", "only_train/y.jpg", "also/x.jpg"):
        write(data / "train" / name, jpeg(ord(name[-5])))
    write(data / "val" / "only_val" / "z.jpg", jpeg(99))
    report = check(str(data), 1)
    assert report.splits["train"].only_here == ["also", "only_train"]
    assert report.splits["val"].only_here == ["only_val"]
    assert len(report.problems) == 1 and report.problems[0].startswith("The classes of train and val differ: 2 only in")


def test_empty_class_folders(data: Path) -> None:
    """Training refuses them; the images are looked at all the same."""
    for name in ("empty", "empty_too"):
        (data / "train" / name).mkdir()
    (data / "train" / ".empty").mkdir()
    write(data / "train" / "unread" / "a.webp", jpeg(0))
    write(data / "train" / "class0" / "bad.jpg", b"")
    report = check(str(data), 1)
    assert report.splits["train"].empty_classes == ["empty", "empty_too", "unread"]
    assert report.splits["train"].images == 7 and list(report.unreadable) == ["train/class0/bad.jpg"]
    assert len(report.problems) == 2 and "No images in 3 class folders" in report.problems[0]


def test_class_folders_within_folders(data: Path) -> None:
    (data / "train" / "group").mkdir()
    (data / "train" / "class0").rename(data / "train" / "group" / "class0")
    report = check(str(data), 1)
    assert report.problems == [] and report.splits["train"].classes == {"class0": 3, "class1": 3}


def test_images_beside_class_folders(data: Path) -> None:
    write(data / "val" / "loose.jpg", jpeg(0))
    report = check(str(data), 1)
    assert "images beside its class folders" in report.problems[0]
    assert report.duplicates["across_splits"] == [["train/class0/0.jpg", "val/loose.jpg"]]


def test_a_validation_folder_as_it_is_unpacked(data: Path) -> None:
    for path in list(data.glob("val/*/*")):
        path.rename(data / "val" / path.name)
    for folder in data.glob("val/class*"):
        folder.rmdir()
    report = check(str(data), 1)
    assert report.problems[0] == f"{data}/val holds images and no class folders; make a folder for each class."
    assert report.splits["val"].classes == {"": 4}


def test_unbalanced_classes(tmp_path: Path) -> None:
    for name, count in (("a", 20), ("b", 20), ("c", 20), ("d", 4), ("e", 81), ("f", 5), ("g", 80)):
        for i in range(count):
            write(tmp_path / "train" / name / f"{i}.jpg", jpeg(i))
        write(tmp_path / "val" / name / "0.jpg", jpeg(0))
    report = check(str(tmp_path), 1)
    assert report.splits["train"].unbalanced == ["d", "e"] and report.splits["val"].unbalanced == []


def test_links_are_followed(data: Path) -> None:
    """As training follows them: a class may lie on another disk."""
    for split in ("train", "val"):
        (data / split / "class1").rename(data / f"{split}1")
        (data / split / "class1").symlink_to(data / f"{split}1")
    write(data / "train1" / "notes.txt", b"")
    write(data / "val1" / "copy.jpg", jpeg(0))
    report = check(str(data), 1)
    assert [split.classes for split in report.splits.values()] == [
        {"class0": 3, "class1": 3},
        {"class0": 2, "class1": 3},
    ]
    assert report.splits["train"].left_out == {".txt": ["train/class1/notes.txt"]}
    assert report.splits["train"].empty_classes == report.splits["val"].empty_classes == []
    assert report.duplicates["across_splits"] == [["train/class0/0.jpg", "val/class1/copy.jpg"]]


@pytest.mark.parametrize("target", ["..", ".", "../../val"])
def test_links_in_circles_are_refused(data: Path, target: str) -> None:
    """timm's reader would follow two of them some 10**12 times."""
    for name in ("a", "b"):
        (data / "train" / "class0" / name).symlink_to(target)
    if target == "../../val":  # no circle
        report = check(str(data), 1).splits
        assert report["train"].images > report["val"].images * 2, "those of val, by each link"
    else:
        with pytest.raises(UserError, match="train/class0/[ab] links to a folder that it is in: remove the link"):
            check(str(data), 1)


def test_left_out_files(data: Path) -> None:
    for name in ("a.jpg.tmp", "b.TMP", "c.webp", "Thumbs.db", "README", ".DS_Store", ".a.JPEG.x81kL", ".hidden"):
        write(data / "train" / "class0" / name, jpeg(0))
    write(data / "train" / "list.txt", b"")
    report = check(str(data), 1)
    assert report.problems == [] and report.splits["train"].images == 6
    assert report.splits["train"].left_out == {
        ".db": ["train/class0/Thumbs.db"],
        ".tmp": ["train/class0/a.jpg.tmp", "train/class0/b.TMP"],
        ".txt": ["train/list.txt"],
        ".webp": ["train/class0/c.webp"],
        "hidden": ["train/class0/.DS_Store", "train/class0/.a.JPEG.x81kL", "train/class0/.hidden"],
        "no ending": ["train/class0/README"],
    }


# --- places


@pytest.mark.parametrize("tars", [("train",), ("val",), ("train", "val")])
def test_tar_files(data: Path, tars: tuple[str, ...]) -> None:
    write(data / "train" / "class0" / "bad.jpg", jpeg(0)[:100])
    write(data / "train" / "class1" / "notes.txt", b"")
    write(data / "val" / "class1" / "copy.png", saved_again(jpeg(0)))
    expected = content(check(str(data), 2))
    for name in tars:
        with tarfile.open(data / f"{name}.tar", "w") as tar:
            for folder in sorted((data / name).iterdir()):
                tar.add(folder, folder.name)
        shutil.rmtree(data / name)
    report = content(check(str(data), 2))
    text = repr(report)
    for name in tars:
        text = text.replace(f"{name}.tar", name)
    assert text == repr(expected) and report["unreadable"] and report["duplicates"]["across_splits"]


def test_other_names_of_the_splits(data: Path) -> None:
    (data / "train").rename(data / "training")
    (data / "val").rename(data / "validation")
    write(data / "validation" / "class0" / "bad.jpg", b"")
    report = check(str(data), 1)
    assert [split.images for split in report.splits.values()] == [6, 5]
    assert list(report.unreadable) == ["validation/class0/bad.jpg"]


def test_nothing_to_check(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no data set at"):
        check(str(tmp_path / "nowhere"), 1)
    shutil.rmtree(data / "val")
    with pytest.raises(UserError, match="has no val/"):
        check(str(data), 1)
    (data / "val" / "class0").mkdir(parents=True)
    with pytest.raises(UserError, match="Found 0 images"):
        check(str(data), 1)
    (data / "val" / "class0").rmdir()
    (data / "val").rmdir()
    (data / "val.tar").write_bytes(b"no tar file")
    with pytest.raises(UserError, match="Cannot open split"):
        check(str(data), 1)
    with tarfile.open(tmp_path / "both.tar", "w") as tar:
        tar.add(data / "train", "train")
    with pytest.raises(UserError, match="would be both train and val"):
        check(str(tmp_path / "both.tar"), 1)


# --- duplicates


def test_copies_are_found_and_told_apart(data: Path) -> None:
    write(data / "train" / "class0" / "copy.JPEG", jpeg(0))  # of train/class0/0.jpg
    write(data / "train" / "class1" / "copy.png", saved_again(jpeg(2)))  # of train/class0/2.jpg
    write(data / "val" / "class1" / "copy.png", saved_again(jpeg(3), compress_level=0))  # of train/class1/3.jpg
    write(data / "val" / "class0" / "copy.png", saved_again(jpeg(6), optimize=True))  # of val/class0/6.jpg
    changed = np.asarray(Image.open(io.BytesIO(jpeg(5)))).copy()
    changed[0, 0, 0] ^= 1
    Image.fromarray(changed).save(data / "val" / "class1" / "changed.png")
    report = check(str(data), 2)
    assert report.duplicates == {
        "across_splits": [["train/class1/3.jpg", "val/class1/copy.png"]],
        "within_train": [
            ["train/class0/0.jpg", "train/class0/copy.JPEG"],
            ["train/class0/2.jpg", "train/class1/copy.png"],
        ],
        "within_val": [["val/class0/6.jpg", "val/class0/copy.png"]],
        "across_classes": [["train/class0/2.jpg", "train/class1/copy.png"]],
    }
    assert report.problems == ["1 images are in train and in val; remove them from train."]


def test_duplicates_of_many_images_against_a_plain_count(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    write_images(tmp_path / "val", 2)
    for i in range(300):
        path = tmp_path / "train" / "green" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 2, (1, 8, 1), np.uint8).repeat(3, 2)).save(path)
    for name in ("blue", "red"):
        write(tmp_path / "train" / name / "a.jpg", jpeg(ord(name[0])))
    same = defaultdict(list)
    for path in sorted(map(str, (tmp_path / "train").rglob("*.*"))):
        with Image.open(path) as image:
            same[hashlib.md5(np.asarray(image.convert("RGB")).tobytes()).digest()].append(
                os.path.relpath(path, tmp_path)
            )
    groups = sorted(group for group in same.values() if len(group) > 1)
    assert len(groups) > 50
    report = check(str(tmp_path), 2)
    assert report.duplicates == {"across_splits": [], "within_train": groups, "within_val": [], "across_classes": []}


# --- ImageNet


@pytest.fixture
def small_imagenet(data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An ImageNet of two classes that `data` holds whole: 5 to 8 training images of a class, 2 for validation."""
    for seed in range(10, 19):
        write(data / "train" / f"class{seed % 2}" / f"{seed}.jpg", jpeg(seed))
    monkeypatch.setattr(module, "ilsvrc2012", lambda: Expected(15, ["class0", "class1"] * 2, {}))
    monkeypatch.setattr(module, "_IMAGENET_CLASS_SIZES", {"train": range(5, 9), "val": range(2, 3)})
    return data


def test_whole_imagenet(small_imagenet: Path) -> None:
    report = check(str(small_imagenet), 1)
    assert report.imagenet is not None and report.problems == []
    assert report.imagenet.images == report.imagenet.expected == {"train": 15, "val": 4}
    assert report.imagenet.unusual == {"train": {}, "val": {}} and report.imagenet.drawn == []


def test_imagenet_with_images_missing(small_imagenet: Path) -> None:
    (small_imagenet / "val" / "class1" / "7.jpg").unlink()
    (small_imagenet / "train" / "class1" / "1.jpg").unlink()
    report = check(str(small_imagenet), 1)
    assert report.imagenet is not None and report.imagenet.images == {"train": 14, "val": 3}
    assert report.imagenet.unusual == {"train": {}, "val": {"class1": 1}}
    assert report.problems == [
        f"{small_imagenet}/train holds 14 images where ImageNet has 15; see vip prepare-imagenet.",
        f"{small_imagenet}/val holds 3 images where ImageNet has 4, and 1 classes of sizes that it does not have; "
        "see vip prepare-imagenet.",
    ]


def test_imagenet_with_images_in_the_wrong_class(small_imagenet: Path) -> None:
    (small_imagenet / "val" / "class1" / "7.jpg").rename(small_imagenet / "val" / "class0" / "7.jpg")
    report = check(str(small_imagenet), 1)
    assert report.imagenet is not None and report.imagenet.unusual["val"] == {"class0": 3, "class1": 1}
    assert len(report.problems) == 1


def test_a_part_of_every_class_is_no_damage(small_imagenet: Path) -> None:
    for path in list(small_imagenet.glob("train/*/*")):
        if int(path.stem) > 5:
            path.unlink()
    report = check(str(small_imagenet), 1)
    assert report.imagenet is not None and report.imagenet.drawn == ["train"] and report.problems == []
    assert report.imagenet.images["train"] == 6


def imagenet_counts(classes: int = 1000) -> dict[str, dict[str, int]]:
    """Images of the first classes, so many in all of them as ImageNet has."""
    names = ImageNetInfo().label_names()
    train = dict.fromkeys(names, 1300)
    excess = sum(train.values()) - 1_281_167
    for name in names:
        train[name] -= (less := min(excess, 568))
        excess -= less
    assert sum(train.values()) == 1_281_167 and min(train.values()) == 732
    return {
        "train": {name: train[name] for name in names[:classes]},
        "val": dict.fromkeys(names[:classes], 50),
    }


@pytest.mark.parametrize(
    "change, bad",
    [
        (lambda train, val: None, []),
        (lambda train, val: val.update(n01440764=49), ["val"]),
        (lambda train, val: train.update(n01440764=731), ["train"]),
        (lambda train, val: train.update(n15075141=1299), ["train"]),
        (lambda train, val: train.update(n15075141=1301), ["train"]),
        (lambda train, val: train.pop("n15075141"), ["train"]),
        (lambda train, val: (train.update(dict.fromkeys(train, 130)), val.update(dict.fromkeys(val, 5))), []),
        (lambda train, val: (train.pop("n01440764"), val.pop("n01440764")), []),
        (lambda train, val: (train.update(other=1), val.update(other=1)), []),
    ],
    ids=["whole", "49", "731", "one less", "one more", "class lost", "a tenth", "999 classes", "one class more"],
)
def test_counts_of_imagenet(change: Callable[[dict, dict], object], bad: list[str]) -> None:
    counts = imagenet_counts()
    change(counts["train"], counts["val"])
    assert problems_of(counts) == bad


def test_subsets_of_imagenet() -> None:
    assert problems_of(imagenet_counts(100)) == []
    counts = imagenet_counts(100)
    counts["train"]["n01440764"] = 10
    splits = splits_of(counts)
    compared = module._compare_with_imagenet(splits)
    assert compared is not None and compared.unusual == {"train": {"n01440764": 10}, "val": {}}
    assert len(compared.missing_classes) == 900 and problems_of(counts) == []


def test_other_data_are_not_compared() -> None:
    names = ImageNetInfo().label_names()
    for classes in (["cat", "dog"], [names[0], "dog"], [str(i) for i in range(1000)]):
        splits = splits_of({split: dict.fromkeys(classes, 50) for split in ("train", "val")})
        assert module._compare_with_imagenet(splits) is None


def splits_of(counts: dict[str, dict[str, int]]) -> dict[str, SplitReport]:
    return {name: SplitReport(name, sum(of.values()), 0, of, [], [], [], {}) for name, of in counts.items()}


def problems_of(counts: dict[str, dict[str, int]]) -> list[str]:
    """The splits that are said to have other counts than ImageNet."""
    splits = splits_of(counts)
    report = DataReport(splits, {}, {}, {"across_splits": []}, module._compare_with_imagenet(splits), [], 1)
    return [problem.partition(" ")[0] for problem in module._problems(report)]
