"""What surrounds the model: the data path of one core, and an epoch of a run against its steps alone."""

import csv
import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import FastCollateMixup, create_dataset, create_loader

import vip
from vip.benchmark.config import BenchmarkConfig
from vip.benchmark.contenders import Case, prepare
from vip.benchmark.measure import Step, take_turn
from vip.data.augmentation import create_mixup, import_fast_images
from vip.data.datasets import create_split
from vip.data.loaders import create_train_loader
from vip.errors import UserError
from vip.training.config import TrainConfig
from vip.training.runtime import available_cores

INPUT = dict(input_size=(3, 224, 224), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), interpolation="bicubic")
CPU = torch.device("cpu")


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch compute with so many threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def write_photographs(folder: Path, count: int, width: int = 500, height: int = 375, quality: int = 90) -> int:
    """Write JPEGs with the spectrum of photographs, whose amplitude falls with the frequency; returns bytes of all."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        spectrum = np.fft.rfft2(rng.standard_normal((3, height, width)), axes=(1, 2)) / np.maximum(frequency, 1 / width)
        grey, *tints = np.fft.irfft2(spectrum, (height, width), axes=(1, 2))
        planes = np.stack([grey, grey + 0.3 * tints[0], grey + 0.3 * tints[1]], -1)
        pixels = np.clip(128 + 50 * (planes - planes.mean()) / planes.std(), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.jpg", quality=quality)
    return sum(path.stat().st_size for path in folder.glob("*.jpg"))


def data_path_seconds(rounds: int, images: int = 128) -> tuple[dict[str, list[float]], float]:
    """CPU seconds that timm's loader ('timm') and `--fast-images` ('fast') take for an image, in each round.

    The recipe is the published one. What the device does (normalization and random erasing) is not part of it.

    Args:
        rounds: Rounds.
        images: Images of a round.

    Returns:
        The seconds, and the mean size of the files in bytes.
    """
    with torch_threads(1), tempfile.TemporaryDirectory() as folder:
        size = write_photographs(Path(folder, "train/a"), images) / images
        loaders = {"timm": _timm_loader(folder), "fast": _fast_loader(folder)}
        seconds: dict[str, list[float]] = {name: [] for name in loaders}
        for i in range(rounds + 1):
            for name, loader in loaders.items():
                seconds[name].append(_seconds_an_image(loader, i))
    return {name: times[1:] for name, times in seconds.items()}, size  # the first round warms up


def data_path_ratios(rounds: int) -> tuple[list[float], str]:
    """How much faster a core fills batches with `--fast-images` than by timm's loader, in each round, and a remark."""
    seconds, size = data_path_seconds(rounds)
    rates = ", ".join(f"{name} {1 / median(times):,.0f} img/s" for name, times in seconds.items())
    ratios = [a / b for a, b in zip(seconds["timm"], seconds["fast"], strict=True)]
    return ratios, f"CPU time; {rates}; {size / 1e3:.0f} kB an image"


def _seconds_an_image(loader: Any, epoch: int) -> float:
    """CPU seconds, which other processes of the machine do not add to."""
    if hasattr(loader.sampler, "set_epoch"):
        loader.sampler.set_epoch(epoch)
    begin, images = time.process_time(), 0
    for batch, _ in loader:
        images += len(batch)
    return (time.process_time() - begin) / images


def _fast_loader(folder: str) -> Any:
    config = TrainConfig(data=folder, workers=0, fast_images=True)
    data = create_split(config, "train", is_training=True, decode=import_fast_images().decode_fast)
    mixup = create_mixup(config, 1000, config.smoothing, collate=True)
    loader: Any = create_train_loader(data, config, INPUT, 32, mixup, CPU)
    return loader.loader  # without the prefetcher, whose work is the device's


def _timm_loader(folder: str) -> Any:
    config = TrainConfig()
    data = create_dataset("", root=f"{folder}/train", is_training=True)
    mixup = FastCollateMixup(
        mixup_alpha=config.mixup, cutmix_alpha=config.cutmix, label_smoothing=config.smoothing, num_classes=1000
    )
    loader: Any = create_loader(
        data,
        batch_size=32,
        is_training=True,
        **INPUT | {"interpolation": "random"},  # type: ignore[arg-type]  # of values of several types
        re_prob=config.reprob,
        re_mode=config.remode,
        color_jitter=config.color_jitter,
        auto_augment=config.aa,
        num_workers=0,
        collate_fn=mixup,
        device=CPU,
        persistent_workers=False,
    )
    return loader.loader


def epoch_ratios(device: torch.device, config: BenchmarkConfig, model: str = "vip_s7") -> tuple[list[float], str]:
    """The time of an epoch over that of its steps, in each epoch but the first two, and a remark.

    The images are of one color, have the size of the model's and are not augmented, so that loading them takes no part.
    Of a run's first two epochs one starts the processes that load for training, the other pays once for having started
    those that load for validation: memory is copied as it is written. On a CPU the run has one thread, as
    `distributed_train.sh` gives a process unless told otherwise, and so have the steps; its loader has the other cores.
    Runs, three on a CPU and one on a GPU, and the steps take turns.

    Raises:
        UserError: If the run fails.
    """
    gpu, cores = device.type == "cuda", available_cores()
    # enough updates for the wait for a first batch to count little, few enough for the suite to stay short
    batch, updates, epochs, runs = (min(config.batch_size[0], 128), 200, 4, 1) if gpu else (4, 10, 4, 3)
    flags = f"--model {model} -b {batch} --epochs {epochs} --warmup-epochs 0 --cooldown-epochs 0 --no-aug "
    flags += f"--mixup 0 --cutmix 0 --drop-path 0 --reprob 0 --log-interval 1000 --device {device.type} "
    workers = min(15, cores - 1) if gpu else cores - 1  # a container may claim cores that it does not get
    flags += f"-j {max(1, workers)} --checkpoint-hist 1" + (" --amp --amp-dtype bfloat16" if gpu else "")
    pretrained_cfg: Any = timm.get_pretrained_cfg(model, allow_unregistered=False)
    size = pretrained_cfg.input_size[-1]
    own = dataclasses.replace(config, precision="bfloat16" if gpu else "float32", torchcompile=None)
    ratios, alone = [], []
    with tempfile.TemporaryDirectory() as folder, torch_threads(torch.get_num_threads() if gpu else 1):
        for split, count in (("train", batch * updates), ("val", batch)):
            _write_plain_images(Path(folder, "data", split), count, size)
        step = prepare(Case(model, None, batch), "train", own, device).step
        alone.append(_median_seconds(step, min(updates, 25), device))
        for i in range(runs):
            rates = _run_epochs(Path(folder, f"run{i}"), f"{folder}/data", *flags.split())[2:]
            alone.append(_median_seconds(step, min(updates, 25), device))
            ratios += [batch / rate / fmean(alone[-2:]) for rate in rates]  # of steps before and after the run
    return ratios, f"{model}, batch {batch}, {batch / median(alone):,.1f} img/s by its steps alone"


def _median_seconds(step: Step, repeats: int, device: torch.device) -> float:
    return median(take_turn(step, repeats, device) for _ in range(3))


def _run_epochs(folder: Path, *flags: str) -> list[float]:
    """Images a second in each epoch of a run of one process."""
    root = Path(vip.__file__).parents[1]
    env = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = [
        str(root / "distributed_train.sh"),
        "1",
        *flags,
        "--output",
        str(folder.parent),
        "--experiment",
        folder.name,
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("Process ")]
        reason = said[-1] if said else "it said nothing"  # but which process it was
        raise UserError(f"distributed_train.sh ended with status {done.returncode}: {reason}")
    with open(folder / "speed.csv") as f:
        return [float(row["train_images_per_second"]) for row in csv.DictReader(f)]


def _write_plain_images(folder: Path, count: int, size: int) -> None:
    """JPEGs of one color, links to ten files."""
    for i in range(10):
        (folder / str(i)).mkdir(parents=True)
        Image.new("RGB", (size, size), (25 * i, 100, 100)).save(folder / str(i) / "0.jpg")
    for i in range(10, count):
        os.link(folder / str(i % 10) / "0.jpg", folder / str(i % 10) / f"{i}.jpg")
