"""What a measurement ran on."""

import datetime
import os
import re
import shlex
import shutil
import subprocess
import sys
from typing import Any

import timm
import torch
from torch.utils.collect_env import get_env_info

from vip.training.runtime import onednn_multiplies
from vip.version import __version__

_GPU_CLOCKS = ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu")


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware, versions, threads and load, as they are now."""
    info = get_env_info()
    facts = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(["vip", *sys.argv[1:]]),
        "vip": __version__,
        "timm": timm.__version__,
        "torch": info.torch_version,
        "python": info.python_version.split()[0],
        "os": info.os,
        "cpu": _lscpu(info.cpu_info, "Model name"),
        "cpu_cores": os.cpu_count(),
        "cpu_threads_of_torch": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,  # not on Windows
    }
    if device.type == "cpu":
        by_default = "MKL" if torch.backends.mkl.is_available() else "BLAS"
        facts["float32_products"] = "oneDNN" if onednn_multiplies() else by_default
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "gpu": properties.name,
            "gpu_memory_gb": round(properties.total_memory / 1e9, 1),
            "gpu_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": info.nvidia_driver_version,
        }
    return facts


def clocks(device: torch.device) -> dict[str, Any]:
    """Clocks, power limit and temperature, as they are now."""
    gpu = _gpu_clocks(f"GPU-{torch.cuda.get_device_properties(device).uuid}") if device.type == "cuda" else {}
    return {"cpu_mhz": _cpu_mhz(), **gpu}


def _lscpu(text: str | None, name: str) -> str | None:
    found = re.search(rf"^{name}:\s*(.+)$", text or "", re.MULTILINE)
    return found.group(1) if found else None


def _cpu_mhz() -> float | None:
    """The fastest core's clock, where Linux tells."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            clocks = re.findall(r"^cpu MHz\s*: ([\d.]+)$", file.read(), re.MULTILINE)
    except OSError:
        return None
    return max(map(float, clocks), default=None)


def _gpu_clocks(uuid: str) -> dict[str, str]:
    if not shutil.which("nvidia-smi"):
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(_GPU_CLOCKS)}", "--format=csv,noheader", "-i", uuid]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):  # clocks are worth no measurement
        return {}
    values = [value.strip() for value in result.stdout.split(",")] if result.returncode == 0 else []
    return {f"gpu_{name}": value for name, value in zip(_GPU_CLOCKS, values, strict=False)}
