"""Leases: which worker trains which chunk, among processes that share nothing but the place of the store.

A worker takes a chunk by making the object `<replicate>-<start>.<attempt>`, which succeeds for exactly one of them. It
says which worker, and that gives a sign of life now and then, one for all its leases; where it has given none for long,
the worker is lost and the next attempt is free. Leases only save work: what is done is said by the store's status
alone, and a chunk that two workers train after all has the same bits, which is checked.
"""

from collections.abc import Iterable

from engine.locks import Alive, attempt, signs
from engine.place import Item, Place
from engine.plan import Chunk

FOLDER = ".leases"
ALIVE = f"{FOLDER}/alive"


class Leases:
    """The leases of one worker on a store, until `close`."""

    def __init__(self, place: Place, owner: str, expires: float) -> None:
        """
        Args:
            owner: who takes them (machine, process, device), which others say where bits differ.
            expires: seconds after which others may take what a worker holds that shows no sign of life.
        """
        self.place, self.owner, self.expires = place, owner, expires
        place.touch(f"{FOLDER}/begun", b"")  # of all workers, by which one of them is the last to leave
        self.alive = Alive(place, ALIVE, owner, expires)
        self.held: dict[Chunk, str] = {}
        self.workers: dict[str, str] = {}
        """who made an object of a lease, by its key, as far as it has been asked for: it never changes"""

    def take(self, chunks: Iterable[Chunk], count: int) -> list[Chunk]:
        """Lease up to `count` of some chunks, in their order; those that living workers hold are left out."""
        taken: list[Chunk] = []
        now, items = self.alive.now(), self.place.items(FOLDER)
        living = {name for name, item in signs(items, ALIVE).items() if now - item.modified <= self.expires}
        last = latest(items)
        for chunk in chunks:
            if len(taken) == count:
                break
            before = last.get(name_of(chunk))
            if before is not None and (now - before.modified <= self.expires or self.worker(before.key) in living):
                continue
            key = f"{FOLDER}/{name_of(chunk)}.{attempt(before.key) + 1 if before else 0}"
            if self.place.put_new(key, self.alive.mark):
                taken.append(chunk)
                self.held[chunk] = key
        return taken

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
        key = self.held[chunk]
        return self.place.get(f"{key.rpartition('.')[0]}.{attempt(key) + 1}") is None

    def holder(self, chunk: Chunk) -> str:
        """Who leased a chunk last."""
        said = self.place.get(latest(self.place.items(FOLDER))[name_of(chunk)].key) or b""
        return said.decode().partition(" ")[2]

    def release(self, chunks: Iterable[Chunk]) -> None:
        """Forget some leases: their chunks are stored."""
        for chunk in chunks:
            del self.held[chunk]

    def close(self) -> None:
        """End the sign of life: what is still held is free."""
        self.alive.close()


def name_of(chunk: Chunk) -> str:
    """A chunk's name among the leases."""
    return f"{chunk.replicate}-{chunk.start}"


def latest(items: Iterable[Item]) -> dict[str, Item]:
    """The lease of the latest attempt at every chunk that was ever leased, by its name."""
    found: dict[str, Item] = {}
    for item in items:
        name = item.key.removeprefix(f"{FOLDER}/").rpartition(".")[0]
        if name and (name not in found or attempt(found[name].key) < attempt(item.key)):
            found[name] = item
    return found


def remove_leases(place: Place) -> bool:
    """Forget all leases of a store; False where somebody else has."""
    there = bool(place.items(FOLDER))
    place.remove(FOLDER)
    return there
