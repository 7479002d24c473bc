"""Reads mutated files, and files made by hand, in a process of limited memory that a crash or a hang may take down.

    python tests/fuzz/fuzzed_bytes.py SEED COUNT FOLDER

reads `COUNT` mutated files of each kind and prints how that went; the file at hand lies in the folder, also after a
crash.
"""

import argparse
import faulthandler
import io
import json
import random
import re
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import crafted_files
import mutations
import numpy as np
import torch
from crafted_files import saved
from map_files import random_map
from PIL import Image
from timm.data import create_transform

from vip.data.augmentation import create_train_transform
from vip.data.images import UnreadableImage, decode_image
from vip.errors import UserError
from vip.models import VisionPermutator
from vip.token_labels.geometry import Region, TrackedTransform
from vip.token_labels.maps import RECORD, DamagedMap, FolderMaps, LabelMap, MapRecord
from vip.token_labels.packing import shard_path, write_shard
from vip.token_labels.store import open_label_maps
from vip.token_labels.targets import TokenLabels, dense_targets
from vip.training import weights
from vip.training.config import TrainConfig

MIB = 2**20
SECONDS = 60  # that one file may take
LIMIT = 6 * 1024 * MIB  # of the process beyond what it starts with: allocations fail there, and nothing swaps


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        samples: Whole files.
        mutate: Mutates within what checksums and lengths guard, None where nothing does.
        crafted: Files made by hand.
        read: Reads a file; raises one of `REFUSALS`, or makes of it what a training or a validation would.
        memory: Bytes that reading one may take.
    """

    samples: Callable[[], list[bytes]]
    mutate: Callable[[random.Random, bytes], bytes] | None
    crafted: Callable[[], dict[str, bytes]]
    read: Callable[[Path], None]
    memory: int


REFUSALS = (UserError, UnreadableImage, DamagedMap)  # which documents promise

# Images

PIXELS = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)).resize((48, 40))
DEEP = Image.fromarray(np.random.default_rng(0).integers(0, 65536, (16, 16), dtype=np.uint16))


def encoded(kind: str, *images: Image.Image, **options: Any) -> bytes:
    """An image file, of as many frames as images."""
    file = io.BytesIO()
    frames = dict(save_all=True, append_images=images[1:]) if len(images) > 1 else {}
    images[0].save(file, kind, **frames, **options)
    return file.getvalue()


def jpegs() -> list[bytes]:
    """Small JPEGs of any make."""
    makes: list[dict[str, Any]] = [{}, {"progressive": True}, {"icc_profile": bytes(200)}]
    makes += [{"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0"}]
    return [*(encoded("JPEG", PIXELS, **make) for make in makes), *(encoded("JPEG", PIXELS.convert(m)) for m in "L1")]


def pngs() -> list[bytes]:
    """Small PNGs of any mode."""
    modes = [PIXELS, *map(PIXELS.convert, ("RGBA", "L", "1")), DEEP]
    palette = encoded("PNG", PIXELS.quantize(16), transparency=3)
    return [*(encoded("PNG", image) for image in modes), palette, encoded("PNG", PIXELS, PIXELS.rotate(90))]


def other_images() -> list[bytes]:
    """Small images of the other formats that are read."""
    compressions = (None, "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")
    files = [encoded("TIFF", PIXELS, compression=compression) for compression in compressions]
    files += [encoded(kind, PIXELS) for kind in ("BMP", "WEBP", "PPM", "JPEG2000")]
    turned = PIXELS.rotate(90)
    return [*files, encoded("TIFF", DEEP), encoded("GIF", PIXELS, turned), encoded("MPO", PIXELS, turned)]


def read_image(path: Path) -> None:
    """Decode an image, and crop it as training and validation do."""
    with open(path, "rb") as file:
        image = decode_image(file)
    assert image.mode == "RGB" and min(image.size) >= 1, image
    data_config = dict(input_size=(3, 32, 32), interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3)
    tracked = TrackedTransform(create_train_transform(TrainConfig(no_prefetcher=True), data_config))
    for pixels in (tracked(image)[0], create_transform(**data_config, crop_pct=0.875)(image)):
        assert pixels.shape == (3, 32, 32) and pixels.isfinite().all()


# Label maps


def published_maps() -> list[bytes]:
    """Files of the published layout, of torch then and now."""
    made = [random_map(shape=shape) for shape in ((2, 5, 4), (1, 1, 1))]
    stacked = [torch.stack((m.values, m.indices.half())) for m in made]
    return [*map(saved, stacked), saved(stacked[0], _use_new_zipfile_serialization=False)]


def read_published_map(path: Path) -> None:
    """Read a map of the published layout."""
    folder = path.parent / "maps" / "a"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, folder / "b.pt")
    found = FolderMaps(folder.parent).read("a/b")
    assert found is not None
    make_targets(found)


def make_targets(found: LabelMap, region: Region | None = None) -> None:
    """What training makes of a map, which has to be finite."""
    values, indices = found
    assert values.dtype is torch.float16 and indices.dtype is torch.int32 and values.shape == indices.shape, found
    assert values.ndim == 3 and values.numel() and values.isfinite().all() and indices.min() >= 0, found
    if indices.max() >= 3000:  # which training refuses: it has fewer classes
        return
    matrix = np.eye(3) if region is None else np.linalg.inv(region.matrix(4000, 3000))
    box = torch.from_numpy(matrix[:2]).float()[None]
    labels = TokenLabels(torch.zeros(1, dtype=torch.long), values[None], indices[None], box, torch.ones(1, 8, 8))
    targets = dense_targets(labels, 3000, (8, 8), smoothing=0.1)
    assert targets.tokens.isfinite().all() and targets.cls.isfinite().all()
    assert (targets.tokens.sum(-1) - 1).abs().max() < 1e-2


def packed_maps() -> list[bytes]:
    """Shards of the packed layout."""
    shards = []
    with tempfile.TemporaryDirectory() as folder:
        for number, shape in enumerate([(2, 5, 4), (1, 1, 1), (5, 3, 3)]):
            path = Path(folder) / f"{number}"
            write_shard(path, [(f"a/{i}", random_map(i, shape)) for i in range(3)])
            shards.append(path.read_bytes())
    return shards


def read_packed_maps(path: Path) -> None:
    """Open packed maps and read all of them."""
    folder = path.parent / "packed"
    folder.mkdir(exist_ok=True)
    shutil.copyfile(path, shard_path(folder, 0))
    maps = open_label_maps(folder)
    maps.classes()
    for key in maps.keys():
        found = maps.read(key)
        assert found is not None
        make_targets(found)


def records() -> list[bytes]:
    """`label_maps.json`, which lies beside maps."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for region in (Region((224, 224)), Region((32, 48), 0.9, "border"), Region((7, 7), 1.0, "squash")):
            MapRecord(region, 4, ["a", "b", "c", "d"], "vip_s7", "0123").write(Path(folder))
            found.append((Path(folder) / RECORD).read_bytes())
    return found


def read_record(path: Path) -> None:
    """Read a record, and place a map where it says."""
    folder = path.parent / "record"
    folder.mkdir(exist_ok=True)
    shutil.copyfile(path, folder / RECORD)
    record = MapRecord.read(folder)
    assert record is not None
    make_targets(random_map(), record.region)


# Checkpoints


def tiny_model() -> VisionPermutator:
    """A model of a few kilobytes."""
    sizes = dict(layers=(1,), embed_dims=(8,), segments=(2,), transitions=(), mlp_ratio=1)
    return VisionPermutator(img_size=16, patch_size=4, num_classes=3, **sizes)  # type: ignore[arg-type]


def checkpoints() -> list[bytes]:
    """What a run writes, what timm does, bare weights, an old file."""
    state = tiny_model().state_dict()
    args = {"model": "vip_nano4_32", "img_size": 16, "opt": "adamw", "model_kwargs": {"a": 1}}
    run = {"epoch": 1, "arch": "x", "state_dict": state, "state_dict_ema": state, "optimizer": {"state": {}}}
    timms = {**run, "args": argparse.Namespace(**args)}
    old = saved({**run, "args": args}, _use_new_zipfile_serialization=False)
    return [saved({**run, "args": args}), saved(timms), saved(state), old]


def safetensors() -> list[bytes]:
    """Weights as safetensors."""
    from safetensors.torch import save

    state = {name: value.contiguous() for name, value in tiny_model().state_dict().items()}
    return [save(state), save(state, {"format": "pt"})]


def read_checkpoint(path: Path, suffix: str) -> None:
    """Read a checkpoint and load its weights."""
    target = path.with_name(f"weights{suffix}")
    shutil.copyfile(path, target)
    state = weights.state_dict_of(weights.read_checkpoint(target), None, target)
    with mock.patch.object(weights, "recognise", lambda state: None):  # for the message, and takes seconds
        weights.load_weights(tiny_model(), state, target)
    assert all(isinstance(v, torch.Tensor) and v.layout is torch.strided for v in state.values())


# Recipes


def recipes() -> list[bytes]:
    """Published recipes, and one with aliases."""
    paths = sorted((Path(__file__).parents[2] / "models").glob("*/*.yaml"))
    return [*(path.read_bytes() for path in paths), b"mean: &a [0.5, 0.5, 0.5]\nstd: *a\n"]


def read_recipe(path: Path) -> None:
    """Parse a recipe into the options of a run."""
    from vip.cli.arguments import parse

    parse(TrainConfig, ["DATA", "--config", str(path)], "vip train", {})


IMAGE, SMALL = 2048 * MIB, 256 * MIB
read_pth, read_safetensors = (partial(read_checkpoint, suffix=suffix) for suffix in (".pth.tar", ".safetensors"))
KINDS = {
    "JPEG": Kind(jpegs, None, crafted_files.jpegs, read_image, IMAGE),
    "PNG": Kind(pngs, mutations.mutate_png, crafted_files.pngs, read_image, IMAGE),
    "other images": Kind(other_images, None, crafted_files.other_images, read_image, IMAGE),
    "label map": Kind(published_maps, mutations.mutate_archive, crafted_files.label_maps, read_published_map, SMALL),
    "packed label maps": Kind(
        packed_maps, mutations.mutate_shard, crafted_files.packed_label_maps, read_packed_maps, SMALL
    ),
    "label_maps.json": Kind(records, mutations.mutate_json, crafted_files.records, read_record, SMALL),
    "checkpoint": Kind(checkpoints, mutations.mutate_archive, crafted_files.checkpoints, read_pth, SMALL),
    "safetensors": Kind(safetensors, mutations.mutate_safetensors, crafted_files.headers, read_safetensors, SMALL),
    "recipe": Kind(recipes, mutations.mutate_recipe, crafted_files.recipes, read_recipe, SMALL),
}

# The process


def resident(name: str) -> int:
    """Bytes of this process: VmRSS, in memory; VmHWM, at most so far; VmData, asked for."""
    found = re.search(rf"^{name}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def judge(kind: Kind, path: Path) -> tuple[str, int, float]:
    """Read a file: 'accepted', 'refused' or what went wrong; the bytes of memory and the seconds that it took."""
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before, start = resident("VmRSS"), time.perf_counter()
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    outcome = "accepted"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kind.read(path)
    except REFUSALS as e:
        outcome = "refused" if 0 < len(str(e).splitlines()[0]) == len(str(e)) < 2000 else f"not one line: {e!r}"[:300]
    except Exception:
        outcome = traceback.format_exc()[-1500:]
    faulthandler.cancel_dump_traceback_later()
    memory = resident("VmHWM") - before
    if memory > kind.memory:
        outcome = f"took {memory / MIB:.0f} MiB, and {outcome}"
    return outcome, memory, time.perf_counter() - start


def read_all(name: str, seed: int, count: int, folder: Path) -> dict[str, Any]:
    """Read the files of a kind; how often each outcome came, the most memory and time, and what went wrong."""
    kind, path = KINDS[name], folder / "input"
    samples = kind.samples()
    for sample in samples:  # what is imported and kept at the first use is no memory of an input
        path.write_bytes(sample)
        assert judge(kind, path)[0] == "accepted", f"a whole file: {judge(kind, path)[0]}"
    crafted = kind.crafted()
    tally: Counter[str] = Counter()
    most, longest, bad = 0, 0.0, []
    for title in (*crafted, *(f"number {i}" for i in range(count))):
        draw = random.Random(f"{name} {seed} {title}")
        sample = draw.choice(samples)
        inner = kind.mutate is not None and draw.random() < 0.5
        mutated = kind.mutate(draw, sample) if inner else mutations.mutate(draw, sample, samples)  # type: ignore[misc]
        path.write_bytes(crafted.get(title, mutated))
        (folder / "at").write_text(f"{name}, {title} of seed {seed}")
        outcome, memory, seconds = judge(kind, path)
        tally[outcome if outcome in ("accepted", "refused") else "wrong"] += 1
        most, longest = max(most, memory), max(longest, seconds)
        if outcome not in ("accepted", "refused"):
            shutil.copyfile(path, folder / f"{name} {seed} {title}".replace("*", "^"))
            bad.append(f"{title} of seed {seed}: {outcome}")
    return dict(tally=tally, memory=most, seconds=longest, bad=bad)


def main(seed: int, count: int, folder: Path) -> None:
    """Read the files of all kinds and print how that went, as JSON."""
    torch.set_num_threads(1)
    faulthandler.enable()
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (resident("VmData") + LIMIT, hard))
    print(json.dumps({name: read_all(name, seed, count, folder) for name in KINDS}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
