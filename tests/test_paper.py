"""The paper's table: six experiments trained, zoomed into and measured beside nulls; kept stores are reused."""

import csv

import pytest

from analysis import paper
from engine.config import resolve


@pytest.mark.parametrize("name", list(paper.experiments(16, 10)))
def test_every_experiment_is_a_legal_sweep(name):
    run = resolve(paper.experiments(16, 10)[name].config, "cpu")
    assert run.config.swept.precision == "fp64"
    assert run.cells.shape == (16, 16)
    assert run.config.training.data_points == {"identity": 16, "single data point": 1}.get(name, 272)


def test_the_table_has_the_experiment_and_the_nulls(tmp_path, monkeypatch, capsys):
    rows, results = tmp_path / "rows.csv", tmp_path / "stores"
    arguments = f"paper --only relu --size 16 --levels 1 --steps 20 --device cpu --results {results} --csv {rows}"
    monkeypatch.setattr("sys.argv", arguments.split())
    paper.main()
    printed = capsys.readouterr().out
    assert "relu" in printed
    assert "null: disc" in printed
    paper.main()  # the stores are there: nothing is trained again, the row is the same
    first, typical, second, _ = csv.DictReader(rows.read_text().splitlines())
    assert (first["follow"], typical["follow"]) == ("1.0", "0.5")
    assert first["maps"] == "2"
    assert {**first, "commit": ""} == {**second, "commit": ""}


def test_an_unknown_experiment_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["paper", "--only", "sigmoid"])
    with pytest.raises(SystemExit, match="2"):
        paper.main()
    assert capsys.readouterr().err.startswith("error: unknown experiment 'sigmoid', expected one of identity")
