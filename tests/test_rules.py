"""Rules of thumb: what a synthetic map was made with is found where its seeds carry it, and refused where not."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from synthetic import julia_measure, language_store, two_layer_store

from analysis import rules
from analysis.early_warning import FROM_END, SIGNS, EarlyWarning, early_warning, roc_area
from engine.outcome import Thresholds, trains
from engine.store import open_store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return language_store(tmp_path_factory.mktemp("rules") / "s", 64, 16)


def test_one_seed_is_one_draw_and_carries_no_law(store):
    found = rules.rules(open_store(store.path), Thresholds())
    assert found.seeds == 1
    assert found.borders is None
    assert found.critical is None
    assert "1 seeds, 4 are needed" in found.best_law.refused
    words = dict(rules.sentences(found))
    assert words["from"].startswith("one seed, one draw")
    assert "no law" in words["best-rate law"]
    assert "LR50 needs 8, LR90 16" in words["not said"]


def test_the_best_rate_lies_below_the_border_and_the_safe_rate_below_the_best(store):
    found = rules.rules(open_store(store.path), Thresholds())
    border = 0.3 * (found.found.other.values / 1e4) ** -0.3  # as language_store makes it
    assert np.all((found.best.rate[0] > 0.3 * border) & (found.best.rate[0] < border))
    assert np.all(found.safe.rate <= found.best.rate[0] * 1.3)


def test_where_the_learning_rate_tells_the_end_the_first_losses_gain_nothing_and_a_coin_tells_nothing(store):
    codes = store.labels(Thresholds())
    early = early_warning(store, codes)
    assert early.first[0] == 2
    assert early.first[-1] <= store.planned_steps.max() - FROM_END
    assert np.all(np.diff(early.runs) <= 0)
    assert early.runs[0] <= len(codes)  # one trajectory a row: its cells are prefixes of the longest
    assert early.areas["learning rate alone"][0] == 1
    assert early.gained == 0
    shuffled = np.random.default_rng(0).permutation(codes.ravel()).reshape(codes.shape)
    assert early_warning(store, shuffled).areas["last"][0] == pytest.approx(0.5, abs=0.2)


def test_what_the_losses_gain_is_over_the_learning_rate_alone_where_enough_runs_are_alive():
    areas = {name: np.array([0.7, 0.8, 1.0]) for name in SIGNS} | {"learning rate alone": np.array([0.6, 0.6, 0.5])}
    early = EarlyWarning(np.array([2, 4, 8]), np.array([200, 100, 10]), areas)
    assert early.gained == pytest.approx(0.2)
    assert np.isnan(EarlyWarning(early.first, early.runs // 100, areas).gained)


def test_runs_that_broke_before_a_landmark_need_no_warning(store):
    codes = store.labels(Thresholds())
    early = early_warning(store, codes)
    stopped, planned = store.read("nonfinite_step"), np.broadcast_to(store.planned_steps, codes.shape)
    longest = store.planned_steps == store.planned_steps.max()
    for k, runs in zip(early.first, early.runs, strict=True):
        alive = np.where(stopped >= 0, stopped, planned) > k
        assert runs <= (alive & (planned - k >= FROM_END)).sum()
    assert (~trains(codes))[:, longest[0]].any()


@pytest.mark.parametrize(
    ("areas", "runs", "soon"),
    [
        ([0.90, 0.96, 0.97, 0.98, 0.99], [900, 800, 700, 600, 500], 3),
        ([0.90, 0.96, 0.94, 0.98, 0.99], [900, 800, 700, 600, 500], 9),  # sure by chance at 3
        ([0.90, 0.96, 0.94, 0.93, 0.90], [900, 800, 700, 600, 500], None),
        ([0.90, 0.94, 0.94, 0.98, 0.99], [900, 800, 700, 40, 20], None),  # by few runs
        ([0.96, 0.96, 0.96, np.nan, 0.4], [900, 800, 700, 40, 20], 2),
    ],
)
def test_a_number_of_losses_tells_if_every_later_one_does(areas, runs, soon):
    first = np.array([2, 3, 5, 9, 20])
    signs = {name: np.array(areas) for name in SIGNS}
    assert EarlyWarning(first, np.array(runs), signs).soon == soon


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
    for part in ("one seed, one draw", "best rate", "safe rate", "not said", "early warning", "ROC area"):
        assert part in shown
    assert (store.figures / "rules.png").stat().st_size > 20_000


@pytest.mark.parametrize("case", ["two rates", "no learning rate"])
def test_what_cannot_be_done_is_one_line_and_exit_2(case, tmp_path, capsys, monkeypatch):
    axes = {"y": "offset:linear:-1:1", "x": "seed:linear:0:700"} if case == "no learning rate" else {}
    two_layer_store(tmp_path / "s", julia_measure(8), **axes)
    expected = "needs a learning-rate axis" if axes else "a map of a learning rate against something else"
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "--store", tmp_path / "s")
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert expected in " ".join(error.split())
    assert error.count("\n") == 1


def test_without_traces_or_columns_for_a_law_the_rest_is_printed(tmp_path, capsys, monkeypatch):
    language_store(tmp_path / "s", 16, 2, trace="off")
    run(monkeypatch, "--store", tmp_path / "s")
    shown = capsys.readouterr().out
    assert "best rate" in shown
    assert "law " not in shown
    assert "early warning" not in shown
