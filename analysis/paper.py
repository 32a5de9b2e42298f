"""The table of fractal dimensions of Sohl-Dickstein 2024 (arXiv:2402.06184), measured again.

Six experiments on the paper's network, each a map over its default window and zoom sequences that follow
the boundary. The paper's sequences were chosen by eye; here a rule chooses, and `--follow` says which: the
busiest part of the boundary, a typical one, or a quiet one. Every experiment is reported with both medians
of local slopes (ours, and the published estimator, which is biased), the mean and the spread of the single
maps' dimensions, and the same numbers for null maps of that size. Stores are kept, so a run that was
interrupted goes on.
"""

if __name__ == "__main__" and not __package__:
    import started  # noqa: F401  says how to start it where its packages are missing

import csv
import datetime
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from analysis.boundary import map_edges
from analysis.classify import Labelling
from analysis.dimension import (
    LEAST_CELLS,
    NULLS,
    Dimension,
    in_words,
    local_median,
    measurable,
    measure,
    null_mask,
    published_median,
)
from analysis.sequence import check_follow, sequence
from engine.command import parse, screen, user_errors
from engine.config import SweepConfig, at_least, make_config
from engine.store import open_map


class Experiment(NamedTuple):
    """One line of the paper's table."""

    published: float
    config: SweepConfig


def experiments(size: int, steps: int) -> dict[str, Experiment]:
    """The paper's experiments as sweeps of size x size cells.

    The offset's window is ours: the paper's figure gives no numbers for it.
    """
    layers = make_config(
        network="two_layer", y=f"lr.0:log:1e-3:1e6:{size}", x=f"lr.1:log:1e-3:1e6:{size}", steps=steps, precision="fp64"
    )
    offset = layers.change(y=f"offset:linear:-4:4:{size}", x=f"lr:log:1e-3:1e6:{size}")
    return {
        "identity": Experiment(1.17, layers.change(nonlinearity="identity")),
        "relu": Experiment(1.20, layers.change(nonlinearity="relu")),
        "single data point": Experiment(1.41, layers.change(data_points=1)),
        "minibatch": Experiment(1.55, layers.change(minibatch=16)),
        "tanh": Experiment(1.66, layers),
        "offset by lr": Experiment(1.98, offset),
    }


@dataclass(frozen=True, kw_only=True)
class Options(Labelling):
    """How large, how deep, and where the stores go."""

    results: str = "results/paper"  # folder of the stores, one an experiment
    only: str = ""  # comma-separated names of experiments (default: all six)
    size: int = 512  # cells a side of every map
    levels: int = 10  # zooms after the first map
    follow: str = "1,0.5"  # parts of the boundary to zoom into, as quantiles of busyness: 1 busiest, 0.5 typical
    factor: int = 4  # how many times finer each zoom is
    steps: int = 500  # steps of gradient descent
    csv: str = ""  # append a row an experiment to this file
    device: str = "auto"  # cpu or cuda; auto: cuda if there is one


def zoomed(
    experiment: Experiment, path: Path, follow: float, options: Options, console: Console
) -> Iterator[np.ndarray]:
    """Boundary blocks of an experiment's map and of the zooms into it."""
    from engine.api import run_sweep
    from engine.options import RunOptions

    run_sweep(experiment.config, RunOptions(store=str(path), device=options.device, quiet=True))
    store = open_map(path)
    levels = sequence(store, options.levels, options.factor, 0, None, follow, options, options.device, console)
    return (map_edges(level.codes) for level in levels)


def figures(masks: list[np.ndarray]) -> dict[str, float]:
    """Both medians over some maps, and mean and spread of the maps' own dimensions; empty without a boundary."""
    large = measurable(masks)
    measured: list[Dimension] = [found for mask in large if (found := measure(mask)) is not None]
    if not measured:
        return {}
    values = np.array([found.value for found in measured])
    return {
        "maps": len(measured),
        "published_estimator": round(published_median(large), 3),
        "local_median": round(local_median(measured), 3),
        "mean": round(float(values.mean()), 3),
        "deviation": round(float(values.std()), 3),
    }


def append(path: Path, row: dict[str, object]) -> None:
    """Add a row to a CSV file, with its header if the file is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


def main() -> None:
    """Train what is missing, measure, print the table."""
    options = parse(Options, "The paper's table of fractal dimensions, measured again with both estimators and nulls.")
    with user_errors():
        from engine.provenance import device_name, provenance
        from engine.ranks import choose_device

        found = experiments(options.size, options.steps)
        names = options.only.split(",") if options.only else list(found)
        unknown = [name for name in names if name not in found]
        if unknown:
            raise ValueError(f"unknown experiment {unknown[0]!r}, expected one of {', '.join(found)}")
        for name, low in (("size", LEAST_CELLS), ("levels", 0), ("factor", 2), ("steps", 1)):
            at_least(name, getattr(options, name), low)
        if not re.fullmatch(r"[\d.]+(,[\d.]+)*", options.follow):
            raise ValueError(f"follow is {options.follow!r}, expected quantiles with commas between, such as 1,0.5")
        follows = [float(text) for text in options.follow.split(",")]
        for follow in follows:
            check_follow(follow)
        device, console = choose_device(options.device), screen()
        versions = provenance(device)
        table = Table(
            "experiment", "follow", "published", "published estimator", "ours", "maps' mean ± deviation", "maps"
        )
        for name in names:
            path = Path(options.results, name.replace(" ", "-"))
            for follow in follows:
                result = figures(list(zoomed(found[name], path, follow, options, console)))
                add(table, name, f"{follow:g}", f"{found[name].published:.2f}", result)
                if not options.csv:
                    continue
                head = {"date": datetime.date.today().isoformat(), "device": device_name(device)}
                head |= {"torch": versions["packages"]["torch"], "commit": versions["commit"]}
                run = {"experiment": name, "follow": follow, "size": options.size, "levels": options.levels}
                run |= {"steps": options.steps}
                blank = dict.fromkeys(("maps", "published_estimator", "local_median", "mean", "deviation"), "")
                append(Path(options.csv), head | run | {"published": found[name].published} | blank | result)
        for null in NULLS:
            add(table, f"null: {null}", "", "", figures([null_mask(null, options.size - 1, options.size - 1)]))
        console.print(table)


def add(table: Table, name: str, follow: str, published: str, result: dict[str, float]) -> None:
    """One line of the table."""
    if not result:
        table.add_row(name, follow, published, "no boundary", "", "", "0")
        return
    spread = f"{result['mean']:.3f} ± {result['deviation']:.3f}"
    medians = (in_words(result["published_estimator"]), in_words(result["local_median"]))
    table.add_row(name, follow, published, *medians, spread, str(result["maps"]))


if __name__ == "__main__":
    main()
