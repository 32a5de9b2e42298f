"""Several processes on one sweep: who trains what, what a lost one leaves, and what happens where bits differ."""

import json
import os
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from tiny import arrays, assert_equal_bits, setup, sweep, tiny

from engine import api
from engine.api import run_sweep
from engine.config import make_config
from engine.files import Folder
from engine.launch import NondeterminismError, check_same_bits, leased_launches
from engine.leases import FOLDER, Leases, remove_leases
from engine.options import RunOptions
from engine.outcome import DONE
from engine.plan import Chunk
from engine.store import Writer, open_store

CHUNKS = [Chunk(0, start, start + 1) for start in range(6)]


def take(leases: Leases, chunks: list[Chunk], most: int) -> list[Chunk]:
    """Lease the first of some chunks that are free."""
    free = list(leases.free(chunks).items())[:most]
    return [chunk for chunk, attempt in free if leases.take(chunk, attempt)]


def lose(leases: Leases) -> None:
    """What is left of a worker that a kill has ended: its leases, and a sign of life that is long ago."""
    leases.alive.closed.set()
    leases.alive.beating.join()
    for key in (*leases.held.values(), leases.alive.key):
        os.utime(leases.place.path / key, (time.time() - 2 * leases.expires,) * 2)


def test_a_chunk_is_leased_to_one_worker_until_that_shows_no_sign_of_life(tmp_path):
    with closing(Leases(Folder(tmp_path), "one", 60.0)) as one, closing(Leases(Folder(tmp_path), "two", 60.0)) as two:
        assert take(one, CHUNKS, 2) == CHUNKS[:2]
        assert take(two, CHUNKS, 3) == CHUNKS[2:5]
        assert take(one, CHUNKS, 3) == CHUNKS[5:]
        lose(one)
        assert one.is_held(CHUNKS[0])
        assert take(two, CHUNKS, 1) == CHUNKS[:1], "the first is taken over"
        assert not one.is_held(CHUNKS[0])
        assert two.is_held(CHUNKS[0])
        assert one.holder(CHUNKS[0]) == "two"


def test_a_worker_keeps_its_leases_alive_by_itself(tmp_path):
    with closing(Leases(Folder(tmp_path), "one", 0.6)) as one, closing(Leases(Folder(tmp_path), "two", 0.6)) as two:
        take(one, CHUNKS, 1)
        time.sleep(1.2)
        assert take(two, CHUNKS, 1) == CHUNKS[1:2]


def test_one_of_many_that_end_together_finds_the_leases(tmp_path):
    Leases(Folder(tmp_path), "one", 60.0).close()
    assert [remove_leases(Folder(tmp_path)) for _ in range(3)] == [True, False, False]


def test_shares_are_whole_stacks_the_costliest_first(tmp_path):
    config = tiny(tmp_path, y="tokens:linear:32:96:4", x="lr:log:1e-3:1e-1:2")
    path = tmp_path / "s"
    run_sweep(config, RunOptions(store=str(path), quiet=True, device="cpu", rows_per_launch="1"))
    writer = Writer(path)
    writer.group["status"][:] = 0
    made = setup(config, rows_per_launch="1")
    with closing(Leases(Folder(path), "one", 60.0)) as leases:
        first = next(leased_launches(made, writer, leases, workers=2))
    writer.close()
    work = made.plan.work_in(made.plan.cells_in(first))
    assert len(first) == 1, "bits depend on the launch here"
    assert work.costs.sum() == max(made.plan.work_in(made.plan.cells_in(each)).costs.sum() for each in made.launches)


def test_a_cell_of_other_bits_raises_the_alarm_and_names_cell_and_machines(tmp_path):
    store = sweep(tiny(tmp_path), tmp_path / "s", rows_per_launch="1")
    chunk, rows = Chunk(0, 1, 2), slice(1, 2)
    block = {name: store.read(name, 0, rows) for name in store.specs}
    with closing(Leases(Folder(tmp_path / "s"), "host A", 60.0)) as leases:
        take(leases, [chunk], 1)
        check_same_bits(store, chunk, block, leases)
        block["weights_digest"][0, 2] ^= 1
        with pytest.raises(NondeterminismError, match=r"weights_digest of cell \(0, 1, 2\) .*trained by host A"):
            check_same_bits(store, chunk, block, leases)


def test_a_shared_sweep_prepares_once_and_says_what_it_took(tmp_path, monkeypatch):
    prepared, prepare = [], api.prepare
    monkeypatch.setattr(api, "prepare", lambda *given: prepared.append(given) or prepare(*given))
    store = sweep(tiny(tmp_path), tmp_path / "s", workers=2)
    assert len(prepared) == 1 and (store.status == DONE).all()
    assert store.attributes["took"]["cells"] == store.status.size and store.attributes["took"]["seconds"] > 0


@pytest.mark.parametrize(
    ("workers", "said"), [(0, "workers is 0; expected at least 1"), (2, "torchrun starts its own")]
)
def test_a_number_of_workers_that_cannot_be(tmp_path, monkeypatch, workers, said):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    with pytest.raises(ValueError, match=said):
        run_sweep(tiny(tmp_path), RunOptions(store=str(tmp_path / "s"), workers=workers, device="cpu"))


DRIVER = """
import json, os, signal, sys, time
import numpy as np
plan = json.loads(sys.argv[1])
sys.path.insert(0, plan["tests"])
import tiny
from engine import launch
from engine.outcome import DONE
from engine.store import open_store
launch.FLUSH, launch.WAIT = 0.0, 0.05
random = np.random.default_rng(plan["seed"])
config = tiny.make_config("two_layer", **plan["sweep"])

def worker():
    child = os.fork()
    if child == 0:
        tiny.sweep(config, plan["store"], workers=3, rows_per_launch="1", lease_seconds=1.0)
        os._exit(0)
    return child

alive = [worker() for _ in range(3)]
killed = 0
while killed < plan["kills"]:
    time.sleep(random.uniform(0.1, 1.0))
    if os.path.exists(plan["store"]) and (open_store(plan["store"]).status == DONE).all():
        break
    lost = alive.pop(0)
    os.kill(lost, signal.SIGKILL)
    os.waitpid(lost, 0)
    killed += 1
    alive.append(worker())
print(killed, "killed", flush=True)
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in alive))
"""


def test_workers_that_are_killed_and_join_again_leave_the_store_of_one(tmp_path):
    axes = {"y": "lr.0:log:1e-1:1e5:24", "x": "lr.1:log:1e-1:1e5:16", "steps": 500}
    told = {"tests": str(Path(__file__).parent), "store": str(tmp_path / "many"), "sweep": axes, "kills": 3}
    told["seed"] = os.getpid()
    command = [sys.executable, "-c", DRIVER, json.dumps(told)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert int(ran.stdout.split()[0]) > 0, "none was killed before the end"
    alone = sweep(make_config("two_layer", **axes), tmp_path / "one")
    assert_equal_bits(arrays(open_store(tmp_path / "many")), arrays(alone))
    assert not (tmp_path / "many" / FOLDER).exists(), "the last to leave removes the leases"
    assert len(np.unique(alone.read("nonfinite_step"))) > 1
