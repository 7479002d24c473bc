"""Checksums, and what is done with checkpoints, against NumPy, `zipfile`, safetensors and timm."""

import argparse
import io
import json
import os
import shutil
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from timm.models import load_checkpoint
from torch import nn

import vip  # noqa: F401  # registers the models
from vip.checkpoints.averaging import average
from vip.checkpoints.inspection import inspect, verify
from vip.checkpoints.reading import checkpoints_at
from vip.checkpoints.writing import check_output, convert, layout_of
from vip.errors import UserError
from vip.files import UnreadableFile, check_records
from vip.training.weights import load_finetune, read_checkpoint, recognise, state_dict_of

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:Duplicate name")

StateDict = dict[str, torch.Tensor]


def random_weights(seed: int, dtype: torch.dtype = torch.float32) -> StateDict:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.randn(4, 3, generator=generator).to(dtype),
        "a.bias": torch.randn(4, generator=generator).to(dtype),
        "scale": torch.randn((), generator=generator).to(dtype),
        "steps": torch.tensor(seed),
    }


def state(seed: int, epoch: int, metric: float = 0.0, **more: Any) -> dict[str, Any]:
    """A training state as `RunSaver` writes it."""
    return {"epoch": epoch, "version": 2, "state_dict": random_weights(seed), "metric": metric, "optimizer": {}, **more}


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    def save(content: Any, name: str = "checkpoint.pth.tar", **options: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        torch.save(content, path, **options)
        return path

    return save


def equal(first: Any, second: Any) -> bool:
    """Equal to the bit, whatever it is nested in."""
    if isinstance(first, torch.Tensor):
        same = isinstance(second, torch.Tensor) and first.dtype == second.dtype and first.shape == second.shape
        return same and first.contiguous().numpy().tobytes() == second.contiguous().numpy().tobytes()
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[name], second[name]) for name in first)
    return first == second


# --- checksums


def flipped(data: bytes, position: int, bit: int) -> bytes:
    changed = bytearray(data)
    changed[position] ^= 1 << bit
    return bytes(changed)


def test_a_flipped_bit_in_any_tensor_is_found_and_named(saved: Callable[..., Path]) -> None:
    path = saved(state(1, 0))
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if "/data/" in name]
        assert len(names) == 4
        places = {name: whole.index(archive.read(name), archive.getinfo(name).header_offset) for name in names}
    for name, place in places.items():
        path.write_bytes(flipped(whole, place + 2, 3))
        assert equal(torch.load(path, weights_only=True)["epoch"], 0), "torch does not notice"
        with pytest.raises(UserError, match=f"damaged .the record '{name}' is not what was written"):
            read_checkpoint(path)


CONTENT = {"state_dict": random_weights(3), "epoch": 3, "args": {"opt": "adamw"}}
ZIPPED, TENSORS = io.BytesIO(), safetensors.torch.save(random_weights(3))
torch.save(CONTENT, ZIPPED)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, len(ZIPPED.getvalue()) - 1), st.integers(0, 7))
def test_any_flipped_bit_of_an_archive_is_found_or_harmless(tmp_path: Path, position: int, bit: int) -> None:
    path = tmp_path / "flipped.pth"
    path.write_bytes(flipped(ZIPPED.getvalue(), position, bit))
    try:
        verify(path)
        assert equal(read_checkpoint(path), CONTENT)
    except UserError as e:
        assert str(path) in str(e) and "\n" not in str(e)


def test_a_record_that_becomes_a_folder_is_found(saved: Callable[..., Path]) -> None:
    """One bit in the list of records, at which torch reads nothing and gives a tensor of whatever is in memory."""
    path = saved(CONTENT)
    whole, place = path.read_bytes(), 0
    while (place := whole.find(b"PK\x01\x02", place + 1)) > 0:
        path.write_bytes(flipped(whole, place + 38, 4))
        with pytest.raises(UserError, match="damaged"):
            read_checkpoint(path)


@pytest.mark.parametrize("checksum", [True, False])
def test_any_flipped_bit_of_safetensors_is_found_where_there_is_a_checksum(tmp_path: Path, checksum: bool) -> None:
    (tmp_path / "source.safetensors").write_bytes(TENSORS)
    whole = tmp_path / "whole.safetensors"
    convert(tmp_path / "source.safetensors", whole, "safetensors")
    data, path = whole.read_bytes() if checksum else TENSORS, tmp_path / "flipped.safetensors"
    found = silent = 0
    for position in range(0, len(data), 3):
        path.write_bytes(flipped(data, position, position % 8))
        try:
            silent += not equal(read_checkpoint(path), random_weights(3))
        except UserError as e:
            found += 1
            assert str(path) in str(e) and "\n" not in str(e)
    assert found > len(data) // 12
    assert (silent == 0) == checksum, "the format itself has no checksum"


@pytest.mark.parametrize("cut", [1, 10, 100, 500, 1000])
def test_a_file_that_was_cut_is_found(saved: Callable[..., Path], cut: int) -> None:
    path = saved(state(1, 0))
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(UserError, match="is damaged"):
        read_checkpoint(path)


def test_files_without_checksums_are_read(saved: Callable[..., Path], tmp_path: Path) -> None:
    """Those of torch before 1.6, those of a torch that is told to write none, and other programs' safetensors."""
    paths = [saved(CONTENT, "old.pth", _use_new_zipfile_serialization=False)]
    torch.serialization.set_crc32_options(False)
    try:
        paths.append(saved(CONTENT, "quick.pth"))
    finally:
        torch.serialization.set_crc32_options(True)
    for path in paths:
        assert equal(read_checkpoint(path), CONTENT) and not verify(path).has_checksum
    (tmp_path / "a.safetensors").write_bytes(TENSORS)
    assert not verify(tmp_path / "a.safetensors").has_checksum
    assert verify(saved(CONTENT, "new.pth")).has_checksum


def archive(path: Path, records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in records.items():
            file.writestr(name, content)
    return path


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_archives_are_refused_unread(tmp_path: Path, compression: int) -> None:
    """A bomb of 20 MB; reading it would take longer."""
    path = archive(tmp_path / "bomb.pth", {"x/data.pkl": bytes(20_000_000)}, compression)
    assert path.stat().st_size < 30_000
    start = time.process_time()
    with pytest.raises(UnreadableFile, match="compressed"):
        check_records(path)
    assert time.process_time() - start < 0.02
    with pytest.raises(UserError, match="compressed"):
        read_checkpoint(path)


def test_records_that_overlap_are_refused_unread(tmp_path: Path) -> None:
    """1000 names of one record of a megabyte: reading them would be reading a gigabyte."""
    path = archive(tmp_path / "x.pth", {"name": bytes(1_000_000)})
    data = path.read_bytes()
    start = data.index(b"PK\x01\x02")
    end = data.index(b"PK\x05\x06")
    entry, tail = data[start:end], bytearray(data[end:])
    tail[8:16] = struct.pack("<HHI", 1000, 1000, 1000 * len(entry))
    path.write_bytes(data[:start] + 1000 * entry + tail)
    assert len(zipfile.ZipFile(path).namelist()) == 1000
    with pytest.raises(UnreadableFile, match="overlap"):
        check_records(path)


def test_sizes_that_no_file_has_are_refused(saved: Callable[..., Path]) -> None:
    path = saved(CONTENT)
    data = bytearray(path.read_bytes())
    at = 0
    while (at := data.find(b"PK\x01\x02", at)) >= 0:
        data[at + 20 : at + 28] = struct.pack("<II", 2**32 - 2, 2**32 - 2)
        at += 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        read_checkpoint(path)


# --- looking into one


def test_a_training_state(saved: Callable[..., Path]) -> None:
    model = timm.create_model("vip_nano4_32", num_classes=7)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    args = argparse.Namespace(opt="adamw", sched="cosine", eval_metric="loss", img_size=None)
    content = {
        "epoch": 4,
        "version": 2,
        "arch": "vip_nano4_32",
        "args": args,
        "data_config": {"input_size": (3, 32, 32)},
        "class_to_idx": {name: i for i, name in enumerate("abcdefg")},
        "state_dict": model.state_dict(),
        "state_dict_ema": model.state_dict(),
        "task_state": {"aux_head.weight": torch.ones(2), "aux_head.bias": torch.ones(2)},
        "optimizer": optimizer.state_dict(),
        "num_updates": 55,
        "position": {"batch": 12},
        "metric": 1.25,
    }
    path = saved(content)
    found = inspect(path)
    assert (found.model, found.recognised, found.layout) == ("vip_nano4_32", False, "training state")
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert (found.classes, found.input_size, found.dtypes) == (7, [3, 32, 32], ["float32"])
    assert (found.weights, found.training_aids) == (["averaged", "plain"], 2)
    assert (found.epoch, found.batch, found.updates) == (4, 12, 55)
    assert (found.metric, found.metric_name) == (1.25, "loss")
    assert (found.optimizer, found.learning_rate, found.schedule) == ("adamw", 3e-4, "cosine")
    assert found.bytes == path.stat().st_size
    entries = {entry.name: entry for entry in found.entries}
    assert list(entries) == list(content)
    assert entries["state_dict"].bytes == sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert entries["optimizer"].holds == f"{3 * len(optimizer.state)} tensors"
    assert entries["args"].holds == "Namespace of 4" and entries["epoch"].holds == "4"


@pytest.mark.parametrize("layout", ["bare", "published", "safetensors", "module", "timm"])
def test_weights_of_other_layouts(saved: Callable[..., Path], tmp_path: Path, layout: str) -> None:
    model = timm.create_model("resnet10t" if layout == "timm" else "lvvit_nano4_32", num_classes=5)
    weights = model.state_dict()
    if layout == "safetensors":
        path = tmp_path / "a.safetensors"
        safetensors.torch.save_file(weights, path)
    elif layout == "published":
        path = saved({"epoch": 3, "arch": "lvvit_nano4_32", "state_dict": weights, "version": 2})
    else:
        path = saved({f"module.{name}": value for name, value in weights.items()} if layout == "module" else weights)
    found = inspect(path)
    assert found.layout == {"safetensors": layout, "published": layout}.get(layout, "bare weights")
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.weights == (["plain"] if layout == "published" else [])
    if layout == "timm":
        assert (found.model, found.classes) == (None, None)
    else:
        assert (found.model, found.classes, found.recognised) == ("lvvit_nano4_32", 5, layout != "published")
    assert found.epoch == (3 if layout == "published" else None) and found.optimizer is found.metric is None


HUGE = st.builds(pow, st.just(10), st.just(5000))  # more digits than Python prints
ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | HUGE | st.floats() | st.text(max_size=5) | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3),
    max_leaves=6,
)
NAMES = ["epoch", "arch", "args", "data_config", "class_to_idx", "optimizer", "num_updates", "position", "metric"]
NAMES += ["state_dict", "state_dict_ema", "model_ema", "task_state", "version", "saver", "lr_scheduler", "\ud800", 7]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(NAMES), ODD | st.just(torch.arange(3)), max_size=6))
def test_entries_of_any_kind_are_told_or_refused(tmp_path: Path, odd: dict[Any, Any]) -> None:
    """A file may hold anything under the names that checkpoints use."""
    path = tmp_path / "odd.pth"
    torch.save({"state_dict": random_weights(1), **odd}, path)
    for action in (inspect, verify):
        try:
            json.dumps(getattr(action(path), "__dict__", {}), default=vars, allow_nan=False)
        except UserError as e:
            assert str(path) in str(e) and len(str(e).splitlines()) == 1
    for name, layout in (("a.pth.tar", "published"), ("a.safetensors", "safetensors")):
        try:
            convert(path, tmp_path / name, layout, overwrite=True)
        except UserError:
            continue
        assert verify(tmp_path / name).has_checksum
        expected = state_dict_of(read_checkpoint(path), None)
        assert equal(state_dict_of(read_checkpoint(tmp_path / name), None), expected)


# --- verifying


def test_a_whole_checkpoint(saved: Callable[..., Path]) -> None:
    path = saved(state(1, 0, state_dict_ema=random_weights(2), optimizer={"state": {0: {"exp_avg": torch.ones(2)}}}))
    verdict = verify(path)
    assert (verdict.tensors, verdict.has_checksum) == (9, True)
    assert verdict.sha256 == os.popen(f"sha256sum {path}").read().split()[0]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("entry", ["state_dict", "state_dict_ema", "optimizer", "task_state"])
def test_numbers_that_are_not_finite(saved: Callable[..., Path], entry: str, value: float) -> None:
    odd = {"state": {0: {"exp_avg": torch.tensor([1.0, value]), "step": torch.tensor(1.0)}}}
    content = state(1, 0, state_dict_ema=random_weights(2))
    content[entry] = odd if entry == "optimizer" else {"a": torch.ones(2), "b": torch.tensor([[1.0], [value]])}
    place = "optimizer/state/0/exp_avg" if entry == "optimizer" else f"{entry}/b"
    with pytest.raises(UserError, match=f"not finite, in '{place}'"):
        verify(saved(content))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.bool])
def test_types_of_numbers(saved: Callable[..., Path], tmp_path: Path, dtype: torch.dtype) -> None:
    weights = {"a": torch.tensor([0, 1]).to(dtype), "b": torch.zeros(0, 3, dtype=dtype), "c": torch.ones(()).to(dtype)}
    path = saved(weights)
    assert verify(path).tensors == 3
    convert(path, tmp_path / "a.safetensors", "safetensors")
    read = read_checkpoint(tmp_path / "a.safetensors")
    assert all(torch.equal(read[n].view(torch.uint8), w.view(torch.uint8)) for n, w in weights.items() if w.ndim)
    assert read["c"] == weights["c"] and read["b"].shape == (0, 3)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("kind", ["sparse", "meta", "bits", "quantized"])
def test_tensors_that_are_not_dense_are_refused(saved: Callable[..., Path], kind: str) -> None:
    make = {
        "sparse": lambda: torch.eye(3).to_sparse(),
        "meta": lambda: torch.ones(2, device="meta"),
        "bits": lambda: torch.zeros(8, dtype=torch.uint8).view(torch.bits8),
        "quantized": lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    }
    with pytest.raises(UserError, match="'state_dict/odd', which is no dense tensor"):
        verify(saved({"state_dict": {"odd": make[kind]()}}))


def test_tensors_larger_than_their_file_are_refused(saved: Callable[..., Path]) -> None:
    """A number that is repeated without being stored: 4 TB that would be allocated to look at them."""
    path = saved({"state_dict": {"a": torch.ones(1).expand(10**6, 10**6)}})
    assert path.stat().st_size < 2000
    for action in (inspect, verify):
        with pytest.raises(UserError, match="4,000,000,000,000 bytes, which it does not hold"):
            action(path)
    tensor = torch.ones(1000)
    path = saved({"state_dict": {str(i): tensor for i in range(1000)}})
    for action in (inspect, verify):
        with pytest.raises(UserError, match="4,000,000 bytes, which it does not hold"):
            action(path)


def test_a_file_that_refers_to_itself(saved: Callable[..., Path]) -> None:
    content = state(1, 0)
    content["self"] = content
    for _ in range(60):  # 2 to the power of 60 ways to the same list
        content["twice"] = [content.get("twice"), content.get("twice")]
    assert verify(saved(content)).tensors == 4


def test_deep_nesting(saved: Callable[..., Path]) -> None:
    deep: list = [torch.ones(1)]
    data = torch.ones(1)
    path = saved({"state_dict": {"a": data}, "deep": 0})
    with zipfile.ZipFile(path) as file:
        records = {name: file.read(name) for name in file.namelist()}
    (name,) = (name for name in records if name.endswith("data.pkl"))
    records[name] = records[name].replace(b"K\x00u", b"]" * 5_000 + b"a" * 4_999 + b"u")
    path = archive(path, records)
    for _ in range(4_999):
        deep = [deep]
    assert len(read_checkpoint(path)["deep"]) == 1 and verify(path).tensors == 1
    assert inspect(path).entries[1].holds == "list of 1"


@pytest.mark.parametrize(
    "content", [{}, {"epoch": 3}, {"state_dict": {}}, {"state_dict": {"a": 1}}, {"a": [1]}, [1, 2]]
)
def test_files_without_weights(saved: Callable[..., Path], content: Any) -> None:
    for action in (inspect, verify):
        with pytest.raises(UserError, match="holds"):
            action(saved(content))


def test_the_checkpoints_of_a_folder(saved: Callable[..., Path], tmp_path: Path) -> None:
    names = ["last.pth.tar", "checkpoint-1.pth.tar", "recovery.pth.tar", "a.pth", "b.pt", "c.safetensors"]
    for name in (*names, ".last.pth.tar.unfinished", ".hidden.pth", "summary.csv", "args.yaml"):
        saved(state(1, 0), name)
    assert [path.name for path in checkpoints_at(tmp_path)] == sorted(names)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoints_at(tmp_path / "empty")
    with pytest.raises(UserError, match="no checkpoint at"):
        checkpoints_at(tmp_path / "none.pth")


# --- averaging


def mean(seeds: list[int], dtype: torch.dtype = torch.float32) -> StateDict:
    """By NumPy, in float64; integers of the last."""
    weights = [random_weights(seed, dtype) for seed in seeds]
    result = {}
    for name, tensor in weights[-1].items():
        values = np.stack([w[name].double().numpy() for w in weights]).mean(0)
        result[name] = torch.from_numpy(np.asarray(values)).to(dtype) if tensor.is_floating_point() else tensor
    return result


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(0, 100), min_size=1, max_size=5, unique=True),
    st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    st.sampled_from(["a.pth", "a.safetensors", "a.pth.tar"]),
)
def test_the_mean_is_that_of_numpy(tmp_path: Path, seeds: list[int], dtype: torch.dtype, name: str) -> None:
    paths = [tmp_path / f"{i}.pth" for i in range(len(seeds))]
    for path, seed in zip(paths, seeds, strict=True):
        torch.save(random_weights(seed, dtype), path)
    average(paths, tmp_path / name, overwrite=True)
    found, expected = read_checkpoint(tmp_path / name), mean(seeds, dtype)
    assert found.keys() == expected.keys() and equal(found["steps"], expected["steps"])
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=eps, atol=0)  # a sum in another order


def test_large_numbers_do_not_overflow(saved: Callable[..., Path], tmp_path: Path) -> None:
    paths = [saved({"a": torch.full((2,), value, dtype=torch.float16)}, f"{value}.pth") for value in (60_000, 60_064)]
    average(paths, tmp_path / "mean.pth")
    assert read_checkpoint(tmp_path / "mean.pth")["a"].tolist() == [60_032, 60_032]


@pytest.fixture
def run(saved: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A run's folder as training leaves it: the best epochs, the last, the best, and a state within an epoch."""

    def make(metrics: dict[int, float], eval_metric: str = "top1", ema: bool = False) -> Path:
        for epoch, metric in metrics.items():
            more = {"state_dict_ema": random_weights(100 + epoch)} if ema else {}
            content = state(epoch, epoch, metric, args={"eval_metric": eval_metric}, **more)
            saved(content, f"run/checkpoint-{epoch}.pth.tar")
        best = max(metrics, key=lambda epoch: metrics[epoch] * (-1 if eval_metric == "loss" else 1))
        os.link(tmp_path / f"run/checkpoint-{best}.pth.tar", tmp_path / "run/model_best.pth.tar")
        shutil.copy(tmp_path / f"run/checkpoint-{max(metrics)}.pth.tar", tmp_path / "run/last.pth.tar")
        saved(state(77, max(metrics)), "run/recovery.pth.tar")
        return tmp_path / "run"

    return make


@pytest.mark.parametrize(
    "options, metric, epochs",
    [
        ({}, "top1", [2, 5, 9, 10]),
        ({"last": 2}, "top1", [9, 10]),
        ({"last": 1}, "top1", [10]),
        ({"best": 1}, "top1", [5]),
        ({"best": 2}, "top1", [2, 5]),
        ({"best": 3}, "top1", [2, 5, 9]),
        ({"best": 1}, "loss", [10]),
        ({"best": 2}, "loss", [9, 10]),
    ],
)
def test_epochs_of_a_run(
    run: Callable[..., Path], tmp_path: Path, options: dict[str, int], metric: str, epochs: list[int]
) -> None:
    """Each once, though the last and the best have two names; of equals the earlier, as training ranks them."""
    folder = run(
        {2: 70.0, 5: 80.0, 9: 70.0, 10: 60.0} if metric == "top1" else {2: 4.0, 5: 3.0, 9: 2.0, 10: 1.0}, metric
    )
    sources, written = average([folder], tmp_path / "mean.pth", **options)
    assert [source.path.name for source in sources] == [f"checkpoint-{epoch}.pth.tar" for epoch in epochs]
    assert [source.epoch for source in sources] == epochs and written.weights == "plain"
    torch.testing.assert_close(read_checkpoint(tmp_path / "mean.pth"), mean(epochs), rtol=1e-6, atol=0)


def test_epochs_beyond_what_is_there(run: Callable[..., Path], saved: Callable[..., Path], tmp_path: Path) -> None:
    folder, output = run({1: 1.0, 2: 2.0}), tmp_path / "mean.pth"
    for option in ("last", "best"):
        with pytest.raises(UserError, match="3 epochs are asked for and there are 2"):
            average([folder], output, **{option: 3})
    bare = saved(random_weights(1), "bare.pth")
    for option, word in (("last", "epoch"), ("best", "metric")):
        with pytest.raises(UserError, match=f"bare.pth does not say its {word}"):
            average([bare], output, **{option: 1})
    with pytest.raises(UserError, match="is a folder"):
        average([folder, bare], output)
    assert not output.exists()


@pytest.mark.parametrize("use_ema, offset", [(None, 100), (True, 100), (False, 0)])
def test_averaged_weights_by_default(
    run: Callable[..., Path], tmp_path: Path, use_ema: bool | None, offset: int
) -> None:
    _, written = average([run({1: 1.0, 2: 2.0}, ema=True)], tmp_path / "mean.pth", use_ema)
    assert written.weights == ("averaged" if offset else "plain")
    expected = mean([1 + offset, 2 + offset])
    torch.testing.assert_close(read_checkpoint(tmp_path / "mean.pth"), expected, rtol=1e-6, atol=0)


def test_averaged_and_plain_weights_are_not_mixed(saved: Callable[..., Path], tmp_path: Path) -> None:
    paths = [saved(state(1, 1, state_dict_ema=random_weights(5)), "a.pth"), saved(state(2, 2), "b.pth")]
    with pytest.raises(UserError, match="b.pth has no averaged weights and others have.*--no-use-ema"):
        average(paths, tmp_path / "mean.pth")
    with pytest.raises(UserError, match="b.pth has no averaged weights"):
        average(paths, tmp_path / "mean.pth", True)
    average(paths, tmp_path / "mean.pth", False)
    torch.testing.assert_close(read_checkpoint(tmp_path / "mean.pth"), mean([1, 2]), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"a.bias": torch.ones(5)}, r"1 of 4 tensors.*'a.bias' is \[4\] float32 in the first and \[5\] float32"),
        ({"a.bias": torch.ones(4).half()}, r"'a.bias' is \[4\] float32 in the first and \[4\] float16"),
        ({"b": torch.ones(4)}, r"1 of 5 tensors.*'b' is missing in the first and \[4\] float32"),
        ({"a.bias": None}, r"1 of 4 tensors.*'a.bias' is \[4\] float32 in the first and missing"),
        ({"a.bias": torch.full((4,), torch.nan)}, "numbers that are not finite, in 'a.bias'"),
    ],
)
def test_weights_that_have_no_mean(
    saved: Callable[..., Path], tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    other = {name: tensor for name, tensor in {**random_weights(2), **change}.items() if tensor is not None}
    paths = [saved(random_weights(1), "a.pth"), saved(random_weights(3), "b.pth"), saved(other, "c.pth")]
    with pytest.raises(UserError, match=words) as e:
        average(paths, tmp_path / "mean.pth")
    assert "c.pth" in str(e.value) and not (tmp_path / "mean.pth").exists()


def test_classes_in_another_order_have_no_mean(saved: Callable[..., Path], tmp_path: Path) -> None:
    paths = [saved(state(i, i, class_to_idx={"cat": i, "dog": 1 - i}), f"{i}.pth") for i in range(2)]
    with pytest.raises(UserError, match="different classes"):
        average(paths, tmp_path / "mean.pth")


# --- stripping and converting


@pytest.mark.parametrize("name", ["vip_nano4_32", "lvvit_nano4_32"])
def test_there_and_back(saved: Callable[..., Path], tmp_path: Path, name: str) -> None:
    """pth to safetensors to pth to the published layout: every model gives the same output to the bit."""
    torch.manual_seed(0)
    model, averaged = (timm.create_model(name, num_classes=7).eval() for _ in range(2))
    content = {"epoch": 8, "version": 2, "arch": name, "metric": 71.5, "optimizer": {}, "args": {"opt": "adamw"}}
    states = {"state_dict": model.state_dict(), "state_dict_ema": averaged.state_dict()}
    first = saved({**content, **states, "task_state": {"aux_head.bias": torch.ones(2)}})
    second, third, last = tmp_path / "b.safetensors", tmp_path / "c.pth", tmp_path / "d.pth.tar"
    written = convert(first, second, "safetensors")
    assert written.weights == "averaged" and set(written.left_out) == {"args", "optimizer", "state_dict", "task_state"}
    assert set(convert(second, third, "pth").left_out) == {"arch", "epoch", "metric", "version"}
    assert convert(third, last, "published").left_out == []
    assert torch.load(last, weights_only=True).keys() == {"arch", "state_dict", "version"}
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = averaged(images)
        assert not torch.equal(model(images), expected)
        for path, weights in (
            (second, safetensors.torch.load_file(second)),
            (third, torch.load(third, weights_only=True)),
            (last, torch.load(last, weights_only=True)["state_dict"]),
        ):
            found = timm.create_model(name, num_classes=7).eval()
            found.load_state_dict(weights)
            assert torch.equal(found(images), expected)
            found = timm.create_model(name, num_classes=7, checkpoint_path=str(path)).eval()
            assert torch.equal(found(images), expected)
    assert recognise(torch.load(third, weights_only=True)) == name


def test_the_published_layout(saved: Callable[..., Path], tmp_path: Path) -> None:
    """What timm's `load_checkpoint` reads, with `use_ema` and without."""
    plain, averaged = (timm.create_model("vip_nano4_32", num_classes=3).state_dict() for _ in range(2))
    more = {"arch": "vip_nano4_32", "task_state": {"aux_head.bias": torch.ones(2)}, "num_updates": 4}
    states = {"state_dict": {f"module.{k}": v for k, v in plain.items()}, "state_dict_ema": averaged}
    source = saved({**state(1, 6, 55.5), **more, **states})
    written = convert(source, tmp_path / "out.pth.tar", "published")
    assert written.weights == "averaged and plain" and set(written.left_out) == {
        "optimizer",
        "task_state",
        "num_updates",
    }
    content = torch.load(tmp_path / "out.pth.tar", weights_only=True)
    assert list(content) == ["epoch", "arch", "metric", "version", "state_dict_ema", "state_dict"]
    assert [content[name] for name in ("epoch", "arch", "metric", "version")] == [6, "vip_nano4_32", 55.5, 2]
    for use_ema, expected in ((True, averaged), (False, plain)):
        model = timm.create_model("vip_nano4_32", num_classes=3)
        load_checkpoint(model, str(tmp_path / "out.pth.tar"), use_ema)
        assert equal(dict(model.state_dict()), dict(expected))


def test_safetensors_say_what_they_are_of(saved: Callable[..., Path], tmp_path: Path) -> None:
    path, output = saved({**state(1, 6, 55.123456789), "arch": "vip_s7"}), tmp_path / "a.safetensors"
    convert(path, output, "safetensors")
    with safetensors.safe_open(output, framework="pt") as file:
        metadata = file.metadata()
    assert {k: metadata[k] for k in ("format", "arch", "epoch", "metric")} == {
        "format": "pt",
        "arch": "vip_s7",
        "epoch": "6",
        "metric": "55.123456789",
    }
    found = inspect(output)
    assert (found.model, found.epoch, found.metric, found.weights) == ("vip_s7", 6, 55.123456789, [])
    convert(output, tmp_path / "a.pth.tar", "published")
    content = torch.load(tmp_path / "a.pth.tar", weights_only=True)
    assert (content["arch"], content["epoch"], content["metric"]) == ("vip_s7", 6, 55.123456789)
    assert output.stat().st_mode == path.stat().st_mode, "others may read it where they may read the source"


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight


def test_tied_and_sliced_tensors(saved: Callable[..., Path], tmp_path: Path) -> None:
    tied, flat = Tied(), torch.arange(12.0)
    weights = {**tied.state_dict(), "rows": flat.view(3, 4)[1:], "turned": flat.view(3, 4).T}
    convert(saved(weights, "a.pth"), tmp_path / "a.safetensors", "safetensors")
    found = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert equal(found, {name: tensor.contiguous() for name, tensor in weights.items()})
    tied.load_state_dict({name: found[name] for name in tied.state_dict()})
    convert(tmp_path / "a.safetensors", tmp_path / "b.pth", "pth")
    assert equal(torch.load(tmp_path / "b.pth", weights_only=True), found)


def test_parameters_become_tensors(saved: Callable[..., Path], tmp_path: Path) -> None:
    source = saved({name: nn.Parameter(p) for name, p in random_weights(1).items() if p.is_floating_point()})
    for name in ("a.pth", "a.safetensors"):
        convert(source, tmp_path / name, layout_of(tmp_path / name))
        average([source], tmp_path / f"mean-{name}")
        for path in (tmp_path / name, tmp_path / f"mean-{name}"):
            assert not any(tensor.requires_grad for tensor in read_checkpoint(path).values())


@pytest.mark.parametrize(
    "name, words",
    [
        ("a.bin", "ends in none of .safetensors, .pth, .pt, .pth.tar"),
        ("none/a.safetensors", "in no folder"),
        ("there.safetensors", "there already.*--overwrite"),
        ("folder.safetensors", "is a folder"),
        ("a.pth", "ending, which is not that of the layout safetensors"),
    ],
)
def test_outputs_that_are_refused(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "there.safetensors").write_text("precious")
    with pytest.raises(UserError, match=words):
        check_output(tmp_path / name, "safetensors", overwrite=False)
    assert (tmp_path / "there.safetensors").read_text() == "precious"
    if name.startswith(("folder", "none")):
        with pytest.raises(UserError, match=words):
            check_output(tmp_path / name, "safetensors", overwrite=True)
    check_output(tmp_path / "there.safetensors", "safetensors", overwrite=True)


@pytest.mark.parametrize("weights", [{"__metadata__": torch.ones(2)}, {"a": torch.ones(2, dtype=torch.complex128)}])
def test_what_safetensors_cannot_hold(saved: Callable[..., Path], tmp_path: Path, weights: StateDict) -> None:
    with pytest.raises(UserError, match="Cannot write .*a.safetensors"):
        convert(saved(weights, "a.pth"), tmp_path / "a.safetensors", "safetensors")
    assert sorted(os.listdir(tmp_path)) == ["a.pth"]


@pytest.mark.parametrize("name", ["out.pth", "out.safetensors"])
def test_a_full_disk_leaves_what_was_there(
    saved: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    source, output = saved(random_weights(1)), tmp_path / name
    output.write_text("precious")

    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match="Cannot write .*out.*No space left on device"):
        convert(source, output, layout_of(output), overwrite=True)
    assert output.read_text() == "precious" and len(os.listdir(tmp_path)) == 2


def test_a_checkpoint_replaces_itself(saved: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(TENSORS)
    convert(tmp_path / "a.safetensors", tmp_path / "a.safetensors", "safetensors", overwrite=True)
    assert equal(read_checkpoint(tmp_path / "a.safetensors"), random_weights(3))
    path = saved(state(4, 1))
    convert(path, path, "pth", overwrite=True)
    assert equal(read_checkpoint(path), random_weights(4))


def test_stripped_weights_start_a_fine_tuning(saved: Callable[..., Path], tmp_path: Path) -> None:
    source = timm.create_model("vip_nano4_32", num_classes=4)
    path = saved({"state_dict": source.state_dict(), "epoch": 1})
    convert(path, tmp_path / "weights.safetensors", "safetensors")
    model = timm.create_model("vip_nano4_32", num_classes=4)
    assert "nothing made anew" in load_finetune(model, tmp_path / "weights.safetensors")
    assert equal(dict(model.state_dict()), dict(source.state_dict()))
