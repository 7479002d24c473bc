"""LV-ViT in PyTorch, as timm models.

Paper: `All Tokens Matter: Token Labeling for Training Better Vision Transformers` - https://arxiv.org/abs/2104.10858

A vision transformer with a convolutional patch embedding and two heads: `head` reads the class token, `aux_head` every
other token. Token labeling supervises both (`LVViT.forward_dense`); at inference the strongest response of the
auxiliary head to any token is added, halved, to the class token's.

@article{jiang2021all,
  title={All Tokens Matter: Token Labeling for Training Better Vision Transformers},
  author={Jiang, Zihang and Hou, Qibin and Yuan, Li and Zhou, Daquan and Shi, Yujun and Jin, Xiaojie and Wang, Anran
    and Feng, Jiashi},
  journal={arXiv preprint arXiv:2104.10858},
  year={2021}
}
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers import (
    Attention,
    DropPath,
    LayerNorm,
    Mlp,
    calculate_drop_path_rates,
    get_device_dtype,
    resample_abs_pos_embed,
    to_2tuple,
)
from timm.layers.trace_utils import _assert
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

from . import layers
from .layers import channels_last, check_img_size, imagenet_cfg, init_linear, mix_tokens, resample_pos_embed

__all__ = ["LVViT"]


class ConvPatchEmbed(nn.Module):
    """Three convolutions at half the resolution, then a strided one: patches of 16 pixels (section 4.1 of the paper).

    Args:
        img_size: Height and width of the image.
        patch_size: Pixels a token covers, an even number.
        in_chans: Image channels.
        stem_dim: Channels of the first convolutions.
        embed_dim: Channels of the tokens.
        strict_img_size: Refuse images of other sizes.
    """

    def __init__(
        self,
        img_size: tuple[int, int],
        patch_size: int = 16,
        in_chans: int = 3,
        stem_dim: int = 64,
        embed_dim: int = 384,
        strict_img_size: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        if patch_size % 2:
            raise ValueError(
                f"Patch size {patch_size} is odd: the first convolution halves the image, so take an even one."
            )
        self.patch_size = to_2tuple(patch_size)
        self.strict_img_size = strict_img_size
        self.set_input_size(img_size)
        conv3x3 = partial(nn.Conv2d, stem_dim, stem_dim, kernel_size=3, padding=1, bias=False, **dd)
        self.conv1 = nn.Conv2d(in_chans, stem_dim, kernel_size=7, stride=2, padding=3, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(stem_dim, **dd)
        self.conv2 = conv3x3()
        self.bn2 = nn.BatchNorm2d(stem_dim, **dd)
        self.conv3 = conv3x3()
        self.bn3 = nn.BatchNorm2d(stem_dim, **dd)
        self.act = nn.ReLU(inplace=True)
        self.proj = nn.Conv2d(stem_dim, embed_dim, kernel_size=patch_size // 2, stride=patch_size // 2, **dd)

    def set_input_size(self, img_size: tuple[int, int]) -> None:
        """Change the image size the layer accepts.

        Raises:
            ValueError: If the patches do not divide it.
        """
        check_img_size(img_size, self.patch_size)
        self.img_size = img_size
        self.grid_size = img_size[0] // self.patch_size[0], img_size[1] // self.patch_size[1]

    def grid_size_of(self, x: torch.Tensor) -> tuple[int, int]:
        """Tokens along the height and width of images `[B, C, H, W]`."""
        if self.strict_img_size:
            return self.grid_size
        return x.shape[2] // self.patch_size[0], x.shape[3] // self.patch_size[1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images `[B, C, H, W]` to tokens `[B, H/16, W/16, embed_dim]`."""
        if self.strict_img_size:
            height, width = self.img_size
            _assert(x.shape[2] == height, f"Input height ({x.shape[2]}) doesn't match model ({height}).")
            _assert(x.shape[3] == width, f"Input width ({x.shape[3]}) doesn't match model ({width}).")
        elif not torch.jit.is_scripting():
            check_img_size(tuple(x.shape[2:]), self.patch_size)
        x = self.act(self.bn1(self.conv1(channels_last(x))))
        x = self.act(self.bn2(self.conv2(x)))
        x = self.act(self.bn3(self.conv3(x)))
        return self.proj(x).permute(0, 2, 3, 1)


class Block(nn.Module):
    """Pre-norm transformer block whose branches are divided by a residual scale."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 3.0,
        residual_scale: float = 1.0,
        norm_layer: Callable[..., nn.Module] = partial(LayerNorm, eps=1e-5),
        act_layer: type[nn.Module] = nn.GELU,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.residual_scale = residual_scale
        self.norm1 = norm_layer(dim, **dd)
        self.attn = Attention(dim, num_heads, attn_drop=attn_drop, proj_drop=proj_drop, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform `[B, N, C]`."""
        x = x + self.drop_path1(self.attn(self.norm1(x))) / self.residual_scale
        x = x + self.drop_path2(self.mlp(self.norm2(x))) / self.residual_scale
        return x


class LVViT(nn.Module):
    """LV-ViT: a vision transformer with a class head and an auxiliary head over the tokens.

    Args:
        img_size: Image size, an int or (height, width).
        patch_size: Pixels a token covers.
        in_chans: Image channels.
        num_classes: Classes of both heads, 0 for none.
        global_pool: 'token' reads the class token, 'avg' the mean of the others, '' returns all tokens.
        embed_dim: Channels.
        depth: Blocks.
        num_heads: Attention heads.
        mlp_ratio: Width of the MLPs relative to the channels.
        stem_dim: Channels of the patch embedding's first convolutions.
        residual_scale: Divisor of each residual branch.
        aux_head: Add the auxiliary head's strongest response to the logits, halved. Not with `global_pool=''`.
        norm_layer: Normalization layer.
        act_layer: Activation of the MLPs.
        drop_rate: Dropout before the heads.
        pos_drop_rate: Dropout after the position embedding.
        proj_drop_rate: Dropout in the attention projections and the MLPs.
        attn_drop_rate: Dropout of the attention weights.
        drop_path_rate: Stochastic depth, growing linearly from 0 at the first block to this rate at the last.
        dynamic_img_size: Take images of every size that the patches divide, with the position embedding resampled to
            each in the forward pass, as `set_input_size` does it once; the weights keep `img_size`. Not in TorchScript.

    Raises:
        ValueError: If the patches do not divide the image, or the pooling is unknown.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 384,
        depth: int = 16,
        num_heads: int = 6,
        mlp_ratio: float = 3.0,
        stem_dim: int = 64,
        residual_scale: float = 2.0,
        aux_head: bool = True,
        norm_layer: Callable[..., nn.Module] = partial(LayerNorm, eps=1e-5),
        act_layer: type[nn.Module] = nn.GELU,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        dynamic_img_size: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_prefix_tokens = 1
        self.use_aux_head = aux_head
        self.grad_checkpointing = False
        self.dynamic_img_size = dynamic_img_size
        self._set_global_pool(global_pool)

        self.patch_embed = ConvPatchEmbed(
            to_2tuple(img_size), patch_size, in_chans, stem_dim, embed_dim, strict_img_size=not dynamic_img_size, **dd
        )
        num_tokens = self.patch_embed.grid_size[0] * self.patch_embed.grid_size[1] + self.num_prefix_tokens
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim, **dd))
        self.pos_embed = nn.Parameter(torch.zeros(1, num_tokens, embed_dim, **dd))
        self.pos_drop = nn.Dropout(pos_drop_rate)
        drop_path_rates: list[Any] = calculate_drop_path_rates(drop_path_rate, depth)
        self.blocks = nn.Sequential(
            *(
                Block(
                    embed_dim,
                    num_heads,
                    mlp_ratio=mlp_ratio,
                    residual_scale=residual_scale,
                    norm_layer=norm_layer,
                    act_layer=act_layer,
                    proj_drop=proj_drop_rate,
                    attn_drop=attn_drop_rate,
                    drop_path=rate,
                    **dd,
                )
                for rate in drop_path_rates
            )
        )
        self.feature_info = [dict(module=f"blocks.{i}", num_chs=embed_dim, reduction=patch_size) for i in range(depth)]
        self.norm = norm_layer(embed_dim, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self._create_heads(dd)
        self.init_weights()

    def _set_global_pool(self, global_pool: str) -> None:
        if global_pool not in ("", "avg", "token"):
            raise ValueError(f"No pooling is called {global_pool!r}: expected 'token', 'avg' or ''.")
        self.global_pool = global_pool

    def _create_heads(self, dd: dict[str, Any]) -> None:
        has_head = self.num_classes > 0
        self.head = nn.Linear(self.embed_dim, self.num_classes, **dd) if has_head else nn.Identity()
        has_aux_head = self.use_aux_head and has_head and self.global_pool != ""
        self.aux_head = nn.Linear(self.embed_dim, self.num_classes, **dd) if has_aux_head else None

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialize all weights as published: normal of std 0.02, zero biases."""
        nn.init.normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=0.02)
        named_apply(init_linear, self)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters to exempt from weight decay besides biases and norms."""
        return {"pos_embed", "cls_token"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that group parameters by depth."""
        return dict(stem=r"^cls_token|pos_embed|patch_embed", blocks=[(r"^blocks\.(\d+)", None), (r"^norm", (99999,))])

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass instead of keeping them."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int] | None = None) -> None:
        """Change the image size in place, resampling the position embedding.

        Args:
            img_size: New image size, the current one if None.

        Raises:
            ValueError: If the patches do not divide it; the model is unchanged then.
        """
        new_img_size = to_2tuple(self.patch_embed.img_size if img_size is None else img_size)
        old_grid_size = self.patch_embed.grid_size
        self.patch_embed.set_input_size(new_img_size)
        pos_embed = resample_abs_pos_embed(
            self.pos_embed.detach(), self.patch_embed.grid_size, old_grid_size, self.num_prefix_tokens
        )
        self.pos_embed = nn.Parameter(pos_embed, requires_grad=self.pos_embed.requires_grad)
        update_model_input_size(self, new_img_size)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        resample_pos_embed(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The head of the class token."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace both heads, and the pooling if given."""
        self.num_classes = num_classes
        if global_pool is not None:
            self._set_global_pool(global_pool)
        self._create_heads(get_device_dtype(self))
        for head in (self.head, self.aux_head):
            if head is not None:
                head.train(self.training)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Forward features that also returns the outputs of blocks.

        Args:
            x: Images `[B, C, H, W]`.
            indices: Last n blocks if int, all if None, else the blocks with these indices.
            return_prefix_tokens: Return pairs of an intermediate and its class token.
            norm: Apply the final norm to the intermediates.
            stop_early: Do not run the blocks after the last one asked for.
            output_fmt: Layout of the intermediates, 'NCHW' or 'NLC'.
            intermediates_only: Return the intermediates alone.

        Returns:
            The intermediates, or a tuple of final features `[B, 1 + H*W, C]` and intermediates.
        """
        assert output_fmt in ("NCHW", "NLC"), "Output format must be one of NCHW or NLC."
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        H, W = self.patch_embed.grid_size_of(x)
        x = self._embed(x)
        if torch.jit.is_scripting() or not stop_early:  # TorchScript cannot slice a Sequential
            blocks = self.blocks
        else:
            blocks = self.blocks[: max_index + 1]
        taken = []
        for i, block in enumerate(blocks):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x)
            else:
                x = block(x)
            if i in take_indices:
                taken.append(self.norm(x) if norm else x)
        prefix_tokens = [y[:, : self.num_prefix_tokens] for y in taken]
        intermediates = [y[:, self.num_prefix_tokens :] for y in taken]
        if output_fmt == "NCHW":
            intermediates = [y.reshape(y.shape[0], H, W, -1).permute(0, 3, 1, 2).contiguous() for y in intermediates]
        if not torch.jit.is_scripting() and return_prefix_tokens:  # TorchScript has no list of pairs or tensors
            intermediates = list(zip(intermediates, prefix_tokens, strict=True))
        if intermediates_only:
            return intermediates
        return self.norm(x), intermediates

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove what the given intermediates do not need.

        Args:
            indices: Blocks to keep, as in `forward_intermediates`.
            prune_norm: Remove the final norm.
            prune_head: Remove the heads.

        Returns:
            The block indices that were kept.
        """
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: max_index + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take_indices

    def _embed(self, x: torch.Tensor, mix: torch.Tensor | None = None) -> torch.Tensor:
        x = self.patch_embed(x)
        if mix is not None:
            x = mix_tokens(x, mix)
        grid_size = x.shape[1], x.shape[2]
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x.flatten(1, 2)), dim=1)
        pos_embed = self.pos_embed
        if not torch.jit.is_scripting():  # TorchScript cannot resample
            if self.dynamic_img_size and grid_size != self.patch_embed.grid_size:
                pos_embed = resample_abs_pos_embed(
                    pos_embed, grid_size, self.patch_embed.grid_size, self.num_prefix_tokens
                )
        return self.pos_drop(x + pos_embed)

    def _forward_blocks(self, x: torch.Tensor) -> torch.Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return self.norm(x)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images `[B, C, H, W]` to normalized tokens `[B, 1 + H'*W', embed_dim]`, the class token first."""
        return self._forward_blocks(self._embed(x))

    def _pool(self, x: torch.Tensor) -> torch.Tensor:
        if self.global_pool == "token":
            return x[:, 0]
        if self.global_pool == "avg":
            return x[:, 1:].mean(1)
        return x

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Tokens to logits, or to what the head would read if `pre_logits`."""
        pooled = self.head_drop(self._pool(x))
        if pre_logits:
            return pooled
        logits = self.head(pooled)
        if self.aux_head is not None:
            logits = logits + 0.5 * self.aux_head(self.head_drop(x[:, 1:])).amax(1)
        return logits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images `[B, C, H, W]` to logits `[B, num_classes]`."""
        return self.forward_head(self.forward_features(x))

    def forward_dense(self, x: torch.Tensor, mix: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Images to the outputs that token labeling supervises (section 3 of the paper).

        Args:
            x: Images `[B, C, H, W]`.
            mix: Boolean mask `[H', W']` on the token grid: MixToken swaps these tokens with those of the batch in
                reverse order, and the outputs at these tokens back.

        Returns:
            Class logits `[B, num_classes]` and token logits `[B, H', W', num_classes]`.

        Raises:
            ValueError: If the model has no auxiliary head.
        """
        if self.aux_head is None:
            raise ValueError("This model has no auxiliary head: create it with aux_head=True and num_classes > 0.")
        H, W = self.patch_embed.grid_size_of(x)
        x = self._forward_blocks(self._embed(x, mix))
        aux = self.aux_head(self.head_drop(x[:, 1:])).reshape(x.shape[0], H, W, -1)
        return self.head(self.head_drop(self._pool(x))), aux if mix is None else mix_tokens(aux, mix)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
    """Unwrap published checkpoints, and leave out the auxiliary head where the model has none."""
    state_dict = layers.checkpoint_filter_fn(state_dict, model)
    if getattr(model, "aux_head", None) is None:
        state_dict = {k: v for k, v in state_dict.items() if not k.startswith("aux_head.")}
    return state_dict


def _create_lvvit(variant: str, pretrained: bool = False, **kwargs: Any) -> LVViT:
    out_indices = kwargs.pop("out_indices", 3)
    return build_model_with_cfg(
        LVViT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=out_indices, feature_cls="getter"),
        **kwargs,
    )


_cfg = partial(
    imagenet_cfg,
    first_conv="patch_embed.conv1",
    classifier=("head", "aux_head"),
    paper_ids="arXiv:2104.10858",
    paper_name="All Tokens Matter: Token Labeling for Training Better Vision Transformers",
)

default_cfgs = generate_default_cfgs(
    {
        "lvvit_t.untrained": _cfg(),
        "lvvit_s.untrained": _cfg(),
        "lvvit_m.untrained": _cfg(crop_pct=1.0),
        "lvvit_l.untrained": _cfg(crop_pct=1.0),
        "lvvit_nano4_32.untrained": _cfg(input_size=(3, 32, 32), crop_pct=1.0),
    }
)


@register_model
def lvvit_t(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-T of the published code, 8.5 M parameters."""
    args = dict(embed_dim=240, depth=12, num_heads=4, residual_scale=1.0)
    return _create_lvvit("lvvit_t", pretrained, **dict(args, **kwargs))


@register_model
def lvvit_s(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-S of the paper, 26.2 M parameters."""
    args = dict(embed_dim=384, depth=16, num_heads=6, residual_scale=2.0)
    return _create_lvvit("lvvit_s", pretrained, **dict(args, **kwargs))


@register_model
def lvvit_m(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-M of the paper, 55.8 M parameters."""
    args = dict(embed_dim=512, depth=20, num_heads=8, residual_scale=2.0)
    return _create_lvvit("lvvit_m", pretrained, **dict(args, **kwargs))


@register_model
def lvvit_l(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-L of the paper, 150 M parameters."""
    args = dict(embed_dim=768, depth=24, num_heads=12, residual_scale=3.0, stem_dim=128)
    return _create_lvvit("lvvit_l", pretrained, **dict(args, **kwargs))


@register_model
def lvvit_nano4_32(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """An LV-ViT for 32x32 images, not in the paper: small enough to train on a laptop."""
    args = dict(img_size=32, patch_size=4, embed_dim=96, depth=6, num_heads=3, residual_scale=1.0, stem_dim=32)
    return _create_lvvit("lvvit_nano4_32", pretrained, **dict(args, **kwargs))
