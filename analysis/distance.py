"""Does a score depend on the distance to the border of training? `uv run analysis/distance.py --store S`.

The distance of a cell is that to the nearest crossing of P(train) with one half, in decades of the two axes, positive
where the cell trains; of one seed P is 0 or 1, and the crossing its border. Scores are those of analysis/evaluate.py.

The distance falls as the rate rises, and so may a score, whatever the border does. So ranks of both are taken free of
what they share with the rank of the logarithm of the learning rate, a seed at a time, and their correlation is the
mean over seeds (partial Spearman). Its interval resamples whole seeds, and items, the same in all cells. Its p-value
permutes what is left of the distance over cells, the same way in every seed (Freedman & Lane 1983), since seeds share
the border and cells the items. What the other axis does to a score is not taken out.
"""

if __name__ == "__main__" and not __package__:
    import started  # noqa: F401  says how to start it where its packages are missing

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from analysis.boundary import is_rate
from analysis.classify import Labelling
from analysis.maps import trained_share
from analysis.panels import Picture, save, side_by_side, style
from engine.command import parse, screen, user_errors
from engine.grid import Axis, Grid
from engine.outcome import Thresholds, measured
from engine.scores import BY_ITEM, stored_tasks
from engine.store import Store, open_store

DRAWS = 2000  # of seeds and items, and permutations
FEWEST_CELLS = 8  # from which a correlation is told
PAIRS = 2000  # of cells whose difference is looked at, at most
LOSS = "held-out loss"
OTHER_FORMS = ("core:", "letters:")  # ask the items of other tasks again, perhaps
BLOCK = 2**23  # values that are drawn at once
FREE = 1e-6  # share of the distance's ranks that the rate leaves free, below which it is the rate


# ---- how far from the border


def decades(axis: Axis) -> np.ndarray:
    """A log axis in decades. Raises ValueError for another axis."""
    if axis.scale != "log":
        raise ValueError(f"axis {axis.name} is linear; expected two log axes: a distance is in decades")
    return np.log10(axis.values)


def border_points(share: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Where P(train) crosses one half between neighbouring cells, linear in between [point, 2], (y, x).

    Args:
        share: P [row, col], NaN where it is not known.
        y, x: places of the rows and columns.
    """
    above = share - 0.5
    places = np.stack(np.meshgrid(y, x, indexing="ij"), axis=-1)
    found = [places[above == 0]]
    for first, second in (np.s_[:-1, :], np.s_[1:, :]), (np.s_[:, :-1], np.s_[:, 1:]):
        crossed = above[first] * above[second] < 0
        a, b = above[first][crossed], above[second][crossed]
        part = (a / (a - b))[:, None]
        found.append(places[first][crossed] * (1 - part) + places[second][crossed] * part)
    return np.concatenate(found)


def signed_distance(share: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Distance of every cell to the nearest border point [row, col], negative where P < 1/2, NaN where unknown.

    Raises:
        ValueError: every cell is on one side.
    """
    from scipy.spatial import KDTree

    points = border_points(share, y, x)
    if not len(points):
        raise ValueError("every measured cell is on one side of P(train) = 1/2; expected a border: widen the axes")
    places = np.stack(np.meshgrid(y, x, indexing="ij"), axis=-1)
    far, _ = KDTree(points).query(places.reshape(-1, 2))
    return np.where(np.isnan(share), np.nan, np.sign(share - 0.5) * far.reshape(share.shape))


def cell_distances(store: Store, thresholds: Thresholds) -> np.ndarray:
    """`signed_distance` of a store's cells [row, col], P over its replicates.

    Raises:
        ValueError: a list of points, a linear axis, no border.
    """
    grid = store.run.cells
    if not isinstance(grid, Grid):
        raise ValueError(f"{store.path} holds a list of points; expected a grid, which has a border")
    return signed_distance(trained_share(store, thresholds).share, decades(grid.y), decades(grid.x))


def distance_note(store: Store, cell: tuple[int, ...] | None, thresholds: Thresholds) -> list[str]:
    """How far from the border a cell lies, in words; [] where there is no border."""
    try:
        far = cell_distances(store, thresholds)
    except ValueError:  # the map has none, which is no fault of the cell
        return []
    if cell is None or np.isnan(far[cell]):
        return []
    side = "inside" if far[cell] > 0 else "beyond"
    return [f"It lies {abs(far[cell]):.2f} decades {side} the border of training."]


def rate_ranks(grid: Grid) -> np.ndarray:
    """Ranks of the learning rates that are swept [rate, row, col]."""
    ranks = [np.arange(len(axis.values), dtype=float) for axis in (grid.y, grid.x)]
    both = np.meshgrid(*ranks, indexing="ij")
    rated = [each for each, axis in zip(both, (grid.y, grid.x), strict=True) if is_rate(axis)]
    return np.stack(rated) if rated else np.empty((0, *grid.shape))


# ---- partial rank correlation


def freed(ranks: np.ndarray, given: np.ndarray) -> np.ndarray:
    """What is left of ranks [..., cell] once their mean and what is linear in `given` [k, cell] are taken out."""
    basis, _ = np.linalg.qr(np.vstack([np.ones(ranks.shape[-1]), given]).T)
    return ranks - (ranks @ basis) @ basis.T


def correlation(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Correlation over cells of two residuals [..., cell], NaN where either does not vary."""
    with np.errstate(invalid="ignore", divide="ignore"):
        norms = np.sqrt((one**2).sum(-1) * (other**2).sum(-1))
        return np.where(norms > 1e-9, (one * other).sum(-1) / norms, np.nan)


@dataclass(frozen=True)
class Relation:
    """Rank correlation of something with the distance."""

    name: str
    cells: int
    seeds: int
    items: int  # 0: nothing but seeds is resampled
    plain: float  # mean Spearman over seeds
    partial: float  # the same, free of log LR
    low: float  # 95% interval of it
    high: float
    p: float  # of no relation, by permutation
    least: float  # 95% of the permutations stay below it: what these cells can tell from nothing

    @property
    def interval(self) -> str:
        """In words; there is none of two seeds, nor of one seed's losses, of which nothing is resampled."""
        if math.isnan(self.low):
            return f"no interval of {self.seeds} seed{'s' * (self.seeds > 1)}"
        return f"95% {self.low:.2f} to {self.high:.2f}"


def relation(
    name: str, distance: np.ndarray, given: np.ndarray, values: np.ndarray, by_item: bool, draws: int = DRAWS
) -> Relation:
    """The relation of values with the distance.

    Args:
        distance: [cell].
        given: ranks of the learning rates [k, cell].
        values: [seed, cell], or [seed, cell, item].
        draws: of seeds and items, and permutations.

    Raises:
        ValueError: too few cells, or the rates leave nothing of the distance.
    """
    from scipy.stats import rankdata

    from analysis.replicates import resampled_interval

    cells, seeds = len(distance), len(values)
    if cells < FEWEST_CELLS:
        raise ValueError(f"{name} is known in {cells} cells; expected {FEWEST_CELLS} or more: score more cells")
    ranks = rankdata(distance)
    left, mean = freed(ranks, given), ranks - ranks.mean()
    if (left**2).sum() < FREE * (mean**2).sum():
        raise ValueError(f"{name}: over these cells the distance is the rate's own; expected cells of several columns")
    random = np.random.default_rng(0)
    scores = rankdata(values.mean(-1) if by_item else values, axis=-1)
    own = freed(scores, given)
    by_seed = correlation(own, left)  # [seed]
    plain = seed_mean(correlation(freed(scores, given[:0]), mean), np.ones(seeds))
    found = float(seed_mean(by_seed, np.ones(seeds)))
    weights = random.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws).astype(float)
    null, drawn = np.empty(draws), np.empty(draws)
    block = max(BLOCK // values.size, 1)  # draws at once
    for some in (slice(first, first + block) for first in range(0, draws, block)):
        moved = random.permuted(np.tile(left, (len(null[some]), 1)), axis=1)
        null[some] = seed_mean(correlation(own, moved[:, None]), np.ones(seeds))
        again = by_seed
        if by_item:
            count = values.shape[-1]
            chosen = random.multinomial(count, np.full(count, 1 / count), size=len(null[some])) / count
            resampled = rankdata(np.moveaxis(values @ chosen.T, -1, 0), axis=-1)  # [draw, seed, cell]
            again = correlation(freed(resampled, given), left)
        drawn[some] = seed_mean(again, weights[some])
    drawn = drawn[np.isfinite(drawn)]
    ends: Any = (np.nan, np.nan)
    if seeds > 2:  # two seeds, resampled, say next to nothing of a third
        ends = resampled_interval(drawn, seeds)
    elif by_item and seeds == 1:
        ends = np.quantile(drawn, (0.025, 0.975))
    p = (1 + (np.abs(null) >= abs(found) - 1e-12).sum()) / (1 + draws)
    items, least = values.shape[-1] if by_item else 0, np.quantile(np.abs(null), 0.95)
    return Relation(name, cells, seeds, items, float(plain), found, *map(float, (*ends, p, least)))


def seed_mean(each: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean over seeds [..., seed], weighted, of those that are known; NaN where none is."""
    known = np.isfinite(each)
    with np.errstate(invalid="ignore"):
        return (weights * np.where(known, each, 0)).sum(-1) / (weights * known).sum(-1)


# ---- what so many items can tell


@dataclass(frozen=True)
class Resolution:
    """How well the items of a task tell cells apart; half widths of 95% intervals, in points."""

    name: str
    items: int
    pairs: int
    lone: float  # of one score, as it would be of one half: 0.98 / sqrt(items)
    apart: float  # of a difference of two cells, were their items not the same
    paired: float  # of one on the same items, the median over pairs
    among: float  # standard deviation of the cells' scores
    noise: float  # share of its square that comes of the choice of items

    def sentence(self) -> str:
        """In words."""
        return (
            f"{self.items} items of {self.name}: one score is known to ±{self.lone:.1f} points (95%), a difference of "
            f"two cells to ±{self.apart:.1f} were their items not the same, and on the same items to "
            f"±{self.paired:.1f} (median of {self.pairs:,} pairs); cells differ by {self.among:.1f} points (standard "
            f"deviation), of whose square the choice of items makes {self.noise:.0%}."
        )


def resolution(name: str, items: np.ndarray) -> Resolution:
    """What items tell, from scores in [0, 1] by seed, cell and item [seed, cell, item]; pairs are of one seed."""
    seeds, cells, count = items.shape
    first, second = np.triu_indices(cells, 1)
    random = np.random.default_rng(0)
    chosen = random.permutation(len(first))[: max(PAIRS // seeds, 1)]
    differences = items[:, first[chosen]] - items[:, second[chosen]]
    error = differences.std(-1, ddof=1) / math.sqrt(count)
    scores = items.mean(-1)
    # the part of an item's value that all cells share moves none of them against another
    own = items - items.mean(1, keepdims=True)
    noise = (own.var(-1, ddof=1) / count).mean()
    among = scores.var(1, ddof=1).mean()
    share = float(min(noise / among, 1.0)) if among > 0 else 1.0
    lone = 100 * 1.96 * 0.5 / math.sqrt(count)
    unpaired = 100 * 1.96 * math.sqrt(2 * float((scores * (1 - scores)).mean()) / count)
    paired = 100 * 1.96 * float(np.median(error))
    return Resolution(name, count, error.size, lone, unpaired, paired, 100 * math.sqrt(among), share)


# ---- of a store


@dataclass(frozen=True)
class Findings:
    """What a store's scores and losses have to do with the distance."""

    distance: np.ndarray  # [row, col]
    relations: tuple[Relation, ...]
    resolutions: tuple[Resolution, ...]
    shown: dict[str, tuple[np.ndarray, np.ndarray]]  # by name: distances [cell] and values [seed, cell]
    left_out: tuple[str, ...]  # what is not told, and why

    def sentence(self) -> str:
        """The last of the relations, which is that of all tasks together where there are several, in one sentence."""
        if not self.relations:
            return ""
        r = self.relations[-1]
        seeds = f"{r.seeds} seeds" if r.seeds > 1 else "one seed, which is one draw"
        verdict = "is told from none" if r.p < 0.05 else "is not told from none"
        return (
            f"{r.name} against the distance to the border, free of log LR: rank correlation {r.partial:.2f} "
            f"({r.interval}), p = {r.p:.2g}; it {verdict}. {r.cells} cells over {seeds} tell {r.least:.2f} or more."
        )


def findings(store: Store, thresholds: Thresholds) -> Findings:
    """Relations of held-out loss and of every task's score with the distance.

    Raises:
        ValueError: no border, or no probe.
    """
    distance = cell_distances(store, thresholds)
    grid = store.run.cells
    assert isinstance(grid, Grid)
    if "val_loss" not in store:
        raise ValueError(f"{store.path} has no val_loss; expected the probe: sweep again into another --store")
    given, relations, resolutions, left_out = rate_ranks(grid), [], [], []
    shown: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    tasks = stored_tasks(store)
    known = measured(store.labels(thresholds)) & np.isfinite(distance)
    for task in tasks:
        known &= task.done & np.isfinite(task.read(task.measure))
    known &= np.isfinite(store.read("val_loss"))
    seeds = known.any((1, 2))
    cells = known[seeds].all(0) & seeds.any()
    if not cells.any():
        raise ValueError(f"{store.path} has no cell with a loss and a score of every task; expected some: score cells")
    wanted = [(LOSS, store.read("val_loss")[seeds][:, cells].astype(float), False)]
    for task in tasks:
        by_item = task.measures[task.measure]
        name = task.measure + (BY_ITEM if by_item else "")
        wanted.append((task.task, task.at(name, cells)[seeds[: task.stored]].astype(float), by_item))
    together = [values for name, values, by_item in wanted if by_item and not name.startswith(OTHER_FORMS)]
    if len(together) > 1:
        wanted.append((f"all {len(together)} tasks", np.concatenate(together, axis=-1), True))
    for name, values, by_item in wanted:
        shown[name] = distance[cells], values.mean(-1) if by_item else values
        if by_item and cells.sum() > 1 and set(np.unique(values)) <= {0.0, 1.0}:
            resolutions.append(resolution(name, values))
        try:
            relations.append(relation(name, distance[cells], given[:, cells], values, by_item))
        except ValueError as error:
            left_out.append(str(error))
    return Findings(distance, tuple(relations), tuple(resolutions), shown, tuple(left_out))


def draw(found: Findings, store: Store, size: str, path: Path) -> Path:
    """Scores and loss against the distance, a panel each; the path."""
    from matplotlib import rc_context

    caption = " ".join([*(each.sentence() for each in found.resolutions), *(f"{each}." for each in found.left_out)])
    with rc_context(style(size)):
        figure, panels = side_by_side(len(found.shown), size, "Scores and the distance to the border", caption)
        for axes, (name, (distance, values)) in zip(panels, found.shown.items(), strict=True):
            told = next((each for each in found.relations if each.name == name), None)
            mean, spread = values.mean(0), values.std(0)
            axes.errorbar(distance, mean, spread if len(values) > 1 else None, fmt="o", ms=3, lw=0.6, color="#1f4e79")
            axes.axvline(0, color="#888888", lw=0.8)
            words = f"\nρ {told.partial:.2f} ({told.interval}), p {told.p:.2g}" if told else ""
            axes.set_xlabel("decades inside the border" + words)
            axes.set_title(name)
            axes.spines[["top", "right"]].set_visible(False)
        return save(figure, path)


@dataclass(frozen=True, kw_only=True)
class Options(Labelling, Picture):
    """Which store to read."""

    store: str  # path of the sweep's store, some of whose cells are scored


def table(found: Findings) -> Table:
    """Every relation in a row."""
    made = Table(box=None, pad_edge=False)
    for name in ("of", "cells", "seeds", "items", "rank correlation", "free of log LR", "95%", "p", "told from"):
        made.add_column(name, no_wrap=True)
    for r in found.relations:
        counts = str(r.cells), str(r.seeds), str(r.items or "")
        interval, least = r.interval.removeprefix("95% "), f"{r.least:.2f}"
        made.add_row(r.name, *counts, f"{r.plain:.2f}", f"{r.partial:.2f}", interval, f"{r.p:.3g}", least)
    return made


def main() -> None:
    """Print the relations, what the items can tell, and draw them."""
    options = parse(Options, "Whether scores depend on the distance to the border of training, free of log LR.")
    with user_errors():
        options.check()
        store = open_store(options.store)
        found = findings(store, options.thresholds)
        if not found.relations:
            raise ValueError(f"{store.path}: {'; '.join(found.left_out)}")
        console = screen(soft_wrap=True)
        screen(width=130).print(table(found))
        for sentence in (found.sentence(), *(each.sentence() for each in found.resolutions)):
            console.print(sentence)
        for reason in found.left_out:
            console.print(reason)
        console.print(f"picture: {draw(found, store, options.size, options.path(store.figures / 'distance.png'))}")


if __name__ == "__main__":
    main()
