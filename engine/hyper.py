"""Hyper-parameters: everything that may be swept or fixed under a name, each declared once.

Flags, help texts, bounds, checks, axes, stored coordinates and the slots' device tensors follow from
`HYPER_PARAMETERS`. One that acts by parameter group may be given for one group as `name.group`
(`lr.attention`); a group's value that is not given follows its parent group's, then the plain name.
"""

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field

import numpy as np

LARGEST = 1e30

# where a hyper-parameter acts: on a run's length and data, its initial weights, the learning rate over its
# steps, the gradient before the update, the update, or the network's forward
PLACES = ("data", "start", "schedule", "gradient", "optimizer", "forward")


@dataclass(frozen=True)
class HyperParameter:
    """One hyper-parameter: what it is, its legal values, its default, and where it acts."""

    acts: str
    """one of PLACES"""
    help: str
    """what `--help` says"""
    default: float
    long_name: str = ""
    """the words for pictures; '' where the name says it"""
    units: str = "1"
    low: float = 0.0
    high: float = LARGEST
    """bounds of the legal values, both inclusive"""
    integer: bool = False
    """rounded to whole numbers"""
    in_kernel: bool = True
    """whether kernels see it, as float32 (float64 at --precision fp64): neighbours on an axis must differ there"""
    by_group: bool = False
    """whether it may be given for one parameter group"""
    at_evaluation: float | None = None
    """acts in the forward: its value on the probe; None: the run's own"""
    off: float | None = None
    """acts in the forward, which does without it where every cell has this value"""
    follows: tuple[str, ...] = ()
    """those it is made of where each of them is given or has a default, and it is not given"""
    made: Callable[[np.ndarray, np.ndarray], np.ndarray] = np.multiply
    """its value from theirs"""
    counted: Mapping[str, str] = field(default_factory=dict)
    """its `long_name` by what --count says a token is, where that is another"""

    @property
    def has_default(self) -> bool:
        """Whether the default is a legal value; else it stands for none."""
        return self.low <= self.default <= self.high


HYPER_PARAMETERS: dict[str, HyperParameter] = {
    "lr": HyperParameter("optimizer", "learning rate", 1e-3, "learning rate", by_group=True),
    "tokens": HyperParameter(
        "data",
        "tokens trained on = unique_tokens * epochs; steps = ceil(tokens / (batch * context))",
        16384.0,
        "training tokens",
        "token",
        low=1.0,
        high=1e15,
        in_kernel=False,
        follows=("unique_tokens", "epochs"),
        counted={"supervised": "supervised tokens"},
    ),
    "unique_tokens": HyperParameter(
        "data",
        "tokens there are to train on, in whole rows: the first of the seed's order (default: all of the data)",
        np.inf,
        "unique tokens",
        "token",
        low=1.0,
        high=1e15,
        in_kernel=False,
        follows=("tokens", "epochs"),
        made=np.divide,
        counted={"supervised": "unique supervised tokens"},
    ),
    "epochs": HyperParameter(
        "data",
        "times the unique tokens are seen (default: as tokens and unique_tokens have it)",
        0.0,
        low=1e-9,
        high=1e9,
        in_kernel=False,
        follows=("tokens", "unique_tokens"),
        made=np.divide,
    ),
    "batch": HyperParameter(
        "data",
        "sequences a step",
        4.0,
        "batch size",
        "sequence",
        low=1.0,
        high=1e6,
        integer=True,
        in_kernel=False,
    ),
    "seed": HyperParameter(
        "data",
        "seed of the initial weights and the data order",
        0.0,
        high=2.0**31 - 1,
        integer=True,
        in_kernel=False,
    ),
    "init_scale": HyperParameter("start", "factor on every initial weight matrix", 1.0, "initial scale"),
    "offset": HyperParameter("start", "constant added to the first layer's initial weights", 0.0, low=-LARGEST),
    "warmup": HyperParameter("schedule", "share of the steps spent warming up linearly", 0.0, "warm-up", high=1.0),
    "decay": HyperParameter("schedule", "share of the steps spent decaying linearly", 0.2, high=1.0),
    "floor": HyperParameter("schedule", "last learning rate as a share of the peak", 0.0, high=1.0),
    "clip": HyperParameter("gradient", "largest gradient norm (0: no clipping)", 0.0, "gradient clip"),
    "weight_decay": HyperParameter("optimizer", "decoupled weight decay", 0.0, "weight decay", by_group=True),
    "beta1": HyperParameter("optimizer", "decay of the first moment", 0.9, high=1.0 - 1e-7, by_group=True),
    "beta2": HyperParameter("optimizer", "decay of the second moment", 0.95, high=1.0 - 1e-7, by_group=True),
    "eps": HyperParameter("optimizer", "added to the root of the second moment", 1e-8, by_group=True),
    "momentum": HyperParameter("optimizer", "decay of the velocity", 0.0, high=1.0, by_group=True),
    "muon_momentum": HyperParameter(
        "optimizer", "decay of Muon's momentum", 0.95, "momentum", high=1.0 - 1e-7, by_group=True
    ),
    "muon_momentum_start": HyperParameter(
        "optimizer", "Muon's momentum at the first step, where it warms up", 0.85, high=1.0 - 1e-7, by_group=True
    ),
    "muon_momentum_warmup": HyperParameter(
        "optimizer",
        "steps in which Muon's momentum rises linearly from its start (0: none)",
        0.0,
        units="step",
        integer=True,
        by_group=True,
    ),
    "normuon_beta2": HyperParameter(
        "optimizer", "decay of NorMuon's second moment", 0.9, high=1.0 - 1e-7, by_group=True
    ),
    "dropout": HyperParameter(
        "forward",
        "share of the residual stream's additions that is dropped, behind the embedding and each half of a layer",
        0.0,
        high=1.0 - 1e-6,
        at_evaluation=0.0,
        off=0.0,
    ),
    "label_smoothing": HyperParameter(
        "forward",
        "share of the target spread over the vocabulary",
        0.0,
        "label smoothing",
        high=1.0,
        at_evaluation=0.0,
    ),
}


def declared(name: str) -> HyperParameter | None:
    """The declaration behind a name, which may be a group's (`lr.mlp`); None if there is none."""
    base, _, group = name.partition(".")
    rule = HYPER_PARAMETERS.get(base)
    return None if rule is None or (group and not rule.by_group) else rule


def rule_of(name: str) -> HyperParameter:
    """The declaration behind a name that is known to have one."""
    rule = declared(name)
    assert rule is not None, name
    return rule


def long_name(name: str, count: str = "") -> str:
    """The words for pictures: `lr.mlp` is 'learning rate of mlp'. count: of the sweep's tokens, as --count says."""
    base, _, group = name.partition(".")
    rule = rule_of(name)
    words = rule.counted.get(count) or rule.long_name or base
    return f"{words} of {group}" if group else words


def sources(name: str, group: str, parents: Mapping[str, str]) -> list[str]:
    """The names that may give a group its value, nearest first: lr.attention, lr.matrix, lr.

    Args:
        parents: parent of each group, '' for none (`Family.groups`).
    """
    chain = []
    while group and rule_of(name).by_group:
        chain.append(f"{name}.{group}")
        group = parents.get(group, "")
    return [*chain, name]


def source(name: str, group: str, parents: Mapping[str, str], given: Container[str]) -> str:
    """The name that gives a group its value where `given` ones are given: the nearest, else the plain name."""
    return next((each for each in sources(name, group, parents) if each in given), name)


def check_value(name: str, value: float) -> None:
    """Raise ValueError unless the value is legal for the hyper-parameter."""
    rule = rule_of(name)
    if not rule.low <= value <= rule.high:
        raise ValueError(f"{name} is {value:g}; expected a value in [{rule.low:g}, {rule.high:.7g}]")
    if rule.integer and value != round(value):
        raise ValueError(f"{name} is {value:g}; expected a whole number")


def kernel_type(name: str, precision: str) -> type[np.floating]:
    """The numbers in which the kernels see a hyper-parameter's values."""
    return np.float32 if rule_of(name).in_kernel and precision != "fp64" else np.float64
