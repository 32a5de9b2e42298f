"""Out of the store: one row a cell, with its hyper-parameters, label, best-rate flag and measurements."""

import numpy as np
import pytest
from pyarrow import csv, parquet
from synthetic import julia_measure, two_layer_store
from test_recommend import COLUMNS, RATES, planted

from analysis import export as command
from analysis.export import export, to_xarray
from analysis.recommend import recommend
from engine.outcome import LABELS, Thresholds
from engine.store import open_store

SEEDS = 2


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return planted(tmp_path_factory.mktemp("export") / "s", seeds=SEEDS)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_every_cell_is_a_row_with_what_the_store_holds(kind, store, tmp_path):
    path = tmp_path / f"cells.{kind}"
    assert export(store, path) == SEEDS * RATES * COLUMNS
    table = {"csv": csv.read_csv, "parquet": parquet.read_table}[kind](path)
    rows = {name: table[name].to_numpy() for name in table.column_names}
    shape = store.run.shape
    for name in ("val_loss", "nonfinite_step", "steps"):
        np.testing.assert_allclose(rows[name].reshape(shape), store.read(name), rtol=1e-6)  # digits of a csv
    assert np.allclose(rows["lr"].reshape(shape)[1, :, 2], store.run.cells.y.values)
    assert np.allclose(rows["tokens"].reshape(shape)[1, 3], store.run.cells.x.values)
    assert rows["seed"].reshape(shape)[:, 0, 0].tolist() == [0, 1] and set(rows["beta2"]) == {0.95}
    assert (rows["label"].reshape(shape) == np.array(LABELS)[store.labels(Thresholds())]).all()
    assert "losses" not in rows and "momentum" not in rows


def test_one_cell_a_column_is_flagged_as_the_recommended_one(store):
    data = to_xarray(store)
    found = recommend(store)
    assert data["best"].sum("lr").values.tolist() == [1] * COLUMNS
    assert [tuple(cell) for cell in np.argwhere(data["best"].values)] == sorted(found.cells())
    assert data.attrs["recommendation"] == found.sentence()
    assert set(data["label"].values.ravel()) <= set(LABELS)


def test_the_papers_network_has_its_best_cell(tmp_path):
    two_layer_store(tmp_path / "s", julia_measure(8))
    store = open_store(tmp_path / "s")
    data = to_xarray(store)
    assert int(data["best"].sum()) == 1
    assert float(data["measure"].values[0][data["best"].values][0]) == julia_measure(8).min()


@pytest.mark.parametrize(("to", "says"), [("cells.json", "expected a path that ends in"), ("none/c.csv", "none/c.csv")])
def test_what_cannot_be_written_is_one_line(to, says, store, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["export", "--store", str(store.path), "--to", str(tmp_path / to)])
    with pytest.raises(SystemExit) as ended:
        command.main()
    error = capsys.readouterr().err
    assert ended.value.code == 2 and says in error and error.count("\n") == 1
