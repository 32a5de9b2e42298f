"""Score cells on tasks: `uv run analysis/evaluate.py --store S --cells 6x6 --tasks arc_easy,piqa --tasks-from FOLDER`.

The chosen cells are trained again, side by side in one stack, and their weights checked against the stored digests;
then all of them, and the weights they started from, answer the same items in one stack. Scores go into the store;
what is there is not scored again.
"""

if __name__ == "__main__" and not __package__:
    import started  # noqa: F401  says how to start it where its packages are missing

import gc
import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich.table import Table

from analysis.recommend import recommend
from analysis.scores import find_task, make_task
from analysis.tasks import CENTRED, Task, load_tasks
from engine.command import parse, screen, user_errors
from engine.grid import Grid
from engine.outcome import DONE, Thresholds, trains
from engine.replay import check_text, language_setup, place_of, replayed
from engine.scores import START, Scored, TaskScores, stored_tasks
from engine.store import Store, open_store

if TYPE_CHECKING:
    from engine.checkpoint import LoadedModel
    from engine.language import LanguageSetup
    from engine.workload import Replay

HOST_MEMORY = 0.3  # share of the machine's memory that replayed weights may take
AGGREGATES = {"CORE": "core:", "ChatCORE": "letters:"}  # means of centred accuracies over the tasks of a form
Place = tuple[int, ...]
"""a cell in [replicate, *cells]"""
Start = tuple[float, ...]
"""hyper-parameters that decide untrained weights"""


# ---- which cells


def chosen_cells(store: Store, asked: str, seeds: int = 0) -> list[Place]:
    """Measured cells by grid (6x6, evenly spread), list (`1,2 3,4`) or rule (best, boundary, all).

    Args:
        seeds: replicates, from the first; 0 for all.

    Raises:
        ValueError: none of these, a cell that is outside or not measured, or a rule that finds none.
    """
    if not 0 <= seeds <= store.run.replicates:
        raise ValueError(f"seeds is {seeds}; expected 1 to the store's {store.run.replicates}, or 0 for all")
    cells = cells_of(store, asked.strip())
    replicates = range(seeds or store.run.replicates)
    return [place_of(store, cell[0], cell[1] if len(cell) > 1 else 0, k) for k in replicates for cell in cells]


def cells_of(store: Store, asked: str) -> list[tuple[int, ...]]:
    """The cells of `chosen_cells` without their replicate."""
    shape = store.run.cells.shape
    if asked in RULES:
        found = RULES[asked](store)
        if not found:
            raise ValueError(f"cells is {asked}, of which {store.path} has none; expected some: give cells by 6x6")
        return found
    if re.fullmatch(r"\d+x\d+", asked):
        counts = [int(count) for count in asked.split("x")]
        if len(shape) != 2 or not all(1 <= n <= size for n, size in zip(counts, shape, strict=True)):
            there = "x".join(map(str, shape))
            raise ValueError(f"cells is {asked}; expected at most {there}, the store's own, and a grid")
        spread = [np.linspace(0, size - 1, n).round().astype(int) for n, size in zip(counts, shape, strict=True)]
        return [(int(row), int(col)) for row in spread[0] for col in spread[1]]
    listed = asked.split()
    if not listed or not all(re.fullmatch(r"\d+,\d+" if len(shape) == 2 else r"\d+", each) for each in listed):
        form = "1,2 3,4" if len(shape) == 2 else "1 5"
        raise ValueError(f"cells is {asked!r}; expected 6x6, a list such as {form!r}, or {', '.join(RULES)}")
    return list(dict.fromkeys(tuple(map(int, each.split(","))) for each in listed))


def boundary_cells(store: Store) -> list[tuple[int, ...]]:
    """Going up from each column's best cell, the last that trains and the first that breaks, of the first replicate."""
    if not isinstance(store.run.cells, Grid):
        raise ValueError(f"cells is boundary, but {store.path} holds a list of points; expected a grid")
    good, score = trains(store.labels(Thresholds())[0]), store.read(store.config.workload.ranks, 0).astype(float)
    found: list[tuple[int, ...]] = []
    for col in range(good.shape[1]):
        own = np.where(good[:, col], score[:, col], np.inf)
        best = int(own.argmin())
        broken = np.flatnonzero(~good[best:, col])
        if np.isfinite(own[best]) and len(broken):
            found += [(best + int(broken[0]) - 1, col), (best + int(broken[0]), col)]
    return found


RULES: dict[str, Callable[[Store], list[tuple[int, ...]]]] = {
    "best": lambda store: recommend(store).cells(),
    "boundary": boundary_cells,
    "all": lambda store: [tuple(cell) for cell in np.argwhere((store.status == DONE).all(0)).tolist()],
}


# ---- their weights


def groups_of(setup: "LanguageSetup", cells: np.ndarray) -> list[np.ndarray]:
    """Cells (flat indices) whose weights the machine's memory holds at once, those of one run together."""
    ordered = setup.plan.work_in(cells).cells if len(cells) else cells
    memory = HOST_MEMORY * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    size = max(int(memory // (4 * setup.network.parameters)), 1)
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def starts_of(store: Store, cells: np.ndarray) -> dict[int, Start]:
    """What decides the untrained weights of some cells (flat indices)."""
    from engine.plan import hyper_of, start_names

    hyper = hyper_of(store.run, cells)
    values = np.stack([hyper[name] for name in start_names(store.run)], axis=1)
    return dict(zip(cells.tolist(), map(tuple, values.tolist()), strict=True))


def release(device: Any) -> None:
    """Give back the memory of a trainer that has ended."""
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# ---- scoring


def score_cells(
    store: Store, places: Sequence[Place], tasks: Sequence[Task], device: str, say: Callable[[str], None]
) -> None:
    """Score cells on tasks into their store, what is missing of it.

    Args:
        say: is told what is done, a line each.

    Raises:
        ValueError: a store whose weights no replay gives, other items under a task's name, weights that differ.
    """
    check_text(store)
    with closing(store.place.lock()):
        stored = {task.name: find_task(store, task) for task in tasks}
        wanted = {}
        for task in tasks:
            found = stored[task.name]
            done = found.done if found else np.zeros(store.run.shape, bool)
            wanted[task.name] = {place for place in places if not done[place]}
        missing = set().union(*wanted.values())
        say(f"{len(places)} cells, {len(places) - len(missing)} of them scored before")
        if missing:
            Evaluation(store, tasks, stored, wanted, device, say).run(missing)


class Weights(NamedTuple):
    """Weights that are scored: of a start, or of cells (flat indices) that share a mark."""

    model: "LoadedModel"
    start: Start | None
    cells: list[int]


class Evaluation:
    """One run of the command: starts, then the cells of each group, scored task by task."""

    def __init__(
        self,
        store: Store,
        tasks: Sequence[Task],
        stored: dict[str, TaskScores | None],
        wanted: dict[str, set[Place]],
        device: str,
        say: Callable[[str], None],
    ) -> None:
        from engine.provenance import provenance

        self.store, self.stored, self.wanted, self.say = store, stored, wanted, say
        self.tasks = [task for task in tasks if wanted[task.name]]
        self.setup = language_setup(store, device)
        self.where = {"provenance": provenance(self.setup.device)}
        self.start_of: dict[int, Start] = {}
        self.starts: dict[tuple[Start, str], Scored] = {}
        self.cut: set[str] = set()

    def run(self, places: set[Place]) -> None:
        """Score some cells; the starts, which are written beside them, in the first stack."""
        flat = {int(np.ravel_multi_index(place, self.store.run.shape)): place for place in places}
        broken = self.store.read("nonfinite_step").ravel() >= 0
        self.start_of = starts_of(self.store, np.array(sorted(flat)))
        some = {start: cell for cell, start in self.start_of.items()}
        weights = [Weights(self.setup.start(cell), start, []) for start, cell in some.items()]
        for group in groups_of(self.setup, np.array([cell for cell in sorted(flat) if not broken[cell]], int)):
            began = time.perf_counter()
            again = replayed(self.store, self.setup, group, self.refuse)
            weights += [Weights(model, None, own) for own, model in again]
            release(self.setup.device)
            self.say(f"{len(group)} cells trained again ({time.perf_counter() - began:.1f} s): the stored weights")
            self.score(weights)
            weights = []
        self.score(weights)  # the starts, where all cells are broken
        lost = [cell for cell in flat if broken[cell]]
        if lost:
            self.say(f"{len(lost)} cells have weights that are not finite: they score nothing")
            for task in self.tasks:
                self.write(task, dict.fromkeys(lost, self.starts[next(iter(some)), task.name].nothing()))

    def refuse(self, place: Place, replay: "Replay") -> None:
        """Raise ValueError for a cell whose weights, trained again, are not those that were stored."""
        stored = int(self.store.read("weights_digest")[place])
        raise ValueError(
            f"cell {place[1:]} of replicate {place[0]} trained again has other weights (digest "
            f"{replay.weights_digest:#018x}, stored {stored:#018x}); expected the same: score it where it was "
            f"trained, on {self.store.attributes['provenance'].get('device')}"
        )

    def score(self, weights: list[Weights]) -> None:
        """Score weights on what is missing, as many in a stack as fit, and write what their cells score."""
        from engine.score import Scorer, stack_width

        if not weights:
            return
        precision, device = self.store.config.swept.precision, self.setup.device
        stacks = -(-len(weights) // stack_width(weights[0].model, precision, device, len(weights)))
        width = -(-len(weights) // stacks)
        scorer = Scorer(weights[0].model, width, precision, device)
        for first in range(0, len(weights), width):
            some, began = weights[first : first + width], time.perf_counter()
            for slot in range(width):  # a last stack that is not full repeats its last weights
                scorer.load(slot, some[min(slot, len(some) - 1)].model.weights)
            for task in self.tasks:
                result = task.score(scorer, weights[0].model.tokenizer)
                if result.cut and task.name not in self.cut:
                    self.cut.add(task.name)
                    longer = f"{result.cut:,} requests longer than {scorer.context} tokens"
                    self.say(f"{task.name}: {longer} cut on the left")
                self.keep(task, some, result.scored)
            items, took = sum(task.items for task in self.tasks), time.perf_counter() - began
            self.say(f"{first + len(some)} of {len(weights)} weights scored on {items:,} items ({took:.1f} s)")
        del scorer
        release(device)

    def keep(self, task: Task, weights: list[Weights], scored: list[Scored]) -> None:
        """Remember what starts score on a task, and write what cells do."""
        if self.stored[task.name] is None:
            self.stored[task.name] = make_task(self.store, task, scored[0], self.where)
        pairs = list(zip(weights, scored, strict=False))  # a stack that is not full scores its last weights again
        self.starts |= {(own.start, task.name): each for own, each in pairs if own.start is not None}
        self.write(task, {cell: each for own, each in pairs for cell in own.cells})

    def write(self, task: Task, scored: dict[int, Scored]) -> None:
        """Write what some cells (flat indices) score, of those that are missing."""
        into, shape, found = self.stored[task.name], self.store.run.shape, {}
        assert into is not None
        for cell, each in scored.items():
            place = tuple(int(index) for index in np.unravel_index(cell, shape))
            if place in self.wanted[task.name]:
                found[place] = each, self.starts[self.start_of[cell], task.name]
        into.write(found)


# ---- the command


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to score, and on what."""

    store: str  # path of the sweep's store
    tasks: str  # tasks of lm-evaluation-harness by name, comma-separated; core:NAME, letters:NAME of a file; core
    cells: str = "best"  # 6x6, spread over the grid; a list (`1,2 3,4`); best (of each column), boundary, all
    tasks_from: str = ""  # folder of .jsonl files that the tasks are read from (default: the hub)
    limit: int = 500  # items a task, at most (0: all)
    shots: int = -1  # examples before each item (-1: the task's own number)
    seeds: int = 0  # replicates that are scored, from the first (0: all)
    device: str = "auto"  # cpu or cuda; auto: cuda if there is one


def scores_table(store: Store) -> Table:
    """Every task and measure of a store: the start, the best and the median cell; and the means that nanochat takes."""
    made = Table(box=None, pad_edge=False)
    for name in ("task", "measure", "items", "cells", "start", "best", "median", "best cell"):
        made.add_column(name, no_wrap=True)
    tasks = stored_tasks(store)
    for found in tasks:
        for measure in found.measures:
            both = found.read(measure), found.read(START + measure)
            words = score_words(store, found.done, *both, lower=found.is_lower_better(measure))
            made.add_row(found.task, measure, str(found.items), *words)
    for name, form in AGGREGATES.items():
        own = [found for found in tasks if found.task.startswith(form)]
        if len(own) > 1:
            done = np.logical_and.reduce([found.done for found in own])
            score, start = (np.mean([each.read(prefix + CENTRED) for each in own], axis=0) for prefix in ("", START))
            words = score_words(store, done, score, start, lower=False)
            made.add_row(f"{name}, {len(own)} tasks", CENTRED, "", *words)
    return made


def score_words(store: Store, done: np.ndarray, score: np.ndarray, start: np.ndarray, lower: bool) -> list[str]:
    """Cells, start, best, median and the best cell of a measure, as texts; lower: whether that is better."""
    values = score[done]
    if not np.isfinite(values).any():
        return [str(len(values)), "", "", "", ""]
    best = int((np.nanargmin if lower else np.nanargmax)(values))
    seed, *cell = np.argwhere(done)[best].tolist()
    where = ",".join(map(str, cell)) + (f" of seed {seed}" if store.run.replicates > 1 else "")
    numbers = (float(np.nanmean(start[done])), float(values[best]), float(np.nanmedian(values)))
    return [str(len(values)), *(f"{number:.4g}" for number in numbers), where]


def main() -> None:
    """Score, and print what every task says."""
    options = parse(Options, "Score cells of a store on tasks: trained again in one stack, asked in one stack.")
    with user_errors():
        console = screen(soft_wrap=True)
        store = open_store(options.store)
        check_text(store)
        places = chosen_cells(store, options.cells, options.seeds)
        names = [name.strip() for name in options.tasks.split(",") if name.strip()]
        tasks = load_tasks(names, options.tasks_from, options.limit, options.shots if options.shots >= 0 else None)
        score_cells(store, places, tasks, options.device, console.print)
        screen(width=120).print(scores_table(store))


if __name__ == "__main__":
    main()
