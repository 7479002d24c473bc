"""Where kernels take the place of torch, and what they are compiled to. Their numbers are in test_kernels.py."""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
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
from vip.models.vision_permutator import AxisMix, PermuteMlp

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
    assert re.search(r"1[34]\d passed, 12 skipped", done.stdout), "what needs a GPU, and no more"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., torch.Tensor]:
    """Makes tensors that say they are on a GPU, of a given compute capability."""

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16, capability: int = 9) -> torch.Tensor:
        monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(major=capability))
        with FakeTensorMode():
            return torch.empty(*shape, dtype=dtype, device="cuda")

    monkeypatch.setattr("torch.version.cuda", "12.0")
    monkeypatch.setattr(ops, "_enabled", True)
    monkeypatch.setattr(ops, "LEAST_IN_EAGER", 0)
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
    assert not ops.use_kernels(gpu(2**14, 16, 16, 16, 16))
    assert not ops.use_kernels(gpu(2, 16, 16, 16, 24, dtype=torch.float32))
    assert not ops.use_kernels(torch.empty(2, 16, 16, 16, 24, dtype=torch.bfloat16))
    assert not ops.use_kernels(gpu(2, 16, 16, 16, 24, dtype=torch.float64))


def test_small_images_are_for_the_compiler(gpu: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """In eager mode Python takes longer over the kernels than over torch, and a GPU waits for it."""
    monkeypatch.undo()
    monkeypatch.setattr("torch.version.cuda", "12.0")
    monkeypatch.setattr(ops, "_enabled", True)
    few, enough = gpu(42, 16, 16, 16, 24), gpu(43, 16, 16, 16, 24)
    assert not ops.use_kernels(few) and ops.use_kernels(enough)
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    assert ops.use_kernels(few)


def test_launched_on_the_gpu_of_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which Triton takes the current one for."""
    from vip.ops import kernels

    x, current = torch.empty(1), []

    @contextlib.contextmanager
    def device_of(tensor: torch.Tensor) -> Iterator[None]:
        current.append(tensor)
        yield
        current.clear()

    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.device_of", device_of)
    launched: list[Any] = []
    monkeypatch.setattr(kernels, "_launchable", lambda kernel: {(3,): lambda *args: launched.append((args, *current))})
    kernels._launch((None, {}, (3,)), x, 1)
    assert launched == [((x, 1), x)] and not current


def test_autocast_decides_with_the_device(gpu: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    x, half = gpu(2, 16, 16, 16, 24, dtype=torch.float32), gpu(2, 16, 16, 16, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert not ops.use_kernels(x) and ops.use_kernels(half)
    monkeypatch.setattr("torch.is_autocast_enabled", lambda device: device == "cuda")  # as no one can without a GPU
    for dtype in (torch.bfloat16, torch.float32):
        monkeypatch.setattr("torch.get_autocast_dtype", lambda device, dtype=dtype: dtype)
        assert ops.use_kernels(x) == ops.use_kernels(half) == (dtype == torch.bfloat16)
        assert not ops.use_kernels(gpu(2, 16, 16, 16, 24, dtype=torch.float64)), "autocast leaves float64 as it is"


def line_means_in_torch(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([x.mean(2), x.mean(1)], 1).transpose(1, 2), x.mean((1, 2))


def pack_lines_in_torch(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return *line_means_in_torch(x), x.transpose(3, 4)


def axis_mix_add_in_torch(
    x: Any, weight: Any, axis: int, scale: Any, base: Any, base_scale: Any = None, packed: bool = False
) -> Any:
    lines = (x.transpose(3, 4) if packed else x).movedim(axis, 3)
    mixed = (lines.flatten(3) @ weight.T).reshape(lines.shape).movedim(3, axis)
    return base * (1 if base_scale is None else base_scale) + scale * (mixed.transpose(3, 4) if packed else mixed)


@pytest.fixture
def in_torch(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Kernels everywhere, what they compute in torch; gives the arguments of each sum."""
    from vip.ops import kernels

    calls: list[tuple[Any, ...]] = []

    def add(*args: Any) -> Any:
        if not torch.compiler.is_compiling():
            calls.append(args)
        return axis_mix_add_in_torch(*args)

    monkeypatch.setattr(ops, "use_kernels", lambda x: True)
    monkeypatch.setattr(kernels, "line_means", line_means_in_torch)
    monkeypatch.setattr(kernels, "pack_lines", pack_lines_in_torch)
    monkeypatch.setattr(kernels, "axis_mix_add", add)
    return calls


@pytest.mark.parametrize("segments", [3, 8])
def test_computes_in_the_type_of_autocast(segments: int, in_torch: list[tuple[Any, ...]]) -> None:
    layer = PermuteMlp(6 * segments, segments, (2, 2))
    x = torch.randn(1, 2, 2, segments, 6)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert ops.weighted_mix(x, layer).dtype == torch.bfloat16
    tensors = [arg for call in in_torch for arg in call if isinstance(arg, torch.Tensor)]
    assert len(tensors) == 9, "x, weight, scale, base and, once, the scale of the base"
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("grid", "segments", "dim", "packed"),
    [
        ((4, 5), 8, 6, True),
        ((32, 32), 8, 6, True),
        ((4, 33), 8, 6, False),  # longer lines than programs keep weights of
        ((4, 5), 8, 8, False),  # 16 bytes
        ((4, 5), 3, 6, False),
    ],
)
def test_packed_where_segments_begin_in_between(
    grid: tuple[int, int], segments: int, dim: int, packed: bool, in_torch: list[tuple[Any, ...]]
) -> None:
    torch.manual_seed(0)
    layer = PermuteMlp(dim * segments, segments, grid)
    x = torch.randn(2, *grid, dim * segments)
    with torch.no_grad():
        found = layer(x)
    with pytest.MonkeyPatch.context() as context:
        context.setattr(ops, "use_kernels", lambda x: False)
        torch.testing.assert_close(found, layer(x), rtol=1e-4, atol=1e-5)
    assert [call[-1] for call in in_torch] == [packed, packed]


class Twice(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class TwiceAxisMix(AxisMix):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("segments", [3, 8])
@pytest.mark.parametrize(
    ("name", "other"),
    [
        *(("proj", Twice(48, 48)), ("mlp_c", Twice(48, 48, bias=False))),
        *(("mlp_h", TwiceAxisMix(4, 6)), ("mlp_w", TwiceAxisMix(4, 6))),
    ],
)
def test_layers_of_others_compute_by_themselves(
    name: str, other: torch.nn.Module, segments: int, in_torch: list[tuple[Any, ...]]
) -> None:
    """As those for low-rank adaptation do; and hooks on them are called."""
    layer, x = PermuteMlp(48, 8, (4, 4)), torch.randn(1, 4, 4, 48)
    seen: list[str] = []
    with torch.no_grad():
        layer(x)
        hook = getattr(layer, name).register_forward_hook(lambda *args: seen.append(name))
        layer(x)
        hook.remove()
        setattr(layer, name, other)
        layer(x)
    assert seen == [name] and len(in_torch) == 2


def test_derivatives_forward_know_the_branches(in_torch: list[tuple[Any, ...]]) -> None:
    layer = PermuteMlp(48, 8, (4, 4)).requires_grad_(False).double()
    x, along = torch.randn(2, 1, 4, 4, 48, dtype=torch.float64)
    _, tangent = torch.func.jvp(layer, (x,), (along,))
    step = 1e-6 * along
    torch.testing.assert_close(tangent, (layer(x + step) - layer(x - step)) / 2e-6, rtol=1e-5, atol=1e-7)
    assert len(in_torch) == 4, "the two others"


@pytest.mark.parametrize(("capability", "roomy"), [((8, 0), True), ((8, 6), False), ((9, 0), True), ((12, 0), False)])
def test_packed_where_there_is_room(
    capability: tuple[int, int], roomy: bool, gpu: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vip.ops import kernels

    x = gpu(2, 32, 32, 32, 6)
    properties = SimpleNamespace(major=capability[0], minor=capability[1])
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: properties)
    assert kernels.use_packed(x) == roomy


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


def test_branches_are_added_where_no_gradient_needs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = PermuteMlp(12, 3, (2, 2)).requires_grad_(False), torch.randn(1, 2, 2, 3, 4)
    use = partial(ops.use_weighted_mix, kinds=(AxisMix, torch.nn.Linear))
    assert not use(x, layer), "on a CPU"
    monkeypatch.setattr(ops, "use_kernels", lambda x: True)
    assert use(x, layer)
    learned = PermuteMlp(12, 3, (2, 2)).requires_grad_(False)
    learned.reweight.fc1.bias.requires_grad_()
    for own, parameters in ((x, learned), (x.clone().requires_grad_(), layer)):
        assert not use(own, parameters)
        with torch.no_grad():
            assert use(own, parameters)


def test_of_a_size_that_is_resampled_to(in_torch: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is added is mixed by matrices for the image at hand."""
    model = timm.create_model("vip_nano4_32", dynamic_img_size=True).eval()
    images = torch.randn(1, 3, 48, 40)
    with torch.no_grad():
        found = model(images)
        monkeypatch.setattr(ops, "use_kernels", lambda x: False)
        torch.testing.assert_close(found, model(images), rtol=1e-4, atol=1e-5)
    assert len(in_torch[0][1]) / len(in_torch[1][1]) == 12 / 10, "tokens"


@pytest.mark.parametrize("training", [True, False])
def test_compiled_in_one_graph(
    training: bool, in_torch: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The choice between adding and not is made while torch.compile traces."""
    torch._dynamo.reset()
    model, images = timm.create_model("vip_nano4_32").eval(), torch.randn(2, 3, 32, 32)
    with torch.set_grad_enabled(training):
        with pytest.MonkeyPatch.context() as context:
            context.setattr(ops, "use_kernels", lambda x: False)
            expected = model(images)
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
    options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
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
    """On GPUs from the A100 on they multiply in matrix units and keep all in registers."""
    from vip.ops import kernels

    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: properties)
    mix_add, calls = kernels.axis_mix_add._init_fn, []
    size = shape[1] * shape[4]
    packed = shape[4] % 8 != 0
    with FakeTensorMode():
        x, weight = (torch.empty(*s, dtype=torch.bfloat16, device="cuda") for s in (shape, (size, size)))
        for other_way in (False, True)[: 1 + packed]:
            y = x.transpose(3, 4).contiguous() if other_way else x
            scale = y[:, :1, :1]
            calls += launches(monkeypatch, partial(mix_add, y, weight, 1, scale, y, scale, other_way))
            calls += launches(monkeypatch, partial(mix_add, y, weight.t(), 2, scale, y, None, other_way))
    assert len(calls) == 2 + 2 * packed
    for call in calls:
        compiled = compile_for(capability, *call)
        ptx = compiled.asm["ptx"]
        assert re.search(MATRIX_UNITS[capability], ptx)
        wide = re.findall(r"cp\.async\.c[ag][^\n]*, 0x(\w+), ", ptx)  # bytes that a thread copies at once
        natural = call[0] is kernels._mix_kernel
        assert wide and set(wide) <= ({"4", "10"} if natural and packed else {"10"})
        # of an A10, the smallest; what is packed is for larger ones, and two programs of it for one multiprocessor
        assert compiled.metadata.shared <= (99 if natural else 113) * 1024
        (tmp_path / "kernel").write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.check_output([tool, "-res-usage", tmp_path / "kernel"], text=True)
        if capability == 90 and not natural:
            (registers,) = re.findall(r"REG:(\d+)", usage)
            assert 2 * int(registers) * 32 * call[2]["num_warps"] <= 2**16, "of a multiprocessor"
        spilled = re.findall(r"(?:STACK|LOCAL):([1-9]\d*)", usage)
        assert "STACK:" in usage and "LOCAL:" in usage
        assert not spilled or (capability == 80 and TRITON < Version("3.9") and spilled == ["24"])


@of_today
@pytest.mark.parametrize("batch", [2, 3])
@pytest.mark.parametrize("channels", [24, 6])
def test_compilers_see_through_them(batch: int, channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile finds Triton kernels, not calls that it knows nothing of."""
    from torch._functorch.aot_autograd import aot_function
    from triton.backends.compiler import GPUTarget

    from vip.ops import kernels

    driver = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: properties)
    operators: list[str] = []

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        operators.extend(str(node.target) for node in module.graph.nodes if node.op == "call_function")
        return module

    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(batch, 8, 8, 16, channels, dtype=torch.bfloat16, device="cuda")
        layer = PermuteMlp(16 * channels, 16, (8, 8), dtype=torch.bfloat16, device="cuda")
        aot_function(partial(ops.weighted_mix, layer=layer), fw_compiler=backend)(x)
        assert kernels.use_packed(x) == (channels == 6)
    assert operators.count("triton_kernel_wrapper_functional") == 3 and not any("vip." in name for name in operators)


@of_today
def test_export_keeps_them_as_operators(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ops, "use_kernels", lambda x: True)
    model = timm.create_model("vip_nano4_32").eval()
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(2, 3, 32, 32),))
    names = [str(node.target) for node in program.graph.nodes]
    blocks = sum(len(stage) for stage in model.network if isinstance(stage, torch.nn.Sequential))
    assert names.count("vip.axis_mix_add.default") == 2 * blocks and names.count("vip.line_means.default") == blocks
    torch.export.save(program, tmp_path / "model.pt2")
    code = "import sys, torch, vip.ops.kernels\nprint(torch.export.load(sys.argv[1]).graph)"
    loaded = subprocess.check_output([sys.executable, "-c", code, tmp_path / "model.pt2"], text=True)
    assert loaded.count("torch.ops.vip.axis_mix_add") == 2 * blocks


@of_today
@pytest.mark.parametrize(
    ("operator", "own"),
    [
        ("line_means", {"_means_kernel"}),
        ("pack_lines", {"_pack_kernel"}),
        ("axis_mix_add", {"_mix_kernel", "_packed_mix_kernel"}),
    ],
)
def test_caches_of_compilers_know_their_kernels(operator: str, own: set[str]) -> None:
    """Or what was compiled of earlier ones would be taken for them."""
    from torch._library.triton import get_triton_kernels_for_op

    from vip.ops import kernels

    assert hasattr(kernels, operator)
    assert {kernel.fn.__name__ for kernel in get_triton_kernels_for_op(f"vip::{operator}")} == own
