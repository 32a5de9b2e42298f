"""A store in a bucket of S3 (or what speaks its protocol), Google Cloud Storage or Azure, through obstore.

Credentials and endpoint come from the environment, as obstore reads them. A bucket must keep conditional writes
(If-None-Match), of which leases and locks are made; that is tried before anything is trained. Requests that fail are
repeated for minutes; the first that a process sends only for seconds, so that a wrong address is told at once.
"""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import zarr
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import ObjectStore, StorePath

from engine.locks import ObjectLock
from engine.place import LEASE_SECONDS, Item, Lock

try:
    import obstore
    from obstore import exceptions as failed
    from obstore.store import MemoryStore, from_url
except ImportError:
    raise ValueError("a store in a bucket needs obstore; install it with uv sync --extra cloud") from None

CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (AWS_ENDPOINT_URL for others than Amazon's)",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    "memory": "none",
}
# where a machine of the cloud finds its own credentials: asked when none are given
METADATA_SERVICES = ("169.254.", "metadata.google.internal")
REQUESTS = 64  # of one reading or writing, at once
REQUEST_SECONDS = 30.0  # that one request may take
FIRST = {"max_retries": 2, "retry_timeout": timedelta(seconds=5)}
PATIENT = {"max_retries": 20, "retry_timeout": timedelta(minutes=5)}
PAUSES = (0.0, 0.2, 1.0, 5.0, 15.0)  # before tries of what obstore does not repeat by itself


@dataclass(frozen=True)
class Bucket:
    """The path of a store in a bucket, and its place (engine.place.Place).

    root: scheme and bucket. prefix: the path in it, without slashes at its ends.
    """

    root: str
    prefix: str

    @classmethod
    def parse(cls, url: str) -> "Bucket":
        """Read scheme://bucket/path. Raises ValueError where one of them is missing."""
        match = re.fullmatch(r"(\w+://[^/]+)/+([^?#]*[^?#/])/*", url)
        if match is None:
            raise ValueError(
                f"store is {url!r}; expected scheme://bucket/path, with the path of the store in the bucket"
            )
        return cls(match[1], match[2])

    def __str__(self) -> str:
        return f"{self.root}/{self.prefix}"

    def __truediv__(self, name: str) -> "Bucket":
        return Bucket(self.root, f"{self.prefix}/{name}")

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.prefix.rpartition("/")[2]

    @property
    def drawings(self) -> Path:
        """A folder of this machine."""
        return Path("results", re.sub(r"[^A-Za-z0-9.]+", "-", str(self)))

    def resolve(self) -> "Bucket":
        """Itself: no folder that one could change decides where it is."""
        return self

    def exists(self) -> bool:
        """Whether there is a store. Raises ValueError where the bucket cannot be read, after seconds."""
        check_readable(self.root)
        return self.get("zarr.json") is not None

    def check_writable(self) -> None:
        """Raise ValueError where objects cannot be written, or not on the condition that they are new."""
        key = f".locks/conditional-{uuid4().hex}"
        made = [self.put_new(key, word) for word in (b"first", b"second")]
        self.remove(key)
        if made != [True, False]:
            raise ValueError(
                f"{self.root} has no conditional writes (If-None-Match: *), by which processes tell who writes; give "
                "--store another bucket"
            )

    def key(self, key: str) -> str:
        """The whole key of one of this store's objects."""
        return f"{self.prefix}/{key}"

    def get(self, key: str) -> bytes | None:
        """An object."""
        with answering(self.root):
            try:
                return bytes(obstore.get(client(self.root), self.key(key)).bytes())
            except FileNotFoundError:
                return None

    def put(self, key: str, data: bytes) -> None:
        """Write an object."""
        with answering(self.root):
            obstore.put(client(self.root), self.key(key), data)

    def put_new(self, key: str, data: bytes) -> bool:
        """Write an object that is not there.

        A request whose answer was lost may have come through: who wrote what is there is told by its contents.
        """
        with answering(self.root):
            for pause in PAUSES:
                time.sleep(pause)
                try:
                    obstore.put(client(self.root), self.key(key), data, mode="create", use_multipart=False)
                    return True
                except failed.AlreadyExistsError:
                    return self.get(key) == data
                except failed.GenericError as error:
                    lost = error
                    if (there := self.get(key)) is not None:
                        return there == data
            raise lost

    def touch(self, key: str, data: bytes) -> float:
        """Write an object; the time by the object store's clock."""
        self.put(key, data)
        with answering(self.root):
            return obstore.head(client(self.root), self.key(key))["last_modified"].timestamp()

    def items(self, prefix: str) -> list[Item]:
        """Every object below a prefix."""
        start = len(self.key(""))
        with answering(self.root):
            found = [each for batch in obstore.list(client(self.root), self.key(prefix)) for each in batch]
        written = [(each["path"][start:], each["last_modified"], each["e_tag"]) for each in found]
        return [Item(key, modified.timestamp(), version or str(modified)) for key, modified, version in written]

    def missing(self, prefix: str, keys: list[str]) -> list[str]:
        """Keys that no listing has: a thousand are listed at once."""
        there = {item.key for item in self.items(prefix)}
        return [key for key in keys if key not in there]

    def names(self, prefix: str) -> list[str]:
        """What stands directly below a prefix."""
        with answering(self.root):
            found = obstore.list_with_delimiter(client(self.root), self.key(prefix))["common_prefixes"]
        return sorted(each.rstrip("/").rpartition("/")[2] for each in found)

    def remove(self, prefix: str) -> None:
        """Delete an object, or all below a prefix."""
        keys = [self.key(prefix), *(self.key(item.key) for item in self.items(prefix))]
        with answering(self.root):
            for pause in PAUSES:
                time.sleep(pause)
                try:
                    obstore.delete(client(self.root), keys)
                    return
                except FileNotFoundError:
                    return
                except failed.GenericError as error:
                    lost = error
            raise lost

    def zarr(self, read_only: bool = True) -> StorePath:
        """The bucket as zarr takes it."""
        return StorePath(Objects(client(self.root), root=self.root, read_only=read_only), self.prefix)

    def lock(self, shared: bool = False, wait: bool = False, seconds: float = LEASE_SECONDS) -> Lock:
        """A lock of signs of life."""
        return ObjectLock(self, "write", shared, wait, seconds)

    def creation_lock(self) -> Lock:
        """A lock of signs of life, of those who would make the store."""
        return ObjectLock(self, "make", shared=False, wait=True, expires=LEASE_SECONDS)

    def workshop(self) -> None:
        """Any folder."""

    def adopt(self, building: Path) -> None:
        """Write every object of a store, and the one by which it is there last."""
        if self.exists():
            raise ValueError(f"another process has just made {self}; run the same command again to go on with it")
        for file in sorted(building.rglob("*")):
            if file.is_file() and file != building / "zarr.json":
                self.put(str(file.relative_to(building)), file.read_bytes())
        self.put("zarr.json", (building / "zarr.json").read_bytes())


class Objects(ObjectStore):
    """Zarr's object store, whose failures are one line."""

    def __init__(self, store: Any, *, root: str = "", read_only: bool = False) -> None:
        super().__init__(store, read_only=read_only)
        self.root = root

    def with_read_only(self, read_only: bool = False) -> "Objects":
        """The same objects."""
        return Objects(self.store, root=self.root, read_only=read_only)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: Any = None) -> Buffer | None:
        """Read an object."""
        with answering(self.root):
            return await super().get(key, prototype, byte_range)

    async def set(self, key: str, value: Buffer) -> None:
        """Write an object."""
        with answering(self.root):
            await super().set(key, value)


@cache
def client(root: str, first: bool = False) -> Any:
    """What asks one bucket, for all stores in it. Raises ValueError for settings that cannot be used."""
    if root.startswith("memory://"):
        return MemoryStore()
    zarr.config.set({"async.concurrency": REQUESTS})
    options = {"timeout": f"{REQUEST_SECONDS:g}s", "connect_timeout": "5s", "allow_http": True}
    with answering(root):
        return from_url(root, client_options=options, retry_config=FIRST if first else PATIENT)  # type: ignore[call-overload]


@cache
def check_readable(root: str) -> None:
    """Raise ValueError where a bucket cannot be listed, after seconds; once a process."""
    if root.startswith("memory://"):
        return
    with answering(root):
        next(iter(obstore.list(client(root, first=True), f"{uuid4().hex}/")), None)


@contextmanager
def answering(root: str) -> Iterator[None]:
    """Say in one line what obstore raises.

    Raises:
        ValueError: the bucket is missing, or it refuses the credentials.
        ConnectionError: it does not answer.
    """
    missing = f"{root} is not there; make the bucket, or give another --store"
    try:
        yield
    except FileNotFoundError:
        raise ValueError(missing) from None
    except (failed.PermissionDeniedError, failed.UnauthenticatedError) as error:
        given = CREDENTIALS[root.partition("://")[0]]
        raise ValueError(f"{root} refuses the credentials ({reason(error)}); expected those of {given}") from None
    except failed.BaseError as error:
        if "404 Not Found" in str(error):  # of a bucket that is to be listed, where obstore has no name for it
            raise ValueError(missing) from None
        given = CREDENTIALS[root.partition("://")[0]]
        if any(service in str(error) for service in METADATA_SERVICES):
            raise ValueError(f"no credentials are given for {root}; set {given}") from None
        raise ConnectionError(
            f"{root} does not answer ({reason(error)}); check the address, the network, and {given}"
        ) from None


def reason(error: Exception) -> str:
    """What an error of obstore's says, without the answer's XML and Rust's own words."""
    said = re.split(r"\n\nDebug source|<\?xml|<html", str(error))[0]
    code = re.search(r"<Code>(\w+)</Code>", str(error))
    return (f"{code[1]}: " if code else "") + " ".join(said.split())[:200]
