"""Cells a second of the paper's network: the fused kernel against JAX's vmap + jit, in one run on one GPU.

    python benchmarks/fractal.py [--ours SIZE ...] [--precisions NAME ...] [--jax SIZE]

Trains SIZE x SIZE maps of lr.0 x lr.1 over the default window (1e-3 to 1e6, log), tanh, 272 points, full
batch, 500 steps, in fp32, tf32x3 and fp64, and the same with JAX (matrix products in full fp32; the
whole run one scan, vmapped over 2^16 cells at a time). A second window, 1e-3 to 1e-1, holds no diverging cell, so
no cell can stop early: it shows the speed of the bare arithmetic. Times are of a second, warm run, device
synchronised; compilation is not in them. Rows go to results/fractal.csv. JAX is left out where it is missing.
"""

if __name__ == "__main__" and not __package__:
    import started  # noqa: F401  says how to start it where its packages are missing

import argparse
import importlib.util
import os
import time

from benchmarks.arguments import Reader

PRECISIONS = ("fp32", "tf32x3", "fp64")
BATCH = 2**16  # cells that JAX trains at once


def positive(text: str) -> int:
    """A whole number above 0, as argparse reads it."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number above 0")
    return int(text)


def jax_size(text: str) -> int:
    """A map's size that is 0 or whose cells fill JAX's batches."""
    if not text.isdecimal() or int(text) ** 2 % min(BATCH, max(int(text) ** 2, 1)):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected 0, at most 256, or a multiple of 256")
    return int(text)


def options() -> argparse.Namespace:
    """The command line."""
    reader = Reader(description=__doc__.split("\n\n")[0])
    reader.add_argument("--ours", type=positive, nargs="+", default=[512, 1024], help="sizes of our maps")
    reader.add_argument("--precisions", choices=PRECISIONS, nargs="+", default=list(PRECISIONS), help="ours")
    reader.add_argument("--jax", type=jax_size, default=512, help="size of JAX's maps (0: none)")
    return reader.parse_args()


if __name__ == "__main__":
    options()  # before what takes seconds to import

import numpy as np
import torch

from benchmarks.timing import append_rows, ready
from engine.command import user_errors
from kernels.descent import descend
from kernels.two_layer import DTYPES

POINTS, STEPS = 272, 500
WINDOWS = {"default": (-3.0, 6.0), "converging": (-3.0, -1.0)}


def problem() -> list[np.ndarray]:
    """X [N, 16], Y [N], W0 [16, 16], W1 [16] in float64."""
    random = np.random.Generator(np.random.Philox(0))
    return [random.standard_normal(shape) for shape in ((POINTS, 16), POINTS, (16, 16), 16)]


def rates(size: int, window: str) -> tuple[np.ndarray, np.ndarray]:
    """lr.0 and lr.1 of each cell of a map [size^2]."""
    axis = np.logspace(*WINDOWS[window], size)
    return np.repeat(axis, size), np.tile(axis, size)


def time_ours(size: int, window: str, precision: str) -> tuple[float, np.ndarray]:
    """Seconds of a map, and its measure [size^2]."""
    tensors = [torch.from_numpy(array)[None].to("cuda", DTYPES[precision]) for array in problem()]
    lr0_R, lr1_R = (torch.from_numpy(rate).to("cuda", DTYPES[precision]) for rate in rates(size, window))
    problem_R = torch.zeros(len(lr0_R), dtype=torch.int32, device="cuda")
    arguments = (*tensors, lr0_R, lr1_R, torch.zeros_like(lr0_R), problem_R)
    descend(*arguments, steps=2, precision=precision)
    torch.cuda.synchronize()
    start = time.perf_counter()
    run = descend(*arguments, steps=STEPS, precision=precision)
    torch.cuda.synchronize()
    return time.perf_counter() - start, run.measure_R.cpu().numpy()


def time_jax(size: int, window: str, precision: str) -> tuple[float, np.ndarray]:
    """The same with JAX."""
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_default_matmul_precision", "highest")
    dtype = {"fp32": jnp.float32, "fp64": jnp.float64}[precision]
    x, y, w0, w1 = (jnp.asarray(array, dtype) for array in problem())

    def loss(weights):
        hidden = jnp.tanh(jnp.sqrt(jnp.asarray(2, dtype)) * (x @ weights[0] / 4))
        return jnp.mean((hidden @ weights[1] / 16 - y) ** 2)

    def train(lr0, lr1):
        def step(weights, _):
            value, (g0, g1) = jax.value_and_grad(loss)(weights)
            return (weights[0] - lr0 * g0, weights[1] - lr1 * g1), value

        losses = jax.lax.scan(step, (w0, w1), length=STEPS)[1].astype(jnp.float64)
        ratio = losses / losses[0]
        v = jnp.where(ratio <= 1e6, ratio, 1e6)
        return jnp.where(v[-20:].mean() < 1, -v.sum(), (1 / v).sum())

    many = jax.jit(jax.vmap(train))
    lr0, lr1 = (jnp.asarray(rate, dtype).reshape(-1, min(BATCH, size * size)) for rate in rates(size, window))
    many(lr0[0], lr1[0]).block_until_ready()
    start = time.perf_counter()
    measures = [many(a, b) for a, b in zip(lr0, lr1, strict=True)]
    measures[-1].block_until_ready()
    return time.perf_counter() - start, np.concatenate([np.asarray(m) for m in measures])


def row(program: str, precision: str, size: int, window: str, seconds: float, measure: np.ndarray) -> dict:
    """One line of the table and of the results."""
    print(f"{program:5} {precision:7} {size:5}^2 {window:11} {seconds:8.3f} s {size**2 / seconds:10,.0f} cells/s "
          f"converged {np.mean(measure < 0):.4f}", flush=True)  # fmt: skip
    return {
        "program": program,
        "precision": precision,
        "size": size,
        "window": window,
        "steps": STEPS,
        "seconds": round(seconds, 4),
        "cells_per_second": round(size**2 / seconds),
        "converged": round(float(np.mean(measure < 0)), 5),
    }


def main() -> None:
    """The command."""
    asked = options()
    with user_errors():
        ready()
    rows = []
    for precision in asked.precisions:
        for size in asked.ours:
            rows.append(row("ours", precision, size, "default", *time_ours(size, "default", precision)))
        rows.append(row("ours", precision, 512, "converging", *time_ours(512, "converging", precision)))
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if asked.jax and importlib.util.find_spec("jax"):
        torch.cuda.empty_cache()
        for precision in ("fp32", "fp64"):
            rows.append(row("jax", precision, asked.jax, "default", *time_jax(asked.jax, "default", precision)))
    print(append_rows("fractal.csv", rows))


if __name__ == "__main__":
    main()
