"""On a GPU a cell's bits depend on the cell alone: at any width, in any slot, beside anything, again and again.

Letters: R replica (slot).
"""

import gc
from dataclasses import replace

import numpy as np
import pytest
import torch
from engine.trainer import Harvest, Trainer
from tiny import arrays, assert_equal_bits, tiny

from engine import plan, trainer
from engine.config import SweepConfig
from engine.outcome import DONE, NOT_COMPUTED
from engine.replay import compare, replay_cell
from engine.store import Store, Writer, open_store
from engine.sweep import Rank, RunOptions, Setup, prepare, run_sweep

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
    config = tiny(folder, width=128, heads=2, depth=2, context=32, batch=4, data_rows=64)
    return replace(config, **{"x": "tokens:linear:256:5120:4", "tokens": 5120} | changes)


def ready(folder, **changes) -> Setup:
    return prepare(small(folder, **changes), RunOptions(device="cuda"), Rank(0, 1), None)


def run(made: Setup, cell: tuple[int, int], steps: int = STEPS, **own) -> plan.Trajectory:
    hyper = plan.cell_hyper(made.config, 0, 0) | own
    return plan.Trajectory(hyper, steps, (plan.Mark(steps, (cell,)),))


def train(made: Setup, slots: int, work: list[plan.Trajectory]) -> dict[tuple[int, int], Harvest]:
    trainer = Trainer(made.config, made.network, made.corpus, slots, made.device)
    return {cell: h for look in trainer.train(work) for h in look for cell in h.mark.cells}


def bits(harvest: Harvest) -> tuple:
    return harvest.losses.tobytes(), harvest.weights_digest, np.float32(harvest.val_loss).tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_the_same_at_any_width_and_slot_and_beside_anything(tmp_path, kind):
    made = ready(tmp_path, **KINDS[kind])
    alone = bits(train(made, 1, [run(made, (0, 0), lr=1e-2)])[0, 0])
    assert np.isfinite(np.frombuffer(alone[0], np.float32)).all()
    for slots in (2, 3, 5, 16):
        for slot in {0, slots // 2, slots - 1}:
            for neighbour in (3e-3, 1e30):
                work = [run(made, (1, other), lr=neighbour) for other in range(slots)]
                work[slot] = run(made, (0, 0), lr=1e-2)
                assert bits(train(made, slots, work)[0, 0]) == alone, (slots, slot, neighbour)


@pytest.mark.parametrize("kind", KINDS)
def test_updates_beside_the_backward_leave_every_bit(tmp_path, monkeypatch, kind):
    """Clipping and SGD keep theirs after the backward, also in a network that is large enough."""
    made = ready(tmp_path, **KINDS[kind])
    work = [run(made, (0, slot), lr=lr) for slot, lr in enumerate((1e-3, 1e30, 1e-2))]
    after = train(made, 3, work)
    monkeypatch.setattr(trainer, "BESIDE", 0)
    beside = train(made, 3, work)
    assert {cell: bits(harvest) for cell, harvest in beside.items()} == {cell: bits(h) for cell, h in after.items()}


@pytest.mark.parametrize("kind", ["bf16", "fp32"])
def test_a_run_is_the_same_after_a_refill_and_across_looks_of_the_host(tmp_path, kind):
    made = ready(tmp_path, **KINDS[kind])
    alone = train(made, 1, [run(made, (0, 0), 40, lr=1e-2)])[0, 0]
    # slots free up at different steps, some because their run broke; the run goes into the last one to be filled
    work = [run(made, (1, i), 3 + 5 * i, lr=lr) for i, lr in enumerate([1e-3, 1e30, 1e-2, 1e30, 1e-1, 1e-3])]
    later = train(made, 3, [*work, run(made, (0, 0), 40, lr=1e-2)])
    assert bits(later[0, 0]) == bits(alone)
    assert {later[1, i].nonfinite_step >= 0 for i in (1, 3)} == {True}


def on_gpu(config: SweepConfig, path, **options) -> Store:
    run_sweep(config, RunOptions(store=str(path), figures=False, quiet=True, device="cuda", **options))
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
        row, col = map(int, random.integers(store.grid.shape))
        assert compare(store, row, col, replay_cell(store, row, col, "cuda")) == "", (row, col)


def test_slots_and_launches_change_no_bit_of_a_map(tmp_path):
    config = small(tmp_path, schedule="linear", rows_per_launch="3")
    whole = arrays(on_gpu(config, tmp_path / "whole"))
    assert_equal_bits(arrays(on_gpu(config, tmp_path / "few", slots=2)), whole)
    assert_equal_bits(arrays(on_gpu(replace(config, rows_per_launch="1"), tmp_path / "rows")), whole)


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
        made = prepare(small(tmp_path, precision="fp32"), RunOptions(device=device), Rank(0, 1), None)
        losses.append(train(made, 2, [run(made, (0, 0), lr=1e-3)])[0, 0].losses)
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    assert not torch.equal(torch.tensor(losses[0][:1]), torch.tensor(losses[0][-1:]))


def test_a_stack_of_one_after_a_large_one_reads_nothing_beyond_itself(tmp_path):
    """Its kernels are compiled by then, and run while others compile ahead, at the border of the only replica."""
    for slots, width in ((64, 512), (1, 512), (1, 256)):
        made = ready(tmp_path, width=width, heads=4, depth=2)
        train(made, slots, [run(made, (0, 0), lr=1e-3)])
        del made
        gc.collect()
        torch.cuda.empty_cache()  # addresses behind the stack are no longer mapped
    torch.cuda.synchronize()
