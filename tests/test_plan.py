"""From cells to trajectories and launches: nothing lost, nothing twice, sharing only where runs are the same."""

import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine import plan
from engine.config import SCHEDULES, SweepConfig, resolve
from engine.grid import HYPER_PARAMETERS

GIB = 2**30

AXES = {
    "lr": "lr:log:1e-3:1e1",
    "lr.matrix": "lr.matrix:log:1e-3:1e1",
    "lr.attention": "lr.attention:log:1e-3:1e1",
    "lr.mlp": "lr.mlp:log:1e-3:1e1",
    "lr.embedding": "lr.embedding:log:1e-3:1e1",
    "lr.unembedding": "lr.unembedding:log:1e-3:1e1",
    "tokens": "tokens:log:700:5000",
    "batch": "batch:linear:1:8",
    "warmup": "warmup:linear:0:0.5",
    "weight_decay": "weight_decay:linear:0:1",
    "beta1": "beta1:linear:0:0.9",
    "beta2": "beta2:linear:0:0.9",
    "clip": "clip:log:0.1:10",
    "init_scale": "init_scale:log:0.1:10",
    "label_smoothing": "label_smoothing:linear:0:0.5",
    "seed": "seed:linear:0:7",
}


def test_every_hyper_parameter_of_a_language_model_is_planned():
    assert set(AXES) == set(plan.LANGUAGE_NAMES) == {n for n, r in HYPER_PARAMETERS.items() if "gpt" in r.networks}


@st.composite
def configs(draw) -> SweepConfig:
    y, x = draw(st.lists(st.sampled_from(sorted(AXES)), min_size=2, max_size=2, unique=True))
    rows, cols = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    warmup = draw(st.sampled_from([0.0, 0.25]))
    schedule = draw(st.sampled_from(SCHEDULES))
    config = SweepConfig(f"{AXES[y]}:{rows}", f"{AXES[x]}:{cols}", schedule=schedule, warmup=warmup)
    return resolve(config, "cpu")


@given(configs(), st.integers(1, 9))
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_trajectories_serve_every_cell_once_at_its_own_last_step(config, rows_per_launch):
    rows, cols = config.grid.shape
    launches = plan.launches(config, rows_per_launch)
    assert [row for launch in launches for row in launch] == list(range(rows))
    assert all(len(launch) <= rows_per_launch for launch in launches)
    served = []
    for launch in launches:
        runs = plan.trajectories(config, launch)
        lengths = [run.steps * run.hyper["batch"] for run in runs]
        assert lengths == sorted(lengths, reverse=True)
        for run in runs:
            steps = [mark.step for mark in run.marks]
            assert steps == sorted(set(steps)) and run.steps == steps[-1] <= plan.longest(config)
            for mark in run.marks:
                for row, col in mark.cells:
                    hyper = plan.cell_hyper(config, row, col)
                    assert row in launch
                    assert mark.step == math.ceil(hyper["tokens"] / (hyper["batch"] * config.context)) >= 1
                    # the cell's run is the trajectory's, up to the cell's last step
                    assert hyper | {"tokens": 0} == run.hyper | {"tokens": 0}
                    if plan.looks_ahead(config):
                        assert run.total == mark.step
                    served.append((row, col))
    assert sorted(served) == [(row, col) for row in range(rows) for col in range(cols)]


@given(configs())
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_runs_are_shared_exactly_where_nothing_looks_ahead(config):
    runs = plan.trajectories(config, range(config.grid.shape[0]))
    shared = any(len(run.marks) > 1 for run in runs)
    budgets = [axis for axis in (config.grid.y, config.grid.x) if axis.name == "tokens" and axis.points > 1]
    sees_the_end = config.schedule != "constant" or config.warmup > 0 or "warmup" in config.swept
    if sees_the_end or not budgets:
        assert not shared
    elif "batch" not in config.swept:
        other = config.grid.y if config.grid.x is budgets[0] or config.grid.x == budgets[0] else config.grid.x
        assert len(runs) == other.points and shared


@pytest.mark.parametrize(("tokens", "steps"), [(256, 1), (257, 2), (512, 2), (16384, 64), (16384.5, 65)])
def test_every_token_asked_for_is_consumed(tokens, steps):
    config = resolve(SweepConfig(y="lr:log:1:2:2", x="seed:linear:0:1:2", tokens=tokens), "cpu")
    assert plan.steps_of(config.tokens, config.batch, config.context) == steps == plan.longest(config)


@pytest.mark.parametrize(
    ("x", "steps"), [("512:512000:4", [2, 20, 200, 2000]), ("2560:163840:7", [10, 20, 40, 80, 160, 320, 640])]
)
def test_round_budgets_of_a_logarithmic_axis_train_no_step_more(x, steps):
    config = resolve(SweepConfig(y="seed:linear:0:1:2", x=f"tokens:log:{x}"), "cpu")
    assert config.values("tokens").tolist() != [step * 256.0 for step in steps]  # not exactly: that is the point
    (run, *_) = plan.trajectories(config, range(1))
    assert [mark.step for mark in run.marks] == steps and plan.longest(config) == steps[-1]


def test_memory_counts_every_buffer_a_replica_has():
    # fp32: master 4, moments 8, gradient 4; bf16: weight 2 and remainder 2 are the master, moments 8, gradient 2
    config = resolve(SweepConfig(batch=4), "cpu")
    assert plan.replica_memory(config, 100, 7).total == 1607
    assert plan.replica_memory(resolve(SweepConfig(precision="bf16"), "cpu"), 100, 0).total == 1400
    assert plan.replica_memory(resolve(SweepConfig(optimizer="sgd"), "cpu"), 100, 0).total == 1200
    assert plan.replica_memory(resolve(SweepConfig(micro_batch=2), "cpu"), 100, 0).total == 2000


def test_a_replica_that_does_not_fit_is_refused_in_one_line():
    assert plan.slots_that_fit(plan.Memory(60, 40, 10), 1099) == 9, "each of the 9 may be under evaluation"
    assert plan.slots_that_fit(plan.Memory(2 * GIB, GIB, GIB), 14 * GIB) == 4, "2 of the 4 at once"
    with pytest.raises(ValueError, match=r"one replica needs 2\.0 GiB, the device offers 1\.0 GiB; lower --depth"):
        plan.slots_that_fit(plan.Memory(GIB, GIB // 2, GIB // 2), GIB)
