"""A store in a bucket: the same sweep bit for bit, whatever fails on the way, and every reader reads it."""

import importlib
import json
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from test_command import main_fails
from tiny import arrays, assert_equal_bits, flags, sweep, tiny

from engine import bucket
from engine.bucket import Bucket
from engine.config import make_config
from engine.locks import ObjectLock
from engine.place import located
from engine.store import open_store

pytest.importorskip("moto", reason="package moto, which serves the bucket, is not installed")
pytest.importorskip("obstore", reason="package obstore (extra cloud) is not installed")
faulty_bucket = importlib.import_module("faulty_bucket")

ROOT = Path(__file__).parent.parent
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def server():
    """A bucket on the loopback, its address, and what makes it fail."""
    with faulty_bucket.serving("bucket") as served:
        yield served


@pytest.fixture
def served(server, monkeypatch):
    """The bucket, as environment and fresh clients know it."""
    address, faulty = server
    for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": address}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(bucket, "REQUEST_SECONDS", faulty_bucket.HANG / 2)
    bucket.client.cache_clear()
    bucket.check_readable.cache_clear()
    return faulty


def test_a_sweep_that_is_killed_and_resumed_beside_failures_is_that_of_a_local_store(tmp_path, served):
    config = make_config("two_layer", y="lr.0:log:1e-1:1e5:12", x="lr.1:log:1e-1:1e5:8", steps=200)
    alone = arrays(sweep(config, tmp_path / "s", rows_per_launch="1"))
    words = [*flags(config, "s3://bucket/a/b"), "--rows-per-launch", "1", "--lease-seconds", "3", "--no-figures"]
    killed = subprocess.Popen([sys.executable, "engine/sweep.py", *words], cwd=ROOT)
    place = located("s3://bucket/a/b")
    while not place.items("status/c"):
        assert killed.poll() is None
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert 0 < int((open_store(place).status == 1).sum()) < 12 * 8
    served.share = 0.06
    found = arrays(sweep(config, "s3://bucket/a/b", rows_per_launch="1", lease_seconds=3.0))
    served.share = 0.0
    assert_equal_bits(found, alone)
    assert all(served.failed.values()), served.failed
    assert not place.items(".locks") and not place.items(".leases")


def test_workers_share_a_sweep_in_a_bucket(tmp_path):
    config = make_config("two_layer", y="lr.0:log:1e-1:1e5:8", x="lr.1:log:1e-1:1e5:8", steps=50)
    alone = arrays(sweep(config, tmp_path / "s", rows_per_launch="1"))
    url, words = "memory://shared/s", {"rows_per_launch": "1", "workers": 2, "lease_seconds": 3.0}
    with ThreadPoolExecutor() as pool:
        stores = [each.result() for each in [pool.submit(sweep, config, url, **words) for _ in range(2)]]
    for store in stores:
        assert_equal_bits(arrays(store), alone)
    assert not located(url).items(".locks") and not located(url).items(".leases")


def test_one_process_holds_a_lock_until_it_ends_and_who_shares_it_keeps_others_out():
    place = Bucket("memory://locks", "s")

    def lock(shared: bool = False) -> ObjectLock:
        return ObjectLock(place, "write", shared, wait=False, expires=0.6)

    with closing(lock()):
        for shared in (False, True):
            with pytest.raises(ValueError, match=r"another process is writing memory://locks/s \(.*, process \d+\)"):
                lock(shared)
    with closing(lock(shared=True)), closing(lock(shared=True)), pytest.raises(ValueError, match="another process"):
        lock()
    lost = lock()
    lost.alive.closed.set()  # as a kill does, which gives nothing up
    with closing(lock()):
        pass
    assert not place.items(".locks")


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    """A finished sweep of language models in a bucket, and the same in a folder."""
    folder = tmp_path_factory.mktemp("language")
    config = tiny(folder, replicates=2)
    return sweep(config, "memory://readers/s"), sweep(config, folder / "s")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("analysis.recommend", []),
        ("analysis.plot", []),
        ("analysis.classify", []),
        ("analysis.boundary", []),
        ("analysis.rules", []),
        ("analysis.report", []),
        ("analysis.export", ["--to", "cells.csv"]),
        ("engine.replay", ["--row", "1", "--col", "2", "--device", "cpu"]),
    ],
)
def test_every_reader_says_of_a_bucket_what_it_says_of_a_folder(
    command, words, language, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    said = []
    for store in language:
        monkeypatch.setattr(sys, "argv", [command, "--store", str(store.path), *words])
        try:
            importlib.import_module(command).main()
            code = 0
        except SystemExit as ended:  # rules have their own say about seeds
            code = ended.code
        ran = capsys.readouterr()
        text = "".join((ran.out + ran.err).split())  # tables break their titles anywhere
        text = re.sub(r"inabout\w+asmeasuredhere", "", text)
        said.append((code, text.replace(str(store.figures), "F").replace(str(store.path), "S")))
    assert said[0] == said[1]


def test_a_store_in_a_bucket_is_a_dataset_and_a_live_page(language):
    from analysis.classify import Labelling
    from analysis.serve import Live

    there, here = language
    assert there.to_xarray().drop_attrs().identical(here.to_xarray().drop_attrs())
    live = Live(str(there.path), Labelling())
    stamp, values = live.map()
    assert stamp == live.stamp() and json.loads(values)
    assert there.place.get("status/c/0/0/0") is not None
    there.place.put("status/c/0/0/0", there.place.get("status/c/0/0/0"))
    assert live.stamp() != stamp


def test_a_zoom_is_stored_inside_its_parent(tmp_path, monkeypatch):
    from analysis.zoom import main

    monkeypatch.chdir(tmp_path)
    config = make_config("two_layer", y="lr.0:log:1e-1:1e5:8", x="lr.1:log:1e-1:1e5:8", steps=50)
    store = sweep(config, "memory://zoom/s")
    monkeypatch.setattr(sys, "argv", ["zoom", "--store", "memory://zoom/s", "--levels", "1", "--device", "cpu"])
    main()
    [child] = open_store(store.path).children()
    assert str(child).startswith("memory://zoom/s/zoom/x")
    assert (open_store(child).status == 1).all()
    assert list(store.figures.iterdir())


@pytest.mark.parametrize(
    ("environment", "store", "said"),
    [
        ({}, "s3://missing/s", "s3://missing is not there; make the bucket, or give another --store"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "s3://bucket/s", "s3://bucket does not answer ("),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "s3://bucket/s", "no credentials are given for s3://"),
        ({"AZURE_STORAGE_ACCOUNT_NAME": ""}, "az://bucket/s", "az://bucket does not answer ("),
        ({}, "s3://bucket", "expected scheme://bucket/path, with the path of the store in the bucket"),
        ({}, "http://bucket/s", "store is 'http://bucket/s'; expected a folder, or s3://, gs:// or az://bucket/path"),
    ],
)
def test_a_bucket_that_cannot_be_had_is_one_line_before_anything_is_trained(
    served, tmp_path, monkeypatch, capsys, environment, store, said
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("engine.api.prepare", lambda *_: pytest.fail("prepared to train"))
    began = time.monotonic()
    assert said in main_fails(capsys, make_config("two_layer"), store)
    assert time.monotonic() - began < 10


def test_a_bucket_without_conditional_writes_is_refused(served, monkeypatch, capsys):
    monkeypatch.setattr("engine.api.prepare", lambda *_: pytest.fail("prepared to train"))
    served.unconditional = True
    line = main_fails(capsys, make_config("two_layer"), "s3://bucket/c")
    served.unconditional = False
    assert "s3://bucket has no conditional writes (If-None-Match: *)" in line
    assert not located("s3://bucket/c").items("")


def test_a_store_in_a_bucket_needs_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "obstore", None)
    monkeypatch.delitem(sys.modules, "engine.bucket")
    line = main_fails(capsys, make_config("two_layer"), "s3://bucket/s")
    assert "a store in a bucket needs obstore; install it with uv sync --extra cloud" in line
