"""R replicas of a network as one stack of tensors; torch.func.vmap makes the stack.

The network is written for one replica. Its trained parameters live in flat [R, P] buffers, and each is a view of
them, contiguous within a replica. With fp32 compute the weights are the master that the optimizer updates. With
bf16 compute the fp32 master is the bf16 weight and a 16-bit remainder, exactly (`split_master`): 2 bytes a
parameter less to keep and to move than a master beside its copy. Frozen parameters have neither remainder nor
gradient; where all starts are equal there is one copy for all replicas. Autograd runs outside vmap.

Letters: R replica, B batch, T time, P flat parameters, F flat frozen parameters.
"""

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call, vmap

from engine.network import Network
from engine.optim import Parameter
from kernels.digest import digest
from kernels.split_master import join_master, split_master

ALIGNMENT = 64  # elements: parameters start on 128 bytes, which the tensor copy engine needs at least 16 of


class Span(NamedTuple):
    """Where a parameter lies in the flat buffers, and the matrices fused in it (rows of its first dimension)."""

    name: str
    group: str
    shape: tuple[int, ...]
    rows: tuple[tuple[int, int], ...]
    slice: slice


def spans_of(network: Network, names: Collection[str]) -> list[Span]:
    """The places of some parameters, in the module's order."""
    spans, start = [], 0
    for name, shape in network.shapes.items():
        if name in names:
            size = torch.Size(shape).numel()
            rows = network.fused.get(name, ((0, shape[0]),))
            spans.append(Span(name, network.groups[name][0], shape, rows, slice(start, start + size)))
            start += aligned(size)
    return spans


def aligned(size: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def flat_size(spans: list[Span]) -> int:
    """Elements of a flat buffer of some parameters."""
    return aligned(spans[-1].slice.stop) if spans else 0


def parameter_of(
    span: Span, weight_RP: Tensor, remainder_RP: Tensor | None, gradient_Rn: Tensor, state: Mapping[str, Tensor]
) -> Parameter:
    """One parameter of flat buffers as its optimizer takes it; `state`: its buffers [R, elements] by name."""
    remainder_Rn = None if remainder_RP is None else remainder_RP[:, span.slice]
    return Parameter(span.name, span.shape, span.rows, weight_RP[:, span.slice], remainder_Rn, gradient_Rn, state)


class Flat(NamedTuple):
    """Weights as one slot holds them: trained weight [P], its remainder [P] or None, frozen weight [F]."""

    weight_P: Tensor
    remainder_P: Tensor | None
    frozen_F: Tensor


class Stack:
    """The parameters of R replicas, and their losses and gradients."""

    def __init__(
        self,
        network: Network,
        replicas: int,
        dtype: torch.dtype,
        device: torch.device,
        frozen: Collection[str] = (),
        shared: bool = True,
    ) -> None:
        """Allocate zero parameters for `replicas`.

        Args:
            dtype: the network's, bf16 or fp32.
            frozen: names of parameters that are not trained.
            shared: whether all replicas have the same frozen ones, for ever.
        """
        self.network = network
        self.spans = spans_of(network, [name for name in network.shapes if name not in frozen])
        self.frozen_spans = spans_of(network, frozen)
        self.replicas = replicas
        self.weight_RP = torch.zeros(replicas, flat_size(self.spans), dtype=dtype, device=device)
        self.remainder_RP: Tensor | None = None
        if dtype != torch.float32:
            self.remainder_RP = torch.zeros(replicas, flat_size(self.spans), dtype=torch.int16, device=device)
        self.frozen_RF = torch.zeros(
            1 if shared else replicas, flat_size(self.frozen_spans), dtype=dtype, device=device
        )
        self.shares_frozen = shared
        trained = self.views(self.weight_RP.detach(), self.spans)
        self.weights = {name: weight.requires_grad_() for name, weight in trained.items()}

    @property
    def master_RP(self) -> Tensor:
        """The fp32 master of the trained weights [R, P]: the weights themselves, or joined in mixed precision."""
        return self.masters(slice(None), slice(None))

    def masters(self, slots, place: slice) -> Tensor:
        """The fp32 master weights of some slots at some place."""
        if self.remainder_RP is None:
            return self.weight_RP[slots, place]
        return join_master(self.weight_RP[slots, place], self.remainder_RP[slots, place])

    def views(self, flat_RP: Tensor, spans: list[Span]) -> dict[str, Tensor]:
        """Parameters as [R, *shape] views of a flat buffer."""
        return {s.name: flat_RP[:, s.slice].unflatten(1, s.shape) for s in spans}

    def frozen(self, frozen_RF: Tensor) -> dict[str, Tensor]:
        """Frozen parameters as vmap takes them: without the replica dimension where they are shared."""
        views = self.views(frozen_RF, self.frozen_spans)
        return {name: view[0] for name, view in views.items()} if self.shares_frozen else views

    def losses(
        self,
        weights: dict[str, Tensor],
        frozen: dict[str, Tensor],
        tokens_RBT: Tensor,
        targets_RBT: Tensor,
        hyper_R: Mapping[str, Tensor],
        key_R3: Tensor,
        **options: bool,
    ) -> Tensor:
        """Summed loss of each replica's micro-batch, fp32 [R]; with by_row=True of each of its rows, [R, B].

        Args:
            hyper_R: what the forward reads, fp32 [R] each.
            key_R3: seed, step and first row of the batch, int64, for whatever the forward draws.
        """

        def one_replica(weights, frozen, tokens_BT, targets_BT, hyper, key):
            arguments = (tokens_BT, targets_BT, hyper, key)
            return functional_call(self.network.module, weights | frozen, arguments, options)

        in_dims = (0, None if self.shares_frozen else 0, 0, 0, 0, 0)
        return vmap(one_replica, in_dims)(weights, frozen, tokens_RBT, targets_RBT, dict(hyper_R), key_R3)

    def losses_and_gradients(
        self,
        tokens_RBT: Tensor,
        targets_RBT: Tensor,
        hyper_R: Mapping[str, Tensor],
        key_R3: Tensor,
        count_R: Tensor,
        ready: Callable[[Span, Tensor], None] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Summed losses [R], and the gradients of loss / count, one [R, n] a trained parameter.

        The gradient of a sum over replicas is each replica's own: a NaN neighbour adds nothing. `ready`, if
        given, is called with each gradient once it is known, when nothing reads that parameter any more.
        """
        frozen = self.frozen(self.frozen_RF)
        loss_R = self.losses(self.weights, frozen, tokens_RBT, targets_RBT, hyper_R, key_R3)
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

    def flatten(self, initial: Mapping[str, Tensor], scale: float) -> Flat:
        """Initial weights, times `scale` where they are matrices, as one slot holds them."""

        def joined(spans: list[Span]) -> Tensor:
            master_P = torch.zeros(flat_size(spans), device=self.weight_RP.device)
            for span in spans:
                values = initial[span.name].to(master_P)
                master_P[span.slice] = (values * scale if len(span.shape) > 1 else values).flatten()
            return master_P

        master_P, frozen_F = joined(self.spans), joined(self.frozen_spans)
        if self.remainder_RP is None:
            return Flat(master_P, None, frozen_F)
        return Flat(*split_master(master_P), split_master(frozen_F)[0])

    def load(self, slot: int, flat: Flat) -> None:
        """Put what `flatten` returned into one slot."""
        self.weight_RP[slot] = flat.weight_P
        if self.remainder_RP is not None:
            assert flat.remainder_P is not None
            self.remainder_RP[slot] = flat.remainder_P
        self.frozen_RF[0 if self.shares_frozen else slot] = flat.frozen_F

    def digest(self, slots: Tensor) -> Tensor:
        """64-bit digests of the fp32 master of the trained weights of some slots, int64 [len(slots)]."""
        return digest(self.weight_RP, self.remainder_RP, slots)

    def master_weights(self, slot: int) -> dict[str, Tensor]:
        """One slot's fp32 weights by name, on the CPU, in the module's order."""
        weights = {s.name: self.masters(slot, s.slice).cpu().clone().view(s.shape) for s in self.spans}
        frozen = self.views(self.frozen_RF, self.frozen_spans)
        weights |= {n: w[0 if self.shares_frozen else slot].float().cpu() for n, w in frozen.items()}
        return {name: weights[name] for name in self.network.shapes}
