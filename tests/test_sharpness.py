"""Critical sharpness: 2 over the critical rate, on quadratics of known curvature and on trained networks."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from tiny import setup, sweep, tiny

from analysis.stability import draw_stability, excesses
from engine.config import make_config, resolve
from engine.optim import OPTIMIZERS
from engine.plan import Mark, Trajectory, hyper_of
from engine.sharpness import along_the_update, critical_sharpness, first_rise

CURVATURES = torch.tensor([0.5, 3.0, 40.0, 700.0])


@pytest.mark.parametrize("curvature", [1e-3, 2.0, 5e4])
@pytest.mark.parametrize("start", [1e-4, 1.0, 30.0])
def test_on_a_parabola_it_is_two_over_the_curvature_in_some_ten_calls(curvature, start):
    calls = []

    def loss(rate):
        calls.append(rate)
        return 0.5 * curvature * (1 - rate * curvature) ** 2

    assert first_rise(loss, start) == pytest.approx(2 / curvature, rel=0.01)
    assert len(calls) <= 10 + 2 * math.log2(1 + abs(math.log(2 / curvature / start, 4)))


def test_the_edges_of_the_search():
    assert first_rise(lambda rate: -rate, 1.0) == math.inf
    assert first_rise(lambda rate: rate, 1.0) == 0.0
    assert first_rise(lambda rate: -rate if rate < 7 else math.nan, 1.0) == pytest.approx(7, rel=0.01)


class Quadratic(torch.nn.Module):
    """Half the curvatures times the squared weights, as a mean over targets."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(len(CURVATURES), device="meta"))

    def forward(self, tokens_BT, targets_BT, hyper, key_3, by_row=False):
        mean = 0.5 * (CURVATURES * self.w.square()).sum()
        return mean * (targets_BT >= 0).sum(1) if by_row else mean * (targets_BT >= 0).sum()


@pytest.mark.parametrize("axis", range(len(CURVATURES)))
def test_the_plain_gradient_along_an_eigenvector_finds_its_curvature(tmp_path, axis):
    made = setup(tiny(tmp_path, optimizer="sgd", clip=0.1))
    network = made.network._replace(
        module=Quadratic(),
        shapes={"w": (len(CURVATURES),)},
        groups={"w": ("mlp",)},
        fused={},
        initial=lambda seed: {"w": torch.eye(len(CURVATURES))[axis]},
    )
    trainer = replace(made, network=network).new_trainer(2)
    hyper = {name: float(values[0]) for name, values in hyper_of(made.run, np.zeros(1, int)).items()}
    trainer.fill(1, Trajectory(hyper, 2, (Mark(2, (0,)),)))
    # clipping shortens the direction, so the rate along it is longer by the same factor
    scale = min(1.0, 0.1 / CURVATURES[axis].item())
    assert critical_sharpness(trainer, 1) == pytest.approx(CURVATURES[axis].item() * scale, rel=0.01)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw,matrix=normuon"])
def test_the_loss_falls_below_the_critical_rate_and_rises_beyond(tmp_path, optimizer):
    made = setup(tiny(tmp_path, optimizer=optimizer, weight_decay=0.1, lr=1e-3, y="warmup:linear:0:0.5:2"))
    trainer = made.new_trainer(4)
    work = made.plan.work_in(np.arange(made.plan.steps.size)).trajectories()
    next(trainer.train(work))
    before = [buffer.clone() for buffer in (trainer.stack.master_RP, *trainer.buffers)]
    loss, peak = along_the_update(trainer, 0)
    rate = 2 / critical_sharpness(trainer, 0)
    assert peak == pytest.approx(1e-3) and 0 < rate < math.inf
    assert loss(rate / 1.05) < loss(0.0) < loss(rate * 1.05)
    after = (trainer.stack.master_RP, *trainer.buffers)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_it_is_stored_where_it_is_asked_for(tmp_path):
    config = tiny(tmp_path, y="lr:log:1e-3:1e30:2", measure="sharpness")
    stored = sweep(config, tmp_path / "s").read("sharpness")
    assert np.isfinite(stored[:, 0]).all() and (stored[:, 0] > 0).all() and np.isnan(stored[:, 1, -1]).all()
    assert "sharpness" not in sweep(config.change(measure=""), tmp_path / "t").specs
    with pytest.raises(ValueError, match="measure is 'losses'; expected one of sharpness"):
        resolve(make_config(measure="losses"), "cpu")


@pytest.mark.parametrize(("momentum", "averaged"), [(0.0, False), (0.9, False), (0.5, True), (0.9, True)])
@pytest.mark.parametrize("beyond", [0.99, 1.01])
def test_the_edges_are_where_steps_along_a_parabola_grow(momentum, averaged, beyond):
    """Of heavy-ball momentum, and of Adam's averaged one behind a frozen preconditioner."""
    hyper = {"lr": 0.1, "momentum": momentum, "beta1": momentum}
    curvature = beyond * OPTIMIZERS["adamw" if averaged else "sgd"].edge(hyper)
    x, velocity = 1.0, 0.0
    for _ in range(20_000):
        velocity = momentum * velocity + (1 - momentum if averaged else 1) * curvature * x
        x -= hyper["lr"] * velocity
        if abs(x) > 1e6:
            break
    assert (abs(x) > 1e6) == (beyond > 1)


def test_a_map_shows_the_lines_that_cross_it(tmp_path):
    store = sweep(tiny(tmp_path, y="lr:log:1e-4:1e2:6", measure="sharpness"), tmp_path / "s").replicate(0)
    critical, edge = excesses(store)
    sharpness, rate = store.read("sharpness"), store.run.column("lr")[0]
    np.testing.assert_allclose(np.exp(critical), sharpness * rate / 2, rtol=1e-6)
    np.testing.assert_allclose(np.exp(edge), sharpness * rate / 38, rtol=1e-6)
    axes = Figure().subplots()
    draw_stability(axes, store)
    assert "rate = critical rate" in axes.get_legend_handles_labels()[1]
    assert any(critical.min() < 0 < critical.max() and len(each.get_paths()) for each in axes.collections)
