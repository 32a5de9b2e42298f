"""Linear cross-entropy: against float64, ignored targets, batch-invariant."""

import pytest
import torch
from stacked import DEVICE, assert_batch_invariant, assert_close_to_float64, assert_well_registered, normal

from kernels import loss
from kernels.loss import (
    IGNORED,
    cross_entropy_,
    linear_cross_entropy_op,
    linear_cross_entropy_reference,
    linear_cross_entropy_triton,
    logits_losses_reference,
    logits_losses_triton,
)
from kernels.matmul import stacked_matmul

pytestmark = pytest.mark.kernel


def make_inputs(R, N, D, V, dtype=torch.float32):
    generator = torch.Generator().manual_seed(4)
    targets = torch.randint(V, (R, N), generator=generator)
    targets[torch.rand(R, N, generator=generator) < 0.2] = IGNORED
    smoothing = torch.linspace(0, 0.3, R)
    x, weight = normal(0, R, N, D, dtype=dtype), normal(1, R, V, D, dtype=dtype)
    return [x, weight * (4 / D**0.5), targets.to(DEVICE), smoothing.to(DEVICE)]


def per_replica(function, softcap):
    """Of (x, weight, targets): smoothing is passed as whole thousandths, so that it has no gradient."""
    return lambda x, weight, targets, smoothing_thousandths: function(
        x, weight, targets, softcap, smoothing_thousandths.to(torch.float32) / 1000
    )


def inputs_of(*shape, dtype=torch.float32):
    x, weight, targets, smoothing = make_inputs(*shape, dtype=dtype)
    return [x, weight, targets, (smoothing * 1000).int()]


@pytest.fixture(params=[False, True], ids=["row in registers", "row in blocks"])
def row_in_blocks(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(loss, "IN_REGISTERS", 0)
        monkeypatch.setattr(loss, "BLOCK", 32)


@pytest.mark.parametrize("softcap", [0.0, 15.0])
@pytest.mark.parametrize("shape", [(3, 9, 16, 77), (1, 63, 8, 130), (1, 1, 16, 33), (2, 5, 16, 64)])
def test_matches_float64(row_in_blocks, softcap, shape):
    assert_close_to_float64(
        per_replica(linear_cross_entropy_triton, softcap),
        per_replica(linear_cross_entropy_reference, softcap),
        inputs_of(*shape),
        2e-6,  # fp32 logits and exponentials: 5e-7
    )


def test_losses_of_logits_match_and_are_batch_invariant(row_in_blocks):
    logits, targets = normal(3, 5, 9, 77), make_inputs(1, 9, 1, 77)[2][0]
    targets[4] = IGNORED
    found = logits_losses_triton(logits, targets)
    expected = logits_losses_reference(logits.double(), targets)
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=2e-6)
    assert (found[:, 4] == 0).all()
    for replica in range(5):
        alone = logits_losses_triton(logits[replica : replica + 1].contiguous(), targets)
        assert torch.equal(alone[0], found[replica])


def test_batch_invariant(row_in_blocks):
    assert_batch_invariant(per_replica(linear_cross_entropy_triton, 15.0), inputs_of(5, 9, 16, 77))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy warns of overflow and NaN
@pytest.mark.parametrize("softcap", [15.0, 60.0])
def test_the_cap_holds_the_largest_logits_and_hides_no_nan(row_in_blocks, softcap):
    logits = torch.tensor([[[3e38, -3e38, 1e3, -1e3, 0.0, 1e-40]]], device=DEVICE)
    targets, smoothing = torch.tensor([[1]], device=DEVICE), torch.tensor([0.1], device=DEVICE)
    capped = softcap * torch.tanh(logits[0].double() / softcap)
    wanted = torch.nn.functional.cross_entropy(capped, targets[0], label_smoothing=0.1)
    got = cross_entropy_(logits, targets, smoothing, softcap, True)
    torch.testing.assert_close(got.double(), wanted[None], rtol=1e-6, atol=0)
    assert logits.isfinite().all()
    assert not logits[0, 0, :4].any()  # where the cap is flat
    logits[0, 0, 2] = float("nan")
    assert cross_entropy_(logits, targets, smoothing, softcap, True).isnan().all() and logits.isnan().all()


@pytest.mark.parametrize("function", [linear_cross_entropy_triton, linear_cross_entropy_reference])
def test_no_supervised_target_is_zero_and_so_is_its_gradient(function):
    x, weight = (t.requires_grad_() for t in make_inputs(1, 6, 8, 40)[:2])
    targets = torch.full((6,), IGNORED, device=DEVICE)
    total = function(x[0], weight[0], targets, 15.0, torch.tensor(0.1, device=DEVICE))
    assert total == 0
    assert not any(g.any() for g in torch.autograd.grad(total, (x, weight)))


def test_the_gradient_of_a_sum_over_replicas_is_that_of_each():
    """Such a gradient is one number with a stride of 0."""
    x, weight, targets, smoothing = make_inputs(3, 9, 16, 77)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    loss_R = linear_cross_entropy_op(x, weight, targets, smoothing, 0.0, True)[0]
    summed = torch.autograd.grad(loss_R.sum(), (x, weight), retain_graph=True)
    each = torch.autograd.grad(loss_R, (x, weight), torch.ones_like(loss_R))
    assert all(torch.equal(one, other) for one, other in zip(summed, each, strict=True))


def test_operator_is_well_registered():
    x, weight, targets, smoothing = make_inputs(2, 5, 8, 40)
    for gradient in (True, False):
        assert_well_registered(linear_cross_entropy_op, x, weight, targets, smoothing, 15.0, gradient)


def test_without_gradients_the_loss_has_the_same_bits():
    x, weight, targets, smoothing = inputs_of(2, 5, 8, 40)
    stacked = torch.func.vmap(per_replica(linear_cross_entropy_triton, 0.0))
    with torch.no_grad():
        quiet = stacked(x, weight, targets, smoothing)
    assert torch.equal(quiet, stacked(x.requires_grad_(), weight, targets, smoothing).detach())


@pytest.mark.gpu
@pytest.mark.parametrize("softcap", [0.0, 15.0])
@pytest.mark.parametrize("shape", [(2, 1000, 256, 4096), (2, 127, 576, 49152), (1, 64, 64, 65535)])
def test_bf16_matches_float64(softcap, shape):
    # The logits are rounded to bf16 (2^-9 of values near 10), and so are their gradients.
    assert_close_to_float64(
        per_replica(linear_cross_entropy_triton, softcap),
        per_replica(linear_cross_entropy_reference, softcap),
        inputs_of(*shape, dtype=torch.bfloat16),
        2e-2,
    )


@pytest.mark.gpu
def test_bits_at_networks_shapes():
    inputs = inputs_of(5, 1024, 256, 4096, dtype=torch.bfloat16)
    assert_batch_invariant(per_replica(linear_cross_entropy_triton, 15.0), inputs)


@pytest.mark.gpu
def test_addresses_beyond_two_to_the_31():
    tokens, vocabulary = 8200, 131072  # of each of 3 replicas: 3.2e9 logits
    logits = torch.zeros(3, tokens, vocabulary, dtype=torch.bfloat16, device=DEVICE)
    logits[2, -1, -1] = 12.0
    targets = torch.full((3, tokens), vocabulary - 1, device=DEVICE)
    alone, targets_alone = logits[2:].clone(), targets[2:]
    smoothing = torch.zeros(3, device=DEVICE)
    loss_R = cross_entropy_(logits, targets, smoothing, 0.0, True)
    assert torch.equal(loss_R[2:], cross_entropy_(alone, targets_alone, smoothing[2:], 0.0, True))
    assert torch.equal(logits[2:], alone)
    uniform = tokens * torch.log(torch.tensor(float(vocabulary)))
    torch.testing.assert_close(loss_R[0].cpu(), uniform, rtol=1e-5, atol=0)


@pytest.mark.gpu
def test_loss_reads_the_stacked_products_logits():
    x, weight, targets, _ = inputs_of(2, 100, 64, 512, dtype=torch.bfloat16)
    logits = stacked_matmul(x, weight, "nt")
    rows = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    wanted = rows.view(2, 100).sum(1)
    got = cross_entropy_(logits, targets, torch.zeros(2, device=DEVICE), 0.0, False)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=0)
