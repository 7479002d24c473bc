"""`vip check-data`: what it prints and writes, its statuses, mistakes, and how it is stopped."""

import errno
import json
import multiprocessing
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from training_command import Outcome

import vip.cli
from vip.data.inspection import KINDS

RATE = r"{} images read in [\d.,]+ s by {}: [\d,]+ images and [\d.,]+ MB a second"


@pytest.fixture
def check_data(command: Callable[..., Outcome]) -> Callable[..., Outcome]:
    """Runs `vip check-data`; whatever it does, it says nothing on standard error where that is no terminal."""

    def run(*argv: object) -> Outcome:
        outcome = command("check-data", *argv)
        assert outcome.status == 2 or outcome.err == ""
        return outcome

    return run


@pytest.fixture
def data(image_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(image_folder, tmp_path / "data")


@pytest.fixture
def bad_data(data: Path) -> Path:
    """A bit of everything."""
    shutil.copy(data / "train" / "red" / "red1.png", data / "train" / "red" / "red1.JPEG")
    shutil.copy(data / "train" / "red" / "red3.png", data / "val" / "red" / "copy.png")
    shutil.copy(data / "train" / "red" / "red5.png", data / "train" / "blue" / "copy.png")
    (data / "train" / "blue" / "text.jpg").write_text("<html>503 Service Unavailable</html>")
    (data / "val" / "green" / "empty.jpg").touch()
    (data / "val" / "green" / "a.webp").touch()
    (data / "val" / "green" / ".DS_Store").touch()
    (data / "val" / "white").mkdir()
    return data


def size(folder: Path) -> str:
    return f"{sum(path.stat().st_size for path in folder.rglob('*.*') if path.suffix != '.webp') / 1e6:,.1f} MB"


def test_all_is_well(check_data: Callable[..., Outcome], data: Path) -> None:
    for flags, processes in (((), None), (("-j", 1), "1 process"), (("--workers", 2), "2 processes")):
        if processes is None:
            cores = len(os.sched_getaffinity(0))
            processes = f"{cores} process{'es' * (cores > 1)}"
        outcome = check_data(data, *flags)
        lines = outcome.out.splitlines()
        assert outcome.status == 0 and lines[0:2] + lines[3:] == [
            f"{data}/train: 36 images, {size(data / 'train')}, 3 classes of 12 to 12 images (median 12)",
            f"{data}/val: 15 images, {size(data / 'val')}, 3 classes of 5 to 5 images (median 5)",
            "All is well.",
        ]
        assert re.fullmatch(RATE.format(51, processes), lines[2])


def test_everything_at_once(check_data: Callable[..., Outcome], bad_data: Path) -> None:
    outcome = check_data(bad_data, "-j", 2)
    *lines, rate, verdict, problem, another, last = outcome.out.splitlines()
    assert outcome.status == 1 and lines == [
        f"{bad_data}/train: 39 images, {size(bad_data / 'train')}, 3 classes of 12 to 14 images (median 13)",
        f"{bad_data}/val: 17 images, {size(bad_data / 'val')}, 3 classes of 5 to 6 images (median 6)",
        "  1 empty classes: white",
        "  left out: 1 .webp, 1 hidden",
        "2 unreadable: train/blue/text.jpg (no image, or of an unknown format), val/green/empty.jpg (empty)",
        "1 wrong_ending (another format than the ending says): train/red/red1.JPEG",
        "1 duplicates across splits: train/red/red3.png = val/red/copy.png",
        "2 duplicates within train: train/blue/copy.png = train/red/red5.png, train/red/red1.JPEG = train/red/red1.png",
        "1 duplicates across classes: train/blue/copy.png = train/red/red5.png",
    ]
    assert re.fullmatch(RATE.format(56, "2 processes"), rate)
    assert [verdict, problem, another, last] == [
        "This is not well:",
        f"- No images in 1 class folders of {bad_data}/val: white; fill or remove them.",
        "- 2 files cannot be read; repair or remove them.",
        "- 1 images are in train and in val; remove them from train.",
    ]


def test_suspicious_files_alone_are_well(check_data: Callable[..., Outcome], data: Path) -> None:
    for i in range(1, 8, 2):
        path = data / "train" / "red" / f"red{i}.png"
        path.rename(path.with_suffix(".jpg"))
        path.with_suffix(".jpg").write_bytes(path.with_suffix(".jpg").read_bytes() + b"more")
    outcome = check_data(data)
    names = ", ".join(f"train/red/red{i}.jpg" for i in (1, 3, 5))
    assert outcome.status == 0 and outcome.out.endswith("\nAll is well.\n")
    for kind in ("wrong_ending", "trailing_bytes"):
        assert f"\n4 {kind} ({KINDS[kind]}): {names}, ...\n" in outcome.out


def test_the_report(check_data: Callable[..., Outcome], bad_data: Path, tmp_path: Path) -> None:
    assert check_data(bad_data, "--report", tmp_path / "1.json", "-j", 1).status == 1
    assert check_data(bad_data, "--report", tmp_path / "2.json", "-j", 3).status == 1
    text = (tmp_path / "1.json").read_text()
    assert text == (tmp_path / "2.json").read_text() and text.isascii()
    report = json.loads(text)
    assert sorted(report) == ["duplicates", "imagenet", "problems", "splits", "suspicious", "unreadable"]
    assert report["splits"]["val"]["left_out"] == {".webp": ["val/green/a.webp"], "hidden": ["val/green/.DS_Store"]}
    assert report["splits"]["train"]["classes"] == {"blue": 14, "green": 12, "red": 13}
    assert report["unreadable"]["val/green/empty.jpg"] == "empty" and len(report["unreadable"]) == 2
    assert report["suspicious"] == {"wrong_ending": ["train/red/red1.JPEG"]}
    assert report["duplicates"]["across_splits"] == [["train/red/red3.png", "val/red/copy.png"]]
    assert report["imagenet"] is None and len(report["problems"]) == 3


def test_names_that_cannot_be_printed(check_data: Callable[..., Outcome], data: Path, tmp_path: Path) -> None:
    name = os.fsdecode(b"train/red/\xff.jpg")
    (data / name).touch()
    outcome = check_data(data, "--report", tmp_path / "report.json")
    assert outcome.status == 1 and r"train/red/\udcff.jpg (empty)" in outcome.out
    assert list(json.loads((tmp_path / "report.json").read_text())["unreadable"]) == [name]


def test_imagenet(check_data: Callable[..., Outcome], image_folder: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name, synset in (("blue", "n01440764"), ("green", "n01443537"), ("red", "other")):
            shutil.copytree(image_folder / split / name, tmp_path / split / synset)
    outcome = check_data(tmp_path)
    assert outcome.status == 0 and outcome.out.splitlines()[2:6] == [
        "ImageNet: 24 of 1,281,167 train images, 10 of 50,000 val images, 2 of its classes, without n01484850, "
        "n01491361, n01494475, ...",
        "  1 classes that it does not have: other",
        "  of every class only a part is in train",
        "  of every class only a part is in val",
    ]


# --- mistakes


def test_mistakes(check_data: Callable[..., Outcome], data: Path, tmp_path: Path) -> None:
    for argv, message in (
        ((tmp_path / "nowhere",), f"There is no data set at {tmp_path / 'nowhere'}"),
        ((data / "train",), "has no train/"),
        ((data, "-j", 0), "--workers/-j: '0', expected a whole number of at least 1"),
        ((data, "-j", "many"), "--workers/-j: 'many', expected a whole number"),
        ((data, "--reprot", "x"), "Did you mean --report?"),
        ((), "required: data"),
    ):
        assert message in check_data(*argv).error("vip check-data")


def test_reports_that_cannot_be_written_are_refused_before_reading(
    check_data: Callable[..., Outcome], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vip.cli.check_data.check", None)
    for path in (tmp_path / "nowhere" / "report.json", tmp_path):
        message = check_data(data, "--report", path).error("vip check-data")
        assert message == f"Cannot write {path}: give --report a file in a folder that is there."


def test_a_full_disk(
    check_data: Callable[..., Outcome], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was found is printed all the same, and an older report stays."""

    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    report = tmp_path / "report.json"
    report.write_text("older")
    monkeypatch.setattr(os, "fsync", fail)
    outcome = check_data(data, "--report", report)
    assert outcome.error("vip check-data").startswith(f"Cannot write {report} (No space left on device)")
    assert "All is well." in outcome.out and sorted(tmp_path.iterdir()) == [data, report]
    assert report.read_text() == "older"


# --- stopping


def test_ctrl_c(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reaches all processes of a terminal, some of which hang; nothing is left of them, and no report."""

    def hang(file: object) -> None:
        (tmp_path / "hangs").touch()
        time.sleep(1000)

    def run() -> None:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
        os.dup2(os.open(tmp_path / "output", os.O_CREAT | os.O_WRONLY), 2)
        os._exit(vip.cli.main(["check-data", str(data), "-j", "2", "--report", str(tmp_path / "report.json")]))

    monkeypatch.setattr("vip.data.inspection.decode_image", hang)
    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    end = time.monotonic() + 30
    while not (tmp_path / "hangs").exists():
        assert process.is_alive() and time.monotonic() < end
        time.sleep(0.02)
    start = time.monotonic()
    os.killpg(process.pid or 0, signal.SIGINT)
    process.join(20)
    assert process.exitcode == 130 and time.monotonic() - start < 5
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid or 0, 0)
    assert (tmp_path / "output").read_text() == "" and not (tmp_path / "report.json").exists()


def test_a_terminal_shows_progress(
    command: Callable[..., Outcome], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    outcome = command("check-data", data)
    assert outcome.status == 0 and re.search(r"0%.*0/51 .*image", outcome.err)
