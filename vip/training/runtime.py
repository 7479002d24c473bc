"""Where a process runs: its device, its place among the other processes, and its numeric precision."""

import ctypes
import gc
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from timm.utils import ApexScaler, NativeScaler
from timm.utils.distributed import is_distributed_env, world_info_from_env

from vip.errors import UserError
from vip.training.config import PrecisionConfig

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


@dataclass(frozen=True)
class Runtime:
    """Device of this process and its place among the others."""

    device: torch.device
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    roll_call: Any = None  # process group that is used when the others have failed

    @property
    def distributed(self) -> bool:
        """Whether there are other processes."""
        return self.world_size > 1

    @property
    def is_primary(self) -> bool:
        """Whether this process writes the files and talks to the user."""
        return self.rank == 0


def setup_runtime(
    device: str | None = None, dist_backend: str | None = None, workers: int = 0, dist_timeout: float = 1800
) -> Runtime:
    """Pick the device, let it be fast, and join the process group that torchrun or Slurm set up, if any.

    Args:
        device: Device, CUDA where there is one if None.
        dist_backend: Backend of the process group, that of the device if None.
        workers: Loader processes, which on a CPU get cores of their own.
        dist_timeout: Seconds to wait for another process before the run ends.

    Raises:
        UserError: If the device does not exist, there are more processes than GPUs, or they do not find each other.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as e:
        raise UserError(f"No device is called {device!r}; --device takes cpu, cuda, cuda:1, mps, ...") from e
    kind = chosen.type
    if kind == "meta":
        raise UserError("--device meta has no memory to compute in; use cpu or cuda.")
    local_rank, rank, world_size = world_info_from_env()
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"--device {device}: torch finds no GPU here; use --device cpu or install a driver.")
        gpus = torch.cuda.device_count()
        if local_rank >= gpus:
            raise UserError(f"Process {local_rank + 1} of this node has no GPU, there are {gpus}: start {gpus}.")
        allow_fast_kernels()
    if kind == "cpu":
        _keep_freed_memory()
        _multiply_by_onednn()
        if "OMP_NUM_THREADS" not in os.environ:
            _leave_cores_to_workers(workers)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _die_with_launcher()
    if is_distributed_env() and kind != "cpu":
        chosen = torch.device(kind, local_rank)
    if chosen.index is not None and kind != "cpu":
        torch.get_device_module(chosen).set_device(chosen)
    if not is_distributed_env():
        return Runtime(chosen)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(local_rank), WORLD_SIZE=str(world_size)
    )  # Slurm names them otherwise
    return Runtime(chosen, rank, local_rank, world_size, _join_processes(kind, dist_backend, dist_timeout))


def _join_processes(kind: str, backend: str | None, seconds: float) -> Any:
    """Join the others, and make the group of roll calls."""
    # what a GPU waits for may take a little longer: it is the votes on the host whose failure Python can explain
    timeout = timedelta(seconds=seconds + 60 * (kind != "cpu"))
    try:
        dist.init_process_group(backend or dist.get_default_backend_for_device(kind), timeout=timeout)
        return dist.new_group(backend="gloo", timeout=timedelta(seconds=seconds))
    except (dist.DistError, RuntimeError, ValueError) as e:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(
            f"Process {os.environ['RANK']} does not find the others at {where} ({str(e).splitlines()[0]}); start all "
            "of them, and look at --dist-backend and the firewall."
        ) from e


_ROLL_CALL_SECONDS = 10
_LOST_MESSAGES = (
    "/gloo/",
    "Application timeout",
    "monitoredBarrier",
)  # in torch's errors that have no type of their own


@contextmanager
def naming_lost_processes(runtime: Runtime, place: Callable[[], str]) -> Iterator[None]:
    """Say which process does not answer when a collective has failed, in the words of the first that answers.

    Args:
        runtime: This process among the others.
        place: Where this process is, such as 'epoch 3, batch 17'.

    Raises:
        UserError: If another process hangs or has ended.
    """
    try:
        yield
    except RuntimeError as e:
        if not isinstance(e, dist.DistError) and not any(text in str(e) for text in _LOST_MESSAGES):
            raise
        reason = str(e).splitlines()[0].partition("] ")
        raise UserError(
            f"Process {runtime.rank} lost the others in {place()}: {_call_roll(runtime)}. A process that hangs, as on "
            "a disk that does not answer, can be given longer with --dist-timeout; one that ended has said why. What "
            f"was saved is intact. ({reason[2] or reason[0]})"
        ) from e


def _call_roll(runtime: Runtime) -> str:
    try:
        dist.monitored_barrier(runtime.roll_call, timedelta(seconds=_ROLL_CALL_SECONDS), wait_all_ranks=True)
    except RuntimeError as e:
        missing = re.search(r"Ranks? ([\d, ]+) failed to pass", str(e))
        if missing:
            return f"process {missing[1]} of {runtime.world_size} does not answer"
        return "process 0 does not answer" if "from rank 0" in str(e) else "one has ended"
    return "all of them answer again"


def _die_with_launcher() -> None:
    """Let Linux kill this process when torchrun is killed.

    It is in a session of its own, and would go on writing to the folder of a run that may be running again.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def allow_fast_kernels() -> None:
    """Let a GPU search for the fastest convolutions, and use TF32 where float32 is asked for."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True


def available_cores() -> int:
    """Cores that this process may use, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _leave_cores_to_workers(workers: int) -> None:
    """Keep torch's threads off the cores of the loader processes: OpenMP threads that share a core crawl."""
    cores = torch.get_num_threads()
    torch.set_num_threads(max(1, cores - min(workers, math.ceil(cores / 4))))


def _keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next tensor, as torch does on a GPU, instead of faulting it in anew."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # other C libraries have none
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def _multiply_by_onednn() -> None:
    """Have oneDNN multiply float32 where MKL leaves half of a processor idle, as AMD's with AVX-512.

    torch asks oneDNN only if it may round operands to bfloat16. That is for matrix units (AMX); without any, oneDNN
    computes in float32, to which a test holds it.
    """
    try:
        cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # no Linux
        return
    matmul: Any = getattr(torch.backends.mkldnn, "matmul", None)  # since torch 2.9
    if matmul and "AuthenticAMD" in cpu and "avx512" in cpu and "amx" not in cpu:
        matmul.fp32_precision = "bf16"


def onednn_multiplies() -> bool:
    """Whether oneDNN multiplies float32 on a CPU, and not MKL."""
    return getattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision", "none") == "bf16"


def find_apex_amp() -> ModuleType | None:
    """NVIDIA Apex's `apex.amp`, which releases after April 2025 lack (NVIDIA/apex pull request 1896).

    PyPI's `apex` is an unrelated package; neither it nor an Apex without `amp` is mistaken for one.
    """
    try:
        from apex import amp
    except ImportError:
        return None
    return amp if all(hasattr(amp, name) for name in ("initialize", "scale_loss", "master_params")) else None


@dataclass(frozen=True)
class Precision:
    """Numeric precision of a step.

    Attributes:
        autocast: Makes the context of a forward pass.
        scaler: timm's loss scaler, None where gradients need no scaling.
        apex_amp: The Apex module that has to initialize model and optimizer, None without Apex.
        description: One line for the user.
    """

    autocast: Callable[[], AbstractContextManager[Any]]
    scaler: NativeScaler | ApexScaler | None
    apex_amp: ModuleType | None
    description: str

    @property
    def loss_scale(self) -> float | None:
        """Present loss scale, None without one."""
        scaler = getattr(self.scaler, "_scaler", None)
        return None if scaler is None else scaler.get_scale()


def setup_precision(config: PrecisionConfig, device: torch.device) -> Precision:
    """Choose autocast and loss scaler from `--amp`, `--amp-dtype`, `--native-amp` and `--apex-amp`.

    Raises:
        UserError: If they contradict each other.
    """
    if config.apex_amp and config.amp_dtype == "bfloat16":
        raise UserError("--apex-amp is float16; for bfloat16 give --amp --amp-dtype bfloat16 without it.")
    if config.apex_amp and device.type == "cuda" and (apex_amp := find_apex_amp()):
        return Precision(nullcontext, ApexScaler(), apex_amp, "float16 mixed precision by apex.amp (O1)")
    if not config.mixed_precision:
        return Precision(nullcontext, None, None, "float32")
    dtype = torch.float16 if config.apex_amp else getattr(torch, config.amp_dtype)
    autocast = partial(torch.autocast, device_type=device.type, dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    if dtype is torch.bfloat16:
        return Precision(autocast, None, None, f"{name} mixed precision by torch")
    why = ", as there is no apex.amp to use" if config.apex_amp else ""
    description = f"{name} mixed precision with dynamic loss scaling by torch{why}"
    return Precision(autocast, NativeScaler(device=device.type), None, description)


def leave_together(runtime: Runtime) -> None:
    """End the process group; a process that leaves while another still works can leave that one hanging."""
    if runtime.distributed:
        with naming_lost_processes(runtime, lambda: "the end"):
            dist.barrier()
        dist.destroy_process_group()


def all_reduce_sum(value: torch.Tensor, runtime: Runtime) -> torch.Tensor:
    """Sum a tensor over all processes."""
    if runtime.distributed:
        dist.all_reduce(value)
    return value


@contextmanager
def sparing_shared_pages() -> Iterator[None]:
    """Keep garbage collections from writing to the memory that loader processes share, which would copy it."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
