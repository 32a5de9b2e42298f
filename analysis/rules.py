"""Rules of thumb from a learning-rate map, as sure as its seeds make them: `uv run analysis/rules.py --store S`.

Where does training break (LR90, LR50 of P(train) over replicates), which rate is best and how does it move with the
other axis, which rate is safe, how much does the rate matter, and how soon do the first losses tell how a run ends.
Every law stands beside the constant, and none is printed that the data do not carry (analysis/laws.py).
"""

if __name__ == "__main__" and not __package__:
    import started  # noqa: F401  says how to start it where its packages are missing

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table

from analysis.axes import number
from analysis.boundary import is_rate, learning_rate_axis
from analysis.classify import Limits
from analysis.early_warning import FEWEST_RUNS, SIGNS, SURE, EarlyWarning, draw_early, early_table, early_warning
from analysis.panels import Picture, legend_below, save, side_by_side, style
from engine.command import parse, screen, user_errors
from engine.grid import Axis, Grid
from engine.outcome import Thresholds, measured, trains
from engine.store import Store, open_store

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import XAxis

    from analysis.laws import BestRates, Estimate, Law, Safe
    from analysis.replicates import Borders

MOST_COLUMNS = 32  # that rules are made of, evenly spread: on an axis of tokens those between are of the same runs


@dataclass(frozen=True)
class Turned:
    """A store's replicates with the learning rate first: arrays [seed, rate, col]."""

    lr: Axis
    other: Axis
    trains: np.ndarray
    known: np.ndarray
    loss: np.ndarray  # held-out loss, NaN where not measured or broken
    start: np.ndarray  # [seed] held-out loss of the untrained weights, NaN where none is stored

    def spread(self) -> "Turned":
        """The same with at most MOST_COLUMNS of its columns."""
        at = self.other.values
        some = np.unique(np.linspace(0, len(at) - 1, MOST_COLUMNS).round().astype(int))
        other = replace(self.other, points=len(some), stored=at[some])
        good, known, loss = (array[..., some] for array in (self.trains, self.known, self.loss))
        return Turned(self.lr, other, good, known, loss, self.start)


def turned(store: Store, thresholds: Thresholds) -> Turned:
    """Outcomes and losses of every seed, rate and column.

    Raises:
        ValueError: a list of points, no learning-rate axis, or a map of two rates.
    """
    grid = store.run.cells
    if not isinstance(grid, Grid):
        raise ValueError(f"{store.path} holds a list of points; expected a grid with a learning-rate axis")
    first = learning_rate_axis(grid) == 0
    lr, other = (grid.y, grid.x) if first else (grid.x, grid.y)
    if is_rate(other):
        raise ValueError(
            f"{store.path} maps {lr.name} against {other.name}; rules need a map of a learning rate against something "
            "else, such as tokens"
        )
    codes = store.labels(thresholds)
    good, known = trains(codes), measured(codes)
    loss = store.read("val_loss" if "val_loss" in store else "last_loss").astype(float)
    loss = np.where(known & good, loss, np.nan)
    start = np.full(len(codes), np.nan)
    if "val_first" in store:
        first_loss = np.where(known, store.read("val_first"), np.nan).reshape(len(codes), -1)
        start = np.array([np.nanmax(each) if np.isfinite(each).any() else np.nan for each in first_loss])
    if not first:
        good, known, loss = (array.swapaxes(1, 2) for array in (good, known, loss))
    return Turned(lr, other, good, known, loss, start)


@dataclass(frozen=True)
class Rules:
    """Every rule of thumb of one store; what the seeds do not carry is None, and why in `refused`."""

    found: Turned
    borders: "Borders | None"
    critical: "Law | None"
    best: "BestRates | None"
    best_law: "Law | None"
    safe: "Safe | None"
    sensitivity: "tuple[Estimate, float] | None"  # nat, and the lowest rate of the decades
    early: EarlyWarning | None  # of the first replicate, where it has traces
    refused: tuple[str, ...]

    @property
    def seeds(self) -> int:
        """Replicates behind it."""
        return len(self.found.trains)


def rules(store: Store, thresholds: Thresholds) -> Rules:
    """All rules of thumb that a store carries.

    Raises:
        ValueError: as `turned`, or rates that are not positive.
    """
    # scipy and numba take a second to import, which --help need not wait for
    from analysis import laws
    from analysis.replicates import FEWEST_SEEDS, borders

    found, refused = turned(store, thresholds).spread(), []
    at, log = found.other.values, found.lr.values > 0
    rates, good, known, loss = found.lr.values[log], found.trains[:, log], found.known[:, log], found.loss[:, log]
    seeds, crossing, critical, best, best_law, safe, sensitivity = len(loss), None, None, None, None, None, None
    levels = tuple(level for level in (0.5, 0.9) if seeds >= FEWEST_SEEDS[level])
    if len(rates) < 4:
        refused.append(f"{len(rates)} rates; 4 are needed")
    else:
        best, safe = laws.best_rates(rates, loss), laws.safe_rates(rates, loss)
        if levels:
            crossing = borders(rates, good, known, levels=levels)
        if seeds < max(FEWEST_SEEDS.values()):
            refused.append(f"{seeds} seeds; LR50 needs {FEWEST_SEEDS[0.5]}, LR90 {FEWEST_SEEDS[0.9]}")
        if len(at) >= laws.FEWEST_COLUMNS and at.min() > 0:
            best_law = laws.best_rate_law(at, best)
            critical = laws.critical_rate_law(at, crossing) if crossing else None
        sensitivity = sensitivity_of(rates, loss, found.start, best)
    early = None
    if "losses" in store and store.run.config.swept.trace == "on":
        early = early_warning(store.replicate(0), store.replicate(0).labels(thresholds))
    return Rules(found, crossing, critical, best, best_law, safe, sensitivity, early, tuple(refused))


def sensitivity_of(
    rates: np.ndarray, loss: np.ndarray, start: np.ndarray, best: "BestRates"
) -> "tuple[Estimate, float] | None":
    """LR sensitivity over the three decades around the median best rate, mean over columns; None where those have
    not been swept by two rates."""
    from analysis import laws

    widest = math.log10(rates[-1] / rates[0])
    middle = np.nanmedian(best.rate) if np.isfinite(best.rate).any() else math.nan
    if widest < laws.DECADES or not np.isfinite(start).all() or not np.isfinite(middle):
        return None
    lowest = float(np.clip(middle / 10 ** (laws.DECADES / 2), rates[0], rates[-1] / 10**laws.DECADES))
    if laws.within_decades(rates, lowest).sum() < 2:  # rates so coarse that the decades lie between two of them
        return None
    return laws.over_seeds(laws.sensitivity(rates, loss, start, lowest).mean(1)), lowest


# ---- in words


def estimate_words(found: "Estimate", form: str = ".3g") -> str:
    """A value with its interval, or without one."""
    interval = f" [{found.low:{form}}, {found.high:{form}}]" if math.isfinite(found.low) else ", no interval"
    return f"{found.value:{form}}{interval}"


def law_words(law: "Law", lr: str, other: str) -> str:
    """A power law, or why there is none, beside the constant."""
    if law.refused:
        return f"no law: {law.refused}; exponent {estimate_words(law.exponent)} all the same"
    scale = math.exp(law.level.value)
    return (
        f"{lr} = {scale:.3g} * ({other} / {law.centre:.3g})^{law.exponent.value:.3f}, exponent "
        f"{estimate_words(law.exponent, '.3f')}; ten times the {other}, {law.ten_times:.2f} x the rate; curvature "
        f"{estimate_words(law.curvature, '.2g')}; on columns left out off by {law.error_columns[0]:.2f}x, the constant "
        f"{law.error_columns[1]:.2f}x"
    )


def column_words(values: np.ndarray, low: np.ndarray, high: np.ndarray, top: float) -> str:
    """One level's rate of every column, bounds said as such."""

    def one(value: float, below: float, above: float) -> str:
        if math.isinf(value):
            return f">{top:.3g}"
        if value == 0:
            return "below the best"
        upper = f"{above:.3g}" if math.isfinite(above) else "..."
        return f"{value:.3g} [{below:.3g}, {upper}]"

    return "  ".join(one(*each) for each in zip(values, low, high, strict=True))


def sentences(r: Rules) -> list[tuple[str, str]]:
    """The rules in words: (name, what it says)."""
    from analysis import laws

    lr, other = r.found.lr.name, r.found.other.name
    draws = "one seed, one draw: more with --replicates" if r.seeds == 1 else f"{r.seeds} seeds"
    said = [("from", f"{draws}; {len(r.found.lr.values)} rates by {len(r.found.other.values)} of {other}")]
    shown = np.unique(np.linspace(0, len(r.found.other.values) - 1, 6).round().astype(int))
    said.append((f"at {other}", "  ".join(f"{r.found.other.values[i]:.3g}" for i in shown)))
    if r.best is not None:
        log_best = np.log(r.best.rate[:, shown])
        edge = (r.best.edge[:, shown] != 0).mean(0) >= 0.5
        texts = [
            "on the edge" if at_edge else f"{math.exp(laws.over_seeds(column).value):.3g}"
            for column, at_edge in zip(log_best.T, edge, strict=True)
        ]
        said.append(("best rate", "  ".join(texts) + ("  (widen " + lr + ")" if edge.any() else "")))
    if r.safe is not None:
        texts = [f"{value:.3g}" if math.isfinite(value) else "none" for value in r.safe.rate[shown]]
        said.append(
            (
                "safe rate",
                "  ".join(texts)
                + f"  (within {laws.SAFE_NAT} nat of its own best in {r.seeds} of {r.seeds} seeds, which "
                f"supports {r.safe.supported:.0%} of seeds)",
            )
        )
    if r.borders is not None:
        for i, level in enumerate(r.borders.levels):
            rate, low, high = (array[i, shown] for array in (r.borders.rate, r.borders.low, r.borders.high))
            said.append((f"LR{100 * level:.0f}", column_words(rate, low, high, r.borders.highest)))
        again = sum(bool(islands) for islands in r.borders.islands[0])
        said.append(
            ("islands", f"above LR50 half of the runs train again in {again} of {len(r.borders.start)} columns")
        )
    if r.best_law is not None:
        said.append(("best-rate law", law_words(r.best_law, lr, other)))
        known = ", ".join(f"{value:+g} ({where})" for where, value in laws.PUBLISHED.items())
        said.append(("", f"published exponents, of opposite sign: {known}"))
    if r.critical is not None:
        said.append(("critical-rate law", law_words(r.critical, lr, other)))
    if r.critical is not None and r.borders is not None:
        unbounded, columns = int(np.isinf(r.borders.high[0]).sum()), len(r.borders.start)
        if unbounded:
            said.append(("", f"approximate, rather too wide: LR50 is open above in {unbounded} of {columns} columns"))
    if r.sensitivity is not None:
        value, lowest = r.sensitivity
        decades = f"{lowest:.2g} to {lowest * 10**laws.DECADES:.2g}"
        said.append(("sensitivity", f"{estimate_words(value)} nat over {lr} from {decades} (arXiv:2309.14322)"))
    if r.early is not None:
        alone, gained = r.early.areas[SIGNS[3]][0], r.early.gained
        soon = f"{r.early.soon} losses tell" if r.early.soon else "no number of first losses tells"
        text = f"{soon} how a run ends with ROC area {SURE:g}; the learning rate alone {alone:.3f}, signs gain at "
        text += f"most {gained:+.3f} (first seed)"
        if not r.early.counted.any():
            text = f"not judged: never do {FEWEST_RUNS} runs of the first seed go on for long enough"
        said.append(("early warning", text))
    said += [("not said", reason) for reason in r.refused]
    return said


def mean_rates(rate: np.ndarray) -> np.ndarray:
    """Geometric mean over seeds [col] of rates [seed, col], NaN where no seed has one."""
    known = np.isfinite(rate)
    logs = np.log(np.where(known, rate, 1)).sum(0)
    return np.where(known.any(0), np.exp(logs / np.maximum(known.sum(0), 1)), np.nan)


# ---- the picture


def draw_rates(axes: "Axes", r: Rules) -> None:
    """Best rates of every seed and their mean, crossings of P(train) with their intervals, safe rates.

    Intervals of the two levels stand beside each other; one that the seeds leave open ends in an arrow.
    """
    x, top = r.found.other.values, r.found.lr.high
    bottom = r.found.lr.values[r.found.lr.values > 0].min()
    aside = (x[1] / x[0]) ** 0.12 if len(x) > 1 else 1.0
    if r.best is not None:
        axes.plot(x, r.best.rate.T, ".", ms=3, color="#9aa7b5", zorder=1)
        axes.plot(x, mean_rates(r.best.rate), "o-", ms=3.5, lw=1, color="black", label="best")
    if r.safe is not None:
        axes.plot(x, r.safe.rate, "s--", ms=3, lw=1, color="#2a6ad4", label="safe")
    if r.borders is not None:
        levels = zip(r.borders.levels, ("#5f0f12", "#d24b12"), (1 / aside, aside), strict=False)
        for i, (level, colour, shift) in enumerate(levels):
            value, low, high = (array[i] for array in (r.borders.rate, r.borders.low, r.borders.high))
            inside = np.isfinite(value) & (value > 0)
            axes.plot(x[inside], value[inside], "-", lw=1.3, color=colour, label=f"P = {level:g}")
            beside, ends = x[inside] * shift, (low[inside].clip(bottom), high[inside].clip(max=top))
            axes.vlines(beside, *ends, color=colour, lw=0.8)
            for marker, end, open_end in (("v", ends[0], low[inside] < bottom), ("^", ends[1], high[inside] > top)):
                axes.plot(beside[open_end], end[open_end], marker, ms=3, color=colour)
            axes.plot(x[np.isinf(value)], np.full(np.isinf(value).sum(), top), "^", ms=4, color=colour)
    axes.set(xscale="log", yscale="log", xlabel=r.found.other.long_name, ylabel=r.found.lr.long_name)
    axes.set_title("Best, safe and critical rate")
    if handles := axes.get_legend_handles_labels()[0]:
        legend_below(axes, handles)


def round_ticks(axis: "XAxis") -> None:
    """Ticks of a logarithmic axis at decades, or at 1, 2 and 5 where there are few."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0,) if high > 300 * low else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axis.set_minor_formatter(NullFormatter())


def draw(r: Rules, path: Path, size: str) -> Path:
    """Write the picture of the rules; the path."""
    from matplotlib import rc_context

    count, seeds = (1 if r.early is None else 2), f"{r.seeds} seeds" if r.seeds > 1 else "one seed, one draw"
    title = f"{r.found.lr.long_name.capitalize()} by {r.found.other.long_name}, {seeds}"
    with rc_context(style(size)):
        figure, panels = side_by_side(count, size, title, f"{'. '.join(r.refused)}." if r.refused else "")
        draw_rates(panels[0], r)
        if r.early is not None:
            draw_early(panels[1], r.early, "Early warning, first seed")
        for panel in panels:
            round_ticks(panel.xaxis)
            panel.spines[["top", "right"]].set_visible(False)
        return save(figure, path)


@dataclass(frozen=True, kw_only=True)
class Options(Limits, Picture):
    """Which map to read."""

    store: str  # path of the sweep's store


def main() -> None:
    """Print the rules and draw them."""
    options = parse(Options, "Rules of thumb from a learning-rate map, with intervals over its seeds.")
    with user_errors():
        options.check()
        store = open_store(options.store)
        found = rules(store, options.thresholds)
        table = Table(title=f"rules of thumb: {store.path}", show_header=False, title_justify="left", box=None)
        for row in sentences(found):
            table.add_row(*row)
        console = screen()
        console.print(table)
        if found.early is not None:
            console.print(
                early_table(found.early, "ROC area, first seed, runs alive and 20 steps or more from their end")
            )
        picture = draw(found, options.path(store.figures / "rules.png"), options.size)
        console.print(f"picture: {picture}", soft_wrap=True)


if __name__ == "__main__":
    main()
