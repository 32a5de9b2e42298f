"""Zoom into a map by training a finer grid: `uv run analysis/zoom.py --store S --factor 4`.

A zoom is a child grid, in float64, over a tile of its parent's cells. It is trained by the same engine
and stored inside the parent's group as `zoom/<name>`. `--levels 30 --movie out.gif` follows the boundary
downwards, one child a level, until neighbouring cells come too close for the kernel's numbers. Levels
that are stored already are not trained again.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console

from analysis.boundary import map_edges
from analysis.classify import Labelling, classify, convergence_value
from analysis.dimension import sequence_lines
from analysis.plot import (
    TEXT,
    analyse,
    colour_scale,
    draw,
    draw_convergence_cells,
    draw_frame,
    equalise,
    extent,
    save,
    summary,
)
from engine.command import parse, screen, user_errors
from engine.config import SweepConfig
from engine.grid import HYPER_PARAMETERS, Axis, Grid, is_number
from engine.outcome import DONE
from engine.store import Store, open_store
from engine.sweep import RunOptions, run_sweep

LEAST = 4  # a sequence stops before neighbouring cells lie closer than this many number spacings
MOVIES = (".gif", ".mp4")
MISSING_GREY = (225, 225, 225)


class Tile(NamedTuple):
    """A block of a grid's cells: rows [top, bottom), columns [left, right)."""

    top: int
    bottom: int
    left: int
    right: int


# ---- choosing where


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


# ---- the child


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


# ---- a sequence


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


# ---- the movie


def places_of(levels: list[Level]) -> list[tuple[np.ndarray, ...]]:
    """For each step from level k to k + 1: equalised values of k and k + 1, by the scale of k and of k + 1."""
    made = []
    for one, two in pairwise(levels):
        made.append(
            tuple(equalise(v, reference) for v in (one.value, two.value) for reference in (one.value, two.value))
        )
    return made


def frames(levels: list[Level], pixels: int, count: int) -> Iterator[np.ndarray]:
    """Pictures of a journey through the levels: equalised values [pixels, pixels], NaN where missing.

    The view shrinks exponentially onto the next level's tile, around one fixed point. Inside the tile
    the next level is shown, outside it this one, and the colour scale moves evenly from one level's
    equalisation to the next one's, so that nothing jumps or flickers at a level.

    Args:
        levels: at least one.
        pixels: side of the pictures.
        count: pictures for each step from a level to the next.
    """
    along = (np.arange(pixels) + 0.5) / pixels
    for level, (here, here_next, there, there_next) in zip(levels[:-1], places_of(levels), strict=True):
        rows, cols = here.shape
        tile = level.tile
        assert tile is not None
        for picture in range(count):
            time = picture / count
            # the tile, and the view, in units of this level's map
            y = view(tile.top / rows, tile.bottom / rows, time, along)
            x = view(tile.left / cols, tile.right / cols, time, along)
            outer = pick((1 - time) * here + time * here_next, y, x)
            inside_y = (y - tile.top / rows) * rows / (tile.bottom - tile.top)
            inside_x = (x - tile.left / cols) * cols / (tile.right - tile.left)
            inner = pick((1 - time) * there + time * there_next, inside_y, inside_x)
            within = np.outer((inside_y >= 0) & (inside_y < 1), (inside_x >= 0) & (inside_x < 1))
            yield np.where(within, inner, outer)
    yield pick(equalise(levels[-1].value), along, along)


def view(start: float, stop: float, time: float, along: np.ndarray) -> np.ndarray:
    """Places in [0, 1] of a level that the pixels `along` show at a time in [0, 1] of the way to [start, stop]."""
    ratio = stop - start
    width = ratio**time
    low = start * (1 - width) / (1 - ratio) if ratio < 1 else 0.0
    return low + width * along


def pick(cells: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The cells [row, col] under places y, x in units of the map; those outside are clipped to its rim."""
    rows, cols = cells.shape
    row = np.clip((y * rows).astype(int), 0, rows - 1)
    col = np.clip((x * cols).astype(int), 0, cols - 1)
    return cells[np.ix_(row, col)]


def palette_frames(pictures: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Pictures as palette indices [row, col] uint8, the first row on top: 0..254 the scale, 255 missing."""
    for placed in pictures:
        index = np.where(np.isnan(placed), 255, np.nan_to_num((placed + 1) * 127).round())
        yield index.astype(np.uint8)[::-1]


def palette() -> np.ndarray:
    """RGB colours [256, 3] uint8 of `palette_frames`."""
    return np.concatenate([colour_scale(size=255), np.array([MISSING_GREY], np.uint8)])


def check_movie(path: str) -> None:
    """Raise ValueError unless the movie's kind is known and can be written here."""
    if not path.endswith(MOVIES):
        raise ValueError(f"movie is {path!r}, expected a name ending in {' or '.join(MOVIES)}")
    if path.endswith(".mp4"):
        from matplotlib.animation import FFMpegWriter

        if not FFMpegWriter.isAvailable():
            raise ValueError(
                "an .mp4 is written by the program ffmpeg, which is not installed; install it or write a .gif"
            )


def write_movie(path: Path, pictures: Iterator[np.ndarray], per_second: int) -> None:
    """Write palette pictures as a .gif (pillow) or an .mp4 (matplotlib's ffmpeg writer)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gif":
        from PIL import Image

        images = []
        for indices in pictures:
            images.append(Image.fromarray(np.ascontiguousarray(indices)))
            images[-1].putpalette(palette().tobytes())
        images[0].save(
            path, save_all=True, append_images=images[1:], duration=1000 // per_second, loop=0, optimize=False
        )
        return
    from matplotlib.animation import FFMpegWriter
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colours, first = palette(), next(pictures)
    figure = Figure(figsize=(first.shape[1] / 100, first.shape[0] / 100), dpi=100)
    FigureCanvasAgg(figure)
    shown_frame = figure.figimage(colours[first])
    writer = FFMpegWriter(fps=per_second, bitrate=8000)
    with writer.saving(figure, str(path), dpi=100):
        writer.grab_frame()
        for indices in pictures:
            shown_frame.set_data(colours[indices])
            writer.grab_frame()


# ---- pictures


def draw_zoom(levels: list[Level], folder: Path, name: str, pdf: bool) -> list[Path]:
    """Maps side by side, each with the rectangle of the next level; the paths written."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    with rc_context(TEXT):
        figure = Figure(figsize=(4.3 * len(levels), 4.5), layout="constrained")
        panels = np.atleast_1d(figure.subplots(1, len(levels)))
        for axes, level in zip(panels, levels, strict=True):
            rows, cols = level.store.grid.shape
            times = width(levels[0].store.grid.x) / width(level.store.grid.x)
            draw_frame(axes, level.store, f"{times:,.0f} x" if times > 1.5 else f"{rows} x {cols} cells")
            draw_convergence_cells(axes, level.store, level.codes, level.value)
            if level.tile is None:
                continue
            x, y = extent(level.store.grid.x), extent(level.store.grid.y)
            corner = x[0] + level.tile.left * (x[1] - x[0]) / cols, y[0] + level.tile.top * (y[1] - y[0]) / rows
            size = (
                (level.tile.right - level.tile.left) * (x[1] - x[0]) / cols,
                (level.tile.bottom - level.tile.top) * (y[1] - y[0]) / rows,
            )
            for colour, line in (("black", 2.6), ("white", 1.2)):
                axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor=colour, linewidth=line, zorder=3))
        return save(figure, folder, name, pdf)


def shown(levels: list[Level], most: int = 4) -> list[Level]:
    """Up to `most` levels of a sequence, evenly spread; a level keeps its rectangle if the next is shown too."""
    chosen = np.unique(np.linspace(0, len(levels) - 1, most).round().astype(int))
    return [levels[i] if i + 1 in chosen else levels[i]._replace(tile=None) for i in chosen]


def report_sequence(levels: list[Level], console: Console) -> None:
    """Print the dimension over the sequence by both estimators."""
    for line in sequence_lines(map_edges(level.codes) for level in levels):
        console.print(line, soft_wrap=True, highlight=False)


@dataclass(frozen=True, kw_only=True)
class Options(Labelling):
    """Where to zoom, and how far."""

    store: str  # path of the parent's store
    rows: str = ""  # rows a:b of the parent to zoom into (default: with --cols all of them, else see --follow)
    cols: str = ""  # columns a:b of the parent
    factor: int = 4  # how many times finer each zoom is, at least 2
    levels: int = 0  # length of a zoom sequence that follows the boundary (0: one zoom)
    size: int = 0  # cells a side of each level of a sequence (0: as many as the parent)
    target: str = ""  # follow this point y,x (values of the axes) instead
    follow: float = 1.0  # tile to follow, as a quantile of the boundary in them: 1 the busiest, 0.5 a typical one
    movie: str = ""  # write the sequence as a movie: a .gif, or an .mp4 where ffmpeg is installed
    pixels: int = 512  # side of the movie's pictures
    frames: int = 16  # pictures of the movie from a level to the next
    per_second: int = 16  # pictures of the movie a second
    device: str = "auto"  # cpu or cuda; auto: cuda if there is one
    pdf: bool = False  # write PDFs beside the PNGs


def check_follow(follow: float) -> None:
    """Raise ValueError for what is no quantile."""
    if not 0 <= follow <= 1:
        raise ValueError(f"follow is {follow:g}, expected a quantile between 0 and 1; 1 is the busiest tile")


def check(options: Options) -> None:
    """Raise ValueError for options that do not go together."""
    for name, low in (("factor", 2), ("levels", 0), ("size", 0), ("pixels", 16), ("frames", 1), ("per_second", 1)):
        if getattr(options, name) < low:
            raise ValueError(f"{name} is {getattr(options, name)}, expected at least {low}")
    check_follow(options.follow)
    if options.levels and (options.rows or options.cols):
        raise ValueError("--rows and --cols give one zoom; a sequence of --levels follows the boundary or --target")
    if options.movie and not options.levels:
        raise ValueError("--movie needs a sequence; give --levels")
    if options.movie:
        check_movie(options.movie)


def main() -> None:
    """Zoom once, or along a sequence."""
    options = parse(Options, "Zoom into a map by training a finer grid over a tile of it, once or level by level.")
    with user_errors():
        check(options)
        store, console = open_store(options.store), screen()
        target = parse_target(options.target) if options.target else None
        if options.levels:
            how = (options.levels, options.factor, options.size, target, options.follow)
            levels = list(sequence(store, *how, options, options.device, console))
            report_sequence(levels, console)
            paths = draw_zoom(shown(levels), store.figures, "zoom-sequence", options.pdf)
            if options.movie:
                pictures = palette_frames(frames(levels, options.pixels, options.frames))
                write_movie(Path(options.movie), pictures, options.per_second)
                paths.append(Path(options.movie))
        else:
            codes = classify(store, options.thresholds)
            tile = choose_tile(store, codes, options, target)
            child = zoom_once(store, tile, options.factor, options.device)
            found = analyse(child, options, None)
            parent = Level(store, codes, convergence_value(store, codes), tile)
            pair = [parent, Level(child, found.codes, found.value, None)]
            paths = draw_zoom(pair, store.figures, f"zoom-{child.path.name}", options.pdf)
            paths += save(draw(found), child.figures, "map", options.pdf)
            console.print(summary(found))
        console.print(f"pictures: {', '.join(map(str, paths))}", soft_wrap=True, highlight=False)


def choose_tile(store: Store, codes: np.ndarray, options: Options, target: tuple[float, float] | None) -> Tile:
    """The tile of one zoom: the range asked for, around the target, or by --follow."""
    rows, cols = store.grid.shape
    if options.rows or options.cols:
        return Tile(*parse_range("rows", options.rows, rows), *parse_range("cols", options.cols, cols))
    height, width = max(rows // options.factor, 2), max(cols // options.factor, 2)
    if min(rows, cols) < 2:
        raise ValueError(f"the map has {rows} x {cols} cells; give --rows and --cols to zoom into so small a map")
    if target:
        return tile_around(store.grid, target, height, width)
    return followed_tile(map_edges(codes), height, width, options.follow)


if __name__ == "__main__":
    main()
