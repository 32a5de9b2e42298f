"""Where a store lies: in a folder, or in a bucket of an object store. Both are met through the same few calls.

An object is bytes under a key such as `status/c/0/3/0`. It is written whole or not at all, and `put_new` lets exactly
one of many writers make it: all that leases, locks and the creation of a store are made of. `Folder` (engine.files)
writes files, `Bucket` (engine.bucket) asks S3, Google's or Azure's object store.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Union

if TYPE_CHECKING:
    from engine.bucket import Bucket

Where = Union[Path, "Bucket"]

SCHEMES = ("s3", "gs", "az", "memory")  # memory: of this process, for tests
LEASE_SECONDS = 60.0  # without a sign of life for so long, a process counts as lost


class Item(NamedTuple):
    """An object that is there. modified: seconds by the place's clock. version: another whenever it is written."""

    key: str
    modified: float
    version: str


class Lock(Protocol):
    """The right to write into a place, until it is closed. warning: '' or why it cannot be had there."""

    warning: str

    def close(self) -> None:
        """Give it up."""


class Place(Protocol):
    """What a store asks of where it lies."""

    @property
    def drawings(self) -> Path:
        """The local folder for pictures of the store."""

    def exists(self) -> bool:
        """Whether something is there that a new store would be in the way of."""

    def check_writable(self) -> None:
        """Raise ValueError where no store could be kept, before anything is trained."""

    def get(self, key: str) -> bytes | None:
        """An object; None where there is none."""

    def put(self, key: str, data: bytes) -> None:
        """Write an object, whole or not at all, to stay."""

    def put_new(self, key: str, data: bytes) -> bool:
        """Write an object unless it is there; whether it was this call that made it. `data` tells callers apart."""

    def touch(self, key: str, data: bytes) -> float:
        """Write an object that need not outlive a crash; the time by the place's clock."""

    def items(self, prefix: str) -> list[Item]:
        """Every object below a prefix."""

    def missing(self, prefix: str, keys: list[str]) -> list[str]:
        """Those of some keys below a prefix that are not there."""

    def names(self, prefix: str) -> list[str]:
        """What stands directly below a prefix and holds objects, in order."""

    def remove(self, prefix: str) -> None:
        """Delete an object, or all below a prefix; what is not there is no error."""

    def zarr(self, read_only: bool = True) -> Any:
        """The place as zarr takes it."""

    def lock(self, shared: bool = False, wait: bool = False, seconds: float = LEASE_SECONDS) -> Lock:
        """The right to write: one process has it, or several share it.

        Args:
            wait: until it is free.
            seconds: after which a holder without a sign of life counts as lost, where nothing else tells.

        Raises:
            ValueError: another process holds it.
        """

    def creation_lock(self) -> Lock:
        """The right to make the store, once it is free."""

    def workshop(self) -> Path | None:
        """A local folder in which a store is to be built; None for any."""

    def adopt(self, building: Path) -> None:
        """Take in a store that was built in a local folder: all or nothing.

        Raises:
            ValueError: another process has made one meanwhile.
        """


def located(text: str | Where) -> Where:
    """The path of a store, from what a user wrote. Raises ValueError for a scheme that is not known."""
    scheme = re.match(r"(\w+)://", text) if isinstance(text, str) else None
    if scheme is None:
        return Path(text) if isinstance(text, str) else text
    if scheme[1] not in SCHEMES:
        raise ValueError(f"store is {text!r}; expected a folder, or s3://, gs:// or az://bucket/path")
    from engine.bucket import Bucket

    assert isinstance(text, str)
    return Bucket.parse(text)


def place_of(path: Where) -> Place:
    """What lies at a path."""
    from engine.files import Folder

    return Folder(path) if isinstance(path, Path) else path
