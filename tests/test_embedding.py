"""Embedding: gradients added in token order, rows nobody asked for zero, batch-invariant."""

import pytest
import torch
from stacked import (
    DEVICE,
    assert_batch_invariant,
    assert_close_to_float64,
    assert_well_registered,
    differentiate,
    normal,
)

from kernels.embedding import _gather_kernel, embedding_backward_op, embedding_op, embedding_reference, embedding_triton

pytestmark = pytest.mark.kernel


def random_tokens(seed, vocabulary, *shape, dtype=torch.int64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, shape, generator=generator).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize(("T", "V", "D"), [(1, 5, 3), (63, 7, 24), (100, 1000, 16)])
def test_matches_float64(T, V, D, dtype):
    inputs = [random_tokens(0, V, 2, 2, T, dtype=dtype), normal(1, 2, V, D)]
    assert_close_to_float64(embedding_triton, embedding_reference, inputs, 1e-6)  # measured: 5e-8


def test_all_tokens_equal():
    inputs = [torch.full((1, 2, 63), 3, device=DEVICE), normal(2, 1, 5, 8)]
    assert_close_to_float64(embedding_triton, embedding_reference, inputs, 2e-6)  # 126 additions in a row


def test_gradients_add_up_in_token_order():
    """1e8 + 1 + 1 is 1e8 in float32, 1 + 1 + 1e8 is not: the order shows in the bits."""
    tokens = torch.tensor([[0, 1, 0, 1, 0, 1]], device=DEVICE)
    upstream = torch.tensor([[1e8, 4.0, 4.0, 4.0, 4.0, 1e8]], device=DEVICE)[..., None]
    _, (dweight,), _ = differentiate(embedding_triton, [tokens, normal(3, 2, 1)], [upstream])
    assert dweight.flatten().tolist() == [1e8, 1e8 + 8]


def test_batch_invariant():
    assert_batch_invariant(embedding_triton, [random_tokens(4, 9, 5, 2, 20), normal(5, 5, 9, 16)])


def test_tokens_may_be_shared_and_weights_views_of_one_buffer():
    tokens, flat_RP = random_tokens(6, 6, 1, 10), normal(7, 3, 100)
    weight_RVD = flat_RP[:, 20:68].unflatten(1, (6, 8))
    stacked = torch.func.vmap(embedding_triton, in_dims=(None, 0))(tokens, weight_RVD)
    assert torch.equal(stacked, weight_RVD[:, tokens])


def test_operators_are_well_registered():
    tokens = random_tokens(13, 6, 2, 1, 5)
    assert_well_registered(embedding_op, tokens, normal(14, 2, 6, 8))
    assert_well_registered(embedding_backward_op, normal(15, 2, 1, 5, 8), tokens, 6)


def test_an_unknown_token_is_nan_and_moves_nothing():
    tokens = torch.tensor([[0, 7, -1, 2]], device=DEVICE)
    (y,), (dweight,), upstream = differentiate(embedding_triton, [tokens, normal(8, 7, 4)])
    assert y.isnan().all(-1).tolist() == [[False, True, True, False]]
    assert torch.equal(dweight[[0, 2]], upstream[0][0, [0, 3]])
    assert dweight[[1, 3, 4, 5, 6]].eq(0).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the masked are NaN, cast by the interpreter's numpy
def test_rows_of_one_replica_beyond_2_to_the_31_elements():
    """5 rows 2^29 elements apart, of which the kernel writes the first 16; the rest of the 2 GiB stays untouched."""
    D, tokens = 2**29, torch.zeros(1, 5, dtype=torch.int64, device=DEVICE)
    weight, y = torch.arange(16, device=DEVICE).bfloat16(), torch.empty(4 * D + 16, dtype=torch.int8, device=DEVICE)
    _gather_kernel[(1,)](tokens, weight, y, 5, 16, N=5, V=1, D=D, ROWS=8, WIDTH=16)
    assert torch.equal(y[4 * D :].bfloat16(), weight)


@pytest.mark.gpu
@pytest.mark.parametrize(("V", "D"), [(4096, 256), (49152, 576), (32768, 768), (301, 1280)])
def test_bf16_matches_float64_and_is_batch_invariant(V, D):
    inputs = [random_tokens(9, V, 5, 8, 128), normal(10, 5, V, D, dtype=torch.bfloat16)]
    assert_close_to_float64(embedding_triton, embedding_reference, inputs, 3e-3)  # one rounding to bf16
    assert_batch_invariant(embedding_triton, inputs)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    R, V, D = 86, 32768, 768
    tokens = random_tokens(11, V, R, 8, 128)
    weight = torch.zeros(R, V, D, dtype=torch.bfloat16, device=DEVICE)
    weight[-1] = normal(12, V, D, dtype=torch.bfloat16)
    y, g, upstream = differentiate(torch.func.vmap(embedding_triton), [tokens, weight])
    lone_y, lone_g, _ = differentiate(embedding_triton, [tokens[-1], weight[-1]], [upstream[0][-1]])
    assert torch.equal(y[0][-1], lone_y[0])
    assert torch.equal(g[0][-1], lone_g[0])
