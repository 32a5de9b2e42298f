"""Weights & Biases, where it is asked for: one run a sweep, never one a cell."""

import re
from pathlib import Path

from engine.config import SweepConfig

MODES = ("off", "offline", "online")
LONGEST = 128  # characters of a name that W&B takes


def check(mode: str) -> None:
    """Raise ValueError unless the mode is one of MODES."""
    if mode not in MODES:
        raise ValueError(f"wandb is {mode!r}, expected one of {', '.join(MODES)}")


class Tracking:
    """A W&B run, or nothing at all."""

    def __init__(self, run) -> None:
        self.run = run

    def launch(self, watch) -> None:
        """Log the aggregates after a launch."""
        if self.run is None:
            return
        counts = {f"cells/{name}": count for name, count in watch.label_counts().items()}
        self.run.log(
            counts
            | {
                "cells": watch.done_before + watch.done,
                "cells_per_second": watch.done / watch.seconds,
                f"{watch.unit}_per_second": watch.trained / watch.seconds,
            }
        )

    def finish(self, store: Path) -> None:
        """Log the drawn maps as images and the store as an artifact, and end the run."""
        if self.run is None:
            return
        import wandb

        images = {f"map/{p.stem}": wandb.Image(str(p)) for p in sorted((store / "figures").glob("*.png"))}
        if images:
            self.run.log(images)
        artifact = wandb.Artifact(re.sub(r"[^A-Za-z0-9_.-]+", "-", f"sweep-{store.name}")[:LONGEST], type="sweep")
        artifact.add_dir(str(store))
        try:
            self.run.log_artifact(artifact)
            self.run.finish()
        except wandb.errors.Error as error:
            raise ValueError(f"all cells are stored in {store}, but W&B did not take them ({error})") from None


def start(
    mode: str, project: str, entity: str, config: SweepConfig, first: bool, identity: str = "", name: str = ""
) -> Tracking:
    """Begin a run on the first rank, unless the mode is off; a resumed sweep goes on with its own.

    Args:
        mode: one of MODES.
        project: W&B's project.
        entity: its owner, '' for the user's own.
        config: what the run shows as its configuration.
        first: whether this is the first rank.
        identity: W&B's id of the run, the same whenever the sweep is resumed ('': a new one each time).
        name: what people call the run ('': W&B thinks of one).

    Raises:
        ValueError: W&B refuses, or is not reached.
    """
    if mode == "off" or not first:
        return Tracking(None)
    import wandb

    try:
        run = wandb.init(
            project=project,
            entity=entity or None,
            config=config.flat(),
            id=identity or None,
            name=name[:LONGEST] or None,
            resume="allow" if identity and mode == "online" else None,  # offline, runs of one id meet when synced
            settings=wandb.Settings(mode="offline" if mode == "offline" else "online"),
        )
    except wandb.errors.Error as error:
        raise ValueError(f"W&B did not start ({error}); log in, or give --wandb offline or off") from None
    return Tracking(run)
