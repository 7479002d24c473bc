"""The models of the data-efficiency study: equal sizes, and ablations against formulas."""

import numpy as np
import pytest
import textbook
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import Attention
from torch import nn

from studies.data_efficiency.models import ABLATIONS, BASELINE, MODELS, SIZES, AblatedPermuteMlp, build, counts
from vip.models.vision_permutator import PermuteMlp


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("size", SIZES)
def test_architectures_have_the_parameters_of_the_permutator(size: str) -> None:
    assert list(SIZES[size].shapes) == list(MODELS)
    expected = parameters(build(BASELINE, SIZES[size]))
    for name in MODELS:
        assert parameters(build(name, SIZES[size])) == pytest.approx(expected, rel=0.05), name
        assert counts(name, size).params == parameters(build(name, SIZES[size]))


def test_outputs_and_sixty_four_tokens() -> None:
    for name in (*MODELS, *ABLATIONS):
        model = build(name, SIZES["small"]).eval()
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
        tokens = model.forward_features(torch.randn(2, 3, 32, 32))
        assert np.prod(tokens.shape[1:-1]) == 64


@pytest.mark.parametrize("name", [*MODELS, *ABLATIONS])
def test_operations(name: str) -> None:
    """By the shapes that go through each linear layer and convolution, and the two products of an attention."""
    model, macs = build(name, SIZES["small"]).eval(), 0

    def add(module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        nonlocal macs
        if isinstance(module, Attention):
            macs += 2 * 64**2 * inputs[0].shape[-1]
        else:
            macs += output.numel() * (module.weight.numel() // module.weight.shape[0])

    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | Attention):
            module.register_forward_hook(add)
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
    assert counts(name, "small").macs == macs


# --- ablations


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.sampled_from([4, 8]))
def test_with_all_branches_it_is_the_whole(batch: int, rows: int, cols: int, segments: int, part: int) -> None:
    whole = PermuteMlp(segments * part, segments, (rows, cols)).double()
    ablated = AblatedPermuteMlp(segments * part, segments, (rows, cols), "hwc", True).double()
    ablated.load_state_dict(whole.state_dict())
    x = torch.randn(batch, rows, cols, segments * part, dtype=torch.float64)
    torch.testing.assert_close(ablated(x), whole(x))


def branch(x: np.ndarray, weights: textbook.Weights, segments: int, name: str) -> np.ndarray:
    """A branch of eq. 1 of arXiv 2106.12368; see `textbook` for the indices."""
    b, rows, cols, channels = x.shape
    dim = channels // segments
    x_bhwns = x.reshape(b, rows, cols, segments, dim)
    weight = weights[f"mlp_{name}.weight"]
    if name == "h":
        return np.einsum("isht,bhwnt->biwns", weight.reshape(rows, dim, rows, dim), x_bhwns).reshape(x.shape)
    if name == "w":
        return np.einsum("jswt,bhwnt->bhjns", weight.reshape(cols, dim, cols, dim), x_bhwns).reshape(x.shape)
    return np.einsum("dc,bhwc->bhwd", weight, x)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["h", "w", "c", "hw", "wc", "hwc"]), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_branches_without_weights_are_added(branches: str, rows: int, cols: int, segments: int) -> None:
    layer = AblatedPermuteMlp(4 * segments, segments, (rows, cols), branches, False).double()
    weights = {name: value.numpy() for name, value in layer.state_dict().items()}
    assert {name.partition(".")[0] for name in weights} == {*(f"mlp_{name}" for name in branches), "proj"}
    x = np.random.default_rng(0).normal(size=(2, rows, cols, 4 * segments))
    total = sum(branch(x, weights, segments, name) for name in branches)
    expected = textbook.linear(total, textbook.part(weights, "proj"))
    with torch.no_grad():
        np.testing.assert_allclose(layer(torch.from_numpy(x)).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("name, mixes", [("height only", "rows"), ("width only", "columns"), ("channel only", "")])
def test_what_a_single_branch_mixes(name: str, mixes: str) -> None:
    """What changes when one token changes: tokens of its column, of its row, or itself."""
    model = build(name, SIZES["small"]).eval()
    x = torch.randn(1, 8, 8, 64)
    changed = x.clone()
    changed[0, 3, 5] += 1
    attention = model.network[0][0].attn
    differs = {tuple(i) for i in (attention(x) != attention(changed)).any(-1)[0].nonzero().tolist()}
    line = range(8) if mixes else [3]
    assert differs == ({(i, 5) for i in line} if mixes != "columns" else {(3, i) for i in line})


def test_ablations_are_of_the_whole_model() -> None:
    """In every block, with the other weights there and drawn alike."""
    whole = build(BASELINE, SIZES["small"])
    parts = {"height only": {"mlp_h", "proj"}, "width only": {"mlp_w", "proj"}, "channel only": {"mlp_c", "proj"}}
    parts["no re-weighting"] = {"mlp_h", "mlp_w", "mlp_c", "proj"}
    for name, expected in parts.items():
        model = build(name, SIZES["small"])
        assert len(model.network[0]) == 4
        for block in model.network[0]:
            assert {child for child, _ in block.attn.named_children()} - {"proj_drop"} == expected
        others = {n: p.shape for n, p in whole.named_parameters() if ".attn." not in n}
        assert {n: p.shape for n, p in model.named_parameters() if ".attn." not in n} == others
        for n, p in model.named_parameters():
            if p.ndim == 2 and "patch" not in n:
                assert p.std().item() == pytest.approx(0.02, rel=0.15), n
    fewer = build("fewer segments (4 of 8)", SIZES["small"])
    assert {block.attn.segments for block in whole.network[0]} == {8}
    assert {block.attn.segments for block in fewer.network[0]} == {4}
    assert fewer.network[0][0].attn.mlp_h.weight.shape == (8 * 16, 8 * 16)
