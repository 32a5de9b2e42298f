"""Axes and grids: which hyper-parameters are swept, over which float64 values.

An axis is written `name:scale:low:high:points`, for example `lr:log:1e-4:1e1:32`. The y axis gives
the rows of a grid, the x axis its columns, and a cell is one (row, column).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class HyperParameter(NamedTuple):
    """What may be swept or fixed under one name.

    low and high bound the legal values (low exclusive when `open_low`); `integer` ones are rounded to
    whole numbers; `kernel_float` ones reach the kernels as float32 (float64 at --precision fp64), so
    neighbouring grid values must differ there.
    """

    low: float
    high: float
    open_low: bool = False
    integer: bool = False
    kernel_float: bool = True
    networks: tuple[str, ...] = ("gpt", "smollm2")


LANGUAGE = ("gpt", "smollm2")
EVERY = ("gpt", "smollm2", "mlp")
LARGEST = 1e30

HYPER_PARAMETERS: dict[str, HyperParameter] = {
    "lr": HyperParameter(0.0, LARGEST, networks=EVERY),
    "lr.matrix": HyperParameter(0.0, LARGEST),
    "lr.attention": HyperParameter(0.0, LARGEST),
    "lr.mlp": HyperParameter(0.0, LARGEST),
    "lr.embedding": HyperParameter(0.0, LARGEST),
    "lr.unembedding": HyperParameter(0.0, LARGEST),
    "tokens": HyperParameter(1.0, 1e15, kernel_float=False),
    "batch": HyperParameter(1.0, 1e6, integer=True, kernel_float=False),
    "warmup": HyperParameter(0.0, 1.0),
    "weight_decay": HyperParameter(0.0, LARGEST),
    "beta1": HyperParameter(0.0, 1.0 - 1e-7),
    "beta2": HyperParameter(0.0, 1.0 - 1e-7),
    "clip": HyperParameter(0.0, LARGEST),
    "init_scale": HyperParameter(0.0, LARGEST),
    "label_smoothing": HyperParameter(0.0, 1.0),
    "seed": HyperParameter(0.0, 2.0**31 - 1, integer=True, kernel_float=False, networks=EVERY),
    "lr.0": HyperParameter(0.0, LARGEST, networks=("mlp",)),
    "lr.1": HyperParameter(0.0, LARGEST, networks=("mlp",)),
    "offset": HyperParameter(-LARGEST, LARGEST, networks=("mlp",)),
}

SCALES = ("log", "linear")


def attribute(name: str) -> str:
    """The field of `SweepConfig` that holds a fixed hyper-parameter: `lr.mlp` -> `lr_mlp`."""
    return name.replace(".", "_")


@dataclass(frozen=True)
class Axis:
    """One swept hyper-parameter and its float64 values."""

    name: str
    scale: str
    low: float
    high: float
    points: int

    @classmethod
    def parse(cls, text: str) -> "Axis":
        """Read `name:scale:low:high:points`.

        Raises:
            ValueError: the text has another form, or names an unknown axis, a reversed or
                non-positive range, or more points than float64 can tell apart.
        """
        parts = text.split(":")
        form = "an axis is written name:scale:low:high:points, for example lr:log:1e-4:1e1:32"
        if len(parts) != 5:
            raise ValueError(f"axis {text!r} has {len(parts)} parts, expected 5: {form}")
        name, scale, low, high, points = parts
        if name not in HYPER_PARAMETERS:
            known = ", ".join(HYPER_PARAMETERS)
            raise ValueError(f"axis {text!r}: unknown hyper-parameter {name!r}, expected one of {known}")
        if scale not in SCALES:
            raise ValueError(f"axis {text!r}: scale {scale!r}, expected log or linear")
        if not (is_number(low) and is_number(high) and points.isdecimal()):
            raise ValueError(f"axis {text!r}: low, high and points must be numbers: {form}")
        axis = cls(name, scale, float(low), float(high), int(points))
        axis.check()
        return axis

    def check(self) -> None:
        """Raise ValueError unless the range is legal and its float64 values are all distinct."""
        rule = HYPER_PARAMETERS[self.name]
        if self.points < 1:
            raise ValueError(f"axis {self}: {self.points} points, expected at least 1")
        if not self.low <= self.high or (self.points > 1 and self.low == self.high):
            raise ValueError(
                f"axis {self}: the range runs from {self.low:g} to {self.high:g}; "
                "give the smaller end first and let them differ"
            )
        if self.scale == "log" and self.low <= 0:
            raise ValueError(f"axis {self}: a log range needs low > 0, got {self.low:g}; use linear")
        if self.low < rule.low or self.high > rule.high:
            raise ValueError(
                f"axis {self}: {self.name} must lie in [{rule.low:g}, {rule.high:g}], got {self.low:g} to {self.high:g}"
            )
        # an interpolated logarithm can miss its neighbours' order by an ulp, so ascending is asked, not distinct
        if not (np.diff(self.values) > 0).all():
            kind = "whole numbers" if rule.integer else "float64 values"
            raise ValueError(
                f"axis {self}: {self.points} points, but the range holds fewer distinct {kind}; "
                "take fewer points or a wider range"
            )

    @property
    def values(self) -> np.ndarray:
        """The axis's float64 values [points], ends exact; whole numbers for integer axes."""
        if self.points == 1:
            values = np.array([self.low])
        elif self.scale == "log":
            # interpolate the logarithm; pin the ends, which exp(log) can miss by an ulp
            values = np.exp(np.linspace(math.log(self.low), math.log(self.high), self.points))
            values[0], values[-1] = self.low, self.high
        else:
            values = np.linspace(self.low, self.high, self.points)
        return np.round(values) if HYPER_PARAMETERS[self.name].integer else values

    def kernel_type(self, precision: str) -> type[np.floating]:
        """The numbers that the kernels see the values in."""
        return np.float32 if HYPER_PARAMETERS[self.name].kernel_float and precision != "fp64" else np.float64

    def distinct(self, precision: str) -> bool:
        """Whether the kernels see all values apart."""
        seen = self.values.astype(self.kernel_type(precision))
        return not HYPER_PARAMETERS[self.name].kernel_float or len(np.unique(seen)) == self.points

    def check_spacing(self, precision: str) -> None:
        """Raise ValueError when neighbours collide in the numbers the kernels compute in."""
        if not self.distinct(precision):
            raise ValueError(
                f"axis {self}: neighbouring values are equal in {np.dtype(self.kernel_type(precision)).name}, in which "
                "the kernels compute; take fewer points or a wider range (or --precision fp64 for mlp)"
            )

    def tile(self, start: int, stop: int, factor: int) -> "Axis":
        """The axis of a child grid: points [start, stop) of this one, `factor` times as dense.

        Cells are centred on their values, so the child covers half a spacing beyond both end points
        and its `(stop - start) * factor` cells are centred again.
        """
        assert 0 <= start < stop <= self.points, (start, stop, self.points)
        log = self.scale == "log"
        low, high = (math.log(self.low), math.log(self.high)) if log else (self.low, self.high)
        spacing = (high - low) / max(self.points - 1, 1)
        child = spacing / factor
        first = low + spacing * (start - 0.5) + child / 2
        last = low + spacing * (stop - 0.5) - child / 2
        if log:
            first, last = math.exp(first), math.exp(last)
        axis = Axis(self.name, self.scale, first, last, (stop - start) * factor)
        axis.check()
        return axis

    def __str__(self) -> str:
        return f"{self.name}:{self.scale}:{self.low!r}:{self.high!r}:{self.points}"


@dataclass(frozen=True)
class Grid:
    """A y axis (rows) by an x axis (columns)."""

    y: Axis
    x: Axis

    @classmethod
    def parse(cls, y: str, x: str) -> "Grid":
        """Read two axes. Raises ValueError for a bad axis or the same one twice."""
        grid = cls(Axis.parse(y), Axis.parse(x))
        if grid.y.name == grid.x.name:
            raise ValueError(f"both axes sweep {grid.y.name!r}; give --y and --x different names")
        return grid

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.y.points, self.x.points


def is_number(text: str) -> bool:
    """Whether float() accepts the text and the result is finite."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
