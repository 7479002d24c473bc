"""EAMLP and ResMLP-B24/16 beside their golden vectors: a textbook, any resolution, and timm's contract."""

import copy
import math
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from torch import nn

import vip.models  # noqa: F401  # registers them
from vip.models.external_attention_mlp import ExternalAttention, TokensToToken, sinusoids
from vip.training.weights import recognise

PUBLISHED = {"eamlp_7": 6_146_638, "eamlp_14": 29_877_070, "eamlp_19": 54_559_054}


def small(**kwargs: Any) -> Any:
    """eamlp_7 with two blocks in float64 and eval mode."""
    torch.manual_seed(0)
    options = dict(depth=2, num_classes=10, img_size=32, dtype=torch.float64)
    return timm.create_model("eamlp_7", **{**options, **kwargs}).eval()


def images(*size: int, batch: int = 2, chans: int = 3) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, chans, *(size or (32, 32)), dtype=torch.float64)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters(name: str) -> None:
    assert sum(p.numel() for p in timm.create_model(name, device="meta").parameters()) == PUBLISHED[name]


def test_resmlp_of_the_published_table() -> None:
    """116 M parameters and 14x14 tokens; timm's member of that size has patches of 8 pixels."""
    model = timm.create_model("resmlp_big_24_p16_224", device="meta")
    assert sum(p.numel() for p in model.parameters()) == 115_736_776
    assert model.stem.grid_size == (14, 14)
    features = timm.create_model("resmlp_big_24_p16_224", features_only=True, device="meta")
    assert features.feature_info.channels() == [768] * 3


def test_external_attention_by_loops() -> None:
    torch.manual_seed(0)
    layer = ExternalAttention(8, num_heads=2, memory=5, dtype=torch.float64)
    x = torch.randn(3, 7, 8, dtype=torch.float64)
    wide = layer.trans_dims(x)  # 8 heads of 4 channels
    out = torch.empty(3, 7, 32, dtype=torch.float64)
    for b in range(3):
        for head in range(8):
            tokens = wide[b, :, 4 * head : 4 * head + 4]
            scores = torch.stack([layer.linear_0(token) for token in tokens])  # [7, 5]
            for unit in range(5):
                exps = [math.exp(scores[n, unit].item()) for n in range(7)]
                scores[:, unit] = torch.tensor(exps) / sum(exps)
            for n in range(7):
                out[b, n, 4 * head : 4 * head + 4] = layer.linear_1(scores[n] / (1e-9 + scores[n].sum()))
    torch.testing.assert_close(layer(x), layer.proj(out))


def test_stem_by_convolution() -> None:
    """Unfolding and a linear layer are a convolution; here without the blocks between."""
    stem = TokensToToken((32, 48), embed_dim=6, token_dim=4, dtype=torch.float64)
    stem.attention1, stem.attention2 = nn.Linear(147, 4, dtype=torch.float64), nn.Linear(36, 4, dtype=torch.float64)
    x = images(32, 48)
    y = F.conv2d(x, stem.attention1.weight.view(4, 3, 7, 7), stem.attention1.bias, stride=4, padding=2)
    for layer in (stem.attention2, stem.project):
        y = F.conv2d(y, layer.weight.view(-1, 4, 3, 3), layer.bias, stride=2, padding=1)
    torch.testing.assert_close(stem(x), y.flatten(2).transpose(1, 2))


def test_positions_are_fixed_sinusoids() -> None:
    table = sinusoids(5, 4)
    for position in range(5):
        expected = [math.sin(position), math.cos(position), math.sin(position / 100), math.cos(position / 100)]
        torch.testing.assert_close(table[0, position], torch.tensor(expected))
    model = small().train()
    assert not model.pos_embed.requires_grad
    optimizer = create_optimizer_v2(model, "adamw", lr=1.0)
    assert all(p is not model.pos_embed for group in optimizer.param_groups for p in group["params"])


@pytest.mark.parametrize("size", [(16, 16), (32, 64), (48, 32), (224, 224)])
def test_any_resolution(size: tuple[int, int]) -> None:
    model = small(img_size=size)
    x = images(*size)
    assert model(x).shape == (2, 10)
    model.set_input_size((64, 48))
    assert model(images(64, 48)).shape == (2, 10) and not model.pos_embed.requires_grad
    model.set_input_size(size)


def test_weights_of_another_resolution_are_resampled() -> None:
    source, target = small(img_size=64), small(img_size=(96, 64))
    target.load_state_dict(source.state_dict())
    moved = copy.deepcopy(source)
    moved.set_input_size((96, 64))
    torch.testing.assert_close(target(images(96, 64)), moved(images(96, 64)))


@pytest.mark.parametrize("size", [100, (224, 230), (0, 16)])
def test_sizes_that_do_not_work(size: Any) -> None:
    with pytest.raises(ValueError, match="patches of 16 need a multiple of it. The nearest sizes that work are"):
        small(img_size=size)
    with pytest.raises(ValueError, match="make tokens of 16 pixels"):
        small().set_input_size(patch_size=8)


def test_features() -> None:
    model, x = small(depth=3, img_size=(32, 64)), images(32, 64)
    final, taken = model.forward_intermediates(x, indices=[0, 2], norm=True)
    assert [t.shape for t in taken] == [(2, 256, 2, 4)] * 2
    torch.testing.assert_close(final, model.forward_features(x))
    torch.testing.assert_close(taken[1].flatten(2).transpose(1, 2), final[:, 1:])
    backbone = timm.create_model("eamlp_7", features_only=True, img_size=32, out_indices=(1, 6))
    assert backbone.feature_info.channels() == [256, 256] and backbone.feature_info.reduction() == [16, 16]
    model.prune_intermediate_layers(1)
    assert len(model.blocks) == 3 and model.num_classes == 0


def test_heads() -> None:
    model, x = small(), images()
    features = model.forward_features(x)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features[:, 0])
    model.reset_classifier(3, "avg")
    torch.testing.assert_close(model(x), model.head(features[:, 1:].mean(1)))
    model.reset_classifier(0, "")
    assert model(x).shape == (2, 5, 256)


def test_every_parameter_trains() -> None:
    model = small(drop_path_rate=0.1, proj_drop_rate=0.1, attn_drop_rate=0.1, pos_drop_rate=0.1, drop_rate=0.1).train()
    model(images()).square().sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_checkpointing_changes_nothing() -> None:
    model, x = small(), images()
    model.train()(x).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.set_grad_checkpointing()
    model(x).sum().backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, expected[name])


def test_groups_by_depth() -> None:
    model = small()
    groups = group_parameters(model, model.group_matcher())
    assert "tokens_to_token.project.weight" in groups[0] and "blocks.1.mlp.fc1.weight" in groups[2]


@pytest.mark.parametrize("how", ["script", "export", "compile", "deepcopy", "bfloat16"])
def test_ways_to_run_it(how: str) -> None:
    model, x = small(dtype=torch.float32), images().float()
    expected = model(x)
    if how == "script":
        model = torch.jit.script(model)
    elif how == "export":
        model = torch.export.export(model, (x,)).module()
    elif how == "compile":
        model = torch.compile(model, backend="eager", fullgraph=True)
    elif how == "deepcopy":
        model = copy.deepcopy(model)
    else:
        assert model.bfloat16()(x.bfloat16()).dtype is torch.bfloat16
        return
    torch.testing.assert_close(model(x), expected)


def test_gray_images_and_checkpoints_of_other_tools() -> None:
    assert small(in_chans=1)(images(chans=1)).shape == (2, 10)
    model = timm.create_model("eamlp_7", device="meta")
    assert recognise(model.state_dict()) == "eamlp_7"
