"""Models made ready for inference: what only training needs is gone, and what can be computed beforehand is."""

import copy
import threading
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, DropPath, Mlp, PatchEmbed
from torch import nn
from torch._inductor import config as inductor
from torch.nn.utils.fusion import fuse_conv_bn_eval

from vip import ops

from .external_attention_mlp import Block as ExternalAttentionBlock
from .external_attention_mlp import TokenBlock
from .lv_vit import Block as LVViTBlock
from .lv_vit import ConvPatchEmbed
from .vision_permutator import PermutatorBlock, PermuteMlp, VisionPermutator

__all__ = ["optimize_for_inference"]

_PACKED = (torch.float32, torch.bfloat16, torch.float16)  # what oneDNN has layouts for
# a sum that several read is written once, and not taken anew by each
_GPU_OPTIONS: dict[str, Any] = {"realize_reads_threshold": 1}
_COMPILING = threading.Lock()
_SHAPES: Any = import_module("torch.fx.experimental._config")
_OPENS_BATCH = torch.__version__ >= "2.9"  # which packs float32 for an open batch; earlier ones leave it unpacked
_OPEN_BATCH = {"backed_size_oblivious": True} if _OPENS_BATCH else {}  # of one image, too


def optimize_for_inference(
    model: nn.Module, dtype: torch.dtype | None = None, channels_last: bool = True, compiled: bool = False
) -> Any:
    """Make a copy of a model that computes the same with less.

    Dropout, stochastic depth and an auxiliary head that `forward` does not use are left out; BatchNorm becomes part of
    the convolution before it, the scale and shift of the LayerNorm before an MLP or attention part of its first layer,
    and the branch weights of ViP are laid out as what they weigh. On a GPU, patches are embedded by a matrix product,
    and in bfloat16 a product computes GELU of its float32 sums, by the tanh form: it differs from GELU by up to 0.0005,
    and its results by less, all in all, than those of exact GELU of sums that are rounded before. `forward`,
    `forward_features` and `forward_intermediates` give what they gave, but for rounding.

    Args:
        model: A model of this package; of others, dropout and stochastic depth are left out, and on a GPU timm's
            `PatchEmbed` and `Mlp` become faster.
        dtype: Type of the weights; None: bfloat16 where the device computes with it, else the one they have.
        channels_last: Lay the weights of convolutions out channels last, as ViP and LV-ViT read images.
        compiled: Compile the result by torch.compile, for the device it is on; on a CPU with packed weights, so do not
            load or change weights once it has been called, and not more than `torch._dynamo.config.recompile_limit` (8)
            models of a kind in a process. Threads may share it, with older torch (2.11 is) once it has been called
            with images of each size: there torch lets no thread call what is compiled while another compiles.

    Returns:
        The copy, in evaluation mode and for patches of the size that it has; unless compiled, it can be exported and
        scripted. Its images have the type of its weights. What is exported on a GPU holds operators of this package:
        import `vip.ops.kernels` to load it, and give a batch that is left open a maximum (`Dim("batch", max=256)`).
        `vip export` uses torch's alone.

    Example:
        >>> import timm
        >>> model = timm.create_model("vip_nano4_32").eval()
        >>> images = torch.randn(1, 3, 32, 32)
        >>> ready = optimize_for_inference(model, dtype=torch.float32)
        >>> torch.allclose(ready(images), model(images), atol=1e-5)
        True
        >>> any("norm2" in name for name, _ in ready.named_parameters())  # they are part of the layers after them
        False
    """
    model = copy.deepcopy(getattr(model, "_orig_mod", model))  # of torch.compile's
    model = model.eval().requires_grad_(False)
    if isinstance(model, VisionPermutator):
        model.aux_head, model.use_aux_head = None, False
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, DropPath | nn.Dropout) and name != "attn_drop":  # whose rate timm's attention reads
                setattr(module, name, nn.Identity())
        if isinstance(module, PermuteMlp) and ops.is_plain(module.reweight.fc2, nn.Linear):
            module.reweight.fc2 = _BranchByBranch(module.reweight.fc2)
        if isinstance(module, ConvPatchEmbed):
            _fold_batch_norms(module)
        if isinstance(module, PermutatorBlock | LVViTBlock | ExternalAttentionBlock | TokenBlock):
            _fold_layer_norm(module.norm2, module.mlp.fc1)
            if isinstance(module.attn, Attention):
                _fold_layer_norm(module.norm1, module.attn.qkv)
    model = model.to(_fast_dtype(model) if dtype is None else dtype)
    if next(model.parameters(), torch.empty(0)).is_cuda:
        _suit_gpu(model)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    return _compile(model) if compiled else model


class _BranchByBranch(nn.Linear):
    """Last layer of `PermuteMlp.reweight` with the weights of a branch side by side in memory, as what they weigh is.

    The published order is that of three weights of a channel, which processors gather one by one.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__(layer.in_features, layer.out_features, device="meta")  # draws no weights
        self.weight = nn.Parameter(layer.weight.unflatten(0, (-1, 3)).transpose(0, 1).flatten(0, 1), False)
        self.bias = nn.Parameter(layer.bias.unflatten(0, (-1, 3)).t().flatten(), False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Weights `[B, C, 3]` of pooled channels `[B, hidden]`."""
        return F.linear(x, self.weight, self.bias).unflatten(-1, (3, -1)).transpose(-1, -2)


def _suit_gpu(model: nn.Module) -> None:
    """Let a GPU's library compute patch embeddings as matrix products, and GELU at the end of the product before it."""
    for module in list(model.modules()):
        if isinstance(module, PatchEmbed) and _takes_patches(module.proj):
            module.proj = _PatchLinear(module.proj)  # type: ignore[assignment]  # timm's is a convolution
        if isinstance(module, Mlp) and _ends_in_gelu(module):
            module.fc1, module.act = _GeluLinear(module.fc1), nn.Identity()


def _takes_patches(conv: Any) -> bool:
    if not ops.is_plain(conv, nn.Conv2d) or conv.kernel_size != conv.stride:
        return False
    return conv.padding == (0, 0) and conv.dilation == (1, 1) and conv.groups == 1


def _ends_in_gelu(mlp: Mlp) -> bool:
    linear, act = mlp.fc1, mlp.act
    exact = isinstance(act, nn.GELU) and act.approximate == "none"
    if not (exact and ops.is_plain(linear, nn.Linear) and linear.bias is not None):
        return False
    return linear.weight.dtype == torch.bfloat16  # whose roundings are larger than what the tanh form errs


class _PatchLinear(nn.Linear):
    """A convolution of patches side by side as a matrix product, for which libraries have faster kernels.

    Patches of 7x7 pixels have 147 values; they are made a multiple of 8, as matrix units want rows of 16 bytes.
    """

    def __init__(self, conv: Any) -> None:
        size = conv.weight[0].numel()
        self.pad = -size % 8
        super().__init__(size + self.pad, conv.out_channels, conv.bias is not None, device="meta")
        self.patch_size = conv.kernel_size
        self.weight = nn.Parameter(F.pad(conv.weight.flatten(1), (0, self.pad)), requires_grad=False)
        self.register_parameter("bias", conv.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images `[B, C_in, H, W]` to `[B, C_out, H / P, W / P]`, whose channels are last in memory."""
        height, width = self.patch_size
        x = x[:, :, : x.shape[2] // height * height, : x.shape[3] // width * width]  # convolutions leave the rest out
        patches = x.unflatten(3, (-1, width)).unflatten(2, (-1, height)).permute(0, 2, 4, 1, 3, 5)
        rows = F.pad(patches.flatten(3), (0, self.pad))  # [B, H / P, W / P, C_in * P * P and padding]
        return F.linear(rows, self.weight, self.bias).permute(0, 3, 1, 2)


class _GeluLinear(nn.Linear):
    """A linear layer that ends in GELU, by its tanh form.

    What is summed in float32 goes into GELU before it is rounded to bfloat16. So the results, in their norm, are nearer
    to exact GELU of exact sums than exact GELU of rounded sums is, which costs a pass over memory more; single ones
    near zero may be farther, by up to 0.0005.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__(layer.in_features, layer.out_features, device="meta")
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Activations `[..., out]` of `[..., in]`."""
        learns = torch.is_grad_enabled() and x.requires_grad
        if learns or x.ndim < 2 or x.dtype != self.weight.dtype:  # which autocast casts, and gradients pass
            return F.gelu(F.linear(x, self.weight, self.bias))
        lines = torch._addmm_activation(self.bias, x.flatten(0, -2), self.weight.t(), use_gelu=True)
        return lines.reshape(x.shape[:-1] + lines.shape[-1:])


def _compile(model: nn.Module) -> Any:
    weights = list(model.parameters())
    if any(weight.is_cuda for weight in weights):
        return torch.compile(model, options=_GPU_OPTIONS)
    compiled: Any = torch.compile(model)
    if all(weight.device.type == "cpu" and weight.dtype in _PACKED for weight in weights):
        compiled.forward = _packing(compiled.forward)
    return compiled


def _packing(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Let torch take weights for constants, and pack them for oneDNN, where it compiles.

    It reads whether to from settings of the process, as it traces, and ignores the options of torch.compile. So the
    settings hold while a call may compile: the first with images of a size. No other waits for it.

    Of float32 torch packs weights for MKL if it knows the batch, and for oneDNN if not. oneDNN computes GELU and sums
    at the end of a product, and is fast on processors for which MKL has no kernels, too, so the batch is left open.
    What is compiled then serves other batches, but for those that torch treats in another way, as that of one image.
    """
    compiled_for = set()

    def call(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        mode = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), x.is_inference()
        case = x.shape, x.stride(), x.dtype, mode
        if case in compiled_for:
            return forward(x, *args, **kwargs)
        if _OPENS_BATCH:
            x = x.view_as(x)  # the mark is not the caller's
            torch._dynamo.maybe_mark_dynamic(x, 0)
        with _COMPILING, inductor.patch(freezing=True), _SHAPES.patch(_OPEN_BATCH):
            output = forward(x, *args, **kwargs)
        compiled_for.add(case)
        return output

    return call


def _fold_batch_norms(stem: ConvPatchEmbed) -> None:
    for i in (1, 2, 3):
        conv, norm = getattr(stem, f"conv{i}"), getattr(stem, f"bn{i}")
        if isinstance(norm, nn.BatchNorm2d):
            setattr(stem, f"conv{i}", fuse_conv_bn_eval(conv, norm))
            setattr(stem, f"bn{i}", nn.Identity())


def _fold_layer_norm(norm: Any, layer: Any) -> None:
    """Let a linear layer scale and shift what the norm before it did."""
    if not isinstance(norm, nn.LayerNorm) or not ops.is_plain(layer, nn.Linear) or norm.weight is None:
        return
    weight, bias = layer.weight.double(), 0 if layer.bias is None else layer.bias.double()
    if norm.bias is not None:
        layer.bias = nn.Parameter((bias + weight @ norm.bias.double()).to(layer.weight), requires_grad=False)
    layer.weight = nn.Parameter((weight * norm.weight.double()).to(layer.weight), requires_grad=False)
    norm.register_parameter("weight", None)
    norm.register_parameter("bias", None)


def _fast_dtype(model: nn.Module) -> torch.dtype:
    """The type of floating point numbers that the model's device is fastest with, of those that keep its accuracy."""
    weight = next(model.parameters(), torch.empty(0))
    if weight.device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = weight.device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else weight.dtype
