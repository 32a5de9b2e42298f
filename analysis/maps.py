"""A map: a store with its labels, convergence, critical rates and dimension, and its one-screen summary."""

from dataclasses import dataclass

import numpy as np
from rich.table import Table

from analysis.boundary import Critical, critical, map_edges
from analysis.classify import Labelling, classify, convergence_value, counts
from analysis.dimension import LEAST_CELLS, Dimension, measure, nulls
from engine.amount import amount_words, epochs_words
from engine.hyper import long_name
from engine.store import Replicate


@dataclass(frozen=True)
class Map:
    """A store with everything the picture and the summary say about it."""

    store: Replicate
    codes: np.ndarray  # label codes [row, col]
    value: np.ndarray  # convergence values [row, col]
    critical: Critical | None  # None without a learning-rate axis
    dimension: Dimension | None  # None without a boundary, or on a map too small for three box sides
    blocks: int  # boundary blocks

    @property
    def title(self) -> str:
        """What was swept, in one line."""
        (rows, cols), store = self.store.grid.shape, self.store
        seed = f", seed {store.config.seed + store.index}" if store.run.replicates > 1 else ""
        axes = f"{long_name(store.grid.y.name)} by {long_name(store.grid.x.name)}"
        return f"{store.config.title}: {axes}, {rows} x {cols} cells{seed}"


def analyse(store: Replicate, labelling: Labelling, fit: tuple[int, int] | None) -> Map:
    """Labels, convergence, critical rates and dimension of a store."""
    codes = classify(store, labelling.thresholds)
    blocks = map_edges(codes)
    rated = any(axis.name == "lr" or axis.name.startswith("lr.") for axis in (store.grid.y, store.grid.x))
    large = min(blocks.shape) >= LEAST_CELLS
    return Map(
        store,
        codes,
        convergence_value(store, codes),
        critical(store.grid, codes) if rated else None,
        measure(blocks, fit) if large or fit else None,
        int(blocks.sum()),
    )


def dimension_line(d: Dimension) -> str:
    """The dimension with its interval and fit range, in one line."""
    return (
        f"boundary dimension {d.value:.2f} (95%: {d.low:.2f} to {d.high:.2f}; boxes of {d.fit[0]} to {d.fit[1]} cells)"
    )


def summary(found: Map) -> Table:
    """The one-screen summary: grid, labels, critical learning rates, dimension with its nulls."""
    table = Table(title=found.title, show_header=False, title_justify="left", title_style="bold", box=None)
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, axis in (("rows", found.store.grid.y), ("columns", found.store.grid.x)):
        table.add_row(name, f"{axis.name}, {axis.points} values, {axis.low:.4g} to {axis.high:.4g} ({axis.scale})")
    if amount := found.store.attributes.get("amount"):
        said, plan = amount_words(found.store.config.training.data, amount), found.store.config.workload.plan
        table.add_row("data", f"{said}; epochs: {epochs_words(plan(found.store.run), amount)}")
    cells = found.codes.size
    table.add_row("labels", ", ".join(f"{name} {n} ({n / cells:.0%})" for name, n in counts(found.codes).items()))
    for name, text in critical_lines(found.critical) if found.critical else ():
        table.add_row(name, text)
    if not found.blocks:
        table.add_row("boundary", "none: every measured cell is on one side, so there is no dimension")
    elif found.dimension is None:
        table.add_row("boundary", f"{found.blocks} blocks; the map is too small for a dimension")
    else:
        table.add_row("boundary", f"{found.blocks} of {map_edges(found.codes).size} blocks of 2 x 2 cells")
        d = found.dimension
        table.add_row(
            "dimension",
            f"{d.value:.3f}, 95% interval {d.low:.3f} to {d.high:.3f}, boxes of {d.fit[0]} to {d.fit[1]} cells "
            f"({d.decades:.1f} decades)",
        )
        null = nulls(map_edges(found.codes).shape, d.fit)
        texts = (f"{name} {n.value:.3f}" if n else f"{name}: no boundary" for name, n in null.items())
        table.add_row("nulls", ", ".join(texts))
        if d.warning:
            table.add_row("warning", d.warning, style="yellow")
    return table


def critical_lines(found: Critical, most: int = 8) -> list[tuple[str, str]]:
    """Summary rows of the critical learning rates: the range, and the rate at up to `most` lines."""
    rows = []
    bracketed = np.flatnonzero(found.bracketed)
    name = f"critical {found.lr.name}"
    if not len(bracketed):
        return [(name, f"in none of {found.other.points} lines is the boundary bracketed")]
    chosen = bracketed[np.unique(np.linspace(0, len(bracketed) - 1, most).round().astype(int))]
    rows.append((name, "  ".join(f"{found.value[i]:.2e}" for i in chosen)))
    rows.append((f"at {found.other.name}", "  ".join(f"{found.other.values[i]:<8.3g}" for i in chosen)))
    if len(bracketed) < found.other.points:
        rows.append(("", f"bracketed in {len(bracketed)} of {found.other.points} lines"))
    return rows
