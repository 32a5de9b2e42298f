"""The noise floor of a map: `uv run analysis/noise.py --store S --share 0.1`.

Whole lines of the grid (columns where the y axis alone is a learning rate, so that every line crosses
the boundary; else rows) are trained again, each as a sweep of its own with exactly the parent's
coordinates, stored inside it as `noise/<variant>-row-<i>` or `-column-<i>`. Variants:

- repeat: nothing changed but the stack a cell trains in; on a GPU cells are batch-invariant and no label changes.
- precision: the network's finest precision, or its coarsest where the map has the finest, if that one
  tells neighbouring cells apart at all; it then says how deep the coarsest goes, and the map's own deeper.
- order: other seed, thus other initial weights and data order (language models).
- permuted: the same hidden units in another order (the paper's network): the same mathematics,
  rounded differently.

What changes near the boundary says how deep a zoom can go: a map is signal while fewer labels change
there than half of what two unrelated maps would differ by.
"""

if __name__ == "__main__" and not __package__:
    import started  # noqa: F401  says how to start it where its packages are missing

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from analysis.boundary import map_edges, near
from analysis.classify import Labelling, classify, measured, trains
from analysis.dimension import measurable, measure
from analysis.sequence import train
from engine.command import parse, screen, user_errors
from engine.config import SweepConfig
from engine.grid import Axis, Grid
from engine.store import Replicate, open_map

BAND = 2  # cells from the boundary that count as near
VARIANTS = ("repeat", "precision", "order", "permuted")


@dataclass(frozen=True)
class Floor:
    """What one variant changed."""

    variant: str
    lines: int  # lines trained again
    near: int  # measured cells within BAND of the boundary
    away: int  # the others
    labels_near: float  # share of the near cells whose label changed
    labels_away: float
    flips_near: float  # share of the near cells that changed between training and breaking
    flips_away: float
    chance: float  # share of the near cells that would flip between two unrelated maps
    coarser: str = ""  # the variant's precision, where it is coarser than the map's, whose own floor lies deeper

    @property
    def is_signal(self) -> bool:
        """Whether no near cell flips, or fewer than half of chance."""
        return self.flips_near == 0 or self.flips_near < self.chance / 2

    def depth(self, exponent: float) -> float:
        """Linear zoom beyond this map at which half of chance flips: (chance / 2 / flips)^(1 / exponent).

        The share of uncertain cells near a boundary of dimension D grows as zoom^(2 - D) (the uncertainty
        exponent, Grebogi et al. 1983). Without a flip, three flips are taken (their 95% bound), so the
        depth is a lower bound.

        Args:
            exponent: 2 - D.
        """
        flips = max(self.flips_near, 3 / self.near if self.flips_near == 0 else 0)
        return max(self.chance / 2 / flips, 1e-9) ** (1 / exponent) if flips else math.inf


# ---- training


def line_axis(grid: Grid) -> int:
    """0 when a line is a row, 1 when it is a column: only where y alone is a learning rate."""
    y_is_rate, x_is_rate = (axis.name == "lr" or axis.name.startswith("lr.") for axis in (grid.y, grid.x))
    return int(y_is_rate and not x_is_rate)


def chosen_lines(points: int, share: float) -> list[int]:
    """Evenly spaced lines, `share` of all and at least one.

    Raises:
        ValueError: the share is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share:g}, expected a value above 0 and at most 1")
    count = max(round(points * share), 1)
    return [int(i) for i in (np.arange(count) + 0.5) / count * points]


def line_cells(store: Replicate, line: int) -> Grid:
    """One line of a stored grid, its coordinates bit for bit the grid's."""
    grid, position = store.grid, line_axis(store.grid)
    axis = (grid.y, grid.x)[position]
    value = float(axis.values[line])
    alone = Axis(axis.name, axis.scale, value, value, 1)
    return Grid(alone, grid.x) if position == 0 else Grid(grid.y, alone)


def line_config(config: SweepConfig, cells: Grid) -> SweepConfig:
    """A configuration over one line."""
    return config.change(y=str(cells.y), x=str(cells.x))


def line_path(store: Replicate, variant: str, line: str) -> Path:
    """Where a line of a variant is stored."""
    return store.path / "noise" / f"{variant}-{('row', 'column')[line_axis(store.grid)]}-{line}"


def variants(store: Replicate) -> dict[str, SweepConfig]:
    """The configurations that a map of this store is compared with, where that can be."""
    config = store.config.change(replicates=1)
    if "seed" not in store.run.names:
        config = config.change(seed=store.config.seed + store.index)
    made, other = {"repeat": config}, other_precision(config)
    if store.grid.y.distinct(other) and store.grid.x.distinct(other):
        made["precision"] = config.change(precision=other)
    name, reordered = config.workload.order(store)
    return made | ({name: reordered.change(replicates=1)} if name else {})


def other_precision(config: SweepConfig) -> str:
    """The precision to compare with: the finest one, or the coarsest where the finest is the map's own."""
    coarsest, *_, finest = config.family.precisions
    return finest if config.swept.precision != finest else coarsest


def coarser_precision(config: SweepConfig) -> str:
    """`other_precision` where it is coarser than the map's own, else ''."""
    return other_precision(config) if config.swept.precision == config.family.precisions[-1] else ""


def train_lines(store: Replicate, share: float, chosen: list[str], device: str, console: Console) -> None:
    """Train the lines of every chosen variant that are not stored yet."""
    points = store.grid.shape[line_axis(store.grid)]
    lines = chosen_lines(points, share)
    possible = variants(store)
    if "precision" in chosen and "precision" not in possible:
        other = other_precision(store.config)
        console.print(f"precision: left out, neighbouring cells are the same in {other}", highlight=False)
    for variant, config in possible.items():
        if variant not in chosen:
            continue
        for line in lines:
            cells = line_cells(store, line)
            path = line_path(store, variant, f"{line:05d}")
            train(line_config(config, cells), path, device, quiet=True, cells=cells)
        console.print(f"{variant}: {len(lines)} of {points} lines trained again", highlight=False)


# ---- reading


def read_noise(store: Replicate, labelling: Labelling) -> list[Floor]:
    """What every variant stored inside a store changed, in the order of VARIANTS."""
    codes = classify(store, labelling.thresholds)
    close = near(map_edges(codes), BAND)
    position = line_axis(store.grid)
    if position == 1:
        codes, close = codes.T, close.T
    found = []
    for variant in VARIANTS:
        pattern = line_path(store, variant, "*")
        paths = sorted(p for p in pattern.parent.glob(pattern.name) if (p / "zarr.json").is_file())
        if not paths:
            continue
        lines = [int(path.name.rsplit("-", 1)[1]) for path in paths]
        stores = [open_map(path) for path in paths]
        for line, again in zip(lines, stores, strict=True):
            if again.grid != line_cells(store, line):
                raise ValueError(f"{again.path} is not a line of {store.path}; delete it and measure the noise again")
        labels = np.stack([classify(again, labelling.thresholds).ravel() for again in stores])
        coarser = coarser_precision(store.config) if variant == "precision" else ""
        found.append(replace(compare(variant, codes[lines], labels, close[lines]), coarser=coarser))
    return found


def compare(variant: str, before: np.ndarray, after: np.ndarray, close: np.ndarray) -> Floor:
    """Compare label codes [line, cell] of two trainings; `close` marks the cells near the boundary."""
    known = measured(before) & measured(after)
    near_cells, away = known & close, known & ~close
    changed, flipped = before != after, trains(before) != trains(after)
    trained = trains(before)[near_cells].mean() if near_cells.any() else 0.0

    def share(what: np.ndarray, where: np.ndarray) -> float:
        return float(what[where].mean()) if where.any() else 0.0

    return Floor(
        variant=variant,
        lines=len(before),
        near=int(near_cells.sum()),
        away=int(away.sum()),
        labels_near=share(changed, near_cells),
        labels_away=share(changed, away),
        flips_near=share(flipped, near_cells),
        flips_away=share(flipped, away),
        chance=float(2 * trained * (1 - trained)),
    )


def exponent_of(store: Replicate, labelling: Labelling) -> float:
    """2 - D of a store's boundary, kept in [0.1, 1]; 1, a smooth boundary's, where no dimension is to be had."""
    blocks = map_edges(classify(store, labelling.thresholds))
    found = measure(blocks) if measurable([blocks]) else None
    return float(np.clip(2 - found.value, 0.1, 1)) if found else 1.0


def verdict(floor: Floor, exponent: float) -> str:
    """How deep the map is signal by this variant, in words; `exponent` is 2 - D of its boundary."""
    where = f" in {floor.coarser}, coarser than the map" if floor.coarser else ""
    if not floor.near:
        return "no cell near a boundary was trained again"
    if not floor.is_signal:
        return f"noise{where}" if where else "noise: this map is already beyond its floor"
    zoom = floor.depth(exponent)
    if zoom <= 1:
        return "signal in this map, too few cells to say of any zoom"
    bound = "at least" if floor.flips_near == 0 else "about"
    return f"signal, down to {bound} a {zoom:.3g}x zoom ({math.log(zoom, 4):.1f} zooms of 4x){where}"


def noise_table(store: Replicate, floors: list[Floor], exponent: float) -> Table:
    """The floors of one store, for the terminal: cells near and away from the boundary."""
    title = f"noise floor: {store.path}, uncertainty exponent {exponent:.2f}"
    head = ("variant", "lines", "near / away", "labels changed", "flips", "chance")
    table = Table(*head, title=title, title_justify="left", box=None)
    for f in floors:
        table.add_row(
            f.variant,
            str(f.lines),
            f"{f.near} / {f.away}",
            f"{f.labels_near:.2%} / {f.labels_away:.2%}",
            f"{f.flips_near:.2%} / {f.flips_away:.2%}",
            f"{f.chance:.0%}",
        )
    return table


@dataclass(frozen=True, kw_only=True)
class Options(Labelling):
    """What to train again."""

    store: str  # path of the sweep's store
    share: float = 0.1  # share of the grid's lines trained again, evenly spaced
    variants: str = ""  # which variants, comma-separated: repeat, precision, order, permuted (default: all that apply)
    zooms: bool = False  # do the same for every zoom stored inside the store
    device: str = "auto"  # cpu or cuda; auto: cuda if there is one


def main() -> None:
    """Train a share of a map again and print what changed."""
    options = parse(Options, "Train a share of a map again, differently rounded or ordered, and count changed labels.")
    with user_errors():
        chosen = [name.strip() for name in options.variants.split(",")] if options.variants else list(VARIANTS)
        unknown = [name for name in chosen if name not in VARIANTS]
        if unknown:
            raise ValueError(f"variants has {', '.join(unknown)}, expected some of {', '.join(VARIANTS)}")
        console, store = screen(), open_map(options.store, options.replicate)
        for path in [store.path, *(store.children() if options.zooms else [])]:
            current = open_map(path)
            train_lines(current, options.share, chosen, options.device, console)
            floors, exponent = read_noise(current, options), exponent_of(current, options)
            console.print(noise_table(current, floors, exponent))
            for floor in floors:
                console.print(f"{floor.variant}: {verdict(floor, exponent)}", highlight=False)


if __name__ == "__main__":
    main()
