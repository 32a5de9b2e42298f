"""Stores of the first format, for reading: [row, col] arrays, no replicates, no probe at step 0.

They are labelled by their old rule, under its own name, and cannot be resumed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from engine.config import Run, SweepConfig, cells_of, hyper_names, make_config
from engine.family import ALIASES
from engine.measure import measurements_of
from engine.outcome import measure_label, window_label
from engine.store import STATUS, Store, store_attributes

FOLLOWING = ("lr_matrix", "lr_attention", "lr_mlp", "lr_embedding", "lr_unembedding", "lr_0", "lr_1")
RULES = {"language": window_label, "two_layer": measure_label}


class StoreV1(Store):
    """A store of the first format, with the interface of `Store`: one replicate."""

    def __init__(self, path: str | Path) -> None:
        """Open an existing store. Raises ValueError where it is not whole."""
        self.path = Path(path)
        self.attributes = store_attributes(self.path)
        self.config = config_v1(self.attributes["configuration"])
        self.group = zarr.open_group(self.path, mode="r")
        cells = cells_of(self.config)
        names = tuple(cells.columns)
        stored = {name: np.asarray(self.array(dim)[:]) for name, dim in zip(names, ("y", "x"), strict=True)}
        self.run = Run(self.config, cells.stored_as(stored))
        self.label_rule = RULES[self.config.family.workload]
        held = {"status": STATUS} | measurements_of(self.run)
        self.specs = {name: spec for name, spec in held.items() if self.has_metadata(name)}
        self.chunk_rows = self.array("status").chunks[0]

    def read(self, name: str, replicate: int | slice = slice(None), rows: slice = slice(None)) -> np.ndarray:
        """An array [1, row, col(, step)], or its only replicate."""
        found = np.asarray(self.array(name)[rows])
        return found[None] if isinstance(replicate, slice) else found

    def labelled(self, replicate: int | slice = slice(None)) -> dict[str, np.ndarray]:
        """`status`, then what the old rules are made of."""
        names = ("status", "first_loss", "last_loss", "nonfinite_step", "measure")
        return {name: self.read(name, replicate) for name in names if name in self}


def config_v1(stored: Mapping[str, Any]) -> SweepConfig:
    """The configuration of a first-format store: fields by their present names, and of those what its network reads."""
    network = ALIASES.get(stored["network"], stored["network"])
    values = {name.replace("_", ".", 1) if name in FOLLOWING else name: value for name, value in stored.items()}
    swept = [values[axis].partition(":")[0] for axis in ("y", "x")]
    fields = {name: values[name] for name in make_config(network).flat() if name in values and name != "network"}
    config = make_config(network, **fields)
    hyper = {name: values[name] for name in hyper_names(config) if values.get(name) is not None and name not in swept}
    return make_config(network, **fields, **hyper)
