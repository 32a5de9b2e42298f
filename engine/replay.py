"""Train one stored cell again and compare, bit for bit: `uv run engine/replay.py --store S --row I --col J`.

Where cells are batch-invariant (on a GPU) the cell trains alone, in a stack of one. Elsewhere its launch is run again
until the cell has been measured. A cell whose batches were shared by ranks (--ddp) takes as many, started by torchrun.
Exit code 0 if the cell is identical, 1 if not.
"""

if __name__ == "__main__" and not __package__:
    import started  # noqa: F401  says how to start it where its packages are missing

import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from engine.command import parse, screen, user_errors, warn
from engine.outcome import LABELS, NOT_COMPUTED, Thresholds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from engine.checkpoint import LoadedModel
    from engine.language import LanguageSetup
    from engine.store import Store
    from engine.workload import Replay


@dataclass(frozen=True)
class ReplayOptions:
    """Which cell to train again."""

    store: str  # the sweep's store
    row: int  # row of the cell, from 0; of a list of points, the point
    col: int = 0  # column of the cell, from 0
    replicate: int = 0  # replicate of the cell, from 0
    device: str = "auto"  # cpu or cuda; auto: cuda if there is one
    # write the cell's final weights for load_model: to a .safetensors file, or with their tokenizer into a new folder,
    # which transformers reads too where it has the network
    save_weights: str = ""


def place_of(store: "Store", row: int, col: int, replicate: int = 0) -> tuple[int, ...]:
    """A cell's place in [replicate, *cells].

    Raises:
        ValueError: it lies outside, or has not been computed.
    """
    shape = store.run.shape
    place = (replicate, row, col) if len(shape) == 3 else (replicate, row)
    inside = all(0 <= index < size for index, size in zip(place, shape, strict=True))
    if not inside or (len(shape) == 2 and col):
        replicates = f" and {shape[0]} replicates" if shape[0] > 1 or replicate else ""
        cells = f"grid of {shape[1]} rows and {shape[2]} columns" if len(shape) == 3 else f"list of {shape[1]} points"
        raise ValueError(f"cell ({row}, {col}) lies outside the {cells}{replicates}, counted from 0")
    if store.read("status", replicate)[place[1:]] == NOT_COMPUTED:
        raise ValueError(f"cell ({row}, {col}) of {store.path} has not been computed yet; resume its sweep first")
    return place


def replay_cell(store: "Store", row: int, col: int, device: str, replicate: int = 0) -> "Replay":
    """Train one cell of a store again.

    Raises:
        ValueError: the cell lies outside the cells or has not been computed, or the inputs have changed.
    """
    from engine.api import prepare_stored  # brings torch, which --help does not need

    place = place_of(store, row, col, replicate)
    return prepare_stored(store, device).replay(int(np.ravel_multi_index(place, store.run.shape)))


def cell_name(store: "Store", place: tuple[int, ...]) -> str:
    """A cell ([replicate, *cells]), its swept hyper-parameters and what became of it, in a line."""
    called, swept = store.config.long_name, [(name, store.run.column(name)) for name in store.run.cells.columns]
    values = [f"{called(name)} {np.broadcast_to(column, store.run.shape)[place]:,.6g}" for name, column in swept]
    code = int(store.labels(Thresholds())[place])
    return f"cell ({', '.join(map(str, place[1:]))}): {', '.join(values)}; {LABELS[code]}"


def check_text(store: "Store") -> None:
    """Raise ValueError where a replay gives no weights that read and write text."""
    from engine.store_v1 import StoreV1

    if isinstance(store, StoreV1):
        raise ValueError(
            f"{store.path} has store format 1, whose cells are not replayed; sweep again for their weights"
        )
    if not store.config.workload.keeps_weights:
        raise ValueError(f"{store.path} is of network {store.config.network}, which has no text; expected a language")


def language_setup(store: "Store", device: str) -> "LanguageSetup":
    """What trains a store's cells again, where their weights write text. Raises ValueError where they do not."""
    from engine.api import prepare_stored
    from engine.language import LanguageSetup

    check_text(store)
    setup = prepare_stored(store, device)
    assert isinstance(setup, LanguageSetup)
    if setup.network.export is None:
        raise ValueError(f"network {store.config.network} has no checkpoint format, so no text; expected one that has")
    return setup


def replayed(
    store: "Store", setup: "LanguageSetup", cells: np.ndarray, unlike: "Callable[[tuple[int, ...], Replay], None]"
) -> "Iterator[tuple[list[int], LoadedModel]]":
    """The final weights of some cells (flat indices), trained again side by side: those of one mark together.

    Args:
        unlike: told each cell ([replicate, *cells]) whose weights are not those that were stored.
    """
    stored = store.read("weights_digest").ravel()
    for own, replay in setup.replays(cells):
        for cell in own:
            if int(stored[cell]) != replay.weights_digest:
                unlike(tuple(map(int, np.unravel_index(cell, store.run.shape))), replay)
        assert replay.model is not None
        yield own, replay.model


def cell_models(
    store: "Store", setup: "LanguageSetup", places: "Sequence[tuple[int, ...]]"
) -> "dict[tuple[int, ...], LoadedModel]":
    """The final weights of some cells ([replicate, *cells]), trained again side by side; warns of other than stored."""

    def unlike(place: tuple[int, ...], _: "Replay") -> None:
        warn(f"cell {place[1:]} trained again here has other weights than the stored ones, if near them")

    flat = {int(np.ravel_multi_index(place, store.run.shape)): place for place in places}
    again = replayed(store, setup, np.array(list(flat), int), unlike)
    return {flat[cell]: model for own, model in again for cell in own}


def compare(store: "Store", row: int, col: int, replay: "Replay", replicate: int = 0) -> str:
    """'' if the stored cell and the replay are identical, else what differs first."""
    place = place_of(store, row, col, replicate)
    agree = "no losses are stored"
    if "losses" in store:
        stored = store.read("losses", replicate, slice(row, row + 1))[0][place[2:]][: len(replay.losses)]
        same = (stored.view(np.uint32) == replay.losses.view(np.uint32)) | (np.isnan(stored) & np.isnan(replay.losses))
        if not same.all():
            step = int(np.argmin(same))
            difference = abs(float(replay.losses[step]) - float(stored[step]))
            return (
                f"first differs at step {step}: stored {stored[step]!r}, replayed {replay.losses[step]!r} "
                f"(off by {difference:.3g})"
            )
        agree = "the losses agree"
    digest = int(store.read("weights_digest", replicate)[place[1:]])
    if digest != replay.weights_digest:
        return f"{agree}, the final weights differ: digest {digest:#018x}, replayed {replay.weights_digest:#018x}"
    return ""


def save_weights(path: str, replay: "Replay") -> str:
    """Save a replayed cell's weights; what was written, in a few words.

    Raises:
        ValueError: they are asked for as a folder, and no format has the network.
    """
    from engine.checkpoint import names_file, save_model, save_safetensors

    model = replay.model
    if names_file(path):
        named = path.endswith(".safetensors")
        if model is None or not named:
            save_safetensors(path, replay.weights)
            return "no configuration with them"
        save_safetensors(path, model.weights, model.config, model.tokenizer_found)
        return "their configuration beside them: load_model reads both"
    if model is None:
        raise ValueError(
            f"{path} is to be a folder, but no checkpoint format has this network: give a .safetensors file"
        )
    save_model(path, model.config, model.weights, model.tokenizer_found, model.chat_template)
    return "with configuration and tokenizer: load_model reads the folder"


def main() -> None:
    """The command."""
    options = parse(ReplayOptions, __doc__.split("\n\n")[0])
    console = screen(soft_wrap=True)
    with user_errors():
        from engine.checkpoint import check_destination
        from engine.store import open_store

        store = open_store(options.store)
        if options.save_weights:
            if not store.config.workload.keeps_weights:
                raise ValueError(f"--save-weights: those of {store.config.network!r} stay in its kernel; leave it out")
            check_destination(options.save_weights)
        at = options.row, options.col
        replay = replay_cell(store, *at, options.device, options.replicate)
        if int(os.environ.get("RANK", 0)):
            return  # torchrun's others share the batches, the first one says what came out
        if options.save_weights:
            console.print(f"weights written to {options.save_weights}, {save_weights(options.save_weights, replay)}")
    difference = compare(store, *at, replay, options.replicate)
    where = f"cell ({options.row}, {options.col}), {len(replay.losses)} steps"
    if not difference:
        console.print(f"{where}: identical, weights digest {replay.weights_digest:#018x}")
        return
    console.print(f"{where}: NOT identical, {difference}")
    report_provenance(store, options.device)
    sys.exit(1)


def report_provenance(store: "Store", device: str) -> None:
    """Say what differs between where a store was made and here."""
    from engine.provenance import provenance
    from engine.ranks import choose_device

    then, now = store.attributes["provenance"], provenance(choose_device(device))
    for name in ("device", "cpu", "packages", "commit"):
        if then.get(name) != now[name]:
            said = then.get(name, "what it does not say")
            screen(soft_wrap=True).print(f"  {name}: stored with {said}, replayed with {now[name]}")


if __name__ == "__main__":
    main()
