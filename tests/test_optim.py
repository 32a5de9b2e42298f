"""One suite for every optimizer over a stack: torch's own is the reference, inactive replicas do not move.

Letters: R replica, P flat parameters.
"""

from types import SimpleNamespace

import pytest
import torch

from engine.optim import OPTIMIZERS, Parameter, Step
from engine.stack import Stack

R, EPS, MOMENTUM = 3, 1e-8, 0.9
RATE = {"mlp": torch.tensor([1e-2, 3e-3, 0.1]), "embedding": torch.tensor([1e-3, 1e-2, 0.2])}
DECAY, BETA1, BETA2 = torch.tensor([0.0, 0.1, 0.5]), torch.tensor([0.9, 0.5, 0.0]), torch.tensor([0.95, 0.7, 0.999])
HYPER = {
    "weight_decay": DECAY,
    "beta1": BETA1,
    "beta2": BETA2,
    "eps": torch.full((R,), EPS),
    "momentum": torch.full((R,), MOMENTUM),
}


def filled(mixed: bool = False) -> Stack:
    """A stack of two parameters in different groups, whose weights are normal numbers."""
    groups = {"a": ("mlp",), "b": ("embedding",)}
    network = SimpleNamespace(shapes={"a": (5, 7), "b": (9,)}, groups=groups, fused={})
    stack = Stack(network, R, torch.bfloat16 if mixed else torch.float32, torch.device("cpu"))
    for slot in range(R):
        generator = torch.Generator().manual_seed(slot)
        initial = {name: torch.randn(shape, generator=generator) for name, shape in network.shapes.items()}
        stack.load(slot, stack.flatten(initial, 1.0))
    return stack


def init(name: str, stack: Stack) -> list[dict[str, torch.Tensor]]:
    """State buffers of both parameters."""
    return [{n: torch.zeros(R, size) for n, size in OPTIMIZERS[name].init(s.shape).items()} for s in stack.spans]


def gradients_of(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step + 1)
    return [torch.randn(R, 35, generator=generator), torch.randn(R, 9, generator=generator)]


def step(name: str, stack: Stack, state, gradients, count: int, active=(True, True, True), scale=None) -> torch.Tensor:
    """One step of an optimizer; which replicas have a weight that is not finite, int32 [R]."""
    optimizer, nonfinite_R = OPTIMIZERS[name], torch.zeros(R, dtype=torch.int32)
    for span, gradient, own in zip(stack.spans, gradients, state, strict=True):
        hyper_R = {n: RATE[span.group] if n == "lr" else HYPER[n] for n in optimizer.hyper}
        prepared = optimizer.prepare(hyper_R, torch.full((R,), count))
        remainder = None if stack.remainder_RP is None else stack.remainder_RP[:, span.slice]
        parameter = Parameter(span.name, span.shape, span.rows, stack.weight_RP[:, span.slice], remainder)
        optimizer.update(parameter, gradient, own, Step(hyper_R, prepared, scale, torch.tensor(active), nonfinite_R))
    return nonfinite_R


def torch_optimizer(name: str, replica: int, weights: list[torch.Tensor]) -> torch.optim.Optimizer:
    groups = [
        {"params": [w], "lr": RATE[s.group][replica].item()} for w, s in zip(weights, filled().spans, strict=True)
    ]
    if name == "adamw":
        betas = (BETA1[replica].item(), BETA2[replica].item())
        return torch.optim.AdamW(groups, betas=betas, eps=EPS, weight_decay=DECAY[replica].item())
    assert name == "sgd", "a new optimizer brings its reference"
    return torch.optim.SGD(groups, momentum=MOMENTUM)


def buffers(stack: Stack, state) -> list[torch.Tensor]:
    return [stack.master_RP, *(buffer for own in state for buffer in own.values())]


EVERY = pytest.mark.parametrize("name", OPTIMIZERS)


@EVERY
def test_ten_steps_equal_torchs_optimizer_on_each_replica(name):
    stack = filled()
    state = init(name, stack)
    lone = [[stack.master_RP[r, s.slice].clone() for s in stack.spans] for r in range(R)]
    theirs = [torch_optimizer(name, r, lone[r]) for r in range(R)]
    for count in range(10):
        gradients = gradients_of(count)
        step(name, stack, state, gradients, count + 1)
        for r in range(R):
            for weight, gradient, span in zip(lone[r], gradients, stack.spans, strict=True):
                if name == "sgd":  # torch's SGD couples the decay with the gradient; ours is decoupled
                    weight.mul_(1 - RATE[span.group][r] * DECAY[r])
                weight.grad = gradient[r].clone()
            theirs[r].step()
    for r in range(R):
        for weight, span in zip(lone[r], stack.spans, strict=True):
            # the same formula in fp32, rounded in another order: a few ulps over ten steps
            torch.testing.assert_close(stack.master_RP[r, span.slice], weight, rtol=1e-5, atol=1e-6)


@EVERY
def test_an_inactive_replica_keeps_every_bit_whatever_its_gradient(name):
    stack = filled()
    state = init(name, stack)
    step(name, stack, state, gradients_of(0), 1)
    before = [buffer.clone() for buffer in buffers(stack, state)]
    gradients = gradients_of(1)
    gradients[0][1] = torch.nan
    nonfinite_R = step(name, stack, state, gradients, 2, active=(True, False, True))
    for old, new in zip(before, buffers(stack, state), strict=True):
        assert torch.equal(old[1], new[1])
        assert not torch.equal(old[0], new[0])
    assert nonfinite_R.tolist() == [0, 0, 0]


@EVERY
def test_a_weight_that_breaks_is_reported_for_its_replica_only(name):
    stack = filled()
    gradients = gradients_of(0)
    gradients[1][2, 4] = torch.nan
    assert step(name, stack, init(name, stack), gradients, 1).tolist() == [0, 0, 1]
    assert torch.isfinite(stack.master_RP[:2]).all()


@EVERY
def test_the_clipping_factor_scales_the_gradient(name):
    scale = torch.tensor([1.0, 0.5, 0.25])
    scaled, plain = filled(), filled()
    step(name, scaled, init(name, scaled), gradients_of(0), 1, scale=scale)
    step(name, plain, init(name, plain), [g * scale[:, None] for g in gradients_of(0)], 1)
    assert torch.equal(scaled.master_RP, plain.master_RP)


@EVERY
def test_the_bf16_weight_follows_the_fp32_master(name):
    mixed, plain = filled(mixed=True), filled()
    for stack in (mixed, plain):
        step(name, stack, init(name, stack), gradients_of(0), 1)
    assert torch.equal(mixed.master_RP, plain.master_RP)
    for span in mixed.spans:
        error = (mixed.weight_RP[:, span.slice].float() - mixed.master_RP[:, span.slice]).abs()
        # nearest bf16: half a step of 8 significant bits
        assert (error <= mixed.master_RP[:, span.slice].abs() * 2**-8).all()


def test_fused_matrices_are_views_of_their_own_rows():
    flat = torch.arange(2.0 * 6 * 5).view(2, 30)
    parameter = Parameter("qkv", (6, 5), ((0, 3), (3, 4), (4, 6)), flat, None)
    matrices = parameter.matrices(flat)
    assert [tuple(m.shape) for m in matrices] == [(2, 3, 5), (2, 1, 5), (2, 2, 5)]
    matrices[1].zero_()
    assert (flat.view(2, 6, 5)[:, 3] == 0).all() and (flat.view(2, 6, 5)[:, 4] != 0).all()


@EVERY
def test_state_bytes_are_those_of_the_buffers(name):
    stack = filled()
    for span, own in zip(stack.spans, init(name, stack), strict=True):
        assert OPTIMIZERS[name].state_bytes(span.shape) == sum(buffer[0].nbytes for buffer in own.values())
