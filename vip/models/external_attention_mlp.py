"""EAMLP: external attention in a tokens-to-token backbone, in PyTorch, as timm models.

Papers:
    `Beyond Self-attention: External Attention using Two Linear Layers for Visual Tasks` -
        https://arxiv.org/abs/2105.02358
    `Tokens-to-Token ViT: Training Vision Transformers from Scratch on ImageNet` - https://arxiv.org/abs/2101.11986

External attention compares tokens with a learned memory instead of with each other: two linear layers, with a softmax
over the tokens and a normalization over the memory units between them. The trunk is timm's `VisionTransformer`.

@article{guo2022beyond,
  title={Beyond Self-attention: External Attention using Two Linear Layers for Visual Tasks},
  author={Guo, Meng-Hao and Liu, Zheng-Ning and Mu, Tai-Jiang and Hu, Shi-Min},
  journal={IEEE Transactions on Pattern Analysis and Machine Intelligence},
  year={2022}
}
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm, Mlp, to_2tuple
from timm.layers.trace_utils import _assert
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, named_apply, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from .layers import check_img_size, checkpoint_filter_fn, imagenet_cfg, init_linear, resample_pos_embed

__all__ = ["ExternalAttention", "ExternalAttentionMlp"]


def _normalize(attn: torch.Tensor) -> torch.Tensor:
    """Softmax over the tokens, then shares of the memory units: `[..., tokens, memory]` (arXiv 2105.02358, eq. 6)."""
    attn = attn.softmax(-2)
    return attn / (1e-9 + attn.sum(-1, keepdim=True))


class TokenAttention(nn.Module):
    """External attention of one head that also changes the channels, with the residual connection inside.

    Args:
        in_dim: Channels of the input.
        dim: Channels of the output.
        memory: Memory units.
    """

    def __init__(self, in_dim: int, dim: int, memory: int = 128, device=None, dtype=None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.q_linear = nn.Linear(in_dim, dim, **dd)
        self.linear_0 = nn.Linear(dim, memory, bias=False, **dd)
        self.linear_1 = nn.Linear(memory, dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform `[B, N, in_dim]` to `[B, N, dim]`."""
        x = self.q_linear(x)
        return x + self.proj(self.linear_1(_normalize(self.linear_0(x))))


class TokenBlock(nn.Module):
    """Block of the tokens-to-token stem."""

    def __init__(self, in_dim: int, dim: int, norm_layer: Callable[..., nn.Module], device=None, dtype=None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm1 = norm_layer(in_dim, **dd)
        self.attn = TokenAttention(in_dim, dim, **dd)
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = Mlp(dim, dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform `[B, N, in_dim]` to `[B, N, dim]`."""
        x = self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TokensToToken(nn.Module):
    """Stem: overlapping patches become tokens, neighbours of which are joined, twice (arXiv 2101.11986, section 3.1).

    Args:
        img_size: Height and width of the image.
        patch_size: Pixels a token is apart from the next, 16.
        in_chans: Image channels.
        embed_dim: Channels of the tokens.
        token_dim: Channels between the steps.
        norm_layer: Normalization layer.

    Raises:
        ValueError: If the image is no multiple of 16 pixels.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 384,
        token_dim: int = 64,
        norm_layer: Callable[..., nn.Module] = partial(LayerNorm, eps=1e-5),
        device=None,
        dtype=None,
        **_: Any,  # what VisionTransformer tells a convolution
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        if patch_size != 16:
            raise ValueError(f"Patch size {patch_size} does not work: the three unfoldings make tokens of 16 pixels.")
        self.patch_size = to_2tuple(patch_size)
        self.strict_img_size = True
        self.set_input_size(to_2tuple(img_size))
        self.attention1 = TokenBlock(in_chans * 7 * 7, token_dim, norm_layer, **dd)
        self.attention2 = TokenBlock(token_dim * 3 * 3, token_dim, norm_layer, **dd)
        self.project = nn.Linear(token_dim * 3 * 3, embed_dim, **dd)

    def set_input_size(self, img_size: tuple[int, int] | None = None, patch_size: int | None = None) -> None:
        """Change the image size the layer accepts; the patch size is what it is.

        Raises:
            ValueError: If the image is no multiple of 16 pixels, or another patch size is asked for.
        """
        if patch_size is not None and to_2tuple(patch_size) != self.patch_size:
            raise ValueError(f"Patch size {patch_size} does not work: the three unfoldings make tokens of 16 pixels.")
        if img_size is not None:
            check_img_size(to_2tuple(img_size), self.patch_size)
            self.img_size: tuple[int, int] = to_2tuple(img_size)
            self.grid_size = self.img_size[0] // 16, self.img_size[1] // 16
            self.num_patches = self.grid_size[0] * self.grid_size[1]

    def feat_ratio(self) -> int:
        """Pixels a token is apart from the next."""
        return self.patch_size[0]

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """The token grid of an image."""
        return img_size[0] // self.patch_size[0], img_size[1] // self.patch_size[1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images `[B, C, H, W]` to tokens `[B, H/16 * W/16, embed_dim]`."""
        height, width = x.shape[-2:]
        _assert(height == self.img_size[0], f"Input height ({height}) doesn't match model ({self.img_size[0]}).")
        _assert(width == self.img_size[1], f"Input width ({width}) doesn't match model ({self.img_size[1]}).")
        x = F.unfold(x, kernel_size=7, stride=4, padding=2).transpose(1, 2)
        x = self._join(self.attention1(x), height // 4, width // 4)
        x = self._join(self.attention2(x), height // 8, width // 8)
        return self.project(x)

    def _join(self, x: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Tokens `[B, H*W, C]` to those of half the grid, each the 3x3 neighbourhood `[B, H/2*W/2, 9*C]`."""
        x = x.transpose(1, 2).reshape(x.shape[0], -1, height, width)
        return F.unfold(x, kernel_size=3, stride=2, padding=1).transpose(1, 2)


class ExternalAttention(nn.Module):
    """External attention of several heads, over four times the channels (arXiv 2105.02358, section 3.3).

    Args:
        dim: Channels.
        num_heads: Heads of the backbone, a quarter of those of the attention.
        memory: Memory units of a head.
        attn_drop: Dropout of the attention weights.
        proj_drop: Dropout after the projection.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        memory: int = 64,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"{num_heads} heads do not divide {dim} channels.")
        self.num_heads = 4 * num_heads
        self.trans_dims = nn.Linear(dim, 4 * dim, **dd)
        self.linear_0 = nn.Linear(dim // num_heads, memory, **dd)
        self.linear_1 = nn.Linear(memory, dim // num_heads, **dd)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(4 * dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform `[B, N, C]`."""
        x = self.trans_dims(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, heads, N, C / num_heads]
        x = self.linear_1(self.attn_drop(_normalize(self.linear_0(x))))
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    """Pre-norm block of external attention and an MLP."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 3.0,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        norm_layer: Callable[..., nn.Module] = partial(LayerNorm, eps=1e-5),
        act_layer: type[nn.Module] = nn.GELU,
        device=None,
        dtype=None,
        **_: Any,  # what VisionTransformer tells self-attention
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm1 = norm_layer(dim, **dd)
        self.attn = ExternalAttention(dim, num_heads, attn_drop=attn_drop, proj_drop=proj_drop, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform `[B, N, C]`."""
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


def sinusoids(length: int, dim: int, device=None, dtype=None) -> torch.Tensor:
    """The fixed position embedding `[1, length, dim]` of arXiv 1706.03762, in float32 precision as published."""
    position = torch.arange(length, dtype=torch.float64)[:, None]
    channel = torch.arange(dim, dtype=torch.float64)
    angle = position / 10000 ** (2 * (channel // 2) / dim)
    table = torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()
    return table[None].to(device=device, dtype=dtype)


class ExternalAttentionMlp(VisionTransformer):
    """EAMLP: external attention in a tokens-to-token backbone.

    Args:
        img_size: Image size, an int or (height, width), multiples of 16.
        in_chans: Image channels.
        num_classes: Classes of the head, 0 for none.
        global_pool: 'token' reads the class token, 'avg' the mean of the others, '' returns all tokens.
        embed_dim: Channels.
        depth: Blocks.
        num_heads: A quarter of the heads of the external attention.
        mlp_ratio: Width of the MLPs relative to the channels.
        norm_layer: Normalization layer.
        act_layer: Activation of the MLPs.
        drop_rate: Dropout before the head.
        pos_drop_rate: Dropout after the position embedding.
        proj_drop_rate: Dropout after the attention's projection and in the MLPs.
        attn_drop_rate: Dropout of the attention weights.
        drop_path_rate: Stochastic depth, growing linearly from 0 at the first block to this rate at the last.
    """

    __jit_unused_properties__ = ["patch_embed"]

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 384,
        depth: int = 14,
        num_heads: int = 6,
        mlp_ratio: float = 3.0,
        norm_layer: Callable[..., nn.Module] = partial(LayerNorm, eps=1e-5),
        act_layer: type[nn.Module] = nn.GELU,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(
            img_size=img_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,  # type: ignore[arg-type]  # timm lists them as literals
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            fc_norm=False,
            norm_layer=norm_layer,
            act_layer=act_layer,
            drop_rate=drop_rate,
            pos_drop_rate=pos_drop_rate,
            proj_drop_rate=proj_drop_rate,
            attn_drop_rate=attn_drop_rate,
            drop_path_rate=drop_path_rate,
            embed_layer=TokensToToken,
            block_fn=Block,
            weight_init="skip",
            device=device,
            dtype=dtype,
        )
        stem = self._modules.pop("patch_embed")
        assert isinstance(stem, TokensToToken)
        self.tokens_to_token = stem  # its published name
        self.init_weights()

    @property
    def patch_embed(self) -> TokensToToken:
        """The stem, as timm's trunk calls it."""
        return self.tokens_to_token

    @torch.jit.ignore
    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Initialize all weights as published: normal of std 0.02, zero biases, fixed positions."""
        assert self.pos_embed is not None and self.cls_token is not None
        self.pos_embed.requires_grad_(False).copy_(sinusoids(*self.pos_embed.shape[1:]))
        nn.init.normal_(self.cls_token, std=0.02)
        named_apply(_init_weights, self)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters to exempt from weight decay besides biases and norms."""
        return {"cls_token"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that group parameters by depth."""
        return dict(
            stem=r"^cls_token|pos_embed|tokens_to_token", blocks=[(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]
        )

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images `[B, C, H, W]` to normalized tokens `[B, 1 + H'*W', embed_dim]`, the class token first."""
        x = self._pos_embed(self.tokens_to_token(x))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return self.norm(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images `[B, C, H, W]` to logits `[B, num_classes]`."""
        return self.forward_head(self.forward_features(x))

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        resample_pos_embed(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _init_weights(module: nn.Module, name: str) -> None:
    init_linear(module, name)
    if isinstance(module, TokenAttention):  # after its linear layers: the memory's keys are its values at first
        with torch.no_grad():
            module.linear_1.weight.copy_(module.linear_0.weight.T)


def _create_eamlp(variant: str, pretrained: bool = False, **kwargs: Any) -> ExternalAttentionMlp:
    out_indices = kwargs.pop("out_indices", 3)
    return build_model_with_cfg(
        ExternalAttentionMlp,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=out_indices, feature_cls="getter"),
        **kwargs,
    )


_cfg = partial(
    imagenet_cfg,
    first_conv=None,
    paper_ids="arXiv:2105.02358",
    paper_name="Beyond Self-attention: External Attention using Two Linear Layers for Visual Tasks",
)

default_cfgs = generate_default_cfgs(
    {"eamlp_7.untrained": _cfg(), "eamlp_14.untrained": _cfg(), "eamlp_19.untrained": _cfg()}
)


@register_model
def eamlp_7(pretrained: bool = False, **kwargs: Any) -> ExternalAttentionMlp:
    """EAMLP-7 of the published code, 6.1 M parameters."""
    args = dict(embed_dim=256, depth=7, num_heads=4, mlp_ratio=2.0)
    return _create_eamlp("eamlp_7", pretrained, **dict(args, **kwargs))


@register_model
def eamlp_14(pretrained: bool = False, **kwargs: Any) -> ExternalAttentionMlp:
    """EAMLP-14 of the paper, 29.9 M parameters."""
    args = dict(embed_dim=384, depth=14, num_heads=6, mlp_ratio=3.0)
    return _create_eamlp("eamlp_14", pretrained, **dict(args, **kwargs))


@register_model
def eamlp_19(pretrained: bool = False, **kwargs: Any) -> ExternalAttentionMlp:
    """EAMLP-19 of the paper, 54.6 M parameters."""
    args = dict(embed_dim=448, depth=19, num_heads=7, mlp_ratio=3.0)
    return _create_eamlp("eamlp_19", pretrained, **dict(args, **kwargs))
