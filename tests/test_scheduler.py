"""The host's decisions, over a device that only counts: slots stay busy, marks are met, broken runs leave early."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.plan import Mark, Trajectory
from engine.scheduler import POLL_STEPS, Scheduler


class Counter:
    """A device whose steps take no time; `breaks` says at which step a trajectory's loss is not finite."""

    def __init__(self, slots: int, breaks: dict[int, int] | None = None, micro: int = 1) -> None:
        self.slots, self.breaks, self.micro = slots, breaks or {}, micro
        self.held: list[Trajectory | None] = [None] * slots
        self.step, self.stop = np.zeros(slots, int), np.zeros(slots, int)
        self.measured = []

    def fill(self, slot, trajectory):
        assert self.stop[slot] == 0, "a slot is filled while it trains"
        self.held[slot] = trajectory
        self.step[slot], self.stop[slot] = 0, trajectory.marks[0].step * self.micro

    def stop_at(self, slot, step):
        self.stop[slot] = step * self.micro

    def run(self, count):
        assert 1 <= count <= POLL_STEPS
        self.step = np.minimum(self.step + count, np.maximum(self.stop, self.step))

    def breaking(self, slot):
        held = self.held[slot]
        return -1 if held is None else self.breaks.get(held.marks[-1].cells[0], -1)

    def nonfinite_steps(self):
        broken = [self.breaking(slot) for slot in range(self.slots)]
        return np.array(
            [b if 0 <= b < self.step[s] // self.micro and self.stop[s] else -1 for s, b in enumerate(broken)]
        )

    def micro_steps(self, trajectory):
        return self.micro

    def measure(self, ready):
        for each in ready:
            assert self.held[each.slot] is each.trajectory
            if each.nonfinite_step < 0:
                assert [mark.step * self.micro for mark in each.marks] == [self.step[each.slot]]
        self.measured += [(mark.cells[0], each.nonfinite_step) for each in ready for mark in each.marks]
        return ready


def run_of(cell: int, *steps: int) -> Trajectory:
    """A trajectory with a mark at each of some steps; its cells count down to `cell`."""
    marks = tuple(Mark(step, (cell + 1000 * (len(steps) - 1 - i),)) for i, step in enumerate(steps))
    return Trajectory({}, steps[-1], marks)


def trained(device: Counter, work: list[Trajectory]) -> Scheduler:
    scheduler = Scheduler(device)
    for _ in scheduler.train(work):
        pass
    return scheduler


@pytest.mark.parametrize("longest", [1000, 100])
def test_slots_stay_busy_over_runs_of_very_different_length(longest):
    # where the longest are short, steps that finished slots wait for the next poll are a larger share
    random = np.random.default_rng(0)
    lengths = np.sort(np.exp(random.uniform(0, np.log(longest), 600)).astype(int) + 1)[::-1]
    device = Counter(32)
    scheduler = trained(device, [run_of(cell, int(length)) for cell, length in enumerate(lengths)])
    assert sorted(cell for cell, _ in device.measured) == list(range(600))
    assert scheduler.trained == lengths.sum()
    assert scheduler.trained / scheduler.spent >= 0.95


@given(
    st.lists(st.lists(st.integers(1, 90), min_size=1, max_size=4, unique=True), min_size=1, max_size=20),
    st.integers(1, 6),
    st.integers(1, 3),
    st.data(),
)
def test_every_mark_is_measured_once_in_order_at_its_own_step(lengths, slots, micro, data):
    work = [run_of(cell, *sorted(steps)) for cell, steps in enumerate(lengths)]
    broken = {c: data.draw(st.integers(0, 100)) for c in data.draw(st.sets(st.integers(0, len(work) - 1)))}
    device = Counter(slots, broken, micro)
    scheduler = trained(device, work)
    expected = {mark.cells[0]: mark.step for each in work for mark in each.marks}
    assert sorted(cell for cell, _ in device.measured) == sorted(expected)
    for cell, nonfinite in device.measured:
        breaks = broken.get(cell % 1000, 10**9)
        assert nonfinite in ((-1, breaks) if breaks >= 0 else (-1,))
        assert (nonfinite >= 0) >= (expected[cell] > breaks), "a mark behind the break is measured as broken"
    assert scheduler.trained <= micro * sum(each.steps for each in work)


@pytest.mark.parametrize("broken", [{}, {0: 2}])
def test_progress_counts_steps_trained_and_saved(broken):
    device, seen = Counter(2, broken), []
    scheduler = Scheduler(device)
    work = [run_of(0, 4, 10), run_of(1, 7)]
    for _ in scheduler.train(work, lambda trained, saved: seen.append((trained, saved))):
        pass
    trained_steps = sum(count for trained, _ in seen for _, count in trained)
    saved_steps = sum(count for _, saved in seen for _, count in saved)
    assert trained_steps + saved_steps == 17
    assert saved_steps == (7 if broken else 0)


def test_the_scheduler_needs_no_torch():
    check = "import sys, engine.scheduler; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0
