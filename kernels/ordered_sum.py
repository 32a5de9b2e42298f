"""Sums over a replica's rows or elements, in an order that follows from one replica's shape alone.

R replica, N rows, D columns, J row blocks of one replica, S sums, n elements of one sum.

No atomics: a sum over rows goes in two passes, each program adding its own block of rows one after the other, a second
kernel the blocks. Every gradient of a parameter that all rows share is such a sum.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.stacking import custom_operator, dense_replicas, fold_vmap

BLOCK_ROWS, WIDE_COLUMNS = 32, 512  # rows that one program adds, and of how many columns
COLUMNS = 128  # columns whose blocks one program adds


def add_bias(x: Tensor, bias_D: Tensor) -> Tensor:
    """x + bias over the last dimension, x [..., D], bias [D] in the same dtype; its gradient is an ordered sum."""
    if x.device.type == "cpu":
        return add_bias_reference(x, bias_D)
    return add_bias_triton(x, bias_D)


def add_bias_triton(x: Tensor, bias_D: Tensor) -> Tensor:
    """`add_bias` with the Triton kernels' gradient whatever the device. ValueError for a bias of another width."""
    if bias_D.shape != x.shape[-1:]:
        raise ValueError(
            f"add_bias got a bias {tuple(bias_D.shape)}, expected ({x.shape[-1]},): give one value a channel"
        )
    return add_bias_op(x.reshape(1, -1, x.shape[-1]), bias_D[None]).reshape(x.shape)


def add_bias_reference(x: Tensor, bias_D: Tensor) -> Tensor:
    """`add_bias` in plain differentiable torch."""
    return x + bias_D


@fold_vmap
@custom_operator("fractal::add_bias")
def add_bias_op(x_RND: Tensor, bias_RD: Tensor) -> Tensor:
    """`add_bias` of R replicas."""
    return (x_RND + bias_RD[:, None]).contiguous()


@add_bias_op.register_fake
def _(x_RND, bias_RD):
    return torch.empty_like(x_RND, memory_format=torch.contiguous_format)


def _nothing_to_save(ctx, inputs, output):
    pass


def _add_bias_backward(ctx, dy_RND):
    return dy_RND, column_sums_op(dy_RND)


add_bias_op.register_autograd(_add_bias_backward, setup_context=_nothing_to_save)


@custom_operator("fractal::column_sums")
def column_sums_op(x_RND: Tensor) -> Tensor:
    """The sum over the rows of every replica's x [R, N, D], [R, D] in the dtype of x; float32 inside."""
    R, N, D = x_RND.shape
    J = triton.cdiv(N, BLOCK_ROWS)
    x_RND = dense_replicas(x_RND)
    partial_RJD = x_RND.new_empty(R, J, D, dtype=torch.float32)
    _sum_rows_kernel[(R * J * triton.cdiv(D, WIDE_COLUMNS),)](
        x_RND, partial_RJD, x_RND.stride(0), N=N, D=D, BLOCK_ROWS=BLOCK_ROWS, COLUMNS=WIDE_COLUMNS, num_warps=4
    )
    return add_blocks(partial_RJD, x_RND.dtype)


@column_sums_op.register_fake
def _(x_RND):
    return x_RND.new_empty(x_RND.shape[0], x_RND.shape[2])


def add_blocks(partial_RJD: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over a replica's blocks, one after the other: float32 [R, J, D] -> [R, D] in `dtype`."""
    R, J, D = partial_RJD.shape
    sum_RD = partial_RJD.new_empty(R, D, dtype=dtype)
    grid = (R * triton.cdiv(D, COLUMNS),)
    _add_blocks_kernel[grid](partial_RJD, sum_RD, J=J, D=D, COLUMNS=COLUMNS, num_warps=4)
    return sum_RD


def row_sums(values_Sn: Tensor) -> Tensor:
    """The sum of each row of float32 values, contiguous [S, n] -> float32 [S]."""
    sums_S = torch.empty(values_Sn.shape[0], dtype=torch.float32, device=values_Sn.device)
    _sum_kernel[(len(sums_S),)](values_Sn, sums_S, values_Sn.shape[1], BLOCK=1024, num_warps=4)
    return sums_S


@triton.jit
def _sum_rows_kernel(
    x_ptr, partial_ptr, stride, N: tl.constexpr, D: tl.constexpr, BLOCK_ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Program (replica, block of rows, block of columns)."""
    blocks: tl.constexpr = (N + BLOCK_ROWS - 1) // BLOCK_ROWS
    column_blocks: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    rows = tl.program_id(0) // column_blocks
    replica = (rows // blocks).to(tl.int64)
    column = tl.program_id(0) % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    x_ptr += replica * stride
    total = tl.zeros([COLUMNS], tl.float32)
    for offset in tl.static_range(BLOCK_ROWS):  # unrolled, so that the loads do not wait for each other
        row = rows % blocks * BLOCK_ROWS + offset
        inside = (column < D) & (row + 0 * column < N)
        total += tl.load(x_ptr + row.to(tl.int64) * D + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(partial_ptr + rows.to(tl.int64) * D + column, total, mask=column < D)


@triton.jit
def _add_blocks_kernel(partial_ptr, sum_ptr, J: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr):
    blocks: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    replica = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float32)
    for block in range(J):
        total += tl.load(partial_ptr + (replica * J + block) * D + column, mask=column < D, other=0.0)
    tl.store(sum_ptr + replica * D + column, total, mask=column < D)


@triton.jit
def _sum_kernel(values_ptr, sum_ptr, n, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(values_ptr + row * n + at, mask=at < n, other=0.0)
    tl.store(sum_ptr + row, tl.sum(total, axis=0))
