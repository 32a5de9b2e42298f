"""The maps' pictures and the one-screen summary."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from synthetic import julia_measure, language_store, two_layer_store, write_store

from analysis import plot
from analysis.axes import extent, ticks
from analysis.colours import GAP, LABEL_COLOURS, equalise
from analysis.panels import boundary_segments
from engine.config import make_config
from engine.grid import Axis
from engine.outcome import CONVERGED, INVALID, MISSING, NONFINITE, WORSENED

VALUES = hnp.arrays(float, st.integers(1, 40), elements=st.floats(-1e6, 1e6).filter(lambda v: abs(v) > 1e-6))


@given(VALUES)
def test_equalising_keeps_signs_and_order_and_uses_the_range(values):
    placed = equalise(values)
    assert np.array_equal(np.sign(placed), np.sign(values))
    assert np.all((np.abs(placed) > GAP) & (np.abs(placed) < 1))
    order = np.argsort(values, kind="stable")
    assert np.all(np.diff(placed[order]) >= 0)


@given(VALUES)
def test_equalising_is_blind_to_monotone_change(values):
    stretched = np.where(values > 0, 8, 2) * values  # powers of two: exact, so no new ties
    assert np.array_equal(equalise(values), equalise(stretched))


def test_equalising_spreads_each_side_evenly_and_keeps_nan():
    placed = equalise(np.array([-4.0, -1.0, np.nan, 10.0, 20.0, 30.0, 30.0]), gap=0.0)
    assert placed == pytest.approx([-0.75, -0.25, np.nan, 0.125, 0.375, 0.75, 0.75], nan_ok=True)
    assert equalise(np.array([2.0]), reference=np.array([-1.0]), gap=0.0) == pytest.approx([0.5])


def test_boundary_segments_lie_between_measured_cells_only():
    codes = np.array([[CONVERGED, WORSENED], [CONVERGED, MISSING], [NONFINITE, INVALID]])
    assert boundary_segments(codes).tolist() == [[[1, 0], [1, 1]], [[0, 2], [1, 2]]]
    assert len(boundary_segments(np.full((4, 4), CONVERGED))) == 0


@pytest.mark.parametrize(
    ("text", "first", "name"),
    [
        ("lr:log:1e-4:1e1:32", "$10^{-4}$", "lr"),
        ("lr:log:0.02:0.03:8", "0.02", "lr"),
        ("beta1:linear:0:0.9:10", "0", "beta1"),
        ("seed:linear:3:3:1", "2.6", "seed"),
    ],
)
def test_ticks_read_as_numbers(text, first, name):
    at, texts, label = ticks(Axis.parse(text))
    assert texts[0] == first
    assert label == name
    assert len(at) == len(texts) >= 2


def test_ticks_of_a_deep_zoom_count_from_its_middle():
    at, texts, label = ticks(Axis("lr", "log", 0.1, 0.1 * (1 + 1e-9), 64))
    low, high = extent(Axis("lr", "log", 0.1, 0.1 * (1 + 1e-9), 64))
    assert "0" in texts
    assert len(set(texts)) == len(texts) >= 3
    assert "0.1000000000" in label
    assert np.all((at >= low) & (at <= high))


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["plot", *map(str, arguments)])
    plot.main()


def test_command_draws_the_map_and_prints_one_screen(tmp_path, capsys, monkeypatch):
    store = language_store(tmp_path / "s", 32, 32)
    run(monkeypatch, "--store", store.path, "--pdf")
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) <= 24
    for part in ("32 x 32 cells", "undertrained", "critical lr", "dimension", "nulls", "warning", "map.png"):
        assert part in shown
    picture = np.array(Image.open(store.figures / "map.png").convert("RGB"))
    assert picture.shape[1] > 2000
    for name in ("converged", "nonfinite"):
        colour = [int(LABEL_COLOURS[name][i : i + 2], 16) for i in (1, 3, 5)]
        assert (picture == colour).all(-1).sum() > 2000
    assert (store.figures / "map.pdf").stat().st_size > 10_000


def test_command_draws_the_papers_network_and_single_panels(tmp_path, monkeypatch):
    store = two_layer_store(tmp_path / "s", julia_measure(96))
    run(monkeypatch, "--store", store.path, "--out", tmp_path / "pictures", "--separate")
    names = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert names == ["convergence.png", "label.png", "loss.png", "map.png"]


@pytest.mark.parametrize("case", ["one label", "nothing computed", "one cell"])
def test_maps_without_a_boundary_are_drawn_and_say_so(case, tmp_path, capsys, monkeypatch):
    config = make_config(y="beta1:linear:0:0.9:12", x="beta2:linear:0:0.9:12", trace="off")
    if case == "one cell":
        config = config.change(y="lr:log:1e-3:1e-3:1", x="beta2:linear:0.9:0.9:1", beta1=None)
    status = 0 if case == "nothing computed" else 1
    store = write_store(
        tmp_path / "s", config, {"status": status, "first_loss": 5.0, "last_loss": 4.0, "val_loss": 4.0, "steps": 9}
    )
    run(monkeypatch, "--store", store.path)
    assert "none: every measured cell is on one side" in capsys.readouterr().out
