"""Files that outlive a crash of the machine, and the lock of who writes them.

The order on disk: a file is written beside its place and synced, renamed, and its folder synced; a new folder's parent
is synced too. So a name that can be read leads to whole contents, whenever the power fails. Folders cannot be synced on
every file system, nor locked; neither stops the work.
"""

import asyncio
import errno
import fcntl
import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from zarr.core.buffer import Buffer
from zarr.storage import LocalStore

from engine.place import LEASE_SECONDS, Item

UNKNOWN = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}  # to some file systems
PARTIAL = ".partial"  # what the name of a file ends with that is being written


def fsync(path: str | Path) -> None:
    """Flush a file to the disk, or a folder where the file system knows how."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in UNKNOWN or not stat.S_ISDIR(os.fstat(handle).st_mode):
            raise
    finally:
        os.close(handle)


def fsync_tree(folder: str | Path) -> None:
    """Flush everything in a folder to the disk: files before the folders that name them."""
    for inner, _, files in os.walk(folder, topdown=False):
        for file in files:
            fsync(Path(inner, file))
        fsync(inner)


def make_folders(folder: str | Path) -> None:
    """Make a folder and its missing parents, each on the disk when this returns."""
    folder = Path(folder)
    missing = [new for new in (folder, *folder.parents) if not new.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for new in missing:
        fsync(new.parent)


def write_beside(path: str | Path, data: bytes | bytearray | memoryview) -> None:
    """Write a file whole or not at all, making its folder: a reader or a crash sees the old one or the new one."""
    path = Path(path)
    make_folders(path.parent)
    beside = path.with_name(f".{uuid4().hex}{PARTIAL}")
    try:
        with beside.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    fsync(path.parent)


def place_folder(building: str | Path, path: str | Path) -> None:
    """Give a finished folder, made on the same file system, its name.

    Raises:
        ValueError: something has taken the name meanwhile.
    """
    fsync_tree(building)
    try:
        os.rename(building, path)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        raise ValueError(
            f"another process has just made {path}; run the same command again to go on with it, or give another path"
        ) from None
    fsync(Path(path).parent)


def replace_file(path: str | Path, data: bytes) -> None:
    """Write a file that a user named: whole or not at all, through a symbolic link, and into a device as it is."""
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        with target.open("wb") as device:
            device.write(data)
    else:
        write_beside(target, data)


class FolderLock:
    """The right to write into a folder: one process has it, or several share it, until it is closed or they end.

    warning: '' where it is held, else what to say of a file system that has no locks.
    """

    def __init__(self, folder: str | Path, shared: bool = False, wait: bool = False) -> None:
        """Take it.

        Args:
            shared: beside others that share it.
            wait: until it is free.

        Raises:
            ValueError: another process holds it.
        """
        self.warning = ""
        self.handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(self.handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(self.handle)
            raise ValueError(
                f"another process is writing {folder}; wait for it, or give --store another path"
            ) from None
        except OSError as error:
            if error.errno not in UNKNOWN:
                os.close(self.handle)
                raise
            self.warning = (
                f"{folder} cannot be locked, its file system has no locks ({error.strerror}): "
                "see to it that no other process writes there"
            )

    def close(self) -> None:
        """Give it up, as the end of the process does."""
        os.close(self.handle)


class DurableStore(LocalStore):
    """Zarr's local files, each on the disk when zarr has written it."""

    async def set(self, key: str, value: Buffer) -> None:
        """Write one object (zarr's asynchronous way)."""
        await asyncio.to_thread(self.set_sync, key, value)

    def set_sync(self, key: str, value: Buffer) -> None:
        """Write one object (the way that newer releases of zarr prefer)."""
        self._check_writable()
        write_beside(self.root / key, value.as_buffer_like())


class Folder:
    """A store's place in a folder (engine.place.Place)."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def drawings(self) -> Path:
        """The folder itself."""
        return self.path

    def exists(self) -> bool:
        """Whether there is anything."""
        return self.path.exists()

    def check_writable(self) -> None:
        """What a folder refuses it refuses before anything is trained: the store is made first."""

    def get(self, key: str) -> bytes | None:
        """The file of that name."""
        file = self.path / key
        return file.read_bytes() if file.is_file() else None

    def put(self, key: str, data: bytes) -> None:
        """Write it, to outlive a crash of the machine."""
        write_beside(self.path / key, data)

    def put_new(self, key: str, data: bytes) -> bool:
        """Make it, which the file system lets one process do."""
        with suppress(FileExistsError), self.touchable(key).open("xb") as file:
            file.write(data)
            return True
        return False

    def touch(self, key: str, data: bytes) -> float:
        """Write it; the time by the file system's own clock."""
        file = self.touchable(key)
        file.write_bytes(data)
        return file.stat().st_mtime

    def touchable(self, key: str) -> Path:
        """A file whose folder is there."""
        file = self.path / key
        file.parent.mkdir(parents=True, exist_ok=True)
        return file

    def items(self, prefix: str) -> list[Item]:
        """Every file below a folder, but for those that are being written."""
        found, folders = [], [prefix]
        while folders:
            folder = folders.pop()
            with suppress(FileNotFoundError), os.scandir(self.path / folder) as entries:
                for entry in entries:
                    if entry.is_dir():
                        folders.append(f"{folder}/{entry.name}")
                    elif not entry.name.endswith(PARTIAL):
                        with suppress(FileNotFoundError):  # it has just been removed
                            stamp = entry.stat()
                            version = f"{stamp.st_mtime_ns}-{stamp.st_ino}"
                            found.append(Item(f"{folder}/{entry.name}", stamp.st_mtime, version))
        return found

    def missing(self, prefix: str, keys: list[str]) -> list[str]:
        """Files that are asked for one by one, which is faster than to look through folders of one file each."""
        return [key for key in keys if not os.path.isfile(f"{self.path}/{key}")]

    def names(self, prefix: str) -> list[str]:
        """The folders in a folder."""
        return sorted(each.name for each in (self.path / prefix).glob("*") if each.is_dir())

    def remove(self, prefix: str) -> None:
        """Delete a file, or a folder with all in it."""
        path = self.path / prefix
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    def zarr(self, read_only: bool = True) -> LocalStore:
        """Zarr's local files; written, each is on the disk at once."""
        return (LocalStore if read_only else DurableStore)(self.path, read_only=read_only)

    def lock(self, shared: bool = False, wait: bool = False, seconds: float = LEASE_SECONDS) -> FolderLock:
        """The folder's lock, which the end of a process gives up."""
        return FolderLock(self.path, shared, wait)

    def creation_lock(self) -> FolderLock:
        """The lock of the folder it will stand in."""
        make_folders(self.path.parent)
        return FolderLock(self.path.parent, wait=True)

    def workshop(self) -> Path:
        """The folder it will stand in, from which a rename brings it to its place."""
        make_folders(self.path.parent)
        return self.path.parent

    def adopt(self, building: Path) -> None:
        """Rename it to its place."""
        place_folder(building, self.path)
