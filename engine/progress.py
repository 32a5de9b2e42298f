"""What a running sweep shows: cells, rates, time left, and a small live map of labels."""

import math
import time

import numpy as np
from rich.console import Group
from rich.live import Live
from rich.text import Text

from engine import plan
from engine.command import screen
from engine.config import SweepConfig
from engine.outcome import LABELS, MISSING, Thresholds, label

STYLES = ("dim", "green", "yellow", "bright_black", "magenta", "red", "cyan")
MARKS = ("·", "█", "▓", "▒", "▚", "░", "?")
LABELLED = ("status", "first_loss", "last_loss", "nonfinite_step")  # what a cell's label is made of
TALL, WIDE = 32, 96  # characters of the live map, at most


class Progress:
    """Counts cells and tokens of a sweep; a live picture on a terminal, a line a launch elsewhere."""

    def __init__(self, config: SweepConfig, stored: dict[str, np.ndarray], todo: list[range], quiet: bool) -> None:
        """stored: the LABELLED arrays as they are before training. todo: the launches about to be trained."""
        self.config = config
        self.codes = block_codes(stored)
        self.done_before = int((self.codes != MISSING).sum())
        missing = sum(int((self.codes[rows.start : rows.stop] == MISSING).sum()) for rows in todo)
        self.cells = self.done_before + missing  # of this rank
        self.total = sum(launch_tokens(config, rows) for rows in todo)
        self.seen = 0.0  # tokens trained, or saved because a run ended early
        self.trained = 0.0
        self.done = 0
        self.started = time.monotonic()
        self.quiet = quiet
        self.console = screen(stderr=True)
        self.live: Live | None = None

    def __enter__(self) -> "Progress":
        if self.console.is_terminal and not self.quiet:
            self.live = Live(self.picture(), console=self.console, refresh_per_second=4)
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live is not None:
            self.live.update(self.picture())
            self.live.stop()

    def tokens(self, trained: float, saved: float) -> None:
        """Count tokens just trained, and those that runs which ended early will not need."""
        self.trained += trained
        self.seen += trained + saved
        self.refresh()

    def show(self, rows: range, block: dict[str, np.ndarray]) -> None:
        """Put a block of results on the map."""
        codes = block_codes(block)
        before = (self.codes[rows.start : rows.stop] != MISSING).sum()
        self.codes[rows.start : rows.stop] = codes
        self.done += int((codes != MISSING).sum() - before)
        self.refresh()

    def launched(self, rows: range) -> None:
        """A launch is stored."""
        if self.config.network == "mlp":
            self.seen += launch_tokens(self.config, rows)
        if self.live is None and not self.quiet:
            self.console.print(f"rows {rows.start}-{rows.stop - 1}: {self.line()}", soft_wrap=True, highlight=False)

    def refresh(self) -> None:
        """Draw again."""
        if self.live is not None:
            self.live.update(self.picture())

    @property
    def seconds(self) -> float:
        """Since the start."""
        return max(time.monotonic() - self.started, 1e-9)

    def line(self) -> str:
        """Cells done, rates and time left in one line."""
        parts = [f"{self.done_before + self.done:,}/{self.cells:,} cells", f"{self.done / self.seconds:,.1f} cells/s"]
        if self.config.network != "mlp":
            parts.append(f"{self.trained / self.seconds:,.0f} tokens/s")
        left = self.seconds * (self.total - self.seen) / self.seen if self.seen else math.inf
        parts.append(f"{clock(self.seconds)} gone")
        parts.append(f"{clock(left)} to go" if math.isfinite(left) else "estimating")
        return ", ".join(parts)

    def picture(self) -> Group:
        """The live map above its line: the first row at the bottom, as a plot has it."""
        rows, cols = self.codes.shape
        picked = self.codes[:: -(-rows // TALL), :: -(-cols // WIDE)][::-1]
        drawn = Text()
        for row in picked:
            for code in row:
                drawn.append(MARKS[code], STYLES[code])
            drawn.append("\n")
        legend = Text()
        for code, name in enumerate(LABELS):
            if (self.codes == code).any():
                legend.append(f"{MARKS[code]} {name} ", STYLES[code])
        return Group(drawn, legend, Text(self.line()))

    def label_counts(self) -> dict[str, int]:
        """Cells of each label so far."""
        return {name: int((self.codes == code).sum()) for code, name in enumerate(LABELS) if code != MISSING}


def block_codes(block: dict[str, np.ndarray]) -> np.ndarray:
    """Label codes of a block of results."""
    status, first_loss, last_loss, nonfinite_step = (block[name] for name in LABELLED)
    return label(status, first_loss, last_loss, nonfinite_step, Thresholds())


def launch_tokens(config: SweepConfig, rows: range) -> float:
    """Tokens (for the mlp: steps) that a launch trains."""
    if config.network == "mlp":
        return len(rows) * config.grid.shape[1] * config.steps
    return sum(run.steps * run.hyper["batch"] * config.context for run in plan.trajectories(config, rows))


def clock(seconds: float) -> str:
    """Seconds as 4s, 3m04s or 2h05m."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds // 60 % 60:02d}m"
