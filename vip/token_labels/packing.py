"""Packed label maps: a few large files that are mapped into memory instead of a small file for each image.

A shard `maps-00000.safetensors` holds the keys of its maps, where each map begins, and the maps. A map is compressed
without loss: its logits byte by byte of their float16 numbers, each class index as its place in a list of the classes
that the map names.
"""

import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from vip.errors import UserError
from vip.files import replacing
from vip.token_labels.maps import DamagedMap, LabelMap, MapRecord, check_shape

SHARD_MAPS = 10_000


def encode(label_map: LabelMap) -> bytes:
    """Compress a map."""
    classes, places = np.unique(label_map.indices.numpy().astype("<i4"), return_inverse=True)
    planes = np.ascontiguousarray(label_map.values.half().numpy(), "<f2").view(np.uint8).reshape(-1, 2).T
    places = places.ravel().astype(np.uint8 if len(classes) <= 256 else "<u2")
    header = np.array([len(classes)], "<u4")
    return zlib.compress(b"".join(part.tobytes() for part in (header, classes, places, planes)))


def decode(packed: bytes, shape: tuple[int, int, int]) -> LabelMap:
    """Reverse `encode`.

    Args:
        packed: What it gave.
        shape: The map's k, H and W.

    Raises:
        DamagedMap: If it is not what `encode` gives for a map of this shape.
    """
    try:
        size = int(np.prod(shape))
        inflate = zlib.decompressobj()
        content = inflate.decompress(packed, 5 + 8 * size)  # a hostile map may inflate to anything; no good one to more
        if not inflate.eof or inflate.unused_data:
            raise ValueError("it is cut off, or has another length")
        count = int(np.frombuffer(content, "<u4", 1)[0])
        place_type = np.dtype(np.uint8 if count <= 256 else "<u2")
        if len(content) != 4 + 4 * count + size * (place_type.itemsize + 2):
            raise ValueError("it has another length")
        classes = np.frombuffer(content, "<i4", count, 4)
        places = np.frombuffer(content, place_type, size, 4 + 4 * count)
        planes = np.frombuffer(content, np.uint8, 2 * size, len(content) - 2 * size)
        values = np.ascontiguousarray(planes.reshape(2, -1).T).view("<f2").astype(np.float16)
        indices = classes.astype(np.int32)[places]
        if (classes < 0).any() or not np.isfinite(values).all():
            raise ValueError("it holds logits that are not finite, or negative classes")
    except (zlib.error, ValueError, IndexError) as e:
        raise DamagedMap(str(e)) from e
    return LabelMap(torch.from_numpy(values).view(shape), torch.from_numpy(indices).view(shape))


def shards_in(root: Path) -> list[Path]:
    """The shards in a folder, in order."""
    return sorted(root.glob("maps-*.safetensors"))


def shard_path(root: Path, number: int) -> Path:
    """The place of a shard."""
    return root / f"maps-{number:05}.safetensors"


def write_shard(path: Path, maps: Sequence[tuple[str, LabelMap]]) -> None:
    """Write a shard of maps of one shape, whole or not at all.

    Raises:
        UserError: If their shapes differ.
        OSError: If it cannot be written.
    """
    shape = maps[0][1].values.shape
    for key, label_map in maps:
        if label_map.values.shape != shape:
            raise UserError(f"The label map {key} is {list(label_map.values.shape)}, the ones before it {list(shape)}.")
    packed = [encode(label_map) for _, label_map in maps]
    keys = np.array([_encode_key(key) for key, _ in maps])
    tensors: dict[str, np.ndarray] = {
        "keys": np.frombuffer(keys.tobytes(), np.uint8).reshape(len(keys), -1),
        "offsets": np.cumsum([0, *map(len, packed)], dtype=np.int64),
        "data": np.frombuffer(b"".join(packed), np.uint8),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished:
        # safetensors would make a file that other users cannot read
        unfinished.write_bytes(save(tensors, {"shape": ",".join(map(str, shape))}))


def _encode_key(key: str) -> bytes:
    return key.encode(errors="surrogateescape")  # names of files are not always UTF-8


def _decode_key(key: bytes) -> str:
    return key.decode(errors="surrogateescape")


def _check_index(
    shape: tuple[int, ...], offsets: np.ndarray, keys: np.ndarray, data_type: str, data_shape: Sequence[int]
) -> None:
    check_shape(shape)
    if (offsets.dtype, keys.dtype, data_type) != (np.int64, np.uint8, "U8"):
        raise ValueError("it holds something else")
    if keys.ndim != 2 or keys.size == 0 or offsets.shape != (len(keys) + 1,):
        raise ValueError("its keys do not fit its index")
    if [offsets[0], offsets[-1]] != [0, *data_shape] or (offsets[1:] <= offsets[:-1]).any():
        raise ValueError("its index does not fit its maps")


class PackedMaps:
    """Packed label maps; the index is in memory, maps are read from the mapped shards."""

    def __init__(self, root: Path) -> None:
        self.root, self.record = root, MapRecord.read(root)
        self.shards = shards_in(root)
        self._data: dict[int, Any] = {}  # of the shards this process has used
        self.shapes: list[tuple[int, int, int]] = []
        self.offsets: list[np.ndarray] = []
        keys = []
        for path in self.shards:
            try:
                with safe_open(path, "np") as file:
                    k, height, width = (int(n) for n in file.metadata()["shape"].split(","))
                    offsets, shard_keys = file.get_tensor("offsets"), file.get_tensor("keys")
                    data = file.get_slice("data")
                    self.shapes.append((k, height, width))
                    self.offsets.append(offsets)
                    _check_index((k, height, width), offsets, shard_keys, data.get_dtype(), data.get_shape())
                    keys.append(np.ascontiguousarray(shard_keys).view(f"S{shard_keys.shape[1]}")[:, 0])
            except (SafetensorError, OSError, KeyError, TypeError, ValueError) as e:
                raise UserError(
                    f"{path} is no shard of label maps or is damaged ({str(e)[:300]}); pack the maps again."
                ) from e
        all_keys = np.concatenate(keys)
        order = np.argsort(all_keys, kind="stable")
        self._keys = all_keys[order]
        self._shard = np.repeat(np.arange(len(keys)), [len(k) for k in keys])[order]
        self._place = np.concatenate([np.arange(len(k)) for k in keys])[order]
        twice = np.flatnonzero(self._keys[1:] == self._keys[:-1])
        if len(twice):
            raise UserError(f"{root} holds two label maps of {_decode_key(self._keys[twice[0]])}; pack the maps again.")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_data": {}}  # open files stay in their process

    def read(self, key: str) -> LabelMap | None:
        """See `LabelMaps`."""
        name = _encode_key(key)
        i = int(np.searchsorted(self._keys, name))
        if i == len(self._keys) or self._keys[i] != name:
            return None
        shard, place = int(self._shard[i]), int(self._place[i])
        if shard not in self._data:
            try:
                self._data[shard] = safe_open(self.shards[shard], "np").get_slice("data")
            except (SafetensorError, OSError) as e:
                raise UserError(f"{self.shards[shard]} cannot be read any more ({e}).") from e
        start, end = self.offsets[shard][place : place + 2].tolist()
        return decode(self._data[shard][start:end].tobytes(), self.shapes[shard])

    def keys(self) -> Iterator[str]:
        """See `LabelMaps`."""
        return map(_decode_key, self._keys)

    def classes(self) -> set[str]:
        """See `LabelMaps`."""
        return {key.rpartition("/")[0] for key in self.keys()}
