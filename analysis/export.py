"""Results out of a store, one row a cell: `uv run analysis/export.py --store S --to cells.csv`.

Columns: the replicate, every hyper-parameter that the sweep reads (swept or fixed), the label, whether the cell is the
recommended one of its column, every measurement that is one number a cell, and the scores of tasks, where there are.
"""

if __name__ == "__main__" and not __package__:
    import started  # noqa: F401  says how to start it where its packages are missing

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from analysis.classify import Limits
from analysis.recommend import Recommendation, recommend, why_not
from engine.command import parse, screen, user_errors
from engine.config import hyper_names
from engine.outcome import LABELS, Thresholds
from engine.plan import hyper_of
from engine.scores import stored_tasks
from engine.store import Store, open_store

if TYPE_CHECKING:
    import pyarrow
    import xarray

SUFFIXES = (".csv", ".parquet")


def best_cells(store: Store, thresholds: Thresholds) -> np.ndarray:
    """Cells nearest the best rate of their column, or the best cell, bool [*cells]; none where the store has no probe.

    The same in all replicates: a best rate is one over seeds.
    """
    return marked_cells(store, None if why_not(store) else recommend(store, thresholds))


def marked_cells(store: Store, found: Recommendation | None) -> np.ndarray:
    """The cells of a recommendation, bool [*cells]."""
    best = np.zeros(store.run.cells.shape, bool)
    for cell in found.cells() if found else ():
        best[cell] = True
    return best


def cell_table(store: Store, thresholds: Thresholds) -> "pyarrow.Table":
    """One row a cell of every replicate, in the order of the store's flat indices."""
    import pyarrow

    run, cells = store.run, int(np.prod(store.run.shape))
    known = {*hyper_names(run.config), *run.given}
    columns = {"replicate": np.repeat(np.arange(run.replicates), cells // run.replicates)}
    columns |= {name: values for name, values in hyper_of(run, np.arange(cells)).items() if name in known}
    codes = pyarrow.array(store.labels(thresholds).ravel(), pyarrow.int8())
    label = pyarrow.DictionaryArray.from_arrays(codes, list(LABELS)).cast(pyarrow.string())
    best = np.broadcast_to(best_cells(store, thresholds), run.shape)
    measured = {name: store.read(name).ravel() for name, spec in store.specs.items() if not spec.by_step}
    scores = {f"{task.task}/{name}": task.read(name).ravel() for task in stored_tasks(store) for name in task.measures}
    return pyarrow.table(columns | {"label": label, "best": best.ravel()} | measured | scores)


def to_xarray(store: Store, thresholds: Thresholds | None = None) -> "xarray.Dataset":
    """`Store.to_xarray` with the recommendation: `best` [*cells], and its sentence and numbers as attributes."""
    thresholds = thresholds or Thresholds()
    data = store.to_xarray(thresholds)
    found = None if why_not(store) else recommend(store, thresholds)
    data["best"] = (store.run.cells.dims, marked_cells(store, found), {"long_name": "nearest to the best rate"})
    return data.assign_attrs(found.summary() if found else {})


def export(store: Store, path: Path, thresholds: Thresholds | None = None) -> int:
    """Write `cell_table` as .csv or .parquet; the rows written.

    Raises:
        ValueError: another suffix.
        OSError: the path cannot be written.
    """
    from pyarrow import csv, parquet

    if path.suffix not in SUFFIXES:
        raise ValueError(f"to is {str(path)!r}; expected a path that ends in {' or '.join(SUFFIXES)}")
    write = {".csv": csv.write_csv, ".parquet": parquet.write_table}[path.suffix]
    with path.open("wb") as file:  # before anything is read
        made = cell_table(store, thresholds or Thresholds())
        write(made, file)
    return made.num_rows


@dataclass(frozen=True, kw_only=True)
class Options(Limits):
    """What to write, and where."""

    store: str  # path of the sweep's store
    to: str  # the .csv or .parquet to write


def main() -> None:
    """Write one row a cell."""
    options = parse(Options, "Write every cell of a store as one row: hyper-parameters, label, measurements.")
    with user_errors():
        rows = export(open_store(options.store), Path(options.to), options.thresholds)
        screen().print(f"{options.to}: {rows:,} rows", soft_wrap=True)


if __name__ == "__main__":
    main()
