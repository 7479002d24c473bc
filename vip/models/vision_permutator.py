"""Vision Permutator (ViP) in PyTorch, as timm models.

Paper: `Vision Permutator: A Permutable MLP-Like Architecture for Visual Recognition` - https://arxiv.org/abs/2106.12368

Tokens are mixed along the height, the width and the channels by three linear branches whose outputs are combined
with a softmax weighting. The branch layers know the length of the axis they mix, so a model is built for one
image size, square or not; `VisionPermutator.set_input_size` and every checkpoint load resample them to another, and
with `dynamic_img_size` every forward pass does.

@article{hou2021vision,
  title={Vision Permutator: A Permutable MLP-Like Architecture for Visual Recognition},
  author={Hou, Qibin and Jiang, Zihang and Yuan, Li and Cheng, Ming-Ming and Yan, Shuicheng and Feng, Jiashi},
  journal={arXiv preprint arXiv:2106.12368},
  year={2021}
}
"""

import logging
from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import (
    DropPath,
    LayerNorm,
    Mlp,
    PatchEmbed,
    SelectAdaptivePool2d,
    calculate_drop_path_rates,
    get_device_dtype,
    to_2tuple,
)
from timm.models import (
    build_model_with_cfg,
    checkpoint,
    checkpoint_seq,
    generate_default_cfgs,
    named_apply,
    register_model,
)
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from torch import nn

from vip import ops

from .layers import channels_last, checkpoint_filter_fn, imagenet_cfg, init_linear, mix_tokens

__all__ = ["PermuteMlp", "VisionPermutator"]

_logger = logging.getLogger(__name__)


def _resize_matrix(old: int, new: int) -> torch.Tensor:
    """Linear map that resizes a signal of length `old` to `new`, [new, old] in float64; each row sums to one."""
    eye = torch.eye(old, dtype=torch.float64)[None, None]
    return F.interpolate(eye, size=(new, old), mode="bicubic", align_corners=False, antialias=True)[0, 0]


class AxisMix(nn.Linear):
    """Linear layer that mixes the tokens along one image axis, `segment_dim` channels at a time.

    Its `[length * segment_dim, length * segment_dim]` weight is resampled when the axis changes length, also when
    a checkpoint of another resolution is loaded, and where `dynamic` is set for every axis of another length.

    Args:
        length: Tokens along the axis.
        segment_dim: Channels of a segment.
    """

    def __init__(self, length: int, segment_dim: int, device=None, dtype=None) -> None:
        super().__init__(length * segment_dim, length * segment_dim, bias=False, device=device, dtype=dtype)
        self.segment_dim = segment_dim
        self.dynamic = False

    def resample(self, weight: torch.Tensor, length: int) -> torch.Tensor:
        """Resample a mixing matrix to an axis of `length` tokens.

        The new matrix resizes its input to the old length, mixes as before and resizes the result. What an output
        sums to over its inputs is kept: a constant input gives the old response, resized along the axis.

        Args:
            weight: `[H * S, H * S]` with S = `segment_dim`.
            length: New number of tokens.

        Returns:
            `[length * S, length * S]`, in the type of `weight`.

        Example:
            >>> mix = AxisMix(length=4, segment_dim=2)
            >>> larger = mix.resample(torch.ones(8, 8), length=7)
            >>> larger.shape
            torch.Size([14, 14])
            >>> torch.allclose(larger.sum(1), torch.full((14,), 8.0))
            True
        """
        dim, old = self.segment_dim, weight.shape[0] // self.segment_dim
        known = weight.device.type in ("cpu", "cuda", "meta")  # not every device knows float64
        device = weight.device if known else torch.device("cpu")
        up, down = (_resize_matrix(*sizes).to(device) for sizes in ((old, length), (length, old)))
        mixing = torch.einsum("ih,hsgt,gj->isjt", up, weight.to(device).double().view(old, dim, old, dim), down)
        return mixing.reshape(length * dim, length * dim).to(weight)

    def weight_for(self, size: int) -> torch.Tensor:
        """The weight for lines of `size` values, tokens times `segment_dim`."""
        if not torch.jit.is_scripting():  # TorchScript cannot resample
            if self.dynamic and size != self.weight.shape[0]:
                return self.resample(self.weight, size // self.segment_dim)
        return self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Mix lines `[..., H * S]`."""
        return F.linear(x, self.weight_for(x.shape[-1]))

    def mix(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        """Mix `[B, H, W, N, S]`, N segments of S channels, along its height (axis 1) or width (axis 2)."""
        lines = x.movedim(axis, 3)  # [B, W, N, H, S] or [B, H, N, W, S]
        mixed = self(lines.flatten(3)).reshape(lines.shape).movedim(3, axis)
        return mixed if torch.compiler.is_compiling() else mixed.contiguous()  # compilers read it where it lies

    @torch.no_grad()
    def set_length(self, length: int) -> None:
        """Resample the layer in place to an axis of `length` tokens."""
        self.in_features = self.out_features = length * self.segment_dim
        if self.weight.shape[0] != self.in_features:
            self.weight = nn.Parameter(self.resample(self.weight, length), requires_grad=self.weight.requires_grad)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        weight = state_dict.get(prefix + "weight")
        square = weight is not None and weight.ndim == 2 and weight.shape[0] == weight.shape[1]
        if square and weight.shape != self.weight.shape and weight.shape[0] % self.segment_dim == 0:
            length = self.in_features // self.segment_dim
            _logger.info(f"Resampling {prefix}weight from {weight.shape[0] // self.segment_dim} to {length} tokens.")
            state_dict[prefix + "weight"] = self.resample(weight, length)
        super()._load_from_state_dict(state_dict, prefix, *args)


class PermuteMlp(nn.Module):
    """Permute-MLP layer (section 3.2 of the paper) with weighted branches (split attention, eq. 4-6 there).

    Args:
        dim: Channels.
        segments: Channel segments; an image column of one segment is one input of the height branch.
        grid_size: Tokens along height and width.
        proj_drop: Dropout after the output projection.

    Raises:
        ValueError: If `segments` does not divide `dim`.
    """

    def __init__(
        self,
        dim: int,
        segments: int,
        grid_size: tuple[int, int],
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        if dim % segments:
            raise ValueError(f"{segments} segments do not divide {dim} channels.")
        self.segments = segments
        self.mlp_c = nn.Linear(dim, dim, bias=False, **dd)
        self.mlp_h = AxisMix(grid_size[0], dim // segments, **dd)
        self.mlp_w = AxisMix(grid_size[1], dim // segments, **dd)
        self.reweight = Mlp(dim, dim // 4, dim * 3, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def set_grid_size(self, grid_size: tuple[int, int]) -> None:
        """Resample the height and width branches to another token grid."""
        self.mlp_h.set_length(grid_size[0])
        self.mlp_w.set_length(grid_size[1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Mix `[B, H, W, C]` along height, width and channels."""
        B, H, W, C = x.shape
        if not torch.jit.is_scripting():
            x = ops.as_autocast(x)  # not in each branch; the gradients of the three are summed in this type, too
        S = C // self.segments
        x_bhwns = x.reshape(B, H, W, self.segments, S)
        if not torch.jit.is_scripting():  # by itself, as scripts compile what stands beside it
            if ops.use_weighted_mix(x_bhwns, self, (AxisMix, nn.Linear)):
                return self.proj_drop(ops.weighted_mix(x_bhwns, self))
        h, w = self.mlp_h.mix(x_bhwns, 1), self.mlp_w.mix(x_bhwns, 2)
        c = self.mlp_c(x).reshape(x_bhwns.shape)

        # sums, as a mean on a CPU copies what it reads in 16 bits to float32, and its gradient is no view; those of
        # float16 may be beyond its range
        wide = torch.float32 if isinstance(c, torch.Tensor) and c.dtype == torch.float16 else c.dtype
        pooled = (h.sum(1, dtype=wide) + w.sum(1, dtype=wide) + c.sum(1, dtype=wide)).mean(1) / H
        a = self.branch_weights(pooled.to(c.dtype))
        a_h, a_w, a_c = a.to(c.dtype).unbind(0)  # autocast's softmax is float32, and would make what it weighs so
        mixed = (c * a_c).addcmul_(w, a_w).addcmul_(h, a_h)
        return self.proj_drop(self.proj(mixed.reshape(x.shape)))

    def branch_weights(self, pooled: torch.Tensor) -> torch.Tensor:
        """Weigh the branches of height, width and channels, a sample and a channel at a time (eq. 4-6 of the paper).

        Args:
            pooled: Mean over the tokens of the sum of the branches, `[B, N, S]`.

        Returns:
            `[3, B, 1, 1, N, S]`.
        """
        B, N, S = pooled.shape
        a = self.reweight(pooled.flatten(1)).reshape(B, 1, 1, N, S, 3)  # fc2 lays its outputs out as [C, 3]
        return a.movedim(-1, 0).softmax(0)


class PermutatorBlock(nn.Module):
    """Pre-norm residual block: Permute-MLP over tokens, then an MLP over channels."""

    def __init__(
        self,
        dim: int,
        segments: int,
        grid_size: tuple[int, int],
        mlp_ratio: float = 3.0,
        norm_layer: Callable[..., nn.Module] = partial(LayerNorm, eps=1e-5),
        act_layer: type[nn.Module] = nn.GELU,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm1 = norm_layer(dim, **dd)
        self.attn = PermuteMlp(dim, segments, grid_size, proj_drop=proj_drop, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform `[B, H, W, C]`."""
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x


class Downsample(nn.Module):
    """Strided convolution between stages, on `[B, H, W, C]`."""

    def __init__(self, in_dim: int, out_dim: int, stride: int, device=None, dtype=None) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_dim, out_dim, kernel_size=stride, stride=stride, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Merge `[B, H, W, C_in]` into `[B, H/stride, W/stride, C_out]`."""
        return self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _check_img_size(img_size: tuple[int, int], patch_size: tuple[int, int], stride: int) -> None:
    """Refuse an image size that the patches and the strided stages do not divide."""
    if len(img_size) != 2 or min(patch_size) < 1:
        raise ValueError(f"Expected a height and a width, got image size {img_size} and patch size {patch_size}.")
    for axis, size, patch in zip(("height", "width"), img_size, patch_size, strict=True):
        step = patch * stride
        if size < step or size % step:
            lower = max(size // step, 1) * step
            raise ValueError(
                f"Image {axis} {size} does not work: a patch of {patch} and a stride of {stride} between stages need "
                f"a multiple of {step}. The nearest sizes that work are {lower} and {lower + step}."
            )


def _create_pool(pool_type: str) -> SelectAdaptivePool2d:
    return SelectAdaptivePool2d(pool_type=pool_type, flatten=bool(pool_type), input_fmt="NHWC")


class VisionPermutator(nn.Module):
    """Vision Permutator.

    Args:
        layers: Blocks of each stage.
        embed_dims: Channels of each stage.
        segments: Channel segments of the Permute-MLPs of each stage.
        transitions: Whether the token grid is halved after each stage but the last.
        img_size: Image size, an int or (height, width).
        patch_size: Patch size, an int or (height, width).
        in_chans: Image channels.
        num_classes: Classes of the head, 0 for none.
        global_pool: Pooling over the tokens, '' for none or one of timm's: 'avg', 'max', 'avgmax', ...
        mlp_ratio: Width of the channel MLPs relative to their stage.
        norm_layer: Normalization layer.
        act_layer: Activation of the channel MLPs.
        drop_rate: Dropout before the head.
        proj_drop_rate: Dropout in the Permute-MLP projections and the channel MLPs.
        drop_path_rate: Stochastic depth, growing linearly from 0 at the first block to this rate at the last.
        aux_head: Make an auxiliary head over the tokens, for `forward_dense`; `forward` does not use it.
        dynamic_img_size: Take images of every size that the patches and strides divide, with mixing matrices resampled
            to each in the forward pass, as `set_input_size` does it once; the weights keep `img_size`. Not in
            TorchScript.

    Raises:
        ValueError: If the image size does not fit the patches and strides, or the segments do not divide the channels.
    """

    output_fmt = "NHWC"

    def __init__(
        self,
        layers: tuple[int, ...] = (4, 3, 8, 3),
        embed_dims: tuple[int, ...] = (192, 384, 384, 384),
        segments: tuple[int, ...] = (32, 16, 16, 16),
        transitions: tuple[bool, ...] = (True, False, False),
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 7,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        mlp_ratio: float = 3.0,
        norm_layer: Callable[..., nn.Module] = partial(LayerNorm, eps=1e-5),
        act_layer: type[nn.Module] = nn.GELU,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        aux_head: bool = False,
        dynamic_img_size: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        if not len(layers) == len(embed_dims) == len(segments) == len(transitions) + 1:
            raise ValueError(
                f"Stages disagree: {len(layers)} layers, {len(embed_dims)} embed_dims, {len(segments)} segments and "
                f"{len(transitions)} transitions given, expected one transition less than the others."
            )
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = embed_dims[-1]
        self.grad_checkpointing = False
        self.dynamic_img_size = dynamic_img_size
        self.stride = prod(2 if t else 1 for t in transitions)

        patch_hw: tuple[int, int] = to_2tuple(patch_size)
        _check_img_size(to_2tuple(img_size), patch_hw, self.stride)
        patch_embed: Any = PatchEmbed  # its hints know square patches only
        strict = dict(strict_img_size=not dynamic_img_size, output_fmt="NHWC")
        self.patch_embed = patch_embed(img_size, patch_hw, in_chans, embed_dims[0], **strict, **dd)

        drop_path_rates: Iterator[Any] = iter(calculate_drop_path_rates(drop_path_rate, sum(layers)))
        network: list[nn.Module] = []
        self.stage_ends: list[int] = []
        self.feature_info: list[dict[str, Any]] = []
        grid_size, reduction = self.patch_embed.grid_size, max(patch_hw)
        for i, (depth, dim) in enumerate(zip(layers, embed_dims, strict=True)):
            if i > 0 and (transitions[i - 1] or dim != embed_dims[i - 1]):
                stride = 2 if transitions[i - 1] else 1
                network.append(Downsample(embed_dims[i - 1], dim, stride, **dd))
                grid_size, reduction = (grid_size[0] // stride, grid_size[1] // stride), reduction * stride
            block = partial(
                PermutatorBlock,
                dim,
                segments[i],
                grid_size,
                mlp_ratio=mlp_ratio,
                norm_layer=norm_layer,
                act_layer=act_layer,
                proj_drop=proj_drop_rate,
                **dd,
            )
            network.append(nn.Sequential(*(block(drop_path=next(drop_path_rates)) for _ in range(depth))))
            self.stage_ends.append(len(network) - 1)
            self.feature_info.append(dict(num_chs=dim, reduction=reduction, module=f"network.{len(network) - 1}"))
        self.network = nn.ModuleList(network)
        for module in self.network.modules():
            if isinstance(module, AxisMix):
                module.dynamic = dynamic_img_size

        self.norm = norm_layer(self.num_features, **dd)
        self.global_pool = _create_pool(global_pool)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(self.head_hidden_size, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.use_aux_head = aux_head
        self.aux_head = nn.Linear(self.num_features, num_classes, **dd) if aux_head and num_classes > 0 else None
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialize all weights as published: normal of std 0.02 for linear layers, zero biases."""
        named_apply(init_linear, self)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters to exempt from weight decay besides biases and norms: none."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that group parameters by depth; if `coarse`, by stage, with transitions as stages of their own."""
        return dict(
            stem=r"^patch_embed",
            blocks=r"^network\.(\d+)"
            if coarse
            else [(r"^network\.(\d+)\.(\d+)", None), (r"^network\.(\d+)", (0,)), (r"^norm", (99999,))],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass instead of keeping them."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Change the image and patch size in place, resampling the mixing matrices and the patch embedding.

        Args:
            img_size: New image size, the current one if None.
            patch_size: New patch size, the current one if None.

        Raises:
            ValueError: If the size does not fit the patches and strides; the model is unchanged then.
        """
        new_img_size: tuple[int, int] = to_2tuple(self.patch_embed.img_size if img_size is None else img_size)
        old_patch_size = self.patch_embed.patch_size
        new_patch_size: tuple[int, int] = to_2tuple(old_patch_size if patch_size is None else patch_size)
        _check_img_size(new_img_size, new_patch_size, self.stride)
        self.patch_embed.set_input_size(img_size=new_img_size, patch_size=new_patch_size)
        grid_size = self.patch_embed.grid_size
        for stage in self.network:
            if isinstance(stage, Downsample):
                stride = stage.proj.stride[0]
                grid_size = (grid_size[0] // stride, grid_size[1] // stride)
            else:
                for layer in stage.modules():
                    if isinstance(layer, PermuteMlp):
                        layer.set_grid_size(grid_size)
        for info in self.feature_info:
            info["reduction"] = info["reduction"] * max(new_patch_size) // max(old_patch_size)
        update_model_input_size(self, new_img_size, patch_size=patch_size)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classification head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the heads, and the pooling if given."""
        dd = get_device_dtype(self)
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = _create_pool(global_pool)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.head = nn.Linear(self.head_hidden_size, num_classes, **dd) if num_classes > 0 else nn.Identity()
        has_aux_head = self.use_aux_head and num_classes > 0
        self.aux_head = nn.Linear(self.num_features, num_classes, **dd) if has_aux_head else None
        for head in (self.head, self.aux_head):
            if head is not None:
                head.train(self.training)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Forward features that also returns the outputs of stages.

        Args:
            x: Images `[B, C, H, W]`.
            indices: Last n stages if int, all if None, else the stages with these indices.
            norm: Apply the final norm to the last stage's output.
            stop_early: Do not run the stages after the last one asked for.
            output_fmt: Layout of the intermediates, 'NCHW' or 'NHWC'.
            intermediates_only: Return the intermediates alone.

        Returns:
            The intermediates, or a tuple of final features `[B, H, W, C]` and intermediates.
        """
        assert output_fmt in ("NCHW", "NHWC"), "Output format must be one of NCHW or NHWC."
        take_indices, max_index = feature_take_indices(len(self.stage_ends), indices)
        take_indices = [self.stage_ends[i] for i in take_indices]
        last = len(self.network) - 1

        x = self._embed(x)
        if torch.jit.is_scripting() or not stop_early:  # TorchScript cannot slice a ModuleList
            network = self.network
        else:
            network = self.network[: self.stage_ends[max_index] + 1]
        intermediates = []
        i = 0
        for i, stage in enumerate(network):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(stage, x)
            else:
                x = stage(x)
            if i in take_indices:
                x_inter = self.norm(x) if norm and i == last else x
                intermediates.append(x_inter.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else x_inter)
        if intermediates_only:
            return intermediates
        if i == last:
            x = self.norm(x)  # the norm is sized for the last stage
        return x, intermediates

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove what the given intermediates do not need.

        Args:
            indices: Stages to keep, as in `forward_intermediates`.
            prune_norm: Remove the final norm.
            prune_head: Remove the head.

        Returns:
            The stage indices that were kept, counted from the first stage.
        """
        take_indices, max_index = feature_take_indices(len(self.stage_ends), indices)
        pruned = max_index < len(self.stage_ends) - 1
        self.network = self.network[: self.stage_ends[max_index] + 1]
        self.stage_ends = self.stage_ends[: max_index + 1]
        self.stride = prod(stage.proj.stride[0] for stage in self.network if isinstance(stage, Downsample))
        if pruned:
            self.num_features = self.feature_info[max_index]["num_chs"]
        if prune_norm or pruned:  # norm and head are sized for the last stage
            self.norm = nn.Identity()
        if prune_head or pruned:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images `[B, C, H, W]` to normalized tokens `[B, H', W', num_features]`."""
        return self._forward_stages(self._embed(x))

    def _embed(self, x: torch.Tensor) -> torch.Tensor:
        if self.dynamic_img_size and not torch.jit.is_scripting():
            _check_img_size((x.shape[-2], x.shape[-1]), self.patch_embed.patch_size, self.stride)
        return self.patch_embed(channels_last(x))

    def _forward_stages(self, x: torch.Tensor) -> torch.Tensor:
        for stage in self.network:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint_seq(stage, x) if isinstance(stage, nn.Sequential) else stage(x)
            else:
                x = stage(x)
        return self.norm(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Tokens to logits, or to what the head would read if `pre_logits`."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images `[B, C, H, W]` to logits `[B, num_classes]`."""
        return self.forward_head(self.forward_features(x))

    def forward_dense(self, x: torch.Tensor, mix: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Images to the outputs that token labeling supervises (arXiv 2104.10858).

        Args:
            x: Images `[B, C, H, W]`.
            mix: Boolean mask `[H', W']` on the final token grid: MixToken swaps what is under it with the batch in
                reverse order, after the patch embedding, and the outputs at these tokens back.

        Returns:
            Class logits `[B, num_classes]` and token logits `[B, H', W', num_classes]`.

        Raises:
            ValueError: If the model has no auxiliary head.
        """
        if self.aux_head is None:
            raise ValueError("This model has no auxiliary head: create it with aux_head=True and num_classes > 0.")
        x = self._embed(x)
        x = self._forward_stages(x if mix is None else mix_tokens(x, mix))
        aux = self.aux_head(self.head_drop(x))
        return self.forward_head(x), aux if mix is None else mix_tokens(aux, mix)


def _create_vip(variant: str, pretrained: bool = False, **kwargs: Any) -> VisionPermutator:
    out_indices = kwargs.pop("out_indices", tuple(range(len(kwargs["layers"]))))
    return build_model_with_cfg(
        VisionPermutator,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=out_indices, feature_cls="getter"),
        **kwargs,
    )


_cfg = partial(
    imagenet_cfg,
    first_conv="patch_embed.proj",
    paper_ids="arXiv:2106.12368",
    paper_name="Vision Permutator: A Permutable MLP-Like Architecture for Visual Recognition",
)

default_cfgs = generate_default_cfgs(
    {
        "vip_s14.untrained": _cfg(),
        "vip_s7.untrained": _cfg(),
        "vip_m7.untrained": _cfg(),
        "vip_l7.untrained": _cfg(crop_pct=0.875),
        "vip_ti7.untrained": _cfg(),
        "vip_nano4_32.untrained": _cfg(input_size=(3, 32, 32), crop_pct=1.0),
    }
)


@register_model
def vip_s14(pretrained: bool = False, **kwargs: Any) -> VisionPermutator:
    """ViP-Small/14 of the paper: one 16x16 token grid throughout, 29.9 M parameters."""
    args = dict(
        patch_size=14,
        layers=(4, 3, 8, 3),
        embed_dims=(384, 384, 384, 384),
        transitions=(False, False, False),
        segments=(16, 16, 16, 16),
    )
    return _create_vip("vip_s14", pretrained, **dict(args, **kwargs))


@register_model
def vip_s7(pretrained: bool = False, **kwargs: Any) -> VisionPermutator:
    """ViP-Small/7 of the paper, 25.1 M parameters."""
    args = dict(
        patch_size=7,
        layers=(4, 3, 8, 3),
        embed_dims=(192, 384, 384, 384),
        transitions=(True, False, False),
        segments=(32, 16, 16, 16),
    )
    return _create_vip("vip_s7", pretrained, **dict(args, **kwargs))


@register_model
def vip_m7(pretrained: bool = False, **kwargs: Any) -> VisionPermutator:
    """ViP-Medium/7 of the paper, 55.3 M parameters."""
    args = dict(
        patch_size=7,
        layers=(4, 3, 14, 3),
        embed_dims=(256, 256, 512, 512),
        transitions=(False, True, False),
        segments=(32, 32, 16, 16),
    )
    return _create_vip("vip_m7", pretrained, **dict(args, **kwargs))


@register_model
def vip_l7(pretrained: bool = False, **kwargs: Any) -> VisionPermutator:
    """ViP-Large/7 of the paper, 87.8 M parameters."""
    args = dict(
        patch_size=7,
        layers=(8, 8, 16, 4),
        embed_dims=(256, 512, 512, 512),
        transitions=(True, False, False),
        segments=(32, 16, 16, 16),
    )
    return _create_vip("vip_l7", pretrained, **dict(args, **kwargs))


@register_model
def vip_ti7(pretrained: bool = False, **kwargs: Any) -> VisionPermutator:
    """ViP-Small/7 at half its width, not in the paper: 6.4 M parameters."""
    args = dict(
        patch_size=7,
        layers=(4, 3, 8, 3),
        embed_dims=(96, 192, 192, 192),
        transitions=(True, False, False),
        segments=(32, 16, 16, 16),
    )
    return _create_vip("vip_ti7", pretrained, **dict(args, **kwargs))


@register_model
def vip_nano4_32(pretrained: bool = False, **kwargs: Any) -> VisionPermutator:
    """A Vision Permutator for 32x32 images, not in the paper: small enough to train on a laptop."""
    args = dict(
        img_size=32,
        patch_size=4,
        layers=(2, 1, 2, 1),
        embed_dims=(64, 128, 128, 128),
        transitions=(True, False, False),
        segments=(8, 4, 4, 4),
    )
    return _create_vip("vip_nano4_32", pretrained, **dict(args, **kwargs))
