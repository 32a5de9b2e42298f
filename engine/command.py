"""The commands' common outside: arguments from dataclasses, and one clear line for a user's fault."""

import signal
import sys
import threading
from argparse import Action
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import copy
from difflib import get_close_matches
from io import TextIOWrapper
from types import FrameType, MappingProxyType
from typing import Any, NoReturn

from rich.console import Console
from simple_parsing import ArgumentParser, DashVariant
from simple_parsing.help_formatter import SimpleHelpFormatter

PROJECT = "fractal-llm"
DEFAULT = " (default: %(default)s)"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # that ask a command to end


class Interrupted(KeyboardInterrupt):
    """A signal has asked the command to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class HelpFormatter(SimpleHelpFormatter):
    """simple_parsing's page, with each default said once and each group by its name alone."""

    def _format_action_invocation(self, action: Action) -> str:
        shown, plain = copy(action), action.option_strings[0]
        shown.option_strings = [f"--no-{plain[2:]}" if is_switched_off(action) else plain]
        shown.nargs = 0 if is_switch(action) else action.nargs
        return super()._format_action_invocation(shown)

    def _get_help_string(self, action: Action) -> str | None:
        said = super()._get_help_string(action)
        if said is not None and is_switched_off(action):
            said = f"do not {said}"
        if said is None or not said.endswith(DEFAULT):
            return said
        text = said.removesuffix(DEFAULT)
        if action.required:
            return f"{text} (required)"
        explained = "(default:" in text or (action.default == 0 and "(0:" in text)
        return text if explained or is_switch(action) or action.default in (None, "") else said


def is_switch(action: Action) -> bool:
    """Whether an option takes no value."""
    return hasattr(action, "negative_option_strings")


def is_switched_off(action: Action) -> bool:
    """Whether an option says no to what is done by default."""
    return is_switch(action) and bool(action.default)


def version_line() -> str:
    """The project and its release."""
    from importlib.metadata import version

    return f"{PROJECT} {version(PROJECT)}"


class ShowVersion(Action):
    """Prints the release and ends the program."""

    def __call__(self, reader: Any, *given: Any) -> NoReturn:
        screen(soft_wrap=True).print(version_line())
        sys.exit()


NEAR = 0.7  # how alike an option is to what was typed for it to be named: below, others come up by chance


class Parser(ArgumentParser):
    """An argument parser whose complaints are one line, without the page of usage.

    legal: names that a field may take, by field; `%(legal)s` in the comment beside it stands for them.
    """

    legal: Mapping[str, Iterable[str]] = MappingProxyType({})

    def error(self, message: str) -> NoReturn:
        """Print the line, with the option that was meant where one is near, and end the program with exit code 2."""
        unknown = message.partition("unrecognized arguments: ")[2].split("=")[0].split()
        near = get_close_matches(unknown[0], self._option_string_actions, 1, NEAR) if unknown else []
        meant = f" (is {near[0]} meant?)" if near else ""
        fail(f"{message}{meant}; --help lists the options")

    def _preprocessing(self, *arguments: Any, **named: Any) -> None:
        """What simple_parsing makes of the dataclasses, plainest spellings first, and no option without its value."""
        super()._preprocessing(*arguments, **named)
        for action in self._actions:
            for negated in getattr(action, "negative_option_strings", [])[:]:
                spaced = f"--no-{negated[4:].replace('_', '-')}"  # beside --nofigures, which older commands say
                action.option_strings = [*action.option_strings, spaced]
                action.negative_option_strings.append(spaced)  # type: ignore[attr-defined]
                self._option_string_actions[spaced] = action
            action.option_strings = sorted(set(action.option_strings), key=plainness)
            own = action.dest.rpartition(".")[2]
            if own in self.legal:
                action.legal = ", ".join(self.legal[own])  # type: ignore[attr-defined]
            if action.nargs == "?" and isinstance(action.metavar, str) and action.metavar.startswith("["):
                # `float | None` stands for a field that need not be given, not for an empty one
                action.nargs, action.metavar = None, action.metavar.strip("[]")
        for group in self._action_groups:
            if group.title and group.description and "['" in group.title:  # of a dataclass: what it says of itself
                group.title, group.description = group.description.strip().rstrip("."), None


def plainness(option: str) -> tuple[int, ...]:
    """Sorts an option's spellings: --lr.mlp, --lr-mlp, --lr_mlp, -y; shorter aliases first, its negation last."""
    return option.startswith("--no"), not option.startswith("--"), "." not in option, "_" in option, len(option)


def spellings(name: str) -> list[str]:
    """Every way to write an option: weight_decay is --weight-decay and --weight_decay, lr.mlp also --lr-mlp."""
    plain = {f"--{name}", f"--{name.replace('_', '-')}"}
    return sorted(plain | {f"--{name.replace('.', '-')}", f"--{name.replace('.', '_')}"}, key=plainness)


def parser(description: str, **named: Any) -> Parser:
    """An argument parser that takes --some-name and --some_name and no abbreviations.

    Comments beside a dataclass's fields become the help text. A terminal that cannot show a character is given its
    code, since no command should fail for what it says.
    """
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    reader = Parser(
        description=description,
        add_option_string_dash_variants=DashVariant.UNDERSCORE_AND_DASH,
        allow_abbrev=False,
        formatter_class=HelpFormatter,
        **named,
    )
    reader.add_argument("--version", action=ShowVersion, nargs=0, help="show the release and exit")
    return reader


def parse(kind: type, description: str, default: Any = None, arguments: list[str] | None = None) -> Any:
    """Read one dataclass from the command line (or from `arguments`).

    Unknown or malformed arguments end the program with one line and exit code 2.
    """
    reader = parser(description)
    reader.add_arguments(kind, dest="value", default=default)
    return reader.parse_args(arguments).value


def screen(**named: Any) -> Console:
    """A rich console that prints text as it is, in tables too: brackets and colons in a path are no markup."""
    return Console(markup=False, emoji=False, highlight=False, **named)


def warn(message: str) -> None:
    """One line on stderr, however quiet the command is."""
    screen(stderr=True, soft_wrap=True).print(f"warning: {message}", style="yellow")


def fail(message: str) -> NoReturn:
    """One line on stderr, and exit code 2."""
    screen(stderr=True, soft_wrap=True).print(f"error: {' '.join(message.split())}", style="red")
    sys.exit(2)


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn what a user or the machine's disk did wrong into one line on stderr and exit code 2.

    Ctrl-C is one line as well, and exit code 130; so is whatever signal `hearing_signals` hears, and 128 more than its
    number.
    """
    try:
        yield
    except ValueError as error:
        fail(str(error))
    except OSError as error:
        known = error.filename and error.strerror
        fail(f"{error.filename} cannot be used ({error.strerror}); give another path" if known else str(error))
    except MemoryError as error:
        fail(f"the machine has not enough memory ({str(error) or 'an allocation failed'}); ask for less at once")
    except KeyboardInterrupt as stop:
        said = " ".join(getattr(stop, "__notes__", ["the same command goes on from what is stored"]))
        if said:
            with suppress(OSError):  # a terminal that hung up takes no words
                screen(stderr=True, soft_wrap=True).print(f"interrupted: {said}", style="yellow")
        sys.exit(128 + getattr(stop, "number", signal.SIGINT))


@contextmanager
def hearing_signals() -> Iterator[None]:
    """Raise `Interrupted` for Ctrl-C, SIGTERM and SIGHUP while there are results to keep.

    A process that was started to ignore a signal (nohup) still does. Only the main thread hears signals.
    """
    heard = {each: signal.getsignal(each) for each in SIGNALS if threading.current_thread() is threading.main_thread()}
    for each, handler in heard.items():
        if handler != signal.SIG_IGN:
            signal.signal(each, interrupt)
    try:
        yield
    finally:
        for each, handler in heard.items():
            signal.signal(each, handler)


def interrupt(number: int, frame: FrameType | None) -> None:
    """End the command; further signals wait until what is to be kept has been written."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise Interrupted(number)
