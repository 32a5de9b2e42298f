"""On a GPU a cell's bits depend on the cell alone: at any width, in any slot, beside anything, again and again.

Letters: R replica (slot).
"""

import gc

import numpy as np
import pytest
import torch
from tiny import arrays, assert_equal_bits, tiny

from engine import plan, step
from engine.api import prepare, run_sweep
from engine.config import SweepConfig, cells_of
from engine.options import RunOptions
from engine.outcome import DONE, NOT_COMPUTED
from engine.replay import compare, replay_cell
from engine.step import Measured
from engine.store import Store, Writer, open_store
from engine.workload import Setup

pytestmark = pytest.mark.gpu

STEPS = 12
KINDS = {
    "bf16": {"precision": "bf16"},
    "fp32": {"precision": "fp32"},
    "clipped": {"precision": "bf16", "clip": 0.5, "schedule": "cosine"},
    "accumulated": {"precision": "bf16", "batch": 5, "micro_batch": 2},
    "sgd": {"precision": "bf16", "optimizer": "sgd", "momentum": 0.9},
}


def small(folder, **changes) -> SweepConfig:
    """Two layers, 128 wide, on the GPU's own tiles."""
    shape = {"width": 128, "heads": 2, "depth": 2, "context": 32, "data_rows": 64}
    shape |= {"x": "tokens:linear:256:5120:4", "batch": 4, "tokens": 5120} | changes
    swept = {shape.get(axis, "lr").split(":")[0] for axis in ("x", "y")}
    return tiny(folder, **{name: value for name, value in shape.items() if name not in swept})


def ready(folder, device: str = "cuda", **changes) -> Setup:
    config = small(folder, **changes)
    return prepare(config, cells_of(config), RunOptions(device=device), 1, None)


def run(made: Setup, cell: int, steps: int = STEPS, **own) -> plan.Trajectory:
    hyper = {name: float(values[0]) for name, values in plan.hyper_of(made.run, np.zeros(1, int)).items()}
    return plan.Trajectory(hyper | own, steps, (plan.Mark(steps, (cell,)),))


def train(made: Setup, slots: int, work: list[plan.Trajectory]) -> dict[int, Measured]:
    trainer = made.new_trainer(slots)
    return {cell: each for poll in trainer.train(work) for each in poll for cell in each.mark.cells}


def bits(measured: Measured) -> tuple:
    values = measured.values
    held_out = np.float64([values[name] for name in ("val_loss", "val_first", "val_difference_se")])
    return measured.losses.tobytes(), values["weights_digest"], held_out.tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_the_same_at_any_width_and_slot_and_beside_anything(tmp_path, kind):
    made = ready(tmp_path, **KINDS[kind])
    alone = bits(train(made, 1, [run(made, 0, lr=1e-2)])[0])
    assert np.isfinite(np.frombuffer(alone[0], np.float32)).all()
    for slots in (2, 3, 5, 16):
        for slot in {0, slots // 2, slots - 1}:
            for neighbour in (3e-3, 1e30):
                work = [run(made, 100 + other, lr=neighbour) for other in range(slots)]
                work[slot] = run(made, 0, lr=1e-2)
                assert bits(train(made, slots, work)[0]) == alone, (slots, slot, neighbour)


@pytest.mark.parametrize("kind", KINDS)
def test_updates_beside_the_backward_leave_every_bit(tmp_path, monkeypatch, kind):
    """Clipping and SGD keep theirs after the backward, also in a network that is large enough."""
    made = ready(tmp_path, **KINDS[kind])
    work = [run(made, slot, lr=lr) for slot, lr in enumerate((1e-3, 1e30, 1e-2))]
    after = train(made, 3, work)
    monkeypatch.setattr(step, "COMPUTE_BOUND", 0)
    beside = train(made, 3, work)
    assert {cell: bits(each) for cell, each in beside.items()} == {cell: bits(each) for cell, each in after.items()}


@pytest.mark.parametrize("kind", ["bf16", "fp32"])
def test_a_run_is_the_same_after_a_refill_and_across_polls_of_the_host(tmp_path, kind):
    made = ready(tmp_path, **KINDS[kind])
    alone = train(made, 1, [run(made, 0, 40, lr=1e-2)])[0]
    # slots free up at different steps, some because their run broke; the run goes into the last one to be filled
    work = [run(made, 100 + i, 3 + 5 * i, lr=lr) for i, lr in enumerate([1e-3, 1e30, 1e-2, 1e30, 1e-1, 1e-3])]
    later = train(made, 3, [*work, run(made, 0, 40, lr=1e-2)])
    assert bits(later[0]) == bits(alone)
    assert {later[100 + i].values["nonfinite_step"] >= 0 for i in (1, 3)} == {True}


def on_gpu(config: SweepConfig, path, **options) -> Store:
    run_sweep(config, RunOptions(store=str(path), quiet=True, device="cuda", **options))
    return open_store(path)


SWEEPS = {
    "shared runs": {},
    "cosine": {"schedule": "cosine"},
    "batches": {"x": "batch:linear:1:7:4"},
    "seeds": {"x": "seed:linear:0:3:4"},
    "breaking": {"y": "lr:log:1e-2:1e30:3", "clip": 1.0},
}


@pytest.mark.parametrize("kind", SWEEPS)
def test_random_cells_of_a_sweep_are_replayed_exactly(tmp_path, kind):
    store = on_gpu(small(tmp_path, **SWEEPS[kind]), tmp_path / "s")
    random = np.random.default_rng()
    for _ in range(4):
        row, col = map(int, random.integers(store.run.cells.shape))
        assert compare(store, row, col, replay_cell(store, row, col, "cuda")) == "", (row, col)


def test_slots_and_launches_change_no_bit_of_a_map(tmp_path):
    config = small(tmp_path, schedule="linear", replicates=2)
    whole = arrays(on_gpu(config, tmp_path / "whole"))
    assert_equal_bits(arrays(on_gpu(config, tmp_path / "few", slots=2)), whole)
    assert_equal_bits(arrays(on_gpu(config, tmp_path / "rows", rows_per_launch="1")), whole)


def test_a_sweep_resumed_in_the_middle_of_a_launch_is_exact(tmp_path):
    config = small(tmp_path)
    whole = arrays(on_gpu(config, tmp_path / "s"))
    writer = Writer(tmp_path / "s")
    status = writer.status
    random = np.random.default_rng()
    missing = random.random(status.shape) < 0.5
    status[missing] = NOT_COMPUTED
    for name, fill in (("losses", np.nan), ("val_loss", np.nan), ("weights_digest", 0)):
        array = writer.read(name)
        array[missing] = fill
        writer.group[name][:] = array
    writer.group["status"][:] = status
    writer.close()
    store = on_gpu(config, tmp_path / "s")
    assert (store.status == DONE).all()
    assert_equal_bits(arrays(store), whole)


def test_the_gpu_and_the_cpu_tell_the_same_story(tmp_path):
    """Within fp32 rounding over a dozen steps at a small rate, so the kernels train what their references do."""
    losses = []
    for device in ("cuda", "cpu"):
        made = ready(tmp_path, device, precision="fp32")
        losses.append(train(made, 2, [run(made, 0, lr=1e-3)])[0].losses)
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    assert not torch.equal(torch.tensor(losses[0][:1]), torch.tensor(losses[0][-1:]))


def test_a_stack_of_one_after_a_large_one_reads_nothing_beyond_itself(tmp_path):
    """Its kernels are compiled by then, and run while others compile ahead, at the border of the only replica."""
    for slots, width in ((64, 512), (1, 512), (1, 256)):
        made = ready(tmp_path, width=width, heads=4, depth=2)
        train(made, slots, [run(made, 0, lr=1e-3)])
        del made
        gc.collect()
        torch.cuda.empty_cache()  # addresses behind the stack are no longer mapped
    torch.cuda.synchronize()


def test_launches_may_change_between_a_sweep_and_its_resumption(tmp_path):
    config = small(tmp_path)
    whole = arrays(on_gpu(config, tmp_path / "s", rows_per_launch="1"))
    writer = Writer(tmp_path / "s")
    writer.group["status"][:, 1:] = NOT_COMPUTED
    writer.close()
    assert_equal_bits(arrays(on_gpu(config, tmp_path / "s", rows_per_launch="3")), whole)


def test_a_run_at_a_vanishing_rate_measures_its_start_exactly(tmp_path):
    made = ready(tmp_path)
    for slots in (1, 5):
        work = [run(made, cell, lr=rate) for cell, rate in enumerate([0.0, 1e-2, 0.0, 1e-1, 0.0][:slots])]
        for cell, each in train(made, slots, work).items():
            still = each.values["val_loss"] == each.values["val_first"]
            assert still == (cell % 2 == 0)


def test_frozen_groups_and_mixed_optimizers_are_batch_invariant(tmp_path):
    made = ready(tmp_path, freeze="embedding", optimizer="adamw,mlp=sgd")
    alone = bits(train(made, 1, [run(made, 0, lr=1e-2)])[0])
    beside = train(made, 5, [run(made, cell, lr=rate) for cell, rate in ((1, 1e30), (2, 1e-3), (0, 1e-2), (3, 1e-1))])
    assert bits(beside[0]) == alone
