"""What is drawn over a map lies within what was swept, and the first epoch ends where the plan says."""

import numpy as np
from matplotlib.figure import Figure
from synthetic import two_layer_store
from test_recommend import COLUMNS, planted

from analysis.axes import extent
from analysis.overlay import draw_best, draw_epochs
from analysis.recommend import recommend


def panel():
    return Figure().subplots()


def test_the_best_rate_is_a_line_through_the_columns(tmp_path):
    axes, store = panel(), planted(tmp_path / "s")
    (line,) = draw_best(axes, store.replicate(0), recommend(store))
    found = recommend(store)
    assert np.allclose(line.get_ydata(), np.log10([column.best.value for column in found.columns]))
    assert np.allclose(line.get_xdata(), np.log10(store.run.cells.x.values))
    assert line.get_label() == "best rate, 95% over seeds"


def test_nothing_is_drawn_outside_the_swept_range(tmp_path):
    axes, store = panel(), planted(tmp_path / "s", best=50.0, exponent=1.0, breaks=99.0)
    (line,) = draw_best(axes, store.replicate(0), recommend(store))
    at = line.get_ydata()
    assert np.isnan(at).any()  # columns whose best lies on the edge
    (band,) = axes.collections
    drawn = np.concatenate([at[np.isfinite(at)], *(path.vertices[:, 1] for path in band.get_paths())])
    assert drawn.min() >= -4 and drawn.max() <= 1 + 1e-9


def test_maps_without_columns_of_one_rate_have_no_line(tmp_path):
    axes, store = panel(), two_layer_store(tmp_path / "s", np.full((4, 4), -5.0))
    assert draw_best(axes, store, recommend(store.store)) == [] and not axes.lines
    draw_epochs(axes, store)
    assert not axes.texts


def test_the_first_epoch_ends_between_the_budgets_that_see_data_once_and_again(tmp_path):
    axes, store = panel(), planted(tmp_path / "s", seeds=1)
    store.attributes["amount"] = {"rows": 78, "tokens": 78 * 64, "documents": 9, "documents_in_all": 9}
    draw_epochs(axes, store.replicate(0))
    tokens = store.run.cells.x.values
    (line,) = axes.lines
    once = tokens[tokens <= 78 * 64].max()
    assert np.log10(once) < line.get_xdata()[0] < np.log10(tokens[tokens > 78 * 64].min())
    assert [text.get_text() for text in axes.texts] == ["up to 12 epochs", "1 epoch"]
    assert extent(store.run.cells.x)[0] < line.get_xdata()[0] and len(tokens) == COLUMNS
    assert "which are 12 epochs" in recommend(store).sentence()


def test_data_seen_once_or_of_unknown_size_have_no_mark(tmp_path):
    axes, store = panel(), planted(tmp_path / "s", seeds=1)
    draw_epochs(axes, store.replicate(0))
    store.attributes["amount"] = {"rows": 940, "tokens": 940 * 64, "documents": 9, "documents_in_all": 9}
    draw_epochs(axes, store.replicate(0))
    assert not axes.lines and not axes.texts
