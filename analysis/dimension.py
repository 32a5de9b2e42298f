"""Fractal dimension by box counting, with the fit range, an interval and null baselines.

A mask (boundary blocks, or any set of cells) is covered by boxes of side s, for s = 1, 2, 3, 4, 6, 8,
12, 16, ... cells; N(s) is the least number of occupied boxes over shifted box grids, the dimension the
slope of log N against -log s over a stated range. At 2,048 cells a side (tests/test_dimension.py) it gives
1.011 for a circle, 1.252 for Koch's curve (1.2619), 1.589 for Sierpinski's triangle (1.5850) and 1.987
for a filled square.

Box counting is biased on small maps and by a narrow range, so nulls of the same size under the same
estimator (a straight line, a disc, noise) belong beside every number, and the range must be said.
"""

if __name__ == "__main__" and not __package__:
    import started  # noqa: F401  says how to start it where its packages are missing

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from rich.table import Table

from analysis.boundary import edges, map_edges
from analysis.classify import Labelling, classify
from engine.command import parse, screen, user_errors
from engine.place import Where
from engine.store import Replicate, open_map

TILES = 8  # the bootstrap resamples the map's TILES x TILES tiles
DRAWS = 1000  # bootstrap draws
LEAST_CELLS = 8  # maps smaller than this a side have no dimension
NULLS = ("straight line", "disc", "noise", "all converged")


@dataclass(frozen=True)
class Dimension:
    """A box-counting dimension and what it rests on."""

    value: float  # slope of log N against -log s over the fit range
    low: float  # 95% bootstrap interval
    high: float
    fit: tuple[int, int]  # smallest and largest box side fitted, cells
    sizes: np.ndarray  # [n] box sides counted, cells
    counts: np.ndarray  # [n] occupied boxes, least over the grid offsets
    slopes: np.ndarray  # [n] local slope at each size

    @property
    def decades(self) -> float:
        """Width of the fit range."""
        return math.log10(self.fit[1] / self.fit[0])

    @property
    def warning(self) -> str:
        """One line when the fit range is under a decade, else empty."""
        if self.decades >= 1:
            return ""
        return (
            f"the fit spans {self.decades:.2f} decades ({self.fit[0]}-{self.fit[1]} cells), under one: "
            "compare with the nulls, do not quote it"
        )

    @property
    def in_fit(self) -> np.ndarray:
        """Which sizes are fitted, bool [n]."""
        return (self.sizes >= self.fit[0]) & (self.sizes <= self.fit[1])


def measure(mask: np.ndarray, fit: tuple[int, int] | None = None) -> Dimension | None:
    """The box-counting dimension of a set of cells.

    Args:
        mask: bool [row, col].
        fit: smallest and largest box side of the fit, cells; default `default_fit`.

    Returns:
        None for an empty mask: no boundary has no dimension. The interval resamples the tiles of the map
        (where the set happens to lie) and the residuals of the fit (how far from a power law it is). It
        is wide rather than narrow: a disc in a box of 2,048 cells has 1.01 with 0.96 to 1.06.

    Raises:
        ValueError: the fit range holds fewer than three box sizes of this map.
    """
    low, high = fit or default_fit(mask.shape)
    sizes, counts, by_tile = box_counts(mask)
    fitted = (sizes >= low) & (sizes <= high)
    if fitted.sum() < 3:
        raise ValueError(
            f"fit range {low}:{high} holds {fitted.sum()} of the box sides {', '.join(map(str, sizes))}, "
            "expected at least 3; widen --fit or take a larger map"
        )
    if not mask.any():
        return None
    x, y = -np.log(sizes[fitted]), np.log(counts[fitted])
    value, intercept = np.polyfit(x, y, 1)
    draws = bootstrap(x, y, y - (value * x + intercept), by_tile[:, fitted])
    bounds = np.percentile(draws, (2.5, 97.5))
    slopes = local_slopes(sizes, counts)
    return Dimension(float(value), float(bounds[0]), float(bounds[1]), (low, high), sizes, counts, slopes)


def local_slopes(sizes: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Slope of -log N between the neighbours of each size, an octave apart; one-sided at both ends [n]."""
    x, y = -np.log(sizes), np.log(counts)
    before, after = np.maximum(np.arange(len(x)) - 1, 0), np.minimum(np.arange(len(x)) + 1, len(x) - 1)
    return (y[after] - y[before]) / (x[after] - x[before])


def default_fit(shape: tuple[int, ...]) -> tuple[int, int]:
    """Box sides fitted unless asked otherwise: from 2 cells to an eighth of the shorter side (8 at least)."""
    return 2, max(min(shape) // 8, 8)


def box_counts(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Occupied boxes at each box side, on the shifted grid that needs fewest.

    Sides 1, 2, 3, 4 are counted on the cells, 3 and 4 times 2^k on cells pooled 2^k x 2^k, each over
    all shifts by one (pooled) cell. Boxes that the frame cuts count when the part inside is occupied.

    Returns:
        sizes [n] in cells up to half the shorter side, counts [n], and counts by tile of the map
        [TILES^2, n] (a box belongs to the tile its centre lies in).
    """
    shortest = min(mask.shape)
    steps = [(1, 1), (1, 2)] + [(2**k, box) for k in range(32) for box in (3, 4)]
    steps = [(pool, box) for pool, box in steps if pool * box <= max(shortest // 2, 1)]
    pooled, pooled_by = mask, 1
    sizes, totals, by_tile = [], [], []
    for pool, box in steps:
        while pooled_by < pool:
            pooled, pooled_by = occupied(pooled, 2, 0, 0), pooled_by * 2
        shifts = [(dy, dx) for dy in range(box) for dx in range(box)]
        covers = [occupied(pooled, box, dy, dx) for dy, dx in shifts]
        best = min(range(len(shifts)), key=lambda i: np.count_nonzero(covers[i]))
        sizes.append(pool * box)
        totals.append(np.count_nonzero(covers[best]))
        by_tile.append(tile_counts(covers[best], shifts[best], box, pooled.shape))
    return np.array(sizes), np.array(totals), np.array(by_tile).reshape(len(sizes), -1).T


def occupied(mask: np.ndarray, box: int, shift_y: int, shift_x: int) -> np.ndarray:
    """Which box x box blocks of cells hold a set cell, the grid starting `shift` cells before the map."""
    for shift in (shift_y, shift_x):  # pool the first axis, turn, pool the other
        cells = -(-(len(mask) + shift) // box) * box
        padded = np.zeros((cells, mask.shape[1]), bool)
        padded[shift : shift + len(mask)] = mask
        mask = padded[::box].copy()
        for offset in range(1, box):
            mask |= padded[offset::box]
        mask = np.ascontiguousarray(mask.T)
    return mask


def tile_counts(cover: np.ndarray, shift: tuple[int, int], box: int, shape: tuple[int, ...]) -> np.ndarray:
    """Occupied boxes in each tile of the map [TILES^2]."""
    i, j = np.nonzero(cover)
    tiles = [
        np.clip(((index + 0.5) * box - offset) / side * TILES, 0, TILES - 1).astype(int)
        for index, offset, side in zip((i, j), shift, shape, strict=True)
    ]
    return np.bincount(tiles[0] * TILES + tiles[1], minlength=TILES**2)


def bootstrap(x: np.ndarray, y: np.ndarray, residuals: np.ndarray, by_tile: np.ndarray) -> np.ndarray:
    """Slopes refitted to resampled counts [DRAWS].

    Each draw takes the map's tiles with replacement, which moves the counts of all sizes together, and
    adds residuals of the fit drawn with replacement, widened for the two fitted parameters.

    Args:
        x, y: -log size and log count of the fitted sizes [n].
        residuals: of the fit [n].
        by_tile: counts of each tile [tile, n].
    """
    random = np.random.default_rng(0)
    tiles = np.flatnonzero(by_tile.any(1))  # empty tiles add nothing and would only thin the draws
    draws = random.multinomial(len(tiles), np.full(len(tiles), 1 / len(tiles)), size=DRAWS)
    counts = np.maximum(draws @ by_tile[tiles], 1)
    widened = residuals * math.sqrt(len(x) / max(len(x) - 2, 1))
    values = np.log(counts) + widened[random.integers(len(x), size=(DRAWS, len(x)))]
    centred = x - x.mean()
    return values @ centred / (centred @ centred)


def local_median(dimensions: Iterable[Dimension]) -> float:
    """Median of the local slopes within the fit range over all maps of a zoom sequence."""
    return float(np.median(np.concatenate([d.slopes[d.in_fit] for d in dimensions])))


def published_median(masks: Iterable[np.ndarray]) -> float:
    """The estimator behind the published figures: median local slope over all maps of a zoom sequence.

    Ten box sides from 10 cells to the whole side, one box grid from the corner, boxes that are full do
    not count, slopes by central differences (Sohl-Dickstein 2024, arXiv:2402.06184, through
    porespy.metrics.boxcount). It is biased: few of its boxes fit the map, and the last sides see the
    frame. Empty maps are left out; NaN when all are.
    """
    slopes = [slope for mask in masks for slope in published_slopes(mask)]
    return float(np.median(slopes)) if slopes else math.nan


def published_slopes(mask: np.ndarray) -> np.ndarray:
    """Local slopes of the published estimator at its ten box sides; empty on maps too small for half a decade."""
    sizes = np.unique(np.logspace(1, np.log10(max(min(mask.shape), 10)), 10).astype(int))
    covers = [occupied(mask, size, 0, 0) & occupied(~mask, size, 0, 0) for size in sizes]
    counts = np.array([np.count_nonzero(cover) for cover in covers])
    sizes, counts = sizes[counts > 0], counts[counts > 0]
    wide = len(sizes) > 1 and sizes[-1] > 3 * sizes[0]
    return -np.gradient(np.log(counts), np.log(sizes)) if wide else np.empty(0)


def measurable(masks: Iterable[np.ndarray]) -> list[np.ndarray]:
    """Those of some maps that have a dimension: LEAST_CELLS a side or more, and a boundary."""
    return [mask for mask in masks if min(mask.shape) >= LEAST_CELLS and mask.any()]


def in_words(value: float) -> str:
    """A median with three decimals, or why there is none."""
    return f"{value:.3f}" if math.isfinite(value) else "none (too small)"


def sequence_lines(masks: Iterable[np.ndarray], fit: tuple[int, int] | None = None) -> list[str]:
    """Both medians over the maps of a zoom sequence in words, beside those of the nulls of the last map's size."""
    maps = measurable(masks)
    if not maps:
        return [f"no dimension: no map of {LEAST_CELLS} x {LEAST_CELLS} cells or more has a boundary"]
    own = [d for mask in maps if (d := measure(mask, fit))]
    values, shape, (low, high) = [d.value for d in own], maps[-1].shape, own[-1].fit
    ours = {name: local_median([d]) for name, d in nulls(shape, (low, high)).items() if d}
    published = {name: published_median([null_mask(name, *shape)]) for name in ours}
    several = f"{len(own)} maps (dimensions {min(values):.3f} to {max(values):.3f})" if len(own) > 1 else "1 map"
    return [
        f"median local slope over {several}, boxes of {low} to {high} cells: {local_median(own):.3f}; "
        + ", ".join(f"{name} {value:.3f}" for name, value in ours.items()),
        f"by the published estimator (biased: one grid, frame and full boxes): {in_words(published_median(maps))}; "
        + ", ".join(f"{name} {in_words(value)}" for name, value in published.items()),
    ]


@cache
def null_mask(name: str, rows: int, cols: int) -> np.ndarray:
    """Boundary blocks [rows, cols] of a null map: NULLS."""
    y, x = np.mgrid[: rows + 1, : cols + 1]
    y, x = y / rows - 0.5, x / cols - 0.5
    labels = {
        "straight line": lambda: y > 0.618 * x,
        "disc": lambda: y**2 + x**2 < 0.16,
        "noise": lambda: np.random.default_rng(0).random(y.shape) < 0.5,
        "all converged": lambda: np.ones(y.shape, bool),
    }
    return edges(labels[name]())


@cache
def nulls(shape: tuple[int, int], fit: tuple[int, int]) -> dict[str, Dimension | None]:
    """Dimensions of the null maps of the same size under the same fit."""
    return {name: measure(null_mask(name, *shape), fit) for name in NULLS}


def parse_fit(text: str) -> tuple[int, int] | None:
    """Read `low:high` in cells, or None from an empty text. Raises ValueError for another form."""
    if not text:
        return None
    low, _, high = text.partition(":")
    if not (low.isdecimal() and high.isdecimal() and 1 <= int(low) < int(high)):
        raise ValueError(f"fit is {text!r}, expected low:high in whole cells with 1 <= low < high, such as 2:64")
    return int(low), int(high)


def dimension_table(found: Dimension, shape: tuple[int, int]) -> Table:
    """The dimension with its interval beside the nulls, for the terminal."""
    table = Table("map", "dimension", "95% interval", "local slopes", title=f"fit {found.fit[0]}-{found.fit[1]} cells")
    rows: dict[str, Dimension | None] = {"this boundary": found, **nulls(shape, found.fit)}
    for name, d in rows.items():
        if d is None:
            table.add_row(name, "no boundary", "", "")
        else:
            slopes = d.slopes[d.in_fit]
            table.add_row(
                name, f"{d.value:.3f}", f"{d.low:.3f} - {d.high:.3f}", f"{slopes.min():.2f} - {slopes.max():.2f}"
            )
    return table


def sequences(store: Replicate) -> dict[str, list[Where]]:
    """The zooms of each sequence stored inside a store, by the sequence's name; single zooms are in none."""
    found: dict[str, list[Where]] = {}
    for path in store.children():
        name, level, _ = path.name.rpartition("-level-")
        if level:
            found.setdefault(name, []).append(path)
    return found


@dataclass(frozen=True, kw_only=True)
class Options(Labelling):
    """Which store to measure, and how."""

    store: str  # path of the sweep's store; its zoom sequences are measured with it
    fit: str = ""  # box sides fitted, low:high in cells (default: 2 to an eighth of the shorter side)


def main() -> None:
    """Print a map's dimension, its nulls, and the medians over each of its zoom sequences."""
    options = parse(Options, "Box-counting dimension of a map's boundary, with its interval and null baselines.")
    with user_errors():
        console, fit = screen(), parse_fit(options.fit)
        store = open_map(options.store, options.replicate)
        mask = map_edges(classify(store, options.thresholds))
        found = measure(mask, fit)
        if found is None:
            raise ValueError(f"{store.path} has no boundary: every measured cell is on one side; no dimension")
        console.print(dimension_table(found, mask.shape))
        if found.warning:
            console.print(f"warning: {found.warning}", style="yellow")
        alone: dict[str, list[Path]] = {"this map": []}
        for name, paths in (alone | sequences(store)).items():
            zooms = [map_edges(classify(open_map(path), options.thresholds)) for path in paths]
            said = [f"{name}, {len(paths)} zooms:" if paths else f"{name}:", *sequence_lines([mask, *zooms], fit)]
            console.print("\n  ".join(said), soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
