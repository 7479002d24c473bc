"""Models that get ready: what their steps do, in which precision and layout, and what is tried when memory is short."""

import gc
import logging
import weakref
from typing import Any

import pytest
import torch

from vip.benchmark import contenders
from vip.benchmark.config import BenchmarkConfig
from vip.benchmark.contenders import Case, Contender, prepare
from vip.benchmark.counts import Counts
from vip.errors import UserError

CPU = torch.device("cpu")
SMALL = dict(warmup=1, device="cpu")
PARAMS = 984136  # of vip_nano4_32, see test_counts


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models that `prepare` makes, which remember what goes in and comes out of them."""
    models: list[Any] = []
    create = contenders.create_model

    def create_model(*args: Any) -> Any:
        model: Any = create(*args)
        model.seen = []
        model.initial = {name: value.clone() for name, value in model.state_dict().items()}

        def remember(module: Any, inputs: Any, output: torch.Tensor) -> None:
            if not output.is_meta:
                model.seen.append((inputs[0], output.detach(), module.training))

        model.register_forward_hook(remember)
        models.append(model)
        return model

    monkeypatch.setattr(contenders, "create_model", create_model)
    return models


def changed(model: Any) -> bool:
    now = model.state_dict()
    return any(not torch.equal(now[name], value) for name, value in model.initial.items())


# --- memory that does not suffice


def fake(monkeypatch: pytest.MonkeyPatch, fits: int, error: Exception) -> list[int]:
    tried: list[int] = []

    def _prepare(case: Case, batch_size: int, *args: Any) -> Contender:
        tried.append(batch_size)
        if batch_size > fits:
            raise error
        return Contender(lambda: None, Counts(1, 1, 1), (3, 8, 8), batch_size, None, 0.1)

    monkeypatch.setattr(contenders, "_prepare", _prepare)
    monkeypatch.setattr(contenders, "free_memory", lambda device: None)  # there is nothing to free, slowly
    return tried


SHORT = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 8 bytes.\nmore"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
    MemoryError(),
]


@pytest.mark.parametrize("error", SHORT)
@pytest.mark.parametrize("batch, fits, tries", [(32, 4, [32, 16, 8, 4]), (7, 2, [7, 3, 1]), (4, 4, [4]), (1, 1, [1])])
def test_batches_are_halved(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    batch: int,
    fits: int,
    tries: list[int],
) -> None:
    caplog.set_level(logging.WARNING)
    tried = fake(monkeypatch, fits, error)
    contender = prepare(Case("vip_s7", None, batch), "train", BenchmarkConfig(), CPU)
    assert tried == tries and contender.batch_size == tries[-1]
    assert caplog.messages == [f"vip_s7: out of memory in train, trying a batch of {size}." for size in tries[1:]]


@pytest.mark.parametrize("error", SHORT)
def test_not_even_one_image(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    tried = fake(monkeypatch, 0, error)
    with pytest.raises(UserError, match="^vip_s7 does not fit into memory with a batch of one: .") as caught:
        prepare(Case("vip_s7", None, 6), "train", BenchmarkConfig(), CPU)
    assert tried == [6, 3, 1] and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("no"), UserError("No model is called x.")])
def test_other_errors_are_not_mistaken(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    tried = fake(monkeypatch, 1, error)
    with pytest.raises(type(error)) as caught:
        prepare(Case("vip_s7", None, 8), "train", BenchmarkConfig(), CPU)
    assert caught.value is error and tried == [8]


def test_memory_of_an_attempt_is_free_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error holds the frames in which it was raised, and models refer to themselves in circles."""
    alive: list[Any] = []

    def _prepare(case: Case, batch_size: int, *args: Any) -> Contender:
        assert not any(ref() is not None for ref in alive), "the failed attempt is still there"
        images = torch.empty(batch_size)
        circle: list[Any] = [images]
        circle.append(circle)
        alive.append(weakref.ref(images))
        if batch_size > 1:
            raise torch.OutOfMemoryError("out of memory")
        return Contender(lambda: None, Counts(1, 1, 1), (3, 8, 8), batch_size, None, 0.1)

    monkeypatch.setattr(contenders, "_prepare", _prepare)
    gc.disable()
    try:
        prepare(Case("vip_s7", None, 8), "train", BenchmarkConfig(), CPU)
    finally:
        gc.enable()
    assert len(alive) == 4


# --- steps


def test_inference(made: list[Any]) -> None:
    contender = prepare(Case("vip_nano4_32", None, 3), "inference", BenchmarkConfig(**SMALL), CPU)
    (model,) = made
    before = len(model.seen)
    contender.step()
    assert len(model.seen) == before + 1
    images, output, training = model.seen[-1]
    assert images.shape == (3, 3, 32, 32) and output.shape == (3, 1000) and not training
    assert output.is_inference() and not changed(model)
    assert all(p.grad is None for p in model.parameters())
    assert (contender.input_size, contender.batch_size, contender.counts.params) == ((3, 32, 32), 3, PARAMS)
    # weights, and of what the layers put out a few at a time
    assert 4 * PARAMS < contender.memory < 4 * PARAMS + 3 * 4 * contender.counts.activations
    assert contender.first_seconds > 0


@pytest.mark.parametrize("opt, copies", [("momentum", 3), ("adamw", 4)])
def test_training(made: list[Any], opt: str, copies: int) -> None:
    """Weights, their gradients and what the optimizer keeps are there at a time, and what the backward pass needs."""
    contender = prepare(Case("vip_nano4_32", None, 2), "train", BenchmarkConfig(**SMALL, opt=opt), CPU)
    (model,) = made
    assert changed(model)
    model.initial = {name: value.clone() for name, value in model.state_dict().items()}
    contender.step()
    assert changed(model) and model.seen[-1][2]
    assert contender.memory > 4 * PARAMS * copies
    assert contender.memory < 4 * PARAMS * (copies + 1) + 2 * 4 * 6 * contender.counts.activations


def test_memory_grows_with_the_batch() -> None:
    """By the same for each further image, once activations and not the optimizer's step make the peak."""
    config = BenchmarkConfig(**SMALL)
    few, more, most = (prepare(Case("vip_nano4_32", None, n), "train", config, CPU).memory for n in (16, 20, 28))
    assert 0 < more - few and most - more == pytest.approx(2 * (more - few), rel=0.05)


def test_image_sizes_and_models_that_do_not_take_them() -> None:
    config = BenchmarkConfig(**SMALL)
    own, large = (prepare(Case("vip_nano4_32", size, 1), "inference", config, CPU) for size in (None, 64))
    assert own.input_size == (3, 32, 32) and large.input_size == (3, 64, 64)
    assert large.counts.macs > 3 * own.counts.macs
    with pytest.raises(UserError, match="33 does not work.*32 and 40"):
        prepare(Case("vip_nano4_32", 33, 1), "inference", config, CPU)
    with pytest.raises(UserError, match="nosuch"):
        prepare(Case("nosuch", None, 1), "inference", config, CPU)


def test_seed(made: list[Any]) -> None:
    for seed in (1, 1, 2):
        prepare(Case("vip_nano4_32", None, 1), "inference", BenchmarkConfig(**SMALL, seed=seed), CPU)
    weights = [model.initial["head.weight"] for model in made]
    images = [model.seen[0][0] for model in made]
    for values in (weights, images):
        assert torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])


@pytest.mark.parametrize("warmup", [1, 4])
def test_warm_up(made: list[Any], warmup: int) -> None:
    config = BenchmarkConfig(device="cpu", warmup=warmup)
    prepare(Case("vip_nano4_32", None, 1), "inference", config, CPU)
    assert len(made[0].seen) == warmup + 1  # one step is watched for its memory


# --- precision, layout, compilation


def test_bfloat16_inference(made: list[Any]) -> None:
    whole, half = (
        prepare(Case("vip_nano4_32", None, 2), "inference", BenchmarkConfig(**SMALL, precision=p), CPU)
        for p in ("float32", "bfloat16")
    )
    model = made[1]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    images, output, _ = model.seen[-1]
    assert images.dtype == output.dtype == torch.bfloat16
    assert 0.4 < half.memory / whole.memory < 0.7
    expected = made[0].seen[-1][1]
    assert (output.float() - expected).abs().max() < 0.05 * expected.abs().max() + 0.02
    assert half.counts == whole.counts


def test_bfloat16_training(made: list[Any]) -> None:
    prepare(Case("vip_nano4_32", None, 2), "train", BenchmarkConfig(**SMALL, precision="bfloat16"), CPU)
    (model,) = made
    assert {p.dtype for p in model.parameters()} == {torch.float32} and changed(model)
    images, output, _ = model.seen[-1]
    assert images.dtype == torch.float32 and output.dtype == torch.bfloat16


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_takes_the_attention_that_the_command_takes(made: list[Any], precision: str) -> None:
    prepare(Case("lvvit_nano4_32", None, 2), "train", BenchmarkConfig(**SMALL, precision=precision), CPU)
    assert all(block.attn.fused_attn == (precision == "float32") for block in made[0].blocks)


def test_float32_training_is_not_mixed(made: list[Any]) -> None:
    prepare(Case("vip_nano4_32", None, 2), "train", BenchmarkConfig(**SMALL), CPU)
    assert made[0].seen[-1][1].dtype == torch.float32


@pytest.mark.parametrize("phase", ["inference", "train"])
def test_channels_last(made: list[Any], phase: str) -> None:
    for channels_last in (False, True):
        config = BenchmarkConfig(**SMALL, channels_last=channels_last)
        prepare(Case("test_resnet", 32, 2), phase, config, CPU)
    for model, expected in zip(made, (False, True), strict=True):
        images = model.seen[-1][0]
        weight = next(p for p in model.parameters() if p.ndim == 4 and min(p.shape) > 1)
        for tensor in (images, weight):
            assert tensor.is_contiguous(memory_format=torch.channels_last) == expected


@pytest.mark.parametrize("phase, backend", [("inference", "aot_eager"), ("train", "eager")])
def test_compiled(phase: str, backend: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    case = Case("vip_nano4_32", None, 2)
    contender = prepare(case, phase, BenchmarkConfig(**SMALL, torchcompile=backend), CPU)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    torch._dynamo.utils.counters.clear()
    contender.step()
    assert not torch._dynamo.utils.counters["stats"], "it compiles again after the warm-up"
    plain = prepare(case, phase, BenchmarkConfig(**SMALL), CPU)
    assert contender.counts == plain.counts
    assert contender.memory == pytest.approx(plain.memory, rel=0.2)
