"""P(train) over seeds: exact intervals, first crossings from the best rate, islands, bounds, refusals."""

import time

import numpy as np
import pytest

from analysis.replicates import borders, share_at_least, train_probability
from benchmarks.coverage import border_draw, coverage_rows

RATES = np.logspace(-3, 1, 32)


def planted(seeds: int, p: np.ndarray, seed: int = 0) -> np.ndarray:
    """Outcomes bool [seed, *p.shape] with probabilities p."""
    return np.random.default_rng(seed).random((seeds, *p.shape)) < p


def test_shares_have_exact_intervals_over_the_replicates_that_were_measured():
    trains = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 0], [1, 1, 0]], bool)
    known = np.array([[1, 1, 0], [1, 1, 0], [1, 1, 0], [1, 0, 0]], bool)
    found = train_probability(trains, known)
    assert found.trained.tolist() == [4, 2, 0] and found.runs.tolist() == [4, 3, 0]
    assert found.low[0] == pytest.approx(0.025**0.25) and found.high[0] == 1  # 4 of 4: P^4 = 0.025
    assert np.isnan(found.share[2]) and (found.low[2], found.high[2]) == (0, 1)


def test_exact_intervals_hold_every_share_at_least_as_often_as_they_say():
    for share in (0.02, 0.3, 0.5, 0.97):
        events = np.random.default_rng(0).binomial(16, share, (1, 4000))[0]
        outcomes = np.arange(16)[:, None] < events
        found = train_probability(outcomes)
        # 0.95 by construction, less three standard errors of 4,000 draws
        assert ((found.low <= share) & (share <= found.high)).mean() >= 0.95 - 3 * np.sqrt(0.95 * 0.05 / 4000)


def test_four_of_four_support_47_percent_and_59_of_59_support_95():
    assert share_at_least(4, 4) == pytest.approx(0.473, abs=0.001)
    assert share_at_least(59, 59) == pytest.approx(0.9505, abs=0.001)


def test_the_border_is_the_first_crossing_and_what_lies_above_is_an_island():
    z = np.log10(RATES)
    p = np.where(z < -0.5, 0.99, np.where(z < 0.2, 0.05, np.where(z < 0.6, 0.95, 0.02)))
    found = borders(RATES, planted(64, p))
    assert np.abs(np.log10(found.rate[:, 0]) + 0.5).max() < 0.15  # a step of the rates is 0.13
    assert (found.low <= found.rate).all() and (found.rate <= found.high).all()
    ((low, high),) = found.islands[0][0]
    assert 0 < np.log10(low) < 0.45 and 0.45 < np.log10(high) < 0.7
    width, narrow, wide = found.width
    assert narrow[0] <= width[0] <= wide[0]


def test_columns_without_a_crossing_are_bounds():
    p = np.stack([np.ones(32), np.linspace(1, 0, 32), np.full(32, 0.02)], axis=1)
    found = borders(RATES, planted(16, p), levels=(0.5,))
    assert np.isinf(found.rate[0, 0]) and np.isinf(found.high[0, 0])  # above the largest rate
    assert 0 < found.rate[0, 1] < np.inf
    assert found.rate[0, 2] == 0 and found.low[0, 2] == 0  # below the best rate


def test_seeds_that_all_agree_leave_the_step_of_the_grid_open():
    trains = np.repeat((RATES < 0.1)[None], 16, axis=0)
    found = borders(RATES, trains, levels=(0.5,))
    last, first = RATES[RATES < 0.1][-1], RATES[RATES >= 0.1][0]
    assert found.low[0, 0] <= last and found.high[0, 0] >= first


def test_the_same_seeds_are_resampled_in_every_column():
    trains = planted(16, np.linspace(1, 0, 32))
    found = borders(RATES, np.stack([trains, trains], axis=2))
    assert (found.draws[:, :, 0] == found.draws[:, :, 1]).all()


def test_unmeasured_cells_count_for_nothing():
    trains = planted(16, np.linspace(1, 0, 32))
    known = np.random.default_rng(1).random(trains.shape) < 0.8
    garbled = trains ^ ~known
    for a, b in zip(borders(RATES, trains, known).rate, borders(RATES, garbled, known).rate, strict=True):
        assert (a == b).all()


@pytest.mark.parametrize(("seeds", "level", "fewest"), [(7, 0.5, 8), (15, 0.9, 16)])
def test_too_few_seeds_have_no_border(seeds, level, fewest):
    with pytest.raises(ValueError, match=f"got {seeds} seeds; expected {fewest} for LR{100 * level:.0f}"):
        borders(RATES, np.ones((seeds, 32), bool), levels=(level,))


def test_rates_must_rise():
    with pytest.raises(ValueError, match="ascending"):
        borders(RATES[::-1], np.ones((16, 32), bool))


@pytest.mark.parametrize("case", [("logistic", 0.2), ("dip", 0.0)])
def test_intervals_hold_planted_borders(case):
    # a smoke test of benchmarks/coverage.py: below 14 of 20 lies 1 in 10^4 at a coverage of 95%
    for row in coverage_rows("borders", border_draw, [case], [16], 20):
        assert row["coverage"] >= 0.7


def test_a_map_of_128_by_128_by_16_takes_half_a_minute_at_most():
    rates, move = np.logspace(-3, 1, 128), np.linspace(-0.3, 0.3, 128)
    p = 1 / (1 + np.exp((np.log10(rates)[:, None] + 0.9 - move) / 0.15))
    columns = slice(0, 128, 16)  # a sixteenth of the columns
    borders(rates, planted(16, p[:, :1]))  # compiled
    start = time.process_time()
    borders(rates, planted(16, p)[:, :, columns])
    assert time.process_time() - start < 2 * 30 / 16  # two cores
