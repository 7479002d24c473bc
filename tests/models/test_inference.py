"""`optimize_for_inference` against the models it is given."""

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import timm
import torch
import torch._inductor.freezing
import torch._inductor.graph
import torch.nn.functional as F
from torch import nn
from torch._inductor import config as inductor
from torch.nn.utils import prune

import vip
from vip.models import inference
from vip.models.vision_permutator import VisionPermutator

SMALL = {
    "vip_nano4_32": dict(aux_head=True),
    "lvvit_t": dict(img_size=32, depth=2, embed_dim=48, num_heads=3),
    "eamlp_7": dict(img_size=32, depth=2, embed_dim=48, num_heads=3),
    "test_vit": dict(img_size=32),
}


# a block of each kind of stage is soon compiled
TWO_BLOCKS: dict[str, Any] = dict(layers=(1, 1), embed_dims=(64, 128), transitions=(True,), segments=(8, 4))


def random_model(name: str, **kwargs: Any) -> nn.Module:
    """With scales, shifts and statistics that are not those of a new model, and all that drops on."""
    torch.manual_seed(0)
    kwargs = dict(num_classes=7, drop_rate=0.3, drop_path_rate=0.3, **SMALL[name], **kwargs)
    model = timm.create_model(name, **kwargs).double().eval()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.1, 0.5)
    return model


@pytest.mark.parametrize("name", SMALL)
def test_what_it_computes_stays(name: str) -> None:
    model = random_model(name)
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    ready = vip.optimize_for_inference(model, dtype=torch.float64)
    torch.testing.assert_close(ready(x), model(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ready.forward_features(x), model.forward_features(x), rtol=1e-9, atol=1e-9)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", SMALL)
def test_twice_is_once(name: str) -> None:
    model = random_model(name)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    ready = vip.optimize_for_inference(vip.optimize_for_inference(model, dtype=torch.float64), dtype=torch.float64)
    torch.testing.assert_close(ready(x), model(x), rtol=1e-10, atol=1e-10)


def test_branch_weights_lie_as_what_they_weigh() -> None:
    model = random_model("vip_nano4_32")
    layers = [m.network[0][0].attn.reweight for m in (model, vip.optimize_for_inference(model, dtype=torch.float64))]
    pooled = torch.randn(2, layers[0].fc1.in_features, dtype=torch.float64)
    published, ready = (layer(pooled) for layer in layers)
    torch.testing.assert_close(ready, published.reshape(2, -1, 3))
    assert ready.stride(1) == 1


@pytest.mark.parametrize("name", SMALL)
def test_what_only_training_needs_is_gone(name: str) -> None:
    ready = vip.optimize_for_inference(random_model(name))
    kinds = {type(module).__name__ for name, module in ready.named_modules() if not name.endswith("attn_drop")}
    assert not kinds & {"DropPath", "Dropout", "BatchNorm2d"}
    assert not ready.training and not any(p.requires_grad for p in ready.parameters())
    if isinstance(ready, VisionPermutator):
        assert ready.aux_head is None and ready.network[0][0].norm2.weight is None


def test_precision_is_that_of_the_device_unless_given(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("vip_nano4_32").float()
    for supported, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda supported=supported: supported)
        assert next(vip.optimize_for_inference(model).parameters()).dtype == expected
    assert next(vip.optimize_for_inference(model, dtype=torch.float16).parameters()).dtype == torch.float16


@pytest.mark.parametrize("name", ["vip_nano4_32", "lvvit_t"])
def test_exports_and_scripts(name: str) -> None:
    ready = vip.optimize_for_inference(random_model(name), dtype=torch.float64)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = ready(x)
    batch = torch.export.Dim("batch", max=64)
    exported = torch.export.export(ready, (x,), dynamic_shapes=({0: batch},)).module()
    torch.testing.assert_close(exported(x), expected)
    torch.testing.assert_close(exported(x[:1].repeat(5, 1, 1, 1))[:1], expected[:1])
    torch.testing.assert_close(torch.jit.trace(ready, x)(x), expected)
    torch.testing.assert_close(torch.jit.script(ready)(x), expected)


@pytest.mark.parametrize("name", ["vip_nano4_32", "test_vit"])
def test_patches_by_a_matrix_product(name: str) -> None:
    """On a GPU; on a CPU, as here, it computes the same."""
    model = random_model(name)
    ready = vip.optimize_for_inference(model, dtype=torch.float64)
    inference._suit_gpu(ready)
    assert type(ready.patch_embed.proj) is inference._PatchLinear
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(ready(x), model(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bias", [True, False])
def test_patches_as_a_convolution_takes_them(bias: bool) -> None:
    conv = nn.Conv2d(3, 5, (7, 4), (7, 4), bias=bias).double()
    x = torch.randn(2, 3, 22, 15, dtype=torch.float64)  # neither side is a multiple
    tokens = inference._PatchLinear(conv)(x)
    torch.testing.assert_close(tokens, conv(x))
    assert tokens.is_contiguous(memory_format=torch.channels_last)
    assert inference._takes_patches(conv)


@pytest.mark.parametrize(
    "other",
    [
        nn.Conv2d(3, 5, 7, 4),
        nn.Conv2d(3, 5, 7, 7, 1),
        nn.Conv2d(3, 6, 7, 7, groups=3),
        nn.Conv2d(3, 5, 7, 7, dilation=2),
        nn.Conv2d(3, 5, 7, 7, "valid"),
        nn.Identity(),
    ],
    ids=str,
)
def test_other_convolutions_stay(other: nn.Module) -> None:
    assert not inference._takes_patches(other)


@pytest.mark.parametrize("std", [0.3, 1.0, 3.0])
def test_gelu_of_sums_by_tanh_is_nearer_than_of_rounded_sums(std: float) -> None:
    """Why a GPU may compute it so: against float64, what it rounds once errs less than exact GELU that rounds twice."""
    torch.manual_seed(0)
    dtype = torch.bfloat16
    sums = std * torch.randn(100_000, dtype=torch.float64)
    exact = F.gelu(sums)
    once = F.gelu(sums, approximate="tanh").to(dtype)
    twice = F.gelu(sums.to(dtype).float()).to(dtype)
    errors = [(own.double() - exact).norm() / exact.norm() for own in (once, twice)]
    assert errors[0] < errors[1]


def test_products_end_in_gelu() -> None:
    model = random_model("vip_nano4_32").to(torch.bfloat16)
    block = vip.optimize_for_inference(model, dtype=torch.bfloat16).network[0][0]
    expected, x = copy.deepcopy(block.mlp), torch.randn(2, 3, 5, 64).to(torch.bfloat16)
    inference._suit_gpu(block)
    assert type(block.mlp.fc1) is inference._GeluLinear and type(block.mlp.act) is nn.Identity
    torch.testing.assert_close(block.mlp(x), expected(x), rtol=0.02, atol=0.02)
    for other in (block.mlp, copy.deepcopy(expected).half(), copy.deepcopy(expected).double()):
        assert not inference._ends_in_gelu(other)
    expected.act = nn.GELU("tanh")
    assert not inference._ends_in_gelu(expected)


def test_gelu_under_autocast_and_with_gradients() -> None:
    """Inputs of another type are autocast's to cast; gradients pass, which the library's product has none of."""
    linear = nn.Linear(8, 16).to(torch.bfloat16).requires_grad_(False)
    ready, x = inference._GeluLinear(linear), torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ready(x), F.gelu(linear(x)), rtol=0.02, atol=0.02)
    torch.testing.assert_close(ready(x[0].bfloat16()), F.gelu(linear(x[0].bfloat16())), rtol=0.02, atol=0.02)
    x = x.to(torch.bfloat16).requires_grad_()
    found, expected = (torch.autograd.grad(f(x).sum(), x)[0] for f in (ready, lambda x: F.gelu(linear(x))))
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


class Adapted(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 0.1 * x.sum(-1, keepdim=True)


@pytest.mark.parametrize("change", ["adapted", "spectral", "pruned"])
def test_layers_that_were_changed_stay_as_they_are(change: str) -> None:
    model = random_model("vip_nano4_32")
    for block in (model.network[0][0], model.network[2][0]):
        if change == "adapted":
            adapted = Adapted(block.mlp.fc1.in_features, block.mlp.fc1.out_features).double()
            adapted.load_state_dict(block.mlp.fc1.state_dict())
            block.mlp.fc1 = adapted
        elif change == "spectral":
            nn.utils.parametrizations.spectral_norm(block.mlp.fc1)
            nn.utils.parametrizations.spectral_norm(block.attn.reweight.fc2)
        else:
            prune.l1_unstructured(block.mlp.fc1, "weight", amount=0.5)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = model.eval()(x)  # what is pruned can be copied from now on
        ready = vip.optimize_for_inference(model, dtype=torch.float64)
        inference._suit_gpu(ready)
        torch.testing.assert_close(ready(x), expected, rtol=1e-10, atol=1e-10)


def test_of_a_compiled_model() -> None:
    model = random_model("vip_nano4_32")
    ready = vip.optimize_for_inference(torch.compile(model), dtype=torch.float64)
    assert isinstance(ready, VisionPermutator) and ready.aux_head is None


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What torch froze."""
    freeze, frozen = torch._inductor.freezing.freeze, []
    monkeypatch.setattr("torch._inductor.freezing.freeze", lambda *args: frozen.append(args) or freeze(*args))
    return frozen


@pytest.mark.parametrize(
    ("dtype", "packed", "tolerance"),
    [(torch.float32, True, 1e-4), (torch.bfloat16, True, 0.05), (torch.float64, False, 1e-9)],
)
def test_compiled(dtype: torch.dtype, packed: bool, tolerance: float, frozen: list[object]) -> None:
    torch._dynamo.reset()
    model = random_model("vip_nano4_32", **TWO_BLOCKS)
    compiled = vip.optimize_for_inference(model, dtype=dtype, compiled=True)
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    for images in (x, x[:2], x):
        with torch.inference_mode():
            torch.testing.assert_close(
                compiled(images.to(dtype)).double(), model(images), rtol=tolerance, atol=tolerance
            )
    assert bool(frozen) == packed and not inductor.freezing


@pytest.mark.skipif(torch.__version__ < "2.9", reason="packs no float32 for an open batch")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_for_onednn_and_other_batches(
    dtype: torch.dtype, frozen: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One image is compiled by itself, and so are tensors of inference; all else is of one compilation."""
    codes: list[str] = []
    monkeypatch.setattr(torch._inductor.graph.GraphLowering, "save_output_code", staticmethod(codes.append))
    torch._dynamo.reset()
    model = random_model("vip_nano4_32", **TWO_BLOCKS).to(dtype)
    compiled = vip.optimize_for_inference(model, dtype=dtype, compiled=True)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.05}[dtype]
    x = torch.randn(5, 3, 32, 32).to(dtype)
    with torch.inference_mode(), inductor.patch(fx_graph_cache=False):
        for images, compilations in ((x[:3], 1), (x[:1], 2), (x, 2), (x[:2], 2), (x[:1], 2), (x.clone(), 3)):
            torch.testing.assert_close(compiled(images), model(images), rtol=tolerance, atol=tolerance)
            assert len(frozen) == len(codes) == compilations
    assert all("_linear_pointwise" in code and "_mkl_linear" not in code for code in codes)
    assert not hasattr(x, "_dynamo_weak_dynamic_indices")


def test_compiled_with_gradients(frozen: list[object]) -> None:
    """With gradients torch does not pack, and compiles anew."""
    torch._dynamo.reset()
    model = random_model("vip_nano4_32", **TWO_BLOCKS).float()
    compiled = vip.optimize_for_inference(model, dtype=torch.float32, compiled=True)
    x = torch.randn(2, 3, 32, 32, requires_grad=True)
    found, expected = (torch.autograd.grad(m(x).sum(), x)[0] for m in (compiled, model))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    assert not frozen
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    assert frozen


@pytest.mark.skipif(
    not hasattr(torch.fx._symbolic_trace, "_is_fx_tracing_tls"), reason="no thread may call while another compiles"
)
def test_compiled_in_threads() -> None:
    torch._dynamo.reset()
    model = random_model("vip_nano4_32", **TWO_BLOCKS).float()
    compiled = vip.optimize_for_inference(model, dtype=torch.float32, compiled=True)
    images = [torch.randn(1 + i % 2, 3, 32, 32) for i in range(40)]
    with torch.no_grad():
        expected = [model(x) for x in images]

    @torch.no_grad()
    def compute(x: torch.Tensor) -> torch.Tensor:
        return compiled(x)

    with ThreadPoolExecutor(4) as pool:
        for found, right in zip(pool.map(compute, images), expected, strict=True):
            torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)
    assert not inductor.freezing


def test_nothing_is_drawn() -> None:
    model = random_model("vip_nano4_32")
    state = torch.get_rng_state()
    vip.optimize_for_inference(model)
    assert torch.equal(torch.get_rng_state(), state)
