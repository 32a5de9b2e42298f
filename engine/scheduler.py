"""The host's side of training: which trajectory is in which slot, when to poll, when a run is measured.

Nothing here knows a tensor: the device is whatever fills slots, runs micro-steps, and says which slots broke.
A stack has R slots, each with its own step and end. The host polls now and then, measures the slots that have
reached a mark or are no longer finite, and refills those whose trajectory is finished.
"""

from collections.abc import Callable, Iterator
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from engine.plan import Mark, Trajectory

POLL_STEPS = 32  # micro-steps between two polls, at most
MAX_IDLE_SHARE = 0.03  # of a stack's slots that may wait, finished, until the next poll

Measured = TypeVar("Measured")


class Ready(NamedTuple):
    """A slot to be measured, for some marks of its trajectory. nonfinite_step: -1 while it is finite."""

    slot: int
    trajectory: Trajectory
    marks: tuple[Mark, ...]
    nonfinite_step: int


class Device(Protocol[Measured]):
    """What the scheduler needs of the device."""

    slots: int

    def fill(self, slot: int, trajectory: Trajectory) -> None:
        """Put a trajectory, at step 0, into a slot; it stops at its first mark."""

    def stop_at(self, slot: int, step: int) -> None:
        """Let a slot train until it has taken `step` steps."""

    def run(self, count: int) -> None:
        """Enqueue micro-steps of every slot."""

    def nonfinite_steps(self) -> np.ndarray:
        """Each slot's first step whose loss or updated weights are not finite, -1 if none, int [R]. Waits."""

    def measure(self, ready: list[Ready]) -> list[Measured]:
        """Measure some slots; one result for every mark of each."""

    def micro_steps(self, trajectory: Trajectory) -> int:
        """Micro-steps of one step of a trajectory."""


class SlotState(NamedTuple):
    """A trajectory in a slot and the index of its next mark."""

    trajectory: Trajectory
    mark: int


class Scheduler(Generic[Measured]):
    """Slots and the trajectories in them.

    micro_steps_to_mark: until each slot's next mark, int64 [R]. trained: slot micro-steps that trained; spent: all.
    """

    def __init__(self, device: Device[Measured]) -> None:
        self.device = device
        self.states: list[SlotState | None] = [None] * device.slots
        self.micro_steps_to_mark = np.zeros(device.slots, np.int64)
        self.trained = self.spent = 0

    def train(
        self,
        work: list[Trajectory],
        progress: Callable[[list[tuple[Trajectory, float]], list[tuple[Trajectory, float]]], None] | None = None,
    ) -> Iterator[list[Measured]]:
        """Train every trajectory; yields what each poll measured.

        Args:
            work: trajectories; slots take them in order.
            progress: called after each poll with the steps (fractions of them count) that trajectories trained since
                the last, and those that runs which broke will not need.
        """
        queue = list(reversed(work))
        for slot in range(self.device.slots):
            if queue:
                self.fill(slot, queue.pop())
        while any(self.states):
            count = self.steps_to_poll()
            self.device.run(count)
            nonfinite = self.device.nonfinite_steps()
            self.count(count, nonfinite, progress)
            ready = [slot for slot, state in enumerate(self.states) if state and self.is_ready(slot, nonfinite)]
            if ready:
                yield self.device.measure([self.reading_of(slot, int(nonfinite[slot])) for slot in ready])
            for slot in ready:
                self.advance(slot, ended=nonfinite[slot] >= 0)
                if self.states[slot] is None and queue:
                    self.fill(slot, queue.pop())

    def fill(self, slot: int, trajectory: Trajectory) -> None:
        """Put a trajectory into a slot."""
        self.device.fill(slot, trajectory)
        self.states[slot] = SlotState(trajectory, 0)
        self.micro_steps_to_mark[slot] = trajectory.marks[0].step * self.device.micro_steps(trajectory)

    def steps_to_poll(self) -> int:
        """Micro-steps until the host should poll again.

        As far as possible while the slots that reach their mark before then waste at most MAX_IDLE_SHARE of the
        stack, at least to the first mark, at most POLL_STEPS.
        """
        left = np.sort(self.micro_steps_to_mark[[state is not None for state in self.states]])
        count = left[0]
        for candidate in left[1:]:
            if np.maximum(candidate - left, 0).sum() > MAX_IDLE_SHARE * candidate * len(left):
                break
            count = candidate
        return int(min(count, POLL_STEPS))

    def count(self, count: int, nonfinite: np.ndarray, progress: Callable | None) -> None:
        """Keep the books of `count` micro-steps."""
        running = np.minimum(self.micro_steps_to_mark, count)
        trained, saved = [], []
        for slot, state in enumerate(self.states):
            if state is None:
                continue
            per_step = self.device.micro_steps(state.trajectory)
            if nonfinite[slot] >= 0:
                stopped = int(nonfinite[slot]) + 1
                mark = state.trajectory.marks[state.mark].step
                running[slot] = self.micro_steps_to_mark[slot] - (mark - stopped) * per_step
                saved.append((state.trajectory, float(state.trajectory.steps - stopped)))
            trained.append((state.trajectory, running[slot] / per_step))
        self.micro_steps_to_mark -= running
        self.trained += int(running.sum())
        self.spent += count * self.device.slots
        if progress is not None:
            progress(trained, saved)

    def is_ready(self, slot: int, nonfinite: np.ndarray) -> bool:
        """Whether a slot has reached its mark, or broke."""
        return self.micro_steps_to_mark[slot] == 0 or nonfinite[slot] >= 0

    def reading_of(self, slot: int, nonfinite_step: int) -> Ready:
        """What of a slot is to be measured: its mark, or all that remain where it is no longer finite."""
        trajectory, mark = self.state(slot)
        marks = trajectory.marks[mark:] if nonfinite_step >= 0 else trajectory.marks[mark : mark + 1]
        return Ready(slot, trajectory, marks, nonfinite_step)

    def state(self, slot: int) -> SlotState:
        """What a slot that is not empty holds."""
        state = self.states[slot]
        assert state is not None
        return state

    def advance(self, slot: int, ended: bool) -> None:
        """Send a slot on to its trajectory's next mark, or empty it."""
        trajectory, mark = self.state(slot)
        if ended or mark + 1 == len(trajectory.marks):
            self.states[slot] = None
            self.device.stop_at(slot, 0)
            self.micro_steps_to_mark[slot] = 0
            return
        self.states[slot] = SlotState(trajectory, mark + 1)
        self.device.stop_at(slot, trajectory.marks[mark + 1].step)
        between = trajectory.marks[mark + 1].step - trajectory.marks[mark].step
        self.micro_steps_to_mark[slot] = between * self.device.micro_steps(trajectory)
