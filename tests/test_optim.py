"""One suite for every optimizer over a stack: the reference is its formula, written out; inactive replicas stay.

Letters: R replica, P flat parameters.
"""

from types import SimpleNamespace

import pytest
import torch

from engine.optim import OPTIMIZERS, Parameter, Step
from engine.stack import Stack

R, EPS, MOMENTUM = 3, 1e-8, 0.9
RATE = {"mlp": torch.tensor([1e-2, 3e-3, 0.1]), "attention": torch.tensor([1e-3, 1e-2, 0.2])}
DECAY, BETA1, BETA2 = torch.tensor([0.0, 0.1, 0.5]), torch.tensor([0.9, 0.5, 0.0]), torch.tensor([0.95, 0.7, 0.999])
MUON_MOMENTUM, MUON_START, WARMUP = torch.tensor([0.95, 0.8, 0.0]), 0.85, torch.tensor([0.0, 8.0, 300.0])
HYPER = {
    "weight_decay": DECAY,
    "beta1": BETA1,
    "beta2": BETA2,
    "eps": torch.full((R,), EPS),
    "momentum": torch.full((R,), MOMENTUM),
    "muon_momentum": MUON_MOMENTUM,
    "muon_momentum_start": torch.full((R,), MUON_START),
    "muon_momentum_warmup": WARMUP,
    "normuon_beta2": torch.tensor([0.9, 0.5, 0.99]),
}


def shapes_of(scale: int) -> tuple[dict, dict]:
    """Shapes of two parameters, a wide matrix and three fused ones, a tall one and two wide ones; the fused rows."""
    fused = ((0, 6 * scale), (6 * scale, 9 * scale), (9 * scale, 12 * scale))
    return {"a": (5 * scale, 7 * scale), "b": (12 * scale, 4 * scale)}, {"b": fused}


def filled(mixed: bool = False, scale: int = 1) -> Stack:
    """A stack of two parameters in different groups, whose weights are normal numbers."""
    shapes, fused = shapes_of(scale)
    network = SimpleNamespace(shapes=shapes, groups={"a": ("mlp",), "b": ("attention",)}, fused=fused)
    stack = Stack(network, R, torch.bfloat16 if mixed else torch.float32, torch.device("cpu"))
    for slot in range(R):
        generator = torch.Generator().manual_seed(slot)
        initial = {name: torch.randn(shape, generator=generator) for name, shape in network.shapes.items()}
        stack.load(slot, stack.flatten(initial, 1.0))
    return stack


def init(name: str, stack: Stack) -> list[dict[str, torch.Tensor]]:
    """State buffers of both parameters."""
    optimizer = OPTIMIZERS[name]
    return [{n: torch.zeros(R, size) for n, size in optimizer.init(s.shape, s.rows).items()} for s in stack.spans]


def gradients_of(step: int, scale: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step + 1)
    return [torch.randn(R, size * scale**2, generator=generator) for size in (35, 48)]


def step(name, stack, state, gradients, count, active=(True, True, True), scale=None, rates=RATE) -> torch.Tensor:
    """One step of an optimizer; which replicas have a weight that is not finite, int32 [R]."""
    optimizer, nonfinite_R = OPTIMIZERS[name], torch.zeros(R, dtype=torch.int32)
    for span, gradient, own in zip(stack.spans, gradients, state, strict=True):
        hyper_R = {n: rates[span.group] if n == "lr" else HYPER[n] for n in optimizer.hyper}
        prepared = optimizer.prepare(hyper_R, torch.full((R,), count))
        remainder = None if stack.remainder_RP is None else stack.remainder_RP[:, span.slice]
        weight = stack.weight_RP[:, span.slice]
        parameter = Parameter(span.name, span.shape, span.rows, weight, remainder, gradient, own)
        optimizer.update([parameter], Step(hyper_R, prepared, scale, torch.tensor(active), nonfinite_R))
    return nonfinite_R


class Lion:
    """Chen et al. 2023, algorithm 2, of one replica."""

    def __init__(self, weights, rates, replica: int, iteration: torch.dtype, scale: int) -> None:
        self.weights, self.rates, self.momenta = weights, rates, [torch.zeros_like(w) for w in weights]
        self.beta1, self.beta2, self.decay = BETA1[replica], BETA2[replica], DECAY[replica]

    def step(self) -> None:
        for p, m, lr in zip(self.weights, self.momenta, self.rates, strict=True):
            c = self.beta1 * m + (1 - self.beta1) * p.grad
            p.copy_(p - lr * (c.sign() + self.decay * p))
            m.copy_(self.beta2 * m + (1 - self.beta2) * p.grad)


class Muon:
    """nanochat's Muon of October 2025 of one replica, matrix by matrix; with weight decay as torch.optim.Muon's."""

    def __init__(self, weights, rates, replica: int, iteration: torch.dtype, scale: int) -> None:
        self.replica, self.rates, self.iteration, self.count = replica, rates, iteration, 0
        self.parts = []  # weight, its place, first and last row
        shapes, fused = shapes_of(scale)
        for place, (name, shape) in enumerate(shapes.items()):
            for first, last in fused.get(name, ((0, shape[0]),)):
                self.parts.append((weights[place], place, shape, first, last))
        self.state = [{} for _ in self.parts]

    def step(self) -> None:
        frac = min(self.count / WARMUP[self.replica].item(), 1) if WARMUP[self.replica] else 1
        mu = (1 - frac) * MUON_START + frac * MUON_MOMENTUM[self.replica].item()
        self.count += 1
        for (weight, place, shape, first, last), state in zip(self.parts, self.state, strict=True):
            p, g = (each.view(shape)[first:last] for each in (weight, weight.grad.clone()))
            buffer = state.setdefault("momentum", torch.zeros_like(p))
            buffer.lerp_(g, 1 - mu)
            g.lerp_(buffer, mu)
            lr = self.rates[place] * max(1, p.size(0) / p.size(1)) ** 0.5
            self.move(p, g, state, lr, self.rates[place])

    def move(self, p, g, state, lr, base_lr) -> None:
        x = g.to(self.iteration)
        if g.size(0) > g.size(1):
            x = x.mT
        x = x / (x.norm() + 1e-7)
        for _ in range(5):
            gram = x @ x.mT
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        if g.size(0) > g.size(1):
            x = x.mT
        p.mul_(1 - base_lr * DECAY[self.replica])
        p.sub_(lr * x.float())


class NorMuon(Muon):
    """nanochat's Muon of July 2026."""

    coefficients = (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    )

    def move(self, p, g, state, lr, base_lr) -> None:
        x = g.to(self.iteration)
        target = x.float().norm() / x.size(0) ** 0.5
        x = x * (target / x.float().norm(dim=-1, keepdim=True).clamp_min(1e-6)).to(x.dtype)
        x = x / (x.norm() * 1.01 + 1e-6)
        for a, b, c in self.coefficients:
            if g.size(0) > g.size(1):
                gram = x.mT @ x
                x = a * x + x @ (b * gram + c * (gram @ gram))
            else:
                gram = x @ x.mT
                x = a * x + (b * gram + c * (gram @ gram)) @ x
        g = x.float()
        g = g * (min(g.shape) ** 0.5 / g.norm().clamp_min(1e-6))
        dim = -1 if g.size(0) >= g.size(1) else -2
        beta2 = HYPER["normuon_beta2"][self.replica]
        mean = g.square().mean(dim=dim, keepdim=True)
        norm = (mean.sum() * g.size(dim)).sqrt()
        second = state.setdefault("second", torch.zeros_like(mean))
        second.lerp_(mean, 1 - beta2)
        size = second.clamp_min(1e-10).rsqrt()
        new_norm = (mean * g.size(dim) * size.square()).sum().sqrt()
        g = g * (size * (norm / new_norm.clamp_min(1e-10)))
        mask = (g * p) >= 0
        p.sub_(lr * g + lr * DECAY[self.replica] * p * mask)


class AdamW(torch.optim.AdamW):
    """torch's own."""

    def __init__(self, weights, rates, replica: int, iteration: torch.dtype, scale: int) -> None:
        groups = [{"params": [w], "lr": rate.item()} for w, rate in zip(weights, rates, strict=True)]
        betas = (BETA1[replica].item(), BETA2[replica].item())
        super().__init__(groups, betas=betas, eps=EPS, weight_decay=DECAY[replica].item())


class SGD(torch.optim.SGD):
    """torch's own, but for the decay: torch couples it with the gradient, ours is decoupled."""

    def __init__(self, weights, rates, replica: int, iteration: torch.dtype, scale: int) -> None:
        super().__init__([{"params": [w], "lr": rate.item()} for w, rate in zip(weights, rates, strict=True)])
        self.decay = DECAY[replica].item()
        for group in self.param_groups:
            group["momentum"] = MOMENTUM

    def step(self) -> None:
        for group in self.param_groups:
            group["params"][0].data.mul_(1 - group["lr"] * self.decay)
        super().step()


FORMULAS = {"adamw": AdamW, "sgd": SGD, "lion": Lion, "muon": Muon, "normuon": NorMuon}


def distance_to_formula(name: str, rates: dict[str, torch.Tensor], mixed: bool, scale: int) -> float:
    """The largest relative distance of a replica's weights from the formula's, after 20 steps."""
    stack = filled(mixed, scale)
    state = init(name, stack)
    lone = [[stack.masters(r, s.slice).clone() for s in stack.spans] for r in range(R)]
    dtype = torch.bfloat16 if mixed else torch.float32
    own = [[rates[s.group][r] for s in stack.spans] for r in range(R)]
    theirs = [FORMULAS[name](lone[r], own[r], r, dtype, scale) for r in range(R)]
    for count in range(20):
        gradients = gradients_of(count, scale)
        step(name, stack, state, gradients, count + 1, rates=rates)
        for r in range(R):
            for weight, gradient in zip(lone[r], gradients, strict=True):
                weight.grad = gradient[r].clone()
            theirs[r].step()
    pairs = [(stack.masters(r, s.slice), w) for r in range(R) for w, s in zip(lone[r], stack.spans, strict=True)]
    return max(((ours - w).norm() / w.norm()).item() for ours, w in pairs)


def buffers(stack: Stack, state) -> list[torch.Tensor]:
    return [stack.master_RP, *(buffer for own in state for buffer in own.values())]


EVERY = pytest.mark.parametrize("name", OPTIMIZERS)


@EVERY
def test_twenty_steps_equal_the_formula_on_each_replica(name):
    # the same formula in fp32, rounded in another order: a few ulps over twenty steps
    assert distance_to_formula(name, RATE, mixed=False, scale=1) < 1e-6


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if OPTIMIZERS[name].matrices_only])
def test_twenty_steps_with_an_iteration_in_bf16_equal_the_formula_in_bf16(name):
    # 8 significant bits through five steps that do not contract: each update is off by some percent of itself, and
    # at nanochat's rate of 0.02 an update is some percent of these weights
    rates = {group: torch.full((R,), 0.02) for group in RATE}
    assert distance_to_formula(name, rates, mixed=True, scale=8) < 3e-3


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


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if not OPTIMIZERS[name].matrices_only])
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
    parameter = Parameter("qkv", (6, 5), ((0, 3), (3, 4), (4, 6)), flat, None, flat, {})
    matrices = parameter.matrices(flat)
    assert [tuple(m.shape) for m in matrices] == [(2, 3, 5), (2, 1, 5), (2, 2, 5)]
    matrices[1].zero_()
    assert (flat.view(2, 6, 5)[:, 3] == 0).all() and (flat.view(2, 6, 5)[:, 4] != 0).all()


@EVERY
def test_state_bytes_are_those_of_the_buffers(name):
    stack = filled()
    for span, own in zip(stack.spans, init(name, stack), strict=True):
        assert OPTIMIZERS[name].state_bytes(span.shape, span.rows) == sum(buffer[0].nbytes for buffer in own.values())
