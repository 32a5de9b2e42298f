"""The commands' common outside: arguments from dataclasses, and one clear line for a user's fault."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from rich.console import Console
from simple_parsing import ArgumentParser, DashVariant


class Parser(ArgumentParser):
    """An argument parser whose complaints are one line, without the page of usage."""

    def error(self, message: str) -> NoReturn:
        """Print the line and end the program with exit code 2."""
        fail(f"{message}; --help lists the options")


def parser(description: str) -> ArgumentParser:
    """An argument parser that takes --some-name and --some_name and no abbreviations.

    Comments beside a dataclass's fields become the help text.
    """
    return Parser(
        description=description,
        add_option_string_dash_variants=DashVariant.UNDERSCORE_AND_DASH,
        allow_abbrev=False,
    )


def parse(kind: type, description: str, default: Any = None, arguments: list[str] | None = None) -> Any:
    """Read one dataclass from the command line (or from `arguments`).

    Unknown or malformed arguments end the program with one line and exit code 2.
    """
    reader = parser(description)
    reader.add_arguments(kind, dest="value", default=default)
    return reader.parse_args(arguments).value


def fail(message: str) -> NoReturn:
    """One line on stderr, and exit code 2."""
    line = " ".join(message.split())
    Console(stderr=True, soft_wrap=True).print(f"error: {line}", style="red", highlight=False, markup=False)
    sys.exit(2)


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn what a user or the machine's disk did wrong into one line on stderr and exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        fail(str(error))
