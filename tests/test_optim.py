"""One suite for both optimizers over a stack: torch's own is the reference, inactive replicas do not move.

Letters: R replica, P flat parameters.
"""

from types import SimpleNamespace

import pytest
import torch

from engine import optim
from engine.stack import Stack

R, EPS, MOMENTUM = 3, 1e-8, 0.9
RATE = {"mlp": torch.tensor([1e-2, 3e-3, 0.1]), "embedding": torch.tensor([1e-3, 1e-2, 0.2])}
DECAY, BETA1, BETA2 = torch.tensor([0.0, 0.1, 0.5]), torch.tensor([0.9, 0.5, 0.0]), torch.tensor([0.95, 0.7, 0.999])


def filled(mixed: bool = False) -> Stack:
    """A stack of two parameters in different groups, whose weights are normal numbers."""
    network = SimpleNamespace(shapes={"a": (5, 7), "b": (9,)}, groups={"a": "mlp", "b": "embedding"})
    stack = Stack(network, R, torch.bfloat16 if mixed else torch.float32, torch.device("cpu"))
    for slot in range(R):
        generator = torch.Generator().manual_seed(slot)
        initial = {name: torch.randn(shape, generator=generator) for name, shape in network.shapes.items()}
        stack.load(slot, stack.flatten(initial, 1.0))
    return stack


def update(count: int, active=(True, True, True), scale=None) -> optim.Update:
    corrections = optim.corrections(BETA1, BETA2, torch.full((R,), count))
    broken_R = torch.zeros(R, dtype=torch.int32)
    return optim.Update(RATE, DECAY, BETA1, BETA2, *corrections, scale, torch.tensor(active), broken_R)


def gradients_of(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step + 1)
    return [torch.randn(R, 35, generator=generator), torch.randn(R, 9, generator=generator)]


def adamw(stack, state, gradients, update):
    for span, gradient in zip(stack.spans, gradients, strict=True):
        optim.adamw_update(stack, state, span, gradient, update, EPS)


def sgd(stack, state, gradients, update):
    for span, gradient in zip(stack.spans, gradients, strict=True):
        optim.sgd_update(stack, state, span, gradient, update, MOMENTUM)


BOTH = pytest.mark.parametrize(
    ("init", "step"), [(optim.adamw_init, adamw), (optim.sgd_init, sgd)], ids=["adamw", "sgd"]
)


def torch_optimizer(name: str, replica: int, weights: list[torch.Tensor]) -> torch.optim.Optimizer:
    groups = [
        {"params": [w], "lr": RATE[s.group][replica].item()} for w, s in zip(weights, filled().spans, strict=True)
    ]
    decay = DECAY[replica].item()
    if name == "adamw":
        betas = (BETA1[replica].item(), BETA2[replica].item())
        return torch.optim.AdamW(groups, betas=betas, eps=EPS, weight_decay=decay)
    return torch.optim.SGD(groups, momentum=MOMENTUM)


@BOTH
def test_ten_steps_equal_torchs_optimizer_on_each_replica(init, step):
    stack, name = filled(), step.__name__
    state = init(stack)
    lone = [[stack.master_RP[r, s.slice].clone() for s in stack.spans] for r in range(R)]
    theirs = [torch_optimizer(name, r, lone[r]) for r in range(R)]
    for count in range(10):
        gradients = gradients_of(count)
        step(stack, state, gradients, update(count + 1))
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


@BOTH
def test_an_inactive_replica_keeps_every_bit_whatever_its_gradient(init, step):
    stack = filled()
    state = init(stack)
    step(stack, state, gradients_of(0), update(1))
    before = [buffer.clone() for buffer in (stack.master_RP, *state)]
    gradients = gradients_of(1)
    gradients[0][1] = torch.nan
    changed = update(2, active=(True, False, True))
    step(stack, state, gradients, changed)
    for old, new in zip(before, (stack.master_RP, *state), strict=True):
        assert torch.equal(old[1], new[1])
        assert not torch.equal(old[0], new[0])
    assert changed.nonfinite_R.tolist() == [0, 0, 0]


@BOTH
def test_a_weight_that_breaks_is_reported_for_its_replica_only(init, step):
    stack = filled()
    gradients = gradients_of(0)
    gradients[1][2, 4] = torch.nan
    changed = update(1)
    step(stack, init(stack), gradients, changed)
    assert changed.nonfinite_R.tolist() == [0, 0, 1]
    assert torch.isfinite(stack.master_RP[:2]).all()


@BOTH
def test_the_clipping_factor_scales_the_gradient(init, step):
    scale = torch.tensor([1.0, 0.5, 0.25])
    scaled, plain = filled(), filled()
    step(scaled, init(scaled), gradients_of(0), update(1, scale=scale))
    step(plain, init(plain), [g * scale[:, None] for g in gradients_of(0)], update(1))
    assert torch.equal(scaled.master_RP, plain.master_RP)


@BOTH
def test_the_bf16_weight_follows_the_fp32_master(init, step):
    mixed, plain = filled(mixed=True), filled()
    for stack in (mixed, plain):
        step(stack, init(stack), gradients_of(0), update(1))
    assert torch.equal(mixed.master_RP, plain.master_RP)
    for span in mixed.spans:
        error = (mixed.weight_RP[:, span.slice].float() - mixed.master_RP[:, span.slice]).abs()
        # nearest bf16: half a step of 8 significant bits
        assert (error <= mixed.master_RP[:, span.slice].abs() * 2**-8).all()
