"""ResMLP-B24 with patches of 16 pixels, a member of the family that timm lacks.

Paper: `ResMLP: Feedforward networks for image classification with data-efficient training` -
    https://arxiv.org/abs/2105.03404

Its table 3 has it at 116 M parameters and 81.0 % top-1; timm's `resmlp_big_24_224` has patches of 8 pixels.
"""

from functools import partial
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock, checkpoint_filter_fn

from .layers import imagenet_cfg

default_cfgs = generate_default_cfgs(
    {
        "resmlp_big_24_p16_224.untrained": imagenet_cfg(
            crop_pct=0.9,
            first_conv="stem.proj",
            paper_ids="arXiv:2105.03404",
            paper_name="ResMLP: Feedforward networks for image classification with data-efficient training",
        )
    }
)


@register_model
def resmlp_big_24_p16_224(pretrained: bool = False, **kwargs: Any) -> MlpMixer:
    """ResMLP-B24 of the paper, patches of 16 pixels, 116 M parameters."""
    args = dict(
        patch_size=16,
        num_blocks=24,
        embed_dim=768,
        mlp_ratio=4,
        block_layer=partial(ResBlock, init_values=1e-6),
        norm_layer=Affine,
    )
    out_indices = kwargs.pop("out_indices", 3)
    return build_model_with_cfg(
        MlpMixer,
        "resmlp_big_24_p16_224",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=out_indices, feature_cls="getter"),
        **dict(args, **kwargs),
    )
