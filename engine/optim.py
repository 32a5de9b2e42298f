"""Optimizers over stacked parameters, declared once: which hyper-parameters, which state, one update.

`OPTIMIZERS` names them. Flags, checks, the memory formula and the slots' device tensors follow. Every
hyper-parameter is an [R] tensor on the device. State buffers are fp32 and start at zero. An update touches only
replicas that are active, and a replica's bits must not depend on the others. They combine by parameter group:
`--optimizer adamw,matrix=muon`.

Muon's hyper-parameters have names of their own, since its values suit no other optimizer: `muon_momentum`, which rises
linearly from `muon_momentum_start` over the first `muon_momentum_warmup` steps (0: not at all), and of the generation
of July 2026 `normuon_beta2`. Like all others they may be axes, also by group: `muon_momentum.mlp`.

Letters: R replica, n elements of one parameter of one replica.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.muon import Matrix, MuonScalars


Rows = tuple[tuple[int, int], ...]


class Parameter(NamedTuple):
    """One parameter of every replica, as an update sees it.

    weight_Rn: in the compute dtype. remainder_Rn: int16, with which a bf16 weight makes the fp32 master
    (`kernels.split_master`), or None where the weight itself is fp32. gradient_Rn: bf16 or fp32. state: fp32 buffers
    [R, elements] by name. shape: of one replica's tensor. rows: first and last + 1 of each matrix that is fused in it
    along its first dimension.
    """

    name: str
    shape: tuple[int, ...]
    rows: Rows
    weight_Rn: "Tensor"
    remainder_Rn: "Tensor | None"
    gradient_Rn: "Tensor"
    state: "Mapping[str, Tensor]"

    def master(self) -> "Tensor":
        """The fp32 master weight [R, n]."""
        from kernels.split_master import join_master

        return self.weight_Rn if self.remainder_Rn is None else join_master(self.weight_Rn, self.remainder_Rn)

    def matrices(self, buffer_Rn: "Tensor") -> "list[Tensor]":
        """Every matrix fused in this parameter as a view [R, rows, columns] of a buffer of its layout."""
        whole = buffer_Rn.unflatten(1, (self.shape[0], -1))
        return [whole[:, first:last] for first, last in self.rows]

    def write(self, master_Rn: "Tensor", step: "Step") -> None:
        """Store a new fp32 master [R, n] where the replica is active, and note where it is not finite."""
        import torch

        from kernels.split_master import split_master

        kept = torch.where(step.active_R[:, None], master_Rn, self.master())
        if self.remainder_Rn is not None:
            kept, remainder = split_master(kept)
            self.remainder_Rn.copy_(remainder)
        self.weight_Rn.copy_(kept)
        broken_R = step.active_R & ~torch.isfinite(self.weight_Rn).all(1)
        step.nonfinite_R.copy_(torch.where(broken_R, 1, step.nonfinite_R))


class Step(NamedTuple):
    """One step of one parameter group, one value a replica.

    hyper_R: fp32, of every name in `Optimizer.hyper`; `lr` is the scheduled rate. prepared_R: what
    `Optimizer.prepare` made of them. scale_R: factor on the gradient (clipping), or None. active_R: bool.
    nonfinite_R: int32, set to 1 where an updated weight is not finite.
    """

    hyper_R: "Mapping[str, Tensor]"
    prepared_R: "Mapping[str, Tensor]"
    scale_R: "Tensor | None"
    active_R: "Tensor"
    nonfinite_R: "Tensor"

    def gradient(self, gradient_Rn: "Tensor") -> "Tensor":
        """The gradient in fp32, scaled."""
        gradient_Rn = gradient_Rn.float()
        return gradient_Rn if self.scale_R is None else gradient_Rn * self.scale_R[:, None]


def nothing(hyper_R: "Mapping[str, Tensor]", count_R: "Tensor") -> "dict[str, Tensor]":
    """No preparation."""
    return {}


@dataclass(frozen=True)
class Optimizer:
    """An optimizer: what it reads, what it keeps, what it does."""

    help: str
    hyper: tuple[str, ...]
    """hyper-parameters it reads"""
    init: Callable[[tuple[int, ...], Rows], dict[str, int]]
    """(shape of a parameter, rows of its matrices) -> elements of each state buffer; all start at zero"""
    update: "Callable[[Sequence[Parameter], Step], None]"
    """one step of some parameters of one group, in place: of all of them at once, or of one where it overlaps"""
    prepare: "Callable[[Mapping[str, Tensor], Tensor], dict[str, Tensor]]" = nothing
    """(hyper_R, number of this step counted from 1, int64 [R]): [R] tensors worked out once a step and group"""
    overlaps: bool = False
    """whether an update may run beside the rest of the backward: only where none of its in-place torch operations
    bumps the weights' shared version counter, which trips autograd's check"""
    edge: Callable[[Mapping[str, Any]], Any] | None = None
    """hyper-parameters -> the (preconditioned) curvature beyond which its steps along a quadratic grow"""
    matrices_only: bool = False
    """whether it takes nothing but matrices between hidden units: no vectors, no table with a row for each token"""

    def state_bytes(self, shape: tuple[int, ...], rows: Rows) -> int:
        """Bytes of one parameter's state in one replica."""
        return 4 * sum(self.init(shape, rows).values())


# ---- AdamW


def adamw_init(shape: tuple[int, ...], rows: Rows) -> dict[str, int]:
    """First and second moment of every element."""
    return {"first": prod(shape), "second": prod(shape)}


def adamw_prepare(hyper_R: "Mapping[str, Tensor]", count_R: "Tensor") -> "dict[str, Tensor]":
    """1 / (1 - beta1^count) and 1 / sqrt(1 - beta2^count), fp32 [R], computed in fp64.

    Moments start at zero: the first, and the second one's root, count that much more in the count-th update.
    """
    count_R = count_R.double()
    bias1_R, bias2_R = 1 - hyper_R["beta1"].double() ** count_R, 1 - hyper_R["beta2"].double() ** count_R
    return {"correction1": (1 / bias1_R).float(), "correction2": (1 / bias2_R.sqrt()).float()}


def adamw_update(parameters: Sequence[Parameter], step: Step) -> None:
    """One AdamW step (Loshchilov & Hutter, arXiv:1711.05101)."""
    from kernels.adamw import AdamWScalars, adamw_, adamw_split_

    hyper_R = step.hyper_R
    scalars = AdamWScalars(
        learning_rate_R=hyper_R["lr"],
        weight_decay_R=hyper_R["weight_decay"],
        beta1_R=hyper_R["beta1"],
        beta2_R=hyper_R["beta2"],
        correction1_R=step.prepared_R["correction1"],
        correction2_R=step.prepared_R["correction2"],
        eps_R=hyper_R["eps"],
        scale_R=step.scale_R,
        active_R=step.active_R,
        nonfinite_R=step.nonfinite_R,
    )
    for parameter in parameters:
        weight, remainder, gradient = parameter.weight_Rn, parameter.remainder_Rn, parameter.gradient_Rn
        moments = parameter.state["first"], parameter.state["second"]
        if remainder is None:
            adamw_(weight, gradient, None, *moments, scalars)
        else:
            adamw_split_(remainder, gradient, weight, *moments, scalars)


# ---- SGD


def sgd_init(shape: tuple[int, ...], rows: Rows) -> dict[str, int]:
    """The velocity of every element."""
    return {"velocity": prod(shape)}


def sgd_update(parameters: Sequence[Parameter], step: Step) -> None:
    """One step of gradient descent with heavy-ball momentum and decoupled weight decay."""
    momentum_update(parameters, step, "velocity", None, step.hyper_R["momentum"])


def momentum_init(shape: tuple[int, ...], rows: Rows) -> dict[str, int]:
    """The momentum of every element."""
    return {"momentum": prod(shape)}


def momentum_update(
    parameters: Sequence[Parameter], step: Step, state: str, beta1_R: "Tensor | None", beta2_R: "Tensor"
) -> None:
    """`kernels.momentum.momentum_step_` of every parameter, its momentum in the state buffer of that name."""
    from kernels.momentum import MomentumScalars, momentum_step_

    rate_R, decay_R = step.hyper_R["lr"], step.hyper_R["weight_decay"]
    scalars = MomentumScalars(rate_R, decay_R, beta1_R, beta2_R, step.scale_R, step.active_R, step.nonfinite_R)
    for each in parameters:
        momentum_step_(each.weight_Rn, each.remainder_Rn, each.gradient_Rn, each.state[state], scalars)


# ---- Lion


def lion_update(parameters: Sequence[Parameter], step: Step) -> None:
    """One step of Lion (Chen et al. 2023, arXiv:2302.06675)."""
    momentum_update(parameters, step, "momentum", step.hyper_R["beta1"], step.hyper_R["beta2"])


# ---- Muon


def normuon_init(shape: tuple[int, ...], rows: Rows) -> dict[str, int]:
    """The momentum of every element, and of every fused matrix a second moment for each unit of its longer side."""
    return {"momentum": prod(shape), "second": sum(normuon_sides(shape, rows))}


def normuon_sides(shape: tuple[int, ...], rows: Rows) -> list[int]:
    """The longer side of every matrix that is fused in a parameter."""
    return [max(last - first, prod(shape[1:])) for first, last in rows]


def muon_prepare(hyper_R: "Mapping[str, Tensor]", count_R: "Tensor") -> "dict[str, Tensor]":
    """The momentum of this step, fp32 [R], computed in fp64: warmed up linearly, the first step at its start."""
    import torch

    start_R, end_R = hyper_R["muon_momentum_start"].double(), hyper_R["muon_momentum"].double()
    steps_R = hyper_R["muon_momentum_warmup"].double()
    share_R = torch.where(steps_R > 0, (count_R - 1) / steps_R.clamp(min=1), 1.0).clamp(max=1.0)
    return {"momentum": (start_R + (end_R - start_R) * share_R).float()}


def muon_update(parameters: Sequence[Parameter], step: Step) -> None:
    """One step of Muon, the matrices of one shape at once (`kernels.muon.muon_`)."""
    from kernels.muon import muon_

    for matrices in matrices_by_shape(parameters):
        muon_(matrices, muon_scalars(step, None))


def normuon_update(parameters: Sequence[Parameter], step: Step) -> None:
    """One step of Muon's generation of July 2026, the matrices of one shape at once (`kernels.muon.normuon_`)."""
    from kernels.muon import normuon_

    for matrices in matrices_by_shape(parameters):
        normuon_(matrices, muon_scalars(step, step.hyper_R["normuon_beta2"]))


def muon_scalars(step: Step, beta2_R: "Tensor | None") -> "MuonScalars":
    """What a step of either generation needs besides its matrices."""
    from kernels.muon import MuonScalars

    rate_R, decay_R, momentum_R = step.hyper_R["lr"], step.hyper_R["weight_decay"], step.prepared_R["momentum"]
    return MuonScalars(rate_R, decay_R, momentum_R, beta2_R, step.scale_R, step.active_R, step.nonfinite_R)


def matrices_by_shape(parameters: Sequence[Parameter]) -> "list[list[Matrix]]":
    """Every matrix of some parameters, those of one shape together."""
    from kernels.muon import Matrix

    found: dict[tuple[int, ...], list[Matrix]] = {}
    for parameter in parameters:
        count, second = len(parameter.rows), parameter.state.get("second")
        remainder = parameter.remainder_Rn
        views = zip(
            parameter.matrices(parameter.weight_Rn),
            [None] * count if remainder is None else parameter.matrices(remainder),
            parameter.matrices(parameter.gradient_Rn),
            parameter.matrices(parameter.state["momentum"]),
            [None] * count if second is None else second.split(normuon_sides(parameter.shape, parameter.rows), 1),
            strict=True,
        )
        for each in views:
            found.setdefault(tuple(each[0].shape), []).append(Matrix(*each))
    return list(found.values())


MUON = ("lr", "weight_decay", "muon_momentum", "muon_momentum_start", "muon_momentum_warmup")

OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": Optimizer(
        "AdamW, decoupled weight decay",
        ("lr", "weight_decay", "beta1", "beta2", "eps"),
        adamw_init,
        adamw_update,
        adamw_prepare,
        overlaps=True,
        edge=lambda hyper: (2 + 2 * hyper["beta1"]) / ((1 - hyper["beta1"]) * hyper["lr"]),
    ),
    "sgd": Optimizer(
        "gradient descent with heavy-ball momentum",
        ("lr", "weight_decay", "momentum"),
        sgd_init,
        sgd_update,
        overlaps=True,
        edge=lambda hyper: (2 + 2 * hyper["momentum"]) / hyper["lr"],
    ),
    "lion": Optimizer(
        "the sign of a momentum", ("lr", "weight_decay", "beta1", "beta2"), momentum_init, lion_update, overlaps=True
    ),
    "muon": Optimizer(
        "momentum, orthogonalised by five quintic steps",
        MUON,
        momentum_init,
        muon_update,
        muon_prepare,
        matrices_only=True,
    ),
    "normuon": Optimizer(
        "Muon of July 2026: rows equilibrated, Polar Express, NorMuon's second moment, cautious decay",
        (*MUON, "normuon_beta2"),
        normuon_init,
        normuon_update,
        muon_prepare,
        matrices_only=True,
    ),
}


def by_group(text: str, groups: Mapping[str, str]) -> dict[str, str]:
    """The optimizer of every parameter group: `adamw`, or `adamw,embedding=sgd`.

    Args:
        groups: of the family, each with its parent; a parent's optimizer is its children's unless they have their own.

    Raises:
        ValueError: an unknown optimizer or group, or none for the rest.
    """
    plain, _, rest = text.partition(",")
    chosen = {"": plain}
    for part in rest.split(",") if rest else ():
        group, equals, name = part.partition("=")
        if not equals or group not in groups:
            raise ValueError(
                f"optimizer has {part!r}; expected group=name with a group among {', '.join(groups)}, "
                "for example adamw,embedding=sgd"
            )
        chosen[group] = name
    for name in chosen.values():
        if name not in OPTIMIZERS:
            raise ValueError(f"optimizer is {name!r}; expected one of {', '.join(OPTIMIZERS)}")

    def of(group: str) -> str:
        return chosen[group] if group in chosen else of(groups[group])

    return {group: of(group) for group in groups}
