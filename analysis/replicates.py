"""What replicates say: the probability that a cell trains, and the rates at which it first falls to a level.

P(train) need not fall monotonically with the rate, so neither a logistic over all rates nor the first break
from below is the border. P is estimated by local logistic regression (local likelihood, tricube kernel; Fan,
Heckman, Wand 1995), and the rate LR_q is where it first falls below q going up from the best rate. What lies above
are islands. The bandwidth is the one under which a fit linear in the log rate predicts left-out seeds best; the fit
itself is quadratic, whose bias is small beside its interval (robust bias correction: Calonico, Cattaneo, Farrell 2018).

An interval of LR_q is the set of rates at which P = q is not rejected: a quasi-likelihood ratio of the local fit, its
dispersion near q from leaving out whole seeds, since the cells of one seed are correlated. Where the seeds leave one
end open, the other is a one-sided 95% bound. It covers better than resampled crossings, which jump from one side of a
dip to the other; its constants were chosen on planted curves and scored on other draws of them
(benchmarks/coverage.py). Resampled crossings, the same seeds in all columns, carry the laws of analysis/laws.py.
"""

import math
from dataclasses import dataclass

import numpy as np
from numba import njit
from scipy import special

FEWEST_SEEDS = {0.5: 8, 0.9: 16}  # seeds below which a crossing of that level is refused
DRAWS = 400  # bootstrap draws
SHRINK = 0.75  # share of the best predicting bandwidth that is used: its bias stays small beside the interval
REACH_BEGIN = 0.5  # bandwidths for which P must not be significantly above a level for an interval to begin
REACH_END = 0.25  # bandwidths for which P must be significantly below it for an interval to end
STRETCHES = 3  # independent stretches of rates near a level, about, each with n - 1 degrees for the dispersion
MOST_COLUMNS = 16  # from which the bandwidth is chosen, evenly spread where a map has more
RIDGE = 0.01  # penalty of the local slope and bend, which keeps separated outcomes finite
LINEAR = 1e9  # penalty of a bend that is not fitted
CERTAIN = 12.0  # largest absolute logit
REFINED = 4  # places a step of the rates at which an interval's ends are looked for
APART = 0.25  # bandwidths that places at which a curve is drawn through lie apart, at most, where the rates allow
NEAR = 1.0  # logits from q within which the dispersion of LR_q is taken, about


@dataclass(frozen=True)
class Probability:
    """Share of replicates that train, with its exact interval; all of one shape [...]."""

    trained: np.ndarray  # replicates that train
    runs: np.ndarray  # replicates measured
    share: np.ndarray  # NaN where none is measured
    low: np.ndarray
    high: np.ndarray


def train_probability(trains: np.ndarray, known: np.ndarray | None = None, confidence: float = 0.95) -> Probability:
    """P(train) of each cell with its Clopper-Pearson interval.

    Args:
        trains: bool [replicate, ...].
        known: bool [replicate, ...], which were measured; default all.
    """
    known = np.ones(trains.shape, bool) if known is None else known
    trained, runs = (trains & known).sum(0), known.sum(0)
    with np.errstate(invalid="ignore"):
        share = trained / runs
    low, high = exact_interval(trained, runs, confidence)
    return Probability(trained, runs, share, low, high)


def exact_interval(
    events: np.ndarray | int, trials: np.ndarray | int, confidence: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """Clopper-Pearson interval of a binomial share; [0, 1] without a trial."""
    events, trials = np.asarray(events), np.asarray(trials)
    tail = (1 - confidence) / 2
    # where the share is 0 or 1, the beta distribution of that end does not exist
    low = special.betaincinv(np.maximum(events, 1), trials - events + 1, tail)
    high = special.betainccinv(events + 1, np.maximum(trials - events, 1), tail)
    return np.where(events > 0, low, 0.0), np.where(events < trials, high, 1.0)


def share_at_least(events: np.ndarray | int, trials: np.ndarray | int, confidence: float = 0.95) -> np.ndarray:
    """One-sided lower bound of a binomial share: 4 of 4 supports 47%, 59 of 59 supports 95%."""
    return exact_interval(events, trials, 2 * confidence - 1)[0]


# ---- resampling whole seeds


def resampled_seeds(seeds: int, draws: int = DRAWS) -> np.ndarray:
    """How often each seed is taken in each draw with replacement, float [draw, seed]; always the same draws."""
    return np.random.default_rng(0).multinomial(seeds, np.full(seeds, 1 / seeds), size=draws).astype(float)


def resampled_interval(draws: np.ndarray, seeds: int, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Interval of a statistic from its values [draw, ...] under `resampled_seeds`.

    Percentiles, expanded as t with n - 2 degrees asks (Hesterberg 2015 takes n - 1: with 8 seeds an exponent's then
    holds the truth in 92% of maps). Jackknife values are not used for few seeds: a first crossing jumps across a dip,
    and their interval then holds the truth in 63% of maps of 8 seeds.
    Infinite values are bounds, and so is an end of the interval where a tail's share of the draws is infinite.
    """
    tail = special.ndtr(math.sqrt(seeds / (seeds - 1)) * special.stdtrit(seeds - 2, (1 - confidence) / 2))
    low, high = np.quantile(draws, (tail, 1 - tail), axis=0, method="inverted_cdf")
    return low, high


# ---- local logistic regression


@njit(cache=True)
def tricube(log_rate, place, bandwidth):
    """Weight of a rate in the kernel around a place; 0 beyond it."""
    u = abs(log_rate - place) / bandwidth
    return (1 - u * u * u) ** 3 if u < 1 else 0.0


@njit(cache=True)
def local_fit(trained, runs, log_rate, place, bandwidth, stiff, logit, fixed):
    """The penalised fit of one column's counts [rate] around a place on the log-rate axis, by Newton's method.

    Args:
        stiff: penalty of the bend; LINEAR for none.
        logit: of P at the place, to start from, or to hold where `fixed`.

    Returns:
        logit, its variance were outcomes independent (0 where fixed), and the penalised log likelihood.
    """
    first = np.searchsorted(log_rate, place - bandwidth)
    last = np.searchsorted(log_rate, place + bandwidth)
    slope, bend, variance = 0.0, 0.0, 0.0
    for _ in range(40):
        # gradient of the log likelihood, and minus its second derivatives
        g0, g1, g2 = 0.0, -RIDGE * slope, -stiff * bend
        h00, h01, h02, h11, h12, h22 = 1e-9, 0.0, 0.0, RIDGE, 0.0, stiff
        for j in range(first, last):
            u, weight = (log_rate[j] - place) / bandwidth, tricube(log_rate[j], place, bandwidth)
            p = 1 / (1 + math.exp(-min(max(logit + slope * u + bend * u * u, -30.0), 30.0)))
            residual, information = weight * (trained[j] - runs[j] * p), weight * runs[j] * p * (1 - p)
            g0 += residual
            g1 += residual * u
            g2 += residual * u * u
            h00 += information
            h01 += information * u
            h02 += information * u * u
            h12 += information * u * u * u
            h22 += information * u * u * u * u
        h11 += h02
        # the inverse by cofactors
        c00 = h11 * h22 - h12 * h12
        if fixed:
            move, move_slope, move_bend = 0.0, (h22 * g1 - h12 * g2) / c00, (h11 * g2 - h12 * g1) / c00
        else:
            c01, c02 = h02 * h12 - h01 * h22, h01 * h12 - h02 * h11
            c11, c12, c22 = h00 * h22 - h02 * h02, h01 * h02 - h00 * h12, h00 * h11 - h01 * h01
            determinant = max(h00 * c00 + h01 * c01 + h02 * c02, 1e-300)
            variance = c00 / determinant
            move = (c00 * g0 + c01 * g1 + c02 * g2) / determinant
            move_slope = (c01 * g0 + c11 * g1 + c12 * g2) / determinant
            move_bend = (c02 * g0 + c12 * g1 + c22 * g2) / determinant
        size = max(abs(move), abs(move_slope), abs(move_bend))
        shorter = 2 / size if size > 2 else 1.0
        logit = min(max(logit + shorter * move, -CERTAIN), CERTAIN)
        slope += shorter * move_slope
        bend += shorter * move_bend
        if size < 1e-3:
            break
    likelihood = -(RIDGE * slope * slope + stiff * bend * bend) / 2
    for j in range(first, last):
        u = (log_rate[j] - place) / bandwidth
        linear = logit + slope * u + bend * u * u
        softplus = max(linear, 0.0) + math.log1p(math.exp(-abs(linear)))
        likelihood += tricube(log_rate[j], place, bandwidth) * (trained[j] * linear - runs[j] * softplus)
    return logit, variance, likelihood


@njit(cache=True)
def window_logit(trained, runs, log_rate, place, bandwidth):
    """Logit of the share trained within the kernel, +-CERTAIN where all end alike, and where it does."""
    yes, no = 0.0, 0.0
    for j in range(np.searchsorted(log_rate, place - bandwidth), np.searchsorted(log_rate, place + bandwidth)):
        weight = tricube(log_rate[j], place, bandwidth)
        yes += weight * trained[j]
        no += weight * (runs[j] - trained[j])
    if yes < 1e-12 or no < 1e-12:
        return (CERTAIN if yes > no else -CERTAIN), True
    return math.log((yes + 0.5) / (no + 0.5)), False


@njit(cache=True)
def local_logits(trained, runs, log_rate, places, bandwidth, stiff, stop_below):
    """Logits of P [draw, place] from counts [draw, rate], until one is below `stop_below`.

    What is not computed is -CERTAIN.
    """
    found = np.full((len(trained), len(places)), -CERTAIN)
    for draw in range(len(trained)):
        for at in range(len(places)):
            column = (trained[draw], runs[draw], log_rate, places[at], bandwidth)
            logit, alike = window_logit(*column)
            if not alike:
                logit = local_fit(*column, stiff, logit, False)[0]
            found[draw, at] = logit
            if logit < stop_below:
                break
    return found


@njit(cache=True)
def signed_roots(trained, runs, log_rate, places, bandwidth, levels):
    """Signed roots [level, place] of twice the log likelihood ratio against P = q, logits and variances [place].

    Args:
        levels: logits of the q [level].
    """
    roots = np.empty((len(levels), len(places)))
    logits, variances = np.empty(len(places)), np.empty(len(places))
    for at in range(len(places)):
        column = (trained, runs, log_rate, places[at], bandwidth, RIDGE)
        logits[at], variances[at], free = local_fit(*column, window_logit(*column[:5])[0], False)
        for i in range(len(levels)):
            root = math.sqrt(max(2 * (free - local_fit(*column, levels[i], True)[2]), 0.0))
            roots[i, at] = root if logits[at] > levels[i] else -root
    return roots, logits, variances


def probability(logit: np.ndarray) -> np.ndarray:
    """The probability of a logit."""
    return 1 / (1 + np.exp(-logit))


def bandwidths(log_rate: np.ndarray) -> np.ndarray:
    """Half-widths of the kernel tried, decades: from 2 grid steps to the range, by factors of sqrt(2)."""
    narrowest = 2 * np.diff(log_rate).max()
    octaves = max(math.log2(max(np.ptp(log_rate) / 2, narrowest) / narrowest), 0)
    return narrowest * 2 ** np.arange(0, octaves + 1e-9, 0.5)


def places_along(log_rate: np.ndarray, bandwidth: float, start: int = 0) -> np.ndarray:
    """Every n-th rate from index `start` on, and the last: a fit does not change within APART bandwidths."""
    every = max(int(APART * bandwidth / np.diff(log_rate).max()), 1)
    return np.append(log_rate[start:-1:every], log_rate[-1])


def choose_bandwidth(log_rate: np.ndarray, trained: np.ndarray, runs: np.ndarray) -> float:
    """SHRINK times the half-width under which all other seeds predict each seed's outcomes best, decades.

    One for all columns, so that what bias it leaves is common to them and not to be taken for a law.

    Args:
        trained, runs: 0 or 1 [col, seed, rate].
    """
    some = np.unique(np.linspace(0, len(trained) - 1, MOST_COLUMNS).round().astype(int))
    unsure = 0.5 / trained.shape[1]  # no seed's outcome is predicted more surely than the others can say

    def likelihood(width: float) -> float:
        total, places = 0.0, places_along(log_rate, width)
        for yes, all_runs in zip(trained[some], runs[some], strict=True):
            others = yes.sum(0) - yes, all_runs.sum(0) - all_runs
            logits = local_logits(*others, log_rate, places, width, LINEAR, -np.inf)
            every = np.stack([np.interp(log_rate, places, each) for each in logits])
            p = np.clip(probability(every), unsure, 1 - unsure)
            total += float((yes * np.log(p) + (all_runs - yes) * np.log1p(-p)).sum())
        return total

    return SHRINK * float(max(bandwidths(log_rate), key=likelihood))


# ---- crossings


@dataclass(frozen=True)
class Borders:
    """Where P(train) first falls below each level going up from the best rate.

    A rate of inf is a bound: above the largest rate of the column. 0 is one too: P is below the level at the best
    rate already. Ends of intervals likewise: 0 and inf where the seeds do not bound it.
    """

    levels: tuple[float, ...]
    seeds: int
    highest: float  # largest rate swept
    start: np.ndarray  # [col] the rate from which on a crossing is looked for
    rate: np.ndarray  # [level, col]
    low: np.ndarray  # [level, col] 95% interval; where one end is open the other is a one-sided 95% bound
    high: np.ndarray
    draws: np.ndarray  # [level, draw, col] under `resampled_seeds`, the same seeds in all columns and levels
    islands: tuple[tuple[tuple[tuple[float, float], ...], ...], ...]  # [level][col]: ranges above where P >= q again
    share: np.ndarray  # P by the local fit [rate, col]
    bandwidth: float  # half-width of the kernel, decades

    @property
    def width(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """log10(LR50 / LR90) of each column and its interval [col]; NaN where either is a bound.

        Raises:
            ValueError: the levels are not 0.5 and 0.9.
        """
        if set(self.levels) != {0.5, 0.9}:
            raise ValueError(f"levels are {self.levels}; a width needs 0.5 and 0.9; ask borders() for both")
        half, most = self.levels.index(0.5), self.levels.index(0.9)
        with np.errstate(divide="ignore", invalid="ignore"):
            value = np.log10(self.rate[half] / self.rate[most])
            draws = np.log10(self.draws[half] / self.draws[most])
        low, high = resampled_interval(np.where(np.isnan(draws), np.inf, draws), self.seeds)
        unknown = ~np.isfinite(value)
        return np.where(unknown, np.nan, value), np.where(unknown, np.nan, low), np.where(unknown, np.nan, high)


def check_seeds(seeds: int, level: float) -> None:
    """Raises ValueError where a crossing of `level` asks for more seeds than there are."""
    fewest = FEWEST_SEEDS.get(level, FEWEST_SEEDS[0.9])
    if seeds < fewest:
        raise ValueError(f"got {seeds} seeds; expected {fewest} for LR{100 * level:.0f}; sweep more replicates")


def borders(
    rates: np.ndarray,
    trains: np.ndarray,
    known: np.ndarray | None = None,
    *,
    levels: tuple[float, ...] = (0.5, 0.9),
    best: np.ndarray | None = None,
    draws: int = DRAWS,
    intervals: bool = True,
) -> Borders:
    """The first crossings of P(train) with each level, going up from the best rate of each column.

    Args:
        rates: [rate], ascending, positive.
        trains: bool [replicate, rate, col], or [replicate, rate] for one column.
        known: bool, which cells were measured; default all.
        best: index of the rate to start from [col]; default the lowest at which P is greatest.
        draws: of whole seeds with replacement.
        intervals: whether `low`, `high` and `draws` are wanted, which take most of the time; NaN if not.

    Raises:
        ValueError: fewer seeds than a level needs, fewer than 4 rates, rates that do not rise.
    """
    seeds = len(trains)
    for level in levels:
        check_seeds(seeds, level)
    if len(rates) < 4 or rates[0] <= 0 or (np.diff(rates) <= 0).any():
        raise ValueError(f"got {len(rates)} rates; expected 4 or more, positive and ascending; sweep more rates")
    known = np.ones(trains.shape, bool) if known is None else known
    # [col, seed, rate], each column's counts contiguous for the kernels
    trained_CSR, runs_CSR = (
        np.ascontiguousarray(np.atleast_3d(which).transpose(2, 0, 1), float) for which in (trains & known, known)
    )
    log_rate, taken, columns = np.log10(rates), resampled_seeds(seeds, draws), len(runs_CSR)
    width = choose_bandwidth(log_rate, trained_CSR, runs_CSR)
    steps = np.arange((len(rates) - 1) * REFINED + 1) / REFINED
    places = np.interp(steps, np.arange(len(rates)), log_rate)
    rate, low, high = (np.full((len(levels), columns), np.nan) for _ in range(3))
    drawn, share = np.full((len(levels), draws, columns), np.nan), np.empty((len(rates), columns))
    started = np.empty(columns)
    islands: list[list[tuple[tuple[float, float], ...]]] = [[] for _ in levels]
    goals = np.log(np.array(levels) / (1 - np.array(levels)))
    two_sided, one_sided = -special.stdtrit(STRETCHES * (seeds - 1), (0.025, 0.05))
    for col, (trained, runs) in enumerate(zip(trained_CSR, runs_CSR, strict=True)):
        counts = trained.sum(0), runs.sum(0)
        roots, logit, variance = signed_roots(*counts, log_rate, places, width, goals if intervals else goals[:0])
        share[:, col] = probability(logit[::REFINED])
        start = int(logit[::REFINED].argmax()) if best is None else int(best[col])
        started[col] = rates[start]
        for i, goal in enumerate(goals):
            rate[i, col] = first_below(logit[None], places, goal, start * REFINED)[0]
            islands[i].append(ranges_above(logit[::REFINED], rates, goal, rate[i, col]))
        if not intervals:
            continue
        left_out = counts[0] - trained, counts[1] - runs
        jackknife = (seeds - 1) * local_logits(*left_out, log_rate, log_rate, width, RIDGE, -np.inf).var(0)
        along = places_along(log_rate, width, start)
        resampled = local_logits(taken @ trained, taken @ runs, log_rate, along, width, RIDGE, goals.min())
        for i, goal in enumerate(goals):
            spread = dispersion(jackknife, logit[::REFINED], variance[::REFINED], goal)
            root = roots[i : i + 1] / math.sqrt(spread)
            begin, end = (highest_ahead(root, places, reach * width) for reach in (REACH_BEGIN, REACH_END))
            low[i, col] = first_below(begin, places, two_sided, start * REFINED)[0]
            high[i, col] = first_below(end, places, -two_sided, start * REFINED)[0]
            if np.isinf(high[i, col]):
                low[i, col] = first_below(begin, places, one_sided, start * REFINED)[0]
            elif low[i, col] == 0:
                high[i, col] = first_below(end, places, -one_sided, start * REFINED)[0]
            low[i, col], high[i, col] = at_least_a_step(rates, low[i, col], high[i, col])
            drawn[i, :, col] = first_below(resampled, along, goal, 0)
    return Borders(
        levels, seeds, float(rates[-1]), started, rate, low, high, drawn, tuple(tuple(i) for i in islands), share, width
    )


def dispersion(jackknife: np.ndarray, logit: np.ndarray, variance: np.ndarray, goal: float) -> float:
    """How much more P varies near a level when whole seeds are left out than independent outcomes would.

    Args:
        jackknife, logit, variance: of the fit to all seeds, [rate].
        goal: logit of the level.
    """
    p = probability(logit)
    # on the scale of P, where certainty varies by nothing
    weight = (p * (1 - p)) ** 2 * np.exp(-(((logit - goal) / NEAR) ** 2) / 2)
    observed, expected = (weight * jackknife).sum(), (weight * variance).sum()
    # a column without any variation shows no dispersion: each seed then counts as one outcome
    return float(observed / expected) if observed > 0 else len(logit)


def first_below(height: np.ndarray, log_rate: np.ndarray, goal: float, start: int) -> np.ndarray:
    """The rate at which each curve [draw, place] first falls below `goal` from index `start` on [draw].

    Linear between the rates. 0 where it is below at `start`, inf where it never falls.
    """
    below = height[:, start:] < goal
    after = np.maximum(below.argmax(1), 1) + start
    after = np.minimum(after, height.shape[1] - 1)
    draw = np.arange(len(height))
    upper, lower = height[draw, after - 1], height[draw, after]
    with np.errstate(divide="ignore", invalid="ignore"):
        part = np.clip((upper - goal) / (upper - lower), 0, 1)
    crossing = 10 ** (log_rate[after - 1] + part * (log_rate[after] - log_rate[after - 1]))
    return np.where(below[:, 0], 0.0, np.where(below.any(1), crossing, np.inf))


def highest_ahead(height: np.ndarray, places: np.ndarray, reach: float) -> np.ndarray:
    """The largest of each curve [draw, place] from a place up to `reach` beyond it.

    Below a level it says that the curve stays there: of many places, one is below by chance more often than any is.
    """
    ends = np.searchsorted(places, places + reach, "right")
    return np.stack([height[:, at:end].max(1) for at, end in enumerate(ends)], axis=1)


def at_least_a_step(rates: np.ndarray, low: float, high: float) -> tuple[float, float]:
    """The interval, or the two rates it lies between: where seeds agree, the grid still leaves that step open."""
    step = np.searchsorted(rates, low)
    if 0 < step < len(rates) and high <= rates[step]:
        return float(rates[step - 1]), float(rates[step])
    return low, high


def ranges_above(logit: np.ndarray, rates: np.ndarray, goal: float, border: float) -> tuple[tuple[float, float], ...]:
    """Ranges of rates above the border where P is at the level again: islands, (lowest, highest rate) each."""
    above = (logit >= goal) & (rates > border) & (border > 0)
    ends = np.flatnonzero(np.diff(np.concatenate(([False], above, [False])).astype(int)))
    return tuple((float(rates[first]), float(rates[after - 1])) for first, after in ends.reshape(-1, 2))
