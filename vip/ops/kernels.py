"""Triton kernels that mix tokens along an image axis where they lie, for inference.

The textbook Permute-MLP gathers the columns (rows) of an image into the rows of a matrix, multiplies, and scatters the
product back: two copies of the image around a matrix product of few operations a byte. Here the matrix product reads
its operand from where it is, and adds the result, already weighed, to where it belongs. An entry of the matrix with row
`(b, q, n)` and column `(l, s)` lies at an offset that is a sum of one of the row and one of the column, so that only
the addresses differ from those of an ordinary matrix product:

- b: image, q: position along the other axis, n: segment of the channels;
- l: position along the axis that is mixed, s: channel within the segment.

Processors read 16 bytes at once. Segments of 6 channels do not begin at such bytes, so `pack_lines` lays channels out
the other way round, `[S, N]`, those of the same place in all segments side by side.
"""

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch.library import triton_op, wrap_triton

__all__ = ["axis_mix_add", "line_means", "pack_lines", "use_packed"]

_PACKED_SIZE = 192  # the longest lines of a packed image whose weights stay in shared memory, in three parts of 64
_ROOMY = ((8, 0), (9, 0), (10, 0))  # compute capabilities with more than the 99 KiB of it that others give a program


@triton.jit
def _row_offsets(
    rows,
    image_stride,
    OTHER_SIZE: tl.constexpr,
    OTHER_STRIDE: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SEGMENT_STRIDE: tl.constexpr,
):
    segment, line = rows % SEGMENTS, rows // SEGMENTS
    return (line // OTHER_SIZE) * image_stride + (line % OTHER_SIZE) * OTHER_STRIDE + segment * SEGMENT_STRIDE


@triton.jit
def _column_offsets(columns, AXIS_STRIDE: tl.constexpr, DIM: tl.constexpr, CHANNEL_STRIDE: tl.constexpr):
    return (columns // DIM) * AXIS_STRIDE + (columns % DIM) * CHANNEL_STRIDE


@triton.jit
def _store_sum(to, mixed, scale_ptr, base, base_scale_ptr, channel, mask):
    out = base.to(tl.float32)
    if base_scale_ptr is not None:
        out *= tl.load(base_scale_ptr + channel, mask=mask, other=0.0)
    out += mixed * tl.load(scale_ptr + channel, mask=mask, other=0.0)
    tl.store(to, out.to(to.dtype.element_ty), mask=mask)


@triton.jit
def _mix_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    scale_ptr,
    base_ptr,
    base_scale_ptr,  # None: one
    rows,
    image_stride,
    weight_out_stride,
    weight_in_stride,
    SIZE: tl.constexpr,  # columns of the gathered matrix: tokens along the axis times channels of a segment
    AXIS_STRIDE: tl.constexpr,
    OTHER_SIZE: tl.constexpr,
    OTHER_STRIDE: tl.constexpr,
    SEGMENTS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    blocks: tl.constexpr = (SIZE + BLOCK_OUT - 1) // BLOCK_OUT
    block = tl.program_id(0)  # those of the same rows follow each other, so that they find them in the cache
    row = (block // blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = (block % blocks) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row_offset = _row_offsets(row, image_stride, OTHER_SIZE, OTHER_STRIDE, SEGMENTS, DIM)[:, None]

    mixed = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
    for start in range(0, SIZE, BLOCK_IN):
        k = start + tl.arange(0, BLOCK_IN)
        x_mask, weight_mask = (row < rows)[:, None], (column < SIZE)[None, :]
        if SIZE % BLOCK_IN:
            x_mask, weight_mask = x_mask & (k < SIZE)[None, :], weight_mask & (k < SIZE)[:, None]
        x_offset = row_offset + _column_offsets(k, AXIS_STRIDE, DIM, 1)[None, :]
        x = tl.load(x_ptr + x_offset, mask=x_mask, other=0.0)
        weight = tl.load(
            weight_ptr + column[None, :] * weight_out_stride + k[:, None] * weight_in_stride,
            mask=weight_mask,
            other=0.0,
        )
        mixed = tl.dot(x, weight, mixed, input_precision="ieee")

    # by halves, as all that is added at once takes registers that more of the product could use
    first, second = tl.split(mixed.reshape(BLOCK_ROWS, 2, BLOCK_OUT // 2).permute(0, 2, 1))
    image, segment = row // (OTHER_SIZE * SEGMENTS), row % SEGMENTS
    for half in tl.static_range(2):
        out = first if half == 0 else second
        column = (block % blocks) * BLOCK_OUT + half * (BLOCK_OUT // 2) + tl.arange(0, BLOCK_OUT // 2)
        offset = row_offset + _column_offsets(column, AXIS_STRIDE, DIM, 1)[None, :]
        mask = (row < rows)[:, None] & (column < SIZE)[None, :]
        channel = ((image * SEGMENTS + segment) * DIM)[:, None] + (column % DIM)[None, :]
        base = tl.load(base_ptr + offset, mask=mask, other=0.0)
        _store_sum(out_ptr + offset, out, scale_ptr, base, base_scale_ptr, channel, mask)


@triton.jit
def _weight_part(weight_ptr, column, k, out_stride, in_stride, SIZE: tl.constexpr):
    mask = (column < SIZE)[:, None] & (k < SIZE)[None, :]
    return tl.load(weight_ptr + column[:, None] * out_stride + k[None, :] * in_stride, mask=mask, other=0.0)


@triton.jit
def _packed_mix_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    scale_ptr,
    base_ptr,
    base_scale_ptr,
    rows,
    image_stride,
    weight_out_stride,
    weight_in_stride,
    SIZE: tl.constexpr,
    AXIS_STRIDE: tl.constexpr,
    OTHER_SIZE: tl.constexpr,
    OTHER_STRIDE: tl.constexpr,
    SEGMENTS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """As `_mix_kernel`, the product transposed; a program keeps its weights and goes through the image with them."""
    blocks: tl.constexpr = (SIZE + BLOCK_OUT - 1) // BLOCK_OUT
    column, k = (tl.program_id(0) % blocks) * BLOCK_OUT + tl.arange(0, BLOCK_OUT), tl.arange(0, BLOCK_IN)
    weight_0 = _weight_part(weight_ptr, column, k, weight_out_stride, weight_in_stride, SIZE)
    weight_1 = _weight_part(weight_ptr, column, k + BLOCK_IN, weight_out_stride, weight_in_stride, SIZE)
    weight_2 = _weight_part(weight_ptr, column, k + 2 * BLOCK_IN, weight_out_stride, weight_in_stride, SIZE)
    column_offset = _column_offsets(column, AXIS_STRIDE, DIM, SEGMENTS)[:, None]

    first, tiles, step = tl.program_id(0) // blocks, tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0) // blocks
    for tile in tl.range(first, tiles, step, num_stages=4):
        row = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        row_offset = _row_offsets(row, image_stride, OTHER_SIZE, OTHER_STRIDE, SEGMENTS, 1)[None, :]
        inside = (row < rows)[None, :]
        offset, mask = row_offset + column_offset, inside & (column < SIZE)[:, None]
        base = tl.load(base_ptr + offset, mask=mask, other=0.0)
        mixed = tl.zeros((BLOCK_OUT, BLOCK_ROWS), tl.float32)
        for part in tl.static_range(3):
            k = part * BLOCK_IN + tl.arange(0, BLOCK_IN)
            x_mask = inside & (k < SIZE)[:, None] if SIZE < 3 * BLOCK_IN else inside
            x_offset = row_offset + _column_offsets(k, AXIS_STRIDE, DIM, SEGMENTS)[:, None]
            x = tl.load(x_ptr + x_offset, mask=x_mask, other=0.0)
            weight = weight_0 if part == 0 else (weight_1 if part == 1 else weight_2)
            mixed = tl.dot(weight, x, mixed, input_precision="ieee")
        image, segment = row // (OTHER_SIZE * SEGMENTS), row % SEGMENTS
        channel = (image * SEGMENTS * DIM + segment)[None, :] + (column % DIM * SEGMENTS)[:, None]
        _store_sum(out_ptr + offset, mixed, scale_ptr, base, base_scale_ptr, channel, mask)


@triton.jit
def _store_means(total, to_line, to_mean, H: tl.constexpr, W: tl.constexpr, mask, inside):
    tl.store(to_line, (total / H).to(to_line.dtype.element_ty), mask=mask)
    tl.store(to_mean, (tl.sum(total, 0) / (H * W)).to(to_mean.dtype.element_ty), mask=inside)


@triton.jit
def _means_kernel(
    x_ptr,
    lines_ptr,
    mean_ptr,
    H: tl.constexpr,
    W: tl.constexpr,
    SEGMENTS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    size: tl.constexpr = SEGMENTS * DIM
    blocks: tl.constexpr = (size + BLOCK_CHANNELS - 1) // BLOCK_CHANNELS
    image, w = tl.program_id(0) // blocks, tl.arange(0, BLOCK_WIDTH)
    channel = (tl.program_id(0) % blocks) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = channel < size
    mask = (w < W)[:, None] & inside[None, :]
    x_offset = w[:, None] * size + channel[None, :]
    lines_ptr += image * (H + W) * size + (channel // DIM) * (H + W) * DIM + channel % DIM

    total = tl.zeros((BLOCK_WIDTH, BLOCK_CHANNELS), tl.float32)
    for h in tl.range(0, H, num_stages=4):
        x = tl.load(x_ptr + (image * H + h) * W * size + x_offset, mask=mask, other=0.0).to(tl.float32)
        tl.store(lines_ptr + h * DIM, (tl.sum(x, 0) / W).to(lines_ptr.dtype.element_ty), mask=inside)
        total += x
    line = lines_ptr[None, :] + (H + w[:, None]) * DIM
    _store_means(total, line, mean_ptr + image * size + channel, H, W, mask, inside)


@triton.jit
def _pack_kernel(
    x_ptr,
    packed_ptr,
    lines_ptr,
    mean_ptr,
    H: tl.constexpr,
    W: tl.constexpr,
    SEGMENTS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_SEGMENTS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    size: tl.constexpr = SEGMENTS * DIM
    blocks: tl.constexpr = (SEGMENTS + BLOCK_SEGMENTS - 1) // BLOCK_SEGMENTS
    image, w, s = tl.program_id(0) // blocks, tl.arange(0, BLOCK_WIDTH), tl.arange(0, BLOCK_DIM)
    n = (tl.program_id(0) % blocks) * BLOCK_SEGMENTS + tl.arange(0, BLOCK_SEGMENTS)
    inside = (n < SEGMENTS)[:, None] & (s < DIM)[None, :]
    mask = (w < W)[:, None, None] & inside[None, :, :]
    packed_mask = (w < W)[:, None, None] & (s < DIM)[None, :, None] & (n < SEGMENTS)[None, None, :]
    channel, packed_channel = n[:, None] * DIM + s[None, :], s[:, None] * SEGMENTS + n[None, :]
    lines_ptr += image * (H + W) * size + n[:, None] * (H + W) * DIM + s[None, :]

    total = tl.zeros((BLOCK_WIDTH, BLOCK_SEGMENTS, BLOCK_DIM), tl.float32)
    for h in tl.range(0, H, num_stages=3):
        start = (image * H + h) * W * size + (w * size)[:, None, None]
        x = tl.load(x_ptr + start + channel[None, :, :], mask=mask, other=0.0)
        tl.store(packed_ptr + start + packed_channel[None, :, :], tl.permute(x, (0, 2, 1)), mask=packed_mask)
        x = x.to(tl.float32)
        tl.store(lines_ptr + h * DIM, (tl.sum(x, 0) / W).to(lines_ptr.dtype.element_ty), mask=inside)
        total += x
    line = lines_ptr[None, :, :] + (H + w[:, None, None]) * DIM
    _store_means(total, line, mean_ptr + image * size + channel, H, W, mask, inside)


def use_packed(x: torch.Tensor) -> bool:
    """Whether `[B, H, W, N, S]` is better mixed after `pack_lines`."""
    if x.is_cuda:
        properties = torch.cuda.get_device_properties(x.device)
        if (properties.major, properties.minor) not in _ROOMY:
            return False
    longest = max(x.shape[1], x.shape[2]) * x.shape[4]
    return x.shape[4] % 8 != 0 and x.shape[3] % 8 == 0 and longest <= _PACKED_SIZE


# What torch keeps on disk of compiled operators, it knows by the kernels that it finds in them: those that functions
# give which stand above the operators.
_Plan = tuple[Any, dict[str, int], tuple[int]]  # a kernel, its blocks and its programs


def _means_plan(x: torch.Tensor) -> _Plan:
    B, _, W, N, S = x.shape
    width = triton.next_power_of_2(W)
    # one warp a program, so that none waits for another where channels are summed
    blocks = dict(BLOCK_WIDTH=width, BLOCK_CHANNELS=max(16, min(64, 2048 // width)), num_warps=1)
    return _means_kernel, blocks, (B * triton.cdiv(N * S, blocks["BLOCK_CHANNELS"]),)


def _pack_plan(x: torch.Tensor) -> _Plan:
    B, _, W, N, S = x.shape
    width, dim = triton.next_power_of_2(W), triton.next_power_of_2(S)
    segments = max(1, min(8, triton.next_power_of_2(N), 2048 // (width * dim)))
    blocks = dict(BLOCK_WIDTH=width, BLOCK_SEGMENTS=segments, BLOCK_DIM=dim, num_warps=1)
    return _pack_kernel, blocks, (B * triton.cdiv(N, segments),)


def _mix_plan(rows: int, size: int, packed: bool, device: torch.device) -> _Plan:
    """What was fastest on an H200 for `vip_s7` and `vip_m7`."""
    if packed:
        blocks = dict(BLOCK_ROWS=32, BLOCK_OUT=64, BLOCK_IN=64, num_warps=4)
        columns, tiles = triton.cdiv(size, 64), triton.cdiv(rows, 32)
        processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        return _packed_mix_kernel, blocks, (columns * max(1, min(tiles, 2 * processors // columns)),)
    if size % 128:
        blocks = dict(BLOCK_ROWS=128, BLOCK_OUT=64, BLOCK_IN=32, num_warps=8, num_stages=4)
    else:
        blocks = dict(BLOCK_ROWS=128, BLOCK_OUT=128, BLOCK_IN=64, num_warps=8, num_stages=3)
    grid = (triton.cdiv(rows, blocks["BLOCK_ROWS"]) * triton.cdiv(size, blocks["BLOCK_OUT"]),)
    return _mix_kernel, blocks, grid


def _launch(plan: _Plan, *args: Any, **constants: Any) -> None:
    """Launch a kernel on the GPU of its first argument, which need not be the current one."""
    kernel, blocks, grid = plan
    with torch.cuda.device_of(args[0]) if torch.cuda.is_initialized() else nullcontext():
        _launchable(kernel)[grid](*args, **constants, **blocks)


def _launchable(kernel: Any) -> Any:
    """A kernel that torch.compile sees; as it is under Triton's interpreter, which older torch does not know."""
    return wrap_triton(kernel) if isinstance(kernel, triton.JITFunction) else kernel


@triton_op("vip::line_means", mutates_args=())
def line_means(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Means of the lines of an image, of rows and columns at once.

    Args:
        x: `[B, H, W, N, S]`, N segments of S channels, of fewer than 2^30 elements.

    Returns:
        Means over the width and, behind them, over the height, `[B, N, H + W, S]`, and over both, `[B, N, S]`. Summed
        in float32.
    """
    B, H, W, N, S = x.shape
    x, lines, mean = x.contiguous(), x.new_empty(B, N, H + W, S), x.new_empty(B, N, S)
    _launch(_means_plan(x), x, lines, mean, H=H, W=W, SEGMENTS=N, DIM=S)
    return lines, mean


@triton_op("vip::pack_lines", mutates_args=())
def pack_lines(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `line_means` gives, and the image with its channels the other way round.

    Args:
        x: `[B, H, W, N, S]`, of fewer than 2^30 elements.

    Returns:
        `[B, N, H + W, S]`, `[B, N, S]`, and the image, `[B, H, W, S, N]`.
    """
    B, H, W, N, S = x.shape
    x, lines, mean = x.contiguous(), x.new_empty(B, N, H + W, S), x.new_empty(B, N, S)
    packed = x.new_empty(B, H, W, S, N)
    _launch(_pack_plan(x), x, packed, lines, mean, H=H, W=W, SEGMENTS=N, DIM=S)
    return lines, mean, packed


@triton_op("vip::axis_mix_add", mutates_args=())
def axis_mix_add(
    x: torch.Tensor,
    weight: torch.Tensor,
    axis: int,
    scale: torch.Tensor,
    base: torch.Tensor,
    base_scale: torch.Tensor | None = None,
    packed: bool = False,
) -> torch.Tensor:
    """Mix the tokens along an axis and add them to others, `base_scale * base + scale * mixed`, in one pass.

    What is mixed are the tokens along an axis, a segment of the channels at a time (arXiv 2106.12368, section 3.2).

    Args:
        x: `[B, H, W, N, S]`, N segments of S channels, or `[B, H, W, S, N]` if packed, of fewer than 2^31 elements.
        weight: `[L * S, L * S]` in the type of `x`, with L the length of the axis; of 192 values at most if packed.
        axis: 1 for the height, 2 for the width.
        scale: Of each image and channel, `[B, 1, 1, N, S]`, or `[B, 1, 1, S, N]`, in the type of `x`.
        base: What to add to, in the shape and type of `x`.
        base_scale: As `scale`; None: one.
        packed: The channels of all but the weight are the other way round.

    Returns:
        The shape of `x`, contiguous. All is computed in float32, and rounded once.

    Raises:
        ValueError: If the axis is another, the weight does not fit the axis, the segments and the type, or a scale or
            the base has another shape or type.
    """
    size, dim = _check(x, weight, axis, packed)
    _check_added(x, scale, base, base_scale)
    x, other = x.contiguous(), 3 - axis
    out = torch.empty_like(x)
    rows = x.numel() // size
    _launch(
        _mix_plan(rows, size, packed, x.device),
        x,
        weight,
        out,
        scale.contiguous(),
        base.contiguous(),
        None if base_scale is None else base_scale.contiguous(),
        rows,
        x.stride(0),
        weight.stride(0),
        weight.stride(1),
        SIZE=size,
        AXIS_STRIDE=x.stride(axis),
        OTHER_SIZE=x.shape[other],
        OTHER_STRIDE=x.stride(other),
        SEGMENTS=x.shape[4 if packed else 3],
        DIM=dim,
    )
    return out


def _check(x: torch.Tensor, weight: torch.Tensor, axis: int, packed: bool) -> tuple[int, int]:
    """Values of a line, and channels of a segment."""
    if x.ndim != 5 or axis not in (1, 2):
        raise ValueError(f"Axis {axis} of {x.ndim} dimensions, expected 1 (height) or 2 (width) of [B, H, W, N, S].")
    dim = x.shape[3 if packed else 4]
    size = x.shape[axis] * dim
    if weight.shape != (size, size) or weight.dtype != x.dtype:
        line = f"{'height' if axis == 1 else 'width'} of {x.shape[axis]}"
        raise ValueError(
            f"A weight of {' x '.join(map(str, weight.shape))} in {weight.dtype}, expected {size} x {size} for a "
            f"{line} and segments of {dim} channels in {x.dtype}."
        )
    if packed and size > _PACKED_SIZE:
        raise ValueError(f"Lines of {size} values, expected at most {_PACKED_SIZE} of what is packed.")
    return size, dim


def _check_added(x: torch.Tensor, scale: torch.Tensor, base: torch.Tensor, base_scale: torch.Tensor | None) -> None:
    per_channel = (x.shape[0], 1, 1, *x.shape[3:])
    for name, t, shape in (
        ("scale", scale, per_channel),
        ("base", base, x.shape),
        ("base_scale", base_scale, per_channel),
    ):
        if t is not None and (t.shape != shape or t.dtype != x.dtype):
            raise ValueError(f"{name} is {list(t.shape)} in {t.dtype}, expected {list(shape)} in {x.dtype}.")


def _save_shape(ctx, inputs, output) -> None:
    ctx.shape = inputs[0].shape


def _backward_of_means(ctx, of_lines, of_mean):
    H, W = ctx.shape[1:3]
    of_width, of_height = of_lines.transpose(1, 2).split((H, W), 1)  # [B, H, N, S] and [B, W, N, S]
    of_mean = of_mean[:, None, None] / (H * W)
    return (of_width / W).unsqueeze(2) + (of_height / H).unsqueeze(1) + of_mean


def _backward_of_pack(ctx, of_lines, of_mean, of_packed):
    return of_packed.transpose(3, 4) + _backward_of_means(ctx, of_lines, of_mean)


def _save_add(ctx, inputs, output) -> None:
    x, weight, ctx.axis, scale, base, base_scale, ctx.packed = inputs
    ctx.save_for_backward(x, weight, scale, *([] if base_scale is None else [base, base_scale]))


def _backward_of_add(ctx, grad):
    """By torch: models that learn mix by torch, too, which is faster there."""
    x, weight, scale, *scaled_base = ctx.saved_tensors
    in_lines = (lambda t: t.transpose(3, 4).movedim(ctx.axis, 3)) if ctx.packed else (lambda t: t.movedim(ctx.axis, 3))
    lines, scaled = in_lines(x), in_lines(grad * scale)  # [B, O, N, L, S]
    rows, scaled_rows = lines.flatten(3).flatten(0, 2), scaled.flatten(3).flatten(0, 2)

    def mix(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        mixed = (rows @ matrix).reshape(lines.shape).movedim(3, ctx.axis)
        return mixed.transpose(3, 4) if ctx.packed else mixed

    grad_x, grad_weight = mix(scaled_rows, weight), scaled_rows.t() @ rows
    grad_scale = (grad * mix(rows, weight.t())).sum((1, 2), keepdim=True)
    if not scaled_base:
        return grad_x, grad_weight, None, grad_scale, grad, None, None
    base, base_scale = scaled_base
    grad_base_scale = (grad * base).sum((1, 2), keepdim=True)
    return grad_x, grad_weight, None, grad_scale, grad * base_scale, grad_base_scale, None


line_means.register_autograd(_backward_of_means, setup_context=_save_shape)
pack_lines.register_autograd(_backward_of_pack, setup_context=_save_shape)
axis_mix_add.register_autograd(_backward_of_add, setup_context=_save_add)
