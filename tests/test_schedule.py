"""Learning-rate schedules against their formulas, written out step by step."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.schedule import SCHEDULES, multiplier

WARMUPS = (0.0, 0.07, 0.1, 0.28, 0.37, 0.55, 1.0)


def hyper(warmup, decay: float, floor: float, count: int = 1) -> dict[str, torch.Tensor]:
    """fp64 [R] each."""
    warmup_R = torch.as_tensor(warmup, dtype=torch.float64).expand(count)
    return {"warmup": warmup_R, "decay": torch.full_like(warmup_R, decay), "floor": torch.full_like(warmup_R, floor)}


def of_step(schedule: str, step: int, total: int, warmup: float, decay: float, floor: float) -> float:
    """The multiplier of one step, in plain Python."""
    warm = math.ceil(Fraction(str(warmup)) * total)  # exactly: 0.07 * 100 is 7, not above it
    if step < warm:
        return (step + 1) / warm
    behind = (step - warm) / max(total - warm, 1)
    if schedule == "cosine":
        return floor + (1 - floor) * (1 + math.cos(math.pi * behind)) / 2
    if schedule == "linear":
        return 1 - behind
    if schedule == "wsd":
        return floor + (1 - floor) * min((total - step) / max(decay * total, 1), 1)
    return 1.0


@given(
    st.sampled_from(list(SCHEDULES)),
    st.lists(st.tuples(st.integers(1, 100), st.sampled_from(WARMUPS)), min_size=1, max_size=5),
    st.sampled_from([0.0, 0.2, 1.0]),
    st.sampled_from([0.0, 0.1, 1.0]),
)
def test_every_replica_follows_its_own_schedule(schedule, runs, decay, floor):
    total_R = torch.tensor([total for total, _ in runs])
    hyper_R = hyper([warmup for _, warmup in runs], decay, floor, len(runs))
    for step in range(100):
        got = multiplier(schedule, torch.full_like(total_R, step), total_R, hyper_R)
        assert got.dtype == torch.float64
        for (total, warmup), value in zip(runs, got.tolist(), strict=True):
            if step < total:
                # the same float64 formula; the cosine of two libraries differs by an ulp
                expected = of_step(schedule, step, total, warmup, decay, floor)
                assert value == pytest.approx(expected, rel=1e-14, abs=1e-15)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_rises_to_the_peak_and_never_rises_again(schedule):
    total, hyper_R = torch.tensor([100]), hyper(0.1, 0.2, 0.1)
    values = torch.cat([multiplier(schedule, torch.tensor([step]), total, hyper_R) for step in range(100)])
    assert torch.equal(values[:10], torch.arange(1, 11).double() / 10)
    assert values.max() == 1
    assert (values[10:].diff() <= 0).all()
    assert values.min() > 0
    ends = {"constant": 1.0, "cosine": 0.1, "wsd": 0.1, "linear": 0.0}
    # one step before the end of the run: within a step's fall of the floor
    assert abs(values[-1].item() - ends[schedule]) < 0.06


def test_replicas_may_have_floors_and_decays_of_their_own():
    hyper_R = hyper([0.0, 0.0], 0.2, 0.0, 2) | {"decay": torch.tensor([0.2, 0.5]).double()}
    got = multiplier("wsd", torch.tensor([60, 60]), torch.tensor([100, 100]), hyper_R)
    assert got.tolist() == [1.0, 0.8]


def test_a_finished_replica_gets_a_finite_multiplier():
    for schedule in SCHEDULES:
        past = multiplier(schedule, torch.tensor([7, 0]), torch.tensor([5, 1]), hyper([0.5, 1.0], 0.2, 0.1, 2))
        assert torch.isfinite(past).all()
