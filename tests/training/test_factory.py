"""Optimizers against their textbook."""

import pytest
import torch
from torch import nn

from vip.errors import UserError
from vip.training.config import TrainConfig
from vip.training.factory import create_optimizer


@pytest.mark.parametrize("opt", ["adam", "adamw", "AdamW"])
def test_fused_steps_are_the_textbooks(opt: str) -> None:
    """Two steps in one pass over the weights, against Adam written out in float64 (arXiv 1412.6980, 1711.05101)."""
    model = nn.Linear(3, 2, bias=False)
    config = TrainConfig(opt=opt, lr=0.1, weight_decay=0.0, opt_betas=[0.8, 0.9], opt_eps=1e-3)
    optimizer = create_optimizer(config, model, images_per_update=1)
    assert all(group["fused"] for group in optimizer.param_groups)
    weight = model.weight.detach().double().clone()
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for step in (1, 2):
        grad = torch.randn(2, 3)
        model.weight.grad = grad.clone()
        optimizer.step()
        first, second = 0.8 * first + 0.2 * grad, 0.9 * second + 0.1 * grad.double() ** 2
        weight -= 0.1 * (first / (1 - 0.8**step)) / ((second / (1 - 0.9**step)).sqrt() + 1e-3)
        torch.testing.assert_close(model.weight.detach().double(), weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("opt", "kwargs", "fused"),
    [
        ("adamw", {"fused": False}, False),
        ("adamw", {"foreach": True}, None),
        ("sgd", {}, None),
        ("nadamw", {}, None),
    ],
)
def test_what_is_asked_for_wins(opt: str, kwargs: dict, fused: bool | None) -> None:
    config = TrainConfig(opt=opt, opt_kwargs=kwargs)
    group = create_optimizer(config, nn.Linear(2, 2), images_per_update=1).param_groups[0]
    assert group.get("fused") == fused and group.get("foreach") == kwargs.get("foreach")


def test_an_argument_that_it_does_not_take_is_said() -> None:
    with pytest.raises(UserError, match="Cannot create the optimizer adamw: .*colour"):
        create_optimizer(TrainConfig(opt="adamw", opt_kwargs={"colour": 1}), nn.Linear(2, 2), images_per_update=1)
