"""The store: what xarray sees, what is refused and how, and that nothing is lost on the way."""

import hashlib
import json
import resource
import signal
import warnings
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from synthetic import write_store
from tiny import arrays, assert_equal_bits, forget, sweep, tiny

from engine.config import SweepConfig
from engine.store import Writer, create_store, open_store


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder and the hash of its bytes."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture
def made(tmp_path) -> Path:
    """A finished sweep of 3 x 4 cells."""
    sweep(tiny(tmp_path), tmp_path / "s")
    return tmp_path / "s"


def test_xarray_sees_labelled_dimensions_and_coordinates(made):
    import xarray

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = xarray.open_zarr(made, consolidated=False)
    store = open_store(made)
    assert data["losses"].dims == ("row", "col", "step") and data["status"].dims == ("row", "col")
    assert {"y", "x"} <= set(data.coords)
    assert np.array_equal(data["y"], store.grid.y.values) and data["y"].dims == ("row",)
    assert np.array_equal(data["x"], store.grid.x.values) and data["x"].attrs["long_name"] == "tokens"
    assert data["y"].dtype == data["x"].dtype == np.float64
    assert data["val_loss"].attrs["units"] == "nat"
    assert data.attrs["configuration"]["width"] == 16
    assert data["weights_digest"].dtype == np.uint64 and data["status"].dtype == np.uint8


def test_what_is_written_is_what_is_read(tmp_path):
    random = np.random.default_rng(0)
    config = SweepConfig(y="lr:log:1e-3:1e-1:3", x="tokens:linear:256:768:2")
    given = {
        "first_loss": random.standard_normal((3, 2)).astype("f4"),
        "losses": random.standard_normal((3, 2, 3)).astype("f4"),
        "weights_digest": random.integers(0, 2**64, (3, 2), np.uint64),
    }
    given["losses"][0, 0, 1:] = [np.nan, -np.inf]
    store = write_store(tmp_path / "s", config, given)
    for name, array in given.items():
        assert store.read(name).tobytes() == array.tobytes()
        assert np.array_equal(store.read(name, rows=slice(1, 2), cols=slice(1, 2)), array[1:2, 1:2], equal_nan=True)


def test_chunks_of_nothing_but_the_fill_value_are_stored(tmp_path):
    store = write_store(tmp_path / "s", SweepConfig(y="lr:log:1e-3:1e-1:2", x="tokens:linear:256:768:2"), {})
    for name in ("nonfinite_step", "losses", "val_loss"):
        assert any(file.is_file() for file in (store.path / name / "c").rglob("*")), name


def test_an_interrupted_creation_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("engine.files.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        create_store(tmp_path / "s", SweepConfig(y="lr:log:1:2:2", x="tokens:log:300:400:2"), 3, 2, {})
    assert list(tmp_path.iterdir()) == []


def refused(capsys, config: SweepConfig, path: Path) -> str:
    """The one line in which the command refuses to sweep into a path, its exit code 2 checked."""
    from test_command import main_fails  # the command as a user meets it

    return main_fails(capsys, config, path)


def another_program(path: Path) -> None:
    metadata = json.loads((path / "zarr.json").read_text())
    metadata["attributes"] = {"format": "picture"}
    (path / "zarr.json").write_text(json.dumps(metadata))


def later_version(path: Path) -> None:
    metadata = json.loads((path / "zarr.json").read_text())
    metadata["attributes"]["format_version"] = 99
    (path / "zarr.json").write_text(json.dumps(metadata))


def cut(path: Path) -> None:
    text = (path / "zarr.json").read_text()
    (path / "zarr.json").write_text(text[: len(text) // 2])


def garble(path: Path) -> None:
    (path / "zarr.json").write_bytes(b"\xff\xfe\x00")


def listed(path: Path) -> None:
    (path / "zarr.json").write_text("[]")


def lose_array(path: Path) -> None:
    (path / "val_loss" / "zarr.json").unlink()


def cut_array(path: Path) -> None:
    (path / "status" / "zarr.json").write_text("{")


def reshape_array(path: Path) -> None:
    zarr.open_group(path, mode="r+").create_array("status", shape=(1, 1), dtype="u1", overwrite=True)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (another_program, "is a Zarr group of another program; give a sweep store, or a new path"),
        (later_version, "has store format 99, expected 1"),
        (cut, "zarr.json is damaged"),
        (garble, "zarr.json is damaged"),
        (listed, "zarr.json is damaged"),
        (lose_array, "is half-written (array 'val_loss'); delete it and sweep again"),
        (cut_array, "zarr.json is damaged"),
        (reshape_array, "is half-written (array 'status')"),
    ],
)
def test_a_store_that_is_not_a_whole_one_of_ours_is_refused_and_left_alone(made, capsys, harm, says):
    harm(made)
    before = contents(made.parent)
    assert says in refused(capsys, tiny(made.parent), made)
    assert contents(made.parent) == before


@pytest.mark.parametrize("kind", ["file", "empty folder", "folder"])
def test_a_path_that_holds_something_else_is_refused_and_left_alone(tmp_path, capsys, kind):
    path = tmp_path / "s"
    if kind == "file":
        path.write_text("precious")
    else:
        path.mkdir()
        if kind == "folder":
            (path / "thesis.txt").write_text("precious")
    config = tiny(tmp_path)
    before = contents(tmp_path)
    assert "is not a sweep store (no zarr.json)" in refused(capsys, config, path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"clip": 0.5}, "holds a sweep with clip=0.0, got 0.5; give the same configuration to resume it"),
        ({"y": "lr:log:1e-3:1e2:3", "seed": 4}, "with y='lr:log:1e-3:1e1:3', got 'lr:log:1e-3:1e2:3'"),
        ({"rows_per_launch": "1"}, "with rows_per_launch='3', got '1'"),
    ],
)
def test_another_configuration_is_refused_by_its_first_differing_field(made, capsys, changes, says):
    before = contents(made)
    assert says in refused(capsys, replace(tiny(made.parent), **changes), made)
    assert contents(made) == before


def test_data_that_changed_since_are_refused(made, capsys):
    data = made.parent / "chat.jsonl"
    data.write_text(data.read_text().replace("cat", "dog"))
    before = contents(made)
    assert "have changed since" in refused(capsys, tiny(made.parent), made)
    assert contents(made) == before


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"device": "NVIDIA H100"}, "was begun on NVIDIA H100, this is CPU"),
        ({"packages": {"torch": "1.0"}}, "was begun with torch 1.0, this is"),
    ],
)
def test_cells_of_other_arithmetic_are_not_mixed(made, capsys, changes, says):
    group = zarr.open_group(made, mode="r+")
    group.attrs["provenance"] = group.attrs["provenance"] | changes
    before = contents(made)
    sweep(tiny(made.parent), made)  # nothing is missing, nothing is trained
    assert contents(made) == before
    forget(made, row=1)
    before = contents(made)
    assert says in refused(capsys, tiny(made.parent), made)
    assert contents(made) == before


def test_a_damaged_chunk_is_one_line_that_names_it(made, capsys):
    (made / "last_loss" / "c" / "0" / "0").write_bytes(b"junk" * 9)
    with pytest.raises(ValueError, match=r"last_loss is damaged \(.*\); restore it or sweep into a new path"):
        open_store(made).read("last_loss")


def test_a_second_writer_is_refused_while_the_first_writes(made, capsys):
    before = contents(made)
    first = Writer(made)
    assert "another process is writing" in refused(capsys, tiny(made.parent), made)
    first.close()
    assert contents(made) == before
    Writer(made).close()


@contextmanager
def no_file_beyond(size: int):
    """Writing a file beyond `size` bytes fails with an OSError, as a full disk does (EFBIG for ENOSPC)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_one_line_and_loses_no_finished_cell(tmp_path, capsys):
    # the 150 losses of a row do not compress below 400 bytes
    config = tiny(tmp_path, rows_per_launch="1", x="tokens:linear:16:2400:2")
    whole = arrays(sweep(config, tmp_path / "whole"))
    sweep(config, tmp_path / "s")
    writer = Writer(tmp_path / "s")
    writer.group["status"][1:3] = 0
    writer.close()
    with no_file_beyond(400):
        line = refused(capsys, config, tmp_path / "s")
    assert "File too large" in line
    left = open_store(tmp_path / "s")
    assert (left.status[0] == 1).all() and (left.status[1:] == 0).all()
    assert np.array_equal(left.read("weights_digest")[0], whole["weights_digest"][0])
    assert_equal_bits(arrays(sweep(config, tmp_path / "s")), whole)


def test_a_disk_that_is_full_at_the_start_leaves_nothing(tmp_path, capsys):
    config = tiny(tmp_path)
    before = contents(tmp_path)
    with no_file_beyond(100):
        assert "File too large" in refused(capsys, config, tmp_path / "s")
    assert contents(tmp_path) == before and not (tmp_path / "s").exists()
