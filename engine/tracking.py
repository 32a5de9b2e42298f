"""Weights & Biases, where it is asked for: one run a sweep, never one a cell."""

from pathlib import Path

from engine.config import SweepConfig

MODES = ("off", "offline", "online")


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
                "tokens_per_second": watch.trained / watch.seconds,
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
        artifact = wandb.Artifact(f"sweep-{store.name}", type="sweep")
        artifact.add_dir(str(store))
        self.run.log_artifact(artifact)
        self.run.finish()


def start(mode: str, project: str, entity: str, config: SweepConfig, first: bool) -> Tracking:
    """Begin a run on the first rank, unless the mode is off."""
    if mode == "off" or not first:
        return Tracking(None)
    import wandb

    chosen = wandb.Settings(mode="offline" if mode == "offline" else "online")
    run = wandb.init(project=project, entity=entity or None, config=config.to_json(), settings=chosen)
    return Tracking(run)
