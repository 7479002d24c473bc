"""From label maps to dense targets, on the training device.

A batch of labels is a handful of kilobytes an image: the five strongest classes of each cell of a coarse map, the box
of the map that the augmented image shows, and the image's class. What a dense target `[B, K, 2 + L*L]` would hold is
made of it where it is used, a few images at a time.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

Grid = tuple[int, int]

NOWHERE = torch.full((2, 3), -10.0)  # the box of an image without a map: it shows no part of one
_CHUNK = 8  # images whose logits over all classes exist at once
_BORDER = 1e-4  # of the map's side: where rounding may put a point of a box that ends at the border


@dataclass
class TokenLabels:
    """The labels of a batch (or of one image, without the dimension B).

    Attributes:
        target: Class indices `[B]`.
        map_values: The k strongest logits of each cell of the label maps, `[B, k, H, W]`; None without maps.
        map_indices: Their classes, `[B, k, H, W]`.
        box: What part of the map the image shows, `[B, 2, 3]`: `box @ (u, v, 1)` is the place `(x, y)` on the map, its
            left top corner (0, 0) and its right bottom one (1, 1), of the place `(u, v)` in the image. A crop, a flip,
            a rotation and a shear are all of this form.
        shown: Share `[B, H', W']` of each token that shows the image, and not what a rotation or a shift fills up with.
        partner: Index `[B]` of the image that each one is mixed with, None where nothing is mixed.
        own: Share `[B]` of an image's own pixels in the mixture.
        own_tokens: The same for each token, `[B, H', W']`.
    """

    target: torch.Tensor
    map_values: torch.Tensor | None = None
    map_indices: torch.Tensor | None = None
    box: torch.Tensor | None = None
    shown: torch.Tensor | None = None
    partner: torch.Tensor | None = None
    own: torch.Tensor | None = None
    own_tokens: torch.Tensor | None = None

    def to(self, device: torch.device, non_blocking: bool = False) -> "TokenLabels":
        """Copy to a device."""
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "TokenLabels":
        """Copy to pinned memory; called by the loader."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "TokenLabels":
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return dataclasses.replace(self, **{k: function(v) for k, v in fields.items() if v is not None})

    @staticmethod
    def collate(labels: Sequence["TokenLabels"]) -> "TokenLabels":
        """Stack the labels of single images."""
        fields = {f.name: [getattr(label, f.name) for label in labels] for f in dataclasses.fields(TokenLabels)}
        return dataclasses.replace(labels[0], **{k: torch.stack(v) for k, v in fields.items() if v[0] is not None})


class DenseTargets(NamedTuple):
    """Targets of a batch, probabilities over K classes: of the image by its class and by its map, and of each token."""

    ground_truth: torch.Tensor  # [B, K]
    cls: torch.Tensor  # [B, K]
    tokens: torch.Tensor  # [B, H', W', K]


@torch.no_grad()
def dense_targets(
    labels: TokenLabels, num_classes: int, grid: Grid, smoothing: float = 0.0, dtype: torch.dtype | None = None
) -> DenseTargets:
    """Make the targets of a batch, as the published code does but for where it reads the map.

    A token's target is the softmax over the logits under it, averaged as `torchvision.ops.roi_align` averages. Where
    the map says nothing (beyond its border, under fill, or without one) the class of the image takes its place.

    Args:
        labels: Labels on the device that the targets are wanted on.
        num_classes: Number of classes K.
        grid: Height and width of the token grid.
        smoothing: Label smoothing s: probabilities become `p * on + off` with `off = s / K` and `on = 1 - s + off`.
        dtype: Type of the token targets, that of the boxes if None. Label maps are float16 themselves.
    """
    float_type = torch.float32 if labels.box is None else labels.box.dtype
    off = smoothing / num_classes
    on = 1.0 - smoothing + off
    ground_truth = torch.full((len(labels.target), num_classes), off, dtype=float_type, device=labels.target.device)
    ground_truth.scatter_(1, labels.target[:, None], on)

    def unmixed(rows: slice | torch.Tensor, grid: Grid) -> torch.Tensor:
        of_class = ground_truth[rows, None, None]
        if labels.map_values is None or labels.map_indices is None or labels.box is None:
            return of_class.expand(-1, *grid, -1)
        maps = labels.map_values[rows], labels.map_indices[rows]
        logits, coverage = pool_maps(*maps, labels.box[rows], num_classes, grid)
        if labels.shown is not None and grid == labels.shown.shape[1:]:  # fill says nothing of the class
            coverage = torch.minimum(coverage, labels.shown[rows])  # fill mostly is what lies beyond the map, too
        return torch.lerp(of_class, logits.softmax(-1) * on + off, coverage[..., None])

    def mixed(grid: Grid, own: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        out = torch.empty((len(labels.target), *grid, num_classes), dtype=dtype, device=labels.target.device)
        for start in range(0, len(out), _CHUNK):
            rows = slice(start, start + _CHUNK)
            if own is None or labels.partner is None:
                out[rows] = unmixed(rows, grid)
            else:
                out[rows] = torch.lerp(unmixed(labels.partner[rows], grid), unmixed(rows, grid), own[rows, ..., None])
        return out

    cls = mixed((1, 1), None if labels.own is None else labels.own[:, None, None], float_type).flatten(1)
    tokens = mixed(grid, labels.own_tokens, dtype or float_type)
    if labels.own is not None:
        ground_truth = torch.lerp(ground_truth[labels.partner], ground_truth, labels.own[:, None])
    return DenseTargets(ground_truth, cls, tokens)


def pool_maps(
    values: torch.Tensor, indices: torch.Tensor, box: torch.Tensor, num_classes: int, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """Average the logits of label maps over the tokens of a grid.

    Equals `torchvision.ops.roi_align(..., aligned=True)` of the maps scattered into `[B, K, H, W]` where the box lies
    on the map, has sides parallel to the map's, and is no smaller than a cell; a smaller one is taken to be a cell, as
    in the published code. The logits are read at as many points of a token as it covers map cells (at most as many as
    the whole map laid under the grid has), bilinearly, and points beyond the map do not count.

    Args:
        values: The k strongest logits of each cell, `[B, k, H, W]`.
        indices: Their classes.
        box: See `TokenLabels`.
        num_classes: Number of classes K.
        grid: Height and width of the token grid.

    Returns:
        Logits `[B, H', W', K]`, 0 for the classes that a map does not name, and the share `[B, H', W']` of each token
        that is on the map.
    """
    B, _, H, W = values.shape
    length = torch.hypot(box[:, 0, :2] * W, box[:, 1, :2] * H)  # [B, 2] of the box's sides, in map cells
    sides = box[:, :, :2] / length.clamp(max=1)[:, None]  # at least one cell, as published
    x, y, weight = _sample_points(torch.cat((sides, box[:, :, 2:]), 2), length.clamp(min=1), max(H, W), grid)
    weight = weight * ((x - 0.5).abs() <= 0.5 + _BORDER) * ((y - 0.5).abs() <= 0.5 + _BORDER)
    coverage = weight.sum((2, 4))
    weight = weight / coverage[:, :, None, :, None].clamp(min=_BORDER)

    x, y = (x * W - 0.5).clamp(0, W - 1), (y * H - 0.5).clamp(0, H - 1)  # in cells, from the middle of the first
    left, top = x.floor(), y.floor()
    right, bottom = (left + 1).clamp(max=W - 1), (top + 1).clamp(max=H - 1)
    x, y = x - left, y - top
    corners = ((left, 1 - x, top, 1 - y), (right, x, top, 1 - y), (left, 1 - x, bottom, y), (right, x, bottom, y))

    token = torch.arange(grid[0] * grid[1], device=box.device).view(1, grid[0], 1, grid[1], 1).expand_as(weight)
    logits = torch.zeros((B, grid[0] * grid[1] * num_classes), dtype=box.dtype, device=box.device)
    for column, column_share, row, row_share in corners:
        cell = (row * W + column).long().flatten(1)[:, None].expand(-1, values.shape[1], -1)  # [B, k, points]
        share = (weight * column_share * row_share).flatten(1)[:, None]
        place = token.flatten(1)[:, None] * num_classes + indices.flatten(2).gather(2, cell).long()
        logits.scatter_add_(1, place.flatten(1), (values.flatten(2).gather(2, cell) * share).flatten(1))
    return logits.view(B, *grid, num_classes), coverage


def _sample_points(
    box: torch.Tensor, length: torch.Tensor, most: int, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Places on the map `(x, y)`, and their weights in the token: three tensors `[B, H', points, W', points]`."""
    (v, v_share), (u, u_share) = (
        _divide(length[:, axis], math.ceil(most / tokens), tokens) for axis, tokens in ((1, grid[0]), (0, grid[1]))
    )
    v, u = v[:, :, :, None, None], u[:, None, None]  # [B, H', points, 1, 1] and [B, 1, 1, W', points]
    x, y = (row[:, 0] * u + row[:, 1] * v + row[:, 2] for row in box[..., None, None, None, None].unbind(1))
    return x, y, (v_share[:, None, :, None, None] * u_share[:, None, None, None]).expand_as(x)


def _divide(length: torch.Tensor, most: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Divide a side of `length` cells into tokens and these into points: places `[B, tokens, most]`, weights."""
    count = (length / tokens).ceil().clamp(1, most)[:, None]
    point = torch.arange(most, dtype=length.dtype, device=length.device)
    token = torch.arange(tokens, dtype=length.dtype, device=length.device)[:, None]
    return (token + ((point + 0.5) / count)[:, None]) / tokens, (point < count) / count
