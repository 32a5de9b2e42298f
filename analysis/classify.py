"""Labels and the convergence value of every cell, computed from a store's raw numbers.

Nothing here is stored: other thresholds give other maps of the same measurements. The rules are those of
`engine.outcome`.
"""

if __name__ == "__main__" and not __package__:
    import started  # noqa: F401  says how to start it where its packages are missing

from dataclasses import dataclass

import numpy as np
from rich.table import Table

from engine.command import parse, screen, user_errors
from engine.outcome import LABELS, Thresholds, measured, trains
from engine.store import Replicate, open_map

LARGEST_RATIO = 1e6  # what a non-finite or larger loss ratio counts as (Sohl-Dickstein 2024)


def classify(store: Replicate, thresholds: Thresholds) -> np.ndarray:
    """Label codes [row, col] uint8 into engine.outcome.LABELS, by the rule of the store's workload."""
    return store.labels(thresholds)


def convergence_value(store: Replicate, codes: np.ndarray) -> np.ndarray:
    """The signed value behind a convergence map, float64 [row, col], NaN where not measured.

    Negative where training works, positive where it breaks; nearer 0 is farther from the boundary on
    the broken side, and quicker convergence on the other. The paper's network has its stored measure
    (-sum v, or +sum 1/v, over v = loss / first loss). For language models it is the same in means over
    the planned steps, so that columns of different length compare: -mean v, or +mean 1/v with the steps
    after a non-finite one counted as v = 1e6. Without stored traces v is the last loss over the first.
    """
    if "measure" in store:
        return np.where(measured(codes), store.read("measure"), np.nan)
    first, planned = store.read("first_loss").astype(np.float64), store.planned_steps
    good = trains(codes)
    if "losses" not in store:
        ratio = loss_ratio(store.read("last_loss"), first)
        return np.where(measured(codes), np.where(good, -ratio, 1 / ratio), np.nan)
    value = np.full(codes.shape, np.nan)
    for row in range(len(codes)):  # one row of traces at a time bounds the memory
        losses = store.read("losses", rows=slice(row, row + 1))[0]
        ratio = loss_ratio(losses, first[row, :, None])
        within = np.arange(losses.shape[-1]) < planned[row, :, None]
        terms = np.where(good[row, :, None], -ratio, 1 / ratio)
        value[row] = np.where(within, terms, 0).sum(-1) / planned[row]
    return np.where(measured(codes), value, np.nan)


def loss_ratio(losses: np.ndarray, first: np.ndarray) -> np.ndarray:
    """losses / first as float64, in [1 / LARGEST_RATIO, LARGEST_RATIO]; not finite counts as LARGEST_RATIO."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        ratio = np.asarray(losses, np.float64) / first
    return np.clip(np.where(np.isfinite(ratio), ratio, LARGEST_RATIO), 1 / LARGEST_RATIO, LARGEST_RATIO)


def counts(codes: np.ndarray) -> dict[str, int]:
    """Number of cells of each label that occurs."""
    found = np.bincount(codes.ravel(), minlength=len(LABELS))
    return {name: int(n) for name, n in zip(LABELS, found, strict=True) if n}


@dataclass(frozen=True)
class Limits:
    """The thresholds of labels; shared by the commands that read all replicates."""

    converged: float = Thresholds.converged  # (loss - best) / (start - best) of a budget, up to which: converged
    moved: float = Thresholds.moved  # share of the start's held-out loss within which a loss has not moved

    @property
    def thresholds(self) -> Thresholds:
        """The thresholds, checked. Raises ValueError for one outside (0, 1)."""
        if not (0 < self.converged < 1 and 0 < self.moved < 1):
            raise ValueError(f"converged is {self.converged:g} and moved {self.moved:g}; expected values in (0, 1)")
        return Thresholds(self.converged, self.moved)


@dataclass(frozen=True)
class Labelling(Limits):
    """Which replicate, and the thresholds of its labels; shared by the commands that read one map."""

    replicate: int = 0  # which seed's map to read, from 0


@dataclass(frozen=True, kw_only=True)
class Options(Labelling):
    """Which store to label, and how."""

    store: str  # path of the sweep's store


def main() -> None:
    """Print how many cells carry each label."""
    options = parse(Options, "Label every cell of a store and count the labels. Stored numbers stay as they are.")
    with user_errors():
        store = open_map(options.store, options.replicate)
        codes = classify(store, options.thresholds)
        table = Table("label", "cells", "share", title=f"{store.path}: {codes.shape[0]} x {codes.shape[1]} cells")
        for name, count in counts(codes).items():
            table.add_row(name, f"{count}", f"{count / codes.size:.1%}")
        screen().print(table)


if __name__ == "__main__":
    main()
