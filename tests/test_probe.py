"""The probe's labels: nothing learned is nothing moved, and a cell's label is its own whatever else its run serves."""

import numpy as np
from tiny import sweep, tiny

from engine.outcome import Thresholds


def test_a_rate_of_zero_leaves_the_probes_loss_where_it_was(tmp_path):
    store = sweep(tiny(tmp_path, y="lr:linear:0:1e-30:2"), tmp_path / "s")
    assert np.array_equal(store.read("val_loss"), store.read("val_first"))


def test_a_label_does_not_depend_on_how_many_marks_its_run_has(tmp_path):
    rates = "lr:log:1e-2:1e2:6"
    many = sweep(tiny(tmp_path, y=rates, x="tokens:linear:32:96:4"), tmp_path / "many").labels(Thresholds())
    one = sweep(tiny(tmp_path, y=rates, x="tokens:linear:96:96:1"), tmp_path / "one").labels(Thresholds())
    assert np.array_equal(many[:, :, -1], one[:, :, 0])
    assert len(np.unique(one)) > 1
