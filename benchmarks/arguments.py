"""What a benchmark is asked for, read before torch is imported: `--help` and a wrong word are answered at once."""

import argparse
from collections.abc import Sequence
from typing import Any

from engine.command import fail


class Reader(argparse.ArgumentParser):
    """An argument parser whose complaints are one line."""

    def error(self, message: str) -> Any:
        """Print the line and end the program with exit code 2."""
        fail(f"{message}; --help lists the options")


def asked(description: str | None, names: Sequence[str] = ()) -> Sequence[str]:
    """The names that the command line of a kernel benchmark gives, all of them if it gives none."""
    reader = Reader(description=description)
    if names:
        reader.add_argument("names", nargs="*", help=f"which to run, of {', '.join(names)} (default: all)")
    given: list[str] = getattr(reader.parse_args(), "names", [])
    if unknown := [name for name in given if name not in names]:
        reader.error(f"got {unknown[0]!r}, expected names among {', '.join(names)}")
    return given or names


def check_positive(options: object, *names: str) -> None:
    """Raise ValueError for the first of these numbers that is not above 0."""
    for name in names:
        if not getattr(options, name) > 0:
            raise ValueError(f"{name} is {getattr(options, name):g}, expected more than 0; change --{name}")
