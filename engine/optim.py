"""Optimizers over stacked parameters: an init/update pair over an explicit state.

Letters: R replica, P flat parameters. Every hyper-parameter is an [R] tensor on the device, every
buffer [R, P] with the same layout as the stack's, and an update touches only replicas that are active.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.adamw import adamw_, round_to_weight


class Update(NamedTuple):
    """What an update needs to know about this step, one value a replica.

    rate_R: learning rate by parameter group, fp32. decay_R: decoupled weight decay. beta1_R, beta2_R: of
    AdamW. count_R: updates made including this one, int64. scale_R: factor on the gradient (clipping), or
    None. active_R: bool. nonfinite_R: int32, set to 1 where an updated weight is not finite.
    """

    rate_R: dict[str, Tensor]
    decay_R: Tensor
    beta1_R: Tensor
    beta2_R: Tensor
    count_R: Tensor
    scale_R: Tensor | None
    active_R: Tensor
    nonfinite_R: Tensor


class AdamWState(NamedTuple):
    """First and second moments, fp32 [R, P]."""

    first_RP: Tensor
    second_RP: Tensor


class SGDState(NamedTuple):
    """Velocity, fp32 [R, P]."""

    velocity_RP: Tensor


def adamw_init(master_RP: Tensor) -> AdamWState:
    """Zero moments."""
    return AdamWState(torch.zeros_like(master_RP), torch.zeros_like(master_RP))


def adamw_update(stack, state: AdamWState, gradients: list[Tensor], update: Update, eps: float) -> None:
    """One AdamW step of every active replica, in place (Loshchilov & Hutter, arXiv:1711.05101).

    Args:
        stack: the `Stack` whose master and weights are updated.
        gradients: one [R, n] a parameter, in the stack's order.
    """
    count_R = update.count_R.double()
    bias1_R = (1 - update.beta1_R.double() ** count_R).float()
    bias2_R = (1 - update.beta2_R.double() ** count_R).float()
    for span, gradient in zip(stack.spans, gradients, strict=True):
        adamw_(
            stack.master_RP[:, span.slice],
            gradient,
            stack.weight_RP[:, span.slice] if stack.mixed else None,
            state.first_RP[:, span.slice],
            state.second_RP[:, span.slice],
            update.rate_R[span.group],
            update.decay_R,
            update.beta1_R,
            update.beta2_R,
            bias1_R,
            bias2_R,
            eps,
            update.scale_R,
            update.active_R,
            update.nonfinite_R,
        )


def sgd_init(master_RP: Tensor) -> SGDState:
    """Zero velocity."""
    return SGDState(torch.zeros_like(master_RP))


def sgd_update(stack, state: SGDState, gradients: list[Tensor], update: Update, momentum: float) -> None:
    """One step of gradient descent with heavy-ball momentum and decoupled weight decay, in place.

    u = momentum u + g;  p = p (1 - lr wd) - lr u. Plain torch on every device: elementwise, so a replica's
    bits do not depend on the others.
    """
    active = update.active_R[:, None]
    for span, gradient in zip(stack.spans, gradients, strict=True):
        rate = update.rate_R[span.group][:, None]
        gradient = gradient.float()
        if update.scale_R is not None:
            gradient = gradient * update.scale_R[:, None]
        velocity, master = state.velocity_RP[:, span.slice], stack.master_RP[:, span.slice]
        moved = momentum * velocity + gradient
        stepped = master * (1 - rate * update.decay_R[:, None]) - rate * moved
        velocity.copy_(torch.where(active, moved, velocity))
        master.copy_(torch.where(active, stepped, master))
        weight = stack.weight_RP[:, span.slice]
        if stack.mixed:
            weight.copy_(torch.where(active, round_to_weight(stepped, weight.dtype), weight))
        broken_R = update.active_R & ~torch.isfinite(weight).all(1)
        update.nonfinite_R.copy_(torch.where(broken_R, 1, update.nonfinite_R))
