"""Parameters, multiply-accumulates and activations, against formulas and against timm's published numbers."""

import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import Attention
from timm.models.mlp_mixer import MlpMixer
from torch import nn

import vip  # noqa: F401  # registers the models
from vip.benchmark.counts import Counts, count


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([1, 2, 3]),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(0, 2),
    st.tuples(st.integers(5, 12), st.integers(5, 12)),
    st.booleans(),
)
def test_convolution(
    groups: int, inputs: int, outputs: int, kernel: int, stride: int, padding: int, size: tuple[int, int], bias: bool
) -> None:
    conv = nn.Conv2d(inputs * groups, outputs * groups, kernel, stride, padding, groups=groups, bias=bias)
    rows, columns = ((s + 2 * padding - kernel) // stride + 1 for s in size)
    out = outputs * groups * rows * columns
    params = outputs * groups * (inputs * kernel**2 + bias)
    assert count(conv, (inputs * groups, *size)) == Counts(params, out * inputs * kernel**2, out)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.integers(1, 5), st.booleans())
def test_linear(inputs: int, outputs: int, rows: int, channels: int, bias: bool) -> None:
    """It has no bias to multiply by, and it works on the last axis."""
    linear = nn.Linear(inputs, outputs, bias)
    expected = Counts(outputs * (inputs + bias), channels * rows * outputs * inputs, channels * rows * outputs)
    assert count(linear, (channels, rows, inputs)) == expected


def test_what_is_no_matrix_product_costs_nothing() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    assert count(model, (3, 8, 8)) == Counts(6, 0, 0)


def test_each_use_of_a_shared_layer_costs_and_its_weights_are_there_once() -> None:
    linear = nn.Linear(8, 8)
    once, twice = count(linear, (1, 8)), count(nn.Sequential(linear, nn.ReLU(), linear), (1, 8))
    assert twice == Counts(once.params, 2 * once.macs, 2 * once.activations)


class Tokens(nn.Module):
    """Rows of a one-channel image as tokens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x[:, 0])


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 6), st.booleans())
def test_attention(tokens: int, heads: int, head_dim: int, fused: bool) -> None:
    dim = heads * head_dim
    attention = Attention(dim, heads, qkv_bias=True)
    attention.fused_attn = fused
    linears = 4 * dim * (dim + 1)
    products = 2 * tokens**2 * dim  # of queries and keys, and of their result and the values
    activations = 3 * tokens * dim + heads * tokens**2 + 2 * tokens * dim
    assert count(Tokens(attention), (1, tokens, dim)) == Counts(linears, 4 * tokens * dim**2 + products, activations)


def test_vision_transformer() -> None:
    depth, dim, heads, tokens, classes = 3, 48, 3, 16 + 1, 10
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, embed_dim=dim, depth=depth, num_heads=heads, num_classes=classes
    )
    block = 4 * tokens * dim**2 + 2 * tokens**2 * dim + 8 * tokens * dim**2
    macs = 16 * dim * 3 * 16**2 + depth * block + dim * classes
    counts = count(model, (3, 64, 64))
    assert counts.macs == macs
    assert counts.params == sum(p.numel() for p in model.parameters())


def test_mlp_mixer() -> None:
    depth, dim, tokens, classes = 2, 32, 16, 10
    model = MlpMixer(img_size=128, patch_size=32, embed_dim=dim, num_blocks=depth, num_classes=classes)
    token_dim, channel_dim = dim // 2, 4 * dim
    macs = 2 * dim * tokens * token_dim + 2 * tokens * dim * channel_dim
    activations = dim * (token_dim + tokens) + tokens * (channel_dim + dim)
    params = (tokens + 1) * token_dim + (token_dim + 1) * tokens + (dim + 1) * channel_dim + (channel_dim + 1) * dim
    expected = Counts(
        (3 * 32**2 + 1) * dim + depth * (params + 4 * dim) + 2 * dim + (dim + 1) * classes,
        tokens * dim * 3 * 32**2 + depth * macs + dim * classes,
        tokens * dim + depth * activations + classes,
    )
    assert count(model, (3, 128, 128)) == expected


def permutator_block(rows: int, cols: int, dim: int, segments: int) -> Counts:
    """Section 3 of arXiv 2106.12368, a layer a line."""
    tokens, part = rows * cols, dim // segments
    layers = [
        (cols * segments, rows * part, rows * part, 0),  # height: a column of tokens of one segment is one input
        (rows * segments, cols * part, cols * part, 0),  # width
        (tokens, dim, dim, 0),  # channels
        (1, dim, dim // 4, 1),  # weights of the branches, of pooled tokens
        (1, dim // 4, 3 * dim, 1),
        (tokens, dim, dim, 1),  # projection
        (tokens, dim, 3 * dim, 1),  # channel MLP
        (tokens, 3 * dim, dim, 1),
    ]
    return Counts(
        sum((i + bias) * o for _, i, o, bias in layers) + 2 * 2 * dim,
        sum(n * i * o for n, i, o, _ in layers),
        sum(n * o for n, _, o, _ in layers),
    )


def test_vision_permutator() -> None:
    blocks = [permutator_block(8, 8, 64, 8)] * 2 + [permutator_block(4, 4, 128, 4)] * 4
    counts = count(timm.create_model("vip_nano4_32"), (3, 32, 32))
    patches, down, head = (64, 3 * 4 * 4, 64), (16, 64 * 2 * 2, 128), (1, 128, 1000)
    others = [patches, down, head]
    assert counts.macs == sum(b.macs for b in blocks) + sum(n * i * o for n, i, o in others)
    assert counts.activations == sum(b.activations for b in blocks) + sum(n * o for n, _, o in others)
    assert counts.params == sum(b.params for b in blocks) + sum((i + 1) * o for _, i, o in others) + 2 * 128


def test_numbers_that_timm_publishes() -> None:
    """In millions and billions, rounded as in timm's results/benchmark-*.csv and model cards."""
    published = {
        "resnet50": (25.56, 4.09, 11.1),
        "mixer_b16_224": (59.88, 12.6, 14.5),
        "vit_small_patch16_224": (22.05, 4.6, 11.9),
    }
    for name, (params, gmacs, activations) in published.items():
        with torch.device("meta"):
            model = timm.create_model(name)
        counts = count(model, (3, 224, 224))
        assert round(counts.params / 1e6, 2) == params
        assert abs(counts.macs / 1e9 - gmacs) <= 0.01
        assert abs(counts.activations / 1e6 - activations) <= 0.06


def test_attention_pooling() -> None:
    """Of test_vit3, whose plain forward pass the counter could not follow with gradients: 94.1 million."""
    model = timm.create_model("test_vit3")
    counts = count(model, model.pretrained_cfg["input_size"])
    assert round(counts.macs / 1e6, 1) == 94.1
    assert counts.params == sum(p.numel() for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_the_model_is_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.Flatten(), nn.Linear(288, 5))
    model[0].weight.requires_grad_(False)
    model[2].eval()
    model(torch.randn(4, 3, 8, 8)).sum().backward()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    ids = [id(p) for p in model.parameters()]
    state = torch.get_rng_state()
    count(model, (3, 8, 8))
    assert [m.training for m in model] == [True, True, False, True, True]
    assert [id(p) for p in model.parameters()] == ids
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    for name, p in model.named_parameters():
        assert p.requires_grad == (name != "0.weight")
        assert p.grad is None if grads[name] is None else torch.equal(p.grad, grads[name])
    assert torch.equal(torch.get_rng_state(), state)
    assert model(torch.randn(4, 3, 8, 8)).shape == (4, 5)
