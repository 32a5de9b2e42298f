"""Memory: what frozen groups cost, and what happens where the device has less than was predicted."""

import numpy as np
import pytest
import torch
from tiny import setup, tiny

from engine import language
from engine.plan import NOT_COMPUTED
from engine.step import Trainer


def train(made):
    """How often each cell was measured, and its final weights' digest."""
    status = np.full(made.run.shape, NOT_COMPUTED)
    times, digests = np.zeros(made.plan.steps.size, int), np.zeros(made.plan.steps.size, np.uint64)
    for launch in made.launches:
        for results in made.train(launch, status, lambda trained, saved: None):
            for cells, values in results:
                times[cells] += 1
                digests[cells] = values["weights_digest"]
    return times, digests


def run_short_of_memory(monkeypatch, after):
    """Let more than two slots fail with the device's own error once `after` micro-steps have been taken."""
    whole, taken = Trainer.run, []

    def run(trainer, count):
        if trainer.slots > 2 and len(taken) >= after:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        taken.append(count)
        whole(trainer, count)

    monkeypatch.setattr(Trainer, "run", run)


@pytest.mark.parametrize("exact", [True, False])
def test_out_of_memory_halves_the_slots_says_so_and_goes_on(tmp_path, monkeypatch, capsys, exact):
    config = tiny(tmp_path, "lr:log:1e-3:1e1:8", "tokens:linear:32:96:3")
    monkeypatch.setattr(language, "batch_invariant", lambda run, device: exact)
    made = setup(config, slots=4, rows_per_launch="8")
    run_short_of_memory(monkeypatch, after=3)
    times, digests = train(made)
    said = " ".join(capsys.readouterr().err.split())
    assert made.slots == 2 and "4 replicas do not fit into the device's memory: 2 train at once" in said
    assert ("its launch begins again" in said) is not exact
    assert (times == 1).all() if exact else (times >= 1).all()
    if not exact:  # a cell's bits are then those of the width it was trained at
        assert np.array_equal(digests, train(setup(config, slots=2, rows_per_launch="8"))[1])


def test_where_not_even_one_replica_fits_it_is_a_line(tmp_path, monkeypatch):
    made = setup(tiny(tmp_path), slots=1)

    def fails(trainer, count):
        raise torch.OutOfMemoryError("CUDA out of memory (injected)")

    monkeypatch.setattr(Trainer, "run", fails)
    with pytest.raises(ValueError, match="one replica does not fit into the device's memory; lower --context"):
        train(made)


def test_frozen_groups_are_one_copy_without_gradient_or_state_and_the_prediction_says_so(tmp_path):
    whole, frozen = (setup(tiny(tmp_path, **more)) for more in ({}, {"freeze": "embedding,unembedding"}))
    tables = [name for name in frozen.network.shapes if "embedding" in name]
    elements = sum(torch.Size(frozen.network.shapes[name]).numel() for name in tables)
    # fp32: master, gradient, and AdamW's two moments, 4 bytes each; spans are padded to 64 elements
    assert whole.memory.state - frozen.memory.state == pytest.approx(16 * elements, abs=16 * 64 * len(tables))
    trainer = frozen.new_trainer(3)
    assert trainer.stack.frozen_RF.shape[0] == 1
    assert not set(tables) & set(trainer.stack.weights)
    largest = frozen.network.parameters - elements
    for buffer in (trainer.stack.weight_RP, *trainer.buffers):
        assert buffer.shape == (3, buffer.shape[1]) and buffer.shape[1] < largest + 64 * len(frozen.network.shapes)
