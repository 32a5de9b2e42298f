"""Newton-Schulz: singular values, the reference, batch-invariant; and the passes of Muon around it."""

import pytest
import torch
from stacked import DEVICE, normal

from kernels.muon import (
    Matrix,
    MuonScalars,
    descend_reference_,
    descend_triton_,
    nesterov_reference_,
    nesterov_triton_,
    sums_of_squares_triton,
    total_triton,
)
from kernels.newton_schulz import POLAR_EXPRESS, QUINTIC, newton_schulz_reference, newton_schulz_triton
from kernels.split_master import split_master
from kernels.symmetric import symmetric_product

pytestmark = pytest.mark.kernel


def unit(seed, *shape, dtype=torch.float32):
    """Normal numbers whose matrices have Frobenius norm 1."""
    x = normal(seed, *shape)
    return (x / x.square().sum((-2, -1), keepdim=True).sqrt()).to(dtype)


@pytest.mark.parametrize("coefficients", [QUINTIC, POLAR_EXPRESS])
@pytest.mark.parametrize("shape", [(2, 24, 40), (2, 40, 24), (1, 33, 17)])
def test_matches_the_reference_in_float64(shape, coefficients):
    x = unit(0, *shape)
    got = newton_schulz_triton(x, coefficients)
    true = newton_schulz_reference(x.double(), coefficients)
    assert got.shape == x.shape
    assert (got.double() - true).norm() / true.norm() < 1e-5  # fp32 products over 5 steps: 1e-6


@pytest.mark.parametrize(("coefficients", "low", "high"), [(QUINTIC, 0.5, 1.3), (POLAR_EXPRESS, 0.8, 1.2)])
def test_singular_values_come_near_one(coefficients, low, high):
    singular = torch.linalg.svdvals(newton_schulz_triton(unit(0, 2, 32, 48), coefficients).double())
    assert singular.min() > low
    assert singular.max() < high


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy warns of NaN
def test_batch_invariant():
    x = unit(0, 5, 24, 40)
    stacked = newton_schulz_triton(x)
    assert torch.equal(newton_schulz_triton(x[3:4])[0], stacked[3])
    x[0], x[4] = float("nan"), float("inf")
    assert torch.equal(newton_schulz_triton(x)[1:4], stacked[1:4])


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(12, 256, 1024), (4, 768, 256), (2, 1000, 520)])
def test_bf16_on_a_gpu(shape):
    x = unit(0, *shape, dtype=torch.bfloat16)
    got = newton_schulz_triton(x)
    true = newton_schulz_reference(x.double())
    # The iteration does not contract towards the exact value, so bf16 roundings (2^-9) add up.
    assert (got.double() - true).norm() / true.norm() < 5e-2
    assert torch.equal(newton_schulz_triton(x[1:2])[0], got[1])


# ---- the passes around it, on matrices inside larger flat buffers

R = 3


def matrix_of(seed, rows, columns, split):
    """A matrix of R replicas as rows 2 and on of a larger parameter, and what a step needs."""
    n = (rows + 3) * columns
    master = normal(seed, R, n)
    weight, remainder = split_master(master) if split else (master, None)
    buffers = [weight, remainder, normal(seed + 1, R, n, dtype=weight.dtype), normal(seed + 2, R, n)]
    views = [None if b is None else b.unflatten(1, (-1, columns))[:, 2 : 2 + rows] for b in buffers]
    scalars = MuonScalars(
        *(torch.tensor(values, device=DEVICE) for values in ([0.1, 0.2, 0.3], [0.1, 0.0, 0.5], [0.9, 0.5, 0.0])),
        None,
        torch.tensor([1.0, 0.5, 2.0], device=DEVICE),
        torch.tensor([True, False, True], device=DEVICE),
        torch.zeros(R, dtype=torch.int32, device=DEVICE),
    )
    return Matrix(*views, None), buffers, scalars


@pytest.mark.parametrize("split", [False, True])
def test_momentum_equals_its_reference_bit_for_bit(split):
    results = []
    for form in (nesterov_reference_, nesterov_triton_):
        matrix, buffers, scalars = matrix_of(0, 37, 41, split)
        x = torch.empty(R, 37, 41, device=DEVICE)
        form(matrix.gradient, matrix.momentum, x, scalars)
        results.append([x, buffers[3]])
    for ours, true in zip(*results, strict=True):
        assert torch.equal(ours, true)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize(("rows", "columns", "factors"), [(37, 41, True), (41, 37, True), (8, 8, False)])
def test_the_weights_step_equals_its_reference_bit_for_bit(split, cautious, rows, columns, factors):
    results = []
    for form in (descend_reference_, descend_triton_):
        matrix, buffers, scalars = matrix_of(1, rows, columns, split)
        x, factor = normal(5, R, rows, columns), normal(6, R, max(rows, columns)).abs() if factors else None
        x[2, 3, 4] = float("inf")
        rate, decay = scalars.learning_rate_R, scalars.weight_decay_R
        form(matrix, x, factor, rate, decay, cautious, scalars)
        results.append([*(b for b in buffers if b is not None), scalars.nonfinite_R])
        assert scalars.nonfinite_R.tolist() == [0, 0, 1]
    for ours, true in zip(*results, strict=True):
        assert torch.equal(ours, true)


@pytest.mark.parametrize("rows", [True, False])
def test_sums_of_squares_are_right_and_batch_invariant(rows):
    x = normal(0, 5, 45, 300)
    sums = sums_of_squares_triton(x, rows)
    torch.testing.assert_close(sums, x.double().square().sum(2 if rows else 1).float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(total_triton(sums), x.double().square().sum((1, 2)).float(), rtol=1e-6, atol=0)
    assert torch.equal(sums_of_squares_triton(x[3:4], rows)[0], sums[3])
    assert torch.equal(total_triton(sums[3:4])[0], total_triton(sums)[3])


# ---- products with one's own transpose


@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize(("m", "n"), [(24, 40), (200, 33)])
def test_symmetric_products_equal_float64s_and_are_batch_invariant(tall, m, n):
    a = normal(0, 3, n, m) if tall else normal(0, 3, m, n)
    wide = a.double()
    true = wide.mT @ wide if tall else wide @ wide.mT
    gram = symmetric_product(a, tall)
    assert (gram - true).norm() / true.norm() < 1e-6  # fp32 sums of 40 products
    assert torch.equal(gram, gram.mT) and torch.equal(symmetric_product(a[1:2], tall)[0], gram[1])
    squared = symmetric_product(gram, extra=gram, alpha=0.5, beta=-2.0)
    true = 0.5 * gram.double() @ gram.double() - 2 * gram.double()
    assert (squared - true).norm() / true.norm() < 1e-6
    assert torch.equal(squared, squared.mT)
