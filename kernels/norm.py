"""RMS norm, alone or fused with the residual addition before it, with or without a weight.

R replica, N rows of one replica (all leading dimensions), D width, J row blocks of one replica.

One program holds whole rows, so nothing but the normed tensor's input is kept for the backward.
The weight's gradient is a sum over all rows of a replica, in two passes of fixed order: each
program adds its own row block, a second kernel adds the blocks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.stacking import custom_operator, dense_replicas, fold_vmap

MAX_WIDTH = 16384
TILE = 4096  # elements a program holds at once
BLOCK_ROWS = 32  # rows whose weight gradients one program adds
COLUMNS = 128  # channels whose blocks one program adds


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, times `weight` where given.

    Zhang and Sennrich 2019, arXiv:1910.07467. x: [..., D]; weight: [D] or None. Returns [..., D]
    in the dtype of x; float32 inside. On a GPU D <= 16384, ValueError otherwise.
    """
    if x.device.type == "cpu":
        return rms_norm_reference(x, weight, eps)
    return rms_norm_triton(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual): the residual stream is updated and read in one pass.

    x, residual: [..., D]; weight: [D] or None. The sum is rounded to the dtype of x before it is
    normed, so that the norm reads what the residual stream keeps.
    """
    if x.device.type == "cpu":
        return add_rms_norm_reference(x, residual, weight, eps)
    return add_rms_norm_triton(x, residual, weight, eps)


def rms_norm_triton(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """`rms_norm` on the Triton kernels whatever the device."""
    check_norm(x, weight)
    return rms_norm_op(x[None], None if weight is None else weight[None], eps).squeeze(0)


def add_rms_norm_triton(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` on the Triton kernels whatever the device."""
    check_norm(x, weight)
    normed, total = add_rms_norm_op(x[None], residual[None], None if weight is None else weight[None], eps)
    return normed.squeeze(0), total.squeeze(0)


def rms_norm_reference(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """`rms_norm` in plain differentiable torch."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        normed = normed * weight
    return normed.to(x.dtype)


def add_rms_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` in plain differentiable torch."""
    total = x + residual
    return rms_norm_reference(total, weight, eps), total


def check_norm(x: Tensor, weight: Tensor | None) -> None:
    """Raise ValueError for a width or weight that the kernels do not take: x [..., D], weight [D] or None."""
    if x.shape[-1] > MAX_WIDTH:
        raise ValueError(f"rms_norm got width {x.shape[-1]}, expected at most {MAX_WIDTH}: use a narrower network")
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm got a weight {tuple(weight.shape)}, expected ({x.shape[-1]},): one value a channel")


@fold_vmap
@custom_operator("fractal::rms_norm")
def rms_norm_op(x: Tensor, weight_RD: Tensor | None, eps: float) -> Tensor:
    """`rms_norm` of R replicas, x [R, ..., D]."""
    normed = torch.empty_like(x, memory_format=torch.contiguous_format)
    _forward(x, None, weight_RD, normed, None, eps)
    return normed


@rms_norm_op.register_fake
def _(x, weight_RD, eps):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@fold_vmap
@custom_operator("fractal::add_rms_norm")
def add_rms_norm_op(x: Tensor, residual: Tensor, weight_RD: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` of R replicas, x and residual [R, ..., D]."""
    normed = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = torch.empty_like(normed)
    _forward(x, residual, weight_RD, normed, total, eps)
    return normed, total


@add_rms_norm_op.register_fake
def _(x, residual, weight_RD, eps):
    total = torch.empty_like(x, memory_format=torch.contiguous_format)
    return torch.empty_like(total), total


@custom_operator("fractal::rms_norm_backward")
def rms_norm_backward_op(
    dnormed: Tensor, dtotal: Tensor | None, x: Tensor, weight_RD: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(dx [R, ..., D], dweight [R, D], or [R, 0] without one); `dtotal`, the gradient of x itself, is added to dx."""
    R, D = x.shape[0], x.shape[-1]
    N = x[0].numel() // D
    J = triton.cdiv(N, BLOCK_ROWS)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    partial_RJD = None if weight_RD is None else x.new_empty(R, J, D, dtype=torch.float32)
    _norm_backward_kernel[(R * J,)](
        dnormed.contiguous(),
        None if dtotal is None else dtotal.contiguous(),
        x.contiguous(),
        *_weight(weight_RD),
        dx,
        partial_RJD,
        eps,
        N=N,
        D=D,
        BLOCK_ROWS=BLOCK_ROWS,
        **_tiles(D),
    )
    if weight_RD is None:
        return dx, x.new_empty(R, 0)
    dweight_RD = weight_RD.new_empty(R, D)
    grid = (R * triton.cdiv(D, COLUMNS),)
    _add_blocks_kernel[grid](partial_RJD, dweight_RD, J=J, D=D, COLUMNS=COLUMNS, num_warps=4)
    return dx, dweight_RD


@rms_norm_backward_op.register_fake
def _(dnormed, dtotal, x, weight_RD, eps):
    dweight_RD = x.new_empty(x.shape[0], 0) if weight_RD is None else torch.empty_like(weight_RD)
    return torch.empty_like(x, memory_format=torch.contiguous_format), dweight_RD


def _rms_norm_save(ctx, inputs, output):
    x, weight_RD, ctx.eps = inputs
    ctx.save_for_backward(x, weight_RD)


def _rms_norm_backward(ctx, dnormed):
    x, weight_RD = ctx.saved_tensors
    dx, dweight_RD = rms_norm_backward_op(dnormed, None, x, weight_RD, ctx.eps)
    return dx, None if weight_RD is None else dweight_RD, None


def _add_rms_norm_save(ctx, inputs, output):
    _, _, weight_RD, ctx.eps = inputs
    ctx.save_for_backward(output[1], weight_RD)
    ctx.set_materialize_grads(False)  # the last norm's total goes nowhere: no zeros to read for it


def sum_and_norm_backward(
    dnormed: Tensor | None, dtotal: Tensor | None, total: Tensor, weight_RD: Tensor | None, eps: float
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of a sum [R, ..., D] and of its norm's weight [R, D].

    From those of the norm and of the sum, both [R, ..., D]; None: that result was not used.
    """
    if dnormed is None:
        return dtotal, None
    dsum, dweight_RD = rms_norm_backward_op(dnormed, dtotal, total, weight_RD, eps)
    return dsum, None if weight_RD is None else dweight_RD


def _add_rms_norm_backward(ctx, dnormed, dtotal):
    dx, dweight_RD = sum_and_norm_backward(dnormed, dtotal, *ctx.saved_tensors, ctx.eps)
    return dx, dx, dweight_RD, None


rms_norm_op.register_autograd(_rms_norm_backward, setup_context=_rms_norm_save)
add_rms_norm_op.register_autograd(_add_rms_norm_backward, setup_context=_add_rms_norm_save)


def _forward(x, residual, weight_RD, normed, total, eps):
    R, D = x.shape[0], x.shape[-1]
    N = x[0].numel() // D
    tiles = _tiles(D)
    _norm_forward_kernel[(R * triton.cdiv(N, tiles["ROWS"]),)](
        x.contiguous(),
        None if residual is None else residual.contiguous(),
        *_weight(weight_RD),
        normed,
        total,
        eps,
        N=N,
        D=D,
        **tiles,
    )


def _weight(weight_RD):
    if weight_RD is None:
        return None, 0
    weight_RD = dense_replicas(weight_RD)
    return weight_RD, weight_RD.stride(0)


def _tiles(D):
    width = triton.next_power_of_2(D)
    return {"ROWS": max(1, min(BLOCK_ROWS, TILE // width)), "WIDTH": width, "num_warps": 4 if width <= TILE else 8}


@triton.jit
def _norm_forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    weight_stride,
    normed_ptr,
    total_ptr,
    eps,
    N: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    blocks: tl.constexpr = (N + ROWS - 1) // ROWS
    replica = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < N)[:, None] & (column < D)[None, :]
    at = (replica * N + row)[:, None] * D + column[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        total = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + at, total, mask=inside)
        x = total.to(tl.float32)
    normed = x * (1.0 / tl.sqrt(tl.sum(x * x, 1) / D + eps))[:, None]
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + replica * weight_stride + column, mask=column < D, other=0.0)
        normed *= weight.to(tl.float32)[None, :]
    tl.store(normed_ptr + at, normed, mask=inside)


@triton.jit
def _norm_backward_kernel(
    dnormed_ptr,
    dtotal_ptr,
    x_ptr,
    weight_ptr,
    weight_stride,
    dx_ptr,
    partial_ptr,
    eps,
    N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    blocks: tl.constexpr = (N + BLOCK_ROWS - 1) // BLOCK_ROWS
    block = tl.program_id(0) % blocks
    replica = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.arange(0, WIDTH)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + replica * weight_stride + column, mask=column < D, other=0.0).to(tl.float32)
        dweight = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(0, BLOCK_ROWS, ROWS):
        row = block * BLOCK_ROWS + start + tl.arange(0, ROWS)
        inside = (row < N)[:, None] & (column < D)[None, :]
        at = (replica * N + row)[:, None] * D + column[None, :]
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dnormed_ptr + at, mask=inside, other=0.0).to(tl.float32)
        inverse_rms = (1.0 / tl.sqrt(tl.sum(x * x, 1) / D + eps))[:, None]
        y = x * inverse_rms
        if weight_ptr is not None:
            dweight += tl.where(inside, dy * y, 0.0)
            dy *= weight[None, :]
        dx = inverse_rms * (dy - y * (tl.sum(dy * y, 1) / D)[:, None])
        if dtotal_ptr is not None:
            dx += tl.load(dtotal_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx, mask=inside)
    if weight_ptr is not None:
        partial_at = tl.program_id(0).to(tl.int64) * D + column
        tl.store(partial_ptr + partial_at, tl.sum(dweight, 0), mask=column < D)


@triton.jit
def _add_blocks_kernel(partial_ptr, dweight_ptr, J: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr):
    blocks: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    replica = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    dweight = tl.zeros([COLUMNS], tl.float32)
    for block in range(J):
        dweight += tl.load(partial_ptr + (replica * J + block) * D + column, mask=column < D, other=0.0)
    tl.store(dweight_ptr + replica * D + column, dweight, mask=column < D)
