"""Labels from stored numbers."""

import numpy as np
import pytest
from synthetic import julia_measure, language_store, two_layer_store

from analysis import classify
from analysis.classify import Labelling, convergence_value, counts
from engine.outcome import (
    CONVERGED,
    INVALID,
    LABELS,
    MARGINAL,
    MISSING,
    NONFINITE,
    UNDERTRAINED,
    WORSENED,
    Thresholds,
    measured,
    trains,
)


def test_every_label_is_either_trained_broken_or_not_measured():
    codes = np.arange(len(LABELS))
    assert trains(codes).tolist() == [c in (CONVERGED, MARGINAL, UNDERTRAINED) for c in codes]
    assert measured(codes).tolist() == [c not in (MISSING, INVALID) for c in codes]
    assert counts(np.array([[0, 1], [1, 4]])) == {"missing": 1, "converged": 2, "worsened": 1}


def test_the_papers_network_is_labelled_by_its_measure(tmp_path):
    store = two_layer_store(tmp_path / "s", np.array([[-1.0, 3.0], [25.0, np.nan]]))
    codes = classify.classify(store, Thresholds())
    assert codes.tolist() == [[CONVERGED, WORSENED], [NONFINITE, INVALID]]
    value = convergence_value(store, codes)
    assert np.array_equal(value, [[-1, 3], [25, np.nan]], equal_nan=True)


@pytest.mark.parametrize("trace", ["on", "off"])
def test_convergence_value_has_the_sign_of_the_label(tmp_path, trace):
    store = language_store(tmp_path / "s", 12, 6, trace=trace)
    codes = classify.classify(store, Thresholds())
    value = convergence_value(store, codes)
    assert np.isfinite(value).all()
    assert np.array_equal(value < 0, trains(codes))


def test_convergence_value_is_a_mean_over_the_planned_steps(tmp_path):
    store = language_store(tmp_path / "s", 12, 6)
    codes = classify.classify(store, Thresholds())
    row, col = np.argwhere(codes == NONFINITE)[0]
    losses = store.read("losses")[row, col]
    planned = store.planned_steps[row, col]
    assert planned == np.ceil(store.grid.x.values[col] / (4 * 64))
    expected = np.sum(np.where(np.isnan(losses[:planned]), 1e-6, 5.5 / losses[:planned])) / planned
    assert convergence_value(store, codes)[row, col] == pytest.approx(expected, rel=1e-6)


def test_thresholds_outside_their_range_are_refused():
    with pytest.raises(ValueError, match="expected values in"):
        _ = Labelling(converged=1.5).thresholds


def test_command_counts_labels(tmp_path, capsys, monkeypatch):
    two_layer_store(tmp_path / "s", julia_measure(16))
    monkeypatch.setattr("sys.argv", ["classify", "--store", str(tmp_path / "s")])
    classify.main()
    assert "converged" in capsys.readouterr().out


def test_command_without_a_store_is_one_line_and_exit_2(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["classify", "--store", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        classify.main()
    assert ended.value.code == 2
    assert "is not a sweep store" in capsys.readouterr().err
