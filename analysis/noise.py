"""The noise floor of a map: `uv run analysis/noise.py --store S --share 0.1`.

Whole lines of the grid (columns where the y axis alone is a learning rate, so that every line crosses
the boundary; else rows) are trained again in every variant of analysis/variants.py, each as a sweep of its own with
exactly the parent's coordinates, stored inside it as `noise/<variant>-<k>-row-<i>` or `-column-<i>`.

A map is signal while fewer labels change near the boundary than half of what two unrelated maps would differ by. How
deep a zoom can go follows from the map's own f(eps) (analysis/uncertainty.py): a change as small as the spacing of a
zoom's cells flips f(eps) of the cells, and where that is no more than what the variant flips, the zoom shows noise.
"""

if __name__ == "__main__" and not __package__:
    import started  # noqa: F401  says how to start it where its packages are missing

import math
from dataclasses import dataclass, replace

import numpy as np
from rich.console import Console
from rich.table import Table

from analysis.boundary import is_rate, map_edges, near
from analysis.classify import Labelling, classify, measured, trains
from analysis.exponent import Exponent
from analysis.sequence import train
from analysis.uncertainty import read_measured
from analysis.variants import VARIANTS, check_variants, coarser_precision, other_precision, variants
from engine.command import parse, screen, user_errors
from engine.config import SweepConfig
from engine.grid import Axis, Grid
from engine.place import Where
from engine.store import Replicate, open_map

BAND = 2  # cells from the boundary that count as near
FEWEST_LINES = 4  # below it there is no interval over lines


@dataclass(frozen=True)
class Floor:
    """What one variant changed; intervals are 95%, over lines, NaN below FEWEST_LINES of them."""

    variant: str
    lines: int  # lines trained again
    orders: int  # times each was: data orders of the variant `order`, else 1
    near: int  # measured cells within BAND of the boundary, of all times
    away: int  # the others
    labels_near: float  # share of the near cells whose label changed
    labels_away: float
    flips_near: float  # share of the near cells that changed between training and breaking
    flips_near_interval: tuple[float, float]
    flips_away: float
    flips: float  # share of all cells
    flips_interval: tuple[float, float]
    chance: float  # share of the near cells that would flip between two unrelated maps
    coarser: str = ""  # the variant's precision, where it is coarser than the map's, whose own floor lies deeper

    @property
    def is_signal(self) -> bool:
        """Whether no near cell flips, or fewer than half of chance."""
        return self.flips_near == 0 or self.flips_near < self.chance / 2

    @property
    def unseen(self) -> float:
        """The share of all cells that flips, or without a flip what three would be: a 95% bound."""
        return self.flips or 3 / max(self.near + self.away, 1)


@dataclass(frozen=True)
class Depth:
    """How fine a map's cells may become: its f(eps), and the spacing of its cells in the units of eps."""

    law: Exponent
    spacing: float

    def zoom(self, share: float) -> float:
        """Linear zoom at which a change of one cell flips no more than this share: spacing over the eps with that f."""
        return self.spacing / self.law.size_at(share)


def depth_of(store: Replicate) -> Depth | None:
    """What a map's own f(eps) says, where it was measured over a window of both axes and is a power law; else None."""
    grid = store.grid
    for found in read_measured(store):
        if set(found.over) == {grid.y.name, grid.x.name} and not found.law.refused:
            steps = []
            for axis in (grid.y, grid.x):
                low, high = found.over[axis.name]
                one = math.log(axis.high / axis.low) if axis.scale == "log" else (axis.high - axis.low) / (high - low)
                steps.append(one / max(axis.points - 1, 1))
            return Depth(found.law, math.sqrt(steps[0] * steps[1]))
    return None


# ---- training


def line_axis(grid: Grid) -> int:
    """0 when a line is a row, 1 when it is a column: only where y alone is a learning rate."""
    return int(is_rate(grid.y) and not is_rate(grid.x))


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


def line_path(store: Replicate, variant: str, line: str) -> Where:
    """Where a line of a variant is stored."""
    return store.path / "noise" / f"{variant}-{('row', 'column')[line_axis(store.grid)]}-{line}"


def train_lines(store: Replicate, share: float, chosen: list[str], device: str, console: Console) -> None:
    """Train the lines of every chosen variant that are not stored yet."""
    points = store.grid.shape[line_axis(store.grid)]
    lines = chosen_lines(points, share)
    possible = variants(store)
    if "precision" in chosen and "precision" not in possible:
        other = other_precision(store.config)
        console.print(f"precision: left out, neighbouring cells are the same in {other}", highlight=False)
    for variant, configs in possible.items():
        if variant not in chosen:
            continue
        for k, config in enumerate(configs):
            for line in lines:
                cells = line_cells(store, line)
                path = line_path(store, f"{variant}-{k}", f"{line:05d}")
                train(line_config(config, cells), path, device, quiet=True, cells=cells)
        times = f", {len(configs)} times" if len(configs) > 1 else ""
        console.print(f"{variant}: {len(lines)} of {points} lines trained again{times}", highlight=False)


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
        pattern = line_path(store, f"{variant}-*", "*")
        paths = store.store.inside("noise", pattern.name)
        if not paths:
            continue
        lines = [int(path.name.rsplit("-", 1)[1]) for path in paths]
        stores = [open_map(path) for path in paths]
        for line, again in zip(lines, stores, strict=True):
            if again.grid != line_cells(store, line):
                raise ValueError(f"{again.path} is not a line of {store.path}; delete it and measure the noise again")
        labels = np.stack([classify(again, labelling.thresholds).ravel() for again in stores])
        coarser = coarser_precision(store.config) if variant == "precision" else ""
        found.append(replace(compare(variant, codes, labels, close, np.array(lines)), coarser=coarser))
    return found


def compare(variant: str, before: np.ndarray, after: np.ndarray, close: np.ndarray, lines: np.ndarray) -> Floor:
    """Compare a map's label codes [line, cell] with those of lines trained again, [again, cell].

    Args:
        close: which cells of the map are near its boundary, bool [line, cell].
        lines: which line each was, [again]; one may be there several times.
    """
    before, close = before[lines], close[lines]
    known = measured(before) & measured(after)
    near_cells, away = known & close, known & ~close
    changed, flipped = before != after, trains(before) != trains(after)
    trained = trains(before)[near_cells].mean() if near_cells.any() else 0.0

    def share(what: np.ndarray, where: np.ndarray) -> float:
        return float(what[where].mean()) if where.any() else 0.0

    single = np.unique(lines)
    return Floor(
        variant=variant,
        lines=len(single),
        orders=-(-len(lines) // max(len(single), 1)),
        near=int(near_cells.sum()),
        away=int(away.sum()),
        labels_near=share(changed, near_cells),
        labels_away=share(changed, away),
        flips_near=share(flipped, near_cells),
        flips_near_interval=interval_over_lines(flipped, near_cells, lines),
        flips_away=share(flipped, away),
        flips=share(flipped, known),
        flips_interval=interval_over_lines(flipped, known, lines),
        chance=float(2 * trained * (1 - trained)),
    )


def interval_over_lines(what: np.ndarray, where: np.ndarray, lines: np.ndarray) -> tuple[float, float]:
    """95% interval of the share of `what` in `where` [again, cell]: t over the lines left out in turn.

    The cells of a line, and its repetitions, are one draw. Without an event, exact over the cells as if independent:
    the least that the upper end can be.
    """
    from scipy import special

    from analysis.replicates import exact_interval

    single, place = np.unique(lines, return_inverse=True)
    events, cells = np.zeros(len(single)), np.zeros(len(single))
    np.add.at(events, place, (what & where).sum(1))
    np.add.at(cells, place, where.sum(1))
    n = len(single)
    if not events.sum():
        return 0.0, float(exact_interval(0, int(cells.sum()))[1])
    others = cells.sum() - cells
    if n < FEWEST_LINES or (others == 0).any():
        return math.nan, math.nan
    left_out = (events.sum() - events) / others
    value = events.sum() / cells.sum()
    half = float(-special.stdtrit(n - 1, 0.025)) * math.sqrt((n - 1) * left_out.var())
    return max(value - half, 0.0), min(value + half, 1.0)


def verdict(floor: Floor, depth: Depth | None) -> str:
    """How deep the map is signal by this variant, in words."""
    where = f" in {floor.coarser}, coarser than the map" if floor.coarser else ""
    if not floor.near:
        return "no cell near a boundary was trained again"
    if not floor.is_signal:
        return f"noise{where}" if where else "noise: this map is already beyond its floor"
    if depth is None:
        return f"signal in this map{where}; how deep, its f(eps) over both axes says: analysis/uncertainty.py"
    zoom = depth.zoom(floor.unseen)
    if not zoom > 1:
        return "signal in this map, too few cells to say of any zoom"
    bound = "at least" if floor.flips == 0 else "about"
    return f"signal, down to {bound} a {zoom:.3g}x zoom ({math.log(zoom, 4):.1f} zooms of 4x){where}"


def percent_words(value: float, interval: tuple[float, float]) -> str:
    """A share with its interval, where there is one."""
    low, high = interval
    return f"{value:.2%} [{low:.2%}, {high:.2%}]" if math.isfinite(low) else f"{value:.2%}, no interval"


def noise_table(store: Replicate, floors: list[Floor], depth: Depth | None) -> Table:
    """The floors of one store, for the terminal: cells near and away from the boundary."""
    law = f", uncertainty exponent {depth.law.alpha:.2f}" if depth else ""
    head = ("variant", "lines", "near / away", "labels changed", "flips near", "flips away", "chance")
    table = Table(*head, title=f"noise floor: {store.path}{law}", title_justify="left", box=None)
    for f in floors:
        table.add_row(
            f.variant,
            f"{f.lines} x {f.orders}" if f.orders > 1 else str(f.lines),
            f"{f.near} / {f.away}",
            f"{f.labels_near:.2%} / {f.labels_away:.2%}",
            percent_words(f.flips_near, f.flips_near_interval),
            f"{f.flips_away:.2%}",
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
        chosen = check_variants(options.variants)
        console, store = screen(), open_map(options.store, options.replicate)
        for path in [store.path, *(store.children() if options.zooms else [])]:
            current = open_map(path)
            train_lines(current, options.share, chosen, options.device, console)
            floors, depth = read_noise(current, options), depth_of(current)
            console.print(noise_table(current, floors, depth))
            for floor in floors:
                console.print(f"{floor.variant}: {verdict(floor, depth)}", highlight=False)


if __name__ == "__main__":
    main()
