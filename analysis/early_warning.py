"""How soon the first losses of a run tell how it will end: areas under the ROC curve of simple signs."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table

from analysis.boundary import Critical, critical, lines
from analysis.classify import measured, trains
from engine.store import Replicate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NEAR = 4.0  # a cell is near the boundary within this factor of its column's critical rate
SURE = 0.95  # area under the ROC curve from which a sign counts as sure
FEWEST_RUNS = 50  # runs below which an area is not counted on
SIGNS = ("last", "highest", "jump", "learning rate alone")


@dataclass(frozen=True)
class EarlyWarning:
    """How surely the first losses tell whether a run breaks, as areas under the ROC curve."""

    first: np.ndarray  # [k] how many losses were looked at
    runs: np.ndarray  # [k] measured runs longer than that
    decided: np.ndarray  # [k] share of the runs that break which are not finite by then
    areas: dict[str, np.ndarray]  # [k] for each of SIGNS; 0.5 is a coin, NaN where all end alike

    @property
    def soon(self) -> int | None:
        """The fewest losses from which the best sign stays sure; None if never.

        Looked at are counts that FEWEST_RUNS runs or more outlast, up to half the longest run: one that is sure
        by chance, or near the end of the few longest runs, warns of nothing.
        """
        best = np.nanmax([self.areas[name] for name in SIGNS[:3]] + [np.zeros(len(self.first))], axis=0)
        counted = (self.runs >= FEWEST_RUNS) & (self.first <= (self.first[-1] + 1) / 2)
        stays = np.logical_and.accumulate(best[counted][::-1] >= SURE)[::-1]
        return int(self.first[counted][stays][0]) if stays.any() else None


def early_warning(store: Replicate, codes: np.ndarray, chosen: np.ndarray | None = None) -> EarlyWarning:
    """Areas under the ROC curve of simple signs in the first k losses, against the final label.

    Signs: the k-th loss and the highest of the first k, both over the first; the largest rise in one
    step; and, as the baseline, the learning rate alone. A non-finite loss counts as the highest value.
    Only runs longer than k steps are looked at.

    Args:
        chosen: bool [row, col], cells to look at; default all measured.

    Raises:
        ValueError: the store holds no traces, or its runs are shorter than three steps.
    """
    if "losses" not in store:
        raise ValueError(f"{store.path} holds no loss traces; early warning needs a sweep with --trace on")
    longest = int(store.planned_steps.max())
    first = np.unique(np.geomspace(2, max(longest - 1, 2), 14).round().astype(int))
    first = first[first < longest]
    if not len(first):
        raise ValueError(f"the longest run of {store.path} has {longest} steps; early warning needs at least 3")
    cells = measured(codes) if chosen is None else measured(codes) & chosen
    broke, planned = ~trains(codes)[cells], store.planned_steps[cells]
    rate = np.broadcast_to(rates(store), codes.shape)[cells]
    # no more than the first k losses of each run are needed, and non-finite is the highest of all
    losses = store.read("losses")[cells][:, : first[-1]].astype(np.float64)
    losses[~np.isfinite(losses)] = np.inf
    with np.errstate(invalid="ignore"):
        ratio = losses / losses[:, :1]
        rise = np.diff(ratio, axis=1)
    rise[~np.isfinite(rise)] = np.inf
    areas: dict[str, list[float]] = {name: [] for name in SIGNS}
    runs, decided = [], []
    for k in first:
        long = planned > k
        signs = (ratio[:, k - 1], ratio[:, :k].max(1), rise[:, : k - 1].max(1), rate)
        for name, sign in zip(SIGNS, signs, strict=True):
            areas[name].append(roc_area(sign[long], broke[long]))
        runs.append(long.sum())
        stopped = np.isinf(losses[:, k - 1]) & long & broke
        decided.append(stopped.sum() / max((long & broke).sum(), 1))
    return EarlyWarning(first, np.array(runs), np.array(decided), {name: np.array(a) for name, a in areas.items()})


def rates(store: Replicate) -> np.ndarray:
    """The swept learning rate, broadcasting to [row, col]."""
    found = critical(store.grid, np.zeros(store.grid.shape, np.uint8))
    return found.lr.values[:, None] if found.lr == store.grid.y else found.lr.values


def near_boundary(store: Replicate, found: Critical) -> np.ndarray:
    """Cells within a factor NEAR of their line's critical rate, bool [row, col]."""
    with np.errstate(invalid="ignore"):
        close = np.abs(np.log(found.lr.values[:, None] / found.value)) <= math.log(NEAR)
    return lines(store.grid, close)


def roc_area(sign: np.ndarray, broke: np.ndarray) -> float:
    """Chance that a run that breaks shows more of the sign than one that does not, ties half; NaN without both."""
    yes, no = np.sort(sign[broke]), np.sort(sign[~broke])
    if not len(yes) or not len(no):
        return math.nan
    below = np.searchsorted(no, yes, "left") + np.searchsorted(no, yes, "right")
    return float(below.mean() / 2 / len(no))


def draw_early(axes: "Axes", early: EarlyWarning, title: str) -> None:
    """ROC areas against the number of losses looked at."""
    styles = (("#0b559f", "-"), ("#5ba3d0", "-"), ("#fd8d3c", "-"), ("#555555", "--"))
    for name, (colour, line) in zip(SIGNS, styles, strict=True):
        axes.plot(early.first, early.areas[name], line, color=colour, marker="o", ms=3, lw=1.3, label=name)
    axes.axhline(0.5, color="#999999", lw=0.8, ls=":")
    axes.text(early.first[-1], 0.505, "coin", ha="right", va="bottom", fontsize=7, color="#777777")
    axes.set(xscale="log", ylim=(min(0.42, np.nanmin(list(early.areas.values())) - 0.02), 1.02))
    axes.set(xlabel="first losses seen", ylabel="ROC area")
    axes.set_title(title, loc="left", fontweight="bold", fontsize=9.5)
    axes.legend(frameon=False, fontsize=7.5, loc="best")


def early_table(early: EarlyWarning, title: str) -> Table:
    """Early warning as numbers."""
    table = Table("first losses", "runs", *SIGNS, "already not finite", title=title, title_justify="left")
    for i, k in enumerate(early.first):
        areas = [f"{early.areas[name][i]:.3f}" for name in SIGNS]
        table.add_row(str(k), str(early.runs[i]), *areas, f"{early.decided[i]:.0%}")
    return table
