"""W&B offline: one run a sweep, read back from its file without a network."""

import json
import struct
from pathlib import Path

import pytest
from tiny import sweep, tiny

from engine import tracking
from engine.outcome import LABELS

# wandb's own code: pydantic and protobuf warn while it is imported and while it logs
BLOCK = 32768
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """A folder that W&B writes into, and nowhere else."""
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb-home"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    (tmp_path / "wandb-home").mkdir()
    return tmp_path / "wandb-home"


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
    config = tiny(tmp_path, rows_per_launch="1")
    run_pictured(config, store, Image.new("RGB", (8, 8), "blue"))
    [file] = offline.rglob("*.wandb")
    read = records(file)
    [run] = [record.run for record in read if record.WhichOneof("record_type") == "run"]
    assert run.project == "fractal-llm" and run.entity == ""
    stored = {item.key: json.loads(item.value_json) for item in run.config.update if item.key}
    assert stored["y"] == config.y and stored["width"] == 16
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
    assert len({key for row in rows for key in row if not key.startswith(("_", "map/"))}) <= 10, "no name a cell"
    [image] = [row for row in rows if "map/drawn/path" in row]
    assert image["map/drawn/_type"] == "image-file" and image["map/drawn/width"] == 8
    assert len(list(offline.rglob("drawn_*.png"))) == 1
    [artifact] = [record.artifact for record in read if record.WhichOneof("record_type") == "artifact"]
    assert artifact.name == "sweep-s" and artifact.type == "sweep"
    paths = {entry.path for entry in artifact.manifest.contents}
    assert "zarr.json" in paths and any(path.startswith("status/c/") for path in paths)


def run_pictured(config, path, picture) -> None:
    """Sweep with W&B offline; a picture is put among the figures where the analysis would draw its own."""
    finish = tracking.Tracking.finish

    def with_picture(self, store):
        picture.save(store / "figures" / "drawn.png")
        finish(self, store)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracking.Tracking, "finish", with_picture)
        sweep(config, path, wandb="offline")


def test_off_is_nothing_at_all(tmp_path, offline):
    track = tracking.start("off", "p", "", tiny(tmp_path), first=True)
    track.launch(None)
    track.finish(tmp_path)
    assert track.run is None and list(offline.iterdir()) == []
    assert tracking.start("offline", "p", "", tiny(tmp_path), first=False).run is None, "the first rank only"


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="wandb is 'sometimes', expected one of off, offline, online"):
        tracking.check("sometimes")
