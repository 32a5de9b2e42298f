"""The claims every stacked operator makes, for the kernel tests: close to float64, batch-invariant, well registered."""

import warnings
from contextlib import contextmanager

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU, Triton's interpreter


@contextmanager
def nan_filled_memory():
    """Within it `torch.empty` is filled with NaN, so that an element a kernel forgets shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def normal(seed, *shape, dtype=torch.float32):
    """Standard normal numbers, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def differentiate(operator, inputs, upstream=None):
    """(outputs, gradients of the floating inputs) of `operator(*inputs)`, with fixed upstream gradients."""
    leaves = [x.detach().clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    outputs = operator(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if upstream is None:
        upstream = [normal(7, *y.shape, dtype=y.dtype) for y in outputs]
    floating = [x for x in leaves if x.is_floating_point()]
    gradients = torch.autograd.grad(outputs, floating, [g.to(y.dtype) for g, y in zip(upstream, outputs, strict=True)])
    return [y.detach() for y in outputs], list(gradients), upstream


def assert_close_to_float64(operator, reference, inputs, tolerance):
    """Outputs and gradients of the vmapped operator, within `tolerance` in relative norm of float64's."""
    with nan_filled_memory():
        outputs, gradients, upstream = differentiate(torch.func.vmap(operator), inputs)
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    true_outputs, true_gradients, _ = differentiate(torch.func.vmap(reference), wide, upstream)
    for got, true in zip(outputs + gradients, true_outputs + true_gradients, strict=True):
        error = (got.double() - true).norm() / true.norm().clamp(min=1e-30)
        assert error <= tolerance, f"relative error {error:.2e} of a tensor {tuple(got.shape)}"


def assert_well_registered(operator, *arguments):
    """Schema, autograd and fake tensors of a stacked operator."""
    arguments = [
        x.detach().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments
    ]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operator.call, tuple(arguments), test_utils=checks)


def assert_batch_invariant(operator, inputs):
    """Replica r's bits are those of a lone call, in R = 1, 2 and 5, in any slot, beside NaN and infinity.

    `inputs` lead with 5 replicas; outputs and gradients are compared bit for bit.
    """
    stacked = torch.func.vmap(operator)
    outputs, gradients, upstream = differentiate(stacked, inputs)
    five = outputs + gradients
    for replica in (0, 3):
        y, g, _ = differentiate(operator, [x[replica] for x in inputs], [u[replica] for u in upstream])
        assert all(torch.equal(alone, all_five[replica]) for alone, all_five in zip(y + g, five, strict=True))
    pair = [4, 1]
    y, g, _ = differentiate(stacked, [x[pair] for x in inputs], [u[pair] for u in upstream])
    assert all(torch.equal(two, all_five[pair]) for two, all_five in zip(y + g, five, strict=True))
    broken = [x.clone() for x in inputs]
    for x in broken:
        if x.is_floating_point():
            x[0], x[2] = float("nan"), float("inf")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the interpreter's numpy warns of NaN
        y, g, _ = differentiate(stacked, broken, upstream)
    healthy = [1, 3, 4]
    assert all(torch.equal(beside[healthy], all_five[healthy]) for beside, all_five in zip(y + g, five, strict=True))
