"""Gradient descent of the paper's network: a cell's whole training run inside one kernel.

R cell (one training run), Q problem, N data point, K network input (16), H hidden unit (16), S step,
B point of a minibatch, P flat parameters (272: W0 row by row, then W1).
In the fused kernel: L lane (thread), U hidden units of one lane, V inputs of one vector load.

The network is y^ = phi(X W0 / sqrt(n)) W1 / n with n = 16, phi(z) = tanh(sqrt(2) z), sqrt(2) relu(z)
or z, mean squared error and plain gradient descent with one constant learning rate a layer
(Sohl-Dickstein 2024, "The boundary of neural network trainability is fractal", arXiv:2402.06184).

A step of 272 points is 148k multiply-adds (70k X W0, 70k X^T dZ, 8.7k for W1) and 4,352 tanh: arithmetic
is the only bound, since nothing but the shared X and Y is read. So the mapping spends no instruction on
anything else. A cell lives in G = 16/U neighbouring lanes, each holding its U columns of W0, their
gradient and their part of W1 in registers; every lane walks through all data points. X W0 and X^T dZ
are then plain FMA chains inside a lane, the 16 inputs of a point arrive in four 16-byte broadcast loads,
and the only exchange between lanes is the sum of y^ over G lanes. A warp of fp32 trains 8 cells with
215 instructions a point (sm_90), 136 of them those multiply-adds; a warp of fp64 4 cells, half of each.

No operation mixes two cells, and the order of every sum is fixed by U and N: a cell's bits do not
depend on the grid, the launch, its place in it or its neighbours, NaN or not.

Early exit. When a step leaves every weight of a cell as it was (bit for bit, or NaN as before), the full
batch step, a function of the weights alone, has reached a fixed point: all later losses equal this
one and the weights stay. With minibatches the step also depends on the draw; there a cell is settled when all
its weights are NaN, which no update undoes. A program whose cells are all settled skips the data
points of its remaining steps and repeats the loss; all outputs are those of the full loop. A non-finite loss
alone settles nothing: a squared error may overflow and come back.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels.adamw import NAN_BITS
from kernels.digest import _mix as mix
from kernels.digest import digest_reference

WIDTH = 16  # inputs and hidden units
PARAMETERS = WIDTH * WIDTH + WIDTH
TAIL = 20  # steps at the end over which the convergence measure and last_loss average
CAP = 1e6  # a loss ratio above this, or not finite, counts as this
DTYPES = {"fp32": torch.float32, "tf32x3": torch.float32, "fp64": torch.float64}
UNITS = {"fp32": 4, "fp64": 2}  # hidden units a lane holds: the most whose weights and gradients fit its registers
UNROLL = {"fp32": 2, "fp64": 1}  # data points of one loop body
REGISTERS = {"fp32": None, "fp64": None}  # cap on a lane's registers (None: the compiler's choice)

SLOPE = tl.constexpr(2.0**0.5 / 4)  # sqrt(2) / sqrt(n)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
ROUND = tl.constexpr(1.5 * 2.0**52)  # adding it rounds a double to an integer, kept in its low bits
SIGN = tl.constexpr(-(2**63))
RATIO_CAP = tl.constexpr(CAP)
TAIL_STEPS = tl.constexpr(TAIL)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


class Descent(NamedTuple):
    """What a training run leaves behind, one entry a cell.

    v_s = loss_s / loss_0, where loss_s is the full-batch loss at the weights before update s (so v_0 = 1);
    v_s that is not finite or above 1e6 counts as 1e6. `measure` is -sum(v) if the mean of the last 20 v is
    below 1 (converged) and +sum(1/v) otherwise.
    """

    measure_R: torch.Tensor  # float64, converged cells negative
    first_loss_R: torch.Tensor  # float64, loss before any update
    last_loss_R: torch.Tensor  # float64, mean of the last 20 losses (of all, if fewer)
    nonfinite_step_R: torch.Tensor  # int32, first step whose loss is not finite; -1 if none
    weights_digest_R: torch.Tensor  # int64, order-independent digest of the final weights (see `digest`)
    losses_RS: torch.Tensor | None  # float32, every step's loss, where asked for
    weights_RP: torch.Tensor | None  # final weights, where asked for


def descend(
    x_QNK,
    y_QN,
    w0_QKH,
    w1_QH,
    lr0_R,
    lr1_R,
    offset_R,
    problem_R,
    *,
    steps: int,
    nonlinearity: str = "tanh",
    precision: str = "fp32",
    minibatch_QSB=None,
    offset_every_step: bool = False,
    keep_losses: bool = False,
    keep_weights: bool = False,
) -> Descent:
    """Train every cell for `steps` steps.

    Args:
        x_QNK, y_QN: inputs and targets of each problem, float32 or (fp64) float64.
        w0_QKH, w1_QH: initial weights of each problem.
        lr0_R, lr1_R: learning rate of each layer, one a cell, in the same dtype.
        offset_R: constant added to W0 before the first step, or with `offset_every_step` before each.
        problem_R: int32 index of each cell's problem.
        nonlinearity: tanh, relu or identity.
        precision: fp32 (IEEE), tf32x3 (matrix products on tensor cores, three TF32 products each; plain
            fp32 on a CPU) or fp64.
        minibatch_QSB: int32 data points of each step's gradient; None: all of them. The loss is
            measured on all of them either way.

    A cell's bits depend on nothing but the cell (see the head of this file and of `kernels.descent_cpu`).
    """
    dtype = DTYPES[precision]
    for tensor in (x_QNK, y_QN, w0_QKH, w1_QH, lr0_R, lr1_R, offset_R):
        assert tensor.dtype == dtype, (tensor.dtype, precision)
        assert tensor.is_contiguous()
    assert w0_QKH.shape[1:] == (WIDTH, WIDTH), w0_QKH.shape
    assert x_QNK.shape[2] == w1_QH.shape[1] == WIDTH, (x_QNK.shape, w1_QH.shape)
    assert problem_R.dtype == torch.int32
    assert minibatch_QSB is None or minibatch_QSB.shape[1] >= steps
    problem = (x_QNK, y_QN, w0_QKH, w1_QH, lr0_R, lr1_R, offset_R, problem_R, steps, nonlinearity)
    options = (minibatch_QSB, offset_every_step, keep_losses, keep_weights)
    if x_QNK.device.type == "cpu":
        return descend_cpu(*problem, *options)
    return descend_triton(*problem, *options, precision=precision)


def digest(weights_RP):
    """64-bit digest of each row of float32 or float64 weights, as the kernels compute it. [R, P] -> int64 [R].

    float32: `kernels.digest`. float64: the 64 bits are mixed once, the index is added and the sum mixed
    again. The mixed elements are added modulo 2^64, so no order matters; all NaNs count as one.
    """
    if weights_RP.dtype == torch.float32:
        return digest_reference(weights_RP, None, torch.arange(len(weights_RP), device=weights_RP.device))
    bits_RP = weights_RP.contiguous().view(torch.int64).masked_fill(weights_RP.isnan(), 0x7FF8 << 48)
    return mix(mix(bits_RP) + torch.arange(weights_RP.shape[1], device=weights_RP.device)).sum(1)


# The CPU path


def descend_cpu(
    x_QNK,
    y_QN,
    w0_QKH,
    w1_QH,
    lr0_R,
    lr1_R,
    offset_R,
    problem_R,
    steps,
    nonlinearity,
    minibatch_QSB,
    offset_every_step,
    keep_losses,
    keep_weights,
) -> Descent:
    """`descend` by the compiled loop of `kernels.descent_cpu`."""
    from kernels.descent_cpu import train  # half a second, which sweeps of language models need not wait for

    problem = (x_QNK, y_QN, w0_QKH, w1_QH, lr0_R, lr1_R, offset_R, problem_R)
    losses_RS, weights_RP = train(*problem, minibatch_QSB, steps, nonlinearity, offset_every_step)
    measure_R, last_loss_R, nonfinite_step_R = measure(losses_RS)
    return Descent(
        measure_R,
        losses_RS[:, 0].double(),
        last_loss_R,
        nonfinite_step_R,
        digest(weights_RP),
        losses_RS.float() if keep_losses else None,
        weights_RP if keep_weights else None,
    )


def measure(losses_RS):
    """Convergence measure (see `Descent`), mean of the last 20 losses and first non-finite step of each row.

    [R, S] -> float64 [R], float64 [R], int32 [R].
    """
    losses_RS = losses_RS.double()
    ratio_RS = losses_RS / losses_RS[:, :1]
    v_RS = torch.where(ratio_RS <= CAP, ratio_RS, CAP)  # NaN fails the test too
    converged_R = v_RS[:, -TAIL:].mean(1) < 1
    measure_R = torch.where(converged_R, -v_RS.sum(1), (1 / v_RS).sum(1))
    nonfinite_RS = ~losses_RS.isfinite()
    step_R = torch.where(nonfinite_RS.any(1), nonfinite_RS.int().argmax(1), -1)
    return measure_R, losses_RS[:, -TAIL:].mean(1), step_R.int()


# The Triton kernels


def descend_triton(
    x_QNK,
    y_QN,
    w0_QKH,
    w1_QH,
    lr0_R,
    lr1_R,
    offset_R,
    problem_R,
    steps,
    nonlinearity,
    minibatch_QSB,
    offset_every_step,
    keep_losses,
    keep_weights,
    precision,
    warps=1,
    unroll=None,
    registers=None,
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
        descend_tensor_cores[(cells,)](*tensors, steps, **options)
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
    descend_lanes[(triton.cdiv(cells, cells_a_program),)](
        *tensors, cells, steps, **options, L=lanes, U=units, V=vector, UNROLL=unroll
    )
    return out


@triton.jit
def descend_lanes(
    x_pointer, y_pointer, w0_pointer, w1_pointer, minibatch_pointer, lr0_pointer, lr1_pointer, offset_pointer,
    problem_pointer, measure_pointer, first_pointer, last_pointer, nonfinite_pointer, digest_pointer, losses_pointer,
    weights_pointer, cells, steps, POINTS: tl.constexpr, MINIBATCH: tl.constexpr, DRAWN_STEPS: tl.constexpr,
    NONLINEARITY: tl.constexpr, EVERY_STEP: tl.constexpr, L: tl.constexpr, U: tl.constexpr, V: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """Cells side by side in the lanes of a program: G = 16/U lanes a cell, U hidden units a lane."""
    G: tl.constexpr = 16 // U
    dtype: tl.constexpr = x_pointer.dtype.element_ty
    lane_L = tl.arange(0, L)
    cell_L = tl.program_id(0).to(tl.int64) * (L // G) + lane_L // G
    valid_L = cell_L < cells
    hidden_UL = (lane_L % G)[None, :] * U + tl.arange(0, U)[:, None]
    problem_L = tl.load(problem_pointer + cell_L, valid_L, 0).to(tl.int64)
    lr0_L = tl.load(lr0_pointer + cell_L, valid_L, 0.0)
    lr1_L = tl.load(lr1_pointer + cell_L, valid_L, 0.0)
    offset_L = tl.load(offset_pointer + cell_L, valid_L, 0.0)
    x_L = x_pointer + problem_L * (POINTS * 16)
    y_L = y_pointer + problem_L * POINTS
    drawn_L = minibatch_pointer
    if MINIBATCH:
        drawn_L = minibatch_pointer + problem_L * (DRAWN_STEPS * MINIBATCH)

    w0 = load_rows(w0_pointer + (problem_L * 256)[None, :] + hidden_UL)  # 16 rows [U, L], one an input
    w1_UL = tl.load(w1_pointer + (problem_L * 16)[None, :] + hidden_UL)
    if not EVERY_STEP:
        w0 = add_to_rows(w0, offset_L)
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
            w0 = add_to_rows(w0, tl.where(settled, -0.0, offset_L))  # w + -0.0 is w, also for w = -0.0
        g0 = zero_rows(U, L, dtype)
        g1_UL = tl.zeros([U, L], dtype)
        error_L = tl.zeros([L], dtype)
        for block in range(0, tl.where(settled, 0, POINTS), UNROLL):
            for i in tl.static_range(UNROLL):
                x = load_point(x_L + (block + i) * 16, L, V)
                y_here_L = tl.load(y_L + block + i)
                a_UL = activation(product(x, w0), NONLINEARITY)
                r_L = tl.fma(sum_over_units(a_UL * w1_UL, L, G), 0.0625, -y_here_L)
                error_L = tl.fma(r_L, r_L, error_L)
                if not MINIBATCH:
                    r_L = r_L * gradient_scale
                    g1_UL = tl.fma(a_UL, r_L[None, :], g1_UL)
                    g0 = add_outer(g0, x, slope(a_UL, r_L[None, :] * w1_UL, NONLINEARITY))
        if MINIBATCH:
            for b in range(tl.where(settled, 0, MINIBATCH)):
                point_L = tl.load(drawn_L + s * MINIBATCH + b)
                x = load_point(x_L + point_L * 16, L, V)
                y_here_L = tl.load(y_L + point_L)
                a_UL = activation(product(x, w0), NONLINEARITY)
                r_L = tl.fma(sum_over_units(a_UL * w1_UL, L, G), 0.0625, -y_here_L) * gradient_scale
                g1_UL = tl.fma(a_UL, r_L[None, :], g1_UL)
                g0 = add_outer(g0, x, slope(a_UL, r_L[None, :] * w1_UL, NONLINEARITY))
        loss_L = tl.where(settled, loss_L, error_L / POINTS)
        first_L, sum_L, inverse_sum_L, tail_sum_L, last_L, nonfinite_L = record(
            loss_L.to(tl.float64), s, steps, first_L, sum_L, inverse_sum_L, tail_sum_L, last_L, nonfinite_L
        )
        if losses_pointer is not None:
            tl.store(losses_pointer + cell_L * steps + s, loss_L.to(tl.float32), valid_L & (lane_L % G == 0))

        w0 = step_rows(w0, g0, rate0_L)
        new_UL = tl.fma(-lr1_L[None, :], g1_UL, w1_UL)
        same_UL = unchanged(w1_UL, new_UL, MINIBATCH) | ~valid_L[None, :]
        for k in tl.static_range(16):
            same_UL = same_UL & (unchanged(before[k], w0[k], MINIBATCH) | ~valid_L[None, :])
        w1_UL = new_UL
        settled = tl.min(tl.min(same_UL.to(tl.int32), 0), 0) == 1

    tail = tl.minimum(steps, TAIL_STEPS)
    store_L = valid_L & (lane_L % G == 0)
    measure_L = tl.where(tail_sum_L / tail < 1.0, -sum_L, inverse_sum_L)
    tl.store(measure_pointer + cell_L, measure_L, store_L)
    tl.store(first_pointer + cell_L, first_L, store_L)
    tl.store(last_pointer + cell_L, last_L / tail, store_L)
    tl.store(nonfinite_pointer + cell_L, nonfinite_L, store_L)
    digest_UL = element_digest(w1_UL, 256 + hidden_UL)
    for k in tl.static_range(16):
        digest_UL += element_digest(w0[k], k * 16 + hidden_UL)
    tl.store(digest_pointer + cell_L, sum_over_units(digest_UL, L, G), store_L)
    if weights_pointer is not None:
        kept_UL = weights_pointer + (cell_L * 272)[None, :] + hidden_UL
        for k in tl.static_range(16):
            tl.store(kept_UL + k * 16, w0[k], valid_L[None, :])
        tl.store(kept_UL + 256, w1_UL, valid_L[None, :])


@triton.jit
def descend_tensor_cores(
    x_pointer, y_pointer, w0_pointer, w1_pointer, minibatch_pointer, lr0_pointer, lr1_pointer, offset_pointer,
    problem_pointer, measure_pointer, first_pointer, last_pointer, nonfinite_pointer, digest_pointer, losses_pointer,
    weights_pointer, steps, POINTS: tl.constexpr, MINIBATCH: tl.constexpr, DRAWN_STEPS: tl.constexpr,
    NONLINEARITY: tl.constexpr, EVERY_STEP: tl.constexpr,
):  # fmt: skip
    """One cell a program, 16 points a block, the matrix products as three TF32 products each."""
    cell = tl.program_id(0).to(tl.int64)
    problem = tl.load(problem_pointer + cell).to(tl.int64)
    lr0, lr1 = tl.load(lr0_pointer + cell), tl.load(lr1_pointer + cell)
    offset = tl.load(offset_pointer + cell)
    x_pointer += problem * (POINTS * 16)
    y_pointer += problem * POINTS
    hidden_H = tl.arange(0, 16)
    flat_KH = hidden_H[:, None] * 16 + hidden_H[None, :]
    w0_KH = tl.load(w0_pointer + problem * 256 + flat_KH)
    w1_H = tl.load(w1_pointer + problem * 16 + hidden_H)
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
            x_NK = tl.load(x_pointer + point_N[:, None] * 16 + hidden_H[None, :], within_N[:, None], 0.0)
            y_N = tl.load(y_pointer + point_N, within_N, 0.0)
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
            drawn_pointer = minibatch_pointer + (problem * DRAWN_STEPS + s) * MINIBATCH
            for block in range(0, tl.where(settled, 0, MINIBATCH), 16):
                within_N = block + hidden_H < MINIBATCH
                point_N = tl.load(drawn_pointer + block + hidden_H, within_N, 0)
                x_NK = tl.load(x_pointer + point_N[:, None] * 16 + hidden_H[None, :], within_N[:, None], 0.0)
                y_N = tl.load(y_pointer + point_N, within_N, 0.0)
                a_NH = activation(tl.dot(x_NK, w0_KH, input_precision="tf32x3"), NONLINEARITY)
                r_N = (tl.sum(a_NH * w1_H[None, :], 1) * 0.0625 - y_N) * gradient_scale
                g1_H += tl.sum(tl.where(within_N[:, None], a_NH * r_N[:, None], 0.0), 0)
                d_NH = slope(a_NH, r_N[:, None] * w1_H[None, :], NONLINEARITY)
                d_NH = tl.where(within_N[:, None], d_NH, 0.0)
                g0_KH += tl.dot(tl.trans(x_NK), d_NH, input_precision="tf32x3")
        loss = tl.where(settled, loss, tl.sum(error_N, 0) / POINTS)
        first, total, inverse_total, tail_total, last, nonfinite = record(
            loss.to(tl.float64), s, steps, first, total, inverse_total, tail_total, last, nonfinite
        )
        if losses_pointer is not None:
            tl.store(losses_pointer + cell * steps + s, loss)

        w0_KH = tl.fma(-rate0, g0_KH, w0_KH)
        new_H = tl.fma(-lr1, g1_H, w1_H)
        same_K = tl.min(unchanged(before_KH, w0_KH, MINIBATCH).to(tl.int32), 1)
        same_H = unchanged(w1_H, new_H, MINIBATCH).to(tl.int32)
        settled = tl.min(same_K, 0) + tl.min(same_H, 0) == 2
        w1_H = new_H

    tail = tl.minimum(steps, TAIL_STEPS)
    tl.store(measure_pointer + cell, tl.where(tail_total / tail < 1.0, -total, inverse_total))
    tl.store(first_pointer + cell, first)
    tl.store(last_pointer + cell, last / tail)
    tl.store(nonfinite_pointer + cell, nonfinite)
    digest = tl.sum(tl.sum(element_digest(w0_KH, flat_KH), 1), 0) + tl.sum(element_digest(w1_H, 256 + hidden_H), 0)
    tl.store(digest_pointer + cell, digest)
    if weights_pointer is not None:
        tl.store(weights_pointer + cell * 272 + flat_KH, w0_KH)
        tl.store(weights_pointer + cell * 272 + 256 + hidden_H, w1_H)


# A row is the weights (or gradients) of one of the 16 inputs, [U, L]; 16 of them are a tuple, since only
# separate tensors give FMA chains that stay inside a lane.


@triton.jit
def load_rows(pointer_UL):
    return [tl.load(pointer_UL + k * 16) for k in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)]


@triton.jit
def zero_rows(U: tl.constexpr, L: tl.constexpr, dtype: tl.constexpr):
    return [tl.zeros([U, L], dtype) for k in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)]


@triton.jit
def add_to_rows(rows, value_L):
    return [row_UL + value_L[None, :] for row_UL in rows]


@triton.jit
def step_rows(w0, g0, rate_L):
    return [tl.fma(-rate_L[None, :], g0[k], w0[k]) for k in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)]


@triton.jit
def add_outer(g0, x, d_UL):
    return [tl.fma(d_UL, x[k][None, :], g0[k]) for k in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)]


@triton.jit
def product(x, w0):
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
def load_point(pointer_L, L: tl.constexpr, V: tl.constexpr):
    """The 16 inputs of one data point as a tuple of [L], in loads of V numbers (16 bytes)."""
    first, second = load_four(pointer_L, L, V), load_four(pointer_L + 4, L, V)
    third, fourth = load_four(pointer_L + 8, L, V), load_four(pointer_L + 12, L, V)
    return first + second + third + fourth


@triton.jit
def load_four(pointer_L, L: tl.constexpr, V: tl.constexpr):
    x_LV = tl.load(pointer_L[:, None] + tl.arange(0, V)[None, :])
    if V == 2:
        x0_L, x1_L = tl.split(x_LV)
        x2_L, x3_L = tl.split(tl.load(pointer_L[:, None] + (2 + tl.arange(0, V))[None, :]))
    else:
        even_L2, odd_L2 = tl.split(tl.reshape(x_LV, [L, 2, 2]))
        x0_L, x2_L = tl.split(even_L2)
        x1_L, x3_L = tl.split(odd_L2)
    return (x0_L, x1_L, x2_L, x3_L)


@triton.jit
def sum_over_units(value_UL, L: tl.constexpr, G: tl.constexpr):
    """Each cell's sum over its 16 hidden units, in all of its G lanes. [U, L] -> [L]."""
    sum_RG = tl.reshape(tl.sum(value_UL, 0), [L // G, G])
    return tl.reshape(tl.broadcast_to(tl.sum(sum_RG, 1)[:, None], [L // G, G]), [L])


@triton.jit
def activation(z, NONLINEARITY: tl.constexpr):
    """phi of z / sqrt(n), where z is the product of inputs and weights."""
    if NONLINEARITY == "tanh":
        if z.dtype == tl.float64:
            return tanh_64(z)
        else:
            return tanh_32(z)
    elif NONLINEARITY == "relu":
        return tl.where(z <= 0, 0.0, z) * SLOPE  # NaN stays NaN
    else:
        return z * 0.25


@triton.jit
def slope(a, upstream, NONLINEARITY: tl.constexpr):
    """upstream times the derivative of phi, up to the constant factor that the rate carries."""
    if NONLINEARITY == "tanh":
        return upstream * tl.fma(-a, a, 1.0)
    elif NONLINEARITY == "relu":
        return tl.where(a > 0, upstream, 0.0)
    else:
        return upstream


@triton.jit
def tanh_32(z):
    """tanh(u), u = SLOPE z, as 1 - 2 / (e^2u + 1) on the special function unit.

    That cancels near 0: below |u| = 0.4 an odd polynomial of degree 7 (Chebyshev) takes its place.
    """
    e = exp2_32(z * (2 * LOG2_E * SLOPE))
    large = tl.fma(reciprocal_32(e + 1.0), -2.0, 1.0)
    x = z * z
    p = tl.fma(x, -3.28344389623282e-05, 0.0007331191588491957)
    p = tl.fma(x, p, -0.014730517535542543)
    p = tl.fma(x, p, 0.3535533557143849)
    return tl.where(tl.abs(z) < 0.4 / SLOPE, z * p, large)


@triton.jit
def tanh_64(z):
    """tanh(SLOPE z) = m / (m + 2), m = e^t - 1, t = 2 SLOPE |z|.

    t = k ln 2 + f; expm1(f) is a polynomial of degree 11 (Chebyshev, relative error 4e-17), and
    m = 2^k expm1(f) + (2^k - 1) keeps the relative precision near 0.
    """
    t = tl.abs(z) * (2 * SLOPE)
    t = tl.where(t > 40.0, 40.0, t)  # tanh is 1 from 19.1 on; NaN stays NaN
    k = multiply_add(t, LOG2_E, ROUND)
    f = tl.fma(k - ROUND, double(-LN_2), t)
    # pairs, then pairs of pairs (Estrin): a short chain of dependent operations
    f2 = f * f
    f4 = f2 * f2
    p01 = multiply_add(f, 0.16666666666666669, 0.5)
    p23 = multiply_add(f, 0.008333333333330062, 0.04166666666662413)
    p45 = multiply_add(f, 0.00019841269863053618, 0.0013888888917213717)
    p67 = multiply_add(f, 2.7557268459997064e-06, 2.4801521295954376e-05)
    p89 = multiply_add(f, 2.510038549551032e-08, 2.7620088445409746e-07)
    p03 = tl.fma(f2, p23, p01)
    p49 = tl.fma(f4, p89, tl.fma(f2, p67, p45))
    p = tl.fma(f2, tl.fma(f4, p49, p03), f)
    power = ((k.to(tl.int64, bitcast=True) + 1023) << 52).to(tl.float64, bitcast=True)
    m = tl.fma(power, p, power - 1.0)
    a = m * reciprocal_64(m + 2.0)
    return (a.to(tl.int64, bitcast=True) | (z.to(tl.int64, bitcast=True) & SIGN)).to(tl.float64, bitcast=True)


@triton.jit
def double(value: tl.constexpr):
    """A float64 constant: a plain number given to tl.fma would be rounded to float32."""
    return tl.full([], value, tl.float64)


@triton.jit
def multiply_add(x, factor: tl.constexpr, term: tl.constexpr):
    """x * factor + term with float64 constants, rounded once."""
    return tl.fma(x, double(factor), double(term))


# The interpreter knows no PTX: there the same functions come from numpy.


@triton.jit
def exp2_32(x):
    if INTERPRETED:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def reciprocal_32(x):
    if INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def reciprocal_64(x):
    """1 / x for normal x: 20 bits from the special function unit, then one cubic Newton step."""
    if INTERPRETED:
        return 1.0 / x
    else:
        r = tl.inline_asm_elementwise("rcp.approx.ftz.f64 $0, $1;", "=d,d", [x], tl.float64, is_pure=True, pack=1)
        e = tl.fma(-x, r, 1.0)
        return tl.fma(r, tl.fma(e, e, e), r)


@triton.jit
def record(loss, s, steps, first, total, inverse_total, tail_total, last, nonfinite):
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
def unchanged(old, new, MINIBATCH: tl.constexpr):
    if MINIBATCH:
        return new != new
    else:
        return (new == old) | ((new != new) & (old != old))


@triton.jit
def element_digest(weight, index):
    """The terms of `digest`, as int64."""
    if weight.dtype == tl.float64:
        bits = tl.where(weight != weight, 0x7FF8 << 48, weight.to(tl.int64, bitcast=True)).to(tl.uint64)
        mixed = mix_bits(mix_bits(bits) + index.to(tl.uint64))
    else:
        bits = tl.where(weight != weight, NAN_BITS, weight.to(tl.int32, bitcast=True)).to(tl.uint32, bitcast=True)
        mixed = mix_bits((index.to(tl.uint64) << 32) + bits.to(tl.uint64))
    return mixed.to(tl.int64, bitcast=True)


@triton.jit
def mix_bits(z):
    """SplitMix64's finaliser on uint64, as in `kernels.digest`."""
    z = z + 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)
