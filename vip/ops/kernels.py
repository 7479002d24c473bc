"""Triton kernels that mix tokens along an image axis where they lie.

The textbook Permute-MLP gathers the columns (rows) of an image into the rows of a matrix, multiplies, and scatters the
product back: two copies of the image around a matrix product of few operations a byte. Here the matrix
product reads its operand from where it is, and writes the result to where it belongs. An entry of the matrix with row
`(b, q, n)` and column `(l, s)` lies at an offset that is a sum of one of the row and one of the column, so that only
the addresses differ from those of an ordinary matrix product:

- b: image, q: position along the other axis, n: segment of the channels;
- l: position along the axis that is mixed, s: channel within the segment.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.library import triton_op, wrap_triton

__all__ = ["axis_mix", "axis_mix_add", "axis_mix_weight_grad"]


@triton.jit
def _row_offsets(
    rows, image_stride, OTHER_SIZE: tl.constexpr, OTHER_STRIDE: tl.constexpr, SEGMENTS: tl.constexpr, DIM: tl.constexpr
):
    segment, line = rows % SEGMENTS, rows // SEGMENTS
    return (line // OTHER_SIZE) * image_stride + (line % OTHER_SIZE) * OTHER_STRIDE + segment * DIM


@triton.jit
def _column_offsets(columns, AXIS_STRIDE: tl.constexpr, DIM: tl.constexpr):
    return (columns // DIM) * AXIS_STRIDE + columns % DIM


@triton.jit
def _mix_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    scale_ptr,  # None, and so are the next two: what is mixed is all
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
        x = tl.load(x_ptr + row_offset + _column_offsets(k, AXIS_STRIDE, DIM)[None, :], mask=x_mask, other=0.0)
        weight = tl.load(
            weight_ptr + column[None, :] * weight_out_stride + k[:, None] * weight_in_stride,
            mask=weight_mask,
            other=0.0,
        )
        mixed = tl.dot(x, weight, mixed, input_precision="ieee")

    # by halves, as all that is added at once takes registers that a second program could use
    first, second = tl.split(mixed.reshape(BLOCK_ROWS, 2, BLOCK_OUT // 2).permute(0, 2, 1))
    image, segment = row // (OTHER_SIZE * SEGMENTS), row % SEGMENTS
    for half in tl.static_range(2):
        out = first if half == 0 else second
        column = (block % blocks) * BLOCK_OUT + half * (BLOCK_OUT // 2) + tl.arange(0, BLOCK_OUT // 2)
        offset = row_offset + _column_offsets(column, AXIS_STRIDE, DIM)[None, :]
        mask = (row < rows)[:, None] & (column < SIZE)[None, :]
        if scale_ptr is not None:
            channel = ((image * SEGMENTS + segment) * DIM)[:, None] + (column % DIM)[None, :]
            base = tl.load(base_ptr + offset, mask=mask, other=0.0).to(tl.float32)
            if base_scale_ptr is not None:
                base *= tl.load(base_scale_ptr + channel, mask=mask, other=0.0)
            out = base + out * tl.load(scale_ptr + channel, mask=mask, other=0.0)
        tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _weight_grad_kernel(
    grad_ptr,
    x_ptr,
    out_ptr,
    rows,
    rows_of_part,
    image_stride,
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
    blocks: tl.constexpr = (SIZE + BLOCK_IN - 1) // BLOCK_IN
    block, part = tl.program_id(0), tl.program_id(1)
    column = (block // blocks) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    k = (block % blocks) * BLOCK_IN + tl.arange(0, BLOCK_IN)
    grad_offset = _column_offsets(column, AXIS_STRIDE, DIM)[None, :]
    x_offset = _column_offsets(k, AXIS_STRIDE, DIM)[None, :]

    total = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    end = tl.minimum((part + 1) * rows_of_part, rows)
    for start in range(part * rows_of_part, end, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        row_offset = _row_offsets(row, image_stride, OTHER_SIZE, OTHER_STRIDE, SEGMENTS, DIM)[:, None]
        mask = (row < end)[:, None]
        grad = tl.load(grad_ptr + row_offset + grad_offset, mask=mask & (column < SIZE)[None, :], other=0.0)
        x = tl.load(x_ptr + row_offset + x_offset, mask=mask & (k < SIZE)[None, :], other=0.0)
        total = tl.dot(tl.trans(grad), x, total, input_precision="ieee")

    tl.store(
        out_ptr + part * SIZE * SIZE + column[:, None] * SIZE + k[None, :],
        total,
        mask=(column < SIZE)[:, None] & (k < SIZE)[None, :],
    )


def _launchable(kernel: Any) -> Any:
    """A kernel that torch.compile sees; as it is under Triton's interpreter, which older torch does not know."""
    return wrap_triton(kernel) if isinstance(kernel, triton.JITFunction) else kernel


def _layout(x: torch.Tensor, axis: int) -> dict[str, int]:
    """What the kernels know of `[B, H, W, N, S]` in contiguous memory."""
    other = 3 - axis
    return dict(
        SIZE=x.shape[axis] * x.shape[4],
        AXIS_STRIDE=x.stride(axis),
        OTHER_SIZE=x.shape[other],
        OTHER_STRIDE=x.stride(other),
        SEGMENTS=x.shape[3],
        DIM=x.shape[4],
    )


def _mix(
    x: torch.Tensor,
    weight: torch.Tensor,
    axis: int,
    scale: torch.Tensor | None = None,
    base: torch.Tensor | None = None,
    base_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    if x.ndim != 5 or axis not in (1, 2):
        raise ValueError(f"Axis {axis} of {x.ndim} dimensions, expected 1 (height) or 2 (width) of [B, H, W, N, S].")
    size = x.shape[axis] * x.shape[4]
    if weight.shape != (size, size) or weight.dtype != x.dtype:
        line = f"{'height' if axis == 1 else 'width'} of {x.shape[axis]}"
        raise ValueError(
            f"A weight of {' x '.join(map(str, weight.shape))} in {weight.dtype}, expected {size} x {size} for a "
            f"{line} and segments of {x.shape[4]} channels in {x.dtype}."
        )
    x = x.contiguous()
    out = torch.empty_like(x)
    layout, rows = _layout(x, axis), x.numel() // size
    if size % 128:  # 192 of vip_s7 is three times 64; its segments of 6 channels take more registers to read
        blocks = dict(BLOCK_ROWS=128, BLOCK_OUT=64, BLOCK_IN=32, num_warps=8, num_stages=4)
    elif scale is None:
        blocks = dict(BLOCK_ROWS=128, BLOCK_OUT=128, BLOCK_IN=64, num_warps=8, num_stages=3)
    else:  # which takes about 106 registers instead of 135 on an H100, and so leaves room for a second program
        blocks = dict(BLOCK_ROWS=128, BLOCK_OUT=128, BLOCK_IN=32, num_warps=8, num_stages=4)
    grid = (triton.cdiv(rows, blocks["BLOCK_ROWS"]) * triton.cdiv(size, blocks["BLOCK_OUT"]),)
    _launchable(_mix_kernel)[grid](
        x,
        weight,
        out,
        scale,
        base,
        base_scale,
        rows,
        x.stride(0),
        weight.stride(0),
        weight.stride(1),
        **layout,
        **blocks,
    )
    return out


@triton_op("vip::axis_mix", mutates_args=())
def axis_mix(x: torch.Tensor, weight: torch.Tensor, axis: int) -> torch.Tensor:
    """Mix the tokens along an axis, a segment of the channels at a time (arXiv 2106.12368, section 3.2).

    Args:
        x: `[B, H, W, N, S]`, N segments of S channels, of fewer than 2^31 elements.
        weight: `[L * S, L * S]` in the type of `x`, with L the length of the axis.
        axis: 1 for the height, 2 for the width.

    Returns:
        `[B, H, W, N, S]`, contiguous. Products are summed in float32.

    Raises:
        ValueError: If the axis is another, or the weight does not fit the axis, the segments and the type.
    """
    return _mix(x, weight, axis)


@triton_op("vip::axis_mix_add", mutates_args=())
def axis_mix_add(
    x: torch.Tensor,
    weight: torch.Tensor,
    axis: int,
    scale: torch.Tensor,
    base: torch.Tensor,
    base_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mix the tokens along an axis and add them to others, `base_scale * base + scale * mixed`, in one pass.

    What is mixed is not kept for the backward pass, which mixes again; models that learn use `axis_mix` instead.

    Args:
        x: As `axis_mix` takes it, and `weight` and `axis`.
        weight: As there.
        axis: As there.
        scale: Of each image and channel, `[B, 1, 1, N, S]` in the type of `x`.
        base: What to add to, in the shape and type of `x`.
        base_scale: As `scale`; None: one.

    Returns:
        `[B, H, W, N, S]`, contiguous. All is computed in float32, and rounded once.

    Raises:
        ValueError: As `axis_mix` does, or if a scale or the base has another shape or type.
    """
    per_channel = (x.shape[0], 1, 1, *x.shape[3:])
    for name, t, shape in (
        ("scale", scale, per_channel),
        ("base", base, x.shape),
        ("base_scale", base_scale, per_channel),
    ):
        if t is not None and (t.shape != shape or t.dtype != x.dtype):
            raise ValueError(f"{name} is {list(t.shape)} in {t.dtype}, expected {list(shape)} in {x.dtype}.")
    base_scale = None if base_scale is None else base_scale.contiguous()
    return _mix(x, weight, axis, scale.contiguous(), base.contiguous(), base_scale)


@triton_op("vip::axis_mix_weight_grad", mutates_args=())
def axis_mix_weight_grad(grad: torch.Tensor, x: torch.Tensor, axis: int) -> torch.Tensor:
    """Gradient of `axis_mix` in its weight.

    Args:
        grad: Gradient of the result, `[B, H, W, N, S]`.
        x: What was mixed.
        axis: As there.

    Returns:
        `[L * S, L * S]` in the type of `x`. The order of the sums depends on the shapes alone.
    """
    grad, x = grad.contiguous(), x.contiguous()
    layout = _layout(x, axis)
    size = layout["SIZE"]
    rows, tiles = x.numel() // size, triton.cdiv(size, 128) ** 2
    # about 256 programs fill a GPU
    rows_of_part = max(1, triton.cdiv(triton.cdiv(rows, max(1, 256 // tiles)), 64)) * 64
    parts = triton.cdiv(rows, rows_of_part)
    out = torch.empty(parts, size, size, dtype=torch.float32, device=x.device)
    _launchable(_weight_grad_kernel)[(tiles, parts)](
        grad,
        x,
        out,
        rows,
        rows_of_part,
        x.stride(0),
        **layout,
        BLOCK_ROWS=64,
        BLOCK_OUT=128,
        BLOCK_IN=128,
        num_warps=8,
        num_stages=3,
    )
    return out.sum(0).to(x.dtype)


def _save_add(ctx, inputs, output) -> None:
    x, weight, ctx.axis, scale, base, base_scale = inputs
    ctx.save_for_backward(x, weight, scale, *([] if base_scale is None else [base, base_scale]))


def _backward_of_add(ctx, grad):
    x, weight, scale, *scaled_base = ctx.saved_tensors
    needs_x, needs_weight, _, needs_scale, *_ = ctx.needs_input_grad
    scaled = _in_memory(grad * scale)
    grad_x = axis_mix(scaled, weight.t(), ctx.axis) if needs_x else None
    grad_weight = axis_mix_weight_grad(scaled, x, ctx.axis) if needs_weight else None
    grad_scale = _sum_of_tokens(grad * axis_mix(x, weight, ctx.axis)) if needs_scale else None
    if not scaled_base:
        return grad_x, grad_weight, None, grad_scale, grad, None
    base, base_scale = scaled_base
    return grad_x, grad_weight, None, grad_scale, grad * base_scale, _sum_of_tokens(grad * base)


def _in_memory(x: torch.Tensor) -> torch.Tensor:
    """Keep what two kernels read: torch.compile would compute it for each of them, but not what is viewed like this."""
    x = x.contiguous()
    return x.as_strided(x.shape, x.stride())


def _sum_of_tokens(x: torch.Tensor) -> torch.Tensor:
    return x.sum((1, 2), keepdim=True)


def _save(ctx, inputs, output) -> None:
    x, weight, ctx.axis = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, grad):
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, _ = ctx.needs_input_grad
    grad = _in_memory(grad)
    grad_x = axis_mix(grad, weight.t(), ctx.axis) if needs_x else None
    return grad_x, axis_mix_weight_grad(grad, x, ctx.axis) if needs_weight else None, None


def _backward_of_weight_grad(ctx, grad):
    """Of optimizers of second order: what mixes `grad` and `x` into a weight's gradient is linear in both."""
    mixed, x = ctx.saved_tensors
    return axis_mix(x, grad, ctx.axis), axis_mix(mixed, grad.t(), ctx.axis), None


axis_mix_add.register_autograd(_backward_of_add, setup_context=_save_add)
axis_mix.register_autograd(_backward, setup_context=_save)
axis_mix_weight_grad.register_autograd(_backward_of_weight_grad, setup_context=_save)
