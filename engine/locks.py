"""Signs of life, and locks made of them, in a place that has neither processes nor locks of its own.

A process rewrites one small object now and then; one whose object has not been written for long counts as lost. What
it held is taken over by the next attempt: an object `<name>.<attempt>` that `Place.put_new` lets one process make.
"""

import os
import platform
import threading
import time
from contextlib import suppress
from uuid import uuid4

from engine.place import Item, Place

BEATS = 6  # signs of life in the time after which a process without one counts as lost
LOOK = 0.5  # seconds between two looks at whether a lock is free


class Alive:
    """This process's sign of life; a thread of its own rewrites it until `close`."""

    def __init__(self, place: Place, folder: str, owner: str, expires: float, beating: bool = True) -> None:
        """
        Args:
            folder: prefix of the signs of those among which this one is.
            owner: who gives it (machine, process, device).
            expires: seconds after which a process without one counts as lost.
            beating: whether the thread runs; else the caller gives every sign (`now`), as a simulation does.
        """
        self.place, self.owner, self.expires = place, owner, expires
        self.name = uuid4().hex
        self.key = f"{folder}/{self.name}"
        self.closed = threading.Event()
        self.now()
        self.beating = threading.Thread(target=self.beat, daemon=True)
        if beating:
            self.beating.start()

    @property
    def mark(self) -> bytes:
        """What an object of this process says: its name among the signs of life, and who it is."""
        return f"{self.name} {self.owner}".encode()

    def now(self) -> float:
        """Give a sign of life; the time by the place's clock, which all processes share."""
        return self.place.touch(self.key, self.mark)

    def beat(self) -> None:
        """Give one now and then."""
        while not self.closed.wait(self.expires / BEATS):
            with suppress(OSError):  # a place that did not answer is asked again; one sign less takes nothing yet
                self.now()

    def close(self) -> None:
        """End them: what this process still holds is free."""
        self.closed.set()
        if self.beating.is_alive():
            self.beating.join()
        self.place.remove(self.key)


def signs(items: list[Item], folder: str) -> dict[str, Item]:
    """The signs of life in a folder, by the name of who gives them."""
    return {item.key.rpartition("/")[2]: item for item in items if item.key.startswith(f"{folder}/")}


class ObjectLock:
    """One process's lock on a place, or several that share it, told by signs of life alone.

    Who shares gives a sign of life and then looks for the one that does not; who does not share makes the object of the
    next attempt and then looks for those who do. So of two at once at least one sees the other.
    """

    warning = ""

    def __init__(self, place: Place, name: str, shared: bool, wait: bool, expires: float) -> None:
        """Take it.

        Args:
            name: of this lock among the place's.
            shared, wait: as `Place.lock`.
            expires: seconds after which a holder without a sign of life counts as lost.

        Raises:
            ValueError: another process holds it.
        """
        self.place, self.shared, self.expires = place, shared, expires
        self.folder = f".locks/{name}"
        self.own = ""
        self.alive = Alive(place, f"{self.folder}/{'shared' if shared else 'alone'}", process_name(), expires)
        before: dict[str, str] = {}
        while holders := self.holders():
            beaten = [owner for owner, version in holders.items() if before.get(owner, version) != version]
            if beaten and not wait:
                self.close()
                raise ValueError(
                    f"another process is writing {place} ({self.owner(beaten[0])}); wait for it, or give --store "
                    "another path"
                )
            before = holders
            time.sleep(min(LOOK, expires / BEATS))

    def holders(self) -> dict[str, str]:
        """Versions of the signs of life of those who hold the lock, by name; nobody: it is ours."""
        now, items = self.alive.now(), self.place.items(self.folder)
        alone, sharing = (
            {
                name: item.version
                for name, item in signs(items, f"{self.folder}/{kind}").items()
                if name != self.alive.name and now - item.modified <= self.expires
            }
            for kind in ("alone", "shared")
        )
        last = max((item.key for item in items if item.key.startswith(f"{self.folder}/held.")), key=attempt, default="")
        held = self.place.get(last) if last and last != self.own else None
        holder = held.decode().partition(" ")[0] if held else ""
        if holder in alone:
            return {holder: alone[holder]}
        if self.shared:
            return {}
        if self.own and sharing:
            self.place.remove(self.own)  # they were first; who waits for them must not keep others from joining
            self.own = ""
        elif not self.own and not sharing:
            own = f"{self.folder}/held.{attempt(last) + 1}"
            if not self.place.put_new(own, self.alive.mark):
                return {"": ""}  # one of two at once; the other has it
            self.own = own
            return self.holders()
        return sharing

    def owner(self, name: str) -> str:
        """Who gives a sign of life."""
        for kind in ("shared", "alone"):
            if said := self.place.get(f"{self.folder}/{kind}/{name}"):
                return said.decode().partition(" ")[2]
        return "which has just ended"

    def close(self) -> None:
        """Give it up: the objects of all attempts before the sign of life, so that a new one begins at the first."""
        if self.own:
            now, items = self.alive.now(), self.place.items(self.folder)
            held = [item.key for item in items if item.key.startswith(f"{self.folder}/held.")]
            lost = [item.key for item in items if item.key not in held and now - item.modified > self.expires]
            for key in (*lost, *sorted(held, key=attempt)):
                self.place.remove(key)
        self.alive.close()


def attempt(key: str) -> int:
    """The number that the key of a held object ends with; -1 for none."""
    return int(key.rpartition(".")[2]) if key else -1


def process_name() -> str:
    """Machine and process."""
    return f"{platform.node()}, process {os.getpid()}"
