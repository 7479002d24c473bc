"""Runs on a tiny image folder: what they leave behind, and how they continue, start from others and stop."""

import csv
import dataclasses
import math
import sys
import time
from pathlib import Path
from typing import IO

import pytest
import timm
import torch
import yaml
from conftest import CLASSES, quick
from timm.models import load_checkpoint
from timm.utils import CheckpointSaver

from vip.cli import main as vip
from vip.errors import UserError
from vip.reporting.progress import ProgressBar
from vip.training.config import TrainConfig
from vip.training.runtime import Runtime
from vip.training.trainer import Trainer, train
from vip.training.weights import read_checkpoint


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "summary.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def run(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("output")
    train(quick(colours, output, epochs=3, checkpoint_hist=2, model_ema=True, model_ema_decay=0.5))
    return output / "run"


def test_run_leaves_its_files(run: Path):
    names = {path.name for path in run.iterdir()}
    assert {"args.yaml", "summary.csv", "train.log", "last.pth.tar", "model_best.pth.tar"} <= names
    assert len([n for n in names if n.startswith("checkpoint-")]) == 2
    assert list(rows(run)[0]) == ["epoch", "train_loss", "eval_loss", "eval_top1", "eval_top5", "lr"]
    assert [row["epoch"] for row in rows(run)] == ["0", "1", "2"]


def test_args_are_a_recipe_for_the_same_run(run: Path):
    from vip.cli.arguments import parse

    again, _ = parse(TrainConfig, ["--config", str(run / "args.yaml")], "train")
    made = read_checkpoint(run / "last.pth.tar")["args"]
    assert made["experiment"] == "run"
    assert dataclasses.asdict(again) == {**made, "experiment": "", "resume": ""}  # of another run


def test_best_checkpoint_is_the_epoch_with_the_highest_accuracy(run: Path):
    best = max(rows(run), key=lambda row: float(row["eval_top1"]))  # the first of equals
    assert read_checkpoint(run / "model_best.pth.tar")["epoch"] == int(best["epoch"])
    assert read_checkpoint(run / "last.pth.tar")["epoch"] == 2


def test_checkpoint_has_timms_layout_and_loads_with_timms_tools(run: Path):
    content = torch.load(run / "last.pth.tar", weights_only=True)
    assert {"state_dict", "state_dict_ema", "optimizer", "arch", "epoch", "args", "version", "metric"} <= set(content)
    assert content["arch"] == "vip_nano4_32"
    assert content["class_to_idx"] == {name: i for i, name in enumerate(CLASSES)}
    model = timm.create_model("vip_nano4_32", num_classes=4, checkpoint_path=str(run / "last.pth.tar"))
    torch.testing.assert_close(model.head.weight.detach(), content["state_dict_ema"]["head.weight"])
    load_checkpoint(model, str(run / "last.pth.tar"), use_ema=False)
    torch.testing.assert_close(model.head.weight.detach(), content["state_dict"]["head.weight"])


@pytest.mark.parametrize("ema", [False, True])
def test_validation_of_a_checkpoint_prints_what_training_wrote(
    colours: Path, tmp_path: Path, capsys: pytest.CaptureFixture, ema: bool
):
    train(quick(colours, tmp_path, model_ema=ema, model_ema_decay=0.9, amp=True, amp_dtype="bfloat16", crop_pct=0.8))
    capsys.readouterr()
    checkpoint = str(tmp_path / "run" / "last.pth.tar")
    assert vip(["validate", str(colours / "val"), "--checkpoint", checkpoint, "-j", "0", "--device", "cpu"]) == 0
    result = yaml.safe_load(capsys.readouterr().out.partition("--result\n")[2])
    last = rows(tmp_path / "run")[-1]
    assert str(result["top1"]) == last["eval_top1"]
    assert str(result["loss"]) == last["eval_loss"]
    assert result["count"] == 13


def test_resumed_run_equals_an_uninterrupted_one(colours: Path, tmp_path: Path):
    options = dict(epochs=4, sched="step", decay_epochs=1, decay_rate=0.5)
    train(quick(colours, tmp_path, experiment="whole", **options))
    train(quick(colours, tmp_path, experiment="parts", **{**options, "epochs": 2}))
    train(quick(colours, tmp_path, experiment="parts", resume="auto", **options))
    assert (tmp_path / "whole/summary.csv").read_text() == (tmp_path / "parts/summary.csv").read_text()
    whole, parts = (read_checkpoint(tmp_path / name / "last.pth.tar") for name in ("whole", "parts"))
    torch.testing.assert_close(whole["state_dict"], parts["state_dict"], rtol=0, atol=0)
    assert whole["num_updates"] == parts["num_updates"] == 8


def test_resume_without_experiment_continues_in_the_runs_folder(colours: Path, tmp_path: Path):
    train(quick(colours, tmp_path, epochs=1))
    train(quick(colours, tmp_path / "elsewhere", experiment="", resume=str(tmp_path / "run/last.pth.tar"), epochs=2))
    assert [row["epoch"] for row in rows(tmp_path / "run")] == ["0", "1"]


def test_resume_of_a_folder_continues_its_last_state(colours: Path, tmp_path: Path):
    train(quick(colours, tmp_path, epochs=2))
    (tmp_path / "run/model_best.pth.tar").unlink()
    (tmp_path / "run/model_best.pth.tar").hardlink_to(tmp_path / "run/checkpoint-0.pth.tar")
    train(quick(colours, tmp_path, experiment="", resume=str(tmp_path / "run"), epochs=3))
    assert [row["epoch"] for row in rows(tmp_path / "run")] == ["0", "1", "2"]


def test_resume_auto_starts_a_run_that_never_began(colours: Path, tmp_path: Path):
    train(quick(colours, tmp_path, resume="auto", epochs=1))
    assert len(rows(tmp_path / "run")) == 1
    with pytest.raises(UserError, match="--experiment"):
        train(quick(colours, tmp_path, experiment="", resume="auto"))


def test_resume_refuses_another_optimizer_and_bare_weights(colours: Path, run: Path, tmp_path: Path):
    with pytest.raises(UserError, match="--no-resume-opt"):
        train(quick(colours, tmp_path, resume=str(run / "last.pth.tar"), opt="sgd", opt_kwargs={"nesterov": False}))
    torch.save(read_checkpoint(run / "last.pth.tar")["state_dict"], tmp_path / "weights.pth")
    with pytest.raises(UserError, match="--initial-checkpoint"):
        train(quick(colours, tmp_path, resume=str(tmp_path / "weights.pth")))


def test_run_does_not_write_over_another(colours: Path, run: Path):
    before = (run / "last.pth.tar").stat().st_mtime_ns
    with pytest.raises(UserError, match="--resume auto"):
        train(quick(colours, run.parent))
    assert (run / "last.pth.tar").stat().st_mtime_ns == before


def test_finetuning_keeps_the_backbone_and_changes_head_and_size(
    colours: Path, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    two = tmp_path / "two"
    for split in ("train", "val"):
        for name in CLASSES[:2]:
            (two / split).mkdir(parents=True, exist_ok=True)
            (two / split / name).symlink_to(colours / split / name)
    config = quick(two, tmp_path, finetune=str(run), img_size=48, lr=0.0, min_lr=0.0, weight_decay=0.0, epochs=1)
    train(config)
    assert "resampled 12 to the new image size" in caplog.text  # two mixing matrices in each of six blocks
    assert "head.weight (4 classes there, 2 here)" in caplog.text
    tuned, source = read_checkpoint(tmp_path / "run/last.pth.tar"), read_checkpoint(run / "model_best.pth.tar")
    key = "network.0.0.attn.mlp_c.weight"
    torch.testing.assert_close(tuned["state_dict"][key], source["state_dict_ema"][key])
    assert tuned["state_dict"]["network.0.0.attn.mlp_h.weight"].shape == (96, 96)
    assert tuned["state_dict"]["head.weight"].shape == (2, 128)


def test_transfer_flags_give_the_head_its_own_rate(colours: Path, run: Path, tmp_path: Path):
    config = quick(colours, tmp_path, transfer_learning="true", transfer_model=str(run), transfer_ratio=0.1, lr=0.01)
    trainer = Trainer(config, Runtime(torch.device("cpu")))
    head = {id(p) for p in trainer.eval_model.get_classifier().parameters()}
    for group in trainer.state.optimizer.param_groups:
        rates = {0.01 if id(p) in head else 0.001 for p in group["params"]}
        assert len(rates) == 1 and math.isclose(group["lr"], rates.pop())


def test_layer_decay_reaches_the_optimizer(colours: Path, tmp_path: Path):
    trainer = Trainer(quick(colours, tmp_path, layer_decay=0.5, lr=1.0), Runtime(torch.device("cpu")))
    rates = {id(p): g["lr"] for g in trainer.state.optimizer.param_groups for p in g["params"]}
    model = trainer.eval_model
    first, last = model.network[0][0].mlp.fc1.weight, model.network[-1][-1].mlp.fc1.weight
    assert rates[id(model.patch_embed.proj.weight)] < rates[id(first)] < rates[id(last)] < rates[id(model.head.weight)]


@pytest.mark.parametrize("amp", [False, True])
def test_attention_is_chosen_for_the_precision(colours: Path, tmp_path: Path, amp: bool):
    config = quick(colours, tmp_path, model="lvvit_nano4_32", amp=amp, amp_dtype="bfloat16")
    model = Trainer(config, Runtime(torch.device("cpu"))).eval_model
    assert all(block.attn.fused_attn != amp for block in model.blocks)


@pytest.mark.parametrize(
    "options",
    [
        dict(apex_amp=True),
        dict(amp=True, amp_dtype="bfloat16", channels_last=True),
        dict(native_amp=True, clip_grad=1.0),
        dict(no_prefetcher=True, mixup=0.8, cutmix=1.0, smoothing=0.1),
        dict(mixup=0.8, cutmix=1.0, smoothing=0.1, mixup_off_epoch=1, no_aug=False, aa="rand-m9-mstd0.5-inc1"),
        dict(no_aug=False, aa="augmix-m5-w4-d2", reprob=0.5, resplit=True),
        dict(no_aug=False, aug_splits=2, jsd_loss=True, aa="rand-m9-mstd0.5-inc1", smoothing=0.1),
        dict(bce_loss=True, bce_sum=True, mixup=0.8, smoothing=0.1),
        dict(opt="lamb", sched="plateau", model_ema=True, model_ema_force_cpu=True),
        dict(opt="sgd", sched="poly", sched_on_updates=True, grad_accum_steps=2, warmup_epochs=1),
        dict(lr_base=1e-3, lr_base_size=16, sched="wsd", decay_epochs=0.5, lr_noise=[0.4, 0.9]),
        dict(torchcompile="eager", model_ema=True),
        dict(torchscript=True),
        dict(aug_repeats=3.0, tta=2, save_images=True, recovery_interval=1),
        dict(model="resnet18", img_size=32, drop_block=0.1, bn_tf=True, dist_bn="reduce", grad_checkpointing=True),
        dict(model="vit_tiny_patch16_224", img_size=32, drop_connect=0.2, drop=0.1, fast_norm=True),
        dict(input_size=[1, 24, 40], gp="max", model_kwargs={"mlp_ratio": 2.0}),
        dict(log_tensorboard=True),
    ],
    ids=lambda options: "-".join(options),
)
def test_options_train_a_finite_epoch_and_a_checkpoint_that_validates(
    colours: Path, tmp_path: Path, capsys: pytest.CaptureFixture, options: dict
):
    train(quick(colours, tmp_path, **options))
    last = rows(tmp_path / "run")[-1]
    assert math.isfinite(float(last["train_loss"])) and math.isfinite(float(last["eval_loss"]))
    capsys.readouterr()
    assert vip(["validate", str(colours), "--checkpoint", str(tmp_path / "run/last.pth.tar"), "-j", "0"]) == 0
    result = yaml.safe_load(capsys.readouterr().out.partition("--result\n")[2])
    assert str(result["top1"]) == last["eval_top1"]
    if options.get("save_images"):
        assert len(list((tmp_path / "run").glob("train-batch-*.jpg"))) == 2
        assert not (tmp_path / "run/recovery.pth.tar").exists(), "the epoch's checkpoint has taken its place"
    if options.get("log_tensorboard"):
        assert list((tmp_path / "run").glob("events.out.tfevents.*"))


def test_runs_of_one_seed_are_identical_and_of_two_are_not(colours: Path, tmp_path: Path):
    random = dict(no_aug=False, mixup=0.8, drop_path=0.1, epochs=1, workers=1)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(quick(colours, tmp_path, experiment=name, seed=seed, **random))
    a, b, c = ((tmp_path / name / "summary.csv").read_text() for name in "abc")
    assert a == b != c


def test_loss_curve_is_pinned(colours: Path, tmp_path: Path):
    """A refactoring must not change a seeded run; float32 sums may differ in the last digits between CPUs."""
    train(quick(colours, tmp_path, epochs=3))
    losses = [float(row["train_loss"]) for row in rows(tmp_path / "run")]
    golden = yaml.safe_load((Path(__file__).parents[1] / "golden" / "loss_curve.yaml").read_text())
    assert losses == pytest.approx(golden["train_loss"], rel=1e-3)


def test_eval_checkpoint_validates_and_trains_nothing(
    colours: Path, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    train(quick(colours, tmp_path, eval_checkpoint=str(run / "last.pth.tar")))
    assert f"top-1 {float(rows(run)[-1]['eval_top1']):.3f}" in caplog.text
    assert not (tmp_path / "run").exists()


def test_interrupted_save_leaves_the_checkpoint_before_it(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    train(quick(colours, tmp_path, epochs=1))
    before = (tmp_path / "run/last.pth.tar").read_bytes()

    def full_disk(content: object, file: IO[bytes]) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(UserError, match="No space left on device.*intact"):
        train(quick(colours, tmp_path, epochs=2, resume="auto"))
    assert (tmp_path / "run/last.pth.tar").read_bytes() == before
    assert not list((tmp_path / "run").glob(".*unfinished*"))


def test_saver_keeps_what_timms_saver_would(tmp_path: Path, colours: Path):
    """The bookkeeping is timm's: the best of the history and the last survive."""
    trainer = Trainer(quick(colours, tmp_path, checkpoint_hist=2), Runtime(torch.device("cpu")))
    with trainer._outputs() as outputs:
        assert outputs is not None and isinstance(outputs.saver, CheckpointSaver)
        for epoch, metric in enumerate((10.0, 30.0, 20.0, 5.0)):
            outputs.saver.save_checkpoint(epoch, metric)
    assert sorted(p.name for p in (tmp_path / "run").glob("*.pth.tar")) == [
        "checkpoint-1.pth.tar",
        "checkpoint-2.pth.tar",
        "last.pth.tar",
        "model_best.pth.tar",
    ]
    assert read_checkpoint(tmp_path / "run/last.pth.tar")["epoch"] == 3
    assert read_checkpoint(tmp_path / "run/model_best.pth.tar")["epoch"] == 1


def test_progress_on_a_terminal_is_a_bar_and_in_a_file_lines(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with ProgressBar("Epoch 0", 4, 2, torch.device("cpu")) as progress:
        for i in range(4):
            time.sleep(0.15)  # a bar is drawn ten times a second at most
            progress.update(8, **({"loss": 1.5, "lr": 0.001} if progress.wants_values(i) else {}))
    shown = capsys.readouterr().err
    assert "loss 1.5000, lr 1.00e-03" in shown and "img/s" in shown and " GB" in shown
    lines = [record.message for record in caplog.records]
    assert [line.partition(" loss")[0] for line in lines] == ["Epoch 0 [2/4]", "Epoch 0 [4/4]"]
    assert all(line.endswith("left") for line in lines)


def test_recovery_checkpoints_never_hold_weights_of_a_loss_that_is_not_finite(colours: Path, tmp_path: Path):
    with pytest.raises(UserError, match="became (nan|inf) in epoch 0 at batch 2"):
        train(quick(colours, tmp_path, batch_size=2, lr=2e37, recovery_interval=3))
    assert not list((tmp_path / "run").glob("*.pth.tar"))


def test_epoch_whose_validation_is_not_finite_is_not_saved(colours: Path, tmp_path: Path):
    train(quick(colours, tmp_path, epochs=1))
    with pytest.raises(UserError, match="validation loss became (nan|inf) after epoch 1"):  # the last update breaks it
        train(quick(colours, tmp_path, epochs=2, resume="auto", resume_elastic=True, lr=2e37, batch_size=40))
    assert read_checkpoint(tmp_path / "run/last.pth.tar")["epoch"] == 0


@pytest.mark.parametrize("options", [dict(start_epoch=3), dict(resume="run/last.pth.tar", no_resume_opt=True)], ids=str)
def test_schedule_goes_on_where_the_epoch_is(colours: Path, tmp_path: Path, options: dict):
    schedule = dict(sched="step", decay_epochs=1, decay_rate=0.5, lr=1e-3, min_lr=0.0, epochs=4)
    if "resume" in options:
        train(quick(colours, tmp_path, **{**schedule, "epochs": 3}))
        options = {**options, "resume": str(tmp_path / options["resume"])}
    train(quick(colours, tmp_path, **{**schedule, **options, "experiment": "more"}))
    first = rows(tmp_path / "more")[0]
    assert first["epoch"] == "3" and math.isclose(float(first["lr"]), 1e-3 * 0.5**3)


def test_average_warms_up_from_the_first_update(colours: Path, tmp_path: Path):
    """The decay of update n is 1 - (1 + n - 1)^(-2/3): 0 at the first, so that the average is the weights then."""
    config = quick(colours, tmp_path, epochs=1, batch_size=40, model_ema=True, model_ema_decay=0.9999)
    train(dataclasses.replace(config, model_ema_warmup=True))
    content = read_checkpoint(tmp_path / "run/last.pth.tar")
    assert content["num_updates"] == 1
    torch.testing.assert_close(content["state_dict"], content["state_dict_ema"])


def test_nothing_left_to_train_is_said(colours: Path, tmp_path: Path):
    with pytest.raises(UserError, match="epoch 5 of 2; raise --epochs"):
        train(quick(colours, tmp_path, start_epoch=5))


def test_model_of_a_folder_is_named_by_its_architecture(colours: Path, tmp_path: Path):
    """The name given is a path, which no tool could make a model of."""
    timm.models.save_for_hf(timm.create_model("vip_nano4_32", num_classes=4), tmp_path / "model.v1")
    train(quick(colours, tmp_path, model=f"local-dir:{tmp_path / 'model.v1'}", epochs=1))
    assert read_checkpoint(tmp_path / "run/last.pth.tar")["arch"] == "vip_nano4_32"


def test_transfer_learning_is_off_where_it_says_so():
    assert not TrainConfig(transfer_learning="False").transfer_learning
    assert TrainConfig(transfer_learning="True").transfer_learning
