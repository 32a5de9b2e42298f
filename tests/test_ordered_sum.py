"""Sums over rows, and the bias whose gradient is one: against float64, batch-invariant."""

import pytest
import torch
from stacked import (
    DEVICE,
    assert_batch_invariant,
    assert_close_to_float64,
    assert_well_registered,
    nan_filled_memory,
    normal,
)

from kernels.ordered_sum import add_bias_op, add_bias_reference, add_bias_triton, column_sums_op, row_sums

pytestmark = pytest.mark.kernel


@pytest.mark.parametrize("shape", [(2, 1, 7), (3, 63, 130), (1, 5, 11, 600), (2, 1000, 3)])
def test_a_bias_and_its_gradient_match_float64(shape):
    inputs = [normal(0, *shape), normal(1, shape[0], shape[-1])]
    assert_close_to_float64(add_bias_triton, add_bias_reference, inputs, 1e-6)  # measured: 2e-7 at most


def test_batch_invariant():
    assert_batch_invariant(add_bias_triton, [normal(2, 5, 2, 40, 24), normal(3, 5, 24)])


def test_positions_are_a_bias_of_whole_rows():
    """[B, T, D] and [T, D], as GPT-2 adds them."""
    x, positions = normal(4, 5, 3, 6, 4), normal(5, 5, 6, 4)

    def add(x_BTD, positions_TD):
        return add_bias_triton(x_BTD.flatten(1), positions_TD.flatten()).view(x_BTD.shape)

    assert_close_to_float64(add, lambda x, p: x + p, [x, positions], 1e-6)
    assert_batch_invariant(add, [x, positions])


def test_a_bias_is_read_from_one_flat_buffer_and_its_gradient_may_be_expanded():
    flat_RP, x = normal(6, 3, 100), normal(7, 3, 5, 16)
    view_RD = flat_RP[:, 40:56].requires_grad_()
    y = torch.func.vmap(add_bias_triton)(x, view_RD)
    assert torch.equal(y, x + view_RD[:, None])
    (gradient,) = torch.autograd.grad(y.sum(), view_RD)  # an upstream gradient of stride 0
    assert torch.equal(gradient, torch.full_like(gradient, 5))


@pytest.mark.parametrize(("sums", "n"), [(1, 1), (3, 1000), (2, 1025), (2, 5000)])
def test_sums_of_rows_match_float64(sums, n):
    values = normal(8, sums, n)
    with nan_filled_memory():
        got = row_sums(values)
    torch.testing.assert_close(got.double(), values.double().sum(1), rtol=0, atol=1e-6 * n**0.5)  # of n terms of 1
    assert torch.equal(row_sums(values[:1]), got[:1])


def test_operators_are_well_registered():
    assert_well_registered(add_bias_op, normal(9, 2, 3, 8), normal(10, 2, 8))
    assert_well_registered(column_sums_op, normal(9, 2, 3, 8))


def test_refuses_a_bias_of_another_width():
    with pytest.raises(ValueError, match=r"a bias \(3,\), expected \(4,\)"):
        add_bias_triton(normal(0, 2, 4), normal(0, 3))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(5, 1024, 768), (5, 1000, 577), (5, 8, 128 * 768), (5, 1, 3)])
def test_bf16_matches_float64_and_is_batch_invariant(shape):
    inputs = [normal(0, *shape, dtype=torch.bfloat16), normal(1, shape[0], shape[-1], dtype=torch.bfloat16)]
    # one rounding to bf16 of the sum and of each gradient, 2^-9 relative
    assert_close_to_float64(add_bias_triton, add_bias_reference, inputs, 3e-3)
    assert_batch_invariant(add_bias_triton, inputs)


@pytest.mark.gpu
@pytest.mark.large
def test_more_than_2_to_the_31_elements():
    N, D = 4096, 4096
    R = 2**31 // (N * D) + 1
    x = torch.zeros(R, N, D, dtype=torch.bfloat16, device=DEVICE)
    x[-1] = normal(0, N, D, dtype=torch.bfloat16)
    assert torch.equal(column_sums_op(x)[-1], column_sums_op(x[-1:])[0])
