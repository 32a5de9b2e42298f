"""How often the recommended rate's 95% interval holds the planted best rate: 8 seeds, several basins, fine and coarse.

    python benchmarks/recommend_coverage.py [--draws N]

Each draw is one column of a map: a basin around a best rate that shifts by a random amount a seed, noise on every loss,
runs that break above it, and a best rate that lies anywhere between two swept ones. Rows go to
results/recommend_coverage.csv.
"""

if __name__ == "__main__" and not __package__:
    import started  # noqa: F401  says how to start it where its packages are missing

from collections.abc import Callable

import numpy as np

from analysis.laws import best_rates
from analysis.recommend import column_of
from benchmarks.arguments import Reader
from benchmarks.coverage import BASINS, Interval, append_rows, coverage_rows

SEEDS, SPREAD = 8, 0.2  # replicates, and the standard deviation of a seed's shift of the log rate
NOISES = (0.003, 0.02)  # nat
GRIDS = {48: (-3.0, 1.0), 32: (-4.0, 1.0), 16: (-6.0, -1.0), 10: (-4.0, 1.0)}  # rates -> decades; 32, 16: the defaults
SHAPES: dict[str, Callable[[np.ndarray], np.ndarray]] = BASINS | {
    "cliff": lambda z: 0.05 * z**2 + np.maximum(z - 1, 0) ** 2,
    "plateau": lambda z: 0.16 * np.log1p(z**2),
    "steep": lambda z: 0.6 * z**2,
}
CASES = [(f"{shape}, {points} rates", noise) for shape in SHAPES for points in GRIDS for noise in NOISES]


def column_draw(random: np.random.Generator, case: str, noise: float, seeds: int) -> dict[str, Interval]:
    """The recommended rate of one planted column."""
    shape, points = case.removesuffix(" rates").split(", ")
    rates = np.logspace(*GRIDS[int(points)], int(points))
    truth = np.log(rates).mean() + random.uniform(-1, 1)
    away = np.log(rates) - truth - random.normal(0, SPREAD, (seeds, 1))
    loss = 3 + SHAPES[shape](away) + random.normal(0, noise, away.shape) + random.normal(0, 0.05, (seeds, 1))
    broke = away > 2.5
    loss = np.where(broke, np.nan, loss)
    found = column_of(rates, 0, 0.0, 0, loss, ~broke, best_rates(rates, loss[..., None])).best
    return {"recommended rate": (float(np.exp(truth)), found.value, found.low, found.high)}


def main() -> None:
    """The command."""
    parser = Reader(description=__doc__.split("\n\n")[0])
    parser.add_argument("--draws", type=int, default=1000, help="simulations of a case")
    options = parser.parse_args()
    append_rows("recommend_coverage.csv", coverage_rows("recommend", column_draw, CASES, [SEEDS], options.draws))


if __name__ == "__main__":
    main()
