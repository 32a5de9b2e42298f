"""The launch loop: train what a store lacks, launch by launch, and write it chunk by chunk."""

import time
from collections.abc import Iterator

import numpy as np

from engine import progress, tracking
from engine.outcome import DONE, NOT_COMPUTED
from engine.plan import Chunk, Launch
from engine.ranks import Rank
from engine.store import Store, Writer, empty_block
from engine.workload import Setup

FLUSH = 10.0  # seconds between two writes of an unfinished launch


class LaunchBuffer:
    """Every array of a launch's cells in host memory, and the chunks that are newer than the store's.

    A launch's chunks are consecutive, so its cells are a contiguous range of flat indices.
    """

    def __init__(self, setup: Setup, launch: Launch, writer: Writer) -> None:
        """Start from what the store holds of the launch."""
        self.writer, self.launch = writer, launch
        self.height, self.row_cells = setup.run.cells.shape[0], setup.plan.row_cells
        self.first = launch[0].replicate * self.height + launch[0].start
        rows, tail = sum(chunk.stop - chunk.start for chunk in launch), setup.run.cells.shape[1:]
        self.arrays = empty_block(writer.specs, (rows, *tail), int(setup.plan.steps.max()))
        status = writer.status
        for chunk in launch:
            if (status[chunk.replicate, chunk.start : chunk.stop] == DONE).any():
                for name, array in self.arrays.items():
                    array[self.rows(chunk)] = writer.read(name, chunk.replicate, slice(chunk.start, chunk.stop))
        self.dirty: set[Chunk] = set()

    def rows(self, chunk: Chunk) -> slice:
        """A chunk's rows in the buffer."""
        start = chunk.replicate * self.height + chunk.start - self.first
        return slice(start, start + chunk.stop - chunk.start)

    def put(self, cells: np.ndarray, values: dict[str, np.ndarray]) -> None:
        """Store one result, or one a cell, for some cells (flat indices)."""
        at = cells - self.first * self.row_cells
        for name, value in values.items():
            if self.writer.specs[name].by_step:
                flat = self.arrays[name].reshape(-1, self.arrays[name].shape[-1])
                flat[at, : value.shape[-1]] = value
            else:
                self.arrays[name].reshape(-1)[at] = value
        self.arrays["status"].reshape(-1)[at] = DONE
        rows = np.unique(at // self.row_cells)
        self.dirty |= {
            chunk for chunk in self.launch if ((rows >= self.rows(chunk).start) & (rows < self.rows(chunk).stop)).any()
        }

    def flush(self) -> None:
        """Write the chunks that have changed."""
        for chunk in sorted(self.dirty):
            self.writer.write_chunk(chunk, {name: array[self.rows(chunk)] for name, array in self.arrays.items()})
        self.dirty.clear()


def missing_launches(setup: Setup, store: Store | None, rank: Rank) -> Iterator[Launch]:
    """This rank's launches that have cells to compute."""
    status = empty_block(["status"], setup.run.shape, 0)["status"] if store is None else store.status
    for launch in setup.launches[rank.index :: rank.count]:
        if any((status[c.replicate, c.start : c.stop] == NOT_COMPUTED).any() for c in launch):
            yield launch


def train_missing(setup: Setup, writer: Writer, rank: Rank, quiet: bool, track: tracking.Tracking) -> None:
    """Train every launch of this rank that the store does not hold yet; what was trained is written, come what may."""
    todo = list(missing_launches(setup, writer, rank))
    if not todo:
        return
    with progress.Progress(setup, writer, todo, quiet or rank.index > 0) as watch:
        for launch in todo:
            buffer = LaunchBuffer(setup, launch, writer)
            written = time.monotonic()
            try:
                for results in setup.train(launch, writer.status, watch.work):
                    for cells, values in results:
                        buffer.put(cells, values)
                        watch.put(cells, values)
                    if time.monotonic() - written > FLUSH:
                        buffer.flush()
                        written = time.monotonic()
                    watch.refresh()
            finally:
                buffer.flush()
            watch.launched(launch)
            track.launch(watch)
    if rank.index == 0:
        writer.timed(watch.seconds, watch.done * rank.count)
