"""Children of a map and zoom sequences: finer grids over a tile, trained by the engine, stored inside their parent.

A child is a grid in float64 over a tile of its parent's cells, stored as `zoom/<name>` inside the parent's group.
A sequence goes on, one child a level, until neighbouring cells come too close for the kernel's numbers. Levels
that are stored already are not trained again.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console

from analysis.axes import extent
from analysis.boundary import map_edges
from analysis.classify import Labelling, classify, convergence_value
from analysis.tile import Tile, followed_tile, tile_around
from engine.config import SweepConfig
from engine.grid import HYPER_PARAMETERS, Axis
from engine.outcome import DONE
from engine.store import Store, open_store

LEAST = 4  # a sequence stops before neighbouring cells lie closer than this many number spacings


def child_config(config: SweepConfig, tile: Tile, density: tuple[int, int]) -> SweepConfig:
    """The parent's configuration over a tile, `density` = (rows, columns) of the child for one of the parent's.

    Raises:
        ValueError: the child's values cannot be told apart, or leave the axis's legal range.
    """
    y = config.grid.y.tile(tile.top, tile.bottom, density[0])
    x = config.grid.x.tile(tile.left, tile.right, density[1])
    return replace(config, y=str(y), x=str(x), rows_per_launch="auto")


def train(config: SweepConfig, path: Path, device: str, quiet: bool) -> Store:
    """Train a child into its store, or open it if it is there and whole."""
    if path.exists():
        stored = open_store(path)
        if stored.grid == config.grid and (stored.status == DONE).all():
            return stored
    from engine.sweep import RunOptions, run_sweep  # brings torch; reading stored children does without

    run_sweep(config, RunOptions(store=str(path), device=device, figures=False, quiet=quiet))
    return open_store(path)


def refinable(axis: Axis, precision: str) -> float:
    """How many times finer an axis may get before its cells lie under LEAST number spacings apart.

    Spacings are the kernel's (float32, or float64 at --precision fp64) and those of the float64
    coordinate the values are computed from; whole-numbered axes stop at steps of 1.
    """
    rule = HYPER_PARAMETERS[axis.name]
    values = axis.values
    if axis.points < 2:
        return math.inf
    if rule.integer:
        return float(np.diff(values).min())
    kernel = axis.kernel_type(precision)
    larger = np.maximum(np.abs(values[1:]), np.abs(values[:-1]))
    number = np.diff(values) / np.spacing(larger.astype(kernel)).astype(np.float64)
    low, high = (math.log(axis.low), math.log(axis.high)) if axis.scale == "log" else (axis.low, axis.high)
    coordinate = (high - low) / (axis.points - 1) / np.spacing(max(abs(low), abs(high)))
    return float(min(number.min(), coordinate)) / LEAST


def zoom_once(store: Store, tile: Tile, factor: int, device: str) -> Store:
    """Train the child grid of one tile, `factor` times as dense."""
    name = f"rows-{tile.top}-{tile.bottom}-cols-{tile.left}-{tile.right}-x{factor}"
    return train(child_config(store.config, tile, (factor, factor)), store.path / "zoom" / name, device, quiet=False)


class Level(NamedTuple):
    """One map of a zoom sequence, and the tile of it that the next level covers."""

    store: Store
    codes: np.ndarray
    value: np.ndarray
    tile: Tile | None


def sequence(
    store: Store,
    levels: int,
    factor: int,
    size: int,
    target: tuple[float, float] | None,
    follow: float,
    labelling: Labelling,
    device: str,
    console: Console,
) -> Iterator[Level]:
    """The store, then up to `levels` children, each over a tile of the one before: around `target`, or the one
    that `follow` picks (see `followed_tile`).

    The paper's network is trained in fp64. Stops, saying so, where the next level's cells would lie too
    close, or where a level has no boundary left to follow.
    """
    base = store.path / "zoom"
    where = f"-follow-{follow:g}" if follow < 1 else ""
    if target is not None:
        where = f"-at-{target[0]:g},{target[1]:g}"
    current = store
    for level in range(levels + 1):
        codes = classify(current, labelling.thresholds)
        value, blocks = convergence_value(current, codes), map_edges(codes)
        rows, cols = current.grid.shape
        height, breadth = max(rows // factor, 2), max(cols // factor, 2)
        density = max(round((size or rows) / height), 1), max(round((size or cols) / breadth), 1)
        config = current.config
        if config.network == "mlp":
            config = replace(config, precision="fp64")
        finer = min(
            refinable(current.grid.y, config.precision) / density[0],
            refinable(current.grid.x, config.precision) / density[1],
        )
        stop = ""
        if level == levels:
            stop = "done"
        elif finer < 1:
            stop = f"stopped: at level {level + 1} neighbouring cells would lie under {LEAST} number spacings apart"
        elif target is None and not blocks.any():
            stop = f"stopped: level {level} shows no boundary to follow"
        if stop:
            yield Level(current, codes, value, None)
            console.print(stop, soft_wrap=True)
            return
        if target is not None:
            tile = tile_around(current.grid, target, height, breadth)
        else:
            tile = followed_tile(blocks, height, breadth, follow)
        yield Level(current, codes, value, tile)
        name = f"x{factor}-size-{size or rows}{where}-level-{level + 1:02d}"
        current = train(child_config(config, tile, density), base / name, device, quiet=True)
        widths = (f"{axis.name} {spread(axis)}" for axis in (current.grid.y, current.grid.x))
        console.print(f"level {level + 1}: {', '.join(widths)}", soft_wrap=True, highlight=False)


def width(axis: Axis) -> float:
    """How wide an axis is, in decades or plain units."""
    low, high = extent(axis)
    return high - low


def spread(axis: Axis) -> str:
    """How wide an axis is, in words."""
    return f"{width(axis):.3g}{' decades' if axis.scale == 'log' else ''} around {axis.values[axis.points // 2]:.6g}"


def check_follow(follow: float) -> None:
    """Raise ValueError for what is no quantile."""
    if not 0 <= follow <= 1:
        raise ValueError(f"follow is {follow:g}, expected a quantile between 0 and 1; 1 is the busiest tile")
