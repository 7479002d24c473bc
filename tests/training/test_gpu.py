"""What only a GPU can show. `pytest -m gpu -s` also prints throughput, for docs/results.md."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from label_maps import write_maps
from PIL import Image
from timm.task import ClassificationTask

from vip.data.loaders import create_train_loader
from vip.token_labels.targets import TokenLabels, dense_targets
from vip.training.config import TrainConfig
from vip.training.engine import TrainState, train_step
from vip.training.factory import compile_task, create_criterion, create_optimizer
from vip.training.runtime import setup_precision

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """512 training and 64 validation images of 256 pixels in 8 classes."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for split, count in (("train", 512), ("val", 64)):
        for i in range(count):
            path = root / split / str(i % 8) / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8) // 2 + 16 * (i % 8)
            Image.fromarray(coarse.astype(np.uint8)).resize((256, 256)).save(path)
    return root


def start(*command: object) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, timeout=900, env=env, cwd=ROOT, check=False
    )


@pytest.mark.parametrize(
    "flags",
    [
        "--amp --amp-dtype bfloat16",
        "--apex-amp",
        "--amp --amp-dtype bfloat16 --channels-last --pin-mem",
        "--amp --amp-dtype bfloat16 --torchcompile",
        "--amp --amp-dtype bfloat16 --torchcompile --memory-budget 0.6",
        "--amp --amp-dtype bfloat16 --fast-norm --model-ema --grad-checkpointing",
        "--amp --amp-dtype bfloat16 --no-prefetcher",
    ],
)
def test_vip_s7_trains_at_224_and_validates_alike(photos: Path, tmp_path: Path, flags: str):
    common = "--model vip_s7 -b 64 -j 8 --epochs 4 --warmup-epochs 0 --cooldown-epochs 0 --log-interval 2".split()
    outputs = ("--output", tmp_path, "--experiment", "run", *flags.split())
    done = start(ROOT / "distributed_train.sh", 1, photos, *common, *outputs)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "run/summary.csv", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    speeds = [line.split(",")[-3].strip() for line in done.stderr.splitlines() if line.startswith("Epoch 3/3")]
    print(f"\nvip_s7 {flags}: {speeds[-1]} in the last epoch, {torch.cuda.get_device_name()}")
    form = ["--torchcompile"] if "--torchcompile" in flags else []  # which a checkpoint does not ask for
    checked = start("bash", ROOT / "eval.sh", photos / "val", tmp_path / "run/last.pth.tar", "-j", 4, *form)
    assert checked.returncode == 0, checked.stderr
    assert str(json.loads(checked.stdout.partition("--result\n")[2])["top1"]) == last["eval_top1"]


@pytest.mark.parametrize("flags", ["--apex-amp", "--amp --amp-dtype bfloat16 --torchcompile --mixup 0.8 --cutmix 1.0"])
@pytest.mark.parametrize("model", ["lvvit_s", "vip_s7"])
def test_token_labels_train_at_224(photos: Path, tmp_path: Path, model: str, flags: str):
    """The published command for LV-ViT-S but for its batch and epochs, and the same for ViP."""
    maps = write_maps(photos / "train", tmp_path / "maps", (18, 18))
    size = {"lvvit_s": 14, "vip_s7": 16}[model]
    labels = ("--token-label", "--token-label-data", maps, "--token-label-size", size, "--model-ema")
    short = "-b 64 -j 8 --epochs 4 --warmup-epochs 0 --cooldown-epochs 0 --log-interval 2 --img-size 224".split()
    outputs = ("--output", tmp_path, "--experiment", "run", "--model", model, *flags.split())
    done = start(ROOT / "distributed_train.sh", 1, photos, *labels, *short, *outputs, "--drop-path", 0.1)
    assert done.returncode == 0, done.stderr
    speeds = [line.split(",")[-3].strip() for line in done.stderr.splitlines() if line.startswith("Epoch 3/3")]
    print(f"\n{model} with token labels {flags}: {speeds[-1]} in the last epoch, {torch.cuda.get_device_name()}")


@pytest.mark.parametrize("mixed", [False, True])
def test_targets_are_made_without_waiting_and_in_little_memory(mixed: bool):
    images, classes, size = 128, 1000, 14
    generator = torch.Generator().manual_seed(0)
    labels = TokenLabels(
        target=torch.randint(classes, (images,), generator=generator),
        map_values=torch.randn(images, 5, 18, 18, generator=generator).half(),
        map_indices=torch.randint(classes, (images, 5, 18, 18), generator=generator).int(),
        box=(0.7 * torch.eye(3)[:2] + 0.1).expand(images, 2, 3).contiguous(),
        shown=torch.ones(images, size, size),
        partner=torch.arange(images).flip(0) if mixed else None,
        own=torch.rand(images) if mixed else None,
        own_tokens=torch.rand(images, size, size) if mixed else None,
    ).to(torch.device("cuda"))
    arguments = (labels, classes, (size, size), 0.1, torch.float16)
    dense_targets(*arguments)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.set_sync_debug_mode("error")
    try:
        start_event.record()
        targets = dense_targets(*arguments)
        end_event.record()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    spent = start_event.elapsed_time(end_event)
    print(f"\ntargets of {images} images, mixed {mixed}: {spent:.1f} ms, {peak / 1e6:.0f} MB")
    assert targets.tokens.shape == (images, size, size, classes) and peak < 100e6


@pytest.mark.parametrize("compiled", [False, True])
def test_a_training_step_does_not_wait(compiled: bool):
    """Forward and backward pass, clipping, update and average of the weights."""
    config = TrainConfig(amp=True, amp_dtype="bfloat16", clip_grad=1.0, torchcompile="inductor" if compiled else None)
    device = torch.device("cuda")
    model = timm.create_model("vip_nano4_32", drop_path_rate=0.1).to(device)
    task = ClassificationTask(model, create_criterion(config), device=device, verbose=False)
    task.setup_ema(decay=0.99)
    state = TrainState(task, create_optimizer(config, model, 32), None, setup_precision(config, device))
    if compiled:
        compile_task(task, config)
    task.train()
    images, target = torch.randn(32, 3, 32, 32, device=device), torch.rand(32, 1000, device=device).softmax(1)
    for _ in range(2):  # the first make what is made once
        train_step(state, config, images, target, 1.0, update=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_step(state, config, images, target, 1.0, update=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_prefetcher_copies_on_a_stream_of_its_own(photos: Path):
    from vip.data.datasets import create_split

    config = TrainConfig(data=str(photos), workers=2, pin_mem=True, mixup=0.0, cutmix=0.0)
    data_config = {"input_size": (3, 64, 64), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"}
    dataset = create_split(config, "train", is_training=True)
    loader = create_train_loader(dataset, config, data_config, 32, None, torch.device("cuda"))
    images, target = next(iter(loader))
    assert images.is_cuda and target.is_cuda and loader.stream is not None
    assert loader.stream != torch.cuda.current_stream()


def test_half_precision_agrees_with_float32(photos: Path):
    torch.manual_seed(0)
    model = timm.create_model("vip_s7").cuda().eval()
    x = torch.randn(8, 3, 224, 224, device="cuda")
    with torch.inference_mode():
        reference = model(x)
        for dtype, limit in ((torch.float16, 0.01), (torch.bfloat16, 0.05)):
            with torch.autocast("cuda", dtype):
                error = (model(x) - reference).norm() / reference.norm()
            assert error < limit, (dtype, error)
