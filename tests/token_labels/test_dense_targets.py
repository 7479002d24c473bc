"""Dense targets against the published code's figures, `roi_align` and sums in loops."""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import golden_vectors
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile
from torchvision.ops import roi_align

from vip.token_labels import targets
from vip.token_labels.loss import TokenLabelCrossEntropy
from vip.token_labels.targets import NOWHERE, DenseTargets, Grid, TokenLabels, dense_targets, pool_maps

GOLDEN = golden_vectors.read("token_labels")
EXACT = dict(rtol=0.0, atol=1e-12)


def upright(left: torch.Tensor, top: torch.Tensor, width: torch.Tensor, height: torch.Tensor) -> torch.Tensor:
    """Boxes [B, 2, 3] with sides parallel to the map's."""
    zero = torch.zeros_like(left)
    return torch.stack([torch.stack([width, zero, left], 1), torch.stack([zero, height, top], 1)], 1)


def draw_maps(
    seed: int, batch: int, k: int, classes: int, size: Grid, scale: float = 5.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k strongest of random logits, so that no class is named twice in a cell."""
    logits = scale * torch.rand(batch, classes, *size, generator=generator(seed), dtype=torch.float64)
    return tuple(logits.topk(k, dim=1))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw_labels(batch: int, classes: int, grid: Grid, mixed: bool = False, seed: int = 0) -> TokenLabels:
    """Labels with rotated boxes that lie partly beyond the maps."""
    rng = generator(seed)
    values, indices = draw_maps(seed, batch, min(5, classes), classes, (9, 7))
    labels = TokenLabels(
        target=torch.randint(classes, (batch,), generator=rng),
        map_values=values,
        map_indices=indices,
        box=torch.rand(batch, 2, 3, generator=rng, dtype=torch.float64) - 0.2,
        shown=torch.rand(batch, *grid, generator=rng, dtype=torch.float64),
    )
    if mixed:
        labels.partner = torch.arange(batch).flip(0)
        labels.own = torch.rand(batch, generator=rng, dtype=torch.float64)
        labels.own_tokens = torch.rand(batch, *grid, generator=rng, dtype=torch.float64)
    return labels


# ---- the published code


def published_labels(golden: dict[str, Any], exchanged: bool) -> TokenLabels:
    """The labels of a golden batch; the published code rounds the corners of its boxes, in map cells, to float32."""
    top, left, height, width = torch.tensor(golden["crop_top_left_h_w"]).unbind(1)
    if exchanged:
        left, top, width, height = top, left, height, width
    side, batch, grid = golden["grid"], len(top), 2 * (golden["token_label_size"],)

    def edges(start: torch.Tensor, length: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first, last = ((place * side - 0.5).double() for place in (start, start + length))
        return (first + 0.5) / side, (last - first) / side

    (left, width), (top, height) = edges(left, width), edges(top, height)
    own = torch.full((batch,), golden["lam"], dtype=torch.float64)
    return TokenLabels(
        target=torch.tensor(golden["label"]),
        map_values=torch.tensor(golden["value"], dtype=torch.float64),
        map_indices=torch.tensor(golden["index"]),
        box=upright(left, top, width, height),
        partner=torch.arange(batch).flip(0),
        own=own,
        own_tokens=own[:, None, None].expand(-1, *grid),
    )


def published_layout(made: DenseTargets) -> torch.Tensor:
    """[B, K, 2 + L*L]: ground truth, class target, tokens by rows; one token is the class target itself."""
    tokens = made.tokens.flatten(1, 2).transpose(1, 2)
    columns = [made.ground_truth[..., None], made.cls[..., None], tokens]
    return torch.cat(columns if tokens.shape[2] > 1 else [columns[0], columns[2]], 2)


@pytest.mark.parametrize("reading", ["aligned", "reference"])
@pytest.mark.parametrize("golden", GOLDEN["targets"], ids=lambda g: f"L{g['token_label_size']}-lam{g['lam']}")
def test_published_targets(golden: dict[str, Any], reading: str) -> None:
    """'aligned' reads the map under the crop, 'reference' with the axes exchanged, as the published code does."""
    labels = published_labels(golden, exchanged=reading == "reference")
    made = dense_targets(labels, golden["classes"], 2 * (golden["token_label_size"],), golden["smoothing"])
    expected = torch.tensor(golden[f"target_{reading}"], dtype=torch.float64)
    torch.testing.assert_close(published_layout(made), expected, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("golden", GOLDEN["losses"], ids=lambda g: f"gt{g['ground_truth']}-box{g['box_rows_cols']}")
def test_published_losses(golden: dict[str, Any]) -> None:
    target, tokens, cls = (torch.tensor(golden[n], dtype=torch.float64) for n in ("target", "aux", "cls"))
    side = math.isqrt(tokens.shape[1])
    token_target = target[:, :, 2:].transpose(1, 2).unflatten(1, (side, side))
    top, left, bottom, right = golden["box_rows_cols"]
    criterion = TokenLabelCrossEntropy(golden["dense_weight"], golden["cls_weight"], golden["ground_truth"])
    loss = criterion(
        cls,
        tokens.unflatten(1, (side, side)),
        DenseTargets(target[:, :, 0], target[:, :, 1], token_target),
        swapped=(bottom - top) * (right - left) / side**2,
    )
    assert loss.item() == pytest.approx(golden["loss"], rel=0, abs=1e-9)


# ---- where the map is read


def roi_aligned(
    maps: tuple[torch.Tensor, torch.Tensor], box: torch.Tensor, classes: int, grid: Grid, smallest: bool = False
) -> torch.Tensor:
    """The same by torchvision: all K channels, then `roi_align` of the upright boxes, `[B, H', W', K]`."""
    values, indices = maps
    batch, _, height, width = values.shape
    dense = values.new_zeros(batch, classes, height, width).scatter_(1, indices, values)
    corners = torch.stack([box[:, 0, 2], box[:, 1, 2], box[:, 0, 0] + box[:, 0, 2], box[:, 1, 1] + box[:, 1, 2]], 1)
    corners = corners * corners.new_tensor([width, height, width, height])
    if smallest:  # unaligned boxes are at least a cell; half a cell to the left makes the rest the same
        corners = corners - 0.5
    boxes = torch.cat([torch.arange(batch, dtype=values.dtype)[:, None], corners], 1)
    return roi_align(dense, boxes, grid, aligned=not smallest).permute(0, 2, 3, 1)


sizes = st.tuples(st.integers(1, 20), st.integers(1, 20))
grids = st.tuples(st.integers(1, 8), st.integers(1, 8))


@settings(max_examples=60, deadline=None)
@given(sizes, grids, st.integers(1, 7), st.integers(7, 3000), st.integers(0, 10**6))
def test_pooling_is_roi_align(size: Grid, grid: Grid, k: int, classes: int, seed: int) -> None:
    """For boxes on the map of at least one cell, whatever the shapes."""
    maps = draw_maps(seed, 3, k, classes, size)
    share = torch.rand(4, 3, generator=generator(seed + 1), dtype=torch.float64)
    wide, high = (1 / n + (1 - 1 / n) * s for n, s in zip(reversed(size), share, strict=False))
    box = upright(share[2] * (1 - wide), share[3] * (1 - high), wide, high)
    logits, coverage = pool_maps(*maps, box, classes, grid)
    torch.testing.assert_close(logits, roi_aligned(maps, box, classes, grid), **EXACT)
    torch.testing.assert_close(coverage, torch.ones_like(coverage), **EXACT)


def test_pooling_with_many_classes_and_the_whole_map() -> None:
    maps = draw_maps(0, 2, 5, 3000, (18, 18))
    box = torch.eye(3, dtype=torch.float64)[:2].expand(2, -1, -1)
    for grid in ((14, 14), (1, 1)):
        torch.testing.assert_close(pool_maps(*maps, box, 3000, grid)[0], roi_aligned(maps, box, 3000, grid), **EXACT)


@pytest.mark.parametrize("grid", [(1, 1), (2, 3)])
def test_a_box_smaller_than_a_cell_is_extended_to_one(grid: Grid) -> None:
    """From its left top corner, in either direction on its own, as `roi_align` does unless `aligned`."""
    maps = draw_maps(0, 3, 5, 9, (6, 8))
    sides = torch.tensor([[0.01, 0.02], [0.1, 0.5], [0.5, 0.1]], dtype=torch.float64)
    box = upright(*torch.tensor([[0.3, 0.2, 0.1], [0.4, 0.1, 0.6]], dtype=torch.float64), *sides.T)
    logits, _ = pool_maps(*maps, box, 9, grid)
    torch.testing.assert_close(logits, roi_aligned(maps, box, 9, grid, smallest=True), **EXACT)


def pooled_in_loops(
    values: np.ndarray, indices: np.ndarray, box: np.ndarray, classes: int, grid: Grid
) -> tuple[np.ndarray, np.ndarray]:
    """One map `[k, H, W]`, token by token and point by point."""
    _, height, width = values.shape
    logits, coverage = np.zeros((*grid, classes)), np.zeros(grid)
    most = [math.ceil(max(height, width) / tokens) for tokens in grid]
    cells = [math.hypot(box[0, axis] * width, box[1, axis] * height) for axis in (1, 0)]  # down, across
    points = [min(math.ceil(c / tokens), m) for c, tokens, m in zip(cells, grid, most, strict=True)]
    for row, column in np.ndindex(*grid):
        for i, j in np.ndindex(*points):
            v, u = (row + (i + 0.5) / points[0]) / grid[0], (column + (j + 0.5) / points[1]) / grid[1]
            x, y = box @ (u, v, 1)
            if not (0 <= x <= 1 and 0 <= y <= 1):
                continue
            coverage[row, column] += 1
            x, y = np.clip(x * width - 0.5, 0, width - 1), np.clip(y * height - 0.5, 0, height - 1)
            for q, p in itertools.product({int(y), min(int(y) + 1, height - 1)}, {int(x), min(int(x) + 1, width - 1)}):
                share = (1 - abs(x - p)) * (1 - abs(y - q))
                np.add.at(logits[row, column], indices[:, q, p], share * values[:, q, p])
        logits[row, column] /= max(coverage[row, column], 1)
    return logits, coverage / math.prod(points)


def turned(degrees: float, shear: float, scale: tuple[float, float], place: tuple[float, float]) -> np.ndarray:
    """The box of a rotated and sheared crop about a place; a negative scale flips it."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    linear = np.array([[cos, -sin], [sin, cos]]) @ np.array([[1, shear], [0, 1]]) @ np.diag(scale)
    return np.concatenate([linear, (np.array(place) - linear @ (0.5, 0.5))[:, None]], 1)


BOXES = {
    "rotated": turned(25, 0.0, (0.5, 0.4), (0.5, 0.55)),
    "sheared": turned(0, 0.3, (0.5, 0.6), (0.45, 0.5)),
    "flipped": turned(0, 0.0, (-0.6, 0.7), (0.4, 0.6)),
    "upside down": turned(0, 0.0, (0.6, -0.3), (0.4, 0.6)),
    "on its side": turned(90, 0.0, (0.8, 0.7), (0.5, 0.5)),
    "all of it": turned(-200, -0.2, (0.5, -0.4), (0.5, 0.5)),
    "beyond the map": turned(30, 0.1, (1.3, 1.1), (0.3, 0.8)),
    "twice the map": turned(0, 0.0, (2.0, 3.0), (0.5, 0.5)),
    "far away": turned(10, 0.0, (0.5, 0.5), (5.0, 5.0)),
}


@pytest.mark.parametrize("box", BOXES.values(), ids=list(BOXES))
@pytest.mark.parametrize("size, grid", [((7, 11), (3, 2)), ((5, 4), (4, 6))])
def test_pooling_of_affine_boxes(box: np.ndarray, size: Grid, grid: Grid) -> None:
    values, indices = draw_maps(0, 1, 4, 9, size)
    logits, coverage = pool_maps(values, indices, torch.from_numpy(box)[None], 9, grid)
    expected, share = pooled_in_loops(values[0].numpy(), indices[0].numpy(), box, 9, grid)
    np.testing.assert_allclose(logits[0], expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(coverage[0], share, rtol=0, atol=1e-12)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_flipped_box_flips_the_tokens(axis: int) -> None:
    maps = draw_maps(0, 4, 5, 9, (9, 7))
    box = torch.rand(4, 2, 3, generator=generator(1), dtype=torch.float64)
    flipped = box.clone()
    flipped[:, :, 2] += box[:, :, axis]
    flipped[:, :, axis] *= -1
    for ours, theirs in zip(pool_maps(*maps, flipped, 9, (4, 5)), pool_maps(*maps, box, 9, (4, 5)), strict=True):
        torch.testing.assert_close(ours, theirs.flip(2 - axis), **EXACT)


def test_a_quarter_turn_turns_the_tokens() -> None:
    """In float32, in which the turned box does not end at the borders of the map exactly."""
    values, indices = draw_maps(0, 1, 3, 5, (6, 6))
    box = torch.from_numpy(turned(90, 0, (1, 1), (0.5, 0.5))).float()[None]
    logits, coverage = pool_maps(values.float(), indices, box, 5, (3, 3))
    upright_logits, _ = pool_maps(values.float(), indices, torch.eye(3)[None, :2], 5, (3, 3))
    torch.testing.assert_close(coverage, torch.ones(1, 3, 3))
    torch.testing.assert_close(logits, upright_logits.rot90(1, (1, 2)))


# ---- what becomes of the logits


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_probabilities_sum_to_one_and_what_smoothing_adds(smoothing: float) -> None:
    """`p * on + off` adds to `1 + s / K`, as in the published code; a smoothed class adds to 1."""
    labels = draw_labels(3, 12, (4, 4))
    labels.box = torch.rand(3, 2, 3, dtype=torch.float64, generator=generator(0)) * 0.3  # on the map
    labels.shown = None
    made = dense_targets(labels, 12, (4, 4), smoothing)
    for target, total in ((made.ground_truth, 1.0), (made.cls, 1 + smoothing / 12), (made.tokens, 1 + smoothing / 12)):
        torch.testing.assert_close(target.sum(-1), torch.full(target.shape[:-1], total, dtype=torch.float64), **EXACT)


def one_class_map(label: int = 3, size: Grid = (16, 16)) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((1, 1, *size), 50.0), torch.full((1, 1, *size), label)


def probability(labels: TokenLabels, label: int, grid: Grid = (4, 4)) -> torch.Tensor:
    made = dense_targets(labels, 5, grid)
    torch.testing.assert_close(made.tokens.sum(-1), torch.ones_like(made.tokens[..., 0]))
    return made.tokens[0, :, :, label]


def test_the_class_takes_the_place_of_what_lies_beyond_the_map() -> None:
    """Half a token to the left and one and a half above."""
    box = torch.tensor([[[1.0, 0, -0.125], [0, 1.0, -0.375]]])
    labels = TokenLabels(torch.tensor([1]), *one_class_map(), box)
    covered = torch.tensor([0, 0.5, 1, 1])[:, None] * torch.tensor([0.5, 1, 1, 1])
    torch.testing.assert_close(probability(labels, 3), covered)
    torch.testing.assert_close(probability(labels, 1), 1 - covered)
    torch.testing.assert_close(dense_targets(labels, 5, (4, 4)).cls[0, 3], covered.mean())


def test_the_class_takes_the_place_of_fill() -> None:
    shown = torch.rand(1, 4, 4)
    labels = TokenLabels(torch.tensor([1]), *one_class_map(), torch.eye(3)[None, :2], shown)
    torch.testing.assert_close(probability(labels, 3), shown[0])
    torch.testing.assert_close(probability(labels, 1), 1 - shown[0])


def test_fill_that_lies_beyond_the_map_counts_once() -> None:
    """A shift of the whole image brings in fill where its map ends."""
    box = torch.tensor([[[1.0, 0, -0.125], [0, 1.0, 0]]])
    shown = torch.tensor([0.5, 1, 1, 1]).expand(1, 4, 4)
    labels = TokenLabels(torch.tensor([1]), *one_class_map(), box, shown)
    torch.testing.assert_close(probability(labels, 3), shown[0])


def assert_class_alone(labels: TokenLabels) -> None:
    made = dense_targets(labels, 5, (2, 3), smoothing=0.1)
    for target in (made.cls[:, None, None], made.tokens):
        torch.testing.assert_close(target, made.ground_truth[:, None, None].expand_as(target))
    assert made.ground_truth.argmax(1).equal(labels.target)
    torch.testing.assert_close(made.ground_truth.amax(1), torch.full((len(labels.target),), 0.92))


def test_without_maps_every_token_has_the_class() -> None:
    assert_class_alone(TokenLabels(torch.tensor([4, 0, 2])))


def test_nowhere_is_off_every_map() -> None:
    assert_class_alone(TokenLabels(torch.tensor([1]), *one_class_map(), NOWHERE[None], torch.ones(1, 2, 3)))
    assert_class_alone(TokenLabels(torch.tensor([1]), *one_class_map(size=(1, 1)), NOWHERE[None]))


def rows_of(labels: TokenLabels, rows: slice) -> TokenLabels:
    return labels._map(lambda x: x[rows])


@pytest.mark.parametrize("batch", [1, 5, 17])
def test_images_do_not_depend_on_their_batch(batch: int) -> None:
    """A batch of one, and batches that are no multiple of what is computed at once."""
    labels = draw_labels(batch, 6, (4, 5))
    together = dense_targets(labels, 6, (4, 5), 0.1)
    for i in range(batch):
        alone = dense_targets(rows_of(labels, slice(i, i + 1)), 6, (4, 5), 0.1)
        for one, all_of_them in zip(alone, together, strict=True):
            torch.testing.assert_close(one[0], all_of_them[i], **EXACT)


@pytest.mark.parametrize("mixed", [False, True])
def test_how_many_are_computed_at_once_does_not_matter(mixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = draw_labels(11, 6, (4, 5), mixed)
    expected = dense_targets(labels, 6, (4, 5), 0.1)
    for chunk in (1, 3, 100):
        monkeypatch.setattr(targets, "_CHUNK", chunk)
        for ours, theirs in zip(dense_targets(labels, 6, (4, 5), 0.1), expected, strict=True):
            torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize("batch", [4, 5])
def test_mixing_labels_mixes_the_dense_targets(batch: int) -> None:
    labels = draw_labels(batch, 6, (4, 5), mixed=True)
    unmixed = dense_targets(draw_labels(batch, 6, (4, 5)), 6, (4, 5), 0.1)
    shares = (labels.own[:, None], labels.own[:, None], labels.own_tokens[..., None])
    for mixed, plain, own in zip(dense_targets(labels, 6, (4, 5), 0.1), unmixed, shares, strict=True):
        torch.testing.assert_close(mixed, own * plain + (1 - own) * plain[labels.partner], **EXACT)


def test_mixed_classes_without_maps() -> None:
    labels = TokenLabels(torch.tensor([0, 1]), partner=torch.tensor([1, 0]), own=torch.tensor([0.7, 0.4]))
    labels.own_tokens = torch.tensor([[[1.0, 0.4]], [[0.4, 0.4]]])
    made = dense_targets(labels, 2, (1, 2))
    torch.testing.assert_close(made.ground_truth, torch.tensor([[0.7, 0.3], [0.6, 0.4]]))
    torch.testing.assert_close(made.cls, made.ground_truth)
    torch.testing.assert_close(made.tokens[..., 0], torch.tensor([[[1.0, 0.4]], [[0.6, 0.6]]]))


def test_half_precision_is_close() -> None:
    """Maps in float16 and boxes in float32, as from disk, and token targets in float16, against float64."""
    labels = draw_labels(5, 40, (4, 5), mixed=True)
    labels.map_values = labels.map_values.half().double()
    exact = dense_targets(labels, 40, (4, 5), 0.1)
    half = labels._map(lambda x: x.float() if x.is_floating_point() else x)
    half.map_values, half.map_indices = labels.map_values.half(), labels.map_indices.int()
    made = dense_targets(half, 40, (4, 5), 0.1, torch.float16)
    assert (made.tokens.dtype, made.cls.dtype, made.ground_truth.dtype) == (torch.float16, torch.float32, torch.float32)
    for ours, theirs in zip(made, exact, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-3)


# ---- batches of labels


def test_collate_and_move() -> None:
    labels = draw_labels(3, 6, (4, 5))
    singles = [labels._map(lambda x, i=i: x[i]) for i in range(3)]
    batch = TokenLabels.collate(singles).to(torch.device("cpu"), non_blocking=True)
    for name in ("target", "map_values", "map_indices", "box", "shown"):
        assert getattr(batch, name).equal(getattr(labels, name)), name
    assert batch.partner is batch.own is batch.own_tokens is None
    assert TokenLabels.collate([TokenLabels(torch.tensor(2))]).box is None
    elsewhere = batch.to(torch.device("meta"))
    assert {elsewhere.target.device.type, elsewhere.map_values.device.type, elsewhere.shown.device.type} == {"meta"}
    assert batch.target.device.type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs CUDA")
def test_pin_memory() -> None:
    pinned = draw_labels(2, 6, (4, 5)).pin_memory()
    assert pinned.target.is_pinned() and pinned.map_values.is_pinned() and pinned.own is None


def test_no_gradient_flows_into_targets() -> None:
    labels = draw_labels(2, 6, (4, 5))
    labels.map_values.requires_grad_()
    assert not dense_targets(labels, 6, (4, 5)).tokens.requires_grad


def peak_bytes(function: Callable[[], Any], folder: Path) -> int:
    """The most memory that a function and its result hold at once, by the allocations that the profiler records."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    profiler.export_chrome_trace(str(folder / "trace.json"))
    trace = json.loads((folder / "trace.json").read_text())
    events = sorted((e for e in trace["traceEvents"] if e["name"] == "[memory]"), key=lambda e: e["ts"])
    held = list(itertools.accumulate(e["args"]["Bytes"] for e in events))
    assert held[-1] >= sum(t.nbytes for t in result), "the profiler saw the result"
    return max(held)


@pytest.mark.parametrize("mixed", [False, True])
def test_memory(mixed: bool, tmp_path: Path) -> None:
    """A dense target [128, 1000, 198] in float32 is 101 MB, and its maps over all classes 166 MB."""
    labels = draw_labels(128, 1000, (14, 14), mixed)
    values, indices = draw_maps(0, 1, 5, 1000, (18, 18))
    labels = labels._map(lambda x: x.float() if x.is_floating_point() else x)
    labels.map_values = values.half().repeat(128, 1, 1, 1)
    labels.map_indices = indices.int().repeat(128, 1, 1, 1)
    peak = peak_bytes(lambda: dense_targets(labels, 1000, (14, 14), 0.1, torch.float16), tmp_path)
    print(f"peak memory of dense targets, {mixed=}: {peak / 1e6:.1f} MB")
    assert 50e6 < peak < 100e6
