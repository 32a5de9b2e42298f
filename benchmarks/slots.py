"""What slots cost: how busy they are, and the time a launch takes beyond its steps: `uv run benchmarks/slots.py`.

Every cell of the grid is a run of its own (its schedule depends on its end), and their token budgets span a factor of
1,000, so slots are measured and refilled all the time. The launch is trained and stored as a sweep does it. Its time
is split into steps, held-out losses, and the rest: polling, refilling and storing.
"""

if __name__ == "__main__" and not __package__:
    import started  # noqa: F401  says how to start it where its packages are missing

import tempfile
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from engine.command import parse, user_errors


@dataclass(frozen=True)
class Options:
    """The grid and its network."""

    depth: int = 4  # layers; width is 64 x depth
    vocabulary: int = 4096  # rows of the embedding
    slots: int = 64  # R
    rows: int = 16  # learning rates
    cols: int = 48  # token budgets
    steps: int = 1000  # of the longest run
    span: int = 1000  # longest over shortest token budget
    batch: int = 8  # sequences a step, of 128 tokens
    device: str = "cuda"  # cuda, or cpu to try the benchmark itself


if __name__ == "__main__":
    parse(Options, __doc__.split("\n\n")[0])  # before what takes seconds to import

import torch

from benchmarks.arguments import check_positive
from benchmarks.random_runs import PROBE_ROWS, network_of, random_corpus
from benchmarks.timing import append_rows, ready
from engine import plan
from engine.api import open_or_create
from engine.config import make_config, resolve
from engine.language import LanguageSetup, memory_of, most_rows
from engine.launch import LaunchBuffer
from engine.ranks import Rank, choose_device
from engine.step import Trainer


class TimedTrainer(Trainer):
    """A trainer that says how long its steps and held-out losses took.

    stepping: start and end of every run of micro-steps, CUDA events or seconds. evaluating: seconds.
    """

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.stepping: list[tuple] = []
        self.evaluating = 0.0

    def run(self, count: int) -> None:
        start = self.stamp()
        super().run(count)
        self.stepping.append((start, self.stamp()))

    def stamp(self):
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def step_seconds(self) -> float:
        """Seconds spent in steps so far."""
        wait(self.device)
        if self.device.type == "cpu":
            return sum(end - start for start, end in self.stepping)
        return sum(start.elapsed_time(end) for start, end in self.stepping) / 1000

    def measure(self, ready: list) -> list:
        wait(self.device)
        start = time.perf_counter()
        measured = super().measure(ready)
        wait(self.device)
        self.evaluating += time.perf_counter() - start
        return measured


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def prepared(options: Options) -> LanguageSetup:
    """The sweep, on random tokens.

    Raises:
        ValueError: the device is not there, or the grid cannot be trained.
    """
    check_positive(options, "depth", "vocabulary", "slots", "rows", "cols", "steps", "span", "batch")
    device = choose_device(options.device)
    if device.type == "cuda":
        ready()
    tokens = options.steps * options.batch * 128
    config = make_config(
        y=f"lr:log:1e-5:1e-2:{options.rows}",
        x=f"tokens:log:{tokens / options.span}:{tokens}:{options.cols}",
        schedule="cosine",
        depth=options.depth,
        vocabulary=options.vocabulary,
        context=128,
        batch=options.batch,
        validation_rows=PROBE_ROWS,
    )
    run = resolve(config, device.type)
    network, corpus = network_of(run, device), random_corpus(128, options.vocabulary)
    made = plan.plan_runs(run)
    launches = plan.launches(made, options.rows, options.rows, together=True)
    widest = len(made.work_in(made.cells_in(launches[0])).runs)
    memory = memory_of(made, network, corpus, device)
    return LanguageSetup(run, made, device, network, corpus, memory, options.rows, launches, options.slots, 0, widest)


def measure(options: Options) -> dict[str, object]:
    """A row of results/slots.csv."""
    with user_errors():
        setup = prepared(options)
    longest = int(setup.plan.steps.max())
    setup.trainer = trainer = TimedTrainer(
        setup.run, setup.network, setup.corpus, setup.slots, setup.device, longest, most_rows(setup.plan)
    )
    with ExitStack() as stack:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory()), "store")
        writer = stack.enter_context(closing(open_or_create(setup, path, None, Rank(0, 1))))
        wait(setup.device)
        start = time.perf_counter()
        buffer = LaunchBuffer(setup, setup.launches[0], writer)
        for results in setup.train(setup.launches[0], writer.status, lambda trained, saved: None):
            for cells, values in results:
                buffer.put(cells, values)
        buffer.flush()
        total = time.perf_counter() - start
    steps, scheduler = trainer.step_seconds(), trainer.scheduler
    return {
        "depth": options.depth,
        "slots": options.slots,
        "runs": setup.widest,
        "span": options.span,
        "busy": round(scheduler.trained / scheduler.spent, 4),
        "micro_steps": scheduler.spent // trainer.slots,
        "total_s": round(total, 3),
        "steps_s": round(steps, 3),
        "held_out_s": round(trainer.evaluating, 3),
        "rest_s": round(total - steps - trainer.evaluating, 3),
    }


def main() -> None:
    """The command."""
    options = parse(Options, __doc__.split("\n\n")[0])
    row = measure(options)
    print("{runs} runs over a span of {span} in {slots} slots: busy {busy} of {micro_steps} steps".format(**row))
    print("{total_s} s: {steps_s} s of steps, {held_out_s} s of held-out losses, {rest_s} s for the rest".format(**row))
    if options.device == "cuda":
        append_rows("slots.csv", [row])


if __name__ == "__main__":
    main()
