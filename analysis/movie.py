"""A journey through the levels of a zoom sequence, as pictures and as a .gif or .mp4."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np

from analysis.colours import colour_scale, equalise
from analysis.sequence import Level

MOVIES = (".gif", ".mp4")
MISSING_GREY = (225, 225, 225)


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
