"""The slot engine: company, refills, accumulation, marks, and numbers that must not drift.

Letters: R replica (slot), B batch, T time, S step.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from engine.trainer import LAST, Harvest, Trainer
from tiny import setup, tiny

from engine import plan
from engine.data import batch_order

CPU = torch.device("cpu")
# another number of slots sums stacked products in another order: fp32 ulps, raised by Adam's division in the
# first steps and by training on top of them
CLOSE = {"rtol": 1e-4, "atol": 0}


def train(config, slots: int, work: list[plan.Trajectory] | None = None) -> tuple[Trainer, dict[tuple, Harvest]]:
    """Every harvest of a sweep's cells, trained in that many slots."""
    made = setup(config)
    trainer = Trainer(made.config, made.network, made.corpus, slots, CPU)
    work = plan.trajectories(made.config, range(made.config.grid.shape[0])) if work is None else work
    cells = {}
    for look in trainer.train(work):
        for harvest in look:
            for cell in harvest.mark.cells:
                assert cell not in cells
                cells[cell] = harvest
    return trainer, cells


def run(config, steps: int, cell: tuple[int, int], **own) -> plan.Trajectory:
    """A trajectory of its own hyper-parameters with one mark."""
    hyper = plan.cell_hyper(config, 0, 0) | own
    return plan.Trajectory(hyper, steps, (plan.Mark(steps, (cell,)),))


def test_a_nan_neighbour_leaves_a_replicas_bits_unchanged(tmp_path):
    made = setup(tiny(tmp_path, tokens=16 * 12, x="clip:log:1:2:2", micro_batch=1))
    ends = []
    for neighbour in (1e-3, 1e30):
        trainer = Trainer(made.config, made.network, made.corpus, 3, CPU)
        work = [run(made.config, 12, (0, slot), lr=lr) for slot, lr in enumerate([neighbour, 1e-2, neighbour])]
        harvests = {h.slot: h for look in trainer.train(work) for h in look}
        ends.append((harvests[1], trainer.stack.master_RP[1].clone()))
        assert (harvests[0].nonfinite_step >= 0) == (harvests[2].nonfinite_step >= 0) == (neighbour > 1)
    (calm, calm_weights), (beside_nan, beside_nan_weights) = ends
    assert calm.losses.tobytes() == beside_nan.losses.tobytes() and np.isfinite(calm.losses).all()
    assert calm.weights_digest == beside_nan.weights_digest and calm.val_loss == beside_nan.val_loss
    assert torch.equal(calm_weights, beside_nan_weights)


def test_a_run_that_breaks_stops_there_and_is_measured_for_all_its_cells(tmp_path):
    config = tiny(tmp_path, y="lr:linear:1e-2:1e30:2")
    _, cells = train(config, 2)
    steps = [cells[1, col].mark.step for col in range(4)]
    broke = cells[1, 3].nonfinite_step
    assert 0 <= broke < steps[-1]
    for col, step in enumerate(steps):
        harvest = cells[1, col]
        assert len(harvest.losses) == step
        if step > broke:
            assert harvest.nonfinite_step == broke and harvest.steps == broke + 1
            assert np.isfinite(harvest.losses[:broke]).all() and np.isnan(harvest.losses[broke + 1 :]).all()
        else:
            assert harvest.nonfinite_step == -1 and harvest.steps == step
        assert cells[0, col].nonfinite_step == -1 and cells[0, col].steps == step
    assert cells[1, 3].weights_digest == cells[1, 2].weights_digest, "the weights stay as they broke"


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_cells_are_the_same_with_fewer_slots_than_runs(tmp_path, slots):
    config = tiny(tmp_path, x="tokens:linear:16:96:4", schedule="linear", y="lr:log:1e-3:1e-1:3")
    _, wide = train(config, 12)
    trainer, narrow = train(config, slots)
    assert wide.keys() == narrow.keys() and len(wide) == 12
    for cell, harvest in wide.items():
        other = narrow[cell]
        assert (harvest.mark, harvest.steps, harvest.nonfinite_step) == (other.mark, other.steps, other.nonfinite_step)
        np.testing.assert_allclose(other.losses, harvest.losses, **CLOSE)
        np.testing.assert_allclose(other.val_loss, harvest.val_loss, **CLOSE)
    assert trainer.trained == 3 * (1 + 3 + 5 + 6)  # steps of the 12 runs


def test_slots_stay_busy_over_runs_of_very_different_length():
    """95% of the slots' micro-steps train, whatever the lengths; the host's part alone, without the arithmetic."""
    random = np.random.default_rng(0)
    lengths = np.sort(np.exp(random.uniform(0, np.log(1000), 600)).astype(int) + 1)[::-1]

    class Hollow(Trainer):
        """A trainer whose steps take no time."""

        def __init__(self, slots: int) -> None:
            self.slots, self.micro_batch, self.config = slots, 1, tiny_config
            self.left, self.occupants = np.zeros(slots, np.int64), [None] * slots
            self.tokens_each = np.ones(slots)
            self.trained = self.spent = 0
            self.nonfinite_R = torch.full((slots,), -1)
            self.stop_R = torch.zeros(slots)
            self.finished = []

        def fill(self, slot, trajectory):
            self.occupants[slot] = (trajectory, 0)
            self.left[slot] = trajectory.steps

        def run(self, count):
            assert count >= 1

        def read_off(self, ready, nonfinite_R):
            self.finished += [self.occupants[slot][0] for slot in ready]
            return []

    tiny_config = type("Config", (), {"context": 1})()
    hollow = Hollow(32)
    hyper = {"batch": 1}
    work = [plan.Trajectory(hyper, int(n), (plan.Mark(int(n), ((0, i),)),)) for i, n in enumerate(lengths)]
    for _ in hollow.train(work):
        pass
    assert len(hollow.finished) == len(work)
    assert hollow.trained == lengths.sum()
    assert hollow.trained / hollow.spent >= 0.95


def test_slots_of_a_real_stack_stay_busy(tmp_path):
    config = tiny(tmp_path, y="lr:log:1e-3:1e-2:4", x="tokens:log:8:1000:10", schedule="linear", batch=1, width=8)
    trainer, cells = train(config, 6)
    assert len(cells) == 40
    assert trainer.trained == sum(harvest.steps for harvest in cells.values())
    assert trainer.trained / trainer.spent >= 0.95


def gradients_after_one_step(tmp_path, micro_batch: int, batch: int = 5) -> tuple[torch.Tensor, Harvest]:
    """First moments / 0.1 after one step, which are the gradients of the whole batch."""
    made = setup(tiny(tmp_path, batch=batch, tokens=8 * batch, micro_batch=micro_batch, x="clip:log:1:2:2"))
    trainer = Trainer(made.config, made.network, made.corpus, 1, CPU)
    [[harvest]] = trainer.train([run(made.config, 1, (0, 0), lr=1e-2, clip=0.0)])
    return trainer.state.first_RP[0] * 10, harvest


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 4])
def test_accumulated_gradients_equal_one_big_batch(tmp_path, micro_batch):
    # batches of 5 in pieces of 2, 3 or 4: the last piece has rows of its own masked out
    whole, at_once = gradients_after_one_step(tmp_path, 5)
    pieces, in_pieces = gradients_after_one_step(tmp_path, micro_batch)
    # sums of up to 40 tokens in another order: fp32 rounding of the largest gradient
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-6 * whole.abs().max().item())
    assert in_pieces.first_loss == pytest.approx(at_once.first_loss, rel=1e-6)


def test_masked_rows_contribute_exactly_nothing(tmp_path):
    made = setup(tiny(tmp_path, batch=3, tokens=48, micro_batch=2, x="clip:log:1:2:2"))
    ends = []
    for filler in (0, 200):
        trainer = Trainer(made.config, made.network, made.corpus, 1, CPU)
        # the fourth place of the stream is the row the mask hides in the first step
        hidden = int(trainer.order[0, 3])
        assert hidden not in trainer.order[0, :3].tolist()
        trainer.tokens = trainer.tokens.clone()
        trainer.tokens[hidden] = filler
        [[harvest]] = trainer.train([run(made.config, 1, (0, 0), lr=1e-2)])
        ends.append((harvest.losses.tobytes(), harvest.weights_digest))
    assert ends[0] == ends[1]


@pytest.mark.parametrize("batch", [1, 2, 3, 7])
def test_a_step_sees_its_own_rows_of_the_stream(tmp_path, batch):
    made = setup(tiny(tmp_path, x="batch:linear:1:7:7", tokens=400))
    trainer = Trainer(made.config, made.network, made.corpus, 2, CPU)
    trainer.fill(1, run(made.config, 7, (0, 0), batch=batch, tokens=400.0))
    order = batch_order(0, len(made.corpus.tokens), 100)
    for step in range(7):
        rows = order[step * batch : (step + 1) * batch]
        seen = []
        for micro in range(-(-batch // trainer.micro_batch)):
            trainer.step_R[1], trainer.micro_R[1] = step, micro
            tokens, targets, count = trainer.gather()
            real = min(batch - micro * trainer.micro_batch, trainer.micro_batch)
            seen.append(tokens[1, :real])
            assert (targets[1, real:] == -100).all()
            assert count[1] == made.corpus.supervised[rows].sum()
        assert np.array_equal(torch.cat(seen).numpy(), made.corpus.tokens[rows])


def test_losses_and_means_are_those_of_the_steps(tmp_path):
    _, cells = train(tiny(tmp_path, x="tokens:linear:16:640:3"), 3)
    for harvest in cells.values():
        assert len(harvest.losses) == harvest.mark.step == harvest.steps
        assert harvest.first_loss == harvest.losses[0]
        assert harvest.last_loss == pytest.approx(harvest.losses[-LAST:].mean(dtype=np.float64), rel=1e-12)
    long, short = cells[0, 2].losses, cells[0, 1].losses
    assert long[: len(short)].tobytes() == short.tobytes(), "one run, read off at several marks"


def test_held_out_loss_is_the_mean_over_the_held_out_targets(tmp_path):
    made = setup(tiny(tmp_path, label_smoothing=0.3))
    trainer = Trainer(made.config, made.network, made.corpus, 2, CPU)
    for slot in (0, 1):
        trainer.stack.load(slot, trainer.stack.flatten(made.network.initial(slot), 1.0))
        weights = made.network.initial(slot)
        tokens, targets = map(torch.from_numpy, (made.corpus.validation_tokens, made.corpus.validation_targets))
        total = torch.func.functional_call(made.network.module, weights, (tokens, targets, torch.tensor(0.0)))
        expected = float(total) / int((targets >= 0).sum())
        assert float(trainer.evaluate(torch.tensor([slot]))) == pytest.approx(expected, rel=1e-6)


def test_the_seed_decides_weights_and_order(tmp_path):
    _, cells = train(tiny(tmp_path, y="seed:linear:0:2:3", x="tokens:linear:32:64:2"), 3)
    assert len({cells[row, 1].weights_digest for row in range(3)}) == 3
    assert len({cells[row, 1].first_loss for row in range(3)}) == 3
    _, fixed = train(tiny(tmp_path, seed=2, y="lr:log:1e-3:2e-3:2", x="tokens:linear:32:64:2"), 2)
    np.testing.assert_allclose(fixed[0, 1].losses, cells[2, 1].losses, **CLOSE)


def test_a_hyper_parameter_that_is_swept_changes_the_run(tmp_path):
    base = replace(tiny(tmp_path), y="lr:log:1e-2:2e-2:2", tokens=96)
    for axis in ("clip:log:0.01:10:2", "weight_decay:linear:0:5:2", "beta1:linear:0:0.9:2", "beta2:linear:0.5:0.9:2",
                 "warmup:linear:0:0.5:2", "init_scale:log:0.5:2:2", "label_smoothing:linear:0:0.5:2",
                 "lr.mlp:log:1e-3:1:2", "lr.embedding:log:1e-3:1:2", "lr.attention:log:1e-3:1:2"):  # fmt: skip
        _, cells = train(replace(base, x=axis), 4)
        assert cells[0, 0].weights_digest != cells[0, 1].weights_digest, axis


GOLDEN = (
    (5.7688422, 5.7696462, 5.7531366, 5.7208586, 5.7110476),
    (5.7688422, 5.7676382, 5.5327296, 4.8805199, 4.5864167),
)
GOLDEN_VALIDATION = (5.7284293, 4.8431654)


def test_golden_losses(tmp_path):
    """Losses of a fixed run, so that a change of any operator, optimizer, order or initial weight shows.

    1e-5 relative: another processor or torch sums in another order (1e-7 a step), and 12 steps at a small
    learning rate do not raise that beyond 1e-6.
    """
    config = tiny(tmp_path, y="lr:log:1e-3:1e-2:2", x="tokens:linear:16:192:2", weight_decay=0.1, clip=1.0)
    _, cells = train(replace(config, schedule="cosine", floor=0.1, warmup=0.25, heads=2, depth=2), 4)
    got = np.stack([cells[row, 1].losses[[0, 1, 3, 7, 11]] for row in (0, 1)])
    np.testing.assert_allclose(got, GOLDEN, rtol=1e-5)
    assert [cells[row, 1].val_loss for row in (0, 1)] == pytest.approx(GOLDEN_VALIDATION, rel=1e-5)
