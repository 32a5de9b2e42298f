"""Where to zoom: a tile of a grid's cells, chosen by the boundary in it, around a target, or by its range."""

import math
from typing import NamedTuple

import numpy as np

from analysis.axes import extent
from engine.grid import Grid, is_number


class Tile(NamedTuple):
    """A block of a grid's cells: rows [top, bottom), columns [left, right)."""

    top: int
    bottom: int
    left: int
    right: int


def followed_tile(blocks: np.ndarray, height: int, width: int, follow: float = 1.0) -> Tile:
    """A tile chosen by how much boundary is inside it; of equals, the one nearest the middle of the map.

    Args:
        blocks: boundary blocks [row - 1, col - 1].
        height, width: of the tile, in cells, at least 2.
        follow: quantile of the boundary blocks inside, among all tiles with any: 1 the most, 0.5 the median.

    Raises:
        ValueError: there is no boundary.
    """
    if not blocks.any():
        raise ValueError("the map has no boundary to follow; give --rows and --cols, or --target")
    total = np.zeros((blocks.shape[0] + 1, blocks.shape[1] + 1), np.int64)
    total[1:, 1:] = blocks.cumsum(0).cumsum(1)
    inner = height - 1, width - 1  # a tile of n cells holds n - 1 blocks
    held = total[inner[0] :, inner[1] :] - total[: -inner[0], inner[1] :]
    held = held - total[inner[0] :, : -inner[1]] + total[: -inner[0], : -inner[1]]
    tops, lefts = np.nonzero(held == np.quantile(held[held > 0], follow, method="nearest"))
    middle = (held.shape[0] - 1) / 2, (held.shape[1] - 1) / 2
    nearest = np.argmin((tops - middle[0]) ** 2 + (lefts - middle[1]) ** 2)
    top, left = int(tops[nearest]), int(lefts[nearest])
    return Tile(top, top + height, left, left + width)


def tile_around(grid: Grid, target: tuple[float, float], height: int, width: int) -> Tile:
    """The tile whose middle is nearest a point (y value, x value), kept inside the grid.

    Raises:
        ValueError: the point lies outside the grid.
    """
    starts = []
    for axis, value, size in zip((grid.y, grid.x), target, (height, width), strict=True):
        low, high = extent(axis)
        place = (math.log10(value) if axis.scale == "log" and value > 0 else value) - low
        if not 0 <= place <= high - low or (axis.scale == "log" and value <= 0):
            raise ValueError(f"target {axis.name}={value:g} lies outside {axis}; give --target y,x inside the map")
        start = round(place / (high - low) * axis.points - size / 2)
        starts.append(min(max(start, 0), axis.points - size))
    top, left = starts
    return Tile(top, top + height, left, left + width)


def parse_range(name: str, text: str, points: int) -> tuple[int, int]:
    """Read `a:b`, the cells a to b - 1; all of them from an empty text. Raises ValueError for a bad range."""
    if not text:
        return 0, points
    start, _, stop = text.partition(":")
    if not (start.isdecimal() and stop.isdecimal() and int(start) < int(stop) <= points):
        raise ValueError(f"{name} is {text!r}, expected a:b with 0 <= a < b <= {points}, counted in cells of the map")
    return int(start), int(stop)


def parse_target(text: str) -> tuple[float, float]:
    """Read `y,x`. Raises ValueError for another form."""
    parts = text.split(",")
    if len(parts) != 2 or not all(is_number(part) for part in parts):
        raise ValueError(f"target is {text!r}, expected two numbers y,x such as 0.5,120")
    return float(parts[0]), float(parts[1])
