"""Gradient descent of the paper's network on a GPU: a cell's whole training run inside one kernel.

The letters are those of `kernels.descent`; in the kernel, L lane (thread), U hidden units of one lane, V inputs of
one vector load, G lanes of one cell.

A step of 272 points is 148k multiply-adds (70k X W0, 70k X^T dZ, 8.7k for W1) and 4,352 tanh: arithmetic
is the only bound, since nothing but the shared X and Y is read. So the mapping spends no instruction on
anything else. A cell lives in G = 16/U neighbouring lanes, each holding its U columns of W0, their
gradient and their part of W1 in registers; every lane walks through all data points. X W0 and X^T dZ
are then plain FMA chains inside a lane, the 16 inputs of a point arrive in four 16-byte broadcast loads,
and the only exchange between lanes is the sum of y^ over G lanes. A warp of fp32 trains 8 cells with
215 instructions a point (sm_90), 136 of them those multiply-adds; a warp of fp64 4 cells, half of each.

No operation mixes two cells, and the order of every sum is fixed by U and N: a cell's bits do not
depend on the grid, the launch, its place in it or its neighbours, NaN or not.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.digest import mix_bits
from kernels.nonlinearity import SLOPE, activation, slope
from kernels.split_master import NAN_BITS
from kernels.two_layer import CAP, PARAMETERS, TAIL, WIDTH, Descent

UNITS = {"fp32": 4, "fp64": 2}  # hidden units a lane holds: the most whose weights and gradients fit its registers
UNROLL = {"fp32": 2, "fp64": 1}  # data points of one loop body
REGISTERS = {"fp32": None, "fp64": None}  # cap on a lane's registers (None: the compiler's choice)

RATIO_CAP = tl.constexpr(CAP)
TAIL_STEPS = tl.constexpr(TAIL)


def descend_triton(
    x_QNK: Tensor,
    y_QN: Tensor,
    w0_QKH: Tensor,
    w1_QH: Tensor,
    lr0_R: Tensor,
    lr1_R: Tensor,
    offset_R: Tensor,
    problem_R: Tensor,
    steps: int,
    nonlinearity: str,
    minibatch_QSB: Tensor | None,
    offset_every_step: bool,
    keep_losses: bool,
    keep_weights: bool,
    precision: str,
    warps: int = 1,
    unroll: int | None = None,
    registers: int | None = None,
) -> Descent:
    """`descend` by the fused kernels; warps, unroll and registers change the speed and no bit."""
    cells, device = len(lr0_R), x_QNK.device
    points = x_QNK.shape[1]
    out = Descent(
        measure_R=torch.empty(cells, dtype=torch.float64, device=device),
        first_loss_R=torch.empty(cells, dtype=torch.float64, device=device),
        last_loss_R=torch.empty(cells, dtype=torch.float64, device=device),
        nonfinite_step_R=torch.empty(cells, dtype=torch.int32, device=device),
        weights_digest_R=torch.empty(cells, dtype=torch.int64, device=device),
        losses_RS=torch.empty(cells, steps, device=device) if keep_losses else None,
        weights_RP=torch.empty(cells, PARAMETERS, dtype=lr0_R.dtype, device=device) if keep_weights else None,
    )
    tensors = (x_QNK, y_QN, w0_QKH, w1_QH, minibatch_QSB, lr0_R, lr1_R, offset_R, problem_R, *out)
    options = {
        "POINTS": points,
        "MINIBATCH": 0 if minibatch_QSB is None else minibatch_QSB.shape[2],
        "DRAWN_STEPS": 0 if minibatch_QSB is None else minibatch_QSB.shape[1],
        "NONLINEARITY": nonlinearity,
        "EVERY_STEP": offset_every_step,
        "num_warps": warps,
        "enable_fp_fusion": False,  # every fused multiply-add is written out: no compiled variant rounds otherwise
    }
    if precision == "tf32x3":
        _descend_tensor_cores_kernel[(cells,)](*tensors, steps, **options)
        return out
    units = UNITS[precision]
    lanes = 32 * warps
    vector = 16 // lr0_R.element_size()
    unroll = unroll or UNROLL[precision]
    unroll = unroll if points % unroll == 0 else 1
    registers = registers or REGISTERS[precision]
    if registers:
        options["maxnreg"] = registers
    cells_a_program = lanes * units // WIDTH
    _descend_lanes_kernel[(triton.cdiv(cells, cells_a_program),)](
        *tensors, cells, steps, **options, L=lanes, U=units, V=vector, UNROLL=unroll
    )
    return out


@triton.jit
def _descend_lanes_kernel(
    x_ptr, y_ptr, w0_ptr, w1_ptr, minibatch_ptr, lr0_ptr, lr1_ptr, offset_ptr,
    problem_ptr, measure_ptr, first_ptr, last_ptr, nonfinite_ptr, digest_ptr, losses_ptr,
    weights_ptr, cells, steps, POINTS: tl.constexpr, MINIBATCH: tl.constexpr, DRAWN_STEPS: tl.constexpr,
    NONLINEARITY: tl.constexpr, EVERY_STEP: tl.constexpr, L: tl.constexpr, U: tl.constexpr, V: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """Cells side by side in the lanes of a program: G = 16/U lanes a cell, U hidden units a lane."""
    G: tl.constexpr = 16 // U
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    lane_L = tl.arange(0, L)
    cell_L = tl.program_id(0).to(tl.int64) * (L // G) + lane_L // G
    valid_L = cell_L < cells
    hidden_UL = (lane_L % G)[None, :] * U + tl.arange(0, U)[:, None]
    problem_L = tl.load(problem_ptr + cell_L, valid_L, 0).to(tl.int64)
    lr0_L = tl.load(lr0_ptr + cell_L, valid_L, 0.0)
    lr1_L = tl.load(lr1_ptr + cell_L, valid_L, 0.0)
    offset_L = tl.load(offset_ptr + cell_L, valid_L, 0.0)
    x_L = x_ptr + problem_L * (POINTS * 16)
    y_L = y_ptr + problem_L * POINTS
    drawn_L = minibatch_ptr
    if MINIBATCH:
        drawn_L = minibatch_ptr + problem_L * (DRAWN_STEPS * MINIBATCH)

    w0 = _load_rows(w0_ptr + (problem_L * 256)[None, :] + hidden_UL)  # 16 rows [U, L], one an input
    w1_UL = tl.load(w1_ptr + (problem_L * 16)[None, :] + hidden_UL)
    if not EVERY_STEP:
        w0 = _add_to_rows(w0, offset_L)
    # the derivative of phi is SLOPE (or 1/4) times what `slope` returns: the factor goes into the rate
    rate0_L = lr0_L * (0.25 if NONLINEARITY == "identity" else SLOPE)
    gradient_scale: tl.constexpr = 2.0 / (16 * (MINIBATCH if MINIBATCH else POINTS))

    first_L = tl.full([L], 1.0, tl.float64)
    sum_L = tl.zeros([L], tl.float64)
    inverse_sum_L = tl.zeros([L], tl.float64)
    tail_sum_L = tl.zeros([L], tl.float64)
    last_L = tl.zeros([L], tl.float64)
    nonfinite_L = tl.full([L], -1, tl.int32)
    loss_L = tl.zeros([L], dtype)
    settled = False
    for s in range(steps):
        before = w0
        if EVERY_STEP:
            w0 = _add_to_rows(w0, tl.where(settled, -0.0, offset_L))  # w + -0.0 is w, also for w = -0.0
        g0 = _zero_rows(U, L, dtype)
        g1_UL = tl.zeros([U, L], dtype)
        error_L = tl.zeros([L], dtype)
        for block in range(0, tl.where(settled, 0, POINTS), UNROLL):
            for i in tl.static_range(UNROLL):
                x = _load_point(x_L + (block + i) * 16, L, V)
                y_here_L = tl.load(y_L + block + i)
                a_UL = activation(_product(x, w0), NONLINEARITY)
                r_L = tl.fma(_sum_over_units(a_UL * w1_UL, L, G), 0.0625, -y_here_L)
                error_L = tl.fma(r_L, r_L, error_L)
                if not MINIBATCH:
                    r_L = r_L * gradient_scale
                    g1_UL = tl.fma(a_UL, r_L[None, :], g1_UL)
                    g0 = _add_outer(g0, x, slope(a_UL, r_L[None, :] * w1_UL, NONLINEARITY))
        if MINIBATCH:
            for b in range(tl.where(settled, 0, MINIBATCH)):
                point_L = tl.load(drawn_L + s * MINIBATCH + b)
                x = _load_point(x_L + point_L * 16, L, V)
                y_here_L = tl.load(y_L + point_L)
                a_UL = activation(_product(x, w0), NONLINEARITY)
                r_L = tl.fma(_sum_over_units(a_UL * w1_UL, L, G), 0.0625, -y_here_L) * gradient_scale
                g1_UL = tl.fma(a_UL, r_L[None, :], g1_UL)
                g0 = _add_outer(g0, x, slope(a_UL, r_L[None, :] * w1_UL, NONLINEARITY))
        loss_L = tl.where(settled, loss_L, error_L / POINTS)
        first_L, sum_L, inverse_sum_L, tail_sum_L, last_L, nonfinite_L = _record(
            loss_L.to(tl.float64), s, steps, first_L, sum_L, inverse_sum_L, tail_sum_L, last_L, nonfinite_L
        )
        if losses_ptr is not None:
            tl.store(losses_ptr + cell_L * steps + s, loss_L.to(tl.float32), valid_L & (lane_L % G == 0))

        w0 = _step_rows(w0, g0, rate0_L)
        new_UL = tl.fma(-lr1_L[None, :], g1_UL, w1_UL)
        same_UL = _unchanged(w1_UL, new_UL, MINIBATCH) | ~valid_L[None, :]
        for k in tl.static_range(16):
            same_UL = same_UL & (_unchanged(before[k], w0[k], MINIBATCH) | ~valid_L[None, :])
        w1_UL = new_UL
        settled = tl.min(tl.min(same_UL.to(tl.int32), 0), 0) == 1

    tail = tl.minimum(steps, TAIL_STEPS)
    store_L = valid_L & (lane_L % G == 0)
    measure_L = tl.where(tail_sum_L / tail < 1.0, -sum_L, inverse_sum_L)
    tl.store(measure_ptr + cell_L, measure_L, store_L)
    tl.store(first_ptr + cell_L, first_L, store_L)
    tl.store(last_ptr + cell_L, last_L / tail, store_L)
    tl.store(nonfinite_ptr + cell_L, nonfinite_L, store_L)
    digest_UL = _element_digest(w1_UL, 256 + hidden_UL)
    for k in tl.static_range(16):
        digest_UL += _element_digest(w0[k], k * 16 + hidden_UL)
    tl.store(digest_ptr + cell_L, _sum_over_units(digest_UL, L, G), store_L)
    if weights_ptr is not None:
        kept_UL = weights_ptr + (cell_L * 272)[None, :] + hidden_UL
        for k in tl.static_range(16):
            tl.store(kept_UL + k * 16, w0[k], valid_L[None, :])
        tl.store(kept_UL + 256, w1_UL, valid_L[None, :])


@triton.jit
def _descend_tensor_cores_kernel(
    x_ptr, y_ptr, w0_ptr, w1_ptr, minibatch_ptr, lr0_ptr, lr1_ptr, offset_ptr,
    problem_ptr, measure_ptr, first_ptr, last_ptr, nonfinite_ptr, digest_ptr, losses_ptr,
    weights_ptr, steps, POINTS: tl.constexpr, MINIBATCH: tl.constexpr, DRAWN_STEPS: tl.constexpr,
    NONLINEARITY: tl.constexpr, EVERY_STEP: tl.constexpr,
):  # fmt: skip
    """One cell a program, 16 points a block, the matrix products as three TF32 products each."""
    cell = tl.program_id(0).to(tl.int64)
    problem = tl.load(problem_ptr + cell).to(tl.int64)
    lr0, lr1 = tl.load(lr0_ptr + cell), tl.load(lr1_ptr + cell)
    offset = tl.load(offset_ptr + cell)
    x_ptr += problem * (POINTS * 16)
    y_ptr += problem * POINTS
    hidden_H = tl.arange(0, 16)
    flat_KH = hidden_H[:, None] * 16 + hidden_H[None, :]
    w0_KH = tl.load(w0_ptr + problem * 256 + flat_KH)
    w1_H = tl.load(w1_ptr + problem * 16 + hidden_H)
    if not EVERY_STEP:
        w0_KH += offset
    rate0 = lr0 * (0.25 if NONLINEARITY == "identity" else SLOPE)
    gradient_scale: tl.constexpr = 2.0 / (16 * (MINIBATCH if MINIBATCH else POINTS))

    first = tl.full([], 1.0, tl.float64)
    total = tl.full([], 0.0, tl.float64)
    inverse_total, tail_total, last = total, total, total
    nonfinite = tl.full([], -1, tl.int32)
    loss = 0.0
    settled = False
    for s in range(steps):
        before_KH = w0_KH
        if EVERY_STEP:
            w0_KH += tl.where(settled, -0.0, offset)
        g0_KH = tl.zeros([16, 16], tl.float32)
        g1_H = tl.zeros([16], tl.float32)
        error_N = tl.zeros([16], tl.float32)
        for block in range(0, tl.where(settled, 0, POINTS), 16):
            point_N = block + hidden_H
            within_N = point_N < POINTS
            x_NK = tl.load(x_ptr + point_N[:, None] * 16 + hidden_H[None, :], within_N[:, None], 0.0)
            y_N = tl.load(y_ptr + point_N, within_N, 0.0)
            a_NH = activation(tl.dot(x_NK, w0_KH, input_precision="tf32x3"), NONLINEARITY)
            r_N = tl.where(within_N, tl.sum(a_NH * w1_H[None, :], 1) * 0.0625 - y_N, 0.0)
            error_N += r_N * r_N
            if not MINIBATCH:
                r_N = r_N * gradient_scale
                g1_H += tl.sum(tl.where(within_N[:, None], a_NH * r_N[:, None], 0.0), 0)
                d_NH = slope(a_NH, r_N[:, None] * w1_H[None, :], NONLINEARITY)
                d_NH = tl.where(within_N[:, None], d_NH, 0.0)
                g0_KH += tl.dot(tl.trans(x_NK), d_NH, input_precision="tf32x3")
        if MINIBATCH:
            drawn_ptr = minibatch_ptr + (problem * DRAWN_STEPS + s) * MINIBATCH
            for block in range(0, tl.where(settled, 0, MINIBATCH), 16):
                within_N = block + hidden_H < MINIBATCH
                point_N = tl.load(drawn_ptr + block + hidden_H, within_N, 0)
                x_NK = tl.load(x_ptr + point_N[:, None] * 16 + hidden_H[None, :], within_N[:, None], 0.0)
                y_N = tl.load(y_ptr + point_N, within_N, 0.0)
                a_NH = activation(tl.dot(x_NK, w0_KH, input_precision="tf32x3"), NONLINEARITY)
                r_N = (tl.sum(a_NH * w1_H[None, :], 1) * 0.0625 - y_N) * gradient_scale
                g1_H += tl.sum(tl.where(within_N[:, None], a_NH * r_N[:, None], 0.0), 0)
                d_NH = slope(a_NH, r_N[:, None] * w1_H[None, :], NONLINEARITY)
                d_NH = tl.where(within_N[:, None], d_NH, 0.0)
                g0_KH += tl.dot(tl.trans(x_NK), d_NH, input_precision="tf32x3")
        loss = tl.where(settled, loss, tl.sum(error_N, 0) / POINTS)
        first, total, inverse_total, tail_total, last, nonfinite = _record(
            loss.to(tl.float64), s, steps, first, total, inverse_total, tail_total, last, nonfinite
        )
        if losses_ptr is not None:
            tl.store(losses_ptr + cell * steps + s, loss)

        w0_KH = tl.fma(-rate0, g0_KH, w0_KH)
        new_H = tl.fma(-lr1, g1_H, w1_H)
        same_K = tl.min(_unchanged(before_KH, w0_KH, MINIBATCH).to(tl.int32), 1)
        same_H = _unchanged(w1_H, new_H, MINIBATCH).to(tl.int32)
        settled = tl.min(same_K, 0) + tl.min(same_H, 0) == 2
        w1_H = new_H

    tail = tl.minimum(steps, TAIL_STEPS)
    tl.store(measure_ptr + cell, tl.where(tail_total / tail < 1.0, -total, inverse_total))
    tl.store(first_ptr + cell, first)
    tl.store(last_ptr + cell, last / tail)
    tl.store(nonfinite_ptr + cell, nonfinite)
    digest = tl.sum(tl.sum(_element_digest(w0_KH, flat_KH), 1), 0) + tl.sum(_element_digest(w1_H, 256 + hidden_H), 0)
    tl.store(digest_ptr + cell, digest)
    if weights_ptr is not None:
        tl.store(weights_ptr + cell * 272 + flat_KH, w0_KH)
        tl.store(weights_ptr + cell * 272 + 256 + hidden_H, w1_H)


# A row is the weights (or gradients) of one of the 16 inputs, [U, L]; 16 of them are a tuple, since only
# separate tensors give FMA chains that stay inside a lane.


@triton.jit
def _load_rows(row_ptr_UL):
    return [tl.load(row_ptr_UL + k * 16) for k in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)]


@triton.jit
def _zero_rows(U: tl.constexpr, L: tl.constexpr, dtype: tl.constexpr):
    return [tl.zeros([U, L], dtype) for k in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)]


@triton.jit
def _add_to_rows(rows, value_L):
    return [row_UL + value_L[None, :] for row_UL in rows]


@triton.jit
def _step_rows(w0, g0, rate_L):
    return [tl.fma(-rate_L[None, :], g0[k], w0[k]) for k in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)]


@triton.jit
def _add_outer(g0, x, d_UL):
    return [tl.fma(d_UL, x[k][None, :], g0[k]) for k in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)]


@triton.jit
def _product(x, w0):
    """x W0 for one point: two chains of FMAs in fp64, whose latency a lane's two units do not hide. [U, L]."""
    if w0[0].dtype == tl.float64:
        even_UL, odd_UL = x[0][None, :] * w0[0], x[1][None, :] * w0[1]
        for k in tl.static_range(2, 16, 2):
            even_UL = tl.fma(x[k][None, :], w0[k], even_UL)
            odd_UL = tl.fma(x[k + 1][None, :], w0[k + 1], odd_UL)
        return even_UL + odd_UL
    else:
        z_UL = x[0][None, :] * w0[0]
        for k in tl.static_range(1, 16):
            z_UL = tl.fma(x[k][None, :], w0[k], z_UL)
        return z_UL


@triton.jit
def _load_point(point_ptr_L, L: tl.constexpr, V: tl.constexpr):
    """The 16 inputs of one data point as a tuple of [L], in loads of V numbers (16 bytes)."""
    first, second = _load_four(point_ptr_L, L, V), _load_four(point_ptr_L + 4, L, V)
    third, fourth = _load_four(point_ptr_L + 8, L, V), _load_four(point_ptr_L + 12, L, V)
    return first + second + third + fourth


@triton.jit
def _load_four(point_ptr_L, L: tl.constexpr, V: tl.constexpr):
    x_LV = tl.load(point_ptr_L[:, None] + tl.arange(0, V)[None, :])
    if V == 2:
        x0_L, x1_L = tl.split(x_LV)
        x2_L, x3_L = tl.split(tl.load(point_ptr_L[:, None] + (2 + tl.arange(0, V))[None, :]))
    else:
        even_L2, odd_L2 = tl.split(tl.reshape(x_LV, [L, 2, 2]))
        x0_L, x2_L = tl.split(even_L2)
        x1_L, x3_L = tl.split(odd_L2)
    return (x0_L, x1_L, x2_L, x3_L)


@triton.jit
def _sum_over_units(value_UL, L: tl.constexpr, G: tl.constexpr):
    """Each cell's sum over its 16 hidden units, in all of its G lanes. [U, L] -> [L]."""
    sum_RG = tl.reshape(tl.sum(value_UL, 0), [L // G, G])
    return tl.reshape(tl.broadcast_to(tl.sum(sum_RG, 1)[:, None], [L // G, G]), [L])


@triton.jit
def _record(loss, s, steps, first, total, inverse_total, tail_total, last, nonfinite):
    """Add step s's float64 loss to the sums behind `Descent`."""
    first = tl.where(s == 0, loss, first)
    v = loss / first
    v = tl.where(v <= RATIO_CAP, v, RATIO_CAP)  # NaN fails the test too
    in_tail = s >= steps - TAIL_STEPS
    total += v
    inverse_total += 1.0 / v
    tail_total += tl.where(in_tail, v, 0.0)
    last += tl.where(in_tail, loss, 0.0)
    nonfinite = tl.where((nonfinite < 0) & ~(tl.abs(loss) < float("inf")), s, nonfinite)
    return first, total, inverse_total, tail_total, last, nonfinite


@triton.jit
def _unchanged(old, new, MINIBATCH: tl.constexpr):
    if MINIBATCH:
        return new != new
    else:
        return (new == old) | ((new != new) & (old != old))


@triton.jit
def _element_digest(weight, index):
    """The terms of `digest`, as int64."""
    if weight.dtype == tl.float64:
        bits = tl.where(weight != weight, 0x7FF8 << 48, weight.to(tl.int64, bitcast=True)).to(tl.uint64)
        mixed = mix_bits(mix_bits(bits) + index.to(tl.uint64))
    else:
        bits = tl.where(weight != weight, NAN_BITS, weight.to(tl.int32, bitcast=True)).to(tl.uint32, bitcast=True)
        mixed = mix_bits((index.to(tl.uint64) << 32) + bits.to(tl.uint64))
    return mixed.to(tl.int64, bitcast=True)
