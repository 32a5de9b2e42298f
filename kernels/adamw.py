"""AdamW over stacked parameters, every replica with hyper-parameters of its own.

Dimensions: R replica, n elements of one parameter of one replica; `_R` tensors are [R], fp32 unless
said otherwise, on the device.

The weights are the fp32 master, or its bf16 half beside the master or beside a 16-bit remainder
(kernels/split_master.py); all three forms round alike. Kernels and references agree bit for bit: every
operation is rounded by itself (no fused multiply-adds), division and square root to nearest.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.split_master import NAN_BITS, join_bits, join_master, round_to_weight, split_master

BLOCK = 1024  # elements a program; it needs no more than 16 bytes of shared memory, so it overlaps with a GEMM
TOGETHER = tl.constexpr(4)  # neighbours a thread holds, of any type: avoids a layout conversion from bf16 to fp32
ONCE = tl.constexpr("evict_first")  # each byte is touched once a step: leave the cache to the GEMMs


class AdamWScalars(NamedTuple):
    """What one step needs besides the buffers; tensors are [R].

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
    """`adamw_` in plain torch."""
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
    where the network computes with the master itself. Master and weight share a replica stride, and
    so do the moments. Moves 28 bytes
    a parameter with a bf16 gradient.

    m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
    p = p (1 - lr wd) - (lr c1) m / (c2 sqrt(v) + eps)  with c1 = 1 / (1 - b1^t), c2 = 1 / sqrt(1 - b2^t)

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019). Written with one division an
    element: while it overlaps with a GEMM, the energy of these instructions counts.
    """
    step = adamw_reference_ if master.device.type == "cpu" else adamw_triton_
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
    step = adamw_reference_ if on_cpu else adamw_triton_
    step(master, gradient, weight, first_moment, second_moment, scalars)
    if on_cpu:
        remainder.copy_(split_master(master)[1])


@triton.jit
def _adamw_step(master, gradient, first, second, learning_rate, decay, beta1, beta2, correction1, correction2, eps):
    first = beta1 * first + (1 - beta1) * gradient
    second = beta2 * second + ((1 - beta2) * gradient) * gradient
    step = tl.div_rn(first, correction2 * tl.sqrt_rn(second) + eps)
    return master * (1 - learning_rate * decay) - (learning_rate * correction1) * step, first, second


@triton.jit
def _adamw_kernel(
    master_ptr, gradient_ptr, weight_ptr, first_moment_ptr, second_moment_ptr,
    learning_rate_ptr, weight_decay_ptr, beta1_ptr, beta2_ptr, correction1_ptr, correction2_ptr, eps_ptr,
    scale_ptr, active_ptr, nonfinite_ptr, n, stride, moment_stride, gradient_stride,
    BLOCK: tl.constexpr, HAS_WEIGHT: tl.constexpr, SPLIT: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    replica = tl.program_id(1)
    row = replica.to(tl.int64)
    at = tl.max_contiguous(tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), TOGETHER)
    active = tl.load(active_ptr + replica)
    inside = at < tl.where(active, n, 0)
    gradient_ptr += row * gradient_stride + at
    first_moment_ptr += row * moment_stride + at
    second_moment_ptr += row * moment_stride + at
    at += row * stride
    g = tl.load(gradient_ptr, mask=inside, other=0.0, eviction_policy=ONCE).to(tl.float32)
    m = tl.load(first_moment_ptr, mask=inside, other=0.0, eviction_policy=ONCE)
    v = tl.load(second_moment_ptr, mask=inside, other=1.0, eviction_policy=ONCE)  # eps may be 0
    if SPLIT:
        high = tl.load(weight_ptr + at, mask=inside, other=0.0, eviction_policy=ONCE)
        p = join_bits(high, tl.load(master_ptr + at, mask=inside, other=0, eviction_policy=ONCE))
    else:
        p = tl.load(master_ptr + at, mask=inside, other=0.0, eviction_policy=ONCE)
    if SCALED:
        g *= tl.load(scale_ptr + replica)
    p, m, v = _adamw_step(
        p, g, m, v,
        tl.load(learning_rate_ptr + replica), tl.load(weight_decay_ptr + replica),
        tl.load(beta1_ptr + replica), tl.load(beta2_ptr + replica),
        tl.load(correction1_ptr + replica), tl.load(correction2_ptr + replica), tl.load(eps_ptr + replica),
    )  # fmt: skip
    bits = tl.where(p != p, NAN_BITS, p.to(tl.int32, bitcast=True))
    seen = bits  # the weight as the network computes with it, by its bits
    if HAS_WEIGHT:
        seen = bits + 0x8000
        rounded = (seen >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
        tl.store(weight_ptr + at, rounded, mask=inside, eviction_policy=ONCE)
    p = bits.to(tl.int16) if SPLIT else bits.to(tl.float32, bitcast=True)
    tl.store(master_ptr + at, p, mask=inside, eviction_policy=ONCE)
    tl.store(first_moment_ptr, m, mask=inside, eviction_policy=ONCE)
    tl.store(second_moment_ptr, v, mask=inside, eviction_policy=ONCE)
    # behind the end p is 0, or NaN by factors that make every p NaN
    largest = tl.max(seen & 0x7F800000, axis=0)
    tl.store(nonfinite_ptr + replica, 1, mask=active & (largest == 0x7F800000))


def adamw_triton_(
    master: Tensor,
    gradient: Tensor,
    weight: Tensor | None,
    first_moment: Tensor,
    second_moment: Tensor,
    scalars: AdamWScalars,
) -> None:
    """`adamw_` on the Triton kernel whatever the device; `adamw_split_` where master is the int16 remainder."""
    replicas, n = gradient.shape
    weight = master if weight is None else weight
    for tensor, like in ((weight, master), (first_moment, first_moment), (second_moment, first_moment)):
        assert tensor.shape == master.shape == (replicas, n) and tensor.stride() == (like.stride(0), 1)
    assert gradient.stride(1) == 1
    _adamw_kernel[(triton.cdiv(n, BLOCK), replicas)](
        master, gradient, weight, first_moment, second_moment, *scalars, n, master.stride(0),
        first_moment.stride(0), gradient.stride(0),
        BLOCK=BLOCK, HAS_WEIGHT=weight is not master, SPLIT=master.dtype == torch.int16,
        SCALED=scalars.scale_R is not None, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
