"""Any configuration runs a step, or ends in one line that names an option.

`FUZZ_EXAMPLES=5000 python -m pytest tests/fuzz` tries so many of each kind, other ones each time.
"""

import csv
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz_runs import EXAMPLES, check_that_it_names_an_option, error_line, run, tally
from fuzzed_options import Drawn, Known, command_line, options
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from timm.optim import list_optimizers

from vip.token_labels.store import open_label_maps
from vip.training.config import GenerateConfig, TrainConfig, ValidateConfig
from vip.training.recovery import REQUEUE

pytestmark = pytest.mark.filterwarnings("ignore")  # what an odd value makes torch, timm and NumPy warn of


@dataclass(frozen=True)
class Place:
    """Images, a run, and what options can name."""

    root: Path
    data: str
    run: str
    known: Known = field(repr=False)


@pytest.fixture(scope="module")
def place(image_folder: Path, trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A folder to work in, with a few images of each class, a run, and files of other kinds."""
    root = tmp_path_factory.mktemp("options")
    for image in image_folder.glob("*/*/*[012].*"):
        copy = root / "data" / image.relative_to(image_folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(image, copy)
    shutil.copytree(trained_run, root / "run")
    torch.save({"state_dict": {}, "epoch": 3}, root / "empty.pth.tar")
    (root / "text").write_text("3\n1\nx\n")
    (root / "classes.txt").write_text("blue\ngreen\nred\n")
    (root / "labels.txt").write_text("0\n1\n2\n")
    (root / "here").mkdir()
    before = os.getcwd()
    os.chdir(root / "here")
    yield Place(root, f"{root}/data", f"{root}/run", known_values(root))
    os.chdir(before)


def known_values(root: Path) -> Known:
    """Values of the options that name something: none that reaches the network, or leaves the folder."""
    files = ["", "nowhere", f"{root}", f"{root}/text", "\0", "a" * 300]
    weights = [*files, f"{root}/run", f"{root}/run/last.pth.tar", f"{root}/empty.pth.tar"]
    splits = ["train", "val", "validation", "", "none", "train/blue", "\0"]
    policies = ["rand-m9-mstd0.5-inc1", "augmix-m5-w4-d2", "original", "3a", "none", "", "rand", "rand-m99", "v0r-p9"]
    arguments = ["mlp_ratio", "drop_rate", "num_classes", "global_pool", "img_size", "layers", "in_chans", "aux_head"]
    return {
        "data": [f"{root}/data", f"{root}/data/train", *files],
        "data_dir": [f"{root}/data", *files],
        "dataset": ["", "folder", "torch/none", "torch/", "tar", "none/none", "x"],
        "class_map": ["", f"{root}/classes.txt", *files[1:]],
        "model": ["vip_nano4_32", "test_vit", "test_resnet", "vip_nano", "", "resnet18.none", "test_*", "a/b", "ä"],
        "model_kwargs.names": arguments,
        "gp": ["avg", "max", "none", "", "token"],
        "device": ["cpu", "cpu:7", "meta", "toaster", "", "cuda:99", "cpu,cpu", "CPU"],
        "torchcompile": ["", "aot_eagr", "none"],  # compiling takes half a minute
        "torchcompile_mode": ["", "default", "none"],
        "aa": policies,
        "opt": ["adamw", "sgd", "none", "", *list_optimizers()],
        "opt_kwargs.names": ["lr", "eps", "betas", "amsgrad", "weight_decay", "momentum"],
        **dict.fromkeys(("initial_checkpoint", "finetune", "eval_checkpoint", "transfer_model"), weights),
        "resume": [*weights, "auto"],
        "transfer_learning": ["", "true", "false", "x"],
        "checkpoint": [*weights, f"{root}/run/*.pth.tar", "[none", "*none*"],
        "token_label_data": files,
        "token_label_root": [f"{root}/maps", *files[1:]],
        "output": [f"{root}/runs", f"{root}/text/x", "\0", "a" * 300],
        "experiment": ["", "fuzz", "a/b", "\0", "a" * 300, "ä"],
        **dict.fromkeys(("train_split", "val_split", "split"), splits),
        "real_labels": files,
        "valid_labels": [*files, f"{root}/labels.txt"],
        "results_file": ["", f"{root}/results.csv", f"{root}/text/x", f"{root}", "\0"],
        "results_format": ["", "csv", "json"],
    }


QUICK = dict(device="cpu", workers=0, batch_size=4)
RUN = dict(model="vip_nano4_32", **QUICK, epochs=1, warmup_epochs=0, cooldown_epochs=0, experiment="fuzz")


def outcome(
    command: str, words: list[str], drawn: list[Drawn], config_class: type, good: tuple[int, ...] = (0,)
) -> tuple[str, str, int]:
    """Run a command; 'refused' after one good line, else 'accepted', with what it printed and the epochs it trained."""
    status, out, err, epochs = run([command, *words])
    if status == 2:
        message = error_line(err)
        if "loss became" not in message and "The loss of" not in message:  # whatever it was that was too much
            check_that_it_names_an_option(message, drawn, config_class)
        return "refused", out, epochs
    assert status in good, (status, err[-1000:])
    return "accepted", out, epochs


def losses_are_finite(folder: Path) -> bool:
    """Whether the last row of every summary in a folder has numbers for losses."""
    rows = [list(csv.DictReader(path.read_text().splitlines()))[-1] for path in folder.rglob("summary.csv")]
    return len(rows) > 0 and all(math.isfinite(float(v)) for row in rows for k, v in row.items() if "loss" in k)


def recipe(**values: Any) -> list[Drawn]:
    """Options by name, given in a recipe."""
    return [Drawn(name, value, in_recipe=True) for name, value in values.items()]


def try_all(
    few: int, drawn: st.SearchStrategy[list[Drawn]], attempt: Callable[[list[Drawn]], str], counts: Counter[str]
) -> None:
    """Attempt drawn options; some of them have to be right and some not, or little was tried."""
    slow = [HealthCheck.too_slow]  # a busy machine

    @settings(
        max_examples=EXAMPLES or few, derandomize=not EXAMPLES, database=None, deadline=None, suppress_health_check=slow
    )
    @given(drawn)
    def each(drawn: list[Drawn]) -> None:
        counts[attempt(drawn)] += 1

    each()
    assert min(counts["accepted"], counts["refused"]) > counts.total() / 10


def test_training(place: Place, pytestconfig: pytest.Config) -> None:
    try_all(
        60, options(TrainConfig, place.known), partial(training, place), tally(pytestconfig, "options of vip train")
    )


def training(place: Place, drawn: list[Drawn]) -> str:
    """Train; an epoch has to be trained, unless a checkpoint is only validated or its run has ended."""
    output = place.root / "runs"
    shutil.rmtree(output, ignore_errors=True)
    shutil.rmtree(place.root / "here")
    (place.root / "here").mkdir()
    os.chdir(place.root / "here")
    base = dict(data=place.data, **RUN, output=str(output))
    words = command_line(drawn, base, place.root / "recipe.yaml")
    result, _, epochs = outcome("train", words, drawn, TrainConfig, good=(0, REQUEUE))
    if result == "accepted" and epochs:
        assert losses_are_finite(place.root / "runs") or losses_are_finite(place.root / "here")
    elif result == "accepted":
        assert any(option.name in ("eval_checkpoint", "resume") and option.value for option in drawn)
    return result


@pytest.mark.parametrize(
    "drawn",
    [
        recipe(lr=float("nan")),
        recipe(lr=float("inf")),
        recipe(lr_noise=[]),
        recipe(lr_noise=[0.0, 1.0], lr_noise_std=10.0, lr_noise_pct=0.01),
        recipe(lr_cycle_mul=0.5, cooldown_epochs=100),
        recipe(lr_cycle_mul=10.0, lr_cycle_limit=100),
        recipe(sched="poly", lr_k_decay=10.0, epochs=2**31),
        recipe(sched="step", decay_rate=10.0),
        recipe(opt_kwargs={"betas": "x"}),
        recipe(opt_kwargs={"weight_decay": [1, 2]}),
        recipe(opt_betas=[1.0, 1.0]),
        recipe(opt="adahessian"),
        recipe(in_chans=4),
        recipe(in_chans=4, input_img_mode="CMYK"),
        recipe(in_chans=4, input_img_mode="RGBA", aa="none"),
        recipe(in_chans=1),
        recipe(train_interpolation="lanczos"),
        recipe(train_interpolation="lanczos", aa="none"),
        recipe(cutmix_minmax=[0.7, 0.2]),
        recipe(cutmix_minmax=[0.5, 0.501]),
        recipe(cutmix_minmax=[0.2, 0.7]),
        recipe(aug_repeats=0.5),
        recipe(mixup=1e300, cutmix=1e-300),
        recipe(color_jitter=1e300, aa="none"),
        recipe(model_kwargs={"layers": 3}),
        recipe(model_kwargs={"global_pool": 3}),
        recipe(model="resnet18.none"),
        recipe(gp=""),
        recipe(crop_pct=1.9),
        recipe(std=[1e-6], mean=[1.0]),
        recipe(validation_batch_size=2**31),
        recipe(torchscript=True, torchcompile="eager"),
        recipe(target_key="label"),
        recipe(experiment="2024-01-31"),
        recipe(batch_size=float("nan")),
        [Drawn("mean", [-1e-05, 0.5, 0.5])],
        [Drawn("model_kwargs", {"a=b": "[1"})],
    ],
    ids=lambda drawn: " ".join(word for option in drawn for word in option.words()),
)
def test_trainings_that_once_went_wrong(place: Place, drawn: list[Drawn]) -> None:
    assert training(place, drawn) in ("accepted", "refused")


def test_validation(place: Place, pytestconfig: pytest.Config) -> None:
    try_all(
        40,
        options(ValidateConfig, place.known),
        partial(validation, place),
        tally(pytestconfig, "options of vip validate"),
    )


def validation(place: Place, drawn: list[Drawn]) -> str:
    """Validate; every row has an error, or images and a loss."""
    base = dict(data=place.data, checkpoint=place.run, **QUICK)
    words = command_line(drawn, base, place.root / "recipe.yaml")
    result, out, _ = outcome("validate", words, drawn, ValidateConfig, good=(0, 1))
    if result == "accepted":
        rows = json.loads(out.split("--result\n")[1])
        for row in rows if isinstance(rows, list) else [rows]:
            assert row["error"] if "error" in row else row["count"] > 0 and math.isfinite(row["loss"])
    return result


def test_generation(place: Place, pytestconfig: pytest.Config) -> None:
    counts = tally(pytestconfig, "options of vip generate-label")
    try_all(40, options(GenerateConfig, place.known), partial(generation, place), counts)


def generation(place: Place, drawn: list[Drawn]) -> str:
    """Write label maps, which have to be there."""
    maps = place.root / "maps"
    shutil.rmtree(maps, ignore_errors=True)
    base = dict(data=place.data, token_label_root=str(maps), checkpoint=place.run, top_k=2, **QUICK)
    words = command_line(drawn, base, place.root / "recipe.yaml", ("data", "token_label_root"))
    result, _, _ = outcome("generate-label", words, drawn, GenerateConfig)
    if result == "accepted" and not any(option.name == "token_label_root" for option in drawn):
        assert next(iter(open_label_maps(maps).keys()))
    return result
