"""Dropout: Philox's published numbers, mean and independence, the same bits in any slot and cut, absent where off."""

import math

import pytest
import torch
from stacked import DEVICE, assert_batch_invariant, assert_well_registered, normal

from kernels.dropout import dropout_op, dropout_reference, dropout_triton, philox_reference

pytestmark = pytest.mark.kernel


def key(*values):
    return torch.tensor(values, device=DEVICE)


def rate(value):
    return torch.tensor(value, device=DEVICE)


@pytest.mark.parametrize(
    ("keys", "counter", "site", "words"),
    [  # of Random123's kat_vectors, philox4x32 10, whose last counter is zero
        ((0, 0), (0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ],
)
def test_the_generator_gives_the_published_numbers(keys, counter, site, words):
    arguments = [torch.tensor(value) for value in (*keys, *counter)]
    assert tuple(word.item() for word in philox_reference(*arguments, site)) == words


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 1030), (1, 4)])
def test_the_kernel_equals_the_reference_bit_for_bit(shape, dtype):
    x = normal(0, *shape).to(torch.bfloat16).to(dtype)  # and a factor of 2: the interpreter does not round to bf16
    for site in (0, 1, 37):
        arguments = rate(0.5), key(2**31 - 1, 70_000, 12), site
        assert torch.equal(dropout_triton(x, *arguments), dropout_reference(x, *arguments))


def test_in_float64_the_mean_is_kept_and_elements_are_independent():
    x, n = torch.ones(8, 50_000, dtype=torch.float64), 400_000
    dropped = [dropout_reference(x, torch.tensor(0.3), torch.tensor(k), s) for k, s in
               [((5, 0, 0), 0), ((6, 0, 0), 0), ((5, 1, 0), 0), ((5, 0, 8), 0), ((5, 0, 0), 1)]]  # fmt: skip
    spread = math.sqrt(0.3 / 0.7)  # of one element
    for y in dropped:
        assert abs(y.mean() - 1) < 5 * spread / math.sqrt(n)
    y = (dropped[0] - 1) / spread
    # other seeds, steps, rows and sites; neighbours; other rows: products of independent ones have mean 0, deviation 1
    others = [(other - 1) / spread for other in dropped[1:]]
    pairs = [(y, other) for other in others] + [(y[:, lag:], y[:, :-lag]) for lag in (1, 2, 3, 4)] + [(y[1:], y[:-1])]
    for one, other in pairs:
        assert abs((one * other).mean()) < 5 / math.sqrt(one.numel())


def test_the_backward_draws_the_forwards_mask():
    x = normal(0, 2, 3, 300).requires_grad_()
    y = torch.func.vmap(lambda x, p, k: dropout_triton(x, p, k, 3))(
        x, torch.tensor([0.25, 0.5], device=DEVICE), key(1, 2, 0).expand(2, -1)
    )
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient == 0, y == 0)
    assert torch.equal(gradient[0][y[0] != 0].unique(), rate(1 / 0.75)[None])


def test_a_batch_cut_into_micro_batches_draws_the_same():
    x = normal(0, 4, 100)
    whole = dropout_triton(x, rate(0.5), key(1, 2, 0), 0)
    halves = [dropout_triton(x[at : at + 2], rate(0.5), key(1, 2, at), 0) for at in (0, 2)]
    assert torch.equal(torch.cat(halves), whole)


def test_a_rate_of_zero_changes_no_bit_and_one_near_one_drops_nearly_all():
    x = normal(0, 2, 1000)
    assert torch.equal(dropout_triton(x, rate(0.0), key(1, 2, 0), 0), x)
    assert (dropout_triton(x, rate(1 - 1e-6), key(1, 2, 0), 0) == 0).all()


def test_batch_invariant_and_well_registered():
    x, rates = normal(0, 5, 2, 3, 40), torch.rand(5, device=DEVICE)
    keys = torch.arange(15, device=DEVICE).view(5, 3)
    stacked = torch.func.vmap(lambda x, p, k: dropout_triton(x, p, k, 1))(x, rates, keys)
    for replica in range(5):
        assert torch.equal(dropout_triton(x[replica], rates[replica], keys[replica], 1), stacked[replica])
    assert_batch_invariant(lambda x: dropout_triton(x, rate(0.5), key(1, 2, 0), 1), [x])
    assert_well_registered(dropout_op, x, rates, keys, 1)
