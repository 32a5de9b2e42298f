"""The uncertainty exponent: planted power laws, known sets, refusals, and points the kernel can tell apart."""

import numpy as np
import pytest

from analysis.uncertainty import ceiling_of, differs, draw_points, fit_exponent
from benchmarks.coverage import exponent_draw

EPS = np.logspace(-4, -1, 7)
WINDOW = np.array([1e-3]), np.array([10.0]), np.array([True])


@pytest.mark.parametrize("alpha", [0.2, 0.5, 1.0])
def test_a_planted_power_law_is_found(alpha):
    share = 0.15 * (EPS / EPS[-1]) ** alpha
    found = fit_exponent(EPS, np.random.default_rng(0).binomial(20000, share), np.full(7, 20000), 0.75, 2)
    assert not found.refused and found.alpha_low < alpha < found.alpha_high
    assert found.alpha == pytest.approx(alpha, abs=0.05)
    value, low, high = found.dimension
    assert low <= value <= high and low >= 1 and high <= 2


def test_the_window_holds_twenty_events_and_a_quarter_of_the_ceiling():
    found = fit_exponent(EPS, np.array([3, 19, 20, 60, 180, 187, 400]), np.full(7, 1000), 0.75, 1)
    assert found.fitted.tolist() == [False, False, True, True, True, True, False]  # 0.1875 is the quarter


def test_too_few_sizes_and_no_power_law_are_refused_with_the_reason():
    few = fit_exponent(EPS, np.array([0, 0, 0, 1, 2, 30, 90]), np.full(7, 1000), 0.75, 2)
    assert "2 of 7 sizes" in few.refused and np.isnan(few.alpha)
    bent = fit_exponent(EPS, np.array([1500, 1500, 300, 300, 1500, 1500, 300]), np.full(7, 10000), 0.75, 2)
    assert "dispersion" in bent.refused and bent.dispersion > 4


@pytest.mark.parametrize(("eps", "ambient", "message"), [(EPS, 3, "got d = 3"), (np.zeros(7), 1, "different positive")])
def test_what_cannot_be_fitted_is_one_line(eps, ambient, message):
    with pytest.raises(ValueError, match=message):
        fit_exponent(eps, np.full(7, 50), np.full(7, 1000), 0.75, ambient)


def test_the_ceiling_is_the_chance_that_one_of_three_outcomes_differs():
    p = np.random.default_rng(0).random(4000)
    trains = np.random.default_rng(1).random((8, 4000)) < p
    a, b, c = np.random.default_rng(2).random((3, 4000)) < p
    # both estimate mean 3P(1 - P) = 0.5; 0.03 is three standard errors of 4,000 triples
    assert ceiling_of(trains) == pytest.approx(differs(a, b, c).mean(), abs=0.03)
    assert ceiling_of(trains) == pytest.approx(0.5, abs=0.03)
    with pytest.raises(ValueError, match="got 1 replicate"):
        ceiling_of(trains[:1])


def test_points_are_log_uniform_own_to_each_eps_and_the_same_again():
    points = draw_points(0, 0, 1e-3, 4000, *WINDOW)
    assert (points.base == draw_points(0, 0, 1e-3, 4000, *WINDOW).base).all()
    assert not (points.base == draw_points(0, 1, 1e-3, 4000, *WINDOW).base).any()
    assert not (points.base == draw_points(1, 0, 1e-3, 4000, *WINDOW).base).any()
    decades = np.histogram(np.log10(points.base), bins=4, range=(-3, 1))[0]
    assert np.abs(decades - 1000).max() < 100  # more than three standard deviations
    # a rate axis has two directions
    assert (points.minus * points.plus) == pytest.approx(points.base**2)


def test_realised_eps_is_that_of_the_rounded_numbers():
    exact = draw_points(0, 0, 1e-6, 1000, *WINDOW)
    assert exact.realised == pytest.approx(1e-6, rel=1e-8)
    rounded = draw_points(0, 0, 1e-6, 1000, *WINDOW, dtype=np.float32)
    assert (rounded.base == rounded.base.astype(np.float32)).all()
    # float32 has 24 bits: neighbours are 6e-8 to 1.2e-7 apart, and both ends are rounded
    assert np.abs(rounded.realised - 1e-6).max() < 1.3e-7 and np.abs(rounded.realised - 1e-6).max() > 1e-8
    with pytest.raises(ValueError, match="equal a neighbour in float32"):
        draw_points(0, 0, 1e-9, 1000, *WINDOW, dtype=np.float32)


@pytest.mark.parametrize(("name", "dimension"), [("line", 1.0), ("weierstrass 1.5", 1.5), ("weierstrass 1.8", 1.8)])
def test_known_sets_have_their_dimension(name, dimension):
    fits = [exponent_draw(name, seed)[0] for seed in range(20)]
    values = [2 - fit.alpha for fit in fits if not fit.refused]
    # 0.05 of benchmarks/coverage.py, and two standard errors of 20 draws of a line, 0.1 each
    assert len(values) >= 15 and np.mean(values) == pytest.approx(dimension, abs=0.05 + 0.045)
