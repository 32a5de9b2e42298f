"""Train every cell of a grid and keep the results: `uv run engine/sweep.py --rows-per-launch 16`.

The arguments are read by engine/options.py, the sweep itself is `engine.api.run_sweep`.
"""

if __name__ == "__main__" and not __package__:
    import started  # noqa: F401  says how to start it where its packages are missing

from collections.abc import Sequence

from engine.command import user_errors
from engine.options import Finish, read_arguments


def main(arguments: Sequence[str] | None = None, finish: Finish | None = None) -> None:
    """The command.

    Args:
        arguments: default those of the command line.
        finish: called with the finished store and whether W&B tracks it, unless --no-figures is given.
    """
    with user_errors():
        config, options = read_arguments(
            "Train every cell of a grid of hyper-parameters, many at once, and map where training works and where "
            "it breaks. The same command again resumes; finished cells are never trained twice.",
            arguments,
        )
        from engine.api import run_sweep  # brings torch, which --help does not need

        run_sweep(config, options, finish if options.figures else None)


if __name__ == "__main__":
    from analysis.fractal import draw  # a script joins what the folders keep apart: the engine imports no analysis

    main(finish=draw)
