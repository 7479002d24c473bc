"""Architectures. Importing this package registers every model with timm."""

from .lv_vit import LVViT
from .vision_permutator import PermuteMlp, VisionPermutator

__all__ = ["LVViT", "PermuteMlp", "VisionPermutator"]
