"""AdamW over stacked parameters, every replica with hyper-parameters of its own; gradient norms.

Dimensions: R replica, n elements of one parameter of one replica; `_R` tensors are [R], fp32 unless
said otherwise, on the device.

The bf16 weight is the fp32 master rounded to nearest, ties away from zero. Ties to even cannot be
undone from 16 bits: an even bf16 would stand for 65,537 masters. With ties away each stands for
65,536, so the master splits exactly into the weight and a 16-bit remainder, and the plain and the
split form round alike. Kernels and references agree bit for bit: every operation is rounded by
itself (no fused multiply-adds), division and square root to nearest.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # elements a program; it needs no more than 16 bytes of shared memory, so it fits beside a product
TOGETHER = tl.constexpr(4)  # neighbours a thread holds, of any type: else bf16 is shuffled to where fp32 lies
NORM_BLOCK = 8192
NAN_BITS = tl.constexpr(0x7FC00000)  # of the canonical NaN; others round to a zero
ONCE = tl.constexpr("evict_first")  # each byte is touched once a step: leave the cache to the products

# ---- the split master ----------------------------------------------------------------------------


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 master -> (bf16 weight, int16 remainder); `join_master` gives the master back exactly.

    Every NaN comes back as the canonical one.
    """
    bits = torch.where(torch.isnan(master), torch.nan, master).view(torch.int32)
    return ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16), bits.to(torch.int16)


def join_master(weight: Tensor, remainder: Tensor) -> Tensor:
    """(bf16 weight, int16 remainder) of `split_master` -> the fp32 master."""
    high = weight.contiguous().view(torch.int16).to(torch.int32) << 16
    return (high + remainder.to(torch.int32)).view(torch.float32)


def round_to_weight(master: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight the networks compute with: the fp32 master itself, or split_master's bf16."""
    return master if dtype == torch.float32 else split_master(master)[0]


# ---- one step ------------------------------------------------------------------------------------


class AdamWScalars(NamedTuple):
    """What one step needs beside the buffers; tensors are [R].

    correction1_R is 1 / (1 - beta1^t), correction2_R 1 / sqrt(1 - beta2^t). scale_R multiplies the gradient
    (clipping). Where active_R (bool) is False nothing of that replica is written. nonfinite_R (int32) becomes 1
    where an updated weight is not finite.
    """

    learning_rate_R: Tensor
    weight_decay_R: Tensor
    beta1_R: Tensor
    beta2_R: Tensor
    correction1_R: Tensor
    correction2_R: Tensor
    eps_R: Tensor
    scale_R: Tensor | None
    active_R: Tensor
    nonfinite_R: Tensor


def adamw_reference_(
    master: Tensor,
    gradient: Tensor,
    weight: Tensor | None,
    first_moment: Tensor,
    second_moment: Tensor,
    scalars: AdamWScalars,
) -> None:
    *factors_R, scale_R, active_R, nonfinite_R = scalars
    learning_rate, decay, beta1, beta2, correction1, correction2, eps = (factor_R[:, None] for factor_R in factors_R)
    active = active_R[:, None]
    gradient = gradient.float() if scale_R is None else gradient.float() * scale_R[:, None]
    first = beta1 * first_moment + (1 - beta1) * gradient
    second = beta2 * second_moment + ((1 - beta2) * gradient) * gradient
    # torch's fp32 square root on a CPU can be an ulp off; the fp64 one, rounded, never is.
    root = second.double().sqrt().float()
    step = first / (correction2 * root + eps)
    updated = master * (1 - learning_rate * decay) - (learning_rate * correction1) * step
    updated = torch.where(torch.isnan(updated), torch.nan, updated)
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
    scalars: AdamWScalars,
) -> None:
    """One AdamW step of one parameter of every replica, in place, decoupled weight decay.

    master, first_moment, second_moment: fp32 [R, n]. gradient: [R, n], bf16 or fp32. weight: bf16 [R, n], or None
    where the network computes with the master itself. Master and weight have one replica stride, both moments
    another. Moves 28 bytes
    a parameter with a bf16 gradient.

    m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
    p = p (1 - lr wd) - (lr c1) m / (c2 sqrt(v) + eps)  with c1 = 1 / (1 - b1^t), c2 = 1 / sqrt(1 - b2^t)

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019). Written with one division an
    element: beside a product the energy of these instructions counts.
    """
    step = adamw_reference_ if master.device.type == "cpu" else launch_adamw_
    step(master, gradient, weight, first_moment, second_moment, scalars)


def adamw_split_(
    remainder: Tensor,
    gradient: Tensor,
    weight: Tensor,
    first_moment: Tensor,
    second_moment: Tensor,
    scalars: AdamWScalars,
) -> None:
    """`adamw_` on the split master: int16 remainder and bf16 weight, both [R, n], read and written.

    The same bits as `adamw_`, in 26 bytes a parameter with a bf16 gradient.
    """
    on_cpu = remainder.device.type == "cpu"
    master = join_master(weight, remainder) if on_cpu else remainder
    step = adamw_reference_ if on_cpu else launch_adamw_
    step(master, gradient, weight, first_moment, second_moment, scalars)
    if on_cpu:
        remainder.copy_(split_master(master)[1])


@triton.jit
def join_bits(weight, remainder):
    """`join_master` of a bf16 weight and an int16 remainder."""
    high = weight.to(tl.int16, bitcast=True).to(tl.int32) << 16
    return (high + remainder.to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def adamw_step(master, gradient, first, second, learning_rate, decay, beta1, beta2, correction1, correction2, eps):
    first = beta1 * first + (1 - beta1) * gradient
    second = beta2 * second + ((1 - beta2) * gradient) * gradient
    step = tl.div_rn(first, correction2 * tl.sqrt_rn(second) + eps)
    return master * (1 - learning_rate * decay) - (learning_rate * correction1) * step, first, second


@triton.jit
def adamw_kernel(
    master, gradient, weight, first_moment, second_moment,
    learning_rate_R, weight_decay_R, beta1_R, beta2_R, correction1_R, correction2_R, eps_R,
    scale_R, active_R, nonfinite_R, n, stride, moment_stride, gradient_stride,
    BLOCK: tl.constexpr, HAS_WEIGHT: tl.constexpr, SPLIT: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    replica = tl.program_id(1)
    row = replica.to(tl.int64)
    at = tl.max_contiguous(tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), TOGETHER)
    active = tl.load(active_R + replica)
    inside = at < tl.where(active, n, 0)
    gradient += row * gradient_stride + at
    first_moment += row * moment_stride + at
    second_moment += row * moment_stride + at
    at += row * stride
    g = tl.load(gradient, mask=inside, other=0.0, eviction_policy=ONCE).to(tl.float32)
    m = tl.load(first_moment, mask=inside, other=0.0, eviction_policy=ONCE)
    v = tl.load(second_moment, mask=inside, other=1.0, eviction_policy=ONCE)  # eps may be 0
    if SPLIT:
        high = tl.load(weight + at, mask=inside, other=0.0, eviction_policy=ONCE)
        p = join_bits(high, tl.load(master + at, mask=inside, other=0, eviction_policy=ONCE))
    else:
        p = tl.load(master + at, mask=inside, other=0.0, eviction_policy=ONCE)
    if SCALED:
        g *= tl.load(scale_R + replica)
    p, m, v = adamw_step(
        p, g, m, v,
        tl.load(learning_rate_R + replica), tl.load(weight_decay_R + replica),
        tl.load(beta1_R + replica), tl.load(beta2_R + replica),
        tl.load(correction1_R + replica), tl.load(correction2_R + replica), tl.load(eps_R + replica),
    )  # fmt: skip
    bits = tl.where(p != p, NAN_BITS, p.to(tl.int32, bitcast=True))
    seen = bits  # the weight as the network computes with it, by its bits
    if HAS_WEIGHT:
        seen = bits + 0x8000
        rounded = (seen >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
        tl.store(weight + at, rounded, mask=inside, eviction_policy=ONCE)
    p = bits.to(tl.int16) if SPLIT else bits.to(tl.float32, bitcast=True)
    tl.store(master + at, p, mask=inside, eviction_policy=ONCE)
    tl.store(first_moment, m, mask=inside, eviction_policy=ONCE)
    tl.store(second_moment, v, mask=inside, eviction_policy=ONCE)
    # behind the end p is 0, or NaN by factors that make every p NaN
    largest = tl.max(seen & 0x7F800000, axis=0)
    tl.store(nonfinite_R + replica, 1, mask=active & (largest == 0x7F800000))


def launch_adamw_(
    master: Tensor,
    gradient: Tensor,
    weight: Tensor | None,
    first_moment: Tensor,
    second_moment: Tensor,
    scalars: AdamWScalars,
) -> None:
    """The Triton form of `adamw_`, and of `adamw_split_` where master is the int16 remainder."""
    replicas, n = gradient.shape
    weight = master if weight is None else weight
    for tensor, like in ((weight, master), (first_moment, first_moment), (second_moment, first_moment)):
        assert tensor.shape == master.shape == (replicas, n) and tensor.stride() == (like.stride(0), 1)
    assert gradient.stride(1) == 1
    adamw_kernel[(triton.cdiv(n, BLOCK), replicas)](
        master, gradient, weight, first_moment, second_moment, *scalars, n, master.stride(0),
        first_moment.stride(0), gradient.stride(0),
        BLOCK=BLOCK, HAS_WEIGHT=weight is not master, SPLIT=master.dtype == torch.int16,
        SCALED=scalars.scale_R is not None, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


# ---- the norm of a replica's gradients -----------------------------------------------------------


def global_norm(gradients: list[Tensor]) -> Tensor:
    """Euclidean norm [R] fp32 over all of a replica's gradients, each [R, n], bf16 or fp32.

    Sums of squares over blocks, then one sum over the blocks, both in an order that follows from
    one replica's shapes. The caller clips by passing min(1, limit / norm) as `adamw_`'s scale_R.
    """
    if gradients[0].device.type == "cpu":
        return global_norm_reference(gradients)
    return launch_global_norm(gradients)


def global_norm_reference(gradients: list[Tensor]) -> Tensor:
    squares = [gradient.float().square().sum(1) for gradient in gradients]
    return torch.stack(squares).sum(0).sqrt()


@triton.jit
def squares_kernel(gradient, partials, n, stride, partials_stride, BLOCK: tl.constexpr):
    replica = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gradient + replica * stride + at, mask=at < n, other=0.0).to(tl.float32)
    tl.store(partials + replica * partials_stride + tl.program_id(0), tl.sum(g * g, axis=0))


@triton.jit
def root_of_sum_kernel(partials, norm_R, blocks, BLOCK: tl.constexpr):
    replica = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, blocks, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(partials + replica * blocks + at, mask=at < blocks, other=0.0)
    tl.store(norm_R + replica, tl.sqrt_rn(tl.sum(total, axis=0)))


def launch_global_norm(gradients: list[Tensor]) -> Tensor:
    replicas = gradients[0].shape[0]
    blocks = [triton.cdiv(gradient.shape[1], NORM_BLOCK) for gradient in gradients]
    device = gradients[0].device
    partials = torch.empty((replicas, sum(blocks)), dtype=torch.float32, device=device)
    start = 0
    for gradient, count in zip(gradients, blocks, strict=True):
        assert gradient.stride(1) == 1
        squares_kernel[(count, replicas)](
            gradient, partials[:, start:], gradient.shape[1], gradient.stride(0), sum(blocks),
            BLOCK=NORM_BLOCK, num_warps=8,
        )  # fmt: skip
        start += count
    norm_R = torch.empty(replicas, dtype=torch.float32, device=device)
    root_of_sum_kernel[(replicas,)](partials, norm_R, sum(blocks), BLOCK=1024, num_warps=4)
    return norm_R


# ---- gradient accumulation -----------------------------------------------------------------------


def accumulate_(accumulator: Tensor, gradient: Tensor, fresh_R: Tensor, active_R: Tensor) -> None:
    """Where active_R: accumulator [R, n] fp32 = gradient if fresh_R else accumulator + gradient.

    fresh_R and active_R are bool. An inactive replica's memory is not touched.
    """
    if accumulator.device.type == "cpu":
        accumulate_reference_(accumulator, gradient, fresh_R, active_R)
    else:
        launch_accumulate_(accumulator, gradient, fresh_R, active_R)


def accumulate_reference_(accumulator: Tensor, gradient: Tensor, fresh_R: Tensor, active_R: Tensor) -> None:
    gradient = gradient.float()
    total = torch.where(fresh_R[:, None], gradient, accumulator + gradient)
    accumulator.copy_(torch.where(active_R[:, None], total, accumulator))


@triton.jit
def accumulate_kernel(accumulator, gradient, fresh_R, active_R, n, stride, gradient_stride, BLOCK: tl.constexpr):
    replica = tl.program_id(1)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tl.where(tl.load(active_R + replica), n, 0)
    old = inside & (at < tl.where(tl.load(fresh_R + replica), 0, n))
    accumulator += replica.to(tl.int64) * stride + at
    gradient += replica.to(tl.int64) * gradient_stride + at
    g = tl.load(gradient, mask=inside, other=0.0).to(tl.float32)
    total = tl.where(old, tl.load(accumulator, mask=old, other=0.0) + g, g)
    tl.store(accumulator, total, mask=inside)


def launch_accumulate_(accumulator: Tensor, gradient: Tensor, fresh_R: Tensor, active_R: Tensor) -> None:
    replicas, n = gradient.shape
    assert accumulator.stride(1) == 1 and gradient.stride(1) == 1
    accumulate_kernel[(triton.cdiv(n, BLOCK), replicas)](
        accumulator, gradient, fresh_R, active_R, n, accumulator.stride(0), gradient.stride(0),
        BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
