"""A 64-bit digest of each replica's weights: equal weights, equal digest, in any order of summation.

R replica, J replica to digest, P flat parameters.

Each element's (index, float32 bits) pair is mixed into 64 bits (SplitMix64's finaliser, Steele et
al. 2014, doi:10.1145/2714064.2660195) and the results are added modulo 2^64. The pair fits 64
bits and the mix is a bijection, so changing a single element always changes the digest; integer
addition is exact, so the order of the sum does not matter. All NaNs count as one NaN; -0 and +0 differ.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.split_master import NAN_BITS, join_bits, join_master
from kernels.stacking import dense_replicas

GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # as signed 64-bit: torch has no uint64 arithmetic
MIX1 = 0xBF58476D1CE4E5B9 - 2**64
MIX2 = 0x94D049BB133111EB - 2**64
CHUNK = 2**20  # elements mixed at once on the CPU: 8 MiB a temporary
BLOCK = 4096  # elements a program of the kernel digests


def digest(weights_RP: Tensor, remainder_RP: Tensor | None = None, replicas_J: Tensor | None = None) -> Tensor:
    """64-bit digest of each replica's float32 weights. [R, P] -> int64 [R], or [J] of the replicas named.

    weights_RP: float32, or the bf16 half of a split master whose other half is remainder_RP (int16).
    replicas_J: int64 indices of replicas, on the weights' device.
    Raises ValueError for another dtype or more than 2^32 elements.
    """
    expected = torch.float32 if remainder_RP is None else torch.bfloat16
    if weights_RP.dtype != expected:
        raise ValueError(f"digest got {weights_RP.dtype}, expected {expected}: digest the fp32 master, whole or split")
    if weights_RP.shape[1] > 2**32:
        raise ValueError(
            f"digest got {weights_RP.shape[1]} elements a replica, expected at most 2^32: digest larger networks "
            "as several digests"
        )
    if replicas_J is None:
        replicas_J = torch.arange(len(weights_RP), device=weights_RP.device)
    on_cpu = weights_RP.device.type == "cpu"
    return (digest_reference if on_cpu else digest_triton)(weights_RP, remainder_RP, replicas_J)


def digest_triton(weights_RP: Tensor, remainder_RP: Tensor | None, replicas_J: Tensor) -> Tensor:
    """`digest` on the Triton kernel whatever the device."""
    weights_RP = dense_replicas(weights_RP)
    split = remainder_RP is not None
    remainder_RP = weights_RP if remainder_RP is None else dense_replicas(remainder_RP)
    P = weights_RP.shape[1]
    blocks = triton.cdiv(P, BLOCK)
    partial_JB = torch.empty(len(replicas_J), blocks, dtype=torch.int64, device=weights_RP.device)
    _digest_kernel[(len(replicas_J) * blocks,)](
        weights_RP, remainder_RP, replicas_J, partial_JB, weights_RP.stride(0), remainder_RP.stride(0), P,
        SPLIT=split, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return partial_JB.sum(1)


def digest_reference(weights_RP: Tensor, remainder_RP: Tensor | None, replicas_J: Tensor) -> Tensor:
    """`digest` in plain torch, a chunk of elements at a time."""
    total_J = torch.zeros(len(replicas_J), dtype=torch.int64, device=weights_RP.device)
    chunk = max(1, CHUNK // max(1, len(replicas_J)))
    for start in range(0, weights_RP.shape[1], chunk):
        place = slice(start, start + chunk)
        piece_JP = weights_RP[:, place][replicas_J]
        if remainder_RP is not None:
            piece_JP = join_master(piece_JP, remainder_RP[:, place][replicas_J])
        bits_JP = piece_JP.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
        bits_JP = bits_JP.masked_fill(piece_JP.isnan(), NAN_BITS.value)
        index_P = torch.arange(piece_JP.shape[1], device=piece_JP.device) + start
        total_J += mix((index_P << 32) + bits_JP).sum(1)
    return total_J


def mix(z: Tensor) -> Tensor:
    """SplitMix64's finaliser of 64-bit integers, any shape."""
    z = z + GOLDEN
    z = (z ^ _shift_right(z, 30)) * MIX1
    z = (z ^ _shift_right(z, 27)) * MIX2
    return z ^ _shift_right(z, 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)  # logical: the sign bit is a bit like any other


@triton.jit
def mix_bits(z):
    """`mix` of uint64 in a kernel."""
    z = z + 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def _digest_kernel(
    weights_ptr, remainder_ptr, replicas_ptr, partial_ptr, stride, remainder_stride, P,
    SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(P, BLOCK)
    replica = tl.load(replicas_ptr + tl.program_id(0) // blocks)
    index = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    weight = tl.load(weights_ptr + replica * stride + index, mask=index < P, other=0.0)
    if SPLIT:
        remainder = tl.load(remainder_ptr + replica * remainder_stride + index, mask=index < P, other=0)
        weight = join_bits(weight, remainder)
    bits = weight.to(tl.uint32, bitcast=True)
    bits = tl.where(weight != weight, NAN_BITS, bits).to(tl.uint64)
    z = mix_bits((index.to(tl.uint64) << 32) + bits)
    z = tl.where(index < P, z, 0).to(tl.int64, bitcast=True)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(z, 0))
