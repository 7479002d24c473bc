"""`vip prepare-imagenet`: what it prints, its statuses, and what stops it."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from imagenet_archives import Archives, Tree, extract, jpeg, pack, tree_of, val_name, write_archives
from training_command import Outcome

from vip.data.imagenet import ilsvrc2012

PROGRAM = "vip prepare-imagenet"
ROOT = Path(__file__).parents[2]
WNIDS = ("n01440764", "n09193705")  # the first of all, and that of the second validation image


def write_all(folder: Path, images: int) -> Archives:
    """Archives with the names of real ones: two training classes, and four validation images of four classes."""
    photographs = [jpeg(i, 16) for i in range(10)]
    train = {f"{w}.tar": pack({f"{w}_{i}.JPEG": photographs[i % 10] for i in range(images)}) for w in WNIDS}
    val = {val_name(i): photographs[i] for i in range(1, 5)}
    return write_archives(folder, train, val, list(ilsvrc2012().val_classes))


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Archives:
    return write_all(tmp_path_factory.mktemp("archives"), 3)


@pytest.fixture(scope="module")
def tree(archives: Archives, tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return extract(archives, tmp_path_factory.mktemp("extracted"))


@pytest.fixture
def prepare(command: Callable[..., Outcome], archives: Archives) -> Callable[..., Outcome]:
    """Runs `vip prepare-imagenet` on the archives."""

    def run(out: Path, *flags: str) -> Outcome:
        return command("prepare-imagenet", archives.train, archives.val, out, *flags)

    return run


@pytest.fixture
def expected(archives: Archives, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets the archives be the ones that are expected, up to `changes`."""

    def expect(**changes: Any) -> None:
        classes = archives.expected.val_classes[:4]
        exact = replace(archives.expected, train_images=6, val_classes=[*classes, WNIDS[0]], **changes)
        monkeypatch.setattr("vip.cli.prepare_imagenet.ilsvrc2012", lambda: exact)

    return expect


def says(message: str, *words: object) -> None:
    missing = [str(word) for word in words if str(word) not in message]
    assert not missing, f"{missing} not in: {message}"


def next_line(out: Path) -> str:
    where = shlex.quote(str(out))
    return f"All is there. Next: vip check-data {where}; python train.py {where} --config models/vip_s7/recipe.yaml"


def test_archives_that_someone_else_packed(prepare: Callable[..., Outcome], tree: Tree, tmp_path: Path) -> None:
    out = tmp_path / "my images"
    for unpacked in ((2, 4), (0, 0)):
        outcome = prepare(out, "--no-checksum")
        lines = outcome.out.splitlines()
        assert outcome.status == 0 and outcome.err == "" and tree_of(out) == tree
        assert lines[:2] == [
            f"train: 6 images of 2 classes, {unpacked[0]} of them unpacked now",
            f"val: 4 images of 4 classes, {unpacked[1]} of them unpacked now",
        ]
        assert len(lines) == 8 and all(line.startswith("warning: ") for line in lines[2:-1])
        for words in (
            ("2 classes", "1,000"),
            ("6 images", "1,281,167"),
            ("4 classes", "1,000"),
            ("4 images", "50,000"),
        ):
            assert any(all(word in line for word in words) for line in lines[2:-1]), words
        assert lines[-1] == next_line(out)
    assert (ROOT / "models/vip_s7/recipe.yaml").exists()


def test_a_checksum_that_is_not_the_published_one(
    prepare: Callable[..., Outcome], archives: Archives, tmp_path: Path
) -> None:
    message = prepare(tmp_path).error(PROGRAM)
    published, found = "29b22e2961454d5413ddabcf34fc5622", archives.expected.checksums["val"]
    says(message, archives.val, published, found, "download it again", "--no-checksum")
    assert not tree_of(tmp_path)


def test_numbers_that_are_wrong(
    prepare: Callable[..., Outcome], expected: Callable[..., None], tree: Tree, tmp_path: Path
) -> None:
    expected()
    outcome = prepare(tmp_path)
    assert outcome.status == 1 and outcome.err == "" and tree_of(tmp_path) == tree
    says(outcome.out, "warning: ", "holds 4 images, expected 5")
    assert outcome.out.splitlines()[-1].startswith("These are not the archives of ILSVRC2012; --no-checksum")
    (tmp_path / "train" / WNIDS[0] / f"{WNIDS[0]}_1.JPEG").unlink()
    for flags in ((), ("--no-checksum",)):
        outcome = prepare(tmp_path, *flags)
        assert outcome.status == 1
        says(outcome.out, "1 folders differ: ", f"{tmp_path / 'train' / WNIDS[0]} holds 2 files, its archive 3")
        assert outcome.out.splitlines()[-1].startswith("Remove the folders that differ, and run the same again")
    shutil.rmtree(tmp_path / "train" / WNIDS[0])
    assert prepare(tmp_path, "--no-checksum").status == 0 and tree_of(tmp_path) == tree


def test_the_wrong_order(command: Callable[..., Outcome], archives: Archives, tmp_path: Path) -> None:
    message = command("prepare-imagenet", archives.val, archives.train, tmp_path / "out").error(PROGRAM)
    says(message, archives.train, "the order is TRAIN_TAR VAL_TAR OUT")


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_for_terminals(
    prepare: Callable[..., Outcome],
    expected: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    terminal: bool,
) -> None:
    expected()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    outcome = prepare(tmp_path)
    for split, classes in (("train", 2), ("val", 4)):
        for words in (f"checksum of {split}", f"unpacking {split}", f"counting {split}", f"/{classes} ["):
            assert (words in outcome.err) == terminal
    assert "\r" not in outcome.out


@pytest.mark.parametrize(
    "argv, words", [("", ["TRAIN_TAR"]), ("a b", ["OUT"]), ("a b c d", ["d"]), ("a b c --fast", [])]
)
def test_command_lines_that_are_wrong(command: Callable[..., Outcome], argv: str, words: list[str]) -> None:
    says(command("prepare-imagenet", *argv.split()).error(PROGRAM), *words, "--help")


def test_help(command: Callable[..., Outcome], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as e:
        command("prepare-imagenet", "--help")
    assert e.value.code == 0
    says(capsys.readouterr().out, f"usage: {PROGRAM}", "TRAIN_TAR", "VAL_TAR", "OUT", "--no-checksum")
    assert "prepare-imagenet" in command("--help").out


# `vip`, which says so and waits when it opens a file of the name in LAST.
SCRIPT = """
import os, signal, sys, time
import vip.cli
import vip.data.imagenet

signal.signal(signal.SIGINT, signal.default_int_handler)  # which the background of a shell may ignore


def hook(event, args):
    if event == "open" and str(args[0]).endswith(os.environ["LAST"]):
        print("waiting", flush=True)
        time.sleep(100)


vip.data.imagenet._SYNC_BYTES, os.sync = 0, lambda: None
sys.addaudithook(hook)
sys.exit(vip.cli.main())
"""


@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_stopped_by_a_signal(command: Callable[..., Outcome], tmp_path: Path, name: str) -> None:
    """Stopped when all of `val` and one class of two of `train` are there, and some images of the other."""
    archives = write_all(tmp_path, 40)
    out = tmp_path / "out"
    argv = ["prepare-imagenet", str(archives.train), str(archives.val), str(out), "--no-checksum"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "LAST": f"{WNIDS[1]}_30.JPEG"}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *argv], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == b"waiting\n"
    process.send_signal(signal.Signals[name])
    output = process.communicate(timeout=60)
    assert (process.returncode, *output) == (-signal.SIGKILL if name == "SIGKILL" else 130, b"", b"")
    unfinished, first = out / "train" / ".unfinished", out / "train" / WNIDS[0]
    assert unfinished.exists() == (name == "SIGKILL") and not (out / "train" / WNIDS[1]).exists()
    inode = first.stat().st_ino
    outcome = command(*argv)
    assert outcome.status == 0 and "train: 80 images of 2 classes, 1 of them unpacked now" in outcome.out
    assert first.stat().st_ino == inode and tree_of(out) == extract(archives, tmp_path / "extracted")
