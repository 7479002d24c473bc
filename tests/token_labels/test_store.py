"""Sets of label maps: opened, converted without loss, checked, compared."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from map_files import identical, one_line, random_map, write_maps

from vip.errors import UserError
from vip.token_labels.geometry import Region
from vip.token_labels.maps import FolderMaps, LabelMap, LabelMaps, MapRecord, write_map
from vip.token_labels.packing import PackedMaps, shard_path, write_shard
from vip.token_labels.store import check, open_label_maps, pack, unpack

KEYS = ["a/1", "a/2", "b/3", "b/4", "ü/5"]
RECORD = MapRecord(Region((64, 64), 0.9), 10, model="vip_s7")


@pytest.fixture
def published(tmp_path: Path) -> Path:
    write_maps(tmp_path / "published", KEYS)
    RECORD.write(tmp_path / "published")
    return tmp_path / "published"


@pytest.fixture
def packed(published: Path, tmp_path: Path) -> Path:
    pack(published, tmp_path / "packed")
    return tmp_path / "packed"


@pytest.fixture(params=["published", "packed"])
def either(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def assert_same(a: LabelMaps, b: LabelMaps) -> None:
    assert set(a.keys()) == set(b.keys()) and a.record == b.record
    assert all(identical(a.read(key), b.read(key)) for key in a.keys())


def refused(function: Callable[..., object], *args: object) -> str:
    with pytest.raises(UserError) as e:
        function(*args)
    return one_line(e.value)


# --- opening


def test_the_layout_is_recognised(published: Path, packed: Path) -> None:
    assert isinstance(open_label_maps(published), FolderMaps) and isinstance(open_label_maps(str(packed)), PackedMaps)
    assert_same(open_label_maps(published), open_label_maps(packed))


@pytest.mark.parametrize("name", ["nowhere", "a name longer than any file has " * 10])
def test_a_missing_folder(tmp_path: Path, name: str) -> None:
    message = refused(open_label_maps, tmp_path / name)
    assert str(tmp_path / name) in message and "generate-label" in message


def test_a_file_in_place_of_a_folder(published: Path) -> None:
    file = published / "a" / "1.pt"
    assert str(file) in refused(open_label_maps, file)


@pytest.mark.parametrize("content", ["nothing", "a record", "empty folders", "images", "loose maps"])
def test_a_folder_without_maps(tmp_path: Path, content: str) -> None:
    if content == "a record":
        RECORD.write(tmp_path)  # what is left where generation stopped at once
    elif content == "empty folders":
        (tmp_path / "a").mkdir()
    elif content == "images":  # the folders mixed up
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "1.jpg").write_bytes(b"")
    elif content == "loose maps":
        write_map(tmp_path / "1.pt", random_map())
    message = refused(open_label_maps, tmp_path)
    assert str(tmp_path) in message and "no label maps" in message
    assert "no label maps" in refused(pack, tmp_path, tmp_path.with_name("target"))
    assert "no label maps" in refused(check, tmp_path)


# --- converting


def test_there_and_back(published: Path, packed: Path, tmp_path: Path) -> None:
    assert unpack(packed, tmp_path / "back") == len(KEYS)
    assert_same(open_label_maps(published), open_label_maps(tmp_path / "back"))
    for key in KEYS:
        tensors = [torch.load(root / f"{key}.pt", weights_only=True) for root in (published, tmp_path / "back")]
        assert tensors[0].view(torch.int16).equal(tensors[1].view(torch.int16))


def test_negative_zero_comes_back(tmp_path: Path) -> None:
    values, indices = random_map()
    values[0] = -0.0
    write_map(tmp_path / "maps" / "a" / "x.pt", LabelMap(values, indices))
    pack(tmp_path / "maps", tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "back")
    content = torch.load(tmp_path / "back" / "a" / "x.pt", weights_only=True)
    assert content[0, 0].view(torch.int16).eq(-(2**15)).all()


def test_the_same_layout_again(published: Path, packed: Path, tmp_path: Path) -> None:
    assert unpack(published, tmp_path / "copy") == pack(packed, tmp_path / "repacked") == len(KEYS)
    assert_same(open_label_maps(published), open_label_maps(tmp_path / "copy"))
    assert_same(open_label_maps(published), open_label_maps(tmp_path / "repacked"))


def test_maps_without_a_record(published: Path, tmp_path: Path) -> None:
    (published / "label_maps.json").unlink()
    pack(published, tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "back")
    assert open_label_maps(tmp_path / "packed").record is None and open_label_maps(tmp_path / "back").record is None


def test_progress_sees_every_key(either: Path, tmp_path: Path) -> None:
    for function, args in ((pack, [tmp_path / "x"]), (unpack, [tmp_path / "y"]), (check, [None, None])):
        seen: list[str] = []

        def progress(keys: list[str], seen: list[str] = seen) -> list[str]:
            seen += keys
            return keys

        function(either, *args, progress)  # type: ignore[operator]
        assert sorted(seen) == KEYS


@pytest.mark.parametrize("convert", [pack, unpack])
def test_a_target_that_holds_something(either: Path, tmp_path: Path, convert: Callable) -> None:
    other = tmp_path / "other"
    other.mkdir()
    assert convert(either, other) == len(KEYS)  # an empty folder will do
    before = {path: path.stat().st_mtime_ns for path in other.rglob("*")}
    for target in (other, either):
        assert str(target) in refused(convert, either, target)
    assert {path: path.stat().st_mtime_ns for path in other.rglob("*")} == before
    (tmp_path / "file").write_text("a file")
    assert str(tmp_path / "file") in refused(convert, either, tmp_path / "file")


@pytest.mark.parametrize("convert", [pack, unpack])
def test_a_damaged_map_is_not_converted(published: Path, tmp_path: Path, convert: Callable) -> None:
    (published / "b" / "3.pt").write_bytes(b"")
    message = refused(convert, published, tmp_path / "target")
    assert str(published / "b" / "3") in message and "damaged" in message


def test_maps_of_several_shapes_are_not_packed(published: Path, tmp_path: Path) -> None:
    write_map(published / "b" / "4.pt", random_map(shape=(5, 4, 5)))
    message = refused(pack, published, tmp_path / "target")
    assert "b/4" in message and "[5, 4, 5]" in message


def test_classes_that_the_published_layout_cannot_hold(tmp_path: Path) -> None:
    write_shard(shard_path(tmp_path / "maps", 0), [("a/1", random_map(1)), ("a/2", random_map(2, classes=21_841))])
    message = refused(unpack, tmp_path / "maps", tmp_path / "target")
    assert "a/2" in message and "21840" in message and "2048" in message
    assert pack(tmp_path / "maps", tmp_path / "again") == 2  # packed they can stay
    assert_same(open_label_maps(tmp_path / "maps"), open_label_maps(tmp_path / "again"))


# --- checking


def test_check_good(either: Path) -> None:
    report = check(either, KEYS, either)
    assert report.good and report.maps == len(KEYS) and report.layout == either.name
    assert report.shapes == {(5, 4, 4)} and report.highest_class == 9
    assert report.damaged == report.missing == report.unused == report.different == []
    assert report.bytes == sum(path.stat().st_size for path in either.rglob("*") if path.is_file())
    assert check(either).good


@pytest.mark.parametrize("content", [b"", b"garbage", "half"])
def test_check_damaged_files(published: Path, content: bytes | str) -> None:
    file = published / "b" / "3.pt"
    file.write_bytes(file.read_bytes()[:-200] if isinstance(content, str) else content)
    report = check(published, KEYS)
    assert not report.good and report.maps == len(KEYS) - 1
    assert len(report.damaged) == 1 and report.damaged[0].startswith("b/3: ")
    assert not report.missing and not report.unused  # it is there, if damaged


def test_check_damaged_shard(packed: Path, published: Path) -> None:
    path = shard_path(packed, 0)
    content = bytearray(path.read_bytes())
    start = content.index(b"x\x9c")  # of the first map's compressed data
    content[start + 40 : start + 44] = bytes(4)
    path.write_bytes(content)
    report = check(packed, KEYS, published)
    assert not report.good and [line.partition(":")[0] for line in report.damaged] == ["a/1"]
    assert report.maps == len(KEYS) - 1 and not report.missing
    # the other way round, the damaged map is one that differs
    assert check(published, None, packed).different == ["a/1"]


def test_check_missing_and_unused(either: Path) -> None:
    report = check(either, ["a/1", "a/0", "b/3", "z/9", "ü/5"])
    assert report.missing == ["a/0", "z/9"] and report.unused == ["a/2", "b/4"] and not report.good
    report = check(either, KEYS[1:])
    assert report.unused == ["a/1"] and report.good  # to have more than is needed does no harm


def test_check_two_sets(published: Path, packed: Path, tmp_path: Path) -> None:
    assert check(published, None, packed).good and check(packed, None, published).good
    other = shutil.copytree(published, tmp_path / "other")
    values, indices = random_map(0)
    write_map(other / "a" / "1.pt", LabelMap(values, indices.roll(1)))
    values, indices = random_map(1)
    values.view(torch.int16)[0, 0, 0] += 1  # the least difference
    write_map(other / "a" / "2.pt", LabelMap(values, indices))
    write_map(other / "b" / "3.pt", random_map(2, (5, 4, 5)))
    (other / "b" / "4.pt").unlink()
    write_map(other / "ü" / "6.pt", random_map())
    for one in (published, packed):
        report = check(one, None, other)
        assert report.different == ["a/1", "a/2", "b/3", "b/4", "ü/6"] and not report.good
        assert report.maps == len(KEYS) and not report.damaged


def test_check_shapes(published: Path) -> None:
    write_map(published / "b" / "4.pt", random_map(shape=(5, 4, 5)))
    report = check(published)
    assert report.shapes == {(5, 4, 4), (5, 4, 5)} and not report.good and report.maps == len(KEYS)


def test_check_highest_class(tmp_path: Path) -> None:
    write_shard(shard_path(tmp_path, 0), [("a/1", random_map(1, classes=21_841)), ("a/2", random_map(2))])
    assert check(tmp_path).highest_class == 21_840


def test_check_refuses_what_is_no_label_map(published: Path) -> None:
    torch.save(torch.zeros(3), published / "b" / "3.pt")
    assert str(published / "b" / "3.pt") in refused(check, published)
    assert "b" in refused(check, published.parent / "nowhere")
    assert "nowhere" in refused(check, published, None, published.parent / "nowhere")
