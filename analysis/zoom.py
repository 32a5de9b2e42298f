"""Zoom into a map by training a finer grid: `uv run analysis/zoom.py --store S --factor 4`.

One zoom trains a child grid over a tile (analysis/sequence.py); `--levels 30 --movie out.gif` follows the boundary
downwards, one child a level.
"""

if __name__ == "__main__" and not __package__:
    import started  # noqa: F401  says how to start it where its packages are missing

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from analysis.axes import extent
from analysis.boundary import map_edges
from analysis.classify import Labelling, classify, convergence_value
from analysis.dimension import sequence_lines
from analysis.maps import analyse, map_title, summary
from analysis.movie import check_movie, frames, palette_frames, write_movie
from analysis.panels import (
    check_picture,
    convergence_bar,
    draw_convergence_cells,
    draw_frame,
    save,
    side_by_side,
    style,
)
from analysis.plot import draw
from analysis.sequence import Level, check_follow, sequence, width, zoom_once
from analysis.tile import Tile, followed_tile, parse_range, parse_target, tile_around
from engine.command import parse, screen, user_errors
from engine.store import Replicate, open_map


def draw_zoom(levels: list[Level], path: Path, size: str) -> Path:
    """Maps side by side, each with the rectangle of the next level; the path written."""
    from matplotlib import rc_context
    from matplotlib.patches import Rectangle

    note = "Convergence, each side equalised in its own panel; a frame is the panel to its right."
    with rc_context(style(size)):
        figure, panels = side_by_side(len(levels), size, map_title(levels[0].store), note)
        for axes, level in zip(panels, levels, strict=True):
            rows, cols = level.store.grid.shape
            times = width(levels[0].store.grid.x) / width(level.store.grid.x)
            draw_frame(axes, level.store, f"{times:,.0f} x" if times > 1.5 else f"{rows} x {cols} cells")
            draw_convergence_cells(axes, level.store, level.codes, level.value)
            convergence_bar(axes)
            if level.tile is None:
                continue
            x, y = extent(level.store.grid.x), extent(level.store.grid.y)
            corner = x[0] + level.tile.left * (x[1] - x[0]) / cols, y[0] + level.tile.top * (y[1] - y[0]) / rows
            sides = (
                (level.tile.right - level.tile.left) * (x[1] - x[0]) / cols,
                (level.tile.bottom - level.tile.top) * (y[1] - y[0]) / rows,
            )
            for colour, line in (("black", 2.6), ("white", 1.2)):
                axes.add_patch(Rectangle(corner, *sides, fill=False, edgecolor=colour, linewidth=line, zorder=3))
        return save(figure, path)


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
    to: str = ""  # the picture to write: .png, .pdf or .svg (default: a .png in figures/ inside the store)
    picture: str = "screen"  # size of the picture: screen, slide (large letters) or paper (two columns wide)


def check(options: Options) -> None:
    """Raise ValueError for options that do not go together."""
    check_picture(options.to, options.picture)
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


def picture_path(options: Options, store: Replicate, name: str) -> Path:
    """Where the picture is written."""
    return Path(options.to) if options.to else store.figures / f"{name}.png"


def main() -> None:
    """Zoom once, or along a sequence."""
    options = parse(Options, "Zoom into a map by training a finer grid over a tile of it, once or level by level.")
    with user_errors():
        check(options)
        store, console = open_map(options.store, options.replicate), screen()
        target = parse_target(options.target) if options.target else None
        if options.levels:
            how = (options.levels, options.factor, options.size, target, options.follow)
            levels = list(sequence(store, *how, options, options.device, console))
            report_sequence(levels, console)
            paths = [draw_zoom(shown(levels), picture_path(options, store, "zoom-sequence"), options.picture)]
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
            picture = picture_path(options, store, f"zoom-{child.path.name}")
            paths = [draw_zoom(pair, picture, options.picture), save(draw(found), child.figures / "map.png")]
            console.print(summary(found))
        console.print(f"pictures: {', '.join(map(str, paths))}", soft_wrap=True, highlight=False)


def choose_tile(store: Replicate, codes: np.ndarray, options: Options, target: tuple[float, float] | None) -> Tile:
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
