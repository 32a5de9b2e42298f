"""Descent along a momentum, or along its sign, over stacked parameters: heavy ball and Lion.

Dimensions: R replica, n elements of one parameter of one replica; `_R` tensors are [R], fp32 unless said otherwise.

Kernel and reference agree bit for bit: every operation is rounded by itself (no fused multiply-adds).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.split_master import join_master, load_master, split_master, store_master

BLOCK = 1024  # elements a program


class MomentumScalars(NamedTuple):
    """What one step needs besides the buffers; tensors are [R].

    beta1_R: Lion's share of the momentum in the direction, or None for heavy ball. beta2_R: decay of the momentum.
    scale_R multiplies the gradient, or None. Where active_R (bool) is False nothing of that replica is written.
    nonfinite_R (int32) becomes 1 where an updated weight is not finite.
    """

    learning_rate_R: Tensor
    weight_decay_R: Tensor
    beta1_R: Tensor | None
    beta2_R: Tensor
    scale_R: Tensor | None
    active_R: Tensor
    nonfinite_R: Tensor


def momentum_step_(
    weight: Tensor, remainder: Tensor | None, gradient: Tensor, momentum: Tensor, scalars: MomentumScalars
) -> None:
    """One step of one parameter of every replica, in place, decoupled weight decay.

    weight [R, n]: bf16 beside its int16 remainder (kernels/split_master.py), or the fp32 master beside None. gradient:
    [R, n], bf16 or fp32. momentum: fp32 [R, n].

    Heavy ball (Polyak 1964): m = b2 m + g;  p = p (1 - lr wd) - lr m.
    Lion (Chen et al. 2023, arXiv:2302.06675): p = p (1 - lr wd) - lr sign(b1 m + (1 - b1) g);  m = b2 m + (1 - b2) g.
    """
    step = momentum_step_reference_ if weight.device.type == "cpu" else momentum_step_triton_
    step(weight, remainder, gradient, momentum, scalars)


def momentum_step_reference_(
    weight: Tensor, remainder: Tensor | None, gradient: Tensor, momentum: Tensor, scalars: MomentumScalars
) -> None:
    """`momentum_step_` in plain torch."""
    rate, beta2, active = (each[:, None] for each in (scalars.learning_rate_R, scalars.beta2_R, scalars.active_R))
    gradient = gradient.float() if scalars.scale_R is None else gradient.float() * scalars.scale_R[:, None]
    if scalars.beta1_R is None:
        direction = moved = beta2 * momentum + gradient
    else:
        beta1 = scalars.beta1_R[:, None]
        mixed = beta1 * momentum + (1 - beta1) * gradient
        direction = torch.where(mixed.isnan(), mixed, mixed.sign())  # the sign of NaN is 0, which would hide it
        moved = beta2 * momentum + (1 - beta2) * gradient
    master = weight if remainder is None else join_master(weight, remainder)
    stepped = master * (1 - rate * scalars.weight_decay_R[:, None]) - rate * direction
    stepped = torch.where(stepped.isnan(), torch.nan, stepped)
    master = torch.where(active, stepped, master)
    if remainder is not None:
        master, split = split_master(master)
        remainder.copy_(split)
    weight.copy_(master)
    momentum.copy_(torch.where(active, moved, momentum))
    broken_R = scalars.active_R & ~torch.isfinite(master).all(1)
    scalars.nonfinite_R.copy_(torch.where(broken_R, 1, scalars.nonfinite_R))


@triton.jit
def _momentum_kernel(
    weight_ptr, remainder_ptr, gradient_ptr, momentum_ptr, rate_ptr, decay_ptr, beta1_ptr, beta2_ptr, scale_ptr,
    active_ptr, nonfinite_ptr, n, stride, gradient_stride, momentum_stride,
    BLOCK: tl.constexpr, LION: tl.constexpr, SPLIT: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    replica = tl.program_id(1)
    row = replica.to(tl.int64)
    active = tl.load(active_ptr + replica)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tl.where(active, n, 0)
    g = tl.load(gradient_ptr + row * gradient_stride + at, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(momentum_ptr + row * momentum_stride + at, mask=inside, other=0.0)
    if SCALED:
        g *= tl.load(scale_ptr + replica)
    beta2 = tl.load(beta2_ptr + replica)
    if LION:
        beta1 = tl.load(beta1_ptr + replica)
        mixed = beta1 * m + (1 - beta1) * g
        direction = tl.where(mixed > 0, 1.0, tl.where(mixed < 0, -1.0, mixed))  # NaN stays NaN
        m = beta2 * m + (1 - beta2) * g
    else:
        m = beta2 * m + g
        direction = m
    rate = tl.load(rate_ptr + replica)
    p = load_master(weight_ptr, remainder_ptr, row * stride + at, inside, SPLIT)
    p = p * (1 - rate * tl.load(decay_ptr + replica)) - rate * direction
    broken = store_master(weight_ptr, remainder_ptr, row * stride + at, p, inside, SPLIT)
    tl.store(momentum_ptr + row * momentum_stride + at, m, mask=inside)
    tl.store(nonfinite_ptr + replica, 1, mask=active & broken)


def momentum_step_triton_(
    weight: Tensor, remainder: Tensor | None, gradient: Tensor, momentum: Tensor, scalars: MomentumScalars
) -> None:
    """`momentum_step_` on the Triton kernel whatever the device."""
    replicas, n = gradient.shape
    assert weight.stride(1) == gradient.stride(1) == momentum.stride(1) == 1
    assert remainder is None or remainder.stride() == weight.stride()
    _momentum_kernel[(triton.cdiv(n, BLOCK), replicas)](
        weight, remainder, gradient, momentum, *scalars, n, weight.stride(0), gradient.stride(0), momentum.stride(0),
        BLOCK=BLOCK, LION=scalars.beta1_R is not None, SPLIT=remainder is not None,
        SCALED=scalars.scale_R is not None, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
