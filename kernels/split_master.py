"""The fp32 master weight as a bf16 weight and a 16-bit remainder, exactly.

The bf16 weight is the master rounded to nearest, ties away from zero. Ties to even cannot be undone from
16 bits: an even bf16 would stand for 65,537 masters. With ties away each stands for 65,536, so the master
splits exactly into the weight and a 16-bit remainder.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

NAN_BITS = tl.constexpr(0x7FC00000)  # of the canonical NaN; others round to a zero


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


@triton.jit
def join_bits(weight, remainder):
    """`join_master` of a bf16 weight and an int16 remainder."""
    high = weight.to(tl.int16, bitcast=True).to(tl.int32) << 16
    return (high + remainder.to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def load_master(weight_ptr, remainder_ptr, at, inside, SPLIT: tl.constexpr):
    """The fp32 master at some places: of a bf16 weight and its remainder (SPLIT), or the fp32 weight itself."""
    if SPLIT:
        high = tl.load(weight_ptr + at, mask=inside, other=0.0)
        return join_bits(high, tl.load(remainder_ptr + at, mask=inside, other=0))
    else:
        return tl.load(weight_ptr + at, mask=inside, other=0.0)


@triton.jit
def store_master(weight_ptr, remainder_ptr, at, master, inside, SPLIT: tl.constexpr):
    """Store a new fp32 master, every NaN as the canonical one; whether a weight, as it is kept, is not finite."""
    bits = tl.where(master != master, NAN_BITS, master.to(tl.int32, bitcast=True))
    seen = bits  # the weight as the network computes with it, by its bits
    if SPLIT:
        seen = bits + 0x8000
        tl.store(weight_ptr + at, (seen >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True), mask=inside)
        tl.store(remainder_ptr + at, bits.to(tl.int16), mask=inside)
    else:
        tl.store(weight_ptr + at, bits.to(tl.float32, bitcast=True), mask=inside)
    return tl.max(tl.where(inside, seen & 0x7F800000, 0), axis=0) == 0x7F800000
