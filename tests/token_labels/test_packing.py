"""Packed label maps: nothing is lost, damage is noticed, and half the space is enough."""

import os
import pickle
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from map_files import identical, one_line, random_map, write_maps
from safetensors.numpy import load_file, save_file
from torch.utils.data import DataLoader, Dataset

from vip.errors import UserError
from vip.token_labels.geometry import Region
from vip.token_labels.maps import DamagedMap, FolderMaps, LabelMap, MapRecord, write_map
from vip.token_labels.packing import PackedMaps, decode, encode, shard_path, shards_in, write_shard
from vip.token_labels.store import pack

SHAPE = (5, 4, 4)


# --- one map

shapes = st.tuples(st.integers(1, 10), st.integers(1, 20), st.integers(1, 20))


@settings(max_examples=200, deadline=None)
@given(shapes, st.integers(1, 30_000), st.integers(0, 2**32 - 1))
def test_lossless(shape: tuple[int, int, int], classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**16, shape, dtype=np.uint16)
    bits[(bits & 0x7C00) == 0x7C00] &= 0x83FF  # infinity and NaN become numbers, zero and subnormal ones
    indices = torch.from_numpy(rng.integers(0, classes, shape, dtype=np.int32))
    label_map = LabelMap(torch.from_numpy(bits.view(np.float16)), indices)
    assert identical(decode(encode(label_map), shape), label_map)


def test_every_finite_float16() -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(torch.float16)
    values = values[values.isfinite()]
    assert len(values) == 2 * 31 * 1024 and {0, -(2**15)} <= set(values.view(torch.int16).tolist())  # both zeros
    label_map = LabelMap(values.reshape(31, 64, 32), torch.zeros(31, 64, 32, dtype=torch.int32))
    assert identical(decode(encode(label_map), (31, 64, 32)), label_map)


@pytest.mark.parametrize("count", [1, 255, 256, 257, 2049, 30_000])
def test_as_many_classes_as_there_are(count: int) -> None:
    """A byte counts 256 classes; beyond 2048 the published layout would round."""
    indices = torch.arange(count, dtype=torch.int32).flip(0).reshape(1, 1, -1)
    label_map = LabelMap(torch.randn(1, 1, count).half(), indices)
    assert identical(decode(encode(label_map), (1, 1, count)), label_map)


def test_large_indices_are_exact() -> None:
    indices = torch.tensor([2047, 2048, 2049, 2051, 21_841, 65_535, 65_536, 2**31 - 1], dtype=torch.int32)
    label_map = LabelMap(torch.randn(2, 2, 2).half(), indices.reshape(2, 2, 2))
    assert identical(decode(encode(label_map), (2, 2, 2)), label_map)


def test_any_memory_layout() -> None:
    label_map = random_map(shape=(6, 4, 5), classes=700)
    expected = decode(encode(LabelMap(*(x.contiguous() for x in map(torch.Tensor.mT.__get__, label_map)))), (6, 5, 4))
    assert identical(decode(encode(LabelMap(label_map.values.mT, label_map.indices.mT)), (6, 5, 4)), expected)
    repeated = LabelMap(torch.tensor(1.5).half().expand(SHAPE), torch.tensor(7, dtype=torch.int32).expand(SHAPE))
    assert identical(decode(encode(repeated), SHAPE), repeated)


def test_what_is_read_can_be_written_to() -> None:
    """PyTorch warns of arrays that cannot, and collation may reuse them."""
    label_map = decode(encode(random_map()), SHAPE)
    label_map.values.zero_(), label_map.indices.zero_()


# --- damage


def intact_or_damaged(packed: bytes, label_map: LabelMap) -> bool:
    """Whether damage is noticed; bits that carry nothing may change nothing."""
    try:
        assert identical(decode(packed, SHAPE), label_map)
    except DamagedMap as e:
        assert "\n" not in str(e)
        return True
    return False


@pytest.mark.parametrize("classes", [1, 10, 30_000])
def test_every_flipped_bit_is_noticed(classes: int) -> None:
    label_map = random_map(classes=classes)
    packed = encode(label_map)
    unnoticed = 0
    for i in range(8 * len(packed)):
        flipped = bytearray(packed)
        flipped[i // 8] ^= 1 << i % 8
        unnoticed += not intact_or_damaged(bytes(flipped), label_map)
    assert unnoticed < 8  # the last byte of compressed data is filled up


def test_every_truncation_is_noticed() -> None:
    label_map = random_map()
    packed = encode(label_map)
    for length in range(len(packed)):
        assert intact_or_damaged(packed[:length], label_map)
        assert intact_or_damaged(packed[len(packed) - length :], label_map)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300), st.booleans(), shapes)
def test_garbage(content: bytes, compressed: bool, shape: tuple[int, int, int]) -> None:
    """Bytes that somebody else compressed, too."""
    try:
        label_map = decode(zlib.compress(content) if compressed else content, shape)
    except DamagedMap:
        return
    assert compressed and label_map.values.isfinite().all() and int(label_map.indices.min()) >= 0


@pytest.mark.parametrize("shape", [(4, 4, 4), (5, 4, 5), (5, 18, 18), (1, 1, 1)])
def test_a_map_of_another_shape(shape: tuple[int, int, int]) -> None:
    with pytest.raises(DamagedMap, match="length"):
        decode(encode(random_map()), shape)


def test_contents_that_no_label_map_has() -> None:
    values, indices = random_map()
    for bad in (float("nan"), float("inf")):
        spoilt = values.clone()
        spoilt[1, 2, 3] = bad
        with pytest.raises(DamagedMap, match="not finite"):
            decode(encode(LabelMap(spoilt, indices)), SHAPE)
    with pytest.raises(DamagedMap, match="negative"):
        decode(encode(LabelMap(values, indices - 1)), SHAPE)
    beyond = zlib.compress(np.array([1, 7], "<u4").tobytes() + bytes([1]) * 80 + bytes(160))  # a place past the list
    with pytest.raises(DamagedMap):
        decode(beyond, SHAPE)


# --- shards

KEYS = [
    "a/1",
    "a/10",
    "a/zwölf",
    "b/x",
    "b/a_rather_long_name_of_an_image_0001",
    "日本/犬",
    "c d/e f",
    "b/y",
    "ä/ö",
    "z/9",
]


def write_packed(root: Path, keys: list[str], shard_size: int = 3, **options: Any) -> dict[str, LabelMap]:
    maps = {key: random_map(i, **options) for i, key in enumerate(keys)}
    items = list(maps.items())
    for number, start in enumerate(range(0, len(items), shard_size)):
        write_shard(shard_path(root, number), items[start : start + shard_size])
    return maps


def test_shards(tmp_path: Path) -> None:
    maps = write_packed(tmp_path / "maps", KEYS)
    packed = PackedMaps(tmp_path / "maps")
    assert [path.name for path in shards_in(tmp_path / "maps")] == [f"maps-{i:05}.safetensors" for i in range(4)]
    assert sorted(packed.keys()) == sorted(KEYS)
    assert packed.classes() == {"a", "b", "c d", "日本", "ä", "z"} and packed.record is None
    for key, label_map in maps.items():
        assert identical(packed.read(key), label_map), key


@pytest.mark.parametrize(
    "key", ["", "a", "a/", "a/2", "a/100", "zz/9", "a/zwölf und mehr als jeder andere Schlüssel" * 3]
)
def test_no_map(tmp_path: Path, key: str) -> None:
    write_packed(tmp_path, KEYS)
    assert PackedMaps(tmp_path).read(key) is None


def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    key = os.fsdecode(b"caf\xe9/\xff1")
    maps = write_packed(tmp_path, ["a/1", key])
    packed = PackedMaps(tmp_path)
    assert set(packed.keys()) == {"a/1", key} and identical(packed.read(key), maps[key])


def test_several_shards_and_the_record_are_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vip.token_labels.store.SHARD_MAPS", 4)
    maps = write_maps(tmp_path / "maps", KEYS)
    record = MapRecord(Region((32, 32), 0.9), 10, model="vip_s7")
    record.write(tmp_path / "maps")
    assert pack(tmp_path / "maps", tmp_path / "packed") == len(KEYS)
    packed = PackedMaps(tmp_path / "packed")
    assert len(packed.shards) == 3 and packed.record == record
    assert sorted(packed.keys()) == sorted(KEYS)
    assert all(identical(packed.read(key), label_map) for key, label_map in maps.items())
    # as many maps as fill the shards leave no empty one
    monkeypatch.setattr("vip.token_labels.store.SHARD_MAPS", 5)
    pack(tmp_path / "maps", tmp_path / "again")
    assert len(shards_in(tmp_path / "again")) == 2


def test_shards_of_two_shapes(tmp_path: Path) -> None:
    write_shard(shard_path(tmp_path, 0), [("a/1", random_map(1))])
    write_shard(shard_path(tmp_path, 1), [("a/2", random_map(2, (3, 2, 7)))])
    packed = PackedMaps(tmp_path)
    assert identical(packed.read("a/1"), random_map(1)) and identical(packed.read("a/2"), random_map(2, (3, 2, 7)))
    with pytest.raises(UserError) as e:
        write_shard(shard_path(tmp_path, 2), [("a/3", random_map(1)), ("b/4", random_map(2, (3, 2, 7)))])
    assert "b/4" in one_line(e.value) and "[3, 2, 7]" in str(e.value) and "[5, 4, 4]" in str(e.value)
    assert not shard_path(tmp_path, 2).exists()


def test_the_same_permissions_as_any_other_file(tmp_path: Path) -> None:
    """Label maps are made by one user and read by many."""
    umask = os.umask(0o022)
    try:
        write_packed(tmp_path, ["a/1"])
    finally:
        os.umask(umask)
    assert shard_path(tmp_path, 0).stat().st_mode & 0o777 == 0o644


def test_a_failing_write_leaves_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maps = write_packed(tmp_path, ["a/1"])

    def fsync(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    for number in (0, 1):
        with pytest.raises(OSError):
            write_shard(shard_path(tmp_path, number), [("b/2", random_map(7))])
    assert os.listdir(tmp_path) == ["maps-00000.safetensors"]
    assert identical(PackedMaps(tmp_path).read("a/1"), maps["a/1"])


def test_an_unfinished_shard_is_not_read(tmp_path: Path) -> None:
    write_packed(tmp_path, ["a/1"])
    (tmp_path / ".maps-00001.safetensors.unfinished").write_bytes(b"half of it")
    assert list(PackedMaps(tmp_path).keys()) == ["a/1"]


# --- processes


class OfMaps(Dataset):
    def __init__(self, maps: PackedMaps) -> None:
        self.maps, self.keys = maps, sorted(maps.keys())

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(self.maps.read(self.keys[index]))  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize("context, workers", [("fork", 2), ("spawn", 1)])
def test_loader_processes(tmp_path: Path, context: str, workers: int) -> None:
    maps = write_packed(tmp_path, KEYS)
    packed = PackedMaps(tmp_path)
    packed.read("a/1")  # has a shard open, which must not be handed over
    loader = DataLoader(OfMaps(packed), batch_size=4, num_workers=workers, multiprocessing_context=context)
    values, indices = (torch.cat(parts) for parts in zip(*loader, strict=True))
    for i, key in enumerate(sorted(KEYS)):
        assert identical(LabelMap(values[i], indices[i]), maps[key])


def test_a_pickled_copy(tmp_path: Path) -> None:
    maps = write_packed(tmp_path, KEYS)
    packed = PackedMaps(tmp_path)
    fresh = len(pickle.dumps(packed))
    assert all(identical(packed.read(key), label_map) for key, label_map in maps.items())
    content = pickle.dumps(packed)
    assert len(content) == fresh  # the index alone
    assert all(identical(pickle.loads(content).read(key), label_map) for key, label_map in maps.items())
    assert identical(packed.read("a/1"), maps["a/1"])  # and the original still reads


# --- damaged and foreign files


def refused(root: Path) -> str:
    with pytest.raises(UserError) as e:
        PackedMaps(root)
    return one_line(e.value)


def test_truncated_shards(tmp_path: Path) -> None:
    write_packed(tmp_path, KEYS, shard_size=5)
    path = shard_path(tmp_path, 1)
    whole = path.read_bytes()
    for length in {0, 1, 7, 8, 9, 100, *range(0, len(whole), 61), len(whole) - 1}:
        path.write_bytes(whole[:length])
        assert str(path) in refused(tmp_path)
    path.write_bytes(whole + b"more")
    assert str(path) in refused(tmp_path)


@pytest.mark.parametrize("content", [b"no shard\n" * 100, bytes(1000), b"\xff" * 1000, b"PK\x03\x04" + bytes(500)])
def test_other_files(tmp_path: Path, content: bytes) -> None:
    shard_path(tmp_path, 0).write_bytes(content)
    assert str(shard_path(tmp_path, 0)) in refused(tmp_path)


def test_a_folder_in_place_of_a_shard(tmp_path: Path) -> None:
    shard_path(tmp_path, 0).mkdir()
    assert str(shard_path(tmp_path, 0)) in refused(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        dict(metadata=None),
        dict(metadata={"format": "pt"}),
        dict(metadata={"shape": "5,4"}),
        dict(metadata={"shape": "5,4,x"}),
        dict(metadata={"shape": "5,4," + "x" * 1000}),
        dict(metadata={"shape": "-5,4,-4"}),
        dict(metadata={"shape": "0,4,4"}),
        dict(keys=None),
        dict(offsets=None),
        dict(data=None),
        dict(keys=np.zeros(3, np.uint8)),
        dict(keys=np.zeros((3, 0), np.uint8)),
        dict(keys=np.zeros((0, 3), np.uint8)),
        dict(keys=np.zeros((3, 3), np.float32)),
        dict(keys=np.zeros((2, 3), np.uint8)),
        dict(offsets=np.array([0, 1, 2, 3])),
        dict(offsets=np.zeros(4, np.int64)),
        dict(offsets=np.zeros(4, np.float32)),
        dict(offsets=np.zeros((2, 2), np.int64)),
        dict(data=np.zeros((4, 4), np.float32)),
        dict(data=np.zeros(0, np.uint8)),
    ],
    ids=str,
)
def test_shards_of_something_else(tmp_path: Path, changes: dict[str, Any]) -> None:
    """A model's weights, say, or the work of a program that is not ours."""
    write_packed(tmp_path, ["a/1", "a/2", "a/3"])
    path = shard_path(tmp_path, 0)
    metadata = changes.pop("metadata", {"shape": "5,4,4"})
    tensors = {**load_file(path), **changes}
    path.unlink()
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path, metadata)
    assert str(path) in refused(tmp_path)


def test_flipped_bits_of_a_shard(tmp_path: Path) -> None:
    """A key that changed is a map that is missed, all else is refused or damaged: no map is another than it was."""
    maps = write_packed(tmp_path, ["a/1", "bb/22"], shape=(1, 2, 2))
    path = shard_path(tmp_path, 0)
    whole = path.read_bytes()
    unnoticed = 0
    for i in range(0, 8 * len(whole), 3):  # every byte, each at other bits
        flipped = bytearray(whole)
        flipped[i // 8] ^= 1 << i % 8
        path.write_bytes(flipped)
        try:
            packed = PackedMaps(tmp_path)
            list(packed.keys()), packed.classes()
            read = [packed.read(key) for key in maps]
        except UserError as e:
            one_line(e)
        except DamagedMap:
            pass
        else:
            assert all(a is None or identical(a, b) for a, b in zip(read, maps.values(), strict=True))
            unnoticed += all(a is not None for a in read)
    assert unnoticed < 64  # in padding


@pytest.mark.parametrize("shard_size", [1, 2])
def test_two_maps_of_one_key(tmp_path: Path, shard_size: int) -> None:
    maps = [("a/1", random_map(1)), ("ü/2", random_map(2)), ("b/3", random_map(3)), ("ü/2", random_map(4))]
    for number, start in enumerate(range(0, 4, shard_size)):
        write_shard(shard_path(tmp_path, number), maps[start : start + shard_size])
    assert "ü/2" in refused(tmp_path) and str(tmp_path) in refused(tmp_path)


def test_a_shard_that_went_away(tmp_path: Path) -> None:
    write_packed(tmp_path, KEYS)
    packed = PackedMaps(tmp_path)
    shard_path(tmp_path, 2).unlink()
    with pytest.raises(UserError) as e:
        packed.read(KEYS[6])
    assert "maps-00002" in one_line(e.value)
    assert packed.read(KEYS[0]) is not None


def test_a_damaged_record(tmp_path: Path) -> None:
    write_packed(tmp_path, ["a/1"])
    (tmp_path / "label_maps.json").write_text("{")
    assert "label_maps.json" in refused(tmp_path)


# --- size


def realistic_map(seed: int, classes: int = 1000, grid: int = 18) -> LabelMap:
    """The five strongest classes of smooth logits, some classes stronger everywhere, as an annotator's are."""
    generator = torch.Generator().manual_seed(seed)
    coarse = 2 * torch.randn(1, classes, grid // 3 + 1, grid // 3 + 1, generator=generator)
    logits = torch.nn.functional.interpolate(coarse, size=(grid, grid), mode="bilinear", align_corners=True)[0]
    logits = logits + 0.3 * torch.randn(classes, grid, grid, generator=generator)
    logits = logits + 2.5 * torch.randn(classes, 1, 1, generator=generator)
    values, indices = logits.topk(5, 0)
    return LabelMap(values.half(), indices.int())


def test_half_the_size_of_the_published_layout(tmp_path: Path) -> None:
    maps = {f"a/{i}": realistic_map(i) for i in range(24)}
    for key, label_map in maps.items():
        write_map(tmp_path / "maps" / f"{key}.pt", label_map)
    pack(tmp_path / "maps", tmp_path / "packed")
    before = sum(path.stat().st_size for path in (tmp_path / "maps" / "a").iterdir())
    after = sum(path.stat().st_size for path in (tmp_path / "packed").iterdir())
    assert after <= before / 2
    published, packed = FolderMaps(tmp_path / "maps"), PackedMaps(tmp_path / "packed")
    assert all(identical(published.read(key), packed.read(key)) for key in maps)
