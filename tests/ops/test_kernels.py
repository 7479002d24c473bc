"""The kernels against float64, on a GPU and in Triton's interpreter (TRITON_INTERPRET=1, see test_ops.py)."""

import copy
import os
from collections.abc import Callable

import pytest
import timm
import torch
from golden_vectors import draw, fill, read
from hypothesis import given, settings
from hypothesis import strategies as st

from vip import ops, optimize_for_inference

kernels = pytest.importorskip("vip.ops.kernels", reason="no Triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="neither GPU nor interpreter")
]
pytestmark += [] if INTERPRETED else [pytest.mark.gpu]
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
# the interpreter multiplies no bfloat16; on a GPU float32 is torch's
ERRORS = {torch.float32: 1e-6, torch.float16: 1e-3} if INTERPRETED else {torch.float16: 1e-3, torch.bfloat16: 8e-3}
DTYPE = next(iter(ERRORS))


def textbook(x: torch.Tensor, weight: torch.Tensor, axis: int) -> torch.Tensor:
    line, other = "hw" if axis == 1 else "wh"
    matrix = weight.reshape(x.shape[axis], x.shape[4], x.shape[axis], x.shape[4])
    sizes = f"b{line}{other}ns" if axis == 1 else f"b{other}{line}ns"
    return torch.einsum(f"{sizes},kt{line}s->{sizes.replace(line, 'k').replace('s', 't')}", x, matrix)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).nan_to_num().item()  # 0 / 0 is of nothing


def without_kernels(compute: Callable[[], torch.Tensor]) -> torch.Tensor:
    ops.set_kernels(False)
    try:
        return compute()
    finally:
        ops.set_kernels(None)


def check(shape: tuple[int, ...], axis: int, dtype: torch.dtype, seed: int = 0) -> None:
    torch.manual_seed(seed)
    size = shape[axis] * shape[4]
    x = torch.randn(shape, device=DEVICE).to(dtype).requires_grad_()
    weight = (torch.randn(size, size, device=DEVICE) / size**0.5).to(dtype).requires_grad_()
    grad = torch.randn(shape, device=DEVICE).to(dtype)
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = textbook(*exact, axis)
    mixed = kernels.axis_mix(x, weight, axis)
    assert mixed.dtype == dtype and mixed.is_contiguous()
    mixed.backward(grad)
    expected.backward(grad.double())
    for found, wanted in ((mixed.detach(), expected.detach()), (x.grad, exact[0].grad), (weight.grad, exact[1].grad)):
        # a sum of few products may be small beside them
        assert relative_error(found, wanted) < ERRORS[dtype] or (found.double() - wanted).norm() < ERRORS[dtype]


def check_add(shape: tuple[int, ...], axis: int, dtype: torch.dtype, base_scaled: bool, seed: int = 0) -> None:
    torch.manual_seed(seed)
    size, per_channel = shape[axis] * shape[4], (shape[0], 1, 1, *shape[3:])
    weight = torch.randn(size, size, device=DEVICE) / size**0.5
    tensors = [
        torch.randn(shape, device=DEVICE),
        weight,
        *(torch.randn(s, device=DEVICE) for s in (per_channel, shape)),
    ]
    tensors += [torch.randn(per_channel, device=DEVICE)] if base_scaled else []
    own = [t.to(dtype).requires_grad_() for t in tensors]
    exact = [t.detach().double().requires_grad_() for t in own]
    grad = torch.randn(shape, device=DEVICE).to(dtype)
    found = kernels.axis_mix_add(own[0], own[1], axis, *own[2:])
    expected = exact[2] * textbook(exact[0], exact[1], axis) + exact[3] * (exact[4] if base_scaled else 1)
    assert found.dtype == dtype and found.is_contiguous()
    pairs = [(found.detach(), expected.detach())]
    found.backward(grad)
    expected.backward(grad.double())
    pairs += [(a.grad, b.grad) for a, b in zip(own, exact, strict=True)]
    for one, other in pairs:
        allowed = 2 * ERRORS[dtype]  # of gradients, which pass through what is rounded between two products
        assert relative_error(one, other) < allowed or (one.double() - other).norm() < allowed


SHAPES = [
    (2, 32, 32, 2, 6),
    (1, 16, 16, 16, 24),
    (1, 32, 32, 2, 8),
    (1, 16, 16, 2, 32),
    (3, 7, 10, 5, 4),
    (2, 1, 3, 1, 2),
]


@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_mixes_as_the_textbook(shape: tuple[int, ...], axis: int, dtype: torch.dtype) -> None:
    check(shape, axis, dtype)


@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize("base_scaled", [True, False])
@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_adds_as_the_textbook(shape: tuple[int, ...], axis: int, base_scaled: bool, dtype: torch.dtype) -> None:
    check_add(shape, axis, dtype, base_scaled)


sizes = st.integers(1, 9)


@settings(deadline=None, max_examples=40)
@given(st.tuples(st.integers(0, 5), sizes, sizes, sizes, sizes), st.sampled_from([1, 2]), sizes, st.booleans())
def test_of_any_shape(shape: tuple[int, ...], axis: int, seed: int, base_scaled: bool) -> None:
    check(shape, axis, DTYPE, seed)
    check_add(shape, axis, DTYPE, base_scaled, seed)


@pytest.mark.parametrize("dtype", [dtype for dtype in ERRORS if dtype.itemsize == 2])
def test_a_sum_is_rounded_once(dtype: torch.dtype) -> None:
    """What is added errs like float64's result in 16 bits; mixing, scaling and adding one after another err more."""
    torch.manual_seed(0)
    x, base = (torch.randn(2, 8, 8, 4, 8, device=DEVICE).to(dtype) for _ in range(2))
    scale, base_scale = (torch.rand(2, 1, 1, 4, 8, device=DEVICE).to(dtype) for _ in range(2))
    weight = (torch.randn(64, 64, device=DEVICE) / 8).to(dtype)
    exact = base_scale.double() * base.double() + scale.double() * textbook(x.double(), weight.double(), 1)
    steps = torch.addcmul(base * base_scale, kernels.axis_mix(x, weight, 1), scale)
    at_once = kernels.axis_mix_add(x, weight, 1, scale, base, base_scale)
    assert relative_error(at_once, exact) < 1.02 * relative_error(exact.to(dtype), exact) < relative_error(steps, exact)


def test_many_rows_are_summed_in_parts() -> None:
    """The gradient of a weight is a sum over rows, which several programs share."""
    check((5, 4, 37, 5, 2), 1, DTYPE)
    assert 5 * 37 * 5 > 2 * 64


def test_is_the_same_to_the_bit_again() -> None:
    x = torch.randn(2, 8, 8, 4, 6, device=DEVICE).half()
    weight = torch.randn(48, 48, device=DEVICE).half()
    scale = torch.randn(2, 1, 1, 4, 6, device=DEVICE).half()
    first, *others = (
        (
            kernels.axis_mix(x, weight, 1),
            kernels.axis_mix_add(x, weight, 1, scale, x, scale),
            kernels.axis_mix_weight_grad(x, x, 1),
        )
        for _ in range(3)
    )
    assert all(torch.equal(own, again) for other in others for own, again in zip(first, other, strict=True))


def test_of_any_memory_layout() -> None:
    x = torch.randn(2, 6, 4, 3, 5, device=DEVICE, dtype=DTYPE).permute(0, 2, 4, 1, 3)
    weight = torch.randn(12, 12, device=DEVICE, dtype=DTYPE).t()
    error = relative_error(kernels.axis_mix(x, weight, 1), textbook(x.double(), weight.double(), 1))
    assert not x.is_contiguous() and not weight.is_contiguous() and error < ERRORS[DTYPE]
    scale, base_scale = torch.randn(2, 1, 1, *x.shape[3:], 2, device=DEVICE, dtype=DTYPE).unbind(-1)
    added = kernels.axis_mix_add(x, weight, 1, scale, x, base_scale)
    exact = textbook(x.double(), weight.double(), 1) * scale.double() + x.double() * base_scale.double()
    assert not scale.is_contiguous() and relative_error(added, exact) < ERRORS[DTYPE]


@pytest.mark.parametrize("weight", [(8, 6), (10, 10), (16,)])
def test_refuses_a_weight_of_another_size(weight: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"8 x 8.*height of 4 and segments of 2"):
        kernels.axis_mix(torch.empty(1, 4, 5, 3, 2, device=DEVICE), torch.empty(weight, device=DEVICE), 1)


def test_refuses_another_type_and_another_axis() -> None:
    x = torch.empty(1, 4, 4, 3, 2, device=DEVICE)
    with pytest.raises(ValueError, match=r"torch.float64, expected 8 x 8 .* in torch.float32"):
        kernels.axis_mix(x, torch.empty(8, 8, device=DEVICE).double(), 1)
    for axis, other in ((0, x), (3, x), (1, x[0])):
        with pytest.raises(ValueError, match=r"expected 1 \(height\) or 2 \(width\)"):
            kernels.axis_mix(other, torch.empty(8, 8, device=DEVICE), axis)


def test_refuses_what_does_not_fit_to_be_added() -> None:
    x, weight = torch.empty(2, 4, 4, 3, 2, device=DEVICE), torch.empty(8, 8, device=DEVICE)
    scale = torch.empty(2, 1, 1, 3, 2, device=DEVICE)
    with pytest.raises(ValueError, match=r"scale is \[1, 1, 1, 3, 2\] in torch.float32, expected \[2, 1, 1, 3, 2\]"):
        kernels.axis_mix_add(x, weight, 1, scale[:1], x)
    with pytest.raises(ValueError, match=r"base is \[2, 4, 4, 3, 2\] in torch.float64, .* in torch.float32"):
        kernels.axis_mix_add(x, weight, 1, scale, x.double())
    with pytest.raises(ValueError, match=r"base_scale is \[2, 3, 2\]"):
        kernels.axis_mix_add(x, weight, 1, scale, x, scale[:, 0, 0])
    with pytest.raises(ValueError, match=r"expected 8 x 8"):
        kernels.axis_mix_add(x, weight[:6, :6], 1, scale, x)


@pytest.mark.parametrize("axis", [1, 2])
def test_gradients_of_gradients(axis: int) -> None:
    """As optimizers of second order take them: a Hessian times a vector, against autograd's in float64."""
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 3, 2, 2, device=DEVICE), torch.randn(6, 6, device=DEVICE)
    found = []
    for mix, dtype in ((kernels.axis_mix, DTYPE), (textbook, torch.float64)):
        own = [t.to(dtype).requires_grad_() for t in (x, weight)]
        first = torch.autograd.grad(mix(*own, axis).pow(2).sum(), own, create_graph=True)
        found.append(torch.autograd.grad(sum(grad.pow(2).sum() for grad in first), own))
    for own, other in zip(*found, strict=True):
        assert relative_error(own, other) < 5 * ERRORS[DTYPE]


def test_only_what_needs_a_gradient_gets_one() -> None:
    x = torch.randn(1, 2, 2, 1, 2, device=DEVICE, dtype=DTYPE)
    weight = torch.randn(4, 4, device=DEVICE, dtype=DTYPE, requires_grad=True)
    (grad,) = torch.autograd.grad(kernels.axis_mix(x, weight, 2).sum(), weight)
    assert grad.shape == weight.shape and x.grad is None
    with torch.no_grad():
        assert not kernels.axis_mix(x, weight, 2).requires_grad
    base = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(kernels.axis_mix_add(x, weight.detach(), 2, x[:, :1, :1], base).sum(), base)
    assert torch.equal(grad, torch.ones_like(base)) and weight.grad is None


def test_is_a_good_operator() -> None:
    x = torch.randn(2, 4, 3, 2, 2, device=DEVICE, dtype=DTYPE, requires_grad=True)
    weight = torch.randn(8, 8, device=DEVICE, dtype=DTYPE, requires_grad=True)
    checks = ("test_schema", "test_autograd_registration") + (() if INTERPRETED else ("test_faketensor",))
    torch.library.opcheck(kernels.axis_mix, (x, weight, 1), test_utils=checks)
    scale = torch.randn(2, 1, 1, 2, 2, device=DEVICE, dtype=DTYPE, requires_grad=True)
    for base_scale in (scale, None):
        torch.library.opcheck(kernels.axis_mix_add, (x, weight, 1, scale, x, base_scale), test_utils=checks)
    torch.library.opcheck(kernels.axis_mix_weight_grad, (x.detach(), x.detach(), 1), test_utils=checks)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the operators that mix, as they are called."""
    names: list[str] = []
    for name in ("axis_mix", "axis_mix_add"):
        own = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *args, name=name, own=own: names.append(name) or own(*args))
    return names


@pytest.mark.skipif(not INTERPRETED, reason="float32")
@pytest.mark.parametrize("learned", ["", "network.0.0.attn.mlp_w", "network.0.0.attn.mlp_c", "attn.reweight", "head"])
def test_models_compute_what_they_did(learned: str, called: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients of a model, the kernels in every block; they add where no branch needs a gradient."""
    torch.manual_seed(0)
    model = timm.create_model("vip_nano4_32", num_classes=5).to(DEVICE)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(learned in name)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    images, labels = torch.randn(2, 3, 32, 32, device=DEVICE), torch.tensor([1, 2], device=DEVICE)
    found, calls = [], []
    for own in (False, True):
        monkeypatch.setattr(ops, "use_kernels", lambda x, own=own: own)
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        calls.append(called.copy())
        found.append([loss, *torch.autograd.grad(loss, parameters)])
    blocks = sum(len(stage) for stage in model.network if isinstance(stage, torch.nn.Sequential))
    assert calls == [[], 2 * blocks * ["axis_mix_add" if learned == "head" else "axis_mix"]]
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(not INTERPRETED, reason="float32")
def test_golden_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    model = timm.create_model("vip_s7").double().eval()
    fill(model)
    model = model.float().to(DEVICE)
    monkeypatch.setattr(ops, "use_kernels", lambda x: True)
    with torch.no_grad():
        logits = model(draw("input", (2, 3, 224, 224)).float().to(DEVICE))
    expected = torch.tensor(read("vip_s7")["logits_first16"], device=DEVICE)
    torch.testing.assert_close(logits[:, :16], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(INTERPRETED, reason="autocast and torch.compile of a GPU")
@pytest.mark.parametrize("dtype", ops.HALVES)
@pytest.mark.parametrize("compiled", [False, True])
def test_training_step_on_a_gpu(compiled: bool, dtype: torch.dtype) -> None:
    """Under autocast the kernels are chosen by themselves, and err no more than torch does."""
    torch.manual_seed(0)
    model = timm.create_model("vip_s7").to(DEVICE)
    images, labels = torch.randn(4, 3, 224, 224, device=DEVICE), torch.arange(4, device=DEVICE)
    parameters = list(model.parameters())
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**12, enabled=dtype == torch.float16)

    def gradients(model: torch.nn.Module, **autocast: object) -> torch.Tensor:
        with torch.autocast(DEVICE.type, dtype, **autocast):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
        scaled = torch.autograd.grad(scaler.scale(loss), parameters)
        return torch.cat([grad.flatten().double() for grad in scaled]) / scaler.get_scale()

    exact = gradients(model, enabled=False)
    plain = relative_error(without_kernels(lambda: gradients(model)), exact)
    assert ops.use_kernels(torch.empty(1, 2, 2, 2, 2, device=DEVICE, dtype=dtype))
    own = relative_error(gradients(torch.compile(model) if compiled else model), exact)
    assert 0 < own < 1.2 * plain < 0.2


@pytest.mark.skipif(INTERPRETED, reason="torch.compile and torch.export of a GPU")
@pytest.mark.parametrize("dtype", ops.HALVES)
@pytest.mark.parametrize("ready", ["optimized", "compiled", "exported"])
def test_inference_on_a_gpu(ready: str, dtype: torch.dtype) -> None:
    """What is made ready for inference keeps the kernels, and errs no more than the model does in torch."""
    torch.manual_seed(0)
    model = timm.create_model("vip_s7").to(DEVICE).eval()
    images = torch.randn(4, 3, 224, 224, device=DEVICE)
    with torch.inference_mode():
        exact = model(images).double()
        halved = copy.deepcopy(model).to(dtype)
        plain = relative_error(without_kernels(lambda: halved(images.to(dtype))), exact)
    own: Callable[..., torch.Tensor] = optimize_for_inference(model, dtype, compiled=ready == "compiled")
    if ready == "exported":
        program = torch.export.export(own, (images.to(dtype),))
        assert "vip.axis_mix_add.default" in {str(node.target) for node in program.graph.nodes}
        own = program.module()
    with torch.inference_mode():
        assert relative_error(own(images.to(dtype)), exact) < 1.2 * plain < 0.1
