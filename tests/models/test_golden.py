"""The published models, by the figures their published implementation gives."""

import re
from typing import Any

import golden_vectors
import pytest
import timm
import torch

import vip  # noqa: F401  registers the models

# relative, in float64
TOLERANCE = dict(rtol=1e-9, atol=0.0)
# biases before the softmax over tokens of EAMLP's external attention
UNSEEN = re.compile(r"blocks\.\d+\.(norm1|attn\.trans_dims|attn\.linear_0)\.bias")


@pytest.fixture(
    scope="module",
    params=[
        "vip_s14",
        "vip_s7",
        "vip_m7",
        "vip_l7",
        "lvvit_t",
        "lvvit_s",
        "lvvit_m",
        "lvvit_l",
        "eamlp_7",
        "eamlp_14",
        "eamlp_19",
    ],
)
def figures(request: pytest.FixtureRequest) -> tuple[dict[str, Any], dict[str, Any]]:
    golden = golden_vectors.read(request.param)
    model = timm.create_model(request.param, dtype=torch.float64)
    return golden_vectors.measure(model, golden["input_shape"]), golden


def assert_close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(
        torch.tensor(actual, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64), **TOLERANCE
    )


def test_parameter_names_and_shapes(figures):
    ours, golden = figures
    assert dict(ours["state_dict"]) == dict(golden["state_dict"])
    assert ours["params"] == golden["params"]


def test_logits(figures):
    ours, golden = figures
    assert_close(ours["logits_first16"], golden["logits_first16"])
    assert_close(ours["logits_norm"], golden["logits_norm"])
    assert ours["argmax"] == golden["argmax"]


def test_loss(figures):
    ours, golden = figures
    assert_close(ours["ce_loss_labels_1_2"], golden["ce_loss_labels_1_2"])


def test_gradient_norm_of_every_parameter(figures):
    ours, golden = figures
    assert ours["grad_norm"].keys() == golden["grad_norm"].keys()
    # a softmax over tokens does not see a bias that all of them share: what is left of its gradient is rounding
    unseen = {name for name, norm in golden["grad_norm"].items() if norm < 1e-12}
    assert (
        unseen == set(filter(UNSEEN.match, golden["grad_norm"])) if golden["model"].startswith("eamlp") else not unseen
    )
    assert all(ours["grad_norm"][name] < 1e-12 for name in unseen)
    seen = [name for name in golden["grad_norm"] if name not in unseen]
    assert_close([ours["grad_norm"][name] for name in seen], [golden["grad_norm"][name] for name in seen])
