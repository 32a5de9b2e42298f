"""Gradient descent of the paper's network on a CPU: a cell's whole training run in one compiled loop (Numba).

The mathematics, the early exit and the letters are those of `kernels.descent`. A cell works in buffers that stay in
the first-level cache: its activations are 16 x 272 numbers. Loops over data points are vector instructions, and two
hidden units at a time share what they load. Plain torch, whose operations each pass over a large array, takes
half as long again or twice as long.

Sums may be taken in any order that suits the compiler, but always in the same one: on one machine a cell's bits
depend on the cell alone.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numba import njit, types
from numba.extending import overload
from torch import Tensor

from kernels.two_layer import PARAMETERS, SLOPE, WIDTH, Descent, digest, measure

BLOCK = 16  # cells a thread takes at once
APART = 256  # elements between the rows a loop writes and what it reads: nearer, the compiled code takes a path of its
# own, without vectors (LLVM's check that an array is not read where it was just written), and sums in another order
SUMS = {"reassoc", "contract", "nsz", "arcp"}  # what a vectorised sum needs; NaN and infinity keep their meaning
IDENTITY, RELU, TANH = range(3)
NONLINEARITIES = {"identity": IDENTITY, "relu": RELU, "tanh": TANH}


def _kept(**options):
    """Numba's `njit`, with the machine code kept on disk for the next process, where a folder for it can be written."""

    def compiled(function):
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:  # neither beside this file nor in the home
            return njit(**options)(function)

    return compiled


def descend_cpu(
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
) -> Descent:
    """`kernels.descent.descend` by the compiled loop; arguments and shapes as there."""
    problem = (x_QNK, y_QN, w0_QKH, w1_QH, lr0_R, lr1_R, offset_R, problem_R)
    losses_RS, weights_RP = _train(*problem, minibatch_QSB, steps, nonlinearity, offset_every_step)
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


def _train(x_QNK, y_QN, w0_QKH, w1_QH, lr0_R, lr1_R, offset_R, problem_R, drawn_QSB, steps, nonlinearity, every_step):
    """Losses [R, S] and final weights [R, P] of every cell, trained on as many threads as torch has.

    Arguments as in `kernels.descent.descend`; drawn_QSB is None for the full batch.
    """
    x_QNK, y_QN, w0_QKH, w1_QH = (t.numpy() for t in (x_QNK, y_QN, w0_QKH, w1_QH))
    drawn_QSB = None if drawn_QSB is None else drawn_QSB.numpy()
    losses_RS = np.empty((len(lr0_R), steps), y_QN.dtype)
    weights_RP = np.empty((len(lr0_R), PARAMETERS), y_QN.dtype)
    x_QKN, w0_QHK = (np.ascontiguousarray(array.swapaxes(1, 2)) for array in (x_QNK, w0_QKH))
    cellwise = (*(t.numpy() for t in (lr0_R, lr1_R, offset_R, problem_R)), losses_RS, weights_RP)

    def train_block(start):
        block = (array[start : start + BLOCK] for array in cellwise)
        _train_cells(x_QKN, y_QN, w0_QHK, w1_QH, drawn_QSB, *block, NONLINEARITIES[nonlinearity], every_step)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(train_block, range(0, len(lr0_R), BLOCK)))
    return torch.from_numpy(losses_RS), torch.from_numpy(weights_RP)


@_kept(nogil=True, fastmath=SUMS, error_model="numpy")
def _train_cells(
    x_QKN, y_QN, w0_QHK, w1_QH, drawn_QSB,
    lr0_R, lr1_R, offset_R, problem_R, losses_RS, weights_RP, nonlinearity, every_step,
):  # fmt: skip
    """Fill losses [R, S] and weights [R, P] of some cells."""
    points, steps, real = y_QN.shape[1], losses_RS.shape[1], y_QN.dtype
    room = APART + points
    a_HN, r_N, u_2N = np.empty((WIDTH, room), real), np.empty(room, real)[APART:], np.empty((2, room), real)
    if drawn_QSB is not None:
        drawn = drawn_QSB.shape[2]
        room = APART + drawn
        a_HB, r_B, u_2B = np.empty((WIDTH, room), real), np.empty(room, real)[APART:], np.empty((2, room), real)
        x_KB, y_B = np.empty((WIDTH, drawn), real), np.empty(drawn, real)
    for cell in range(len(lr0_R)):
        q = problem_R[cell]
        x_KN, y_N, w0_HK, w1_H = x_QKN[q], y_QN[q], w0_QHK[q].copy(), w1_QH[q].copy()
        lr0, lr1, offset = lr0_R[cell], lr1_R[cell], offset_R[cell]
        if not every_step:
            _shift(w0_HK, offset)
        for s in range(steps):
            old0_HK, old1_H = w0_HK.copy(), w1_H.copy()
            if every_step:
                _shift(w0_HK, offset)
            _forward(x_KN, y_N, w0_HK, w1_H, a_HN, r_N, nonlinearity)
            losses_RS[cell, s] = _squares(r_N) / y_N.dtype.type(points)
            if drawn_QSB is None:
                _update(x_KN, w0_HK, w1_H, a_HN, r_N, u_2N, lr0, lr1, nonlinearity)
            else:
                for b in range(drawn):
                    point = drawn_QSB[q, s, b]
                    y_B[b] = y_N[point]
                    for k in range(WIDTH):
                        x_KB[k, b] = x_KN[k, point]
                _forward(x_KB, y_B, w0_HK, w1_H, a_HB, r_B, nonlinearity)
                _update(x_KB, w0_HK, w1_H, a_HB, r_B, u_2B, lr0, lr1, nonlinearity)
            draws = drawn_QSB is not None
            if _settled(old0_HK.ravel(), w0_HK.ravel(), draws) and _settled(old1_H, w1_H, draws):
                losses_RS[cell, s + 1 :] = losses_RS[cell, s]
                break
        for h in range(WIDTH):
            for k in range(WIDTH):
                weights_RP[cell, WIDTH * k + h] = w0_HK[h, k]
            weights_RP[cell, WIDTH * WIDTH + h] = w1_H[h]


# Numba puts these into `_train_cells`, where it sees that their arrays do not overlap, and can use vectors


@njit(inline="always")
def _forward(x_KN, y_N, w0_HK, w1_H, a_HN, r_N, nonlinearity):
    """Fill the activations [H, APART + N], whose first APART columns are left alone, and the residuals [N]."""
    points, real = len(y_N), y_N.dtype.type
    inner = real(0.25 if nonlinearity == IDENTITY else SLOPE)
    r_N[:] = 0
    for h in range(0, WIDTH, 2):
        w, v, a, b = w0_HK[h], w0_HK[h + 1], a_HN[h, APART:], a_HN[h + 1, APART:]
        for n in range(points):
            y, z = real(0), real(0)
            for k in range(WIDTH):
                y += w[k] * x_KN[k, n]
                z += v[k] * x_KN[k, n]
            a[n], b[n] = inner * y, inner * z
        for c in (a, b):
            if nonlinearity == RELU:
                for n in range(points):
                    c[n] = real(0) if c[n] <= real(0) else c[n]  # NaN stays NaN
            elif nonlinearity == TANH:
                for n in range(points):
                    c[n] = _tanh(c[n])
        for n in range(points):
            r_N[n] += w1_H[h] * a[n] + w1_H[h + 1] * b[n]
    for n in range(points):
        r_N[n] = r_N[n] * real(1 / WIDTH) - y_N[n]


@njit(inline="always")
def _squares(r_N):
    """The sum of squares."""
    total = r_N.dtype.type(0)
    for n in range(len(r_N)):
        total += r_N[n] * r_N[n]
    return total


@njit(inline="always")
def _update(x_KN, w0_HK, w1_H, a_HN, r_N, u_2N, lr0, lr1, nonlinearity):
    """One step of gradient descent of both layers; u_2N [2, APART + N] is room for two hidden units' gradients."""
    points, real = len(r_N), r_N.dtype.type
    zero, factor = real(0), real(2 / WIDTH) / real(points)
    inner = real(0.25 if nonlinearity == IDENTITY else SLOPE)
    u, v = u_2N[0, APART:], u_2N[1, APART:]
    for h in range(0, WIDTH, 2):
        a, b = a_HN[h, APART:], a_HN[h + 1, APART:]
        c, d = w1_H[h] * factor * inner, w1_H[h + 1] * factor * inner
        g, e = zero, zero
        for n in range(points):
            g += r_N[n] * a[n]
            e += r_N[n] * b[n]
            u[n], v[n] = c * r_N[n], d * r_N[n]
        if nonlinearity == RELU:
            for n in range(points):
                u[n] = u[n] if a[n] > zero else zero
                v[n] = v[n] if b[n] > zero else zero
        elif nonlinearity == TANH:
            for n in range(points):
                u[n] *= real(1) - a[n] * a[n]
                v[n] *= real(1) - b[n] * b[n]
        w1_H[h] -= lr1 * (factor * g)
        w1_H[h + 1] -= lr1 * (factor * e)
        for k in range(0, WIDTH, 4):
            s0, s1, s2, s3, t0, t1, t2, t3 = zero, zero, zero, zero, zero, zero, zero, zero
            for n in range(points):
                s0 += u[n] * x_KN[k, n]
                s1 += u[n] * x_KN[k + 1, n]
                s2 += u[n] * x_KN[k + 2, n]
                s3 += u[n] * x_KN[k + 3, n]
                t0 += v[n] * x_KN[k, n]
                t1 += v[n] * x_KN[k + 1, n]
                t2 += v[n] * x_KN[k + 2, n]
                t3 += v[n] * x_KN[k + 3, n]
            for i, s, t in ((0, s0, t0), (1, s1, t1), (2, s2, t2), (3, s3, t3)):
                w0_HK[h, k + i] -= lr0 * s
                w0_HK[h + 1, k + i] -= lr0 * t


@_kept()
def _shift(w0_HK, offset):
    """Add a constant to every weight. Array operations like `w0_HK += offset` compile for seconds each."""
    for h in range(WIDTH):
        for k in range(WIDTH):
            w0_HK[h, k] += offset


@_kept()
def _settled(old, new, draws):
    """Whether no later step can change these weights (see the head of `kernels.descent`)."""
    for i in range(len(new)):
        nan = new[i] != new[i]
        if draws:
            same = nan
        else:
            same = new[i] == old[i] or (nan and old[i] != old[i])
        if not same:
            return False
    return True


def _tanh(u):
    """tanh of a number; compiled, by its type. Sums in `_train_cells` may be reordered, these not."""
    return np.tanh(u)


@overload(_tanh)
def _compiled_tanh(u):
    single = u == types.float32
    return (lambda u: tanh_32(u)) if single else (lambda u: tanh_64(u))


@_kept(fastmath={"contract"}, error_model="numpy")
def tanh_32(u):
    """1 - 2 / (e^2u + 1), and below |u| = 0.4, where that cancels, an odd polynomial of degree 7."""
    one, two, whole = np.float32(1), np.float32(2), np.float32(12582912)  # 1.5 * 2^23
    t = u * np.float32(2.8853900817779268)  # e^2u = 2^t
    t = np.float32(126) if t > np.float32(126) else t  # tanh is 1 by then; NaN stays NaN
    t = np.float32(-126) if t < np.float32(-126) else t
    k = t + whole  # rounded to a whole number, which is kept in the low bits
    f = t - (k - whole)
    p = np.float32(0.00132669704)
    p = p * f + np.float32(0.00967545975)
    p = p * f + np.float32(0.0555074262)
    p = p * f + np.float32(0.240221218)
    p = p * f + np.float32(0.693146949)
    p = p * f + np.float32(1.00000007)
    power = np.int32((np.float32(k).view(np.int32) + 127) << 23).view(np.float32)
    large = one - two / (p * power + one)
    x = u * u
    q = np.float32(-0.047541875)
    q = q * x + np.float32(0.132706941)
    q = q * x + np.float32(-0.333313454)
    q = q * x + np.float32(0.9999999)
    return u * q if x < np.float32(0.16) else large


@_kept(fastmath={"contract"}, error_model="numpy")
def tanh_64(u):
    """m / (m + 2), m = e^t - 1, t = 2 |u| = k ln 2 + f; expm1(f) is a polynomial of degree 11 (as on a GPU)."""
    whole = 6755399441055744.0  # 1.5 * 2^52
    t = 2.0 * abs(u)
    t = 40.0 if t > 40.0 else t  # tanh is 1 from 19.1 on; NaN stays NaN
    k = t * 1.4426950408889634 + whole
    r = k - whole
    f = (t - r * 0.6931471805599453) - r * 2.3190468138462996e-17  # ln 2 in two parts
    p = 2.510038549551032e-08
    p = p * f + 2.7620088445409746e-07
    p = p * f + 2.7557268459997064e-06
    p = p * f + 2.4801521295954376e-05
    p = p * f + 0.00019841269863053618
    p = p * f + 0.0013888888917213717
    p = p * f + 0.008333333333330062
    p = p * f + 0.04166666666662413
    p = p * f + 0.16666666666666669
    p = p * f + 0.5
    p = p * (f * f) + f
    power = np.int64((np.float64(k).view(np.int64) + 1023) << 52).view(np.float64)
    m = power * p + (power - 1.0)
    a = m / (m + 2.0)
    return -a if u < 0.0 else a
