"""The store of a sweep: a Zarr v3 group that survives a kill at any moment.

Every array is preallocated. A chunk spans the rows of one launch and all columns, so each stored
object has one writer. A block of rows is written results first, each file down to the disk, `status` last: a
cell that says DONE has all its numbers on disk. Status is a small integer and is never inferred from
NaN, which is a legitimate result. A file is written beside its place and renamed (`engine.files`), so a reader
or a kill sees the old chunk or the new one.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import zarr

from engine.config import DERIVED, SweepConfig
from engine.files import DurableStore, FolderLock, make_folders, place_folder
from engine.grid import Grid

FORMAT = "fractal-llm sweep"
VERSION = 1


@dataclass(frozen=True)
class ArraySpec:
    """One stored array over (row, col[, step])."""

    dtype: str
    fill: float
    long_name: str
    units: str = "1"
    steps: bool = False


COMMON = {
    "status": ArraySpec("u1", 0, "0 not computed, 1 done"),
    "first_loss": ArraySpec("f4", np.nan, "loss of the first step", "nat"),
    "last_loss": ArraySpec("f4", np.nan, "mean loss of the last 20 steps (all, if fewer)", "nat"),
    "steps": ArraySpec("i4", 0, "steps of the cell's run"),
    "nonfinite_step": ArraySpec("i4", -1, "first step whose loss or updated weights are not finite, -1 if none"),
    "weights_digest": ArraySpec("u8", 0, "64-bit digest of the final weights"),
}
LANGUAGE = {"val_loss": ArraySpec("f4", np.nan, "loss on the held-out sequences after the last step", "nat")}
MLP = {
    "nonfinite_step": ArraySpec("i4", -1, "first step whose loss (as the kernel has it) is not finite, -1 if none"),
    "measure": ArraySpec("f8", np.nan, "convergence measure: -sum v if converged, else sum 1/v"),
}
TRACE = {"losses": ArraySpec("f4", np.nan, "loss of every step, before its update", "nat", steps=True)}


def array_specs(config: SweepConfig) -> dict[str, ArraySpec]:
    """The arrays a sweep of this configuration stores."""
    own = MLP if config.network == "mlp" else LANGUAGE
    return COMMON | own | (TRACE if config.trace == "on" else {})


class Store:
    """A sweep's results, open for reading; `Writer` adds the writing."""

    def __init__(self, path: str | Path) -> None:
        """Open an existing store.

        Raises:
            ValueError: there is no store of ours at the path, or its creation was interrupted.
        """
        self.path = Path(path)
        metadata = self.path / "zarr.json"
        if not metadata.is_file():
            raise ValueError(f"{self.path} is not a sweep store (no zarr.json); give the path of one, or a new path")
        attributes = read_metadata(metadata).get("attributes", {})
        if attributes.get("format") != FORMAT or "configuration" not in attributes:
            raise ValueError(f"{self.path} is a Zarr group of another program; give a sweep store, or a new path")
        if attributes.get("format_version") != VERSION:
            raise ValueError(
                f"{self.path} has store format {attributes.get('format_version')}, expected {VERSION}; "
                "read it with the version that wrote it"
            )
        self.attributes = attributes
        self.config = SweepConfig.from_json(attributes["configuration"])
        self.grid: Grid = self.config.grid
        self.group = zarr.open_group(self.path, mode="r", zarr_format=3)
        for name, spec in array_specs(self.config).items():
            # zarr lets a damaged array's own error through, which names no file
            whole = "shape" in read_metadata(self.path / name / "zarr.json")
            array = self.array(name) if whole else None
            if array is None or array.shape[:2] != self.grid.shape or array.dtype != np.dtype(spec.dtype):
                raise ValueError(f"{self.path} is half-written (array {name!r}); delete it and sweep again")

    def __contains__(self, name: str) -> bool:
        return name in self.group

    def array(self, name: str) -> zarr.Array:
        """A stored array."""
        array = self.group[name]
        assert isinstance(array, zarr.Array), name
        return array

    def read(self, name: str, rows: slice = slice(None), cols: slice = slice(None)) -> np.ndarray:
        """An array, or a block of its rows and columns, as numpy. Raises ValueError when a chunk is damaged."""
        try:
            return np.asarray(self.array(name)[rows, cols])
        except RuntimeError as error:
            raise ValueError(f"{self.path / name} is damaged ({error}); restore it or sweep into a new path") from None

    @property
    def status(self) -> np.ndarray:
        """Status codes [row, col] (engine.outcome)."""
        return self.read("status")

    @property
    def figures(self) -> Path:
        """The folder inside the store that pictures of it are drawn into."""
        return self.path / "figures"

    def children(self) -> list[Path]:
        """Paths of the zooms stored inside this store."""
        return sorted(p for p in (self.path / "zoom").glob("*") if (p / "zarr.json").is_file())


def read_metadata(file: Path) -> dict:
    """A zarr.json, {} if it is missing. Raises ValueError when it is no JSON object."""
    text = file.read_text("utf-8", errors="replace") if file.is_file() else "{}"
    try:
        metadata = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({error}); restore it or sweep into a new path") from None
    if not isinstance(metadata, dict):
        raise ValueError(f"{file} is damaged (no JSON object); restore it or sweep into a new path")
    return metadata


def open_store(path: str | Path) -> Store:
    """Open a store for reading. Raises ValueError when it is not a whole store of ours."""
    return Store(path)


def create_store(path: str | Path, config: SweepConfig, steps: int, rows_per_chunk: int, attributes: dict) -> None:
    """Make the empty store of a sweep: all or nothing.

    It is built beside its place and renamed, so an interrupted creation leaves nothing at `path`.

    Args:
        path: where it will stand; nothing may stand there yet.
        config: the resolved configuration.
        steps: length of the longest run, for `losses`.
        rows_per_chunk: rows of a launch.
        attributes: provenance and what else the sweep states about itself, JSON values.
    """
    path = Path(path)
    make_folders(path.parent)
    with TemporaryDirectory(prefix=".sweep-", dir=path.parent) as beside:
        building = Path(beside, "store")
        build_store(building, config, steps, rows_per_chunk, attributes)
        place_folder(building, path)


def build_store(building: Path, config: SweepConfig, steps: int, rows_per_chunk: int, attributes: dict) -> None:
    """Write the empty store of `create_store` where nobody looks yet."""
    grid = config.grid
    rows, cols = grid.shape
    group = zarr.create_group(
        building,
        zarr_format=3,  # whatever ZARR_DEFAULT_ZARR_FORMAT says
        attributes={
            "format": FORMAT,
            "format_version": VERSION,
            "configuration": config.to_json(),
            "configuration_hash": config.hash,
        }
        | attributes,
    )
    for name, dim, axis in (("y", "row", grid.y), ("x", "col", grid.x)):
        coordinate = group.create_array(
            name,
            data=axis.values.astype("f8"),
            dimension_names=(dim,),
            attributes={"long_name": axis.name, "scale": axis.scale},
        )
        assert coordinate.shape == (axis.points,)
    for name, spec in array_specs(config).items():
        group.create_array(
            name,
            shape=(rows, cols) + ((steps,) if spec.steps else ()),
            chunks=(rows_per_chunk, cols) + ((steps,) if spec.steps else ()),
            dtype=spec.dtype,
            fill_value=spec.fill,
            dimension_names=("row", "col") + (("step",) if spec.steps else ()),
            attributes={"long_name": spec.long_name, "units": spec.units, "coordinates": "y x"},
        )
    # sub-groups, so that what is kept inside the store is part of its hierarchy
    for name in ("figures", "zoom", "noise"):
        group.create_group(name)


class Writer(Store):
    """A store open for writing by one process at a time (per group of ranks: rank 0 holds the lock)."""

    def __init__(self, path: str | Path, lock: bool = True) -> None:
        """Open an existing store for writing.

        Raises:
            ValueError: not a store of ours, or another process is writing it.
        """
        super().__init__(path)
        self.lock = FolderLock(self.path) if lock else None
        self.group = zarr.open_group(DurableStore(self.path), mode="r+", zarr_format=3)

    def write_rows(self, start: int, block: dict[str, np.ndarray]) -> None:
        """Write rows [start, start + n) of every array given, each [n, cols, ...]; `status` last.

        `start` and n must be a launch's rows, so that a chunk has one writer.
        """
        count = len(block["status"])
        chunk = self.array("status").chunks[0]
        assert start % chunk == 0, (start, chunk)
        assert count <= chunk, (count, chunk)
        for name in sorted(block, key=lambda name: name == "status"):
            # an all-fill chunk is a result like any other
            array = self.array(name).with_config({"write_empty_chunks": True})
            array[start : start + count] = block[name]

    def close(self) -> None:
        """Give up the lock, as the end of the process does."""
        if self.lock is not None:
            self.lock.close()


def check_same_configuration(path: Path, stored: SweepConfig, asked: SweepConfig) -> None:
    """Raise ValueError naming the first field in which a store's configuration differs from the asked one.

    Fields that follow from others come last, so that the line names what the user changed.
    """
    for field in sorted(fields(SweepConfig), key=lambda field: field.name in DERIVED):
        was, now = getattr(stored, field.name), getattr(asked, field.name)
        if was != now:
            raise ValueError(
                f"{path} holds a sweep with {field.name}={was!r}, got {now!r}; "
                "give the same configuration to resume it, or --store another path"
            )


def check_same_data(store: Store, digest: str) -> None:
    """Raise ValueError when the data are no longer those a store's cells were trained on."""
    if store.attributes["data_digest"] != digest:
        raise ValueError(
            f"the data {store.config.data!r} have changed since {store.path} was made; "
            "restore them, or sweep into another --store"
        )
