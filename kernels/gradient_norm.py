"""The global norm of each replica's gradients.

Dimensions: R replica, n elements of one parameter of one replica.

The square of a finite gradient may overflow. Sums of squares are therefore kept twice: as they are, and of
gradients times 2^-96, which is exact, so that neither they nor their sum can. The second counts where the first
is infinite; elsewhere it changes no bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192  # elements whose squares one program adds
SMALL = tl.constexpr(2.0**-96)  # the largest fp32 number times it is 2^32


def global_norm(gradients: list[Tensor]) -> Tensor:
    """Euclidean norm [R] fp32 over all of a replica's gradients, each [R, n], bf16 or fp32.

    Sums of squares over blocks, then one sum over the blocks, both in an order that follows from
    one replica's shapes. The caller clips by passing min(1, limit / norm) as `adamw_`'s scale_R. NaN
    where the norm is no finite fp32 number: a factor of 0 would freeze the run, NaN breaks it.
    """
    on_cpu = gradients[0].device.type == "cpu"
    return (global_norm_reference if on_cpu else global_norm_triton)(gradients)


def global_norm_reference(gradients: list[Tensor]) -> Tensor:
    """`global_norm` in plain torch."""
    squares_R = torch.stack([gradient.float().square().sum(1) for gradient in gradients]).sum(0)
    small_R = torch.stack([(gradient.float() * SMALL.value).square().sum(1) for gradient in gradients]).sum(0)
    norm_R = torch.where(squares_R.isinf(), small_R.sqrt() / SMALL.value, squares_R.sqrt())
    return torch.where(norm_R.isfinite(), norm_R, torch.nan)


@triton.jit
def _squares_kernel(gradient_ptr, partials_ptr, n, stride, partials_stride, BLOCK: tl.constexpr):
    """The sum of squares of one block of one replica's gradient, and that of the gradient times SMALL."""
    replica = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gradient_ptr + replica * stride + at, mask=at < n, other=0.0).to(tl.float32)
    squares = tl.sum(g * g, axis=0)
    small = squares * SMALL * SMALL
    if squares == float("inf"):
        g *= SMALL
        small = tl.sum(g * g, axis=0)
    partials_ptr += replica * partials_stride + tl.program_id(0)
    tl.store(partials_ptr, squares)
    tl.store(partials_ptr + partials_stride // 2, small)


@triton.jit
def sum_of_blocks(partials_ptr, blocks, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, blocks, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(partials_ptr + at, mask=at < blocks, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _root_of_sum_kernel(partials_ptr, norm_ptr, blocks, BLOCK: tl.constexpr):
    replica = tl.program_id(0).to(tl.int64)
    partials_ptr += replica * 2 * blocks
    squares = sum_of_blocks(partials_ptr, blocks, BLOCK)
    norm = tl.sqrt_rn(squares)
    if squares == float("inf"):
        norm = tl.sqrt_rn(sum_of_blocks(partials_ptr + blocks, blocks, BLOCK)) / SMALL
    tl.store(norm_ptr + replica, tl.where(norm < float("inf"), norm, float("nan")))


def global_norm_triton(gradients: list[Tensor]) -> Tensor:
    """`global_norm` on the Triton kernels whatever the device."""
    replicas = gradients[0].shape[0]
    blocks = [triton.cdiv(gradient.shape[1], BLOCK) for gradient in gradients]
    device = gradients[0].device
    partials = torch.empty((replicas, 2, sum(blocks)), dtype=torch.float32, device=device)
    start = 0
    for gradient, count in zip(gradients, blocks, strict=True):
        assert gradient.stride(1) == 1
        _squares_kernel[(count, replicas)](
            gradient, partials[:, 0, start:], gradient.shape[1], gradient.stride(0), partials.stride(0),
            BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
        start += count
    norm_R = torch.empty(replicas, dtype=torch.float32, device=device)
    _root_of_sum_kernel[(replicas,)](partials, norm_R, sum(blocks), BLOCK=1024, num_warps=4)
    return norm_R
