"""W&B offline: one run a sweep, read back from its file without a network."""

import json
import struct
from pathlib import Path

import pytest
from test_command import main_fails
from tiny import forget, sweep, tiny

from engine import tracking
from engine.outcome import LABELS
from engine.store import open_store

# wandb's own code: pydantic and protobuf warn while it is imported and while it logs
BLOCK = 32768
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """A folder that W&B writes into, and nowhere else."""
    import wandb

    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb-home"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    (tmp_path / "wandb-home").mkdir()
    yield tmp_path / "wandb-home"
    wandb.teardown()  # it reads the environment once


def records(file: Path) -> list:
    """Every record of an offline run's file.

    The file is a LevelDB log: a header of 7 bytes, then blocks of 32 KiB of pieces, each with its checksum,
    length and kind (1 whole, 2 first, 3 middle, 4 last) in 7 bytes. The checksums are not looked at.
    """
    from wandb.proto import wandb_internal_pb2

    data, at, read, pieces = file.read_bytes(), 7, [], b""
    while at + 7 <= len(data):
        left = BLOCK - at % BLOCK
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        pieces += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(pieces)
            read.append(record)
            pieces = b""
    return read


def test_an_offline_run_holds_aggregates_the_map_and_the_store(tmp_path, offline):
    from PIL import Image

    store = tmp_path / "s"
    # the second launch's sweep resumes, and draws nothing by itself: a picture stands for the map
    config = tiny(tmp_path)
    run_pictured(config, store, Image.new("RGB", (8, 8), "blue"))
    [file] = offline.rglob("*.wandb")
    read = records(file)
    [run] = [record.run for record in read if record.WhichOneof("record_type") == "run"]
    assert run.project == "fractal-llm" and run.entity == ""
    assert run.display_name == "s" and run.run_id == open_store(store).attributes["wandb_run"]
    stored = {item.key: json.loads(item.value_json) for item in run.config.update if item.key}
    assert stored["y"] == "lr:log:0.001:10.0:3" and stored["width"] == 16
    rows = []
    for record in read:
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
    launches = [row for row in rows if "cells" in row]
    assert [row["cells"] for row in launches] == [4, 8, 12], "one line of aggregates a launch"
    for row in launches:
        assert row["cells_per_second"] > 0 and row["tokens_per_second"] > 0
        assert sum(row[f"cells/{name}"] for name in LABELS if f"cells/{name}" in row) == row["cells"]
    assert len({key for row in rows for key in row if not key.startswith(("_", "map/", "cells_table"))}) <= 10, (
        "no name a cell"
    )
    [image] = [row for row in rows if "map/drawn/path" in row]
    assert image["map/drawn/_type"] == "image-file" and image["map/drawn/width"] == 8
    assert len(list(offline.rglob("drawn_*.png"))) == 1
    logged = [record.artifact for record in read if record.WhichOneof("record_type") == "artifact"]
    [artifact], [page] = ([each for each in logged if each.type == kind] for kind in ("sweep", "report"))
    assert artifact.name == "sweep-s" and artifact.type == "sweep"
    assert page.name == "report-s" and [entry.path for entry in page.manifest.contents] == ["report.html"]
    paths = {entry.path for entry in artifact.manifest.contents}
    assert "zarr.json" in paths and any(path.startswith("status/c/") for path in paths)
    assert [row["_step"] for row in launches] == [4, 8, 12], "a resumed sweep's lines follow the earlier ones"
    [file] = offline.rglob("cells_table_*.table.json")
    table = json.loads(file.read_text("utf-8"))
    cells = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    kept = open_store(store)
    assert len(cells) == 12 and {"lr", "tokens", "seed", "label", "val_loss"} <= set(table["columns"])
    assert [cell["val_loss"] for cell in cells] == pytest.approx(kept.read("val_loss").ravel().tolist(), nan_ok=True)
    assert sorted({cell["lr"] for cell in cells}) == pytest.approx(kept.run.cells.y.values.tolist())
    said = summary(read)
    assert said["lr/best"] == 0.01
    assert sum(count for name, count in said.items() if name.startswith("labels/")) == 12


def summary(read: list) -> dict:
    """What a run's summary says at its end."""
    updates = [r.summary.update for r in read if r.WhichOneof("record_type") == "summary"]
    return {i.key or "/".join(i.nested_key): json.loads(i.value_json) for update in updates for i in update}


def run_pictured(config, path, picture) -> None:
    """Sweep with W&B offline; a picture is put among the figures where the analysis would draw its own."""
    import wandb

    finish = tracking.Tracking.finish

    def with_picture(self, store, found):
        picture.save(store / "figures" / "drawn.png")
        (store / "figures" / "report.html").write_text("<p>a report</p>", "utf-8")
        finish(self, store, {"lr/best": 0.01})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracking.Tracking, "finish", with_picture)
        sweep(config, path, wandb="offline", rows_per_launch="1")
    wandb.teardown()  # its process has then written all of its file


def test_a_resumed_sweep_goes_on_in_its_own_run(tmp_path, offline):
    for _ in range(2):
        sweep(tiny(tmp_path), tmp_path / "s", wandb="offline", rows_per_launch="1")
        forget(tmp_path / "s", 1)
    begun = [r.run.run_id for f in offline.rglob("*.wandb") for r in records(f) if r.WhichOneof("record_type") == "run"]
    assert len(begun) == 2 and set(begun) == {open_store(tmp_path / "s").attributes["wandb_run"]}


def test_a_store_of_any_name_is_an_artifact(tmp_path, offline):
    sweep(tiny(tmp_path), tmp_path / "[lr = 0.1, ä]", wandb="offline")
    [file] = offline.rglob("*.wandb")
    artifacts = [record.artifact for record in records(file) if record.WhichOneof("record_type") == "artifact"]
    assert "sweep--lr-0.1-" in [artifact.name for artifact in artifacts]


def test_without_a_key_nothing_is_made(tmp_path, offline, monkeypatch, capsys):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "wandb-home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    said = main_fails(capsys, tiny(tmp_path), tmp_path / "s", "--wandb", "online")
    assert "W&B did not start (No API key configured" in said
    assert sorted(file.name for file in tmp_path.iterdir()) == ["chat.jsonl", "wandb-home"]


@pytest.mark.parametrize("error", ["CommError", "AuthenticationError", "UsageError"])
def test_what_wandb_raises_is_a_users_error(tmp_path, monkeypatch, error):
    import wandb

    def fails(**_):
        raise getattr(wandb.errors, error)("no such host")

    monkeypatch.setattr(wandb, "init", fails)
    with pytest.raises(ValueError, match=r"W&B did not start \(no such host\); log in, or give --wandb offline or off"):
        tracking.start("online", "p", "", tiny(tmp_path), first=True)


def test_off_is_nothing_at_all(tmp_path, offline):
    track = tracking.start("off", "p", "", tiny(tmp_path), first=True)
    track.launch(None)
    track.finish(tmp_path, {})
    assert track.run is None and list(offline.iterdir()) == []
    assert tracking.start("offline", "p", "", tiny(tmp_path), first=False).run is None, "the first rank only"


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="wandb is 'sometimes', expected one of off, offline, online"):
        tracking.check("sometimes")
