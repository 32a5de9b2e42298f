"""Optimizers over stacked parameters: an init/update pair over an explicit state.

Letters: R replica, P flat parameters. Every hyper-parameter is an [R] tensor on the device, every
buffer [R, P] with the same layout as the stack's, and an update touches only replicas that are active.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from engine.stack import Span, Stack
from kernels.adamw import AdamWScalars, adamw_, adamw_split_
from kernels.split_master import split_master


class Update(NamedTuple):
    """What an update needs to know about this step, one value a replica.

    rate_R: learning rate by parameter group, fp32. decay_R: decoupled weight decay. beta1_R, beta2_R: of
    AdamW, as correction1_R and correction2_R, its `corrections`. scale_R: factor on the gradient (clipping), or
    None. active_R: bool. nonfinite_R: int32, set to 1 where an updated weight is not finite.
    """

    rate_R: dict[str, Tensor]
    decay_R: Tensor
    beta1_R: Tensor
    beta2_R: Tensor
    correction1_R: Tensor
    correction2_R: Tensor
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


def corrections(beta1_R: Tensor, beta2_R: Tensor, count_R: Tensor) -> tuple[Tensor, Tensor]:
    """1 / (1 - beta1^count) and 1 / sqrt(1 - beta2^count), fp32 [R], computed in fp64.

    Moments start at zero: the first, and the second one's root, count that much more in the count-th update.
    """
    count_R = count_R.double()
    bias1_R, bias2_R = 1 - beta1_R.double() ** count_R, 1 - beta2_R.double() ** count_R
    return (1 / bias1_R).float(), (1 / bias2_R.sqrt()).float()


def adamw_update(stack: Stack, state: AdamWState, span: Span, gradient: Tensor, update: Update, eps: float) -> None:
    """One AdamW step of one parameter of every active replica, in place (Loshchilov & Hutter, arXiv:1711.05101).

    Args:
        stack: what is updated: its weights, and in mixed precision the remainders of its master.
        gradient: the parameter's, [R, n].
    """
    scalars = AdamWScalars(
        learning_rate_R=update.rate_R[span.group],
        weight_decay_R=update.decay_R,
        beta1_R=update.beta1_R,
        beta2_R=update.beta2_R,
        correction1_R=update.correction1_R,
        correction2_R=update.correction2_R,
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


def sgd_update(stack: Stack, state: SGDState, span: Span, gradient: Tensor, update: Update, momentum: float) -> None:
    """One step of gradient descent with heavy-ball momentum and decoupled weight decay, of one parameter, in place.

    u = momentum u + g;  p = p (1 - lr wd) - lr u. Plain torch on every device: elementwise, so a replica's
    bits do not depend on the others.
    """
    active = update.active_R[:, None]
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
