"""Label maps in the published layout: what is written, what can be read, and what is refused."""

import json
import os
import pickle
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from map_files import identical, one_line, random_map, write_maps

from vip.errors import UserError
from vip.token_labels.geometry import Region
from vip.token_labels.maps import EXACT_CLASSES, RECORD, DamagedMap, FolderMaps, LabelMap, MapRecord, map_key, write_map

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")

GOOD = torch.stack((torch.randn(5, 3, 4), torch.arange(60.0).reshape(5, 3, 4))).half()


def read(root: Path, content: Any) -> LabelMap | None:
    """Save something as the map of `a/x` (bytes as they are) and read it."""
    path = root / "a" / "x.pt"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    return FolderMaps(root).read("a/x")


# --- the layout


def test_the_file_is_the_published_one(tmp_path: Path) -> None:
    label_map = random_map(shape=(5, 18, 17), classes=1000)
    write_map(tmp_path / f"{map_key('train/n01440764/n01440764_10026.JPEG')}.pt", label_map)
    content = torch.load(tmp_path / "n01440764" / "n01440764_10026.pt", weights_only=True)
    assert type(content) is torch.Tensor and content.dtype is torch.float16 and content.shape == (2, 5, 18, 17)
    assert content.is_contiguous() and not content.requires_grad
    torch.testing.assert_close(content[0], label_map.values, rtol=0, atol=0)
    torch.testing.assert_close(content[1].long(), label_map.indices.long(), rtol=0, atol=0)
    assert os.listdir(tmp_path / "n01440764") == ["n01440764_10026.pt"]


def test_what_torch_saves_in_the_layout_is_read(tmp_path: Path) -> None:
    label_map = read(tmp_path, GOOD)
    assert label_map is not None
    assert label_map.values.dtype is torch.float16 and label_map.indices.dtype is torch.int32
    assert identical(label_map, LabelMap(GOOD[0], GOOD[1].int()))


@pytest.mark.parametrize("shape", [(5, 18, 18), (1, 1, 1), (3, 2, 7), (10, 1, 5)])
def test_round_trip(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    label_map = random_map(shape=shape, classes=EXACT_CLASSES + 1)
    label_map.values[0, 0, 0] = -0.0
    write_map(tmp_path / "a" / "x.pt", label_map)
    assert identical(FolderMaps(tmp_path).read("a/x"), label_map)


def test_every_index_that_float16_holds_exactly(tmp_path: Path) -> None:
    indices = torch.arange(EXACT_CLASSES + 1, dtype=torch.int32).reshape(-1, 1, 1)
    write_map(tmp_path / "a" / "x.pt", LabelMap(torch.zeros(indices.shape).half(), indices))
    assert FolderMaps(tmp_path).read("a/x").indices.equal(indices)  # type: ignore[union-attr]
    assert int((indices + 1).half().max()) == EXACT_CLASSES  # the next one would be another class
    with pytest.raises(AssertionError, match="float16"):
        write_map(tmp_path / "a" / "y.pt", LabelMap(torch.zeros(indices.shape).half(), indices + 1))
    assert not (tmp_path / "a" / "y.pt").exists()


def test_maps_of_any_memory_layout(tmp_path: Path) -> None:
    transposed = LabelMap(*(x.transpose(0, 2) for x in random_map(shape=(4, 4, 5))))  # as of a channels-last top-k
    write_map(tmp_path / "a" / "x.pt", transposed)
    assert identical(FolderMaps(tmp_path).read("a/x"), transposed)
    assert identical(read(tmp_path, GOOD.transpose(2, 3)), LabelMap(GOOD[0].mT, GOOD[1].mT.int()))


def test_a_parameter_is_read_without_its_gradient(tmp_path: Path) -> None:
    label_map = read(tmp_path, torch.nn.Parameter(GOOD))
    assert label_map is not None and not label_map.values.requires_grad  # a loader process could not hand it over


def test_folder_of_maps(tmp_path: Path) -> None:
    keys = ["b/1", "b/2", "a/zwölf", "a/x_10", "c d/x y"]
    maps = write_maps(tmp_path, keys)
    (tmp_path / "readme.txt").write_text("not a class folder")
    (tmp_path / "b" / "notes.txt").write_text("not a map")
    (tmp_path / "b" / ".3.pt.unfinished").write_bytes(b"")
    (tmp_path / ".cache").mkdir()
    folder = FolderMaps(tmp_path)
    assert list(folder.keys()) == sorted(keys) and folder.classes() == {"a", "b", "c d"} and folder.record is None
    for key, label_map in maps.items():
        assert identical(folder.read(key), label_map)
    assert folder.read("a/11") is None and folder.read("d/1") is None


@pytest.mark.parametrize(
    "filename, key",
    [
        ("n01440764/n01440764_10026.JPEG", "n01440764/n01440764_10026"),
        ("/data/train/dog/1.png", "dog/1"),
        ("dog/a.b.c.jpg", "dog/a"),
        ("dog/1.5.tar.png", "dog/1"),
        ("dog/no extension", "dog/no extension"),
        ("./dog/1.png", "dog/1"),
        ("v1.2/cat.v3/x.y.jpg", "cat.v3/x"),  # dots of the folder stay
        ("Hündchen/größe.jpg", "Hündchen/größe"),
    ],
)
def test_map_key(filename: str, key: str) -> None:
    assert map_key(filename) == key
    assert map_key(f"/somewhere/{filename}") == key


@pytest.mark.parametrize("filename", ["n01440764_10026.JPEG", "/1.png", "../1.png", "a/../1.png"])
def test_no_key_without_a_class_folder(tmp_path: Path, filename: str) -> None:
    """The key of a file in no folder would be an absolute path."""
    with pytest.raises(UserError) as e:
        map_key(filename)
    assert filename in one_line(e.value) and "class folder" in str(e.value)


# --- broken files


def test_truncated_files(tmp_path: Path) -> None:
    write_map(tmp_path / "a" / "x.pt", random_map())
    whole = (tmp_path / "a" / "x.pt").read_bytes()
    for length in {1, 2, 4, 30, 64, *range(0, len(whole), 97), len(whole) - 30, len(whole) - 1}:
        with pytest.raises(DamagedMap) as e:
            read(tmp_path, whole[:length])
        assert str(e.value) and "\n" not in str(e.value)


def test_an_empty_file_is_called_empty(tmp_path: Path) -> None:
    with pytest.raises(DamagedMap, match="empty"):
        read(tmp_path, b"")


@pytest.mark.parametrize(
    "content",
    [b"no tensor\n" * 100, bytes(2000), b"\x80", b"PK\x03\x04" + bytes(500), b"\x89PNG\r\n\x1a\n" + bytes(99)],
)
def test_other_files(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DamagedMap):
        read(tmp_path, content)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_garbage(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    try:
        read(tmp_path_factory.getbasetemp(), content)
    except DamagedMap:
        return
    except UserError as e:  # what looks like code, or is a pickle of something else
        one_line(e)
        return
    pytest.fail(f"{content!r} was read as a map")


def test_a_folder_in_place_of_a_map(tmp_path: Path) -> None:
    (tmp_path / "a" / "x.pt").mkdir(parents=True)
    with pytest.raises(DamagedMap):
        FolderMaps(tmp_path).read("a/x")


def spoilt(part: int, value: float) -> torch.Tensor:
    content = GOOD.clone()
    content[part, 2, 1, 1] = value
    return content


@pytest.mark.parametrize(
    "content, words",
    [
        (GOOD.float(), "float32 [2, 5, 3, 4]"),
        (GOOD.bfloat16(), "bfloat16 [2, 5, 3, 4]"),
        (GOOD.double(), "float64 [2, 5, 3, 4]"),
        (GOOD.int(), "int32 [2, 5, 3, 4]"),
        (GOOD[0], "float16 [5, 3, 4]"),
        (GOOD[None], "float16 [1, 2, 5, 3, 4]"),
        (GOOD[:1], "float16 [1, 5, 3, 4]"),
        (GOOD[[0, 1, 1]], "float16 [3, 5, 3, 4]"),
        (GOOD[:, :0], "float16 [2, 0, 3, 4]"),
        (torch.tensor(1.0).half(), "float16 []"),
        (GOOD.to_sparse(), "Tensor"),
        (GOOD.to("meta"), "Tensor"),
        ([GOOD[0], GOOD[1]], "list"),
        ({"map": GOOD}, "dict"),
        (None, "NoneType"),
        ("text", "str"),
        (spoilt(0, float("nan")), "not finite"),
        (spoilt(0, float("inf")), "not finite"),
        (spoilt(0, float("-inf")), "not finite"),
        (spoilt(1, 2.5), "no whole numbers"),
        (spoilt(1, -1), "no whole numbers"),
        (spoilt(1, float("nan")), "no whole numbers"),
        (spoilt(1, float("inf")), "no whole numbers"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_is_no_label_map(tmp_path: Path, content: Any, words: str) -> None:
    with pytest.raises(UserError) as e:
        read(tmp_path, content)
    message = one_line(e.value)
    assert words in message and str(tmp_path / "a" / "x.pt") in message


class Payload:
    """Makes a folder when it is unpickled by a reader that runs code."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("kind", ["torch", "old torch", "pickle", "beside a map"])
def test_code_is_refused_and_not_run(tmp_path: Path, kind: str) -> None:
    marker = tmp_path / "pwned"
    path = tmp_path / "maps" / "a" / "x.pt"
    path.parent.mkdir(parents=True)
    content = {"map": GOOD, "more": Payload(marker)} if kind == "beside a map" else Payload(marker)
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind != "old torch")
    with pytest.raises(UserError) as e:
        FolderMaps(tmp_path / "maps").read("a/x")
    assert "mkdir" in one_line(e.value) and str(path) in str(e.value) and "weights_only" not in str(e.value)
    assert not marker.exists()
    torch.load(path, weights_only=False) if kind != "pickle" else pickle.loads(path.read_bytes())
    assert marker.exists()  # the payload is one that a careless reader runs


def test_code_in_a_protocol_that_torch_does_not_read(tmp_path: Path) -> None:
    marker = tmp_path / "pwned"
    with pytest.raises(DamagedMap):
        read(tmp_path, pickle.dumps(Payload(marker), protocol=4))
    assert not marker.exists()


# --- writing


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("write failed")])
def test_a_failing_write_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    old, path = random_map(1), tmp_path / "a" / "x.pt"
    write_map(path, old)

    def save(content: Any, file: IO[bytes]) -> None:
        file.write(b"half of it")
        raise error

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(type(error)):
        write_map(path, random_map(2))
    with pytest.raises(type(error)):
        write_map(tmp_path / "a" / "y.pt", random_map(2))
    assert os.listdir(path.parent) == ["x.pt"]
    assert identical(FolderMaps(tmp_path).read("a/x"), old)


def test_a_map_is_replaced(tmp_path: Path) -> None:
    for seed in (1, 2):
        write_map(tmp_path / "a" / "x.pt", random_map(seed))
    assert identical(FolderMaps(tmp_path).read("a/x"), random_map(2))


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a file where the class folder should be")
    with pytest.raises(OSError):
        write_map(tmp_path / "a" / "x.pt", random_map())


# --- the record

RECORDS = [
    MapRecord(Region((1, 1))),
    MapRecord(Region((288, 224), 0.875, "squash"), 3, ["blau", "grün", "rot"], "vip_s7"),
    MapRecord(Region((64, 96), 1.2, "border"), num_classes=21841),
]


@pytest.mark.parametrize("record", RECORDS)
def test_record_round_trip(tmp_path: Path, record: MapRecord) -> None:
    root = tmp_path / "yet" / "to be"
    record.write(root)
    assert MapRecord.read(root) == record == FolderMaps(root).record
    assert os.listdir(root) == [RECORD]
    json.loads((root / RECORD).read_text(encoding="utf-8"))
    RECORDS[0].write(root)
    assert MapRecord.read(root) == RECORDS[0]


def test_no_record(tmp_path: Path) -> None:
    assert MapRecord.read(tmp_path) is None and MapRecord.read(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '"text"',
        "[" * 100_000,
        "{}",
        '{"region": 5}',
        '{"region": {}}',
        '{"region": {"img_size": 5}}',
        '{"region": {"img_size": "ab"}}',
        '{"region": {"img_size": [224]}}',
        '{"region": {"img_size": [0, 0]}}',
        '{"region": {"img_size": [1, 1], "crop_pct": 0}}',
        '{"region": {"img_size": [1, 1], "crop_pct": NaN}}',
        '{"region": {"img_size": [1, 1], "crop_pct": "all"}}',
        '{"region": {"img_size": [1, 1], "crop_mode": "other"}}',
        '{"region": {"img_size": [1, 1], "zoom": 2}}',
        '{"region": {"img_size": [1, 1]}, "num_classes": "10"}',
        '{"region": {"img_size": [1, 1]}, "num_classes": 0}',
        '{"region": {"img_size": [1, 1]}, "num_classes": "' + "a" * 1000 + '"}',
        '{"region": {"img_size": [1, 1]}, "classes": 10}',
        '{"region": {"img_size": [1, 1]}, "classes": [1, 2]}',
        '{"region": {"img_size": [1, 1]}, "classes": ["a", "a"]}',
        '{"region": {"img_size": [1, 1]}, "licence": "free"}',
        b"\xff\xfe\x00",
    ],
    ids=lambda x: str(x)[:60],
)
def test_damaged_record(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / RECORD
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as e:
        FolderMaps(tmp_path)
    assert str(path) in one_line(e.value) and "damaged" in str(e.value)


def test_a_truncated_record(tmp_path: Path) -> None:
    RECORDS[1].write(tmp_path)
    whole = (tmp_path / RECORD).read_bytes().rstrip()
    for length in range(len(whole)):
        (tmp_path / RECORD).write_bytes(whole[:length])
        with pytest.raises(UserError):
            MapRecord.read(tmp_path)


def test_a_failing_write_leaves_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RECORDS[1].write(tmp_path)

    def fsync(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError):
        RECORDS[0].write(tmp_path)
    assert MapRecord.read(tmp_path) == RECORDS[1] and os.listdir(tmp_path) == [RECORD]
