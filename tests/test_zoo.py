"""The model zoo: recipes, model cards and published logs say what they should, and the same thing."""

import csv
import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

import vip  # noqa: F401  registers the models
from vip.cli.arguments import parse, read_recipe
from vip.training.config import TrainConfig
from vip.training.factory import create_optimizer, create_training_model
from vip.training.trainer import _create_scheduler

ZOO = Path(__file__).parent.parent / "models"
COMPARISON = ZOO.parent / "vip" / "benchmark" / "published.csv"
FOLDERS = sorted(path.parent for path in ZOO.glob("*/recipe.yaml"))
PUBLISHED = ["vip_s14", "vip_s7", "vip_m7", "vip_l7"]
LOGGED = ["vip_s7", "vip_m7", "vip_l7"]

# The flags of the published ViP-Small/7 command; its --apex-amp is float16 AMP in the recipe.
S7_COMMAND = """--model vip_s7 -b 256 -j 8 --opt adamw --epochs 300 --sched cosine --img-size 224 --drop-path 0.1
--lr 2e-3 --weight-decay 0.05 --remode pixel --reprob 0.25 --aa rand-m9-mstd0.5-inc1 --smoothing 0.1 --mixup 0.8
--cutmix 1.0 --warmup-lr 1e-6 --warmup-epochs 20"""
S7_AMP = dict(amp=True, amp_dtype="float16")
# The published script's own defaults for what the command leaves out.
SCRIPT_DEFAULTS = dict(
    seed=42,
    clip_grad=None,
    model_ema=False,
    min_lr=1e-5,
    cooldown_epochs=10,
    lr_cycle_limit=1,
    lr_noise=None,
    drop=0.0,
    train_interpolation="random",
    scale=[0.08, 1.0],
    ratio=[3 / 4, 4 / 3],
    hflip=0.5,
    vflip=0.0,
    color_jitter=0.4,
    aug_splits=0,
    recount=1,
    cutmix_minmax=None,
    mixup_prob=1.0,
    mixup_switch_prob=0.5,
    mixup_mode="batch",
    mixup_off_epoch=0,
    eval_metric="top1",
)
# What the published script did not have, at the value that leaves it out.
NEWER = dict(
    grad_accum_steps=1,
    layer_decay=None,
    sched_on_updates=False,
    warmup_prefix=False,
    lr_k_decay=1.0,
    aug_repeats=0.0,
)


def recipe(model: str) -> dict:
    return read_recipe(str(ZOO / model / "recipe.yaml"), TrainConfig)


def card(model: str) -> str:
    return (ZOO / model / "README.md").read_text(encoding="utf-8")


def log(model: str) -> list[dict[str, str]]:
    with open(ZOO / model / "published_log.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def fact(model: str, name: str) -> str:
    found = re.search(rf"^\| {re.escape(name)} \| (.+) \|$", card(model), re.MULTILINE)
    assert found, f"the card of {model} has no row {name!r}"
    return found[1]


def test_published_models_are_there():
    assert set(PUBLISHED) <= {folder.name for folder in FOLDERS}
    assert {path.parent.name for path in ZOO.glob("*/published_log.csv")} == set(LOGGED)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_recipe_parses_and_names_the_model_of_its_folder(folder: Path):
    values = recipe(folder.name)
    TrainConfig(**values)
    assert values["model"].partition(".")[0] == folder.name
    assert timm.is_model(folder.name)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_folder_has_a_card(folder: Path):
    assert folder.name in card(folder.name)


def test_s7_recipe_is_the_published_one():
    config, given = parse(TrainConfig, shlex.split(S7_COMMAND), "train.py")
    command = {name: getattr(config, name) for name in given}
    assert recipe("vip_s7") == {**SCRIPT_DEFAULTS, **NEWER, **command, **S7_AMP}


@pytest.mark.parametrize("model", ["vip_s14", "vip_m7", "vip_l7"])
def test_recipe_marks_what_was_not_published(model: str):
    """Without a published command, only the defaults of the published script may stand unmarked."""
    values, defaults = recipe(model), TrainConfig(drop=0.0, img_size=224, model=model)
    assert values.keys() == recipe("vip_s7").keys()
    lines = {line.partition(":")[0]: line for line in (ZOO / model / "recipe.yaml").read_text().splitlines()}
    unmarked = {name for name in values if "# ours: " not in lines[name]}
    assert {name: values[name] for name in unmarked} == {name: getattr(defaults, name) for name in unmarked}
    assert "drop_path" not in unmarked


LVVIT_COMMANDS = {  # the published ones for 8 GPUs; their --apex-amp is float16 AMP in the recipes
    "lvvit_s": "-b 128 --img-size 224 --drop-path 0.1 --model-ema",
    "lvvit_m": "-b 128 --img-size 224 --drop-path 0.2 --model-ema",
    "lvvit_l": "-b 128 --lr 1.e-3 --aa rand-n3-m9-mstd0.5-inc1 --img-size 224 --drop-path 0.3 --model-ema",
}


@pytest.mark.parametrize("model", LVVIT_COMMANDS)
def test_lvvit_recipes_are_the_published_ones(model: str):
    """Every option is that of the published command, or the published script's default, which --token-label brings."""
    words = ["--model", model, "--token-label", *LVVIT_COMMANDS[model].split()]
    published, _ = parse(TrainConfig, words, "train.py")
    config, _ = parse(TrainConfig, ["--config", str(ZOO / model / "recipe.yaml")], "train.py")
    assert config == dataclasses.replace(published, **S7_AMP, drop=0.0)
    net = timm.create_model(model, device="meta")
    assert fact(model, "parameters") == f"{sum(p.numel() for p in net.parameters()):,}"
    assert fact(model, "crop_pct") == str(net.pretrained_cfg["crop_pct"])
    assert fact(model, "blocks") == str(len(net.blocks))
    assert fact(model, "channels, heads") == f"{net.embed_dim}, {net.blocks[0].attn.num_heads}"
    assert fact(model, "divisor of the residual branches") == f"{net.blocks[0].residual_scale:.0f}"


def test_flags_win_over_a_recipe():
    argv = ["--no-amp", "--config", str(ZOO / "vip_s7" / "recipe.yaml"), "--epochs", "100"]
    config, _ = parse(TrainConfig, argv, "train.py")
    assert (config.amp, config.epochs, config.lr) == (False, 100, 2e-3)


@pytest.mark.parametrize("model", PUBLISHED)
def test_learning_rate_of_a_recipe(model: str):
    config = TrainConfig(**recipe(model))
    optimizer = create_optimizer(config, torch.nn.Linear(1, 1), images_per_update=8 * config.batch_size)
    assert isinstance(optimizer, torch.optim.AdamW)
    scheduler, epochs = _create_scheduler(config, optimizer, updates=1)
    rates = []
    for epoch in range(epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step(epoch + 1)
    assert epochs == 310
    assert rates[0] == pytest.approx(1e-6)
    assert all(low < high for low, high in zip(rates[:20], rates[1:21], strict=True))
    # the warm-up heads for 2e-3; the cosine has fallen by 1 % when it takes over in epoch 20
    assert rates[19] == pytest.approx(1e-6 + 19 / 20 * (2e-3 - 1e-6))
    assert rates[20] == max(rates) == pytest.approx(2e-3, rel=0.015)
    assert all(low < high for high, low in zip(rates[20:300], rates[21:301], strict=True))
    assert rates[300:] == pytest.approx([1e-5] * 10)


@pytest.mark.parametrize("model", LOGGED)
def test_published_log(model: str):
    rows = log(model)
    assert list(rows[0]) == ["epoch", "train_loss", "eval_loss", "eval_top1", "eval_top5"]
    config = TrainConfig(**recipe(model))
    assert [int(row["epoch"]) for row in rows] == list(range(config.epochs + config.cooldown_epochs))


@pytest.mark.parametrize("model", LOGGED)
def test_card_quotes_the_published_log(model: str):
    rows = log(model)
    quoted = {"best": max(rows, key=lambda row: float(row["eval_top1"])), "last": rows[-1]}
    for name, row in quoted.items():
        top1, top5 = (f"{float(row[column]):.3f}" for column in ("eval_top1", "eval_top5"))
        assert fact(model, f"{name} row of the log") == f"{row['epoch']} | {top1} | {top5}"
    assert f" {len(rows)} rows" in card(model)
    index = (ZOO / "README.md").read_text(encoding="utf-8")
    last, best = (f"{float(quoted[name]['eval_top1']):.3f}" for name in ("last", "best"))
    assert re.search(rf"^\| \[{model}\].* \| {last} \| {best} \|", index, re.MULTILINE)


@pytest.mark.parametrize("model", PUBLISHED)
def test_card_gives_the_facts_of_the_model(model: str):
    assert f"./distributed_train.sh 8 /path/to/imagenet --config models/{model}/recipe.yaml\n" in card(model)
    net = timm.create_model(model, device="meta")
    cfg = net.pretrained_cfg
    assert fact(model, "parameters") == f"{sum(p.numel() for p in net.parameters()):,}"
    assert fact(model, "patch") == "{}×{} pixels".format(*net.patch_embed.patch_size)
    assert (fact(model, "image size"), fact(model, "crop_pct")) == (str(cfg["input_size"][-1]), str(cfg["crop_pct"]))
    assert fact(model, "interpolation") == cfg["interpolation"]


# The other rows of the published comparison. What their sources give, in flags, for 8 processes. EAMLP: the training
# script published with it. ResMLP: the paper, its author's answer, and the defaults of the published script. Mixer: the
# paper and the authors' later configuration. gMLP: the paper, as a third-party implementation quotes it.
EAMLP_SCRIPT = "--warmup-epochs 5 --model-ema --model-ema-decay 0.99996"
RESMLP_SETTING = """--opt lamb --opt-eps 1e-8 --lr 5e-3 --weight-decay 0.2 --epochs 400 --cooldown-epochs 0
--warmup-epochs 5 --aug-repeats 3 --train-interpolation bicubic --crop-pct 0.9 --seed 0 -j 10"""
MIXER_SETTING = """--sched poly --decay-rate 1 --sched-on-updates --lr 1e-3 --weight-decay 0.1 --opt-betas 0.9 0.999
--clip-grad 1 --warmup-prefix --warmup-epochs 32 --epochs 268 --cooldown-epochs 0 --warmup-lr 0 --bce-loss --bce-sum
--smoothing 0 --train-interpolation bilinear --scale 0.05 1 --color-jitter 0 --reprob 0 --mixup 0.5 --cutmix 0 --seed 0
--model-kwargs nlhb=True"""
GMLP_SETTING = """--opt-eps 1e-6 --opt-betas 0.9 0.999 --weight-decay 0.05 --clip-grad 1 --lr 1e-3 --warmup-epochs 32
--smoothing 0.1 --reprob 0 --mixup 0.8 --cutmix 1 --mixup-switch-prob 0.5 --aug-repeats 0"""
SETTINGS = {
    "eamlp_14": EAMLP_SCRIPT,
    "eamlp_19": EAMLP_SCRIPT,
    "gmlp_s16_224": GMLP_SETTING + " --drop-path 0.05",
    "gmlp_b16_224": GMLP_SETTING + " --drop-path 0.2",
    "resmlp_24_224": RESMLP_SETTING,
    "resmlp_big_24_p16_224": RESMLP_SETTING,
    "mixer_b16_224": MIXER_SETTING,
}
OURS = {
    "eamlp_14": {"batch_size"},
    "eamlp_19": {"batch_size", "weight_decay"},
    "resmlp_24_224": {"batch_size", "drop_path"},
    "resmlp_big_24_p16_224": {"batch_size", "drop_path"},
    "mixer_b16_224": {"batch_size", "workers", "amp", "aa"},
}
UPDATE_EPOCHS = {  # images an update, epochs
    "eamlp_14": (512, 310),
    "eamlp_19": (512, 310),
    "gmlp_s16_224": (4096, 300),
    "gmlp_b16_224": (4096, 300),
    "resmlp_24_224": (2048, 400),
    "resmlp_big_24_p16_224": (2048, 400),
    "mixer_b16_224": (4096, 300),
}
COMPARED = list(SETTINGS)


def comparison() -> dict[str, dict[str, str]]:
    with open(COMPARISON, newline="", encoding="utf-8") as file:
        return {row["model"]: row for row in csv.DictReader(file)}


def marked(model: str, mark: str) -> set[str]:
    lines = (ZOO / model / "recipe.yaml").read_text(encoding="utf-8").splitlines()
    return {line.partition(":")[0] for line in lines if f"  # {mark}" in line}


def test_every_row_of_the_comparison_has_a_recipe_and_a_card():
    assert set(comparison()) == {*COMPARED, *LOGGED}
    for model in comparison():
        assert (ZOO / model / "recipe.yaml").is_file() and (ZOO / model / "README.md").is_file()


@pytest.mark.parametrize("model", COMPARED)
def test_compared_recipes_mark_what_was_not_published(model: str):
    """What is unmarked or second hand is what the source gives; all of a recipe from a second hand is marked."""
    values, ours, second_hand = recipe(model), marked(model, "ours"), marked(model, "second hand")
    words = ["--model", model, "--img-size", "224", "--drop", "0", *shlex.split(SETTINGS[model])]
    source, given = parse(TrainConfig, words, "train.py")
    published = values.keys() - ours
    assert {name: values[name] for name in published} == {name: getattr(source, name) for name in published}
    assert set(given) - {"drop"} <= values.keys()
    if model in OURS:
        assert ours == OURS[model] and not second_hand
    else:
        assert values.keys() - ours - second_hand == {"model"} and not ours & second_hand
        assert set(given) - {"model", "drop"} <= second_hand


@pytest.mark.parametrize("model", COMPARED)
def test_schedule_of_a_compared_recipe(model: str):
    config = TrainConfig(**recipe(model))
    images, total = UPDATE_EPOCHS[model]
    assert 8 * config.batch_size == images
    optimizer = create_optimizer(config, timm.create_model(model, device="meta"), images_per_update=images)
    assert type(optimizer).__name__.lower() == config.opt
    decays = {group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {0.0, config.weight_decay}
    updates = 4
    scheduler, epochs = _create_scheduler(config, optimizer, updates=updates)
    assert epochs == total
    rates = []  # of every epoch's first update
    for epoch in range(epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        if config.sched_on_updates:
            scheduler.step_update((epoch + 1) * updates)
        else:
            scheduler.step(epoch + 1)
    peak, warm = max(rates), config.warmup_epochs
    assert rates[0] == pytest.approx(config.warmup_lr) and rates.index(peak) == warm
    assert peak == pytest.approx(config.lr, rel=2e-3)
    schedule = rates[warm : total - config.cooldown_epochs]
    assert all(low < high for high, low in zip(schedule[:-1], schedule[1:], strict=True))
    assert rates[-1] == pytest.approx(config.min_lr, abs=5e-3 * config.lr)
    if config.sched == "poly":  # linear
        assert rates[warm + 134] == pytest.approx((config.lr + config.min_lr) / 2)


@pytest.mark.parametrize("model", COMPARED)
def test_card_of_a_compared_model(model: str):
    assert f"./distributed_train.sh 8 /path/to/imagenet --config models/{model}/recipe.yaml\n" in card(model)
    net = timm.create_model(model, device="meta")
    cfg, row = net.pretrained_cfg, comparison()[model]
    parameters = f"{sum(p.numel() for p in net.parameters()):,}"
    assert fact(model, "parameters") == parameters
    assert fact(model, "blocks") == str(len(net.blocks))
    assert fact(model, "channels") == str(net.embed_dim)
    assert (fact(model, "image size"), fact(model, "crop_pct")) == (str(cfg["input_size"][-1]), str(cfg["crop_pct"]))
    assert fact(model, "interpolation") == cfg["interpolation"]
    of_imagenet = fact(model, "mean, standard deviation") == "those of ImageNet"
    assert (cfg["mean"], cfg["std"]) == (
        (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD) if of_imagenet else ((0.5,) * 3, (0.5,) * 3)
    )
    assert fact(model, "top-1 on the ImageNet-1k validation set").startswith(f"{row['top1']} % | ")
    speed = row["v100_images_per_second"] or "not given"
    assert fact(model, "images a second, V100, batch 32") == f"{speed} | the same"
    assert fact(model, "parameters, as published") == f"{row['params_m']} M | the same"
    index = (ZOO / "README.md").read_text(encoding="utf-8")
    assert f"| [{model}]({model}/README.md) | 16 | {parameters} | {row['top1']}" in index


@pytest.mark.parametrize("model", COMPARED)
def test_card_names_the_weights_that_timm_has(model: str):
    text = card(model)
    tags = [name for name in timm.list_pretrained() if name.partition(".")[0] == model]
    assert all(f"{name.partition('.')[2]}`" in text for name in tags)
    assert ("--pretrained" in text) == bool(tags)


def test_head_of_the_mixer_recipe_starts_at_the_published_bias():
    model: Any = create_training_model(TrainConfig(**recipe("mixer_b16_224")), num_classes=1000)
    assert model.head.bias.tolist() == pytest.approx([-6.9] * 1000, abs=0.01)
