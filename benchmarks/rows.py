"""Rows of measurements that say where they come from, appended to a file of results/; without torch."""

import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

HOME = Path(__file__).parent.parent


def command_line() -> str:
    """The command that runs, its script named from the project's folder: a row says how, on no matter what machine."""
    script = Path(sys.argv[0]).resolve()
    named = str(script.relative_to(HOME)) if script.is_relative_to(HOME) else sys.argv[0]
    return " ".join(["python", named, *sys.argv[1:]])


def write_rows(path: Path, source: Mapping[str, object], rows: Sequence[Mapping[str, object]]) -> Path:
    """Append rows to a .csv, each behind what is the same for all; a new file gets a head. Returns the path."""
    path.parent.mkdir(exist_ok=True)
    fresh = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*source, *rows[0]])
        if fresh:
            writer.writeheader()
        writer.writerows({**source, **row} for row in rows)
    return path
