"""The kernels against float64, on a GPU and in Triton's interpreter (TRITON_INTERPRET=1, see test_ops.py)."""

import copy
import os
from collections.abc import Callable
from functools import partial

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
# weights of packed lines take more shared memory than some GPUs give a program
PACKS = INTERPRETED or (torch.cuda.is_available() and kernels.use_packed(torch.empty(1, 32, 32, 8, 6, device=DEVICE)))
ERRORS = {torch.float32: 1e-6, torch.float16: 1e-3} if INTERPRETED else {torch.float16: 1e-3, torch.bfloat16: 8e-3}
DTYPE = next(iter(ERRORS))
OF_VIP_S7 = {"axis_mix_add", "line_means"} | ({"pack_lines"} if PACKS else set())
needs_room = pytest.mark.skipif(not PACKS, reason="too little shared memory")
packed_or_not = pytest.mark.parametrize("packed", [False, pytest.param(True, marks=needs_room)])


def textbook(x: torch.Tensor, weight: torch.Tensor, axis: int) -> torch.Tensor:
    line, other = "hw" if axis == 1 else "wh"
    matrix = weight.reshape(x.shape[axis], x.shape[4], x.shape[axis], x.shape[4])
    sizes = f"b{line}{other}ns" if axis == 1 else f"b{other}{line}ns"
    return torch.einsum(f"{sizes},kt{line}s->{sizes.replace(line, 'k').replace('s', 't')}", x, matrix)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    error = (found.double() - expected).norm()
    return (error / expected.norm()).item() if error else 0.0  # of no images, too


def without_kernels(compute: Callable[[], torch.Tensor]) -> torch.Tensor:
    ops.set_kernels(False)
    try:
        return compute()
    finally:
        ops.set_kernels(None)


def other_way(x: torch.Tensor) -> torch.Tensor:
    """Channels `[N, S]` as `[S, N]`, and back."""
    return x.transpose(3, 4).contiguous()


def check_add(
    shape: tuple[int, ...], axis: int, dtype: torch.dtype, base_scaled: bool, packed: bool = False, seed: int = 0
) -> None:
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
    x, matrix, *added = own
    if packed:
        x, added = other_way(x), [other_way(t) for t in added]
    found = kernels.axis_mix_add(x, matrix, axis, *added, *([] if base_scaled else [None]), packed)
    assert found.dtype == dtype and found.is_contiguous()
    found = other_way(found) if packed else found
    expected = exact[2] * textbook(exact[0], exact[1], axis) + exact[3] * (exact[4] if base_scaled else 1)
    pairs = [(found.detach(), expected.detach())]
    found.backward(grad)
    expected.backward(grad.double())
    pairs += [(a.grad, b.grad) for a, b in zip(own, exact, strict=True)]
    for one, other in pairs:
        allowed = 2 * ERRORS[dtype]  # of gradients, which pass through what is rounded between two products
        # a sum of few products may be small beside them
        assert relative_error(one, other) < allowed or (one.double() - other).norm() < allowed


def check_means(shape: tuple[int, ...], dtype: torch.dtype, packed: bool, seed: int = 0) -> None:
    torch.manual_seed(seed)
    x = torch.randn(shape, device=DEVICE).to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    expected = [torch.cat([exact.mean(2), exact.mean(1)], 1).transpose(1, 2), exact.mean((1, 2))]
    expected += [exact.transpose(3, 4)] if packed else []
    found = kernels.pack_lines(x) if packed else kernels.line_means(x)
    for own, wanted in zip(found, expected, strict=True):
        assert own.dtype == dtype and own.is_contiguous() and own.shape == wanted.shape
        assert relative_error(own.detach(), wanted.detach()) < ERRORS[dtype]
    grads = [torch.randn(t.shape, device=DEVICE).to(dtype) for t in found]
    torch.autograd.backward(found, grads)
    torch.autograd.backward(expected, [grad.double() for grad in grads])
    assert relative_error(x.grad, exact.grad) < 2 * ERRORS[dtype]


SHAPES = [
    (2, 32, 32, 2, 6),
    (1, 16, 16, 16, 24),
    (1, 32, 32, 2, 8),
    (1, 16, 16, 2, 32),
    (3, 7, 10, 5, 4),
    (2, 1, 3, 1, 2),
]
PACKED = [(2, 32, 32, 8, 6), (3, 7, 10, 16, 3), (2, 1, 3, 8, 5), (1, 64, 3, 32, 3)]


@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize("base_scaled", [True, False])
@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_adds_as_the_textbook(shape: tuple[int, ...], axis: int, base_scaled: bool, dtype: torch.dtype) -> None:
    check_add(shape, axis, dtype, base_scaled)


@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize("base_scaled", [True, False])
@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("shape", PACKED)
@needs_room
def test_adds_what_is_packed(shape: tuple[int, ...], axis: int, base_scaled: bool, dtype: torch.dtype) -> None:
    assert kernels.use_packed(torch.empty(shape, device=DEVICE))
    check_add(shape, axis, dtype, base_scaled, packed=True)


@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("shape", SHAPES + PACKED)
def test_means(shape: tuple[int, ...], packed: bool, dtype: torch.dtype) -> None:
    check_means(shape, dtype, packed)


sizes = st.integers(1, 9)


@settings(deadline=None, max_examples=40)
@given(st.tuples(st.integers(0, 5), sizes, sizes, sizes, sizes), st.sampled_from([1, 2]), sizes, st.booleans())
def test_of_any_shape(shape: tuple[int, ...], axis: int, seed: int, base_scaled: bool) -> None:
    for packed in (False, True)[: 1 + PACKS]:
        check_add(shape, axis, DTYPE, base_scaled, packed, seed)
        check_means(shape, DTYPE, packed, seed)


@pytest.mark.parametrize("dtype", [dtype for dtype in ERRORS if dtype.itemsize == 2])
@packed_or_not
def test_a_sum_is_rounded_once(packed: bool, dtype: torch.dtype) -> None:
    """What is added errs like float64's result in 16 bits; mixing, scaling and adding one after another err more."""
    torch.manual_seed(0)
    x, base = (torch.randn(2, 8, 8, 8, 8, device=DEVICE).to(dtype) for _ in range(2))
    scale, base_scale = (torch.rand(2, 1, 1, 8, 8, device=DEVICE).to(dtype) for _ in range(2))
    weight = (torch.randn(64, 64, device=DEVICE) / 8).to(dtype)
    mixed = textbook(x.double(), weight.double(), 1)
    exact = base_scale.double() * base.double() + scale.double() * mixed
    steps = torch.addcmul(base * base_scale, mixed.to(dtype), scale)
    added = [other_way(t) if packed else t for t in (x, scale, base, base_scale)]
    at_once = kernels.axis_mix_add(added[0], weight, 1, *added[1:], packed)
    at_once = other_way(at_once) if packed else at_once
    assert relative_error(at_once, exact) < 1.02 * relative_error(exact.to(dtype), exact) < relative_error(steps, exact)


def test_is_the_same_to_the_bit_again() -> None:
    x = torch.randn(2, 8, 8, 8, 6, device=DEVICE).half()
    weight = torch.randn(48, 48, device=DEVICE).half()
    scale = torch.randn(2, 1, 1, 8, 6, device=DEVICE).half()
    packed = [other_way(t) for t in (scale, x, scale)]
    first, *others = (
        (
            kernels.axis_mix_add(x, weight, 1, scale, x, scale),
            *([kernels.axis_mix_add(packed[1], weight, 2, *packed, True)] if PACKS else []),
            *kernels.line_means(x),
            *kernels.pack_lines(x),
        )
        for _ in range(3)
    )
    assert all(torch.equal(own, again) for other in others for own, again in zip(first, other, strict=True))


def test_of_any_memory_layout() -> None:
    x = torch.randn(2, 6, 4, 3, 5, device=DEVICE, dtype=DTYPE).permute(0, 2, 4, 1, 3)
    weight = torch.randn(12, 12, device=DEVICE, dtype=DTYPE).t()
    scale, base_scale = torch.randn(2, 1, 1, *x.shape[3:], 2, device=DEVICE, dtype=DTYPE).unbind(-1)
    added = kernels.axis_mix_add(x, weight, 1, scale, x, base_scale)
    exact = textbook(x.double(), weight.double(), 1) * scale.double() + x.double() * base_scale.double()
    assert not any(t.is_contiguous() for t in (x, weight, scale)) and relative_error(added, exact) < ERRORS[DTYPE]
    assert all(torch.equal(*pair) for pair in zip(kernels.line_means(x), kernels.pack_lines(x), strict=False))


@pytest.mark.parametrize("weight", [(8, 6), (10, 10), (16,)])
def test_refuses_a_weight_of_another_size(weight: tuple[int, ...]) -> None:
    x = torch.empty(1, 4, 5, 3, 2, device=DEVICE)
    with pytest.raises(ValueError, match=r"8 x 8.*height of 4 and segments of 2"):
        kernels.axis_mix_add(x, torch.empty(weight, device=DEVICE), 1, x[:, :1, :1], x)


def test_refuses_another_type_and_another_axis() -> None:
    x = torch.empty(1, 4, 4, 3, 2, device=DEVICE)
    with pytest.raises(ValueError, match=r"torch.float64, expected 8 x 8 .* in torch.float32"):
        kernels.axis_mix_add(x, torch.empty(8, 8, device=DEVICE).double(), 1, x[:, :1, :1], x)
    for axis, other in ((0, x), (3, x), (1, x[0])):
        with pytest.raises(ValueError, match=r"expected 1 \(height\) or 2 \(width\)"):
            kernels.axis_mix_add(other, torch.empty(8, 8, device=DEVICE), axis, x[:, :1, :1], x)


def test_refuses_long_lines_of_what_is_packed() -> None:
    x, weight = torch.empty(1, 33, 2, 6, 8, device=DEVICE), torch.empty(198, 198, device=DEVICE)
    with pytest.raises(ValueError, match="198 values, expected at most 192"):
        kernels.axis_mix_add(x, weight, 1, x[:, :1, :1], x, None, True)


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


def test_only_what_needs_a_gradient_gets_one() -> None:
    x = torch.randn(1, 2, 2, 1, 2, device=DEVICE, dtype=DTYPE)
    weight = torch.randn(4, 4, device=DEVICE, dtype=DTYPE, requires_grad=True)
    mix = partial(kernels.axis_mix_add, x, axis=2, scale=x[:, :1, :1])
    (grad,) = torch.autograd.grad(mix(weight=weight, base=x).sum(), weight)
    assert grad.shape == weight.shape and x.grad is None
    with torch.no_grad():
        assert not mix(weight=weight, base=x).requires_grad
    base = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(mix(weight=weight.detach(), base=base).sum(), base)
    assert torch.equal(grad, torch.ones_like(base)) and weight.grad is None


def test_is_a_good_operator() -> None:
    x = torch.randn(2, 4, 3, 2, 2, device=DEVICE, dtype=DTYPE, requires_grad=True)
    weight = torch.randn(8, 8, device=DEVICE, dtype=DTYPE, requires_grad=True)
    checks = ("test_schema", "test_autograd_registration") + (() if INTERPRETED else ("test_faketensor",))
    scale = torch.randn(2, 1, 1, 2, 2, device=DEVICE, dtype=DTYPE, requires_grad=True)
    for base_scale in (scale, None):
        for packed in (False, True)[: 1 + PACKS]:
            arguments = (x, weight, 1, scale, x, base_scale, packed)
            torch.library.opcheck(kernels.axis_mix_add, arguments, test_utils=checks)
    for operator in (kernels.line_means, kernels.pack_lines):
        torch.library.opcheck(operator, (x,), test_utils=checks)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the operators, as they are called."""
    names: list[str] = []
    for name in ("axis_mix_add", "line_means", "pack_lines"):
        own = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *args, name=name, own=own: names.append(name) or own(*args))
    return names


@pytest.mark.skipif(not INTERPRETED, reason="float32")
@pytest.mark.parametrize("learned", ["", "network.0.0.attn.mlp_w", "network.0.0.attn.mlp_c", "attn.reweight", "head"])
def test_models_compute_what_they_did(learned: str, called: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients of a model; the kernels compute every block that needs no gradient, and no other."""
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
    assert calls == [[], blocks * ["line_means", "axis_mix_add", "axis_mix_add"] if learned == "head" else []]
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
def test_validation_on_a_gpu(
    compiled: bool, dtype: torch.dtype, called: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under autocast the kernels are chosen by themselves, and err no more than torch does."""
    torch.manual_seed(0)
    monkeypatch.setattr(ops, "LEAST_IN_EAGER", 0)  # of what torch.compile traces there is none
    model = timm.create_model("vip_s7").to(DEVICE).eval()
    images = torch.randn(4, 3, 224, 224, device=DEVICE)

    def logits(model: Callable[..., torch.Tensor], **autocast: object) -> torch.Tensor:
        with torch.autocast(DEVICE.type, dtype, **autocast), torch.inference_mode():
            return model(images).double()

    exact = logits(model, enabled=False)
    plain = relative_error(without_kernels(lambda: logits(model)), exact)
    assert not called
    own = relative_error(logits(torch.compile(model) if compiled else model), exact)
    assert set(called) == OF_VIP_S7
    assert 0 < own < 1.2 * plain < 0.2


@pytest.mark.skipif(INTERPRETED, reason="torch.compile and torch.export of a GPU")
@pytest.mark.parametrize("dtype", ops.HALVES)
@pytest.mark.parametrize("ready", ["optimized", "compiled", "exported"])
def test_inference_on_a_gpu(ready: str, dtype: torch.dtype, called: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is made ready for inference keeps the kernels, and errs no more than the model does in torch."""
    torch.manual_seed(0)
    monkeypatch.setattr(ops, "LEAST_IN_EAGER", 0)
    model = timm.create_model("vip_s7").to(DEVICE).eval()
    images = torch.randn(4, 3, 224, 224, device=DEVICE)
    with torch.inference_mode():
        exact = model(images).double()
        halved = copy.deepcopy(model).to(dtype)
        plain = relative_error(without_kernels(lambda: halved(images.to(dtype))), exact)
    assert not called
    own: Callable[..., torch.Tensor] = optimize_for_inference(model, dtype, compiled=ready == "compiled")
    if ready == "exported":
        program = torch.export.export(own, (images.to(dtype),))
        assert "vip.axis_mix_add.default" in {str(node.target) for node in program.graph.nodes}
        own = program.module()
    with torch.inference_mode():
        assert 0 < relative_error(own(images.to(dtype)), exact) < 1.2 * plain < 0.1
    assert set(called) == OF_VIP_S7


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="a GPU that is not the current one")
@packed_or_not
def test_on_a_gpu_that_is_not_the_current_one(packed: bool) -> None:
    x = torch.randn(2, 8, 8, 8, 6, device="cuda:1").to(DTYPE)
    x, weight = other_way(x) if packed else x, torch.randn(48, 48, device="cuda:1").to(DTYPE)
    own, *_, means = kernels.axis_mix_add(x, weight, 1, x[:, :1, :1], x, None, packed), *kernels.line_means(x)
    torch.cuda.set_device(1)
    try:
        again, *_, same = kernels.axis_mix_add(x, weight, 1, x[:, :1, :1], x, None, packed), *kernels.line_means(x)
    finally:
        torch.cuda.set_device(0)
    assert torch.equal(own, again) and torch.equal(means, same) and own.isfinite().all()
