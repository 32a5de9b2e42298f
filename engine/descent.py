"""The paper's network over a grid: its problem, from a seed or a file, and the training of grid rows.

R cell, Q problem, N data point, K network input (16), H hidden unit (16), S step, B point of a minibatch.

A problem is what training starts from: inputs X [N, 16] and targets Y [N, 1], initial weights W0 [16, 16] and
W1 [16, 1], all standard normal, and for minibatches the points of every step, minibatch_index [S, B], drawn with
replacement. Each comes from its own Philox stream of the seed, so none depends on the size of
another. An .npz of the same arrays takes their place, so that another program's run can be checked cell by cell.
"""

import zipfile

import numpy as np
import torch

from engine.config import SweepConfig
from kernels.descent import descend
from kernels.two_layer import DTYPES, WIDTH

STREAMS = ("W0", "W1", "X", "Y", "minibatch_index")
SWEPT = ("lr", "lr.0", "lr.1", "offset", "seed")


def make_problem(config: SweepConfig) -> dict[str, np.ndarray]:
    """The problem of a configuration: float64 X, Y, W0, W1 and, with minibatches, int64 minibatch_index.

    The weights are those before `init_scale` and `offset`. `np.savez(path, **problem)` makes a file that
    `--problem` reads back.

    Raises:
        ValueError: the problem file is no .npz of these arrays in these shapes.
    """
    return load_problem(config) if config.problem else draw_problem(config, config.seed)


def problems_of(config: SweepConfig, seeds: list[int]) -> list[dict[str, np.ndarray]]:
    """The problem of every seed, or the one of the file.

    Raises:
        ValueError: the problem file does not fit, or is given while the seed is swept.
    """
    if not config.problem:
        return [draw_problem(config, seed) for seed in seeds]
    if "seed" in config.swept:
        raise ValueError("the seed is swept, but --problem fixes what it decides; leave out one of them")
    return [load_problem(config)]


def draw_problem(config: SweepConfig, seed: int) -> dict[str, np.ndarray]:
    """The problem that a seed stands for."""
    stream = {
        name: np.random.Generator(np.random.Philox(key=np.array([seed, index], np.uint64)))
        for index, name in enumerate(STREAMS)
    }
    points = config.data_points
    problem: dict[str, np.ndarray] = {
        "X": stream["X"].standard_normal((points, WIDTH)),
        "Y": stream["Y"].standard_normal((points, 1)),
        "W0": stream["W0"].standard_normal((WIDTH, WIDTH)),
        "W1": stream["W1"].standard_normal((WIDTH, 1)),
    }
    if config.minibatch:
        draws = stream["minibatch_index"].integers(0, points, (config.steps, config.minibatch))
        problem["minibatch_index"] = draws
    return problem


def load_problem(config: SweepConfig) -> dict[str, np.ndarray]:
    """The problem in the configuration's .npz; the number of data points is the file's."""
    path = config.problem
    form = "a problem is an .npz of X [N, 16], Y [N, 1], W0 [16, 16], W1 [16, 1] and, with --minibatch, minibatch_index"
    if not zipfile.is_zipfile(path):
        raise ValueError(f"problem file {path!r} is not an .npz; {form}")
    with np.load(path) as file:
        stored = {name: file[name] for name in file.files}
    names = [*STREAMS[:4], *(["minibatch_index"] if config.minibatch else [])]
    missing = [name for name in names if name not in stored]
    if missing:
        raise ValueError(f"problem file {path!r} has no {', '.join(missing)}; {form}")
    points = len(stored["X"]) if stored["X"].ndim else 0
    shapes = {"X": (points, WIDTH), "Y": (points, 1), "W0": (WIDTH, WIDTH), "W1": (WIDTH, 1)}
    for name, shape in shapes.items():
        if points == 0 or stored[name].shape != shape or stored[name].dtype.kind not in "fiu":
            got = f"{stored[name].dtype} {list(stored[name].shape)}"
            raise ValueError(f"problem file {path!r}: {name} is {got}, expected numbers {list(shape)}; {form}")
        if not np.isfinite(stored[name]).all():
            raise ValueError(f"problem file {path!r}: {name} has values that are not finite; mend the file")
    problem = {name: np.ascontiguousarray(stored[name], np.float64) for name in shapes}
    if config.minibatch:
        problem["minibatch_index"] = check_draws(stored["minibatch_index"], config, points)
    return problem


def check_draws(index: np.ndarray, config: SweepConfig, points: int) -> np.ndarray:
    """minibatch_index [>= steps, minibatch] as int64, or a ValueError."""
    wanted = f"whole numbers in [0, {points}) of shape [{config.steps} or more, {config.minibatch}]"
    shape_fits = index.ndim == 2 and index.shape[0] >= config.steps and index.shape[1] == config.minibatch
    if not shape_fits or index.dtype.kind not in "iu" or index.min() < 0 or index.max() >= points:
        got = f"{index.dtype} {list(index.shape)}"
        raise ValueError(
            f"problem file {config.problem!r}: minibatch_index is {got}, expected {wanted}; "
            "mend the file, or change --steps or --minibatch"
        )
    return index[: config.steps].astype(np.int64)


def train_rows(config: SweepConfig, rows: slice, device: str) -> dict[str, np.ndarray]:
    """Train the cells of some grid rows.

    Args:
        config: a resolved configuration of the network mlp, with axes out of SWEPT.
        rows: grid rows [start, stop).
        device: cuda or cpu.

    Returns:
        Arrays [rows, cols]: measure float64, first_loss and last_loss float32, steps and nonfinite_step int32,
        weights_digest uint64; with `trace` on also losses float32 [rows, cols, steps]. On one GPU model, or one
        CPU model, a cell's bits depend on the cell alone.

    Raises:
        ValueError: the problem file does not fit, or is given while the seed is swept.
    """
    launch = range(*rows.indices(config.grid.shape[0]))
    dtype = DTYPES[config.precision]
    values_R = cell_values(config, launch)
    seeds, problem_R = np.unique(values_R["seed"].astype(np.int64), return_inverse=True)
    problems = problems_of(config, [int(seed) for seed in seeds])

    def stacked(name: str, scale: float = 1.0) -> torch.Tensor:
        array = np.stack([problem[name] for problem in problems]) * scale
        return torch.from_numpy(array).to(device, dtype)

    def cellwise(name: str) -> torch.Tensor:
        return torch.from_numpy(values_R[name]).to(device, dtype)

    draws = None
    if config.minibatch:
        draws = torch.from_numpy(np.stack([p["minibatch_index"] for p in problems])).to(device, torch.int32)
    run = descend(
        stacked("X"),
        stacked("Y")[:, :, 0].contiguous(),
        stacked("W0", config.init_scale),
        stacked("W1", config.init_scale)[:, :, 0].contiguous(),
        cellwise("lr.0"),
        cellwise("lr.1"),
        cellwise("offset"),
        torch.from_numpy(problem_R.astype(np.int32)).to(device),
        steps=config.steps,
        nonlinearity=config.nonlinearity,
        precision=config.precision,
        minibatch_QSB=draws,
        offset_every_step=config.offset_every_step,
        keep_losses=config.trace == "on",
    )
    arrays = {
        "measure": run.measure_R,
        "first_loss": run.first_loss_R.float(),
        "last_loss": run.last_loss_R.float(),
        "steps": torch.full_like(run.nonfinite_step_R, config.steps),
        "nonfinite_step": run.nonfinite_step_R,
        "weights_digest": run.weights_digest_R,
    }
    if run.losses_RS is not None:
        arrays["losses"] = run.losses_RS
    shape = (len(launch), config.grid.shape[1])
    results = {name: tensor.unflatten(0, shape).cpu().numpy() for name, tensor in arrays.items()}
    results["weights_digest"] = results["weights_digest"].view(np.uint64)
    return results


def cell_values(config: SweepConfig, rows: range) -> dict[str, np.ndarray]:
    """float64 lr.0, lr.1, offset and seed of each cell, row by row [rows * cols].

    lr.0 and lr.1 follow lr where they are neither swept nor given.
    """
    grid = config.grid
    y, x = grid.y.values[rows.start : rows.stop], grid.x.values
    fixed = {name: config.fixed(name) for name in SWEPT}
    lr = fixed["lr"]
    for layer in ("lr.0", "lr.1"):
        fixed[layer] = lr if fixed[layer] is None else fixed[layer]
    swept = {grid.y.name: np.repeat(y, len(x)), grid.x.name: np.tile(x, len(y))}
    values = {name: swept.get(name, np.full(len(y) * len(x), value)) for name, value in fixed.items()}
    for layer in ("lr.0", "lr.1"):
        if "lr" in swept and layer not in swept and config.fixed(layer) is None:
            values[layer] = swept["lr"]
    return values
