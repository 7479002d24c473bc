"""A tiny image folder, a run trained on it, and a way to call the commands."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from training_command import QUICK, Outcome

import vip.cli

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that hold slow tests come first, so that no process is left with them while the others have ended."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


COLOURS = {"blue": (30, 60, 200), "green": (40, 180, 50), "red": (210, 40, 30)}


def write_images(root: Path, per_class: int, names: dict[str, tuple[int, int, int]] | None = None) -> Path:
    """Write noisy images of one colour a class, JPEG and PNG in turn."""
    rng = np.random.default_rng(per_class)
    for name, colour in (names or COLOURS).items():
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = np.clip(rng.normal(colour, 20, (32, 32, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{name}{i}.{'png' if i % 2 else 'jpg'}")
    return root


@pytest.fixture(scope="session", autouse=True)
def process_as_it_was() -> Iterator[None]:
    """Keeps what commands set in their process out of that of the tests.

    It gives memory back, which tells what a test takes, and multiplies by what torch takes by default.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vip.training.runtime._keep_freed_memory", lambda: None)
        patch.setattr("vip.training.runtime._multiply_by_onednn", lambda: None)
        yield


@pytest.fixture
def matmul_setting() -> Iterator[Any]:
    """torch's setting of oneDNN's matrix products, which is what it was afterwards."""
    setting: Any = getattr(torch.backends.mkldnn, "matmul", None)
    if setting is None:
        pytest.skip("torch before 2.9 has none")
    before = setting.fp32_precision
    yield setting
    setting.fp32_precision = before


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 training and 15 validation images of three colours. Do not change it, copy it."""
    root = tmp_path_factory.mktemp("image_folder")
    write_images(root / "train", 12)
    write_images(root / "val", 5)
    return root


@pytest.fixture(scope="session")
def trained_run(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one epoch of `vip_nano4_32` on `image_folder`."""
    output = tmp_path_factory.mktemp("runs")
    argv = ["train", image_folder, *QUICK, "--lr", "1e-3", "--output", output, "--experiment", "run"]
    assert vip.cli.main([str(a) for a in argv]) == 0
    return output / "run"


@pytest.fixture
def command(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Runs `vip ARGUMENTS` in this process and returns what a shell would see."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def run(*argv: object) -> Outcome:
        capsys.readouterr()
        status = vip.cli.main([str(a) for a in argv])
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err)

    return run
