"""RMS norm with and without residual and weight, and layer norm: against float64, batch-invariant."""

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

from kernels.norm import (
    _norm_backward_kernel,
    _norm_forward_kernel,
    add_layer_norm_reference,
    add_layer_norm_triton,
    add_norm_op,
    add_rms_norm_reference,
    add_rms_norm_triton,
    layer_norm_reference,
    layer_norm_triton,
    norm_backward_op,
    norm_op,
    rms_norm_reference,
    rms_norm_triton,
)

pytestmark = pytest.mark.kernel

FORMS = {
    "plain": (rms_norm_triton, rms_norm_reference, 1, 0),
    "weight": (rms_norm_triton, rms_norm_reference, 1, 1),
    "residual": (add_rms_norm_triton, add_rms_norm_reference, 2, 0),
    "residual and weight": (add_rms_norm_triton, add_rms_norm_reference, 2, 1),
    "layer norm": (layer_norm_triton, layer_norm_reference, 1, 2),
    "residual and layer norm": (add_layer_norm_triton, add_layer_norm_reference, 2, 2),
}


def make_inputs(tensors, vectors, shape, dtype=torch.float32):
    """Tensors [R, ..., D] of a mean that is not zero, and vectors [R, D]."""
    R, D = shape[0], shape[-1]
    found = [0.5 + normal(i, *shape, dtype=dtype) for i in range(tensors)]
    return found + [normal(9 + i, R, D, dtype=dtype) for i in range(vectors)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(2, 1, 1, 48), (2, 1, 63, 7), (1, 2, 50, 256)])
def test_matches_float64(form, shape):
    operator, reference, tensors, vectors = FORMS[form]
    assert_close_to_float64(operator, reference, make_inputs(tensors, vectors, shape), 1e-6)  # measured: 2e-7


@pytest.mark.parametrize("form", FORMS)
def test_batch_invariant(form):
    operator, _, tensors, vectors = FORMS[form]
    assert_batch_invariant(operator, make_inputs(tensors, vectors, (5, 1, 40, 24)))


def test_a_total_that_goes_nowhere_has_no_gradient_to_add():
    x, residual = normal(0, 6, 16).requires_grad_(), normal(1, 6, 16)
    upstream = normal(2, 6, 16)
    (used,) = torch.autograd.grad(add_rms_norm_triton(x, residual)[0], x, upstream)
    (expected,) = torch.autograd.grad(add_rms_norm_reference(x, residual)[0], x, upstream)
    torch.testing.assert_close(used, expected)
    (straight,) = torch.autograd.grad(add_rms_norm_triton(x, residual)[1], x, upstream)
    assert torch.equal(straight, upstream)


def test_weights_are_read_from_one_flat_buffer():
    """The stack's parameters are views [R, D] of one [R, P] buffer."""
    flat_RP, x = normal(3, 3, 100), normal(4, 3, 5, 16)
    view_RD = flat_RP[:, 40:56]
    stacked = torch.func.vmap(rms_norm_triton)
    assert torch.equal(stacked(x, view_RD), stacked(x, view_RD.contiguous()))


def test_a_shared_weight_gathers_every_replicas_gradient():
    x, weight = normal(5, 3, 4, 16), normal(6, 16).requires_grad_()
    upstream = normal(7, 3, 4, 16)
    results = [torch.func.vmap(f, in_dims=(0, None))(x, weight) for f in (rms_norm_triton, rms_norm_reference)]
    used, expected = (torch.autograd.grad(y, weight, upstream)[0] for y in results)
    torch.testing.assert_close(used, expected)


def test_operators_are_well_registered():
    x, weight = normal(0, 2, 3, 8), normal(1, 2, 8)
    for scale, bias in ((weight, None), (None, None), (weight, normal(3, 2, 8))):
        assert_well_registered(norm_op, x, scale, bias, 1e-6)
        assert_well_registered(add_norm_op, x, normal(2, 2, 3, 8), scale, bias, 1e-6)
        assert_well_registered(norm_backward_op, x, None, normal(2, 2, 3, 8), scale, bias is not None, 1e-6)


def test_refuses_a_weight_or_bias_of_another_width():
    with pytest.raises(ValueError, match=r"a weight \(3,\), expected \(4,\)"):
        rms_norm_triton(normal(0, 2, 4), normal(0, 3))
    with pytest.raises(ValueError, match=r"a bias \(3,\), expected \(4,\)"):
        layer_norm_triton(normal(0, 2, 4), normal(0, 4), normal(0, 3))


def test_layer_norm_is_torchs():
    x, weight, bias = normal(0, 3, 40), normal(1, 40), normal(2, 40)
    torch.testing.assert_close(
        layer_norm_triton(x, weight, bias, 1e-5), torch.nn.functional.layer_norm(x, (40,), weight, bias, 1e-5)
    )


def test_rows_of_one_replica_beyond_2_to_the_31_elements():
    """5 rows 2^29 elements apart, of which the kernels get the first 16; the rest of the 2 GiB stays untouched."""
    D, row = 2**29, torch.arange(16, device=DEVICE)
    x = torch.empty(4 * D + 16, dtype=torch.int8, device=DEVICE)
    x[4 * D :] = row
    shape = {"N": 5, "D": D, "ROWS": 8, "WIDTH": 16}
    _norm_forward_kernel[(1,)](x, None, None, 0, None, 0, x, None, 0.25, **shape)
    # over sqrt(0.25), the mean over D being next to nothing; the cast to int8 may cut up to 1
    assert (x[4 * D :] - 2 * row).abs().max() <= 1
    _norm_backward_kernel[(1,)](x, None, x, None, 0, x, None, 0.25, CENTRED=False, BLOCK_ROWS=8, **shape)
    assert (x[4 * D :] - 4 * row).abs().max() <= 3


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "shape", [(3, 8, 128, 256), (2, 8, 127, 576), (2, 8, 128, 768), (2, 1, 1000, 1280), (1, 1, 63, 8192)]
)
def test_bf16_matches_float64_and_is_batch_invariant(form, shape):
    operator, reference, tensors, vectors = FORMS[form]
    # bf16: the output, the sum and the gradients are each rounded once or twice, 2^-9 relative.
    assert_close_to_float64(operator, reference, make_inputs(tensors, vectors, shape, torch.bfloat16), 6e-3)
    assert_batch_invariant(operator, make_inputs(tensors, vectors, (5, *shape[1:]), torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.large
def test_more_than_2_to_the_31_elements():
    N, D = 4096, 4096
    R = 2**31 // (N * D) + 1
    x = torch.zeros(R, N, D, dtype=torch.bfloat16, device=DEVICE)
    weight = torch.ones(R, D, dtype=torch.bfloat16, device=DEVICE)
    x[-1], weight[-1] = normal(0, N, D, dtype=torch.bfloat16), normal(1, D, dtype=torch.bfloat16)
    upstream = x.clone()
    y, g, _ = differentiate(torch.func.vmap(rms_norm_triton), [x, weight], [upstream])
    lone_y, lone_g, _ = differentiate(rms_norm_triton, [x[-1], weight[-1]], [upstream[-1]])
    assert all(torch.equal(a[-1], b) for a, b in zip(y + g, lone_y + lone_g, strict=True))
