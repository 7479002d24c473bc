"""Vision Permutator spelled out in NumPy, float64: one einsum a formula, every axis an index of its own.

Indices: b sample, i and h rows of the token grid, j and w columns, n segment, s and t channels in a segment,
c and d channels, p and q pixels of a patch. Weights come as a flat dict with the names of the state dict.
"""

from collections.abc import Callable, Mapping

import numpy as np
from scipy.special import erf

Array = np.ndarray
Weights = Mapping[str, Array]


def gelu(x: Array) -> Array:
    return 0.5 * x * (1 + erf(x / np.sqrt(2)))


def relu(x: Array) -> Array:
    return np.maximum(x, 0)


def part(weights: Weights, prefix: str) -> dict[str, Array]:
    return {name[len(prefix) + 1 :]: w for name, w in weights.items() if name.startswith(prefix + ".")}


def linear(x: Array, weights: Weights) -> Array:
    return np.einsum("...c,dc->...d", x, weights["weight"]) + weights.get("bias", 0.0)


def mlp(x: Array, weights: Weights, act: Callable[[Array], Array] = gelu) -> Array:
    return linear(act(linear(x, part(weights, "fc1"))), part(weights, "fc2"))


def layer_norm(x: Array, weights: Weights, eps: float) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * weights["weight"] + weights["bias"]


def permute_mlp(x: Array, weights: Weights, segments: int) -> Array:
    b, rows, cols, channels = x.shape
    dim = channels // segments
    x_bhwns = x.reshape(b, rows, cols, segments, dim)

    # a column of tokens (a row) mixes its positions and the channels of one segment, every segment alike
    mix_h = weights["mlp_h.weight"].reshape(rows, dim, rows, dim)
    mix_w = weights["mlp_w.weight"].reshape(cols, dim, cols, dim)
    h = np.einsum("isht,bhwnt->biwns", mix_h, x_bhwns).reshape(x.shape)
    w = np.einsum("jswt,bhwnt->bhjns", mix_w, x_bhwns).reshape(x.shape)
    c = np.einsum("dc,bhwc->bhwd", weights["mlp_c.weight"], x)

    pooled = np.einsum("bhwc->bc", h + w + c) / (rows * cols)
    score = np.exp(mlp(pooled, part(weights, "reweight")).reshape(b, channels, 3))
    a = score / score.sum(-1, keepdims=True)
    mixed = np.einsum("bck,kbhwc->bhwc", a, np.stack([h, w, c]))
    return linear(mixed, part(weights, "proj"))


def strided_conv(x: Array, weights: Weights) -> Array:
    """Convolution whose stride is its kernel, on [B, H, W, C]."""
    kernel = weights["weight"]
    b, rows, cols, channels = x.shape
    p, q = kernel.shape[2:]
    patches = x.reshape(b, rows // p, p, cols // q, q, channels)
    return np.einsum("bhpwqc,dcpq->bhwd", patches, kernel) + weights["bias"]


def stages(
    images: Array,
    weights: Weights,
    layers: tuple[int, ...],
    segments: tuple[int, ...],
    eps: float = 1e-5,
    act: Callable[[Array], Array] = gelu,
) -> list[Array]:
    """Output of every stage, [B, H, W, C] each, for images [B, C, H, W]; the final norm is not applied."""
    x = strided_conv(images.transpose(0, 2, 3, 1), part(weights, "patch_embed.proj"))
    outputs, position = [], 0
    for depth, n in zip(layers, segments, strict=True):
        down = part(weights, f"network.{position}.proj")
        if down:
            x, position = strided_conv(x, down), position + 1
        for k in range(depth):
            block = part(weights, f"network.{position}.{k}")
            x = x + permute_mlp(layer_norm(x, part(block, "norm1"), eps), part(block, "attn"), n)
            x = x + mlp(layer_norm(x, part(block, "norm2"), eps), part(block, "mlp"), act)
        outputs.append(x)
        position += 1
    return outputs


def logits(
    images: Array,
    weights: Weights,
    layers: tuple[int, ...],
    segments: tuple[int, ...],
    eps: float = 1e-5,
    act: Callable[[Array], Array] = gelu,
) -> Array:
    x = layer_norm(stages(images, weights, layers, segments, eps, act)[-1], part(weights, "norm"), eps)
    return linear(x.mean((1, 2)), part(weights, "head"))
