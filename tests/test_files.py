"""Order on disk, by the calls the system gets; locks; and file systems that lack some of it."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import sweep, tiny

from engine import files
from engine.config import make_config, resolve
from engine.plan import Chunk
from engine.store import Writer, create_store


@pytest.fixture
def calls(tmp_path, monkeypatch) -> list[str]:
    """What the file system is asked to do below tmp_path, in order; a file yet to be renamed is '(beside)'."""
    done = []

    def name(path: str | Path) -> str:
        path = Path(path).absolute().relative_to(tmp_path)
        return str(path.with_name("(beside)") if path.suffix == ".partial" else path)

    def recorded(call):
        def run(path, *more, **named):
            result = call(path, *more, **named)
            where = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else path
            done.append(" ".join([call.__name__, name(where), *(name(m) for m in more if isinstance(m, (str, Path)))]))
            return result

        return run

    for function in ("mkdir", "fsync", "rename", "replace"):
        monkeypatch.setattr(os, function, recorded(getattr(os, function)))
    return done


def test_a_file_is_synced_before_it_has_its_name_and_new_folders_in_their_parents(tmp_path, calls):
    files.write_beside(tmp_path / "new" / "folder" / "file", b"content")
    assert calls == [
        "mkdir new",
        "mkdir new/folder",
        "fsync new",
        "fsync .",
        "fsync new/folder/(beside)",
        "replace new/folder/(beside) new/folder/file",
        "fsync new/folder",
    ]
    assert (tmp_path / "new" / "folder" / "file").read_bytes() == b"content"


def test_a_folder_is_synced_inside_out_before_it_has_its_name(tmp_path, calls):
    (tmp_path / "made" / "inner").mkdir(parents=True)
    (tmp_path / "made" / "inner" / "file").write_bytes(b"content")
    calls.clear()
    files.place_folder(tmp_path / "made", tmp_path / "s")
    expected = ["fsync made/inner/file", "fsync made/inner", "fsync made", "rename made s", "fsync ."]
    assert calls == expected


def test_a_stores_rows_are_on_disk_before_their_status(tmp_path, calls):
    run = resolve(make_config(y="lr:log:1:2:2", x="tokens:log:300:400:2", validation_rows=2), "cpu")
    create_store(tmp_path / "s", run, 3, 2, {})
    writer = Writer(tmp_path / "s")
    calls.clear()
    writer.write_chunks({Chunk(0, 0, 2): {"status": np.ones((2, 2), "u1"), "val_loss": np.ones((2, 2), "f4")}})
    writer.close()
    last = max(i for i, call in enumerate(calls) if "val_loss" in call)
    assert last < min(i for i, call in enumerate(calls) if "status" in call)
    written = [call for call in calls if "mkdir" not in call]
    for array in ("val_loss", "status"):
        chunk = [call for call in written if (f" s/{array}/c/0" in call and "fsync" in call) or "replace" in call]
        chunk = [call for call in chunk if array in call]
        assert chunk[-3:] == [
            f"fsync s/{array}/c/0/0/(beside)",
            f"replace s/{array}/c/0/0/(beside) s/{array}/c/0/0/0",
            f"fsync s/{array}/c/0/0",
        ]
        assert f"fsync s/{array}/c" in written, "the chunk's new folder"


def test_the_loser_of_a_race_to_make_a_store_gets_one_line(tmp_path):
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "zarr.json").write_text("{}")
    files.place_folder(tmp_path / "first", tmp_path / "s")
    with pytest.raises(ValueError, match=r"another process has just made .*/s; run the same command again"):
        files.place_folder(tmp_path / "second", tmp_path / "s")


def test_what_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "file").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_beside(tmp_path / "file", b"new")
    assert [file.name for file in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_bytes() == b"old"


def test_a_file_system_that_cannot_sync_folders_is_written_all_the_same(tmp_path, monkeypatch):
    fsync = os.fsync

    def files_only(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", files_only)
    assert sweep(tiny(tmp_path), tmp_path / "s").status.all()


def test_a_folder_that_cannot_be_synced_for_another_reason_is_an_error(tmp_path, monkeypatch):
    def broken(handle):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error"):
        files.fsync(tmp_path)


def test_one_process_holds_a_lock_until_it_closes_it(tmp_path):
    words = [sys.executable, "-c", "import sys; from engine.files import FolderLock; FolderLock(sys.argv[1])"]
    lock = files.FolderLock(tmp_path)
    assert lock.warning == ""
    ran = subprocess.run([*words, str(tmp_path)], capture_output=True, text=True)
    assert f"ValueError: another process is writing {tmp_path}; wait for it" in ran.stderr
    lock.close()
    assert subprocess.run([*words, str(tmp_path)]).returncode == 0


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_sweep_goes_on_where_nothing_can_be_locked_and_says_so(tmp_path, monkeypatch, capsys, code):
    def missing(handle, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.fcntl, "flock", missing)
    assert sweep(tiny(tmp_path), tmp_path / "s").status.all()
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {tmp_path / 's'} cannot be locked") and os.strerror(code) in line


def test_a_lock_that_fails_otherwise_is_an_error(tmp_path, monkeypatch):
    def broken(handle, operation):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files.fcntl, "flock", broken)
    with pytest.raises(OSError, match="Input/output error"):
        files.FolderLock(tmp_path)


def test_a_named_file_is_replaced_through_its_link(tmp_path):
    (tmp_path / "target").write_bytes(b"old")
    (tmp_path / "link").symlink_to("target")
    files.replace_file(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_bytes() == b"new"
    (tmp_path / "dangling").symlink_to("not yet")
    files.replace_file(tmp_path / "dangling", b"new")
    assert (tmp_path / "not yet").read_bytes() == b"new"


def test_a_device_is_written_and_stays_one():
    files.replace_file("/dev/null", b"weights")
    assert not Path("/dev/null").is_file()
    with pytest.raises(OSError, match="No space left on device"):
        files.replace_file("/dev/full", b"weights")
    assert Path("/dev/full").is_char_device()
