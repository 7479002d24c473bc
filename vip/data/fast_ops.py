"""The operations of timm's augmentation policies by OpenCV, on uint8 images.

What looks levels up gives what Pillow does to the bit. Contrast, color, sharpness and bicubic shifts differ by a level
at most, other moves by the filters of the libraries.
"""

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import AugmentOp
from torchvision.transforms.functional import pil_to_tensor

from vip.data.moves import MOVES, crop_matrix

Pixels = np.ndarray  # [H, W, C]

_WARPS = {
    Image.Resampling.NEAREST: cv2.INTER_NEAREST,
    Image.Resampling.BILINEAR: cv2.INTER_LINEAR,
    Image.Resampling.BICUBIC: cv2.INTER_CUBIC,
}
_LEVELS = np.arange(256)
_DOWN = -0.499  # before rounding: Pillow blends to the next lower level, and OpenCV to the nearest
_GRAY = np.array([0.299, 0.587, 0.114])  # Pillow's mode L


def accelerate_op(op: AugmentOp) -> None:
    """Let an operation of timm take and give uint8 images `[C, H, W]` of one or three channels; others by Pillow."""
    name = op.name.removesuffix("Increasing").removesuffix("Original")
    function: Any = partial(_by_pillow, op.aug_fn)  # type: ignore[arg-type]  # a function of Pillow's images
    if name in MOVES:
        function = partial(_on_pixels, partial(_move, name))
    elif name in _COLOURINGS:
        function = partial(_on_pixels, _COLOURINGS[name])
    op.aug_fn = function


def to_pillow(image: torch.Tensor) -> Image.Image:
    """The Pillow image of a tensor `[C, H, W]`."""
    return Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy())


def _by_pillow(function: Callable[..., Image.Image], image: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return pil_to_tensor(function(to_pillow(image), *args, **kwargs))


def _on_pixels(function: Callable[..., Pixels], image: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    pixels = image.permute(1, 2, 0).numpy()
    made = function(pixels, *args, **kwargs)
    return torch.from_numpy(made.reshape(pixels.shape)).permute(2, 0, 1)  # OpenCV leaves a single channel out


def _move(name: str, pixels: Pixels, amount: float, fillcolor: Any, resample: Any) -> Pixels:
    if isinstance(resample, tuple | list):
        resample = random.choice(resample)
    height, width, channels = pixels.shape
    matrix = MOVES[name](width, height, amount)
    if name.startswith("Translate") and resample == Image.Resampling.BICUBIC:
        whole = np.floor(matrix + 0.5)  # by which pixels are moved; OpenCV's own filter takes six times as long
        columns, rows = (_cubic(part) for part in (matrix - whole)[:2, 2])
        pixels = cv2.filter2D(pixels, -1, np.outer(rows, columns), borderType=cv2.BORDER_REPLICATE)
        matrix, resample = whole, Image.Resampling.NEAREST
    # pixels are at their middles for Pillow, and at whole numbers for OpenCV
    matrix = crop_matrix(-0.5, -0.5, 1, 1) @ matrix @ crop_matrix(0.5, 0.5, 1, 1)
    flags = _WARPS[resample] | cv2.WARP_INVERSE_MAP
    warp = partial(cv2.warpAffine, M=matrix[:2], dsize=(width, height), flags=flags, borderValue=fillcolor)
    if channels == 3 and resample == Image.Resampling.BILINEAR:  # of which OpenCV is faster with four channels
        return cv2.cvtColor(warp(cv2.cvtColor(pixels, cv2.COLOR_RGB2RGBA)), cv2.COLOR_RGBA2RGB)
    return warp(pixels)


def _cubic(part: float) -> np.ndarray:
    """Pillow's bicubic filter for a place that is a part of a pixel beside one, over the pixels around it."""
    t = abs(np.arange(-2, 3) - part)
    return np.where(t < 1, (t - 2) * t * t + 1, np.where(t < 2, ((5 - t) * t - 8) * t + 4, 0))


def _look_up(pixels: Pixels, *tables: np.ndarray) -> Pixels:
    """Replace levels by those of a table, or of a table for each channel."""
    return cv2.LUT(pixels, np.stack(tables, -1).clip(0, 255).astype(np.uint8)[None])


def _blend_with(level: int, pixels: Pixels, factor: float, **_: Any) -> Pixels:
    """Pillow's blending of one level with an image, in its precision."""
    return _look_up(pixels, np.float32(level) + np.float32(factor) * (_LEVELS - level).astype(np.float32))


def _auto_contrast(pixels: Pixels, **_: Any) -> Pixels:
    lowest, highest = pixels.min(0).min(0).tolist(), pixels.max(0).max(0).tolist()  # over both axes it takes far longer
    tables = []
    for low, high in zip(lowest, highest, strict=True):
        scale = 255 / (high - low) if high > low else 0
        tables.append(_LEVELS * scale - low * scale if scale else _LEVELS)
    return _look_up(pixels, *tables)


def _equalize(pixels: Pixels, **_: Any) -> Pixels:
    tables = []
    for channel in range(pixels.shape[2]):
        counts = cv2.calcHist([pixels], [channel], None, [256], [0, 256]).ravel().astype(np.int64)
        step = (counts.sum() - counts[np.flatnonzero(counts)[-1]]) // 255
        tables.append((step // 2 + counts.cumsum() - counts) // step if step else _LEVELS)
    return _look_up(pixels, *tables)


def _invert(pixels: Pixels, **_: Any) -> Pixels:
    return cv2.bitwise_not(pixels)


def _posterize(pixels: Pixels, bits: int, **_: Any) -> Pixels:
    return _look_up(pixels, _LEVELS & -(1 << (8 - min(bits, 8))))


def _solarize(pixels: Pixels, threshold: int, **_: Any) -> Pixels:
    return _look_up(pixels, np.where(_LEVELS < threshold, _LEVELS, 255 - _LEVELS))


def _solarize_add(pixels: Pixels, add: int, **_: Any) -> Pixels:
    return _look_up(pixels, np.where(_LEVELS < 128, _LEVELS + add, _LEVELS))


def _contrast(pixels: Pixels, factor: float, **_: Any) -> Pixels:
    gray = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY) if pixels.shape[2] == 3 else pixels
    return _blend_with(int(cv2.mean(gray)[0] + 0.5), pixels, factor)


def _color(pixels: Pixels, factor: float, **_: Any) -> Pixels:
    if pixels.shape[2] == 1:
        return pixels
    matrix = factor * np.eye(3) + (1 - factor) * _GRAY
    return cv2.transform(pixels, np.column_stack((matrix, np.full(3, _DOWN))))


def _sharpness(pixels: Pixels, factor: float, **_: Any) -> Pixels:
    blurred = (1 - factor) * 9 / 13  # Pillow blends with the mean of the neighbours, of which the pixel itself is five
    made = cv2.addWeighted(pixels, 1 - blurred, cv2.blur(pixels, (3, 3)), blurred, _DOWN).reshape(pixels.shape)
    made[[0, -1]], made[:, [0, -1]] = pixels[[0, -1]], pixels[:, [0, -1]]  # which it leaves as they are
    return made


_COLOURINGS: dict[str, Callable[..., Pixels]] = {
    "AutoContrast": _auto_contrast,
    "Brightness": partial(_blend_with, 0),
    "Color": _color,
    "Contrast": _contrast,
    "Equalize": _equalize,
    "Invert": _invert,
    "Posterize": _posterize,
    "Sharpness": _sharpness,
    "Solarize": _solarize,
    "SolarizeAdd": _solarize_add,
}
