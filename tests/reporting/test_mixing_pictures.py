"""Mixing matrices and branch weights, against the layers' own outputs and against arithmetic in float64."""

import math

import numpy as np
import pytest
import timm
import torch
from torch import nn

import vip  # noqa: F401
from vip.errors import UserError
from vip.models.vision_permutator import AxisMix, PermuteMlp
from vip.reporting.mixing_pictures import (
    BRANCHES,
    branch_weights,
    draw_branch_weights,
    draw_mixing,
    find_permute_mlps,
    token_mixing,
)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("vip_nano4_32", num_classes=3).eval()
    for layer in find_permute_mlps(model).values():
        nn.init.normal_(layer.reweight.fc2.weight, std=1)
        nn.init.normal_(layer.reweight.fc2.bias, std=1)
    return model


@pytest.mark.parametrize("axis", [1, 2])
def test_token_mixing_is_the_energy_that_arrives(axis: int) -> None:
    """What a token says in each of its channels, put in one at a time, and what each token has of it afterwards."""
    torch.manual_seed(0)
    length, segment = 5, 3
    layer = AxisMix(length, segment).double()
    expected = np.zeros((length, length))
    for source in range(length):
        for channel in range(segment):
            x = torch.zeros(1, length, length, 1, segment, dtype=torch.float64)
            x.movedim(axis, 1)[0, source, 2, 0, channel] = 1
            out = layer.mix(x, axis).movedim(axis, 1)[0, :, 2, 0]
            expected[:, source] += out.detach().square().sum(-1).numpy()
    np.testing.assert_allclose(token_mixing(layer).numpy(), np.sqrt(expected), rtol=1e-5)


def test_blocks_are_found_in_order(model: nn.Module) -> None:
    layers = find_permute_mlps(model)
    assert list(layers) == ["network.0.0", "network.0.1", "network.2.0", "network.3.0", "network.3.1", "network.4.0"]
    assert all(model.get_submodule(name).attn is layer for name, layer in layers.items())


def test_models_without_permute_mlps() -> None:
    with pytest.raises(UserError, match=r"ResNet has no Permute-MLP.*vip_nano4_32.*vip_s7"):
        find_permute_mlps(timm.create_model("resnet10t"))


def test_branch_weights_that_are_known(model: nn.Module) -> None:
    for layer in find_permute_mlps(model).values():
        nn.init.zeros_(layer.reweight.fc2.weight)
        layer.reweight.fc2.bias.data = torch.tensor([0.6, 0.3, 0.1]).log().repeat(layer.mlp_c.in_features)
    weights, count = branch_weights(model, torch.randn(5, 3, 32, 32).split(2))
    assert count == 5 and weights.shape == (6, 3)
    torch.testing.assert_close(weights, torch.tensor([[0.6, 0.3, 0.1]] * 6).double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("branch", range(3))
def test_weights_are_of_the_branch_they_are_said_to_be_of(model: nn.Module, branch: int) -> None:
    """A block whose softmax picks one branch has that branch's output alone."""
    layer = find_permute_mlps(model)["network.0.0"]
    nn.init.zeros_(layer.reweight.fc2.weight)
    layer.reweight.fc2.bias.data = torch.full((192,), -50.0)
    layer.reweight.fc2.bias.data.view(64, 3)[:, branch] = 50
    weights, _ = branch_weights(model, [torch.randn(2, 3, 32, 32)])
    assert weights[0].argmax() == branch and weights[0, branch] == pytest.approx(1)
    x = torch.randn(2, 8, 8, 64)
    segments = x.view(2, 8, 8, 8, 8)
    own = {"height": layer.mlp_h.mix(segments, 1), "width": layer.mlp_w.mix(segments, 2), "channel": layer.mlp_c(x)}
    torch.testing.assert_close(layer(x), layer.proj(own[BRANCHES[branch]].reshape(x.shape)))


def test_branch_weights_against_the_formulas(model: nn.Module) -> None:
    """Equations 4 to 6 of the paper in float64, for the first block, whatever the batches."""
    images = torch.randn(6, 3, 32, 32)
    weights, _ = branch_weights(model, images.split(4))
    block = model.network[0][0].double()
    layer: PermuteMlp = block.attn
    x = block.norm1(model.patch_embed.double()(images.double()))
    segments = x.view(6, 8, 8, 8, 8)
    branches = layer.mlp_h.mix(segments, 1), layer.mlp_w.mix(segments, 2), layer.mlp_c(x).view_as(segments)
    pooled = sum(branches).mean((1, 2)).flatten(1)
    hidden = pooled @ layer.reweight.fc1.weight.T + layer.reweight.fc1.bias
    hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    logits = (hidden @ layer.reweight.fc2.weight.T + layer.reweight.fc2.bias).view(6, 64, 3)
    expected = (logits.exp() / logits.exp().sum(-1, keepdim=True)).mean((0, 1))
    torch.testing.assert_close(weights[0], expected.detach(), rtol=1e-4, atol=1e-5)
    model.float()
    again, _ = branch_weights(model, [images])
    torch.testing.assert_close(again, weights, rtol=1e-4, atol=1e-5)


def test_batches_without_images(model: nn.Module) -> None:
    images, nothing = torch.randn(2, 3, 32, 32), torch.empty(0, 3, 32, 32)
    weights, count = branch_weights(model, [nothing, images, nothing])
    assert count == 2 and weights.equal(branch_weights(model, [images])[0])
    with pytest.raises(UserError, match="None of the images can be read"):
        branch_weights(model, [nothing])


def test_weights_that_are_not_finite(model: nn.Module) -> None:
    torch.nn.init.constant_(model.patch_embed.proj.bias, float("nan"))
    with pytest.raises(UserError, match="not finite: take another checkpoint"):
        branch_weights(model, [torch.randn(1, 3, 32, 32)])


def test_nothing_stays_on_the_model(model: nn.Module) -> None:
    branch_weights(model, [torch.randn(1, 3, 32, 32)])
    with pytest.raises(RuntimeError):
        branch_weights(model, [torch.randn(1, 4, 32, 32)])
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("full", [False, True])
def test_pictures_of_all_matrices(model: nn.Module, full: bool) -> None:
    layers = find_permute_mlps(model)
    layers["network.4.0"].mlp_w.weight.data.zero_()
    figure = draw_mixing(layers, "a model", full)
    axes = [ax for ax in figure.axes if ax.images]
    assert len(axes) == 12
    for i, (name, layer) in enumerate(layers.items()):
        for ax, mix, branch in ((axes[i], layer.mlp_h, "height"), (axes[6 + i], layer.mlp_w, "width")):
            drawn = np.asarray(ax.images[0].get_array())
            matrix = (mix.weight.detach() if full else token_mixing(mix)).numpy()
            np.testing.assert_array_equal(drawn, matrix)
            assert branch in ax.get_title() and (branch == "width" or name in ax.get_title())
    assert ("Frobenius norm" in figure.get_suptitle().replace("\n", " ")) != full
    figure.draw_without_rendering()


def test_many_blocks_are_drawn_in_bands() -> None:
    model = timm.create_model("vip_nano4_32", layers=(9, 1, 8, 2))
    layers = find_permute_mlps(model)
    figure = draw_mixing(layers, "a deep model")
    titles = [ax.get_title() for ax in figure.axes if ax.images]
    assert len(titles) == 40 and [t.split("\n")[0] for t in titles if "height" in t] == list(layers)


def test_bars_are_as_long_as_the_weights() -> None:
    weights = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]], dtype=torch.float64)
    figure = draw_branch_weights(["one", "two"], weights, "a title")
    (ax,) = figure.axes
    for branch, bars in enumerate(ax.containers):
        assert bars.get_label() == BRANCHES[branch]
        for block, bar in enumerate(bars):
            assert bar.get_height() == pytest.approx(float(weights[block, branch]))
            assert bar.get_y() == pytest.approx(float(weights[block, :branch].sum()))
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["channel", "width", "height"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["one", "two"]
