"""Cells: which hyper-parameters are swept, over which float64 values.

An axis is written `name:scale:low:high:points`, for example `lr:log:1e-4:1e1:32`. In a grid the y axis gives
the rows, the x axis the columns; a sweep over a list of points takes any number of hyper-parameters from a file.
"""

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.hyper import HYPER_PARAMETERS, check_value, declared, kernel_type, long_name, rule_of

SCALES = {"log": "log", "lin": "linear", "linear": "linear"}  # as written -> as stored
SPELT = {"log": "log", "linear": "lin"}  # as stored -> as written


@dataclass(frozen=True)
class Axis:
    """One swept hyper-parameter and its float64 values."""

    name: str
    scale: str
    low: float
    high: float
    points: int
    stored: np.ndarray | None = field(default=None, compare=False, repr=False)
    """the values a store holds, which are never computed again; None: those of the range"""
    words: str = field(default="", compare=False, repr=False)
    """what a sweep calls its values; '' as everywhere"""

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
        name = name.replace("-", "_")  # as the flag is written
        if declared(name) is None:
            known = ", ".join(HYPER_PARAMETERS)
            raise ValueError(f"axis {text!r}: unknown hyper-parameter {name!r}; expected one of {known}")
        if scale not in SCALES:
            raise ValueError(f"axis {text!r}: scale {scale!r}; expected log or lin")
        if not (is_number(low) and is_number(high) and points.isdecimal() and len(points) < 10):
            raise ValueError(f"axis {text!r}: low, high and points must be numbers: {form}")
        axis = cls(name, SCALES[scale], float(low), float(high), int(points))
        axis.check()
        return axis

    def check(self) -> None:
        """Raise ValueError unless the range is legal and its float64 values are all distinct."""
        rule = rule_of(self.name)
        if self.points < 1:
            raise ValueError(f"axis {self}: {self.points} points, expected at least 1")
        if not self.low <= self.high or (self.points > 1 and self.low == self.high):
            raise ValueError(
                f"axis {self}: the range runs from {self.low:g} to {self.high:g}; "
                "give the smaller end first and let them differ"
            )
        if self.scale == "log" and self.low <= 0:
            raise ValueError(f"axis {self}: a log range needs low > 0, got {self.low:g}; use lin")
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
        if self.stored is not None:
            return self.stored
        if self.points == 1:
            values = np.array([self.low])
        elif self.scale == "log":
            # interpolate the logarithm; pin the ends, which exp(log) can miss by an ulp
            values = np.exp(np.linspace(math.log(self.low), math.log(self.high), self.points))
            values[0], values[-1] = self.low, self.high
        else:
            values = np.linspace(self.low, self.high, self.points)
        return np.round(values) if rule_of(self.name).integer else values

    @property
    def long_name(self) -> str:
        """The words for pictures."""
        return self.words or long_name(self.name)

    def distinct(self, precision: str) -> bool:
        """Whether the kernels see all values apart."""
        return distinct(self.name, self.values, precision)

    def check_spacing(self, precision: str) -> None:
        """Raise ValueError when neighbours collide in the numbers the kernels compute in."""
        if not self.distinct(precision):
            raise ValueError(
                f"axis {self}: neighbouring values are equal in {np.dtype(kernel_type(self.name, precision)).name}, in "
                "which the kernels compute; take fewer points, a wider range, or a finer --precision"
            )

    def tile(self, start: int, stop: int, factor: int) -> "Axis":
        """The axis of a child grid: points [start, stop) of this one, `factor` times as dense.

        Cells are centred on their values, so the child covers half a spacing beyond both end points and its
        `(stop - start) * factor` cells are centred again. Of a tile that overhangs the legal range, the part inside.
        """
        assert 0 <= start < stop <= self.points, (start, stop, self.points)
        log = self.scale == "log"
        low, high = (math.log(self.low), math.log(self.high)) if log else (self.low, self.high)
        spacing = (high - low) / max(self.points - 1, 1)
        child = spacing / factor
        ends = low + spacing * (start - 0.5) + child / 2, low + spacing * (stop - 0.5) - child / 2
        first, last = (math.exp(end) for end in ends) if log else ends
        points, rule = (stop - start) * factor, rule_of(self.name)
        if first < rule.low or last > rule.high:
            places = np.linspace(*ends, points)
            values = np.exp(places) if log else places
            inside = values[(values >= rule.low) & (values <= rule.high)]
            first, last, points = float(inside[0]), float(inside[-1]), len(inside)
        axis = Axis(self.name, self.scale, first, last, points)
        axis.check()
        return axis

    def __str__(self) -> str:
        return f"{self.name}:{SPELT[self.scale]}:{self.low!r}:{self.high!r}:{self.points}"


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

    @property
    def dims(self) -> tuple[str, str]:
        """Dimension names: the axes'."""
        return self.y.name, self.x.name

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """The swept hyper-parameters' values, float64, broadcasting to `shape`."""
        return {self.y.name: self.y.values[:, None], self.x.name: self.x.values[None, :]}

    def check(self, precision: str) -> None:
        """Raise ValueError where the kernels cannot tell neighbours apart."""
        self.y.check_spacing(precision)
        self.x.check_spacing(precision)

    def stored_as(self, read: Mapping[str, np.ndarray]) -> "Grid":
        """The same grid with the coordinates that a store holds."""
        return Grid(*(replace(axis, stored=read[axis.name]) for axis in (self.y, self.x)))

    def coordinates(self) -> dict[str, tuple[str, np.ndarray, dict[str, Any]]]:
        """Name -> (dimension, values, attributes) of what a store labels its cells with."""
        axes = (self.y, self.x)
        said = {a.name: {"long_name": a.long_name, "units": rule_of(a.name).units, "scale": a.scale} for a in axes}
        return {a.name: (a.name, a.values, said[a.name]) for a in axes}

    def __str__(self) -> str:
        return f"{self.y.points} x {self.x.points} cells: y {self.y}; x {self.x}"


@dataclass(frozen=True, eq=False)
class Points:
    """A list of points, each a cell with values of its own for every column."""

    columns: dict[str, np.ndarray]
    """float64 [point] by hyper-parameter"""

    @classmethod
    def read(cls, path: str) -> "Points":
        """Read a .csv whose first line names hyper-parameters.

        Raises:
            ValueError: no such file, no point, an unknown column, a value that is no legal number, a point twice.
        """
        if not Path(path).is_file():
            raise ValueError(f"points file {path!r} does not exist; give a .csv whose columns are hyper-parameters")
        with open(path, newline="", encoding="utf-8-sig") as file:
            header, *lines = [line for line in csv.reader(file) if line] or [[]]
        names = [name.strip().replace("-", "_") for name in header]
        for name in names:
            if declared(name) is None or names.count(name) > 1:
                known = ", ".join(HYPER_PARAMETERS)
                raise ValueError(f"points file {path!r} has a column {name!r}; expected each of {known} once at most")
        if not lines:
            raise ValueError(f"points file {path!r} holds no point; expected a line of numbers below its header")
        for number, line in enumerate(lines, 2):
            if len(line) != len(names) or not all(map(is_number, line)):
                raise ValueError(f"points file {path!r} line {number} is {line}; expected {len(names)} numbers")
            for name, text in zip(names, line, strict=True):
                check_value(name, float(text))
        table = np.array(lines, dtype=np.float64)
        _, first, count = np.unique(table, axis=0, return_index=True, return_counts=True)
        if (count > 1).any():
            again = lines[int(first[count > 1].min())]
            raise ValueError(f"points file {path!r} has the point {', '.join(again)} twice; remove one")
        return cls(dict(zip(names, np.ascontiguousarray(table.T), strict=True)))

    @property
    def shape(self) -> tuple[int]:
        """(points,)."""
        return (len(next(iter(self.columns.values()))),)

    @property
    def dims(self) -> tuple[str]:
        """Dimension names."""
        return ("point",)

    def check(self, precision: str) -> None:
        """Points may be as close as they like: they were given one by one."""

    def stored_as(self, read: Mapping[str, np.ndarray]) -> "Points":
        """The same points with the values that a store holds."""
        return Points({name: read[name] for name in self.columns})

    def coordinates(self) -> dict[str, tuple[str, np.ndarray, dict[str, Any]]]:
        """Name -> (dimension, values, attributes) of what a store labels its cells with."""
        places: dict[str, Any] = {"point": ("point", np.arange(*self.shape), {"long_name": "point"})}
        said = {name: {"long_name": long_name(name), "units": rule_of(name).units} for name in self.columns}
        return places | {name: ("point", values, said[name]) for name, values in self.columns.items()}

    def __str__(self) -> str:
        return f"{self.shape[0]} points of {', '.join(self.columns)}"


Cells = Grid | Points


def distinct(name: str, values: np.ndarray, precision: str) -> bool:
    """Whether the kernels see all values of a hyper-parameter apart."""
    return not rule_of(name).in_kernel or len(np.unique(values.astype(kernel_type(name, precision)))) == len(values)


def is_number(text: str) -> bool:
    """Whether float() accepts the text and the result is finite."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
