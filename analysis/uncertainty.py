"""How surely the outcome of a run is known: `uv run analysis/uncertainty.py --store S --over lr:LR90:10`.

Base points drawn over a window of a map, and neighbours at +-eps of each, are trained under the map's configuration,
inside its store. Counts of outcomes that differ give f(eps) and the uncertainty exponent (analysis/exponent.py). The
floor, eps = 0, is what flips when the same base points are trained otherwise rounded or ordered (analysis/variants.py);
the ceiling is what unrelated outcomes would flip, from the map's replicates. An interrupted command goes on where it
was when it is given again. What was found is kept as `uncertainty/<window>.json`.
"""

if __name__ == "__main__" and not __package__:
    import started  # noqa: F401  says how to start it where its packages are missing

import fnmatch
import json
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import numpy as np

from analysis.classify import Labelling
from analysis.exponent import (
    Exponent,
    ceiling_of,
    differs,
    draw_points,
    exponent_table,
    exponent_words,
    fit_exponent,
)
from analysis.rules import turned
from analysis.variants import check_variants, own_config, variants
from engine.command import parse, screen, user_errors
from engine.config import SweepConfig
from engine.grid import Points, is_number
from engine.hyper import check_value, kernel_type, rule_of
from engine.options import RunOptions
from engine.outcome import Thresholds, measured, trains
from engine.place import Place, Where
from engine.store import Replicate, Store, open_map, open_store

FLOOR_SLOTS = 97  # replicas that the floor's runs train beside, no width that a sweep chooses by itself
FOLDER = "uncertainty"  # inside a store: what was measured, and the stores of its points
LAUNCH_POINTS = 2**20  # points of a launch, at most


class Floor(NamedTuple):
    """Base points trained again, otherwise rounded or ordered."""

    variant: str
    points: int
    flips: int  # points whose outcome changed
    same_bits: int  # points whose final weights have the same bits

    @property
    def interval(self) -> tuple[float, float]:
        """Exact 95% interval of the share that flips."""
        from analysis.replicates import exact_interval

        low, high = exact_interval(self.flips, self.points)
        return float(low), float(high)


class Measured(NamedTuple):
    """f(eps) of one window of a map."""

    over: dict[str, tuple[float, float]]  # what is changed, and its range
    held: dict[str, float]
    law: Exponent
    floors: tuple[Floor, ...]


class Window(NamedTuple):
    """What is changed [axis], and what stays."""

    names: tuple[str, ...]
    low: np.ndarray
    high: np.ndarray
    log: np.ndarray
    fixed: dict[str, float]

    @property
    def slug(self) -> str:
        """A name for files."""
        ranges = [f"{n}-{low:.4g}-{high:.4g}" for n, low, high in zip(self.names, self.low, self.high, strict=True)]
        return "-".join([*ranges, *(f"{name}-{value:g}" for name, value in self.fixed.items())])


# ---- the window


def read_window(store: Replicate, over: str, at: str, thresholds: Thresholds) -> Window:
    """The window of --over and --at; an end LR50 or LR90 is that crossing of P(train) in the map's replicates.

    Raises:
        ValueError: a name that is no axis of the store, a range outside it, an axis that is neither, or one that the
            kernels see in whole steps only; too few replicates for a crossing, or none among the rates.
    """
    axes = {axis.name: axis for axis in (store.grid.y, store.grid.x)}
    fixed = {}
    for part in at.split(",") if at else ():
        name, _, value = part.partition("=")
        if name not in axes or not is_number(value):
            raise ValueError(f"at has {part!r}; expected name=value with a name among {', '.join(axes)}")
        fixed[name] = float(value)
    chosen = {}
    for part in over.split(",") if over else ():
        name, *ends = part.split(":")
        if name not in axes or len(ends) != 2 or not all(is_number(end) or end in CROSSINGS for end in ends):
            raise ValueError(
                f"over has {part!r}; expected name:low:high with a name among {', '.join(axes)}, and numbers or "
                f"{' or '.join(CROSSINGS)}"
            )
        chosen[name] = tuple(float(e) if is_number(e) else crossing_at(store, e, fixed, thresholds) for e in ends)
    if not chosen:
        chosen = {name: (axis.low, axis.high) for name, axis in axes.items() if name not in fixed}
    for name, (low, high) in chosen.items():
        if not axes[name].low <= low < high <= axes[name].high:
            raise ValueError(f"over has {name} from {low:g} to {high:g}; expected a range within {axes[name]}")
        if rule_of(name).integer or not rule_of(name).in_kernel:
            raise ValueError(
                f"over has {name}, which counts in whole numbers or steps: a small change of it is none; hold it with "
                f"--at {name}=value"
            )
    missing = [name for name in axes if name not in chosen and name not in fixed]
    if missing:
        raise ValueError(f"{missing[0]} is neither changed nor held; give --at {missing[0]}=value, or --over it too")
    low, high = np.array(list(chosen.values())).T
    return Window(tuple(chosen), low, high, np.array([axes[name].scale == "log" for name in chosen]), fixed)


CROSSINGS = {"LR50": 0.5, "LR90": 0.9}


def crossing_at(store: Replicate, end: str, fixed: dict[str, float], thresholds: Thresholds) -> float:
    """LR50 or LR90 of the map's replicates in the column nearest to what is held.

    Raises:
        ValueError: no axis is held, too few replicates, or P(train) does not cross the level among the rates.
    """
    from analysis.replicates import borders

    found = turned(store.store, thresholds)
    if found.other.name not in fixed:
        raise ValueError(f"over has {end}, which depends on {found.other.name}; give --at {found.other.name}=value")
    col = int(nearest(found.other.values, fixed[found.other.name]).argmax())
    rates, level = found.lr.values, CROSSINGS[end]
    rate = float(
        borders(rates, found.trains[:, :, col], found.known[:, :, col], levels=(level,), intervals=False).rate[0, 0]
    )
    if not 0 < rate < np.inf:
        raise ValueError(
            f"over has {end}, but P(train) of {store.path} does not fall to {level:g} between {rates[0]:g} and "
            f"{rates[-1]:g}; give a number"
        )
    return rate


def nearest(values: np.ndarray, value: float) -> np.ndarray:
    """Which of an axis's values is nearest to one, as a ratio where all are positive; bool [point]."""
    away = np.abs(np.log(values / value)) if value > 0 and values.min() > 0 else np.abs(values - value)
    return away == away.min()


def read_sizes(text: str) -> np.ndarray:
    """Read `smallest:largest:number`, log-spaced. Raises ValueError for another form."""
    parts = text.split(":")
    numbers = len(parts) == 3 and all(map(is_number, parts)) and parts[2].isdecimal() and int(parts[2]) > 0
    if not numbers or not 0 < float(parts[0]) <= float(parts[1]):
        raise ValueError(f"sizes is {text!r}; expected smallest:largest:number, such as 1e-6:1e-1:7")
    return np.geomspace(float(parts[0]), float(parts[1]), int(parts[2]))


def window_ceiling(store: Replicate, window: Window, thresholds: Thresholds) -> float:
    """`ceiling_of` the store's replicates over the cells of the window, held axes at their nearest value.

    Raises:
        ValueError: one replicate, or no cell in the window.
    """
    inside = np.ones(store.grid.shape, bool)
    for position, axis in enumerate((store.grid.y, store.grid.x)):
        if axis.name in window.fixed:
            own = nearest(axis.values, window.fixed[axis.name])
        else:
            index = window.names.index(axis.name)
            own = (axis.values >= window.low[index]) & (axis.values <= window.high[index])
        inside &= own[:, None] if position == 0 else own
    if not inside.any():
        raise ValueError(f"no cell of {store.path} lies in the window; widen it, for the ceiling")
    codes = store.store.labels(thresholds)
    return ceiling_of(trains(codes)[:, inside])


# ---- training


def train_points(
    config: SweepConfig, window: Window, points: np.ndarray, path: Where, device: str, slots: int, launch: int
) -> Store:
    """Train a list of points [point, axis] under a map's configuration, or what of it is missing, into `path`.

    Args:
        slots: replicas trained at once; 0 for what fits.
        launch: points of one launch, at most.
    """
    from engine.api import run_sweep  # brings torch; --help does without

    for name, column in zip(window.names, points.T, strict=True):
        check_value(name, float(column.min()))
        check_value(name, float(column.max()))
    cells = Points(dict(zip(window.names, np.ascontiguousarray(points.T), strict=True)))
    # the store holds the points; a list in a file would be read back number by number
    own = {"y": "", "x": "", "points": f"{path.name}, drawn", "replicates": 1, "trace": "off", **window.fixed}
    rows = str(min(launch, len(points)))
    run_sweep(
        config.change(**own),
        RunOptions(store=str(path), device=device, slots=slots, rows_per_launch=rows),
        cells=cells,
    )
    return open_store(path)


def outcomes_of(store: Store, thresholds: Thresholds) -> np.ndarray:
    """Whether each point trains, bool [point]. Raises ValueError where one measured nothing."""
    codes = store.labels(thresholds)[0]
    if not measured(codes).all():
        raise ValueError(f"{store.path} has {(~measured(codes)).sum()} points without an outcome; expected none")
    return trains(codes)


# ---- what was measured


def write_measured(place: Place, key: str, found: Measured) -> None:
    """Keep a measurement in a store, as JSON."""
    law = {
        name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in asdict(found.law).items()
    }
    text = {"over": found.over, "held": found.held, "law": law, "floors": [f._asdict() for f in found.floors]}
    place.put(key, json.dumps(text, indent=1).encode())


def read_measured(store: Replicate) -> list[Measured]:
    """Every f(eps) that was measured of a map, by name."""
    found = []
    keys = [item.key for item in store.place.items(FOLDER) if item.key.count("/") == 1]
    for key in sorted(fnmatch.filter(keys, f"{FOLDER}/{store.index}-*.json")):
        text = json.loads(store.place.get(key) or b"")
        arrays = {field.name for field in fields(Exponent) if field.type is np.ndarray}
        kept: dict[str, Any] = {n: np.array(v) if n in arrays else v for n, v in text["law"].items()}
        law = Exponent(**kept)
        over = {name: (low, high) for name, (low, high) in text["over"].items()}
        found.append(Measured(over, text["held"], law, tuple(Floor(**each) for each in text["floors"])))
    return found


# ---- the command


@dataclass(frozen=True, kw_only=True)
class Options(Labelling):
    """Which map, over which window, at which sizes."""

    store: str  # path of the sweep's store; replicates in it give the ceiling
    over: str = ""  # name:low:high of what is changed, two with a comma between (default: the store's axes)
    at: str = ""  # name=value of the axes that stay, with commas between, such as tokens=262144
    sizes: str = "1e-6:1e-1:7"  # smallest, largest and number of relative changes
    points: int = 500  # base points for each size
    floor: int = 500  # base points trained again, for the floor
    variants: str = "repeat"  # how they are: repeat, precision, order, permuted, with commas between
    device: str = "auto"  # cpu or cuda; auto: cuda if there is one


def main() -> None:
    """Train what is missing, count what flips, fit the exponent."""
    options = parse(Options, "How surely a run's outcome is known: the share of runs that a small change flips.")
    with user_errors():
        store = open_map(options.store, options.replicate)
        window = read_window(store, options.over, options.at, options.thresholds)
        found, events = measure(store, window, options)
        console = screen()
        title = f"{store.path}: f(eps) over {', '.join(window.names)}"
        console.print(exponent_table(found.law, events, options.points, title))
        console.print(exponent_words(found.law))
        for line in floor_lines(found):
            console.print(line)


def measure(store: Replicate, window: Window, options: Options) -> tuple[Measured, np.ndarray]:
    """Train, count and fit; what was found, also kept in the store, and events [size].

    Raises:
        ValueError: counts below 1 or 0, an eps that the kernel's numbers cannot tell, one replicate.
    """
    if options.points < 1 or options.floor < 0:
        raise ValueError(f"points is {options.points} and floor {options.floor}; expected at least 1 and at least 0")
    sizes, chosen = read_sizes(options.sizes), check_variants(options.variants)
    ceiling = window_ceiling(store, window, options.thresholds)
    kernel = kernel_type(window.names[0], store.config.swept.precision)
    ends = window.low, window.high, window.log, kernel
    drawn = [draw_points(0, i, float(eps), options.points, *ends) for i, eps in enumerate(sizes)]
    points = np.concatenate([np.concatenate([each.base, each.minus, each.plus]) for each in drawn])
    folder = store.path / FOLDER
    name = "-".join([str(store.index), window.slug, options.sizes.replace(":", "-"), str(options.points)])
    run = own_config(store)
    found = train_points(run, window, points, folder / name, options.device, 0, launch_points(3 * options.points))
    outcome = outcomes_of(found, options.thresholds).reshape(len(sizes), 3, options.points)
    events = differs(*outcome.transpose(1, 0, 2)).sum(1)
    realised = np.array([np.median(each.realised) for each in drawn])
    law = fit_exponent(realised, events, np.full(len(sizes), options.points), ceiling, len(window.names))
    floors = []
    for variant, configs in variants(store).items() if options.floor else ():
        for k, config in enumerate(configs if variant in chosen else ()):
            base, path = points[: min(options.floor, options.points)], folder / f"{name}-{variant}-{k}"
            again = train_points(config, window, base, path, options.device, FLOOR_SLOTS, len(base))
            flips = outcomes_of(again, options.thresholds) != outcome.reshape(-1)[: len(base)]
            same = again.read("weights_digest")[0] == found.read("weights_digest")[0][: len(base)]
            floors.append(Floor(variant, len(base), int(flips.sum()), int(same.sum())))
    over = {n: (float(low), float(high)) for n, low, high in zip(window.names, window.low, window.high, strict=True)}
    kept = Measured(over, window.fixed, law, tuple(floors))
    write_measured(store.place, f"{FOLDER}/{name}.json", kept)
    return kept, events


def launch_points(size: int) -> int:
    """Points of a launch: those of as many whole sizes as LAUNCH_POINTS hold, or a part of one."""
    return max(LAUNCH_POINTS // size, 1) * size if size <= LAUNCH_POINTS else LAUNCH_POINTS


def floor_lines(found: Measured) -> list[str]:
    """The floor in words."""
    return [
        f"floor, {f.variant}: {f.flips} of {f.points} points flip, {f.flips / f.points:.2%} [{f.interval[0]:.2%}, "
        f"{f.interval[1]:.2%}]; {f.same_bits} have the same bits"
        for f in found.floors
    ]


if __name__ == "__main__":
    main()
