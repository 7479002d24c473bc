"""Vision Permutator at any resolution: built, resized alive, or loaded from a checkpoint of another."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import get_model_input_config, save_for_hf

from vip.models.vision_permutator import AxisMix, VisionPermutator

SIZES = [(64, 64), (48, 40), (24, 56), (16, 16), (8, 32)]


def nano(**kwargs: Any) -> VisionPermutator:
    """vip_nano4_32 in float64 with ten classes, in eval mode, its weights wide enough for every branch to count."""
    model = timm.create_model("vip_nano4_32", **{"num_classes": 10, "dtype": torch.float64, **kwargs}).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.0, p[0].numel() ** -0.5) if p.ndim > 1 else p.add_(0.1 * torch.randn_like(p))
    return model


def images(size: tuple[int, int], batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, *size, dtype=torch.float64)


def axis_mixes(model: VisionPermutator) -> list[AxisMix]:
    return [m for m in model.modules() if isinstance(m, AxisMix)]


def by_axis(layer: AxisMix, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Mixing matrix as [H', S', H, S]."""
    weight = layer.weight.detach() if weight is None else weight
    s = layer.segment_dim
    return weight.reshape(-1, s, weight.shape[1] // s, s)


def along(x: torch.Tensor, length: int) -> torch.Tensor:
    """Resize a signal [H, S] along H with the cubic kernel of Keys (1981), a = -1/2, stretched when it shrinks."""
    step = x.shape[0] / length
    t = torch.arange(x.shape[0])[None] + 0.5 - (torch.arange(length, dtype=x.dtype)[:, None] + 0.5) * step
    t = t.abs() / max(step, 1.0)
    near, far = 1.5 * t**3 - 2.5 * t**2 + 1, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
    weight = torch.where(t < 1, near, torch.where(t < 2, far, 0.0))
    return weight / weight.sum(1, keepdim=True) @ x


# --- sizes at construction


@pytest.mark.parametrize(
    ("img_size", "shape"), [(64, (64, 64)), ((48, 40), (48, 40)), ([24, 56], (24, 56)), ((8, 8), (8, 8))]
)
def test_img_size_is_an_int_or_height_and_width(img_size, shape):
    model = nano(img_size=img_size)
    x = images(shape)
    assert model(x).shape == (2, 10)
    assert model.forward_features(x).shape == (2, shape[0] // 8, shape[1] // 8, 128)
    block = model.network[0][0].attn
    assert block.mlp_h.weight.shape[0] == shape[0] // 4 * 8
    assert block.mlp_w.weight.shape[0] == shape[1] // 4 * 8
    assert get_model_input_config(model)["input_size"] == (3, *shape)


@pytest.mark.parametrize("name", ["vip_s14", "vip_s7", "vip_m7", "vip_l7", "vip_ti7"])
def test_every_variant_takes_rectangles(name):
    model = timm.create_model(name, img_size=(168, 280), device="meta")
    assert model.forward_features(torch.empty(1, 3, 168, 280, device="meta")).shape[1:3] == (12, 20)


def build(img_size: Any, **kwargs: Any) -> VisionPermutator:
    return nano(img_size=img_size, **kwargs)


def resize(img_size: Any, **kwargs: Any) -> VisionPermutator:
    model = nano()
    model.set_input_size(img_size, **kwargs)
    return model


@pytest.mark.parametrize("make", [build, resize])
@pytest.mark.parametrize(
    ("img_size", "axis", "came", "nearest"),
    [
        (33, "height", 33, (32, 40)),
        (36, "height", 36, (32, 40)),  # the patch divides it, the strided stage does not
        ((32, 47), "width", 47, (40, 48)),
        ((31, 32), "height", 31, (24, 32)),
        (5, "height", 5, (8, 16)),
        (0, "height", 0, (8, 16)),
        (-8, "height", -8, (8, 16)),
    ],
)
def test_size_that_does_not_divide_names_the_two_nearest(make: Callable, img_size, axis, came, nearest):
    with pytest.raises(ValueError, match=rf"(?i){axis} {came}\b.*\b{nearest[0]} and {nearest[1]}\b"):
        make(img_size)


def test_nearest_sizes_work():
    for size in (32, 40, 24, 8, 16):
        assert build(size)(images((size, size))).shape == (2, 10)


def test_step_depends_on_the_variant():
    with pytest.raises(ValueError, match="210 and 224"):
        timm.create_model("vip_s7", img_size=217, device="meta")
    with pytest.raises(ValueError, match="224 and 238"):
        timm.create_model("vip_s14", img_size=231, device="meta")
    with pytest.raises(ValueError, match="24 and 36"):  # patch 6 and a stride of 2
        nano(img_size=32, patch_size=6)


@pytest.mark.parametrize("size", [(40, 32), (32, 24), (64, 64)])
def test_wrong_size_at_run_time_says_expected_and_came(size):
    wrong = size[0] if size[0] != 32 else size[1]
    with pytest.raises((AssertionError, ValueError, RuntimeError)) as error:
        nano()(images(size))
    assert "32" in str(error.value) and str(wrong) in str(error.value)


# --- set_input_size


@pytest.mark.parametrize("size", SIZES)
def test_set_input_size_equals_a_model_built_at_that_size(size):
    live = nano()
    built = nano(img_size=size)
    built.load_state_dict(live.state_dict())
    live.set_input_size(size)

    assert {n: t.shape for n, t in live.state_dict().items()} == {n: t.shape for n, t in built.state_dict().items()}
    x = images(size)
    torch.testing.assert_close(live(x), built(x), rtol=1e-12, atol=0)
    assert live.patch_embed.img_size == built.patch_embed.img_size == size
    assert live.feature_info == built.feature_info
    assert get_model_input_config(live)["input_size"] == (3, *size)
    with pytest.raises(AssertionError):
        live(images((32, 32)))


def test_set_input_size_leaves_the_rest_alone():
    model = nano()
    before = dict(model.named_parameters())
    model.set_input_size((48, 32))
    for name, p in model.named_parameters():
        assert (p is before[name]) == (not name.endswith("mlp_h.weight")), name


def test_set_input_size_to_the_same_size_is_the_identity():
    model, x = nano(), images((32, 32))
    before, out = dict(model.named_parameters()), model(x)
    for size in (32, (32, 32), [32, 32], None):
        model.set_input_size(size)
    after = dict(model.named_parameters())
    assert all(after[name] is p for name, p in before.items()) and after.keys() == before.keys()
    torch.testing.assert_close(model(x), out, rtol=0, atol=0)


def test_set_input_size_keeps_what_trains_and_the_mode():
    model = nano(dtype=torch.bfloat16).train()
    frozen = "network.0.0.attn.mlp_h.weight"
    model.get_parameter(frozen).requires_grad_(False)
    model.set_input_size((48, 64), patch_size=8)
    for name, p in model.named_parameters():
        assert p.requires_grad == (name != frozen), name
        assert isinstance(p, torch.nn.Parameter) and p.is_leaf and p.dtype == torch.bfloat16
    assert all(m.training for m in model.modules())


def test_resized_model_trains():
    model = nano().train()
    model.set_input_size((48, 40))
    model(images((48, 40))).square().mean().backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in model.parameters())
    assert all(p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.parametrize(
    "arguments",
    [
        dict(img_size=33),
        dict(img_size=(48, 44)),
        dict(img_size=0),
        dict(img_size=(40, 0)),
        dict(img_size=(40,)),
        dict(img_size=(40, 40, 40)),
        dict(patch_size=5),
        dict(patch_size=32),
        dict(img_size=48, patch_size=(8, 5)),
    ],
    ids=str,
)
def test_failed_set_input_size_leaves_the_model_as_it_was(arguments):
    model, x = nano(), images((32, 32))
    before, out, info = dict(model.named_parameters()), model(x), [dict(i) for i in model.feature_info]
    with pytest.raises(ValueError):
        model.set_input_size(**arguments)
    assert all(before[name] is p for name, p in model.named_parameters())
    assert model.patch_embed.img_size == (32, 32) and model.patch_embed.patch_size == (4, 4)
    assert model.feature_info == info
    assert get_model_input_config(model)["input_size"] == (3, 32, 32)
    torch.testing.assert_close(model(x), out, rtol=0, atol=0)
    model.set_input_size(48)
    assert model(images((48, 48))).shape == (2, 10)


def test_set_patch_size():
    model = nano()
    model.set_input_size(patch_size=8)
    assert model.patch_embed.img_size == (32, 32)
    assert model(images((32, 32))).shape == (2, 10)
    features = model.forward_intermediates(images((32, 32)), intermediates_only=True)
    assert [i["reduction"] for i in model.feature_info] == [32 // f.shape[2] for f in features] == [8, 16, 16, 16]


def test_set_patch_and_image_size_together_keep_the_tokens():
    """Twice the patch on an image of twice the size: same grid, so the mixing matrices stay as they are."""
    model = nano()
    before = dict(model.named_parameters())
    x = images((32, 32))
    out = model(x)
    model.set_input_size(64, patch_size=8)
    assert all(before[n] is p for n, p in model.named_parameters() if not n.startswith("patch_embed"))
    big = F.interpolate(x, scale_factor=2, mode="bicubic", antialias=True)
    assert F.cosine_similarity(model(big), out).min() > 0.9


def test_stages_that_were_pruned_ask_for_nothing():
    model = timm.create_model("vip_nano4_32", features_only=True, out_indices=(0,)).eval()
    model.model.set_input_size((36, 44))  # the patch of 4 divides them, the pruned stride would not
    assert model(torch.randn(2, 3, 36, 44))[0].shape == (2, 64, 9, 11)


def test_resized_model_is_saved_and_built_again_at_its_size(tmp_path: Path):
    model = nano()
    model.set_input_size((48, 40))
    save_for_hf(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, dtype=torch.float64).eval()
    x = images((48, 40))
    torch.testing.assert_close(again(x), model(x), rtol=1e-12, atol=0)


def test_input_can_be_set_on_the_meta_device():
    model = timm.create_model("vip_l7", device="meta")
    model.set_input_size((280, 168))
    assert model(torch.empty(1, 3, 280, 168, device="meta")).shape == (1, 1000)


# --- dynamic_img_size


@pytest.mark.parametrize("size", [(32, 32), *SIZES])
def test_dynamic_model_computes_what_a_resized_one_does(size):
    model, resized = nano(dynamic_img_size=True, aux_head=True), nano(aux_head=True)
    resized.load_state_dict(model.state_dict())
    resized.set_input_size(size)
    before, x = {n: p.clone() for n, p in model.named_parameters()}, images(size)
    for got, expected in (
        ([model(x)], [resized(x)]),
        (model.forward_dense(x), resized.forward_dense(x)),
        (model.forward_intermediates(x)[1], resized.forward_intermediates(x)[1]),
    ):
        torch.testing.assert_close(list(got), list(expected), rtol=1e-12, atol=0)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_dynamic_model_passes_the_gradient_through_the_resampling():
    layer = AxisMix(4, 2, dtype=torch.float64)
    layer.dynamic = True
    x = torch.randn(3, 6 * 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda w: torch.func.functional_call(layer, {"weight": w}, (x,)), layer.weight)


def test_dynamic_features_take_any_size_that_divides():
    model = timm.create_model("vip_nano4_32", features_only=True, dynamic_img_size=True).train()
    for size in SIZES:
        features = model(torch.randn(1, 3, *size))
        expected = [(size[0] // r, size[1] // r) for r in model.feature_info.reduction()]
        assert [tuple(f.shape[2:]) for f in features] == expected
    with pytest.raises(ValueError, match=r"(?i)width 36\b.*\b32 and 40\b"):  # the patch divides it, the stride does not
        model(torch.randn(1, 3, 32, 36))


def test_dynamic_model_is_built_again_from_what_was_saved(tmp_path: Path):
    model = nano(dynamic_img_size=True)
    assert not get_model_input_config(model)["fixed_input_size"]
    save_for_hf(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, dtype=torch.float64).eval()
    x = images((48, 40))
    torch.testing.assert_close(again(x), model(x), rtol=1e-12, atol=0)


# --- resampling


@pytest.mark.parametrize("length", [1, 3, 4, 5, 9, 20])
def test_resampling_keeps_the_sum_of_each_output(length):
    """A layer whose outputs sum to the same at every position does so, to the same, at every length."""
    layer = AxisMix(6, 3, dtype=torch.float64)
    mixing = by_axis(layer)
    sums = mixing.sum(2)  # [H', S', S]
    mixing -= ((sums - sums.mean(0)) / 6)[:, :, None]
    expected = by_axis(layer).sum(2)[0]
    torch.testing.assert_close(by_axis(layer).sum(2), expected.expand(6, 3, 3))

    resampled = by_axis(layer, layer.resample(layer.weight.detach(), length))
    assert resampled.shape == (length, 3, length, 3)
    torch.testing.assert_close(resampled.sum(2), expected.expand(length, 3, 3), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("length", [3, 4, 9, 20])
def test_sums_that_differ_by_position_are_resized_with_the_positions(length):
    layer = AxisMix(6, 3, dtype=torch.float64)
    sums = by_axis(layer).sum(2).flatten(1)
    resampled = by_axis(layer, layer.resample(layer.weight.detach(), length)).sum(2).flatten(1)
    torch.testing.assert_close(resampled, along(sums, length), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("length", [3, 4, 6, 9, 20])
def test_resampled_layer_resizes_its_input_mixes_and_resizes_back(length):
    layer = AxisMix(6, 3, dtype=torch.float64)
    x = torch.randn(length, 3, dtype=torch.float64)
    expected = along(layer(along(x, 6).flatten()).view(6, 3), length)
    layer.set_length(length)
    torch.testing.assert_close(layer(x.flatten()).view(length, 3), expected, rtol=1e-9, atol=1e-12)


def test_resampled_layer_answers_a_smooth_signal_alike():
    layer = AxisMix(16, 2, dtype=torch.float64)

    def wave(n: int) -> torch.Tensor:
        t = (torch.arange(n, dtype=torch.float64) + 0.5) / n
        return torch.stack([torch.cos(torch.pi * t), 1 + torch.sin(torch.pi * t)], 1)

    expected = along(layer(wave(16).flatten()).view(16, 2), 32)
    layer.set_length(32)
    torch.testing.assert_close(layer(wave(32).flatten()).view(32, 2), expected, rtol=0.01, atol=0.01)


def test_resampling_keeps_the_type():
    layer = AxisMix(6, 3, dtype=torch.bfloat16)
    assert layer.resample(layer.weight, 9).dtype == torch.bfloat16


def constant_image(size: tuple[int, int]) -> torch.Tensor:
    return torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64).view(1, 3, 1, 1).expand(1, 3, *size)


def balance(model: VisionPermutator) -> None:
    """Make the outputs of every mixing matrix sum to the same at each position."""
    for layer in axis_mixes(model):
        mixing = by_axis(layer)
        sums = mixing.sum(2)
        mixing -= ((sums - sums.mean(0)) / mixing.shape[2])[:, :, None]


@pytest.mark.parametrize("size", SIZES)
def test_constant_image_gives_the_same_logits_at_any_size_when_the_positions_are_alike(size):
    """Tokens stay equal then, so the sums are all that counts. Positions that differ would each be resized."""
    model = nano()
    balance(model)
    expected = model(constant_image((32, 32)))
    model.set_input_size(size)
    torch.testing.assert_close(model(constant_image(size)), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [(64, 64), (48, 40)])
def test_constant_image_gives_the_first_layer_a_resized_response(size):
    model = nano()
    layer = model.network[0][0].attn.mlp_h
    token = torch.randn(layer.segment_dim, dtype=torch.float64)
    old = layer(token.repeat(8)).view(8, -1)
    model.set_input_size(size)
    new = layer(token.repeat(size[0] // 4)).view(size[0] // 4, -1)
    torch.testing.assert_close(new, along(old, size[0] // 4), rtol=1e-9, atol=1e-12)


def test_smooth_image_gives_similar_logits_at_twice_the_size():
    model = nano()
    coarse = torch.randn(4, 3, 3, 3, dtype=torch.float64)

    def photo(size: int) -> torch.Tensor:
        return F.interpolate(coarse, size=(size, size), mode="bicubic")

    expected = model(photo(64 // 2))
    model.set_input_size(64)
    got = model(photo(64))
    assert F.cosine_similarity(got, expected).min() > 0.9


# --- checkpoints of another resolution


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("wrap", [False, True], ids=["bare", "wrapped"])
def test_create_model_with_a_checkpoint_of_another_size(tmp_path: Path, size, wrap):
    model = nano()
    state = model.state_dict()
    if wrap:
        state = {"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 1}
    torch.save(state, tmp_path / "weights.pth")
    other = timm.create_model(
        "vip_nano4_32", num_classes=10, img_size=size, dtype=torch.float64, checkpoint_path=tmp_path / "weights.pth"
    ).eval()
    model.set_input_size(size)
    x = images(size)
    torch.testing.assert_close(other(x), model(x), rtol=1e-12, atol=0)


def test_pretrained_weights_of_another_size(tmp_path: Path):
    model = nano(num_classes=1000)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    overlay = dict(file=str(tmp_path / "weights.pth"))
    other = timm.create_model(
        "vip_nano4_32", pretrained=True, pretrained_cfg_overlay=overlay, img_size=(48, 40), dtype=torch.float64
    ).eval()
    model.set_input_size((48, 40))
    x = images((48, 40))
    torch.testing.assert_close(other(x), model(x), rtol=1e-12, atol=0)


def test_checkpoint_from_a_rectangle_keeps_the_axes_apart():
    """Back at 32 x 32, the height comes from the height and the width from the width."""
    model = nano(img_size=(64, 24))
    other = nano()
    other.load_state_dict(model.state_dict())
    model.set_input_size(32)
    x = images((32, 32))
    torch.testing.assert_close(other(x), model(x), rtol=1e-12, atol=0)
    torch.testing.assert_close(other.network[0][0].attn.mlp_h.weight, model.network[0][0].attn.mlp_h.weight)


def test_resized_model_loads_a_checkpoint_of_its_old_size():
    model, live = nano(), nano()
    live.set_input_size((48, 40))
    live.load_state_dict(model.state_dict())
    model.set_input_size((48, 40))
    x = images((48, 40))
    torch.testing.assert_close(live(x), model(x), rtol=1e-12, atol=0)


def test_loading_leaves_the_given_state_dict_alone():
    state = nano().state_dict()
    shapes = {name: t.shape for name, t in state.items()}
    nano(img_size=64).load_state_dict(state)
    assert {name: t.shape for name, t in state.items()} == shapes


def test_published_geometry_loads_at_another_size():
    small = timm.create_model("vip_ti7", num_classes=3, img_size=112).eval()
    model = timm.create_model("vip_ti7", num_classes=3, img_size=(140, 168)).eval()
    result = model.load_state_dict(small.state_dict())
    assert not result.missing_keys and not result.unexpected_keys
    assert model(torch.randn(1, 3, 140, 168)).isfinite().all()


@pytest.mark.parametrize("arguments", [dict(img_size=(32,)), dict(img_size=(32, 32, 32)), dict(patch_size=0)], ids=str)
def test_size_that_is_no_height_and_width_is_refused(arguments):
    with pytest.raises(ValueError, match="Expected a height and a width"):
        nano(**arguments)


def test_resampling_works_on_the_meta_device():
    model = timm.create_model("vip_nano4_32", device="meta")
    model.set_input_size((48, 32))
    assert model.network[0][0].attn.mlp_h.weight.is_meta
    assert model.network[0][0].attn.mlp_h.weight.shape == (96, 96)
