"""Scaled sums, of a whole replica and of its rows: against float64, batch-invariant."""

import pytest
import torch
from stacked import DEVICE, assert_batch_invariant, assert_close_to_float64, assert_well_registered, normal

from kernels.scaled_sum import (
    TILE,
    scaled_sum_backward_op,
    scaled_sum_op,
    scaled_sum_reference,
    scaled_sum_triton,
)

pytestmark = pytest.mark.kernel

# which of a and of z with b there are
FORMS = {"a x + b z": (True, True), "x + b z": (False, True), "a x": (True, False)}
# of one replica's x, and how many of its leading dimensions a scale has
SHAPES = [((), (7,)), ((), (3, TILE)), ((9,), (70,)), ((5, 3), (16,)), ((2, 63), ()), ((2, 5), (2, 3, 5))]


def form_of(form, function):
    """The scaled sum as a function of just the tensors it has."""
    first, second = FORMS[form]

    def call(x, *rest):
        rest = list(rest)
        a = rest.pop(0) if first else None
        return function(x, a, *(rest if second else ()))

    return call


def inputs_of(form, scales, behind, replicas=2, dtype=torch.float32):
    first, second = FORMS[form]
    term, scale = (replicas, *scales, *behind), (replicas, *scales)
    made = [normal(0, *term, dtype=dtype)] + [normal(1, *scale, dtype=dtype)] * first
    return made + [normal(2, *term, dtype=dtype), normal(3, *scale, dtype=dtype)] * second


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("scales", "behind"), SHAPES)
def test_matches_float64(form, scales, behind):
    calls = (form_of(form, function) for function in (scaled_sum_triton, scaled_sum_reference))
    assert_close_to_float64(*calls, inputs_of(form, scales, behind), 2e-6)  # measured: 5e-7 at most


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("scales", "behind"), [((), (2, TILE)), ((9, 2), (12,))])
def test_batch_invariant(form, scales, behind):
    assert_batch_invariant(form_of(form, scaled_sum_triton), inputs_of(form, scales, behind, replicas=5))


def test_operators_are_well_registered():
    x, z, a, b = normal(0, 2, 3, 8), normal(1, 2, 3, 8), normal(2, 2, 3), normal(3, 2, 3)
    for more in ((a, z, b), (None, z, b), (a, None, None)):
        assert_well_registered(scaled_sum_op, x, *more)
        assert_well_registered(scaled_sum_backward_op, z.clone(), None if more[0] is None else x, *more)


def test_refuses_terms_and_scales_that_do_not_fit():
    x, scale = normal(0, 4, 8), normal(1, 4)
    for arguments in ((x, scale, x[:3], scale), (x, normal(1, 8)), (x, scale, x, scale[0]), (x, scale, x)):
        with pytest.raises(ValueError, match="expected terms of one shape and a scale for each"):
            scaled_sum_triton(*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("scales", "behind"), [((), (1024, 768)), ((1016,), (768,)), ((1024, 6), (128,)), ((), (5,))])
def test_bf16_matches_float64_and_is_batch_invariant(form, scales, behind):
    inputs = inputs_of(form, scales, behind, replicas=5, dtype=torch.bfloat16)
    calls = [form_of(form, function) for function in (scaled_sum_triton, scaled_sum_reference)]
    # one rounding to bf16 of the sum and of each gradient, 2^-9 relative; a dot product of random signs loses a digit
    assert_close_to_float64(*calls, inputs, 4e-3)
    assert_batch_invariant(calls[0], inputs)


@pytest.mark.gpu
@pytest.mark.large
def test_more_than_2_to_the_31_elements():
    shape = (2**31 // 2**20 + 3, 2**20)
    x = torch.zeros(shape, dtype=torch.bfloat16, device=DEVICE)
    x[-1] = normal(0, shape[1], dtype=torch.bfloat16)
    a = torch.full(shape[:1], 3.0, dtype=torch.bfloat16, device=DEVICE)
    y = torch.func.vmap(scaled_sum_triton)(x, a)
    assert torch.equal(y[-1], scaled_sum_triton(x[-1], a[-1]))
