"""The probe's labels: nothing learned is nothing moved, and a cell's label is its own whatever else its run serves."""

import math

import numpy as np
from tiny import sweep, tiny

from analysis.replicates import borders
from engine import step
from engine.outcome import Thresholds, trains


def test_a_rate_of_zero_leaves_the_probes_loss_where_it_was(tmp_path):
    store = sweep(tiny(tmp_path, y="lr:linear:0:1e-30:2"), tmp_path / "s")
    assert np.array_equal(store.read("val_loss"), store.read("val_first"))


def test_a_label_does_not_depend_on_how_many_marks_its_run_has(tmp_path):
    rates = "lr:log:1e-2:1e2:6"
    many = sweep(tiny(tmp_path, y=rates, x="tokens:linear:32:96:4"), tmp_path / "many").labels(Thresholds())
    one = sweep(tiny(tmp_path, y=rates, x="tokens:linear:96:96:1"), tmp_path / "one").labels(Thresholds())
    assert np.array_equal(many[:, :, -1], one[:, :, 0])
    assert len(np.unique(one)) > 1


def test_the_order_of_the_last_20_batches_moves_the_border_less_than_its_seeds_do(tmp_path, monkeypatch):
    steps, batch, last = 24, 2, 20
    own = {"tokens": steps * batch * 8, "trace": "off", "validation_rows": 16, "data_rows": 64}
    config = tiny(tmp_path, y="lr:log:1:12:5", x="seed:linear:0:15:16", **own)
    ordered = step.batch_order

    def with_the_last_permuted(seed: int, *arguments):
        order = ordered(seed, *arguments).copy()
        batches = order[(steps - last) * batch : steps * batch].reshape(last, batch)
        batches[:] = batches[np.random.default_rng(seed).permutation(last)]
        return order

    def border(name: str):
        store = sweep(config, tmp_path / name)
        return store.read("val_loss"), borders(store.run.cells.y.values, trains(store.labels(Thresholds()))[0].T)

    loss, before = border("before")
    monkeypatch.setattr(step, "batch_order", with_the_last_permuted)
    permuted_loss, after = border("after")
    assert (loss != permuted_loss).any()
    spread = math.log(before.high[0, 0] / before.low[0, 0]) / 4  # a 95% interval is four standard errors wide
    assert 0 < abs(math.log(after.rate[0, 0] / before.rate[0, 0])) < spread < 0.5
