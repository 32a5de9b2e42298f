"""A map: a store with its labels, convergence, critical rates and dimension, and its one-screen summary."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table

from analysis.boundary import Critical, critical, is_rate, map_edges
from analysis.classify import Labelling, classify, convergence_value, counts
from analysis.dimension import LEAST_CELLS, Dimension, measure, nulls
from analysis.recommend import Recommendation, recommend, why_not
from engine.amount import amount_words, epochs_words, short_name
from engine.grid import Grid
from engine.outcome import Thresholds, measured, trains
from engine.store import Replicate, Store

if TYPE_CHECKING:
    from analysis.replicates import Borders


@dataclass(frozen=True)
class Map:
    """A store with everything the picture and the summary say about it."""

    store: Replicate
    thresholds: Thresholds  # of its labels, and of all that follows from them
    codes: np.ndarray  # label codes [row, col]
    value: np.ndarray  # convergence values [row, col]
    critical: Critical | None  # None without a learning-rate axis
    dimension: Dimension | None  # None without a boundary, or on a map too small for three box sides
    blocks: int  # boundary blocks

    @cached_property
    def answer(self) -> Recommendation | None:
        """What the store recommends; None where `why_not` says why it does not."""
        return None if why_not(self.store.store) else recommend(self.store.store, self.thresholds)

    @cached_property
    def trained(self) -> "Trained | None":
        """P(train) over the store's seeds; None of one seed."""
        several = self.store.run.replicates > 1
        return trained_share(self.store.store, self.thresholds) if several else None

    @property
    def title(self) -> str:
        """What was swept on what, in one line."""
        return map_title(self.store)

    @property
    def caption(self) -> str:
        """Which data and seeds, in a sentence or two."""
        seeds, first = self.store.run.replicates, self.store.config.seed
        if "seed" in self.store.run.names:
            draws = "Every seed has its own cells."
        elif seeds == 1:
            draws = f"One seed ({first}): one draw."
        else:
            draws = f"Labels and losses of seed {first + self.store.index}, one of {seeds}."
        data = self.store.attributes.get("data", "")
        return f"{data}. {draws}" if data else draws


def map_title(store: Replicate) -> str:
    """What a map sweeps on which network and data, in one line."""
    (rows, cols), data = store.grid.shape, data_name(store.store)
    axes = f"{store.grid.y.long_name} by {store.grid.x.long_name}"
    return f"{store.config.title}{f' on {data}' if data else ''}: {axes}, {rows} x {cols} cells"


def data_name(store: Store) -> str:
    """The data in a word or two: a file's or package's name, '' for a workload without any."""
    return short_name(str(store.config.flat().get("data", "")))


@dataclass(frozen=True)
class Trained:
    """P(train): the share of a store's seeds that train in each cell."""

    grid: Grid
    trains: np.ndarray  # bool [seed, row, col]
    known: np.ndarray  # which were measured

    @property
    def seeds(self) -> int:
        """Replicates behind it."""
        return len(self.trains)

    @cached_property
    def share(self) -> np.ndarray:
        """Of the seeds [row, col]; NaN where none was measured."""
        with np.errstate(invalid="ignore"):
            return (self.trains & self.known).sum(0) / self.known.sum(0)

    @property
    def rated(self) -> bool:
        """Whether one of the axes, and not both, is a learning rate."""
        return is_rate(self.grid.y) != is_rate(self.grid.x)

    @property
    def lr_rows(self) -> bool:
        """Whether the learning rate gives the rows."""
        return is_rate(self.grid.y)

    @cached_property
    def missing(self) -> str:
        """Which of LR50 and LR90 the seeds are too few for, '' if none."""
        from analysis.replicates import FEWEST_SEEDS  # brings scipy and numba

        few = [(level, fewest) for level, fewest in FEWEST_SEEDS.items() if self.seeds < fewest]
        return ", ".join(f"LR{100 * level:.0f} needs {fewest} seeds" for level, fewest in few) if self.rated else ""

    @cached_property
    def borders(self) -> "Borders | None":
        """LR50 and LR90 without their intervals, where the map has a learning rate and seeds enough."""
        from analysis.replicates import FEWEST_SEEDS, borders  # brings scipy and numba

        levels = tuple(level for level in (0.5, 0.9) if self.seeds >= FEWEST_SEEDS[level])
        rates = (self.grid.y if self.lr_rows else self.grid.x).values
        if not self.rated or not levels or (rates > 0).sum() < 4:
            return None
        good, known = (
            (each if self.lr_rows else each.swapaxes(1, 2))[:, rates > 0] for each in (self.trains, self.known)
        )
        return borders(rates[rates > 0], good, known, levels=levels, intervals=False)


def trained_share(store: Store, thresholds: Thresholds) -> Trained:
    """P(train) over the replicates of a grid."""
    codes = store.labels(thresholds)
    grid = store.run.cells
    assert isinstance(grid, Grid)
    return Trained(grid, trains(codes), measured(codes))


def analyse(store: Replicate, labelling: Labelling, fit: tuple[int, int] | None) -> Map:
    """Labels, convergence, critical rates and dimension of a store."""
    codes = classify(store, labelling.thresholds)
    blocks = map_edges(codes)
    rated = is_rate(store.grid.y) or is_rate(store.grid.x)
    large = min(blocks.shape) >= LEAST_CELLS
    return Map(
        store,
        labelling.thresholds,
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
