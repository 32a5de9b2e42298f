"""Scores of tasks inside a store: one group a task, `scores/TASK`, with arrays like those of the cells.

For every measure of a task (`acc`, say): `acc` [replicate, *cells], `acc_by_item` [..., item] where it has a value an
item, and both with `start_` before them for the cell's own untrained weights, so that a cell and its start are paired.
`status` is written last: a cell that says DONE has all its scores. A chunk holds one row.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import zarr

from analysis.tasks import Scored, Task
from engine.measure import Measurement
from engine.outcome import DONE
from engine.place import place_of
from engine.store import STATUS, Store, consolidate

FOLDER, BY_ITEM, START = "scores", "_by_item", "start_"


class Spec(NamedTuple):
    """An array of a task: what is measured, and whether it has a value an item."""

    measurement: Measurement
    by_item: bool


def specs_of(task: str, measures: Mapping[str, bool]) -> dict[str, Spec]:
    """The arrays of a task whose measures have values an item, or not."""
    specs = {"status": Spec(STATUS, False)}
    for measure, by_item in measures.items():
        for prefix, whose in (("", ""), (START, " of the untrained weights")):
            made = Measurement(f"{measure} of {task}{whose}", "f4", np.nan, {})
            specs[prefix + measure] = Spec(made, False)
            if by_item:
                item = Measurement(f"{measure} of each item of {task}{whose}", "f4", np.nan, {})
                specs[prefix + measure + BY_ITEM] = Spec(item, True)
    return specs


class TaskScores:
    """One task's scores in a store."""

    def __init__(self, store: Store, folder: str, mode: Any = "r") -> None:
        self.store, self.path = store, store.path / FOLDER / folder
        own = place_of(self.path).zarr(read_only=mode == "r")
        self.group = zarr.open_group(own, mode=mode, use_consolidated=False)
        self.attributes: dict[str, Any] = dict(self.group.attrs)
        self.task, self.items = str(self.attributes["task"]), int(self.attributes["items"])
        self.measures: dict[str, bool] = self.attributes["measures"]
        self.specs = specs_of(self.task, self.measures)

    def read(self, name: str) -> np.ndarray:
        """An array [replicate, *cells(, item)]; replicates that were swept since are filled."""
        stored = np.asarray(self.group[name][:])  # type: ignore[index]
        missing = self.store.run.replicates - len(stored)
        fill = self.specs[name].measurement.fill
        return np.pad(stored, [(0, missing)] + [(0, 0)] * (stored.ndim - 1), constant_values=fill)

    def at(self, name: str, cells: np.ndarray) -> np.ndarray:
        """Some cells (bool [row, col]) of an array [replicate, cell(, item)]; only their rows are read."""
        array: Any = self.group[name]
        rows = np.flatnonzero(cells.any(1)).tolist()
        return np.concatenate([np.asarray(array[:, row])[:, cells[row]] for row in rows], axis=1)

    @property
    def stored(self) -> int:
        """Replicates that the arrays hold; what was swept since has no scores."""
        return int(self.group["status"].shape[0])  # type: ignore[union-attr]

    @property
    def done(self) -> np.ndarray:
        """Which cells are scored, bool [replicate, *cells]."""
        return self.read("status") == DONE

    @property
    def measure(self) -> str:
        """The one that stands for the task: accuracy, that of length-normalised answers where there is one."""
        return next((name for name in ("acc_norm", "acc") if name in self.measures), next(iter(self.measures)))

    def is_lower_better(self, measure: str) -> bool:
        """Whether a lower value is the better one."""
        return any(measure == name or measure.startswith(f"{name}_") for name in self.attributes["lower"])

    def check(self, task: Task) -> None:
        """Raise ValueError where other items were asked, or asked otherwise."""
        if self.attributes["digest"] != task.digest:
            raise ValueError(
                f"{self.path} holds {self.items} items of {self.task}, got {task.items} or other ones; expected the "
                "same file, --limit and --shots; delete that folder to score anew"
            )

    def write(self, found: Mapping[tuple[int, ...], tuple[Scored, Scored]]) -> None:
        """Write what some cells, and their starts, score, a row of cells at once; `status` last."""
        values: dict[str, dict[tuple[int, ...], Any]] = {name: {} for name in self.specs}
        for place, both in found.items():
            for prefix, own in zip(("", START), both, strict=True):
                for measure, value in own.total.items():
                    values[prefix + measure][place] = value
                for measure, by_item in own.items.items():
                    values[prefix + measure + BY_ITEM][place] = by_item
            values["status"][place] = DONE
        for name in sorted(self.specs, key=lambda name: name == "status"):
            array = self.group[name]
            assert isinstance(array, zarr.Array)
            if array.shape[0] < self.store.run.replicates:
                array.resize((self.store.run.replicates, *array.shape[1:]))
            for row in sorted({place[:2] for place in found}):
                block = np.array(array[row])
                for place, value in values[name].items():
                    if place[:2] == row:
                        block[place[2:]] = value
                array[row] = block


def folder_of(task: str) -> str:
    """A task's name as a folder's."""
    return re.sub(r"[^\w.-]+", "-", task)


def stored_tasks(store: Store) -> list[TaskScores]:
    """Every task of which a store has scores."""
    return [TaskScores(store, path.name) for path in store.inside(FOLDER, "*")]


def find_task(store: Store, task: Task) -> TaskScores | None:
    """The scores of a task, open for writing, None where there are none. Raises ValueError where it is another one."""
    folder = folder_of(task.name)
    if not store.inside(FOLDER, folder):
        return None
    found = TaskScores(store, folder, "r+")
    found.check(task)
    return found


def make_task(store: Store, task: Task, example: Scored, provenance: Mapping[str, Any]) -> TaskScores:
    """The empty scores of a task: all of them or nothing."""
    measures = {name: name in example.items for name in example.total}
    attributes = {"task": task.name, "items": task.items, "digest": task.digest, "measures": measures}
    attributes["lower"] = list(task.lower)
    attributes |= json.loads(json.dumps(dict(provenance)))
    whole = zarr.open_group(store.place.zarr(read_only=False), mode="r+", use_consolidated=False)
    whole.require_group(FOLDER)
    shape, dims = store.run.shape, ("replicate", *store.run.cells.dims)
    own = place_of(store.path / FOLDER / folder_of(task.name))
    with TemporaryDirectory(prefix=".scores-", dir=own.workshop()) as beside:
        building = Path(beside, "task")
        group = zarr.create_group(building, attributes=attributes, zarr_format=3)
        for name, (spec, by_item) in specs_of(task.name, measures).items():
            tail = (task.items,) if by_item else ()
            group.create_array(
                name,
                shape=(*shape, *tail),
                chunks=(1, 1, *shape[2:], *tail),
                dtype=spec.dtype,
                fill_value=spec.fill,
                dimension_names=(*dims, *(("item",) if by_item else ())),
                attributes={"long_name": spec.long_name, "units": spec.units},
            )
        own.adopt(building)
    consolidate(store.place)
    return TaskScores(store, folder_of(task.name), "r+")


# ---- for recommend and the report


def score_line(found: TaskScores, cell: tuple[int, ...]) -> str:
    """What a cell scores on a task beside its start, over the seeds in which it is scored; '' where in none.

    The interval is of the difference, paired by item, over items (and seeds) as they are.
    """
    at: tuple[Any, ...] = (slice(None), *cell)
    known = found.done[at]
    measure = found.measure
    score, start = (found.read(prefix + measure)[at][known] for prefix in ("", START))
    if not np.isfinite(score).any():
        return ""
    said = f"{found.task}: {measure} {np.nanmean(score):.3g}, {np.nanmean(start):.3g} before training"
    if found.measures[measure]:
        arrays: list[Any] = [found.group[prefix + measure + BY_ITEM] for prefix in ("", START)]
        pairs = [np.asarray(array[at])[known[: found.stored]] for array in arrays]
        difference = np.nanmean(pairs[0] - pairs[1], axis=0)  # of each item
        half = 1.96 * difference.std(ddof=1) / np.sqrt(len(difference)) if len(difference) > 1 else np.nan
        said += f" (difference {difference.mean():+.3g} ± {half:.2g} over {found.items} items)"
    return said


def score_notes(store: Store, cell: tuple[int, ...] | None) -> list[str]:
    """What the answer's cell scores, and how far from the border it lies; [] without scores."""
    tasks = stored_tasks(store)
    if not tasks or cell is None:
        return []
    said = [line for task in tasks if (line := score_line(task, cell))]
    where = ",".join(map(str, cell))
    return [f"Cell {where} scores: {'; '.join(said)}."] if said else [f"Cell {where} has no scores; others have."]
