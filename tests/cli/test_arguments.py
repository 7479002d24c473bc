"""Flags and recipes. `published_flags.csv` lists the flags of the published scripts: script, flag, kind, default."""

import ast
import csv
import dataclasses
import io
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from training_command import Outcome

import vip.cli
from vip.cli.arguments import parse, read_recipe
from vip.errors import UserError
from vip.training.config import (
    GENERATE_FLAGS_WITHOUT_EFFECT,
    TRAIN_FLAGS_WITHOUT_EFFECT,
    VALIDATE_FLAGS_WITHOUT_EFFECT,
    GenerateConfig,
    TrainConfig,
    ValidateConfig,
)

REPOSITORY = Path(vip.cli.__file__).parents[2]


def train(*argv: str) -> TrainConfig:
    return parse(TrainConfig, argv, "vip train", TRAIN_FLAGS_WITHOUT_EFFECT)[0]


def validate(*argv: str) -> ValidateConfig:
    return parse(ValidateConfig, argv, "vip validate", VALIDATE_FLAGS_WITHOUT_EFFECT)[0]


def generate(*argv: str) -> GenerateConfig:
    return parse(GenerateConfig, argv, "vip generate-label", GENERATE_FLAGS_WITHOUT_EFFECT)[0]


def parser_of(script: str) -> Callable[..., Any]:
    return validate if script.endswith("validate") else generate if script.endswith("generate") else train


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return str(path)

    return write


# Flags of the published scripts


def published() -> list[dict[str, str]]:
    with open(Path(__file__).with_name("published_flags.csv"), newline="") as file:
        return list(csv.DictReader(file))


WITHOUT_EFFECT = {"--local_rank", "--split-bn", "--num-gpu", "--use-multi-epochs-loader", "--legacy-jit"}
RENAMED = {"jsd": "jsd_loss", "b": "batch_size", "wd": "weight_decay"}  # as timm 1.x names them
SAMPLES = {  # words where the kind alone does not tell what is allowed
    "--sched": "tanh",
    "--interpolation": "bicubic",
    "--train-interpolation": "bilinear",
    "--remode": "const",
    "--mixup-mode": "pair",
    "--dist-bn": "reduce",
    "--eval-metric": "loss",
    "--clip-mode": "agc",
    "--tta": "2",
    "--local_rank": "0",
}
WORDS = {
    "str": ("word", "word"),
    "int": ("3", 3),
    "float": ("0.25", 0.25),
    "float x+": ("0.25 0.75", [0.25, 0.75]),
    "int x3": ("3 32 48", [3, 32, 48]),
    "store_true": ("", True),
}


def flags() -> list[Any]:
    """Each spelling of each published flag, but for the positional arguments and --config, which has its own tests."""
    cases = []
    for row in published():
        spellings = row["flag"].split()
        if spellings[0] == "-c" or not spellings[0].startswith("-"):
            continue
        for flag in spellings:
            name = max(spellings, key=len).lstrip("-").replace("-", "_")
            words, value = WORDS[row["kind"]]
            if spellings[0] in SAMPLES:
                words = SAMPLES[spellings[0]]
                value = int(words) if row["kind"] == "int" else words
            cases.append(pytest.param(row["script"], flag, name, words, value, id=f"{row['script']} {flag}"))
    return cases


@pytest.mark.parametrize("script, flag, name, words, value", flags())
def test_published_flag(
    script: str, flag: str, name: str, words: str, value: Any, capsys: pytest.CaptureFixture
) -> None:
    """It is accepted, takes as many words as it took, and its value arrives or a note says that it has no effect."""
    config: Any = parser_of(script)("DATA", flag, *words.split())
    assert config.data == "DATA"
    note = capsys.readouterr().err
    ignored = flag in WITHOUT_EFFECT and not (flag == "--num-gpu" and script.endswith("validate"))
    if ignored or (flag == "--torchscript" and script == "tl-generate"):
        assert note.startswith(f"note: {flag} has no effect: ") and note.count("\n") == 1
        return
    assert note == ""
    name = RENAMED.get(name, name)
    if name == "no_test_pool":
        assert config.test_pool is False
    elif (script, flag) in (("vip-transfer", "--resume"), ("vip-transfer", "-r")):
        assert config.resume == "auto"  # a switch there, a file elsewhere
    elif name == "checkpoint" and script != "tl-generate":
        assert config.checkpoint == [value]
    else:
        assert getattr(config, name) == value


def test_the_list_of_published_flags_is_whole() -> None:
    counts = Counter(row["script"] for row in published())
    assert counts == {
        "vip-train": 94,
        "tl-train": 103,
        "vip-transfer": 22,
        "vip-validate": 33,
        "tl-validate": 33,
        "tl-generate": 29,
    }


OTHER_DEFAULTS = {
    "vip-train": {
        "--num-classes": "the training set's",
        "--img-size": "the model's",
        "--drop": "the model's, which is 0 for ours",
        "--local_rank": "without effect",
        "--num-gpu": "without effect",
        "--split-bn": "without effect",
        "--use-multi-epochs-loader": "without effect",
    },
    "vip-validate": {
        "--model": "what the checkpoint holds",
        "--checkpoint": "a list, as the flag can be repeated",
        "--no-test-pool": "pooling at test time has to be asked for, as in timm 1.x",
        "--use-ema": "where the checkpoint has averaged weights",
        "--legacy-jit": "without effect",
    },
    "tl-train": {
        "--token-label": "the flag that these defaults go with",
        "--token-label-size": "the model's own grid",
        "--model": "vip_s7: no model is called lvvit",
        "--drop": "the model's, which is 0 for ours",
        "--local_rank": "without effect",
        "--split-bn": "without effect",
        "--use-multi-epochs-loader": "without effect",
    },
    "tl-generate": {
        "--model": "what the checkpoint holds",
        "--split": "train/ where there is one, else the folder",
        "--use-ema": "where the checkpoint has averaged weights",
        "--num-gpu": "without effect",
        "--legacy-jit": "without effect",
    },
}


@pytest.mark.parametrize(
    "script, config",
    [
        ("vip-train", TrainConfig()),
        ("vip-validate", ValidateConfig()),
        ("tl-train", train("DATA", "--token-label")),
        ("tl-generate", GenerateConfig()),
    ],
)
def test_published_defaults(script: str, config: Any) -> None:
    different = set()
    for row in published():
        flag = max(row["flag"].split(), key=len)
        if row["script"] != script or not flag.startswith("-") or flag == "--config":
            continue
        name = flag.lstrip("-").replace("-", "_")
        ours = getattr(config, RENAMED.get(name, name), "no such option")
        if ours != ast.literal_eval(row["default"]):
            different.add(flag)
    assert different == set(OTHER_DEFAULTS[script])


# Flags of timm 1.x


@pytest.mark.parametrize(
    "words, name, value",
    [
        ("--amp-dtype bfloat16", "amp_dtype", "bfloat16"),
        ("--device cuda:1", "device", "cuda:1"),
        ("--torchcompile", "torchcompile", "inductor"),
        ("--torchcompile eager", "torchcompile", "eager"),
        ("--grad-accum-steps 4", "grad_accum_steps", 4),
        ("--data-dir FOLDER", "data_dir", "FOLDER"),
        ("--input-size 1 64 48", "input_size", [1, 64, 48]),
        ("--model-kwargs depth=3 name=x on=True", "model_kwargs", {"depth": 3, "name": "x", "on": True}),
        ("--opt-kwargs foreach=False", "opt_kwargs", {"foreach": False}),
        ("--layer-decay 0.75", "layer_decay", 0.75),
        ("--clip-mode agc", "clip_mode", "agc"),
        ("--bce-loss", "bce_loss", True),
        ("--bce-sum", "bce_sum", True),
        ("--bce-target-thresh 0.2", "bce_target_thresh", 0.2),
        ("--jsd-loss", "jsd_loss", True),
        ("--drop-block 0.1", "drop_block", 0.1),
        ("--lr-base 0.1", "lr_base", 0.1),
        ("--lr-base-size 512", "lr_base_size", 512),
        ("--sched-on-updates", "sched_on_updates", True),
        ("--warmup-prefix", "warmup_prefix", True),
        ("--lr-k-decay 0.5", "lr_k_decay", 0.5),
        ("--lr-cycle-decay 0.3", "lr_cycle_decay", 0.3),
        ("--epoch-repeats 2.5", "epoch_repeats", 2.5),
        ("--aug-repeats 3", "aug_repeats", 3.0),
        ("--grad-checkpointing", "grad_checkpointing", True),
        ("--fast-norm", "fast_norm", True),
        ("--no-kernels", "no_kernels", True),
        ("--model-ema-warmup", "model_ema_warmup", True),
        ("--checkpoint-hist 3", "checkpoint_hist", 3),
        ("--log-tensorboard", "log_tensorboard", True),
        ("--log-wandb", "log_wandb", True),
        ("--dataset-download", "dataset_download", True),
        ("--class-map names.txt", "class_map", "names.txt"),
        ("--in-chans 4", "in_chans", 4),
        ("--train-crop-mode rkrc", "train_crop_mode", "rkrc"),
        ("--grayscale-prob 0.1", "grayscale_prob", 0.1),
        ("--gaussian-blur-prob 0.2", "gaussian_blur_prob", 0.2),
        ("--color-jitter-prob 0.3", "color_jitter_prob", 0.3),
        ("--input-key picture", "input_key", "picture"),
        ("--target-key kind", "target_key", "kind"),
        ("--decay-milestones 10 20", "decay_milestones", [10, 20]),
        ("--experiment name", "experiment", "name"),
        ("-j 3", "workers", 3),
    ],
)
def test_flags_of_timm(words: str, name: str, value: Any) -> None:
    config = train(*(() if "--data-dir" in words else ("DATA",)), *words.split())
    assert getattr(config, name) == value
    assert config.data == ("FOLDER" if "--data-dir" in words else "DATA")


@pytest.mark.parametrize(
    "parser, flag",
    [
        *((train, f) for f in ("--local_rank 1", "--local_rank=1", "--local-rank 1", "--split-bn", "--num-gpu 4")),
        *((train, f) for f in ("--use-multi-epochs-loader", "--worker-seeding all", "--amp-impl native", "--fuser te")),
        *((validate, f) for f in ("--legacy-jit", "--fuser te")),
        *((generate, f) for f in ("--legacy-jit", "--num-gpu 2", "--torchscript")),
    ],
)
def test_flags_without_effect(
    parser: Callable, flag: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They say so in one line, to the first process only, and swallow exactly their value."""
    name = flag.replace("=", " ").split()[0]
    for argv in ((*flag.split(), "DATA", "-b", "6"), ("-b", "6", "DATA", *flag.split())):
        config = parser(*argv)
        assert (config.data, config.batch_size) == ("DATA", 6)
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1
        assert captured.err.startswith(f"note: {name} has no effect: ")
    monkeypatch.setenv("RANK", "1")
    assert parser(*flag.split(), "DATA") == parser("DATA")
    assert capsys.readouterr().err == ""
    if " " in flag:
        with pytest.raises(UserError, match=f"{name}.*expected one argument"):
            parser("DATA", name)


def test_flags_without_effect_in_a_recipe(recipe: Callable[[str], str], capsys: pytest.CaptureFixture) -> None:
    config = train("DATA", "--config", recipe("split_bn: true\nlocal_rank: 3\nlr: 0.1"))
    assert config.lr == 0.1
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1].split()[0] for line in lines] == ["split_bn", "local_rank"]


# Flags over recipe over defaults


def test_flags_over_recipe_over_defaults(recipe: Callable[[str], str]) -> None:
    path = recipe("epochs: 7\nlr: 0.5\nopt: sgd\n")
    for flag in ("--config", "-c"):
        config, given = parse(TrainConfig, ["DATA", "--lr", "0.25", flag, path, "--opt", "lamb"], "vip train")
        assert (config.data, config.epochs, config.lr, config.opt) == ("DATA", 7, 0.25, "lamb")
        assert config.momentum == TrainConfig().momentum
        assert given == {"data", "epochs", "lr", "opt"}


def test_a_flag_wins_even_when_it_says_the_default(recipe: Callable[[str], str]) -> None:
    path = recipe("epochs: 7\namp: true\nno_aug: true\nno_prefetcher: true\n")
    config = train("DATA", "-c", path, "--epochs", str(TrainConfig().epochs), "--no-amp", "--aug", "--prefetcher")
    assert (config.epochs, config.amp, config.no_aug, config.no_prefetcher) == (300, False, False, False)


@pytest.mark.parametrize(
    "argv, name, value",
    [
        (["--amp"], "amp", True),
        (["--no-amp"], "amp", False),
        (["--amp", "--no-amp"], "amp", False),
        (["--no-aug"], "no_aug", True),
        (["--aug"], "no_aug", False),
        (["--no-aug", "--aug"], "no_aug", False),
        (["--no-prefetcher"], "no_prefetcher", True),
        (["--no-resume-opt"], "no_resume_opt", True),
        ([], "amp", False),
    ],
)
def test_switches(argv: list[str], name: str, value: bool) -> None:
    assert getattr(train("DATA", *argv), name) is value


def test_recipe_keys_are_the_flags_in_any_spelling(recipe: Callable[[str], str]) -> None:
    text = "batch-size: 8\nwarmup_epochs: 3\nwd: 0.1\njsd: true\ndata: FOLDER\nmodel_kwargs: {depth: 3}\naa: null\n"
    config = train("-c", recipe(text))
    assert (config.batch_size, config.warmup_epochs, config.weight_decay, config.jsd_loss) == (8, 3, 0.1, True)
    assert (config.data, config.model_kwargs, config.aa) == ("FOLDER", {"depth": 3}, None)


@pytest.mark.parametrize(
    "text, name, value",
    [
        ("lr: 1e-3", "lr", 1e-3),  # a string to YAML 1.1
        ("lr: 2E-4", "lr", 2e-4),
        ("lr: 1", "lr", 1.0),
        ("opt_betas: [0.9, 999e-3]", "opt_betas", [0.9, 0.999]),
        ("lr_noise: 0.5", "lr_noise", [0.5]),
        ("epochs: 30.0", "epochs", 30),
        ("experiment: 2024", "experiment", "2024"),
        ("mean: [0, 1, 0.5]", "mean", [0.0, 1.0, 0.5]),
        ("img_size: null", "img_size", None),
        ("drop_path: 0", "drop_path", 0.0),
        ("decay_milestones: [1, 2]", "decay_milestones", [1, 2]),
    ],
)
def test_values_of_a_recipe(recipe: Callable[[str], str], text: str, name: str, value: Any) -> None:
    found = getattr(train("DATA", "-c", recipe(text)), name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "text, words",
    [
        ("lerning_rate: 1", ["lerning_rate"]),
        ("epoch: 3", ["epoch", "Did you mean epochs"]),
        ("batch-sise: 3", ["batch-sise", "Did you mean batch_size"]),
        ("weight_decy: 3", ["Did you mean weight_decay"]),
        ("epochs: many", ["epochs", "'many'", "expected int"]),
        ("epochs: 1.5", ["epochs", "1.5", "expected int"]),
        ("epochs: .inf", ["epochs", "inf", "expected int"]),
        ("epochs: [1]", ["epochs", "expected int"]),
        ("epochs: null", ["epochs", "no value"]),
        ("epochs: true", ["epochs", "True", "expected int"]),
        ("lr: fast", ["lr", "'fast'", "expected float"]),
        ("amp: 1", ["amp", "1", "expected bool"]),
        ("amp: 'true'", ["amp", "'true'", "expected bool"]),
        ("amp: null", ["amp", "no value"]),
        ("opt_betas: [0.9, x]", ["opt_betas", "a list of float"]),
        ("scale: 0.5", ["scale", "0.5", "2 float"]),
        ("scale: [0.1, 0.5, 1]", ["scale", "2 float"]),
        ("input_size: [3, 224]", ["input_size", "3 int"]),
        ("model_kwargs: [1]", ["model_kwargs", "expected dict"]),
        ("model: {a: b}", ["model", "expected str"]),
        ("remode: pixels", ["remode", "'pixels'", "'const', 'rand', 'pixel'"]),
        ("interpolation: smooth", ["interpolation", "'smooth'", "'bicubic'"]),
        ("- epochs", ["list", "expected a mapping"]),
        ("just words", ["str", "expected a mapping"]),
        ("a: [1", ["is not YAML"]),
        ("a: !!python/object/apply:os.getcwd []", ["is not YAML"]),
        ("\x00", ["is not YAML"]),
    ],
)
def test_bad_recipe_is_one_line_that_names_it(recipe: Callable[[str], str], text: str, words: list[str]) -> None:
    path = recipe(text)
    with pytest.raises(UserError) as error:
        train("DATA", "-c", path)
    message = str(error.value)
    assert all(word in message for word in (path, *words)), message
    assert "\n" not in message


def test_recipe_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    (tmp_path / "photo.yaml").write_bytes(bytes(range(128, 256)))
    for name, reason in (("none.yaml", "No such file"), (".", "directory"), ("photo.yaml", "not YAML")):
        with pytest.raises(UserError, match=reason):
            train("DATA", "-c", str(tmp_path / name))


def test_empty_recipe_changes_nothing(recipe: Callable[[str], str]) -> None:
    assert train("DATA", "-c", recipe("# nothing yet\n")) == train("DATA")


def test_args_of_a_run_are_a_recipe(recipe: Callable[[str], str]) -> None:
    """What a run writes to `args.yaml` can be given to --config, and says the same."""
    config = train("DATA", "--lr", "1e-3", "--scale", "0.5", "1", "--model-kwargs", "a=1", "--torchcompile", "--no-aug")
    assert train("-c", recipe(yaml.safe_dump(dataclasses.asdict(config)))) == config


def any_numbers() -> st.SearchStrategy[dict[str, float]]:
    """Options that are numbers, within their bounds."""
    values: dict[str, st.SearchStrategy] = {}
    for field in dataclasses.fields(TrainConfig):
        low, high = field.metadata.get("low"), field.metadata.get("high")
        if field.metadata["choices"]:
            continue
        if str(field.type) in ("<class 'float'>", "float | None"):
            values[field.name] = st.floats(1e-9 if low is None else low, 1e9 if high is None else high)
        elif str(field.type) in ("<class 'int'>", "int | None"):
            values[field.name] = st.integers(0 if low is None else int(low), 10**9 if high is None else int(high))
    assert len(values) > 60
    return st.fixed_dictionaries({}, optional=values)


@settings(max_examples=60, deadline=None)
@given(any_numbers())
def test_flags_and_recipe_say_the_same(options: dict[str, float]) -> None:
    argv = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", repr(value))]
    expected = dataclasses.replace(TrainConfig(), **options)
    assert train(*argv) == expected
    for recipe in (yaml.safe_dump(options), yaml.safe_dump({k: repr(v) for k, v in options.items()})):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("builtins.open", lambda *args, text=recipe, **kwargs: io.StringIO(text))
            values = read_recipe("recipe.yaml", TrainConfig)
        assert TrainConfig(**values) == expected


# Mistakes on the command line


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--epoch", "3"], ["--epoch", "Did you mean --epochs"]),
        (["--leraning-rate=3"], ["--leraning-rate=3"]),
        (["--weight_decay", "3"], ["Did you mean --weight-decay"]),
        (["--epochs", "many"], ["--epochs", "'many'"]),
        (["--epochs"], ["--epochs", "expected one argument"]),
        (["--scale", "0.5"], ["--scale", "expected 2 arguments"]),
        (["--remode", "pixels"], ["--remode", "'pixels'", "const"]),
        (["--interpolation", "smooth"], ["--interpolation", "'smooth'", "bicubic"]),
        (["--tta", "3"], ["--tta", "3"]),
        (["another"], ["another"]),
    ],
)
def test_wrong_flags(argv: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        train("DATA", *argv)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_flags_are_not_abbreviated() -> None:
    with pytest.raises(UserError, match="--warmup-e"):
        train("DATA", "--warmup-e", "3")


# The command itself


@pytest.mark.parametrize(
    "name, config", [("train", TrainConfig), ("validate", ValidateConfig), ("generate-label", GenerateConfig)]
)
def test_help_lists_every_option_with_its_text(name: str, config: Any, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        vip.cli.main([name, "--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(config):
        if config is GenerateConfig and field.name == "torchscript":
            continue  # listed with the flags without effect
        assert field.name.upper() in text or f"--{field.name.replace('_', '-')}" in text
        assert field.metadata["help"] in text


def test_vip_without_a_command_shows_the_commands(command: Callable[..., Outcome]) -> None:
    for argv in ([], ["--help"], ["-h"]):
        outcome = command(*argv)
        assert outcome.status == 0 and outcome.err == ""
        assert all(name in outcome.out for name in ("train", "validate", "make-digits"))


def test_version(command: Callable[..., Outcome]) -> None:
    assert command("--version").out == f"vip {vip.__version__}\n"


def test_unknown_command(command: Callable[..., Outcome]) -> None:
    error = command("trian", "DATA").error("vip")
    assert "'trian'" in error and "Did you mean train" in error


def test_interrupted_command_ends_without_a_word(capsys: pytest.CaptureFixture) -> None:
    def interrupted(argv: list[str]) -> None:
        raise KeyboardInterrupt

    assert vip.cli.run("vip train", interrupted, []) == 130
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no /dev/full")
@pytest.mark.parametrize("to, status, said", [("pipe", 141, b""), ("/dev/full", 2, b"No space left on device")])
def test_output_that_nobody_takes(to: str, status: int, said: bytes) -> None:
    """A few lines stay in Python's buffer until the command has ended."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    code = "import sys, vip.cli; sys.exit(vip.cli.run('vip', lambda argv: print('a few lines'), []))"
    if to == "pipe":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open(to, os.O_WRONLY)
    argv = [sys.executable, "-c", code]
    done = subprocess.run(argv, stdout=writer, stderr=subprocess.PIPE, env=environment, cwd=REPOSITORY)
    os.close(writer)
    assert done.returncode == status and said in done.stderr and done.stderr.count(b"\n") == bool(said)


def test_other_processes_wait_for_the_first_to_report(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)

    def wrong(argv: list[str]) -> None:
        raise UserError("wrong")

    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert vip.cli.run("vip train", wrong, []) == 2
        assert capsys.readouterr().err == "vip train: error: wrong\n"
    assert len(waited) == 1


@pytest.mark.parametrize(
    "script, flag",
    [("train.py", "--data-dir"), ("validate.py", "--checkpoint"), ("generate_label.py", "DATA OUT --checkpoint")],
)
def test_scripts_are_doors_to_the_commands(script: str, flag: str, tmp_path: Path) -> None:
    """From any folder; what goes wrong is one line under the name that was typed."""
    argv = [sys.executable, str(REPOSITORY / script), *flag.split(), "nowhere"]
    process = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
    outcome = Outcome(process.returncode, process.stdout, process.stderr)
    assert "nowhere" in outcome.error(script)
    assert not any(tmp_path.iterdir())
