"""ImageNet's folder from its archives, against an extraction by tarfile; killed, damaged and hostile ones."""

import errno
import io
import os
import re
import shutil
import signal
import stat
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from imagenet_archives import Archives, Tree, digest, extract, jpeg, pack, tree_of, val_name, write_archives
from timm.data import ImageNetInfo
from timm.data.real_labels import RealLabelsImagenet

from vip.data.config import DatasetConfig
from vip.data.datasets import check_same_classes, class_to_idx, create_split
from vip.data.imagenet import Report, ilsvrc2012, prepare
from vip.errors import UserError

WNIDS = ["n00000003", "n00000001", "n00000002"]  # in the order of the archive
VAL_CLASSES = ["n00000002", "n00000001", "n00000003", "n00000003", "n00000001", "n00000002"]


def class_archive(wnid: str, images: int) -> bytes:
    return pack({f"{wnid}_{7 * i}.JPEG": jpeg(i + int(wnid[1:])) for i in range(images)})


TRAIN = {f"{wnid}.tar": class_archive(wnid, images) for wnid, images in zip(WNIDS, (4, 1, 3), strict=True)}
TRAIN["n00000001.tar"] = pack({"n00000001_5.JPEG": jpeg(5, 400), "n00000001_11.JPEG": jpeg(11)})  # one of many chunks
VAL = {val_name(i): jpeg(100 + i) for i in (4, 2, 6, 1, 3, 5)}


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for the disk takes longer than all the rest, and what is killed here is never the machine."""
    monkeypatch.setattr(os, "sync", lambda: None)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Archives:
    """Archives of three classes. Do not change them, copy them."""
    assert len(TRAIN["n00000001.tar"]) > 2 * 2**16  # of which shutil copies one at a time
    return write_archives(tmp_path_factory.mktemp("archives"), TRAIN, VAL, VAL_CLASSES)


@pytest.fixture(scope="module")
def tree(archives: Archives, tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return extract(archives, tmp_path_factory.mktemp("extracted"))


def make(archives: Archives, out: Path, **options: Any) -> Report:
    return prepare(archives.train, archives.val, out, archives.expected, **options)


def refusal(archives: Archives, out: Path, **options: Any) -> str:
    with pytest.raises(UserError) as e:
        make(archives, out, **options)
    message = str(e.value)
    assert "\n" not in message and len(message) < 600
    return message


def says(message: str, *words: object) -> None:
    missing = [str(word) for word in words if str(word) not in message]
    assert not missing, f"{missing} not in: {message}"


class Steps:
    """A `progress` that notes what was done."""

    def __init__(self) -> None:
        self.done: list[tuple[str, str, Any]] = []

    def __call__(self, items: Iterable[Any], desc: str, unit: str) -> Iterator[Any]:
        for item in items:
            self.done.append((desc, unit, item))
            yield item

    def of(self, desc: str) -> list[Any]:
        return [item for name, _, item in self.done if name == desc]


# --- the folder


def test_against_an_extraction(archives: Archives, tree: Tree, tmp_path: Path) -> None:
    out = tmp_path / "a" / "out"
    report = make(archives, out)
    assert len(tree) == 9 + 6 and tree_of(out) == tree
    assert report == Report(
        Counter(train=3, val=3), Counter(train=9, val=6), unpacked=Counter(train=3, val=3), wrong=[], unusual=[]
    )
    umask = os.umask(0)
    os.umask(umask)
    modes = {stat.S_IMODE(p.stat().st_mode) for p in out.rglob("*.JPEG")}
    assert modes == {0o666 & ~umask}, "others may not read it"
    assert {p.name for p in out.iterdir()} == {"train", "val", "train.json", "val.json", ".lock"}
    assert sorted(os.listdir(out / "train")) == sorted(os.listdir(out / "val")) == sorted(WNIDS)


def test_training_reads_it(archives: Archives, tmp_path: Path) -> None:
    make(archives, tmp_path)
    config = DatasetConfig(data=str(tmp_path))
    train, val = create_split(config, "train", True), create_split(config, "validation", False)
    check_same_classes(train, val)
    classes = class_to_idx(val)
    assert classes == {wnid: i for i, wnid in enumerate(sorted(WNIDS))}
    assert len(train) == 9 and len(val) == 6
    for i, name in enumerate(val.filenames(basename=True)):
        assert val[i][1] == classes[VAL_CLASSES[int(name[15:23]) - 1]]


def test_a_second_run_changes_nothing(archives: Archives, tmp_path: Path) -> None:
    make(archives, tmp_path)
    before = {p: p.stat().st_mtime_ns for p in [tmp_path, *tmp_path.glob("*/**/*")]}
    steps = Steps()
    report = make(archives, tmp_path, progress=steps)
    assert {p: p.stat().st_mtime_ns for p in before if p != tmp_path} | {tmp_path: before[tmp_path]} == before
    assert not report.unpacked.total() and report.images == Counter(train=9, val=6) and not report.wrong
    assert {desc for desc, _, _ in steps.done} == {"counting train", "counting val"}


def test_splits_may_be_links(archives: Archives, tree: Tree, tmp_path: Path) -> None:
    (tmp_path / "other disk").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train").symlink_to(tmp_path / "other disk")
    make(archives, tmp_path / "out")
    assert len(os.listdir(tmp_path / "other disk")) == 3
    make(archives, tmp_path / "out")


@pytest.mark.parametrize("sync_bytes, syncs", [(0, 6), (6000, 4), (2**28, 2)])
def test_a_class_is_on_disk_before_it_is_in_its_place(
    archives: Archives, tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sync_bytes: int, syncs: int
) -> None:
    synced: list[Tree] = []
    rename = Path.rename

    def files() -> Tree:
        return {name: content for name, content in tree_of(tmp_path).items() if "/.unfinished/" in name}

    def rename_synced(path: Path, target: Path) -> Path:
        if path.parent.name == ".unfinished":
            name = str(path.relative_to(tmp_path))
            of_class = {n: content for n, content in synced[-1].items() if n.startswith(name)}
            assert of_class and of_class.items() <= files().items()
            assert {n.replace("/.unfinished", ""): c for n, c in of_class.items()}.items() <= tree.items()
        return rename(path, target)

    monkeypatch.setattr("vip.data.imagenet._SYNC_BYTES", sync_bytes)
    monkeypatch.setattr(os, "sync", lambda: synced.append(files()))
    monkeypatch.setattr(Path, "rename", rename_synced)
    make(archives, tmp_path)
    assert len(synced) == syncs and tree_of(tmp_path) == tree


# --- killed runs


def run_disturbed(archives: Archives, out: Path, at: int, disturb: Callable[[], None]) -> tuple[int, int]:
    """Prepare in a process of its own that calls `disturb` before its step number `at`.

    A step is anything that changes the disk: a folder made, renamed or removed, a file opened, 200 bytes of an image.

    Returns:
        Its wait status, and the number of steps it took.
    """
    receive, send = os.pipe()
    child = os.fork()
    if child:
        os.close(send)
        with open(receive, "rb") as pipe:
            steps = len(pipe.read())
        return os.waitpid(child, 0)[1], steps
    try:
        os.close(receive)
        steps = 0

        def step() -> None:
            nonlocal steps
            steps += 1
            if steps == at:
                disturb()
            os.write(send, b".")

        def copy(source: Any, target: Any) -> None:
            while content := source.read(200):
                step()
                target.write(content)
                target.flush()

        def hook(event: str, args: tuple) -> None:
            writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax")
            if writes or event in ("os.mkdir", "os.rename", "os.rmdir", "os.remove"):
                step()

        shutil.copyfileobj = copy
        sys.addaudithook(hook)
        make(archives, out)
        os._exit(0)
    except KeyboardInterrupt:
        os._exit(130)
    finally:
        os._exit(1)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def small_archives(tmp_path_factory: pytest.TempPathFactory) -> Archives:
    train = {f"{wnid}.tar": class_archive(wnid, 2) for wnid in WNIDS}
    return write_archives(tmp_path_factory.mktemp("small"), train, VAL, VAL_CLASSES)


@pytest.fixture(scope="module")
def small_tree(small_archives: Archives, tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return extract(small_archives, tmp_path_factory.mktemp("small_extracted"))


@pytest.fixture(scope="module")
def steps(small_archives: Archives, tmp_path_factory: pytest.TempPathFactory) -> int:
    """Steps of an undisturbed run."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    status, steps = run_disturbed(small_archives, out, 0, kill)
    assert status == 0 and steps > 90
    return steps


def classes_in(out: Path) -> dict[str, tuple[int, int]]:
    """The class folders, and what would differ if one were made anew."""
    folders = [p for split in ("train", "val") for p in (out / split).glob("n*")]
    return {str(p.relative_to(out)): (p.stat().st_ino, p.stat().st_mtime_ns) for p in folders}


def check_whole(out: Path, tree: Tree) -> None:
    """Each class that has its name is whole, and there is nothing else but what is unfinished."""
    found = tree_of(out)
    done = set(classes_in(out))
    assert {n: c for n, c in found.items() if "/.unfinished/" not in n} == {
        n: c for n, c in tree.items() if n.rpartition("/")[0] in done
    }


@pytest.mark.parametrize("sync_bytes", [0, 2**28])
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kills=st.lists(st.floats(0, 1), min_size=1, max_size=3))
def test_killed_at_any_step(
    small_archives: Archives,
    small_tree: Tree,
    steps: int,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    sync_bytes: int,
    kills: list[float],
) -> None:
    monkeypatch.setattr("vip.data.imagenet._SYNC_BYTES", sync_bytes)
    out = tmp_path_factory.mktemp("killed") / "out"
    done: dict[str, tuple[int, int]] = {}
    for i, place in enumerate(kills):
        status, _ = run_disturbed(small_archives, out, 1 + int(place * (steps - 1)), kill)
        assert status == signal.SIGKILL or (i > 0 and status == 0), "it ended in an error"
        check_whole(out, small_tree)
        assert done.items() <= classes_in(out).items(), "a class that was done was done again"
        done = classes_in(out)
    report = make(small_archives, out)
    assert tree_of(out) == small_tree and done.items() <= classes_in(out).items()
    assert report.unpacked.total() == 6 - len(done) and not report.wrong and not report.unusual
    assert not list(out.glob("**/*unfinished*"))
    shutil.rmtree(out.parent)


def test_interrupted_at_every_eleventh_step(
    small_archives: Archives, small_tree: Tree, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vip.data.imagenet._SYNC_BYTES", 0)
    done = set()
    for at in range(1, steps, 11):
        out = tmp_path / str(at)
        status, _ = run_disturbed(small_archives, out, at, interrupt)
        assert os.waitstatus_to_exitcode(status) == 130
        check_whole(out, small_tree)
        assert not list(out.glob("**/.unfinished")), "what is unfinished takes room"
        done.add(len(classes_in(out)))
        make(small_archives, out)
        assert tree_of(out) == small_tree
    assert done >= {0, 1, 2, 3, 4, 5}


def test_two_at_once(
    small_archives: Archives, small_tree: Tree, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vip.data.imagenet._SYNC_BYTES", 0)
    receive, send = os.pipe()

    def wait() -> None:
        os.write(send, str(os.getpid()).encode())
        time.sleep(60)

    waiting = os.fork()
    if not waiting:
        run_disturbed(small_archives, tmp_path, steps // 2, wait)
        os._exit(0)
    first = int(os.read(receive, 100))
    try:
        before = sorted(tmp_path.rglob("*"))
        says(refusal(small_archives, tmp_path), "Another process works in", tmp_path)
        assert sorted(tmp_path.rglob("*")) == before and 0 < len(classes_in(tmp_path)) < 6
    finally:
        os.kill(first, signal.SIGKILL)
        os.waitpid(waiting, 0)
    make(small_archives, tmp_path)
    assert tree_of(tmp_path) == small_tree


@pytest.mark.parametrize("place", [1, 5, 9, 14])
def test_a_full_disk(
    archives: Archives, tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    monkeypatch.setattr("vip.data.imagenet._SYNC_BYTES", 0)
    copy, copies = shutil.copyfileobj, []

    def fill(source: Any, target: Any) -> None:
        copies.append(target.name)
        if len(copies) == place:
            target.write(source.read(10))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        copy(source, target)

    monkeypatch.setattr(shutil, "copyfileobj", fill)
    says(refusal(archives, tmp_path), tmp_path, "(No space left on device)", "make room", "run the same again")
    check_whole(tmp_path, tree)
    assert not list(tmp_path.glob("**/.unfinished"))
    done = classes_in(tmp_path)
    assert len(done) == (place > 2) + (place > 4) + (place > 6) + (place > 10) + (place > 12)
    report = make(archives, tmp_path)
    assert report.unpacked.total() == 6 - len(done) and tree_of(tmp_path) == tree
    assert done.items() <= classes_in(tmp_path).items()


# --- archives that are not what they should be


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def hostile_members(good: str) -> list[tarfile.TarInfo]:
    """What no archive may hold beside a file of the name `good`."""
    names = [
        *(f"/{good}", f"/tmp/{good}", f"../{good}", f"../../train/{good}", f"a/../../{good}", f"./{good}", f"a/{good}"),
        *(f"{good}/..", f"{good}/x", f"{good}\n", f" {good}", f"{good} ", good.lower() + ".", f"{good}.exe", "..", "/"),
        *(
            f"..\\{good}",
            f"C:{good}",
            f"//host/{good}",
            "\udcff" + good,
            re.sub(r"[0-9](?=\D*$)", "\N{ARABIC-INDIC DIGIT ONE}", good),
        ),
        *("README", ".lock", ".unfinished", "train.json", "n" * 300, "n99999999.tar", "n99999999_1.JPEG"),
        *("ILSVRC2012_val_00000000.JPEG", "ILSVRC2012_val_00000007.JPEG", "ILSVRC2012_val_1.JPEG"),
        *("n00000001.tar.gz", "N00000001.tar", "n00000001.TAR", "n00000002_.JPEG", "n00000002_1.jpeg"),
        *("n00000001_1.JPEG", "n00000002_1_1.JPEG", "n00000002_-1.JPEG"),
    ]
    links = [
        (tarfile.SYMTYPE, "/etc/passwd"),
        (tarfile.SYMTYPE, ".."),
        (tarfile.LNKTYPE, good),
        (tarfile.LNKTYPE, "../x"),
    ]
    kinds = [tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.GNUTYPE_SPARSE, b"Z"]
    new = good.replace("_21", "_22")
    return [
        *(member(name) for name in names),
        *(member(new, kind, target) for kind, target in links),
        *(member(new, kind) for kind in kinds),
        member(good),  # a second time
    ]


@pytest.mark.parametrize(
    "where, good", [("train", "n00000002.tar"), ("class", "n00000002_21.JPEG"), ("val", val_name(2))]
)
def test_hostile_members(
    archives: Archives, tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, good: str
) -> None:
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    monkeypatch.chdir(cwd)
    content = {"train": TRAIN, "val": VAL, "class": {"n00000002_21.JPEG": jpeg(1)}}[where]
    out, path = tmp_path / "deep" / "down" / "out", tmp_path / "hostile.tar"
    for bad in hostile_members(good):
        packed = pack(content, [bad])
        if where == "class":
            packed = pack({**TRAIN, "n00000002.tar": packed})
        path.write_bytes(packed)
        hostile = replace(archives, **{"val" if where == "val" else "train": path})
        message = refusal(hostile, out, checksum=False)
        says(
            message,
            repr(bad.name.rstrip("/") or "/")[:90] if bad.name != "/" else "holds",
            path,
            "expected plain files",
        )
        if where == "class":
            says(message, "n00000002.tar in")
            check_whole(out, tree)
            assert not (out / "train" / "n00000002").exists() and not list(out.glob("**/.unfinished"))
            shutil.rmtree(out)
        else:
            assert not (tmp_path / "deep").exists()
        assert not list(cwd.iterdir()) and set(os.listdir(tmp_path)) <= {"cwd", "deep", "hostile.tar"}


def test_the_wrong_order(archives: Archives, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for train, val, path, other in (
        (archives.val, archives.train, archives.train, "train"),
        (archives.train, archives.train, archives.train, "train"),
        (archives.val, archives.val, archives.val, "val"),
    ):
        message = refusal(replace(archives, train=train, val=val), out)
        says(message, path, f"as the archive of {other} does", "TRAIN_TAR VAL_TAR OUT")
        assert not out.exists()


@pytest.mark.parametrize("split", ["train", "val"])
def test_what_is_no_archive(archives: Archives, tmp_path: Path, split: str) -> None:
    path = tmp_path / "images.tar"
    out = tmp_path / "out"
    says(refusal(replace(archives, **{split: path}), out), path, "No such file")
    says(refusal(replace(archives, **{split: tmp_path}), out), tmp_path, "Is a directory")
    compressed = io.BytesIO()
    with tarfile.open(fileobj=compressed, mode="w:gz"):
        pass
    for content in (b"", b"half", bytes(512), bytes(10240), os.urandom(3000), compressed.getvalue(), pack({})):
        path.write_bytes(content)
        says(refusal(replace(archives, **{split: path}), out), path, "cut off, damaged or no tar archive", "again")
    assert not out.exists()


def damaged(archives: Archives, folder: Path, split: str, content: bytes) -> Archives:
    path = folder / "damaged.tar"
    path.write_bytes(content)
    return replace(archives, **{split: path})


def header_of(content: bytes | bytearray, name: str) -> int:
    """Where the header of a member begins."""
    return content.index(name.encode() + b"\0")


@pytest.mark.parametrize(
    "split, name, title",
    [
        ("train", "n00000001.tar", "damaged.tar"),
        ("train", "n00000003_7.JPEG", "n00000003.tar in "),
        ("val", val_name(6), "damaged.tar"),
    ],
)
def test_a_damaged_header_is_not_the_end(
    archives: Archives, tree: Tree, tmp_path: Path, split: str, name: str, title: str
) -> None:
    """tarfile itself would leave out, in silence, all that follows it; here what follows is most of the archive."""
    good = (archives.train if split == "train" else archives.val).read_bytes()
    place = header_of(good, name)
    for sector in (b"\xff" + good[place + 1 : place + 512], bytes(512), os.urandom(512)):
        archive = damaged(archives, tmp_path, split, good[:place] + sector + good[place + 512 :])
        says(refusal(archive, tmp_path / "out", checksum=False), title, "cut off, damaged")
        check_whole(tmp_path / "out", tree)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_cut_off_archive(archives: Archives, tree: Tree, tmp_path: Path, split: str) -> None:
    good = (archives.train if split == "train" else archives.val).read_bytes()
    end = len(good.rstrip(b"\0"))
    members = [header_of(good, name) for name in (TRAIN if split == "train" else VAL)]
    for length in {*members, *(m + 512 for m in members), *range(1, end, end // 40), end, end + 400}:
        archive = damaged(archives, tmp_path, split, good[:length])
        says(refusal(archive, tmp_path / "out", checksum=False), "damaged.tar is cut off, damaged")
        assert not (tmp_path / "out").exists()


def test_a_cut_off_class(archives: Archives, tree: Tree, tmp_path: Path) -> None:
    nested = TRAIN["n00000003.tar"]
    end = len(nested.rstrip(b"\0"))
    for length in (0, 100, 512, header_of(nested, "n00000003_14.JPEG"), 2000, end, end + 400):
        train = pack({**TRAIN, "n00000003.tar": nested[:length]})
        archive = damaged(archives, tmp_path, "train", train)
        message = refusal(archive, tmp_path / "out", checksum=False)
        says(message, "n00000003.tar in", "damaged.tar is cut off, damaged")
        check_whole(tmp_path / "out", tree)
        assert not (tmp_path / "out" / "train" / "n00000003").exists()


def mend_sum(content: bytearray, header: int) -> None:
    """Make the sum of a header right, as a forger does."""
    block = content[header : header + 148] + b" " * 8 + content[header + 156 : header + 512]
    content[header + 148 : header + 156] = b"%06o\0 " % sum(block)


@pytest.mark.parametrize("size", [-512, -1024, -(10**6), -(2**62), 10**6, 2**62, 2**63, 2**80])
@pytest.mark.parametrize(
    "split, name", [("train", "n00000001.tar"), ("train", "n00000003_7.JPEG"), ("val", val_name(6))]
)
def test_forged_sizes(archives: Archives, tree: Tree, tmp_path: Path, split: str, name: str, size: int) -> None:
    """They lead before the archive, far behind it, or to the same header for ever."""
    content = bytearray((archives.train if split == "train" else archives.val).read_bytes())
    header = header_of(content, name)
    sign = b"\xff" if size < 0 else b"\x80"
    content[header + 124 : header + 136] = sign + size.to_bytes(11, "big", signed=True)
    mend_sum(content, header)
    message = refusal(damaged(archives, tmp_path, split, bytes(content)), tmp_path / "out", checksum=False)
    says(message, tmp_path / "damaged.tar")
    assert "damaged or no tar archive" in message or "(twice)" in message
    check_whole(tmp_path / "out", tree)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), split=st.sampled_from(["train", "val"]), checksum=st.booleans())
def test_any_damage(
    small_archives: Archives,
    small_tree: Tree,
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
    split: str,
    checksum: bool,
) -> None:
    """Refused in one line, always by the checksum; without it there are at most other bytes or fewer images."""
    folder = tmp_path_factory.mktemp("damage")
    good = (small_archives.train if split == "train" else small_archives.val).read_bytes()
    headers = [m.start() - 257 for m in re.finditer(rb"ustar", good)]
    content = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.one_of(st.integers(0, len(good) - 1), st.sampled_from(headers).map(lambda h: h + 124)))
        part = data.draw(st.binary(min_size=1, max_size=12))
        content[place : place + len(part)] = part
    for header in headers:
        if data.draw(st.booleans()):
            mend_sum(content, header)
    archive = damaged(small_archives, folder, split, bytes(content))
    try:
        report = make(archive, folder / "out", checksum=checksum)
    except UserError as e:
        assert "\n" not in str(e) and content != good
    else:
        assert not checksum or content == good
        found = tree_of(folder / "out")
        assert found.keys() <= small_tree.keys() | {
            n for n in found if re.fullmatch(r"train/(n0{7}\d)/\1_\d+\.JPEG", n)
        }
        assert found.keys() == small_tree.keys() or report.unusual or split == "train"
    shutil.rmtree(folder)


# --- checksums


def test_a_wrong_checksum(archives: Archives, tmp_path: Path) -> None:
    for split, path in (("train", archives.train), ("val", archives.val)):
        right = archives.expected.checksums[split]
        wrong = {**archives.expected.checksums, split: "0" * 32}
        other = replace(archives, expected=replace(archives.expected, checksums=wrong))
        says(refusal(other, tmp_path), path, right, "0" * 32, "download it again", "--no-checksum")
        assert not tree_of(tmp_path)
        assert make(other, tmp_path / f"{split} out", checksum=False).unpacked == Counter(train=3, val=3)


def test_checksums_are_compared_once(archives: Archives, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archives = replace(archives, train=Path(shutil.copy(archives.train, tmp_path)))

    def compared() -> dict[str, int]:
        steps = Steps()
        make(archives, tmp_path / "out", progress=steps)
        assert {unit for desc, unit, _ in steps.done if "checksum" in desc} <= {"MiB"}
        return {split: len(items) for split in ("train", "val") if (items := steps.of(f"checksum of {split}"))}

    monkeypatch.setattr("vip.data.imagenet._CHUNK", 1000)
    chunks = {
        split: -(-path.stat().st_size // 1000) for split, path in (("train", archives.train), ("val", archives.val))
    }
    assert compared() == chunks
    assert compared() == {}
    os.utime(archives.train)
    assert compared() == {"train": chunks["train"]}
    before = archives.train.stat().st_mtime_ns
    with open(archives.train, "ab") as file:
        file.write(b"\0")
    os.utime(archives.train, ns=(before, before))
    says(refusal(archives, tmp_path / "out"), archives.train, "MD5")
    shutil.rmtree(tmp_path / "out")
    make(archives, tmp_path / "out", checksum=False)
    says(refusal(archives, tmp_path / "out"), archives.train, "MD5")


# --- counts


def test_class_folders_that_differ(archives: Archives, tree: Tree, tmp_path: Path) -> None:
    make(archives, tmp_path)
    (tmp_path / "train" / "n00000003" / "n00000003_7.JPEG").unlink()
    (tmp_path / "val" / "n00000001" / "Thumbs.db").write_bytes(b"")
    expected = [
        f"{tmp_path / 'val' / 'n00000001'} holds 3 files, its archive 2",
        f"{tmp_path / 'train' / 'n00000003'} holds 3 files, its archive 4",
    ]
    for record in tmp_path.glob("*.json"):
        assert make(archives, tmp_path).wrong == expected
        record.unlink()  # the archive is counted then
    assert make(archives, tmp_path).wrong == expected
    for name in ("val/n00000001", "train/n00000003"):
        shutil.rmtree(tmp_path / name)
    report = make(archives, tmp_path)
    assert not report.wrong and report.unpacked == Counter(train=1, val=1) and tree_of(tmp_path) == tree


def test_other_numbers_than_expected(archives: Archives, tmp_path: Path) -> None:
    """As of an archive that someone packed of fewer classes or images."""
    val = {name: VAL[name] for name in list(VAL)[:-1]}  # without one of n00000001
    fewer = write_archives(tmp_path, {"n00000001.tar": TRAIN["n00000001.tar"]}, val, VAL_CLASSES)
    fewer = replace(fewer, expected=archives.expected)
    expected = [
        f"{fewer.val} holds 5 images, expected 6",
        f"{fewer.val} holds another number of images than expected of 1 classes: n00000001 (1)",
        f"{fewer.train} holds 1 classes, expected 3",
        f"{fewer.train} holds 2 images, expected 9",
    ]
    for _ in range(2):
        report = make(fewer, tmp_path / "out", checksum=False)
        assert report.unusual == expected and not report.wrong
    assert report.images == Counter(train=2, val=5) and report.classes == Counter(train=1, val=3)


def test_other_archives_later(archives: Archives, tmp_path: Path) -> None:
    """What is known of an archive says nothing of another one at its place."""
    mine = replace(archives, train=Path(shutil.copy(archives.train, tmp_path / "train.tar")))
    make(mine, tmp_path / "out")
    mine.train.write_bytes(pack({**TRAIN, "n00000003.tar": class_archive("n00000003", 6)}))
    report = make(mine, tmp_path / "out", checksum=False)
    assert report.wrong == [f"{tmp_path / 'out' / 'train' / 'n00000003'} holds 4 files, its archive 6"]


# --- the place


@pytest.mark.parametrize("name", ["train/n99999999/x.JPEG", "val/notes.txt", "train/n00000001", "val/.hidden/x"])
def test_other_things_in_the_place(archives: Archives, tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text("mine")
    first = "/".join(name.split("/")[:2])
    says(refusal(archives, tmp_path), tmp_path / name.split("/")[0], first.split("/")[1], "another OUT")
    assert tree_of(tmp_path) == {name: digest(tmp_path / name)}


def test_a_link_in_the_place_of_a_class(archives: Archives, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / "val").mkdir(parents=True)
    (tmp_path / "out" / "val" / "n00000001").symlink_to(tmp_path / "elsewhere")
    says(refusal(archives, tmp_path / "out"), "n00000001")


def test_places_that_cannot_be(archives: Archives, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for out, reason in (("file", "Not a directory"), ("file/out", "Not a directory")):
        says(refusal(archives, tmp_path / out), tmp_path / out, reason)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train").write_text("mine")
    says(refusal(archives, tmp_path / "out"), tmp_path / "out", "File exists")
    for content in ("{", "[]", '{"sizes": 1}', "\udcff"):
        (tmp_path / "train.json").write_text(content, errors="surrogateescape")
        says(refusal(archives, tmp_path), tmp_path / "train.json", "remove it")


def test_too_little_room(archives: Archives, tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = sum(map(len, TRAIN.values()))
    needed = train + sum(map(len, VAL.values()))
    usage = type(shutil.disk_usage(tmp_path))
    free = needed - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - free, free))
    says(refusal(archives, tmp_path), f"{needed / 1e9:.2f} GB", "free", "make room")
    assert not tree_of(tmp_path)
    free = needed
    make(archives, tmp_path)
    shutil.rmtree(tmp_path / "train" / "n00000003")
    free = len(TRAIN["n00000003.tar"])
    make(archives, tmp_path)
    assert tree_of(tmp_path) == tree


# --- the classes of the validation images


def test_labels_of_the_validation_images() -> None:
    """The labels that people gave later (Beyer et al., 2020) hold the original one of 90 % of the images."""
    expected = ilsvrc2012()
    wnids = ImageNetInfo().label_names()
    assert expected.val_classes[:2] == ["n01751748", "n09193705"]
    assert Counter(expected.val_classes) == Counter(dict.fromkeys(wnids, 50))
    assert expected.train_images == 1_281_167
    assert expected.checksums == {
        "train": "1d675b47d978889d74fa0da5fadfb00e",
        "val": "29b22e2961454d5413ddabcf34fc5622",
    }
    names = [val_name(i) for i in range(1, 50_001)]
    assert list(expected.members("val")) == names
    real = RealLabelsImagenet(names).real_labels
    places = {wnid: i for i, wnid in enumerate(wnids)}
    agree = np.array([places[wnid] in real[n] for n, wnid in expected.members("val").items() if real[n]])
    assert len(agree) == 46_837 and 0.89 < agree.mean() < 0.91
    assert min(part.mean() for part in np.array_split(agree, 50)) > 0.85, "a part of the list is out of step"
    shifted = np.roll([places[wnid] for wnid in expected.val_classes], 1)
    assert np.mean([label in real[n] for n, label in zip(names, shifted, strict=True) if real[n]]) < 0.01
