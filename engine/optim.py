"""Optimizers over stacked parameters, declared once: which hyper-parameters, which state, one update.

`OPTIMIZERS` names them. Flags, checks, the memory formula and the slots' device tensors follow. Every
hyper-parameter is an [R] tensor on the device. State buffers are fp32 and start at zero. An update touches only
replicas that are active, and a replica's bits must not depend on the others. They combine by parameter group:
`--optimizer adamw,embedding=sgd`.

Letters: R replica, n elements of one parameter of one replica.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Parameter(NamedTuple):
    """One parameter of every replica, as an update sees it.

    weight_Rn: in the compute dtype. remainder_Rn: int16, with which a bf16 weight makes the fp32 master
    (`kernels.split_master`), or None where the weight itself is fp32. shape: of one replica's tensor.
    rows: first and last + 1 of each matrix that is fused in it along its first dimension.
    """

    name: str
    shape: tuple[int, ...]
    rows: tuple[tuple[int, int], ...]
    weight_Rn: "Tensor"
    remainder_Rn: "Tensor | None"

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
    init: Callable[[tuple[int, ...]], dict[str, int]]
    """shape of a parameter -> elements of each state buffer; all start at zero"""
    update: "Callable[[Parameter, Tensor, Mapping[str, Tensor], Step], None]"
    """(parameter, gradient [R, n], state buffers [R, elements], step): one step, in place"""
    prepare: "Callable[[Mapping[str, Tensor], Tensor], dict[str, Tensor]]" = nothing
    """(hyper_R, number of this step counted from 1, int64 [R]): [R] tensors worked out once a step and group"""
    overlaps: bool = False
    """whether an update may run beside the rest of the backward: only where none of its in-place torch operations
    bumps the weights' shared version counter, which trips autograd's check"""

    def state_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of one parameter's state in one replica."""
        return 4 * sum(self.init(shape).values())


# ---- AdamW


def adamw_init(shape: tuple[int, ...]) -> dict[str, int]:
    """First and second moment of every element."""
    return {"first": prod(shape), "second": prod(shape)}


def adamw_prepare(hyper_R: "Mapping[str, Tensor]", count_R: "Tensor") -> "dict[str, Tensor]":
    """1 / (1 - beta1^count) and 1 / sqrt(1 - beta2^count), fp32 [R], computed in fp64.

    Moments start at zero: the first, and the second one's root, count that much more in the count-th update.
    """
    count_R = count_R.double()
    bias1_R, bias2_R = 1 - hyper_R["beta1"].double() ** count_R, 1 - hyper_R["beta2"].double() ** count_R
    return {"correction1": (1 / bias1_R).float(), "correction2": (1 / bias2_R.sqrt()).float()}


def adamw_update(parameter: Parameter, gradient_Rn: "Tensor", state: "Mapping[str, Tensor]", step: Step) -> None:
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
    weight, remainder = parameter.weight_Rn, parameter.remainder_Rn
    if remainder is None:
        adamw_(weight, gradient_Rn, None, state["first"], state["second"], scalars)
    else:
        adamw_split_(remainder, gradient_Rn, weight, state["first"], state["second"], scalars)


# ---- SGD


def sgd_init(shape: tuple[int, ...]) -> dict[str, int]:
    """The velocity of every element."""
    return {"velocity": prod(shape)}


def sgd_update(parameter: Parameter, gradient_Rn: "Tensor", state: "Mapping[str, Tensor]", step: Step) -> None:
    """One step of gradient descent with heavy-ball momentum and decoupled weight decay.

    u = momentum u + g;  p = p (1 - lr wd) - lr u. Plain torch on every device: elementwise, so batch-invariant.
    """
    import torch

    rate, decay, momentum = (step.hyper_R[name][:, None] for name in ("lr", "weight_decay", "momentum"))
    moved = momentum * state["velocity"] + step.gradient(gradient_Rn)
    stepped = parameter.master() * (1 - rate * decay) - rate * moved
    state["velocity"].copy_(torch.where(step.active_R[:, None], moved, state["velocity"]))
    parameter.write(stepped, step)


OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": Optimizer(
        "AdamW, decoupled weight decay",
        ("lr", "weight_decay", "beta1", "beta2", "eps"),
        adamw_init,
        adamw_update,
        adamw_prepare,
        overlaps=True,
    ),
    "sgd": Optimizer(
        "gradient descent with heavy-ball momentum", ("lr", "weight_decay", "momentum"), sgd_init, sgd_update
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
