"""The device's side of training: neighbours, accumulation, marks, and numbers that must not drift.

Letters: R replica (slot), B batch, T time, S step.
"""

import math

import numpy as np
import pytest
import torch
from tiny import setup, tiny

from engine import plan
from engine.data import IGNORED, batch_order
from engine.measure import LAST, RowLosses
from engine.step import Measured, Trainer

CPU = torch.device("cpu")
# another number of slots sums stacked products in another order: fp32 ulps, raised by Adam's division in the
# first steps and by training on top of them
CLOSE = {"rtol": 1e-4, "atol": 0}


def trainer_of(made, slots: int) -> Trainer:
    return made.new_trainer(slots)


def train(config, slots: int, work: list[plan.Trajectory] | None = None) -> tuple[Trainer, dict[tuple, Measured]]:
    """What every cell (row, col) of a sweep measured, trained in that many slots."""
    made = setup(config)
    trainer = trainer_of(made, slots)
    if work is None:
        work = made.plan.work_in(np.arange(made.plan.steps.size)).trajectories()
    cells = {}
    for poll in trainer.train(work):
        for each in poll:
            for cell in each.mark.cells:
                place = tuple(map(int, np.unravel_index(cell, made.run.cells.shape)))
                assert place not in cells
                cells[place] = each
    return trainer, cells


def run(made, steps: int, cell: int = 0, **own) -> plan.Trajectory:
    """A trajectory of its own hyper-parameters with one mark."""
    hyper = {name: float(values[0]) for name, values in plan.hyper_of(made.run, np.zeros(1, int)).items()}
    return plan.Trajectory(hyper | own, steps, (plan.Mark(steps, (cell,)),))


def test_a_nan_neighbour_leaves_a_replicas_bits_unchanged(tmp_path):
    made = setup(tiny(tmp_path, tokens=16 * 12, x="clip:log:1:2:2", micro_batch=1))
    ends = []
    for neighbour in (1e-3, 1e30):
        trainer = trainer_of(made, 3)
        work = [run(made, 12, slot, lr=lr) for slot, lr in enumerate([neighbour, 1e-2, neighbour])]
        measured = {h.slot: h for poll in trainer.train(work) for h in poll}
        ends.append((measured[1], trainer.stack.master_RP[1].clone()))
        assert (
            (measured[0].values["nonfinite_step"] >= 0)
            == (measured[2].values["nonfinite_step"] >= 0)
            == (neighbour > 1)
        )
    (calm, calm_weights), (beside_nan, beside_nan_weights) = ends
    assert calm.losses.tobytes() == beside_nan.losses.tobytes() and np.isfinite(calm.losses).all()
    assert (
        calm.values["weights_digest"] == beside_nan.values["weights_digest"]
        and calm.values["val_loss"] == beside_nan.values["val_loss"]
    )
    assert torch.equal(calm_weights, beside_nan_weights)


def test_a_run_that_breaks_stops_there_and_is_measured_for_all_its_cells(tmp_path):
    config = tiny(tmp_path, y="lr:linear:1e-2:1e30:2")
    _, cells = train(config, 2)
    steps = [cells[1, col].mark.step for col in range(4)]
    broke = cells[1, 3].values["nonfinite_step"]
    assert 0 <= broke < steps[-1]
    for col, step in enumerate(steps):
        each = cells[1, col]
        assert len(each.losses) == step
        if step > broke:
            assert each.values["nonfinite_step"] == broke and each.values["steps"] == broke + 1
            assert np.isfinite(each.losses[:broke]).all() and np.isnan(each.losses[broke + 1 :]).all()
        else:
            assert each.values["nonfinite_step"] == -1 and each.values["steps"] == step
        assert cells[0, col].values["nonfinite_step"] == -1 and cells[0, col].values["steps"] == step
    assert cells[1, 3].values["weights_digest"] == cells[1, 2].values["weights_digest"], (
        "the weights stay as they broke"
    )


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_cells_are_the_same_with_fewer_slots_than_runs(tmp_path, slots):
    config = tiny(tmp_path, x="tokens:linear:32:96:4", schedule="linear", y="lr:log:1e-3:1e-1:3")
    _, wide = train(config, 12)
    trainer, narrow = train(config, slots)
    assert wide.keys() == narrow.keys() and len(wide) == 12
    for cell, each in wide.items():
        other = narrow[cell]
        assert (each.mark, each.values["steps"], each.values["nonfinite_step"]) == (
            other.mark,
            other.values["steps"],
            other.values["nonfinite_step"],
        )
        np.testing.assert_allclose(other.losses, each.losses, **CLOSE)
        np.testing.assert_allclose(other.values["val_loss"], each.values["val_loss"], **CLOSE)
    assert trainer.scheduler.trained == 3 * (2 + 4 + 5 + 6)  # steps of the 12 runs


def test_slots_of_a_real_stack_stay_busy(tmp_path):
    config = tiny(tmp_path, y="lr:log:1e-3:1e-2:4", x="tokens:log:16:1000:10", schedule="linear", batch=1, width=8)
    trainer, cells = train(config, 6)
    assert len(cells) == 40
    assert trainer.scheduler.trained == sum(each.values["steps"] for each in cells.values())
    assert trainer.scheduler.trained / trainer.scheduler.spent >= 0.95


def gradients_after_one_step(tmp_path, micro_batch: int, batch: int = 5) -> tuple[torch.Tensor, Measured]:
    """First moments / 0.1 after one step, which are the gradients of the whole batch."""
    made = setup(tiny(tmp_path, batch=batch, tokens=16 * batch, micro_batch=micro_batch, x="clip:log:1:2:2"))
    trainer = trainer_of(made, 1)
    [[each]] = trainer.train([run(made, 1, lr=1e-2, clip=0.0)])
    return torch.cat([own["first"][0] for own in trainer.state]) * 10, each


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 4])
def test_accumulated_gradients_equal_one_big_batch(tmp_path, micro_batch):
    # batches of 5 in pieces of 2, 3 or 4: the last piece has rows of its own masked out
    whole, at_once = gradients_after_one_step(tmp_path, 5)
    pieces, in_pieces = gradients_after_one_step(tmp_path, micro_batch)
    # sums of up to 40 tokens in another order: fp32 rounding of the largest gradient
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-6 * whole.abs().max().item())
    assert in_pieces.values["first_loss"] == pytest.approx(at_once.values["first_loss"], rel=1e-6)


def test_masked_rows_contribute_exactly_nothing(tmp_path):
    made = setup(tiny(tmp_path, batch=3, tokens=48, micro_batch=2, x="clip:log:1:2:2"))
    ends = []
    for filler in (0, 200):
        trainer = trainer_of(made, 1)
        # the fourth place of the stream is the row the mask hides in the first step
        *seen, hidden = trainer.order_of(0, np.inf)[:4].tolist()
        assert hidden not in seen
        trainer.tokens = trainer.tokens.clone()
        trainer.tokens[hidden] = filler
        [[each]] = trainer.train([run(made, 1, lr=1e-2)])
        ends.append((each.losses.tobytes(), each.values["weights_digest"]))
    assert ends[0] == ends[1]


@pytest.mark.parametrize(("batch", "unique"), [(1, None), (2, None), (3, 5), (7, 3)])
def test_a_step_sees_its_own_rows_of_the_stream(tmp_path, batch, unique):
    made = setup(tiny(tmp_path, x="batch:linear:1:7:7", tokens=400))
    trainer = trainer_of(made, 2)
    tokens = {"unique_tokens": 8.0 * unique} if unique else {}
    trainer.fill(1, run(made, 7, batch=batch, tokens=400.0, **tokens))
    order = batch_order(0, len(made.corpus.tokens), 100, unique)
    assert len(set(order[:50].tolist())) == (unique or len(made.corpus.tokens))
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
    _, cells = train(tiny(tmp_path, x="tokens:linear:32:640:3"), 3)
    for each in cells.values():
        assert len(each.losses) == each.mark.step == each.values["steps"]
        assert each.values["first_loss"] == each.losses[0]
        assert each.values["last_loss"] == pytest.approx(each.losses[-LAST:].mean(dtype=np.float64), rel=1e-12)
    long, short = cells[0, 2].losses, cells[0, 1].losses
    assert long[: len(short)].tobytes() == short.tobytes(), "one run, measured at several marks"


def test_held_out_loss_is_the_mean_over_the_held_out_targets(tmp_path):
    made = setup(tiny(tmp_path, label_smoothing=0.3))
    trainer = trainer_of(made, 2)
    for slot in (0, 1):
        trainer.stack.load(slot, trainer.stack.flatten(made.network.initial(slot), 1.0))
        weights = made.network.initial(slot)
        tokens, targets = map(torch.from_numpy, (made.corpus.validation_tokens, made.corpus.validation_targets))
        unsmoothed = {"label_smoothing": torch.tensor(0.0)}
        call = (tokens, targets, unsmoothed, torch.zeros(3, dtype=torch.int64))
        total = torch.func.functional_call(made.network.module, weights, call)
        expected = float(total) / int((targets >= 0).sum())
        (probe,) = trainer.probe.of_slots(torch.tensor([slot]), trainer.hyper_R, trainer.graphs)
        assert probe.mean == pytest.approx(expected, rel=1e-6)


def test_the_seed_decides_weights_and_order(tmp_path):
    _, cells = train(tiny(tmp_path, y="seed:linear:0:2:3", x="tokens:linear:32:64:2"), 3)
    assert len({cells[row, 1].values["weights_digest"] for row in range(3)}) == 3
    assert len({cells[row, 1].values["first_loss"] for row in range(3)}) == 3
    _, fixed = train(tiny(tmp_path, seed=2, y="lr:log:1e-3:2e-3:2", x="tokens:linear:32:64:2"), 2)
    np.testing.assert_allclose(fixed[0, 1].losses, cells[2, 1].losses, **CLOSE)


def test_a_hyper_parameter_that_is_swept_changes_the_run(tmp_path):
    y = "lr:log:1e-2:2e-2:2"
    for axis in ("clip:log:0.01:10:2", "weight_decay:linear:0:5:2", "beta1:linear:0:0.9:2", "beta2:linear:0.5:0.9:2",
                 "warmup:linear:0:0.5:2", "init_scale:log:0.5:2:2", "label_smoothing:linear:0:0.5:2",
                 "dropout:linear:0:0.5:2",
                 "lr.mlp:log:1e-3:1:2", "lr.embedding:log:1e-3:1:2", "lr.attention:log:1e-3:1:2"):  # fmt: skip
        _, cells = train(tiny(tmp_path, y, axis, tokens=96), 4)
        assert cells[0, 0].values["weights_digest"] != cells[0, 1].values["weights_digest"], axis


def test_dropout_is_drawn_alike_in_any_slot_and_cut_and_left_out_where_off_and_on_the_probe(tmp_path):
    axes = {"y": "dropout:linear:0:0.6:3", "x": "lr:log:1e-2:2e-2:2", "batch": 4, "tokens": 192, "init_scale": 2.0}
    _, whole = train(tiny(tmp_path, micro_batch=4, **axes), 6)
    _, cut = train(tiny(tmp_path, micro_batch=1, **axes), 2)
    for at, cell in whole.items():
        np.testing.assert_allclose(cut[at].losses, cell.losses, **CLOSE)
        assert cell.values["val_first"] == whole[0, 0].values["val_first"]  # nothing is dropped there
    assert whole[1, 0].losses[0] != whole[0, 0].losses[0]
    made = setup(tiny(tmp_path, y="lr:log:1e-2:2e-2:2", dropout=0.0))
    assert "dropout" not in trainer_of(made, 2).names
    assert "dropout" in trainer_of(setup(tiny(tmp_path, **axes)), 2).names


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
    fixed = {
        "weight_decay": 0.1,
        "clip": 1.0,
        "schedule": "cosine",
        "floor": 0.1,
        "warmup": 0.25,
        "heads": 2,
        "depth": 2,
    }
    _, cells = train(tiny(tmp_path, "lr:log:1e-3:1e-2:2", "tokens:linear:32:192:2", **fixed), 4)
    got = np.stack([cells[row, 1].losses[[0, 1, 3, 7, 11]] for row in (0, 1)])
    np.testing.assert_allclose(got, GOLDEN, rtol=1e-5)
    assert [cells[row, 1].values["val_loss"] for row in (0, 1)] == pytest.approx(GOLDEN_VALIDATION, rel=1e-5)


def test_a_run_at_a_vanishing_rate_measures_its_start(tmp_path):
    """Step 0 is evaluated in the shape of a full stack, and so is this mark: the same bits on a CPU too."""
    _, cells = train(tiny(tmp_path, y="lr:linear:0:1:2", x="clip:log:1:2:2", tokens=96), 4)
    for col in (0, 1):
        still = cells[0, col].values
        assert still["val_loss"] == still["val_first"] and still["val_difference_se"] == 0
        assert cells[1, col].values["val_loss"] != still["val_first"]


def test_the_standard_error_is_that_of_means_over_sequences_drawn_anew():
    random = np.random.default_rng(0)
    counts = random.integers(1, 9, 4000)
    sums = counts * 3.0 + random.normal(0, 1, 4000) * counts
    whole = RowLosses(sums, counts, 0)
    drawn = [RowLosses(sums[i], counts[i], 0).mean for i in random.integers(0, 4000, (400, 4000))]
    assert whole.error() == pytest.approx(np.std(drawn), rel=0.1)  # a deviation of 400 draws is known to 3.5%
    assert whole.error(whole.sums - sums) == 0


def test_bits_a_byte_are_the_probes_nats_over_the_bytes_of_its_text(tmp_path):
    config = tiny(tmp_path)
    _, cells = train(config, 3)
    targets = setup(config).corpus.validation_targets
    targets = targets[targets != IGNORED]
    for each in cells.values():
        bits = each.values["val_loss"] * len(targets) / (targets < 256).sum() / math.log(2)  # ids from 256 on are marks
        assert each.values["val_bits_per_byte"] == pytest.approx(bits, rel=1e-12)


def test_extremes_and_noise_of_the_training_losses_are_measured(tmp_path):
    _, cells = train(tiny(tmp_path, x="tokens:linear:32:640:3"), 3)
    for each in cells.values():
        assert each.values["loss_min"] == each.losses.min() and each.values["loss_max"] == each.losses.max()
        assert 0 < each.values["loss_noise"] < 1


@pytest.mark.parametrize("frozen", ["embedding", "embedding,unembedding", "matrix"])
def test_frozen_groups_keep_their_start_and_have_no_state(tmp_path, frozen):
    made = setup(tiny(tmp_path, freeze=frozen))
    trainer = trainer_of(made, 2)
    (poll,) = list(trainer.train([run(made, 3, lr=0.1)]))
    weights, initial = trainer.stack.master_weights(poll[0].slot), made.network.initial(0)
    groups = set(frozen.split(",")) | ({"attention", "mlp"} if frozen == "matrix" else set())
    for name, weight in weights.items():
        assert torch.equal(weight, initial[name]) == (made.network.groups[name][0] in groups), name
    trained = sum(w.numel() for n, w in initial.items() if made.network.groups[n][0] not in groups)
    assert sum(buffer[0].numel() for own in trainer.state for buffer in own.values()) == 2 * trained
    assert trainer.stack.shares_frozen and len(trainer.stack.frozen_RF) == 1


def test_frozen_groups_are_kept_for_each_replica_where_starts_differ(tmp_path):
    made = setup(tiny(tmp_path, y="seed:linear:0:2:3", x="clip:log:1:2:2", freeze="embedding", tokens=48))
    trainer = trainer_of(made, 3)
    work = [run(made, 3, cell, seed=float(cell)) for cell in range(3)]
    measured = {each.mark.cells[0]: each.slot for poll in trainer.train(work) for each in poll}
    for seed, slot in measured.items():
        assert torch.equal(
            trainer.stack.master_weights(slot)["embedding.weight"], made.network.initial(seed)["embedding.weight"]
        )
    assert not trainer.stack.shares_frozen and len(trainer.stack.frozen_RF) == 3


def test_every_group_trains_by_its_own_optimizer(tmp_path):
    losses = {}
    for optimizer in ("adamw", "sgd", "sgd,embedding=adamw", "adamw,matrix=sgd"):
        _, cells = train(tiny(tmp_path, y="lr:log:1e-2:2e-2:2", x="clip:log:1:2:2", tokens=96, optimizer=optimizer), 4)
        losses[optimizer] = cells[0, 0].losses.tobytes()
    assert len(set(losses.values())) == 4


def test_every_scalar_of_an_optimizer_may_be_an_axis(tmp_path):
    for optimizer, axis in (
        ("adamw", "eps:log:1e-8:1:2"),
        ("sgd", "momentum:linear:0:0.9:2"),
        ("adamw", "beta1.mlp:lin:0:0.9:2"),
    ):
        _, cells = train(tiny(tmp_path, "lr:log:1e-2:2e-2:2", axis, tokens=96, optimizer=optimizer), 4)
        assert cells[0, 0].values["weights_digest"] != cells[0, 1].values["weights_digest"], axis
