"""Distillation: losses against formulas in float64, whatever the teacher is, and runs with one."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import quick
from exact_runs import ROOT
from PIL import Image
from timm.models import save_for_hf
from training_command import QUICK, Outcome

import vip  # noqa: F401  # registers the models
from vip.training.config import TrainConfig
from vip.training.distillation import Teacher, create_distillation
from vip.training.trainer import train

CPU = torch.device("cpu")
STUDENT = dict(input_size=(3, 32, 32), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
TEACHER = dict(input_size=(3, 48, 40), mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def teachers_view(images: torch.Tensor) -> torch.Tensor:
    """The images as Pillow resizes them, from what the student sees to what the teacher does."""
    mean, std, own_mean, own_std = (np.array(c[n]) for c in (STUDENT, TEACHER) for n in ("mean", "std"))
    pixels = images.permute(0, 2, 3, 1).numpy() * std + mean
    height, width = TEACHER["input_size"][1:]
    resized = [
        [Image.fromarray(p[..., c].astype(np.float32)).resize((width, height), Image.BICUBIC) for c in range(3)]
        for p in pixels
    ]
    planes = np.array([[np.asarray(channel) for channel in image] for image in resized], dtype=float)
    return torch.from_numpy((planes - own_mean[:, None, None]) / own_std[:, None, None])


def models_and_loss(student: Any, **options: Any) -> tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """Teacher, images, targets, the teacher's view, and the loss of timm's task."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=4).double()
    images = torch.randn(6, 3, 32, 32, dtype=torch.float64)
    target = torch.softmax(torch.randn(6, 4, dtype=torch.float64), 1)
    config = TrainConfig(teacher="x", **options)
    criterion = torch.nn.CrossEntropyLoss()
    teacher = Teacher(model, TEACHER, STUDENT).double()
    task = create_distillation(config, student, teacher, criterion, CPU).double()
    task.train()
    loss = task(images, target)["loss"]
    return task, images, target, teachers_view(images), loss.item()


def kl(student: np.ndarray, teacher: np.ndarray, temperature: float) -> float:
    """T² times the divergence from the teacher's softened distribution (arXiv 1503.02531), averaged over images."""
    log_p, log_q = log_softmax(teacher / temperature), log_softmax(student / temperature)
    return temperature**2 * (np.exp(log_p) * (log_p - log_q)).sum(1).mean()


@pytest.mark.parametrize(("alpha", "temperature"), [(0.3, 4.0), (1.0, 1.0), (0.0, 2.0)])
def test_logits(alpha: float, temperature: float) -> None:
    torch.manual_seed(1)
    student = timm.create_model("vip_nano4_32", num_classes=4).double()
    task, images, target, view, loss = models_and_loss(student, distill_alpha=alpha, distill_temperature=temperature)
    with torch.no_grad():
        ours, theirs = student(images).numpy(), task.teacher.model(view).numpy()
    labels = -(target.numpy() * log_softmax(ours)).sum(1).mean()
    assert loss == pytest.approx((1 - alpha) * labels + alpha * kl(ours, theirs, temperature), rel=1e-4)
    assert alpha == 0 or loss != pytest.approx(labels, rel=0.01)


def test_features() -> None:
    """Of 128 numbers, projected to the teacher's."""
    torch.manual_seed(1)
    student = timm.create_model("vip_nano4_32", num_classes=4).double()
    task, images, target, view, loss = models_and_loss(student, distill_type="feature", distill_alpha=0.7)
    with torch.no_grad():
        pooled = student.forward_features(images).numpy().mean((1, 2))
        weight, bias = (p.numpy() for p in task.trainable_module.projection.parameters())
        theirs = task.teacher.model.forward_features(view).numpy().mean((2, 3))
        ours = student(images).numpy()
    assert pooled.shape[1] != theirs.shape[1]
    labels = -(target.numpy() * log_softmax(ours)).sum(1).mean()
    assert loss == pytest.approx(0.3 * labels + 0.7 * ((pooled @ weight.T + bias - theirs) ** 2).mean(), rel=1e-4)


def test_tokens() -> None:
    """The head of the class token learns from the labels, that of the distillation token from the teacher."""
    torch.manual_seed(1)
    student = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, num_classes=4, depth=2).double()
    task, images, target, view, loss = models_and_loss(student, distill_type="token", distill_temperature=3.0)
    with torch.no_grad():
        tokens = student.forward_features(images)
        main, distilled = student.head(tokens[:, 0]).numpy(), student.head_dist(tokens[:, 1]).numpy()
        theirs = task.teacher.model(view).numpy()
    labels = -(target.numpy() * log_softmax(main)).sum(1).mean()
    assert loss == pytest.approx(0.5 * labels + 0.5 * kl(distilled, theirs, 3.0), rel=1e-4)


def test_a_teacher_of_the_same_view_sees_the_same_images() -> None:
    teacher = Teacher(timm.create_model("vip_nano4_32", num_classes=4), STUDENT, STUDENT)
    images = torch.randn(2, 3, 32, 32)
    assert teacher.normalize_input(images) is images


@pytest.fixture(scope="module")
def colour_teacher(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned the four colours."""
    folder = tmp_path_factory.mktemp("teacher")
    train(quick(colours, folder, epochs=4, img_size=40, mean=[0.5], std=[0.25]))
    return folder / "run"


WAYS: dict[str, dict[str, Any]] = {
    "all at once": dict(
        mixup=0.8, cutmix=1.0, smoothing=0.1, amp=True, amp_dtype="bfloat16", model_ema=True, model_ema_decay=0.5,
        grad_accum_steps=2, channels_last=True, grad_checkpointing=True, bce_loss=True, drop_path=0.1,
    ),
    "compiled": dict(torchcompile="eager", model_ema=True, layer_decay=0.7),
    "compiled, features": dict(torchcompile="eager", model_ema=True, distill_type="feature", layer_decay=0.7),
    "no prefetcher": dict(no_prefetcher=True, clip_grad=1.0),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_teacher_goes_with(way: str, colours: Path, colour_teacher: Path, tmp_path: Path, command: Callable) -> None:
    """The checkpoint has a student's weights and no others, and is validated as any."""
    before = {f.name: f.read_bytes() for f in colour_teacher.iterdir() if f.is_file()}
    train(quick(colours, tmp_path, teacher=str(colour_teacher), epochs=1, **WAYS[way]))
    assert {f.name: f.read_bytes() for f in colour_teacher.iterdir() if f.is_file()} == before
    path = tmp_path / "run/last.pth.tar"
    content = torch.load(path, weights_only=True)
    names = timm.create_model("vip_nano4_32").state_dict().keys()
    assert content["state_dict"].keys() == names and "task_state" not in content
    assert ("state_dict_ema" in content) == ("model_ema" in WAYS[way])
    done: Outcome = command("validate", colours, "--checkpoint", path, "--device", "cpu", "-j", 0)
    assert done.status == 0, done.err


def test_it_is_from_the_teacher_that_the_student_learns(colours: Path, colour_teacher: Path, tmp_path: Path) -> None:
    """With no weight on the labels and with labels that say nothing; the teacher is not changed by it."""
    labels = dict(smoothing=0.999, lr=2e-3, epochs=6, batch_size=8)
    train(quick(colours, tmp_path, experiment="alone", **labels))
    train(quick(colours, tmp_path, experiment="taught", teacher=str(colour_teacher), distill_alpha=1.0, **labels))
    state = [torch.load(tmp_path / name / "last.pth.tar", weights_only=True) for name in ("alone", "taught")]
    assert state[1]["metric"] > 80 and state[1]["metric"] > state[0]["metric"]


def test_student_starts_as_without_a_teacher(
    colours: Path, colour_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same weights and the same images, so that what differs is the teacher's doing."""
    seen: dict[str, list[torch.Tensor]] = {}
    for name, options in {"alone": {}, "taught": {"teacher": str(colour_teacher), "distill_alpha": 0.0}}.items():
        train(quick(colours, tmp_path, experiment=name, aa="rand-m9", no_aug=False, mixup=0.2, epochs=1, **options))
        seen[name] = list(torch.load(tmp_path / name / "last.pth.tar", weights_only=True)["state_dict"].values())
    for ours, theirs in zip(*seen.values(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_teacher_by_name_and_by_bare_weights(colours: Path, tmp_path: Path, command: Callable) -> None:
    torch.manual_seed(0)
    teacher = timm.create_model("test_vit", num_classes=4)
    save_for_hf(teacher, str(tmp_path / "hub"))
    torch.save(timm.create_model("vip_nano4_32", num_classes=4).state_dict(), tmp_path / "bare.pth")
    for i, name in enumerate((f"local-dir:{tmp_path / 'hub'}", tmp_path / "bare.pth")):
        flags = ("--teacher", name, "--output", tmp_path, "--experiment", f"run{i}")
        done: Outcome = command("train", colours, *QUICK, *flags)
        assert done.status == 0, done.err


def test_teachers_that_cannot_teach(colours: Path, colour_teacher: Path, tmp_path: Path, command: Callable) -> None:
    def refused(*flags: object) -> str:
        done: Outcome = command("train", colours, *QUICK, "--output", tmp_path, *flags)
        return done.error("vip train")

    torch.save(timm.create_model("vip_nano4_32", num_classes=10).state_dict(), tmp_path / "ten.pth")
    torch.save(timm.create_model("vip_nano4_32", num_classes=4, in_chans=1).state_dict(), tmp_path / "gray.pth")
    (tmp_path / "damaged.pth").write_bytes(b"nothing")
    content = torch.load(colour_teacher / "last.pth.tar", weights_only=True)
    content["class_to_idx"] = {"blue": 0, "green": 1, "red": 2, "violet": 3}
    torch.save(content, tmp_path / "violet.pth.tar")
    assert "has 10 classes, and the student 4" in refused("--teacher", tmp_path / "ten.pth")
    assert "gray.pth" in refused("--teacher", tmp_path / "gray.pth")
    assert "damaged" in refused("--teacher", tmp_path / "damaged.pth")
    assert "no checkpoint" in refused("--teacher", tmp_path / "nowhere.pth")
    assert "no checkpoint and no model" in refused("--teacher", "resnet51x") and "Did you mean" in refused(
        "--teacher", "resnet51x"
    )
    assert "no pretrained weights" in refused("--teacher", "vip_nano4_32")
    assert "other classes" in refused("--teacher", tmp_path / "violet.pth.tar")
    assert "has none" in refused("--teacher", colour_teacher, "--distill-type", "token")
    for flags in (["--token-label"], ["--jsd-loss", "--aug-splits", 3], ["--torchscript"]):
        said = refused("--teacher", colour_teacher, "--mixup", 0, "--cutmix", 0, *flags)
        assert f"{flags[0]} does not go with --teacher" in said
    assert "add --teacher" in refused("--distill-alpha", 0.9)
    assert "compares none" in refused(
        "--teacher", colour_teacher, "--distill-type", "feature", "--distill-temperature", 3
    )
    assert "--distill-alpha is 2.0" in refused("--teacher", colour_teacher, "--distill-alpha", 2)
    assert not [f for f in tmp_path.iterdir() if f.is_dir()]


def test_resume_says_when_the_projection_comes_or_goes_or_is_another(
    colours: Path, tmp_path: Path, command: Callable
) -> None:
    for name in ("test_resnet", "test_vit"):
        content = {"arch": name, "state_dict": timm.create_model(name, num_classes=4).state_dict()}
        torch.save(content, tmp_path / f"{name}.pth.tar")
    run = ("train", colours, *QUICK, "--output", tmp_path, "--experiment", "run")
    resnet, vit = (
        ("--teacher", tmp_path / f"test_{n}.pth.tar", "--distill-type", "feature") for n in ("resnet", "vit")
    )
    assert command(*run, *resnet).status == 0
    again = (*run, "--resume", "auto", "--epochs", 2)
    assert "of other features" in command(*again, *vit).error("vip train")
    assert "with --distill-type feature: add it" in command(*again).error("vip train")
    assert command(*again, *resnet).status == 0


@pytest.mark.slow
def test_two_processes_learn_from_a_teacher_as_one_does(colours: Path, colour_teacher: Path, tmp_path: Path) -> None:
    """Also with frozen parts, which take part in no reduction."""
    flags = [str(colours), *QUICK, "--teacher", str(colour_teacher), "--freeze", "patch_embed", "network.0"]
    flags += ["--distill-type", "feature", "--no-aug", "--mixup", "0", "--cutmix", "0", "--drop-path", "0"]
    env = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    rows = []
    for start, batch in (([sys.executable, "train.py"], "16"), (["./distributed_train.sh", "2"], "8")):
        argv = [*start, *flags, "-b", batch, "--lr", "1e-3", "--output", str(tmp_path), "--experiment", f"b{batch}"]
        done = subprocess.run(argv, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        rows.append((tmp_path / f"b{batch}" / "summary.csv").read_text().splitlines()[1].split(","))
    assert [float(x) for x in rows[0][1:4]] == pytest.approx([float(x) for x in rows[1][1:4]], rel=1e-4)
