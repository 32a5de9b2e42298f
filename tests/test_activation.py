"""SwiGLU, squared ReLU and GELU behind a bias: against float64, NaN kept, batch-invariant."""

import pytest
import torch
from stacked import DEVICE, assert_batch_invariant, assert_close_to_float64, assert_well_registered, normal

from kernels.activation import (
    bias_gelu_backward_op,
    bias_gelu_op,
    bias_gelu_reference,
    bias_gelu_triton,
    relu2_backward_op,
    relu2_op,
    relu2_reference,
    relu2_triton,
    swiglu_backward_op,
    swiglu_op,
    swiglu_reference,
    swiglu_triton,
)

pytestmark = pytest.mark.kernel

FORMS = {
    "swiglu": (swiglu_triton, swiglu_reference),
    "relu2": (relu2_triton, relu2_reference),
    "bias_gelu": (bias_gelu_triton, bias_gelu_reference),
}


def inputs_of(form, seed, *shape, dtype=torch.float32):
    """x [R, ..., F] and, for GELU, a bias [R, F]."""
    bias = [normal(seed + 9, shape[0], shape[-1], dtype=dtype)] if form == "bias_gelu" else []
    return [normal(seed, *shape, dtype=dtype), *bias]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(2, 1, 1, 2), (2, 1, 63, 14), (1, 2, 3, 3000)])
def test_matches_float64(form, shape):
    assert_close_to_float64(*FORMS[form], inputs_of(form, 0, *shape), 1e-6)  # measured: 2e-7 at most


@pytest.mark.parametrize("form", FORMS)
def test_batch_invariant(form):
    assert_batch_invariant(FORMS[form][0], inputs_of(form, 1, 5, 2, 9, 12))


@pytest.mark.parametrize("form", FORMS)
def test_keeps_nan(form):
    x, *bias = inputs_of(form, 2, 3, 8)
    x[1, 2] = float("nan")
    operator, reference = FORMS[form]
    bias = [each[0] for each in bias]
    assert torch.equal(operator(x, *bias).isnan(), reference(x, *bias).isnan())


def test_operators_are_well_registered():
    wide, narrow = normal(3, 2, 3, 8), normal(4, 2, 3, 4)
    assert_well_registered(swiglu_op, wide)
    assert_well_registered(swiglu_backward_op, narrow, wide)
    assert_well_registered(relu2_op, wide)
    assert_well_registered(relu2_backward_op, wide, wide.clone())
    assert_well_registered(bias_gelu_op, wide, normal(5, 2, 8))
    assert_well_registered(bias_gelu_backward_op, wide, wide.clone(), normal(5, 2, 8))


def test_swiglu_refuses_an_odd_width_and_gelu_another_bias():
    with pytest.raises(ValueError, match="even number"):
        swiglu_triton(normal(0, 2, 5))
    with pytest.raises(ValueError, match=r"a bias \(4,\), expected \(5,\)"):
        bias_gelu_triton(normal(0, 2, 5), normal(1, 4))


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(3, 8, 128, 1024), (2, 8, 127, 3072), (1, 1, 1000, 6)])
def test_bf16_matches_float64(form, shape):
    # One rounding to bf16 of the output and one of each gradient, 2^-9 relative; the reference
    # rounds what relu2 squares, so twice that.
    inputs = inputs_of(form, 3, *shape, dtype=torch.bfloat16)
    assert_close_to_float64(*FORMS[form], inputs, 4e-3)
    assert_batch_invariant(FORMS[form][0], inputs_of(form, 3, 5, *shape[1:], dtype=torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.large
@pytest.mark.parametrize("form", ["swiglu", "relu2"])
def test_more_than_2_to_the_31_elements(form):
    x = torch.zeros(2**31 // 4096 + 3, 4096, dtype=torch.bfloat16, device=DEVICE)
    x[-1] = normal(4, 4096, dtype=torch.bfloat16)
    x.requires_grad_()
    y = FORMS[form][0](x)
    (dx,) = torch.autograd.grad(y, x, y.detach())
    last = x[-1].detach().requires_grad_()
    y_last = FORMS[form][0](last)
    (dx_last,) = torch.autograd.grad(y_last, last, y_last.detach())
    assert torch.equal(y[-1], y_last)
    assert torch.equal(dx[-1], dx_last)
