"""Workloads: what a launch trains and how, declared once each: stacked language models, the paper's network.

Everything outside asks the workload, through `Workload` before anything is loaded and through `Setup` after;
`workload_of` is the one place that chooses. Nothing here imports torch.
"""

import datetime
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from engine.hyper import rule_of
from engine.optim import OPTIMIZERS, by_group
from engine.outcome import Arrays, Thresholds, measure_label, probe_label
from engine.schedule import SCHEDULES

ORDERS = 3  # other seeds whose data order a noise floor takes

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from engine.checkpoint import LoadedModel
    from engine.config import Run, SweepConfig
    from engine.family import Family
    from engine.plan import Launch, Plan
    from engine.store import Replicate, Store


class Replay(NamedTuple):
    """A cell trained again.

    losses: fp32 [S], before each update. weights: fp32 by name, {} if not kept. model: what `engine.checkpoint` saves,
    None where no format of it has the network.
    """

    losses: np.ndarray
    weights_digest: int
    weights: "dict[str, torch.Tensor]"
    model: "LoadedModel | None" = None


class Setup(Protocol):
    """A sweep that is ready to train: its plan, and whatever its workload has loaded."""

    run: "Run"
    plan: "Plan"
    device: "torch.device"
    chunk_rows: int
    """rows of a stored chunk"""
    launches: "list[Launch]"

    @property
    def width(self) -> int:
        """Runs that train at once, so that a launch should hold as many."""

    @property
    def exact(self) -> str:
        """What a cell's bits depend on: 'at any width', 'in the same wave' or launch."""

    @property
    def inputs(self) -> dict[str, str]:
        """SHA-256 by name of every input that decides a cell, beside the configuration and the coordinates."""

    @property
    def attributes(self) -> dict[str, Any]:
        """What the store says of it."""

    def to_train(self, launch: "Launch", status: np.ndarray) -> np.ndarray:
        """Flat indices of the cells of a launch that are trained: those missing, and whichever that takes."""

    def train(
        self, launch: "Launch", status: np.ndarray, progress: Callable[[float, float], None]
    ) -> "Iterator[list[tuple[np.ndarray, dict[str, np.ndarray]]]]":
        """Train what is missing of a launch; yields now and then (flat cells, measurements) that are done."""

    def replay(self, cell: int) -> Replay:
        """Train one cell, by its flat index, again."""

    def describe(self, table: "Table", left: "list[Launch]", status: np.ndarray) -> float:
        """Add rows of the dry run to a table; the seconds it will take about."""

    def announce(self) -> list[str]:
        """Lines for the start of a sweep."""


@dataclass(frozen=True)
class Workload:
    """One way to train, before anything is loaded."""

    options: type
    """dataclass of the fields that only its sweeps have"""
    hyper: "Callable[[SweepConfig], tuple[str, ...]]"
    """hyper-parameters that a sweep reads, the family's own left out"""
    reads: "Callable[[Run, str], bool]"
    """whether a swept hyper-parameter changes anything, the others as they are"""
    resolve: "Callable[[Run, str], Run]"
    """(run, device type): its own fields filled in and checked; ValueError in one line"""
    prepare: "Callable[[Run, torch.device, Any, int, Store | None], Setup]"
    """(run, device, RunOptions, ranks, store): load and plan; ValueError before any training"""
    plan: "Callable[[Run], Plan]"
    """which steps serve which cells"""
    label: Callable[[Arrays, np.ndarray, Thresholds], np.ndarray]
    labelled: tuple[str, ...]
    """measurements that `label` reads, beside `status`"""
    ranks: str
    """the measurement by which a cell is better the lower it is"""
    setting: "Callable[[Run], str]"
    """how it trains what is not swept, in a few words, for a sentence that holds for this alone"""
    traces: bool
    """whether --trace auto stores every loss"""
    unit: str
    """what the progress counts"""
    keeps_weights: bool
    """whether a replay gives the cell's final weights"""
    order: "Callable[[Replicate], dict[str, list[SweepConfig]]]"
    """the same sweep in other orders, by what is ordered, for the noise floor; {} where there is none"""


# ---- language models


@dataclass(frozen=True)
class LanguageOptions:
    """Data, optimizer and schedule of a language model's sweep."""

    context: int = 64  # tokens a sequence
    # chitchat (the package), a .txt, .jsonl or .parquet file, a folder, a hub name; a.jsonl:0.7,b.jsonl:0.3 mixes
    data: str = "chitchat"
    data_config: str = ""  # configuration name of a folder's or a hub's data set
    split: str = "train"  # split of a folder's or a hub's data set
    packing: str = "cut"  # cut: documents end to end, cut every context; best-fit: whole documents, rows filled up
    date: str = ""  # what a chat template prints as today, YYYY-MM-DD (default: the day the store is made)
    data_rows: int = 16384  # sequences taken from the data, always the same ones (0: all of them)
    validation_rows: int = 0  # held-out sequences of the probe (0: as many as cost 0.15 of training)
    optimizer: str = "adamw"  # %(legal)s; by parameter group: adamw,matrix=muon
    freeze: str = ""  # parameter groups that are not trained, with commas between
    count: str = "tokens"  # what tokens and unique_tokens count: %(legal)s (only those that are learned)
    schedule: str = "constant"  # %(legal)s (wsd: warm-up, stable, decay; linear: to zero)
    micro_batch: int = 0  # sequences a forward pass; larger batches accumulate gradients (0: chosen from the batches)
    # ranks that share every batch, as many as torchrun started if no number is given; bits depend on how many
    ddp: int = field(default=1, metadata={"custom_args": {"nargs": "?", "const": 0}})


COUNTS = {"tokens": "", "supervised": "supervised"}
"""the field of a corpus that says what each row adds to `tokens`, by what is counted; '' where every row adds its
context"""


def language_hyper(config: "SweepConfig") -> tuple[str, ...]:
    """Those of the data and the start, of every optimizer that is used, and of the schedule."""
    training = config.training
    names = ["tokens", "unique_tokens", "epochs", "batch", "seed", "init_scale", "warmup", "clip"]
    for optimizer in set(by_group(training.optimizer, config.family.groups).values()):
        names += OPTIMIZERS[optimizer].hyper
    return (*names, *schedule_of(training.schedule).hyper)


def schedule_of(name: str) -> Any:
    """The declaration of a schedule. Raises ValueError for an unknown name."""
    if name not in SCHEDULES:
        raise ValueError(f"schedule is {name!r}; expected one of {', '.join(SCHEDULES)}")
    return SCHEDULES[name]


def leaf_groups(family: "Family") -> list[str]:
    """Groups that parameters are in: those that are no other's parent."""
    return [group for group in family.groups if group not in family.groups.values()]


def language_reads(run: "Run", name: str) -> bool:
    """Whether some group that trains takes its value from this name, where the name acts in an optimizer."""
    base = name.partition(".")[0]
    if rule_of(base).acts != "optimizer":
        return True
    training, family = run.config.training, run.config.family
    optimizers = by_group(training.optimizer, family.groups)
    trained = [group for group in leaf_groups(family) if group not in training.freeze.split(",")]
    return any(base in OPTIMIZERS[optimizers[group]].hyper and run.source(base, group) == name for group in trained)


def resolve_language(run: "Run", device: str) -> "Run":
    """Micro-batch filled in, every field checked; the size of the probe follows from the plan."""
    from engine.config import at_least, expect
    from engine.plan import automatic_micro_batch

    training = run.config.training
    for name, low in (("context", 1), ("micro_batch", 0), ("validation_rows", 0), ("data_rows", 0), ("ddp", 0)):
        at_least(name, getattr(training, name), low)
    if not training.data.strip():
        raise ValueError("data is empty; expected chitchat, a file, a folder or a hub name")
    for group in training.freeze.split(",") if training.freeze else ():
        if group not in run.config.family.groups:
            raise ValueError(f"freeze has {group!r}; expected some of {', '.join(run.config.family.groups)}")
    expect("packing", training.packing, ("cut", "best-fit"))
    expect("count", training.count, tuple(COUNTS))
    if training.date:
        check_date(training.date)
    check_schedule(run)
    if not COUNTS[training.count]:
        check_steps(run)
    data = training.data if training.data == "chitchat" else resolved_data(training.data)
    training = replace(training, data=data, ddp=training.ddp or ranks_started())
    run = replace(run, config=replace(run.config, training=training))
    training = replace(training, micro_batch=training.micro_batch or automatic_micro_batch(run))
    return replace(run, config=replace(run.config, training=training))


def ranks_started() -> int:
    """The ranks of torchrun. Raises ValueError where there is but one process."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if ranks == 1:
        raise ValueError("--ddp shares every batch among ranks, but one process was started; start it with torchrun")
    return ranks


def check_date(text: str) -> None:
    """Raise ValueError for anything but a day as YYYY-MM-DD."""
    try:
        day = datetime.date.fromisoformat(text).isoformat()
    except ValueError:
        day = ""
    if day != text:
        raise ValueError(f"date is {text!r}; expected a day as YYYY-MM-DD, for example 2026-11-25")


def resolved_data(data: str) -> str:
    """The data's name with local paths made absolute, so that a store can be gone on with from another folder."""
    from engine.data.corpus import parse_mix

    parts = [(str(Path(n).resolve()) if Path(n).exists() else n, weight) for n, weight in parse_mix(data)]
    return ",".join(f"{n}:{weight:g}" for n, weight in parts) if len(parts) > 1 else parts[0][0]


def check_schedule(run: "Run") -> None:
    """Raise ValueError where warm-up and decay overlap."""
    if "decay" in schedule_of(run.config.training.schedule).hyper:
        together = (run.column("warmup") + run.column("decay")).max()
        if together > 1:
            raise ValueError(f"warmup and decay are {together:g} of the steps together; expected at most 1")


def check_steps(run: "Run") -> None:
    """Raise ValueError unless every cell has two whole steps: one step says nothing about training."""
    from engine.plan import planned_steps

    if planned_steps(run).min() < 2:
        tokens, training = run.column("tokens"), run.config.training
        step = int(run.column("batch").max()) * training.context
        raise ValueError(
            f"tokens starts at {tokens.min():g}, below two steps of {step} tokens (batch x context; counted are "
            f"{training.count}); expected more: raise tokens, or lower --batch or --context"
        )


def language_setting(run: "Run") -> str:
    """Optimizer, batch, schedule and data."""
    training = run.config.training
    batch = f"{run.config.value('batch'):g}" if "batch" not in run.names else "the batch"
    said = [training.optimizer, f"{batch} x {training.context} tokens a step", f"{training.schedule} schedule"]
    said += [f"{name} {value:g}" for name, value in run.config.hyper.items() if name not in ("tokens", "batch")]
    said += [f"{training.freeze} frozen"] if training.freeze else []
    from engine.amount import short_name

    return ", ".join([*said, f"on {short_name(training.data)}"])


def prepare_language(run: "Run", device: "torch.device", options: Any, ranks: int, stored: "Store | None") -> "Setup":
    """`engine.language.prepare`."""
    from engine.language import prepare

    return prepare(run, device, options, ranks, stored)


def plan_language(run: "Run") -> "Plan":
    """`engine.plan.plan_runs`."""
    from engine.plan import plan_runs

    return plan_runs(run)


def other_seeds(store: "Replicate") -> dict[str, list["SweepConfig"]]:
    """ORDERS other seeds, thus other initial weights and data orders; nothing where the seed is swept."""
    if "seed" in store.run.names:
        return {}
    first = store.config.seed + store.run.replicates
    return {"order": [store.config.change(seed=first + k, replicates=1) for k in range(ORDERS)]}


# ---- the paper's two-layer network


@dataclass(frozen=True)
class TwoLayerTraining:
    """The problem and the length of the paper's training."""

    steps: int = 500  # gradient descent steps
    data_points: int = 0  # training points (0: 272, or 16 for the identity network)
    minibatch: int = 0  # points a step, drawn with replacement (0: the full batch)
    offset_every_step: bool = False  # add the offset at each step, as the public notebook does
    problem: str = ""  # .npz with X, Y, W0, W1 (and minibatch_index) instead of the seed's


def resolve_two_layer(run: "Run", device: str) -> "Run":
    """Data points filled in, every field checked."""
    from engine.config import at_least

    training = run.config.training
    for name, low in (("steps", 2), ("data_points", 0), ("minibatch", 0)):
        at_least(name, getattr(training, name), low)
    if training.problem and not Path(training.problem).is_file():
        raise ValueError(f"problem file {training.problem!r} does not exist; give an .npz with X, Y, W0 and W1")
    if training.problem and ("seed" in run.names or run.replicates > 1):
        raise ValueError("the seed is swept, but --problem fixes what it decides; leave out one of them")
    if not training.data_points:
        training = replace(training, data_points=16 if run.config.shape.nonlinearity == "identity" else 272)
    if training.problem:
        training = replace(training, problem=str(Path(training.problem).resolve()))
    return replace(run, config=replace(run.config, training=training))


def two_layer_reads(run: "Run", name: str) -> bool:
    """Whether one of the two layers takes its rate from this name."""
    return name.partition(".")[0] != "lr" or name in (run.source("lr", "0"), run.source("lr", "1"))


def two_layer_setting(run: "Run") -> str:
    """Steps and points."""
    training = run.config.training
    points = f"{training.minibatch} of {training.data_points}" if training.minibatch else f"all {training.data_points}"
    given = [f"{name} {value:g}" for name, value in run.config.hyper.items()]
    return ", ".join([f"{training.steps} steps of gradient descent", f"{points} points a step", *given])


def prepare_two_layer(run: "Run", device: "torch.device", options: Any, ranks: int, stored: "Store | None") -> "Setup":
    """`engine.two_layer.prepare`."""
    from engine.two_layer import prepare

    return prepare(run, device, options, ranks, stored)


def plan_two_layer(run: "Run") -> "Plan":
    """`engine.plan.plan_cells`."""
    from engine.plan import plan_cells

    return plan_cells(run)


def permuted(store: "Replicate") -> dict[str, list["SweepConfig"]]:
    """`engine.two_layer.permuted_problem`: the same hidden units in another order; nothing where the seed is swept."""
    if "seed" in store.run.names or store.run.replicates > 1:
        return {}
    from engine.two_layer import permuted_problem

    return {"permuted": [store.config.change(problem=str(permuted_problem(store)), replicates=1)]}


WORKLOADS: dict[str, Workload] = {
    "language": Workload(
        options=LanguageOptions,
        hyper=language_hyper,
        reads=language_reads,
        resolve=resolve_language,
        prepare=prepare_language,
        plan=plan_language,
        label=probe_label,
        labelled=(
            "first_loss", "nonfinite_step", "val_first", "val_loss", "loss_min", "loss_max", "loss_noise",
            "val_difference_se",
        ),
        ranks="val_loss",
        setting=language_setting,
        traces=True,
        unit="tokens",
        keeps_weights=True,
        order=other_seeds,
    ),
    "two_layer": Workload(
        options=TwoLayerTraining,
        hyper=lambda config: ("lr", "seed", "init_scale"),
        reads=two_layer_reads,
        resolve=resolve_two_layer,
        prepare=prepare_two_layer,
        plan=plan_two_layer,
        label=measure_label,
        labelled=("first_loss", "nonfinite_step", "measure"),
        ranks="measure",
        setting=two_layer_setting,
        traces=False,
        unit="steps",
        keeps_weights=False,
        order=permuted,
    ),
}  # fmt: skip


def workload_of(family: "Family") -> Workload:
    """What trains a family's networks."""
    return WORKLOADS[family.workload]
