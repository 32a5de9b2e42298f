"""Train one stored cell again and compare, bit for bit: `uv run engine/replay.py --store S --row I --col J`.

On a GPU the cell trains alone, in a stack of one. On a CPU, where bits depend on the company, its launch is
run again until the cell has been read off. Exit code 0 if the cell is identical, 1 if not.
"""

import sys
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from engine import descent, plan
from engine.checkpoint import check_folder, save_safetensors
from engine.command import parse, screen, user_errors
from engine.provenance import provenance
from engine.store import Store, check_same_data, open_store
from engine.sweep import LanguageSetup, Rank, RunOptions, choose_device, prepare
from engine.trainer import Trainer, bit_exact_at_any_width


@dataclass(frozen=True)
class ReplayOptions:
    """Which cell to train again."""

    store: str  # the sweep's store
    row: int  # row of the cell, from 0
    col: int  # column of the cell, from 0
    device: str = "auto"  # cpu or cuda; auto: cuda if there is one
    save_weights: str = ""  # write the cell's final weights to this .safetensors file


class Replay(NamedTuple):
    """A cell trained again. losses: fp32 [S], before each update; weights: fp32 by name, [] -> shape."""

    losses: np.ndarray
    weights_digest: int
    weights: dict[str, torch.Tensor]


def replay_cell(store: Store, row: int, col: int, device: str) -> Replay:
    """Train one cell of a store again.

    Raises:
        ValueError: the cell lies outside the grid or has not been computed.
    """
    rows, cols = store.grid.shape
    if not (0 <= row < rows and 0 <= col < cols):
        raise ValueError(f"cell ({row}, {col}) lies outside the grid of {rows} rows and {cols} columns, counted from 0")
    if store.status[row, col] == 0:
        raise ValueError(f"cell ({row}, {col}) of {store.path} has not been computed yet; resume its sweep first")
    if store.config.network == "mlp":
        return replay_mlp(store, row, col, device)
    setup = prepare(store.config, RunOptions(device=device), Rank(0, 1), store)
    assert isinstance(setup, LanguageSetup)
    check_same_data(store, setup.corpus.digest)
    config = setup.config
    launch = next(rows for rows in plan.launches(config, setup.rows_per_launch) if row in rows)
    work = plan.trajectories(config, launch)
    slots = setup.slots
    if bit_exact_at_any_width(setup.device):
        work, slots = [alone(work, row, col)], 1
    trainer = Trainer(config, setup.network, setup.corpus, slots, setup.device)
    for harvests in trainer.train(work):
        for harvest in harvests:
            if (row, col) in harvest.mark.cells:
                return Replay(harvest.losses, harvest.weights_digest, trainer.stack.master_weights(harvest.slot))
    raise AssertionError("the launch of a cell holds no trajectory that serves it")


def alone(work: list[plan.Trajectory], row: int, col: int) -> plan.Trajectory:
    """The trajectory that serves a cell, with that cell's mark only."""
    for run in work:
        for mark in run.marks:
            if (row, col) in mark.cells:
                return replace(run, marks=(mark,))
    raise AssertionError("no trajectory serves the cell")


def replay_mlp(store: Store, row: int, col: int, device: str) -> Replay:
    """Train one cell of the paper's network again, with its trace."""
    config = replace(store.config, trace="on")
    block = descent.train_rows(config, slice(row, row + 1), choose_device(device).type)
    return Replay(block["losses"][0, col], int(block["weights_digest"][0, col]), {})


def compare(store: Store, row: int, col: int, replay: Replay) -> str:
    """'' if the stored cell and the replay are identical, else what differs first."""
    at = {"rows": slice(row, row + 1), "cols": slice(col, col + 1)}
    if "losses" in store:
        stored = store.read("losses", **at)[0, 0][: len(replay.losses)]
        same = (stored.view(np.uint32) == replay.losses.view(np.uint32)) | (np.isnan(stored) & np.isnan(replay.losses))
        if not same.all():
            step = int(np.argmin(same))
            difference = abs(float(replay.losses[step]) - float(stored[step]))
            return (
                f"first differs at step {step}: stored {stored[step]!r}, replayed {replay.losses[step]!r} "
                f"(off by {difference:.3g})"
            )
    digest = int(store.read("weights_digest", **at)[0, 0])
    if digest != replay.weights_digest:
        return (
            f"the losses agree, the final weights differ: digest {digest:#018x}, replayed {replay.weights_digest:#018x}"
        )
    return ""


def main() -> None:
    """The command."""
    options = parse(ReplayOptions, __doc__.split("\n\n")[0])
    console = screen(soft_wrap=True)
    with user_errors():
        store = open_store(options.store)
        if options.save_weights:
            if store.config.network == "mlp":
                raise ValueError("--save-weights: the mlp's weights stay in its kernel; only language models have them")
            check_folder(options.save_weights)
        replay = replay_cell(store, options.row, options.col, options.device)
        if options.save_weights:
            save_safetensors(options.save_weights, replay.weights)
            console.print(f"weights written to {options.save_weights}")
    difference = compare(store, options.row, options.col, replay)
    where = f"cell ({options.row}, {options.col}), {len(replay.losses)} steps"
    if not difference:
        console.print(f"{where}: identical, weights digest {replay.weights_digest:#018x}")
        return
    console.print(f"{where}: NOT identical, {difference}")
    then, now = store.attributes["provenance"], provenance(choose_device(options.device))
    for name in ("device", "cpu", "packages", "commit"):
        if then.get(name) != now[name]:
            console.print(f"  {name}: stored with {then.get(name, 'what it does not say')}, replayed with {now[name]}")
    sys.exit(1)


if __name__ == "__main__":
    main()
