"""An axis of a map in drawing units (log10 of the value on a log axis): its extent and its ticks."""

import math

import numpy as np

from engine.grid import Axis


def places(axis: Axis) -> tuple[float, float]:
    """An axis's ends in drawing units: log10 of the value, or the value itself."""
    return (math.log10(axis.low), math.log10(axis.high)) if axis.scale == "log" else (axis.low, axis.high)


def middles(axis: Axis) -> np.ndarray:
    """The middles of an axis's cells in drawing units [point]."""
    return np.linspace(*places(axis), axis.points)


def place_of(axis: Axis, values: np.ndarray | float) -> np.ndarray:
    """Values of an axis in drawing units; -inf and NaN where a log axis has no place for them."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log10(values) if axis.scale == "log" else np.asarray(values, float)


def extent(axis: Axis) -> tuple[float, float]:
    """The outer edges of an axis's first and last cell, in drawing units."""
    low, high = places(axis)
    half = (high - low) / max(axis.points - 1, 1) / 2 or 0.5
    return low - half, high + half


def ticks(axis: Axis) -> tuple[np.ndarray, list[str], str]:
    """Where an axis has ticks (drawing units), what they say, and the axis's name in words.

    Decades where there are three or more, round numbers in narrower ranges; in a zoom too narrow for
    four digits to tell ticks apart, distances from the middle.
    """
    from matplotlib.ticker import MaxNLocator

    low, high = extent(axis)
    log, words = axis.scale == "log", axis.long_name
    first, last = (10.0**low, 10.0**high) if log else (low, high)
    decades = np.arange(math.ceil(low), math.floor(high) + 1)
    if log and len(decades) >= 3:
        decades = decades[:: -(-len(decades) // 7)]
        return decades, [f"$10^{{{d}}}$" for d in decades], words
    if log and last > 8 * first:
        powers = 10.0 ** np.arange(math.floor(low), math.ceil(high))
        values = (powers[:, None] * (1, 2, 5)).ravel()
        values = values[(values >= first) & (values <= last)]
        return np.log10(values), [number(float(v)) for v in values], words
    middle = (first + last) / 2
    if last - first > 2e-3 * abs(middle):
        values = np.asarray(MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(first, last))
        values = values[(values >= first) & (values <= last) & ((values > 0) | (not log))]
        return (np.log10(values) if log else values), [number(float(v)) for v in values], words
    offsets = np.asarray(MaxNLocator(4, symmetric=True).tick_values(first - middle, last - middle))
    offsets = offsets[np.abs(offsets) <= (last - first) / 2]
    power = math.floor(math.log10(np.abs(offsets).max()))
    at = np.log10(middle) + offsets / middle / math.log(10) if log else middle + offsets
    texts = [f"{o / 10.0**power:+.2g}" if o else "0" for o in offsets]
    return at, texts, f"{words} $-$ {middle!r}   ($10^{{{power}}}$)"


def number(value: float) -> str:
    """A tick's number: plain, whole thousands and millions as 2k and 2M, or times a power of ten."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if size <= abs(value) < 1e3 * size and value % (size / 10) == 0:
            return f"{value / size:g}{letter}"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.6g}"
    power = math.floor(math.log10(abs(value)) + 1e-9)
    return f"${value / 10.0**power:.4g}\\times10^{{{power}}}$"
