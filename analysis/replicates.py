"""What replicates say: the probability that a cell trains, and the rates at which it first falls to a level.

P(train) need not fall monotonically with the rate, so neither a logistic over all rates nor the first break
from below is the border. P is estimated by local logistic regression (local likelihood, linear in the log
rate, tricube kernel; Fan, Heckman, Wand 1995), and the rate LR_q is where it first falls below q going up from
the best rate. What lies above are islands.

An interval of LR_q is the set of rates at which P = q is not rejected: a quasi-likelihood ratio of the local fit
against t with n - 1 degrees, its dispersion from leaving out whole seeds, since the cells of one seed are
correlated. It covers better than resampled crossings, which jump from one side of a dip to the other
(benchmarks/coverage.py). Resampled crossings, the same seeds in all columns, carry the laws of analysis/laws.py.
"""

import math
from dataclasses import dataclass

import numpy as np
from numba import njit, prange
from scipy import stats

FEWEST_SEEDS = {0.5: 8, 0.9: 16}  # seeds below which a crossing of that level is refused
DRAWS = 400  # bootstrap draws
SHRINK = 0.75  # share of the best predicting bandwidth that is used: its bias stays small beside the interval
RIDGE = 0.01  # penalty of the local slope, which keeps separated outcomes finite
MOST_COLUMNS = 16  # from which the bandwidth is chosen, evenly spread where a map has more
CERTAIN = 12.0  # largest absolute logit


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
    low = stats.beta.ppf(tail, np.maximum(events, 1), trials - events + 1)
    high = stats.beta.isf(tail, events + 1, np.maximum(trials - events, 1))
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

    Percentiles, expanded as t with n - 1 degrees asks (Hesterberg 2015). Jackknife values are not used for few
    seeds: a first crossing jumps across a dip, and their interval then holds the truth in 63% of maps of 8 seeds.
    Infinite values are bounds, and so is an end of the interval where a tail's share of the draws is infinite.
    """
    tail = stats.norm.cdf(math.sqrt(seeds / (seeds - 1)) * stats.t.ppf((1 - confidence) / 2, seeds - 1))
    low, high = np.quantile(draws, (tail, 1 - tail), axis=0, method="inverted_cdf")
    return low, high


# ---- local logistic regression


@njit(cache=True)
def window(log_rate, at, bandwidth):
    """First and last index of the rates that the kernel at rate `at` reaches."""
    first, last = at, at
    while first > 0 and log_rate[at] - log_rate[first - 1] < bandwidth:
        first -= 1
    while last < len(log_rate) - 1 and log_rate[last + 1] - log_rate[at] < bandwidth:
        last += 1
    return first, last


@njit(cache=True)
def local_fit(trained, runs, log_rate, at, bandwidth, logit, slope, fixed):
    """The penalised local fit at rate `at` of one column's counts [rate], by Newton's method from (logit, slope).

    Returns:
        logit (as it came where `fixed`), slope a bandwidth, and the logit's variance were outcomes independent.
    """
    first, last = window(log_rate, at, bandwidth)
    variance = 0.0
    for _ in range(40):
        score, score_slope = 0.0, -RIDGE * slope
        twice, mixed, twice_slope = 1e-9, 0.0, RIDGE  # minus the second derivatives
        for j in range(first, last + 1):
            u = (log_rate[j] - log_rate[at]) / bandwidth
            cubed = abs(u * u * u)
            weight = (1 - cubed) * (1 - cubed) * (1 - cubed)
            p = 1 / (1 + math.exp(-logit - slope * u))
            residual, information = weight * (trained[j] - runs[j] * p), weight * runs[j] * p * (1 - p)
            score += residual
            score_slope += residual * u
            twice += information
            mixed += information * u
            twice_slope += information * u * u
        determinant = twice * twice_slope - mixed * mixed
        variance = twice_slope / max(determinant, 1e-300)
        if fixed:
            move, move_slope = 0.0, score_slope / twice_slope
        else:
            move = (twice_slope * score - mixed * score_slope) / determinant
            move_slope = (twice * score_slope - mixed * score) / determinant
        size = max(abs(move), abs(move_slope))
        if size > 2:
            move, move_slope = move * 2 / size, move_slope * 2 / size
        logit, slope = min(max(logit + move, -CERTAIN), CERTAIN), slope + move_slope
        if size < 1e-3:
            break
    return logit, slope, variance


@njit(cache=True)
def local_likelihood(trained, runs, log_rate, at, bandwidth, logit, slope):
    """The penalised log likelihood that `local_fit` maximises."""
    first, last = window(log_rate, at, bandwidth)
    likelihood = -RIDGE * slope * slope / 2
    for j in range(first, last + 1):
        u = (log_rate[j] - log_rate[at]) / bandwidth
        linear = logit + slope * u
        softplus = max(linear, 0.0) + math.log1p(math.exp(-abs(linear)))
        likelihood += (1 - abs(u) ** 3) ** 3 * (trained[j] * linear - runs[j] * softplus)
    return likelihood


@njit(cache=True)
def window_logit(trained, runs, log_rate, at, bandwidth):
    """Logit of the share trained within the kernel at rate `at`, +-CERTAIN where all end alike, and where it does."""
    yes, no = 0.0, 0.0
    first, last = window(log_rate, at, bandwidth)
    for j in range(first, last + 1):
        weight = (1 - (abs(log_rate[j] - log_rate[at]) / bandwidth) ** 3) ** 3
        yes += weight * trained[j]
        no += weight * (runs[j] - trained[j])
    if yes < 1e-12 or no < 1e-12:
        return (CERTAIN if yes > no else -CERTAIN), True
    return math.log((yes + 0.5) / (no + 0.5)), False


@njit(parallel=True, cache=True)
def local_logits(trained, runs, log_rate, bandwidth, start, stop_below):
    """Logits of P [draw, rate] from counts [draw, rate], from rate `start` until one is below `stop_below`.

    What is not computed is -CERTAIN.
    """
    found = np.full(trained.shape, -CERTAIN)
    for draw in prange(len(trained)):
        slope = 0.0
        for at in range(start, trained.shape[1]):
            logit, alike = window_logit(trained[draw], runs[draw], log_rate, at, bandwidth)
            if not alike:  # the slope at the rate before is near this one's
                logit, slope, _ = local_fit(trained[draw], runs[draw], log_rate, at, bandwidth, logit, slope, False)
            found[draw, at] = logit
            if logit < stop_below:
                break
    return found


@njit(cache=True)
def signed_roots(trained, runs, log_rate, bandwidth, levels):
    """Signed roots [level, rate] of twice the log likelihood ratio against P = q, logits [rate] and variances [rate].

    Args:
        levels: logits of the q [level].
    """
    rates = len(log_rate)
    roots, logits, variances = np.empty((len(levels), rates)), np.empty(rates), np.empty(rates)
    for at in range(rates):
        column = (trained, runs, log_rate, at, bandwidth)
        logits[at], slope, variances[at] = local_fit(*column, window_logit(*column)[0], 0.0, False)
        free = local_likelihood(*column, logits[at], slope)
        for i in range(len(levels)):
            held = local_likelihood(*column, *local_fit(*column, levels[i], slope, True)[:2])
            root = math.sqrt(max(2 * (free - held), 0.0))
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


def choose_bandwidth(log_rate: np.ndarray, trained: np.ndarray, runs: np.ndarray) -> float:
    """SHRINK times the half-width under which all other seeds predict each seed's outcomes best, decades.

    One for all columns, so that what bias it leaves is common to them and not to be taken for a law.

    Args:
        trained, runs: 0 or 1 [col, seed, rate].
    """
    some = np.unique(np.linspace(0, len(trained) - 1, MOST_COLUMNS).round().astype(int))
    unsure = 0.5 / trained.shape[1]  # no seed's outcome is predicted more surely than the others can say

    def likelihood(width: float) -> float:
        total = 0.0
        for yes, all_runs in zip(trained[some], runs[some], strict=True):
            logits = local_logits(yes.sum(0) - yes, all_runs.sum(0) - all_runs, log_rate, width, 0, -np.inf)
            p = np.clip(probability(logits), unsure, 1 - unsure)
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
    low: np.ndarray  # [level, col] 95% interval
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
) -> Borders:
    """The first crossings of P(train) with each level, going up from the best rate of each column.

    Args:
        rates: [rate], ascending, positive.
        trains: bool [replicate, rate, col], or [replicate, rate] for one column.
        known: bool, which cells were measured; default all.
        best: index of the rate to start from [col]; default the lowest at which P is greatest.
        draws: of whole seeds with replacement.

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
    rate, low, high = (np.empty((len(levels), columns)) for _ in range(3))
    drawn, share = np.empty((len(levels), draws, columns)), np.empty((len(rates), columns))
    started = np.empty(columns)
    islands: list[list[tuple[tuple[float, float], ...]]] = [[] for _ in levels]
    goals = np.log(np.array(levels) / (1 - np.array(levels)))
    for col, (trained, runs) in enumerate(zip(trained_CSR, runs_CSR, strict=True)):
        roots, logit, variance = signed_roots(trained.sum(0), runs.sum(0), log_rate, width, goals)
        roots /= math.sqrt(dispersion(log_rate, trained, runs, width, logit, variance))
        share[:, col] = probability(logit)
        start = int(logit.argmax()) if best is None else int(best[col])
        started[col] = rates[start]
        resampled = local_logits(taken @ trained, taken @ runs, log_rate, width, start, goals.min())
        critical = stats.t.isf(0.025, seeds - 1)
        for i, goal in enumerate(goals):
            rate[i, col] = first_below(logit[None], log_rate, goal, start)[0]
            low[i, col] = first_below(roots[i : i + 1], log_rate, critical, start)[0]
            high[i, col] = first_below(roots[i : i + 1], log_rate, -critical, start)[0]
            low[i, col], high[i, col] = at_least_a_step(rates, low[i, col], high[i, col])
            drawn[i, :, col] = first_below(resampled, log_rate, goal, start)
            islands[i].append(ranges_above(logit, rates, goal, rate[i, col]))
    return Borders(
        levels, seeds, float(rates[-1]), started, rate, low, high, drawn, tuple(tuple(i) for i in islands), share, width
    )


def dispersion(
    log_rate: np.ndarray,
    trained: np.ndarray,
    runs: np.ndarray,
    bandwidth: float,
    logit: np.ndarray,
    variance: np.ndarray,
) -> float:
    """How much more P varies when whole seeds are left out in turn than independent outcomes would, over the column.

    Args:
        trained, runs: [seed, rate].
        logit, variance: of the fit to all seeds [rate].
    """
    left_out = local_logits(trained.sum(0) - trained, runs.sum(0) - runs, log_rate, bandwidth, 0, -np.inf)
    jackknife = (len(trained) - 1) * left_out.var(0)
    p = probability(logit)
    weight = (p * (1 - p)) ** 2  # on the scale of P, where certainty varies by nothing
    expected = (weight * variance).sum()
    # a column without any variation shows no dispersion: each seed then counts as one outcome
    return float((weight * jackknife).sum() / expected) if (jackknife > 0).any() else float(len(log_rate))


def first_below(height: np.ndarray, log_rate: np.ndarray, goal: float, start: int) -> np.ndarray:
    """The rate at which each curve [draw, rate] first falls below `goal` from index `start` on [draw].

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
