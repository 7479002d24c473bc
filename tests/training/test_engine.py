"""The loops against sums written out."""

import math

import pytest
import torch
import torch.nn.functional as F
from timm.task import ClassificationTask
from torch import nn

from vip.errors import UserError
from vip.training.config import TrainConfig
from vip.training.engine import LossLog, TrainState, evaluate, train_one_epoch, train_step
from vip.training.runtime import Precision, Runtime, setup_precision

CPU = Runtime(torch.device("cpu"))
FLOAT32 = setup_precision(TrainConfig(), CPU.device)


class Silent:
    def update(self, images: int, **values: float) -> None:
        self.values = values

    def wants_values(self, batch: int) -> bool:
        return False


def linear_state(precision: Precision = FLOAT32, lr: float = 0.1, **task_options: object) -> TrainState:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    task = ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)
    return TrainState(task, torch.optim.SGD(model.parameters(), lr=lr), None, precision)


def batches(count: int, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 3, 2, 2, generator=generator), torch.randint(3, (size,), generator=generator))
        for _ in range(count)
    ]


def weights_after(data: list, **config: object) -> torch.Tensor:
    state = linear_state()
    train_one_epoch(state, data, TrainConfig(**config), CPU, Silent())
    return state.task.trainable_module[1].weight.detach().clone()


def test_accumulated_batches_equal_one_large_batch():
    small = batches(6, 4)
    pairs = [(torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]])) for a, b in zip(small[::2], small[1::2], strict=True)]
    torch.testing.assert_close(weights_after(small, grad_accum_steps=2), weights_after(pairs))


def test_last_update_of_an_epoch_averages_the_batches_it_has():
    data = batches(5, 4)
    four = (torch.cat([x for x, _ in data[:4]]), torch.cat([y for _, y in data[:4]]))
    torch.testing.assert_close(weights_after(data, grad_accum_steps=4), weights_after([four, data[4]]))


def test_only_the_last_accumulated_batch_synchronizes(monkeypatch: pytest.MonkeyPatch):
    state = linear_state()
    entered: list[int] = []

    class NoSync:
        def __enter__(self) -> None:
            entered.append(1)

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(state.task, "no_sync", NoSync)
    train_one_epoch(state, batches(7, 2), TrainConfig(grad_accum_steps=3), CPU, Silent())
    assert len(entered) == 4  # two of each full group of three, none of the last group of one
    assert state.updates == 3


@pytest.mark.parametrize("mode", ["norm", "value", "agc"])
def test_clipping_limits_what_it_says(mode: str):
    state = linear_state()
    image, target = batches(1, 8)[0]
    model = state.task.trainable_module
    before = [p.detach().clone() for p in model.parameters()]
    F.cross_entropy(model(image * 100), target).backward()
    raw = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    train_step(state, TrainConfig(clip_grad=0.01, clip_mode=mode), image * 100, target, 1.0, True)
    steps = [(b - p.detach()) / 0.1 for b, p in zip(before, model.parameters(), strict=True)]
    if mode == "norm":
        assert math.isclose(torch.cat([s.flatten() for s in steps]).norm().item(), 0.01, rel_tol=1e-3)
    elif mode == "value":
        assert max(s.abs().max().item() for s in steps) <= 0.01 + 1e-6
    else:  # AGC leaves the head alone, and this model is nothing but a head
        torch.testing.assert_close(steps, raw, rtol=1e-4, atol=1e-5)


def test_loss_of_an_epoch_is_the_mean_of_its_batches():
    data = batches(5, 4)
    state = linear_state(lr=0.0)
    model = state.task.trainable_module
    expected = sum(F.cross_entropy(model(x), y).item() for x, y in data) / 5
    metrics = train_one_epoch(state, data, TrainConfig(log_interval=2), CPU, Silent())
    assert math.isclose(metrics["loss"], expected, rel_tol=1e-6)


def test_loss_that_is_not_finite_stops_with_batch_rate_and_scale():
    data = batches(6, 4)
    data[3] = (data[3][0] * math.inf, data[3][1])
    with pytest.raises(UserError, match=r"nan in epoch 0 at batch 4 .*rate 0\.1.*earlier checkpoints are intact"):
        train_one_epoch(linear_state(), data, TrainConfig(log_interval=5), CPU, Silent())
    log = LossLog(CPU, 7)
    log.add(torch.tensor(math.inf), 0.5)
    with pytest.raises(UserError, match="inf in epoch 7 at batch 1 .*loss scale 1024"):
        log.read(1024.0)


def test_float16_scales_the_loss_and_skips_an_overflowing_step():
    precision = setup_precision(TrainConfig(apex_amp=True), CPU.device)
    state = linear_state(precision)
    weight = state.task.trainable_module[1].weight
    before, scale = weight.detach().clone(), precision.loss_scale
    image, target = batches(1, 4)[0]
    train_step(state, TrainConfig(), image * 1e4, target, 1.0, True)  # gradients times 65536 overflow float16
    assert precision.loss_scale is not None and scale is not None and precision.loss_scale <= scale
    if precision.loss_scale < scale:
        torch.testing.assert_close(weight.detach(), before)
    for _ in range(20):
        train_step(state, TrainConfig(), image, target, 1.0, True)
    assert not torch.equal(weight.detach(), before)
    assert weight.isfinite().all()


def test_average_of_the_weights_follows_every_update():
    state = linear_state()
    state.task.setup_ema(decay=0.5)
    weight = state.task.trainable_module[1].weight
    average = weight.detach().clone()
    data = batches(4, 4)
    for i, (image, target) in enumerate(data):
        train_step(state, TrainConfig(), image, target, 1.0, True)
        # timm counts from the first update, which sets the average to the weights
        average = weight.detach().clone() if i == 0 else 0.5 * average + 0.5 * weight.detach()
    torch.testing.assert_close(state.task.get_trainable_module(ema=True).module[1].weight, average)


class Fixed(nn.Module):
    """Answers with logits that are the image's first pixels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)[:, :7]


def test_evaluation_counts_as_a_loop_over_images_would():
    generator = torch.Generator().manual_seed(2)
    images, target = torch.randn(23, 3, 2, 2, generator=generator), torch.randint(7, (23,), generator=generator)
    loader = list(zip(images.split(5), target.split(5), strict=True))
    metrics = evaluate(Fixed(), loader, CPU, FLOAT32, Silent())
    order = [row.flatten()[:7].argsort(descending=True).tolist() for row in images]
    assert metrics.count == 23
    assert metrics.correct1 == sum(o[0] == t for o, t in zip(order, target.tolist(), strict=True))
    assert metrics.correct5 == sum(t in o[:5] for o, t in zip(order, target.tolist(), strict=True))
    assert math.isclose(metrics.loss, F.cross_entropy(images.flatten(1)[:, :7], target).item(), rel_tol=1e-6)
    assert math.isclose(metrics.top1, 100 * metrics.correct1 / 23)


class InPlace(nn.Module):
    """Writes over what it gave, as what is compiled with CUDA graphs does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.given = model, torch.empty(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.given.copy_(self.model(x))


def test_evaluation_averages_an_image_and_its_mirror_image():
    x = torch.randn(4, 3, 8, 8)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    seen: list[torch.Tensor] = []
    evaluate(
        InPlace(model),
        [(x, torch.zeros(4, dtype=torch.long))],
        CPU,
        FLOAT32,
        Silent(),
        tta=2,
        on_output=lambda o, _: seen.append(o),
    )
    torch.testing.assert_close(seen[0], (model(x) + model(x.flip(-1))) / 2)


def test_evaluation_skips_empty_batches_and_keeps_a_subset_of_labels():
    x, y = torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 1, 0])
    empty = (torch.empty(0, 3, 2, 2), torch.empty(0, dtype=torch.long))
    metrics = evaluate(Fixed(), [empty, (x, y)], CPU, FLOAT32, Silent(), label_subset=torch.tensor([2, 5]))
    expected = (x.flatten(1)[:, [2, 5]].argmax(1) == y).sum().item()
    assert (metrics.count, metrics.correct1, metrics.correct5) == (4, expected, 4)


def test_a_step_reads_nothing_back_from_the_device(monkeypatch: pytest.MonkeyPatch):
    """Between log lines no value may travel to the host, or a GPU would wait at every step."""
    reads: list[str] = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *a, _f=original, _n=name: (reads.append(_n), _f(self, *a))[1]
        )
    state = linear_state()
    train_one_epoch(state, batches(9, 4), TrainConfig(log_interval=10), CPU, Silent())
    assert reads == ["tolist"]  # the losses of the epoch, at its end
