"""TRL's arguments as printed train the network that the cell holds, loss by loss."""

import ast
import contextlib
import io

import numpy as np
import pytest
import torch
from synthetic import write_cells
from tiny import setup, sweep, tiny
from torch.func import functional_call
from transformers import TrainingArguments, get_scheduler

from analysis.recommend import print_arguments, recommend
from analysis.trl import LATE, trl_arguments, trl_text
from engine.data.order import batch_order
from engine.store import open_store

STEPS = 24
OF_LENGTH = {"max_length", "packing", "packing_strategy"}  # SFTConfig's own, beside those of TrainingArguments


def printed(found) -> dict:
    """The arguments that a command prints, read back from its text."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        print_arguments(found, None)
    call = ast.parse(out.getvalue()).body[0].value
    return {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}


def plain_loop(config, given: dict, steps: int) -> list[float]:
    """Losses of a torch loop made of the printed arguments alone; the data and the initial weights are the cell's."""
    made = setup(config)
    corpus, module = made.corpus, made.network.module
    assert given["optim"] == "adamw_torch" and given["max_length"] == corpus.tokens.shape[1]
    weights = {name: w.clone().requires_grad_() for name, w in made.network.initial(given["seed"]).items()}
    optimizer = torch.optim.AdamW(
        list(weights.values()),
        lr=given["learning_rate"],
        betas=(given["adam_beta1"], given["adam_beta2"]),
        eps=given["adam_epsilon"],
        weight_decay=given["weight_decay"],
    )
    scheduler = get_scheduler(
        given["lr_scheduler_type"], optimizer, given["warmup_steps"], given["max_steps"], given["lr_scheduler_kwargs"]
    )
    batch = given["per_device_train_batch_size"] * given["gradient_accumulation_steps"]
    order = batch_order(given["seed"], len(corpus.tokens), batch * steps)
    smoothing = {"label_smoothing": torch.tensor(given["label_smoothing_factor"])}
    losses = []
    for step in range(steps):
        rows = order[step * batch : (step + 1) * batch]
        tokens, targets = (torch.tensor(array[rows], dtype=torch.int64) for array in (corpus.tokens, corpus.targets))
        key = torch.zeros(3, dtype=torch.int64)
        loss = functional_call(module, weights, (tokens, targets, smoothing, key)) / (targets >= 0).sum()
        optimizer.zero_grad()
        loss.backward()
        if given["max_grad_norm"]:
            torch.nn.utils.clip_grad_norm_(list(weights.values()), given["max_grad_norm"])
        optimizer.step()
        scheduler.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize(
    "changes",
    [
        {"weight_decay": 0.1, "clip": 0.5},
        {"schedule": "cosine", "floor": 0.1, "beta1": 0.8},
        {"schedule": "wsd", "decay": 0.25, "label_smoothing": 0.1},
    ],
)
def test_a_torch_loop_of_the_printed_arguments_has_the_stored_losses(changes, tmp_path):
    axes = {"y": "lr:log:1e-3:1e-2:3", "x": f"tokens:lin:64:{16 * STEPS}:2", "validation_rows": 8}
    config = tiny(tmp_path, **axes, **changes)
    found = recommend(sweep(config, tmp_path / "s"))
    given = printed(found)
    assert given["max_steps"] == STEPS
    assert given.keys() <= {*TrainingArguments.__dataclass_fields__, *OF_LENGTH}
    stored = found.store.read("losses")[(0, *found.cell())][:20]
    # fp32 on one CPU, sums in another order: an ulp of a loss, 5e-7, grows over 20 steps of AdamW
    np.testing.assert_allclose(plain_loop(config, given, 20), stored, rtol=2e-4)
    assert stored[-1] < stored[0] - 0.1  # they have trained meanwhile


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"init_scale": 0.5}, "init_scale 0.5"),
        ({"lr.mlp": 1e-3}, "lr.mlp"),
        ({"freeze": "embedding"}, "freeze embedding"),
        ({"optimizer": "sgd"}, "optimizer sgd"),
    ],
)
def test_what_trl_cannot_say_is_refused(changes, says, tmp_path):

    write_cells(tmp_path / "s", tiny(tmp_path, validation_rows=4, trace="off", **changes), {})
    with pytest.raises(ValueError, match=says):
        trl_arguments(open_store(tmp_path / "s"), (0, 0))


def test_a_warm_up_that_runs_a_step_behind_is_said(tmp_path):

    write_cells(tmp_path / "s", tiny(tmp_path, validation_rows=4, trace="off", warmup=0.5), {})
    given = trl_arguments(open_store(tmp_path / "s"), (0, 3))
    assert given["lr_scheduler_type"] == "constant_with_warmup" and given["warmup_steps"] == 3
    assert LATE in trl_text(given)
