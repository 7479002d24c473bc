"""Mutations of files: of their bytes, and of what checksums and lengths guard, which are put right again."""

import io
import json
import random
import struct
import zipfile
import zlib
from typing import Any

import numpy as np
from safetensors.numpy import load, save

EXTREMES = [bytes(1), b"\xff", b"\x7f", b"\x80", b"\xff" * 2, b"\xff" * 4, b"\xff" * 8, bytes(8)]
EXTREMES += [struct.pack(order + "I", n) for order in "<>" for n in (1, 65535, 2**31 - 1, 2**31)]
CHUNKS = [b"tRNS", b"PLTE", b"acTL", b"fcTL", b"fdAT", b"zTXt", b"iCCP", b"iTXt", b"eXIf", b"gAMA"]
JUNK: list[Any] = [0, -1, 1, 2**31, 2**62, 2**64, 10**30, 10**400, 0.5, 1e308, float("nan"), float("inf"), None, True]
JUNK += ["", "x", "0", "F64", "U8", "BF16", "F4", "1,1,1", "0,0,0", "1,1,1000000000000", "-1,-1,1"]
JUNK += [[], {}, [0], [0, 0], [2**62, 2**62], [[[]]], {"a": 1}, "\ud800", "a" * 5000]
YAML_JUNK = [b"&a [*a]", b"!!int ''", b"!!timestamp 2024-99-99", b"!!binary x", b"9" * 5000, b"[" * 200, b"{<<: 1}"]
YAML_JUNK += [b"? [", b"!!set", b"!!python/object:os.x", b"*x", b"1e999", b"1:2:3", b"!!float x", b"!!bool x", b"~"]


def mutate(draw: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """Change a few things: bits, numbers, blocks, the end, or one half for that of another file."""
    content = bytearray(data)
    for _ in range(draw.choice([1, 1, 1, 2, 3, 8])):
        if not content:
            break
        # most of what can go wrong is said in the first bytes
        at = min(draw.randrange(len(content)), draw.choice([len(content), len(content), 64, 512]) - 1)
        size = min(draw.choice([1, 4, 16, 64, 1024]), len(content) - at)
        kind = draw.randrange(9)
        if kind <= 1:
            content[at] ^= 1 << draw.randrange(8)
        elif kind == 2:
            extreme = draw.choice(EXTREMES)
            content[at : at + len(extreme)] = extreme
        elif kind == 3:
            del content[at:]
        elif kind == 4:
            del content[at : at + size]
        elif kind == 5:
            content[at:at] = bytes(content[at : at + size]) * draw.choice([1, 2, 50])
        elif kind == 6:
            content[at : at + size] = bytes(size)
        elif kind == 7:
            content[at:at] = draw.randbytes(size)
        else:
            other = draw.choice(others)
            content[at:] = other[draw.randrange(len(other) + 1) :]
    return bytes(content)


def png_chunk(name: bytes, data: bytes) -> bytes:
    """A chunk with its length and checksum."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def mutate_png(draw: random.Random, data: bytes) -> bytes:
    """Mutate a chunk of a PNG, or what is compressed in it."""
    chunks, at = [], 8
    while at + 12 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    i = draw.randrange(len(chunks))
    name, body = chunks[i]
    action = draw.randrange(5)
    if action == 0 and name == b"IDAT":
        body = zlib.compress(mutate(draw, zlib.decompress(body), [body]))
    elif action < 3:
        body = mutate(draw, body or bytes(1), [b for _, b in chunks])
    elif action == 3:
        chunks.insert(i, draw.choice(chunks))
    else:
        name = draw.choice(CHUNKS)
    chunks[i] = (name, body)
    return data[:8] + b"".join(png_chunk(*chunk) for chunk in chunks)


def archive_of(records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A zip archive."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return file.getvalue()


def mutate_archive(draw: random.Random, data: bytes) -> bytes:
    """Mutate records of what `torch.save` wrote, its pickle more often than others."""
    if not data.startswith(b"PK"):  # of torch before 1.6
        return mutate(draw, data, [data])
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    for _ in range(draw.choice([1, 1, 2])):
        name = draw.choice(sorted(records))
        if draw.random() < 0.8:
            name = next((name for name in records if name.endswith("data.pkl")), name)
        action = draw.randrange(12)
        if action == 0 and len(records) > 1:
            del records[name]
        elif action == 1:
            records[name + draw.choice(["x", ".pkl"])] = draw.choice(list(records.values()))
        else:
            records[name] = mutate(draw, records[name], list(records.values()))
    return archive_of(records, draw.choice([zipfile.ZIP_STORED] * 9 + [zipfile.ZIP_DEFLATED]))


def mutate_json(draw: random.Random, text: bytes) -> bytes:
    """Replace, remove or rename something within nested dictionaries and lists."""
    content = json.loads(text)
    for _ in range(draw.choice([1, 1, 2])):
        at = content
        while keys := list(at) if isinstance(at, dict) else list(range(len(at))):
            key = draw.choice(keys)
            if isinstance(at[key], dict | list) and draw.random() < 0.8:
                at = at[key]
                continue
            action = draw.randrange(6)
            if action == 0:
                del at[key]
            elif action == 1 and isinstance(at, dict):
                at[draw.choice(["", "x", "shape", "a/0"])] = at.pop(key)
            else:
                at[key] = at[draw.choice(keys)] if action == 2 else draw.choice(JUNK)
            break
    return json.dumps(content).encode()


def mutate_safetensors(draw: random.Random, data: bytes) -> bytes:
    """Mutate the header and its length with it."""
    (length,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + length]
    header = mutate_json(draw, header) if draw.random() < 0.7 else mutate(draw, header, [header])
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def mutate_shard(draw: random.Random, data: bytes) -> bytes:
    """Mutate the header of a shard of packed maps, or what is compressed in its first map."""
    if draw.random() < 0.5:
        return mutate_safetensors(draw, data)
    (length,) = struct.unpack("<Q", data[:8])
    shape = json.loads(data[8 : 8 + length])["__metadata__"]["shape"]
    arrays = load(data)
    maps = [arrays["data"][a:b].tobytes() for a, b in zip(arrays["offsets"], arrays["offsets"][1:], strict=False)]
    unpacked = zlib.decompress(maps[0])
    maps[0] = zlib.compress(mutate(draw, unpacked, [unpacked]))
    return shard(shape, maps, keys=arrays["keys"])


def shard(shape: str, maps: list[bytes], **arrays: np.ndarray) -> bytes:
    """A shard of packed maps."""
    content = {
        "keys": np.frombuffer(b"".join(b"a/%d" % i for i in range(len(maps))), np.uint8).reshape(len(maps), -1),
        "offsets": np.cumsum([0, *map(len, maps)], dtype=np.int64),
        "data": np.frombuffer(b"".join(maps), np.uint8),
    }
    return save({**content, **arrays}, {"shape": shape})


def mutate_recipe(draw: random.Random, data: bytes) -> bytes:
    """Replace values and keys."""
    lines = data.split(b"\n")
    for _ in range(draw.choice([1, 1, 3])):
        i = draw.randrange(len(lines))
        key, colon, _ = lines[i].partition(b":")
        junk = draw.choice(YAML_JUNK)
        lines[i] = key + colon + b" " + junk if draw.random() < 0.7 else junk + colon
    return b"\n".join(lines)
