"""Vision Permutator for PyTorch: `import vip` registers its models with timm."""

from . import models
from .models.inference import optimize_for_inference
from .version import __version__

__all__ = ["__version__", "models", "optimize_for_inference"]
