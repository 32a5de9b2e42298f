"""Rules of thumb from a learning-rate map: `uv run analysis/rules.py --store S`.

Where does training break (critical rate of each column, as a power law of the tokens), how well does
that predict columns it has not seen, is half of it safe, how near to it lies the best rate, and how
soon do the first losses of a run tell how it will end.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table

from analysis.boundary import Critical, critical, lines
from analysis.classify import Labelling, classify, measured, planned_steps, trains
from analysis.plot import TEXT, number, save
from engine.command import parse, screen, user_errors
from engine.outcome import CONVERGED
from engine.plan import looks_ahead
from engine.store import Store, open_store

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import XAxis

FEWEST = 4  # bracketed columns below which nothing is fitted
DRAWS = 2000  # bootstrap draws
SAFE = 0.5  # the rule of thumb: this share of the critical rate is safe
NEAR = 4.0  # a cell is near the boundary within this factor of its column's critical rate
SURE = 0.95  # area under the ROC curve from which a sign counts as sure
FEWEST_RUNS = 50  # runs below which an area is not counted on
SIGNS = ("last", "highest", "jump", "learning rate alone")


# ---- the power law of the critical rate


@dataclass(frozen=True)
class PowerLaw:
    """critical rate = scale * at^exponent, with 95% bootstrap intervals."""

    at: np.ndarray  # [line] values of the other axis
    fitted: np.ndarray  # [line] the law at each
    low: np.ndarray  # [line] confidence band
    high: np.ndarray
    scale: float
    exponent: float
    exponent_low: float
    exponent_high: float


def bracketed_lines(found: Critical) -> np.ndarray:
    """Indices of the lines a law can be fitted to.

    Raises:
        ValueError: fewer than FEWEST, or an axis with values that are not positive.
    """
    lines = np.flatnonzero(found.bracketed)
    if len(lines) < FEWEST:
        raise ValueError(
            f"the boundary is bracketed in {len(lines)} of {found.other.points} lines along {found.other.name}, "
            f"a power law needs {FEWEST}; widen the range of {found.lr.name}"
        )
    if found.other.low <= 0:
        raise ValueError(f"{found.other.name} starts at {found.other.low:g}; a power law needs values above 0")
    return lines


def power_law(found: Critical) -> PowerLaw:
    """Least squares of log critical rate on log value of the other axis, over bracketed lines.

    Each bootstrap draw takes the lines with replacement and a place, log-uniform, within each one's
    bracket, so the interval holds both the scatter of the lines and the spacing of the grid. It is of one
    seed, and of lines that may be read off the same runs: another seed's law often lies outside.

    Raises:
        ValueError: too few bracketed lines.
    """
    chosen = bracketed_lines(found)
    x, at = np.log(found.other.values[chosen]), np.log(found.other.values)
    low, high = np.log(found.below[chosen]), np.log(found.above[chosen])
    exponent, intercept = np.polyfit(x, (low + high) / 2, 1)
    random = np.random.default_rng(0)
    picked = random.integers(len(x), size=(DRAWS, len(x)))
    drawn_x = x[picked]
    drawn_y = low[picked] + (high - low)[picked] * random.random(picked.shape)
    varied = np.ptp(drawn_x, axis=1) > 0
    slopes, levels = straight_lines(drawn_x[varied], drawn_y[varied])
    band = np.percentile(slopes[:, None] * at + levels[:, None], (2.5, 97.5), axis=0)
    bounds = np.percentile(slopes, (2.5, 97.5))
    return PowerLaw(
        at=found.other.values,
        fitted=np.exp(exponent * at + intercept),
        low=np.exp(band[0]),
        high=np.exp(band[1]),
        scale=math.exp(intercept),
        exponent=float(exponent),
        exponent_low=float(bounds[0]),
        exponent_high=float(bounds[1]),
    )


def straight_lines(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slope and intercept [draw] of the least-squares line through each draw's points [draw, point]."""
    centred = x - x.mean(1, keepdims=True)
    slopes = (centred * y).sum(1) / (centred**2).sum(1)
    return slopes, y.mean(1) - slopes * x.mean(1)


@dataclass(frozen=True)
class HeldOut:
    """How far the law is from lines it was not fitted to: factors >= 1, and its prediction for each line."""

    predicted: np.ndarray  # [line] by the law of all other bracketed lines
    left_out: np.ndarray  # [bracketed line] factor between that and the measured rate
    ahead: np.ndarray  # [larger half of the bracketed lines] factor by the law of the smaller half


def held_out(found: Critical) -> HeldOut:
    """Leave each line out in turn; and predict the larger half of the lines from the smaller.

    Raises:
        ValueError: too few bracketed lines.
    """
    chosen = bracketed_lines(found)
    at, x, y = np.log(found.other.values), np.log(found.other.values[chosen]), np.log(found.value[chosen])
    predicted = np.empty(len(at))
    for line in range(len(at)):
        others = chosen != line
        predicted[line] = np.polyval(np.polyfit(x[others], y[others], 1), at[line])
    half = len(x) // 2
    ahead = np.polyval(np.polyfit(x[:half], y[:half], 1), x[half:])
    return HeldOut(np.exp(predicted), np.exp(np.abs(predicted[chosen] - y)), np.exp(np.abs(ahead - y[half:])))


# ---- safe and best rates


@dataclass(frozen=True)
class Safety:
    """What happens at SAFE times a critical rate, over the lines that have one."""

    runs: int  # measured runs at or below it
    trained: float  # share of them that did not break
    at_it: float  # share of lines that did not break at the highest rate at or below it
    converged: float  # share of lines whose run there converged


def safety(store: Store, codes: np.ndarray, found: Critical, critical_rate: np.ndarray) -> Safety:
    """Share of runs under SAFE x `critical_rate` [line] that train.

    With the measured rates the share is 1 by definition (they are the first that break); with rates
    predicted from other lines it is a test.
    """
    cells, known = lines(store.grid, codes), lines(store.grid, measured(codes))
    good = trains(cells)
    under = known & (found.lr.values[:, None] <= SAFE * critical_rate)
    some = np.flatnonzero(under.any(0))
    top = found.lr.points - 1 - under[::-1].argmax(0)
    return Safety(
        int(under.sum()),
        float(good[under].mean()) if len(some) else math.nan,
        float(good[top[some], some].mean()) if len(some) else math.nan,
        float((cells[top[some], some] == CONVERGED).mean()) if len(some) else math.nan,
    )


def best_rates(store: Store, codes: np.ndarray, found: Critical) -> np.ndarray:
    """The rate of lowest held-out loss (last loss, where none is stored) of each line [line]; NaN if none trains."""
    loss = store.read("val_loss" if "val_loss" in store else "last_loss").astype(float)
    usable = lines(store.grid, trains(codes) & np.isfinite(loss))
    ordered = np.where(usable, lines(store.grid, loss), np.inf)
    return np.where(usable.any(0), found.lr.values[ordered.argmin(0)], np.nan)


# ---- early warning


@dataclass(frozen=True)
class EarlyWarning:
    """How surely the first losses tell whether a run breaks, as areas under the ROC curve."""

    first: np.ndarray  # [k] how many losses were looked at
    runs: np.ndarray  # [k] measured runs longer than that
    decided: np.ndarray  # [k] share of the runs that break which are not finite by then
    areas: dict[str, np.ndarray]  # [k] for each of SIGNS; 0.5 is a coin, NaN where all end alike

    @property
    def soon(self) -> int | None:
        """The fewest losses from which the best sign stays sure; None if never.

        Looked at are counts that FEWEST_RUNS runs or more outlast, up to half the longest run: one that is sure
        by chance, or near the end of the few longest runs, warns of nothing.
        """
        best = np.nanmax([self.areas[name] for name in SIGNS[:3]] + [np.zeros(len(self.first))], axis=0)
        counted = (self.runs >= FEWEST_RUNS) & (self.first <= (self.first[-1] + 1) / 2)
        stays = np.logical_and.accumulate(best[counted][::-1] >= SURE)[::-1]
        return int(self.first[counted][stays][0]) if stays.any() else None


def early_warning(store: Store, codes: np.ndarray, chosen: np.ndarray | None = None) -> EarlyWarning:
    """Areas under the ROC curve of simple signs in the first k losses, against the final label.

    Signs: the k-th loss and the highest of the first k, both over the first; the largest rise in one
    step; and, as the baseline, the learning rate alone. A non-finite loss counts as the highest value.
    Only runs longer than k steps are looked at.

    Args:
        chosen: bool [row, col], cells to look at; default all measured.

    Raises:
        ValueError: the store holds no traces, or its runs are shorter than three steps.
    """
    if "losses" not in store:
        raise ValueError(f"{store.path} holds no loss traces; early warning needs a sweep with --trace on")
    longest = int(planned_steps(store).max())
    first = np.unique(np.geomspace(2, max(longest - 1, 2), 14).round().astype(int))
    first = first[first < longest]
    if not len(first):
        raise ValueError(f"the longest run of {store.path} has {longest} steps; early warning needs at least 3")
    cells = measured(codes) if chosen is None else measured(codes) & chosen
    broke, planned = ~trains(codes)[cells], planned_steps(store)[cells]
    rate = np.broadcast_to(rates(store), codes.shape)[cells]
    # no more than the first k losses of each run are needed, and non-finite is the highest of all
    losses = store.read("losses")[cells][:, : first[-1]].astype(np.float64)
    losses[~np.isfinite(losses)] = np.inf
    with np.errstate(invalid="ignore"):
        ratio = losses / losses[:, :1]
        rise = np.diff(ratio, axis=1)
    rise[~np.isfinite(rise)] = np.inf
    areas: dict[str, list[float]] = {name: [] for name in SIGNS}
    runs, decided = [], []
    for k in first:
        long = planned > k
        signs = (ratio[:, k - 1], ratio[:, :k].max(1), rise[:, : k - 1].max(1), rate)
        for name, sign in zip(SIGNS, signs, strict=True):
            areas[name].append(roc_area(sign[long], broke[long]))
        runs.append(long.sum())
        stopped = np.isinf(losses[:, k - 1]) & long & broke
        decided.append(stopped.sum() / max((long & broke).sum(), 1))
    return EarlyWarning(first, np.array(runs), np.array(decided), {name: np.array(a) for name, a in areas.items()})


def rates(store: Store) -> np.ndarray:
    """The swept learning rate, broadcasting to [row, col]."""
    found = critical(store.grid, np.zeros(store.grid.shape, np.uint8))
    return found.lr.values[:, None] if found.lr == store.grid.y else found.lr.values


def near_boundary(store: Store, found: Critical) -> np.ndarray:
    """Cells within a factor NEAR of their line's critical rate, bool [row, col]."""
    with np.errstate(invalid="ignore"):
        close = np.abs(np.log(found.lr.values[:, None] / found.value)) <= math.log(NEAR)
    return lines(store.grid, close)


def roc_area(sign: np.ndarray, broke: np.ndarray) -> float:
    """Chance that a run that breaks shows more of the sign than one that does not, ties half; NaN without both."""
    yes, no = np.sort(sign[broke]), np.sort(sign[~broke])
    if not len(yes) or not len(no):
        return math.nan
    below = np.searchsorted(no, yes, "left") + np.searchsorted(no, yes, "right")
    return float(below.mean() / 2 / len(no))


# ---- all of them


@dataclass(frozen=True)
class Rules:
    """Every rule of thumb of one map."""

    critical: Critical
    law: PowerLaw
    held_out: HeldOut
    safe_measured: Safety
    safe_predicted: Safety
    best: np.ndarray  # [line]
    shared: bool  # whether columns are read off the same runs
    early: tuple[EarlyWarning, ...]  # over the whole map, and over cells near the boundary; empty without traces


def rules(store: Store, codes: np.ndarray) -> Rules:
    """All rules of thumb; without stored traces there is no early warning.

    Raises:
        ValueError: no learning-rate axis, or too few lines with a bracketed boundary.
    """
    found = critical(store.grid, codes)
    if found.other.name.startswith("lr"):
        raise ValueError(
            f"{store.path} maps {found.lr.name} against {found.other.name}; rules need a map of a learning rate "
            "against something else, such as tokens"
        )
    law, unseen = power_law(found), held_out(found)
    traced = "losses" in store and planned_steps(store).max() >= 3
    return Rules(
        found,
        law,
        unseen,
        safety(store, codes, found, found.value),
        safety(store, codes, found, unseen.predicted),
        best_rates(store, codes, found),
        found.other.name == "tokens" and not looks_ahead(store.config),
        (early_warning(store, codes), early_warning(store, codes, near_boundary(store, found))) if traced else (),
    )


def sentences(r: Rules) -> list[tuple[str, str]]:
    """The rules in words: (name, what it says)."""
    lr, other = r.critical.lr.name, r.critical.other.name
    ratio = r.best / r.critical.value
    ratio = ratio[np.isfinite(ratio)]
    said = [
        (
            "critical rate",
            f"{lr} = {r.law.scale:.3g} * {other}^{r.law.exponent:.3f}, exponent 95% {r.law.exponent_low:.3f} to "
            f"{r.law.exponent_high:.3f}, from {r.critical.bracketed.sum()} of {r.critical.other.points} columns",
        ),
        ("held-out columns", f"one left out: {factors(r.held_out.left_out)}"),
        ("", f"larger half of {other} from the smaller: {factors(r.held_out.ahead)}"),
        (
            f"{SAFE:g} x predicted",
            f"{r.safe_predicted.trained:.1%} of {r.safe_predicted.runs} runs at or under it train; at it "
            f"{r.safe_predicted.at_it:.0%} train and {r.safe_predicted.converged:.0%} converge (predicted from the "
            "other columns)",
        ),
        (
            "all of this",
            f"holds for one seed{' and for columns read off the same runs' * r.shared}; sweep the seed, or run "
            "analysis/noise.py, to see others",
        ),
    ]
    if len(ratio):
        low, middle, high = np.percentile(ratio, (0, 50, 100))
        said.append(("best rate", f"{middle:.2g} x critical in the median column ({low:.2g} to {high:.2g})"))
    for name, early in zip(("early warning", f"within {NEAR:g}x of critical"), r.early, strict=False):
        soon = f"{early.soon} losses tell" if early.soon else "no number of first losses tells"
        alone = early.areas[SIGNS[3]][0]
        said.append((name, f"{soon} the label with ROC area {SURE:g}; the learning rate alone {alone:.3f}"))
    return said


def factors(found: np.ndarray) -> str:
    """Held-out factors in words."""
    within = (found <= 2).mean()
    return f"off by {np.median(found):.2f}x in the median, {found.max():.2f}x at most; {within:.0%} within 2x"


# ---- the picture


def draw_rates(axes: "Axes", r: Rules) -> None:
    """Critical rates with their brackets, the law with its band, the best rates."""
    found, law, x = r.critical, r.law, r.critical.other.values
    chosen = found.bracketed
    axes.fill_between(x, law.low, law.high, color="#b9d3ec", lw=0, label="95% band")
    axes.plot(x, law.fitted, color="#0b559f", lw=1.3, label=f"critical, power {law.exponent:.2f}")
    axes.plot(x, SAFE * law.fitted, color="#0b559f", lw=1, ls="--", label=f"{SAFE:g} x critical")
    axes.vlines(x[chosen], found.below[chosen], found.above[chosen], color="#a6231c", lw=1.6, label="bracket")
    axes.plot(x, r.best, "o", ms=3.5, mfc="white", mec="black", mew=0.8, label="best")
    axes.set(xscale="log", yscale="log", xlabel=found.other.name, ylabel=found.lr.name)
    axes.set_title("Critical and best rate", loc="left", fontweight="bold", fontsize=9.5)
    axes.legend(frameon=False, fontsize=7.5)


def draw_early(axes: "Axes", early: EarlyWarning, title: str) -> None:
    """ROC areas against the number of losses looked at."""
    styles = (("#0b559f", "-"), ("#5ba3d0", "-"), ("#fd8d3c", "-"), ("#555555", "--"))
    for name, (colour, line) in zip(SIGNS, styles, strict=True):
        axes.plot(early.first, early.areas[name], line, color=colour, marker="o", ms=3, lw=1.3, label=name)
    axes.axhline(0.5, color="#999999", lw=0.8, ls=":")
    axes.text(early.first[-1], 0.505, "coin", ha="right", va="bottom", fontsize=7, color="#777777")
    axes.set(xscale="log", ylim=(min(0.42, np.nanmin(list(early.areas.values())) - 0.02), 1.02))
    axes.set(xlabel="first losses seen", ylabel="ROC area")
    axes.set_title(title, loc="left", fontweight="bold", fontsize=9.5)
    axes.legend(frameon=False, fontsize=7.5, loc="best")


def round_ticks(axis: "XAxis") -> None:
    """Ticks of a logarithmic axis at decades, or at 1, 2 and 5 where there are few."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0,) if high > 300 * low else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axis.set_minor_formatter(NullFormatter())


def draw(store: Store, r: Rules, pdf: bool) -> list[Path]:
    """Write figures/rules.png (and .pdf); the paths written."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(TEXT):
        panels = 1 + len(r.early)
        figure = Figure(figsize=(4.2 * panels, 3.6), layout="constrained")
        axes = np.atleast_1d(figure.subplots(1, panels))
        draw_rates(axes[0], r)
        titles = ("Early warning, whole map", f"Within {NEAR:g}x of critical")
        for panel, early, title in zip(axes[1:], r.early, titles, strict=False):
            draw_early(panel, early, title)
        for panel in axes:
            round_ticks(panel.xaxis)
            panel.spines[["top", "right"]].set_visible(False)
        return save(figure, store.figures, "rules", pdf)


@dataclass(frozen=True, kw_only=True)
class Options(Labelling):
    """Which map to read."""

    store: str  # path of the sweep's store
    pdf: bool = False  # write a PDF beside the PNG
    early_warning: bool = True  # look at the first losses too; needs stored traces


def main() -> None:
    """Print the rules and draw them."""
    options = parse(
        Options, "Rules of thumb from a learning-rate map: critical and best rates, safe rates, early warning."
    )
    with user_errors():
        store = open_store(options.store)
        if options.early_warning and "losses" not in store:
            raise ValueError(
                f"{store.path} holds no loss traces; sweep with --trace on, or give --noearly_warning for the rest"
            )
        found = rules(store, classify(store, options.thresholds))
        table = Table(title=f"rules of thumb: {store.path}", show_header=False, title_justify="left", box=None)
        for row in sentences(found):
            table.add_row(*row)
        console = screen()
        console.print(table)
        for early, where in zip(found.early, ("whole map", f"cells within {NEAR:g}x of critical"), strict=False):
            console.print(early_table(early, f"ROC area, {where}"))
        console.print(f"pictures: {', '.join(map(str, draw(store, found, options.pdf)))}", soft_wrap=True)


def early_table(early: EarlyWarning, title: str) -> Table:
    """Early warning as numbers."""
    table = Table("first losses", "runs", *SIGNS, "already not finite", title=title, title_justify="left")
    for i, k in enumerate(early.first):
        areas = [f"{early.areas[name][i]:.3f}" for name in SIGNS]
        table.add_row(str(k), str(early.runs[i]), *areas, f"{early.decided[i]:.0%}")
    return table


if __name__ == "__main__":
    main()
