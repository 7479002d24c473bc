"""Where the operations of timm's augmentation policies move pixels, as matrices from (u, v, 1) to (x, y, 1)."""

import math
from collections.abc import Callable

import numpy as np
from timm.data.auto_augment import AugmentOp, AutoAugment, RandAugment

Matrix = np.ndarray


def crop_matrix(left: float, top: float, width: float, height: float) -> Matrix:
    """The matrix of an image that shows this part of another."""
    return np.array([[width, 0, left], [0, height, top], [0, 0, 1]], dtype=np.float64)


def _shear(x: float = 0.0, y: float = 0.0) -> Matrix:
    return np.array([[1, x, 0], [y, 1, 0], [0, 0, 1]], dtype=np.float64)


def _shift(x: float = 0.0, y: float = 0.0) -> Matrix:
    return crop_matrix(x, y, 1, 1)


def _rotation(width: int, height: int, degrees: float) -> Matrix:
    """Counterclockwise, about the middle, as Pillow rotates."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turn = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    x, y = width / 2, height / 2
    return _shift(x, y) @ turn @ _shift(-x, -y)


# The operations of timm's policies that move pixels: from width, height and their argument to the matrix over pixels.
MOVES: dict[str, Callable[[int, int, float], Matrix]] = {
    "Rotate": _rotation,
    "ShearX": lambda width, height, factor: _shear(x=factor),
    "ShearY": lambda width, height, factor: _shear(y=factor),
    "TranslateX": lambda width, height, pixels: _shift(x=pixels),
    "TranslateY": lambda width, height, pixels: _shift(y=pixels),
    "TranslateXRel": lambda width, height, share: _shift(x=share * width),
    "TranslateYRel": lambda width, height, share: _shift(y=share * height),
}


def policy_ops(policy: RandAugment | AutoAugment) -> list[AugmentOp]:
    """The operations of a policy."""
    return policy.ops if isinstance(policy, RandAugment) else sum(policy.policy, [])
