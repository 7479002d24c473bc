"""A tiny image folder and runs on it, shared by the training tests."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vip.training.config import TrainConfig

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

CLASSES = ("blue", "green", "red", "yellow")


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noisy images of four colours: 40 to train on, 13 to validate on (a number no batch divides)."""
    return write_colours(tmp_path_factory.mktemp("colours"), 40, 13)


def write_colours(root: Path, train: int, val: int) -> Path:
    """Write so many noisy images of four colours."""
    rng = np.random.default_rng(0)
    means = ((40, 40, 200), (40, 200, 40), (200, 40, 40), (200, 200, 40))
    for split, count in (("train", train), ("val", val)):
        for i in range(count):
            pixels = np.clip(rng.normal(means[i % 4], 40, (32, 32, 3)), 0, 255).astype(np.uint8)
            path = root / split / CLASSES[i % 4] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return root


def quick(data: Path, output: Path, **options: object) -> TrainConfig:
    """A run of a second or two without any randomness but the order of images."""
    defaults = dict(
        data=str(data),
        output=str(output),
        experiment="run",
        model="vip_nano4_32",
        device="cpu",
        batch_size=16,
        workers=0,
        epochs=2,
        warmup_epochs=0,
        cooldown_epochs=0,
        lr=1e-3,
        no_aug=True,
        mixup=0.0,
        cutmix=0.0,
        drop_path=0.0,
        smoothing=0.0,
    )
    return TrainConfig(**{**defaults, **options})  # type: ignore[arg-type]
