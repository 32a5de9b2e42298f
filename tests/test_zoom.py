"""Zooms are child grids, trained by the engine and stored inside their parent."""

import itertools
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from synthetic import julia_measure, two_layer_store

from analysis import zoom
from analysis.colours import equalise
from analysis.movie import frames, pick, view
from analysis.sequence import Level, refinable, width
from analysis.tile import Tile, followed_tile, tile_around
from engine.api import run_sweep
from engine.config import make_config
from engine.grid import Axis, Grid
from engine.options import RunOptions
from engine.store import open_map

CONFIG = make_config(
    network="two_layer", y="lr.0:log:1e-1:1e3:16", x="lr.1:log:1e-1:1e3:16", steps=40, nonlinearity="identity"
)


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """A small map of the paper's network, trained."""
    path = tmp_path_factory.mktemp("zoom") / "parent"
    run_sweep(CONFIG, RunOptions(store=str(path), device="cpu", quiet=True))
    return path


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["zoom", "--device", "cpu", *map(str, arguments)])
    zoom.main()


@given(hnp.arrays(bool, (11, 13)), st.integers(2, 6), st.integers(2, 6))
def test_the_followed_tile_holds_most_boundary_blocks(blocks, height, width):
    if not blocks.any():
        with pytest.raises(ValueError, match="no boundary to follow"):
            followed_tile(blocks, height, width)
        return
    tile = followed_tile(blocks, height, width)
    assert (tile.bottom - tile.top, tile.right - tile.left) == (height, width)
    assert 0 <= tile.top <= tile.bottom <= 12
    assert 0 <= tile.left <= tile.right <= 14

    def held(top, left):
        return blocks[top : top + height - 1, left : left + width - 1].sum()

    most = max(held(top, left) for top in range(13 - height) for left in range(15 - width))
    assert held(tile.top, tile.left) == most
    counts = sorted(held(top, left) for top in range(13 - height) for left in range(15 - width))
    counts = [count for count in counts if count > 0]
    typical, quietest = (followed_tile(blocks, height, width, follow) for follow in (0.5, 0.0))
    assert held(typical.top, typical.left) in counts[(len(counts) - 1) // 2 : len(counts) // 2 + 1]
    assert held(quietest.top, quietest.left) == counts[0]


def test_a_target_is_kept_inside_the_grid():
    grid = Grid.parse("lr:log:1e-3:1e0:16", "beta1:linear:0:0.75:16")
    assert tile_around(grid, (1e-3, 0.0), 4, 4) == Tile(0, 4, 0, 4)
    assert tile_around(grid, (1.0, 0.75), 4, 4) == Tile(12, 16, 12, 16)
    tile = tile_around(grid, (float(grid.y.values[8]), float(grid.x.values[7])), 5, 3)
    assert tile == Tile(6, 11, 6, 9)
    for target in ((1e-5, 0.1), (-1.0, 0.1), (0.1, 2.0)):
        with pytest.raises(ValueError, match="lies outside"):
            tile_around(grid, target, 4, 4)


def test_refining_stops_before_numbers_run_out():
    wide, deep = Axis("lr.0", "log", 1e-3, 1e6, 64), Axis("lr.0", "log", 0.1, 0.1 * (1 + 1e-12), 64)
    assert refinable(wide, "fp32") > 1e5
    assert refinable(wide, "fp64") > 1e7 * refinable(wide, "fp32")
    assert refinable(deep, "fp64") < 100
    assert refinable(deep, "fp32") < 1
    assert refinable(Axis("seed", "linear", 0, 60, 7), "fp32") == 10
    assert refinable(Axis("lr", "log", 1, 1, 1), "fp32") == np.inf
    # what refinable allows, the grid accepts
    child = deep
    while refinable(child, "fp64") >= 2:
        child = child.tile(0, 64, 2).tile(32, 96, 1)
        assert len(np.unique(child.values)) == 64


def test_the_view_shrinks_onto_the_tile_around_one_fixed_point():
    along = np.array([0.0, 1.0])
    start, stop = 0.5, 0.75
    assert view(start, stop, 0.0, along) == pytest.approx([0, 1])
    assert view(start, stop, 1.0, along) == pytest.approx([start, stop])
    fixed = start / (1 - (stop - start))
    for time in (0.2, 0.6):
        low, high = view(start, stop, time, along)
        assert (fixed - low) / (high - low) == pytest.approx(fixed)
        assert high - low == pytest.approx((stop - start) ** time)


def test_a_movie_joins_its_levels_without_a_jump():
    parent = julia_measure(64)
    tile = Tile(16, 48, 8, 40)
    child = np.kron(parent[16:48, 8:40], np.ones((2, 2)))  # the same map, twice as dense
    none = np.zeros((64, 64), np.uint8)
    levels = [Level(None, none, parent, tile), Level(None, none, child, None)]
    pictures = list(frames(levels, 64, 8))
    assert len(pictures) == 9
    assert np.allclose(pictures[-1], equalise(child))
    # both levels tell the same story, so a picture is one level seen through the view
    for number, picture in enumerate(pictures[:-1]):
        along = (np.arange(64) + 0.5) / 64
        y, x = view(16 / 64, 48 / 64, number / 8, along), view(8 / 64, 40 / 64, number / 8, along)
        mixed = (1 - number / 8) * equalise(parent) + number / 8 * equalise(parent, child)
        inner = pick(mixed, y, x)
        assert np.mean(np.isclose(picture, inner)) > 0.95


def test_one_zoom_stores_a_child_that_says_what_the_parent_says(parent, monkeypatch, capsys):
    run(monkeypatch, "--store", parent, "--rows", "4:12", "--cols", "2:10", "--factor", "3")
    child = open_map(parent / "zoom" / "rows-4-12-cols-2-10-x3")
    assert open_map(parent).children() == [child.path]
    assert child.grid.shape == (24, 24)
    whole = open_map(parent)
    # every third child cell lies on a parent's cell
    assert child.grid.y.values[1::3] == pytest.approx(whole.grid.y.values[4:12], rel=1e-12)
    mine, theirs = child.read("measure")[1::3, 1::3], whole.read("measure")[4:12, 2:10]
    assert np.mean(np.sign(mine) == np.sign(theirs)) > 0.9
    assert (parent / "figures" / "zoom-rows-4-12-cols-2-10-x3.png").exists()
    assert (child.figures / "map.png").exists()
    assert "24 x 24 cells" in capsys.readouterr().out


def test_a_sequence_follows_the_boundary_and_is_not_trained_twice(parent, monkeypatch, capsys, tmp_path):
    arguments = ["--store", parent, "--levels", 2, "--size", 12, "--factor", 4, "--movie", tmp_path / "z.gif"]
    arguments += ["--pixels", 48, "--frames", 3]
    run(monkeypatch, *arguments)
    shown = capsys.readouterr().out
    assert "level 2:" in shown
    assert "published estimator" in shown
    last = open_map(parent / "zoom" / "x4-size-12-level-02")
    assert last.config.swept.precision == "fp64"
    assert last.grid.shape == (12, 12)
    with Image.open(tmp_path / "z.gif") as movie:
        assert (movie.n_frames, movie.size) == (7, (48, 48))

    def refuse(*_):
        raise AssertionError("a stored level was trained again")

    monkeypatch.setattr("engine.api.run_sweep", refuse)
    run(monkeypatch, *arguments)


def test_a_sequence_stops_at_the_number_spacing(tmp_path, monkeypatch, capsys):
    run_sweep(CONFIG, RunOptions(store=str(tmp_path / "s"), device="cpu", quiet=True))
    target = "3.0,3.0"
    run(monkeypatch, "--store", tmp_path / "s", "--levels", 40, "--size", 32, "--factor", 16, "--target", target)
    shown = " ".join(capsys.readouterr().out.split())
    assert "neighbouring cells would lie under 4 number spacings apart" in shown
    axes = [open_map(path).grid.y for path in open_map(tmp_path / "s").children()]
    assert 8 <= len(axes) <= 16
    assert all(axis.low < 3.0 < axis.high for axis in axes)
    for axis, deeper in itertools.pairwise(axes):
        assert width(deeper) == pytest.approx(width(axis) / 16, rel=0.2)


def test_the_mp4_writer_is_named_where_it_is_missing(tmp_path, parent, monkeypatch, capsys):
    arguments = ["--store", parent, "--levels", 1, "--size", 12, "--pixels", 48, "--frames", 2]
    if shutil.which("ffmpeg"):
        run(monkeypatch, *arguments, "--movie", tmp_path / "z.mp4")
        assert (tmp_path / "z.mp4").stat().st_size > 500
        capsys.readouterr()
    monkeypatch.setattr("matplotlib.animation.FFMpegWriter.isAvailable", classmethod(lambda _: False))
    with pytest.raises(SystemExit):
        run(monkeypatch, *arguments, "--movie", tmp_path / "y.mp4")
    assert "ffmpeg, which is not installed" in capsys.readouterr().err


BAD = {
    "--factor 1": "factor is 1, expected at least 2",
    "--rows 4:99": "rows is '4:99', expected a:b with 0 <= a < b <= 16",
    "--rows 5:5": "expected a:b",
    "--cols b:2": "cols is 'b:2'",
    "--levels 2 --rows 1:4": "a sequence of --levels follows",
    "--movie a.gif": "--movie needs a sequence",
    "--levels 2 --movie a.avi": "expected a name ending in .gif or .mp4",
    "--target 4": "expected two numbers y,x",
    "--target 1e9,1": "lies outside",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_arguments_are_one_line_and_exit_2(arguments, parent, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "--store", parent, *arguments.split())
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert BAD[arguments] in error
    assert error.count("\n") == 1


def test_zooming_below_the_number_spacing_is_refused(tmp_path, monkeypatch, capsys):
    store = two_layer_store(tmp_path / "s", julia_measure(16), "lr.0:log:1.0:1.00001", "lr.1:log:1.0:1.00001")
    with pytest.raises(SystemExit):
        run(monkeypatch, "--store", store.path, "--factor", 64)
    assert "neighbouring values are equal in float32" in capsys.readouterr().err
    assert not store.children()


def test_a_map_without_a_boundary_is_refused(tmp_path, monkeypatch, capsys):
    store = two_layer_store(tmp_path / "s", -np.ones((16, 16)))
    with pytest.raises(SystemExit):
        run(monkeypatch, "--store", store.path)
    assert "no boundary to follow" in capsys.readouterr().err


def test_an_axis_through_zero_can_be_refined_as_one_beside_it():
    through, beside = Axis("offset", "linear", -4.0, 4.0, 33), Axis("offset", "linear", 0.0, 8.0, 33)
    assert refinable(through, "fp64") >= refinable(beside, "fp64") > 1e12
