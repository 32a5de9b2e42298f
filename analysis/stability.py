"""Stability lines on a map whose sweep stored the critical sharpness (--measure sharpness).

On one line the rate is the critical one of the next update, 2 / sharpness. On the other the sharpness is at the edge of
the optimizer on a quadratic, (2 + 2 beta1) / ((1 - beta1) lr) for Adam at a frozen preconditioner (Cohen et al. 2022,
arXiv:2207.14484): beyond it a step grows what it should shrink.
"""

from typing import TYPE_CHECKING

import numpy as np

from analysis.axes import middles
from engine.optim import OPTIMIZERS
from engine.store import Replicate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINES = (("rate = critical rate", "#d62728"), ("edge of the optimizer", "#1f77b4"))


def excesses(store: Replicate) -> list[np.ndarray]:
    """Natural logarithms [row, col] of sharpness over each line's; positive where training is beyond the line.

    The rate and the optimizer are those of every group that has none of its own. NaN where nothing is stored.
    """
    run, sharpness = store.run, store.read("sharpness").astype(float)
    optimizer = OPTIMIZERS[run.config.training.optimizer.partition(",")[0]]

    def column(name: str) -> np.ndarray:
        return np.broadcast_to(run.column(name), run.shape)[store.index]

    edges = [2 / column("lr")]
    if optimizer.edge is not None:
        edges.append(optimizer.edge({name: column(name) for name in optimizer.hyper}))
    with np.errstate(divide="ignore", invalid="ignore"):
        return [np.log(sharpness) - np.log(edge) for edge in edges]


def draw_stability(axes: "Axes", store: Replicate) -> None:
    """Draw both lines where the sweep stored what they need and they cross the map."""
    if "sharpness" not in store:
        return
    x, y = (middles(axis) for axis in (store.grid.x, store.grid.y))
    for excess, (text, colour) in zip(excesses(store), LINES, strict=False):
        finite = excess[np.isfinite(excess)]
        if min(excess.shape) > 1 and len(finite) and finite.min() < 0 < finite.max():
            shown = np.where(np.isfinite(excess), excess, np.nan)
            axes.contour(x, y, shown, levels=[0.0], colors=colour, linewidths=1.2, zorder=3)
            axes.plot([], [], color=colour, linewidth=1.2, label=text)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=6, loc="lower left")
