"""Where kernels take the place of torch, and what they are compiled to. Their numbers are in test_kernels.py."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from packaging.version import Version
from torch._subclasses.fake_tensor import FakeTensorMode

from vip import ops
from vip.models.vision_permutator import AxisMix

triton = pytest.importorskip("triton")

TRITON = Version(triton.__version__)
# torch 2.6 comes with Triton 3.2, whose compiler takes other arguments, and does not trace kernels without a GPU
of_today = pytest.mark.skipif(TRITON < Version("3.3"), reason="Triton 3.2")
SHAPES = {
    "vip_s7, first stage": (2, 32, 32, 32, 6),
    "vip_s7": (2, 16, 16, 16, 24),
    "vip_l7, first stage": (2, 32, 32, 32, 8),
    "vip_l7": (2, 16, 16, 16, 32),
}
MATRIX_UNITS = {80: r"mma\.sync", 90: r"wgmma\.mma_async", 100: r"tcgen05\.mma"}


@pytest.mark.skipif(
    TRITON < Version("3.9") and Version(np.__version__) >= Version("2.4"),
    reason="Triton 3.6 interprets no loop to a number that is computed, with NumPy from 2.4 on",
)
def test_numbers_in_the_interpreter() -> None:
    """Triton decides when it is imported whether it interprets, so that these tests need a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("test_kernels.py"))],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert re.search(r"[89]\d passed, 10 skipped", done.stdout)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., torch.Tensor]:
    """Makes tensors that say they are on a GPU, of a given compute capability."""

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16, capability: int = 9) -> torch.Tensor:
        monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(major=capability))
        with FakeTensorMode():
            return torch.empty(*shape, dtype=dtype, device="cuda")

    monkeypatch.setattr("torch.version.cuda", "12.0")
    monkeypatch.setattr(ops, "_enabled", True)
    return empty


def test_cast_once_as_autocast_would(gpu: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    norm, double, elsewhere = gpu(2, 4, dtype=torch.float32), gpu(2, 4, dtype=torch.float64), torch.randn(2, 4)
    assert ops.as_autocast(norm) is norm
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: True)  # it cannot be, without a GPU
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: torch.bfloat16)
    assert ops.as_autocast(norm).dtype == torch.bfloat16
    assert ops.as_autocast(double) is double and ops.as_autocast(elsewhere) is elsewhere


def test_used_where_they_are_for(gpu: Callable[..., torch.Tensor]) -> None:
    assert ops.use_kernels(gpu(2, 16, 16, 16, 24))
    assert ops.use_kernels(gpu(2, 16, 16, 16, 24, dtype=torch.float16, capability=8))
    assert not ops.use_kernels(gpu(2, 16, 16, 16, 24, capability=7))
    assert not ops.use_kernels(gpu(2, 16, 16, 16, 23))
    assert not ops.use_kernels(gpu(2**15, 16, 16, 16, 16))
    assert not ops.use_kernels(gpu(2, 16, 16, 16, 24, dtype=torch.float32))
    assert not ops.use_kernels(torch.empty(2, 16, 16, 16, 24, dtype=torch.bfloat16))
    assert not ops.use_kernels(gpu(2, 16, 16, 16, 24, dtype=torch.float64))


def test_autocast_decides_with_the_device(gpu: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    x, half = gpu(2, 16, 16, 16, 24, dtype=torch.float32), gpu(2, 16, 16, 16, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert not ops.use_kernels(x) and ops.use_kernels(half)
    monkeypatch.setattr("torch.is_autocast_enabled", lambda device: device == "cuda")  # as no one can without a GPU
    for dtype in (torch.bfloat16, torch.float32):
        monkeypatch.setattr("torch.get_autocast_dtype", lambda device, dtype=dtype: dtype)
        assert ops.use_kernels(x) == ops.use_kernels(half) == (dtype == torch.bfloat16)
        assert not ops.use_kernels(gpu(2, 16, 16, 16, 24, dtype=torch.float64)), "autocast leaves float64 as it is"


def test_computes_in_the_type_of_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch's own products do; gradients come back in the types of what they are of."""
    from vip.ops import kernels

    monkeypatch.setattr(kernels, "axis_mix", lambda x, weight, axis: x * weight.sum())
    x, weight = torch.randn(1, 2, 2, 1, 2, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    assert ops.axis_mix(x, weight, 1).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        mixed = ops.axis_mix(x, weight, 1)
    mixed.sum().backward()
    assert mixed.dtype == torch.bfloat16 and x.grad.dtype == weight.grad.dtype == torch.float32

    types: list[torch.dtype] = []
    monkeypatch.setattr(
        kernels, "axis_mix_add", lambda *args: types.extend(t.dtype for t in args if t is not args[2]) or args[0]
    )
    with torch.autocast("cpu", torch.bfloat16):
        axis = SimpleNamespace(weight_for=lambda size: weight)
        branches = dict(mlp_h=axis, mlp_w=axis, mlp_c=torch.nn.Linear(2, 2))
        ops.weighted_mix(x, SimpleNamespace(**branches, branch_weights=lambda pooled: torch.rand(3, 1, 1, 1, 1, 2)))
    assert types == 9 * [torch.bfloat16], "x, weight, scale, base and, once, the scale of the base"


def test_off_by_one_flag(gpu: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    x = gpu(2, 16, 16, 16, 24)
    ops.set_kernels(False)
    assert not ops.use_kernels(x)
    ops.set_kernels(None)
    assert ops.use_kernels(x), "as the environment says"
    monkeypatch.setattr(ops, "_HAS_TRITON", False)
    assert not ops.use_kernels(x)


@pytest.mark.parametrize(("value", "enabled"), [("0", False), ("1", True)])
def test_off_by_environment(value: str, enabled: bool) -> None:
    code = "import vip.ops, sys; print(vip.ops._enabled)"
    env = {**os.environ, "VIP_KERNELS": value}
    assert subprocess.check_output([sys.executable, "-c", code], env=env, text=True).strip() == str(enabled)


def test_models_work_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, timm, vip\n"
        "print(timm.create_model('vip_nano4_32')(torch.randn(1, 3, 32, 32)).shape[1], vip.ops._HAS_TRITON)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["1000", "False"], done.stderr[-2000:]


def test_what_is_traced_knows_torch_only(gpu: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    x = gpu(2, 16, 16, 16, 24)
    monkeypatch.setattr("torch.onnx.is_in_onnx_export", lambda: True)
    assert not ops.use_kernels(x)


def test_layers_hand_over_what_they_have(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = AxisMix(4, 2)
    calls: list[Any] = []
    monkeypatch.setattr(ops, "use_kernels", lambda x: True)
    monkeypatch.setattr(ops, "axis_mix", lambda *args: calls.append(args) or args[0])
    x = torch.randn(1, 4, 3, 5, 2)
    assert layer.mix(x, 1) is x
    assert calls == [(x, layer.weight, 1)]


def test_branches_are_added_where_no_gradient_needs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, learned = torch.randn(1, 2, 2, 1, 2), torch.randn(4, 4), torch.randn(4, 4, requires_grad=True)
    assert not ops.use_weighted_mix(x, [weight]), "on a CPU"
    monkeypatch.setattr(ops, "use_kernels", lambda x: True)
    assert ops.use_weighted_mix(x, [weight])
    for own, parameters in ((x, [weight, learned]), (learned, [weight])):
        assert not ops.use_weighted_mix(own, iter(parameters))
        with torch.no_grad():
            assert ops.use_weighted_mix(own, iter(parameters))


def add_in_torch(sizes: list[int], x: Any, weight: Any, axis: int, scale: Any, base: Any, base_scale: Any = 1) -> Any:
    sizes.append(len(weight))
    lines = x.movedim(axis, 3)
    mixed = (lines.flatten(3) @ weight.T).reshape(lines.shape).movedim(3, axis)
    return base * base_scale + scale * mixed


def test_of_a_size_that_is_resampled_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is added is mixed by matrices for the image at hand."""
    from vip.ops import kernels

    model = timm.create_model("vip_nano4_32", dynamic_img_size=True).eval()
    images, sizes = torch.randn(1, 3, 48, 40), []
    with torch.no_grad():
        expected = model(images)
        monkeypatch.setattr(ops, "use_kernels", lambda x: True)
        monkeypatch.setattr(kernels, "axis_mix_add", partial(add_in_torch, sizes))
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
    assert sizes[0] / sizes[1] == 12 / 10, "tokens"


@pytest.mark.parametrize("training", [True, False])
def test_compiled_in_one_graph(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice between adding and not is made while torch.compile traces."""
    from vip.ops import kernels

    torch._dynamo.reset()
    model, images = timm.create_model("vip_nano4_32").eval(), torch.randn(2, 3, 32, 32)
    with torch.set_grad_enabled(training):
        expected = model(images)
        monkeypatch.setattr(ops, "use_kernels", lambda x: True)
        mix = partial(add_in_torch, [], scale=1, base=0)
        monkeypatch.setattr(kernels, "axis_mix", mix if training else None)
        monkeypatch.setattr(kernels, "axis_mix_add", None if training else partial(add_in_torch, []))
        logits = torch.compile(model, backend="aot_eager", fullgraph=True)(images)
    assert logits.requires_grad == training
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def launches(monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any]) -> list[tuple[Any, tuple, dict[str, Any]]]:
    """Kernels with the arguments that they are launched with."""
    from vip.ops import kernels

    found: list[Any] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *args, **kwargs: found.append((self.kernel, args, kwargs))

    with monkeypatch.context() as context:
        context.setattr(kernels, "_launchable", Recorder)
        call()
    return found


def compile_for(capability: int, kernel: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kwargs = dict(kwargs)
    options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages")}
    names = kernel.arg_names
    constants = {(names.index(name),): value for name, value in kwargs.items()}
    signature, attributes = {name: "constexpr" for name in names}, {}
    for i, (name, value) in enumerate(zip(names, args, strict=False)):  # as Triton itself makes them
        tensor = isinstance(value, torch.Tensor)
        if value is None or (not tensor and value == 1):
            constants[(i,)] = value
            continue
        signature[name] = ("*bf16" if value.dtype == torch.bfloat16 else "*fp32") if tensor else "i32"
        if tensor or value % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@of_today
@pytest.mark.parametrize("capability", MATRIX_UNITS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_compiled_for_the_matrix_units(
    shape: tuple[int, ...], capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On GPUs from the A100 on they multiply in matrix units, keep all in registers, and fit beside another."""
    from vip.ops import kernels

    size = shape[1] * shape[4]
    with FakeTensorMode():
        x, weight = (torch.empty(*s, dtype=torch.bfloat16, device="cuda") for s in (shape, (size, size)))
        calls = launches(monkeypatch, lambda: kernels.axis_mix._init_fn(x, weight, 1))
        calls += launches(monkeypatch, lambda: kernels.axis_mix._init_fn(x, weight.t(), 2))
        calls += launches(monkeypatch, lambda: kernels.axis_mix_weight_grad._init_fn(x, x, 1))
        scale = x[:, :1, :1]
        calls += launches(monkeypatch, lambda: kernels.axis_mix_add._init_fn(x, weight, 1, scale, x, scale))
        calls += launches(monkeypatch, lambda: kernels.axis_mix_add._init_fn(x, weight, 2, scale, x))
    assert len(calls) == 5
    for call in calls:
        compiled = compile_for(capability, *call)
        ptx = compiled.asm["ptx"]
        assert re.search(MATRIX_UNITS[capability], ptx)
        wide = re.findall(r"cp\.async\.c[ag][^\n]*, 0x(\w+), ", ptx)  # bytes that a thread copies at once
        assert wide and set(wide) <= ({"10"} if shape[4] % 8 == 0 else {"4", "10"})
        assert compiled.metadata.shared <= 99 * 1024  # of an A10, the smallest; two programs fit an H100
        (tmp_path / "kernel").write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.check_output([tool, "-res-usage", tmp_path / "kernel"], text=True)
        if capability == 90 and call[0] is kernels._mix_kernel:
            (registers,) = re.findall(r"REG:(\d+)", usage)
            assert 2 * int(registers) * 32 * call[2]["num_warps"] <= 2**16, "of a multiprocessor"
        spilled = re.findall(r"(?:STACK|LOCAL):([1-9]\d*)", usage)
        assert "STACK:" in usage and "LOCAL:" in usage
        assert not spilled or (capability == 80 and TRITON < Version("3.9") and spilled == ["24"])


@of_today
@pytest.mark.parametrize("batch", [2, 3])
@pytest.mark.parametrize("added", [True, False])
def test_compilers_see_through_them(batch: int, added: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile finds a Triton kernel, not a call that it knows nothing of."""
    from torch._functorch.aot_autograd import aot_function
    from triton.backends.compiler import GPUTarget

    from vip.ops import kernels

    driver = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    operators: list[str] = []

    def mix(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return kernels.axis_mix_add(x, weight, 1, x[:, :1, :1], x) if added else kernels.axis_mix(x, weight, 1)

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        operators.extend(str(node.target) for node in module.graph.nodes if node.op == "call_function")
        return module

    with FakeTensorMode():
        x = torch.empty(batch, 16, 16, 16, 24, dtype=torch.bfloat16, device="cuda")
        weight = torch.empty(384, 384, dtype=torch.bfloat16, device="cuda")
        aot_function(mix, fw_compiler=backend)(x, weight)
    assert "triton_kernel_wrapper_functional" in operators and not any("axis_mix" in name for name in operators)


@of_today
@pytest.mark.parametrize("added", [True, False])
def test_gradients_are_kept_once_for_two_kernels(added: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile computes what several kernels read once for each, but not what is a view of strides."""
    from torch._functorch.aot_autograd import aot_function
    from triton.backends.compiler import GPUTarget

    from vip.ops import kernels

    driver = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    read: list[Any] = []

    def gradients(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, grad: torch.Tensor) -> Any:
        needed = (True, True, False)
        if added:
            ctx = SimpleNamespace(
                axis=1, saved_tensors=(x, weight, scale), needs_input_grad=(*needed, False, True, False)
            )
            return kernels._backward_of_add(ctx, grad * 2)[:2]
        ctx = SimpleNamespace(axis=1, saved_tensors=(x, weight), needs_input_grad=needed)
        return kernels._backward(ctx, grad * 2)[:2]

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        launched = [node.kwargs["kwargs"] for node in module.graph.nodes if "triton_kernel" in str(node.target)]
        read.extend(kwargs.get("grad_ptr", kwargs["x_ptr"]) for kwargs in launched)
        return module

    with FakeTensorMode():
        x = torch.empty(2, 16, 16, 16, 24, dtype=torch.bfloat16, device="cuda")
        weight = torch.empty(384, 384, dtype=torch.bfloat16, device="cuda")
        aot_function(gradients, fw_compiler=backend)(x, weight, x[:, :1, :1], x)
    assert len(read) == 2 and read[0] is read[1]
    assert "as_strided" in str(read[0].target)


@of_today
def test_export_keeps_them_as_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "use_kernels", lambda x: True)
    model = timm.create_model("vip_nano4_32").eval()
    graph = torch.export.export(model, (torch.randn(2, 3, 32, 32),)).graph
    mixes = [node for node in graph.nodes if str(node.target) == "vip.axis_mix.default"]
    assert len(mixes) == 2 * sum(len(stage) for stage in model.network if isinstance(stage, torch.nn.Sequential))
