"""The store: what xarray sees, what is refused and how, and that nothing is lost on the way."""

import hashlib
import json
import re
import resource
import shutil
import signal
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import zarr
from synthetic import write_store
from tiny import arrays, assert_equal_bits, forget, sweep, tiny

from engine.api import default_store
from engine.config import cells_of, make_config, resolve
from engine.files import Folder, FolderLock
from engine.outcome import Thresholds
from engine.store import Writer, consolidate, create_store, open_store


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
        data = xarray.open_zarr(made)
        near = data.sel(lr=1e-2, method="nearest")
    store = open_store(made)
    assert data["losses"].dims == ("replicate", "lr", "tokens", "step")
    assert data["status"].dims == ("replicate", "lr", "tokens")
    assert set(data.coords) == {"replicate", "seed", "lr", "tokens", "step"}
    for axis in (store.run.cells.y, store.run.cells.x):
        assert np.array_equal(data[axis.name], axis.values) and data[axis.name].dtype == np.float64
    assert data["lr"].attrs["long_name"] == "learning rate" and data["tokens"].attrs["units"] == "token"
    assert float(near["lr"]) == store.run.cells.y.values[1] or float(near["lr"]) == store.run.cells.y.values[0]
    assert data["val_loss"].attrs["units"] == "nat"
    assert data.attrs["configuration"]["width"] == 16
    assert data["weights_digest"].dtype == np.uint64 and data["status"].dtype == np.uint8


def test_a_store_is_a_dataset_with_labels(made):
    data = open_store(made).to_xarray()
    assert data["label"].dims == ("replicate", "lr", "tokens")
    assert set(data["label"].values.ravel()) <= {"converged", "marginal", "undertrained", "worsened", "collapsed"}
    assert (open_store(made).labels(Thresholds()) > 0).all()


def test_a_list_of_points_is_a_dataset_too(tmp_path):
    import xarray

    (tmp_path / "p.csv").write_text("lr,tokens\n1e-2,64\n1e-1,48\n")
    sweep(tiny(tmp_path).change(y="", x="", tokens=None, points=str(tmp_path / "p.csv"), replicates=2), tmp_path / "s")
    data = xarray.open_zarr(tmp_path / "s")
    assert data["val_loss"].dims == ("replicate", "point")
    assert data["lr"].dims == ("point",) and data["lr"].values.tolist() == [1e-2, 1e-1] and "lr" in data.coords


def test_what_is_written_is_what_is_read(tmp_path):
    random = np.random.default_rng(0)
    config = make_config(y="lr:log:1e-3:1e-1:3", x="tokens:linear:512:768:2", validation_rows=2)
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


def test_a_store_grows_by_replicates_and_keeps_what_it_has(made):
    before = arrays(open_store(made))
    steps = before["losses"].shape[-1]
    writer = Writer(made)
    writer.grow(3, steps + 2)  # where seeds decide the steps, the new ones may take more
    writer.close()
    store = open_store(made)
    assert store.run.replicates == 3 and store.run.shape == (3, 3, 4)
    assert (store.status[1:] == 0).all() and (store.status[0] == 1).all()
    for name, array in before.items():
        read = store.read(name, slice(0, 1))
        assert read[..., : array.shape[-1]].tobytes() == array.tobytes()
        assert np.isnan(read[..., array.shape[-1] :]).all()
    assert store.to_xarray().sizes["step"] == steps + 2
    assert store.to_xarray()["seed"].values.tolist() == [0, 1, 2]


def test_a_growth_that_was_interrupted_is_no_harm(made):
    before = arrays(open_store(made))
    group = zarr.open_group(made, mode="r+", use_consolidated=False)
    for name in ("status", "val_loss"):  # and no further: the configuration still says one replicate
        group[name].resize((4, *group[name].shape[1:]))
    assert_equal_bits(arrays(open_store(made)), before)


def test_a_chunk_that_done_cells_promise_is_missed_by_name(made):
    (made / "val_loss" / "c" / "0" / "0" / "0").unlink()
    with pytest.raises(ValueError, match=r"val_loss/c/0/0/0 is missing, though its cells are done; restore it"):
        open_store(made)


def test_chunks_of_nothing_but_the_fill_value_are_stored(tmp_path):
    store = write_store(
        tmp_path / "s", make_config(y="lr:log:1e-3:1e-1:2", x="tokens:linear:512:768:2", validation_rows=2), {}
    )
    for name in ("nonfinite_step", "losses", "val_loss"):
        assert any(file.is_file() for file in (store.path / name / "c").rglob("*")), name


def test_an_interrupted_creation_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("engine.files.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        create_store(tmp_path / "s", resolve(make_config(y="lr:log:1:2:2", x="tokens:log:300:400:2"), "cpu"), 3, 2, {})
    assert list(tmp_path.iterdir()) == []


def refused(capsys, config, path: Path, *more: str) -> str:
    """The one line in which the command refuses to sweep into a path, its exit code 2 checked."""
    from test_command import main_fails  # the command as a user meets it

    return main_fails(capsys, config, path, *more)


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
        (later_version, "has store format 99; expected 2"),
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
        (
            {"y": "lr:log:1e-3:1e2:3", "seed": 4, "trace": "off"},
            "with y='lr:log:0.001:10.0:3', got 'lr:log:0.001:100.0:3'; trace='on', got 'off'; seed=0.0, got 4.0; give",
        ),
    ],
)
def test_another_configuration_is_refused_by_every_field_that_differs(made, capsys, changes, says):
    before = contents(made)
    assert says in refused(capsys, tiny(made.parent, **changes), made)
    assert contents(made) == before


def test_other_launches_are_refused_where_bits_depend_on_them(made, capsys):
    before = contents(made)
    said = refused(capsys, tiny(made.parent), made, "--rows-per-launch", "1")
    assert "rows_per_launch is 1, but" in said and "was begun with 3, on which a cell's bits depend" in said
    assert contents(made) == before


def test_fewer_replicates_than_are_stored_are_refused(made, capsys):
    writer = Writer(made)
    writer.grow(2, 1)
    writer.close()
    assert "with replicates=2, got 1" in refused(capsys, tiny(made.parent), made)


def test_data_elsewhere_of_the_same_content_are_the_same(made):
    moved = made.parent / "moved.jsonl"
    (made.parent / "chat.jsonl").rename(moved)
    sweep(tiny(made.parent, data=str(moved)), made)


def test_data_that_changed_since_are_refused(made, capsys):
    data = made.parent / "chat.jsonl"
    data.write_text(data.read_text().replace("cat", "dog"))
    before = contents(made)
    said = refused(capsys, tiny(made.parent, clip=0.5), made)
    assert "holds a sweep with clip=0.0, got 0.5; data of other content, '" in said and "chat.jsonl'; give the" in said
    assert contents(made) == before


def test_an_axis_that_an_older_version_spelt_out_is_the_same(made):
    file = made / "zarr.json"
    stored = file.read_text()
    assert stored.count("tokens:lin:") >= 1
    file.write_text(stored.replace("tokens:lin:", "tokens:linear:"))
    sweep(tiny(made.parent), made)
    assert open_store(made).config.swept.x.startswith("tokens:lin:")


def test_a_store_of_before_a_measurement_was_declared_is_gone_on_with(made):
    whole = open_store(made).read("val_loss")
    shutil.rmtree(made / "val_bits_per_byte")
    consolidate(Folder(made))
    assert "val_bits_per_byte" not in open_store(made)
    forget(made, row=1)
    store = sweep(tiny(made.parent, replicates=2), made)
    assert store.status.all() and store.run.replicates == 2
    assert (store.read("val_loss")[0] == whole[0]).all() and not (made / "val_bits_per_byte").exists()


def test_stores_are_named_by_network_axes_and_content(tmp_path):
    def named(**changes):
        config = tiny(tmp_path, **changes)
        return default_store(config, cells_of(config)).name

    first = named()
    assert re.fullmatch(r"gpt-lr-tokens-chat-[0-9a-f]{8}", first)
    assert named(x="tokens:lin:32:96:4", replicates=3) == named(x="tokens:linear:32.0:96:4") == first
    points = tmp_path / "points.csv"
    names = {first, named(seed=1), named(x="tokens:lin:32:96:5"), named(y="lr.mlp:log:1e-3:1:3")}
    for rows in ("1e-3,64", "1e-2,64"):
        points.write_text(f"lr,tokens\n{rows}\n")
        names.add(named(y="", x="", points=str(points)))
    data = tmp_path / "chat.jsonl"
    data.write_text(data.read_text().replace("cat", "dog"))
    assert len({*names, named()}) == 7


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
    (made / "last_loss" / "c" / "0" / "0" / "0").write_bytes(b"junk" * 9)
    with pytest.raises(ValueError, match=r"last_loss is damaged \(.*\); restore it or sweep into a new path"):
        open_store(made).read("last_loss")


def test_a_second_writer_is_refused_while_the_first_writes(made, capsys):
    before = contents(made)
    first = FolderLock(made)
    assert "another process is writing" in refused(capsys, tiny(made.parent), made)
    first.close()
    assert contents(made) == before
    FolderLock(made).close()


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
    config, rows = tiny(tmp_path, x="tokens:linear:32:2400:2"), {"rows_per_launch": "1"}
    whole = arrays(sweep(config, tmp_path / "whole", **rows))
    sweep(config, tmp_path / "s", **rows)
    writer = Writer(tmp_path / "s")
    writer.group["status"][0, 1:3] = 0
    writer.close()
    with no_file_beyond(400):
        line = refused(capsys, config, tmp_path / "s")
    assert "File too large" in line
    left = open_store(tmp_path / "s")
    assert (left.status[0, 0] == 1).all() and (left.status[0, 1:] == 0).all()
    assert np.array_equal(left.read("weights_digest")[0, 0], whole["weights_digest"][0, 0])
    assert_equal_bits(arrays(sweep(config, tmp_path / "s")), whole)


def test_a_disk_that_is_full_at_the_start_leaves_nothing(tmp_path, capsys):
    config = tiny(tmp_path)
    before = contents(tmp_path)
    with no_file_beyond(100):
        assert "File too large" in refused(capsys, config, tmp_path / "s")
    assert contents(tmp_path) == before and not (tmp_path / "s").exists()
