"""A batch that is split over ranks: each has the same stack and trains its share of the rows; gradients are added up.

Sums are made here, not by the library's all-reduce: ranks exchange pieces, each adds up its own in the order of the
ranks, rounded once, and all gather the sums. So an element's bits depend on the number of ranks alone; a ring adds in
an order that depends on where the element lies, thus on the number of replicas. As many bytes move as in a ring.

Letters: R replica, n elements of a parameter, K rank, m elements of a rank's piece.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as distributed
from torch import Tensor

from engine.ranks import Rank, this_rank
from engine.stack import Span, aligned

# torch 2.13 renamed it
gather_single = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
BUCKET = 2**20  # bytes of a gradient that is sent alone; smaller ones wait for each other


class NondeterminismError(RuntimeError):
    """Two machines that count as equal have trained one cell to different bits."""


@dataclass(frozen=True)
class Split:
    """This process among those that share every batch; alone without --ddp. group: of torch.distributed."""

    index: int = 0
    count: int = 1
    group: Any = None

    def sums(self, tensors: list[Tensor]) -> list[Tensor]:
        """Sums over ranks of some tensors of one dtype, in new ones of their shapes."""
        starts = np.cumsum([0, *(aligned(each.numel()) for each in tensors)]).tolist()
        piece = -(-starts[-1] // self.count)
        if len(tensors) == 1 and tensors[0].numel() == piece * self.count:
            flat = tensors[0].contiguous().flatten()
        else:
            flat = tensors[0].new_zeros(piece * self.count)
            for start, each in zip(starts, tensors, strict=False):
                flat[start : start + each.numel()] = each.flatten()
        received_Km = torch.empty_like(flat)
        # as bytes: not every backend takes every type
        distributed.all_to_all_single(received_Km.view(torch.uint8), flat.view(torch.uint8), group=self.group)
        received_Km = received_Km.view(self.count, piece)
        total_m, own_m = received_Km[0], torch.empty_like(received_Km[0])
        for each_m in received_Km[1:-1]:
            total_m = torch.add(total_m.float(), each_m)
        torch.add(total_m, received_Km[-1], out=own_m)
        whole = torch.empty_like(flat)
        gather_single(whole.view(torch.uint8), own_m.view(torch.uint8), group=self.group)
        return [
            whole[a : a + each.numel()].view(each.shape) for (a, _), each in zip(pairwise(starts), tensors, strict=True)
        ]

    def check_same(self, digests: np.ndarray) -> None:
        """Raise NondeterminismError where the ranks do not hold the same weights."""
        every = Rank(self.index, self.count).gather(digests.tolist())
        if every.count(every[0]) < self.count:
            raise NondeterminismError(
                f"the ranks hold different weights, by their digests {every}: one computes wrongly"
            )

    def least(self, number: int) -> int:
        """The smallest of a number over ranks."""
        return min(Rank(self.index, self.count).gather(number))


def split_over(ranks: int, device: torch.device) -> Split:
    """The ranks that share every batch.

    Raises:
        ValueError: they are not as many as were started.
    """
    if ranks == 1:
        return Split()
    rank = this_rank()
    if rank.count != ranks:
        raise ValueError(
            f"ddp is {ranks}, but {rank.count} {'process was' if rank.count == 1 else 'processes were'} started; a "
            f"cell's bits depend on the number of ranks: start it with torchrun --nproc-per-node {ranks}"
        )
    return Split(rank.index, rank.count, group_on(device.type))


@cache
def group_on(device: str) -> Any:
    """The process group of all ranks for tensors on a kind of device: NCCL's on GPUs, else the one of the ranks."""
    return distributed.new_group(backend="nccl") if device == "cuda" else distributed.group.WORLD


class Buckets:
    """Gradients summed over ranks while the backward goes on: large ones at once, small ones together."""

    def __init__(self, split: Split, ready: Callable[[Span, Tensor], None], stream: torch.cuda.Stream | None) -> None:
        """
        Args:
            ready: called with each sum, on the stream.
            stream: that sums are made on, beside the one that is current now; None on a CPU.
        """
        self.split, self.ready, self.stream = split, ready, stream
        self.main = torch.cuda.current_stream() if stream else None
        self.small: list[tuple[Span, Tensor]] = []
        self.kept: list[Tensor] = []  # keep alive until the streams join: the allocator may reuse it

    def add(self, span: Span, gradient: Tensor) -> None:
        """Take a gradient [R, n] of this rank's share."""
        if gradient.nbytes >= BUCKET:
            self.send([(span, gradient)])
            return
        self.small.append((span, gradient))
        if sum(each.nbytes for _, each in self.small) >= BUCKET:
            self.flush()

    def flush(self) -> None:
        """Send what waits."""
        if self.small:
            waiting, self.small = self.small, []
            self.send(waiting)

    def send(self, gradients: list[tuple[Span, Tensor]]) -> None:
        """Sum some gradients over ranks."""
        if self.stream and self.main:
            self.stream.wait_stream(self.main)
        with torch.cuda.stream(self.stream):  # does nothing without one
            sums = self.split.sums([each for _, each in gradients])
            for (span, gradient), total in zip(gradients, sums, strict=True):
                self.kept += [gradient, total]
                self.ready(span, total)
