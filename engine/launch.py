"""The launch loop: train what a store lacks, launch by launch, and write it chunk by chunk.

One process goes through its launches in order. Where several share a sweep, each leases chunks, the costliest first:
many at once while much is left, few towards the end, so that all of them end together.
"""

import time
from collections.abc import Iterable, Iterator
from itertools import pairwise

import numpy as np

from engine import progress, tracking
from engine.leases import Leases
from engine.locks import BEATS
from engine.outcome import DONE, NOT_COMPUTED
from engine.plan import Chunk, Launch
from engine.split import NondeterminismError
from engine.store import Store, Writer, empty_block
from engine.workload import Setup

FLUSH = 10.0  # seconds between two writes of an unfinished launch
WAIT = 0.5  # seconds until a process that finds every missing chunk leased looks again, at first
TURNS = 2  # launches that a process makes of its share of what is left


class LaunchBuffer:
    """Every array of a launch's cells in host memory, and the chunks that are newer than the store's."""

    def __init__(self, setup: Setup, launch: Launch, writer: Writer, leases: Leases | None = None) -> None:
        """Start from what the store holds of the launch, whose chunks ascend.

        Args:
            leases: where other processes write to the store too, this one's.
        """
        self.writer, self.launch, self.leases = writer, launch, leases
        self.cells = setup.plan.cells_in(launch)
        starts = np.cumsum([0, *(chunk.stop - chunk.start for chunk in launch)]).tolist()
        self.slices = {chunk: slice(*between) for chunk, between in zip(launch, pairwise(starts), strict=True)}
        rows, tail = starts[-1], setup.run.cells.shape[1:]
        self.arrays = empty_block(writer.specs, (rows, *tail), int(setup.plan.steps.max()))
        status = writer.status
        for chunk in launch:
            if (status[chunk.replicate, chunk.start : chunk.stop] == DONE).any():
                for name, array in self.arrays.items():
                    array[self.slices[chunk]] = writer.read(name, chunk.replicate, slice(chunk.start, chunk.stop))
        self.dirty: set[Chunk] = set()

    def put(self, cells: np.ndarray, values: dict[str, np.ndarray]) -> None:
        """Store one result, or one a cell, for some cells (flat indices); what the store has an array for."""
        at = np.searchsorted(self.cells, cells)
        for name, value in values.items():
            if name not in self.arrays:
                continue
            if self.writer.specs[name].by_step:
                flat = self.arrays[name].reshape(-1, self.arrays[name].shape[-1])
                flat[at, : value.shape[-1]] = value
            else:
                self.arrays[name].reshape(-1)[at] = value
        self.arrays["status"].reshape(-1)[at] = DONE
        touched = np.zeros(len(self.arrays["status"]), bool)
        touched[at * len(touched) // len(self.cells)] = True
        self.dirty |= {chunk for chunk, own in self.slices.items() if touched[own].any()}

    def flush(self) -> None:
        """Write the chunks that have changed, but for those that another process has taken over meanwhile."""
        held: dict[Chunk, dict[str, np.ndarray]] = {}
        for chunk in sorted(self.dirty):
            block = {name: array[self.slices[chunk]] for name, array in self.arrays.items()}
            if self.leases is None or self.leases.is_held(chunk):
                held[chunk] = block
            else:
                check_same_bits(self.writer, chunk, block, self.leases)
        self.writer.write_chunks(held)
        self.dirty.clear()


def check_same_bits(store: Store, chunk: Chunk, block: dict[str, np.ndarray], leases: Leases) -> None:
    """Raise NondeterminismError where cells that two processes have trained differ in a bit."""
    rows = slice(chunk.start, chunk.stop)
    both = (store.read("status", chunk.replicate, rows) == DONE) & (block["status"] == DONE)
    for name in block:
        theirs, ours = store.read(name, chunk.replicate, rows)[both], block[name][both]
        equal = np.array([one.tobytes() == other.tobytes() for one, other in zip(theirs, ours, strict=True)], bool)
        if not equal.all():
            row, *rest = (int(i[~equal][0]) for i in np.nonzero(both))
            raise NondeterminismError(
                f"{name} of cell {(chunk.replicate, chunk.start + row, *rest)} of {store.path} is {theirs[~equal][0]} "
                f"as trained by {leases.holder(chunk)}, and {ours[~equal][0]} here ({leases.owner}): one of them "
                "computes wrongly, or differs in what provenance does not record"
            )


def missing_launches(setup: Setup, store: Store | None) -> list[Launch]:
    """The launches that have cells to compute."""
    missing = set(still_missing(status_of(setup, store), [chunk for launch in setup.launches for chunk in launch]))
    return [launch for launch in setup.launches if not missing.isdisjoint(launch)]


def status_of(setup: Setup, store: Store | None) -> np.ndarray:
    """Status of every cell that is asked for [replicate, *cells]: replicates a store lacks are not computed."""
    status = empty_block(["status"], setup.run.shape, 0)["status"]
    if store is not None:
        status[: store.run.replicates] = store.status
    return status


class Sharing:
    """What one of several workers trains next: chunks that nobody holds, the costliest first.

    A launch costs a part of a worker's share of what nobody holds, so that all end together, with enough runs for every
    slot where the share has them; where bits depend on the launch it is one chunk.
    """

    def __init__(self, setup: Setup, store: Store, leases: Leases, workers: int) -> None:
        """
        Args:
            workers: about how many there are.
        """
        plan, runs = setup.plan, 1
        self.costs: dict[Chunk, float] = {}
        for chunk in store.chunks():
            work = plan.work_in(plan.cells_in((chunk,)))
            self.costs[chunk], runs = float(work.costs.sum()), max(len(work.runs), runs)
        self.left = sorted(self.costs, key=lambda chunk: -self.costs[chunk])
        self.enough = -(-setup.width // runs)
        self.together, self.workers = setup.exact == "at any width", workers
        self.store, self.leases = store, leases

    def next(self) -> Launch:
        """Lease the next launch; none where others hold all that is `left`."""
        self.left = still_missing(self.store.status, self.left)
        free = self.leases.free(self.left)
        share = sum(self.costs[chunk] for chunk in free) / self.workers
        taken: list[Chunk] = []
        cost = 0.0
        for chunk, attempt in free.items():
            if not self.leases.take(chunk, attempt):
                continue
            taken.append(chunk)
            cost += self.costs[chunk]
            if not self.together or cost >= share or (cost >= share / TURNS and len(taken) >= self.enough):
                break
        return tuple(sorted(taken))


def leased_launches(setup: Setup, store: Store, leases: Leases, workers: int) -> Iterator[Launch]:
    """Launches of leased chunks, until the store holds every cell, whoever trained it."""
    sharing, pause = Sharing(setup, store, leases, workers), WAIT
    while True:
        launch = sharing.next()
        if launch:
            pause = WAIT
            yield launch
            leases.release(launch)
        elif sharing.left:
            time.sleep(pause)
            pause = min(2 * pause, max(leases.expires / BEATS, WAIT))  # many that wait ask much of a store
        else:
            return


def still_missing(status: np.ndarray, chunks: Iterable[Chunk]) -> list[Chunk]:
    """Those of some chunks that have cells to compute."""
    rows = status.reshape(*status.shape[:2], -1).min(2) == NOT_COMPUTED  # which is the least code
    before = np.pad(np.cumsum(rows, 1), ((0, 0), (1, 0))).tolist()
    return [c for c in chunks if before[c.replicate][c.stop] > before[c.replicate][c.start]]


def train_missing(
    setup: Setup, writer: Writer, leases: Leases | None, workers: int, quiet: bool, track: tracking.Tracking
) -> tuple[float, int]:
    """Train every cell that the store does not hold yet; what was trained is written, come what may.

    Args:
        leases: this process's, where others train the same sweep.
        workers: about how many processes there are.

    Returns:
        the seconds this took, and the cells that this process has trained.
    """
    missing, trained = missing_launches(setup, writer), 0
    if not missing:
        return 0.0, 0
    todo = iter(missing) if leases is None else leased_launches(setup, writer, leases, workers)
    tracked = track.run is not None
    with progress.Progress(setup, writer, missing, leases is not None, quiet, tracked) as watch:
        for launch in todo:
            buffer = LaunchBuffer(setup, launch, writer, leases)
            written = time.monotonic()
            try:
                for results in setup.train(launch, writer.status, watch.work):
                    for cells, values in results:
                        buffer.put(cells, values)
                        trained += len(cells)
                        watch.put(cells, values)
                    if time.monotonic() - written > FLUSH:
                        buffer.flush()
                        written = time.monotonic()
                    watch.refresh()
            finally:
                buffer.flush()
            watch.launched(launch)
            track.launch(watch)
    return watch.seconds, trained


def train_along(setup: Setup, store: Store) -> None:
    """Train what a store lacks beside the first of the ranks that share every batch, which alone writes.

    A launch's status is the same for all of them when they reach it: it changes by training that launch alone.
    """
    for launch in missing_launches(setup, store):
        for _ in setup.train(launch, store.status, lambda trained, saved: None):
            pass
