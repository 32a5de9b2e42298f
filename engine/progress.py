"""What a running sweep shows: cells, rates, time left, and a small live map of labels."""

import math
import time
from contextlib import suppress

import numpy as np
from rich.console import Group
from rich.live import Live
from rich.text import Text

from engine.command import screen
from engine.measure import MEASUREMENTS
from engine.outcome import DONE, LABELS, MISSING, NOT_COMPUTED, Thresholds
from engine.plan import Launch
from engine.store import Store, budget_of, empty_block
from engine.workload import Setup

STYLES = ("dim", "green", "yellow", "bright_black", "magenta", "bright_magenta", "red", "cyan")
MARKS = ("·", "█", "▓", "▒", "▚", "▞", "░", "?")
TALL, WIDE = 32, 96  # characters of the live map, at most
SECONDS_A_LINE = 15.0  # between two lines where there is no terminal
SECONDS_A_LAUNCH = 2.0  # launches that end sooner after a line have none
SECONDS_A_PICTURE = 0.25
SECONDS_A_READING = 5.0  # between two readings of what other processes have stored


class Progress:
    """Counts cells and work of a sweep; a live picture on a terminal, a line every few seconds elsewhere."""

    def __init__(
        self, setup: Setup, store: Store, todo: list[Launch], shared: bool, quiet: bool, tracked: bool = False
    ) -> None:
        """
        Args:
            todo: launches that miss cells.
            shared: whether other processes train some of them, whose cells are read from the store now and then.
            tracked: whether labels are asked for even where nothing is shown.
        """
        self.setup, self.unit = setup, setup.run.config.workload.unit
        shown = tracked or not (shared and quiet)
        self.store, self.shared, self.read = store, shared and shown, time.monotonic()
        status = store.status
        names = setup.run.config.workload.labelled if shown else ()
        self.arrays = {"status": status} | empty_block(names, status.shape, 0)
        done = np.flatnonzero(status == DONE)
        for name in names:
            self.arrays[name].reshape(-1)[done] = store.read_cells(name, done)
        self.budget = budget_of(setup.run)
        self.done_before = int((self.arrays["status"] == DONE).sum())
        plan = setup.plan
        missing = [plan.missing(launch, self.arrays["status"]) for launch in todo]
        self.cells = self.done_before + sum(map(len, missing))
        status = self.arrays["status"]
        self.total = sum(plan.work_in(setup.to_train(launch, status)).costs.sum() for launch in todo)
        self.best = {name: math.inf for name in names if MEASUREMENTS[name].best}
        self.seen = 0.0  # work done, or saved because a run ended early
        self.trained = 0.0
        self.launch = todo[0]
        self.started = self.shown = time.monotonic()
        self.quiet = quiet
        self.console = screen(stderr=True)
        self.live: Live | None = None

    def __enter__(self) -> "Progress":
        if self.console.is_terminal and not self.quiet:
            self.live = Live(self.picture(), console=self.console, auto_refresh=False)
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live is not None:
            with suppress(OSError):  # a terminal that hung up shows nothing
                self.live.update(self.picture(), refresh=True)
                self.live.stop()

    def work(self, trained: float, saved: float) -> None:
        """Count work just done, and that which runs that ended early will not need."""
        self.trained += trained
        self.seen += trained + saved

    def put(self, cells: np.ndarray, values: dict[str, np.ndarray]) -> None:
        """Put results of some cells (flat indices) on the map."""
        for name, array in self.arrays.items():
            array.reshape(-1)[cells] = DONE if name == "status" else values[name]
        for name, best in self.best.items():
            self.best[name] = min(best, float(np.fmin.reduce(np.ravel(values[name]), initial=best)))

    def launched(self, launch: Launch) -> None:
        """A launch is stored."""
        self.launch = launch
        recent = time.monotonic() - self.shown < SECONDS_A_LAUNCH and self.done_before + self.done < self.cells
        if self.live is None and not self.quiet and not recent:
            first, last = launch[0], launch[-1]
            seeds = f"replicate {span(first.replicate, last.replicate)}, " if self.setup.run.replicates > 1 else ""
            self.say(f"{seeds}rows {span(first.start, last.stop - 1)}: ")

    def refresh(self) -> None:
        """Draw again, where the last drawing is old enough."""
        now = time.monotonic()
        if self.shared and now - self.read > SECONDS_A_READING:
            self.read_others()
        if self.live is not None and now - self.shown > SECONDS_A_PICTURE:
            self.shown = now
            self.live.update(self.picture(), refresh=True)
        elif self.live is None and not self.quiet and now - self.shown > SECONDS_A_LINE:
            self.say("")

    def read_others(self) -> None:
        """Put what other processes have stored on the map, and count their work as done."""
        self.read = time.monotonic()
        status = self.store.status
        new = np.flatnonzero((status == DONE) & (self.arrays["status"] != DONE))
        if new.size:
            self.put(new, {name: self.store.read_cells(name, new) for name in self.arrays if name != "status"})
            self.seen += float(self.setup.plan.work_in(new).costs.sum())

    def say(self, where: str) -> None:
        """One line."""
        self.shown = time.monotonic()
        self.console.print(where + self.line(), soft_wrap=True)

    @property
    def seconds(self) -> float:
        """Since the start."""
        return max(time.monotonic() - self.started, 1e-9)

    @property
    def done(self) -> int:
        """Cells computed since the start."""
        return int((self.arrays["status"] == DONE).sum()) - self.done_before

    def line(self) -> str:
        """Cells done, rates, the best so far and time left in one line."""
        done = self.done
        parts = [f"{self.done_before + done:,}/{self.cells:,} cells", f"{done / self.seconds:,.1f} cells/s"]
        parts.append(f"{self.trained / self.seconds:,.0f} {self.unit}/s")
        parts += [f"{MEASUREMENTS[n].best} {best:.3f} at best" for n, best in self.best.items() if best < math.inf]
        left = self.seconds * (self.total - self.seen) / self.seen if self.seen else math.inf
        parts.append(f"{clock(self.seconds)} gone")
        parts.append(f"{clock(max(left, 0))} to go" if math.isfinite(left) else "estimating")
        return ", ".join(parts)

    def codes(self) -> np.ndarray:
        """Label codes so far [replicate, *cells]."""
        return self.setup.run.config.workload.label(self.arrays, self.budget, Thresholds())

    def picture(self) -> Group:
        """The live map of the first replicate that misses cells above its line: the first row at the bottom."""
        codes = self.codes()
        missing = (self.arrays["status"] == NOT_COMPUTED).reshape(len(codes), -1).any(1)
        shown = codes[int(missing.argmax())]
        shown = shown.reshape(len(shown), -1)
        picked = shown[:: -(-shown.shape[0] // TALL), :: -(-shown.shape[1] // WIDE)][::-1]
        drawn = Text()
        for row in picked:
            for code in row:
                drawn.append(MARKS[code], STYLES[code])
            drawn.append("\n")
        legend = Text()
        for code, name in enumerate(LABELS):
            if (codes == code).any():
                legend.append(f"{MARKS[code]} {name} ", STYLES[code])
        return Group(drawn, legend, Text(self.line()))

    def label_counts(self) -> dict[str, int]:
        """Cells of each label so far."""
        codes = self.codes()
        return {name: int((codes == code).sum()) for code, name in enumerate(LABELS) if code != MISSING}


def span(first: int, last: int) -> str:
    """A range of whole numbers in words."""
    return f"{first}" if first == last else f"{first} to {last}"


def clock(seconds: float) -> str:
    """Seconds as 4s, 3m04s or 2h05m."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds // 60 % 60:02d}m"
