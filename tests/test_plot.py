"""The maps' pictures and the one-screen summary."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from synthetic import julia_measure, language_store, two_layer_store, write_store

from analysis import plot
from analysis.axes import extent, ticks
from analysis.classify import Labelling
from analysis.colours import GAP, LABEL_COLOURS, equalise
from analysis.maps import analyse, trained_share
from analysis.panels import SIZES, boundary_segments, style
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
        ("lr:log:1e-4:1e1:32", "$10^{-4}$", "learning rate"),
        ("lr:log:0.02:0.03:8", "0.02", "learning rate"),
        ("beta1:linear:0:0.9:10", "0", "beta1"),
        ("seed:linear:3:3:1", "2.6", "seed"),
        ("tokens:log:2e3:3e4:8", "2k", "training tokens"),
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
    run(monkeypatch, "--store", store.path)
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) <= 24
    for part in ("32 x 32 cells", "undertrained", "critical lr", "dimension", "nulls", "warning", "map.png"):
        assert part in " ".join(shown.split())
    picture = np.array(Image.open(store.figures / "map.png").convert("RGB"))
    assert picture.shape[1] > 2000
    for name in ("converged", "nonfinite"):
        colour = [int(LABEL_COLOURS[name][i : i + 2], 16) for i in (1, 3, 5)]
        assert (picture == colour).all(-1).sum() > 2000


@pytest.mark.parametrize("panel", ["label", "loss", "convergence"])
def test_command_draws_single_panels_of_the_papers_network(tmp_path, monkeypatch, panel):
    store = two_layer_store(tmp_path / "s", julia_measure(48))
    run(monkeypatch, "--store", store.path, "--panel", panel)
    assert (store.figures / f"{panel}.png").stat().st_size > 10_000


@pytest.mark.parametrize(("suffix", "starts"), [(".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml")])
def test_the_suffix_says_the_kind_of_picture(tmp_path, monkeypatch, suffix, starts):
    path = tmp_path / "new" / f"map{suffix}"
    run(monkeypatch, "--store", language_store(tmp_path / "s", 8, 6).path, "--to", path)
    assert path.read_bytes().startswith(starts)


def test_a_picture_says_network_data_axes_and_that_one_seed_is_one_draw(tmp_path, monkeypatch):
    path = tmp_path / "map.svg"  # whose text is text
    run(monkeypatch, "--store", language_store(tmp_path / "s", 8, 6).path, "--to", path)
    text = path.read_text("utf-8")
    for part in ("gpt, depth 1, width 64 on chitchat", "learning rate", "training tokens", "one draw", "worsened"):
        assert part in text


@pytest.mark.parametrize("size", SIZES)
def test_nothing_of_a_picture_leaves_it_or_lies_over_a_map(tmp_path, size):
    found = analyse(language_store(tmp_path / "s", 12, 10), Labelling(), None)
    with rc_context(style(size)):
        figure = plot.draw(found, size=size)
        FigureCanvasAgg(figure).draw()
        panels = [axes for axes in figure.axes if axes.get_title(loc="left")]
        boxes = [axes.get_window_extent() for axes in panels]
        around = [text for text in figure.texts if text.get_text()]
        for axes in panels:
            around += [axes.xaxis.label, axes.get_legend(), *(child.xaxis.label for child in axes.child_axes)]
        for each in filter(None, around):
            extent_of = each.get_window_extent()
            assert not any(extent_of.overlaps(box) for box in boxes), each
            assert extent_of.x0 >= 0 and extent_of.x1 <= figure.bbox.x1 and extent_of.y0 >= 0, each


def test_p_train_shows_the_share_of_seeds_and_where_it_falls(tmp_path, monkeypatch):
    rate = np.geomspace(1e-3, 10, 12)[:, None]
    breaks = 10.0 ** np.linspace(-1, 0, 16)[:, None, None]  # every seed at another rate
    loss = np.where(rate < breaks, 4.0, 9.0) * np.ones((16, 12, 5))
    config = make_config(y="lr:log:1e-3:10:12", x="tokens:log:1e3:6e4:5", replicates=16, trace="off")
    arrays = {"first_loss": 5.5, "val_first": 5.5, "val_loss": loss, "last_loss": loss, "loss_min": 3, "loss_max": 9}
    store = write_store(tmp_path / "s", config, arrays)
    found = trained_share(store.store, Labelling().thresholds)
    assert found.share[:, 0] == pytest.approx((rate < breaks[:, 0, 0]).mean(1))
    assert found.borders.levels == (0.5, 0.9) and not found.missing
    half, most = found.borders.rate[:, 0]
    assert 0.1 < most < half < 1
    path = tmp_path / "trained.svg"
    run(monkeypatch, "--store", store.path, "--panel", "trained", "--to", path)
    assert all(part in path.read_text("utf-8") for part in ("LR50", "LR90", "P(train) over 16 seeds"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--to", "map.gif"], "to is 'map.gif'; expected a name that ends in one of .png, .pdf, .svg"),
        (["--size", "poster"], "size is 'poster'; expected one of screen, slide, paper"),
        (["--panel", "all"], "panel is 'all'; expected one of label, loss, convergence, trained"),
        (["--panel", "trained"], "has one seed; expected several for P(train)"),
    ],
)
def test_a_picture_that_there_is_not_is_one_line(tmp_path, monkeypatch, capsys, arguments, said):
    store = language_store(tmp_path / "s", 6, 4)
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, "--store", store.path, *arguments)
    [line] = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and said in line


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
