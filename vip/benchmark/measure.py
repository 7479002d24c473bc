"""Time and memory of steps that take turns, so that a slow minute of the machine falls on all of them."""

import gc
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Step = Callable[[], Any]


@dataclass
class Turns:
    """What a step took.

    Attributes:
        seconds: Seconds of one step, averaged over each turn.
        error: Why it takes no more turns, empty if nothing went wrong.
        out_of_memory: Whether memory was what it lacked.
    """

    seconds: list[float] = field(default_factory=list)
    error: str = ""
    out_of_memory: bool = False


def take_turn(step: Step, repeats: int, device: torch.device) -> float:
    """Seconds of a step, averaged over repeats in a row; by the events of the device where it is a GPU."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats
    begin = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - begin) / repeats


def take_turns(
    steps: Mapping[Hashable, Step],
    rounds: int,
    seconds: float,
    device: torch.device,
    on_turn: Callable[[], Any] = lambda: None,
) -> dict[Hashable, Turns]:
    """Time steps in rounds; each has a turn of about `seconds` in each round.

    Every other round goes back through the order of the one before, and each pair of rounds begins one step further
    on: so no step always follows the same other, whose work may have heated the processor or filled its caches.

    Args:
        steps: Steps that have been warmed up, by name.
        rounds: Turns of each step.
        seconds: Length of a turn; it is one step at least.
        device: Device they run on.
        on_turn: Called after each turn.
    """
    turns: dict[Hashable, Turns] = {name: Turns() for name in steps}
    repeats: dict[Hashable, int] = {}
    names = list(steps)
    for i in range(rounds):
        first = i // 2 % max(len(names), 1)
        order = names[first:] + names[:first]
        for name in reversed(order) if i % 2 else order:
            if not turns[name].error:
                try:
                    if name not in repeats:
                        repeats[name] = max(1, round(seconds / max(take_turn(steps[name], 1, device), 1e-9)))
                    turns[name].seconds.append(take_turn(steps[name], repeats[name], device))
                except Exception as e:  # whatever it is that a model does not survive, the others go on
                    turns[name].error, turns[name].out_of_memory = one_line(e), is_out_of_memory(e)
            on_turn()
    return turns


def one_line(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    # torch.compile names the backend in a line that ends in a colon, and the reason in the next
    return next((line for line in lines if not line.endswith(":")), lines[0] if lines else type(error).__name__)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was what a computation lacked."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    texts = (
        *("can't allocate memory", "not enough memory", "could not create a primitive"),  # the last is all of oneDNN's
        *("out of memory", "ALLOC_FAILED", "unable to find an engine"),  # CUDA, its libraries, cuDNN's search
    )
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


def free_memory(device: torch.device) -> None:
    """Give back what nobody refers to any more, on a CPU to what is allocated next."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def within_available_memory(device: torch.device) -> Iterator[None]:
    """Let allocations beyond the memory that is free now fail on a CPU, where Linux would kill the process later."""
    available = _kilobytes("/proc/meminfo", "MemAvailable")
    if device.type != "cpu" or available is None:
        yield
        return
    import resource  # not on Windows, which has no /proc either

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = ((_kilobytes("/proc/self/status", "VmData") or 0) + available) * 1024
    known = [n for n in (soft, hard, limit) if n != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min(known), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _kilobytes(path: str, name: str) -> int | None:
    """A number that Linux tells, None where there is no Linux."""
    try:
        found = re.search(rf"^{name}:\s*(\d+) kB$", Path(path).read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return None
    return int(found.group(1)) if found else None


def peak_memory(step: Step, device: torch.device) -> int | None:
    """Bytes that a step allocates at its peak, beyond what is there; None on devices that do not tell."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return None
    with _silent_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    return max(accumulate(e["args"]["Bytes"] for e in sorted(events, key=lambda e: e["ts"])), default=0)


_KINDS = {  # of kernels and operations, by what their names hold in small letters
    "matrix products": (
        *("gemm", "::mm", "addmm", "bmm", "cutlass", "nvjet", "xmma", "mkldnn_linear", "convolution", "conv2d"),
        "_mix_kernel",  # of vip.ops
    ),
    "copies": ("_pack_kernel", "copy", "memcpy", "clone", "::cat", "catarray", "elementwise_kernel_with_index"),
    "norms, means and softmax": ("norm", "gammabeta", "mean", "sum", "softmax", "reduce", "_red_", "_per_"),
    "activations": ("gelu", "relu"),
    "other element by element": ("add", "mul", "div", "elementwise", "_poi_", "foreach", "adam"),
}


def time_shares(step: Step, device: torch.device) -> dict[str, float]:
    """Shares of the time of a step by kind of operation, of the device's kernels where it is a GPU."""
    gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with _silent_stderr(), profile(activities=activities) as profiler:
        step()
        synchronize(device)
    seconds = dict.fromkeys((*_KINDS, "rest"), 0.0)
    for event in profiler.key_averages():
        if gpu and (event.device_type.name != "CUDA" or event.is_user_annotation):  # kernels are events of their own
            continue
        seconds[_kind(event.key)] += event.self_device_time_total if gpu else event.self_cpu_time_total
    total = sum(seconds.values())
    if not total:
        raise RuntimeError("The profiler saw no kernels; it may lack the right to (CUPTI).")
    return {kind: value / total for kind, value in seconds.items()}


def _kind(name: str) -> str:
    return next((kind for kind, words in _KINDS.items() if any(word in name.lower() for word in words)), "rest")


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Drop what libraries write to standard error: torch's profiler tells every start and stop, and a missing GPU."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def matmul_step(dtype: torch.dtype, device: torch.device) -> tuple[Step, int]:
    """A large matrix product, which shows what the machine can do, and its multiply-accumulates."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out), size**3


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()
