"""Boundary blocks and critical learning rates."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from synthetic import language_store

from analysis import boundary
from analysis.boundary import ALWAYS_BREAKS, BRACKETED, NEVER_BREAKS, UNMEASURED, critical, edges, near
from engine.grid import Grid
from engine.outcome import CONVERGED, INVALID, MISSING, NONFINITE, UNDERTRAINED, WORSENED

MAPS = hnp.arrays(
    np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=9), elements=st.integers(0, 2)
)


@given(MAPS)
def test_edges_are_the_blocks_whose_four_labels_differ(labels):
    rows, cols = labels.shape
    blocks = [[len(set(labels[i : i + 2, j : j + 2].ravel())) > 1 for j in range(cols - 1)] for i in range(rows - 1)]
    assert edges(labels).tolist() == blocks


@given(MAPS)
def test_edges_turn_with_the_map_and_ignore_which_label_is_which(labels):
    found = edges(labels)
    assert np.array_equal(edges(labels[::-1]), found[::-1])
    assert np.array_equal(edges(labels[:, ::-1]), found[:, ::-1])
    assert np.array_equal(edges(labels.T), found.T)
    assert np.array_equal(edges(np.array([7, 3, 5])[labels]), found)


def test_the_frame_and_unknown_cells_are_no_boundary():
    assert not edges(np.ones((5, 5))).any()
    labels = np.zeros((4, 4))
    labels[0, 0] = 1
    assert edges(labels).sum() == 1
    known = np.ones((4, 4), bool)
    known[0, 0] = False
    assert not edges(labels, known).any()


@given(hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=8)), st.integers(0, 3))
def test_near_is_every_cell_within_the_distance_of_a_blocks_cells(blocks, distance):
    expected = np.zeros((blocks.shape[0] + 1, blocks.shape[1] + 1), bool)
    for i, j in np.argwhere(blocks):
        expected[max(i - distance, 0) : i + 2 + distance, max(j - distance, 0) : j + 2 + distance] = True
    assert np.array_equal(near(blocks, distance), expected)


def test_critical_rate_is_the_mean_of_its_bracket_with_every_verdict():
    grid = Grid.parse("lr:log:1e-3:1e1:5", "tokens:log:1e3:1e4:5")
    good, bad, gone = UNDERTRAINED, NONFINITE, MISSING
    codes = np.array(
        [  # a column a case: plain, islands above do not count, never, always, unmeasured
            [good, CONVERGED, good, bad, gone],
            [good, bad, good, good, INVALID],
            [gone, good, good, good, gone],
            [WORSENED, bad, good, good, gone],
            [good, good, gone, bad, gone],
        ]
    )
    found = critical(grid, codes)
    assert found.verdict.tolist() == [BRACKETED, BRACKETED, NEVER_BREAKS, ALWAYS_BREAKS, UNMEASURED]
    assert found.below == pytest.approx([1e-2, 1e-3, 1.0, np.nan, np.nan], nan_ok=True)
    assert found.above == pytest.approx([1.0, 1e-2, np.nan, 1e-3, np.nan], nan_ok=True)
    assert found.value == pytest.approx([1e-1, 10**-2.5, np.nan, np.nan, np.nan], nan_ok=True)


def test_critical_rate_reads_rows_where_the_rate_is_the_x_axis():
    grid = Grid.parse("tokens:log:1e3:1e4:2", "lr:log:1e-2:1e0:3")
    codes = np.array([[CONVERGED, CONVERGED, NONFINITE], [CONVERGED, NONFINITE, NONFINITE]])
    assert critical(grid, codes).value == pytest.approx([10**-0.5, 10**-1.5])


def test_a_plain_learning_rate_comes_before_a_groups():
    assert boundary.learning_rate_axis(Grid.parse("lr.mlp:log:1e-2:1e0:3", "lr:log:1e-2:1e0:3")) == 1
    assert boundary.learning_rate_axis(Grid.parse("lr.0:log:1e-2:1e0:3", "lr.1:log:1e-2:1e0:3")) == 0
    with pytest.raises(ValueError, match="needs a learning-rate axis"):
        boundary.learning_rate_axis(Grid.parse("beta1:linear:0:0.9:3", "beta2:linear:0:0.9:3"))


def test_command_prints_every_column(tmp_path, capsys, monkeypatch):
    language_store(tmp_path / "s", 12, 6)
    monkeypatch.setattr("sys.argv", ["boundary", "--store", str(tmp_path / "s")])
    boundary.main()
    assert capsys.readouterr().out.count("bracketed") == 6
