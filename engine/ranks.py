"""The processes that torchrun starts: they lease chunks of one store, replicas never communicate."""

import os
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as distributed

SECONDS_A_LOOK = 0.02  # between two looks at whether every rank has come


@dataclass(frozen=True)
class Rank:
    """This process among those torchrun started."""

    index: int
    count: int

    def barrier(self) -> None:
        """Wait for every rank, and hear signals meanwhile."""
        if self.count > 1:
            waiting = distributed.barrier(async_op=True)
            while not waiting.is_completed():
                time.sleep(SECONDS_A_LOOK)
            waiting.wait()

    def gather(self, own: Any) -> list[Any]:
        """What every rank passes, by rank."""
        if self.count == 1:
            return [own]
        every = [None] * self.count
        distributed.all_gather_object(every, own)
        return every


def this_rank() -> Rank:
    """The rank torchrun gave this process; (0, 1) without torchrun."""
    rank = Rank(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    if rank.count > 1 and not distributed.is_initialized():
        # ranks only wait for each other, the first to finish for as long as the last one trains
        distributed.init_process_group("gloo", timeout=timedelta(days=365))
    return rank


def choose_device(name: str) -> torch.device:
    """The torch device of `--device`. Raises ValueError for an unknown or absent one."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device is {name!r}; expected auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch finds no CUDA GPU; use --device cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device
