"""What timm and the commands rely on, of every model that the package registers, without a number computed."""

import inspect

import pytest
import timm
import torch

import vip  # noqa: F401  registers the models
from vip.training.weights import recognise

NAMES = [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("vip.models.")]


def create(name: str, **kwargs: object) -> torch.nn.Module:
    return timm.create_model(name, device="meta", **kwargs)


def images(name: str, channels: int = 3) -> torch.Tensor:
    return torch.empty(2, channels, *timm.get_pretrained_cfg(name).input_size[1:], device="meta")


def test_all_modules_were_found() -> None:
    assert {"vip_s7", "lvvit_s", "eamlp_14", "resmlp_big_24_p16_224"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_shapes(name: str) -> None:
    model = create(name, num_classes=7, in_chans=5).eval()
    x = images(name, 5)
    assert model(x).shape == (2, 7)
    features = model.forward_features(x)
    assert model.forward_head(features).shape == (2, 7)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)


@pytest.mark.parametrize("name", NAMES)
def test_configuration_names_its_layers(name: str) -> None:
    model, cfg = create(name), timm.get_pretrained_cfg(name)
    classifiers = (cfg.classifier,) if isinstance(cfg.classifier, str) else cfg.classifier
    assert all(model.get_submodule(layer).out_features == cfg.num_classes for layer in classifiers)
    if cfg.first_conv:  # EAMLP has none that takes images alone
        assert model.get_submodule(cfg.first_conv).weight.shape[1] == cfg.input_size[0]


@pytest.mark.parametrize("name", NAMES)
def test_weights_tell_the_model(name: str) -> None:
    state_dict = create(name, num_classes=3).state_dict()
    assert recognise(state_dict) == name


@pytest.mark.parametrize("name", NAMES)
def test_docstring(name: str) -> None:
    assert inspect.getdoc(timm.model_entrypoint(name))
