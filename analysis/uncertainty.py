"""The uncertainty exponent: how fast the chance that a small change flips an outcome falls with its size.

f(eps) is the probability that a run and its neighbours at +-eps do not all end alike; f ~ eps^alpha, and the
boundary of a `d`-dimensional map has the dimension D = d - alpha (Grebogi, McDonald, Ott, Yorke 1983; McDonald,
Grebogi, Ott, Yorke 1985). Every eps has base points of its own, so counts are independent binomials. What is
fitted is fixed beforehand: sizes with at least FEWEST_EVENTS events and f of at most a quarter of the ceiling.
"""

if __name__ == "__main__" and not __package__:
    import started  # noqa: F401  says how to start it where its packages are missing

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.table import Table

from analysis.classify import Labelling
from engine.command import parse, screen, user_errors
from engine.grid import is_number
from engine.hyper import kernel_type
from engine.options import RunOptions
from engine.outcome import Thresholds, measured, trains
from engine.store import Replicate, Store, open_map, open_store

FEWEST_EVENTS = 20
CEILING_SHARE = 0.25  # above it f bends towards its ceiling
FEWEST_SIZES = 3  # in the window; below it nothing is fitted
LARGEST_DISPERSION = 4.0  # above it the counts are no power law


@dataclass(frozen=True)
class Exponent:
    """f(eps) and the power law fitted to its window; NaN, and why in `refused`, where there is none."""

    eps: np.ndarray  # [size] realised
    share: np.ndarray  # [size] f
    low: np.ndarray  # [size] exact 95% interval
    high: np.ndarray
    fitted: np.ndarray  # [size] bool, the window
    ceiling: float
    alpha: float
    alpha_low: float  # 95% interval
    alpha_high: float
    dispersion: float
    ambient: int  # d, the dimension of what is swept
    refused: str  # '' or the reason

    @property
    def dimension(self) -> tuple[float, float, float]:
        """D = d - alpha and its interval, kept in [d - 1, d]: no boundary lies outside."""
        low, value, high = np.clip(
            self.ambient - np.array([self.alpha_high, self.alpha, self.alpha_low]), self.ambient - 1, self.ambient
        )
        return float(value), float(low), float(high)


def fit_exponent(eps: np.ndarray, events: np.ndarray, trials: np.ndarray, ceiling: float, ambient: int) -> Exponent:
    """log f = c + alpha log eps as a quasi-binomial regression over the window.

    The interval is the wider of t with the dispersion found, and normal with the binomial's: few sizes may fit a
    power law by chance.

    Args:
        eps: [size] sizes of the change, as realised.
        events: [size] base points whose outcome differs from either neighbour's.
        trials: [size] base points.
        ceiling: f between unrelated outcomes, `ceiling_of`.
        ambient: d: 1 for a rate axis, 2 for a map.

    Raises:
        ValueError: d is neither 1 nor 2, sizes that are not positive or not different.
    """
    if ambient not in (1, 2):
        raise ValueError(f"got d = {ambient}; expected 1 (a rate axis) or 2 (a map)")
    if (eps <= 0).any() or len(np.unique(eps)) < len(eps):
        raise ValueError(f"got eps {', '.join(f'{e:g}' for e in eps)}; expected different positive sizes")
    # these take seconds to import, which --help need not wait for
    import statsmodels.api as sm
    from scipy import stats
    from statsmodels.genmod.families.links import Log
    from statsmodels.tools.sm_exceptions import DomainWarning

    from analysis.replicates import exact_interval

    share, (low, high) = events / trials, exact_interval(events, trials)
    window = (events >= FEWEST_EVENTS) & (share <= CEILING_SHARE * ceiling)

    def result(refused: str, alpha: float = math.nan, half: float = math.nan, dispersion: float = math.nan) -> Exponent:
        interval = (alpha, alpha - half, alpha + half)
        return Exponent(eps, share, low, high, window, ceiling, *interval, dispersion, ambient, refused)

    if window.sum() < FEWEST_SIZES:
        return result(
            f"{window.sum()} of {len(eps)} sizes have {FEWEST_EVENTS} events and f of at most "
            f"{CEILING_SHARE * ceiling:.3g}, a quarter of the ceiling; {FEWEST_SIZES} are needed"
        )
    counts = np.column_stack([events, trials - events])[window]
    x = np.log(eps[window])
    start = np.polyfit(x, np.log(share[window]), 1)[::-1]
    with warnings.catch_warnings():
        # a log link may leave [0, 1] in general; in the window f stays below a quarter
        warnings.simplefilter("ignore", DomainWarning)
        model = sm.GLM(counts, sm.add_constant(x), family=sm.families.Binomial(link=Log()))
    found = model.fit(start_params=start, maxiter=100)
    dispersion = float(found.pearson_chi2 / (len(x) - 2))
    if dispersion > LARGEST_DISPERSION:
        return result(
            f"the dispersion about a power law is {dispersion:.1f}, above {LARGEST_DISPERSION:g}", dispersion=dispersion
        )
    error = float(found.bse[1])
    half = error * max(float(stats.t.isf(0.025, len(x) - 2)) * math.sqrt(dispersion), float(stats.norm.isf(0.025)))
    return result("", float(found.params[1]), half, dispersion)


def ceiling_of(trains: np.ndarray) -> float:
    """Mean of 3P(1 - P): the probability that one of three unrelated outcomes differs from the others.

    Args:
        trains: bool [replicate, point]; unbiased from two replicates on.

    Raises:
        ValueError: one replicate.
    """
    runs, trained = len(trains), trains.sum(0)
    if runs < 2:
        raise ValueError(f"got {runs} replicate; expected 2 or more for a ceiling; sweep more replicates")
    return float((3 * trained * (runs - trained)).mean() / (runs * (runs - 1)))


def differs(base: np.ndarray, minus: np.ndarray, plus: np.ndarray) -> np.ndarray:
    """Whether the outcome of each base point differs from either neighbour's; all of one shape."""
    return (base != minus) | (base != plus)


# ---- base points and their neighbours


def to_position(values: np.ndarray, low: np.ndarray, high: np.ndarray, log: np.ndarray) -> np.ndarray:
    """Coordinates [point, axis] in the units of eps: natural logarithm on a log axis, else share of the range."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(log, np.log(values), (values - low) / (high - low))


def from_position(position: np.ndarray, low: np.ndarray, high: np.ndarray, log: np.ndarray) -> np.ndarray:
    """The inverse of `to_position`."""
    return np.where(log, np.exp(np.where(log, position, 0.0)), low + position * (high - low))


@dataclass(frozen=True)
class Probes:
    """Base points of one eps with their neighbours along a random direction, as the kernel will see them."""

    base: np.ndarray  # [point, axis]
    minus: np.ndarray
    plus: np.ndarray
    realised: np.ndarray  # [point, 2] distance to minus and to plus, in the units of eps


def draw_points(
    seed: int,
    size: int,
    eps: float,
    count: int,
    low: np.ndarray,
    high: np.ndarray,
    log: np.ndarray,
    dtype: type[np.floating] = np.float64,
) -> Probes:
    """Base points drawn over a window, log-uniformly on log axes, and neighbours at +-eps.

    Args:
        seed, size: decide the draw; `size` is the place of eps in its list, so every eps has its own points.
        eps: relative change on a log axis (difference of natural logarithms), share of the range on a linear one.
        count: base points.
        low, high, log: [axis] ends of the window, and which axes are logarithmic.
        dtype: the kernel's numbers, to which every coordinate is rounded before distances are taken.

    Raises:
        ValueError: the rounded neighbours of some point coincide with it.
    """
    random = np.random.Generator(np.random.Philox(key=[seed, size]))
    ends = to_position(np.stack([low, high]), low, high, log)
    position = ends[0] + (ends[1] - ends[0]) * random.random((count, len(low)))
    direction = random.standard_normal((count, len(low)))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)

    def rounded(where: np.ndarray) -> np.ndarray:
        return from_position(where, low, high, log).astype(dtype).astype(np.float64)

    base, minus, plus = (rounded(position + sign * eps * direction) for sign in (0, -1, 1))
    own = to_position(base, low, high, log)
    realised = np.stack([np.linalg.norm(to_position(n, low, high, log) - own, axis=1) for n in (minus, plus)], axis=1)
    if (realised == 0).any():
        share = (realised == 0).any(1).mean()
        raise ValueError(
            f"got eps {eps:g}, at which {share:.0%} of the points equal a neighbour in {np.dtype(dtype).name}; "
            "expected a change the kernel's numbers can tell; take a larger eps or float64"
        )
    return Probes(base, minus, plus, realised)


# ---- the command: points trained by the engine, inside the store they belong to


@dataclass(frozen=True, kw_only=True)
class Options(Labelling):
    """Which map, over which window, at which sizes."""

    store: str  # path of the sweep's store; replicates in it give the ceiling
    over: str = ""  # name:low:high of what is changed, two with a comma between (default: the store's axes)
    at: str = ""  # name=value of the axes that stay, with commas between, such as tokens=262144
    sizes: str = "1e-6:1e-1:7"  # smallest, largest and number of relative changes
    points: int = 500  # base points for each size
    floor: int = 500  # base points trained again beside other runs, for the floor
    device: str = "auto"  # cpu or cuda; auto: cuda if there is one


class Window(NamedTuple):
    """What is changed [axis], and what stays."""

    names: tuple[str, ...]
    low: np.ndarray
    high: np.ndarray
    log: np.ndarray
    fixed: dict[str, float]


def read_window(store: Replicate, options: Options) -> Window:
    """The window of --over and --at.

    Raises:
        ValueError: a name that is no axis of the store, a range outside it, an axis that is neither.
    """
    axes = {axis.name: axis for axis in (store.grid.y, store.grid.x)}
    fixed = {}
    for part in options.at.split(",") if options.at else ():
        name, _, value = part.partition("=")
        if name not in axes or not is_number(value):
            raise ValueError(f"at has {part!r}; expected name=value with a name among {', '.join(axes)}")
        fixed[name] = float(value)
    chosen = {}
    for part in options.over.split(",") if options.over else ():
        name, *ends = part.split(":")
        if name not in axes or len(ends) != 2 or not all(map(is_number, ends)):
            raise ValueError(f"over has {part!r}; expected name:low:high with a name among {', '.join(axes)}")
        chosen[name] = tuple(map(float, ends))
    if not chosen:
        chosen = {name: (axis.low, axis.high) for name, axis in axes.items() if name not in fixed}
    for name, (low, high) in chosen.items():
        if not axes[name].low <= low < high <= axes[name].high:
            raise ValueError(f"over has {name} from {low:g} to {high:g}; expected a range within {axes[name]}")
    missing = [name for name in axes if name not in chosen and name not in fixed]
    if missing:
        raise ValueError(f"{missing[0]} is neither changed nor held; give --at {missing[0]}=value, or --over it too")
    low, high = np.array(list(chosen.values())).T
    return Window(tuple(chosen), low, high, np.array([axes[name].scale == "log" for name in chosen]), fixed)


def read_sizes(text: str) -> np.ndarray:
    """Read `smallest:largest:number`, log-spaced. Raises ValueError for another form."""
    parts = text.split(":")
    if len(parts) != 3 or not all(map(is_number, parts)) or not 0 < float(parts[0]) <= float(parts[1]):
        raise ValueError(f"sizes is {text!r}; expected smallest:largest:number, such as 1e-6:1e-1:7")
    return np.geomspace(float(parts[0]), float(parts[1]), int(parts[2]))


def write_points(path: Path, window: Window, points: np.ndarray) -> None:
    """A list of points [point, axis] as the .csv that a sweep reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [",".join(window.names), *(",".join(map(repr, point)) for point in points.tolist())]
    path.write_text("\n".join(lines) + "\n", "utf-8")


def train_points(store: Replicate, window: Window, points: np.ndarray, name: str, device: str, slots: int = 0) -> Store:
    """Train a list of points under the store's configuration, as `uncertainty/<name>` inside it."""
    from engine.api import run_sweep  # brings torch; --help does without

    folder = store.path / "uncertainty"
    write_points(folder / f"{name}.csv", window, points)
    changes = {"y": "", "x": "", "points": str((folder / f"{name}.csv").resolve()), "replicates": 1, "trace": "off"}
    config = store.config.change(**changes, seed=store.config.seed + store.index, **window.fixed)
    run_sweep(config, RunOptions(store=str(folder / name), device=device, slots=slots))
    return open_store(folder / name)


def outcomes_of(store: Store, thresholds: Thresholds) -> np.ndarray:
    """Whether each point trains, bool [point]. Raises ValueError where one measured nothing."""
    codes = store.labels(thresholds)[0]
    if not measured(codes).all():
        raise ValueError(f"{store.path} has {(~measured(codes)).sum()} points without an outcome; expected none")
    return trains(codes)


def window_ceiling(store: Replicate, window: Window, thresholds: Thresholds) -> float:
    """`ceiling_of` the store's replicates over the cells of the window, held axes at their nearest value.

    Raises:
        ValueError: one replicate, or no cell in the window.
    """
    inside = np.ones(store.grid.shape, bool)
    for position, axis in enumerate((store.grid.y, store.grid.x)):
        if axis.name in window.fixed:
            near = np.abs(np.log(axis.values / window.fixed[axis.name]))
            own = near == near.min()
        else:
            index = window.names.index(axis.name)
            own = (axis.values >= window.low[index]) & (axis.values <= window.high[index])
        inside &= own[:, None] if position == 0 else own
    if not inside.any():
        raise ValueError(f"no cell of {store.path} lies in the window; widen it, for the ceiling")
    codes = store.store.labels(thresholds)
    return ceiling_of(trains(codes)[:, inside])


def main() -> None:
    """Train what is missing, count what flips, fit the exponent."""
    options = parse(Options, "How surely a run's outcome is known: the share of runs that a small change flips.")
    with user_errors():
        from analysis.replicates import exact_interval

        store = open_map(options.store, options.replicate)
        window, sizes, console = read_window(store, options), read_sizes(options.sizes), screen()
        ceiling = window_ceiling(store, window, options.thresholds)
        kernel = kernel_type(window.names[0], store.config.swept.precision)
        ends = window.low, window.high, window.log, kernel
        drawn = [draw_points(0, i, float(eps), options.points, *ends) for i, eps in enumerate(sizes)]
        points = np.concatenate([np.concatenate([each.base, each.minus, each.plus]) for each in drawn])
        held = [f"{name}-{value:g}" for name, value in window.fixed.items()]
        ranges = [f"{n}-{low:g}-{high:g}" for n, low, high in zip(window.names, window.low, window.high, strict=True)]
        name = "-".join([*ranges, *held, options.sizes.replace(":", "-"), str(options.points)])
        found = train_points(store, window, points, name, options.device)
        outcome = outcomes_of(found, options.thresholds).reshape(len(sizes), 3, options.points)
        events = differs(*outcome.transpose(1, 0, 2)).sum(1)
        realised = np.array([np.median(each.realised) for each in drawn])
        law = fit_exponent(realised, events, np.full(len(sizes), options.points), ceiling, len(window.names))
        title = f"{store.path}: f(eps) over {', '.join(window.names)}"
        console.print(exponent_table(law, events, options.points, title))
        console.print(exponent_words(law))
        if options.floor:
            again = train_points(store, window, points[: options.floor], f"{name}-floor", options.device, slots=97)
            same = again.read("weights_digest")[0] == found.read("weights_digest")[0][: options.floor]
            flips = int((outcomes_of(again, options.thresholds) != outcome.reshape(-1)[: options.floor]).sum())
            bound = exact_interval(flips, options.floor)[1]
            console.print(
                f"floor: {flips} of {options.floor} points flip when trained again beside other runs (at most "
                f"{bound:.2%}); {same.sum()} have the same bits"
            )


def exponent_table(law: Exponent, events: np.ndarray, trials: int, title: str) -> Table:
    """f at every size with its interval."""
    table = Table("eps", "flips", "f", "95%", "", title=title, title_justify="left", box=None)
    for i, eps in enumerate(law.eps):
        interval = f"{law.low[i]:.3f} to {law.high[i]:.3f}"
        table.add_row(
            f"{eps:.3g}", f"{events[i]} of {trials}", f"{law.share[i]:.3f}", interval, "fitted" if law.fitted[i] else ""
        )
    return table


def exponent_words(law: Exponent) -> str:
    """The exponent and the dimension, or why there is none."""
    if law.refused:
        return f"no exponent: {law.refused}; ceiling about {law.ceiling:.3f}"
    value, low, high = law.dimension
    return (
        f"alpha {law.alpha:.3f} [{law.alpha_low:.3f}, {law.alpha_high:.3f}], D = {law.ambient} - alpha = {value:.3f} "
        f"[{low:.3f}, {high:.3f}]; dispersion {law.dispersion:.1f}, ceiling about {law.ceiling:.3f}"
    )


if __name__ == "__main__":
    main()
