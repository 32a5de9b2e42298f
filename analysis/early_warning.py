"""How soon the first losses of a run tell how it will end: areas under the ROC curve of simple signs."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table

from analysis.boundary import learning_rate_axis
from analysis.classify import measured, trains
from analysis.panels import legend_below
from engine.store import Replicate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SURE = 0.95  # area under the ROC curve from which a sign counts as sure
FEWEST_RUNS = 50  # runs below which an area is not counted on
FROM_END = 20  # steps that a run must still have before it for a warning to be early
SIGNS = ("last", "highest", "jump", "learning rate alone")


@dataclass(frozen=True)
class EarlyWarning:
    """How surely the first losses tell whether a run breaks, as areas under the ROC curve at landmarks."""

    first: np.ndarray  # [k] how many losses were looked at
    runs: np.ndarray  # [k] runs that are alive then and have FROM_END steps or more before them
    areas: dict[str, np.ndarray]  # [k] for each of SIGNS; 0.5 is a coin, NaN where all end alike

    @property
    def best(self) -> np.ndarray:
        """The area of the best sign of the losses [k], 0 where none is known."""
        return np.nanmax([self.areas[name] for name in SIGNS[:3]] + [np.zeros(len(self.first))], axis=0)

    @property
    def counted(self) -> np.ndarray:
        """Landmarks that FEWEST_RUNS runs or more outlast, bool [k]."""
        return self.runs >= FEWEST_RUNS

    @property
    def soon(self) -> int | None:
        """The fewest losses from which the best sign stays sure over all landmarks counted on; None if never."""
        stays = np.logical_and.accumulate(self.best[self.counted][::-1] >= SURE)[::-1]
        return int(self.first[self.counted][stays][0]) if stays.any() else None

    @property
    def gained(self) -> float:
        """The most that a sign of the losses adds to the area of the learning rate alone; NaN without a landmark."""
        gain = (self.best - self.areas[SIGNS[3]])[self.counted]
        return float(np.nanmax(gain)) if np.isfinite(gain).any() else math.nan


def early_warning(store: Replicate, codes: np.ndarray) -> EarlyWarning | None:
    """Areas under the ROC curve of simple signs in the first k losses, against how the run ends.

    Signs: the k-th loss and the highest of the first k, both over the first; the largest rise in one step; and, as the
    baseline, the learning rate alone. Each trajectory counts once, by its longest cell, at the landmarks k at which it
    is alive with FROM_END steps or more before it: what has broken already, or is about to end, needs no warning.

    Returns:
        None where no run is long enough.

    Raises:
        ValueError: the store holds no traces.
    """
    if "losses" not in store:
        raise ValueError(f"{store.path} holds no loss traces; early warning needs a sweep with --trace on")
    plan, size = store.config.workload.plan(store.run), codes.size
    longest = plan.work_in(store.index * size + np.arange(size)).longest - store.index * size
    known = measured(codes).ravel()[longest]
    at = np.unravel_index(longest[known], codes.shape)
    planned, broke = store.planned_steps[at], ~trains(codes)[at]
    stopped = store.read("nonfinite_step")[at]
    alive_until = np.where(stopped >= 0, stopped, planned)
    if not len(planned) or planned.max() - FROM_END < 2:
        return None
    first = np.unique(np.geomspace(2, planned.max() - FROM_END, 14).round().astype(int))
    rate = np.broadcast_to(rates(store), codes.shape)[at]
    losses = store.read("losses")[at][:, : first[-1]].astype(np.float64)
    losses[~np.isfinite(losses)] = np.inf
    with np.errstate(invalid="ignore"):
        ratio = losses / losses[:, :1]
        rise = np.diff(ratio, axis=1)
    rise[~np.isfinite(rise)] = np.inf
    areas: dict[str, list[float]] = {name: [] for name in SIGNS}
    runs = []
    for k in first:
        alive = (alive_until > k) & (planned - k >= FROM_END)
        signs = (ratio[:, k - 1], ratio[:, :k].max(1), rise[:, : k - 1].max(1), rate)
        for name, sign in zip(SIGNS, signs, strict=True):
            areas[name].append(roc_area(sign[alive], broke[alive]))
        runs.append(alive.sum())
    return EarlyWarning(first, np.array(runs), {name: np.array(a) for name, a in areas.items()})


def rates(store: Replicate) -> np.ndarray:
    """The swept learning rate, broadcasting to [row, col]."""
    return store.grid.y.values[:, None] if learning_rate_axis(store.grid) == 0 else store.grid.x.values


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
    axes.text(early.first[-1], 0.505, "coin", ha="right", va="bottom", size="small", color="#777777")
    lowest = np.nanmin([*early.areas.values(), np.full(len(early.first), 0.5)])
    axes.set(xscale="log", ylim=(min(0.42, lowest - 0.02), 1.02))
    axes.set(xlabel="first losses seen", ylabel="ROC area")
    axes.set_title(title)
    legend_below(axes, axes.get_legend_handles_labels()[0])


def early_table(early: EarlyWarning, title: str) -> Table:
    """Early warning as numbers."""
    table = Table("first losses", "runs", *SIGNS, title=title, title_justify="left")
    for i, k in enumerate(early.first):
        areas = [f"{early.areas[name][i]:.3f}" for name in SIGNS]
        table.add_row(str(k), str(early.runs[i]), *areas)
    return table
