"""Optimizers over stacked parameters: an init/update pair over an explicit state.

Letters: R replica, P flat parameters. Every hyper-parameter is an [R] tensor on the device, every
buffer [R, P] with the same layout as the stack's, and an update touches only replicas that are active.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from engine.stack import Stack
from kernels.adamw import AdamWScalars, adamw_, adamw_split_, split_master


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


def adamw_init(stack: Stack) -> AdamWState:
    """Zero moments."""
    return AdamWState(stack.zeros(), stack.zeros())


def adamw_update(stack: Stack, state: AdamWState, gradients: list[Tensor], update: Update, eps: float) -> None:
    """One AdamW step of every active replica, in place (Loshchilov & Hutter, arXiv:1711.05101).

    Args:
        stack: what is updated: its weights, and in mixed precision the remainders of its master.
        gradients: one [R, n] a parameter, in the stack's order.
    """
    count_R = update.count_R.double()
    bias1_R = (1 - update.beta1_R.double() ** count_R).float()
    bias2_R = (1 - update.beta2_R.double() ** count_R).float()
    for span, gradient in zip(stack.spans, gradients, strict=True):
        scalars = AdamWScalars(
            learning_rate_R=update.rate_R[span.group],
            weight_decay_R=update.decay_R,
            beta1_R=update.beta1_R,
            beta2_R=update.beta2_R,
            bias1_R=bias1_R,
            bias2_R=bias2_R,
            eps=eps,
            scale_R=update.scale_R,
            active_R=update.active_R,
            nonfinite_R=update.nonfinite_R,
        )
        weight = stack.weight_RP[:, span.slice]
        first, second = state.first_RP[:, span.slice], state.second_RP[:, span.slice]
        if stack.remainder_RP is None:
            adamw_(weight, gradient, None, first, second, scalars)
        else:
            adamw_split_(stack.remainder_RP[:, span.slice], gradient, weight, first, second, scalars)


def sgd_init(stack: Stack) -> SGDState:
    """Zero velocity."""
    return SGDState(stack.zeros())


def sgd_update(stack: Stack, state: SGDState, gradients: list[Tensor], update: Update, momentum: float) -> None:
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
        velocity, master = state.velocity_RP[:, span.slice], stack.masters(slice(None), span.slice)
        moved = momentum * velocity + gradient
        stepped = master * (1 - rate * update.decay_R[:, None]) - rate * moved
        velocity.copy_(torch.where(active, moved, velocity))
        weight = stack.weight_RP[:, span.slice]
        kept = torch.where(active, stepped, master)
        if stack.remainder_RP is not None:
            kept, remainder = split_master(kept)
            stack.remainder_RP[:, span.slice].copy_(remainder)
        weight.copy_(kept)
        broken_R = update.active_R & ~torch.isfinite(weight).all(1)
        update.nonfinite_R.copy_(torch.where(broken_R, 1, update.nonfinite_R))
