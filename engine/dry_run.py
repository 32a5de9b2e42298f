"""What a sweep would do, or what is left of one, without doing it."""

import math

from rich.table import Table

from engine.launch import missing_launches, status_of
from engine.progress import clock
from engine.store import Store
from engine.workload import Setup


def dry_run_table(setup: Setup, stored: Store | None) -> Table:
    """Cells, launches, and what the workload says of its work, memory and time."""
    run = setup.run
    table = Table(title="dry run: nothing is trained or stored", show_header=False, title_justify="left")
    table.add_row("cells", f"{run.cells}; {run.replicates} replicates, {math.prod(run.shape):,} runs to measure")
    left = missing_launches(setup, stored)
    held = f"; {len(left)} of them still to train" if stored is not None else ""
    table.add_row("launches", f"{len(setup.launches)} of {sum(c.stop - c.start for c in setup.launches[0])} rows{held}")
    seconds = setup.describe(table, left, status_of(setup, stored))
    spread = "two cores; expect half to twice that" if setup.device.type == "cpu" else "an H100"
    table.add_row("time", f"about {clock(seconds)}, typical of {spread}")
    return table
