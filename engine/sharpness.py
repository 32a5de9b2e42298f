"""Critical sharpness: 2 over the rate at which the optimizer's next update begins to raise its own batch's loss.

Gradient descent on a quadratic of curvature lambda becomes unstable at the rate 2 / lambda; along any other update, and
in any other landscape, the rate at which the loss stops falling takes that place (arXiv:2601.16979). Beside it stands
the rate of training: adaptive methods hover at their own edge (Cohen et al. 2022, arXiv:2207.14484).

Letters: P flat parameters, of the one replica that is looked at.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.data import IGNORED
from engine.optim import OPTIMIZERS, Step
from engine.stack import parameter_of
from kernels.gradient_norm import global_norm
from kernels.split_master import join_master, round_to_weight, split_master

if TYPE_CHECKING:
    from engine.step import Trainer

FACTOR = 4.0  # first stretch of the bracket; each further one is the square of the last
WITHIN = 1.02  # upper end of the bracket over the lower, at last: their mean is within 1%
FARTHEST = 1e12  # from where the search starts, either way
UNIT = 2.0**20  # rate of the update that shows the direction: the weights' own rounding vanishes beside it


def first_rise(loss: Callable[[float], float], start: float) -> float:
    """The rate at which loss(rate) begins to exceed loss(0), within 1%, by bracketing from `start` in some ten calls.

    0 where it does at any rate, infinity where it does at none. A loss that is not finite exceeds.
    """
    at_zero = loss(0.0)

    def rises(rate: float) -> bool:
        return not loss(rate) <= at_zero

    low = high = start
    down, factor = rises(start), FACTOR
    while max(start / low, high / start) <= FARTHEST:
        low, high = (low / factor, low) if down else (high, high * factor)
        if rises(low if down else high) != down:
            break
        factor *= factor
    else:
        return 0.0 if down else math.inf
    while high / low > WITHIN:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if rises(middle) else (middle, high)
    return math.sqrt(low * high)


def critical_sharpness(trainer: "Trainer", slot: int) -> float:
    """2 over the critical rate of a slot's next update, its groups' peak rates in their proportions, the largest named.

    The batch is the first micro-batch of the slot's next batch; its gradient goes through clipping and the optimizer's
    state, neither of which is changed.
    """
    loss, start = along_the_update(trainer, slot)
    rate = first_rise(loss, start) if start > 0 else math.inf
    return 2 / rate if rate > 0 else math.inf


def along_the_update(trainer: "Trainer", slot: int) -> tuple[Callable[[float], float], float]:
    """(rate -> loss of the slot's next micro-batch at the weights less rate times the next update's, peak rate)."""
    stack, own = trainer.stack, slice(slot, slot + 1)
    tokens_1BT, targets_1BT, _ = (each[own] for each in trainer.gather())
    hyper_R = dict(zip(trainer.names, trainer.hyper.float(), strict=True))
    forward_1 = {name: hyper_R[name][own] for name in trainer.probe.hyper_R}
    frozen = stack.frozen(stack.frozen_RF if stack.shares_frozen else stack.frozen_RF[own])
    count = (targets_1BT != IGNORED).sum().clamp(min=1)
    key_13 = trainer.keys()[own]

    def mean_loss(weight_1P: Tensor) -> Tensor:
        weights = stack.views(weight_1P, stack.spans)
        return stack.losses(weights, frozen, tokens_1BT, targets_1BT, forward_1, key_13)[0] / count

    weight_1P = stack.weight_RP[own].detach().clone().requires_grad_()
    (gradient_1P,) = torch.autograd.grad(mean_loss(weight_1P), weight_1P)
    master_1P = stack.masters(own, slice(None)).detach().clone()
    delta_1P, peak = direction_of(trainer, own, master_1P, gradient_1P, hyper_R)

    @torch.no_grad()
    def loss(rate: float) -> float:
        return float(mean_loss(round_to_weight(master_1P - rate * delta_1P, stack.weight_RP.dtype)))

    return loss, peak


@torch.no_grad()
def direction_of(
    trainer: "Trainer", own: slice, master_1P: Tensor, gradient_1P: Tensor, hyper_R: dict[str, Tensor]
) -> tuple[Tensor, float]:
    """(what one update at rate 1 takes off the weights [1, P], the largest peak rate of the groups)."""
    stack, spans = trainer.stack, trainer.stack.spans
    active_1 = torch.ones(1, dtype=torch.bool, device=trainer.device)
    scale_1 = None
    if trainer.clips:
        norm_1 = global_norm([gradient_1P[:, span.slice] for span in spans])
        scale_1 = (hyper_R["clip"][own] / norm_1).clamp(max=1.0)
    peaks = {span.group: hyper_R[trainer.run_of.source("lr", span.group)][own] for span in spans}
    largest = max(float(peak_1) for peak_1 in peaks.values())
    if stack.remainder_RP is None:
        weight_1P, remainder_1P = master_1P.clone(), None
    else:
        weight_1P, remainder_1P = split_master(master_1P)
    for group, step in trainer.steps_of_groups(hyper_R, trainer.active()).items():
        own_1 = {name: value_R[own] for name, value_R in step.hyper_R.items()}
        own_1["lr"] = peaks[group] / max(largest, 1e-30) * UNIT
        prepared_1 = {name: value_R[own] for name, value_R in step.prepared_R.items()}
        nonfinite_1 = torch.zeros(1, dtype=torch.int32, device=trainer.device)
        step = Step(own_1, prepared_1, scale_1, active_1, nonfinite_1)
        parameters = [
            parameter_of(
                span,
                weight_1P,
                remainder_1P,
                gradient_1P[:, span.slice],
                {name: buffer_Rn[own].clone() for name, buffer_Rn in state.items()},
            )
            for span, state in zip(spans, trainer.state, strict=True)
            if span.group == group
        ]
        OPTIMIZERS[trainer.optimizers[group]].update(parameters, step)
    after_1P = weight_1P if remainder_1P is None else join_master(weight_1P, remainder_1P)
    return (master_1P - after_1P) / UNIT, largest
