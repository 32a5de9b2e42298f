"""One sweep over many machines: `uv run engine/fleet.py --ray auto --at-most 8 --store /shared/s.zarr …`.

The arguments after the fleet's own are those of `engine/sweep.py`. Whoever schedules the processes (Ray, SLURM through
submitit), each of them runs `work`: one process of a shared sweep, which leases chunks of the store until none is left.
So workers may join, be lost and be started again at any time; Ray runs the work of a lost node again, SLURM requeues a
preempted job. All machines share the folder of the store, and have this project installed.
"""

if __name__ == "__main__" and not __package__:
    import started  # noqa: F401  says how to start it where its packages are missing

import logging
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engine.command import parser, user_errors
from engine.config import SweepConfig, cells_of
from engine.options import Finish, RunOptions, read_arguments
from engine.outcome import NOT_COMPUTED
from engine.place import Where, located, place_of
from engine.plan import Launch, Plan

POLL = 1.0  # seconds between two looks at the workers


class Watched(NamedTuple):
    """What the live map needs of a sweep that others train (engine.progress.Progress)."""

    run: Any
    plan: Plan
    launches: list[Launch]

    def to_train(self, launch: Launch, status: np.ndarray) -> np.ndarray:
        """Flat indices of a launch's cells that are still to train."""
        return self.plan.missing(launch, status)


class Order(NamedTuple):
    """What every worker is told: the folder in which to understand paths, arguments of engine/sweep.py, how many."""

    folder: str
    arguments: list[str]
    workers: int


def work(order: Order) -> None:
    """Train a sweep beside other processes until its store holds every cell.

    Raises:
        ValueError: what the user gave cannot be done.
    """
    from engine.api import run_sweep

    os.chdir(order.folder)
    config, options = read_arguments("", order.arguments)
    run_sweep(config, replace(options, quiet=True, workers=order.workers))


class Work:
    """`work` as a job that SLURM may preempt: it is submitted again as it is, and goes on from the store."""

    def __call__(self, order: Order) -> None:
        """Train."""
        work(order)

    def checkpoint(self, order: Order) -> Any:
        """What submitit queues again after SIGUSR1."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, order)


@contextmanager
def ray_workers(address: str, order: Order, chosen: Namespace) -> Iterator[Callable[[], bool]]:
    """Tasks on a Ray cluster, as many at once as it has GPUs (CPUs with --device cpu); whether one still runs."""
    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError) as error:
        raise ValueError(
            f"no Ray cluster answers at {address!r} ({str(error).splitlines()[0]}); expected auto or host:port of one"
        ) from None
    task = ray.remote(num_cpus=1, num_gpus=0 if chosen.device == "cpu" else 1, max_retries=-1)(work)
    tasks = [task.remote(order) for _ in range(order.workers)]

    def running() -> bool:
        ended, left = ray.wait(tasks, num_returns=len(tasks), timeout=0)
        try:
            ray.get(ended)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        return bool(left)

    try:
        yield running
    finally:
        for each in tasks:
            ray.cancel(each)  # those for which there was never a place
        ray.shutdown()


@contextmanager
def slurm_workers(partition: str, order: Order, chosen: Namespace) -> Iterator[Callable[[], bool]]:
    """An array of SLURM jobs with a GPU each; whether one still runs. `--slurm local` runs them on this machine."""
    import submitit

    logs = Path(chosen.logs)
    executor = submitit.AutoExecutor(folder=logs, cluster="local" if partition == "local" else "slurm")
    executor.update_parameters(
        name="fractal", timeout_min=chosen.minutes, gpus_per_node=0 if chosen.device == "cpu" else 1
    )
    if partition not in ("local", "default"):
        executor.update_parameters(slurm_partition=partition)
    jobs = executor.map_array(Work(), [order] * order.workers)

    def running() -> bool:
        left = [job for job in jobs if not job.done()]
        for job in jobs:
            if job.done():
                job.result()
        return bool(left)

    try:
        yield running
    finally:
        for job in jobs:
            if job.state not in ("RUNNING", "COMPLETED", "COMPLETING"):
                job.cancel()  # those for which there was never a place


SCHEDULERS = {"ray": ray_workers, "slurm": slurm_workers}


def watch(path: Where, options: RunOptions, running: Callable[[], bool]) -> None:
    """Show the sweep from its store until every cell is there, or no worker runs."""
    from engine.launch import missing_launches
    from engine.progress import Progress
    from engine.store import Store

    while not path.exists():
        if not running():
            return
        time.sleep(POLL)
    store = Store(path)
    made = store.config.workload.plan(store.run)
    setup: Any = Watched(store.run, made, [(chunk,) for chunk in store.chunks()])
    missing = missing_launches(setup, store)
    if not missing:
        return
    with Progress(setup, store, missing, shared=True, quiet=options.quiet) as progress:
        while (store.status == NOT_COMPUTED).any() and running():
            time.sleep(POLL)
            progress.refresh()
        progress.read_others()
    left = int((store.status == NOT_COMPUTED).sum())
    if left:
        raise ValueError(f"every worker has ended and {left:,} cells are missing; the same command goes on")


def read(arguments: Sequence[str]) -> tuple[Namespace, list[str], SweepConfig, RunOptions]:
    """The fleet's own arguments, those of every worker, and what they ask for."""
    reader = parser(__doc__.split("\n\n")[0] + " Further arguments are those of engine/sweep.py.")
    reader.add_argument("--ray", default="", help="address of a Ray cluster (auto: the one of this machine)")
    reader.add_argument(
        "--slurm", default="", help="partition of SLURM; default: the cluster's own, local: this machine"
    )
    reader.add_argument("--at-most", type=int, default=8, help="processes at once, at most (default: 8)")
    reader.add_argument("--minutes", type=int, default=720, help="time limit of a SLURM job (default: 720)")
    chosen, rest = reader.parse_known_args(list(arguments))
    named = [name for name in SCHEDULERS if getattr(chosen, name)]
    if len(named) != 1:
        got = " and ".join(f"--{name}" for name in named) or "no scheduler"
        raise ValueError(f"got {got}; expected --ray ADDRESS or --slurm PARTITION")
    if chosen.at_most < 1:
        raise ValueError(f"at_most is {chosen.at_most}; expected at least 1")
    config, options = read_arguments("", rest)
    chosen.scheduler, chosen.device = named[0], options.device
    return chosen, rest, config, options


def main(arguments: Sequence[str] | None = None, finish: Finish | None = None) -> None:
    """The command; `finish` is called as by engine/sweep.py, unless --no-figures is given."""
    with user_errors():
        chosen, rest, config, options = read(sys.argv[1:] if arguments is None else arguments)
        from engine.api import default_store, last_to_leave

        path = located(options.store) if options.store else default_store(config, cells_of(config))
        chosen.store = str(path.resolve())
        chosen.logs = place_of(path).drawings.resolve().with_suffix(".logs")
        place_of(path).check_writable()
        order = Order(os.getcwd(), [*rest, "--store", chosen.store], chosen.at_most)
        with SCHEDULERS[chosen.scheduler](getattr(chosen, chosen.scheduler), order, chosen) as running:
            watch(path, options, running)
        last_to_leave(path, (0.0, 0), options.lease_seconds)
        if finish is not None and options.figures:
            finish(path, False)  # the workers, not this process, have W&B's run


if __name__ == "__main__":
    from analysis.fractal import draw  # a script joins what the folders keep apart: the engine imports no analysis

    main(finish=draw)
