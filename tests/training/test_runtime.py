"""Devices, precision, and the two packages called apex."""

import platform
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vip.errors import UserError
from vip.training.config import TrainConfig
from vip.training.runtime import (
    _leave_cores_to_workers,
    _multiply_by_onednn,
    find_apex_amp,
    onednn_multiplies,
    setup_precision,
    setup_runtime,
)

CPU = torch.device("cpu")


@pytest.fixture
def fake_apex(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts a package called apex in front of any other."""
    for name in [n for n in sys.modules if n == "apex" or n.startswith("apex.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)

    def write(**modules: str) -> None:
        for name, code in modules.items():
            path = tmp_path / "apex" / f"{name}.py"
            path.parent.mkdir(exist_ok=True)
            path.write_text(textwrap.dedent(code))

    yield write
    for name in [n for n in sys.modules if n == "apex" or n.startswith("apex.")]:
        del sys.modules[name]


OLD_AMP = "def initialize(*a, **k): ...\ndef scale_loss(*a): ...\ndef master_params(o): ...\n"


@pytest.mark.parametrize(
    "modules, found",
    [
        ({}, False),
        ({"__init__": "from pyramid_mailer.interfaces import IMailer"}, False),  # PyPI's unrelated apex
        ({"__init__": ""}, False),  # NVIDIA's since April 2025
        ({"__init__": "", "amp": "def scale_loss(*a): ..."}, False),
        ({"__init__": "", "amp": OLD_AMP}, True),  # NVIDIA's before
    ],
    ids=["none", "pypi", "without-amp", "half", "old"],
)
def test_only_nvidias_old_apex_counts(fake_apex, modules: dict[str, str], found: bool):
    fake_apex(**modules)
    assert (find_apex_amp() is not None) == found


def test_apex_amp_is_used_where_it_exists_and_is_float16_by_torch_elsewhere(fake_apex, monkeypatch: pytest.MonkeyPatch):
    config = TrainConfig(apex_amp=True)
    native = setup_precision(config, CPU)
    assert native.apex_amp is None and native.scaler is not None and "no apex.amp" in native.description
    with native.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.float16
    fake_apex(__init__="", amp=OLD_AMP)
    assert "apex.amp" in setup_precision(config, torch.device("cuda")).description
    assert setup_precision(config, torch.device("cuda")).apex_amp is sys.modules["apex.amp"]


@pytest.mark.parametrize(
    "options, dtype, scaled",
    [
        ({}, torch.float32, False),
        ({"amp": True}, torch.float16, True),
        ({"native_amp": True}, torch.float16, True),
        ({"amp": True, "amp_dtype": "bfloat16"}, torch.bfloat16, False),
    ],
)
def test_precision_is_what_the_flags_say(options: dict, dtype: torch.dtype, scaled: bool):
    precision = setup_precision(TrainConfig(**options), CPU)
    with precision.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is dtype
    assert (precision.scaler is not None) == scaled
    assert (precision.loss_scale is not None) == scaled


def test_contradicting_precision_is_refused():
    with pytest.raises(UserError, match="--apex-amp is float16"):
        setup_precision(TrainConfig(apex_amp=True, amp_dtype="bfloat16"), CPU)


def test_devices_that_do_not_exist_are_refused():
    with pytest.raises(UserError, match="No device is called 'gpu'"):
        setup_runtime("gpu")
    with pytest.raises(UserError, match="meta has no memory"):
        setup_runtime("meta")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="finds no GPU"):
            setup_runtime("cuda")


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="Process 3 of this node has no GPU, there are 2"):
        setup_runtime("cuda")


def test_gpus_compute_as_fast_in_every_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for place in (torch.backends, torch.backends.cuda):
        monkeypatch.setattr(place, "cudnn" if place is torch.backends else "matmul", SimpleNamespace())
    assert setup_runtime("cuda").device.type == "cuda"
    assert torch.backends.cudnn.benchmark
    assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("cores, workers, threads", [(2, 0, 2), (2, 1, 1), (2, 8, 1), (8, 1, 7), (8, 8, 6), (1, 4, 1)])
def test_workers_get_cores_of_their_own(monkeypatch: pytest.MonkeyPatch, cores: int, workers: int, threads: int):
    asked: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    _leave_cores_to_workers(workers)
    assert asked == [threads]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such setting")
@pytest.mark.parametrize("set_up", [False, True])
def test_memory_on_a_cpu_is_faulted_in_once(set_up: bool):
    """Sixteen tensors of 64 MB, one after the other: without it, Linux maps the pages of each anew."""
    code = f"""
        import resource, torch
        from vip.training.runtime import setup_runtime
        if {set_up}: setup_runtime("cpu")
        for _ in range(16):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.ones(2**24)
            print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    faulted = sum(int(faults) > 100 for faults in done.stdout.split())
    assert faulted < 5 if set_up else faulted == 16  # what is small may come to lie where a large one was, and stay


@pytest.mark.parametrize("transposed", [False, True])
def test_float32_is_multiplied_in_float32(transposed: bool):
    """Whoever multiplies: rounding to bfloat16 makes errors of 2^-9, a sum of 512 in float32 less than 2^-18."""
    code = f"""
        import torch
        from vip.training.runtime import setup_runtime
        setup_runtime("cpu")
        torch.manual_seed(0)
        for rows, size, columns in ((1, 512, 33), (64, 512, 384), (2048, 512, 512), (9, 512, 1000)):
            a, b = torch.rand(3, rows, size), torch.rand(size, columns)
            b = b.t().contiguous().t() if {transposed} else b
            for found, right in ((a[0] @ b, a[0].double() @ b.double()), (a @ b, a.double() @ b.double())):
                print(((found - right) / right).abs().max().item())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    errors = [float(error) for error in done.stdout.split()]
    assert len(errors) == 8 and max(errors) < 2**-18


@pytest.mark.parametrize(
    ("cpu", "by_onednn"),
    [
        ("vendor_id: AuthenticAMD\nflags: fma avx2 avx512f avx512_bf16", True),
        ("vendor_id: AuthenticAMD\nflags: fma avx2", False),
        ("vendor_id: AuthenticAMD\nflags: fma avx2 avx512f amx_tile", False),
        ("vendor_id: GenuineIntel\nflags: fma avx2 avx512f amx_tile", False),
        (None, False),
    ],
)
def test_onednn_multiplies_where_mkl_leaves_half_idle(
    cpu: str | None, by_onednn: bool, matmul_setting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(self: Path, encoding: str) -> str:
        if cpu is None:
            raise FileNotFoundError(self)
        return cpu

    assert not onednn_multiplies()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", read)
        _multiply_by_onednn()
    assert onednn_multiplies() == by_onednn
