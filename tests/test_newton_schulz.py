"""Newton-Schulz: singular values, the reference, batch-invariant."""

import pytest
import torch
from stacked import normal

from kernels.newton_schulz import newton_schulz_reference, newton_schulz_triton

pytestmark = pytest.mark.kernel


@pytest.mark.parametrize("shape", [(2, 24, 40), (2, 40, 24), (1, 2, 33, 17)])
def test_matches_the_reference_in_float64(shape):
    matrix = normal(0, *shape)
    got = newton_schulz_triton(matrix)
    true = newton_schulz_reference(matrix.double())
    assert got.shape == matrix.shape
    assert (got.double() - true).norm() / true.norm() < 1e-5  # fp32 products over 5 steps: 1e-6


def test_singular_values_come_near_one():
    singular = torch.linalg.svdvals(newton_schulz_triton(normal(0, 2, 32, 48)).double())
    assert singular.min() > 0.5
    assert singular.max() < 1.3


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy warns of NaN
def test_batch_invariant():
    matrix = normal(0, 5, 24, 40)
    stacked = newton_schulz_triton(matrix)
    assert torch.equal(newton_schulz_triton(matrix[3:4])[0], stacked[3])
    matrix[0], matrix[4] = float("nan"), float("inf")
    assert torch.equal(newton_schulz_triton(matrix)[1:4], stacked[1:4])


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4, 3, 256, 1024), (4, 768, 256), (2, 1000, 520)])
def test_bf16_on_a_gpu(shape):
    matrix = normal(0, *shape, dtype=torch.bfloat16)
    got = newton_schulz_triton(matrix)
    true = newton_schulz_reference(matrix.double())
    # The iteration does not contract towards the exact value, so bf16 roundings (2^-9) add up.
    assert (got.double() - true).norm() / true.norm() < 5e-2
    assert torch.equal(newton_schulz_triton(matrix[1:2])[0], got[1])
