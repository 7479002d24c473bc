"""Recognising and loading weights."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

import vip  # noqa: F401  # registers the models
from vip.errors import UserError
from vip.training.config import ValidateConfig
from vip.training.factory import create_model
from vip.training.weights import (
    find_checkpoint,
    load_finetune,
    load_weights,
    read_checkpoint,
    recognise,
    state_dict_of,
)

NAMES = ["vip_s14", "vip_s7", "vip_m7", "vip_l7", "vip_ti7", "vip_nano4_32"]


@pytest.mark.parametrize("name", NAMES)
def test_models_are_recognised_by_their_shapes(name: str):
    """Whatever the classes, the input channels and the image size."""
    size = 64 if "32" in name else 280
    assert recognise(timm.create_model(name, device="meta").state_dict()) == name
    other = timm.create_model(name, device="meta", num_classes=7, in_chans=1, img_size=size)
    assert recognise(other.state_dict()) == name


def test_other_models_are_not_recognised():
    assert recognise(timm.create_model("resnet18", device="meta").state_dict()) is None
    assert recognise(timm.create_model("vip_s7", device="meta", layers=(4, 3, 8, 2)).state_dict()) is None


@pytest.mark.parametrize("wrap", ["plain", "module", "state_dict", "model", "safetensors"])
def test_weights_load_from_every_layout(tmp_path: Path, wrap: str):
    source = timm.create_model("vip_nano4_32")
    weights = source.state_dict()
    path = tmp_path / ("w.safetensors" if wrap == "safetensors" else "w.pth.tar")
    if wrap == "safetensors":
        save_file(weights, path)
    else:
        module = {f"module.{k}": v for k, v in weights.items()}
        contents = {
            "plain": weights,
            "module": module,
            "state_dict": {"state_dict": module},
            "model": {"model": weights},
        }
        torch.save(contents[wrap], path)
    model = timm.create_model("vip_nano4_32")
    load_weights(model, state_dict_of(read_checkpoint(path), None), path)
    torch.testing.assert_close(model.state_dict(), weights)


def test_averaged_weights_are_chosen_as_asked():
    a, b = {"x": torch.ones(1)}, {"x": torch.zeros(1)}
    content = {"state_dict": a, "state_dict_ema": b}
    assert state_dict_of(content, None)["x"] == 0
    assert state_dict_of(content, True)["x"] == 0
    assert state_dict_of(content, False)["x"] == 1
    with pytest.raises(UserError, match="no averaged weights"):
        state_dict_of({"state_dict": a}, True)


def test_folder_gives_its_best_checkpoint_or_its_only_file(tmp_path: Path):
    with pytest.raises(UserError, match="no checkpoint"):
        find_checkpoint(tmp_path)
    (tmp_path / "a.pth").touch()
    assert find_checkpoint(tmp_path).name == "a.pth"
    (tmp_path / "b.pth").touch()
    with pytest.raises(UserError, match="2 checkpoints to choose from"):
        find_checkpoint(tmp_path)
    (tmp_path / "last.pth.tar").touch()
    assert find_checkpoint(tmp_path).name == "last.pth.tar"
    (tmp_path / "model_best.pth.tar").touch()
    assert find_checkpoint(tmp_path).name == "model_best.pth.tar"


def test_finetuning_reports_what_was_kept_and_made_anew(tmp_path: Path):
    path = tmp_path / "w.pth"
    source = timm.create_model("vip_nano4_32", num_classes=10)
    torch.save(source.state_dict(), path)
    model = timm.create_model("vip_nano4_32", num_classes=10)
    assert load_finetune(model, path).endswith("kept 110 of 110 tensors; nothing made anew.")
    model = timm.create_model("vip_nano4_32", num_classes=3, in_chans=1, img_size=(64, 32))
    said = load_finetune(model, path)
    assert (
        "head.weight (10 classes there, 3 here)" in said and "patch_embed.proj.weight (3 channels there, 1 here" in said
    )
    assert "resampled 6" in said  # the height branch of each of six blocks
    torch.testing.assert_close(model.patch_embed.proj.weight, source.patch_embed.proj.weight.sum(1, keepdim=True))
    headless = timm.create_model("vip_nano4_32", num_classes=0)
    load_finetune(headless, path)
    torch.testing.assert_close(headless.norm.weight, source.norm.weight)


def test_finetuning_resamples_the_positions_of_timms_models(tmp_path: Path):
    path = tmp_path / "vit.pth"
    torch.save(timm.create_model("vit_tiny_patch16_224", img_size=64).state_dict(), path)
    model = timm.create_model("vit_tiny_patch16_224", img_size=96, num_classes=5)
    assert "head.weight (1000 classes there, 5 here)" in load_finetune(model, path)
    assert model.pos_embed.shape[1] == 37


def test_unknown_model_and_argument_are_refused():
    with pytest.raises(UserError, match="No model is called 'vip_s77'. Did you mean vip_s7"):
        create_model(ValidateConfig(model="vip_s77"), None)
    with pytest.raises(UserError, match="no_such_argument"):
        create_model(ValidateConfig(model="vip_nano4_32", model_kwargs={"no_such_argument": 1}), None)
    with pytest.raises(UserError, match="nearest sizes that work are 32 and 40"):
        create_model(ValidateConfig(model="vip_nano4_32", img_size=33), None)
