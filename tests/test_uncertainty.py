"""The uncertainty exponent: planted power laws, known sets, refusals, and points the kernel can tell apart."""

import numpy as np
import pytest
from synthetic import language_store
from tiny import sweep, tiny

from analysis import uncertainty
from analysis.exponent import ceiling_of, differs, draw_points, fit_exponent
from benchmarks.coverage import exponent_draw
from engine.api import run_sweep
from engine.config import make_config
from engine.options import RunOptions
from engine.store import open_map

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


def test_a_flat_f_has_no_exponent_and_its_slope_says_how_flat():
    flat = fit_exponent(EPS, np.array([300, 290, 310, 300, 310, 290, 300]), np.full(7, 1000), 0.75, 1)
    assert "a quarter of the ceiling" in flat.refused
    assert flat.slope[1] < 0 < flat.slope[2] and abs(flat.slope[0]) < 0.01


def test_the_law_gives_the_size_of_a_share():
    found = fit_exponent(EPS, np.round(1000003 * 0.15 * EPS**0.5), np.full(7, 1000003), 0.75, 2)
    assert found.size_at(0.15 * 0.02**0.5) == pytest.approx(0.02, rel=1e-3)


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


# ---- the command


def command(monkeypatch, store, *arguments):
    monkeypatch.setattr("sys.argv", ["uncertainty", "--store", str(store), "--device", "cpu", *map(str, arguments)])
    uncertainty.main()


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """Sixteen seeds of a tiny language model over six rates and two horizons."""
    folder = tmp_path_factory.mktemp("flips")
    config = tiny(folder, y="lr:log:1e-2:1e2:6", x="tokens:linear:64:96:2", replicates=16, trace="off")
    return sweep(config, folder / "s")


def test_a_language_models_flips_are_measured_from_lr90_up_and_kept(seeds, monkeypatch, capsys):
    asked = ("--over", "lr:LR90:100", "--at", "tokens=96", "--sizes", "1e-6:1e-1:3", "--points", 8, "--floor", 6)
    command(monkeypatch, seeds.path, *asked, "--variants", "repeat,order")
    shown = capsys.readouterr().out
    assert "f(eps) over lr" in shown and "ceiling about" in shown
    assert "floor, repeat: 0 of 6 points flip" in shown
    (found,) = uncertainty.read_measured(seeds.replicate(0))
    assert 0.01 < found.over["lr"][0] < 100 == found.over["lr"][1] and found.held == {"tokens": 96}
    # realised in float32: as asked to one part in ten at 1e-6, whose neighbours lie up to 1.2e-7 apart
    assert found.law.eps == pytest.approx(np.logspace(-6, -1, 3), rel=0.1)
    assert [f.variant for f in found.floors] == ["repeat", "order", "order", "order"]
    assert found.floors[0].interval == pytest.approx((0, 0.459), abs=0.001)  # 1 - 0.025^(1 / 6)
    points = [path for path in (seeds.path / "uncertainty").iterdir() if path.is_dir()]
    before = {path: (path / "status" / "zarr.json").stat().st_mtime_ns for path in points}
    monkeypatch.setattr("engine.step.Trainer.train", None)  # nothing is trained twice
    command(monkeypatch, seeds.path, *asked, "--variants", "repeat,order")
    assert len(points) == 5 and before == {p: (p / "status" / "zarr.json").stat().st_mtime_ns for p in points}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--over", "lr:LR90:10"), "depends on tokens; give --at tokens=value"),
        (("--over", "lr:1e-1:1", "--at", "tokens=96,depth=2"), "at has 'depth=2'; expected name=value"),
        (("--over", "lr:1e-1:1e3", "--at", "tokens=96"), "expected a range within lr:log"),
        (("--over", "tokens:64:96", "--at", "lr=1"), "counts in whole numbers or steps"),
        (("--over", "lr:0.1:1"), "tokens is neither changed nor held"),
        (("--over", "lr:0.1:1", "--at", "tokens=96", "--sizes", "1e-9:1e-8:2"), "equal a neighbour in float32"),
        (("--over", "lr:0.1:1", "--at", "tokens=96", "--sizes", "1:2:x"), "sizes is '1:2:x'"),
        (("--over", "lr:0.1:1", "--at", "tokens=96", "--variants", "colour"), "variants has colour"),
        (("--over", "lr:0.1:1", "--at", "tokens=96", "--points", 0), "points is 0"),
    ],
)
def test_what_cannot_be_measured_is_one_line_and_exit_2(seeds, arguments, message, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        command(monkeypatch, seeds.path, *arguments)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and message in error


def test_one_seed_has_neither_a_ceiling_nor_a_border(tmp_path, monkeypatch, capsys):
    language_store(tmp_path / "s", 8, 4)
    for over, message in (("lr:LR50:10", "got 1 seeds; expected 8 for LR50"), ("lr:1e-3:10", "got 1 replicate")):
        with pytest.raises(SystemExit):
            command(monkeypatch, tmp_path / "s", "--over", over, "--at", "tokens=1e4")
        assert message in capsys.readouterr().err


def test_a_map_of_the_papers_network_is_measured_over_both_axes(tmp_path, monkeypatch, capsys):
    config = make_config(
        network="two_layer",
        y="lr.0:log:1e-1:1e3:8",
        x="lr.1:log:1e-1:1e3:8",
        steps=40,
        data_points=16,
        replicates=2,
        precision="fp64",
    )
    run_sweep(config, RunOptions(store=str(tmp_path / "s"), device="cpu", quiet=True))
    asked = ("--sizes", "1e-3:1e-1:3", "--points", 100, "--floor", 20, "--variants", "repeat,precision")
    command(monkeypatch, tmp_path / "s", *asked)
    assert "floor, repeat: 0 of 20 points flip" in capsys.readouterr().out
    (found,) = uncertainty.read_measured(open_map(tmp_path / "s"))
    assert list(found.over) == ["lr.0", "lr.1"] and found.law.ambient == 2
    assert found.floors[0].same_bits == 20 and found.floors[1].same_bits < 20
