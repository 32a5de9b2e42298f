"""R replicas of a network as one stack of tensors; torch.func.vmap makes the stack.

The network is written for one replica. Its parameters live in flat [R, P] buffers, and each is a view of
them, contiguous within a replica. With fp32 compute the weights are the master that the optimizer
updates. With bf16 compute the fp32 master is the bf16 weight and a 16-bit remainder, exactly
(`kernels.split_master`): 2 bytes a parameter less to keep and to move than a master beside its
copy. Autograd runs outside vmap.

Letters: R replica, B batch, T time, P flat parameters.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call, vmap

from engine.network import Network
from kernels.digest import digest
from kernels.split_master import join_master, split_master

ALIGNMENT = 64  # elements: parameters start on 128 bytes, which the tensor copy engine needs at least 16 of


class Span(NamedTuple):
    """Where a parameter lies in the flat buffers."""

    name: str
    group: str
    shape: tuple[int, ...]
    slice: slice


def spans_of(network: Network) -> list[Span]:
    """Every parameter's place, in the module's order."""
    spans, start = [], 0
    for name, shape in network.shapes.items():
        size = torch.Size(shape).numel()
        spans.append(Span(name, network.groups[name], shape, slice(start, start + size)))
        start += -(-size // ALIGNMENT) * ALIGNMENT
    return spans


class Stack:
    """The parameters of R replicas, and their losses and gradients."""

    def __init__(self, network: Network, replicas: int, dtype: torch.dtype, device: torch.device) -> None:
        """Allocate zero parameters for `replicas`; dtype is the network's (bf16 or fp32)."""
        self.network = network
        self.spans = spans_of(network)
        self.replicas = replicas
        size = -(-self.spans[-1].slice.stop // ALIGNMENT) * ALIGNMENT
        self.weight_RP = torch.zeros(replicas, size, dtype=dtype, device=device)
        self.remainder_RP: Tensor | None = None
        if dtype != torch.float32:
            self.remainder_RP = torch.zeros(replicas, size, dtype=torch.int16, device=device)
        self.weights = {name: w.requires_grad_() for name, w in self.views(self.weight_RP.detach()).items()}

    def zeros(self) -> Tensor:
        """An fp32 buffer [R, P] beside the weights: a moment, an accumulator."""
        return torch.zeros(self.weight_RP.shape, device=self.weight_RP.device)

    @property
    def master_RP(self) -> Tensor:
        """The fp32 master weights [R, P]: the weights themselves, or joined anew in mixed precision."""
        return self.masters(slice(None), slice(None))

    def masters(self, slots, place: slice) -> Tensor:
        """The fp32 master weights of some slots at some place."""
        if self.remainder_RP is None:
            return self.weight_RP[slots, place]
        return join_master(self.weight_RP[slots, place], self.remainder_RP[slots, place])

    def views(self, flat_RP: Tensor) -> dict[str, Tensor]:
        """Every parameter as [R, *shape] views of a flat buffer."""
        return {s.name: flat_RP[:, s.slice].unflatten(1, s.shape) for s in self.spans}

    def losses(
        self, weights: dict[str, Tensor], tokens_RBT: Tensor, targets_RBT: Tensor, smoothing_R: Tensor
    ) -> Tensor:
        """Summed loss of each replica's micro-batch, fp32 [R]."""

        def one_replica(weights, tokens_BT, targets_BT, smoothing):
            return functional_call(self.network.module, weights, (tokens_BT, targets_BT, smoothing))

        return vmap(one_replica)(weights, tokens_RBT, targets_RBT, smoothing_R)

    def losses_and_gradients(
        self,
        tokens_RBT: Tensor,
        targets_RBT: Tensor,
        smoothing_R: Tensor,
        count_R: Tensor,
        ready: Callable[[Span, Tensor], None] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Summed losses [R], and the gradients of loss / count, one [R, n] a parameter.

        The gradient of a sum over replicas is each replica's own: a NaN neighbour adds nothing. `ready`, if
        given, is called with each gradient once it is known, when nothing reads that parameter any more.
        """
        loss_R = self.losses(self.weights, tokens_RBT, targets_RBT, smoothing_R)
        hooks = []
        if ready is not None:
            hooks = [
                self.weights[span.name].register_hook(lambda gradient, span=span: ready(span, gradient.flatten(1)))
                for span in self.spans
            ]
        gradients = torch.autograd.grad((loss_R / count_R).sum(), list(self.weights.values()))
        for hook in hooks:
            hook.remove()
        return loss_R.detach(), [gradient.flatten(1) for gradient in gradients]

    def flatten(self, initial: dict[str, Tensor], scale: float) -> tuple[Tensor, ...]:
        """Initial weights, times `scale` where they are matrices, as one slot holds them: weight [P], remainder [P]."""
        master_P = torch.zeros(self.weight_RP.shape[1], device=self.weight_RP.device)
        for span in self.spans:
            values = initial[span.name].to(master_P.device)
            master_P[span.slice] = (values * scale if len(span.shape) > 1 else values).flatten()
        return (master_P,) if self.remainder_RP is None else split_master(master_P)

    def load(self, slot: int, flat: tuple[Tensor, ...]) -> None:
        """Put what `flatten` returned into one slot."""
        self.weight_RP[slot] = flat[0]
        if self.remainder_RP is not None:
            self.remainder_RP[slot] = flat[1]

    def digest(self, slots: Tensor) -> Tensor:
        """64-bit digests of the fp32 master weights of some slots, int64 [len(slots)]."""
        return digest(self.weight_RP, self.remainder_RP, slots)

    def master_weights(self, slot: int) -> dict[str, Tensor]:
        """One slot's fp32 master weights by name, on the CPU."""
        return {s.name: self.masters(slot, s.slice).cpu().clone().view(s.shape) for s in self.spans}
