"""Scores of tasks inside a store: one group a task, `scores/TASK`, with arrays like those of the cells.

For every measure of a task (`acc`, say): `acc` [replicate, *cells], `acc_by_item` [..., item] where it has a value an
item, and both with `start_` before them for the cell's own untrained weights, so that a cell and its start are paired.
`status` is written last: a cell that says DONE has all its scores. A chunk holds one row.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import zarr

from engine.measure import Measurement
from engine.outcome import DONE
from engine.place import place_of
from engine.store import STATUS, Store

FOLDER, BY_ITEM, START = "scores", "_by_item", "start_"


class Scored(NamedTuple):
    """What one set of weights scores. items: values [item] by measure; total: the task's by measure."""

    items: dict[str, np.ndarray]
    total: dict[str, float]

    def nothing(self) -> "Scored":
        """The same measures of weights that answer NaN: no score, for an argmax of NaN would find one."""
        items = {name: np.full_like(values, np.nan) for name, values in self.items.items()}
        return Scored(items, dict.fromkeys(self.total, np.nan))


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
