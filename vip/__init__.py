"""Vision Permutator for PyTorch: `import vip` registers its models with timm.

Example:
    >>> import timm, torch, vip
    >>> timm.list_models("vip_*")
    ['vip_l7', 'vip_m7', 'vip_nano4_32', 'vip_s7', 'vip_s14', 'vip_ti7']
    >>> model = timm.create_model("vip_nano4_32", img_size=48, num_classes=5)
    >>> model(torch.zeros(1, 3, 48, 48)).shape
    torch.Size([1, 5])
"""

from . import models
from .models.inference import optimize_for_inference
from .version import __version__

__all__ = ["__version__", "models", "optimize_for_inference"]
