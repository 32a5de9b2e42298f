"""RMS norm with or without a weight, and layer norm, alone or fused with the residual addition before them.

R replica, N rows of one replica (all leading dimensions), D width, J row blocks of one replica.

One program holds whole rows, so nothing but the normed tensor's input is kept for the backward.
The gradients of weight and bias are sums over all rows of a replica, in two passes of fixed order: each
program adds its own row block, a second kernel adds the blocks. A norm with a bias is a layer norm.
"""

import torch
import torch.nn.functional as functional
import triton
import triton.language as tl
from torch import Tensor

from kernels.ordered_sum import add_blocks
from kernels.stacking import custom_operator, dense_replicas, fold_vmap

MAX_WIDTH = 16384
TILE = 4096  # elements a program holds at once
BLOCK_ROWS = 32  # rows whose weight gradients one program adds


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


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """(x - mean) / sqrt(variance + eps) over the last dimension, times `weight` plus `bias`.

    Ba et al. 2016, arXiv:1607.06450. x: [..., D]; weight, bias: [D]. The rest as `rms_norm`.
    """
    if x.device.type == "cpu":
        return layer_norm_reference(x, weight, bias, eps)
    return layer_norm_triton(x, weight, bias, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """(layer_norm(x + residual), x + residual), as `add_rms_norm`."""
    if x.device.type == "cpu":
        return add_layer_norm_reference(x, residual, weight, bias, eps)
    return add_layer_norm_triton(x, residual, weight, bias, eps)


def rms_norm_triton(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """`rms_norm` on the Triton kernels whatever the device."""
    check_norm(x, weight)
    return norm_op(x[None], one(weight), None, eps).squeeze(0)


def add_rms_norm_triton(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` on the Triton kernels whatever the device."""
    check_norm(x, weight)
    normed, total = add_norm_op(x[None], residual[None], one(weight), None, eps)
    return normed.squeeze(0), total.squeeze(0)


def layer_norm_triton(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """`layer_norm` on the Triton kernels whatever the device."""
    check_norm(x, weight, bias)
    return norm_op(x[None], one(weight), one(bias), eps).squeeze(0)


def add_layer_norm_triton(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """`add_layer_norm` on the Triton kernels whatever the device."""
    check_norm(x, weight, bias)
    normed, total = add_norm_op(x[None], residual[None], one(weight), one(bias), eps)
    return normed.squeeze(0), total.squeeze(0)


def one(weight: Tensor | None) -> Tensor | None:
    """A weight [D] as that of a stack of one replica, [1, D]."""
    return None if weight is None else weight[None]


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


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """`layer_norm` in plain differentiable torch."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return functional.layer_norm(wide, wide.shape[-1:], weight.to(wide.dtype), bias.to(wide.dtype), eps).to(x.dtype)


def add_layer_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """`add_layer_norm` in plain differentiable torch."""
    total = x + residual
    return layer_norm_reference(total, weight, bias, eps), total


def check_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None = None) -> None:
    """Raise ValueError for a width, weight or bias that the kernels do not take: x [..., D], the others [D] or None."""
    if x.shape[-1] > MAX_WIDTH:
        raise ValueError(f"a norm got width {x.shape[-1]}, expected at most {MAX_WIDTH}: use a narrower network")
    for name, given in (("weight", weight), ("bias", bias)):
        if given is not None and given.shape != x.shape[-1:]:
            raise ValueError(
                f"a norm got a {name} {tuple(given.shape)}, expected ({x.shape[-1]},): one value a channel"
            )


@fold_vmap
@custom_operator("fractal::norm")
def norm_op(x: Tensor, weight_RD: Tensor | None, bias_RD: Tensor | None, eps: float) -> Tensor:
    """`rms_norm`, or with a bias `layer_norm`, of R replicas, x [R, ..., D]."""
    normed = torch.empty_like(x, memory_format=torch.contiguous_format)
    _forward(x, None, weight_RD, bias_RD, normed, None, eps)
    return normed


@norm_op.register_fake
def _(x, weight_RD, bias_RD, eps):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@fold_vmap
@custom_operator("fractal::add_norm")
def add_norm_op(
    x: Tensor, residual: Tensor, weight_RD: Tensor | None, bias_RD: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """`add_rms_norm`, or with a bias `add_layer_norm`, of R replicas, x and residual [R, ..., D]."""
    normed = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = torch.empty_like(normed)
    _forward(x, residual, weight_RD, bias_RD, normed, total, eps)
    return normed, total


@add_norm_op.register_fake
def _(x, residual, weight_RD, bias_RD, eps):
    total = torch.empty_like(x, memory_format=torch.contiguous_format)
    return torch.empty_like(total), total


@custom_operator("fractal::norm_backward")
def norm_backward_op(
    dnormed: Tensor, dtotal: Tensor | None, x: Tensor, weight_RD: Tensor | None, centred: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """(dx [R, ..., D], the gradients of weight and, where `centred` (a layer norm), bias [R, 0, 1 or 2, D]).

    `dtotal`, the gradient of x itself, is added to dx.
    """
    R, D = x.shape[0], x.shape[-1]
    N = x[0].numel() // D
    J = triton.cdiv(N, BLOCK_ROWS)
    sums = _sums(weight_RD, centred)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    partial_RJD = x.new_empty(R, J, sums * D, dtype=torch.float32) if sums else None
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
        CENTRED=centred,
        BLOCK_ROWS=BLOCK_ROWS,
        **_tiles(D),
    )
    if weight_RD is None or partial_RJD is None:
        return dx, x.new_empty(R, 0, D)
    return dx, add_blocks(partial_RJD, weight_RD.dtype).unflatten(1, (sums, D))


@norm_backward_op.register_fake
def _(dnormed, dtotal, x, weight_RD, centred, eps):
    dsums = x.new_empty(x.shape[0], _sums(weight_RD, centred), x.shape[-1])
    return torch.empty_like(x, memory_format=torch.contiguous_format), dsums


def _sums(weight_RD, centred):
    """How many of weight and bias there are."""
    return 0 if weight_RD is None else 2 if centred else 1


def _norm_save(ctx, inputs, output):
    x, weight_RD, bias_RD, ctx.eps = inputs
    ctx.centred = bias_RD is not None
    ctx.save_for_backward(x, weight_RD)


def _norm_backward(ctx, dnormed):
    return *sum_and_norm_backward(dnormed, None, *ctx.saved_tensors, ctx.centred, ctx.eps), None


def _add_norm_save(ctx, inputs, output):
    _, _, weight_RD, bias_RD, ctx.eps = inputs
    ctx.centred = bias_RD is not None
    ctx.save_for_backward(output[1], weight_RD)
    ctx.set_materialize_grads(False)  # the last norm's total goes nowhere: no zeros to read for it


def sum_and_norm_backward(
    dnormed: Tensor | None,
    dtotal: Tensor | None,
    total: Tensor,
    weight_RD: Tensor | None,
    centred: bool,
    eps: float,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of a sum [R, ..., D] and of its norm's weight and bias, each [R, D] or None.

    From those of the norm and of the sum, both [R, ..., D]; None: that result was not used. centred: a layer norm.
    """
    if dnormed is None:
        return dtotal, None, None
    dsum, dsums = norm_backward_op(dnormed, dtotal, total, weight_RD, centred, eps)
    dweight_RD, dbias_RD = [*dsums.unbind(1), None, None][:2]
    return dsum, dweight_RD, dbias_RD


def _add_norm_backward(ctx, dnormed, dtotal):
    dx, *dsums = sum_and_norm_backward(dnormed, dtotal, *ctx.saved_tensors, ctx.centred, ctx.eps)
    return dx, dx, *dsums, None


norm_op.register_autograd(_norm_backward, setup_context=_norm_save)
add_norm_op.register_autograd(_add_norm_backward, setup_context=_add_norm_save)


def _forward(x, residual, weight_RD, bias_RD, normed, total, eps):
    R, D = x.shape[0], x.shape[-1]
    N = x[0].numel() // D
    tiles = _tiles(D)
    _norm_forward_kernel[(R * triton.cdiv(N, tiles["ROWS"]),)](
        x.contiguous(),
        None if residual is None else residual.contiguous(),
        *_weight(weight_RD),
        *_weight(bias_RD),
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
    bias_ptr,
    bias_stride,
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
    if bias_ptr is not None:
        x = tl.where(inside, x - (tl.sum(x, 1) / D)[:, None], 0.0)
    normed = x * (1.0 / tl.sqrt(tl.sum(x * x, 1) / D + eps))[:, None]
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + replica * weight_stride + column, mask=column < D, other=0.0)
        normed *= weight.to(tl.float32)[None, :]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + replica * bias_stride + column, mask=column < D, other=0.0)
        normed += bias.to(tl.float32)[None, :]
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
    CENTRED: tl.constexpr,
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
    if CENTRED:
        dbias = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(0, BLOCK_ROWS, ROWS):
        row = block * BLOCK_ROWS + start + tl.arange(0, ROWS)
        inside = (row < N)[:, None] & (column < D)[None, :]
        at = (replica * N + row)[:, None] * D + column[None, :]
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dnormed_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if CENTRED:
            x = tl.where(inside, x - (tl.sum(x, 1) / D)[:, None], 0.0)
        inverse_rms = (1.0 / tl.sqrt(tl.sum(x * x, 1) / D + eps))[:, None]
        y = x * inverse_rms
        if weight_ptr is not None:
            dweight += tl.where(inside, dy * y, 0.0)
            if CENTRED:
                dbias += dy
            dy *= weight[None, :]
        if CENTRED:
            dy -= (tl.sum(dy, 1) / D)[:, None]
        dx = inverse_rms * (dy - y * (tl.sum(dy * y, 1) / D)[:, None])
        if dtotal_ptr is not None:
            dx += tl.load(dtotal_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx, mask=inside)
    if weight_ptr is not None:
        sums: tl.constexpr = 2 if CENTRED else 1
        partial_ptr += tl.program_id(0).to(tl.int64) * sums * D
        tl.store(partial_ptr + column, tl.sum(dweight, 0), mask=column < D)
        if CENTRED:
            tl.store(partial_ptr + D + column, tl.sum(dbias, 0), mask=column < D)
