"""Whole sweeps on the CPU: every axis, resuming after a kill, ranks, and what is written when."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import arrays, assert_equal_bits, forget, setup, sweep, tiny

from engine import plan
from engine.api import prepare_stored, run_sweep
from engine.config import hyper_names, make_config
from engine.data import batch_order
from engine.language import CPU_FLOPS, CPU_SLOTS, WAVE_SECONDS, cpu_slots
from engine.optim import OPTIMIZERS
from engine.options import RunOptions
from engine.outcome import DONE, NOT_COMPUTED, Thresholds
from engine.progress import Progress
from engine.schedule import SCHEDULES
from engine.step import Trainer
from engine.store import Writer, open_store

PAIRS = (
    ("lr:log:1e-3:1e-1:2", "tokens:linear:32:64:2"),
    ("batch:linear:1:3:2", "lr.matrix:log:1e-3:1:2"),
    ("warmup:linear:0:0.5:2", "tokens:linear:64:96:2"),
    ("lr.attention:log:1e-3:1:2", "lr.mlp:log:1e-3:1:2"),
    ("lr.embedding:log:1e-3:1:2", "lr.unembedding:log:1e-3:1:2"),
    ("weight_decay:linear:0:2:2", "beta1:linear:0:0.9:2"),
    ("beta2:linear:0.5:0.99:2", "clip:log:0.01:1:2"),
    ("init_scale:log:0.5:2:2", "label_smoothing:linear:0:0.5:2"),
    ("seed:linear:0:1:2", "dropout:linear:0:0.5:2"),
    ("eps:log:1e-8:1e-1:2", "weight_decay.mlp:linear:0:2:2"),
    ("unique_tokens:linear:8:24:2", "tokens:linear:32:64:2"),
    ("epochs:linear:1:3:2", "lr:log:1e-3:1e-1:2"),
)


def test_the_pairs_name_every_axis():
    plain = {name for name in hyper_names(make_config()) if "." not in name or name.startswith("lr.")}
    assert plain <= {axis.split(":")[0] for pair in PAIRS for axis in pair}


@pytest.mark.parametrize(("y", "x"), PAIRS)
def test_any_two_axes_make_a_whole_map(tmp_path, y, x):
    store = sweep(tiny(tmp_path, y, x), tmp_path / "s")
    assert (store.status == DONE).all()
    planned = plan.plan_runs(store.run).steps
    assert np.array_equal(store.read("steps"), planned)
    for cell in np.ndindex(*store.run.shape):
        losses = store.read("losses")[cell]
        assert np.isfinite(losses[: planned[cell]]).all() and np.isnan(losses[planned[cell] :]).all()
        assert losses[0] == store.read("first_loss")[cell]
    for name in set(store.specs) - {"losses", "status"}:
        assert np.isfinite(store.read(name)).all()
    assert len(np.unique(store.read("weights_digest"))) == 4


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_schedule_and_optimizer_trains(tmp_path, schedule, optimizer):
    named = f"adamw,matrix={optimizer}" if OPTIMIZERS[optimizer].matrices_only else optimizer
    config = tiny(tmp_path, "lr:log:1e-3:1e-2:2", "tokens:linear:32:96:2", schedule=schedule, optimizer=named)
    store = sweep(config.change(warmup=0.2), tmp_path / "s")
    assert (store.status == DONE).all() and np.isfinite(store.read("last_loss")).all()


def test_rows_per_launch_changes_no_result_beyond_rounding(tmp_path):
    whole = sweep(tiny(tmp_path), tmp_path / "whole")
    split = sweep(tiny(tmp_path), tmp_path / "split", rows_per_launch="2")
    assert split.group["losses"].chunks[:2] == (1, 2)
    assert np.array_equal(whole.read("steps"), split.read("steps"))
    for name in ("first_loss", "val_loss"):
        # 3 or 2 replicas in a stack: products summed in another order, and a rate of 10 that magnifies it
        np.testing.assert_allclose(split.read(name)[:, :2], whole.read(name)[:, :2], rtol=1e-4)


def test_the_store_says_where_its_numbers_come_from(tmp_path):
    store = sweep(tiny(tmp_path), tmp_path / "s")
    made = store.attributes
    assert made["configuration"] == json.loads(json.dumps(store.config.flat()))
    assert made["configuration_hash"] == store.config.hash
    assert made["slots"] == 3 and made["exact"] == "in the same wave"
    assert made["start"] == "random"
    assert made["inputs"] == {"data": setup(tiny(tmp_path)).corpus.digest}
    assert {"date", "command", "commit", "device", "cpu", "threads", "python", "packages"} == made["provenance"].keys()


def test_a_finished_sweep_is_not_trained_again(tmp_path, monkeypatch):
    config = tiny(tmp_path)
    before = sweep(config, tmp_path / "s")
    stamps = {file: file.stat().st_mtime_ns for file in (tmp_path / "s").rglob("*")}
    monkeypatch.setattr("engine.language.Trainer", None)
    assert_equal_bits(arrays(sweep(config, tmp_path / "s")), arrays(before))
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "s").rglob("*")} == stamps


def test_finished_launches_are_skipped_when_resuming(tmp_path, monkeypatch):
    config, rows = tiny(tmp_path), {"rows_per_launch": "1"}
    whole = arrays(sweep(config, tmp_path / "s", **rows))
    forget(tmp_path / "s", row=1)
    launched = []
    train = Trainer.train
    monkeypatch.setattr(Trainer, "train", lambda self, work, *rest: launched.append(work) or train(self, work, *rest))
    assert_equal_bits(arrays(sweep(config, tmp_path / "s")), whole)
    [[run]] = launched
    assert {cell for mark in run.marks for cell in mark.cells} == {4, 5, 6, 7}


def test_on_a_cpu_an_interruption_costs_one_wave_of_runs(tmp_path, monkeypatch):
    # 6 runs in one launch, 2 slots: three waves; a cell of the middle one is missing
    config = tiny(tmp_path, y="lr:log:1e-3:1e30:6")
    whole = arrays(sweep(config, tmp_path / "s", rows_per_launch="6", slots=2))
    forget(tmp_path / "s", row=2)
    trained = []
    train = Trainer.train
    monkeypatch.setattr(Trainer, "train", lambda self, work, *rest: trained.append(work) or train(self, work, *rest))
    assert_equal_bits(arrays(sweep(config, tmp_path / "s")), whole)
    [wave] = trained
    assert [run.marks[0].cells[0] // 4 for run in wave] == [2, 3]


def test_a_wave_on_a_cpu_lasts_half_a_minute_at_most_or_one_run(tmp_path):
    made = setup(tiny(tmp_path, y="lr:log:1e-3:1:80", schedule="linear"), rows_per_launch="80")
    [work] = [made.plan.work_in(made.plan.cells_in(launch)) for launch in made.launches]
    seconds = work.costs.max() * made.network.flops_per_token / CPU_FLOPS
    for slower, slots in ((1.0, CPU_SLOTS), (WAVE_SECONDS / seconds / 10.5, 10), (1e9, 1)):
        flops = made.network.flops_per_token * slower
        assert cpu_slots([work], made.network._replace(flops_per_token=flops)) == slots


def test_what_a_launch_has_already_stored_stays_while_it_is_run_again(tmp_path, monkeypatch):
    config = tiny(tmp_path)
    whole = arrays(sweep(config, tmp_path / "s"))
    writer = Writer(tmp_path / "s")
    status = writer.status
    status[0, 2, 3] = NOT_COMPUTED
    writer.group["status"][:] = status
    writer.close()
    seen = []
    write_chunks = Writer.write_chunks

    def watched(self, blocks):
        write_chunks(self, blocks)
        done = self.status == DONE
        assert np.isfinite(self.read("first_loss")[done]).all(), "a cell that says done has its numbers"
        seen.append(done.sum())

    monkeypatch.setattr("engine.launch.FLUSH", 0.0)
    monkeypatch.setattr(Writer, "write_chunks", watched)
    assert_equal_bits(arrays(sweep(config, tmp_path / "s")), whole)
    assert len(seen) > 1 and seen[0] >= 11 and seen[-1] == 12


def test_missing_cells_alone_are_planned(tmp_path):
    made = setup(tiny(tmp_path))
    (launch,) = made.launches
    status = np.full(made.run.shape, DONE)
    assert len(made.plan.missing(launch, status)) == 0
    status[0, 1, [0, 3]] = NOT_COMPUTED
    [left] = made.plan.work_in(made.plan.missing(launch, status)).trajectories()
    assert [mark.cells for mark in left.marks] == [(4,), (7,)]


def test_more_replicates_train_only_the_missing_ones(tmp_path, monkeypatch):
    config = tiny(tmp_path)
    one = arrays(sweep(config, tmp_path / "s"))
    trained = []
    train = Trainer.train
    monkeypatch.setattr(Trainer, "train", lambda self, work, *rest: trained.append(work) or train(self, work, *rest))
    three = arrays(sweep(config.change(replicates=3), tmp_path / "s"))
    assert {run.hyper["seed"] for work in trained for run in work} == {1, 2}
    assert_equal_bits({name: array[:1] for name, array in three.items()}, one)
    assert_equal_bits(three, arrays(sweep(config.change(replicates=3), tmp_path / "at once")))


def test_supervised_budgets_are_reached_by_every_seed_and_seeds_may_be_added(tmp_path):
    config = tiny(tmp_path, y="lr:log:1e-3:1e-2:2", x="tokens:linear:40:120:3", count="supervised", unique_tokens=60)
    sweep(config, tmp_path / "s")
    store = sweep(config.change(replicates=3), tmp_path / "s")
    counts, unique = store.run.counts, plan.unique_rows(store.run)
    for seed, col in np.ndindex(3, 3):
        steps, rows = store.read("steps")[seed, 0, col], int(unique[seed, 0, 0])
        first = counts[batch_order(seed, len(counts), rows)]
        assert first.sum() >= 60 > first[:-1].sum()
        seen = counts[batch_order(seed, len(counts), 2 * steps, rows)]
        assert seen.sum() >= [40, 80, 120][col] > seen[:-2].sum()
    assert_equal_bits(arrays(store), arrays(sweep(config.change(replicates=3), tmp_path / "at once")))
    again = prepare_stored(store, "cpu").replay(17)
    assert again.weights_digest == store.read("weights_digest")[2, 1, 2]


def test_more_unique_tokens_than_there_are_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"unique_tokens goes up to 200, but the data have 192 \(tokens\) in 24 rows"):
        setup(tiny(tmp_path, unique_tokens=200))


def test_a_resumed_sweep_keeps_the_stored_coordinates(tmp_path):
    store = sweep(tiny(tmp_path), tmp_path / "s")
    group = Writer(tmp_path / "s").group
    moved = store.run.cells.y.values * (1 + 2**-52)  # as the machine had them that began it
    group["lr"][:] = moved
    forget(tmp_path / "s", 1)
    again = sweep(tiny(tmp_path), tmp_path / "s")
    assert again.run.cells.y.values.tobytes() == moved.tobytes()
    assert (again.status == DONE).all()


def test_a_list_of_points_is_swept_and_resumed(tmp_path):
    (tmp_path / "p.csv").write_text("lr,beta1,tokens\n1e-2,0.9,64\n1e-1,0.5,48\n3e-2,0.1,96\n")
    config = tiny(tmp_path).change(y="", x="", tokens=None, points=str(tmp_path / "p.csv"), replicates=2)
    whole = arrays(sweep(config, tmp_path / "s"))
    assert whole["steps"].tolist() == [[4, 3, 6]] * 2 and len(np.unique(whole["weights_digest"])) == 6
    forget(tmp_path / "s", 1)
    assert_equal_bits(arrays(sweep(config, tmp_path / "s")), whole)
    (tmp_path / "p.csv").write_text("lr,beta1,tokens\n1e-2,0.9,64\n1e-1,0.5,48\n4e-2,0.1,96\n")
    with pytest.raises(ValueError, match="holds a sweep with points of other content"):
        sweep(config, tmp_path / "s")


@pytest.mark.parametrize("network", ["gpt", "two_layer"])
def test_the_live_map_and_the_final_one_have_the_same_labels(tmp_path, network):
    config = tiny(tmp_path, y="lr:log:1e-3:1e3:5")
    if network == "two_layer":
        config = make_config(network, y="lr.0:log:1e-1:1e5:9", x="lr.1:log:1e-1:1e5:9", steps=30)
    watched = []
    launched = Progress.launched
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "launched", lambda self, rows: (launched(self, rows), watched.append(self)))
        store = sweep(config, tmp_path / "s", rows_per_launch="2")
    assert np.array_equal(watched[-1].codes(), store.labels(Thresholds()))
    assert len(np.unique(watched[-1].codes())) > 1


DRIVER = """
import json, os, signal, sys, time
plan = json.loads(sys.argv[1])
sys.path.insert(0, plan["tests"])
import numpy as np
import tiny
from pathlib import Path
from engine import launch
from engine.outcome import DONE
from engine.store import open_store
from engine.sweep import main
launch.FLUSH = 0.0
folder = Path(plan["folder"])
# whoever started the tests may ignore signals, as nohup and a shell's & do
signal.signal(signal.SIGINT, signal.default_int_handler)
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)

def fork(path, changes, **environment):
    child = os.fork()
    if child == 0:
        os.environ.update(environment)
        os.dup2(os.open(f"{path}.said", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        words = tiny.flags(tiny.tiny(folder, **changes), path)
        try:
            main([*words, "--rows-per-launch", plan["rows"]])
        except SystemExit as end:
            os._exit(end.code)
        os._exit(0)
    return child

def done(path):
    return (open_store(path).status == DONE) if path.exists() else np.zeros(1, bool)

for kind, delays in plan["delays"].items():
    number, codes = signal.Signals["SIG" + kind].value, []
    for delay in delays:
        child = fork(folder / kind, plan["killed"])
        while not codes and not done(folder / kind).any() and os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.001)  # the first is ended once it has something to keep
        time.sleep(delay)
        os.kill(child, number)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        print(kind, "after", delay, "s:", done(folder / kind).sum(), "cells done", codes, flush=True)
    # one that has not begun to train is ended by the signal itself
    assert codes[0] == (-number if kind == "KILL" else 128 + number) and set(codes[1:]) <= {codes[0], -number, 0}, codes
ranks = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": plan["port"]}
children = [fork(folder / "ranks", plan["ranked"], RANK=str(rank), **ranks) for rank in range(2)]
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""
KILLED = {"y": "lr:log:1e-3:1e30:6", "x": "tokens:linear:32:640:4", "replicates": 2, "schedule": "linear"}
RANKED = {"y": "lr:log:1e-3:1e-1:4", "x": "tokens:linear:32:64:2"}
ROWS = {"rows_per_launch": "2"}


@pytest.fixture(scope="module")
def driven(tmp_path_factory) -> Path:
    """A folder with the stores of sweeps that were killed, interrupted, or shared by two ranks.

    One process imports torch and forks the sweeps, since the import takes longer than all of them. The two
    ranks get the environment that torchrun gives.
    """
    folder = tmp_path_factory.mktemp("driven")
    tests = Path(__file__).parent
    random = np.random.default_rng(os.getpid())
    counts = {"KILL": 4, "INT": 1, "TERM": 1, "HUP": 1}
    delays = {kind: [0.0, *random.uniform(0.05, 1.2, count).round(3).tolist()] for kind, count in counts.items()}
    told = {"tests": str(tests), "folder": str(folder), "delays": delays, "port": str(free_port())}
    told |= {"killed": KILLED, "ranked": RANKED, "rows": "2"}
    environment = os.environ | {"PYTHONPATH": str(tests.parent)}
    command = [sys.executable, "-c", DRIVER, json.dumps(told)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    print(ran.stdout)  # shown if a test fails
    return folder


@pytest.fixture(scope="module")
def whole(driven) -> dict[str, np.ndarray]:
    """What the sweeps that were ended hold when they are not."""
    return arrays(sweep(tiny(driven, **KILLED), driven / "whole", **ROWS))


@pytest.mark.parametrize("kind", ["INT", "TERM", "HUP"])
def test_a_signal_is_one_line_that_says_what_is_kept(driven, kind):
    first, *others = (driven / f"{kind}.said").read_text().splitlines()
    assert int(re.fullmatch(r"interrupted: (\d+) of 48 cells kept, the same command goes on", first)[1]) > 0
    assert all(line.startswith("interrupted: ") for line in others)


@pytest.mark.parametrize("kind", ["KILL", "INT", "TERM", "HUP"])
def test_a_sweep_ended_at_random_moments_and_resumed_equals_the_uninterrupted_one(driven, whole, kind):
    ended = open_store(driven / kind)
    done = ended.status == DONE
    assert np.array_equal(ended.read("weights_digest")[done], whole["weights_digest"][done])
    assert_equal_bits(arrays(sweep(tiny(driven, **KILLED), driven / kind, **ROWS)), whole)
    assert len(np.unique(whole["nonfinite_step"])) > 1, "some of the runs break"


def test_two_ranks_make_the_same_map(driven):
    whole = sweep(tiny(driven, **RANKED), driven / "one", **ROWS)
    assert_equal_bits(arrays(open_store(driven / "ranks")), arrays(whole))


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_a_dry_run_trains_and_stores_nothing(tmp_path, capsys):
    run_sweep(tiny(tmp_path), RunOptions(store=str(tmp_path / "s"), dry_run=True, device="cpu"))
    shown = capsys.readouterr().out
    for part in ("3 x 4 cells", "3 runs serve 12 cells", "3 replicas at once", "FLOPs", "MiB of state", "about"):
        assert part in shown
    assert [file.name for file in tmp_path.iterdir()] == ["chat.jsonl"]


def test_a_dry_run_of_a_begun_sweep_says_what_is_left(tmp_path, capsys):
    config = tiny(tmp_path)
    sweep(config, tmp_path / "s", rows_per_launch="1")
    forget(tmp_path / "s", row=1)
    capsys.readouterr()
    run_sweep(config, RunOptions(store=str(tmp_path / "s"), dry_run=True, device="cpu"))
    shown = capsys.readouterr().out
    assert "1 of them still to train" in shown and "1 runs serve 4 cells" in shown
    run_sweep(config.change(replicates=2), RunOptions(store=str(tmp_path / "s"), dry_run=True, device="cpu"))
    assert "4 runs serve 16 cells" in capsys.readouterr().out  # the row that is left, and another seed's three
    other = config.change(seed=1)
    with pytest.raises(ValueError, match=r"holds a sweep with seed=0\.0, got 1\.0"):
        run_sweep(other, RunOptions(store=str(tmp_path / "s"), dry_run=True, device="cpu"))


def test_a_language_sweep_into_the_store_of_another_network_is_refused(tmp_path):
    sweep(make_config("two_layer", y="lr.0:log:1:2:2", x="lr.1:log:1:2:2", steps=2), tmp_path / "s")
    with pytest.raises(ValueError, match=r"holds a sweep with network='two_layer', got 'gpt'; y='lr\.0:log"):
        sweep(tiny(tmp_path), tmp_path / "s")


def test_progress_counts_every_token_and_every_cell_once(tmp_path, capsys):
    # batches of 1 to 4 in masked pieces of 4, and runs that break: what is counted is what was asked for
    config = tiny(tmp_path, "lr:linear:1e-3:1e30:2", "batch:linear:1:4:4", tokens=320)
    watched = []
    launched = Progress.launched
    Progress.launched, kept = lambda self, rows: (launched(self, rows), watched.append(self)), launched
    try:
        run_sweep(config, RunOptions(store=str(tmp_path / "s"), device="cpu"))
        forget(tmp_path / "s", 1)
        run_sweep(config, RunOptions(store=str(tmp_path / "s"), device="cpu"))
    finally:
        Progress.launched = kept
    first, resumed = watched
    assert first.seen == first.total
    steps = open_store(tmp_path / "s").read("steps")
    assert first.trained == (steps * [1, 2, 3, 4] * 8).sum()
    for watch in watched:
        assert watch.done_before + watch.done == watch.cells == 8
    assert resumed.done == 4 and "8/8 cells" in capsys.readouterr().err
    assert sum(resumed.label_counts().values()) == 8
