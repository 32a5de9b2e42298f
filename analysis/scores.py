"""What the scores inside a store (engine/scores.py) are made for, and what they say of a cell."""

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import zarr

from analysis.tasks import Task
from engine.place import place_of
from engine.scores import BY_ITEM, FOLDER, START, Scored, TaskScores, folder_of, specs_of, stored_tasks
from engine.store import Store, consolidate


def find_task(store: Store, task: Task) -> TaskScores | None:
    """The scores of a task, open for writing, None where there are none. Raises ValueError where it is another one."""
    folder = folder_of(task.name)
    if not store.inside(FOLDER, folder):
        return None
    found = TaskScores(store, folder, "r+")
    if found.attributes["digest"] != task.digest:
        raise ValueError(
            f"{found.path} holds {found.items} items of {found.task}, got {task.items} or other ones; expected the "
            "same file, --limit and --shots; delete that folder to score anew"
        )
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
