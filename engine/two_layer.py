"""The workload of the paper's two-layer network: its problem, from a seed or a file, and the training of launches.

R cell, Q problem, N data point, K network input (16), H hidden unit (16), S step, B point of a minibatch.

A problem is what training starts from: inputs X [N, 16] and targets Y [N, 1], initial weights W0 [16, 16] and
W1 [16, 1], all standard normal, and for minibatches the points of every step, minibatch_index [S, B], drawn with
replacement. Each comes from its own Philox stream of the seed, so none depends on the size of
another. An .npz of the same arrays takes their place, so that another program's run can be checked cell by cell.
"""

import hashlib
import lzma
import math
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.table import Table

from engine import plan
from engine.config import Run
from engine.measure import measurements_of
from engine.plan import Launch, Plan, hyper_of
from engine.workload import Replay
from kernels.descent import descend
from kernels.two_layer import DTYPES, WIDTH, Descent

STREAMS = ("W0", "W1", "X", "Y", "minibatch_index")
# what numpy and zipfile say of an archive that is damaged, encrypted, oddly compressed, or claims more than fits
UNREADABLE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    OSError,
    ValueError,
    RuntimeError,
    MemoryError,
)
CPU_CELLS, GPU_CELLS = 2**12, 2**20  # cells a launch: seconds of work
FLOPS = 1088  # a point and step: 544 multiply-adds
CPU_FLOPS, GPU_FLOPS = 5e10, 5e13  # a second in fp32; typical of two cores, and of an H100


class TwoLayerReading(NamedTuple):
    """What some cells show after their last step. steps: taken by each."""

    descent: Descent
    steps: int


def make_problem(run: Run) -> dict[str, np.ndarray]:
    """The problem of a sweep: float64 X, Y, W0, W1 and, with minibatches, int64 minibatch_index.

    The weights are those before `init_scale` and `offset`. `np.savez(path, **problem)` makes a file that
    `--problem` reads back.

    Raises:
        ValueError: the problem file is no .npz of these arrays in these shapes.
    """
    return load_problem(run) if run.config.training.problem else draw_problem(run, run.config.seed)


def draw_problem(run: Run, seed: int) -> dict[str, np.ndarray]:
    """The problem that a seed stands for."""
    stream = {
        name: np.random.Generator(np.random.Philox(key=np.array([seed, index], np.uint64)))
        for index, name in enumerate(STREAMS)
    }
    points = run.config.training.data_points
    problem: dict[str, np.ndarray] = {
        "X": stream["X"].standard_normal((points, WIDTH)),
        "Y": stream["Y"].standard_normal((points, 1)),
        "W0": stream["W0"].standard_normal((WIDTH, WIDTH)),
        "W1": stream["W1"].standard_normal((WIDTH, 1)),
    }
    training = run.config.training
    if training.minibatch:
        draws = stream["minibatch_index"].integers(0, points, (training.steps, training.minibatch))
        problem["minibatch_index"] = draws
    return problem


def load_problem(run: Run) -> dict[str, np.ndarray]:
    """The problem in the configuration's .npz; the number of data points is the file's."""
    training = run.config.training
    path = training.problem
    form = "a problem is an .npz of X [N, 16], Y [N, 1], W0 [16, 16], W1 [16, 1] and, with --minibatch, minibatch_index"
    if not zipfile.is_zipfile(path):
        raise ValueError(f"problem file {path!r} is not an .npz; {form}")
    try:
        with np.load(path) as file:
            stored = {name: np.asarray(file[name]) for name in file.files}
    except UNREADABLE as error:
        raise ValueError(f"problem file {path!r} cannot be read ({error}); make it again; {form}") from error
    names = [*STREAMS[:4], *(["minibatch_index"] if training.minibatch else [])]
    missing = [name for name in names if name not in stored]
    if missing:
        raise ValueError(f"problem file {path!r} has no {', '.join(missing)}; {form}")
    if "minibatch_index" in stored and not training.minibatch:
        size = stored["minibatch_index"].shape[-1:]
        raise ValueError(
            f"problem file {path!r} has minibatch_index, but --minibatch is 0; give --minibatch "
            f"{''.join(map(str, size))}, or remove the array from the file for full batches"
        )
    points = len(stored["X"]) if stored["X"].ndim else 0
    shapes = {"X": (points, WIDTH), "Y": (points, 1), "W0": (WIDTH, WIDTH), "W1": (WIDTH, 1)}
    for name, shape in shapes.items():
        if points == 0 or stored[name].shape != shape or stored[name].dtype.kind not in "fiu":
            got = f"{stored[name].dtype} {list(stored[name].shape)}"
            raise ValueError(f"problem file {path!r}: {name} is {got}, expected numbers {list(shape)}; {form}")
        if not np.isfinite(stored[name]).all():
            raise ValueError(f"problem file {path!r}: {name} has values that are not finite; mend the file")
    problem = {name: np.ascontiguousarray(stored[name], np.float64) for name in shapes}
    if training.minibatch:
        problem["minibatch_index"] = check_draws(stored["minibatch_index"], run, points)
    return problem


def check_draws(index: np.ndarray, run: Run, points: int) -> np.ndarray:
    """minibatch_index [>= steps, minibatch] as int64, or a ValueError."""
    training = run.config.training
    wanted = f"whole numbers in [0, {points}) of shape [{training.steps} or more, {training.minibatch}]"
    shape_fits = index.ndim == 2 and index.shape[0] >= training.steps and index.shape[1] == training.minibatch
    if not shape_fits or index.dtype.kind not in "iu" or index.min() < 0 or index.max() >= points:
        got = f"{index.dtype} {list(index.shape)}"
        raise ValueError(
            f"problem file {training.problem!r}: minibatch_index is {got}, expected {wanted}; "
            "mend the file, or change --steps or --minibatch"
        )
    return index[: training.steps].astype(np.int64)


def permuted_problem(store: Any) -> Path:
    """Write a store's problem with its hidden units in another order, once; its .npz's path."""
    path = store.place.drawings / "noise" / "permuted.npz"
    if not path.exists():
        problem: dict[str, Any] = make_problem(store.run)
        order = np.random.default_rng(0).permutation(problem["W0"].shape[1])
        problem["W0"], problem["W1"] = np.ascontiguousarray(problem["W0"][:, order]), problem["W1"][order]
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **problem)
    return path


def train_cells(run: Run, cells: np.ndarray, device: torch.device, keep_losses: bool) -> TwoLayerReading:
    """Train some cells (flat indices). On one GPU model, or one CPU model, a cell's bits depend on the cell alone."""
    training, dtype = run.config.training, DTYPES[run.config.swept.precision]
    hyper = hyper_of(run, cells)
    for layer in ("0", "1"):
        hyper[f"lr.{layer}"] = hyper[run.source("lr", layer)]
    starts, problem_R = np.unique(np.stack([hyper["seed"], hyper["init_scale"]], 1), axis=0, return_inverse=True)
    if training.problem:
        problems = [load_problem(run)] * len(starts)
    else:
        problems = [draw_problem(run, int(seed)) for seed, _ in starts]

    def stacked(name: str, scaled: bool = False) -> torch.Tensor:
        arrays = [
            problem[name] * (scale if scaled else 1.0) for problem, (_, scale) in zip(problems, starts, strict=True)
        ]
        return torch.from_numpy(np.stack(arrays)).to(device, dtype)

    def cellwise(name: str) -> torch.Tensor:
        return torch.from_numpy(hyper[name]).to(device, dtype)

    draws = None
    if training.minibatch:
        draws = torch.from_numpy(np.stack([p["minibatch_index"] for p in problems])).to(device, torch.int32)
    found = descend(
        stacked("X"),
        stacked("Y")[:, :, 0].contiguous(),
        stacked("W0", scaled=True),
        stacked("W1", scaled=True)[:, :, 0].contiguous(),
        cellwise("lr.0"),
        cellwise("lr.1"),
        cellwise("offset"),
        torch.from_numpy(problem_R.ravel().astype(np.int32)).to(device),
        steps=training.steps,
        nonlinearity=run.config.shape.nonlinearity,
        precision=run.config.swept.precision,
        minibatch_QSB=draws,
        offset_every_step=training.offset_every_step,
        keep_losses=keep_losses,
    )
    return TwoLayerReading(found, training.steps)


@dataclass
class TwoLayerSetup:
    """A sweep of the paper's network, ready to train."""

    run: Run
    plan: Plan
    device: torch.device
    chunk_rows: int
    launches: list[Launch]
    inputs: dict[str, str]
    exact: str = "at any width"
    width: int = 1

    @property
    def attributes(self) -> dict[str, Any]:
        """What the store says of it."""
        return {}

    def to_train(self, launch: Launch, status: np.ndarray) -> np.ndarray:
        """Those missing."""
        return self.plan.missing(launch, status)

    def train(
        self, launch: Launch, status: np.ndarray, progress: Callable[[float, float], None]
    ) -> Iterator[list[tuple[np.ndarray, dict[str, np.ndarray]]]]:
        """Train what is missing of a launch, all at once."""
        cells = self.plan.missing(launch, status)
        wanted = measurements_of(self.run)
        reading = train_cells(self.run, cells, self.device, "losses" in wanted)
        values = {name: as_numpy(own.compute["two_layer"](reading), own.dtype) for name, own in wanted.items()}
        progress(float(len(cells) * reading.steps), 0.0)
        yield [(cells, values)]

    def replay(self, cell: int) -> Replay:
        """Train one cell again, with its trace."""
        found = train_cells(self.run, np.array([cell]), self.device, keep_losses=True).descent
        assert found.losses_RS is not None
        digest = int(as_numpy(found.weights_digest_R, "u8")[0])
        return Replay(found.losses_RS[0].cpu().numpy(), digest, {})

    def describe(self, table: Table, left: list[Launch], status: np.ndarray) -> float:
        """Add rows of the dry run to a table; the seconds it will take about."""
        training = self.run.config.training
        steps = sum(len(self.plan.missing(launch, status)) for launch in left) * training.steps
        flops = FLOPS * (training.minibatch or training.data_points) * steps
        table.add_row("work", f"{training.steps} steps a cell, {steps:,} in all, {flops:.3g} FLOPs")
        rate = CPU_FLOPS if self.device.type == "cpu" else GPU_FLOPS
        return flops / (rate / 3 if self.run.config.swept.precision == "fp64" else rate)

    def announce(self) -> list[str]:
        """Nothing to say."""
        return []


def as_numpy(tensor: torch.Tensor, dtype: str) -> np.ndarray:
    """A tensor as the array that is stored; int64 digests keep their bits."""
    array = tensor.cpu().numpy()
    return array.view(dtype) if array.dtype.itemsize == np.dtype(dtype).itemsize else array.astype(dtype)


def prepare(run: Run, device: torch.device, options: Any, ranks: int, stored: Any) -> TwoLayerSetup:
    """Read the problem, choose launches.

    Args:
        options: engine.options.RunOptions.
        ranks: processes that share the launches.
        stored: the store that is resumed, or None.

    Raises:
        ValueError: the problem file does not fit, or `rows_per_launch` is no number.
    """
    inputs = {}
    if run.config.training.problem:
        digest = hashlib.sha256()
        for name, array in sorted(load_problem(run).items()):
            digest.update(f"{name} {array.shape}".encode() + array.tobytes())
        inputs["problem"] = digest.hexdigest()
    made = plan.plan_cells(run)
    rows, asked = run.cells.shape[0], options.rows_per_launch
    if asked != "auto" and (not asked.isdecimal() or int(asked) < 1):
        raise ValueError(f"rows_per_launch is {asked!r}; expected auto or a whole number >= 1")
    cells = CPU_CELLS if device.type == "cpu" else GPU_CELLS
    automatic = max(min(cells // math.prod(run.cells.shape[1:]), plan.shared_rows(rows, ranks)), 1)
    chunk = stored.chunk_rows if stored is not None else min(automatic if asked == "auto" else int(asked), rows)
    launch = automatic if asked == "auto" else int(asked)
    return TwoLayerSetup(run, made, device, chunk, plan.launches(made, chunk, launch, together=True), inputs)
