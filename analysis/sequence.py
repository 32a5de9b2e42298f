"""Children of a map and zoom sequences: finer grids over a tile, trained by the engine, stored inside their parent.

A child is a grid in float64 over a tile of its parent's cells, stored as `zoom/<name>` inside the parent's group.
A sequence goes on, one child a level, until neighbouring cells come too close for the kernel's numbers. Levels
that are stored already are not trained again.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from rich.console import Console

from analysis.axes import extent
from analysis.boundary import map_edges
from analysis.classify import Labelling, classify, convergence_value
from analysis.tile import Tile, followed_tile, tile_around
from engine.config import Run, SweepConfig, cells_of
from engine.grid import Axis, Grid
from engine.hyper import kernel_type, rule_of
from engine.options import RunOptions
from engine.outcome import DONE, Thresholds
from engine.place import Where
from engine.store import Replicate, open_map

LEAST = 4  # a sequence stops before neighbouring cells lie closer than this many number spacings


def child_config(store: Replicate, tile: Tile, density: tuple[int, int], precision: str = "") -> SweepConfig:
    """The parent's configuration over a tile, `density` = (rows, columns) of the child for one of the parent's.

    Raises:
        ValueError: the child's values cannot be told apart.
    """
    grid = store.grid
    y, x = grid.y.tile(tile.top, tile.bottom, density[0]), grid.x.tile(tile.left, tile.right, density[1])
    changes = {"y": str(y), "x": str(x), "replicates": 1, "precision": precision or store.config.swept.precision}
    if "seed" not in store.run.names:
        changes["seed"] = store.config.seed + store.index
    return store.config.change(**changes)


def same_neighbours(config: SweepConfig, counts: np.ndarray | None) -> str:
    """'rows' or 'columns' where two neighbours are the same runs in every cell, as close token budgets are, else ''.

    counts: of the data (`Run.counts`).
    """
    run = Run(config, cells_of(config), counts)
    plan = run.config.workload.plan(run)
    cells = np.stack([np.broadcast_to(each, run.shape)[0] for each in (plan.key, plan.steps)])
    for name, axis in (("rows", 1), ("columns", 2)):
        if run.shape[axis] > 1 and (np.diff(cells, axis=axis) == 0).all(axis=(0, 3 - axis)).any():
            return name
    return ""


def train(config: SweepConfig, path: Where, device: str, quiet: bool, cells: Grid | None = None) -> Replicate:
    """Train a child into its store, or open it if it is there, whole, and of the same configuration.

    Args:
        cells: with coordinates that are stored elsewhere; default those of the configuration.
    """
    if path.exists():
        stored = open_map(path)
        if stored.config.flat() == config.flat() and (stored.status == DONE).all():
            return stored
    from engine.api import run_sweep  # brings torch; reading stored children does without

    run_sweep(config, RunOptions(store=str(path), device=device, quiet=quiet), cells=cells)
    return open_map(path)


def refinable(axis: Axis, precision: str) -> float:
    """How many times finer an axis may get before its cells lie under LEAST number spacings apart.

    Spacings are the kernel's (float32, or float64 at --precision fp64) and those of the float64
    coordinate the values are computed from; whole-numbered axes stop at steps of 1.
    """
    rule = rule_of(axis.name)
    values = axis.values
    if axis.points < 2:
        return math.inf
    if rule.integer:
        return float(np.diff(values).min())
    kernel = kernel_type(axis.name, precision)
    larger = np.maximum(np.abs(values[1:]), np.abs(values[:-1]))
    number = np.diff(values) / np.spacing(larger.astype(kernel)).astype(np.float64)
    low, high = (math.log(axis.low), math.log(axis.high)) if axis.scale == "log" else (axis.low, axis.high)
    coordinate = (high - low) / (axis.points - 1) / np.spacing(max(abs(low), abs(high)))
    return float(min(number.min(), coordinate)) / LEAST


def zoom_once(store: Replicate, tile: Tile, factor: int, device: str) -> Replicate:
    """Train the child grid of one tile, `factor` times as dense."""
    seed = f"replicate-{store.index}-" if store.index else ""
    name = f"{seed}rows-{tile.top}-{tile.bottom}-cols-{tile.left}-{tile.right}-x{factor}"
    config = child_config(store, tile, (factor, factor))
    if same := same_neighbours(config, store.run.counts):
        raise ValueError(f"neighbouring {same} of the zoom would train the same steps; zoom less, or into fewer {same}")
    return train(config, store.path / "zoom" / name, device, quiet=False)


class Level(NamedTuple):
    """One map of a zoom sequence, and the tile of it that the next level covers."""

    store: Replicate
    codes: np.ndarray
    value: np.ndarray
    tile: Tile | None


def sequence(
    store: Replicate,
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

    Zooms are trained in the network's `zoom_precision`. Stops, saying so, where the next level's cells would lie too
    close, or where a level has no boundary left to follow.
    """
    base = store.path / "zoom"
    where = f"-follow-{follow:g}" if follow < 1 else ""
    if target is not None:
        where = f"-at-{target[0]:g},{target[1]:g}"
    if labelling.thresholds != Thresholds():
        where += f"-converged-{labelling.converged:g}-moved-{labelling.moved:g}"
    if store.index:
        where += f"-replicate-{store.index}"
    current = store
    for level in range(levels + 1):
        codes = classify(current, labelling.thresholds)
        value, blocks = convergence_value(current, codes), map_edges(codes)
        rows, cols = current.grid.shape
        height, breadth = max(rows // factor, 2), max(cols // factor, 2)
        density = max(round((size or rows) / height), 1), max(round((size or cols) / breadth), 1)
        config = current.config
        precision = config.family.zoom_precision or config.swept.precision
        finer = min(
            refinable(current.grid.y, precision) / density[0],
            refinable(current.grid.x, precision) / density[1],
        )
        stop = ""
        if level == levels:
            stop = "done"
        elif finer < 1:
            stop = f"stopped: at level {level + 1} neighbouring cells would lie under {LEAST} number spacings apart"
        elif target is None and not blocks.any():
            stop = f"stopped: level {level} shows no boundary to follow"
        if not stop:
            if target is not None:
                tile = tile_around(current.grid, target, height, breadth)
            else:
                tile = followed_tile(blocks, height, breadth, follow)
            child = child_config(current, tile, density, precision)
            if same := same_neighbours(child, current.run.counts):
                stop = f"stopped: at level {level + 1} neighbouring {same} would train the same steps"
        if stop:
            yield Level(current, codes, value, None)
            console.print(stop, soft_wrap=True)
            return
        yield Level(current, codes, value, tile)
        name = f"x{factor}-size-{size or rows}{where}-level-{level + 1:02d}"
        current = train(child, base / name, device, quiet=True)
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
