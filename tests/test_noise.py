"""The noise floor: lines of a map trained again and compared with it."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from synthetic import julia_measure, language_store, two_layer_store, write_store

from analysis import noise
from analysis.classify import Labelling
from analysis.exponent import fit_exponent
from analysis.noise import Depth, chosen_lines, compare, line_axis, line_cells, line_config, read_noise, verdict
from analysis.variants import coarser_precision, variants
from engine.api import run_sweep
from engine.config import make_config
from engine.grid import Grid
from engine.options import RunOptions
from engine.outcome import CONVERGED, MARGINAL, MISSING, NONFINITE
from engine.store import open_map

CONFIG = make_config(
    network="two_layer",
    y="lr.0:log:1e-1:1e3:16",
    x="lr.1:log:1e-1:1e3:16",
    steps=40,
    nonlinearity="tanh",
    data_points=16,
)


def test_lines_run_along_the_learning_rate_and_are_spread_evenly():
    assert line_axis(Grid.parse("lr:log:1e-3:1:4", "tokens:log:1e3:1e4:4")) == 1
    assert line_axis(Grid.parse("tokens:log:1e3:1e4:4", "lr:log:1e-3:1:4")) == 0
    assert line_axis(Grid.parse("lr.0:log:1e-3:1:4", "lr.1:log:1e-3:1:4")) == 0
    assert line_axis(Grid.parse("beta1:linear:0:0.9:4", "beta2:linear:0:0.9:4")) == 0
    assert chosen_lines(32, 0.1) == [5, 16, 26]
    assert chosen_lines(10, 0.001) == [5]
    assert chosen_lines(3, 1.0) == [0, 1, 2]
    for share in (0.0, 1.5, -1.0):
        with pytest.raises(ValueError, match="above 0 and at most 1"):
            chosen_lines(10, share)


@pytest.mark.parametrize("line", range(7))
def test_a_line_has_the_grids_own_coordinates_bit_for_bit(line):
    grid = Grid.parse("lr:log:1e-4:1e1:5", "tokens:log:1e3:6e4:7")
    stored = {axis.name: axis.values * (1 + 2**-52) for axis in (grid.y, grid.x)}  # as another machine's exp has them
    grid = grid.stored_as(stored)
    alone = line_cells(SimpleNamespace(grid=grid), line)
    assert alone.y.values.tobytes() == grid.y.values.tobytes()
    assert alone.x.values.tobytes() == grid.x.values[line : line + 1].tobytes()


def test_changes_are_counted_near_and_away_and_only_where_both_were_measured():
    before = np.array([[CONVERGED, CONVERGED, NONFINITE, NONFINITE, CONVERGED]])
    after = np.array([[MARGINAL, NONFINITE, NONFINITE, MISSING, CONVERGED]])
    close = np.array([[False, True, True, True, False]])
    floor = compare("repeat", before, after, close, np.arange(1))
    assert (floor.near, floor.away) == (2, 2)
    assert (floor.labels_near, floor.flips_near) == (0.5, 0.5)
    assert (floor.labels_away, floor.flips_away) == (0.5, 0.0)
    assert floor.chance == 0.5
    assert not floor.is_signal


def law(alpha: float, dimension: int = 2):
    """f(eps) = 0.1 * eps^alpha, exactly."""
    eps = np.logspace(-3, 0, 7)
    return fit_exponent(eps, np.round(1000003 * 0.1 * eps**alpha), np.full(7, 1000003), 0.75, dimension)


def test_depth_follows_the_maps_own_f_of_eps():
    before = np.tile([CONVERGED, NONFINITE], (4, 200))
    after = before.copy()
    after[:, 0], after[:, 2] = NONFINITE, NONFINITE  # eight flips of 1,600
    floor = compare("precision", before, after, np.ones(before.shape, bool), np.arange(4))
    assert floor.flips == floor.flips_near == 8 / 1600
    # f falls to 0.005 = 0.1 eps^alpha at eps = 0.05^(1 / alpha); cells lie 0.5 apart
    for alpha in (1.0, 0.5):
        assert Depth(law(alpha), 0.5).zoom(floor.unseen) == pytest.approx(0.5 / 0.05 ** (1 / alpha), rel=1e-3)
    assert "down to about a 10x zoom" in verdict(floor, Depth(law(1.0), 0.5))
    assert "its f(eps) over both axes says" in verdict(floor, None)
    same = compare("repeat", before, before, np.ones(before.shape, bool), np.arange(4))
    assert same.unseen == 3 / 1600
    assert "at least" in verdict(same, Depth(law(1.0), 0.5))


def test_intervals_are_over_lines_and_their_orders_are_one_draw():
    before = np.tile([CONVERGED, NONFINITE], (6, 50))
    after = before.copy()
    after[:, ::4] = NONFINITE
    alike = compare("order", before, after, np.ones(before.shape, bool), np.arange(6))
    assert alike.flips == 0.25 and alike.flips_interval == pytest.approx((0.25, 0.25))  # every line flips the same
    after[3:] = before[3:]
    lines = np.tile(np.arange(6), 2)
    twice = compare("order", before, np.concatenate([after, after]), np.ones(before.shape, bool), lines)
    assert (twice.lines, twice.orders) == (6, 2)
    once = compare("order", before, after, np.ones(before.shape, bool), np.arange(6))
    assert twice.flips_interval == once.flips_interval
    assert once.flips_interval[0] == pytest.approx(max(0.125 - 2.571 * 0.125 / np.sqrt(5), 0))  # t with 5 degrees
    few = compare("order", before[:3], after[:3], np.ones((3, 100), bool), np.arange(3))
    assert np.isnan(few.flips_interval).all()


def test_a_coarser_precision_speaks_for_itself_and_is_left_out_where_it_merges_cells(tmp_path, monkeypatch, capsys):
    config = CONFIG.change(precision="fp64", y="lr.0:linear:10:20:8", x="lr.1:linear:10:10.0000001:8")
    store = write_store(tmp_path / "s", config, {"measure": np.where(np.eye(8) > 0, 1.0, -1.0)})
    assert list(variants(store)) == ["repeat", "permuted"]
    run(monkeypatch, "--store", store.path, "--share", 0.1, "--variants", "precision")
    assert "precision: left out, neighbouring cells are the same in fp32" in capsys.readouterr().out
    assert coarser_precision(config) == "fp32"
    assert coarser_precision(config.change(precision="fp32")) == ""
    before = np.tile([CONVERGED, NONFINITE], (1, 200))
    turned = compare("precision", before, before[:, ::-1], np.ones(before.shape, bool), np.arange(1))
    assert verdict(replace(turned, coarser="fp32"), None) == "noise in fp32, coarser than the map"
    assert verdict(turned, None) == "noise: this map is already beyond its floor"


def test_stored_lines_are_compared_with_the_map_they_came_from(tmp_path):
    store = language_store(tmp_path / "s", 32, 8)
    for line in (2, 5):
        config = line_config(store.config, line_cells(store, line))
        arrays = {name: store.read(name)[:, line : line + 1] for name in store.store.specs if name != "losses"}
        arrays["nonfinite_step"] = store.read("nonfinite_step")[:, line : line + 1].copy()
        arrays["nonfinite_step"][0] = 1  # far from the boundary, one label differs
        write_store(store.path / "noise" / f"precision-0-column-{line:05d}", config, arrays)
    (floor,) = read_noise(store, Labelling())
    assert (floor.variant, floor.lines) == ("precision", 2)
    assert floor.near + floor.away == 64
    assert floor.flips_near == 0
    assert floor.flips_away == pytest.approx(2 / floor.away)


def test_a_stored_line_that_is_none_of_the_map_is_refused(tmp_path):
    store = language_store(tmp_path / "s", 8, 4)
    write_store(store.path / "noise" / "repeat-0-column-00001", line_config(store.config, line_cells(store, 2)), {})
    with pytest.raises(ValueError, match="is not a line of"):
        read_noise(store, Labelling())


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["noise", "--device", "cpu", *map(str, arguments)])
    noise.main()


def test_command_trains_every_variant_of_the_papers_network(tmp_path, monkeypatch, capsys):
    path = tmp_path / "s"
    run_sweep(CONFIG, RunOptions(store=str(path), device="cpu", quiet=True))
    run(monkeypatch, "--store", path, "--share", 0.2)
    assert "noise floor" in capsys.readouterr().out
    floors = {floor.variant: floor for floor in read_noise(open_map(path), Labelling())}
    assert list(floors) == ["repeat", "precision", "permuted"]
    assert {floor.lines for floor in floors.values()} == {3}
    assert floors["repeat"].labels_near == floors["repeat"].labels_away == 0
    assert floors["repeat"].flips_interval[0] == 0 < floors["repeat"].flips_interval[1]
    for floor in floors.values():
        assert floor.flips_away < 0.2


def test_unknown_variants_are_refused(tmp_path, monkeypatch, capsys):
    two_layer_store(tmp_path / "s", julia_measure(16))
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "--store", tmp_path / "s", "--variants", "repeat,colour")
    assert ended.value.code == 2
    assert "variants has colour" in capsys.readouterr().err
