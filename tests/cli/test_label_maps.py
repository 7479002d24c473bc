"""`vip label-maps`: what it prints, its statuses, and mistakes."""

import errno
import os
import re
import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from map_files import identical, random_map, write_maps
from training_command import Outcome

from vip.token_labels.geometry import Region
from vip.token_labels.maps import LabelMap, MapRecord, write_map
from vip.token_labels.store import open_label_maps

KEYS = [f"{name}/{name}{i}" for name in ("blue", "green", "red") for i in range(12)]  # of `image_folder`
RECORD = MapRecord(Region((64, 64), 0.9), 10, model="vip_s7")


@pytest.fixture
def label_maps(command: Callable[..., Outcome]) -> Callable[..., Outcome]:
    """Runs `vip label-maps`; whatever it does, it says nothing on standard error where that is no terminal."""

    def run(*argv: object) -> Outcome:
        outcome = command("label-maps", *argv)
        assert outcome.status == 2 or outcome.err == ""
        return outcome

    return run


@pytest.fixture
def refuses(command: Callable[..., Outcome]) -> Callable[..., str]:
    """Runs `vip label-maps`, which must end in an error; returns it."""

    def run(*argv: object) -> str:
        outcome = command("label-maps", *argv)
        message = outcome.error("vip label-maps")
        assert len(outcome.err.splitlines()) == 1 and len(message) < 600
        return message

    return run


@pytest.fixture
def published(tmp_path: Path) -> Path:
    write_maps(tmp_path / "published", KEYS)
    RECORD.write(tmp_path / "published")
    return tmp_path / "published"


@pytest.fixture
def packed(published: Path, tmp_path: Path, label_maps: Callable[..., Outcome]) -> Path:
    assert label_maps("pack", published, tmp_path / "packed").status == 0
    return tmp_path / "packed"


@pytest.fixture(params=["published", "packed"])
def either(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def says(message: str, *words: object) -> None:
    """The message names all of these."""
    missing = [str(word) for word in words if str(word) not in message]
    assert not missing, f"{missing} not in: {message}"


def summary(folder: Path, layout: str, maps: int = 36) -> str:
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return f"{maps} label maps, {layout} layout, shape 5x4x4, classes up to 9, {size / maps:,.0f} bytes each"


# --- converting


def test_there_and_back(label_maps: Callable[..., Outcome], published: Path, tmp_path: Path) -> None:
    packed, back = tmp_path / "a" / "packed", tmp_path / "b" / "back"
    assert label_maps("pack", published, packed) == Outcome(0, f"36 label maps written to {packed}\n", "")
    assert sorted(path.name for path in packed.iterdir()) == ["label_maps.json", "maps-00000.safetensors"]
    assert label_maps("unpack", packed, back) == Outcome(0, f"36 label maps written to {back}\n", "")
    first, last = open_label_maps(published), open_label_maps(back)
    assert first.record == last.record == RECORD and sorted(last.keys()) == sorted(KEYS)
    assert all(identical(first.read(key), last.read(key)) for key in KEYS)


@pytest.mark.parametrize("action", ["pack", "unpack"])
def test_folders_that_cannot_be_converted(
    refuses: Callable[..., str], either: Path, tmp_path: Path, action: str
) -> None:
    before = {path: path.stat().st_mtime_ns for path in either.rglob("*")}
    says(refuses(action, tmp_path / "nowhere", tmp_path / "out"), "no label maps at", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    says(refuses(action, tmp_path / "empty", tmp_path / "out"), tmp_path / "empty", "holds no label maps")
    says(refuses(action, either, either), either, "holds something already")
    (tmp_path / "file").write_text("a file")
    says(refuses(action, either, tmp_path / "file"), tmp_path / "file", "holds something already")
    assert not (tmp_path / "out").exists() and (tmp_path / "file").read_text() == "a file"
    assert {path: path.stat().st_mtime_ns for path in either.rglob("*")} == before


@pytest.mark.parametrize("action", ["pack", "unpack"])
def test_damaged_maps_are_not_converted(
    refuses: Callable[..., str], published: Path, tmp_path: Path, action: str
) -> None:
    path = published / "green" / "green3.pt"
    path.write_bytes(path.read_bytes()[:100])
    says(refuses(action, published, tmp_path / "out"), path.with_suffix(""), "is damaged")
    assert not (tmp_path / "out").exists()


def test_classes_beyond_the_published_layout(
    label_maps: Callable[..., Outcome], refuses: Callable[..., str], packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vip.token_labels.store.EXACT_CLASSES", 8)
    says(
        refuses("unpack", packed, packed.with_name("out")), "names class 9", "up to 8 exactly", "keep these maps packed"
    )


@pytest.mark.parametrize("action, writer", [("pack", "write_shard"), ("unpack", "write_map")])
def test_a_full_disk(
    refuses: Callable[..., str],
    published: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    action: str,
    writer: str,
) -> None:
    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(f"vip.token_labels.store.{writer}", fail)
    before = set(tmp_path.iterdir())
    says(refuses(action, published, tmp_path / "out"), tmp_path / "out", "(No space left on device)", "make room")
    assert set(tmp_path.iterdir()) == before, "half of it was left"


@pytest.mark.parametrize("action", ["pack", "unpack"])
def test_a_target_below_a_file(refuses: Callable[..., str], published: Path, tmp_path: Path, action: str) -> None:
    (tmp_path / "file").write_text("a file")
    says(refuses(action, published, tmp_path / "file" / "out"), tmp_path / "file" / "out", "Not a directory")


# --- checking


def test_all_is_well(label_maps: Callable[..., Outcome], published: Path, packed: Path, image_folder: Path) -> None:
    for folder, other, layout in ((published, packed, "published"), (packed, published, "packed")):
        expected = Outcome(0, f"{summary(folder, layout)}\nAll is well.\n", "")
        for flags in (
            (),
            ("--images", image_folder),
            ("--images", image_folder / "train"),
            ("--same-as", other),
            ("--images", image_folder, "--same-as", folder),
        ):
            assert label_maps("check", folder, *flags) == expected


def test_images_without_maps_and_maps_without_images(
    label_maps: Callable[..., Outcome], either: Path, image_folder: Path, tmp_path: Path
) -> None:
    images = shutil.copytree(image_folder / "train", tmp_path / "images")
    (images / "red" / "red3.png").unlink()
    outcome = label_maps("check", either, "--images", images)
    assert outcome.status == 0 and outcome.out.splitlines()[1:] == ["1 unused: red/red3", "All is well."]
    for i in range(6):
        shutil.copy(images / "red" / "red0.jpg", images / "blue" / f"new{i}.large.jpg")
    outcome = label_maps("check", either, "--images", images)
    assert outcome.status == 1 and outcome.out.splitlines()[1:] == [
        f"6 missing: {', '.join(f'blue/new{i}' for i in range(5))}, ...",
        "1 unused: red/red3",
        "This is not well.",
    ]


@pytest.mark.parametrize("kind", ["training", "train.tar", "tar"])
def test_places_of_images(
    label_maps: Callable[..., Outcome], published: Path, image_folder: Path, tmp_path: Path, kind: str
) -> None:
    """The training images are looked for where generation and training look for them."""
    data = shutil.copytree(image_folder, tmp_path / "data")
    if kind == "training":
        (data / "train").rename(data / "training")
    else:
        with tarfile.open(data / "train.tar", "w") as tar:
            tar.add(data / "train", "train")
        shutil.rmtree(data / "train")
    outcome = label_maps("check", published, "--images", data / "train.tar" if kind == "tar" else data)
    assert outcome.status == 0 and outcome.out.endswith("\nAll is well.\n")


def test_images_that_are_not_there(
    refuses: Callable[..., str], published: Path, image_folder: Path, tmp_path: Path
) -> None:
    says(refuses("check", published, "--images", tmp_path / "nowhere"), "no data set at", tmp_path / "nowhere")
    shutil.copytree(image_folder / "val", tmp_path / "data" / "val")
    says(refuses("check", published, "--images", tmp_path / "data"), tmp_path / "data", "no train/")


def test_damaged_maps(label_maps: Callable[..., Outcome], published: Path) -> None:
    (published / "red" / "red1.pt").write_bytes(b"")
    (published / "red" / "red2.pt").write_bytes((published / "red" / "red3.pt").read_bytes()[:-200])
    outcome = label_maps("check", published)
    lines = outcome.out.splitlines()
    assert outcome.status == 1 and lines[0].startswith("34 label maps,") and lines[2:] == ["This is not well."]
    says(lines[1], "2 damaged: red/red1: it is empty", "red/red2: ")


def test_maps_of_several_shapes(label_maps: Callable[..., Outcome], published: Path) -> None:
    write_map(published / "red" / "red1.pt", random_map(shape=(5, 2, 3)))
    outcome = label_maps("check", published)
    lines = outcome.out.splitlines()
    assert outcome.status == 1 and "shape 5x2x3, 5x4x4," in lines[0]
    assert lines[1:] == ["The shapes differ: generate all maps at one --img-size.", "This is not well."]


def test_sets_that_differ(
    label_maps: Callable[..., Outcome], refuses: Callable[..., str], published: Path, packed: Path, tmp_path: Path
) -> None:
    values, indices = open_label_maps(published).read("red/red1")
    values[0, 0, 0] += 0.5
    write_map(published / "red" / "red1.pt", LabelMap(values, indices))
    (published / "red" / "red2.pt").unlink()
    for folder, other in ((published, packed), (packed, published)):
        outcome = label_maps("check", folder, "--same-as", other)
        assert outcome.status == 1
        assert outcome.out.splitlines()[1:] == ["2 different: red/red1, red/red2", "This is not well."]
    says(refuses("check", packed, "--same-as", tmp_path / "nowhere"), "no label maps at", tmp_path / "nowhere")


def test_folders_without_maps(refuses: Callable[..., str], image_folder: Path, tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", image_folder / "train"):
        for action in ("check", "benchmark"):
            says(refuses(action, folder), folder, "no label maps")


def test_what_is_no_label_map(refuses: Callable[..., str], published: Path, packed: Path) -> None:
    (published / "red" / "red1.pt").write_bytes((published / "label_maps.json").read_bytes())
    (packed / "maps-00000.safetensors").write_bytes(b"half")
    says(refuses("check", packed), packed / "maps-00000.safetensors", "is damaged")
    (published / "label_maps.json").write_text("{")
    for action in ("check", "benchmark"):
        says(refuses(action, published), published / "label_maps.json", "is damaged")


# --- timing


def test_benchmark(label_maps: Callable[..., Outcome], published: Path, packed: Path) -> None:
    outcome = label_maps("benchmark", published, packed, "--seconds", 0.05)
    assert outcome.status == 0
    head, line, *rows = outcome.out.splitlines()
    assert head == "| label maps | layout | maps | bytes a map | files | maps a second |"
    assert line.count("|") == head.count("|")
    for row, folder, layout, files in zip(rows, (published, packed), ("published", "packed"), (37, 2), strict=True):
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        size = re.search(r"([\d,]+) bytes each", summary(folder, layout)).group(1)
        assert cells[:5] == [str(folder), layout, "36", size, str(files)]
        assert float(cells[5].replace(",", "")) > 10


def test_damaged_maps_are_not_timed(refuses: Callable[..., str], published: Path) -> None:
    for path in published.rglob("*.pt"):
        path.write_bytes(b"")
    says(refuses("benchmark", published, "--seconds", 0.1), published, "is damaged", "see vip label-maps check")


# --- the command line


@pytest.mark.parametrize(
    "argv, words",
    [
        ("", ["required", "--help"]),
        ("squeeze", ["squeeze", "pack"]),
        ("pack", ["required", "source", "target"]),
        ("pack one", ["required", "target"]),
        ("pack one two three", ["three"]),
        ("check", ["required", "folder"]),
        ("check one --samee two", ["--samee"]),
        ("benchmark", ["required", "folder"]),
        ("benchmark one --seconds long", ["--seconds", "'long'"]),
    ],
)
def test_command_lines_that_are_wrong(refuses: Callable[..., str], argv: str, words: list[str]) -> None:
    says(refuses(*argv.split()), *words)


@pytest.mark.parametrize(
    "action, words",
    [
        ("", ["pack", "unpack", "check", "benchmark", "convert, check and time label maps"]),
        ("pack", ["source", "target", "a few large files"]),
        ("unpack", ["source", "target", "as published"]),
        ("check", ["--images", "--same-as", "status 1 if one is bad"]),
        ("benchmark", ["--seconds", "default: 5"]),
    ],
)
def test_help(command: Callable[..., Outcome], capsys: pytest.CaptureFixture, action: str, words: list[str]) -> None:
    with pytest.raises(SystemExit) as e:
        command("label-maps", *action.split(), "--help")
    assert e.value.code == 0
    says(capsys.readouterr().out, "usage: vip label-maps", *words)


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_for_terminals(
    command: Callable[..., Outcome],
    published: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    terminal: bool,
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    for argv in (("pack", published, tmp_path / "packed"), ("unpack", published, tmp_path / "b"), ("check", published)):
        outcome: Any = command("label-maps", *argv)
        assert outcome.status == 0 and ("/36 [" in outcome.err) == terminal
        assert "\r" not in outcome.out
