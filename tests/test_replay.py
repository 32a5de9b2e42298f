"""Replaying stored cells on the CPU, where the launch is run again: identical, or the first step that is not."""

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tiny import run_command, sweep, tiny

from engine import load_model, replay
from engine.config import make_config
from engine.replay import compare, replay_cell
from engine.store import Writer, open_store

SWEEPS = {
    "shared runs": {},
    "cosine": {"schedule": "cosine", "warmup": 0.2},
    "masked micro-batches": {"x": "batch:linear:1:5:3", "micro_batch": 2},
    "seeds": {"y": "seed:linear:0:3:4"},
    "runs that break": {"y": "lr:log:1e-2:1e30:4", "clip": 1.0},
    "fewer slots than runs": {"schedule": "linear"},
    "momentum": {"optimizer": "sgd", "momentum": 0.9, "y": "lr:log:1e-2:1:3"},
    "no trace": {"trace": "off"},
    "replicates": {"replicates": 3},
    "frozen": {"freeze": "embedding", "optimizer": "adamw,mlp=sgd"},
}


@pytest.mark.parametrize("kind", SWEEPS)
def test_random_cells_are_identical(tmp_path, kind):
    options = {
        "fewer slots than runs": {"slots": 2},
        "cosine": {"rows_per_launch": "2"},
        "seeds": {"rows_per_launch": "3"},
    }
    store = sweep(tiny(tmp_path, **SWEEPS[kind]), tmp_path / "s", **options.get(kind, {}))
    random = np.random.default_rng()
    cells = [tuple(map(int, random.integers(store.run.shape))) for _ in range(3)]
    print("cells", cells)  # shown if the test fails
    for replicate, row, col in cells:
        again = replay_cell(store, row, col, "cpu", replicate)
        assert compare(store, row, col, again, replicate) == ""
        assert again.weights_digest == store.read("weights_digest")[replicate, row, col]
        assert len(again.losses) >= store.read("steps")[replicate, row, col]


def test_the_first_step_that_differs_is_reported(tmp_path):
    store = sweep(tiny(tmp_path), tmp_path / "s")
    again = replay_cell(store, 1, 3, "cpu")
    losses = store.read("losses")
    was = losses[0, 1, 3, 4]
    losses[0, 1, 3, 4] = np.nextafter(was, np.float32(np.inf))
    overwrite(store, "losses", losses)
    assert compare(store, 1, 3, again).startswith(f"first differs at step 4: stored {losses[0, 1, 3, 4]!r}")
    losses[0, 1, 3, 2] = np.nan
    overwrite(store, "losses", losses)
    assert compare(store, 1, 3, again).startswith("first differs at step 2: stored")
    assert compare(store, 0, 3, replay_cell(store, 0, 3, "cpu")) == "", "other cells are as they were"


def test_weights_that_differ_under_equal_losses_are_reported(tmp_path):
    store = sweep(tiny(tmp_path), tmp_path / "s")
    digests = store.read("weights_digest")
    digests[0, 2, 1] += np.uint64(1)
    overwrite(store, "weights_digest", digests)
    assert "the final weights differ" in compare(store, 2, 1, replay_cell(store, 2, 1, "cpu"))


def overwrite(store, name: str, array: np.ndarray) -> None:
    writer = Writer(store.path)
    writer.group[name][:] = array
    writer.close()


def test_the_command_says_identical_and_writes_the_weights(tmp_path, monkeypatch, capsys):
    store = sweep(tiny(tmp_path), tmp_path / "s")
    file = tmp_path / "weights.safetensors"
    cell = ("--store", str(store.path), "--row", "1", "--col", "2")
    code, shown, _ = run_command(monkeypatch, capsys, replay, *cell, "--save-weights", str(file))
    digest = int(store.read("weights_digest")[0, 1, 2])
    assert code == 0 and f"cell (1, 2), 5 steps: identical, weights digest {digest:#018x}" in shown
    weights = load_file(file)
    assert weights["layers.0.mlp.up"].shape == (64, 16) and weights["embedding.weight"].dtype == np.float32
    model, tokens = load_model(file), torch.tensor([[1, 2, 3]])
    assert model.logits(tokens).shape == (1, 3, 320) and model.logits(tokens).dtype == torch.float32
    assert torch.equal(model.weights["embedding.weight"], torch.from_numpy(weights["embedding.weight"]))
    losses = store.read("losses")
    losses[0, 1, 2, 0] += 1
    overwrite(store, "losses", losses)
    code, shown, _ = run_command(monkeypatch, capsys, replay, *cell)
    assert code == 1 and "NOT identical, first differs at step 0" in shown and "off by 1" in shown


def test_a_cell_that_was_never_computed_cannot_be_replayed(tmp_path):
    store = sweep(tiny(tmp_path), tmp_path / "s")
    status = store.status
    status[0, 0, 2] = 0
    overwrite(store, "status", status)
    with pytest.raises(ValueError, match=r"cell \(0, 2\) of .* has not been computed yet; resume its sweep first"):
        replay_cell(open_store(store.path), 0, 2, "cpu")


def test_a_cell_of_the_papers_network_is_identical(tmp_path):
    config = make_config("two_layer", y="lr.0:log:0.1:1e4:3", x="lr.1:log:0.1:1e4:3", steps=20)
    store = sweep(config, tmp_path / "s")
    for row, col in [(0, 0), (1, 2), (2, 1)]:
        assert compare(store, row, col, replay_cell(store, row, col, "cpu")) == ""


def test_a_point_of_a_list_is_identical(tmp_path):
    (tmp_path / "p.csv").write_text("lr,beta1,tokens\n1e-2,0.9,64\n1e-1,0.5,48\n3e-2,0.1,96\n")
    store = sweep(tiny(tmp_path).change(y="", x="", tokens=None, points=str(tmp_path / "p.csv")), tmp_path / "s")
    assert store.run.shape == (1, 3)
    for point in range(3):
        assert compare(store, point, 0, replay_cell(store, point, 0, "cpu")) == ""
    with pytest.raises(ValueError, match=r"cell \(3, 0\) lies outside the list of 3 points"):
        replay_cell(store, 3, 0, "cpu")


def test_what_agrees_is_not_claimed_of_losses_that_are_not_stored(tmp_path):
    store = sweep(tiny(tmp_path, trace="off"), tmp_path / "s")
    digests = store.read("weights_digest")
    digests[0, 2, 1] += np.uint64(1)
    overwrite(store, "weights_digest", digests)
    assert compare(store, 2, 1, replay_cell(store, 2, 1, "cpu")).startswith("no losses are stored, the final weights")
