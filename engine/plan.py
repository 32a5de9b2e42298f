"""From cells to work: cells -> trajectories -> launches, and the memory they need.

A trajectory is one training run from step 0. Cells whose runs are the same up to each cell's last step share
one: with a constant learning rate and no warm-up, a row of token budgets is a single run measured at several
marks. Schedules that need the horizon give every budget a run of its own. The plan is arrays over all cells,
made once; trajectories are made from it a launch at a time.

A cell's flat index counts over [replicate, *cells] in C order.
"""

import heapq
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from engine.config import Run
from engine.hyper import HYPER_PARAMETERS, rule_of
from engine.outcome import NOT_COMPUTED
from engine.schedule import SCHEDULES, SLACK

EVALUATED = 16  # replicas whose probe is evaluated at once, at most
EVALUATED_BYTES = 2 * 2**30  # their weights, at most (or one replica's)
PROBE_SHARE = 0.15  # of training's cost, that the probe may cost where its size is automatic
MOST_PROBE_ROWS = 1024
CHUNK_BYTES = 2**26  # traces in one stored chunk, at most
LAUNCH_BYTES = 2**29  # traces in one launch, which the host holds, at most
CPU_RUNS = 16  # trajectories of a launch on a CPU, about
CHUNKS_A_WORKER = 4  # that several processes on one sweep find, at least
ALL_ROWS = 2**62  # of the training set, however many there are
WAVES = 64  # waves of slots from which the last one's emptiness does not matter


class Mark(NamedTuple):
    """A step at which cells are measured on a trajectory: after `step` updates. cells: flat indices."""

    step: int
    cells: tuple[int, ...]


@dataclass(frozen=True)
class Trajectory:
    """One training run.

    hyper holds every hyper-parameter that is given or has a default, by the name that gives it, as float64; total is
    the run's length for its schedule, in steps.
    """

    hyper: dict[str, float]
    total: int
    marks: tuple[Mark, ...]

    @property
    def steps(self) -> int:
        """Steps until the last mark."""
        return self.marks[-1].step


class Chunk(NamedTuple):
    """What one stored object of every array holds: rows [start, stop) of the cells of one replicate."""

    replicate: int
    start: int
    stop: int


Launch = tuple[Chunk, ...]


@dataclass(frozen=True)
class Plan:
    """Which run serves each cell, and until which step."""

    run: Run
    steps: np.ndarray
    """planned steps of every cell, int64 [replicate, *cells]"""
    key: np.ndarray
    """cells of equal key share a run, int64 [replicate, *cells]"""
    cost: np.ndarray
    """what one step of a cell's run costs, in the workload's unit, float64 [replicate, *cells]"""

    @property
    def row_cells(self) -> int:
        """Cells in a row of one replicate."""
        return math.prod(self.run.cells.shape[1:])

    def cells_in(self, launch: Launch) -> np.ndarray:
        """Flat indices of a launch's cells, ascending by chunk."""
        size, rows = self.row_cells, self.run.cells.shape[0]
        return np.concatenate([np.arange((c.replicate * rows + c.start) * size, (c.replicate * rows + c.stop) * size)
                               for c in launch])  # fmt: skip

    def work_in(self, cells: np.ndarray) -> "Work":
        """The runs that serve some cells (flat indices)."""
        # picked by place: flat, an array that is broadcast would be copied whole, for every chunk of 10^7 cells
        at = np.unravel_index(cells, self.steps.shape)
        key, steps = self.key[at], self.steps[at]
        order = np.lexsort((steps, key))
        cells, key, steps = cells[order], key[order], steps[order]
        new_run = np.flatnonzero(np.diff(key, prepend=key[:1] - 1))
        new_mark = np.flatnonzero(np.diff(key, prepend=key[:1] - 1) | np.diff(steps, prepend=0))
        last = np.append(new_run[1:], len(cells)) - 1
        return Work(self, cells, steps, new_run, new_mark, cells[last], steps[last])

    def missing(self, launch: Launch, status: np.ndarray) -> np.ndarray:
        """Flat indices of a launch's cells that are not computed yet."""
        cells = self.cells_in(launch)
        return cells[status.ravel()[cells] == NOT_COMPUTED]


@dataclass(frozen=True)
class Work:
    """Runs over some cells, as arrays: cells sorted by run and step.

    cells, steps: [cell]. runs: where each run begins in them. marks: where each mark does. longest: the cell of each
    run's last mark. lengths: steps of each run.
    """

    plan: Plan
    cells: np.ndarray
    steps: np.ndarray
    runs: np.ndarray
    marks: np.ndarray
    longest: np.ndarray
    lengths: np.ndarray

    @property
    def costs(self) -> np.ndarray:
        """What each run costs, in the workload's unit, float64 [run]."""
        return self.lengths * self.plan.cost[np.unravel_index(self.longest, self.plan.cost.shape)]

    def trajectories(self) -> list[Trajectory]:
        """Every run as an object, the costliest first (ties in the order of their first cells)."""
        hyper = hyper_of(self.plan.run, self.longest)
        first = np.minimum.reduceat(self.cells, self.runs) if len(self.runs) else self.runs
        bounds = np.append(self.marks, len(self.cells))
        mark_of = np.append(np.searchsorted(self.marks, self.runs), len(self.marks))
        made: list[Trajectory] = [None] * len(self.runs)  # type: ignore[list-item]
        for place, index in enumerate(np.lexsort((first, -self.costs))):
            marks = tuple(
                Mark(int(self.steps[bounds[m]]), tuple(np.sort(self.cells[bounds[m] : bounds[m + 1]]).tolist()))
                for m in range(mark_of[index], mark_of[index + 1])
            )
            made[place] = Trajectory({n: float(v[index]) for n, v in hyper.items()}, marks[-1].step, marks)
        return made


def hyper_of(run: Run, cells: np.ndarray) -> dict[str, np.ndarray]:
    """Every hyper-parameter that is given or has a default, of some cells (flat indices), float64 [cell]."""
    names = [*HYPER_PARAMETERS, *sorted(name for name in run.given if "." in name)]
    shape = run.shape
    at = np.unravel_index(cells, shape)
    values = {}
    for name in names:
        base, _, group = name.partition(".")
        column = run.column(base, group) if group else run.column(base)
        values[name] = np.broadcast_to(column, shape)[at]
    return values


def planned_steps(run: Run) -> np.ndarray:
    """Steps that reach every cell's budget, int64, broadcasting to [replicate, *cells]."""
    tokens, batch = run.column("tokens"), run.column("batch")
    if run.counts is None:
        return steps_of(tokens, batch, run.config.training.context)
    from engine.data.order import rows_that_hold

    seeds, unique, tokens = np.broadcast_arrays(run.column("seed"), unique_rows(run), tokens)
    rows = np.empty(tokens.shape, np.int64)
    for seed, repeated in set(zip(seeds.flat, unique.flat, strict=True)):
        here = (seeds == seed) & (unique == repeated)
        rows[here] = rows_that_hold(tokens[here], int(seed), run.counts, int(repeated))
    return np.ceil(rows / batch).astype(np.int64)


def unique_rows(run: Run) -> np.ndarray:
    """Rows of the training set that every cell's run sees, int64, broadcasting to [replicate, *cells].

    ALL_ROWS where it sees whatever there is.
    """
    tokens, context = run.column("unique_tokens"), run.config.training.context
    known = np.isfinite(tokens)
    finite = np.where(known, tokens, 1.0)
    if run.counts is None:
        return np.where(known, steps_of(finite, 1, context), ALL_ROWS)
    from engine.data.order import rows_that_hold

    seeds, finite, known = np.broadcast_arrays(run.column("seed"), finite, known)
    rows = np.full(finite.shape, ALL_ROWS)
    for seed in np.unique(seeds):
        here = (seeds == seed) & known
        rows[here] = rows_that_hold(finite[here], int(seed), run.counts)
    return rows


def repeated_rows(key: np.ndarray, rows: np.ndarray, unique: np.ndarray) -> np.ndarray:
    """Which rows a cell's run repeats: the first so many of its seed's order, int64 of the shape of all three.

    Runs that end within their first epoch see the same rows whatever their unique tokens are. Where such runs are alike
    otherwise (of one key), they are read off the run with the longest first epoch, if that is long enough for all of
    them, and else off one of their own (0).
    """
    repeats = rows > unique
    group = np.unique(key, return_inverse=True)[1].reshape(key.shape)
    epoch, needed = np.zeros((2, group.max() + 1), np.int64)
    np.maximum.at(epoch, group[repeats], unique[repeats])
    np.maximum.at(needed, group[~repeats], rows[~repeats])
    return np.where(repeats, unique, np.where(needed <= epoch, epoch, 0)[group])


def steps_of(tokens: np.ndarray | float, batch: np.ndarray | float, context: int) -> np.ndarray:
    """Steps that consume a cell's tokens, int64: ceil(tokens / (batch * context)).

    A relative slack of 1e-9 absorbs float error: 5,120 tokens of a log axis can be 5,120.000000000003.
    """
    return np.ceil(tokens / (batch * context) * SLACK).astype(np.int64)


def needs_horizon(run: Run) -> bool:
    """Whether a step's learning rate depends on how many steps are still to come."""
    return SCHEDULES[run.config.training.schedule].needs_horizon or bool((run.column("warmup") > 0).any())


def plan_runs(run: Run) -> Plan:
    """The plan of language models: budgets of one run are its marks unless the schedule needs the horizon."""
    steps = np.broadcast_to(planned_steps(run), run.shape)
    columns = [run.column(name) for name in run.names if not rule_of(name).follows]  # the others decide steps and rows
    if "seed" not in run.names:
        columns.append(run.column("seed"))
    key = codes_of(columns, run.shape)
    if needs_horizon(run):
        assert key.max() < 2**62 // (steps.max() + 1)
        key = key * (steps.max() + 1) + steps
    if {"unique_tokens", "epochs"} & run.given:
        rows, unique = steps * run.column("batch").astype(np.int64), np.broadcast_to(unique_rows(run), run.shape)
        key = codes_of([key, repeated_rows(key, rows, unique)], run.shape)
    cost = run.column("batch") * float(run.config.training.context)
    return Plan(run, steps, key, np.broadcast_to(cost, run.shape))


def plan_cells(run: Run) -> Plan:
    """A plan in which every cell is a run of its own, all of the same length."""
    key = np.arange(math.prod(run.shape)).reshape(run.shape)
    steps = np.broadcast_to(np.array(run.config.training.steps), run.shape)
    return Plan(run, steps, key, np.broadcast_to(1.0, run.shape))


def codes_of(columns: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """A whole number for every cell, equal where all columns are, int64 of the shape they broadcast to."""
    code, size = np.zeros((1,) * len(shape), np.int64), 1
    for column in columns:
        values, inverse = np.unique(column, return_inverse=True)
        code, size = code * len(values) + inverse.reshape(column.shape), size * len(values)
        assert size < 2**62
    return np.broadcast_to(code, shape)


# ---- launches


def automatic_chunk_rows(plan: Plan, device: str) -> int:
    """Rows of one stored chunk, whose loss traces stay under CHUNK_BYTES; on a CPU of about CPU_RUNS trajectories."""
    rows = plan.run.cells.shape[0]
    by_store = max(CHUNK_BYTES // trace_bytes(plan), 1)
    if device != "cpu":
        return min(rows, by_store)
    per_row = len(plan.work_in(np.arange(plan.row_cells)).runs)
    return min(rows, by_store, max(CPU_RUNS // per_row, 1))


def trace_bytes(plan: Plan) -> int:
    """Bytes of the loss traces of one row."""
    return plan.row_cells * int(plan.steps.max()) * 4 if plan.run.config.swept.trace == "on" else plan.row_cells


def launches(plan: Plan, chunk_rows: int, rows: int, together: bool) -> list[Launch]:
    """All chunks, cut into launches of about `rows` rows.

    Args:
        together: whether a launch may hold chunks of several replicates; else its cells are those of one.
    """
    replicates, height = plan.run.replicates, plan.run.cells.shape[0]
    chunks = [
        [Chunk(k, start, min(start + chunk_rows, height)) for start in range(0, height, chunk_rows)]
        for k in range(replicates)
    ]
    lines = [[chunk for line in chunks for chunk in line]] if together else chunks
    count = max(-(-rows // chunk_rows), 1)
    return [tuple(line[start : start + count]) for line in lines for start in range(0, len(line), count)]


def shared_rows(rows: int, workers: int) -> int:
    """Rows of a chunk, at most: several a worker, so that the one that ends early can take more."""
    return rows if workers == 1 else -(-rows // (CHUNKS_A_WORKER * workers))


def automatic_launch_rows(plan: Plan, chunk_rows: int, ranks: int) -> int:
    """Rows a launch where cells are batch-invariant: the more trajectories wait, the longer every slot stays busy.

    As many as LAUNCH_BYTES of traces allow, but at least a launch a rank.
    """
    rows = plan.run.cells.shape[0] * plan.run.replicates
    return max(min(LAUNCH_BYTES // trace_bytes(plan), -(-rows // ranks)), chunk_rows)


# ---- data of a step


def automatic_micro_batch(run: Run) -> int:
    """Sequences a forward pass: the batches' common divisor, cut evenly where it exceeds 4,096 tokens.

    A function of the configuration alone, never of the number of replicas or the free memory, so a
    cell's sums are cut at the same places whatever machine or launch trains it. Where the common
    divisor is below 1,024 tokens, too few to fill a GPU, rows are masked instead. Of the ranks that share
    a batch, each has its part of it.
    """
    context = run.config.training.context
    batches = -(-run.values("batch").astype(int) // run.config.training.ddp)
    divisor = int(np.gcd.reduce(batches))
    enough = max(1024 // context, 1)
    if divisor < enough:
        return min(int(batches.max()), enough)
    pieces = -(-divisor // max(4096 // context, 1))
    return -(-divisor // pieces)


def automatic_probe_rows(plan: Plan) -> int:
    """Held-out sequences: the most whose evaluations cost at most PROBE_SHARE of training.

    A sequence evaluated costs a third of one trained on. Whole micro-batches where there is one.
    """
    run = plan.run
    work = plan.work_in(np.arange(plan.steps.size))
    trained = work.costs.sum() / run.config.training.context
    rows = int(PROBE_SHARE * 3 * trained / (len(work.marks) + len(starts_of(run))))
    micro_batch = run.config.training.micro_batch
    return int(np.clip(rows - rows % micro_batch if rows > micro_batch else rows, 1, MOST_PROBE_ROWS))


def starts_of(run: Run) -> np.ndarray:
    """Distinct starts of training: the values of what decides the untrained network, float64 [start, name]."""
    columns = [np.broadcast_to(run.column(name), run.shape).ravel() for name in start_names(run)]
    varying = [column for column in columns if column.size]
    if all((column == column[0]).all() for column in varying):
        return np.stack([column[:1] for column in varying], 1)
    return np.unique(np.stack(varying, 1), axis=0)


def start_names(run: Run) -> list[str]:
    """Hyper-parameters that decide the untrained network's losses: the seed, and those of the start and the forward."""
    known = run.config.family.hyper
    inside = [n for n in known if HYPER_PARAMETERS[n].acts == "forward" and HYPER_PARAMETERS[n].at_evaluation is None]
    return ["seed", "init_scale", *inside]


# ---- memory and slots


class Memory(NamedTuple):
    """Bytes on the device.

    shared: what all replicas read. state: of one replica, kept between steps. activations: of one replica's
    micro-step. weights: of one replica in the compute precision, which a replica under evaluation needs once more.
    """

    shared: int
    state: int
    activations: int
    weights: int

    @property
    def replica(self) -> int:
        """Bytes a replica."""
        return self.state + self.activations

    def stack(self, replicas: int) -> int:
        """Bytes of a whole stack."""
        return self.shared + replicas * self.replica + evaluated_at_once(self.weights, replicas) * self.weights


def evaluated_at_once(weights: int, replicas: int) -> int:
    """Replicas whose probe is evaluated at once: enough to fill a GPU, not so many that a few slots at a
    mark cost much, and within EVALUATED_BYTES of weights where one replica is."""
    return min(replicas, EVALUATED, max(EVALUATED_BYTES // max(weights, 1), 1))


def slots_that_fit(memory: Memory, budget: int) -> int:
    """Replicas that fit in `budget` bytes.

    Raises:
        ValueError: not even one does.
    """
    fit = max(budget - memory.shared, 0) // memory.replica
    while fit > 0 and memory.stack(fit) > budget:
        fit -= 1
    if fit < 1:
        raise ValueError(
            f"one replica needs {memory.stack(1) / 2**30:.1f} GiB, the device offers {budget / 2**30:.1f} GiB; "
            "lower --depth, --context or --micro-batch"
        )
    return int(fit)


def even_slots(lengths: np.ndarray, fit: int) -> int:
    """Slots, at most `fit`, that train runs of some lengths in the least slot-steps, the longest first.

    128 equal runs where 29 fit are 5 waves of 26, not 4 of 29 and one of 12. A step of a stack takes as long as its
    slots are many, so what counts is slots times the steps until the last run has ended.
    """
    if len(lengths) <= fit:
        return max(len(lengths), 1)
    if len(lengths) > WAVES * fit:
        return fit
    ordered = np.sort(lengths)[::-1].tolist()
    waves = -(-len(lengths) // fit)
    candidates = range(fit, max(-(-len(lengths) // (waves + 1)), 1) - 1, -1)
    return min(candidates, key=lambda slots: slots * makespan(ordered, slots))


def makespan(lengths: list[int], slots: int) -> int:
    """Steps until the last of some runs has ended, each going to the slot that is free first, in order."""
    free = lengths[:slots]
    heapq.heapify(free)
    for length in lengths[slots:]:
        heapq.heapreplace(free, free[0] + length)
    return max(free)
