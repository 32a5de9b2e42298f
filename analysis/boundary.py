"""Where training stops working: boundary blocks of a map, and the critical learning rate of each line.

Frame-free: a boundary block is a 2x2 block of measured cells whose labels are not all equal. Nothing is
padded, so the picture's own frame never counts as boundary.
"""

if __name__ == "__main__" and not __package__:
    import started  # noqa: F401  says how to start it where its packages are missing

from dataclasses import dataclass

import numpy as np
from rich.table import Table

from analysis.classify import Labelling, classify, measured, trains
from engine.command import parse, screen, user_errors
from engine.grid import Axis, Grid
from engine.store import open_map

# what a line of cells says about its critical learning rate
BRACKETED, NEVER_BREAKS, ALWAYS_BREAKS, UNMEASURED = range(4)
VERDICTS = ("bracketed", "never breaks", "always breaks", "not measured")


def edges(labels: np.ndarray, known: np.ndarray | None = None) -> np.ndarray:
    """2x2 blocks that straddle a boundary.

    Args:
        labels: [row, col], any type that compares; two or more different values in a block make an edge.
        known: [row, col] bool; a block with an unknown cell is no edge. Default: all are known.

    Returns:
        bool [row - 1, col - 1]; block (i, j) covers cells i..i+1, j..j+1.
    """
    differ_down = labels[:-1] != labels[1:]
    differ_right = labels[:, :-1] != labels[:, 1:]
    found = differ_down[:, :-1] | differ_down[:, 1:] | differ_right[:-1] | differ_right[1:]
    if known is not None:
        found &= known[:-1, :-1] & known[:-1, 1:] & known[1:, :-1] & known[1:, 1:]
    return found


def map_edges(codes: np.ndarray) -> np.ndarray:
    """Blocks that straddle the boundary of trainability, from label codes; bool [row - 1, col - 1]."""
    return edges(trains(codes), measured(codes))


def near(blocks: np.ndarray, distance: int) -> np.ndarray:
    """Cells within `distance` rows and columns of a boundary block's own cells, bool [row, col].

    With distance 0 these are the four cells of each block in `blocks` [row - 1, col - 1].
    """
    rows, cols = blocks.shape[0] + 1, blocks.shape[1] + 1
    reach = np.zeros((rows, cols), np.int64)
    i, j = np.nonzero(blocks)
    top, bottom = np.maximum(i - distance, 0), np.minimum(i + 1 + distance, rows - 1) + 1
    left, right = np.maximum(j - distance, 0), np.minimum(j + 1 + distance, cols - 1) + 1
    # a rectangle is +1 and -1 at its corners, summed along both axes
    corners = np.zeros((rows + 1, cols + 1), np.int64)
    for y, x, sign in ((top, left, 1), (bottom, left, -1), (top, right, -1), (bottom, right, 1)):
        np.add.at(corners, (y, x), sign)
    reach = corners.cumsum(0).cumsum(1)[:rows, :cols]
    return reach > 0


def is_rate(axis: Axis) -> bool:
    """Whether an axis is a learning rate, of all parameters or of a group."""
    return axis.name.partition(".")[0] == "lr"


def learning_rate_axis(grid: Grid) -> int:
    """0 when the y axis is the learning rate, 1 when x is; a plain `lr` comes before a group's, y before x.

    Raises:
        ValueError: neither axis is a learning rate.
    """
    names = (grid.y.name, grid.x.name)
    if "lr" in names:
        return names.index("lr")
    for position, name in enumerate(names):
        if name.startswith("lr."):
            return position
    raise ValueError(f"the axes are {names[0]} and {names[1]}; a critical learning rate needs a learning-rate axis")


@dataclass(frozen=True)
class Critical:
    """The critical learning rate of each line of cells: a column where the rate is on the y axis, else a row."""

    lr: Axis  # the learning-rate axis
    other: Axis  # the axis that counts the lines
    below: np.ndarray  # [line] highest rate of the run of training cells from below, NaN if there is none
    above: np.ndarray  # [line] lowest rate that breaks after that run, NaN if none does
    verdict: np.ndarray  # [line] uint8: BRACKETED, NEVER_BREAKS, ALWAYS_BREAKS or UNMEASURED

    @property
    def value(self) -> np.ndarray:
        """Geometric mean of the two bracketing rates [line] float64, NaN unless bracketed between rates above 0."""
        return np.where(self.below > 0, np.sqrt(self.below) * np.sqrt(self.above), np.nan)

    @property
    def bracketed(self) -> np.ndarray:
        """Lines with a rate above 0 that trains below one that breaks, bool [line]."""
        return (self.verdict == BRACKETED) & (self.below > 0)


def lines(grid: Grid, cells: np.ndarray) -> np.ndarray:
    """Cells [row, col] turned to [rate, line]: the learning rate first."""
    return cells if learning_rate_axis(grid) == 0 else cells.T


def critical(grid: Grid, codes: np.ndarray) -> Critical:
    """The critical learning rate of every column (of every row, where the rate is on the x axis).

    From the lowest rate upwards, over measured cells: `below` is the last that trains before the first
    that breaks, `above` is that one. What happens at still higher rates does not count.

    Raises:
        ValueError: no learning-rate axis.
    """
    position = learning_rate_axis(grid)
    lr, other = (grid.y, grid.x) if position == 0 else (grid.x, grid.y)
    good, known = lines(grid, trains(codes)), lines(grid, measured(codes))
    broken = known & ~good
    breaks, points = broken.any(0), lr.points
    first_broken = np.where(breaks, broken.argmax(0), points)
    run = known & good & (np.arange(points)[:, None] < first_broken)
    has_run = run.any(0)
    last_good = points - 1 - run[::-1].argmax(0)
    verdict = np.select([has_run & breaks, has_run, breaks], [BRACKETED, NEVER_BREAKS, ALWAYS_BREAKS], UNMEASURED)
    return Critical(
        lr,
        other,
        np.where(has_run, lr.values[last_good], np.nan),
        np.where(breaks, lr.values[np.minimum(first_broken, points - 1)], np.nan),
        verdict.astype(np.uint8),
    )


@dataclass(frozen=True, kw_only=True)
class Options(Labelling):
    """Which store to read."""

    store: str  # path of the sweep's store


def main() -> None:
    """Print the critical learning rate of every line of a map."""
    options = parse(Options, "The critical learning rate of each column: between which two rates training breaks.")
    with user_errors():
        store = open_map(options.store, options.replicate)
        codes = classify(store, options.thresholds)
        found = critical(store.grid, codes)
        blocks = map_edges(codes)
        title = f"{store.path}: {blocks.sum()} of {blocks.size} blocks straddle the boundary"
        table = Table(found.other.name, f"critical {found.lr.name}", "trains at", "breaks at", "", title=title)
        for at, value, below, above, verdict in zip(
            found.other.values, found.value, found.below, found.above, found.verdict, strict=True
        ):
            table.add_row(f"{at:.4g}", f"{value:.3g}", f"{below:.3g}", f"{above:.3g}", VERDICTS[verdict])
        screen().print(table)


if __name__ == "__main__":
    main()
