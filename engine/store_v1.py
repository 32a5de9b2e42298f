"""Stores of the first format, for reading: [row, col] arrays, no replicates, no probe at step 0.

They are labelled by their old rule, under its own name, and cannot be resumed.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr

from engine.config import Run, SweepConfig, cells_of, hyper_names, make_config
from engine.family import spelt_out
from engine.measure import measurements_of
from engine.outcome import LABELS, Thresholds, measure_label, window_label
from engine.place import Where, located, place_of
from engine.store import STATUS, Store, store_attributes

if TYPE_CHECKING:
    import xarray

FOLLOWING = ("lr_matrix", "lr_attention", "lr_mlp", "lr_embedding", "lr_unembedding", "lr_0", "lr_1")
RULES = {"language": window_label, "two_layer": measure_label}


class StoreV1(Store):
    """A store of the first format, with the interface of `Store`: one replicate."""

    def __init__(self, path: str | Where) -> None:
        """Open an existing store. Raises ValueError where it is not whole."""
        self.path = located(path)
        self.place = place_of(self.path)
        self.attributes = store_attributes(self.path)
        self.config = config_v1(self.attributes["configuration"])
        self.group = zarr.open_group(self.place.zarr(), mode="r")
        cells = cells_of(self.config)
        names = tuple(cells.columns)
        stored = {name: np.asarray(self.array(dim)[:]) for name, dim in zip(names, ("y", "x"), strict=True)}
        self.run = Run(self.config, cells.stored_as(stored))
        self.label_rule = RULES[self.config.family.workload]
        held = {"status": STATUS} | measurements_of(self.run)
        self.specs = {name: spec for name, spec in held.items() if self.has_metadata(name)}
        self.chunk_rows = self.array("status").chunks[0]
        # what a replay needs, under its present names
        self.attributes |= {
            "rows_per_launch": self.chunk_rows,
            "inputs": {"data": self.attributes.get("data_digest", "")},
        }

    def read(self, name: str, replicate: int | slice = slice(None), rows: slice = slice(None)) -> np.ndarray:
        """An array [1, row, col(, step)], or its only replicate."""
        found = np.asarray(self.array(name)[rows])
        return found[None] if isinstance(replicate, slice) else found

    @property
    def status(self) -> np.ndarray:
        """Status codes [1, row, col]; nobody writes them any more."""
        return self.read("status")

    def labelled(self, replicate: int | slice = slice(None)) -> dict[str, np.ndarray]:
        """`status`, then what the old rules are made of."""
        names = ("status", "first_loss", "last_loss", "nonfinite_step", "measure")
        return {name: self.read(name, replicate) for name in names if name in self}

    def to_xarray(self, thresholds: Thresholds | None = None) -> "xarray.Dataset":
        """Every measurement and `label`, with named, valued dimensions, in memory."""
        import xarray

        dims = ("replicate", *self.run.cells.dims)
        arrays = {}
        for name, spec in self.specs.items():
            own = (*dims, "step") if spec.by_step else dims
            arrays[name] = (own, self.read(name), {"long_name": spec.long_name, "units": spec.units})
        names = np.array(LABELS)[self.labels(thresholds or Thresholds())]
        arrays["label"] = (dims, names, {"long_name": "what became of the run, by the old rule"})
        coordinates = {name: (dim, values, own) for name, (dim, values, own) in self.run.cells.coordinates().items()}
        return xarray.Dataset(arrays, coordinates, self.attributes)


def config_v1(stored: Mapping[str, Any]) -> SweepConfig:
    """The configuration of a first-format store: fields by their present names, and of those what its network reads."""
    network, stored = spelt_out(stored["network"], stored)
    values = {name.replace("_", ".", 1) if name in FOLLOWING else name: value for name, value in stored.items()}
    swept = [values[axis].partition(":")[0] for axis in ("y", "x")]
    fields = {name: values[name] for name in make_config(network).flat() if name in values and name != "network"}
    config = make_config(network, **fields)
    hyper = {name: values[name] for name in hyper_names(config) if values.get(name) is not None and name not in swept}
    return make_config(network, **fields, **hyper)
