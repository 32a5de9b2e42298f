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

from analysis.axes import number
from analysis.boundary import Critical, critical, lines
from analysis.classify import Labelling, classify, measured, trains
from analysis.early_warning import (
    NEAR,
    SIGNS,
    SURE,
    EarlyWarning,
    draw_early,
    early_table,
    early_warning,
    near_boundary,
)
from analysis.panels import TEXT, save
from analysis.power_law import HeldOut, PowerLaw, held_out, power_law
from engine.command import parse, screen, user_errors
from engine.outcome import CONVERGED
from engine.plan import needs_horizon
from engine.store import Replicate, open_map

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import XAxis

SAFE = 0.5  # the rule of thumb: this share of the critical rate is safe


@dataclass(frozen=True)
class Safety:
    """What happens at SAFE times a critical rate, over the lines that have one."""

    runs: int  # measured runs at or below it
    trained: float  # share of them that did not break
    at_it: float  # share of lines that did not break at the highest rate at or below it
    converged: float  # share of lines whose run there converged


def safety(store: Replicate, codes: np.ndarray, found: Critical, critical_rate: np.ndarray) -> Safety:
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


def best_rates(store: Replicate, codes: np.ndarray, found: Critical) -> np.ndarray:
    """The rate of lowest held-out loss (last loss, where none is stored) of each line [line]; NaN if none trains."""
    loss = store.read("val_loss" if "val_loss" in store else "last_loss").astype(float)
    usable = lines(store.grid, trains(codes) & np.isfinite(loss))
    ordered = np.where(usable, lines(store.grid, loss), np.inf)
    return np.where(usable.any(0), found.lr.values[ordered.argmin(0)], np.nan)


@dataclass(frozen=True)
class Rules:
    """Every rule of thumb of one map."""

    critical: Critical
    law: PowerLaw
    held_out: HeldOut
    safe_measured: Safety
    safe_predicted: Safety
    best: np.ndarray  # [line]
    shared: bool  # whether columns are measured on the same runs
    early: tuple[EarlyWarning, ...]  # over the whole map, and over cells near the boundary; empty without traces


def rules(store: Replicate, codes: np.ndarray) -> Rules:
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
    traced = "losses" in store and store.planned_steps.max() >= 3
    return Rules(
        found,
        law,
        unseen,
        safety(store, codes, found, found.value),
        safety(store, codes, found, unseen.predicted),
        best_rates(store, codes, found),
        found.other.name == "tokens" and not needs_horizon(store.run),
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
            f"holds for one seed{' and for columns measured on the same runs' * r.shared}; sweep the seed, or run "
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


def round_ticks(axis: "XAxis") -> None:
    """Ticks of a logarithmic axis at decades, or at 1, 2 and 5 where there are few."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0,) if high > 300 * low else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axis.set_minor_formatter(NullFormatter())


def draw(store: Replicate, r: Rules, pdf: bool) -> list[Path]:
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
        store = open_map(options.store, options.replicate)
        if options.early_warning and "losses" not in store:
            raise ValueError(
                f"{store.path} holds no loss traces; sweep with --trace on, or give --no-early-warning for the rest"
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


if __name__ == "__main__":
    main()
