"""Laws that can fail, from what every seed says by itself: best rate, basin, safe rate, critical rate.

A replicate is one draw; the columns read off its runs are not several. So every law is fitted to each seed and
its interval is over seeds, on the log scale. It stands beside the constant, both scored on seeds and columns
that they have not seen, and beside a quadratic: where the curvature is not zero, it is not a law. A column
without a minimum or a crossing is a bound (interval-censored), not a gap.

Shapes: [seed, rate, col] for losses, [seed, col] or [draw, col] for rates.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy import special

from analysis.replicates import Borders, resampled_interval, share_at_least

FEWEST_SEEDS = 4  # below it there is no interval
FEWEST_COLUMNS = 3
BASINS = (0.01, 0.05)  # nat above the best
SAFE_NAT = 0.05
VERTEX_NAT = 0.02  # above the best, up to which the second neighbour of a swept rate still lies on its parabola
DECADES = 3.0  # of learning rates, over which the sensitivity is taken
# exponents of the best rate against tokens: of opposite sign, never one without the other
PUBLISHED = {"arXiv:2409.19913": -0.32, "arXiv:2503.04715": 0.307}


# ---- the best rate and its basin


@dataclass(frozen=True)
class BestRates:
    """The best rate of each seed and column."""

    rate: np.ndarray  # [seed, col]; NaN where nothing is finite
    edge: np.ndarray  # [seed, col] -1 or 1: the minimum lies on the lowest or highest rate swept, a bound; else 0
    index: np.ndarray  # [seed, col] of the lowest loss among the rates; 0 where nothing is finite
    loss: np.ndarray  # [seed, col] the lowest loss
    basins: np.ndarray  # [basin, 2, seed, col] lowest and highest rate of the range around it within BASINS nat
    shape: np.ndarray  # [2, seed, col] bend and skew of each basin where it was fitted (`shape_at`)

    def some(self, seeds: np.ndarray, cols: slice = slice(None)) -> "BestRates":
        """Those of some seeds (bool [seed]) and columns."""
        parts = (self.rate, self.edge, self.index, self.loss, self.basins, self.shape)
        return BestRates(*(part[..., seeds, cols] for part in parts))

    @property
    def bias(self) -> np.ndarray:
        """How far the mean over seeds of the log rate may lie from the truth for the grid being coarse [col].

        A parabola through three points of a skewed basin misses its minimum by skew / bend.
        """
        (bend, skew), narrow = self.shape.sum(1), (self.shape[0] != 0).mean(0)
        return narrow * np.divide(skew, bend, out=np.zeros(len(bend)), where=bend > 0)


def best_rates(rates: np.ndarray, loss: np.ndarray) -> BestRates:
    """The vertex of a parabola in the log rate around each seed's and column's lowest loss, and its basins.

    The parabola is fitted to the rates around the minimum within the narrower of BASINS (over the wider a skewed
    basin moves it), one a side at least and two within VERTEX_NAT, where they are finite; where it has no vertex among
    them, the swept rate of the lowest loss stands.

    Args:
        rates: [rate], ascending.
        loss: [seed, rate, col] held-out loss in nat; anything not finite is a run that broke or was not made.

    Raises:
        ValueError: fewer than 3 rates.
    """
    if len(rates) < 3:
        raise ValueError(f"got {len(rates)} rates; expected 3 or more for a best rate; sweep more rates")
    log_rate, seeds, columns = np.log(rates), loss.shape[0], loss.shape[2]
    filled = np.where(np.isfinite(loss), loss, np.inf)
    index, lowest = filled.argmin(1), filled.min(1)
    found, basins = np.full((seeds, columns), np.nan), np.full((len(BASINS), 2, seeds, columns), np.nan)
    shape = np.zeros((2, seeds, columns))
    for seed, col in np.argwhere(np.isfinite(lowest)):
        curve, at = filled[seed, :, col], index[seed, col]
        ranges = [contiguous(curve <= lowest[seed, col] + nat, at) for nat in BASINS]
        basins[:, :, seed, col] = rates[np.array(ranges)]
        near = fitted_range(curve, at, *ranges[0])
        found[seed, col] = math.exp(vertex(log_rate, curve, at, *near))
        shape[:, seed, col] = shape_at(log_rate, curve, at, *near)
    edge = np.where(index == 0, -1, np.where(index == len(rates) - 1, 1, 0))
    return BestRates(found, np.where(np.isfinite(lowest), edge, 0), index, lowest, basins, shape)


def contiguous(holds: np.ndarray, at: int) -> tuple[int, int]:
    """First and last index of the unbroken run of True [rate] around index `at`."""
    failing = np.flatnonzero(~holds)
    before, after = failing[failing < at], failing[failing > at]
    return int(before[-1]) + 1 if len(before) else 0, int(after[0]) - 1 if len(after) else len(holds) - 1


def fitted_range(curve: np.ndarray, at: int, first: int, last: int) -> tuple[int, int]:
    """First and last index of the rates that the parabola around index `at` of one curve [rate] is fitted to.

    Args:
        first, last: of the narrowest of BASINS.
    """
    near, end = contiguous(np.isfinite(curve), at)
    # on a coarse grid second neighbours lie beyond the parabola: a cliff there would move the vertex by half a step
    below, above = contiguous(curve <= curve[at] + VERTEX_NAT, at)
    return max(min(first, at - 1, max(below, at - 2)), near), min(max(last, at + 1, min(above, at + 2)), end)


def vertex(log_rate: np.ndarray, curve: np.ndarray, at: int, first: int, last: int) -> float:
    """The log rate of the vertex of the parabola through some rates around index `at` of one curve [rate]."""
    if last - first >= 2:
        x = log_rate[first : last + 1] - log_rate[at]
        bend, slope, _ = np.polyfit(x, curve[first : last + 1], 2)
        if bend > 0 and x[0] <= -slope / (2 * bend) <= x[-1]:
            return float(log_rate[at] - slope / (2 * bend))
    return float(log_rate[at])


def shape_at(log_rate: np.ndarray, curve: np.ndarray, at: int, first: int, last: int) -> tuple[float, float]:
    """Bend and skew of a basin that is fitted by the two neighbours of index `at`: nat per (log rate)^2, and nat per
    log rate by which its cubic moves the vertex, times the bend.

    The fourth point of the cubic is on the gentler side: the other may be a cliff, which says nothing of the minimum.
    Wider fits have no skew, they are within the narrowest of BASINS.
    """
    if (first, last) != (at - 1, at + 1):
        return 0.0, 0.0
    padded = np.concatenate([[np.inf] * 2, curve, [np.inf] * 2])
    sides = {at - 2: padded[at], at + 2: padded[at + 4]}
    outer = min(sides, key=lambda place: sides[place])
    x = log_rate[first : last + 1] - log_rate[at]
    bend = float(np.polyfit(x, curve[first : last + 1], 2)[0])
    if not math.isfinite(sides[outer]):
        return bend, 0.0
    some = [outer, at - 1, at, at + 1]
    cubic = float(np.polyfit(log_rate[some] - log_rate[at], curve[some], 3)[0])
    return bend, cubic * -x[0] * x[-1] / 2


# ---- power laws


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval over seeds; the interval is NaN where there are too few seeds."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether its interval does."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Law:
    """rate = exp(level) * (at / centre)^exponent, beside its rivals.

    Errors are factors >= 1 between prediction and measurement (root mean square of the log); NaN where none is left.
    """

    seeds: int
    at: np.ndarray  # [col]
    centre: float  # geometric mean of `at`
    level: Estimate
    exponent: Estimate
    curvature: Estimate  # of log rate in (log at)^2; NaN below FEWEST_COLUMNS + 1 columns
    bounds: int  # columns (of all seeds) that are bounds
    error_seeds: tuple[float, float]  # by the law and by the constant, on seeds left out
    error_columns: tuple[float, float]  # on columns left out in turn
    error_ahead: tuple[float, float]  # on the upper half of the columns from the lower

    @property
    def refused(self) -> str:
        """Why this is not printed as a law; '' where it is one."""
        if self.seeds < FEWEST_SEEDS:
            return f"{self.seeds} seeds, {FEWEST_SEEDS} are needed for any interval"
        if self.curvature.excludes_zero:
            return (
                f"the exponent is not constant: curvature {self.curvature.value:.3g} "
                f"[{self.curvature.low:.3g}, {self.curvature.high:.3g}] per (log tokens)^2"
            )
        return ""

    @property
    def ten_times(self) -> float:
        """The factor by which the rate changes where `at` is ten times as large."""
        return float(10**self.exponent.value)


def over_seeds(values: np.ndarray, bias: float = 0.0) -> Estimate:
    """Mean +- t * s / sqrt(n) of one value a seed [seed]; no interval below FEWEST_SEEDS.

    Args:
        bias: how far above the mean the truth may lie for another reason, or below where negative: the interval grows
            by it on that side, and in quadrature on the other.
    """
    values = values[np.isfinite(values)]
    n = len(values)
    mean = float(values.mean()) if n else math.nan
    half = float(-special.stdtrit(n - 1, 0.025) * values.std(ddof=1)) / math.sqrt(n) if n >= FEWEST_SEEDS else math.nan
    low, high = (half + abs(bias) if side * bias > 0 else math.hypot(half, bias) for side in (-1, 1))
    return Estimate(mean, mean - low, mean + high)


def censored_fit(design: np.ndarray, value: np.ndarray, bound: np.ndarray) -> np.ndarray:
    """Normal linear regression of each row of `value` with censored entries, by expectation-maximisation.

    Args:
        design: [col, term].
        value: [row, col]; NaN entries are left out.
        bound: [row, col] 0 for a measured value, 1 where the truth lies above it, -1 where below.

    Returns:
        coefficients [row, term]; NaN where fewer columns are measured than there are terms.
    """
    known = np.isfinite(value)
    measured = known & (bound == 0)
    inverse = np.linalg.pinv(design * known[..., None])  # [row, term, col]
    filled = np.where(known, value, 0.0)
    # bounds say something only beside enough measured columns to place a line
    enough = measured.sum(1) >= design.shape[1]
    found = np.einsum("rtc,rc->rt", inverse, filled)
    rows = np.flatnonzero(enough & (known & ~measured).any(1))
    if len(rows):
        found[rows] = expectation_maximisation(design, filled[rows], bound[rows], known[rows], inverse[rows])
    return np.where(enough[:, None], found, np.nan)


def expectation_maximisation(
    design: np.ndarray, value: np.ndarray, bound: np.ndarray, known: np.ndarray, inverse: np.ndarray
) -> np.ndarray:
    """`censored_fit` of rows that have censored entries."""
    censored, filled = known & (bound != 0), value.copy()
    found = np.einsum("rtc,rc->rt", inverse, filled)
    extra = np.zeros_like(value)  # variance of what is censored about its expectation
    for _ in range(200):
        fitted = found @ design.T
        variance = (np.where(known, (filled - fitted) ** 2 + extra, 0.0)).sum(1) / known.sum(1)
        spread = np.sqrt(np.maximum(variance, 1e-12))[:, None]
        beyond = bound * (value - fitted) / spread  # standard deviations by which the bound passes the line
        hazard = np.exp(-(beyond**2) / 2 - special.log_ndtr(-beyond)) / math.sqrt(2 * math.pi)
        filled = np.where(censored, fitted + bound * spread * hazard, value)
        extra = np.where(censored, spread**2 * np.clip(1 + beyond * hazard - hazard**2, 0, 1), 0.0)
        before, found = found, np.einsum("rtc,rc->rt", inverse, filled)
        if np.abs(found - before).max() < 1e-6:
            break
    return found


def powers(at: np.ndarray, degree: int) -> np.ndarray:
    """Powers 0 to `degree` of log at, about its mean [col, degree + 1]."""
    x = np.log(at)
    return np.vander(x - x.mean(), degree + 1, increasing=True)


def check_columns(at: np.ndarray) -> None:
    """Raises ValueError for an axis on which no power law can be fitted."""
    if len(at) < FEWEST_COLUMNS or (np.asarray(at) <= 0).any():
        raise ValueError(
            f"got {len(at)} columns from {np.min(at):g}; expected {FEWEST_COLUMNS} or more, positive, for a power law; "
            "sweep more of them"
        )


def best_rate_law(at: np.ndarray, best: BestRates) -> Law:
    """log best rate = level + exponent * log at in each seed, then over seeds.

    Raises:
        ValueError: fewer than FEWEST_COLUMNS columns.
    """
    check_columns(at)
    value, bound = np.log(best.rate), best.edge
    line = censored_fit(powers(at, 1), value, bound)
    bend = censored_fit(powers(at, 2), value, bound)[:, 2] if len(at) > FEWEST_COLUMNS else np.full(len(value), np.nan)
    return Law(
        len(value),
        np.asarray(at),
        math.exp(np.log(at).mean()),
        over_seeds(line[:, 0]),
        over_seeds(line[:, 1]),
        over_seeds(bend),
        int((bound != 0).sum()),
        left_out_seeds(at, value, bound),
        left_out_columns(at, value, bound, columns_in_turn(at)),
        left_out_columns(at, value, bound, upper_half(at)),
    )


def factor(errors: np.ndarray) -> float:
    """Root mean square of differences of natural logarithms, as a factor; NaN without any."""
    errors = errors[np.isfinite(errors)]
    return float(np.exp(np.sqrt((errors**2).mean()))) if len(errors) else math.nan


def left_out_seeds(at: np.ndarray, value: np.ndarray, bound: np.ndarray) -> tuple[float, float]:
    """Errors of the law and of the constant of all other seeds on each seed's measured columns."""
    scores = []
    for degree in (1, 0):
        design = powers(at, degree)
        own = censored_fit(design, value, bound)
        errors = []
        for seed in range(len(value)):
            others = np.delete(own, seed, axis=0)
            others = others[np.isfinite(others).all(1)]
            if len(others):
                errors.append(np.where(bound[seed] == 0, value[seed] - design @ others.mean(0), np.nan))
        scores.append(factor(np.array(errors)))
    return scores[0], scores[1]


def left_out_columns(
    at: np.ndarray, value: np.ndarray, bound: np.ndarray, tests: list[np.ndarray]
) -> tuple[float, float]:
    """Errors of the law and of the constant on the columns of each test (bool [col]), each row from its own others."""
    scores = []
    for degree in (1, 0):
        design, errors = powers(at, degree), []
        for test in tests:
            predicted = censored_fit(design, np.where(test, np.nan, value), bound) @ design.T
            errors.append(np.where(test & (bound == 0), value - predicted, np.nan))
        scores.append(factor(np.array(errors)))
    return scores[0], scores[1]


def columns_in_turn(at: np.ndarray) -> list[np.ndarray]:
    """Each column alone, bool [col]."""
    return list(np.eye(len(at), dtype=bool))


def upper_half(at: np.ndarray) -> list[np.ndarray]:
    """The columns of the larger half of `at` together, bool [col]."""
    return [np.argsort(np.argsort(at)) >= len(at) // 2]


def critical_rate_law(at: np.ndarray, found: Borders, level: float = 0.5) -> Law:
    """log critical rate = level + exponent * log at through the crossings of P(train), interval over resampled seeds.

    A column without a crossing is a bound: above the largest rate, or below the best one. One seed has
    outcomes and no critical rate, so nothing is scored on seeds left out.

    Args:
        at: [col].
        found: of `replicates.borders`.

    Raises:
        ValueError: fewer than FEWEST_COLUMNS columns.
    """
    check_columns(at)
    i = found.levels.index(level)
    values = np.concatenate([found.rate[i : i + 1], found.draws[i]])
    bound = np.where(values == 0, -1, np.where(np.isinf(values), 1, 0))
    value = np.log(np.where(bound < 0, found.start, np.where(bound > 0, found.highest, values)))
    line = censored_fit(powers(at, 1), value, bound)
    bend = censored_fit(powers(at, 2), value, bound)[:, 2] if len(at) > FEWEST_COLUMNS else np.full(len(value), np.nan)
    return Law(
        found.seeds,
        np.asarray(at),
        math.exp(np.log(at).mean()),
        resampled_estimate(line[:, 0], found.seeds),
        resampled_estimate(line[:, 1], found.seeds),
        resampled_estimate(bend, found.seeds),
        int((bound[0] != 0).sum()),
        (math.nan, math.nan),
        left_out_columns(at, value[:1], bound[:1], columns_in_turn(at)),
        left_out_columns(at, value[:1], bound[:1], upper_half(at)),
    )


def resampled_estimate(values: np.ndarray, seeds: int) -> Estimate:
    """The first of [1 + draw] values with the interval that the rest, under `resampled_seeds`, give."""
    draws = np.where(np.isnan(values[1:]), np.inf, values[1:])  # a draw without enough crossings bounds nothing
    low, high = resampled_interval(draws, seeds)
    return Estimate(float(values[0]), float(low), float(high))


# ---- the safe rate, and how much the rate matters


@dataclass(frozen=True)
class Safe:
    """The largest rate up to which every seed stays within SAFE_NAT of its own best."""

    rate: np.ndarray  # [col]; NaN where not even the start holds in all seeds
    start: np.ndarray  # [col] the best rate of the seeds' mean loss
    holding: np.ndarray  # [rate, col] seeds that hold from `start` up to this rate; 0 below it
    seeds: int
    supported: float  # one-sided 95% lower bound of the share of seeds, all of `seeds` holding


def safe_rates(rates: np.ndarray, loss: np.ndarray) -> Safe:
    """The largest rate up to which, from the best rate on, every rate is within SAFE_NAT of each seed's own best.

    Args:
        rates: [rate], ascending.
        loss: [seed, rate, col]; anything not finite is worse than all.
    """
    seeds = len(loss)
    filled = np.where(np.isfinite(loss), loss, np.inf)
    good = np.isfinite(filled) & (filled <= filled.min(1, keepdims=True) + SAFE_NAT)
    start = filled.mean(0).argmin(0)  # inf where a seed broke: no start
    from_start = np.arange(len(rates))[:, None] >= start
    holding = np.where(from_start, np.logical_and.accumulate(good | ~from_start, axis=1).sum(0), 0)
    top = (holding == seeds).cumsum(0).argmax(0)
    safe = np.where((holding == seeds).any(0), rates[top], np.nan)
    return Safe(safe, rates[start], holding, seeds, float(share_at_least(seeds, seeds)))


def within_decades(rates: np.ndarray, lowest: float) -> np.ndarray:
    """Which rates lie in the DECADES from `lowest` on."""
    return (rates >= lowest * (1 - 1e-9)) & (rates <= lowest * 10**DECADES * (1 + 1e-9))


def sensitivity(rates: np.ndarray, loss: np.ndarray, initial: np.ndarray, lowest: float) -> np.ndarray:
    """E[min(loss, initial) - lowest loss] over DECADES of log rate from `lowest` on (arXiv:2309.14322).

    Args:
        rates: [rate], ascending.
        loss: [seed, rate, col]; anything not finite counts as the initial loss.
        initial: [seed] loss of the untrained weights.

    Returns:
        [seed, col].

    Raises:
        ValueError: the decades are not all swept.
    """
    highest = lowest * 10**DECADES
    if lowest < rates[0] * (1 - 1e-9) or highest > rates[-1] * (1 + 1e-9):
        raise ValueError(
            f"got rates from {rates[0]:g} to {rates[-1]:g}; expected {lowest:g} to {highest:g} for the sensitivity "
            f"over {DECADES:g} decades; widen the rates or take another start"
        )
    top = initial[:, None, None]
    capped = np.minimum(np.where(np.isfinite(loss), loss, top), top)
    inside = within_decades(rates, lowest)
    above = (capped - capped.min(1, keepdims=True))[:, inside]
    x = np.log10(rates[inside])
    return np.trapezoid(above, x, axis=1) / (x[-1] - x[0])
