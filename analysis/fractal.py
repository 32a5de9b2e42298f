"""The command `fractal`: everything this project does, a word each. `fractal sweep` is `engine/sweep.py`, and so on."""

if __name__ == "__main__" and not __package__:
    import started  # noqa: F401  says how to start it where its packages are missing

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, NamedTuple

from engine.command import fail, screen, version_line
from engine.place import Where


def draw(store: Where, tracked: bool) -> Mapping[str, Any]:
    """What a sweep does when it is through: answer and picture, the report where W&B takes it; the answer's values."""
    from analysis.plot import draw_store

    found, answer = draw_store(store)
    if tracked and found is not None:
        from analysis.classify import Labelling
        from analysis.report import write_report

        write_report(found.store.figures / "report.html", Labelling(), found)
    return answer


class Command(NamedTuple):
    """One word: the module whose `main` it runs, what that does, and what it is given."""

    module: str
    help: str
    given: Mapping[str, Any] = {}


COMMANDS = {
    "sweep": Command(
        "engine.sweep", "train a grid of hyper-parameters, many runs at once, and map it", {"finish": draw}
    ),
    "replay": Command("engine.replay", "train one stored cell again and compare, bit for bit; save its weights"),
    "chat": Command("engine.chat", "talk to a cell, to several side by side, or to a checkpoint"),
    "samples": Command("analysis.samples", "what cells write before and after training, kept for the report"),
    "recommend": Command("analysis.recommend", "which learning rate, for each budget, with its interval over seeds"),
    "zoom": Command("analysis.zoom", "train a part of a map again, denser, once or many times in a row"),
    "rules": Command(
        "analysis.rules", "rules of thumb over seeds: where half and 90% of runs train, best and safe rates"
    ),
    "noise": Command("analysis.noise", "how much of a map is noise: lines of it in other precision or data order"),
    "uncertainty": Command(
        "analysis.uncertainty", "how fine the border is: its uncertainty exponent from pairs of points"
    ),
    "evaluate": Command("analysis.evaluate", "score cells on tasks of lm-evaluation-harness, many in one stack"),
    "distance": Command("analysis.distance", "whether scores depend on the distance to the border of training"),
    "report": Command("analysis.report", "one self-contained HTML page about a store"),
    "export": Command("analysis.export", "a store's cells as a .csv or .parquet, one row each"),
    "fleet": Command(
        "engine.fleet", "the same over a Ray cluster or SLURM, with workers that come and go", {"finish": draw}
    ),
}
USAGE = "usage: fractal COMMAND [options]"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the first word names, with the words after it."""
    word, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    shown: dict[str, Callable[[], str]] = {"--help": help_page, "-h": help_page, "--version": version_line}
    if word in shown:
        screen(soft_wrap=True).print(shown[word]())
        return
    if word not in COMMANDS:
        fail(f"command is {word!r}; expected one of {', '.join(COMMANDS)}; fractal --help says what they do")
    sys.argv = [f"fractal {word}", *rest]
    import_module(COMMANDS[word].module).main(**COMMANDS[word].given)


def help_page() -> str:
    """Every command in a line."""
    lines = [f"  {word:12} {command.help}" for word, command in COMMANDS.items()]
    return "\n".join(
        [USAGE, "", *lines, "", "fractal COMMAND --help lists a command's options, --version the release."]
    )


if __name__ == "__main__":
    main()
