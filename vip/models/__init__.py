"""Architectures. Importing this package registers every model with timm."""

from .vision_permutator import PermuteMlp, VisionPermutator

__all__ = ["PermuteMlp", "VisionPermutator"]
