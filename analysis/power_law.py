"""The critical learning rate as a power law of the other axis: fit, bootstrap interval, and lines held out."""

import math
from dataclasses import dataclass

import numpy as np

from analysis.boundary import Critical

FEWEST = 4  # bracketed columns below which nothing is fitted
DRAWS = 2000  # bootstrap draws


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
    seed, and of lines that may be measured on the same runs: another seed's law often lies outside.

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
