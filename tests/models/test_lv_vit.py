"""LV-ViT equals its golden vectors and a textbook, at any resolution, and keeps timm's contract."""

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import golden_vectors
import numpy as np
import pytest
import textbook
import timm
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, resolve_model_data_config
from timm.models import create_feature_extractor, get_model_input_config, group_parameters, save_for_hf
from timm.optim import create_optimizer_v2
from torch import nn

import vip
from vip.models.layers import mix_tokens
from vip.models.lv_vit import Block, LVViT, checkpoint_filter_fn
from vip.training.weights import load_finetune, recognise

PUBLISHED = {"lvvit_t": 8_534_720, "lvvit_s": 26_151_824, "lvvit_m": 55_830_544, "lvvit_l": 150_021_968}
NAMES = [*PUBLISHED, "lvvit_nano4_32"]
# image size, patch size, channels, depth, heads, residual scale
SHAPES = {
    "lvvit_t": (224, 16, 240, 12, 4, 1.0),
    "lvvit_s": (224, 16, 384, 16, 6, 2.0),
    "lvvit_m": (224, 16, 512, 20, 8, 2.0),
    "lvvit_l": (224, 16, 768, 24, 12, 3.0),
    "lvvit_nano4_32": (32, 4, 96, 6, 3, 1.0),
}
SIZES = [(64, 64), (48, 40), (24, 56), (16, 16), (4, 32)]


def nano(**kwargs: Any) -> LVViT:
    """lvvit_nano4_32 in float64 with ten classes, in eval mode, its weights wide enough for every branch to count."""
    model = timm.create_model("lvvit_nano4_32", **{"num_classes": 10, "dtype": torch.float64, **kwargs}).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in ("pos_embed", "cls_token"):
                p.normal_(0.0, 0.5)
            else:
                p.normal_(0.0, p[0].numel() ** -0.5) if p.ndim > 1 else p.add_(0.1 * torch.randn_like(p))
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.normal_(0.0, 0.1)
            elif name.endswith("running_var"):
                b.uniform_(0.5, 1.5)
    return model


def images(size: tuple[int, int] = (32, 32), batch: int = 2, chans: int = 3, **kwargs: Any) -> torch.Tensor:
    return torch.randn(batch, chans, *size, **{"dtype": torch.float64, **kwargs})


def random_mask(size: tuple[int, int] = (8, 8)) -> torch.Tensor:
    mask = torch.rand(size) < 0.4
    assert mask.any() and not mask.all()
    return mask


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


# --- golden vectors


@pytest.mark.parametrize("name", ["lvvit_t", "lvvit_s"])
@torch.no_grad()
def test_class_and_token_outputs_are_the_published_ones(name):
    golden = golden_vectors.read(name)
    model = timm.create_model(name, dtype=torch.float64).eval()
    golden_vectors.fill(model)
    cls, aux = model.forward_dense(golden_vectors.draw("input", tuple(golden["input_shape"])))
    assert cls.shape == (2, 1000) and aux.shape == (2, 14, 14, 1000)

    def assert_close(actual: torch.Tensor, key: str) -> None:
        torch.testing.assert_close(actual, torch.tensor(golden[key], dtype=torch.float64), rtol=1e-9, atol=0.0)

    assert_close(cls[:, :8], "cls_first8")
    assert_close(aux.flatten(1, 2)[:, :2, :8], "aux_first2tokens_first8")
    logits = cls + 0.5 * aux.flatten(1, 2).amax(1)
    assert_close(logits[:, :16], "logits_first16")
    assert_close(logits.norm(dim=1), "logits_norm")


# --- the layers and the network against the textbook


def textbook_attention(x: np.ndarray, weights: dict[str, np.ndarray], heads: int) -> np.ndarray:
    """b sample, n and m tokens, h head, d channels of a head; queries, keys and values one after the other."""
    b, n, c = x.shape
    q, k, v = np.einsum("bnc,khdc->kbnhd", x, weights["qkv.weight"].reshape(3, heads, c // heads, c))
    score = np.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(c // heads)
    attention = np.exp(score - score.max(-1, keepdims=True))
    attention /= attention.sum(-1, keepdims=True)
    out = np.einsum("bhnm,bmhd->bnhd", attention, v).reshape(b, n, c)
    return textbook.linear(out, textbook.part(weights, "proj"))


def textbook_block(
    x: np.ndarray,
    weights: dict[str, np.ndarray],
    heads: int,
    scale: float,
    eps: float = 1e-5,
    act: Callable[[np.ndarray], np.ndarray] = textbook.gelu,
) -> np.ndarray:
    part = partial(textbook.part, weights)
    x = x + textbook_attention(textbook.layer_norm(x, part("norm1"), eps), part("attn"), heads) / scale
    return x + textbook.mlp(textbook.layer_norm(x, part("norm2"), eps), part("mlp"), act) / scale


def textbook_conv(x: np.ndarray, kernel: np.ndarray, stride: int, padding: int) -> np.ndarray:
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[2:], axis=(2, 3))[:, :, ::stride, ::stride]
    return np.einsum("bchwpq,dcpq->bdhw", windows, kernel, optimize=True)


def textbook_embed(x: np.ndarray, weights: dict[str, np.ndarray]) -> np.ndarray:
    """Images [B, C, H, W] to patch tokens [B, H', W', C']."""
    for i, (stride, padding) in enumerate(((2, 3), (1, 1), (1, 1)), start=1):
        x = textbook_conv(x, weights[f"conv{i}.weight"], stride, padding)
        bn = {k: v[:, None, None] for k, v in textbook.part(weights, f"bn{i}").items() if v.ndim}
        x = (x - bn["running_mean"]) / np.sqrt(bn["running_var"] + 1e-5) * bn["weight"] + bn["bias"]
        x = textbook.relu(x)
    proj = textbook.part(weights, "proj")
    return textbook.strided_conv(x.transpose(0, 2, 3, 1), proj)


def textbook_blocks(model: LVViT, x: torch.Tensor, heads: int = 3, scale: float = 1.0, **kwargs: Any) -> list[Any]:
    """Output of every block as a tensor [B, 1 + H'*W', C]; the final norm is not applied."""
    weights = weights_of(model)
    patches = textbook_embed(x.numpy(), textbook.part(weights, "patch_embed"))
    b, h, w, c = patches.shape
    cls = np.broadcast_to(weights["cls_token"], (b, 1, c))
    tokens = np.concatenate([cls, patches.reshape(b, h * w, c)], 1) + weights["pos_embed"]
    outputs = []
    for i in range(len(model.blocks)):
        tokens = textbook_block(tokens, textbook.part(weights, f"blocks.{i}"), heads, scale, **kwargs)
        outputs.append(torch.from_numpy(tokens))
    return outputs


def textbook_outputs(model: LVViT, x: torch.Tensor, eps: float = 1e-5, **kwargs: Any) -> tuple[np.ndarray, np.ndarray]:
    """Class logits [B, K] and token logits [B, H'*W', K]."""
    weights = weights_of(model)
    tokens = textbook_blocks(model, x, eps=eps, **kwargs)[-1].numpy()
    tokens = textbook.layer_norm(tokens, textbook.part(weights, "norm"), eps)
    head, aux_head = textbook.part(weights, "head"), textbook.part(weights, "aux_head")
    return textbook.linear(tokens[:, 0], head), textbook.linear(tokens[:, 1:], aux_head)


assert_allclose = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("dim", "heads", "tokens"), [(12, 3, 5), (12, 1, 7), (8, 8, 4), (8, 2, 1)])
def test_attention_is_the_textbook_formula(dim, heads, tokens):
    attn = Block(dim, heads, dtype=torch.float64).attn
    for p in attn.parameters():
        nn.init.normal_(p, std=0.7)
    assert [n for n, _ in attn.named_parameters()] == ["qkv.weight", "proj.weight", "proj.bias"]
    x = torch.randn(3, tokens, dim, dtype=torch.float64)
    assert_allclose(attn(x).detach().numpy(), textbook_attention(x.numpy(), weights_of(attn), heads))


@pytest.mark.parametrize("scale", [1.0, 2.0, 3.0])
def test_block_is_the_textbook_formula(scale):
    block = Block(12, 3, mlp_ratio=2.5, residual_scale=scale, dtype=torch.float64)
    assert block.mlp.fc1.out_features == 30
    for p in block.parameters():
        nn.init.normal_(p, std=0.7)
    x = torch.randn(3, 5, 12, dtype=torch.float64)
    assert_allclose(block(x).detach().numpy(), textbook_block(x.numpy(), weights_of(block), 3, scale))


def test_attention_is_scaled_dot_product_attention(monkeypatch):
    calls = []
    original = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or original(*a, **k))
    nano()(images())
    assert len(calls) == 6


@pytest.mark.parametrize("size", [(32, 32), (24, 48), (40, 16)])
def test_patch_embedding_is_the_textbook_one(size):
    embed = nano(img_size=size).patch_embed
    x = images(size)
    got = embed(x)
    assert got.shape == (2, size[0] // 4, size[1] // 4, 96)
    assert_allclose(got.detach().numpy(), textbook_embed(x.numpy(), weights_of(embed)))


def test_convolutions_read_channels_last_and_blocks_tokens_that_lie_in_a_row():
    """The layouts in which they are fastest, however images come."""
    model, images_read, tokens_read = nano(), [], []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(
                lambda _, args: images_read.append(args[0].is_contiguous(memory_format=torch.channels_last))
            )
        if isinstance(module, Block):
            module.register_forward_pre_hook(lambda _, args: tokens_read.append(args[0].is_contiguous()))
    model(images())
    assert len(images_read) == 4 and all(images_read)
    assert len(tokens_read) == 6 and all(tokens_read)


@pytest.mark.parametrize("size", [(32, 32), (24, 48), (40, 16)])
def test_network_is_the_textbook_network(size):
    model, x = nano(img_size=size), images(size)
    cls, aux = textbook_outputs(model, x)
    got_cls, got_aux = model.forward_dense(x)
    assert_allclose(got_cls.detach().numpy(), cls)
    assert_allclose(got_aux.detach().numpy(), aux.reshape(2, size[0] // 4, size[1] // 4, 10))
    assert_allclose(model(x).detach().numpy(), cls + 0.5 * aux.max(1))


def test_norm_act_ratio_and_scale_options():
    options = dict(norm_layer=partial(timm.layers.LayerNorm, eps=0.3), act_layer=nn.ReLU, mlp_ratio=1.5)
    model, x = nano(residual_scale=2.5, num_heads=4, **options), images()
    assert model.blocks[0].mlp.fc1.out_features == 144
    cls, aux = textbook_outputs(model, x, eps=0.3, act=textbook.relu, heads=4, scale=2.5)
    assert_allclose(model(x).detach().numpy(), cls + 0.5 * aux.max(1))


def test_shape_options():
    model = LVViT(
        (24, 16), patch_size=8, num_classes=5, embed_dim=12, depth=2, num_heads=2, stem_dim=6, dtype=torch.float64
    ).eval()
    x = images((24, 16))
    assert model.patch_embed.conv1.weight.shape == (6, 3, 7, 7)
    assert model.patch_embed.proj.weight.shape == (12, 6, 4, 4)
    assert model.pos_embed.shape == (1, 7, 12)
    cls, aux = textbook_outputs(model, x, heads=2, scale=2.0)
    assert_allclose(model(x).detach().numpy(), cls + 0.5 * aux.max(1))


def test_unknown_option_is_refused():
    with pytest.raises(TypeError, match="segments"):
        nano(segments=4)


# --- the dense outputs and MixToken


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_mix_tokens_by_brute_force(batch):
    x, mask = torch.randn(batch, 3, 5, 4), random_mask((3, 5))
    expected = x.clone()
    for b in range(batch):
        for i in range(3):
            for j in range(5):
                if mask[i, j]:
                    expected[b, i, j] = x[batch - 1 - b, i, j]
    assert torch.equal(mix_tokens(x, mask), expected)
    assert torch.equal(mix_tokens(expected, mask), x)  # swapping again swaps back


def test_logits_are_the_class_output_and_half_the_strongest_token():
    model, x = nano(), images(batch=3)
    cls, aux = model.forward_dense(x)
    assert cls.shape == (3, 10) and aux.shape == (3, 8, 8, 10)
    tokens = model.forward_features(x)
    torch.testing.assert_close(cls, F.linear(tokens[:, 0], model.head.weight, model.head.bias))
    expected = F.linear(tokens[:, 1:], model.aux_head.weight, model.aux_head.bias)
    torch.testing.assert_close(aux, expected.view(3, 8, 8, 10))
    torch.testing.assert_close(model(x), cls + 0.5 * aux.flatten(1, 2).max(1).values)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_dense_outputs_of_a_mix_are_those_of_mixed_tokens(batch):
    model, x = nano(img_size=(32, 24)), images((32, 24), batch)
    mask = random_mask((8, 6))
    cls, aux = model.forward_dense(x, mask)

    def mix(module: nn.Module, args: Any, tokens: torch.Tensor) -> torch.Tensor:
        mixed = tokens.clone()
        mixed[:, mask] = tokens.flip(0)[:, mask]
        return mixed

    handle = model.patch_embed.register_forward_hook(mix)
    expected_cls, mixed_aux = model.forward_dense(x)
    logits = model(x)
    handle.remove()
    expected_aux = mixed_aux.clone()
    expected_aux[:, mask] = mixed_aux.flip(0)[:, mask]
    torch.testing.assert_close(cls, expected_cls)
    torch.testing.assert_close(aux, expected_aux)
    torch.testing.assert_close(logits, cls + 0.5 * mixed_aux.flatten(1, 2).amax(1))
    if batch == 2:  # with one image, or the middle of five, nothing is swapped
        assert not torch.allclose(cls, model.forward_dense(x)[0])


def test_mix_of_no_token_and_of_every_token():
    model, x = nano(), images(batch=3)
    cls, aux = model.forward_dense(x)
    torch.testing.assert_close(model.forward_dense(x, torch.zeros(8, 8, dtype=torch.bool)), (cls, aux))
    # every token swapped: the class output is that of the other image, the tokens are back at their own
    torch.testing.assert_close(model.forward_dense(x, torch.ones(8, 8, dtype=torch.bool)), (cls.flip(0), aux))


@pytest.mark.parametrize("mixed", [False, True])
def test_every_parameter_gets_a_gradient_from_the_dense_outputs(mixed):
    model = nano().train()
    cls, aux = model.forward_dense(images(), random_mask() if mixed else None)
    (cls.square().mean() + aux.square().mean()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.norm() > 0, name


@pytest.mark.parametrize("options", [dict(aux_head=False), dict(num_classes=0), dict(global_pool="")], ids=str)
def test_dense_outputs_need_an_auxiliary_head(options):
    model = nano(**options)
    assert model.aux_head is None
    assert not [name for name in model.state_dict() if name.startswith("aux_head")]
    with pytest.raises(ValueError, match="aux"):
        model.forward_dense(images())


def test_without_auxiliary_head_the_class_token_alone_decides():
    model, x = nano(), images()
    other = nano(aux_head=False)
    other.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("aux_head")})
    torch.testing.assert_close(other(x), model.forward_dense(x)[0])


# --- registration


def test_import_vip_is_enough_to_register():
    code = "import vip, timm; print(*timm.list_models('lvvit_*')); timm.create_model('lvvit_nano4_32', num_classes=3)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_registered_name_creates_the_model(name):
    model = timm.create_model(name, num_classes=10, device="meta")
    _, patch, channels, depth, heads, scale = SHAPES[name]
    assert isinstance(model, vip.models.lv_vit.LVViT)
    assert model.num_classes == model.head.out_features == model.aux_head.out_features == 10
    assert model.patch_embed.patch_size == (patch, patch)
    assert model.embed_dim == channels and len(model.blocks) == depth
    assert {b.attn.num_heads for b in model.blocks} == {heads}
    assert {b.residual_scale for b in model.blocks} == {scale}
    assert timm.create_model(f"{name}.untrained", device="meta").pretrained_cfg["tag"] == "untrained"


def test_parameter_counts():
    count = {n: sum(p.numel() for p in timm.create_model(n, device="meta").parameters()) for n in NAMES}
    assert {n: count[n] for n in PUBLISHED} == PUBLISHED
    assert count["lvvit_nano4_32"] < 1_000_000


@pytest.mark.parametrize("name", NAMES)
def test_models_are_recognised_by_their_shapes(name):
    assert recognise(timm.create_model(name, device="meta").state_dict()) == name


@pytest.mark.parametrize("options", [dict(num_classes=7, img_size=64), dict(aux_head=False, in_chans=1)], ids=str)
def test_models_are_recognised_whatever_heads_size_and_channels(options):
    assert recognise(timm.create_model("lvvit_t", device="meta", **options).state_dict()) == "lvvit_t"


def test_other_depths_are_not_recognised():
    assert recognise(timm.create_model("lvvit_s", device="meta", depth=15).state_dict()) is None


# --- default_cfgs


@pytest.mark.parametrize("name", NAMES)
def test_default_cfg_is_true_of_the_model(name):
    model = timm.create_model(name, device="meta")
    cfg = model.default_cfg
    size, patch, channels, *_ = SHAPES[name]
    tokens = (size // patch) ** 2 + 1
    x = images((size, size), 1, device="meta", dtype=torch.float32)
    assert (cfg["architecture"], cfg["tag"]) == (name, "untrained")
    assert cfg["input_size"] == (3, size, size)
    assert model.forward_features(x).shape == (1, tokens, channels)
    assert cfg["num_classes"] == 1000
    assert cfg["classifier"] == ("head", "aux_head")
    for classifier in cfg["classifier"]:
        assert isinstance(model.get_submodule(classifier), nn.Linear)
        assert model.get_submodule(classifier).out_features == 1000
    assert model.get_submodule(cfg["classifier"][0]) is model.get_classifier()
    first_conv = model.get_submodule(cfg["first_conv"])
    assert isinstance(first_conv, nn.Conv2d) and first_conv.in_channels == 3
    assert next(m for m in model.modules() if isinstance(m, nn.Conv2d)) is first_conv
    assert cfg["interpolation"] == "bicubic"
    assert (cfg["mean"], cfg["std"]) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    assert cfg["fixed_input_size"]
    with pytest.raises(AssertionError):  # and so it is
        model(images((size * 2, size * 2), 1, device="meta", dtype=torch.float32))


@pytest.mark.parametrize(("name", "crop_pct"), [("lvvit_t", 0.9), ("lvvit_s", 0.9), ("lvvit_m", 1.0), ("lvvit_l", 1.0)])
def test_crop_pct_reaches_the_data_configuration(name, crop_pct):
    assert resolve_model_data_config(timm.create_model(name, device="meta"))["crop_pct"] == crop_pct


def test_classifiers_are_gone_from_the_state_dict_without_classes():
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

POOLS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "": lambda x: x,
    "avg": lambda x: x[:, 1:].mean(1),
    "token": lambda x: x[:, 0],
}


def head_of(model: LVViT, features: torch.Tensor) -> torch.Tensor:
    """What the heads make of normalized tokens [B, N, C]."""
    logits = F.linear(POOLS[model.global_pool](features), model.head.weight, model.head.bias)
    if model.global_pool:
        logits = logits + 0.5 * F.linear(features[:, 1:], model.aux_head.weight, model.aux_head.bias).amax(1)
    return logits


def test_forward_is_features_then_head():
    model, x = nano(), images()
    features = model.forward_features(x)
    assert features.shape == (2, 65, 96)
    expected = F.layer_norm(textbook_blocks(model, x)[-1], (96,), model.norm.weight, model.norm.bias, 1e-5)
    torch.testing.assert_close(features, expected)
    torch.testing.assert_close(model.forward_head(features), model(x))
    assert model.num_prefix_tokens == 1


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("by_reset", [False, True], ids=["constructor", "reset_classifier"])
def test_global_pool(pool, by_reset):
    model = nano(**({} if by_reset else {"global_pool": pool}))
    if by_reset:
        model.reset_classifier(10, pool)
    x = images()
    features = model.forward_features(x)
    assert model.num_features == model.head_hidden_size == model.get_classifier().in_features == 96
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), POOLS[pool](features))
    torch.testing.assert_close(model(x), head_of(model, features))
    assert (model.aux_head is None) == (pool == "")


@pytest.mark.parametrize("pool", ["median", "max", "map"])
def test_unknown_global_pool_is_refused(pool):
    with pytest.raises(ValueError, match=pool):
        nano(global_pool=pool)
    model = nano()
    with pytest.raises(ValueError, match=pool):
        model.reset_classifier(10, pool)
    assert model.global_pool == "token"


@pytest.mark.parametrize("name", ["lvvit_t", "lvvit_nano4_32"])
def test_without_classes_and_pooling_the_tokens_come_out(name):
    size, patch, channels, *_ = SHAPES[name]
    tokens = (size // patch) ** 2 + 1
    x = images((size, size), 1, device="meta", dtype=torch.float32)
    model = timm.create_model(name, num_classes=0, device="meta")
    assert model(x).shape == (1, channels)
    assert model.num_features == model.head_hidden_size == channels
    model.reset_classifier(0, "")
    assert model(x).shape == (1, tokens, channels)
    assert timm.create_model(name, num_classes=0, global_pool="", device="meta")(x).shape == (1, tokens, channels)


def test_reset_classifier():
    model, x = nano(), images()
    features = model.forward_features(x)

    model.reset_classifier(0)
    assert model.num_classes == 0 and not isinstance(model.get_classifier(), nn.Linear) and model.aux_head is None
    torch.testing.assert_close(model(x), features[:, 0])

    model.reset_classifier(0, "avg")
    torch.testing.assert_close(model(x), features[:, 1:].mean(1))

    model.reset_classifier(7)
    assert model.num_classes == 7 and model(x).shape == (2, 7)
    assert model.get_classifier() is model.head
    assert model.head.out_features == model.aux_head.out_features == 7
    torch.testing.assert_close(model(x), head_of(model, features))

    model.reset_classifier(5, "")
    assert model(x).shape == (2, 65, 5)
    torch.testing.assert_close(model(x), head_of(model, features))

    model.reset_classifier(5)  # the pooling stays
    assert model(x).shape == (2, 65, 5)

    model.reset_classifier(4, "token")  # the auxiliary head is back
    cls, aux = model.forward_dense(x)
    assert cls.shape == (2, 4) and aux.shape == (2, 8, 8, 4)
    torch.testing.assert_close(model(x), head_of(model, features))
    assert model.num_features == 96


def test_reset_classifier_makes_no_auxiliary_head_that_was_not_asked_for():
    model = nano(aux_head=False)
    model.reset_classifier(3, "token")
    assert model.aux_head is None and model(images()).shape == (2, 3)


@pytest.mark.parametrize("training", [True, False])
def test_reset_classifier_keeps_mode(training):
    model = nano().train(training)
    model.reset_classifier(4)
    assert {m.training for m in model.modules()} == {training}


def test_odd_patch_is_refused():
    with pytest.raises(ValueError, match="Patch size 5 is odd"):
        nano(patch_size=5, img_size=40)


def test_checkpoint_of_a_rectangle_is_not_taken_for_a_square():
    with pytest.raises(RuntimeError, match="size mismatch for pos_embed"):
        nano().load_state_dict(nano(img_size=(48, 40)).state_dict())


def test_reset_classifier_keeps_type_and_device():
    model = nano(dtype=torch.bfloat16)
    model.reset_classifier(4)
    assert model.head.weight.dtype == model.aux_head.weight.dtype == torch.bfloat16
    meta = timm.create_model("lvvit_nano4_32", device="meta")
    meta.reset_classifier(4)
    assert meta.head.weight.is_meta and meta.aux_head.weight.is_meta


# --- intermediates


def as_map(tokens: torch.Tensor, grid: tuple[int, int] = (8, 8)) -> torch.Tensor:
    return tokens[:, 1:].transpose(1, 2).reshape(tokens.shape[0], -1, *grid)


@pytest.mark.parametrize("output_fmt", ["NCHW", "NLC"])
@pytest.mark.parametrize(
    ("indices", "taken"),
    [
        (None, [0, 1, 2, 3, 4, 5]),
        (1, [5]),
        (3, [3, 4, 5]),
        ([0, 2], [0, 2]),
        ([-1], [5]),
        ([-6, -2], [0, 4]),
        ((1,), [1]),
    ],
)
def test_intermediates_are_the_block_outputs(indices, taken, output_fmt):
    model, x = nano(img_size=(24, 40)), images((24, 40))
    blocks = textbook_blocks(model, x)
    expected = [as_map(blocks[i], (6, 10)) if output_fmt == "NCHW" else blocks[i][:, 1:] for i in taken]
    final, got = model.forward_intermediates(x, indices=indices, output_fmt=output_fmt)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(final, model.forward_features(x))
    only = model.forward_intermediates(x, indices=indices, output_fmt=output_fmt, intermediates_only=True)
    torch.testing.assert_close(only, got)
    assert all(t.is_contiguous() for t in got) or output_fmt == "NLC"


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("output_fmt", ["NCHW", "NLC"])
def test_intermediates_with_prefix_tokens(output_fmt, norm):
    model, x = nano(), images()
    blocks = textbook_blocks(model, x)
    if norm:
        blocks = [F.layer_norm(b, (96,), model.norm.weight, model.norm.bias, 1e-5) for b in blocks]
    options = dict(indices=[1, 4], return_prefix_tokens=True, output_fmt=output_fmt, norm=norm)
    final, got = model.forward_intermediates(x, **options)
    for (t, prefix), i in zip(got, [1, 4], strict=True):
        torch.testing.assert_close(prefix, blocks[i][:, :1])
        torch.testing.assert_close(t, as_map(blocks[i]) if output_fmt == "NCHW" else blocks[i][:, 1:])
    torch.testing.assert_close(model.forward_intermediates(x, intermediates_only=True, **options), got)
    torch.testing.assert_close(final, model.forward_features(x))


def test_intermediates_norm():
    model, x = nano(), images()
    final, got = model.forward_intermediates(x, norm=True, output_fmt="NLC")
    torch.testing.assert_close(got[-1], final[:, 1:])
    expected = F.layer_norm(textbook_blocks(model, x)[2], (96,), model.norm.weight, model.norm.bias, 1e-5)
    torch.testing.assert_close(got[2], expected[:, 1:])


def test_intermediates_stop_early():
    model, x = nano(), images()
    blocks = textbook_blocks(model, x)
    calls = count_calls(dict(model.blocks.named_children()))
    final, got = model.forward_intermediates(x, indices=[0, 2], stop_early=True)
    assert [n for n, c in calls.items() if c] == ["0", "1", "2"]
    torch.testing.assert_close(got, [as_map(blocks[0]), as_map(blocks[2])])
    torch.testing.assert_close(final, F.layer_norm(blocks[2], (96,), model.norm.weight, model.norm.bias, 1e-5))

    final, _ = model.forward_intermediates(x, indices=1, stop_early=True)
    torch.testing.assert_close(final, model.forward_features(x))


def test_intermediates_refuse_what_does_not_exist():
    model, x = nano(), images()
    for options in (dict(indices=[6]), dict(indices=7), dict(indices=[-7]), dict(output_fmt="NHWC")):
        with pytest.raises(AssertionError):
            model.forward_intermediates(x, **options)


@pytest.mark.parametrize(("indices", "kept"), [(1, [5]), ([0], [0]), ([0, 2], [0, 2]), ([-3], [3]), (6, [*range(6)])])
def test_prune_keeps_what_the_intermediates_need(indices, kept):
    model, x = nano(), images()
    expected = model.forward_intermediates(x, indices=kept, intermediates_only=True)
    assert model.prune_intermediate_layers(indices) == kept
    assert len(model.blocks) == kept[-1] + 1
    assert not [n for n, _ in model.named_parameters() if n.startswith(("head", "aux_head"))]
    final, got = model.forward_intermediates(x, indices=kept)
    torch.testing.assert_close(got, expected)

    # nothing is left that does not take part
    (final * torch.randn_like(final)).sum().backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in model.parameters())
    assert model.num_features == model.head_hidden_size == final.shape[-1]
    torch.testing.assert_close(model(x), final)


def test_prune_options():
    model, x = nano(), images()
    logits, last = model(x), textbook_blocks(model, x)[-1]
    model.prune_intermediate_layers([5], prune_head=False)
    torch.testing.assert_close(model(x), logits)
    model.prune_intermediate_layers([5], prune_norm=True)
    torch.testing.assert_close(model.forward_features(x), last)


# --- features_only


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("factor", [1, 2], ids=["default size", "twice the height"])
def test_features_only_levels_channels_and_reductions(name, factor):
    size, patch, channels, depth, *_ = SHAPES[name]
    shape = (size * factor, size)
    model = timm.create_model(name, features_only=True, img_size=shape, device="meta")
    outputs = model(images(shape, 1, device="meta", dtype=torch.float32))
    assert len(outputs) >= 3
    assert model.feature_info.reduction() == [patch] * len(outputs)
    assert model.feature_info.channels() == [channels] * len(outputs)
    assert model.feature_info.module_name() == [f"blocks.{depth - k}" for k in range(len(outputs), 0, -1)]
    assert model.output_fmt == "NCHW"
    for out in outputs:
        assert out.shape == (1, channels, shape[0] // patch, shape[1] // patch)


@pytest.mark.parametrize(
    ("out_indices", "taken"), [((0,), [0]), ((1, 3), [1, 3]), ((-1,), [5]), ((-4, -3), [2, 3]), (2, [4, 5])]
)
def test_features_only_out_indices(out_indices, taken):
    whole, x = nano(), images()
    options = dict(features_only=True, out_indices=out_indices, dtype=torch.float64)
    model = timm.create_model("lvvit_nano4_32", **options).eval()
    assert not model.model.load_state_dict(whole.state_dict(), strict=False).missing_keys
    torch.testing.assert_close(model(x), whole.forward_intermediates(x, indices=taken, intermediates_only=True))
    assert len(model.model.blocks) == taken[-1] + 1


def test_features_follow_set_input_size():
    model = timm.create_model("lvvit_nano4_32", features_only=True, dtype=torch.float64).eval()
    model.model.set_input_size((48, 64))
    for out, reduction in zip(model(images((48, 64))), model.feature_info.reduction(), strict=True):
        assert out.shape[2:] == (48 // reduction, 64 // reduction)


def test_features_only_by_fx():
    whole, x = nano(), images()
    model = timm.create_model("lvvit_nano4_32", features_only=True, feature_cls="fx", num_classes=10).eval().double()
    state = {"graph_module." + k: v for k, v in whole.state_dict().items()}
    assert not model.load_state_dict(state, strict=False).missing_keys
    torch.testing.assert_close(model(x), textbook_blocks(whole, x)[-3:])  # with the class token
    assert len(gradients(model, x)) >= len(list(whole.blocks.parameters()))


# --- what the optimizer asks


@pytest.mark.parametrize("name", ["lvvit_nano4_32", "lvvit_t", "lvvit_m"])
def test_layer_decay_follows_depth(name):
    model = timm.create_model(name, device="meta")
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1.0, weight_decay=0.05, layer_decay=0.5)
    groups = optimizer.param_groups
    scale = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    assert sum(len(g["params"]) for g in groups) == len(scale) == len(list(model.parameters()))

    depth = len(model.blocks)
    for name, p in model.named_parameters():
        if name.startswith(("patch_embed.", "cls_token", "pos_embed")):
            layer = 0
        elif name.startswith("blocks."):
            layer = 1 + int(name.split(".")[1])
        else:
            layer = depth if name.startswith("norm.") else depth + 1
        assert scale[id(p)] == 0.5 ** (depth + 1 - layer), name


def test_weight_decay_spares_biases_norms_and_embeddings():
    model = nano()
    assert model.no_weight_decay() == {"pos_embed", "cls_token"}
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1.0, weight_decay=0.05)
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    embeddings = {id(model.pos_embed), id(model.cls_token)}
    assert decayed == {id(p) for p in model.parameters() if p.ndim > 1} - embeddings


@pytest.mark.parametrize("coarse", [False, True])
def test_groups_cover_every_parameter_once(coarse):
    model = nano()
    groups = list(group_parameters(model, model.group_matcher(coarse=coarse)).values())
    assert sorted(sum(groups, [])) == sorted(name for name, _ in model.named_parameters())
    assert {n.partition(".")[0] for n in groups[0]} == {"cls_token", "pos_embed", "patch_embed"}
    assert {n.partition(".")[0] for n in groups[-1]} == {"head", "aux_head"}


@pytest.mark.parametrize("pool", POOLS)
def test_every_parameter_gets_a_gradient_in_train_mode(pool):
    model = nano(global_pool=pool).train()
    x = images().requires_grad_()
    grads = gradients(model, x)
    assert grads.keys() == dict(model.named_parameters()).keys()
    assert all(g.isfinite().all() and g.norm() > 0 for g in grads.values())
    assert x.grad.norm() > 0


def test_forward_is_one_tensor_in_both_modes():
    model, x = nano(), images()
    for mode in (True, False):
        out = model.train(mode)(x)
        assert isinstance(out, torch.Tensor) and out.shape == (2, 10)


@pytest.mark.parametrize("drop", [0.0, 0.3], ids=["plain", "stochastic"])
def test_grad_checkpointing_changes_nothing_but_memory(drop):
    model, x = nano(drop_path_rate=drop, proj_drop_rate=drop, attn_drop_rate=drop).train(), images(batch=4)
    plain = gradients(model, x)
    torch.manual_seed(2)
    out = model(x)

    model.set_grad_checkpointing()
    calls = count_calls(dict(model.blocks.named_children()))
    checkpointed = gradients(model, x)
    assert set(calls.values()) == {2}  # each runs again in the backward pass
    torch.testing.assert_close(checkpointed, plain, rtol=0, atol=0)
    torch.manual_seed(2)
    torch.testing.assert_close(model(x), out, rtol=0, atol=0)

    model.set_grad_checkpointing(False)
    calls.update(dict.fromkeys(calls, 0))
    gradients(model, x)
    assert set(calls.values()) == {1}


def test_grad_checkpointing_of_intermediates_and_dense_outputs():
    model, x, mask = nano(), images(), random_mask()
    intermediates, dense = model.forward_intermediates(x), model.forward_dense(x, mask)
    model.set_grad_checkpointing()
    calls = count_calls(dict(model.blocks.named_children()))
    torch.testing.assert_close(model.forward_intermediates(x), intermediates)
    got = model.forward_dense(x, mask)
    torch.testing.assert_close(got, dense)
    calls.update(dict.fromkeys(calls, 0))
    got[1].sum().backward()
    assert set(calls.values()) == {1}


# --- compilers


def test_torchscript():
    model, x = nano(), images()
    scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(x), model(x))
    torch.testing.assert_close(scripted(x[:1]), model(x[:1]))
    with pytest.raises(torch.jit.Error, match=r"40.*32"):
        scripted(images((40, 32)))


@pytest.mark.parametrize("options", [dict(num_classes=0, global_pool=""), dict(aux_head=False)], ids=str)
def test_torchscript_without_heads(options):
    model, x = nano(**options), images()
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


def test_torchscript_features():
    options = dict(features_only=True, out_indices=(0, 2), dtype=torch.float64)
    model, x = timm.create_model("lvvit_nano4_32", **options).eval(), images()
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


def test_fx_forward_and_backward():
    model, x = nano().train(), images()
    for bn in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        bn.momentum = 0.0
    traced = create_feature_extractor(model, {"blocks.2": "block", "head": "cls", "aux_head": "aux"})
    out = traced(x)
    cls, aux = model.forward_dense(x)
    torch.testing.assert_close(out["cls"], cls)
    torch.testing.assert_close(out["aux"], aux.flatten(1, 2))
    block = model.forward_intermediates(x, [2], output_fmt="NLC", intermediates_only=True)[0]
    torch.testing.assert_close(out["block"][:, 1:], block)
    assert traced(images(batch=5))["cls"].shape == (5, 10)  # the batch size is not baked in

    expected = gradients(model, x)
    model.zero_grad()
    out = traced(x)
    (out["cls"] + 0.5 * out["aux"].amax(1)).square().mean().backward()
    torch.testing.assert_close({n: p.grad for n, p in model.named_parameters()}, expected)


def test_fx_symbolic_trace():
    model, x = nano(), images()
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(x), model(x))
    torch.testing.assert_close(traced(x[:1]), model(x[:1]))


@pytest.fixture
def dynamo() -> Any:
    torch._dynamo.reset()
    yield torch._dynamo
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", ["eval", "train", "checkpointing", "features"])
def test_compile_without_graph_break(dynamo, mode):
    model, x = nano(depth=3, drop_path_rate=0.2 if mode == "train" else 0.0), images()
    model.train(mode in ("train", "checkpointing"))
    model.set_grad_checkpointing(mode == "checkpointing")
    if mode == "features":
        model = timm.create_model("lvvit_nano4_32", features_only=True, dtype=torch.float64).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert compiled(x)[0].shape == model(x)[0].shape
    if mode != "train":  # drop path draws anew
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("training", [False, True])
def test_compile_the_dense_outputs_without_graph_break(dynamo, training):
    model, x = nano(depth=2).train(training), images()
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model.forward_dense, fullgraph=True, backend=backend)
    for _ in range(3):  # another mask is no other graph
        mask = random_mask()
        torch.testing.assert_close(compiled(x, mask), model.forward_dense(x, mask))
    assert len(graphs) == 1
    torch.testing.assert_close(compiled(x), model.forward_dense(x))


def test_compiled_gradients(dynamo):
    model, x = nano(depth=2).train(), images()
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
        y = images(batch=n)
        torch.testing.assert_close(exported(y), model(y))


# --- constructor options


@pytest.mark.parametrize("chans", [1, 4])
def test_in_chans(chans):
    model = nano(in_chans=chans)
    assert model.patch_embed.conv1.weight.shape[1] == model.in_chans == chans
    assert model(images(chans=chans)).shape == (2, 10)
    with pytest.raises(RuntimeError):
        model(images(chans=3))


def share_of_zeros(x: torch.Tensor) -> float:
    return (x == 0).double().mean().item()


def test_drop_rate_is_before_both_heads():
    model = nano(drop_rate=0.4)
    ones = torch.ones(64, 65, 96, dtype=torch.float64)
    torch.testing.assert_close(model.forward_head(ones, pre_logits=True), ones[:, 0])
    out = model.train().forward_head(ones, pre_logits=True)
    assert share_of_zeros(out) == pytest.approx(0.4, abs=0.03)
    torch.testing.assert_close(out[out != 0], torch.full_like(out[out != 0], 1 / 0.6))

    inputs = {}
    for name in ("head", "aux_head"):
        hook = partial(lambda name, module, args: inputs.update({name: args[0]}), name)
        model.get_submodule(name).register_forward_pre_hook(hook)
    for run in (lambda: model.forward_head(ones), lambda: model.forward_dense(images(batch=8))):
        inputs.clear()
        run()
        assert share_of_zeros(inputs["head"]) == pytest.approx(0.4, abs=0.06)
        assert share_of_zeros(inputs["aux_head"]) == pytest.approx(0.4, abs=0.02)


def test_pos_drop_rate_is_behind_the_position_embedding():
    model = nano(pos_drop_rate=0.3).train()
    inputs = []
    model.blocks[0].register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    model(images(batch=4))
    model.eval()(images(batch=4))
    assert share_of_zeros(inputs[0]) == pytest.approx(0.3, abs=0.02)
    assert share_of_zeros(inputs[1]) == 0


def test_attn_drop_rate_drops_attention_weights():
    """With all scores equal and the values unit vectors, a head's output is its attention weights."""
    model = nano(attn_drop_rate=0.3).train()
    for block in model.blocks:
        attn = block.attn
        with torch.no_grad():
            attn.qkv.weight.zero_()
            attn.qkv.weight[192:, :32] = torch.eye(32).repeat(3, 1)
            attn.proj.weight.copy_(torch.eye(96))
            attn.proj.bias.zero_()
        x = torch.eye(32, 96, dtype=torch.float64).expand(4, -1, -1)
        out = attn(x)
        assert share_of_zeros(out) == pytest.approx(0.3, abs=0.03)
        torch.testing.assert_close(out[out != 0], torch.full_like(out[out != 0], 1 / 32 / 0.7))
        torch.testing.assert_close(attn.eval()(x), torch.full_like(out, 1 / 32))


def test_proj_drop_rate_is_behind_every_projection():
    model = nano(proj_drop_rate=0.3).train()
    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str, module: nn.Module, args: Any, out: torch.Tensor) -> None:
        outputs[name] = out

    for name, module in model.named_modules():
        if name.endswith((".attn", ".mlp")):
            module.register_forward_hook(partial(keep, name))
    model(images(batch=4))
    assert len(outputs) == 12
    for name, out in outputs.items():
        assert share_of_zeros(out) == pytest.approx(0.3, abs=0.02), name


def test_drop_path_rate_grows_linearly_over_the_blocks():
    """Share of samples whose residual is dropped, by block and branch."""
    model = nano(drop_path_rate=0.5).train()
    for k, block in enumerate(model.blocks):
        for drop in (block.drop_path1, block.drop_path2):
            out = drop(torch.ones(4000, 1, 2))
            assert share_of_zeros(out) == pytest.approx(0.5 * k / 5, abs=0.04)
            assert (out[:, 0, 0] == out[:, 0, 1]).all()
    x = images(batch=8)
    assert not torch.equal(model(x), model(x))
    torch.testing.assert_close(model.eval()(x), model(x), rtol=0, atol=0)


def test_drop_path_spares_the_skip_connections():
    block = Block(12, 3, drop_path=0.5, dtype=torch.float64).train()
    for p in block.parameters():
        nn.init.normal_(p, std=0.7)
    x = torch.randn(200, 5, 12, dtype=torch.float64)
    untouched = (block(x) == x).flatten(1).all(1).double().mean().item()
    assert untouched == pytest.approx(0.25, abs=0.1)  # both branches dropped


def test_drop_rates_are_off_by_default():
    model, x = nano().train(), images()
    torch.testing.assert_close(model(x), model(x), rtol=0, atol=0)
    assert not [m for m in model.modules() if isinstance(m, nn.Dropout) and m.p > 0]
    assert not [m for m in model.modules() if isinstance(m, timm.layers.DropPath)]


@pytest.mark.parametrize("name", NAMES)
def test_device_and_dtype_arguments_reach_every_parameter(name):
    model = timm.create_model(name, device="meta", dtype=torch.bfloat16)
    tensors = [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]
    assert all(t.dtype == torch.bfloat16 for t in tensors)
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
    size = SHAPES[name][0]
    out = model(images((size, size), device="meta", dtype=torch.bfloat16))
    assert out.shape == (2, 1000) and out.dtype == torch.bfloat16


def test_low_precision_output_is_close_to_the_full_one():
    model, x = nano(), images()
    low = nano(dtype=torch.bfloat16)
    low.load_state_dict(model.state_dict())
    assert low.head.weight.dtype == torch.bfloat16
    torch.testing.assert_close(low(x.bfloat16()).double(), model(x), rtol=0.1, atol=0.1)


def test_initial_weights():
    model = timm.create_model("lvvit_t")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.15), name
            assert module.bias is None or not module.bias.any()
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.3)


# --- any resolution


def resize_tokens(pos_embed: torch.Tensor, old: tuple[int, int], new: tuple[int, int]) -> torch.Tensor:
    """The class token's position stays, the others are resized as a picture."""
    grid = pos_embed[:, 1:].reshape(1, *old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=new, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], 1)


def build(img_size: Any) -> LVViT:
    return nano(img_size=img_size)


def resize(img_size: Any) -> LVViT:
    model = nano()
    model.set_input_size(img_size)
    return model


@pytest.mark.parametrize("make", [build, resize])
@pytest.mark.parametrize(
    ("img_size", "shape"), [(64, (64, 64)), ((48, 40), (48, 40)), ([24, 56], (24, 56)), ((4, 4), (4, 4))]
)
def test_img_size_is_an_int_or_height_and_width(make, img_size, shape):
    model = make(img_size)
    x = images(shape)
    grid = shape[0] // 4, shape[1] // 4
    assert model(x).shape == (2, 10)
    assert model.pos_embed.shape == (1, grid[0] * grid[1] + 1, 96)
    assert model.forward_dense(x)[1].shape == (2, *grid, 10)
    assert model.patch_embed.img_size == shape and model.patch_embed.grid_size == grid
    assert get_model_input_config(model)["input_size"] == (3, *shape)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_variant_takes_rectangles(name):
    model = timm.create_model(name, img_size=(160, 288), device="meta")
    x = images((160, 288), 1, device="meta", dtype=torch.float32)
    assert model.forward_dense(x)[1].shape == (1, 10, 18, 1000)


@pytest.mark.parametrize("make", [build, resize])
@pytest.mark.parametrize(
    ("img_size", "axis", "came", "nearest"),
    [
        (33, "height", 33, (32, 36)),
        ((32, 47), "width", 47, (44, 48)),
        ((31, 32), "height", 31, (28, 32)),
        (3, "height", 3, (4, 8)),
        (0, "height", 0, (4, 8)),
        (-8, "height", -8, (4, 8)),
    ],
)
def test_size_that_does_not_divide_names_the_two_nearest(make, img_size, axis, came, nearest):
    with pytest.raises(ValueError, match=rf"(?i){axis} {came}\b.*\b{nearest[0]} and {nearest[1]}\b"):
        make(img_size)
    for size in nearest:
        assert make(size)(images((size, size))).shape == (2, 10)


def test_step_depends_on_the_patch():
    with pytest.raises(ValueError, match="224 and 240"):
        timm.create_model("lvvit_s", img_size=230, device="meta")


@pytest.mark.parametrize("make", [build, resize])
@pytest.mark.parametrize("img_size", [(32,), (32, 32, 32)])
def test_size_that_is_no_height_and_width_is_refused(make, img_size):
    with pytest.raises(ValueError, match="Expected a height and a width"):
        make(img_size)


@pytest.mark.parametrize("size", [(40, 32), (32, 24), (64, 64)])
def test_wrong_size_at_run_time_says_expected_and_came(size):
    wrong = size[0] if size[0] != 32 else size[1]
    for call in (nano(), nano().forward_dense):
        with pytest.raises((AssertionError, ValueError, RuntimeError)) as error:
            call(images(size))
        assert "32" in str(error.value) and str(wrong) in str(error.value)


@pytest.mark.parametrize("size", SIZES)
def test_set_input_size_equals_a_model_built_at_that_size(size):
    live, built = nano(), nano(img_size=size)
    expected = resize_tokens(live.pos_embed, (8, 8), (size[0] // 4, size[1] // 4))
    built.load_state_dict(live.state_dict())
    live.set_input_size(size)
    torch.testing.assert_close(live.pos_embed.detach(), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(built.pos_embed.detach(), expected.detach(), rtol=1e-5, atol=1e-6)
    x = images(size)
    torch.testing.assert_close(live(x), built(x), rtol=1e-12, atol=1e-12)
    assert live.patch_embed.img_size == built.patch_embed.img_size == size
    assert get_model_input_config(live)["input_size"] == (3, *size)
    with pytest.raises(AssertionError):
        live(images((32, 32)))


def test_set_input_size_from_a_rectangle_keeps_the_axes_apart():
    model = nano(img_size=(64, 24))
    expected = resize_tokens(model.pos_embed, (16, 6), (8, 10))
    model.set_input_size((32, 40))
    torch.testing.assert_close(model.pos_embed.detach(), expected.detach(), rtol=1e-5, atol=1e-6)


def test_set_input_size_of_as_many_tokens_resamples():
    model = nano()
    expected = resize_tokens(model.pos_embed, (8, 8), (4, 16))
    model.set_input_size((16, 64))
    torch.testing.assert_close(model.pos_embed.detach(), expected.detach(), rtol=1e-5, atol=1e-6)


def test_set_input_size_leaves_the_rest_alone():
    model = nano()
    before = dict(model.named_parameters())
    model.set_input_size((48, 32))
    assert {name for name, p in model.named_parameters() if p is not before[name]} == {"pos_embed"}


def test_set_input_size_to_the_same_size_changes_no_output():
    model, x = nano(), images()
    out = model(x)
    for size in (32, (32, 32), [32, 32]):
        model.set_input_size(size)
    torch.testing.assert_close(model(x), out, rtol=0, atol=0)


@pytest.mark.parametrize("trains", [True, False])
def test_set_input_size_keeps_what_trains_the_type_and_the_mode(trains):
    model = nano(dtype=torch.bfloat16).train()
    model.pos_embed.requires_grad_(trains)
    model.set_input_size((48, 64))
    for name, p in model.named_parameters():
        assert p.requires_grad == (trains or name != "pos_embed"), name
        assert isinstance(p, nn.Parameter) and p.is_leaf and p.dtype == torch.bfloat16
    assert all(m.training for m in model.modules())


def test_resized_model_trains():
    model = nano().train()
    model.set_input_size((48, 40))
    grads = gradients(model, images((48, 40)))
    assert grads.keys() == dict(model.named_parameters()).keys()
    assert all(g.norm() > 0 for g in grads.values())


@pytest.mark.parametrize("img_size", [33, (48, 42), 0, (40, 0), (40,), (40, 40, 40)], ids=str)
def test_failed_set_input_size_leaves_the_model_as_it_was(img_size):
    model, x = nano(), images()
    before, out = dict(model.named_parameters()), model(x)
    with pytest.raises(ValueError):
        model.set_input_size(img_size)
    assert all(before[name] is p for name, p in model.named_parameters())
    assert model.patch_embed.img_size == (32, 32) and model.patch_embed.grid_size == (8, 8)
    assert get_model_input_config(model)["input_size"] == (3, 32, 32)
    torch.testing.assert_close(model(x), out, rtol=0, atol=0)
    model.set_input_size(48)
    assert model(images((48, 48))).shape == (2, 10)


def test_input_can_be_set_on_the_meta_device():
    model = timm.create_model("lvvit_l", device="meta")
    model.set_input_size((288, 160))
    assert model.pos_embed.is_meta
    assert model(images((288, 160), 1, device="meta", dtype=torch.float32)).shape == (1, 1000)


@pytest.mark.parametrize("size", [(32, 32), (32, 64), *SIZES])
def test_dynamic_model_computes_what_a_resized_one_does(size):
    model, resized = nano(dynamic_img_size=True), nano()
    resized.load_state_dict(model.state_dict())
    resized.set_input_size(size)
    before, x = model.pos_embed.clone(), images(size)
    for got, expected in (
        ([model(x)], [resized(x)]),
        (model.forward_dense(x), resized.forward_dense(x)),
        (model.forward_intermediates(x)[1], resized.forward_intermediates(x)[1]),
    ):
        torch.testing.assert_close(list(got), list(expected), rtol=1e-12, atol=0)
    model(x).square().sum().backward()
    assert torch.equal(model.pos_embed, before) and model.pos_embed.grad.abs().min() > 0
    assert not get_model_input_config(model)["fixed_input_size"]


def test_dynamic_model_names_the_nearest_sizes_that_work():
    with pytest.raises(ValueError, match=r"(?i)width 34\b.*\b32 and 36\b"):
        nano(dynamic_img_size=True)(images((32, 34)))


def test_resized_model_is_saved_and_built_again_at_its_size(tmp_path: Path):
    model = nano()
    model.set_input_size((48, 40))
    save_for_hf(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, dtype=torch.float64).eval()
    x = images((48, 40))
    torch.testing.assert_close(again(x), model(x), rtol=1e-12, atol=1e-12)


# --- checkpoints


def wrapped(state_dict: dict[str, torch.Tensor], kind: str) -> dict[str, Any]:
    return {
        "bare": state_dict,
        "state_dict": {"state_dict": state_dict, "epoch": 3, "arch": "lvvit_nano4_32"},
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
def test_checkpoint_filter_leaves_out_the_auxiliary_head_where_there_is_none(kind):
    model, other, x = nano(), nano(aux_head=False), images()
    other.load_state_dict(checkpoint_filter_fn(wrapped(model.state_dict(), kind), other), strict=True)
    torch.testing.assert_close(other(x), model.forward_dense(x)[0], rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["bare", "ddp state_dict", "compiled ddp"])
@pytest.mark.parametrize("size", [(32, 32), (64, 64), (48, 40), (4, 32)])
def test_create_model_from_a_checkpoint(tmp_path: Path, kind, size):
    model = nano()
    torch.save(wrapped(model.state_dict(), kind), tmp_path / "last.pth.tar")
    options = dict(num_classes=10, img_size=size, dtype=torch.float64, checkpoint_path=tmp_path / "last.pth.tar")
    other = timm.create_model("lvvit_nano4_32", **options).eval()
    model.set_input_size(size)
    x = images(size)
    torch.testing.assert_close(other(x), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [384, 448, 512])
def test_published_geometry_loads_at_the_published_sizes(size):
    small = timm.create_model("lvvit_t", num_classes=3)
    model = timm.create_model("lvvit_t", num_classes=3, img_size=size)
    model.load_state_dict(small.state_dict())
    expected = resize_tokens(small.pos_embed, (14, 14), (size // 16, size // 16))
    torch.testing.assert_close(model.pos_embed.detach(), expected.detach())
    small.load_state_dict(model.state_dict())  # and back
    assert small.pos_embed.shape == (1, 197, 240)


def test_resized_model_loads_a_checkpoint_of_its_old_size():
    model, live = nano(), nano()
    live.set_input_size((48, 40))
    live.load_state_dict(model.state_dict())
    model.set_input_size((48, 40))
    x = images((48, 40))
    torch.testing.assert_close(live(x), model(x), rtol=1e-12, atol=1e-12)


def test_rectangle_loads_its_own_checkpoint_unchanged():
    model, other = nano(img_size=(48, 40)), nano(img_size=(48, 40))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.pos_embed, model.pos_embed)


def test_loading_leaves_the_given_state_dict_alone():
    state = nano().state_dict()
    before = {name: t.clone() for name, t in state.items()}
    nano(img_size=64).load_state_dict(state)
    assert state.keys() == before.keys() and all(torch.equal(t, before[name]) for name, t in state.items())


def test_wrapped_model_resamples_too():
    model, other = nano(), nano(img_size=64)
    wrapper = nn.ModuleDict({"backbone": other})
    wrapper.load_state_dict({f"backbone.{k}": v for k, v in model.state_dict().items()})
    model.set_input_size(64)
    assert torch.equal(other.pos_embed, model.pos_embed)


@pytest.mark.parametrize("options", [{}, dict(img_size=(48, 40)), dict(aux_head=False), dict(num_classes=7)], ids=str)
def test_pretrained_weights_adapt(tmp_path: Path, options):
    """What `classifier` and `first_conv` of the configuration are for."""
    model = nano(num_classes=1000)
    torch.save(wrapped(model.state_dict(), "ddp state_dict"), tmp_path / "weights.pth")
    overlay = dict(file=str(tmp_path / "weights.pth"))
    options = {"in_chans": 1, "dtype": torch.float64, **options}
    other = timm.create_model("lvvit_nano4_32", pretrained=True, pretrained_cfg_overlay=overlay, **options).eval()
    size = options.get("img_size", (32, 32))
    model.set_input_size(size)
    gray = images(size, chans=1)
    torch.testing.assert_close(other.forward_features(gray), model.forward_features(gray.expand(-1, 3, -1, -1)))
    assert other(gray).shape == (2, options.get("num_classes", 1000))
    if "num_classes" not in options:
        cls, aux = model.forward_dense(gray.expand(-1, 3, -1, -1))
        expected = cls + 0.5 * aux.flatten(1, 2).amax(1) if options.get("aux_head", True) else cls
        torch.testing.assert_close(other(gray), expected)


def test_checkpoint_of_another_architecture_is_refused(tmp_path: Path):
    torch.save(nano(embed_dim=48).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(RuntimeError, match="size mismatch"):
        timm.create_model("lvvit_nano4_32", num_classes=10, checkpoint_path=tmp_path / "weights.pth")


# --- fine-tuning


@pytest.fixture
def weights(tmp_path: Path) -> tuple[LVViT, Path]:
    model, path = nano(), tmp_path / "weights.pth.tar"
    torch.save(wrapped(model.state_dict(), "state_dict"), path)
    return model, path


@pytest.mark.parametrize("size", [(64, 64), (48, 40)])
def test_finetune_at_another_size(weights, size):
    model, path = weights
    other = nano(img_size=size)
    line = load_finetune(other, path)
    assert "resampled 1 to" in line and "nothing made anew" in line
    model.set_input_size(size)
    x = images(size)
    torch.testing.assert_close(other(x), model(x), rtol=1e-12, atol=1e-12)


def test_finetune_with_other_classes_makes_both_heads_anew(weights):
    model, path = weights
    other, x = nano(num_classes=4), images()
    heads = {n: p.detach().clone() for n, p in other.named_parameters() if n.startswith(("head.", "aux_head."))}
    line = load_finetune(other, path)
    for name in ("head.weight", "head.bias", "aux_head.weight", "aux_head.bias"):
        assert f"{name} (10 classes there, 4 here)" in line
        assert torch.equal(other.get_parameter(name), heads[name])
    torch.testing.assert_close(other.forward_features(x), model.forward_features(x), rtol=0, atol=0)


def test_finetune_without_an_auxiliary_head(weights):
    model, path = weights
    other, x = nano(aux_head=False), images()
    assert "nothing made anew" in load_finetune(other, path)
    torch.testing.assert_close(other(x), model.forward_dense(x)[0], rtol=0, atol=0)


def test_finetune_makes_an_auxiliary_head_the_checkpoint_lacks(tmp_path: Path):
    model, other, x = nano(aux_head=False), nano(), images()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    before = other.aux_head.weight.detach().clone()
    line = load_finetune(other, tmp_path / "weights.pth")
    assert "aux_head.weight (none there, 10 here)" in line and " head.weight" not in line
    assert torch.equal(other.aux_head.weight, before)
    torch.testing.assert_close(other.forward_dense(x)[0], model(x), rtol=0, atol=0)


def test_finetune_with_other_channels(weights):
    model, path = weights
    other, gray = nano(in_chans=1), images(chans=1)
    assert "patch_embed.conv1.weight (3 channels there, 1 here, converted)" in load_finetune(other, path)
    torch.testing.assert_close(other(gray), model(gray.expand(-1, 3, -1, -1)))
