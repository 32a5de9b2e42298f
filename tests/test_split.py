"""A batch that ranks share: the losses of one process but for rounding, the same bits every time for as many ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_sweep import free_port
from tiny import arrays, assert_equal_bits, sweep, tiny, write_chat

from engine import split
from engine.api import check_same_machines, run_sweep
from engine.options import RunOptions
from engine.outcome import DONE
from engine.provenance import provenance
from engine.replay import replay_cell
from engine.split import NondeterminismError, Split
from engine.store import open_store

# batches of 1 to 5 rows, in forward passes of 1 on either rank: of one row the second rank has none, of 3 the first has
# two, and those above 2 accumulate
RAGGED = {"y": "lr:log:1e-3:3e-2:2", "x": "batch:linear:1:5:5", "tokens": 120, "micro_batch": 1, "validation_rows": 4}
SWEEPS = {
    "ragged": RAGGED | {"clip": 0.5, "freeze": "embedding", "optimizer": "adamw,matrix=muon"},
    "others": RAGGED | {"optimizer": "lion,matrix=normuon,embedding=sgd", "schedule": "linear", "count": "supervised"},
    "breaks": {"y": "lr:log:1e-3:1e30:4", "x": "tokens:linear:48:240:3", "batch": 3, "replicates": 2},
}
DRIVER = """
import json, os, signal, sys, time
from contextlib import redirect_stdout
import torch
plan = json.loads(sys.argv[1])
sys.path.insert(0, plan["tests"])
import tiny
from pathlib import Path
from engine import launch, replay
from engine.command import user_errors
from engine.split import group_on, split_over
from engine.store import open_store
launch.FLUSH = 0.0
folder, ports = Path(plan["folder"]), iter(plan["ports"])

def ranks(count, work, name):
    port, children = next(ports), []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            os.environ.update(WORLD_SIZE=str(count), RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            said = os.open(folder / f"{name}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(said, 1), os.dup2(said, 2)
            with user_errors():
                work(rank)
            sys.stdout.flush()
            os._exit(0)
        children.append(child)
    return children

def codes(children):
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]

def trains(name, store, ddp):
    config = tiny.tiny(folder, **plan["sweeps"][name], ddp=ddp)
    return lambda rank: tiny.sweep(config, folder / store, rows_per_launch="2")

def adds(rank):
    own = split_over(3, torch.device("cpu"))
    torch.manual_seed(rank)
    tensors = [torch.randn(size).bfloat16() for size in plan["sizes"]]
    torch.save((tensors, own.sums(tensors), own.sums(tensors[1:2])), folder / f"sums.{rank}.pt")

def replays(rank):
    sys.argv = ["replay", "--store", str(folder / "breaks"), "--row", "1", "--col", "2", "--device", "cpu"]
    replay.main()

for name in plan["sweeps"]:
    assert not any(codes(ranks(2, trains(name, name, 0), name))), name
assert not any(codes(ranks(2, trains("ragged", "again", 2), "again")))
both = ranks(2, trains("breaks", "killed", 0), "killed")
while not (folder / "killed").exists() or not 0 < (open_store(folder / "killed").status == 1).sum() < 24:
    time.sleep(0.005)
for child in both:
    os.kill(child, signal.SIGKILL)
codes(both)
done = int((open_store(folder / "killed").status == 1).sum())
assert not any(codes(ranks(2, trains("breaks", "killed", 0), "resumed")))
print(json.dumps({
    "done": done,
    "replay": codes(ranks(2, replays, "replay")),
    "three": codes(ranks(3, trains("breaks", "breaks", 0), "three")),
    "sums": codes(ranks(3, adds, "sums")),
}))
"""
SIZES = [[3, 5], [7, 1000], [2, 64], [1]]


@pytest.fixture(scope="module")
def driven(tmp_path_factory) -> Path:
    """A folder of what ranks stored and said; one process forks them all."""
    folder = tmp_path_factory.mktemp("driven")
    write_chat(folder / "chat.jsonl")
    tests = Path(__file__).parent
    told = {"tests": str(tests), "folder": str(folder), "sweeps": SWEEPS, "sizes": SIZES}
    told["ports"] = [str(free_port()) for _ in range(10)]
    environment = os.environ | {"PYTHONPATH": str(tests.parent)}
    command = [sys.executable, "-c", DRIVER, json.dumps(told)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    said = "".join(f"{each.name}: {each.read_text()}" for each in sorted(folder.glob("*.[01]")))
    assert ran.returncode == 0, ran.stdout + ran.stderr + said
    (folder / "codes.json").write_text(ran.stdout)
    return folder


@pytest.mark.parametrize("name", SWEEPS)
def test_two_ranks_have_the_losses_of_one_process(driven, name):
    shared = open_store(driven / name)
    alone = sweep(tiny(driven, **SWEEPS[name]), driven / f"{name}-alone", rows_per_launch="2")
    assert (shared.status == DONE).all() and shared.config.training.ddp == 2
    assert np.array_equal(shared.read("steps"), alone.read("steps"))
    assert np.array_equal(shared.read("nonfinite_step"), alone.read("nonfinite_step"))
    whole = np.isfinite(alone.read("losses")) & (alone.read("losses") < 10)  # a run that blows up enlarges roundings
    # fp32 sums in another order, over up to 60 steps: relative 1e-7 each
    assert np.allclose(shared.read("losses")[whole], alone.read("losses")[whole], rtol=1e-4)
    assert not np.array_equal(shared.read("weights_digest"), alone.read("weights_digest")), "sums in the same order?"


def test_two_runs_of_two_ranks_have_the_same_bits(driven):
    assert_equal_bits(arrays(open_store(driven / "again")), arrays(open_store(driven / "ragged")))


def test_ranks_that_are_killed_and_started_again_leave_the_uninterrupted_store(driven):
    assert 0 < json.loads((driven / "codes.json").read_text())["done"] < 24
    assert_equal_bits(arrays(open_store(driven / "killed")), arrays(open_store(driven / "breaks")))


def test_replay_by_as_many_ranks_is_identical_and_said_once(driven):
    assert json.loads((driven / "codes.json").read_text())["replay"] == [0, 0]
    assert "identical" in (driven / "replay.0").read_text()
    assert (driven / "replay.1").read_text() == ""


def test_another_number_of_ranks_is_refused(driven):
    with pytest.raises(ValueError, match=r"ddp is 2, but 1 process was started; .* torchrun --nproc-per-node 2"):
        replay_cell(open_store(driven / "breaks"), 1, 2, "cpu")
    with pytest.raises(ValueError, match=r"holds a sweep with .*ddp=2, got 1"):
        sweep(tiny(driven, **SWEEPS["breaks"]), driven / "breaks")
    assert json.loads((driven / "codes.json").read_text())["three"] == [2, 2, 2]
    assert "ddp=2, got 3" in (driven / "three.0").read_text()


@pytest.mark.parametrize(("ddp", "said"), [(0, "one process was started"), (2, "ddp is 2, but 1 process was started")])
def test_ranks_that_were_not_started(tmp_path, ddp, said):
    with pytest.raises(ValueError, match=said):
        sweep(tiny(tmp_path, ddp=ddp), tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_sums_are_made_in_the_order_of_the_ranks_wherever_an_element_lies(driven):
    tensors, *_ = zip(*(torch.load(driven / f"sums.{rank}.pt")[0] for rank in range(3)), strict=True), None
    wanted = [(a.float() + b.float() + c.float()).bfloat16() for a, b, c in tensors]
    for rank in range(3):
        _, together, alone = torch.load(driven / f"sums.{rank}.pt")
        for got, want in zip(together, wanted, strict=True):
            assert torch.equal(got, want)
        assert torch.equal(alone[0], wanted[1])


def test_ranks_with_other_weights_raise_the_alarm(monkeypatch):
    monkeypatch.setattr(
        split.distributed, "all_gather_object", lambda found, own: found.__setitem__(slice(2), [own, [3]])
    )
    Split(0, 2).check_same(np.array([3]))
    with pytest.raises(NondeterminismError, match=r"different weights, by their digests \[\[4\], \[3\]\]"):
        Split(0, 2).check_same(np.array([4]))


def test_ranks_of_other_gpus_are_refused():
    here = provenance(torch.device("cpu"))
    check_same_machines([here, here])
    with pytest.raises(ValueError, match=r"rank 0 trains on CPU .*, this is NVIDIA A100 on rank 1: .*one GPU model"):
        check_same_machines([here, here | {"device": "NVIDIA A100"}])


def test_fsdp_is_refused_with_its_arithmetic(tmp_path):
    with pytest.raises(
        ValueError, match=r"bytes of state a parameter, so one replica takes 0\.\d+ GiB where this device"
    ):
        run_sweep(tiny(tmp_path), RunOptions(store=str(tmp_path / "s"), device="cpu", fsdp=True))
    assert not (tmp_path / "s").exists()
