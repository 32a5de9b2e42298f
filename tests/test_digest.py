"""Digest: kernel, plain torch and numpy agree on every bit, for whole and split masters; single changes show."""

import numpy as np
import pytest
import torch
from stacked import DEVICE, normal

from kernels.digest import digest, digest_reference, digest_triton
from kernels.split_master import split_master

pytestmark = pytest.mark.kernel


def digest_numpy(weights_P):
    """The definition, in numpy's own wrapping uint64."""
    bits = np.where(np.isnan(weights_P), np.uint32(0x7FC00000), weights_P.view(np.uint32)).astype(np.uint64)
    z = (np.arange(bits.size, dtype=np.uint64) << np.uint64(32)) + bits
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))).sum(dtype=np.uint64).astype(np.int64)


def awkward_weights(R, P):
    weights = normal(0, R, P)
    weights[0, 0], weights[0, 1], weights[-1, -1] = float("nan"), -0.0, float("inf")
    return weights


def everyone(weights):
    return torch.arange(len(weights), device=weights.device)


@pytest.mark.parametrize("P", [3, 63, 1000, 9001])
def test_three_implementations_agree(P):
    weights = awkward_weights(3, P)
    expected = [digest_numpy(row) for row in weights.cpu().numpy()]
    assert digest_reference(weights, None, everyone(weights)).tolist() == expected
    assert digest_triton(weights, None, everyone(weights)).tolist() == expected


@pytest.mark.parametrize("P", [63, 9001])
def test_a_split_master_has_the_digest_of_the_whole(P):
    master = awkward_weights(3, P)
    weights, remainder = split_master(master)
    expected = digest(master).tolist()
    assert digest_reference(weights, remainder, everyone(weights)).tolist() == expected
    assert digest_triton(weights, remainder, everyone(weights)).tolist() == expected


@pytest.mark.parametrize("split", [False, True])
def test_only_the_replicas_asked_for_in_their_order_and_whatever_their_stride(split):
    master = awkward_weights(5, 700)
    parts = split_master(master[:, :600]) if split else (master[:, :600], None)
    chosen = torch.tensor([3, 0, 3], device=DEVICE)
    expected = digest(master[:, :600].contiguous())[chosen]
    assert torch.equal(digest(*parts, chosen), expected)
    assert torch.equal(digest_triton(*parts, chosen), expected)


def test_every_single_change_shows():
    weights = normal(1, 1, 64)
    same = digest(weights)
    for element in range(64):
        changed = weights.clone()
        changed[0, element] = torch.nextafter(changed[0, element], changed.new_tensor(9.0))
        assert digest(changed) != same
    swapped = weights[:, [1, 0, *range(2, 64)]]
    assert digest(swapped) != same


def test_signed_zeros_differ_and_all_nans_are_one():
    assert digest(torch.tensor([[0.0]])) != digest(torch.tensor([[-0.0]]))
    nans = torch.tensor([[0x7FC00000, 0x7F800001]], dtype=torch.int32).view(torch.float32)
    negative = torch.tensor([[-1, -2]], dtype=torch.int32).view(torch.float32)
    assert negative.isnan().all()
    one = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    assert torch.equal(digest_triton(nans.to(DEVICE), None, one), digest_triton(negative.to(DEVICE), None, one))
    assert torch.equal(digest(nans), digest(negative))


def test_refuses_another_dtype_and_indices_that_do_not_fit():
    with pytest.raises(ValueError, match=r"expected torch\.float32"):
        digest(torch.zeros(1, 4, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"expected torch\.bfloat16"):
        digest(torch.zeros(1, 4), torch.zeros(1, 4, dtype=torch.int16))
    with pytest.raises(ValueError, match="at most 2\\^32"):
        digest(torch.zeros(1, 1).expand(1, 2**32 + 1))


@pytest.mark.gpu
@pytest.mark.large
def test_more_than_2_to_the_31_elements():
    weights = torch.zeros(3, 2**30, device=DEVICE)
    weights[-1] = torch.randn(2**30, device=DEVICE)
    assert torch.equal(digest(weights), digest_reference(weights, None, everyone(weights)))
