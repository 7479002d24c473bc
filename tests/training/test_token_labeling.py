"""Training with token labels: runs on a tiny image folder whose label maps name the image's class in every cell."""

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from conftest import CLASSES, quick, write_colours
from label_maps import write_maps
from training_command import Outcome

from vip.cli import main as vip
from vip.cli.arguments import parse
from vip.errors import UserError
from vip.token_labels.store import pack
from vip.token_labels.targets import TokenLabels
from vip.training.config import TRAIN_FLAGS_WITHOUT_EFFECT, TrainConfig
from vip.training.runtime import Runtime
from vip.training.trainer import Trainer, train

CPU = Runtime(torch.device("cpu"))
LABELS = dict(token_label=True, token_label_region="image")


@pytest.fixture(scope="module")
def maps(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_maps(colours / "train", tmp_path_factory.mktemp("maps") / "published")


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "summary.csv", newline="") as file:
        return list(csv.DictReader(file))


AUGMENTED = dict(no_aug=False, aa="rand-m9-mstd0.5-inc1", mixup=0.8, cutmix=1.0, smoothing=0.1, reprob=0.25)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(model="lvvit_nano4_32", **AUGMENTED, model_ema=True, drop_path=0.1),
        dict(model="resnet18", img_size=64, **AUGMENTED),
        dict(model="vit_small_patch16_dinov3", img_size=32, epochs=1),  # class and register tokens
        dict(**AUGMENTED, mixup_mode="elem", token_label_mix="published", token_label_crop="published"),
        dict(token_label_data="", **AUGMENTED),
        dict(token_label_data="", model="lvvit_nano4_32", mix_token=0.0),
        dict(ground_truth=True, dense_weight=0.5, cls_weight=2.0, smoothing=0.1, grad_accum_steps=2),
        dict(dense_weight=0.0, model_ema=True, apex_amp=True, clip_grad=1.0),
        dict(amp=True, amp_dtype="bfloat16", channels_last=True, no_prefetcher=True, **AUGMENTED),
        dict(torchcompile="eager", model_ema=True),
        dict(batch_size=1, epochs=1, **AUGMENTED),
        dict(batch_size=7, model="lvvit_nano4_32", **AUGMENTED),
        dict(grad_checkpointing=True, workers=1, token_label_size=4, layer_decay=0.7),
        dict(input_size=[3, 32, 48], **AUGMENTED),
    ],
    ids=lambda options: "-".join(options) or "defaults",
)
def test_options_train_a_finite_epoch_and_a_checkpoint_that_validates(
    colours: Path, maps: Path, tmp_path: Path, capsys: pytest.CaptureFixture, options: dict
):
    train(quick(colours, tmp_path, **{**LABELS, "token_label_data": str(maps), **options}))
    last = rows(tmp_path / "run")[-1]
    assert math.isfinite(float(last["train_loss"])) and math.isfinite(float(last["eval_loss"]))
    capsys.readouterr()
    assert vip(["validate", str(colours), "--checkpoint", str(tmp_path / "run/last.pth.tar"), "-j", "0"]) == 0
    result = yaml.safe_load(capsys.readouterr().out.partition("--result\n")[2])
    assert str(result["top1"]) == last["eval_top1"]


@pytest.mark.parametrize("model", ["vip_nano4_32", "lvvit_nano4_32", "resnet18"])
def test_checkpoint_is_of_the_inference_model(colours: Path, maps: Path, tmp_path: Path, model: str):
    """It loads into the model that timm makes by that name; a head that only training uses is beside it."""
    config = quick(colours, tmp_path, **LABELS, token_label_data=str(maps), model=model, epochs=1, model_ema=True)
    train(config)
    file = tmp_path / "run/last.pth.tar"
    plain = timm.create_model(model, num_classes=4, checkpoint_path=str(file))
    content = torch.load(file, weights_only=True)
    assert content["state_dict"].keys() == content["state_dict_ema"].keys() == plain.state_dict().keys()
    aids = {"aux_head.weight", "aux_head.bias"}
    assert (
        set(content.get("task_state", ()))
        == set(content.get("task_state_ema", ()))
        == (set() if model.startswith("lvvit") else aids)
    )


def test_an_auxiliary_head_that_was_asked_for_stays_in_the_model(
    colours: Path, maps: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """What `--model-kwargs` says is in the checkpoint, and validation makes the model again by it."""
    options: Any = dict(**LABELS, token_label_data=str(maps), model_kwargs={"aux_head": True}, epochs=1)
    train(quick(colours, tmp_path, **options))
    assert vip(["validate", str(colours), "--checkpoint", str(tmp_path / "run/last.pth.tar"), "-j", "0"]) == 0
    assert "aux_head.weight" in torch.load(tmp_path / "run/last.pth.tar", weights_only=True)["state_dict"]


@pytest.mark.parametrize("labels_first", [True, False])
def test_resume_says_when_token_labels_come_or_go(colours: Path, tmp_path: Path, labels_first: bool):
    train(quick(colours, tmp_path, token_label=labels_first, epochs=1))
    config = quick(colours, tmp_path, token_label=not labels_first, resume=str(tmp_path / "run/last.pth.tar"))
    with pytest.raises(UserError, match=f"with{'' if labels_first else 'out'} --token-label: .*--finetune"):
        train(config)


def test_resumed_run_equals_an_uninterrupted_one(colours: Path, maps: Path, tmp_path: Path):
    """Also the auxiliary head and its average, which are no part of the inference model."""
    options: Any = dict(**LABELS, token_label_data=str(maps), model_ema=True, model_ema_decay=0.5, mix_token=0.0)
    train(quick(colours, tmp_path / "whole", epochs=3, **options))
    train(quick(colours, tmp_path / "parts", epochs=3, **options))
    parts = tmp_path / "parts/run"
    config = quick(colours, tmp_path / "parts", epochs=3, resume=str(parts / "checkpoint-0.pth.tar"), **options)
    train(config)
    ours, theirs = (torch.load(tmp_path / p / "run/last.pth.tar", weights_only=True) for p in ("parts", "whole"))
    for name in ("state_dict", "state_dict_ema", "task_state", "task_state_ema"):
        for key, value in theirs[name].items():
            torch.testing.assert_close(ours[name][key], value, msg=f"{name} {key}")


def test_both_layouts_train_alike(colours: Path, maps: Path, tmp_path: Path):
    pack(maps, tmp_path / "packed")
    for name, root in (("published", maps), ("packed", tmp_path / "packed")):
        train(quick(colours, tmp_path, **LABELS, token_label_data=str(root), experiment=name, **AUGMENTED))
    assert rows(tmp_path / "published") == rows(tmp_path / "packed")


def test_token_labels_teach_the_auxiliary_head(colours: Path, maps: Path, tmp_path: Path):
    """With the weight of the class output at zero, the tokens alone learn the colours, each of them."""
    options: Any = dict(cls_weight=0.0, mix_token=0.0, epochs=12, lr=3e-3, **LABELS)
    config = quick(colours, tmp_path, token_label_data=str(maps), model="lvvit_nano4_32", **options)
    trainer = Trainer(config, CPU)
    trainer.fit()
    dense: Any = trainer.state.task.get_trainable_module()
    images, labels = next(iter(trainer.train_loader))
    dense.eval()
    with torch.no_grad():
        _, tokens = dense(images)
    right = (tokens.argmax(-1) == labels.target[:, None, None]).float().mean()
    assert right > 0.9


def test_labels_travel_under_their_names_and_as_they_are_on_disk(colours: Path, maps: Path, tmp_path: Path):
    """A worker hands over the map and where it is read, never a target over all classes."""
    config = quick(colours, tmp_path, **LABELS, token_label_data=str(maps), workers=1)
    _, labels = next(iter(Trainer(config, CPU).train_loader))
    assert isinstance(labels, TokenLabels)
    assert labels.map_values.dtype is torch.float16 and labels.map_values.shape == (16, 2, 6, 6)
    assert labels.box.shape == (16, 2, 3) and labels.target.shape == (16,)
    torch.testing.assert_close(labels.box, torch.eye(3)[:2].expand(16, 2, 3))  # without augmentation: all of the map


def test_missing_maps_are_counted_and_reported(colours: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    root = write_maps(colours / "train", tmp_path / "maps")
    files = sorted(root.glob("*/*.pt"))
    for file in files[:3]:
        file.unlink()
    files[5].write_bytes(files[5].read_bytes()[:700])
    with caplog.at_level("WARNING"):
        train(quick(colours, tmp_path, **LABELS, token_label_data=str(root), workers=2, epochs=1, batch_size=10))
    assert "4 images had no label map but their class alone: " in caplog.text


# The defaults that --token-label brings


def parsed(*argv: str) -> TrainConfig:
    return parse(TrainConfig, argv, "vip train", TRAIN_FLAGS_WITHOUT_EFFECT)[0]


def test_recipe_and_flags_win_over_the_defaults_of_token_labels(tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("token_label: true\nlr: 1.0e-3\nmixup: 0.2\n")
    config = parsed("DATA", "--config", str(recipe), "--mixup", "0.4")
    assert (config.lr, config.mixup, config.cutmix, config.warmup_epochs) == (1e-3, 0.4, 0.0, 5)
    assert parsed("DATA", "--config", str(recipe), "--no-token-label").cutmix == 1.0


# The commands of the published README

PUBLISHED = [
    "--model lvvit_s -b 256 --apex-amp --img-size 224 --drop-path 0.1 --token-label --token-label-data MAPS "
    "--token-label-size 14 --model-ema",
    "--model lvvit_s -b 128 --apex-amp --img-size 224 --drop-path 0.1 --token-label --token-label-data MAPS "
    "--token-label-size 14 --model-ema",
    "--model lvvit_m -b 128 --apex-amp --img-size 224 --drop-path 0.2 --token-label --token-label-data MAPS "
    "--token-label-size 14 --model-ema",
    "--model lvvit_l -b 128 --lr 1.e-3 --aa rand-n3-m9-mstd0.5-inc1 --apex-amp --img-size 224 --drop-path 0.3 "
    "--token-label --token-label-data MAPS --token-label-size 14 --model-ema",
]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """256 images, as the largest published batch needs, and their maps."""
    root = write_colours(tmp_path_factory.mktemp("many"), 256, 4)
    return root, write_maps(root / "train", root / "maps", (18, 18))


@pytest.mark.parametrize("size", [224, 384])
@pytest.mark.parametrize("command", PUBLISHED, ids=["S, 4 GPUs", "S, 8 GPUs", "M", "L"])
def test_published_commands(many: tuple[Path, Path], tmp_path: Path, command: str, size: int):
    """As they are printed, or with `--img-size 384 --token-label-size 24`: all that comes before the first batch.

    The batch itself is the published one, so that its size and labels are seen; the model then takes two images of it.
    """
    data, maps = many
    command = command.replace("MAPS", str(maps))
    if size == 384:
        command = command.replace("--img-size 224", "--img-size 384").replace("-size 14", "-size 24")
    config = parsed(str(data), *command.split(), "--output", str(tmp_path))
    assert (config.mixup, config.cutmix, config.warmup_epochs, config.model_ema_decay) == (0.0, 0.0, 5, 0.99992)
    assert config.lr == (1e-3 if "lvvit_l" in command else 1.6e-3)
    config.workers = 0  # processes would all decode before the first batch is asked for
    trainer = Trainer(config, CPU)
    images, labels = next(iter(trainer.train_loader))
    assert images.shape == (config.batch_size, 3, size, size)
    assert labels.map_values.shape == (config.batch_size, 2, 18, 18)
    some = TokenLabels(**{k: v[:2] for k, v in vars(labels).items() if v is not None})
    task: Any = trainer.state.task
    if size == 224 and "lvvit_s" in command:
        loss = task(images[:2], some)["loss"]
        loss.backward()
        assert loss.isfinite() and all(p.grad is not None for p in task.trainable_module.parameters())
    assert task.grid == (size // 16, size // 16)


# Bad input


@pytest.fixture
def train_error(command: Callable[..., Outcome], colours: Path, tmp_path: Path) -> Callable[..., str]:
    """The one line in which a training with token labels says what is wrong."""

    def run(*options: object) -> str:
        quick_run = ("--model", "vip_nano4_32", "--device", "cpu", "-j", "0", "-b", "8", "--epochs", "1")
        return command("train", colours, *quick_run, "--output", tmp_path / "out", *options).error("vip train")

    return run


def damaged(how: str, colours: Path, root: Path) -> Path:
    """A set of maps with one kind of damage."""
    write_maps(colours / "train", root)
    files = sorted(root.glob("*/*.pt"))
    content = torch.load(files[0], weights_only=True)
    if how == "shape":
        torch.save(content[:, :, :3], files[-1])
    elif how == "dimensions":
        torch.save(content[0], files[0])
    elif how == "type":
        torch.save(content.float(), files[0])
    elif how == "class":
        content[1, 0, 0, 0] = 9
        torch.save(content, files[0])
    elif how == "code":
        torch.save(Malicious(root / "ran"), files[0])
    elif how == "folders":
        (root / CLASSES[0]).rename(root / "other")
    return root


class Malicious:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "how, words",
    [
        ("shape", ["[2, 3, 6]", "[2, 6, 6]", "--img-size"]),
        ("dimensions", ["float16 [2, 6, 6]", "expected a label map: float16 [2, k, H, W]"]),
        ("type", ["float32 [2, 2, 6, 6]", "expected a label map"]),
        ("class", ["names class 9", "has 4 classes"]),
        ("code", ["refused", "would run code"]),
        ("folders", ["no label maps for 1 of 4 class folders: blue", "green"]),
    ],
)
def test_wrong_maps(train_error: Callable[..., str], colours: Path, tmp_path: Path, how: str, words: list[str]):
    root = damaged(how, colours, tmp_path / "maps")
    error = train_error("--token-label", "--token-label-data", root)
    assert all(word in error for word in words), error
    assert not (root / "ran").exists()


def test_missing_folder_of_maps(train_error: Callable[..., str], tmp_path: Path):
    assert "There are no label maps at" in train_error("--token-label", "--token-label-data", tmp_path / "nowhere")


def test_grid_that_does_not_match(train_error: Callable[..., str], maps: Path):
    error = train_error("--token-label", "--token-label-data", maps, "--token-label-size", 14)
    assert "--token-label-size is 14" in error and "4x4 tokens at (32, 32) pixels" in error


@pytest.mark.parametrize(
    "options, words",
    [
        (("--token-label-data", "maps"), "add --token-label"),
        (("--token-label", "--jsd-loss"), "--jsd-loss does not go with --token-label"),
        (("--token-label", "--bce-loss"), "--bce-loss does not go with --token-label"),
        (("--token-label", "--torchscript"), "--torchscript does not go with --token-label"),
        (("--token-label", "--aug-splits", "2"), "--aug-splits does not go with --token-label"),
        (("--token-label", "--dense-weight", "-1"), "--dense-weight is -1.0, expected at least 0"),
        (("--token-label", "--model", "crossvit_tiny_240"), "has no tokens to label"),
        (
            ("--token-label", "--model", "inception_v3", "--img-size", "32"),
            "inception_v3 does not work at 32x32",
        ),
        (("--token-label", "--dense-weight", "0", "--cls-weight", "0"), "nothing would be learned"),
    ],
)
def test_options_that_contradict(train_error: Callable[..., str], options: tuple[str, ...], words: str):
    assert words in train_error(*options)


@pytest.mark.parametrize("option", [("--aa", "augmix-m5-w4-d2"), ("--train-crop-mode", "rkrc")])
def test_augmentation_that_labels_cannot_follow(train_error: Callable[..., str], maps: Path, option: tuple[str, str]):
    error = train_error("--token-label", "--token-label-data", maps, "--token-label-region", "image", *option)
    assert "Token labels cannot follow" in error


def test_unknown_way_to_read_maps_is_refused():
    with pytest.raises(UserError, match="--token-label-crop.*aligned.*published"):
        parsed("DATA", "--token-label-crop", "other")
