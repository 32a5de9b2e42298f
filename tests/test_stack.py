"""Stacked replicas against the same module trained alone with torch's own optimizers.

Letters: R replica, B batch, T time, S step, V vocabulary.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import setup, tiny
from torch.func import functional_call

from engine import plan
from engine.models import gpt, llama, normal_weights, parameter_shapes
from engine.schedule import multiplier
from engine.stack import ALIGNMENT, Stack
from engine.step import Trainer, frozen_parameters

CPU = torch.device("cpu")
KEY = torch.zeros(3, dtype=torch.int64)
# a stacked product sums in another order than a lone one: a few fp32 ulps (6e-8 each) a step, which Adam's
# division by the root of a tiny second moment can raise tenfold in the first steps
LOSSES = {"rtol": 2e-5, "atol": 0}
STEPS = 5


GROUPS = ("attention", "mlp", "embedding", "unembedding")
# every group has a rate of its own, which each replica sets
SWEPT = {"y": "weight_decay:lin:0:1:2", "x": "beta1:lin:0:0.9:2", "tokens": 16 * STEPS}
SWEPT |= {f"lr.{group}": 1e-2 for group in GROUPS}


def hyper_of(made, **own) -> dict:
    hyper = {name: float(values[0]) for name, values in plan.hyper_of(made.run, np.zeros(1, int)).items()}
    rates = {f"lr.{group}": own.get("lr.matrix", own["lr"]) for group in ("attention", "mlp")}
    return hyper | rates | {"lr.embedding": own["lr"], "lr.unembedding": own["lr"]} | own


REPLICAS = (
    {"lr": 1e-2},
    {"lr": 3e-3, "weight_decay": 0.3, "beta1": 0.5, "beta2": 0.7},
    {"lr": 1e-2, "clip": 0.05},
    {"lr": 1e-2, "warmup": 0.6, "init_scale": 0.5},
    {"lr": 1e-2, "label_smoothing": 0.2, "lr.mlp": 1e-3, "lr.embedding": 0.1},
    {"lr": 1e-2, "lr.matrix": 1e-3, "lr.attention": 3e-2, "lr.unembedding": 2e-3, "clip": 1e9},
)


def alone(trainer: Trainer, made, hyper: dict, optimizer: str) -> list[float]:
    """Losses of one replica trained in plain PyTorch on the trainer's corpus."""
    network, training = trainer.network, made.run.config.training
    initial = network.initial(int(hyper["seed"]))
    scale = hyper["init_scale"]
    weights = {n: (w * scale if w.ndim > 1 else w).clone().requires_grad_() for n, w in initial.items()}
    groups, peaks = [], []
    for name in frozen_parameters(made.run.config, network):
        weights[name].requires_grad_(False)
    for name, weight in weights.items():
        peaks.append(hyper[f"lr.{network.groups[name][0]}"])
        groups.append({"params": [weight], "lr": peaks[-1]})
    if optimizer == "adamw":
        betas = (hyper["beta1"], hyper["beta2"])
        step = torch.optim.AdamW(groups, betas=betas, eps=hyper["eps"], weight_decay=hyper["weight_decay"])
    else:
        step = torch.optim.SGD(groups, momentum=hyper["momentum"])
    losses = []
    for s in range(STEPS):
        batch = int(hyper["batch"])
        rows = trainer.order_of(int(hyper["seed"]), np.inf)[s * batch : (s + 1) * batch]
        tokens, targets = trainer.tokens[rows], trainer.targets[rows]
        smoothing = {"label_smoothing": torch.tensor(hyper["label_smoothing"], dtype=torch.float32)}
        loss = functional_call(network.module, weights, (tokens, targets, smoothing, KEY)) / (targets >= 0).sum()
        step.zero_grad()
        loss.backward()
        if hyper["clip"]:
            torch.nn.utils.clip_grad_norm_(list(weights.values()), hyper["clip"])
        own = {name: torch.tensor([hyper[name]], dtype=torch.float64) for name in ("warmup", "decay", "floor")}
        share = float(multiplier(training.schedule, torch.tensor([s]), torch.tensor([STEPS]), own))
        for group, peak in zip(step.param_groups, peaks, strict=True):
            group["lr"] = peak * share
        step.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("changes", [{}, {"schedule": "cosine", "floor": 0.1}, {"depth": 2, "heads": 2, "kv_heads": 1}])
def test_each_replica_of_a_stack_trains_as_alone_under_torch_adamw(tmp_path, changes):
    made = setup(tiny(tmp_path, clip=1.0, warmup=0.01, init_scale=1.0, label_smoothing=0.0, **SWEPT, **changes))
    trainer = made.new_trainer(len(REPLICAS))
    hypers = [hyper_of(made, **({"clip": 0.0} | own)) for own in REPLICAS]
    work = [plan.Trajectory(hyper, STEPS, (plan.Mark(STEPS, (slot,)),)) for slot, hyper in enumerate(hypers)]
    got = {h.slot: h.losses for poll in trainer.train(work) for h in poll}
    expected = np.array([alone(trainer, made, hyper, "adamw") for hyper in hypers])
    np.testing.assert_allclose(np.stack([got[slot] for slot in range(len(hypers))]), expected, **LOSSES)
    # the settings matter: no two replicas trained alike
    assert len({tuple(row) for row in expected}) == len(hypers)


@pytest.mark.parametrize("frozen", ["embedding", "mlp", "attention,unembedding"])
@pytest.mark.parametrize("scales", [(1.0, 1.0, 1.0), (1.0, 0.5, 2.0)])
def test_beside_frozen_parameters_the_others_train_as_alone(tmp_path, frozen, scales):
    """Shared by all replicas where starts are equal, else each its own; a frozen one is no part of the norm."""
    axes = {"x": "init_scale:lin:0.5:2:4"} if len(set(scales)) > 1 else {"init_scale": 1.0}
    rates = {f"lr.{group}" for group in frozen.split(",")}  # refused, as they would change nothing
    fixed = {name: value for name, value in (SWEPT | axes).items() if name not in rates}
    made = setup(tiny(tmp_path, freeze=frozen, clip=1.0, **fixed))
    trainer = made.new_trainer(3)
    assert trainer.stack.shares_frozen == (len(set(scales)) == 1)
    own = zip((0.0, 1e-3, 1e-2), scales, strict=True)
    hypers = [hyper_of(made, lr=1e-2, clip=clip, init_scale=scale) for clip, scale in own]
    work = [plan.Trajectory(hyper, STEPS, (plan.Mark(STEPS, (slot,)),)) for slot, hyper in enumerate(hypers)]
    got = {h.slot: h.losses for poll in trainer.train(work) for h in poll}
    expected = np.array([alone(trainer, made, hyper, "adamw") for hyper in hypers])
    np.testing.assert_allclose(np.stack([got[slot] for slot in range(3)]), expected, **LOSSES)
    # the limits matter: no two replicas trained alike
    assert len({tuple(row) for row in expected}) == 3


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_each_replica_of_a_stack_trains_as_alone_under_torch_sgd(tmp_path, momentum):
    made = setup(tiny(tmp_path, optimizer="sgd", momentum=momentum, clip=1.0, **SWEPT | {"x": "warmup:lin:0:0.5:2"}))
    trainer = made.new_trainer(3)
    hypers = [hyper_of(made, lr=lr, clip=clip) for lr, clip in [(0.1, 0.0), (1.0, 0.0), (1.0, 0.2)]]
    work = [plan.Trajectory(hyper, STEPS, (plan.Mark(STEPS, (slot,)),)) for slot, hyper in enumerate(hypers)]
    got = {h.slot: h.losses for poll in trainer.train(work) for h in poll}
    expected = np.array([alone(trainer, made, hyper, "sgd") for hyper in hypers])
    np.testing.assert_allclose(np.stack([got[slot] for slot in range(3)]), expected, **LOSSES)


def test_parameters_are_aligned_views_that_do_not_overlap(tmp_path):
    made = setup(tiny(tmp_path))
    stack = Stack(made.network, 3, torch.float32, CPU)
    stack.load(1, stack.flatten(made.network.initial(0), 2.0))
    covered = np.zeros(stack.master_RP.shape[1], int)
    for span in stack.spans:
        assert span.slice.start % ALIGNMENT == 0
        covered[span.slice] += 1
        initial = made.network.initial(0)[span.name]
        loaded = stack.views(stack.master_RP, stack.spans)[span.name][1]
        assert torch.equal(loaded, initial * (2.0 if initial.ndim > 1 else 1.0))
    assert covered.max() == 1 and covered.sum() == made.network.parameters
    assert not stack.master_RP[[0, 2]].any(), "only the slot that was asked for is written"


def test_a_mixed_stack_rounds_its_weights_from_the_master(tmp_path):
    made = setup(tiny(tmp_path))
    stack = Stack(made.network, 2, torch.bfloat16, CPU)
    initial = made.network.initial(3)
    stack.load(0, stack.flatten(initial, 1.0))
    assert stack.weight_RP.dtype == torch.bfloat16 and stack.master_RP.dtype == torch.float32
    for name, weight in stack.master_weights(0).items():
        assert torch.equal(weight, initial[name]), "weight and remainder give the master back exactly"
    # nearest bf16: off by at most half a step of 8 significant bits
    assert ((stack.weight_RP.float() - stack.master_RP).abs() <= stack.master_RP.abs() * 2**-8).all()


def test_the_digest_of_a_mixed_stack_is_that_of_its_master(tmp_path):
    made = setup(tiny(tmp_path))
    digests = set()
    for dtype in (torch.bfloat16, torch.float32):
        stack = Stack(made.network, 2, dtype, CPU)
        stack.load(1, stack.flatten(made.network.initial(0), 1.0))
        digests.add(int(stack.digest(torch.tensor([1]))))
    assert len(digests) == 1


def test_the_digest_sees_every_weight_and_where_it_is(tmp_path):
    made = setup(tiny(tmp_path))
    stack = Stack(made.network, 2, torch.float32, CPU)
    for slot in (0, 1):
        stack.load(slot, stack.flatten(made.network.initial(0), 1.0))
    both = torch.tensor([0, 1])
    assert len(set(stack.digest(both).tolist())) == 1
    for span in stack.spans:
        place = span.slice.start + (span.slice.stop - span.slice.start) // 2
        before = stack.master_RP[1, place].clone()
        stack.master_RP[1, place] = before + 1
        assert len(set(stack.digest(both).tolist())) == 2, span.name
        stack.master_RP[1, place] = before
    first = stack.spans[0].slice.start
    stack.master_RP[1, [first, first + 1]] = stack.master_RP[1, [first + 1, first]]
    assert len(set(stack.digest(both).tolist())) == 2


TINY_GPT = gpt.GPTConfig(depth=2, width=24, heads=4, kv_heads=2, context=12, vocabulary=37)
TINY_LLAMA = llama.LlamaConfig(depth=2, width=24, heads=4, kv_heads=2, mlp_width=40, context=12, vocabulary=37)


@pytest.mark.parametrize(("network", "config"), [(gpt.GPT, TINY_GPT), (llama.Llama, TINY_LLAMA)])
def test_a_gradient_is_handed_on_once_and_when_its_weights_are_read_no_more(network, config):
    """Weights made NaN as soon as their gradient is there spoil no other gradient, not even where a head is tied."""
    with torch.device("meta"):
        module = network(config)
    shapes = parameter_shapes(module)
    stack = Stack(
        SimpleNamespace(module=module, shapes=shapes, groups=dict.fromkeys(shapes, ("mlp",)), fused={}),
        2,
        torch.float32,
        CPU,
    )
    for slot in range(2):
        initial = {name: normal_weights(slot, name, shape, 0.3) for name, shape in shapes.items()}
        stack.load(slot, stack.flatten(initial, 1.0))
    tokens_RBT = torch.arange(2 * 3 * 12).view(2, 3, 12) % 37
    keys = KEY.expand(2, 3)
    batch = tokens_RBT, tokens_RBT.roll(1, 2), {"label_smoothing": torch.zeros(2)}, keys, torch.ones(2)
    _, wanted = stack.losses_and_gradients(*batch)
    seen = {}

    def ready(span, gradient):
        assert span.name not in seen
        seen[span.name] = gradient
        stack.weight_RP.data[:, span.slice] = torch.nan  # `data`: autograd must not notice

    _, gradients = stack.losses_and_gradients(*batch, ready)
    for span, before, after in zip(stack.spans, wanted, gradients, strict=True):
        assert before.isfinite().all() and before.any()
        assert torch.equal(before, after) and torch.equal(after, seen[span.name])
    _, again = stack.losses_and_gradients(*batch)
    assert len(seen) == len(again) and all(gradient.isnan().any() for gradient in again)  # the hooks are gone
