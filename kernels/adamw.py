"""AdamW over stacked parameters, every replica with hyper-parameters of its own.

Dimensions: R replica, n one parameter's elements; `_R` tensors are [R] fp32 on the device.

The bf16 weight is the fp32 master rounded to nearest, ties away from zero. Ties to even cannot be
undone from 16 bits: an even bf16 would stand for 65,537 masters. With ties away each stands for
65,536, so the master splits exactly into the weight and a 16-bit remainder, and the plain and the
split form round alike.
"""

import torch
from torch import Tensor


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 master -> (bf16 weight, int16 remainder); `join_master` gives the master back exactly.

    Signalling NaNs come back quiet, which is what any arithmetic makes of them.
    """
    bits = master.contiguous().view(torch.int32)
    rounded = torch.where(torch.isnan(master), (bits >> 16) | 0x40, (bits + 0x8000) >> 16)
    return rounded.to(torch.int16).view(torch.bfloat16), bits.to(torch.int16)


def join_master(weight: Tensor, remainder: Tensor) -> Tensor:
    """(bf16 weight, int16 remainder) of `split_master` -> the fp32 master."""
    high = weight.contiguous().view(torch.int16).to(torch.int32) << 16
    low = remainder.to(torch.int32)
    bits = torch.where(torch.isnan(weight), high | (low & 0xFFFF), high + low)
    return bits.view(torch.float32)


def round_to_weight(master: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight the networks compute with: the fp32 master itself, or split_master's bf16."""
    return master if dtype == torch.float32 else split_master(master)[0]


def adamw_reference_(
    master: Tensor,
    gradient: Tensor,
    weight: Tensor | None,
    first_moment: Tensor,
    second_moment: Tensor,
    learning_rate_R: Tensor,
    weight_decay_R: Tensor,
    beta1_R: Tensor,
    beta2_R: Tensor,
    bias1_R: Tensor,
    bias2_R: Tensor,
    eps: float,
    scale_R: Tensor | None,
    active_R: Tensor,
    nonfinite_R: Tensor,
) -> None:
    learning_rate, decay, beta1, beta2, bias1, bias2 = (
        scalar_R[:, None]
        for scalar_R in (learning_rate_R, weight_decay_R, beta1_R, beta2_R, bias1_R, bias2_R)
    )
    active = active_R[:, None]
    gradient = gradient.float() if scale_R is None else gradient.float() * scale_R[:, None]
    first = beta1 * first_moment + (1 - beta1) * gradient
    second = beta2 * second_moment + ((1 - beta2) * gradient) * gradient
    step = (first / bias1) / ((second / bias2).sqrt() + eps)
    updated = master * (1 - learning_rate * decay) - learning_rate * step
    rounded = updated if weight is None else round_to_weight(updated, weight.dtype)
    first_moment.copy_(torch.where(active, first, first_moment))
    second_moment.copy_(torch.where(active, second, second_moment))
    master.copy_(torch.where(active, updated, master))
    if weight is not None:
        weight.copy_(torch.where(active, rounded, weight))
    broken_R = active_R & ~torch.isfinite(rounded).all(1)
    nonfinite_R.copy_(torch.where(broken_R, 1, nonfinite_R))


def adamw_(
    master: Tensor,
    gradient: Tensor,
    weight: Tensor | None,
    first_moment: Tensor,
    second_moment: Tensor,
    learning_rate_R: Tensor,
    weight_decay_R: Tensor,
    beta1_R: Tensor,
    beta2_R: Tensor,
    bias1_R: Tensor,
    bias2_R: Tensor,
    eps: float,
    scale_R: Tensor | None,
    active_R: Tensor,
    nonfinite_R: Tensor,
) -> None:
    """One AdamW step of one parameter of every replica, in place, decoupled weight decay.

    master, first_moment, second_moment: fp32 [R, n], any replica stride. gradient: [R, n], bf16 or
    fp32. weight: bf16 [R, n], or None where the network computes with the master itself. bias1_R
    and bias2_R are 1 - beta^t. scale_R multiplies the gradient (clipping). Where active_R (bool) is
    False nothing of that replica is written. nonfinite_R (int32) becomes 1 where an updated weight
    is not finite.

    m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
    p = p (1 - lr wd) - lr (m / bias1) / (sqrt(v / bias2) + eps)

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019).
    """
    adamw_reference_(
        master,
        gradient,
        weight,
        first_moment,
        second_moment,
        learning_rate_R,
        weight_decay_R,
        beta1_R,
        beta2_R,
        bias1_R,
        bias2_R,
        eps,
        scale_R,
        active_R,
        nonfinite_R,
    )


def global_norm_reference(gradients: list[Tensor]) -> Tensor:
    return sum(gradient.float().square().sum(1) for gradient in gradients).sqrt()


def global_norm(gradients: list[Tensor]) -> Tensor:
    """Euclidean norm [R] fp32 over every gradient [R, n] of a replica."""
    return global_norm_reference(gradients)


def accumulate_reference_(
    accumulator: Tensor, gradient: Tensor, fresh_R: Tensor, active_R: Tensor
) -> None:
    gradient = gradient.float()
    total = torch.where(fresh_R[:, None], gradient, accumulator + gradient)
    accumulator.copy_(torch.where(active_R[:, None], total, accumulator))


def accumulate_(accumulator: Tensor, gradient: Tensor, fresh_R: Tensor, active_R: Tensor) -> None:
    """Where active_R: accumulator [R, n] fp32 = gradient if fresh_R else accumulator + gradient."""
    accumulate_reference_(accumulator, gradient, fresh_R, active_R)
