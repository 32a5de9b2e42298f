"""a x + b z with a scale for a whole replica, or for each of its rows: multipliers of the residual stream, and gates.

R replica, S scales of one replica, n elements that share a scale.

The gradient of a scale is the dot product of n elements: a program's block of them first, then the blocks, both in an
order that follows from n alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ordered_sum import row_sums
from kernels.stacking import custom_operator, fold_vmap

TILE = 4096  # elements a program holds at once


def scaled_sum(x: Tensor, a: Tensor | None, z: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    """a x + b z; without a: x + b z, without z and b: a x.

    x, z: [*s, ...], same shape and dtype. a, b: [*s], a scale for all that lies behind its place, 0-dim for all of x.
    Returns the shape and dtype of x; float32 inside. Raises ValueError for shapes that do not fit.
    """
    if x.device.type == "cpu":
        return scaled_sum_reference(x, a, z, b)
    return scaled_sum_triton(x, a, z, b)


def scaled_sum_triton(x: Tensor, a: Tensor | None, z: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    """`scaled_sum` on the Triton kernels whatever the device."""
    scales = [each for each in (a, b) if each is not None]
    others = [] if z is None else [z]
    fits = all(each.shape == scales[0].shape == x.shape[: each.dim()] for each in scales)
    if not fits or any(other.shape != x.shape for other in others) or (z is None) != (b is None):
        raise ValueError(
            f"scaled_sum got {[tuple(each.shape) for each in (x, *others)]} and scales "
            f"{[tuple(each.shape) for each in scales]}, expected terms of one shape and a scale for each, of the first "
            "of its dimensions"
        )
    S = scales[0].numel()
    terms = [None if term is None else term.reshape(1, S, -1) for term in (x, z)]
    factors = [None if scale is None else scale.reshape(1, S) for scale in (a, b)]
    return scaled_sum_op(terms[0], factors[0], terms[1], factors[1]).reshape(x.shape)


def scaled_sum_reference(x: Tensor, a: Tensor | None, z: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    """`scaled_sum` in plain differentiable torch."""
    wide = torch.promote_types(x.dtype, torch.float32)
    terms = [(x, a), *([] if z is None else [(z, b)])]
    scaled = [
        term.to(wide) if scale is None else scale.reshape(*scale.shape, *[1] * (x.dim() - scale.dim())) * term.to(wide)
        for term, scale in terms
    ]
    return sum(scaled[1:], scaled[0]).to(x.dtype)


@fold_vmap
@custom_operator("fractal::scaled_sum")
def scaled_sum_op(x_RSn: Tensor, a_RS: Tensor | None, z_RSn: Tensor | None, b_RS: Tensor | None) -> Tensor:
    """`scaled_sum` of R replicas."""
    y_RSn = torch.empty_like(x_RSn, memory_format=torch.contiguous_format)
    grid, sizes = _tiles(x_RSn)
    _scaled_sum_kernel[grid](*_dense(x_RSn, a_RS, z_RSn, b_RS), y_RSn, **sizes)
    return y_RSn


@scaled_sum_op.register_fake
def _(x_RSn, a_RS, z_RSn, b_RS):
    return torch.empty_like(x_RSn, memory_format=torch.contiguous_format)


@custom_operator("fractal::scaled_sum_backward")
def scaled_sum_backward_op(
    dy_RSn: Tensor, x_RSn: Tensor | None, a_RS: Tensor | None, z_RSn: Tensor | None, b_RS: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, a, z and b, of a term with its scale or, where both are None, empty."""
    grid, sizes = _tiles(dy_RSn)
    gradients = [dy_RSn.new_empty(dy_RSn.shape) if each is not None else dy_RSn.new_empty(0) for each in (x_RSn, z_RSn)]
    parts = [
        None if scale is None else dy_RSn.new_empty(scale.numel(), sizes["BLOCKS"], dtype=torch.float32)
        for scale in (a_RS, b_RS)
    ]
    terms = _dense(dy_RSn, x_RSn, a_RS, z_RSn, b_RS)
    _scaled_sum_backward_kernel[grid](*terms, gradients[0], parts[0], gradients[1], parts[1], **sizes)
    da_RS, db_RS = (_sums(part, scale, dy_RSn) for part, scale in zip(parts, (a_RS, b_RS), strict=True))
    return gradients[0], da_RS, gradients[1], db_RS


@scaled_sum_backward_op.register_fake
def _(dy_RSn, x_RSn, a_RS, z_RSn, b_RS):
    return tuple(dy_RSn.new_empty(0 if each is None else each.shape) for each in (x_RSn, a_RS, z_RSn, b_RS))


def _sums(parts_SJ, scale_RS, like):
    """A scale's gradient [R, S] from its parts, one a block of elements; empty where there is no scale."""
    if scale_RS is None:
        return like.new_empty(0)
    sums = parts_SJ if parts_SJ.shape[1] == 1 else row_sums(parts_SJ)
    return sums.view(scale_RS.shape).to(scale_RS.dtype)


def _scaled_sum_save(ctx, inputs, output):
    x_RSn, a_RS, z_RSn, b_RS = inputs
    ctx.save_for_backward(None if a_RS is None else x_RSn, a_RS, z_RSn, b_RS)


def _scaled_sum_backward(ctx, dy_RSn):
    found = scaled_sum_backward_op(dy_RSn, *ctx.saved_tensors)
    gradients = [None if kept is None else each for kept, each in zip(ctx.saved_tensors, found, strict=True)]
    return (dy_RSn, *gradients[1:]) if gradients[0] is None else tuple(gradients)


scaled_sum_op.register_autograd(_scaled_sum_backward, setup_context=_scaled_sum_save)


def _dense(*tensors):
    return [None if each is None else each.contiguous() for each in tensors]


def _tiles(x_RSn):
    """The grid (replicas, rows, blocks of elements), and the kernels' sizes, from one replica's shape alone."""
    R, S, n = x_RSn.shape
    width = min(triton.next_power_of_2(n), TILE)
    rows = min(max(1, TILE // width), triton.next_power_of_2(S))
    blocks = triton.cdiv(n, width)
    return (R * triton.cdiv(S, rows) * blocks,), {
        "S": S, "n": n, "BLOCKS": blocks, "ROWS": rows, "WIDTH": width, "num_warps": 4
    }  # fmt: skip


@triton.jit
def _place(S: tl.constexpr, n: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Scales of this program, its elements, and which of both exist."""
    row_blocks: tl.constexpr = (S + ROWS - 1) // ROWS
    rows = tl.program_id(0) // BLOCKS
    replica = (rows // row_blocks).to(tl.int64)
    row = rows % row_blocks * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % BLOCKS * WIDTH + tl.arange(0, WIDTH)
    scale_at = replica * S + row
    return scale_at, scale_at[:, None] * n + column[None, :], row < S, (row < S)[:, None] & (column < n)[None, :]


@triton.jit
def _scaled_sum_kernel(
    x_ptr, a_ptr, z_ptr, b_ptr, y_ptr,
    S: tl.constexpr, n: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    scale_at, at, known, inside = _place(S, n, BLOCKS, ROWS, WIDTH)
    y = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if a_ptr is not None:
        y *= tl.load(a_ptr + scale_at, mask=known, other=0.0).to(tl.float32)[:, None]
    if z_ptr is not None:
        b = tl.load(b_ptr + scale_at, mask=known, other=0.0).to(tl.float32)
        y += b[:, None] * tl.load(z_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y, mask=inside)


@triton.jit
def _scaled_sum_backward_kernel(
    dy_ptr, x_ptr, a_ptr, z_ptr, b_ptr, dx_ptr, da_ptr, dz_ptr, db_ptr,
    S: tl.constexpr, n: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    scale_at, at, known, inside = _place(S, n, BLOCKS, ROWS, WIDTH)
    part_at = scale_at * BLOCKS + tl.program_id(0) % BLOCKS
    dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if a_ptr is not None:
        a = tl.load(a_ptr + scale_at, mask=known, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, a[:, None] * dy, mask=inside)
        tl.store(da_ptr + part_at, tl.sum(dy * x, 1), mask=known)
    if z_ptr is not None:
        b = tl.load(b_ptr + scale_at, mask=known, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dz_ptr + at, b[:, None] * dy, mask=inside)
        tl.store(db_ptr + part_at, tl.sum(dy * z, 1), mask=known)
