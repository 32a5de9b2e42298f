"""A fleet of GPUs that fail, in simulation, and a store of its size: `python benchmarks/fleet.py simulate open`.

The simulation runs what a worker runs, `engine.launch.Sharing` over `engine.leases.Leases`, for every worker in turn
by one clock; the object store is a dictionary whose requests take time, and a GPU trains a launch's runs in its slots,
the longest first, at a fixed time a step and replica. Workers are lost at random and others come; what a lost one had
finished and written stays. Counted is what becomes of every GPU-second, and how often each cell was trained.

`open` makes a real store of that many cells in a folder, and measures what a worker does with it before it trains.
Rows go to results/fleet.csv and fleet_open.csv.
"""

if __name__ == "__main__" and not __package__:
    import started  # noqa: F401  says how to start it where its packages are missing

import copy
import heapq
import multiprocessing
import resource
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from benchmarks.arguments import Reader

if TYPE_CHECKING:
    from argparse import Namespace


def arguments() -> "Namespace":
    """What the command is asked for."""
    reader = Reader(description=__doc__.split("\n\n")[0])
    reader.add_argument("what", nargs="+", choices=("simulate", "open"))
    reader.add_argument("--failures", type=float, default=1.0, help="workers lost an hour")
    reader.add_argument("--rows", type=int, default=10_000, help="objects an array of the opened store has")
    return reader.parse_args()


if __name__ == "__main__":
    arguments()  # before what takes seconds to import

import numpy as np
import zarr

from benchmarks.coverage import append_rows
from engine.config import Run, make_config, resolve
from engine.launch import FLUSH, WAIT, Sharing, still_missing
from engine.leases import ALIVE, Leases
from engine.locks import BEATS
from engine.outcome import DONE, NOT_COMPUTED
from engine.place import LEASE_SECONDS, Item
from engine.plan import Chunk, Launch, Plan, Work, even_slots, launches
from engine.store import Store, create_store, open_store

CELLS, WORKERS = 10_000_000, 1000
HOURS = 10.0  # that the fleet would take if nothing were lost
START, REPLACED = 60.0, 300.0  # seconds until a worker trains; until another comes for a lost one
WRITE, LIST, READ = 0.05, 0.1, 0.03  # seconds of one request; a listing has 1,000 keys
KEYS = 1000
SLOTS = 64
FIXED: dict[str, Any] = {"trace": "off", "validation_rows": 64}
MAPS: dict[str, dict[str, Any]] = {
    "budgets x rates, own runs": {"y": "tokens:log:1e4:1e6:10000", "x": "lr:log:1e-5:1:1000", "schedule": "linear"},
    "rates x budgets, own runs": {"y": "lr:log:1e-5:1:10000", "x": "tokens:log:1e4:1e6:1000", "schedule": "linear"},
    "32 seeds, shared runs": {"y": "lr:log:1e-5:1:625", "x": "tokens:log:1e4:1e6:500", "replicates": 32},
}


class Bucket:
    """An object store in memory, as leases use one, by a clock of its own that requests move on."""

    def __init__(self) -> None:
        self.now = self.spent = 0.0
        self.said: dict[str, bytes] = {}
        self.there: dict[str, Item] = {}
        self.living: set[str] = set()

    def ask(self, seconds: float) -> float:
        """A request; the time after it."""
        self.spent += seconds
        return self.now + self.spent

    def touch(self, key: str, data: bytes) -> float:
        """Write an object; the time."""
        self.said[key], self.there[key] = data, Item(key, self.ask(WRITE + READ), "")
        if key.startswith(ALIVE):
            self.living.add(key)
        return self.now + self.spent

    def put_new(self, key: str, data: bytes) -> bool:
        """Write an object that is not there."""
        if key in self.there:
            return False
        self.said[key], self.there[key] = data, Item(key, self.ask(WRITE), "")
        return True

    def get(self, key: str) -> bytes | None:
        """An object."""
        self.ask(READ)
        return self.said.get(key)

    def items(self, prefix: str) -> list[Item]:
        """Everything there is; workers that live have given a sign just now."""
        self.ask(LIST * (1 + len(self.there) // KEYS))
        for key in self.living:
            self.there[key] = Item(key, self.now, "")
        return list(self.there.values())

    def remove(self, key: str) -> None:
        """Delete an object."""
        self.living.discard(key)
        self.there.pop(key, None)


class Worker:
    """One process with a GPU, and the launch it is at. ends: seconds from its beginning to each cell's measurement."""

    def __init__(self, fleet: "Fleet") -> None:
        self.leases = Leases(fleet.bucket, "a worker", LEASE_SECONDS, beating=False)  # type: ignore[arg-type]
        self.sharing = copy.copy(fleet.sharing)
        self.sharing.leases = self.leases
        self.launch: Launch = ()
        self.joined, self.began, self.pause, self.idle = fleet.bucket.now, 0.0, WAIT, 0.0
        self.work: Work | None = None
        self.ends = np.zeros(0)


class Fleet:
    """Workers on one sweep by simulated time: a store as `Sharing` sees one, and what becomes of every GPU-second."""

    def __init__(self, plan: Plan, failures: float, seed: int = 0) -> None:
        self.plan, self.failures, self.random = plan, failures, np.random.default_rng(seed)
        self.status = np.full(plan.run.shape, NOT_COMPUTED, np.uint8)
        self.bucket, self.workers = Bucket(), set[Worker]()
        self.stored = np.zeros(plan.steps.size, np.uint8)  # how often each cell was
        self.again = np.zeros(plan.steps.size, bool)  # at which a lost worker was, or which it had not written
        self.ideal = float(plan.work_in(np.arange(plan.steps.size)).lengths.sum())
        self.second = HOURS * 3600 * WORKERS / self.ideal  # of one step of one replica
        setup: Any = SimpleNamespace(plan=plan, width=SLOTS, exact="at any width")
        self.sharing = Sharing(setup, self, None, WORKERS)  # type: ignore[arg-type]
        self.spent: defaultdict[str, float] = defaultdict(float)
        self.lost, self.left, self.number = 0, plan.steps.size, count()
        self.events: list[tuple[float, int, Callable[[], None]]] = []

    def chunks(self) -> list[Chunk]:
        """A row each."""
        return [chunk for launch in launches(self.plan, 1, 1, False) for chunk in launch]

    def after(self, seconds: float, what: Callable[[], None]) -> None:
        """Let something happen."""
        heapq.heappush(self.events, (self.bucket.now + seconds, next(self.number), what))

    def simulate(self) -> None:
        """Run until every cell is stored."""
        for _ in range(WORKERS):
            self.join()
        if self.failures:
            self.after(self.random.exponential(3600 / self.failures), self.fail)
        while self.left:
            self.bucket.now, _, what = heapq.heappop(self.events)
            what()
        self.spent["all"] += sum(self.bucket.now - worker.joined for worker in self.workers)

    def join(self) -> None:
        """A worker comes, and asks for work when it has started."""
        worker = Worker(self)
        self.workers.add(worker)
        self.spent["starting"] += START
        self.after(START, lambda: self.ask(worker))

    def ask(self, worker: Worker) -> None:
        """A worker has trained what it held, if anything, and takes more."""
        if worker not in self.workers:
            return
        self.store(worker, np.inf)
        self.bucket.spent = 0.0
        worker.launch = worker.sharing.next()
        self.spent["leasing"] += self.bucket.spent
        self.spent["takes"] += 1
        if worker.launch:
            self.train(worker)
        elif worker.sharing.left:
            self.after(self.bucket.spent + worker.pause, lambda: self.ask(worker))
            worker.pause = min(2 * worker.pause, LEASE_SECONDS / BEATS)

    def train(self, worker: Worker) -> None:
        """Begin a launch: its runs in slots, the longest first, each slot taking the next when it is free."""
        cells = np.concatenate([self.plan.missing((chunk,), self.status) for chunk in worker.launch])
        work = self.plan.work_in(cells)
        slots, begins = even_slots(work.lengths, SLOTS), np.zeros(len(work.runs))
        free = [0.0] * slots
        lengths = work.lengths.tolist()
        for run in np.argsort(-work.lengths, kind="stable").tolist():
            begins[run] = free[0]
            heapq.heapreplace(free, free[0] + lengths[run])
        step = slots * self.second
        sizes = np.diff(work.runs, append=len(work.cells))
        worker.work, worker.ends = work, (np.repeat(begins, sizes) + work.steps) * step
        worker.began, worker.pause = self.bucket.now + self.bucket.spent, WAIT
        worker.idle = (max(free) * slots - sum(lengths)) * self.second
        self.spent["idle slots"] += worker.idle
        self.after(self.bucket.spent + max(free) * step, lambda: self.ask(worker))

    def store(self, worker: Worker, until: float) -> float:
        """Write what a worker has measured until some seconds after its launch began; what that took of a GPU."""
        if worker.work is None:
            return 0.0
        work, done = worker.work, worker.ends <= until
        self.stored[work.cells[done]] += 1
        self.left -= int((self.status.reshape(-1)[work.cells[done]] != DONE).sum())
        self.status.reshape(-1)[work.cells[done]] = DONE
        worker.leases.release(worker.launch)
        worker.work = None
        return float(np.maximum.reduceat(np.where(done, work.steps, 0), work.runs).sum()) * self.second

    def fail(self) -> None:
        """A worker is lost: what it had not written is trained again, by others; another comes for it."""
        worker = sorted(self.workers, key=lambda each: each.leases.alive.name)[self.random.integers(len(self.workers))]
        since = self.bucket.now - worker.began
        if worker.work is not None:
            written = since // FLUSH * FLUSH
            self.again[worker.work.cells[worker.ends > written]] = True
            self.spent["idle slots"] -= worker.idle
            self.spent["lost"] += since - self.store(worker, written)
        self.workers.remove(worker)
        self.bucket.living.discard(worker.leases.alive.key)
        self.spent["all"] += self.bucket.now - worker.joined
        self.lost += 1
        self.after(REPLACED, self.join)
        self.after(self.random.exponential(3600 / self.failures), self.fail)


def simulate(name: str, failures: float) -> dict[str, object]:
    """One map's row. Shares are of the GPU-seconds that the cells need; trained_twice are cells of no lost lease."""
    run = resolve(make_config(**FIXED, **MAPS[name]), "cpu")
    began = time.perf_counter()
    fleet = Fleet(run.config.workload.plan(run), failures)
    fleet.simulate()
    assert (fleet.stored == 1).all(), "a cell was lost, or stored twice"
    needed, spent = HOURS * 3600 * WORKERS, fleet.spent
    waiting = spent["all"] - needed - sum(spent[each] for each in ("starting", "leasing", "idle slots", "lost"))
    shares = {each: spent[each] / needed for each in ("starting", "leasing", "idle slots", "lost")}
    return {
        "what": f"simulate: {name}",
        "cells": run_cells(run),
        "objects": len(fleet.chunks()),
        "workers": WORKERS,
        "lost_workers": fleet.lost,
        "hours": round(fleet.bucket.now / 3600, 3),
        "overhead_percent": round(100 * (spent["all"] / needed - 1), 3),
        **{f"{each.replace(' ', '_')}_percent": round(100 * share, 3) for each, share in shares.items()},
        "waiting_percent": round(100 * waiting / needed, 3),
        "cells_of_lost_leases": int(fleet.again.sum()),
        "leases": int(spent["takes"]),
        "seconds": round(time.perf_counter() - began, 1),
        "peak_gb": round(peak(), 2),
    }


def run_cells(run: Run) -> int:
    """Cells of all replicates."""
    return int(np.prod(run.shape))


def peak() -> float:
    """The most memory this process has had, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def open_large(rows: int) -> dict[str, object]:
    """Make a store of CELLS cells, one object a row, in a folder; what a worker does with it before it trains."""
    columns = CELLS // rows
    config = make_config(y=f"lr:log:1e-5:1:{rows}", x=f"tokens:log:1e4:1e6:{columns}", **FIXED)
    run = resolve(config, "cpu")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "s")
        create_store(path, run, 2, 1, {"provenance": {}, "slots": 1, "inputs": {}})
        group = zarr.open_group(path, mode="r+", use_consolidated=False)
        for name in Store(path).specs:
            array: Any = group[name]
            array = array.with_config({"write_empty_chunks": True})
            values = np.random.default_rng(0).random((rows // 100, columns)) * 255 + 1
            for start in range(0, rows, rows // 100):  # zarr holds what it writes at once in memory
                array[0, start : start + rows // 100] = DONE if name == "status" else values.astype(array.dtype)
        # in a process of its own, whose memory is that of reading alone
        context = multiprocessing.get_context("spawn")
        with context.Pool(1) as pool:
            measured = pool.apply(read_large, (path,))
    return {"what": "open a store", "cells": CELLS, "objects": rows, **measured}


def read_large(path: Path) -> dict[str, object]:
    """Seconds of each thing a worker does first, and the memory they need."""
    began = time.perf_counter()
    store = open_store(path)
    seconds = {"open_seconds": time.perf_counter() - began, "open_gb": peak()}
    began = time.perf_counter()
    missing = still_missing(store.status, store.chunks())
    seconds["status_seconds"] = time.perf_counter() - began
    assert not missing
    began = time.perf_counter()
    setup: Any = SimpleNamespace(plan=store.config.workload.plan(store.run), width=SLOTS, exact="at any width")
    Sharing(setup, store, None, WORKERS)  # type: ignore[arg-type]
    seconds |= {"plan_seconds": time.perf_counter() - began, "peak_gb": peak()}
    return {name: round(value, 2) for name, value in seconds.items()}


def main() -> None:
    """The command."""
    given = arguments()
    rows = [simulate(name, given.failures) for name in MAPS] if "simulate" in given.what else []
    for row in rows:
        print(row, flush=True)
    if rows:
        append_rows("fleet.csv", rows)
    if "open" in given.what:
        row = open_large(given.rows)
        print(row)
        append_rows("fleet_open.csv", [row])


if __name__ == "__main__":
    main()
