"""From cells to trajectories and launches: nothing lost, nothing twice, sharing only where runs are the same."""

import math
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from engine import plan
from engine.config import Run, hyper_names, make_config, resolve
from engine.data import batch_order
from engine.hyper import rule_of
from engine.schedule import SCHEDULES, SLACK

GIB = 2**30
RANGES = {
    "tokens": "log:1100:5000",
    "batch": "linear:1:8",
    "seed": "linear:0:7",
    "init_scale": "log:0.1:10",
    "warmup": "linear:0:0.5",
    "clip": "log:0.1:10",
    "weight_decay": "linear:0:1",
    "beta1": "linear:0:0.9",
    "beta2": "linear:0:0.9",
    "eps": "log:1e-8:1e-3",
    "label_smoothing": "linear:0:0.5",
    "dropout": "linear:0:0.5",
    "unique_tokens": "log:300:5000",
    "epochs": "log:0.5:8",
}
AXES = [name for name in hyper_names(make_config()) if name.partition(".")[0] in (*RANGES, "lr")]


BUDGET = {"tokens": 0, "unique_tokens": 0, "epochs": 0}


def data_of(hyper: dict[str, float], steps: int) -> np.ndarray:
    """The rows that a run sees in its first steps, of 100 rows of 64 tokens."""
    unique = min(math.ceil(hyper["unique_tokens"] / 64 * SLACK), 100) if np.isfinite(hyper["unique_tokens"]) else 100
    return batch_order(int(hyper["seed"]), 100, steps * int(hyper["batch"]), unique)


def axis(name: str, points: int) -> str:
    return f"{name}:{RANGES.get(name.partition('.')[0], 'log:1e-3:1e1')}:{points}"


def test_every_hyper_parameter_of_a_language_model_is_planned():
    assert set(AXES) == set(hyper_names(make_config()))


@st.composite
def runs(draw) -> Run:
    y, x = draw(st.lists(st.sampled_from(sorted(AXES)), min_size=2, max_size=2, unique=True))
    warmup = draw(st.sampled_from([0.0, 0.25]))
    fixed = {} if "warmup" in (y, x) else {"warmup": warmup}
    replicates = 1 if "seed" in (y, x) else draw(st.integers(1, 3))
    swept = {"y": axis(y, draw(st.integers(1, 8))), "x": axis(x, draw(st.integers(1, 8)))}
    return resolve(
        make_config(**swept, schedule=draw(st.sampled_from(list(SCHEDULES))), replicates=replicates, **fixed), "cpu"
    )


@given(runs(), st.integers(1, 9), st.integers(1, 9), st.booleans())
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_trajectories_serve_every_cell_once_at_its_own_last_step(run, chunk_rows, rows, together):
    made = plan.plan_runs(run)
    launches = plan.launches(made, chunk_rows, rows, together)
    cells = np.concatenate([made.cells_in(launch) for launch in launches])
    assert np.array_equal(cells, np.arange(math.prod(run.shape))), "launches cut the cells in order"
    if not together:
        assert all(len({chunk.replicate for chunk in launch}) == 1 for launch in launches)
    hyper = plan.hyper_of(run, cells)
    served = []
    for launch in launches:
        work = made.work_in(made.cells_in(launch))
        trajectories = work.trajectories()
        assert len(trajectories) == len(work.runs)
        assert sum(len(each.marks) for each in trajectories) == len(work.marks)
        costs = [each.steps * each.hyper["batch"] for each in trajectories]
        assert costs == sorted(costs, reverse=True)
        for each in trajectories:
            steps = [mark.step for mark in each.marks]
            assert steps == sorted(set(steps)) and each.steps == steps[-1] <= made.steps.max()
            for mark in each.marks:
                for cell in mark.cells:
                    own = {name: values[cell] for name, values in hyper.items()}
                    assert mark.step == math.ceil(own["tokens"] / (own["batch"] * 64) * SLACK) >= 2
                    # the cell's run is the trajectory's, up to the cell's last step
                    assert own | BUDGET == each.hyper | BUDGET
                    assert np.array_equal(*[data_of(hyper, mark.step) for hyper in (own, each.hyper)])
                    if plan.needs_horizon(run):
                        assert each.total == mark.step
                    served.append(cell)
    assert sorted(served) == list(range(math.prod(run.shape)))


@given(runs())
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_runs_are_shared_exactly_where_nothing_needs_the_horizon(run):
    assume(not {"unique_tokens", "epochs"} & run.given)  # the next test's
    made = plan.plan_runs(run)
    work = made.work_in(np.arange(math.prod(run.shape)))
    shared = len(work.marks) > len(work.runs)
    budgets = len(np.unique(made.steps)) > 1 and "tokens" in run.names
    if plan.needs_horizon(run) or not budgets:
        assert not shared
    elif "batch" not in run.names:
        other = 1 - run.names.index("tokens")
        assert len(work.runs) == run.cells.shape[other] * run.replicates and shared


@pytest.mark.parametrize(
    ("swept", "runs"),
    [
        # 4 unique rows seen 1, 2 and 4 times are one run; so are 8
        ({"y": "unique_tokens:linear:256:512:2", "x": "epochs:log:1:4:3"}, 2),
        # 16 rows of 16, 8 and 4 unique ones: the first ends with its first epoch, but no other's is as long
        ({"y": "epochs:log:1:4:3", "x": "seed:linear:0:1:2", "tokens": 1024}, 6),
        # budgets of 8, 16 and 32 rows: all but one of them end within the first epoch
        ({"y": "unique_tokens:log:1024:8192:2", "x": "tokens:log:512:2048:3"}, 2),
        # whole rows: 100 and 120 tokens are two rows of 64
        ({"y": "unique_tokens:linear:100:120:2", "x": "lr:log:1:2:2", "tokens": 1024}, 2),
        # nobody sees anything twice: one run
        ({"y": "unique_tokens:linear:4096:8192:9", "x": "tokens:linear:512:4096:9"}, 1),
    ],
)
def test_runs_are_one_exactly_where_they_see_the_same_data(swept, runs):
    run = resolve(make_config(**swept, batch=2), "cpu")
    made = plan.plan_runs(run)
    work = made.work_in(np.arange(made.steps.size))
    seen = {(each.hyper["lr"], data_of(each.hyper, each.steps).tobytes()) for each in work.trajectories()}
    assert len(seen) == len(work.runs) == runs


@pytest.mark.parametrize("unique", [None, 7, 40])
def test_a_supervised_budget_ends_with_the_first_step_that_reaches_it(unique):
    counts = np.random.default_rng(0).integers(1, 64, 40).astype(np.int32)
    own = {"unique_tokens": float(counts[batch_order(1, 40, unique)].sum())} if unique else {}
    config = make_config(y="tokens:linear:300:9000:30", x="batch:linear:1:5:3", replicates=2, count="supervised", **own)
    run = replace(resolve(config, "cpu"), counts=counts)
    steps = plan.plan_runs(run).steps
    for seed, row, col in np.ndindex(*run.shape):
        batch, tokens = int(run.column("batch")[0, 0, col]), run.column("tokens")[0, row, 0]
        rows = None if unique is None else int(np.broadcast_to(plan.unique_rows(run), run.shape)[seed, row, col])
        seen = counts[batch_order(seed, 40, steps[seed, row, col] * batch, rows)]
        assert seen.sum() >= tokens * SLACK > seen[:-batch].sum()
    if unique:
        assert plan.unique_rows(run).ravel().tolist()[1] == unique


@pytest.mark.parametrize(("tokens", "steps"), [(257, 2), (512, 2), (16384, 64), (16384.5, 65)])
def test_every_token_asked_for_is_consumed(tokens, steps):
    run = resolve(make_config(y="lr:log:1:2:2", x="seed:linear:0:1:2", tokens=tokens), "cpu")
    assert (plan.plan_runs(run).steps == steps).all()


@pytest.mark.parametrize(
    ("x", "steps"), [("512:512000:4", [2, 20, 200, 2000]), ("2560:163840:7", [10, 20, 40, 80, 160, 320, 640])]
)
def test_round_budgets_of_a_log_axis_train_no_step_more(x, steps):
    run = resolve(make_config(y="seed:linear:0:1:2", x=f"tokens:log:{x}"), "cpu")
    assert run.values("tokens").tolist() != [step * 256.0 for step in steps]  # not exactly: that is the point
    assert plan.plan_runs(run).steps[0, 0].tolist() == steps


def test_a_large_grid_is_planned_in_two_seconds():
    run = resolve(make_config(y="lr:log:1e-4:1e1:100000"), "cpu")
    start = time.process_time()
    made = plan.plan_runs(run)
    work = made.work_in(np.arange(made.steps.size))
    assert plan.automatic_probe_rows(made) >= 2
    assert len(work.runs) == 100_000
    assert time.process_time() - start < 2


def test_the_probe_costs_at_most_its_share_of_training():
    made = plan.plan_runs(resolve(make_config(), "cpu"))
    rows = plan.automatic_probe_rows(made)
    work = made.work_in(np.arange(made.steps.size))
    cost = (len(work.marks) + 1) * rows * 64 / 3
    assert cost <= plan.PROBE_SHARE * work.costs.sum() < cost * (rows + 4) / rows * 1.05


@pytest.mark.parametrize(
    ("lengths", "fit", "slots"),
    [([9] * 128, 29, 26), ([9] * 29, 29, 29), ([9] * 30, 29, 15), ([9, 3, 3, 3], 2, 2), ([1], 5, 1)],
)
def test_waves_are_even(lengths, fit, slots):
    assert plan.even_slots(np.array(lengths), fit) == slots


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 20))
def test_even_slots_cost_no_more_slot_steps_than_all_that_fit(lengths, fit):
    slots = plan.even_slots(np.array(lengths), fit)
    ordered = sorted(lengths, reverse=True)
    assert 1 <= slots <= fit
    most = min(fit, len(lengths))
    assert slots * plan.makespan(ordered, slots) <= most * plan.makespan(ordered, most)


def test_a_replica_that_does_not_fit_is_refused_in_one_line():
    assert plan.slots_that_fit(plan.Memory(0, 60, 40, 10), 1099) == 9, "each of the 9 may be under evaluation"
    assert plan.slots_that_fit(plan.Memory(0, 2 * GIB, GIB, GIB), 14 * GIB) == 4, "2 of the 4 at once"
    assert plan.slots_that_fit(plan.Memory(GIB, 2 * GIB, GIB, GIB), 15 * GIB) == 4, "what all share is there once"
    with pytest.raises(ValueError, match=r"one replica needs 2\.0 GiB, the device offers 1\.0 GiB; lower --depth"):
        plan.slots_that_fit(plan.Memory(0, GIB, GIB // 2, GIB // 2), GIB)


def test_starts_are_counted_once():
    run = resolve(make_config(y="lr:log:1:2:2", x="init_scale:log:1:2:3", replicates=4), "cpu")
    assert len(plan.starts_of(run)) == 12
    assert rule_of("init_scale").acts == "start"
