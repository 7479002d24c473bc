"""Vision Permutator keeps timm's contract for models with a spatial output in NHWC."""

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import textbook
import timm
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, resolve_model_data_config
from timm.models import create_feature_extractor, group_parameters
from timm.optim import create_optimizer_v2
from torch import nn

import vip
from vip.models.layers import init_linear
from vip.models.vision_permutator import PermutatorBlock, PermuteMlp, VisionPermutator, checkpoint_filter_fn

PUBLISHED = {"vip_s14": 29_892_904, "vip_s7": 25_114_984, "vip_m7": 55_272_488, "vip_l7": 87_784_936}
NAMES = [*PUBLISHED, "vip_ti7", "vip_nano4_32"]
# image size, grid of the last stage, channels of the last stage, reduction of each stage
SHAPES = {
    "vip_s14": (224, 16, 384, [14, 14, 14, 14]),
    "vip_s7": (224, 16, 384, [7, 14, 14, 14]),
    "vip_m7": (224, 16, 512, [7, 7, 14, 14]),
    "vip_l7": (224, 16, 512, [7, 14, 14, 14]),
    "vip_ti7": (224, 16, 192, [7, 14, 14, 14]),
    "vip_nano4_32": (32, 4, 128, [4, 8, 8, 8]),
}
NANO = dict(layers=(2, 1, 2, 1), segments=(8, 4, 4, 4))


def nano(**kwargs: Any) -> VisionPermutator:
    """vip_nano4_32 with ten classes, in eval mode, its weights wide enough for every branch to count."""
    model = timm.create_model("vip_nano4_32", **{"num_classes": 10, **kwargs}).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.0, p[0].numel() ** -0.5) if p.ndim > 1 else p.add_(0.1 * torch.randn_like(p))
    return model


def images(batch: int = 2, size: tuple[int, int] = (32, 32), chans: int = 3, **kwargs: Any) -> torch.Tensor:
    return torch.randn(batch, chans, *size, **kwargs)


def weights_of(module: nn.Module) -> dict[str, np.ndarray]:
    return {name: t.detach().numpy() for name, t in module.state_dict().items()}


def gradients(model: nn.Module, x: torch.Tensor, seed: int = 1) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(seed)
    out = model(x)
    sum((o * o).mean() for o in (out if isinstance(out, list) else [out])).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def count_calls(modules: dict[str, nn.Module]) -> dict[str, int]:
    """Counter of the forward calls each module has had since."""
    calls = dict.fromkeys(modules, 0)

    def hook(name: str, *_: Any) -> None:
        calls[name] += 1

    for name, module in modules.items():
        module.register_forward_pre_hook(partial(hook, name))
    return calls


# --- the layer and the network against the textbook


@pytest.mark.parametrize(
    ("channels", "segments", "grid"),
    [
        (12, 3, (5, 5)),
        (12, 3, (2, 7)),
        (12, 4, (7, 2)),
        (8, 1, (3, 4)),
        (8, 8, (4, 3)),
        (12, 2, (1, 6)),
        (4, 2, (1, 1)),
    ],
)
def test_permute_mlp_is_the_textbook_formula(channels, segments, grid):
    layer = PermuteMlp(channels, segments, grid, dtype=torch.float64)
    for p in layer.parameters():
        nn.init.normal_(p, std=0.5)
    x = torch.randn(3, *grid, channels, dtype=torch.float64)
    expected = textbook.permute_mlp(x.numpy(), weights_of(layer), segments)
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=1e-10, atol=1e-12)


def test_permute_mlp_gradients_are_the_slopes_of_the_textbook():
    layer = PermuteMlp(12, 3, (3, 5), dtype=torch.float64)
    for p in layer.parameters():
        nn.init.normal_(p, std=0.5)
    x = torch.randn(2, 3, 5, 12, dtype=torch.float64, requires_grad=True)
    scale = torch.randn(2, 3, 5, 12, dtype=torch.float64)
    (layer(x) * scale).sum().backward()

    values = {"x": x.detach().numpy(), **weights_of(layer)}
    grads = {"x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}
    rng = np.random.default_rng(0)

    def output(step: float, name: str, direction: np.ndarray) -> float:
        moved = {**values, name: values[name] + step * direction}
        return float((textbook.permute_mlp(moved["x"], moved, 3) * scale.numpy()).sum())

    for name, grad in grads.items():
        direction = rng.standard_normal(values[name].shape)
        slope = (output(1e-5, name, direction) - output(-1e-5, name, direction)) / 2e-5
        np.testing.assert_allclose((grad.numpy() * direction).sum(), slope, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("size", [(32, 32), (24, 48), (40, 16)])
def test_network_is_the_textbook_network(size):
    model = nano(img_size=size, dtype=torch.float64)
    x = images(size=size, dtype=torch.float64)
    expected = textbook.logits(x.numpy(), weights_of(model), **NANO)
    np.testing.assert_allclose(model(x).detach().numpy(), expected, rtol=1e-9, atol=1e-11)


# --- registration


def test_import_vip_is_enough_to_register():
    code = "import vip, timm; print(*timm.list_models('vip_*')); timm.create_model('vip_nano4_32', num_classes=3)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_registered_name_creates_the_model(name):
    model = timm.create_model(name, num_classes=10, device="meta")
    assert isinstance(model, vip.models.VisionPermutator)
    assert model.num_classes == 10
    assert timm.create_model(f"{name}.untrained", device="meta").pretrained_cfg["tag"] == "untrained"


def test_parameter_counts():
    count = {n: sum(p.numel() for p in timm.create_model(n, device="meta").parameters()) for n in NAMES}
    assert {n: count[n] for n in PUBLISHED} == PUBLISHED
    assert 5_500_000 < count["vip_ti7"] < 6_500_000
    assert count["vip_nano4_32"] < 1_000_000


# --- default_cfgs


@pytest.mark.parametrize("name", NAMES)
def test_default_cfg_is_true_of_the_model(name):
    model = timm.create_model(name, device="meta")
    cfg = model.default_cfg
    size, grid, channels, _ = SHAPES[name]
    assert (cfg["architecture"], cfg["tag"]) == (name, "untrained")
    assert cfg["input_size"] == (3, size, size)
    assert cfg["pool_size"] is None  # what has one is taken for [B, C, H, W] features, by fastai and test-time pooling
    assert model.forward_features(images(1, (size, size), device="meta")).shape == (1, grid, grid, channels)
    assert cfg["num_classes"] == model.get_classifier().out_features == 1000
    assert isinstance(model.get_submodule(cfg["classifier"]), nn.Linear)
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
    first_conv = model.get_submodule(cfg["first_conv"])
    assert isinstance(first_conv, nn.Conv2d) and first_conv.in_channels == 3
    assert next(m for m in model.modules() if isinstance(m, nn.Conv2d)) is first_conv
    assert cfg["interpolation"] == "bicubic"
    assert (cfg["mean"], cfg["std"]) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    assert cfg["fixed_input_size"]
    with pytest.raises(AssertionError):  # and so it is
        model(images(1, (size * 2, size * 2), device="meta"))


@pytest.mark.parametrize(
    ("name", "crop_pct"), [("vip_s14", 0.9), ("vip_s7", 0.9), ("vip_m7", 0.9), ("vip_l7", 0.875), ("vip_ti7", 0.9)]
)
def test_crop_pct_reaches_the_data_configuration(name, crop_pct):
    assert resolve_model_data_config(timm.create_model(name, device="meta"))["crop_pct"] == crop_pct


def test_classifier_is_gone_from_the_state_dict_without_classes():
    model = nano(num_classes=0)
    assert not [name for name in model.state_dict() if name.startswith(model.default_cfg["classifier"])]


@pytest.mark.parametrize("name", NAMES)
def test_no_pretrained_weights_are_claimed(name):
    assert not timm.is_model_pretrained(name)
    assert not timm.list_pretrained(name)
    cfg = timm.get_pretrained_cfg(name)
    assert not (cfg.url or cfg.file or cfg.hf_hub_id)
    with pytest.raises(RuntimeError, match="No pretrained weights"):
        timm.create_model(name, pretrained=True, device="meta")


# --- features, head, classifier


def test_forward_is_features_then_head():
    model, x = nano(), images()
    assert model.output_fmt == "NHWC"
    features = model.forward_features(x)
    assert features.shape == (2, 4, 4, 128)
    torch.testing.assert_close(model.forward_head(features), model(x))


POOLS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "": lambda x: x,
    "avg": lambda x: x.mean((1, 2)),
    "max": lambda x: x.amax((1, 2)),
    "avgmax": lambda x: (x.mean((1, 2)) + x.amax((1, 2))) / 2,
    "catavgmax": lambda x: torch.cat([x.mean((1, 2)), x.amax((1, 2))], -1),
}


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("by_reset", [False, True], ids=["constructor", "reset_classifier"])
def test_global_pool(pool, by_reset):
    model = nano(**({} if by_reset else {"global_pool": pool}))
    if by_reset:
        model.reset_classifier(10, pool)
    x = images()
    pooled = POOLS[pool](model.forward_features(x))
    head = model.get_classifier()
    assert model.num_features == 128
    assert model.head_hidden_size == pooled.shape[-1] == head.in_features
    torch.testing.assert_close(model.forward_head(model.forward_features(x), pre_logits=True), pooled)
    torch.testing.assert_close(model(x), F.linear(pooled, head.weight, head.bias))


def test_unknown_global_pool_is_refused():
    with pytest.raises((AssertionError, ValueError), match="median"):
        nano(global_pool="median")


@pytest.mark.parametrize("name", NAMES)
def test_without_classes_and_pooling_the_tokens_come_out(name):
    size, grid, channels, _ = SHAPES[name]
    x = images(1, (size, size), device="meta")
    model = timm.create_model(name, num_classes=0, device="meta")
    assert model(x).shape == (1, channels)
    assert model.num_features == model.head_hidden_size == channels
    model.reset_classifier(0, "")
    assert model(x).shape == (1, grid, grid, channels)
    assert timm.create_model(name, num_classes=0, global_pool="", device="meta")(x).shape == (1, grid, grid, channels)


def test_reset_classifier():
    model, x = nano(), images()
    pooled = model.forward_features(x).mean((1, 2))

    model.reset_classifier(0)
    assert model.num_classes == 0 and not isinstance(model.get_classifier(), nn.Linear)
    torch.testing.assert_close(model(x), pooled)

    model.reset_classifier(7)
    assert model.num_classes == 7 and model(x).shape == (2, 7)
    assert model.get_classifier() is model.head and model.head.out_features == 7

    model.reset_classifier(5, "")
    tokens = model.forward_features(x)
    torch.testing.assert_close(model(x), F.linear(tokens, model.head.weight, model.head.bias))
    assert model(x).shape == (2, 4, 4, 5)

    model.reset_classifier(5)  # the pooling stays
    assert model(x).shape == (2, 4, 4, 5)
    assert model.num_features == 128


def test_reset_classifier_keeps_mode_and_type():
    model = nano(dtype=torch.bfloat16).train()
    model.reset_classifier(4, "max")
    assert model.head.weight.dtype == torch.bfloat16
    assert all(m.training for m in model.modules())
    meta = timm.create_model("vip_nano4_32", device="meta")
    meta.reset_classifier(4)
    assert meta.head.weight.is_meta


# --- intermediates


def textbook_stages(model: VisionPermutator, x: torch.Tensor) -> list[torch.Tensor]:
    return [torch.from_numpy(s) for s in textbook.stages(x.numpy(), weights_of(model), **NANO)]


@pytest.mark.parametrize("output_fmt", ["NCHW", "NHWC"])
@pytest.mark.parametrize(
    ("indices", "taken"),
    [(None, [0, 1, 2, 3]), (1, [3]), (3, [1, 2, 3]), ([0, 2], [0, 2]), ([-1], [3]), ([-4, -2], [0, 2]), ((1,), [1])],
)
def test_intermediates_are_the_stage_outputs(indices, taken, output_fmt):
    model, x = nano(dtype=torch.float64), images(dtype=torch.float64)
    stages = textbook_stages(model, x)
    final, got = model.forward_intermediates(x, indices=indices, output_fmt=output_fmt)
    assert len(got) == len(taken)
    for t, i in zip(got, taken, strict=True):
        torch.testing.assert_close(t, stages[i].permute(0, 3, 1, 2) if output_fmt == "NCHW" else stages[i])
    torch.testing.assert_close(final, model.forward_features(x))

    alone = model.forward_intermediates(x, indices=indices, output_fmt=output_fmt, intermediates_only=True)
    assert isinstance(alone, list)
    torch.testing.assert_close(alone, got)


def test_intermediates_are_nchw_unless_asked():
    shapes = [tuple(t.shape) for t in nano().forward_intermediates(images(), intermediates_only=True)]
    assert shapes == [(2, 64, 8, 8), (2, 128, 4, 4), (2, 128, 4, 4), (2, 128, 4, 4)]


def test_intermediates_norm_is_of_the_last_stage():
    model, x = nano(dtype=torch.float64), images(dtype=torch.float64)
    stages = textbook_stages(model, x)
    final, got = model.forward_intermediates(x, norm=True, output_fmt="NHWC")
    torch.testing.assert_close(got[:3], stages[:3])
    torch.testing.assert_close(got[3], final)
    torch.testing.assert_close(final, F.layer_norm(stages[3], (128,), model.norm.weight, model.norm.bias, 1e-5))


def test_intermediates_stop_early():
    model, x = nano(dtype=torch.float64), images(dtype=torch.float64)
    calls = count_calls(dict(model.network.named_children()))
    final, got = model.forward_intermediates(x, indices=[0, 1], stop_early=True, output_fmt="NHWC")
    assert [n for n, c in calls.items() if c] == ["0", "1", "2"]  # stage, downsampling, stage
    torch.testing.assert_close(got, textbook_stages(model, x)[:2])
    torch.testing.assert_close(final, got[-1])

    final, _ = model.forward_intermediates(x, indices=1, stop_early=True)
    torch.testing.assert_close(final, model.forward_features(x))


def test_intermediates_refuse_what_does_not_exist():
    model, x = nano(), images()
    for options in (dict(indices=[4]), dict(indices=5), dict(indices=[-5]), dict(output_fmt="NLC")):
        with pytest.raises(AssertionError):
            model.forward_intermediates(x, **options)


@pytest.mark.parametrize(("indices", "kept"), [(1, [3]), ([0], [0]), ([0, 1], [0, 1]), ([-3], [1]), (4, [0, 1, 2, 3])])
def test_prune_keeps_what_the_intermediates_need(indices, kept):
    model, x = nano(), images()
    expected = model.forward_intermediates(x, indices=kept, intermediates_only=True)
    total = len(list(model.parameters()))
    assert model.prune_intermediate_layers(indices) == kept
    assert len(list(model.parameters())) < total
    torch.testing.assert_close(model.forward_intermediates(x, indices=kept, intermediates_only=True), expected)

    # nothing is left that does not take part
    final, _ = model.forward_intermediates(x, indices=kept)
    final.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.num_features == model.head_hidden_size == final.shape[-1]
    torch.testing.assert_close(model(x), final)


def test_prune_options():
    model, x = nano(), images()
    logits = model(x)
    model.prune_intermediate_layers([3], prune_head=False)
    torch.testing.assert_close(model(x), logits)

    stage = model.forward_intermediates(x, [3], intermediates_only=True, output_fmt="NHWC")[0]
    model.prune_intermediate_layers([3], prune_norm=True)
    torch.testing.assert_close(model.forward_features(x), stage)


# --- features_only


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("factor", [1, 2], ids=["default size", "twice the height"])
def test_features_only_levels_channels_and_reductions(name, factor):
    size, _, _, reductions = SHAPES[name]
    shape = (size * factor, size)
    model = timm.create_model(name, features_only=True, img_size=shape, device="meta")
    outputs = model(images(1, shape, device="meta"))
    assert len(outputs) == len(model.feature_info.reduction()) >= 3
    assert model.feature_info.reduction() == reductions
    assert model.output_fmt == "NCHW"
    for out, channels, reduction in zip(outputs, model.feature_info.channels(), reductions, strict=True):
        assert out.shape == (1, channels, shape[0] // reduction, shape[1] // reduction)


@pytest.mark.parametrize(
    ("out_indices", "taken"), [((0,), [0]), ((1, 3), [1, 3]), ((-1,), [3]), ((-4, -3), [0, 1]), (2, [2, 3])]
)
def test_features_only_out_indices(out_indices, taken):
    x = images()
    whole = nano()
    model = timm.create_model("vip_nano4_32", features_only=True, out_indices=out_indices).eval()
    model.model.load_state_dict(whole.state_dict(), strict=False)
    torch.testing.assert_close(model(x), whole.forward_intermediates(x, indices=taken, intermediates_only=True))
    assert model.feature_info.channels() == [[64, 128, 128, 128][i] for i in taken]
    assert model.feature_info.reduction() == [[4, 8, 8, 8][i] for i in taken]


def test_features_follow_set_input_size():
    model = timm.create_model("vip_nano4_32", features_only=True).eval()
    model.model.set_input_size((48, 64), patch_size=8)
    for out, reduction in zip(model(images(size=(48, 64))), model.feature_info.reduction(), strict=True):
        assert out.shape[2:] == (48 // reduction, 64 // reduction)


@pytest.mark.parametrize("feature_cls", ["fx", "hook"])
def test_features_only_by_other_means(feature_cls):
    x = images()
    whole = nano()
    model = timm.create_model("vip_nano4_32", features_only=True, feature_cls=feature_cls, num_classes=10).eval()
    prefix = "graph_module." if feature_cls == "fx" else "body."
    missing = model.load_state_dict({prefix + k: v for k, v in whole.state_dict().items()}, strict=False).missing_keys
    assert not missing
    assert model.output_fmt == "NHWC"
    expected = whole.forward_intermediates(x, output_fmt="NHWC", intermediates_only=True)
    torch.testing.assert_close(model(x), expected)
    assert len(gradients(model, x)) >= len(list(whole.network.parameters()))


# --- what the optimizer asks


def block_order(model: VisionPermutator) -> list[str]:
    """Prefixes of the parameters from the input to the output, norm and head last."""
    order = ["patch_embed"]
    for i, stage in enumerate(model.network):
        order += (
            [f"network.{i}.{k}." for k in range(len(stage))] if isinstance(stage, nn.Sequential) else [f"network.{i}."]
        )
    return [*order, "head."]


@pytest.mark.parametrize("name", ["vip_nano4_32", "vip_s14", "vip_m7"])
def test_layer_decay_follows_depth(name):
    model = timm.create_model(name, device="meta")
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1.0, weight_decay=0.05, layer_decay=0.5)
    groups = optimizer.param_groups
    scale = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    assert sum(len(g["params"]) for g in groups) == len(scale) == len(list(model.parameters()))

    order = block_order(model)
    for name, p in model.named_parameters():
        prefix = order[-2] if name.startswith("norm.") else next(o for o in order if name.startswith(o))
        assert scale[id(p)] == 0.5 ** (len(order) - 1 - order.index(prefix)), name


def test_weight_decay_spares_biases_and_norms_alone():
    model = nano()
    assert model.no_weight_decay() == set()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1.0, weight_decay=0.05)
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    assert decayed == {id(p) for p in model.parameters() if p.ndim > 1}


def test_coarse_groups_are_stages():
    model = nano()
    groups = list(group_parameters(model, model.group_matcher(coarse=True)).values())
    assert sorted(sum(groups, [])) == sorted(name for name, _ in model.named_parameters())
    prefixes = [{".".join(name.split(".")[: 2 if name.startswith("network") else 1]) for name in g} for g in groups]
    assert prefixes == [{"patch_embed"}, *({f"network.{i}"} for i in range(5)), {"norm", "head"}]


@pytest.mark.parametrize("pool", ["avg", "max", ""])
def test_every_parameter_gets_a_gradient_in_train_mode(pool):
    model = nano(global_pool=pool).train() if pool else nano().train()
    if not pool:
        model.reset_classifier(10, "")
    x = images().requires_grad_()
    grads = gradients(model, x)
    assert grads.keys() == dict(model.named_parameters()).keys()
    assert all(g.isfinite().all() and g.norm() > 0 for g in grads.values())
    assert x.grad.norm() > 0


@pytest.mark.parametrize("drop", [0.0, 0.3], ids=["plain", "stochastic"])
def test_grad_checkpointing_changes_nothing_but_memory(drop):
    model, x = nano(drop_path_rate=drop, proj_drop_rate=drop).train(), images(4)
    blocks = {
        n: m for n, m in model.named_modules() if n.count(".") == 2 and n.startswith("network") and n[-1].isdigit()
    }
    assert len(blocks) == 6
    plain = gradients(model, x)
    torch.manual_seed(2)
    out = model(x)

    model.set_grad_checkpointing()
    calls = count_calls(blocks)
    checkpointed = gradients(model, x)
    assert set(calls.values()) == {2}  # each runs again in the backward pass
    torch.testing.assert_close(checkpointed, plain, rtol=0, atol=0)
    torch.manual_seed(2)
    torch.testing.assert_close(model(x), out, rtol=0, atol=0)

    model.set_grad_checkpointing(False)
    calls.update(dict.fromkeys(calls, 0))
    gradients(model, x)
    assert set(calls.values()) == {1}


def test_grad_checkpointing_of_intermediates():
    model, x = nano(), images()
    expected = model.forward_intermediates(x)
    model.set_grad_checkpointing()
    torch.testing.assert_close(model.forward_intermediates(x), expected)


# --- compilers


def test_torchscript():
    model, x = nano(), images()
    scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(x), model(x))
    torch.testing.assert_close(scripted(x[:1]), model(x[:1]))
    with pytest.raises(torch.jit.Error, match=r"40.*32"):
        scripted(images(size=(40, 32)))


def test_torchscript_without_head():
    model, x = nano(), images()
    model.reset_classifier(0, "")
    torch.testing.assert_close(torch.jit.script(model)(x), model.forward_features(x))


def test_torchscript_features():
    model, x = timm.create_model("vip_nano4_32", features_only=True, out_indices=(0, 2)).eval(), images()
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


def test_fx_forward_and_backward():
    model, x = nano().train(), images()
    traced = create_feature_extractor(model, {"network.2": "stage", "head": "logits"})
    out = traced(x)
    torch.testing.assert_close(out["logits"], model(x))
    torch.testing.assert_close(out["stage"], model.forward_intermediates(x, [1], output_fmt="NHWC")[1][0])
    assert traced(images(5))["logits"].shape == (5, 10)  # the batch size is not baked in

    expected = gradients(model, x)
    model.zero_grad()
    (traced(x)["logits"] ** 2).mean().backward()
    torch.testing.assert_close({n: p.grad for n, p in model.named_parameters()}, expected)


def test_fx_symbolic_trace():
    model, x = nano(), images()
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))


@pytest.fixture
def dynamo() -> Any:
    torch._dynamo.reset()
    yield torch._dynamo
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", ["eval", "train", "checkpointing", "features"])
def test_compile_without_graph_break(dynamo, mode):
    model, x = nano(drop_path_rate=0.2 if mode == "train" else 0.0), images()
    model.train(mode in ("train", "checkpointing"))
    model.set_grad_checkpointing(mode == "checkpointing")
    if mode == "features":
        model = timm.create_model("vip_nano4_32", features_only=True).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert compiled(x)[0].shape == model(x)[0].shape
    if mode != "train":  # drop path draws anew
        torch.testing.assert_close(compiled(x), model(x))


def test_compiled_gradients(dynamo):
    model, x = nano().train(), images()
    expected = gradients(model, x)
    got = gradients(torch.compile(model, fullgraph=True, backend="aot_eager"), x)
    torch.testing.assert_close({n.removeprefix("_orig_mod."): g for n, g in got.items()}, expected)


@pytest.mark.slow
def test_compile_with_inductor(dynamo):
    model, x = nano(), images()
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-4, atol=1e-5)


def test_export_with_a_dynamic_batch():
    model, x = nano(), images()
    batch = torch.export.Dim("batch", max=1024)  # torch 2.6 cannot do without a bound
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},), strict=False).module()
    for n in (1, 2, 5):
        y = images(n)
        torch.testing.assert_close(exported(y), model(y))


# --- constructor options


@pytest.mark.parametrize("chans", [1, 4])
def test_in_chans(chans):
    model = nano(in_chans=chans)
    assert model.patch_embed.proj.weight.shape[1] == model.in_chans == chans
    assert model(images(chans=chans)).shape == (2, 10)
    with pytest.raises(RuntimeError):
        model(images(chans=3))


def lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same numbers elsewhere in memory."""
    if layout == "every other column":
        return x.repeat_interleave(2, -1)[..., ::2]
    return x.contiguous(memory_format=getattr(torch, layout))


LAYOUTS = ("contiguous_format", "channels_last", "every other column")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_read_tokens_that_lie_in_a_row_however_images_do(layout: str):
    """A strided tensor is copied by every norm that reads it."""
    model, x = nano(), images()
    expected = model(x)
    read: list[bool] = []
    for block in model.network.modules():
        if isinstance(block, PermutatorBlock):
            block.register_forward_pre_hook(lambda _, args: read.append(args[0].is_contiguous()))
    torch.testing.assert_close(model(lay_out(x, layout)), expected)
    assert len(read) == sum(NANO["layers"]) and all(read)


def test_drop_rate_is_before_the_head():
    model = nano(drop_rate=0.4)
    ones = torch.ones(64, 4, 4, 128)
    torch.testing.assert_close(model.forward_head(ones, pre_logits=True), torch.ones(64, 128))
    out = model.train().forward_head(ones, pre_logits=True)
    assert (out == 0).float().mean().item() == pytest.approx(0.4, abs=0.03)
    torch.testing.assert_close(out[out != 0], torch.full_like(out[out != 0], 1 / 0.6))


def test_drop_path_rate_grows_linearly_over_the_blocks():
    """Share of samples whose residual is dropped, by block and branch."""
    model = nano(drop_path_rate=0.5).train()
    blocks = [m for m in model.modules() if isinstance(m, PermutatorBlock)]
    assert len(blocks) == 6
    for k, block in enumerate(blocks):
        for drop in (block.drop_path1, block.drop_path2):
            out = drop(torch.ones(4000, 1, 1, 2))
            expected = 0.5 * k / (len(blocks) - 1)
            assert (out == 0).float().mean().item() == pytest.approx(expected, abs=0.04)
            assert (out[:, 0, 0, 0] == out[:, 0, 0, 1]).all()
    x = images(8)
    assert not torch.equal(model(x), model(x))
    torch.testing.assert_close(model.eval()(x), model(x), rtol=0, atol=0)


def test_proj_drop_rate_is_behind_every_projection():
    model = nano(proj_drop_rate=0.3).train()
    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str, module: nn.Module, args: Any, out: torch.Tensor) -> None:
        outputs[name] = out

    for name, module in model.named_modules():
        if name.endswith((".attn", ".mlp")):
            module.register_forward_hook(partial(keep, name))
    model(images(8))
    assert len(outputs) == 12
    for name, out in outputs.items():
        assert (out == 0).float().mean().item() == pytest.approx(0.3, abs=0.02), name


def test_drop_rates_are_off_by_default():
    model, x = nano().train(), images()
    torch.testing.assert_close(model(x), model.eval()(x), rtol=0, atol=0)


def test_norm_act_and_ratio_options():
    options = dict(norm_layer=partial(timm.layers.LayerNorm, eps=0.3), act_layer=nn.ReLU, mlp_ratio=1.5)
    model, x = nano(dtype=torch.float64, **options), images(dtype=torch.float64)
    assert model.network[0][0].mlp.fc1.out_features == 96
    expected = textbook.logits(x.numpy(), weights_of(model), eps=0.3, act=textbook.relu, **NANO)
    np.testing.assert_allclose(model(x).detach().numpy(), expected, rtol=1e-9, atol=1e-11)


def test_stage_options():
    stages = dict(layers=(1, 2, 1), embed_dims=(8, 8, 12), segments=(2, 4, 3))
    model = VisionPermutator(
        img_size=(12, 24), patch_size=(2, 3), transitions=(False, True), num_classes=5, dtype=torch.float64, **stages
    )
    x = images(size=(12, 24), dtype=torch.float64)
    # the width alone changes nowhere here, so one strided convolution, before the last stage
    assert [isinstance(m, nn.Sequential) for m in model.network] == [True, True, False, True]
    assert [tuple(t.shape[2:]) for t in model.forward_intermediates(x, intermediates_only=True)] == [
        (6, 8),
        (6, 8),
        (3, 4),
    ]
    expected = textbook.logits(x.numpy(), weights_of(model), stages["layers"], stages["segments"])
    np.testing.assert_allclose(model(x).detach().numpy(), expected, rtol=1e-9, atol=1e-11)


def test_a_change_of_width_alone_is_a_convolution_of_stride_one():
    stages = dict(layers=(1, 1), embed_dims=(8, 12), segments=(2, 3))
    model = VisionPermutator(img_size=8, patch_size=2, transitions=(False,), dtype=torch.float64, **stages)
    assert model.network[1].proj.weight.shape == (12, 8, 1, 1)
    x = images(size=(8, 8), dtype=torch.float64)
    expected = textbook.logits(x.numpy(), weights_of(model), stages["layers"], stages["segments"])
    np.testing.assert_allclose(model(x).detach().numpy(), expected, rtol=1e-9, atol=1e-11)


def test_stage_options_that_disagree_are_refused():
    with pytest.raises(ValueError, match="3 layers.*4 embed_dims.*4 segments.*3 transitions"):
        nano(layers=(1, 1, 1))
    with pytest.raises(ValueError, match="transitions"):
        nano(transitions=(True, False, False, False))


def test_segments_that_do_not_divide_the_channels_are_refused():
    with pytest.raises(ValueError, match="7 segments.*128 channels"):
        nano(segments=(8, 4, 7, 4))


def test_unknown_option_is_refused():
    with pytest.raises(TypeError, match="attn_drop_rate"):
        nano(attn_drop_rate=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_device_and_dtype_arguments_reach_every_parameter(name):
    model = timm.create_model(name, device="meta", dtype=torch.bfloat16)
    tensors = [*model.parameters(), *model.buffers()]
    assert all(t.is_meta and t.dtype == torch.bfloat16 for t in tensors)
    size = SHAPES[name][0]
    out = model(images(2, (size, size), device="meta", dtype=torch.bfloat16))
    assert out.shape == (2, 1000) and out.dtype == torch.bfloat16


def test_low_precision_output_is_close_to_the_full_one():
    model, x = nano(dtype=torch.float64), images(dtype=torch.float64)
    low = nano(dtype=torch.bfloat16)
    low.load_state_dict(model.state_dict())
    assert low.head.weight.dtype == torch.bfloat16
    torch.testing.assert_close(low(x.bfloat16()).double(), model(x), rtol=0.1, atol=0.1)


def test_initial_weights():
    model = timm.create_model("vip_ti7")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.15), name
            assert module.bias is None or not module.bias.any()


# --- checkpoints


def wrapped(state_dict: dict[str, torch.Tensor], kind: str) -> dict[str, Any]:
    return {
        "bare": state_dict,
        "state_dict": {"state_dict": state_dict, "epoch": 3, "arch": "vip_nano4_32"},
        "model": {"model": state_dict, "args": None},
        "ddp": {f"module.{k}": v for k, v in state_dict.items()},
        "compiled": {f"_orig_mod.{k}": v for k, v in state_dict.items()},
        "ddp state_dict": {"state_dict": {f"module.{k}": v for k, v in state_dict.items()}},
        "compiled ddp": {"state_dict": {f"_orig_mod.module.{k}": v for k, v in state_dict.items()}},
    }[kind]


CHECKPOINTS = ["bare", "state_dict", "model", "ddp", "compiled", "ddp state_dict", "compiled ddp"]


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoint_filter_unwraps(kind):
    model, other, x = nano(), nano(), images()
    assert not torch.allclose(other(x), model(x))
    other.load_state_dict(checkpoint_filter_fn(wrapped(model.state_dict(), kind), other), strict=True)
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_create_model_from_a_checkpoint(tmp_path: Path, kind):
    model, x = nano(), images()
    torch.save(wrapped(model.state_dict(), kind), tmp_path / "last.pth.tar")
    other = timm.create_model("vip_nano4_32", num_classes=10, checkpoint_path=tmp_path / "last.pth.tar").eval()
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)


def test_pretrained_weights_adapt_to_classes_and_channels(tmp_path: Path):
    """What `classifier` and `first_conv` of the configuration are for."""
    model = nano(num_classes=1000)
    torch.save(wrapped(model.state_dict(), "ddp state_dict"), tmp_path / "weights.pth")
    overlay = dict(file=str(tmp_path / "weights.pth"))
    other = timm.create_model(
        "vip_nano4_32", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=7, in_chans=1
    ).eval()
    gray = images(chans=1)
    torch.testing.assert_close(other.forward_features(gray), model.forward_features(gray.expand(-1, 3, -1, -1)))
    assert other(gray).shape == (2, 7)


def test_checkpoint_of_another_architecture_is_refused(tmp_path: Path):
    torch.save(nano(embed_dims=(32, 64, 64, 64)).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(RuntimeError, match="size mismatch"):
        timm.create_model("vip_nano4_32", num_classes=10, checkpoint_path=tmp_path / "weights.pth")
    state = nano().state_dict()
    state["network.0.0.attn.mlp_h.weight"] = torch.zeros(65, 65)  # no whole number of tokens
    with pytest.raises(RuntimeError, match="network.0.0.attn.mlp_h.weight"):
        nano().load_state_dict(state)


def test_no_initial_weight_is_an_outlier() -> None:
    """timm's truncated normal rounds a draw in 27 million to -2; the largest of 41 million normal ones is 5.6 sigma."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(8192, 5000, bias=False)
    init_linear(linear, "")
    assert 0.1 < linear.weight.detach().abs().max() < 0.14
    assert abs(linear.weight.std().item() - 0.02) < 1e-5


def test_batches_of_no_image() -> None:
    """As torch's own layers take them."""
    model = timm.create_model("vip_nano4_32", num_classes=3).eval()
    assert model(torch.empty(0, 3, 32, 32)).shape == (0, 3)


def test_sums_of_float16_stay_within_its_range() -> None:
    """A mean of large values is one of them, even if their sum is beyond what float16 holds."""
    layer = PermuteMlp(12, 3, (32, 32)).half()
    with torch.no_grad():
        for mix in (layer.mlp_h, layer.mlp_w, layer.mlp_c):
            mix.weight.copy_(torch.eye(len(mix.weight)))
        x = torch.full((1, 32, 32, 12), 3000.0, dtype=torch.float16)
        assert layer(x).isfinite().all()


@pytest.mark.parametrize("name", ["vip_nano4_32", "lvvit_t"])
def test_gradients_of_each_image(name: str) -> None:
    """By torch.func.vmap, against those of one image after another."""
    size = {"lvvit_t": dict(img_size=32, depth=1, embed_dim=48, num_heads=3)}.get(name, {})
    model = timm.create_model(name, num_classes=3, **size).double().eval()
    weights = dict(model.named_parameters())
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)

    def loss(weights: dict[str, torch.Tensor], image: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, weights, (image[None],)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, images)["patch_embed.proj.weight"]
    for own, image in zip(found, images, strict=True):
        (expected,) = torch.autograd.grad(loss(weights, image), weights["patch_embed.proj.weight"])
        torch.testing.assert_close(own, expected)
