"""Architectures. Importing this package registers every model with timm."""

from .external_attention_mlp import ExternalAttention, ExternalAttentionMlp
from .lv_vit import LVViT
from .resmlp import resmlp_big_24_p16_224
from .vision_permutator import PermuteMlp, VisionPermutator

__all__ = [
    "ExternalAttention",
    "ExternalAttentionMlp",
    "LVViT",
    "PermuteMlp",
    "VisionPermutator",
    "resmlp_big_24_p16_224",
]
