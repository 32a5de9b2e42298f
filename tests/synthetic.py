"""Stores with known arrays, made through the engine's own writer, for the tests of the analysis."""

from pathlib import Path

import numpy as np

from engine.config import SweepConfig, make_config, resolve
from engine.plan import steps_of
from engine.store import Replicate, Writer, create_store, empty_block, open_map


def write_store(path: Path, config: SweepConfig, arrays: dict[str, np.ndarray]) -> Replicate:
    """`write_cells` of a grid; its first map."""
    write_cells(path, config, arrays)
    return open_map(path)


def write_cells(path: Path, config: SweepConfig, arrays: dict[str, np.ndarray]) -> None:
    """A complete store of a configuration; arrays that are not given keep their fill value.

    arrays: [*cells(, step)], the same for every replicate, or [replicate, *cells(, step)].
    """
    run = resolve(config, "cpu")
    steps = int(run.config.workload.plan(run).steps.max())
    provenance = {"date": "2026-01-01", "device": "CPU", "packages": {"torch": "2.13"}, "commit": "abc", "threads": 1}
    create_store(path, run, steps, run.cells.shape[0], {"provenance": provenance, "slots": 1, "inputs": {}})
    writer = Writer(path)
    block = empty_block(writer.specs, run.shape, steps)
    block["status"][:] = 1
    for name, value in arrays.items():
        block[name][:] = value
    for chunk in writer.chunks():
        writer.write_chunks({chunk: {name: array[chunk.replicate] for name, array in block.items()}})
    writer.close()


def language_store(
    path: Path, rows: int = 24, cols: int = 16, exponent: float = -0.3, jitter: float = 0.0, trace: str = "on"
) -> Replicate:
    """A learning-rate by tokens map whose critical rate is 0.3 * (tokens / 1e4)^exponent, with its traces.

    Runs below the critical rate fall from 5.5, the faster the nearer they are to it; up to 10 times above
    it they rise; beyond, they are not finite from a step on.
    """
    config = make_config(y=f"lr:log:1e-4:1e1:{rows}", x=f"tokens:log:1e3:6e4:{cols}", trace=trace, validation_rows=16)
    random = np.random.default_rng(0)
    grid = resolve(config, "cpu").cells
    lr, tokens = grid.y.values[:, None], grid.x.values
    critical = 0.3 * (tokens / 1e4) ** exponent * np.exp(jitter * random.standard_normal(cols))
    steps = steps_of(tokens, 4, 64)
    above = np.log10(lr / critical)
    step = np.arange(steps.max())
    good = 5.5 - 3.0 * np.exp(above)[..., None] * (1 - np.exp(-step * lr[..., None] * 0.3))
    bad = 5.5 + (0.5 + 2 * np.maximum(above, 0))[..., None] * (1 - np.exp(-step / 3))
    losses = np.where(above[..., None] <= 0, good, bad) + 0.05 * random.standard_normal(good.shape)
    losses[..., 0] = 5.5
    breaks_at = np.where(above > 1, np.clip(12 / np.maximum(above, 1) ** 3, 1, steps - 1).astype(int), -1)
    ran = np.where(breaks_at >= 0, breaks_at + 1, steps)
    losses[step >= ran[..., None]] = np.nan
    losses[(breaks_at[..., None] >= 0) & (step == breaks_at[..., None])] = np.nan
    last = np.stack([losses[:, j, max(n - 20, 0) : n].mean(-1) for j, n in enumerate(steps)], 1)
    arrays = {
        "first_loss": np.full((rows, cols), 5.5),
        "last_loss": last,
        "val_first": np.full((rows, cols), 5.5),
        "val_loss": last,
        "val_difference_se": np.full((rows, cols), 0.01),
        "loss_min": np.fmin.reduce(losses, -1),
        "loss_max": np.fmax.reduce(losses, -1),
        "loss_noise": np.full((rows, cols), 0.05),
        "steps": ran,
        "nonfinite_step": breaks_at,
        "weights_digest": random.integers(1, 2**63, (rows, cols), dtype=np.uint64),
    }
    return write_store(path, config, arrays | ({"losses": losses} if trace == "on" else {}))


def two_layer_store(
    path: Path, measure: np.ndarray, y: str = "lr.0:log:1e-3:1e6", x: str = "lr.1:log:1e-3:1e6"
) -> Replicate:
    """A map of the paper's network with a given convergence measure [row, col]."""
    rows, cols = measure.shape
    config = make_config(network="two_layer", y=f"{y}:{rows}", x=f"{x}:{cols}")
    nonfinite = np.where(measure > 20, 5, -1)
    arrays = {"measure": measure, "first_loss": 1.0, "last_loss": np.exp(np.clip(measure / 100, -8, 8)), "steps": 500}
    return write_store(path, config, arrays | {"nonfinite_step": nonfinite})


def julia_measure(side: int) -> np.ndarray:
    """A convergence measure [side, side] with a fractal boundary: escape times of z^2 - 0.123 + 0.745i."""
    y, x = np.mgrid[:side, :side] / (side - 1) * 3 - 1.5
    z, escaped = x + 1j * y, np.zeros((side, side), int)
    for _ in range(200):
        inside = np.abs(z) < 2
        z = np.where(inside, z**2 - 0.123 + 0.745j, z)
        escaped += inside
    closeness = np.abs(z)
    return np.where(escaped == 200, -100 - 100 * closeness, escaped + closeness)
