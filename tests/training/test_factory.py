"""Optimizers against their textbook, and what models are created with."""

from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import is_fast_norm
from timm.task import ClassificationTask
from torch import nn

import vip  # noqa: F401  # registers the models
from vip.errors import UserError
from vip.training.config import TrainConfig
from vip.training.factory import choose_attention, compile_task, create_model, create_optimizer
from vip.training.resume import _taking_its_own_steps


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


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("own", [{}, {"fused": False}])
@pytest.mark.parametrize("saved", [{}, {"fused": False}])
def test_a_resumed_optimizer_steps_as_it_was_made_to(saved: dict, own: dict, scaled: bool) -> None:
    """Whatever the saved one did: a loss scale finds out what an optimizer can when it is made."""
    torch.manual_seed(0)
    models = [nn.Linear(3, 2) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    first, second = (
        create_optimizer(TrainConfig(opt="adamw", opt_kwargs=kwargs), model, images_per_update=1)
        for kwargs, model in zip((saved, own), models, strict=True)
    )
    images = torch.randn(4, 3)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        scaler = torch.amp.GradScaler("cpu", enabled=scaled)
        optimizer.zero_grad()
        scaler.scale(model(images).pow(2).sum()).backward()
        scaler.step(optimizer)

    step(models[0], first)
    models[1].load_state_dict(models[0].state_dict())
    second.load_state_dict(_taking_its_own_steps(first.state_dict(), second))
    assert [group["fused"] for group in second.param_groups] == [own.get("fused", True)] * 2
    for model, optimizer in ((models[0], first), (models[1], second)):
        step(model, optimizer)
    torch.testing.assert_close(models[1].state_dict(), models[0].state_dict())


def test_memory_budget_is_kept_and_changes_no_gradient() -> None:
    """By the bytes that autograd holds between the passes, which is what recomputing is to spare."""
    backend = "aot_eager_decomp_partition"  # inductor's partitioner without its compiler, which takes minutes
    x, target = torch.randn(32, 3, 32, 32), torch.randn(32, 10)
    kept, gradients = [], []
    for budget in (None, 0.3):
        torch._dynamo.reset()
        torch.manual_seed(0)
        task = ClassificationTask(timm.create_model("vip_nano4_32", num_classes=10), nn.MSELoss(), verbose=False)
        compile_task(task, SimpleNamespace(torchcompile=backend, torchcompile_mode=None, memory_budget=budget))
        held: dict[int, int] = {}

        def hold(tensor: torch.Tensor, held: dict[int, int] = held) -> torch.Tensor:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            loss = task(x, target)["loss"]
        loss.backward()
        weights = sum(p.nbytes for p in task.parameters())
        kept.append(sum(held.values()) - weights)
        gradients.append([p.grad for p in task.parameters()])
    assert 0 < kept[1] < 0.6 * kept[0]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


def test_low_precision_norms_are_of_the_models_that_ask_for_them() -> None:
    for fast in (True, False):
        create_model(TrainConfig(model="vip_nano4_32", fast_norm=fast), num_classes=10)
        assert is_fast_norm() == fast


@pytest.mark.parametrize(
    ("device", "options", "onednn", "fused", "fused_in_training"),
    [
        ("cpu", {}, False, True, True),
        ("cpu", {}, True, False, False),
        ("cpu", {"amp_dtype": "bfloat16"}, False, True, True),
        ("cpu", {"amp": True}, True, True, True),
        ("cpu", {"amp": True, "amp_dtype": "bfloat16"}, True, True, False),
        ("cpu", {"native_amp": True, "amp_dtype": "bfloat16"}, False, True, False),
        ("cuda", {"amp": True, "amp_dtype": "bfloat16"}, False, True, True),
    ],
)
@pytest.mark.parametrize("name", ["lvvit_nano4_32", "test_vit"])
def test_attention_is_fused_where_that_is_faster(
    name: str,
    device: str,
    options: dict,
    onednn: bool,
    fused: bool,
    fused_in_training: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vip.training.factory.onednn_multiplies", lambda: onednn)
    calls: list[int] = []
    original = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or original(*a, **k))
    model = timm.create_model(name, img_size=32).eval()
    x = torch.randn(1, 3, 32, 32)
    expected = model(x)
    assert calls
    for training, expects in ((False, fused), (True, fused_in_training)):
        calls.clear()
        choose_attention(model, TrainConfig(**options), torch.device(device), training)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
        assert bool(calls) == expects
