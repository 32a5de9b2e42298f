"""A 64-bit digest of each replica's weights: equal weights, equal digest, in any order of summation.

R replica, P flat parameters.

Each element's (index, float32 bits) pair is mixed into 64 bits (SplitMix64's finaliser, Steele et
al. 2014, doi:10.1145/2714064.2660195) and the results are added modulo 2^64. The pair fits 64
bits and the mix is a bijection, so changing a single element always changes the digest; integer
addition is exact, so the order of the sum does not matter. All NaNs count as one NaN; -0 and +0 differ.
"""

import torch
import triton
import triton.language as tl

from kernels.stacking import dense_replicas

GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # as signed 64-bit: torch has no uint64 arithmetic
MIX1 = 0xBF58476D1CE4E5B9 - 2**64
MIX2 = 0x94D049BB133111EB - 2**64
NAN_BITS = 0x7FC00000
CHUNK = 2**20  # elements mixed at once on the CPU: 8 MiB a temporary
BLOCK = 4096  # elements a program of the kernel digests


def digest(weights_RP, offset=0):
    """64-bit digest of each replica's float32 weights. [R, ...] float32 -> int64 [R].

    A list of parameters is digested piece by piece: give each piece the number of elements before
    it as `offset` and add the digests (int64, wrapping); the result equals that of the whole.
    Raises ValueError for another dtype or for indices beyond 2^32.
    """
    if weights_RP.dtype != torch.float32:
        raise ValueError(f"digest got {weights_RP.dtype}, expected float32: digest the fp32 master")
    weights_RP = weights_RP.flatten(1)
    if offset + weights_RP.shape[1] > 2**32:
        raise ValueError(
            f"digest got element indices up to {offset + weights_RP.shape[1]}, expected at most "
            "2^32: digest larger networks as several digests"
        )
    if weights_RP.device.type == "cpu":
        return digest_reference(weights_RP, offset)
    return digest_triton(weights_RP, offset)


def digest_triton(weights_RP, offset=0):
    """`digest` on the Triton kernel whatever the device."""
    weights_RP = dense_replicas(weights_RP)
    R, P = weights_RP.shape
    blocks = triton.cdiv(P, BLOCK)
    partial_RJ = torch.empty(R, blocks, dtype=torch.int64, device=weights_RP.device)
    _digest_kernel[(R * blocks,)](weights_RP, partial_RJ, weights_RP.stride(0), offset, P, BLOCK=BLOCK, num_warps=4)
    return partial_RJ.sum(1)


def digest_reference(weights_RP, offset=0):
    """`digest` in plain torch, a chunk of elements at a time."""
    total_R = torch.zeros(weights_RP.shape[0], dtype=torch.int64, device=weights_RP.device)
    chunk = max(1, CHUNK // max(1, weights_RP.shape[0]))
    for start in range(0, weights_RP.shape[1], chunk):
        piece_RP = weights_RP[:, start : start + chunk]
        bits_RP = piece_RP.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
        bits_RP = bits_RP.masked_fill(piece_RP.isnan(), NAN_BITS)
        index_P = torch.arange(piece_RP.shape[1], device=piece_RP.device) + (offset + start)
        total_R += _mix((index_P << 32) + bits_RP).sum(1)
    return total_R


def _mix(z):
    z = z + GOLDEN
    z = (z ^ _shift_right(z, 30)) * MIX1
    z = (z ^ _shift_right(z, 27)) * MIX2
    return z ^ _shift_right(z, 31)


def _shift_right(z, bits):
    return (z >> bits) & ((1 << (64 - bits)) - 1)  # logical: the sign bit is a bit like any other


@triton.jit
def _digest_kernel(weights_ptr, partial_ptr, stride, offset, P, BLOCK: tl.constexpr):
    blocks = tl.cdiv(P, BLOCK)
    replica = (tl.program_id(0) // blocks).to(tl.int64)
    index = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    weight = tl.load(weights_ptr + replica * stride + index, mask=index < P, other=0.0)
    bits = weight.to(tl.uint32, bitcast=True)
    bits = tl.where(weight != weight, 0x7FC00000, bits).to(tl.uint64)
    z = ((index + offset).to(tl.uint64) << 32) + bits
    z = z + 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z = z ^ (z >> 31)
    z = tl.where(index < P, z, 0).to(tl.int64, bitcast=True)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(z, 0))
