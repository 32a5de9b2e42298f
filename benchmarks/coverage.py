"""How often the 95% intervals of the analysis hold the truth, on planted maps, and known sets' dimensions.

    python benchmarks/coverage.py [borders] [slopes] [best] [known] [--draws N] [--sets N]

borders: LR50 and LR90 of planted P(train), 48 rates from 1e-3 to 10, monotone and with a dip, outcomes independent
    or shifted by a random rate a seed (the truth is the crossing of P over all seeds).
slopes: exponent of LR50 over 6 columns (tokens) of the same curves. best: exponent of the best rate over 6 columns
    and the best rate of one, planted basins with noise and random shifts. Rows go to results/coverage.csv.
known: D = 2 - alpha of a line, a disc and Weierstrass graphs from 65,536 label evaluations, beside box counting
    at 256 x 256. Rows go to results/known_sets.csv.
"""

if __name__ == "__main__" and not __package__:
    import started  # noqa: F401  says how to start it where its packages are missing

import os
import platform
import time
from collections.abc import Callable
from datetime import date
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
from scipy.interpolate import PchipInterpolator

from analysis.boundary import edges
from analysis.dimension import measure
from analysis.exponent import Exponent, differs, draw_points, fit_exponent
from analysis.laws import best_rate_law, best_rates, critical_rate_law, over_seeds
from analysis.replicates import FEWEST_SEEDS, borders, exact_interval
from benchmarks.arguments import Reader
from benchmarks.rows import command_line, write_rows

RESULTS = Path(__file__).with_name("results")
RATES = np.logspace(-3, 1, 48)
TOKENS = 1024 * 4.0 ** np.arange(6)
EPS = np.logspace(-4, -1, 10)  # of the known sets
EVALUATIONS = 65536
Interval = tuple[float, float, float, float]  # truth, estimate, low, high


# ---- planted probabilities of training, functions of the log10 rate

DIP = PchipInterpolator(np.log10([1e-4, 1e-3, 0.1, 0.16, 0.95, 3.1, 10, 30]), [1, 1, 1, 0.95, 0.42, 0.83, 0.42, 0.1])
CURVES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "logistic": lambda z: 1 / (1 + np.exp((z + 0.9) / 0.2)),
    "steep": lambda z: 1 / (1 + np.exp((z + 0.9) / 0.05)),
    "skewed": lambda z: np.exp(-np.exp((z + 0.9) / 0.25) * np.log(2)),
    "dip": lambda z: np.clip(DIP(np.clip(z, -4, 1.47)), 0, 1),
}
CASES = [  # the curve, and the standard deviation of a seed's shift in decades
    *(("logistic", spread) for spread in (0.0, 0.2)),
    *(("steep", spread) for spread in (0.0, 0.3)),
    ("skewed", 0.15),
    *(("dip", spread) for spread in (0.0, 0.15)),
]


def outcomes(random: np.random.Generator, curve: str, spread: float, seeds: int, moved: np.ndarray) -> np.ndarray:
    """Planted outcomes bool [seed, rate, col]: moved by `moved` [col] and a random shift a seed, decades."""
    shift = random.normal(0, spread, (seeds, 1, 1)) + moved
    return random.random((seeds, len(RATES), len(moved))) < CURVES[curve](np.log10(RATES)[:, None] - shift)


@cache
def crossing(curve: str, spread: float, level: float) -> float:
    """The true rate at which P over all seeds first falls below `level`."""
    z, (nodes, weights) = np.linspace(-3, 1, 20001), np.polynomial.hermite_e.hermegauss(61)
    p = sum(w * CURVES[curve](z - spread * node) for node, w in zip(nodes, weights / weights.sum(), strict=True))
    return float(10 ** z[(p < level).argmax()])


def border_draw(random: np.random.Generator, curve: str, spread: float, seeds: int) -> dict[str, Interval]:
    """LR50 and LR90 of one planted column."""
    levels = tuple(level for level, fewest in FEWEST_SEEDS.items() if seeds >= fewest)
    found = borders(RATES, outcomes(random, curve, spread, seeds, np.zeros(1)), levels=levels, draws=1)
    columns = zip(levels, found.rate[:, 0], found.low[:, 0], found.high[:, 0], strict=True)
    return {f"LR{100 * q:.0f}": (crossing(curve, spread, q), rate, low, high) for q, rate, low, high in columns}


def slope_draw(random: np.random.Generator, curve: str, spread: float, seeds: int) -> dict[str, Interval]:
    """The exponent of LR50 where the curve falls as tokens^-0.1."""
    moved = -0.1 * np.log10(TOKENS / TOKENS.mean())
    found = borders(RATES, outcomes(random, curve, spread, seeds, moved), levels=(0.5,), draws=200)
    law = critical_rate_law(TOKENS, found)
    return {"exponent of LR50": (-0.1, law.exponent.value, law.exponent.low, law.exponent.high)}


# ---- planted basins of the loss, functions of the natural log of rate over best rate

BASINS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "parabola": lambda z: 0.08 * z**2,
    "skewed": lambda z: 0.3 * (np.exp(0.6 * z) - 1 - 0.6 * z),
    "flat": lambda z: 0.01 * z**4 + 0.01 * z**2,
}


def best_draw(random: np.random.Generator, shape: str, noise: float, seeds: int) -> dict[str, Interval]:
    """The best rate of the first column and its exponent, -0.3 planted; runs far above it break."""
    truth = np.log(0.05) - 0.3 * np.log(TOKENS / TOKENS[0])
    shift = random.normal(0, 0.2, (seeds, 1, 1)) + random.normal(0, 0.1, (seeds, 1, len(TOKENS)))
    away = np.log(RATES)[:, None] - truth - shift
    loss = 3 + BASINS[shape](away) + random.normal(0, noise, away.shape) + random.normal(0, 0.05, (seeds, 1, 1))
    found = best_rates(RATES, np.where(away > 2.5, np.nan, loss))
    exponent, first = best_rate_law(TOKENS, found).exponent, over_seeds(np.log(found.rate[:, 0]))
    return {
        "exponent of the best rate": (-0.3, exponent.value, exponent.low, exponent.high),
        "best rate": tuple(np.exp([truth[0], first.value, first.low, first.high]).tolist()),
    }


# ---- known sets


def weierstrass(dimension: float, random: np.random.Generator) -> Callable[[np.ndarray], np.ndarray]:
    """y > W(x) on the unit square, W = sum of 2^-kH cos(2 pi 2^k x + phase), H = 2 - D, scaled to [0, 1]."""
    k, phases = np.arange(30), random.uniform(0, 2 * np.pi, 30)

    def height(x: np.ndarray) -> np.ndarray:
        total = np.zeros_like(x)
        for i in k:
            total += 2.0 ** (-i * (2 - dimension)) * np.cos(2 * np.pi * 2.0**i * x + phases[i])
        return total

    sampled = height(np.linspace(0, 1, 4096))
    low, high = sampled.min(), sampled.max()
    return lambda point: point[..., 1] > (height(point[..., 0]) - low) / (high - low)


def known_set(name: str, random: np.random.Generator) -> Callable[[np.ndarray], np.ndarray]:
    """Which of two sides points [..., 2] of the unit square lie on; position and phases are random."""
    if name == "line":
        slope, offset = random.uniform(-0.6, 0.6), random.uniform(0.35, 0.65)
        return lambda point: point[..., 1] - offset > slope * (point[..., 0] - 0.5)
    if name == "disc":
        radius, centre = random.uniform(0.2, 0.4), random.uniform(0.4, 0.6, 2)
        return lambda point: ((point - centre) ** 2).sum(-1) < radius**2
    return weierstrass(float(name.removeprefix("weierstrass ")), random)


KNOWN = {"line": 1.0, "disc": 1.0, "weierstrass 1.2": 1.2, "weierstrass 1.5": 1.5, "weierstrass 1.8": 1.8}


def exponent_draw(name: str, seed: int) -> tuple[Exponent, float]:
    """The fit to one known set from EVALUATIONS labels, and its box-counting dimension at 256 x 256 cells."""
    label, count = known_set(name, np.random.default_rng(seed)), EVALUATIONS // (3 * len(EPS))
    window = np.zeros(2), np.ones(2), np.zeros(2, bool)
    events, realised, share = np.empty(len(EPS), int), np.empty(len(EPS)), np.empty(len(EPS))
    for i, eps in enumerate(EPS):
        points = draw_points(seed, i, eps, count, *window)
        base = label(points.base)
        events[i] = differs(base, label(points.minus), label(points.plus)).sum()
        realised[i], share[i] = points.realised.mean(), base.mean()
    trained = share.mean()  # outcomes that have nothing to do with each other
    fit = fit_exponent(realised, events, np.full(len(EPS), count), 3 * trained * (1 - trained), 2)
    centre = (np.arange(256) + 0.5) / 256
    box = measure(edges(label(np.stack(np.meshgrid(centre, centre), -1))))
    return fit, box.value if box else np.nan


# ---- rows


def coverage_rows(
    study: str, draw: Callable[..., dict[str, Interval]], cases: list[tuple], seeds: list[int], draws: int
) -> list[dict[str, object]]:
    """One row for each case, number of seeds and quantity."""
    rows = []
    for case, n in ((case, n) for case in cases for n in seeds):
        random, start = np.random.default_rng(1), time.perf_counter()
        drawn = [draw(random, *case, n) for _ in range(draws)]
        for quantity in drawn[0]:
            truth, value, low, high = np.array([d[quantity] for d in drawn]).T
            held = (low <= truth) & (truth <= high)
            least, most = exact_interval(held.sum(), draws)
            open_ended = np.mean((low == 0) | np.isinf(low) | np.isinf(high) | np.isnan(low))
            row = {
                "study": study,
                "quantity": quantity,
                "case": case[0],
                "spread": case[1],
                "seeds": n,
                "draws": draws,
                "coverage": round(float(held.mean()), 3),
                "coverage_low": round(float(least), 3),
                "coverage_high": round(float(most), 3),
                "missed_below": round(float((truth < low).mean()), 3),
                "missed_above": round(float((truth > high).mean()), 3),
                "open_ended": round(float(open_ended), 3),
                "truth": round(float(truth[0]), 4),
                "median": round(float(np.nanmedian(value)), 4),
                "median_low": round(float(np.nanmedian(low)), 4),
                "median_high": round(float(np.nanmedian(high)), 4),
                "seconds": round(time.perf_counter() - start, 1),
            }
            rows.append(row)
            print(*row.values(), flush=True)
    return rows


def known_rows(sets: int) -> list[dict[str, object]]:
    """One row for each known set."""
    rows = []
    for name, truth in KNOWN.items():
        start = time.perf_counter()
        fits, boxes = zip(*(exponent_draw(name, seed) for seed in range(sets)), strict=True)
        fitted = [fit for fit in fits if not fit.refused]
        values = np.array([2 - fit.alpha for fit in fitted])
        held = [2 - fit.alpha_high <= truth <= 2 - fit.alpha_low for fit in fitted]
        row = {
            "set": name,
            "truth": truth,
            "draws": sets,
            "evaluations": EVALUATIONS,
            "refused": sets - len(fitted),
            "mean": round(float(values.mean()), 3),
            "deviation": round(float(values.std(ddof=1)), 3),
            "coverage": round(float(np.mean(held)), 3),
            "half_interval": round(float(np.nanmedian([(f.alpha_high - f.alpha_low) / 2 for f in fitted])), 3),
            "sizes_fitted": round(float(np.mean([f.fitted.sum() for f in fitted])), 1),
            "box_mean": round(float(np.nanmean(boxes)), 3),
            "box_deviation": round(float(np.nanstd(boxes, ddof=1)), 3),
            "seconds": round(time.perf_counter() - start, 1),
        }
        rows.append(row)
        print(*row.values(), flush=True)
    return rows


def append_rows(name: str, rows: list[dict[str, object]]) -> Path:
    """Appends rows, each with date, machine, versions, commit and command, to results/`name`."""
    from engine.provenance import commit  # brings torch

    source = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        **{package: version(package) for package in ("numpy", "scipy", "statsmodels", "numba")},
        "commit": commit(),
        "command": command_line(),
    }
    return write_rows(RESULTS / name, source, rows)


def main() -> None:
    """The command."""
    parser = Reader(description=__doc__.split("\n\n")[0])
    studies = ("borders", "slopes", "best", "known")
    parser.add_argument("studies", nargs="*", help=f"of {', '.join(studies)} (default: all)")
    parser.add_argument("--draws", type=int, default=1000, help="simulations of a case")
    parser.add_argument("--sets", type=int, default=300, help="draws of a known set")
    options = parser.parse_args()
    if unknown := set(options.studies) - set(studies):
        parser.error(f"got {min(unknown)!r}; expected names among {', '.join(studies)}")
    asked = options.studies or studies
    if "borders" in asked:
        append_rows("coverage.csv", coverage_rows("borders", border_draw, CASES, [8, 12, 16, 32, 64], options.draws))
    if "slopes" in asked:
        append_rows("coverage.csv", coverage_rows("slopes", slope_draw, CASES, [8, 16], options.draws))
    if "best" in asked:
        cases = [(shape, noise) for shape in BASINS for noise in (0.003, 0.02)]
        append_rows("coverage.csv", coverage_rows("best", best_draw, cases, [4, 8, 16], options.draws))
    if "known" in asked:
        append_rows("known_sets.csv", known_rows(options.sets))


if __name__ == "__main__":
    main()
