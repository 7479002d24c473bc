"""Architectures, a module each. Importing this package imports all of them, and so registers every model with timm."""

import importlib
import pkgutil

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

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
