"""Rules of thumb recover the law a synthetic map was made with."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from synthetic import julia_measure, language_store, two_layer_store

from analysis import rules
from analysis.boundary import critical
from analysis.classify import classify
from analysis.early_warning import SIGNS, EarlyWarning, early_warning, near_boundary, roc_area
from analysis.power_law import held_out, power_law
from analysis.rules import best_rates, safety
from engine.outcome import Thresholds

EXPONENT = -0.3  # of the synthetic map's critical rate, 0.3 at 1e4 tokens


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return language_store(tmp_path_factory.mktemp("rules") / "s", 64, 16, EXPONENT)


@pytest.fixture(scope="module")
def codes(store):
    return classify(store, Thresholds())


@pytest.fixture(scope="module")
def found(store, codes):
    return critical(store.grid, codes)


def test_the_power_law_is_recovered_within_its_interval(found):
    law = power_law(found)
    assert law.exponent_low < EXPONENT < law.exponent_high
    assert law.exponent == pytest.approx(EXPONENT, abs=0.05)
    assert np.interp(1e4, law.at, law.fitted) == pytest.approx(0.3, rel=0.1)
    assert np.all((law.low < law.fitted) & (law.fitted < law.high))


def test_held_out_columns_are_off_by_little_more_than_a_grid_step(store, found):
    unseen = held_out(found)
    step = np.exp(np.diff(np.log(store.grid.y.values)).mean())
    assert unseen.left_out.shape == (16,)
    assert unseen.ahead.shape == (8,)
    assert unseen.left_out.max() < step**1.5
    assert unseen.ahead.max() < step**2
    assert unseen.predicted == pytest.approx(found.value, rel=step - 1)


def test_half_the_predicted_rate_is_safe_and_the_best_lies_between(store, codes, found):
    safe = safety(store, codes, found, held_out(found).predicted)
    assert safe.runs > 300
    assert safe.trained == safe.at_it == 1.0
    assert 0 <= safe.converged < 1
    assert safety(store, codes, found, 100 * found.value).trained < 1
    best = best_rates(store, codes, found) / found.value
    assert np.all((best > 0.5) & (best < 1))


def test_the_first_losses_tell_the_end_and_a_coin_does_not(store, codes, found):
    close = near_boundary(store, found)
    early = early_warning(store, codes, close)
    assert early.first[0] == 2
    assert early.areas["last"][3] > 0.97
    assert early.areas["last"][3] > early.areas["learning rate alone"][3]
    assert early.soon is not None
    assert early.soon <= 6
    assert np.all(np.diff(early.runs) <= 0)
    shuffled = np.random.default_rng(0).permutation(codes.ravel()).reshape(codes.shape)
    coin = early_warning(store, shuffled)
    assert coin.areas["last"][0] == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize(
    ("areas", "runs", "soon"),
    [
        ([0.90, 0.96, 0.97, 0.98, 0.99], [900, 800, 700, 600, 500], 3),
        ([0.90, 0.96, 0.94, 0.98, 0.99], [900, 800, 700, 600, 500], 9),  # sure by chance at 3
        ([0.90, 0.96, 0.94, 0.93, 0.99], [900, 800, 700, 600, 500], None),  # sure in the last half alone
        ([0.90, 0.94, 0.94, 0.98, 0.99], [900, 800, 700, 40, 20], None),  # by few runs
        ([0.96, 0.96, 0.96, np.nan, 0.4], [900, 800, 700, 40, 20], 2),
    ],
)
def test_a_number_of_losses_tells_if_every_later_one_does(areas, runs, soon):
    first = np.array([2, 3, 5, 9, 20])
    signs = {name: np.array(areas) for name in SIGNS}
    assert EarlyWarning(first, np.array(runs), np.zeros(5), signs).soon == soon


@given(hnp.arrays(float, st.integers(2, 30), elements=st.integers(0, 5)), st.randoms())
def test_roc_area_counts_pairs(sign, random):
    broke = np.array([random.random() < 0.5 for _ in sign])
    pairs = [(a > b) + (a == b) / 2 for a in sign[broke] for b in sign[~broke]]
    expected = np.mean(pairs) if pairs else np.nan
    assert roc_area(sign, broke) == pytest.approx(expected, nan_ok=True)


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["rules", *map(str, arguments)])
    rules.main()


def test_command_prints_and_draws(store, capsys, monkeypatch):
    run(monkeypatch, "--store", store.path)
    shown = capsys.readouterr().out
    for part in ("critical rate", "held-out columns", "best rate", "early warning", "ROC area"):
        assert part in shown
    assert (store.figures / "rules.png").stat().st_size > 20_000


@pytest.mark.parametrize("case", ["no traces", "too few columns", "no learning rate"])
def test_what_cannot_be_done_is_one_line_and_exit_2(case, tmp_path, capsys, monkeypatch):
    if case == "no traces":
        language_store(tmp_path / "s", 16, 8, trace="off")
        expected = "holds no loss traces"
    elif case == "too few columns":
        language_store(tmp_path / "s", 16, 3)
        expected = "a power law needs 4"
    else:
        two_layer_store(tmp_path / "s", julia_measure(8), y="offset:linear:-1:1", x="seed:linear:0:700")
        expected = "needs a learning-rate axis"
    switch = ["--noearly_warning"] if case == "no learning rate" else []
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "--store", tmp_path / "s", *switch)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert expected in " ".join(error.split())
    assert error.count("\n") == 1


def test_without_traces_the_rest_is_printed(tmp_path, capsys, monkeypatch):
    language_store(tmp_path / "s", 16, 8, trace="off")
    run(monkeypatch, "--store", tmp_path / "s", "--noearly_warning")
    shown = capsys.readouterr().out
    assert "best rate" in shown
    assert "early warning" not in shown
