"""Leases: which worker trains which chunk, among processes that share nothing but the store's folder.

A worker takes a chunk by making the file `<replicate>-<start>.<attempt>`, which succeeds for exactly one of them, and
keeps touching it. A file that has not been touched for long is a lost worker's, and the next attempt is
free. Leases only save work: what is done is said by the store's status alone, and a chunk that two workers train
after all has the same bits, which is checked.
"""

import os
import shutil
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from engine.plan import Chunk

FOLDER = ".leases"
BEATS = 6  # signs of life in the time after which a worker without one counts as lost


class Leases:
    """The leases of one worker on a store; a thread of its own keeps them alive until `close`."""

    def __init__(self, store: Path, owner: str, expires: float) -> None:
        """
        Args:
            owner: who takes them (machine, process, device), which others say where bits differ.
            expires: seconds after which others may take a lease that shows no sign of life.
        """
        self.folder, self.owner, self.expires = store / FOLDER, owner, expires
        self.folder.mkdir(exist_ok=True)
        self.clock = self.folder / f"clock-{os.getpid()}-{threading.get_native_id()}"
        self.held: dict[Chunk, Path] = {}
        self.lost: dict[Chunk, Path] = {}
        self.closed = threading.Event()
        self.guard = threading.Lock()
        self.beating = threading.Thread(target=self.beat, daemon=True)
        self.beating.start()

    def now(self) -> float:
        """The time by the file system's own clock, which all workers share."""
        self.clock.touch()
        return self.clock.stat().st_mtime

    def attempts(self) -> dict[tuple[int, int], list[Path]]:
        """Files of every leased chunk (replicate, start), the latest attempt last."""
        found: dict[tuple[int, int], list[Path]] = {}
        for path in sorted(self.folder.glob("*-*.*"), key=lambda path: int(path.suffix[1:])):
            replicate, _, start = path.stem.partition("-")
            found.setdefault((int(replicate), int(start)), []).append(path)
        return found

    def take(self, chunks: Iterable[Chunk], count: int) -> list[Chunk]:
        """Lease up to `count` of some chunks, in their order; those that living workers hold are left out."""
        taken: list[Chunk] = []
        now, attempts = self.now(), self.attempts()
        for chunk in chunks:
            if len(taken) == count:
                break
            before = attempts.get((chunk.replicate, chunk.start), [])
            if before and not self.expired(before[-1], now):
                continue
            path = self.folder / f"{chunk.replicate}-{chunk.start}.{len(before)}"
            with suppress(FileExistsError), path.open("x", encoding="utf-8") as file:
                file.write(self.owner)
                taken.append(chunk)
                with self.guard:
                    self.held[chunk] = path
        return taken

    def expired(self, path: Path, now: float) -> bool:
        """Whether a lease is a lost worker's."""
        return now - path.stat().st_mtime > self.expires

    def is_held(self, chunk: Chunk) -> bool:
        """Whether no other worker has taken a chunk of ours over, as it does when we were held up for long."""
        path = self.held[chunk]
        return not path.with_suffix(f".{int(path.suffix[1:]) + 1}").exists()

    def holder(self, chunk: Chunk) -> str:
        """Who leased a chunk last."""
        return self.attempts()[chunk.replicate, chunk.start][-1].read_text("utf-8")

    def beat(self) -> None:
        """Show a sign of life now and then."""
        while not self.closed.wait(self.expires / BEATS):
            with self.guard:
                paths = list(self.held.values())
            for path in paths:
                with suppress(FileNotFoundError):  # the folder goes when the sweep is done
                    os.utime(path)

    def release(self, chunks: Iterable[Chunk]) -> None:
        """Stop keeping some leases alive: their chunks are stored."""
        with self.guard:
            for chunk in chunks:
                del self.held[chunk]

    def close(self) -> None:
        """End the signs of life."""
        self.closed.set()
        self.beating.join()
        self.clock.unlink(missing_ok=True)


def remove_leases(store: Path) -> bool:
    """Forget all leases of a store; False where somebody else has."""
    there = (store / FOLDER).exists()
    shutil.rmtree(store / FOLDER, ignore_errors=True)
    return there
