"""What is drawn over a map: the best rate with its band, and where a budget sees its data again."""

from typing import TYPE_CHECKING

import numpy as np

from analysis.axes import extent, place_of, places
from analysis.recommend import Recommendation
from engine.grid import Axis
from engine.store import Replicate

if TYPE_CHECKING:  # matplotlib takes half a second to import: the drawing functions import what they use
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

BEST_COLOUR = "#111111"


def drawn_at(axis: Axis, values: np.ndarray) -> np.ndarray:
    """Values in an axis's drawing units, NaN beyond its cells: nothing is drawn outside what was swept."""
    at, (low, high) = place_of(axis, values), places(axis)
    return np.where((at >= low - 1e-9) & (at <= high + 1e-9), at, np.nan)


def draw_best(axes: "Axes", store: Replicate, found: Recommendation | None) -> "list[Artist]":
    """The best rate of every column as a line, with its 95% band over seeds (few seeds: within 0.01 nat).

    Columns whose best lies on the edge have no line. Handles for a legend; none on maps without such columns.

    Args:
        found: what the store recommends, None where it does not.
    """
    from analysis.laws import BASINS, FEWEST_SEEDS  # brings scipy and numba

    if found is None or not found.columns:
        return []
    lr, other = (store.grid.y, store.grid.x) if store.grid.y.name == found.lr else (store.grid.x, store.grid.y)
    at = np.full(other.points, np.nan)
    best, low, high = at.copy(), at.copy(), at.copy()
    at[:] = drawn_at(other, other.values)
    for column in found.columns:
        if not column.edge:
            best[column.index] = column.best.value
            band = column.within[0] if np.isnan(column.best.low) else (column.best.low, column.best.high)
            low[column.index], high[column.index] = np.clip(band, found.rates[0], found.rates[-1])
    over = "95% over seeds" if found.seeds >= FEWEST_SEEDS else f"within {BASINS[0]} nat"
    value, below, above = (drawn_at(lr, each) for each in (best, low, high))
    upright = lr is store.grid.y
    fill = axes.fill_between if upright else axes.fill_betweenx
    fill(at, below, above, color="white", alpha=0.45, lw=0, zorder=3)
    for colour, width in (("white", 2.6), (BEST_COLOUR, 1.3)):
        (line,) = axes.plot(*((at, value) if upright else (value, at)), color=colour, lw=width, ls="--", zorder=4)
    line.set_label(f"best rate, {over}")
    return [line]


def draw_epochs(axes: "Axes", store: Replicate) -> None:
    """Where data are seen again: the end of the first epoch on an axis of tokens, and the most epochs of any cell."""
    epochs = store.store.epochs
    if epochs is None or (most := float(epochs.max())) <= 1:
        return
    grid = store.grid
    note(axes, (0.985, 0.985), f"{'up to ' if epochs.min() < most else ''}{most:.2g} epochs", ("right", "top"))
    for axis, along, lined in ((grid.x, 0, axes.axvline), (grid.y, 1, axes.axhline)):
        again = (epochs[0] > 1).any(along)
        if axis.name == "tokens" and not again[0]:
            at, first = drawn_at(axis, axis.values), int(again.argmax())
            mark, (low, high) = (at[first - 1] + at[first]) / 2, extent(axis)
            lined(mark, color="#222222", lw=0.9, ls=":", zorder=4)
            share = (mark - low) / (high - low)
            note(axes, (share, 0.015) if along == 0 else (0.015, share), "1 epoch", ("left", "bottom"))


def note(axes: "Axes", place: tuple[float, float], text: str, sides: tuple[str, str]) -> None:
    """A few words in a panel, at a share of its width and height."""
    box = {"facecolor": "white", "alpha": 0.8, "lw": 0, "pad": 1.0}
    horizontal, vertical = sides
    axes.annotate(
        text, place, xycoords="axes fraction", ha=horizontal, va=vertical, fontsize="small", bbox=box, zorder=5
    )
