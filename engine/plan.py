"""From a grid to work: cells -> trajectories -> launches.

A trajectory is one training run from step 0. Cells whose runs are the same up to each cell's last step
share one: with a constant learning rate and no warm-up, a row of token budgets is a single run read
off at several marks. Schedules that look ahead to the last step give every budget a run of its own.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from engine.config import SweepConfig
from engine.grid import HYPER_PARAMETERS

EVALUATED = 16  # replicas whose held-out loss is measured at once, at most
EVALUATED_BYTES = 2 * 2**30  # their weights, at most (or one replica's)

LANGUAGE_NAMES = tuple(name for name, rule in HYPER_PARAMETERS.items() if "gpt" in rule.networks)


class Mark(NamedTuple):
    """A step at which cells are read off a trajectory: after `step` updates."""

    step: int
    cells: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Trajectory:
    """One training run.

    hyper holds the hyper-parameters of `LANGUAGE_NAMES` as float64 (learning rates of groups that are
    not given are absent and follow `lr`); total is the run's length for its schedule, in steps.
    """

    hyper: dict[str, float]
    total: int
    marks: tuple[Mark, ...]

    @property
    def steps(self) -> int:
        """Steps until the last mark."""
        return self.marks[-1].step


def fixed_hyper(config: SweepConfig) -> dict[str, float]:
    """The fixed hyper-parameters that are given."""
    values = {name: config.fixed(name) for name in LANGUAGE_NAMES}
    return {name: value for name, value in values.items() if value is not None}


def cell_hyper(config: SweepConfig, row: int, col: int) -> dict[str, float]:
    """Every hyper-parameter of one cell: the fixed values, with the two axes' put in."""
    grid = config.grid
    return fixed_hyper(config) | {grid.y.name: float(grid.y.values[row]), grid.x.name: float(grid.x.values[col])}


def steps_of(tokens: np.ndarray | float, batch: np.ndarray | float, context: int) -> np.ndarray:
    """Steps that consume a cell's tokens, int: ceil(tokens / (batch * context)).

    An excess of a billionth makes no step: 5,120 tokens of a logarithmic axis can be 5,120.000000000003.
    """
    return np.ceil(tokens / (batch * context) * (1 - 1e-9)).astype(int)


def looks_ahead(config: SweepConfig) -> bool:
    """Whether a step's learning rate depends on how many steps are still to come."""
    warms_up = config.warmup > 0 or "warmup" in config.swept
    return config.schedule != "constant" or warms_up


def trajectories(config: SweepConfig, rows: range) -> list[Trajectory]:
    """The runs that serve the cells of some grid rows, longest first (ties in grid order)."""
    grid = config.grid
    ahead = looks_ahead(config)
    runs: dict[tuple, dict[int, list[tuple[int, int]]]] = {}
    hypers: dict[tuple, dict[str, float]] = {}
    y_values, x_values = grid.y.values, grid.x.values
    fixed = fixed_hyper(config)
    for row in rows:
        for col in range(grid.x.points):
            hyper = fixed | {grid.y.name: float(y_values[row]), grid.x.name: float(x_values[col])}
            steps = int(steps_of(hyper["tokens"], hyper["batch"], config.context))
            key = tuple(value for name, value in hyper.items() if name != "tokens") + ((steps,) if ahead else ())
            hypers.setdefault(key, hyper)
            runs.setdefault(key, {}).setdefault(steps, []).append((row, col))
    made = []
    for key, by_step in runs.items():
        marks = tuple(Mark(step, tuple(by_step[step])) for step in sorted(by_step))
        made.append(Trajectory(hypers[key], marks[-1].step, marks))
    return sorted(made, key=lambda run: -run.steps * run.hyper["batch"])


def launches(config: SweepConfig, rows_per_launch: int) -> list[range]:
    """The grid's rows, cut into launches."""
    rows = config.grid.shape[0]
    return [range(start, min(start + rows_per_launch, rows)) for start in range(0, rows, rows_per_launch)]


def longest(config: SweepConfig) -> int:
    """Steps of the sweep's longest run."""
    if config.network == "mlp":
        return config.steps
    return int(steps_of(config.values("tokens").max(), config.values("batch").min(), config.context))


def largest_batch(config: SweepConfig) -> int:
    """Sequences in the sweep's largest batch."""
    return int(config.values("batch").max())


def seeds(config: SweepConfig) -> list[int]:
    """Every seed of the sweep."""
    return [int(value) for value in np.unique(config.values("seed"))]


class Memory(NamedTuple):
    """Bytes one replica needs: weights, optimizer state and gradients, and a micro-step's activations.

    weights: bytes of its weights in the compute precision, which a replica under evaluation needs once more.
    """

    state: int
    activations: int
    weights: int

    @property
    def total(self) -> int:
        """Bytes a replica."""
        return self.state + self.activations

    def stack(self, replicas: int) -> int:
        """Bytes of a whole stack."""
        return replicas * self.total + evaluated_at_once(self.weights, replicas) * self.weights


def replica_memory(config: SweepConfig, parameters: int, activations: int) -> Memory:
    """Bytes one replica needs on the device.

    fp32 master (with bf16 compute: bf16 weight and 16-bit remainder), the optimizer's fp32 moments and a
    gradient in the compute precision; an fp32 accumulator where batches are cut into micro-batches.
    """
    moments = 2 if config.optimizer == "adamw" else 1
    compute = 2 if config.precision == "bf16" else 4
    state = 4 + 4 * moments + compute
    if largest_batch(config) > config.micro_batch:
        state += 4
    return Memory(parameters * state, activations, parameters * compute)


def evaluated_at_once(weights: int, replicas: int) -> int:
    """Replicas whose held-out loss is measured at once: enough to fill a GPU, not so many that a few slots at a
    mark cost much, and within EVALUATED_BYTES of weights where one replica is."""
    return min(replicas, EVALUATED, max(EVALUATED_BYTES // weights, 1))


def slots_that_fit(memory: Memory, budget: int) -> int:
    """Replicas that fit in `budget` bytes.

    Raises:
        ValueError: not even one does.
    """
    fit = budget // memory.total
    while fit > 0 and memory.stack(fit) > budget:
        fit -= 1
    if fit < 1:
        raise ValueError(
            f"one replica needs {memory.stack(1) / 2**30:.1f} GiB, the device offers {budget / 2**30:.1f} GiB; "
            "lower --depth, --context or --micro-batch"
        )
    return int(fit)


def automatic_rows(config: SweepConfig, device: str) -> int:
    """Grid rows a launch where the user leaves it to us.

    A launch's rows are one chunk of the store, rewritten as its cells finish, so its loss traces stay
    under 64 MiB. On a GPU a launch is as many rows as that allows: the more trajectories wait, the
    longer every slot stays busy. On a CPU a launch is what an interrupted sweep has to repeat, so it
    holds about 16 trajectories.
    """
    rows, cols = config.grid.shape
    trace = cols * longest(config) * 4 if config.trace == "on" else 1
    rows_by_store = max(2**26 // trace, 1)
    if device != "cpu":
        return min(rows, rows_by_store)
    per_row = len(trajectories(config, range(1)))
    return min(rows, rows_by_store, max(16 // per_row, 1))
