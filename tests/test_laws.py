"""Laws over seeds: what is planted is found, what is no law is refused, and bounds are no gaps."""

import numpy as np
import pytest

from analysis.laws import best_rate_law, best_rates, censored_fit, critical_rate_law, powers, safe_rates, sensitivity
from analysis.replicates import borders
from benchmarks.coverage import best_draw, coverage_rows, slope_draw

RATES, TOKENS = np.logspace(-3, 1, 48), 1024 * 4.0 ** np.arange(6)


def losses(exponent: float, curvature: float = 0.0, seeds: int = 8, best: float = 0.05) -> np.ndarray:
    """Losses [seed, rate, col] with a parabolic basin around best * tokens^exponent; far above it runs break."""
    random, x = np.random.default_rng(0), np.log(TOKENS) - np.log(TOKENS).mean()
    shift = random.normal(0, 0.1, (seeds, 1, 1))
    away = np.log(RATES)[:, None] - np.log(best) - exponent * x - curvature * x**2 - shift
    return np.where(away > 2.5, np.nan, 3 + 0.08 * away**2 + random.normal(0, 0.002, away.shape))


def test_the_best_rate_is_the_vertex_of_its_basin():
    clean = 3 + 0.08 * (np.log(RATES) - np.log(0.05)) ** 2
    found = best_rates(RATES, clean[None, :, None])
    assert found.rate[0, 0] == pytest.approx(0.05, rel=1e-6) and found.edge[0, 0] == 0
    (narrow, wide) = found.basins[:, :, 0, 0]
    step = RATES[1] / RATES[0]
    for (low, high), nat in ((narrow, 0.01), (wide, 0.05)):
        reach = np.exp(np.sqrt(nat / 0.08))
        assert 0.05 / reach <= low <= 0.05 / reach * step and 0.05 * reach / step <= high <= 0.05 * reach


def test_a_minimum_on_the_edge_is_a_bound_and_a_column_without_a_loss_has_none():
    rising = np.linspace(3, 4, 48)
    loss = np.stack([rising, rising[::-1], np.full(48, np.nan)], axis=1)[None]
    found = best_rates(RATES, loss)
    assert found.edge.tolist() == [[-1, 1, 0]] and np.isnan(found.rate[0, 2])
    assert found.rate[0, :2] == pytest.approx([RATES[0], RATES[-1]])


def test_a_planted_law_is_found_and_beats_the_constant_on_what_it_has_not_seen():
    law = best_rate_law(TOKENS, best_rates(RATES, losses(-0.35)))
    assert law.exponent.low < -0.35 < law.exponent.high and not law.refused
    assert law.ten_times == pytest.approx(10**-0.35, rel=0.05)
    for by_law, by_constant in (law.error_seeds, law.error_columns, law.error_ahead):
        assert by_law < by_constant


def test_a_constant_rate_is_predicted_by_the_constant_as_well():
    law = best_rate_law(TOKENS, best_rates(RATES, losses(0.0)))
    assert not law.exponent.excludes_zero
    assert law.error_ahead[1] <= law.error_ahead[0]


def test_a_bent_law_is_no_law():
    law = best_rate_law(TOKENS, best_rates(RATES, losses(-0.3, curvature=0.05)))
    assert law.curvature.low < 0.05 < law.curvature.high and "not constant" in law.refused


def test_three_seeds_have_no_interval():
    law = best_rate_law(TOKENS, best_rates(RATES, losses(-0.3, seeds=3)))
    assert np.isnan(law.exponent.low) and "3 seeds" in law.refused


def test_columns_beyond_the_rates_are_bounds_that_do_not_flatten_the_law():
    # the minima of the first two columns lie above the largest rate swept
    swept = RATES < 0.12
    law = best_rate_law(TOKENS, best_rates(RATES[swept], losses(-0.35)[:, swept]))
    assert law.bounds >= 8 and law.exponent.value == pytest.approx(-0.35, abs=0.05)


def test_censored_regression_without_bounds_is_least_squares_and_with_them_respects_them():
    design, value = powers(TOKENS, 1), np.array([[1.0, 2.0, 2.5, 4.5, 5.0, 6.0]])
    none = censored_fit(design, value, np.zeros((1, 6), int))
    assert none[0] == pytest.approx(np.linalg.lstsq(design, value[0])[0])
    low = np.where(np.arange(6) == 5, 4.0, value)
    above = censored_fit(design, low, np.array([[0, 0, 0, 0, 0, 1]]))
    as_measured = censored_fit(design, low, np.zeros((1, 6), int))
    assert above[0, 1] > as_measured[0, 1]
    missing = censored_fit(design, np.where(np.arange(6) < 5, np.nan, value), np.zeros((1, 6), int))
    assert np.isnan(missing).all()


def test_the_critical_rate_has_a_law_through_crossings_and_bounds():
    moved = -0.2 * np.log10(TOKENS / TOKENS[0])
    p = 1 / (1 + np.exp((np.log10(RATES)[:, None] + 0.2 - moved) / 0.15))
    trains = np.random.default_rng(0).random((16, *p.shape)) < p
    law = critical_rate_law(TOKENS, borders(RATES, trains, levels=(0.5,)))
    assert law.exponent.low < -0.2 < law.exponent.high and law.bounds == 0
    swept = RATES < 0.5  # the first column's crossing, 0.63, is beyond
    bounded = critical_rate_law(TOKENS, borders(RATES[swept], trains[:, swept], levels=(0.5,)))
    assert bounded.bounds >= 1 and bounded.exponent.low < -0.2 < bounded.exponent.high


def test_too_few_columns_are_one_line():
    with pytest.raises(ValueError, match="got 2 columns"):
        best_rate_law(TOKENS[:2], best_rates(RATES, losses(-0.3)[:, :, :2]))


def test_the_safe_rate_holds_in_every_seed_and_says_what_that_supports():
    loss = np.full((4, 48, 1), 3.2)
    loss[:, 10:21] = 3.0
    loss[:3, 21:31] = 3.04  # within 0.05 nat in three seeds of four
    loss[:, 40] = np.nan
    found = safe_rates(RATES, loss)
    assert found.rate[0] == RATES[20] and found.start[0] == RATES[10]
    assert found.holding[:, 0].tolist() == [0] * 10 + [4] * 11 + [3] * 10 + [0] * 17
    assert found.supported == pytest.approx(0.473, abs=0.001)


def test_no_rate_is_safe_where_the_seeds_disagree_on_the_best():
    loss = np.full((2, 48, 1), 3.2)
    loss[0, 10], loss[1, 30] = 3.0, 3.0
    assert np.isnan(safe_rates(RATES, loss).rate[0])


def test_sensitivity_is_the_mean_excess_over_three_decades_no_worse_than_the_start():
    rates = np.logspace(-3, 0, 301)
    loss = np.where(rates < 0.1, 3.0, np.nan)[None, :, None]
    # one decade of three stands at the initial loss; half a step is 0.5 / 300 of 2 nat
    assert sensitivity(rates, loss, np.array([5.0]), 1e-3)[0, 0] == pytest.approx(2 / 3, abs=0.005)
    with pytest.raises(ValueError, match="widen the rates"):
        sensitivity(rates, loss, np.array([5.0]), 1e-2)


def test_intervals_hold_planted_laws():
    # a smoke test of benchmarks/coverage.py: below 14 of 20 lies 1 in 10^4 at a coverage of 95%
    rows = coverage_rows("best", best_draw, [("skewed", 0.01)], [8], 20)
    rows += coverage_rows("slopes", slope_draw, [("logistic", 0.2)], [16], 20)
    assert all(row["coverage"] >= 0.7 for row in rows)
