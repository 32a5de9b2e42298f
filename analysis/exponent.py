"""The uncertainty exponent: how fast the chance that a small change flips an outcome falls with its size.

f(eps) is the probability that a run and its neighbours at +-eps do not all end alike; f ~ eps^alpha, and the
boundary of a `d`-dimensional map has the dimension D = d - alpha (Grebogi, McDonald, Ott, Yorke 1983; McDonald,
Grebogi, Ott, Yorke 1985). Every eps has base points of its own, so counts are independent binomials. What is
fitted is fixed beforehand: sizes with at least FEWEST_EVENTS events and f of at most a quarter of the ceiling.
"""

import math
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from rich.table import Table

FEWEST_EVENTS = 20
CEILING_SHARE = 0.25  # above it f bends towards its ceiling
FEWEST_SIZES = 3  # in the window; below it nothing is fitted
LARGEST_DISPERSION = 4.0  # above it the counts are no power law


@dataclass(frozen=True)
class Exponent:
    """f(eps) and the power law fitted to its window; NaN, and why in `refused`, where there is none."""

    eps: np.ndarray  # [size] realised
    share: np.ndarray  # [size] f
    low: np.ndarray  # [size] exact 95% interval
    high: np.ndarray
    fitted: np.ndarray  # [size] bool, the window
    ceiling: float
    alpha: float
    alpha_low: float  # 95% interval
    alpha_high: float
    level: float  # log f at eps = 1, by the law
    dispersion: float
    ambient: int  # d, the dimension of what is swept
    refused: str  # '' or the reason
    slope: tuple[float, float, float]  # of log f over all sizes with FEWEST_EVENTS, and its interval: no exponent

    @property
    def dimension(self) -> tuple[float, float, float]:
        """D = d - alpha and its interval, kept in [d - 1, d]: no boundary lies outside."""
        low, value, high = np.clip(
            self.ambient - np.array([self.alpha_high, self.alpha, self.alpha_low]), self.ambient - 1, self.ambient
        )
        return float(value), float(low), float(high)

    def size_at(self, share: float) -> float:
        """The eps at which the law gives this f; NaN where there is no law, or f does not rise with eps."""
        return math.exp((math.log(share) - self.level) / self.alpha) if self.alpha > 0 else math.nan


def fit_exponent(eps: np.ndarray, events: np.ndarray, trials: np.ndarray, ceiling: float, ambient: int) -> Exponent:
    """log f = c + alpha log eps as a quasi-binomial regression over the window.

    The interval is the wider of t with the dispersion found, and normal with the binomial's: few sizes may fit a
    power law by chance. Where nothing is fitted, the slope over all sizes still says how flat f is.

    Args:
        eps: [size] sizes of the change, as realised.
        events: [size] base points whose outcome differs from either neighbour's.
        trials: [size] base points.
        ceiling: f between unrelated outcomes, `ceiling_of`.
        ambient: d: 1 for a rate axis, 2 for a map.

    Raises:
        ValueError: d is neither 1 nor 2, sizes that are not positive or not different.
    """
    if ambient not in (1, 2):
        raise ValueError(f"got d = {ambient}; expected 1 (a rate axis) or 2 (a map)")
    if (eps <= 0).any() or len(np.unique(eps)) < len(eps):
        raise ValueError(f"got eps {', '.join(f'{e:g}' for e in eps)}; expected different positive sizes")
    from analysis.replicates import exact_interval

    share, (low, high) = events / trials, exact_interval(events, trials)
    enough = events >= FEWEST_EVENTS
    window = enough & (share <= CEILING_SHARE * ceiling)
    known = eps, share, low, high, window, ceiling
    slope = binomial_law(eps[enough], events[enough], trials[enough])
    over_all = slope.alpha, slope.alpha - slope.half, slope.alpha + slope.half
    law, refused = NO_LAW, ""
    if window.sum() < FEWEST_SIZES:
        refused = (
            f"{window.sum()} of {len(eps)} sizes have {FEWEST_EVENTS} events and f of at most "
            f"{CEILING_SHARE * ceiling:.3g}, a quarter of the ceiling; {FEWEST_SIZES} are needed"
        )
    else:
        law = binomial_law(eps[window], events[window], trials[window])
        if law.dispersion > LARGEST_DISPERSION:
            refused = f"the dispersion about a power law is {law.dispersion:.1f}, above {LARGEST_DISPERSION:g}"
            law = NO_LAW._replace(dispersion=law.dispersion)
    interval = law.alpha, law.alpha - law.half, law.alpha + law.half
    return Exponent(*known, *interval, law.level, law.dispersion, ambient, refused, over_all)


class BinomialLaw(NamedTuple):
    """log f = level + alpha log eps, alpha +- half, and the dispersion about it."""

    level: float
    alpha: float
    half: float
    dispersion: float


NO_LAW = BinomialLaw(math.nan, math.nan, math.nan, math.nan)


def binomial_law(eps: np.ndarray, events: np.ndarray, trials: np.ndarray) -> BinomialLaw:
    """Quasi-binomial regression with a log link; NO_LAW below FEWEST_SIZES.

    Args:
        eps, events, trials: [size].
    """
    if len(eps) < FEWEST_SIZES:
        return NO_LAW
    # these take seconds to import, which --help need not wait for
    import statsmodels.api as sm
    from scipy import special
    from statsmodels.genmod.families.links import Log
    from statsmodels.tools.sm_exceptions import DomainWarning

    x = np.log(eps)
    start = np.polyfit(x, np.log(events / trials), 1)[::-1]
    with warnings.catch_warnings():
        # a log link may leave [0, 1] in general; near these counts f stays below 1
        warnings.simplefilter("ignore", DomainWarning)
        model = sm.GLM(
            np.column_stack([events, trials - events]), sm.add_constant(x), family=sm.families.Binomial(link=Log())
        )
    found = model.fit(start_params=start, maxiter=100)
    dispersion = float(found.pearson_chi2 / (len(x) - 2))
    widest = max(float(-special.stdtrit(len(x) - 2, 0.025)) * math.sqrt(dispersion), float(-special.ndtri(0.025)))
    level, alpha = map(float, found.params)
    return BinomialLaw(level, alpha, float(found.bse[1]) * widest, dispersion)


def ceiling_of(trains: np.ndarray) -> float:
    """Mean of 3P(1 - P): the probability that one of three unrelated outcomes differs from the others.

    Args:
        trains: bool [replicate, point]; unbiased from two replicates on.

    Raises:
        ValueError: one replicate.
    """
    runs, trained = len(trains), trains.sum(0)
    if runs < 2:
        raise ValueError(f"got {runs} replicate; expected 2 or more for a ceiling; sweep more replicates")
    return float((3 * trained * (runs - trained)).mean() / (runs * (runs - 1)))


def differs(base: np.ndarray, minus: np.ndarray, plus: np.ndarray) -> np.ndarray:
    """Whether the outcome of each base point differs from either neighbour's; all of one shape."""
    return (base != minus) | (base != plus)


# ---- base points and their neighbours


def to_position(values: np.ndarray, low: np.ndarray, high: np.ndarray, log: np.ndarray) -> np.ndarray:
    """Coordinates [point, axis] in the units of eps: natural logarithm on a log axis, else share of the range."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(log, np.log(values), (values - low) / (high - low))


def from_position(position: np.ndarray, low: np.ndarray, high: np.ndarray, log: np.ndarray) -> np.ndarray:
    """The inverse of `to_position`."""
    return np.where(log, np.exp(np.where(log, position, 0.0)), low + position * (high - low))


@dataclass(frozen=True)
class Probes:
    """Base points of one eps with their neighbours along a random direction, as the kernel will see them."""

    base: np.ndarray  # [point, axis]
    minus: np.ndarray
    plus: np.ndarray
    realised: np.ndarray  # [point, 2] distance to minus and to plus, in the units of eps


def draw_points(
    seed: int,
    size: int,
    eps: float,
    count: int,
    low: np.ndarray,
    high: np.ndarray,
    log: np.ndarray,
    dtype: type[np.floating] = np.float64,
) -> Probes:
    """Base points drawn over a window, log-uniformly on log axes, and neighbours at +-eps.

    Args:
        seed, size: decide the draw; `size` is the place of eps in its list, so every eps has its own points.
        eps: relative change on a log axis (difference of natural logarithms), share of the range on a linear one.
        count: base points.
        low, high, log: [axis] ends of the window, and which axes are logarithmic.
        dtype: the kernel's numbers, to which every coordinate is rounded before distances are taken.

    Raises:
        ValueError: the rounded neighbours of some point coincide with it.
    """
    random = np.random.Generator(np.random.Philox(key=[seed, size]))
    ends = to_position(np.stack([low, high]), low, high, log)
    position = ends[0] + (ends[1] - ends[0]) * random.random((count, len(low)))
    direction = random.standard_normal((count, len(low)))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)

    def rounded(where: np.ndarray) -> np.ndarray:
        return from_position(where, low, high, log).astype(dtype).astype(np.float64)

    base, minus, plus = (rounded(position + sign * eps * direction) for sign in (0, -1, 1))
    own = to_position(base, low, high, log)
    realised = np.stack([np.linalg.norm(to_position(n, low, high, log) - own, axis=1) for n in (minus, plus)], axis=1)
    if (realised == 0).any():
        share = (realised == 0).any(1).mean()
        raise ValueError(
            f"got eps {eps:g}, at which {share:.0%} of the points equal a neighbour in {np.dtype(dtype).name}; "
            "expected a change the kernel's numbers can tell; take a larger eps or float64"
        )
    return Probes(base, minus, plus, realised)


# ---- in words


def exponent_table(law: Exponent, events: np.ndarray, trials: int, title: str) -> Table:
    """f at every size with its interval."""
    table = Table("eps", "flips", "f", "95%", "", title=title, title_justify="left", box=None)
    for i, eps in enumerate(law.eps):
        interval = f"{law.low[i]:.3f} to {law.high[i]:.3f}"
        table.add_row(
            f"{eps:.3g}", f"{events[i]} of {trials}", f"{law.share[i]:.3f}", interval, "fitted" if law.fitted[i] else ""
        )
    return table


def exponent_words(law: Exponent) -> str:
    """The exponent and the dimension, or why there is none."""
    if law.refused:
        value, low, high = law.slope
        known = math.isfinite(value)
        slope = f"; over all sizes f changes as eps^{value:.3f} [{low:.3f}, {high:.3f}]" if known else ""
        return f"no exponent: {law.refused}; ceiling about {law.ceiling:.3f}{slope}"
    value, low, high = law.dimension
    return (
        f"alpha {law.alpha:.3f} [{law.alpha_low:.3f}, {law.alpha_high:.3f}], D = {law.ambient} - alpha = {value:.3f} "
        f"[{low:.3f}, {high:.3f}]; dispersion {law.dispersion:.1f}, ceiling about {law.ceiling:.3f}"
    )
