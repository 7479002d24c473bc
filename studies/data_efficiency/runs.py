"""All trainings of the study, in processes of their own."""

import json
import os
import signal
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from studies.data_efficiency.models import ABLATIONS, MODELS
from studies.data_efficiency.training import Job, train
from vip.errors import UserError
from vip.files import replacing
from vip.training.runtime import Runtime, allow_fast_kernels

FRACTIONS = (1.0, 0.3, 0.1)
SEEDS = (0, 1, 2)


def jobs() -> list[Job]:
    """All trainings, seed by seed."""
    return [
        *(Job(model, fraction, seed) for seed in SEEDS for fraction in FRACTIONS for model in MODELS),
        *(Job(model, 1.0, seed) for seed in SEEDS for model in ABLATIONS),
    ]


def run_missing(data: str, size: str, device: torch.device, output: Path, at_a_time: int) -> list[dict[str, Any]]:
    """Run the trainings that have no result in `output`; returns the results of all."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"Cannot write to {output} ({e.strerror}); choose another --output.") from e
    files = {job: output / f"{job.name}.json" for job in jobs()}
    missing = [job for job, file in files.items() if not file.exists()]
    for job in files.keys() - set(missing):  # before hours are spent beside results that are of no use
        _read(files[job], size)
    threads = max(1, (os.cpu_count() or 1) // at_a_time)
    with ProcessPoolExecutor(
        at_a_time, get_context("spawn"), initializer=_start_process, initargs=(threads, device.type)
    ) as pool:
        running = [pool.submit(_run, job, data, size, device, files[job]) for job in missing]
        try:
            for done in tqdm(as_completed(running), "Trainings", len(files), initial=len(files) - len(missing)):
                done.result()
        except BaseException:  # an interruption, or a training that failed: the others are not waited for
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [_read(file, size) for file in files.values()]


def _read(file: Path, size: str) -> dict[str, Any]:
    try:
        result = json.loads(file.read_text())
    except ValueError as e:
        raise UserError(f"{file} is damaged ({e}): remove it, and the training is repeated.") from e
    if not isinstance(result, dict) or "size" not in result:
        raise UserError(f"{file} is no result of this study: remove it, and the training is repeated.")
    if result["size"] != size:
        raise UserError(f"{file.parent} holds results of --size {result['size']}, not {size}: choose another --output.")
    return result


def _start_process(threads: int, device_type: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # an interruption ends a training at once
    torch.set_num_threads(threads)
    if device_type == "cuda":
        allow_fast_kernels()


def _run(job: Job, data: str, size: str, device: torch.device, file: Path) -> None:
    result = train(job, data, size, Runtime(device))
    with replacing(file) as unfinished:
        unfinished.write_text(json.dumps(result, indent=1))
