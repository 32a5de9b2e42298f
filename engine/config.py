"""What a sweep is: every field that decides a cell's numbers, and nothing else.

`SweepConfig` is the request; its fields come from four places: those every sweep has (here), the network's own
(`Family.options`), its workload's (`Workload.options`), and the hyper-parameters that are given
(`engine.hyper`). Resolved, with its cells, it is a `Run`: what a store holds. Two runs that are equal give equal
cells on one GPU model and one software stack. Options that only say where and how to run live in
`engine.options.RunOptions`.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import numpy as np

from engine.family import Family, family_of, spelt_out
from engine.grid import Cells, Grid, Points
from engine.hyper import HYPER_PARAMETERS, check_value, declared, long_name, rule_of, source
from engine.measure import MEASUREMENTS
from engine.workload import Workload, workload_of


@dataclass(frozen=True)
class Swept:
    """The cells, and how they are computed and kept."""

    y: str = ""  # rows: name:scale:low:high:points (default: the network's)
    x: str = ""  # columns, written alike (default: the network's)
    points: str = ""  # a .csv of points instead of a grid, a column for each hyper-parameter
    replicates: int = 1  # seeds every cell is trained with: seed, seed + 1, ...
    precision: str = "auto"  # %(legal)s (default: bf16 on a GPU, fp32 on a CPU; two_layer: fp32)
    trace: str = "auto"  # on: store every step's loss; off; auto: on except for two_layer
    measure: str = ""  # measured at every mark beside the rest: sharpness (a backward and some ten forward passes)


@dataclass(frozen=True)
class SweepConfig:
    """A sweep as it was asked for, or resolved."""

    network: str = "gpt"
    swept: Swept = Swept()
    shape: Any = None
    """the network's own fields"""
    training: Any = None
    """its workload's"""
    hyper: Mapping[str, float] = field(default_factory=dict)
    """the hyper-parameters that are given, by name"""

    @property
    def family(self) -> Family:
        """The network's declaration."""
        return family_of(self.network)

    @property
    def title(self) -> str:
        """The network in a few words."""
        return ", ".join(filter(None, (self.network, self.family.title(self.shape))))

    def long_name(self, name: str) -> str:
        """The words for a hyper-parameter's values in this sweep."""
        return long_name(name, self.flat().get("count", ""))

    @property
    def workload(self) -> Workload:
        """What trains it."""
        return workload_of(self.family)

    def flat(self) -> dict[str, Any]:
        """Every field by its name, as flags and stores have it."""
        parts = (asdict(part) for part in (self.swept, self.shape, self.training))
        return {"network": self.network} | {k: v for part in parts for k, v in part.items()} | dict(self.hyper)

    def change(self, **changes: Any) -> "SweepConfig":
        """The same sweep with other values of some flat fields; of a hyper-parameter, None takes it away."""
        return make_config(**{name: value for name, value in (self.flat() | changes).items() if value is not None})

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of the canonical JSON of every field."""
        return hashlib.sha256(json.dumps(self.flat(), sort_keys=True).encode()).hexdigest()

    @property
    def seed(self) -> int:
        """The first replicate's."""
        return int(self.value("seed"))

    def value(self, name: str) -> float:
        """The fixed value of a hyper-parameter: given, its parent's, or its default."""
        base, _, group = name.partition(".")
        found = source(base, group, self.family.groups, self.hyper)
        return float(self.hyper.get(found, HYPER_PARAMETERS[base].default))


def make_config(network: str = "", **values: Any) -> SweepConfig:
    """A sweep from flat values: fields of the network and its workload, and hyper-parameters by name.

    network: a name of FAMILIES or ALIASES; by default pretrained where a model is given, else gpt.

    Raises:
        ValueError: a name that this network has no field for.
    """
    network, left = spelt_out(network, values)
    family = family_of(network)
    parts: list[Any] = []
    for kind in (Swept, family.options, workload_of(family).options):
        own = {each.name for each in fields(kind)}
        parts.append(kind(**{name: left.pop(name) for name in list(left) if name in own}))
    config = SweepConfig(network, *parts)
    known = hyper_names(config)
    for name in left:
        if declared(name) is None:
            raise ValueError(f"{name} is {left[name]!r}, but the network {network!r} has no such field; leave it out")
        if name not in known:
            raise ValueError(
                f"{name} is {left[name]!r}, but this sweep of {network!r} does not read it; it has {', '.join(known)}"
            )
    return replace(config, hyper={name: float(value) for name, value in left.items()})


def hyper_names(config: SweepConfig) -> list[str]:
    """Every hyper-parameter that a sweep of this network may have, groups' included, in the order of declaration."""
    own = {*config.workload.hyper(config), *config.family.hyper}
    names = []
    for name, rule in HYPER_PARAMETERS.items():
        if name in own:
            names.append(name)
            names += [f"{name}.{group}" for group in config.family.groups if rule.by_group]
    return names


@dataclass(frozen=True)
class Run:
    """A resolved sweep and its cells: what is planned, trained and stored."""

    config: SweepConfig
    cells: Cells
    counts: np.ndarray | None = field(default=None, compare=False)
    """what each row of the training set adds to `tokens`, int32 [N]; None: its context"""

    @property
    def names(self) -> tuple[str, ...]:
        """The swept hyper-parameters."""
        return tuple(self.cells.columns)

    @cached_property
    def given(self) -> set[str]:
        """Hyper-parameters that are swept or given."""
        return {*self.names, *self.config.hyper}

    @property
    def replicates(self) -> int:
        """Seeds every cell is trained with."""
        return self.config.swept.replicates

    @property
    def shape(self) -> tuple[int, ...]:
        """(replicates, *cells)."""
        return self.replicates, *self.cells.shape

    def has(self, name: str) -> bool:
        """Whether a hyper-parameter is given or has a default."""
        return name in self.given or rule_of(name).has_default

    def source(self, name: str, group: str = "") -> str:
        """The hyper-parameter that gives `name` its value in a parameter group."""
        return source(name, group, self.config.family.groups, self.given)

    def column(self, name: str, group: str = "") -> np.ndarray:
        """A hyper-parameter's value in every cell, float64, broadcasting to [replicate, *cells]."""
        found = self.source(name, group)
        rule = rule_of(found)
        if found not in self.given and rule.follows and all(self.has(each) for each in rule.follows):
            return rule.made(*[self.column(each) for each in rule.follows])
        column = self.cells.columns.get(found, np.array(self.config.value(found)))
        if name != "seed" or "seed" in self.names:
            return column[None]
        return (self.config.seed + np.arange(self.replicates, dtype=np.float64))[
            (slice(None), *[None] * len(self.cells.shape))
        ]

    def values(self, name: str) -> np.ndarray:
        """The distinct values of a hyper-parameter over the whole sweep, ascending, float64."""
        return np.unique(self.column(name))


def cells_of(config: SweepConfig) -> Cells:
    """The cells that a configuration names. Raises ValueError for bad axes or points."""
    if config.swept.points:
        if config.swept.y or config.swept.x:
            raise ValueError("points are given beside an axis; leave out --points, or --y and --x")
        return Points.read(config.swept.points)
    y, x = config.family.axes
    grid = Grid.parse(config.swept.y or y, config.swept.x or x)
    return Grid(*(replace(axis, words=config.long_name(axis.name)) for axis in (grid.y, grid.x)))


def resolve(config: SweepConfig, device: str, cells: Cells | None = None) -> Run:
    """Fill in what `auto`, 0 and '' stand for, and check every field.

    Args:
        device: cpu or cuda.
        cells: those of a store, which are taken as they are.

    Raises:
        ValueError: a field's value is not legal, in one line.
    """
    family, swept = config.family, config.swept
    if cells is None:
        cells = cells_of(config)
    if isinstance(cells, Grid):
        swept = replace(swept, y=str(cells.y), x=str(cells.x))
    if swept.precision == "auto":
        swept = replace(swept, precision=family.automatic_precision[device])
    if swept.trace == "auto":
        swept = replace(swept, trace="on" if config.workload.traces else "off")
    expect("precision", swept.precision, family.precisions)
    expect("trace", swept.trace, ("on", "off"))
    at_least("replicates", swept.replicates, 1)
    for name in swept.measure.split(",") if swept.measure else ():
        expect("measure", name, tuple(n for n, m in MEASUREMENTS.items() if m.asked and family.workload in m.compute))
    config = replace(config, swept=swept, shape=family.resolve(config.shape))
    run = Run(config, cells)
    check_swept(run)
    for name, value in config.hyper.items():
        check_value(name, value)
    cells.check(swept.precision)
    return config.workload.resolve(run, device)


def check_swept(run: Run) -> None:
    """Raise ValueError for an axis or column that this network does not have, or that changes nothing."""
    known = hyper_names(run.config)
    for name in run.names:
        if name not in known:
            raise ValueError(
                f"axis {name!r} changes nothing in this sweep of {run.config.network!r}; it has {', '.join(known)}"
            )
        if name in run.config.hyper:
            raise ValueError(f"{name} is an axis, and --{name} is {run.config.hyper[name]:g}; leave out one of the two")
        if not run.config.workload.reads(run, name):
            raise ValueError(
                f"axis {name} changes nothing: no parameter group that trains takes its value from it; sweep something "
                "else"
            )
    for name, rule in HYPER_PARAMETERS.items():
        every = {name, *rule.follows}
        if rule.follows and every <= run.given:
            raise ValueError(
                f"{', '.join(sorted(every))} are all given; expected all but one, which follows from the others: leave "
                f"one out, as an axis or as a flag"
            )
    if run.replicates > 1 and "seed" in run.names:
        raise ValueError(f"replicates is {run.replicates}, but the seed is swept; leave out one of them")


def expect(name: str, value: str, legal: tuple[str, ...]) -> None:
    """Raise ValueError unless the value is one of the legal ones."""
    if value not in legal:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(legal)}")


def at_least(name: str, value: float, low: float) -> None:
    """Raise ValueError unless value >= low."""
    if not value >= low:
        raise ValueError(f"{name} is {value:g}; expected at least {low:g}")


# nanochat's rates at a width of 768, and the 0.8 of them that its fine-tuning starts with
NANOCHAT_SFT = {
    "unembedding": {"lr": 0.8 * 0.004, "beta1": 0.8, "beta2": 0.96, "weight_decay": 0.01},
    "embedding": {"lr": 0.8 * 0.2, "beta1": 0.8, "beta2": 0.995, "weight_decay": 0.001},
    "value_embeddings": {"lr": 0.8 * 0.1, "beta1": 0.8, "beta2": 0.995, "weight_decay": 0.01},
    "residual_lambdas": {"lr": 0.8 * 0.005, "beta1": 0.8, "beta2": 0.95, "weight_decay": 0.05},
    "x0_lambdas": {"lr": 0.8 * 0.5, "beta1": 0.96, "beta2": 0.95},
    "smear": {"lr": 0.8 * 0.2, "beta1": 0.8, "beta2": 0.95},
}
WIDTH_OF_RATES = 768

PRESETS: dict[str, SweepConfig] = {
    "default": make_config(),
    "smollm2-sft": make_config(network="smollm2", context=128, batch=8, beta2=0.999, data_rows=4096),
    "nanochat-sft": make_config(
        network="pretrained",
        y="lr.matrix:log:1e-4:1:16",
        x="lr.unembedding:log:1e-5:1e-1:16",
        context=1024,
        batch=8,
        tokens=250_000,
        optimizer="adamw,matrix=normuon",
        schedule="wsd",
        decay=0.5,
        eps=1e-10,
        muon_momentum_start=0.85,
        muon_momentum=0.95,
        muon_momentum_warmup=300,
        **{
            "lr.matrix": 0.8 * 0.02,
            **{f"{name}.{group}": v for group, own in NANOCHAT_SFT.items() for name, v in own.items()},
        },
    ),
    "fractal-sft": make_config(
        network="pretrained",
        y="lr.matrix:log:1e-6:3e-1:16",
        x="lr.unembedding:log:1e-6:1e-1:16",
        context=1024,
        batch=8,
        tokens=250_000,
        freeze="embedding",
        schedule="cosine",
        warmup=0.06,
        weight_decay=0.1,
    ),
}


def fit_preset(preset: SweepConfig, width: int, groups: set[str], tied: Mapping[str, str]) -> SweepConfig:
    """A preset for a network of some width and parameter groups.

    Values and axes of groups that the network does not have are left out, but for those of a tied table's second group
    (tied: it -> the first), which take the place of the first's: a table that is the head too learns at the head's
    rate. nanochat's AdamW rates grow with (width / 768)^-1/2.
    """
    parents = preset.family.groups
    there = groups | {parents[group] for group in groups}
    hyper = {}
    for name, value in preset.hyper.items():
        base, _, group = name.partition(".")
        if group in tied.values():
            continue
        own = tied.get(group, group)
        if own and own not in there:
            continue
        scaled = base == "lr" and group in NANOCHAT_SFT
        hyper[f"{base}.{own}" if own else base] = value * (width / WIDTH_OF_RATES) ** -0.5 if scaled else value
    swept = preset.swept
    for second, first in tied.items():
        swept = replace(swept, **{axis: getattr(swept, axis).replace(f".{second}:", f".{first}:") for axis in "yx"})
    return replace(preset, swept=swept, hyper=hyper)
