"""The store of a sweep: a Zarr v3 group that survives a kill at any moment.

Every array spans [replicate, *cells(, step)], is preallocated, and has its dimensions named: a grid's by its axes, a
list's `point`. A chunk holds some rows of one replicate, so each stored object has one writer. A block is written
results first, each file fsynced, `status` last: a cell that says DONE has all its numbers on disk. Status is a small
integer and is never inferred from NaN, which is a legitimate result. zarr writes a file beside its place and renames
it, so a reader or a kill sees the old chunk or the new one. Readers take `status` first, for the same reason.
"""

import fnmatch
import json
import math
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from zarr.errors import ZarrUserWarning

from engine.amount import epochs_of
from engine.config import Run, SweepConfig, cells_of, make_config
from engine.grid import Axis, Grid, Points
from engine.hyper import HYPER_PARAMETERS
from engine.measure import MEASUREMENTS, Measurement, measurements_of
from engine.outcome import DONE, LABELS, NOT_COMPUTED, Thresholds
from engine.place import Lock, Place, Where, located, place_of
from engine.plan import Chunk

if TYPE_CHECKING:
    import xarray

FORMAT = "fractal-llm sweep"
VERSION = 2
STATUS = Measurement("0 not computed, 1 done", "u1", 0, {})
READERS = 32  # objects read at once, by threads
WRITERS = 16  # objects written at once: each waits for a disk or a network
COUNTS = "counts"  # the array of Run.counts
# fields that name inputs, which are compared by what they hold
BY_CONTENT = ("data", "model", "tokenizer", "problem", "points")


class Store:
    """A sweep's results, open for reading; `Writer` adds the writing."""

    def __init__(self, path: str | Where) -> None:
        """Open an existing store.

        Raises:
            ValueError: there is no store of this format at the path, its creation was interrupted, or a chunk is lost.
        """
        self.path = located(path)
        self.place = place_of(self.path)
        self.attributes = store_attributes(self.path)
        if self.attributes.get("format_version") != VERSION:
            raise ValueError(
                f"{self.path} has store format {self.attributes.get('format_version')}; expected {VERSION}: "
                "read it with the version that wrote it"
            )
        self.config: SweepConfig = config_from(self.attributes["configuration"])
        self.group = zarr.open_group(self.place.zarr(), mode="r", use_consolidated=False)
        self.opened: dict[str, zarr.Array] = {}
        self.kept: KeptStatus | None = None
        self.run = Run(self.config, self.stored_cells(), self.stored_counts())
        self.label_rule = self.config.workload.label
        held = {n: spec for n, spec in measurements_of(self.run).items() if not spec.later or self.has_metadata(n)}
        self.specs = {"status": STATUS} | held
        self.check_arrays()
        self.chunk_rows: int = self.array("status").chunks[1]
        self.check_chunks()

    def stored_cells(self) -> Any:
        """The cells, with the coordinates that are stored."""
        if self.config.swept.points:
            names = [name for name in self.attributes["points"] if self.has_metadata(name)]
            if names != self.attributes["points"]:
                raise ValueError(f"{self.path} is half-written (its points); delete it and sweep again")
            return Points({name: np.asarray(self.array(name)[:]) for name in names})
        cells = cells_of(self.config)
        for name in cells.columns:
            if not self.has_metadata(name):
                raise ValueError(f"{self.path} is half-written (coordinate {name!r}); delete it and sweep again")
        return cells.stored_as({name: np.asarray(self.array(name)[:]) for name in cells.columns})

    def stored_counts(self) -> np.ndarray | None:
        """What each row of the training set adds to `tokens`, where that is stored (`Run.counts`)."""
        return np.asarray(self.array(COUNTS)[:]) if self.has_metadata(COUNTS) else None

    def has_metadata(self, name: str) -> bool:
        """Whether an array is there; zarr lets a damaged array's own error through, which names no file."""
        return "shape" in read_metadata(self.place, f"{name}/zarr.json")

    def check_arrays(self) -> None:
        """Raise ValueError for an array that is missing or has another shape or type."""
        for name, spec in self.specs.items():
            array = self.array(name) if self.has_metadata(name) else None
            shape = None if array is None else array.shape[: len(self.run.shape)]
            # an interrupted `grow` leaves more replicates than the configuration says
            fits = shape is not None and shape[0] >= self.run.replicates and shape[1:] == self.run.shape[1:]
            if array is None or not fits or array.dtype != np.dtype(spec.dtype):
                raise ValueError(f"{self.path} is half-written (array {name!r}); delete it and sweep again")

    def check_chunks(self) -> None:
        """Raise ValueError naming an object that a DONE cell promises and that is not there."""
        status = self.status
        done = [c for c in self.chunks() if (status[c.replicate, c.start : c.stop] == DONE).any()]

        def missing(name: str) -> list[str]:
            return self.place.missing(f"{name}/c", [self.chunk_key(name, chunk) for chunk in done])

        with ThreadPoolExecutor(len(self.specs)) as pool:
            for keys in pool.map(missing, self.specs) if done else ():
                for key in keys:
                    raise ValueError(
                        f"{self.path}/{key} is missing, though its cells are done; restore it or sweep into a new path"
                    )

    def chunks(self) -> list[Chunk]:
        """Every chunk."""
        height, size = self.run.cells.shape[0], self.chunk_rows
        return [
            Chunk(k, start, min(start + size, height))
            for k in range(self.run.replicates)
            for start in range(0, height, size)
        ]

    def chunk_key(self, name: str, chunk: Chunk) -> str:
        """The object that holds a chunk of an array."""
        dims = len(self.run.cells.shape) - 1 + self.specs[name].by_step
        return "/".join([name, "c", str(chunk.replicate), str(chunk.start // self.chunk_rows), *["0"] * dims])

    def __contains__(self, name: str) -> bool:
        return name in self.specs

    def array(self, name: str) -> zarr.Array:
        """A stored array."""
        if name not in self.opened:
            array = self.group[name]
            assert isinstance(array, zarr.Array), name
            self.opened[name] = array
        return self.opened[name]

    def read(self, name: str, replicate: int | slice = slice(None), rows: slice = slice(None)) -> np.ndarray:
        """An array [replicate, *cells(, step)], or some of its replicates and rows, as numpy.

        Raises:
            ValueError: a chunk is damaged.
        """
        if isinstance(replicate, slice):
            replicate = slice(*replicate.indices(self.run.replicates))
        try:
            return np.asarray(self.array(name)[replicate, rows])
        except RuntimeError as error:  # zarr's codecs raise it for a damaged chunk
            raise ValueError(f"{self.path / name} is damaged ({error}); restore it or sweep into a new path") from error

    def labelled(self, replicate: int | slice = slice(None)) -> dict[str, np.ndarray]:
        """`status`, then what labels are made of: a cell that says DONE has the numbers that belong to it."""
        return {name: self.read(name, replicate) for name in ("status", *self.config.workload.labelled) if name in self}

    def labels(self, thresholds: Thresholds) -> np.ndarray:
        """Label codes [replicate, *cells], uint8 into engine.outcome.LABELS."""
        return self.label_rule(self.labelled(), budget_of(self.run), thresholds)

    @property
    def status(self) -> np.ndarray:
        """Status codes [replicate, *cells] (engine.outcome) as of now; what has not changed is not read again."""
        if self.kept is None or self.kept.status.shape != self.run.shape:
            self.kept = KeptStatus(self)
        self.kept.update()
        return self.kept.status.copy()

    def read_cells(self, name: str, cells: np.ndarray) -> np.ndarray:
        """Values of some cells (flat indices, ascending) of an array; chunks that hold none of them are not read."""
        spec, tail = self.specs[name], self.run.cells.shape[1:]
        at = np.unravel_index(cells, self.run.shape)
        chunk = np.ravel_multi_index((at[0], at[1] // self.chunk_rows), self.run.shape[:2]) if len(cells) else cells
        found = np.empty(len(cells), spec.dtype)
        chunks = {(c.replicate, c.start // self.chunk_rows): c for c in self.chunks()}
        wanted = [chunks[k, i] for k, i in zip(*np.unravel_index(np.unique(chunk), self.run.shape[:2]), strict=True)]
        for first, last in neighbours(wanted):
            here = (at[0] == first.replicate) & (at[1] >= first.start) & (at[1] < last.stop)
            block = self.read(name, first.replicate, slice(first.start, last.stop)).reshape(-1, *tail)
            found[here] = block[(at[1][here] - first.start, *(each[here] for each in at[2:]))]
        return found

    @property
    def epochs(self) -> np.ndarray | None:
        """How often each cell's budget sees the data [replicate, *cells]; None where the store holds no size of it."""
        amount = self.attributes.get("amount")
        return None if amount is None else epochs_of(self.config.workload.plan(self.run), amount)

    @property
    def figures(self) -> Path:
        """The folder that pictures of it are drawn into: inside the store, where that is one."""
        return self.place.drawings / "figures"

    def children(self) -> list[Where]:
        """Paths of the zooms stored inside this store."""
        return self.inside("zoom", "*")

    def inside(self, folder: str, pattern: str) -> list[Where]:
        """Paths of the stores inside this one that are kept in a folder under names of a pattern, in order."""
        names = fnmatch.filter(self.place.names(folder), pattern)
        return [self.path / folder / name for name in names if self.place.get(f"{folder}/{name}/zarr.json") is not None]

    def replicate(self, index: int) -> "Replicate":
        """One replicate of a grid as a map. Raises ValueError for a list of points, or where there is no such one."""
        if not isinstance(self.run.cells, Grid):
            raise ValueError(f"{self.path} holds a list of points; expected a grid, which has a map")
        if not 0 <= index < self.run.replicates:
            raise ValueError(f"replicate {index} of {self.path} is not there; expected 0 to {self.run.replicates - 1}")
        return Replicate(self, index)

    def to_xarray(self, thresholds: Thresholds | None = None) -> "xarray.Dataset":
        """Every measurement and `label`, with named, valued dimensions; measurements are read when they are used."""
        import xarray

        data = xarray.open_zarr(self.place.zarr())
        names = np.array(LABELS)[self.labels(thresholds or Thresholds())]
        data["label"] = (data["status"].dims, names, {"long_name": "what became of the run"})
        return data


class KeptStatus:
    """The status of every cell, kept up with what is written: only objects written since are read again.

    status: [replicate, *cells].
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.status = np.full(store.run.shape, NOT_COMPUTED, STATUS.dtype)
        self.versions: dict[str, str] = {}
        self.chunks = {store.chunk_key("status", chunk): chunk for chunk in store.chunks()}

    def update(self) -> None:
        """Read what has been written, or removed, since."""
        now = {item.key: item.version for item in self.store.place.items("status/c") if item.key in self.chunks}
        changed = [key for key, version in now.items() if self.versions.get(key) != version]
        changed += self.versions.keys() - now.keys()
        array = self.store.array("status")
        if array.compressors:  # of a store that an older version made
            for first, last in neighbours([self.chunks[key] for key in changed]):
                rows = slice(first.start, last.stop)
                self.status[first.replicate, rows] = self.store.read("status", first.replicate, rows)
        else:  # a byte a cell: ten thousand objects in a tenth of the time that zarr takes for them
            with ThreadPoolExecutor(READERS) as pool:
                for key, data in zip(changed, pool.map(self.store.place.get, changed), strict=True):
                    self.put(self.chunks[key], data, array.chunks)
        self.versions = now

    def put(self, chunk: Chunk, data: bytes | None, shape: tuple[int, ...]) -> None:
        """Take in a chunk as it is stored; None where it is not."""
        rows = slice(chunk.start, chunk.stop)
        if data is None:
            self.status[chunk.replicate, rows] = NOT_COMPUTED
            return
        if len(data) != math.prod(shape):
            key = self.store.chunk_key("status", chunk)
            raise ValueError(f"{self.store.path}/{key} is damaged; restore it or sweep into a new path")
        self.status[chunk.replicate, rows] = np.frombuffer(data, np.uint8).reshape(shape)[0, : chunk.stop - chunk.start]


def neighbours(chunks: list[Chunk]) -> list[tuple[Chunk, Chunk]]:
    """The first and the last of every row of chunks without a gap, which are read at once."""
    found: list[tuple[Chunk, Chunk]] = []
    for chunk in sorted(chunks):
        if found and found[-1][1][::2] == chunk[:2]:
            found[-1] = (found[-1][0], chunk)
        else:
            found.append((chunk, chunk))
    return found


class Replicate:
    """One replicate of a store over a grid: the same arrays as [row, col(, step)]."""

    def __init__(self, store: Store, index: int) -> None:
        self.store, self.index = store, index
        self.path, self.config, self.run, self.attributes = store.path, store.config, store.run, store.attributes
        self.place, self.figures = store.place, store.figures
        assert isinstance(store.run.cells, Grid)
        self.grid = store.run.cells

    def __contains__(self, name: str) -> bool:
        return name in self.store

    def read(self, name: str, rows: slice = slice(None), cols: slice = slice(None)) -> np.ndarray:
        """An array [row, col(, step)], or a block of it."""
        return self.store.read(name, self.index, rows)[:, cols]

    def labels(self, thresholds: Thresholds) -> np.ndarray:
        """Label codes [row, col]."""
        one = slice(self.index, self.index + 1)
        return self.store.label_rule(self.store.labelled(one), budget_of(self.run), thresholds)[0]

    @property
    def status(self) -> np.ndarray:
        """Status codes [row, col]."""
        return self.read("status")

    @property
    def planned_steps(self) -> np.ndarray:
        """Steps each cell was to train, had nothing broken, int [row, col]."""
        return self.config.workload.plan(self.run).steps[self.index]

    @property
    def flat_index(self) -> np.ndarray:
        """Each cell's flat index in its store [row, col]."""
        rows, cols = self.grid.shape
        return self.index * rows * cols + np.arange(rows * cols).reshape(rows, cols)

    def children(self) -> list[Where]:
        """Paths of the zooms stored inside the store."""
        return self.store.children()


def budget_of(run: Run) -> np.ndarray:
    """Tokens planned for each cell [*cells]; 0 everywhere for a workload that has none."""
    if "tokens" not in run.config.workload.hyper(run.config):
        return np.zeros(run.cells.shape)
    return np.broadcast_to(run.column("tokens"), (1, *run.cells.shape))[0]


def store_attributes(path: Where) -> dict:
    """The attributes of a store of any version. Raises ValueError where there is none."""
    place = place_of(path)
    metadata = read_metadata(place, "zarr.json") if place.exists() else {}
    if not metadata:
        raise ValueError(f"{path} is not a sweep store (no zarr.json); give the path of one, or a new path")
    attributes = metadata.get("attributes", {})
    if attributes.get("format") != FORMAT or "configuration" not in attributes:
        raise ValueError(f"{path} is a Zarr group of another program; give a sweep store, or a new path")
    return attributes


def config_from(stored: dict[str, Any]) -> SweepConfig:
    """Read back `SweepConfig.flat`. Raises ValueError for fields that this version does not know."""
    try:
        # axes as they are written now: older versions spelt lin out
        axes = {name: str(Axis.parse(stored[name])) for name in ("y", "x") if stored.get(name)}
        return make_config(**(stored | axes))
    except ValueError as error:
        raise ValueError(f"the stored configuration cannot be read ({error}); it comes from another version") from error


def read_metadata(place: Place, key: str) -> dict:
    """A zarr.json, {} if it is missing. Raises ValueError when it is no JSON object."""
    try:
        metadata = json.loads((place.get(key) or b"{}").decode(errors="replace"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{place}/{key} is damaged ({error}); restore it or sweep into a new path") from error
    if not isinstance(metadata, dict):
        raise ValueError(f"{place}/{key} is damaged (no JSON object); restore it or sweep into a new path")
    return metadata


def open_store(path: str | Where) -> Store:
    """Open a store for reading, of this version or the first. Raises ValueError when it is not a whole one of ours."""
    from engine.store_v1 import StoreV1

    path = located(path)
    version_1 = store_attributes(path).get("format_version") == 1
    return StoreV1(path) if version_1 else Store(path)


def open_map(path: str | Where, replicate: int = 0) -> Replicate:
    """One replicate of a stored grid. Raises ValueError as `open_store` and `Store.replicate` do."""
    return open_store(path).replicate(replicate)


# ---- making and writing


def create_store(path: Where, run: Run, steps: int, chunk_rows: int, attributes: dict) -> None:
    """Make the empty store of a sweep: all or nothing.

    It is built beside its place and renamed, so an interrupted creation leaves nothing at `path`.

    Args:
        path: where it will stand; nothing may stand there yet.
        run: resolved.
        steps: length of the longest run, for `losses`.
        chunk_rows: rows of a chunk.
        attributes: provenance and what else the sweep states about itself, JSON values.

    Raises:
        ValueError: another process has made a store there meanwhile.
    """
    place = place_of(path)
    with TemporaryDirectory(prefix=".sweep-", dir=place.workshop()) as beside:
        building = Path(beside, "store")
        build_store(building, run, steps, chunk_rows, attributes)
        place.adopt(building)


def build_store(building: Path, run: Run, steps: int, chunk_rows: int, attributes: dict) -> None:
    """Write the empty store of `create_store` where nobody looks yet."""
    config, dims = run.config, ("replicate", *run.cells.dims)
    stated = {
        "format": FORMAT,
        "format_version": VERSION,
        "configuration": config.flat(),
        "configuration_hash": config.hash,
    }
    if config.swept.points:
        stated["points"] = list(run.names)
    group = zarr.create_group(building, attributes=stated | attributes, zarr_format=3)
    coordinates = replicate_coordinates(run) | run.cells.coordinates()
    if config.swept.trace == "on":
        coordinates["step"] = ("step", np.arange(steps), {"long_name": "step"})
    if run.counts is not None:
        words: dict[str, Any] = {"long_name": "what a row of the training set adds to tokens", "units": "token"}
        group.create_array(COUNTS, data=run.counts, dimension_names=("data_row",), attributes=words)
    for name, (dim, values, own) in coordinates.items():
        group.create_array(name, data=values, dimension_names=(dim,), attributes=own)
    auxiliary = " ".join(name for name, (dim, *_) in coordinates.items() if name != dim)
    named: dict[str, Any] = {"coordinates": auxiliary} if auxiliary else {}
    for name, spec in ({"status": STATUS} | measurements_of(run)).items():
        tail = (steps,) if spec.by_step else ()
        group.create_array(
            name,
            shape=(*run.shape, *tail),
            chunks=(1, chunk_rows, *run.cells.shape[1:], *tail),
            dtype=spec.dtype,
            fill_value=spec.fill,
            compressors=None if name == "status" else "auto",  # by which it is read at once (KeptStatus)
            dimension_names=(*dims, *(("step",) if spec.by_step else ())),
            attributes={"long_name": spec.long_name, "units": spec.units} | named,
        )
    # sub-groups, so that what is kept inside the store is part of its hierarchy
    for name in ("figures", "zoom", "noise"):
        group.create_group(name)
    consolidate(place_of(building))


def replicate_coordinates(run: Run) -> dict[str, tuple[str, np.ndarray, dict[str, Any]]]:
    """The replicates' numbers and, where the seed is not swept, their seeds."""
    found = {"replicate": ("replicate", np.arange(run.replicates), {"long_name": "replicate"})}
    if "seed" not in run.names:
        seeds = run.config.seed + np.arange(run.replicates)
        found["seed"] = ("replicate", seeds, {"long_name": "seed of the initial weights and the data order"})
    return found


def consolidate(place: Place) -> None:
    """Copy all metadata into the group's own, which readers open in one read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ZarrUserWarning)  # not yet part of the written specification
        zarr.consolidate_metadata(place.zarr(read_only=False), zarr_format=3)


class Writer(Store):
    """A store open for writing by one process at a time (per group of ranks: rank 0 holds the lock)."""

    def __init__(self, path: Where, lock: Lock | None = None) -> None:
        """Open an existing store for writing; `lock` is given up by `close`."""
        super().__init__(path)
        self.lock = lock
        self.group = zarr.open_group(self.place.zarr(read_only=False), mode="r+", use_consolidated=False)
        self.opened.clear()

    def grow(self, replicates: int, steps: int) -> None:
        """Make room for more replicates, of runs of at most `steps` steps; the configuration says so last."""
        run = replace(self.run, config=replace(self.config, swept=replace(self.config.swept, replicates=replicates)))
        coordinates = replicate_coordinates(run)
        for name, spec in self.specs.items():
            array = self.array(name)
            shape = (replicates, *array.shape[1:])
            if spec.by_step:
                shape = (*shape[:-1], max(steps, shape[-1]))
                coordinates["step"] = ("step", np.arange(shape[-1]), {})
            array.resize(shape)
        for name, (_, values, _) in coordinates.items():
            array = self.array(name)
            array.resize(values.shape)
            array[:] = values
        self.group.update_attributes({"configuration": run.config.flat(), "configuration_hash": run.config.hash})
        consolidate(self.place)
        self.config, self.run = run.config, run

    def timed(self, seconds: float, cells: int) -> None:
        """Add to what training took, if anything: what more replicates would cost follows from it."""
        if not cells:
            return
        before = self.attributes.get("took", {"seconds": 0.0, "cells": 0})
        took = {"seconds": before["seconds"] + seconds, "cells": before["cells"] + cells}
        self.attributes["took"] = took
        self.group.update_attributes({"took": took})
        consolidate(self.place)

    def write_chunks(self, blocks: Mapping[Chunk, Mapping[str, np.ndarray]]) -> None:
        """Write some chunks of every array given, each [rows, ...], several at once; every `status` last."""
        parts = [(chunk, name) for chunk, block in blocks.items() for name in block]

        def write(part: tuple[Chunk, str]) -> None:
            chunk, name = part
            assert chunk.start % self.chunk_rows == 0 and len(blocks[chunk][name]) == chunk.stop - chunk.start, chunk
            # an all-fill chunk is a result like any other
            array = self.array(name).with_config({"write_empty_chunks": True})
            array[chunk.replicate, chunk.start : chunk.stop] = blocks[chunk][name]

        with ThreadPoolExecutor(WRITERS) as pool:
            list(pool.map(write, (part for part in parts if part[1] != "status")))
            list(pool.map(write, (part for part in parts if part[1] == "status")))

    def close(self) -> None:
        """Give up the lock, as the end of the process does."""
        if self.lock is not None:
            self.lock.close()


def check_same_run(path: Where, stored: Run, asked: Run, changed: Iterable[str] = ()) -> None:
    """Raise ValueError naming every field in which a store's sweep differs from the asked one.

    Inputs are compared by content, `changed` (`changed_inputs`). More replicates than are stored are no difference.
    """
    defaults = {name: rule.default for name, rule in HYPER_PARAMETERS.items()}
    was, now = stored.config.flat(), asked.config.flat()
    values = {name: [each.get(name, defaults.get(name)) for each in (was, now)] for name in {**was, **now}}
    differ = [n for n, (old, new) in values.items() if old != new and n not in (*BY_CONTENT, "replicates")]
    if bool(was["points"]) != bool(now["points"]):
        differ.append("points")
    if now["replicates"] < was["replicates"]:
        differ.append("replicates")
    if differ or changed:
        said = [f"{name}={values[name][0]!r}, got {values[name][1]!r}" for name in differ]
        said += [f"{name} of other content, {values[name][0]!r}, got {values[name][1]!r}" for name in changed]
        fields = "; ".join(said)
        raise ValueError(
            f"{path} holds a sweep with {fields}; give the same configuration to resume it, or --store another path"
        )


def changed_inputs(store: Store, inputs: Mapping[str, str], cells: Any) -> list[str]:
    """Which of data, problem and points are no longer those that a store's cells were trained on."""
    changed = [name for name, digest in inputs.items() if store.attributes["inputs"].get(name) != digest]
    if cells is not None and not isinstance(cells, Grid):
        same = list(cells.columns) == list(store.run.names) and all(
            np.array_equal(cells.columns[name], store.run.cells.columns[name]) for name in store.run.names
        )
        changed += [] if same else ["points"]
    return changed


def empty_block(specs: Iterable[str], shape: tuple[int, ...], steps: int) -> dict[str, np.ndarray]:
    """A block of cells that are not computed: fill values, [*shape(, step)] by name."""
    block = {}
    for name in specs:
        spec = STATUS if name == "status" else MEASUREMENTS[name]
        block[name] = np.full((*shape, steps) if spec.by_step else shape, spec.fill, spec.dtype)
    return block
