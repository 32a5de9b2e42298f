"""Weights & Biases, where it is asked for: one run a sweep, never one a cell."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.config import SweepConfig
from engine.place import Where
from engine.scores import stored_tasks
from engine.store import Store, open_store

if TYPE_CHECKING:
    import pandas

MODES = ("off", "offline", "online")
LONGEST = 128  # characters of a name that W&B takes
MOST_CELLS = 200_000  # rows that a table of W&B's holds


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
        done = watch.done_before + watch.done
        # cells as steps: they go on where a resumed sweep goes on, so that its lines follow the earlier ones
        self.run.log(
            counts
            | {
                "cells": done,
                "cells_per_second": watch.done / watch.seconds,
                f"{watch.unit}_per_second": watch.trained / watch.seconds,
            },
            step=done,
        )

    def finish(self, path: Where, found: Mapping[str, Any]) -> None:
        """Log the maps, a table of cells and what was found, with store and report as artifacts, and end the run.

        Args:
            found: what the run's summary says besides the counts of labels.
        """
        if self.run is None:
            return
        import wandb

        store = open_store(path)
        images = {f"map/{p.stem}": wandb.Image(str(p)) for p in sorted(store.figures.glob("*.png"))}
        cells = cell_frame(store)
        table = {"cells_table": wandb.Table(dataframe=cells)} if len(cells) < MOST_CELLS else {}
        self.run.log(images | table)
        labels = {f"labels/{name}": int(count) for name, count in cells["label"].value_counts().items()}
        self.run.summary.update(labels | dict(found))
        try:
            for kind, file in (("sweep", path), ("report", store.figures / "report.html")):
                if not file.exists():
                    continue
                artifact = wandb.Artifact(re.sub(r"[^A-Za-z0-9_.-]+", "-", f"{kind}-{path.name}")[:LONGEST], type=kind)
                if not isinstance(file, Path):
                    artifact.add_reference(str(file), checksum=False)  # it stays in its bucket
                else:
                    (artifact.add_dir if file.is_dir() else artifact.add_file)(str(file))
                self.run.log_artifact(artifact)
            self.run.finish()
        except wandb.errors.Error as error:
            raise ValueError(f"all cells are stored in {path}, but W&B did not take them ({error})") from None


def cell_frame(store: Store) -> "pandas.DataFrame":
    """A row a cell: its swept hyper-parameters and seed, the weights it started from, its label, every measurement that
    is one number, and what it scores on tasks."""
    data = store.to_xarray()
    # a digest is no number, and W&B's tables hold none of 64 bits
    numbers = [
        name for name, each in store.specs.items() if not each.by_step and each.dtype != "u8" and name != "status"
    ]
    frame = data[["label", *numbers]].to_dataframe().reset_index()
    frame.insert(0, "start", base_model(store))
    scores = {f"{task.task}/{name}": task.read(name).ravel() for task in stored_tasks(store) for name in task.measures}
    return frame.assign(**scores)


def base_model(store: Store) -> str:
    """What the weights of a store's cells were before training: the checkpoint with its digest, or random."""
    digest = store.attributes.get("inputs", {}).get("model")
    return str(store.attributes.get("start", "random")) + (f" (sha256 {digest[:12]})" if digest else "")


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
