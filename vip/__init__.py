"""Vision Permutator for PyTorch: `import vip` registers its models with timm."""

from . import models
from .version import __version__

__all__ = ["__version__", "models"]
