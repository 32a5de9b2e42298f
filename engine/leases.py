"""Leases: which worker trains which chunk, among processes that share nothing but the place of the store.

A worker takes a chunk by making the object `<replicate>-<start>.<attempt>`, which succeeds for exactly one of them. It
says which worker, and that gives a sign of life now and then, one for all its leases; where it has given none for long,
the worker is lost and the next attempt is free. Leases only save work: what is done is said by the store's status
alone, and a chunk that two workers train after all has the same bits, which is checked.
"""

from collections.abc import Iterable
from itertools import count

from engine.locks import Alive, attempt, signs
from engine.place import Item, Place
from engine.plan import Chunk

FOLDER = ".leases"
ALIVE = f"{FOLDER}/alive"


class Leases:
    """The leases of one worker on a store, until `close`."""

    def __init__(self, place: Place, owner: str, expires: float, beating: bool = True) -> None:
        """
        Args:
            owner: who takes them (machine, process, device), which others say where bits differ.
            expires: seconds after which others may take what a worker holds that shows no sign of life.
            beating: as `Alive`.
        """
        self.place, self.owner, self.expires = place, owner, expires
        place.touch(f"{FOLDER}/begun", b"")  # of all workers, by which one of them is the last to leave
        self.alive = Alive(place, ALIVE, owner, expires, beating)
        self.held: dict[Chunk, str] = {}
        self.workers: dict[str, str] = {}
        """who made an object of a lease, by its key, as far as it has been asked for: it never changes"""

    def free(self, chunks: Iterable[Chunk]) -> dict[Chunk, int]:
        """Those of some chunks that no living worker holds, in their order, and the attempt that comes next."""
        now, items = self.alive.now(), self.place.items(FOLDER)
        living = {name for name, item in signs(items, ALIVE).items() if now - item.modified <= self.expires}
        there = {item.key: item for item in items}
        found = {}
        for chunk in chunks:
            before = latest(there, chunk)
            if before is None:
                found[chunk] = 0
            elif now - before.modified > self.expires and self.worker(before.key) not in living:
                found[chunk] = attempt(before.key) + 1
        return found

    def take(self, chunk: Chunk, number: int) -> bool:
        """Lease a chunk that was free, by the attempt that comes next; False where another worker was first."""
        key = key_of(chunk, number)
        if not self.place.put_new(key, self.alive.mark):
            return False
        self.held[chunk] = key
        return True

    def worker(self, key: str) -> str:
        """The worker whose lease an object is; '' where it is gone or not written yet."""
        if key not in self.workers:
            said = (self.place.get(key) or b"").decode()
            if not said:
                return ""
            self.workers[key] = said.partition(" ")[0]
        return self.workers[key]

    def is_held(self, chunk: Chunk) -> bool:
        """Whether no other worker has taken a chunk of ours over, as it does when we were held up for long."""
        return self.place.get(key_of(chunk, attempt(self.held[chunk]) + 1)) is None

    def holder(self, chunk: Chunk) -> str:
        """Who leased a chunk last."""
        last = latest({item.key: item for item in self.place.items(FOLDER)}, chunk)
        return (self.place.get(last.key) or b"").decode().partition(" ")[2] if last else ""

    def release(self, chunks: Iterable[Chunk]) -> None:
        """Forget some leases: their chunks are stored."""
        for chunk in chunks:
            del self.held[chunk]

    def close(self) -> None:
        """End the sign of life: what is still held is free."""
        self.alive.close()


def key_of(chunk: Chunk, number: int) -> str:
    """The object of an attempt at a chunk; attempts are counted from 0 without a gap."""
    return f"{FOLDER}/{chunk.replicate}-{chunk.start}.{number}"


def latest(there: dict[str, Item], chunk: Chunk) -> Item | None:
    """The latest attempt at a chunk among all leases by their keys; None for one that was never leased."""
    last = None
    for number in count():
        if (item := there.get(key_of(chunk, number))) is None:
            return last
        last = item
    raise AssertionError


def remove_leases(place: Place) -> bool:
    """Forget all leases of a store; False where somebody else has."""
    there = bool(place.items(FOLDER))
    place.remove(FOLDER)
    return there
