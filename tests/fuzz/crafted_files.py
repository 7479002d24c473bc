"""Hostile files made by hand: what a mutation would hardly come upon."""

import io
import json
import pickle
import struct
import zipfile
import zlib
from typing import Any

import numpy as np
import torch
from mutations import archive_of, png_chunk, shard
from PIL import Image

EXTREME = 2**32 - 1

# Images


def png_file(width: int, height: int, *chunks: bytes, depth: int = 8, kind: int = 2, interlace: int = 0) -> bytes:
    """A PNG of these chunks."""
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, interlace)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + b"".join(chunks) + png_chunk(b"IEND", b"")


def idat(size: int) -> bytes:
    """Image data of so many zeros, which take a thousandth of them."""
    compressor = zlib.compressobj(9)
    parts = [compressor.compress(bytes(min(2**20, size - at))) for at in range(0, size, 2**20)]
    return png_chunk(b"IDAT", b"".join(parts) + compressor.flush())


def pngs() -> dict[str, bytes]:
    """PNGs that claim too much, or hold it."""
    bomb, row = zlib.compress(bytes(2**28), 9), idat(32 * 97)
    return {
        "0x0": png_file(0, 0, row),
        "13000x13000 of 16 bits": png_file(13000, 13000, idat(13000 * 26001), depth=16, kind=0),
        "strip": png_file(1, 60000, idat(60000 * 4)),
        "interlaced": png_file(9000, 9000, row, interlace=1),
        "zTXt bomb": png_file(32, 32, png_chunk(b"zTXt", b"a\0\0" + bomb), row),
        "iTXt bomb": png_file(32, 32, png_chunk(b"iTXt", b"a\0\1\0\0\0" + bomb), row),
        "iCCP bomb": png_file(32, 32, png_chunk(b"iCCP", b"a\0\0" + bomb), row),
        "many chunks": png_file(32, 32, *[png_chunk(b"tEXt", b"a\0b")] * 50_000, row),
        "text of 64 MiB": png_file(32, 32, *[png_chunk(b"tEXt", b"a\0" + bytes(2**20))] * 70, row),
        "2**31 frames": png_file(32, 32, png_chunk(b"acTL", struct.pack(">II", 2**31, 0)), row),
        "long chunk": png_file(32, 32)[:33] + struct.pack(">I", EXTREME) + b"IDATx",
    }


def jpeg_file(width: int, height: int, **options: Any) -> bytes:
    """A JPEG whose header says another size than its data has."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 30, 30)).save(file, "JPEG", **options)
    data = bytearray(file.getvalue())
    at = data.index(b"\xff\xc2" if options else b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def jpegs() -> dict[str, bytes]:
    """JPEGs that claim too much."""
    return {
        "65535x65535": jpeg_file(65535, 65535),
        "5000x5000 progressive": jpeg_file(5000, 5000, progressive=True),
        "65535x1": jpeg_file(65535, 1),
        "markers": b"\xff\xd8" + b"\xff\xe1\x00\x02" * 100_000 + b"\xff\xd9",
    }


def other_images() -> dict[str, bytes]:
    """Images of other formats that claim too much, never end, or are programs."""
    frames = [Image.new("L", (8, 8), i % 256) for i in range(2000)]
    gif = io.BytesIO()
    frames[0].save(gif, "GIF", save_all=True, append_images=frames[1:])
    bmp = struct.pack("<IHHIIiiHHIIiiII", 100, 0, 0, 54, 40, 10_000, 10_000, 1, 8, 1, 0, 0, 0, 256, 0)
    return {
        "gif of many frames": gif.getvalue(),
        "gif": b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0xF7, 0, 0) + bytes(768) + gif.getvalue()[781:],
        "bmp run length": b"BM" + bmp + bytes(1024) + b"\0\2\0\1" * 9999,
        "ppm of text": b"P3 1000000 1 255\n" + b"1 " * 1000,
        "ppm number": b"P6 " + b"9" * 10_000 + b" 1 255\n",
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n{ } loop\n%%EOF\n",
        "webp": b"RIFF" + struct.pack("<I", EXTREME) + b"WEBPVP8X" + struct.pack("<II", 10, 0) + b"\xff" * 6,
    }


# What torch.save writes


def saved(content: Any, **options: Any) -> bytes:
    """What `torch.save` writes."""
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def torch_file(pickled: bytes, record: bytes = bytes(96), compression: int = zipfile.ZIP_STORED) -> bytes:
    """An archive in torch's layout around a pickle and a storage."""
    content = {"data.pkl": b"\x80\x02" + pickled + b".", "byteorder": b"little", "data/0": record, "version": b"3\n"}
    return archive_of({f"archive/{name}": data for name, data in content.items()}, compression)


def text(value: str) -> bytes:
    """The opcode of a text."""
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    """The opcode of a whole number."""
    data = pickle.encode_long(value)
    return b"\x8a" + bytes([len(data)]) + data


def tensor(kind: str, count: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """The opcodes of a tensor over a storage of so many numbers."""
    parts = [text("storage"), f"ctorch\n{kind}Storage\n".encode(), text("0"), text("cpu"), number(count)]
    sizes = b"".join(b"(" + b"".join(map(number, values)) + b"t" for values in (shape, stride))
    arguments = b"(" + b"".join(parts) + b"tQ" + number(0) + sizes + b"\x89ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


def calling(name: str, arguments: bytes) -> bytes:
    """The opcodes of a call."""
    module, _, function = name.rpartition(".")
    return f"c{module}\n{function}\n(".encode() + arguments + b"tR"


def pickles() -> dict[str, bytes]:
    """Pickles that ask for memory, nest, or say nonsense; in the place of a label map and of a checkpoint."""
    made = {
        "bytearray of 3 GiB": calling("builtins.bytearray", number(3 * 2**30)),
        "tensor of 3 * 2**30": calling("torch.FloatTensor", number(3 * 2**30)),
        "put at 2**32 - 1": b"Nr" + struct.pack("<I", EXTREME) + b"0]",
        "text of 4 GiB": b"X" + struct.pack("<I", EXTREME) + b"a",
        "nested": b"]" * 200_000 + b"a" * 199_999,
        "nested dictionaries": b"}" + b"X\x01\0\0\0a}" * 100_000 + b"s" * 100_000,
        "laughs": b"]" + b"".join(b"q\0]" + b"(" + b"h\0" * 10 + b"e" for _ in range(60)),
    }
    legacy = saved(torch.arange(77, dtype=torch.float32), _use_new_zipfile_serialization=False)
    assert b"K\x4d" in legacy  # the 77
    whole = tensor("Half", 2**27, (2, 1, 2**13, 2**13), (2**26, 2**26, 2**13, 1))
    return {
        **{name: torch_file(content) for name, content in made.items()},
        "compressed pickle": torch_file(b"N0" * 2**27 + b"N", compression=zipfile.ZIP_DEFLATED),
        "compressed record": torch_file(whole, bytes(2**28), zipfile.ZIP_DEFLATED),
        "legacy of 3 GiB": legacy.replace(b"K\x4d", number(3 * 2**28)),
        "tar": b"pickle\0".ljust(257, b"\0") + b"ustar\x0000".ljust(255, b"\0"),
    }


def label_maps() -> dict[str, bytes]:
    """Label maps of impossible shapes."""
    claims = {
        "stride 0": (40, (2, 1, 10**5, 10**5), (0, 0, 0, 0)),
        "negative stride": (40, (2, 1, 2, 2), (-1, -1, -1, -1)),
        "shape 2**62": (40, (2**62, 2**62), (1, 1)),
        "empty shape": (40, (2, 0, 2**40, 2**40), (1, 1, 1, 1)),
        "beyond its storage": (40, (2, 1, 100, 100), (10**4, 10**4, 100, 1)),
        "3 * 2**30 claimed": (3 * 2**29, (2, 1, 2**14, 2**14), (2**28, 2**28, 2**14, 1)),
    }
    shapes = {"row": (2, 1, 1, 100_000), "column": (2, 1, 100_000, 1), "cells": (2, 5, 900, 900)}
    return {
        **pickles(),
        **{name: torch_file(tensor("Half", *claim)) for name, claim in claims.items()},
        **{name: saved(torch.zeros(shape).half()) for name, shape in shapes.items()},
    }


def checkpoints() -> dict[str, bytes]:
    """Checkpoints whose weights are larger than their file, or many."""
    names = ("patch_embed.proj.weight", "head.weight", "network.0.0.attn.mlp_h.weight")
    huge = tensor("Float", 24, (10**4, 10**4, 10**4), (0, 0, 0))
    one = torch.ones(3)
    return {
        **pickles(),
        **{f"expanded {name}": torch_file(b"}" + text("model") + b"}" + text(name) + huge + b"ss") for name in names},
        "names that are numbers": saved({"state_dict": {1: one, None: one}}),
        "name of 10**6 letters": saved({"state_dict": {"a" * 10**6: one}}),
        "many prefixes": saved({"state_dict": {"module." * 50 + "head.bias": one}}),
        "many weights": saved({"state_dict": {f"{i}": one for i in range(20_000)}}),
        "weights within weights": saved({"state_dict": {"state_dict": {"head.bias": one}}}),
        "other things": saved({"state_dict": 3, "state_dict_ema": one, "model_ema": "x", "model": []}),
    }


# Packed label maps, and other safetensors


def packed_map(size: int, classes: int = 1, first: int = 0) -> bytes:
    """A packed map of zeros."""
    parts = (np.array([classes], "<u4"), np.arange(first, first + classes, dtype="<i4"), np.zeros(3 * size, np.uint8))
    return zlib.compress(b"".join(part.tobytes() for part in parts))


def packed_label_maps() -> dict[str, bytes]:
    """Shards of impossible shapes and contents."""
    one = packed_map(8)
    return {
        "shape 10**12": shard("1,1,1000000000000", [one]),
        "shape that overflows": shard("4294967296,4294967296,1", [one]),
        "long shape": shard("9" * 5000 + ",1,1", [one]),
        "bomb": shard("2,2,2", [zlib.compress(bytes(2**28))]),
        "bomb of its shape": shard("1,16384,16384", [zlib.compress(bytes(2**28))]),
        "row": shard("1,1,100000", [packed_map(100_000)]),
        "2**32 - 1 classes": shard("2,2,2", [zlib.compress(struct.pack("<I", EXTREME) + bytes(100))]),
        "class 2**31 - 1": shard("2,2,2", [packed_map(8, first=2**31 - 1)]),
        "keys beyond UTF-8": shard("2,2,2", [one], keys=np.full((1, 3), 255, np.uint8)),
        "keys of lines": shard("2,2,2", [one, one], keys=np.full((2, 3), 10, np.uint8)),
        "wide keys": shard("2,2,2", [one], keys=np.full((1, 10**6), 97, np.uint8)),
        "offsets of 2**62": shard("2,2,2", [one, one], offsets=np.array([0, 2**62, 2 * len(one)])),
        **headers(),
    }


def headers() -> dict[str, bytes]:
    """safetensors files whose headers claim too much."""

    def file(header: bytes) -> bytes:
        return struct.pack("<Q", len(header)) + header + bytes(64)

    def entry(dtype: str, shape: list[int], end: int, start: int = 0) -> dict[str, Any]:
        return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}

    made = {
        "claim": {"a": entry("U8", [2**40], 2**40)},
        "shape that overflows": {"a": entry("U8", [2**33, 2**33], 64)},
        "overlap": {"a": entry("U8", [64], 64), "b": entry("U8", [64], 64)},
        "backwards": {"a": entry("U8", [0], 0, start=64)},
        "odd type": {"a": entry("F4", [128], 64)},
        "bfloat16": {"data": entry("BF16", [32], 64)},
        "many tensors": {f"t{i}": entry("U8", [0], 0) for i in range(10_000)},
        "long name": {"a" * 10**6: entry("U8", [64], 64)},
    }
    return {
        **{name: file(json.dumps(header).encode()) for name, header in made.items()},
        "header of 2**60": struct.pack("<Q", 2**60) + b"{}",
        "header of 90 MB": file(b"{" + b" " * 90_000_000 + b"}"),
        "nested header": file(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    }


# Texts


def recipes() -> dict[str, bytes]:
    """Recipes that unfold to anything."""
    laughs = "\n".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}' if i else 'x'] * 10)}]" for i in range(30))
    merged = "\n".join(f"m{i}: &m{i} {{<<: [{','.join([f'*m{i - 1}'] * 10)}]}}" for i in range(1, 30))
    return {
        "billion laughs": f"{laughs}\nepochs: *a29".encode(),
        "billion laughs in arguments": f"{laughs}\nmodel_kwargs: {{a: *a29}}".encode(),
        "billion merges": f"m0: &m0 {{x: 1}}\n{merged}".encode(),
        "in circles": b"model_kwargs: &a {a: *a}",
        "circles of lists": b"mean: &a [*a]",
        "nested lists": b"mean: " + b"[" * 10_000,
        "nested mappings": b"".join(b" " * i + b"a:\n" for i in range(1000)),
        "long number": b"epochs: " + b"9" * 100_000,
        "long hexadecimal number": b"epochs: 0x" + b"f" * 100_000,
        "long number of 60s": b"epochs: 1" + b":59" * 50_000,
        "month 13": b"experiment: 2024-13-01",
        "UTF-16": "epochs: 3".encode("utf-16"),
        "binary": b"experiment: !!binary AAAA",
    }


def records() -> dict[str, bytes]:
    """`label_maps.json` of impossible regions."""
    sizes = ((10**400, 7), (10**18, 10**18), (1.5, 1.5), (float("inf"), 7))
    made = [{"img_size": size, "crop_pct": 1.0, "crop_mode": "center"} for size in sizes]
    made += [{"img_size": (7, 7), "crop_pct": part, "crop_mode": "center"} for part in (1e-300, 1e300)]
    return {
        **{f"{region}"[:60]: json.dumps({"region": region}).encode() for region in made},
        "many classes": json.dumps({"region": {"img_size": (7, 7)}, "classes": [*map(str, range(100_000))]}).encode(),
        "long number": b'{"region": {"img_size": [' + b"9" * 100_000 + b", 7]}}",
    }
