"""Axes: their values, their tiles, and what they refuse."""

import re

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from engine.grid import Axis, Grid, Points
from engine.hyper import HYPER_PARAMETERS

positive = st.floats(1e-12, 1e12)


@st.composite
def axes(draw, least_points: int = 1) -> Axis:
    """Learning-rate axes of any legal range, log or linear."""
    scale = draw(st.sampled_from(["log", "linear"]))
    low, high = sorted([draw(positive), draw(positive)])
    points = draw(st.integers(least_points, 200))
    assume(high > low * (1 + 1e-9))
    return Axis("lr", scale, low, high, points)


@given(axes())
def test_values_ascend_between_exact_ends(axis):
    axis.check()
    values = axis.values
    assert values.dtype == np.float64 and len(values) == axis.points
    assert (np.diff(values) > 0).all()
    assert values[0] == axis.low and (axis.points == 1 or values[-1] == axis.high)


@given(axes(least_points=2))
def test_values_are_evenly_spaced_on_their_scale(axis):
    assume(axis.high > axis.low * 1.01)  # below that the logarithms' own rounding shows in the spacing
    values = np.log(axis.values) if axis.scale == "log" else axis.values
    spacing = np.diff(values)
    # a value is off by an ulp of the largest one, so a spacing by two
    ulp = np.spacing(np.abs(values).max())
    assert np.ptp(spacing) <= 8 * ulp


@given(st.floats(1e-6, 1e6), st.integers(0, 40), st.integers(2, 60), st.sampled_from(["log", "linear"]))
def test_a_range_of_a_few_ulps_ascends_or_is_refused(low, ulps, points, scale):
    high = low
    for _ in range(ulps):
        high = float(np.nextafter(high, np.inf))
    axis = Axis("lr", scale, low, high, points)
    try:
        axis.check()
    except ValueError:
        return
    assert (np.diff(axis.values) > 0).all()
    assert (axis.values[0], axis.values[-1]) == (low, high)


@given(axes(least_points=2), st.data())
def test_a_tile_covers_its_cells_with_a_finer_spacing(axis, data):
    assume(axis.high > axis.low * 1.01)
    start = data.draw(st.integers(0, axis.points - 1))
    stop = data.draw(st.integers(start + 1, axis.points))
    factor = data.draw(st.integers(2, 8))
    scaled = np.log if axis.scale == "log" else np.asarray
    parent = scaled(axis.values)
    spacing = (parent[-1] - parent[0]) / (axis.points - 1)
    assume(axis.scale == "log" or parent[start] - spacing / 2 > 0)  # a tile that leaves the legal range is cut
    child = axis.tile(start, stop, factor)
    values = scaled(child.values)
    assert child.points == (stop - start) * factor
    tolerance = 1e-9 * spacing + 8 * np.spacing(np.abs(parent).max())
    assert np.allclose(np.diff(values), spacing / factor, rtol=0, atol=tolerance)
    # the child's cells, as wide as their spacing, cover the parent's cells edge to edge
    assert abs(values[0] - spacing / factor / 2 - (parent[start] - spacing / 2)) <= tolerance
    assert abs(values[-1] + spacing / factor / 2 - (parent[stop - 1] + spacing / 2)) <= tolerance
    for cell in range(start, stop):
        inside = values[(cell - start) * factor : (cell - start + 1) * factor]
        assert (np.abs(inside - parent[cell]) < spacing / 2 + tolerance).all()


@given(st.integers(1, 500), st.integers(0, 500), st.integers(1, 60), st.sampled_from(["log", "linear"]))
def test_integer_axes_hold_distinct_whole_numbers(low, extent, points, scale):
    axis = Axis("batch", scale, low, low + extent, points)
    try:
        axis.check()
    except ValueError:
        return
    assert (np.diff(axis.values) >= 1).all() and (axis.values == np.round(axis.values)).all()


@pytest.mark.parametrize("text", ["lr:log:1e-4:1e1:32", "tokens:linear:1000.5:2000.25:7", "lr.0:log:0.1:1e6:3"])
def test_an_axis_reads_back_what_it_writes(text):
    axis = Axis.parse(text)
    assert Axis.parse(str(axis)) == axis


def test_older_spellings_of_an_axis_are_the_same_axis():
    axis = Axis.parse("weight_decay:lin:0:1:3")
    assert str(axis) == "weight_decay:lin:0.0:1.0:3"
    for text in ("weight-decay:lin:0:1:3", "weight_decay:linear:0:1:3"):
        assert Axis.parse(text) == axis


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lr:log:1:2", "has 4 parts, expected 5"),
        ("lr", "has 1 parts, expected 5"),
        ("rate:log:1:2:3", "unknown hyper-parameter 'rate'; expected one of lr"),
        ("lr:logarithmic:1:2:3", "scale 'logarithmic'; expected log or lin"),
        ("lr:log:one:2:3", "low, high and points must be numbers"),
        ("lr:log:1:2:3.5", "low, high and points must be numbers"),
        ("lr:log:nan:2:3", "low, high and points must be numbers"),
        ("lr:log:1:inf:3", "low, high and points must be numbers"),
        ("lr:log:1:2:-3", "low, high and points must be numbers"),
        ("lr:log:1:2:0", "0 points, expected at least 1"),
        ("lr:log:2:1:3", "give the smaller end first"),
        ("lr:log:2:2:3", "let them differ"),
        ("lr:log:0:1:3", "a log range needs low > 0, got 0; use lin"),
        ("lr:log:-1:1:3", "a log range needs low > 0, got -1"),
        ("lr:linear:-1:1:3", "lr must lie in [0, 1e+30]"),
        ("warmup:linear:0:2:3", "warmup must lie in [0, 1]"),
        ("beta2:linear:0:1:3", "beta2 must lie in [0, 1], got 0 to 1"),
        ("batch:linear:1:4:9", "fewer distinct whole numbers"),
        ("lr:linear:1:1.0000000000000002:3", "fewer distinct float64 values"),
    ],
)
def test_a_bad_axis_is_one_clear_line(text, says):
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        Axis.parse(text)
    assert "\n" not in str(error.value)


def test_neighbours_that_collide_in_float32_are_refused_there_only():
    axis = Axis.parse("lr:linear:1:1.000001:33")
    axis.check_spacing("fp64")
    with pytest.raises(ValueError, match="neighbouring values are equal in float32"):
        axis.check_spacing("fp32")
    # tokens and seeds never reach a kernel as floats
    Axis.parse("tokens:linear:1e9:1000000001:3").check_spacing("bf16")


def test_a_grid_needs_two_different_axes():
    assert Grid.parse("lr:log:1:2:3", "tokens:log:1:2:4").shape == (3, 4)
    with pytest.raises(ValueError, match="both axes sweep 'lr'"):
        Grid.parse("lr:log:1:2:3", "lr:log:1:2:3")


def test_a_tile_that_overhangs_the_legal_range_is_cut_to_it():
    child = Axis.parse("label_smoothing:linear:0:0.6:4").tile(0, 2, 2)
    assert child.values == pytest.approx([0.05, 0.15, 0.25]) and child.low >= 0


def test_lin_is_linear():
    assert Axis.parse("warmup:lin:0:0.5:3") == Axis.parse("warmup:linear:0:0.5:3")


def test_stored_coordinates_are_taken_as_they_are():
    grid = Grid.parse("lr:log:1e-3:1e1:5", "tokens:log:1e3:1e4:3")
    moved = {axis.name: axis.values * (1 + 2**-52) for axis in (grid.y, grid.x)}  # as another machine's exp has them
    stored = grid.stored_as(moved)
    assert stored == grid and str(stored) == str(grid)
    for axis in (stored.y, stored.x):
        assert axis.values.tobytes() == moved[axis.name].tobytes()


def write(path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_points_are_read_by_their_columns_names(tmp_path):
    points = Points.read(write(tmp_path / "p.csv", "lr,lr.mlp,batch\n1e-3,0.1,2\n\n2e-3,0.2,4\n"))
    assert points.shape == (2,) and points.dims == ("point",)
    assert {name: column.tolist() for name, column in points.columns.items()} == {
        "lr": [1e-3, 2e-3],
        "lr.mlp": [0.1, 0.2],
        "batch": [2.0, 4.0],
    }


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lr,rate\n1,2\n", "has a column 'rate'; expected each of lr"),
        ("lr,lr\n1,2\n", "has a column 'lr'; expected each of"),
        ("lr\n", "holds no point"),
        ("", "holds no point"),
        ("lr\n1\ntwo\n", "line 3 is ['two']; expected 1 numbers"),
        ("lr,tokens\n1\n", "line 2 is ['1']; expected 2 numbers"),
        ("lr\n-1\n", "lr is -1; expected a value in [0, 1e+30]"),
        ("batch\n1.5\n", "batch is 1.5; expected a whole number"),
        ("lr\n1\n2\n1\n", "has the point 1 twice; remove one"),
    ],
)
def test_a_bad_list_of_points_is_one_clear_line(tmp_path, text, says):
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        Points.read(write(tmp_path / "p.csv", text))
    assert "\n" not in str(error.value)


def test_every_hyper_parameter_says_where_it_acts_and_lies_within_its_bounds():
    for name, rule in HYPER_PARAMETERS.items():
        # what follows from others where it is not given has no default of its own
        assert rule.help and (rule.low <= rule.default <= rule.high or rule.follows), name
