"""Accumulation of micro-batches' gradients in fp32, every replica at its own place in its batch.

Dimensions: R replica, n elements of one parameter of one replica.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # elements a program adds


def accumulate_(accumulator: Tensor, gradient: Tensor, fresh_R: Tensor, active_R: Tensor) -> None:
    """Where active_R: accumulator [R, n] fp32 = gradient if fresh_R else accumulator + gradient.

    fresh_R and active_R are bool. An inactive replica's memory is not touched.
    """
    if accumulator.device.type == "cpu":
        accumulate_reference_(accumulator, gradient, fresh_R, active_R)
    else:
        accumulate_triton_(accumulator, gradient, fresh_R, active_R)


def accumulate_reference_(accumulator: Tensor, gradient: Tensor, fresh_R: Tensor, active_R: Tensor) -> None:
    """`accumulate_` in plain torch."""
    gradient = gradient.float()
    total = torch.where(fresh_R[:, None], gradient, accumulator + gradient)
    accumulator.copy_(torch.where(active_R[:, None], total, accumulator))


@triton.jit
def _accumulate_kernel(
    accumulator_ptr, gradient_ptr, fresh_ptr, active_ptr, n, stride, gradient_stride, BLOCK: tl.constexpr
):
    replica = tl.program_id(1)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tl.where(tl.load(active_ptr + replica), n, 0)
    old = inside & (at < tl.where(tl.load(fresh_ptr + replica), 0, n))
    accumulator_ptr += replica.to(tl.int64) * stride + at
    gradient_ptr += replica.to(tl.int64) * gradient_stride + at
    g = tl.load(gradient_ptr, mask=inside, other=0.0).to(tl.float32)
    total = tl.where(old, tl.load(accumulator_ptr, mask=old, other=0.0) + g, g)
    tl.store(accumulator_ptr, total, mask=inside)


def accumulate_triton_(accumulator: Tensor, gradient: Tensor, fresh_R: Tensor, active_R: Tensor) -> None:
    """`accumulate_` on the Triton kernel whatever the device."""
    replicas, n = gradient.shape
    assert accumulator.stride(1) == 1 and gradient.stride(1) == 1
    _accumulate_kernel[(triton.cdiv(n, BLOCK), replicas)](
        accumulator, gradient, fresh_R, active_R, n, accumulator.stride(0), gradient.stride(0),
        BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
