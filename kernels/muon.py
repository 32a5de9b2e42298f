"""Muon's step of many matrices of one shape at once: momentum, orthogonalisation, the weights' step.

The momenta of all matrices of all replicas lie in one stack, which the iteration takes in one launch a product
(kernels/newton_schulz.py). Sums are made in an order that follows from one matrix's shape, so a matrix's bits do not
depend on the others.

Dimensions: R replica, L matrix of one replica, K = L R matrix of the stack, M rows, N columns, S the side along
which NorMuon has a factor for each row or column: rows where M >= N.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gradient_norm import sum_of_blocks
from kernels.newton_schulz import POLAR_EXPRESS, QUINTIC, newton_schulz
from kernels.split_master import join_master, load_master, split_master, store_master

BLOCK = 1024  # elements a program
SUMMED = 2**28  # elements of a stack, at most: bounds what the iteration keeps, 4 such stacks at its peak


class Matrix(NamedTuple):
    """One matrix of every replica, as views of the flat buffers of its parameter.

    weight: [R, M, N], bf16 beside an int16 remainder of the same strides (kernels/split_master.py), or the fp32 master
    beside None. gradient: [R, M, N], bf16 or fp32. momentum: fp32 [R, M, N]. second: NorMuon's, fp32 [R, S], or None.
    """

    weight: Tensor
    remainder: Tensor | None
    gradient: Tensor
    momentum: Tensor
    second: Tensor | None


class MuonScalars(NamedTuple):
    """What a step needs besides the buffers, fp32 [R] each.

    beta2_R: of NorMuon, else None. scale_R multiplies the gradient, or None. Where active_R (bool) is False nothing of
    that replica is written. nonfinite_R (int32) becomes 1 where an updated weight is not finite.
    """

    learning_rate_R: Tensor
    weight_decay_R: Tensor
    momentum_R: Tensor
    beta2_R: Tensor | None
    scale_R: Tensor | None
    active_R: Tensor
    nonfinite_R: Tensor


def muon_(matrices: list[Matrix], scalars: MuonScalars) -> None:
    """One step of Muon of matrices of one shape, in place.

    m <- m + (1 - mu) (g - m);  u = g + mu (m - g);  o = five quintic steps from u / (|u| + 1e-7);
    p <- p (1 - lr wd) - lr sqrt(max(1, M / N)) o. The iteration is in the weights' dtype.

    Source: Jordan et al. (2024), in the form of nanochat of October 2025, which has no weight decay (wd = 0).
    """
    replicas = scalars.active_R.shape[0]
    for some in pieces(matrices, replicas):
        x_KMN = nesterov_(some, scalars)
        norm_K = total(sums_of_squares(x_KMN, rows=True)).sqrt().to(x_KMN.dtype)
        x_KMN.div_((norm_K + 1e-7)[:, None, None])
        x_KMN = newton_schulz(x_KMN, QUINTIC)
        rate_R = scalars.learning_rate_R * aspect(some[0])
        decay_R = scalars.learning_rate_R * scalars.weight_decay_R
        for matrix, x_RMN in zip(some, x_KMN.split(replicas), strict=True):
            descend_(matrix, x_RMN, None, rate_R, decay_R, False, scalars)


def normuon_(matrices: list[Matrix], scalars: MuonScalars) -> None:
    """One step of the July 2026 generation of Muon of matrices of one shape, in place.

    u as in `muon_`. Its rows are brought to their root mean square norm (MuonEq, arXiv:2603.28254), the matrix divided
    by 1.01 |u| + 1e-6 and orthogonalised by Polar Express; the result o is brought to |o| = sqrt(min(M, N)) (Muon+,
    arXiv:2602.21545). NorMuon (arXiv:2510.05491): v <- b2 v + (1 - b2) mean(o^2) over the shorter side's direction,
    o / sqrt(v) with the norm that o had. The decay is cautious: with o' the outcome and lr' = lr sqrt(max(1, M / N)),
    p <- p - lr' o' - lr' wd p where o' p >= 0, p - lr' o' elsewhere.
    """
    assert scalars.beta2_R is not None
    replicas = scalars.active_R.shape[0]
    for some in pieces(matrices, replicas):
        x_KMN = nesterov_(some, scalars)
        equilibrate_(x_KMN)
        x_KMN = newton_schulz(x_KMN, POLAR_EXPRESS)
        rows, columns = x_KMN.shape[1:]
        by_row = rows >= columns
        squares_KS = sums_of_squares(x_KMN, rows=by_row)
        rate_R = scalars.learning_rate_R * aspect(some[0])
        decay_R = rate_R * scalars.weight_decay_R
        for matrix, x_RMN, squares_RS in zip(
            some, x_KMN.split(replicas), squares_KS.split(replicas), strict=True
        ):  # fmt: skip
            factor_RS = normuon_factors_(matrix, squares_RS, (rows, columns), scalars)
            descend_(matrix, x_RMN, factor_RS, rate_R, decay_R, True, scalars)


def pieces(matrices: list[Matrix], replicas: int) -> list[list[Matrix]]:
    """The matrices in stacks of at most SUMMED elements, or of one matrix of every replica."""
    size = max(SUMMED // matrices[0].weight.numel(), 1)
    return [matrices[start : start + size] for start in range(0, len(matrices), size)]


def aspect(matrix: Matrix) -> float:
    """sqrt(max(1, M / N)), Muon's factor on the learning rate."""
    rows, columns = matrix.weight.shape[1:]
    return max(1.0, rows / columns) ** 0.5


def equilibrate_(x_KMN: Tensor) -> None:
    """Bring all rows of a matrix to one norm and the matrix to a spectral norm below 1, in place.

    Factors and norms are rounded to x's dtype where nanochat rounds them.
    """
    squares_KM = sums_of_squares(x_KMN, rows=True)
    target_K1 = (total(squares_KM).sqrt() / x_KMN.shape[1] ** 0.5)[:, None]
    factor_KM = (target_K1 / squares_KM.sqrt().clamp_min(1e-6)).to(x_KMN.dtype)
    norm_K = total(factor_KM.float().square() * squares_KM).sqrt().to(x_KMN.dtype)
    x_KMN.mul_(factor_KM[:, :, None]).div_((norm_K * 1.01 + 1e-6)[:, None, None])


def normuon_factors_(
    matrix: Matrix, squares_RS: Tensor, shape: tuple[int, int], scalars: MuonScalars
) -> Tensor:  # fmt: skip
    """Factors [R, S] on an orthogonalised matrix: its norm, then NorMuon's, whose second moment moves on in place."""
    assert matrix.second is not None and scalars.beta2_R is not None
    norm_R1 = total(squares_RS).sqrt()[:, None].clamp_min(1e-6)
    unit_R1 = min(shape) ** 0.5 / norm_R1
    squares_RS = squares_RS * unit_R1.square()
    beta2_R1, active_R1 = scalars.beta2_R[:, None], scalars.active_R[:, None]
    second_RS = beta2_R1 * matrix.second + (1 - beta2_R1) * (squares_RS / min(shape))
    matrix.second.copy_(torch.where(active_R1, second_RS, matrix.second))
    step_RS = second_RS.clamp_min(1e-10).rsqrt()
    norm_R1 = total(squares_RS).sqrt()[:, None]
    stepped_R1 = total(squares_RS * step_RS.square()).sqrt()[:, None]
    return unit_R1 * step_RS * (norm_R1 / stepped_R1.clamp_min(1e-10))


# ---- momentum


def nesterov_(matrices: list[Matrix], scalars: MuonScalars) -> Tensor:
    """Move the momenta on; what Nesterov's rule makes of them, [K, M, N] in the weights' dtype, replicas innermost."""
    first = matrices[0].weight
    x_LRMN = torch.empty((len(matrices), *first.shape), dtype=first.dtype, device=first.device)
    form = nesterov_reference_ if first.device.type == "cpu" else nesterov_triton_
    for matrix, x_RMN in zip(matrices, x_LRMN, strict=True):
        form(matrix.gradient, matrix.momentum, x_RMN, scalars)
    return x_LRMN.flatten(0, 1)


def nesterov_reference_(gradient: Tensor, momentum: Tensor, x_RMN: Tensor, scalars: MuonScalars) -> None:
    """Of one matrix of every replica, in plain torch: momentum and x_RMN are written."""
    mu, active = scalars.momentum_R[:, None, None], scalars.active_R[:, None, None]
    gradient = gradient.float() if scalars.scale_R is None else gradient.float() * scalars.scale_R[:, None, None]
    moved = momentum + (1 - mu) * (gradient - momentum)
    x_RMN.copy_(moved - (1 - mu) * (moved - gradient))
    momentum.copy_(torch.where(active, moved, momentum))


@triton.jit
def _nesterov_kernel(
    gradient_ptr, momentum_ptr, x_ptr, mu_ptr, scale_ptr, active_ptr, n, gradient_stride, momentum_stride,
    BLOCK: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    replica = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    mu = tl.load(mu_ptr + replica)
    g = tl.load(gradient_ptr + replica * gradient_stride + at, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(momentum_ptr + replica * momentum_stride + at, mask=inside, other=0.0)
    if SCALED:
        g *= tl.load(scale_ptr + replica)
    m += (1 - mu) * (g - m)
    x = m - (1 - mu) * (m - g)
    tl.store(x_ptr + replica * n + at, x.to(x_ptr.dtype.element_ty), mask=inside)
    kept = at < tl.where(tl.load(active_ptr + replica), n, 0)
    tl.store(momentum_ptr + replica * momentum_stride + at, m, mask=kept)


def nesterov_triton_(gradient: Tensor, momentum: Tensor, x_RMN: Tensor, scalars: MuonScalars) -> None:
    """`nesterov_reference_` on the Triton kernel whatever the device, with the same bits but in bf16's ties."""
    replicas, n = x_RMN.shape[0], x_RMN[0].numel()
    assert gradient[0].is_contiguous() and momentum[0].is_contiguous() and x_RMN.is_contiguous()
    _nesterov_kernel[(triton.cdiv(n, BLOCK), replicas)](
        gradient, momentum, x_RMN, scalars.momentum_R, scalars.scale_R, scalars.active_R, n,
        gradient.stride(0), momentum.stride(0),
        BLOCK=BLOCK, SCALED=scalars.scale_R is not None, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


# ---- sums


def sums_of_squares(x_KMN: Tensor, rows: bool) -> Tensor:
    """The squares of x summed over each row [K, M], or over each column [K, N], fp32."""
    if x_KMN.device.type == "cpu":
        return x_KMN.float().square().sum(2 if rows else 1)
    return sums_of_squares_triton(x_KMN, rows)


@triton.jit
def _squares_kernel(x_ptr, sums_ptr, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr):
    matrix = tl.program_id(1).to(tl.int64)
    x_ptr += matrix * m * n
    own = tl.program_id(0) * (BLOCK_M if ROWS else BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, n if ROWS else m, BLOCK_N if ROWS else BLOCK_M):
        row = (own if ROWS else start) + tl.arange(0, BLOCK_M)
        column = (start if ROWS else own) + tl.arange(0, BLOCK_N)
        inside = (row < m)[:, None] & (column < n)[None, :]
        x = tl.load(x_ptr + row[:, None].to(tl.int64) * n + column[None, :], mask=inside, other=0.0).to(tl.float32)
        total += x * x
    if ROWS:
        row = own + tl.arange(0, BLOCK_M)
        tl.store(sums_ptr + matrix * m + row, tl.sum(total, axis=1), mask=row < m)
    else:
        column = own + tl.arange(0, BLOCK_N)
        tl.store(sums_ptr + matrix * n + column, tl.sum(total, axis=0), mask=column < n)


def sums_of_squares_triton(x_KMN: Tensor, rows: bool) -> Tensor:
    """`sums_of_squares` on the Triton kernel whatever the device."""
    matrices, m, n = x_KMN.shape
    assert x_KMN.is_contiguous()
    block_m, block_n = (4, 256) if rows else (32, 64)
    side = m if rows else n
    sums_KS = torch.empty((matrices, side), dtype=torch.float32, device=x_KMN.device)
    _squares_kernel[(triton.cdiv(side, block_m if rows else block_n), matrices)](
        x_KMN, sums_KS, m, n, BLOCK_M=block_m, BLOCK_N=block_n, ROWS=rows, num_warps=4
    )
    return sums_KS


def total(sums_KS: Tensor) -> Tensor:
    """The sum of each matrix's sums, fp32 [K]."""
    return sums_KS.sum(1) if sums_KS.device.type == "cpu" else total_triton(sums_KS)


@triton.jit
def _total_kernel(sums_ptr, total_ptr, n, BLOCK: tl.constexpr):
    matrix = tl.program_id(0).to(tl.int64)
    tl.store(total_ptr + matrix, sum_of_blocks(sums_ptr + matrix * n, n, BLOCK))


def total_triton(sums_KS: Tensor) -> Tensor:
    """`total` on the Triton kernel whatever the device."""
    matrices, n = sums_KS.shape
    assert sums_KS.is_contiguous()
    total_K = torch.empty(matrices, dtype=torch.float32, device=sums_KS.device)
    _total_kernel[(matrices,)](sums_KS, total_K, n, BLOCK=1024, num_warps=4)
    return total_K


# ---- the weights' step


def descend_(
    matrix: Matrix,
    x_RMN: Tensor,
    factor_RS: Tensor | None,
    rate_R: Tensor,
    decay_R: Tensor,
    cautious: bool,
    scalars: MuonScalars,
) -> None:
    """p <- p - (rate u + decay p) of one matrix of every replica, u = x times a factor of its row (M >= N) or column.

    cautious: the decay counts only where u p >= 0. Kernel and reference agree bit for bit.
    """
    form = descend_reference_ if x_RMN.device.type == "cpu" else descend_triton_
    form(matrix, x_RMN, factor_RS, rate_R, decay_R, cautious, scalars)


def descend_reference_(
    matrix: Matrix,
    x_RMN: Tensor,
    factor_RS: Tensor | None,
    rate_R: Tensor,
    decay_R: Tensor,
    cautious: bool,
    scalars: MuonScalars,
) -> None:
    """`descend_` in plain torch."""
    weight, remainder = matrix.weight, matrix.remainder
    active = scalars.active_R[:, None, None]
    master = weight if remainder is None else join_master(weight, remainder)
    u = x_RMN.float()
    if factor_RS is not None:
        u = u * (factor_RS[:, :, None] if u.shape[1] >= u.shape[2] else factor_RS[:, None, :])
    decayed = decay_R[:, None, None] * master
    if cautious:
        decayed = torch.where(u * master >= 0, decayed, 0.0)
    master = torch.where(active, master - (rate_R[:, None, None] * u + decayed), master)
    if remainder is not None:
        master, split = split_master(master)
        remainder.copy_(split)
    weight.copy_(master)
    broken_R = scalars.active_R & ~torch.isfinite(master).flatten(1).all(1)
    scalars.nonfinite_R.copy_(torch.where(broken_R, 1, scalars.nonfinite_R))


@triton.jit
def _descend_kernel(
    weight_ptr, remainder_ptr, x_ptr, factor_ptr, rate_ptr, decay_ptr, active_ptr, nonfinite_ptr, n, columns, side,
    stride, BLOCK: tl.constexpr, FACTOR: tl.constexpr, CAUTIOUS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    replica = tl.program_id(1).to(tl.int64)
    active = tl.load(active_ptr + replica)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tl.where(active, n, 0)
    u = tl.load(x_ptr + replica * n + at, mask=inside, other=0.0).to(tl.float32)
    if FACTOR == "row":
        u *= tl.load(factor_ptr + replica * side + at // columns, mask=inside, other=0.0)
    if FACTOR == "column":
        u *= tl.load(factor_ptr + replica * side + at % columns, mask=inside, other=0.0)
    at += replica * stride
    p = load_master(weight_ptr, remainder_ptr, at, inside, SPLIT)
    decayed = tl.load(decay_ptr + replica) * p
    if CAUTIOUS:
        decayed = tl.where(u * p >= 0, decayed, 0.0)
    p -= tl.load(rate_ptr + replica) * u + decayed
    broken = store_master(weight_ptr, remainder_ptr, at, p, inside, SPLIT)
    tl.store(nonfinite_ptr + replica, 1, mask=active & broken)


def descend_triton_(
    matrix: Matrix,
    x_RMN: Tensor,
    factor_RS: Tensor | None,
    rate_R: Tensor,
    decay_R: Tensor,
    cautious: bool,
    scalars: MuonScalars,
) -> None:
    """`descend_` on the Triton kernel whatever the device."""
    weight, remainder = matrix.weight, matrix.remainder
    replicas, rows, columns = x_RMN.shape
    assert weight[0].is_contiguous() and x_RMN.is_contiguous()
    assert remainder is None or remainder.stride() == weight.stride()
    factor, side = "none", 0
    if factor_RS is not None:
        factor, side = ("row", rows) if rows >= columns else ("column", columns)
        assert factor_RS.shape == (replicas, side) and factor_RS.is_contiguous()
    _descend_kernel[(triton.cdiv(rows * columns, BLOCK), replicas)](
        weight, remainder, x_RMN, factor_RS, rate_R, decay_R, scalars.active_R, scalars.nonfinite_R,
        rows * columns, columns, side, weight.stride(0),
        BLOCK=BLOCK, FACTOR=factor, CAUTIOUS=cautious, SPLIT=remainder is not None,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
