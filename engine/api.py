"""A whole sweep: prepare, make or resume the store, train what is missing. Commands and notebooks call it."""

import hashlib
import json
import math
import os
import platform
import re
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from engine import tracking
from engine.command import hearing_signals, screen, warn
from engine.config import SweepConfig, cells_of, make_config, resolve
from engine.data.corpus import parse_mix
from engine.dry_run import dry_run_table
from engine.grid import Cells
from engine.launch import train_along, train_missing
from engine.leases import Leases, remove_leases
from engine.options import Finish, RunOptions
from engine.outcome import DONE, NOT_COMPUTED
from engine.place import LEASE_SECONDS, Where, located, place_of
from engine.provenance import device_name, other_arithmetic, provenance
from engine.ranks import Rank, choose_device, this_rank
from engine.store import (
    VERSION,
    Store,
    Writer,
    changed_inputs,
    check_same_run,
    create_store,
    open_store,
    store_attributes,
)
from engine.workload import Setup

if TYPE_CHECKING:
    import torch
    import xarray


def sweep(store: str = "", *, device: str = "auto", quiet: bool = True, **values: Any) -> "xarray.Dataset":
    """Train every cell of a grid, many at once, and keep the results; the same call again resumes.

        sweep(y="lr:log:1e-4:1:16", x="tokens:log:2e3:3e4:8", data="my.jsonl", store="s.zarr")

    Args:
        store: path of the Zarr store; default as the command's.
        values: every flag of the command by its name; a hyper-parameter of one group as {"lr.mlp": 1e-3}.

    Returns:
        Every measurement and `label`, with named, valued dimensions.

    Raises:
        ValueError: anything that cannot be done, before any training.
    """
    own = {name: values.pop(name) for name in list(values) if name in RunOptions.__dataclass_fields__}
    options = RunOptions(store=store, device=device, quiet=quiet, **own)
    return open_store(run_sweep(make_config(**values), options)).to_xarray()


def default_store(config: SweepConfig, cells: Cells) -> Path:
    """results/<network>-<axes>-<data>-<hash>: sweeps of other cells, data or settings never meet.

    Local files count by content, so that data which were edited are other data.
    """
    flat = config.flat()
    decides = {name: value for name, value in flat.items() if name not in ("replicates", "y", "x", "points")}
    digest = hashlib.sha256(json.dumps([decides, str(cells)], sort_keys=True).encode())
    for values in cells.columns.values():
        digest.update(values.tobytes())
    for name, _ in parse_mix(flat.get("data", "")) if flat.get("data") else ():
        if Path(name).is_file():
            with open(name, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    data = re.sub(r"[^A-Za-z0-9]+", "-", Path(str(flat.get("data", ""))).stem).strip("-")
    axes = cells.dims if len(cells.dims) > 1 else ("points",)
    return Path("results", "-".join(filter(None, (config.network, *axes, data, digest.hexdigest()[:8]))))


def run_sweep(
    config: SweepConfig,
    options: RunOptions,
    finish: Finish | None = None,
    cells: Cells | None = None,
) -> Where:
    """Train (or resume) a whole sweep into its store; the store's path.

    Args:
        finish: called by the first rank with the finished store, to draw it, and whether W&B tracks it; what it finds
            goes into the summary of W&B's run.
        cells: those of the configuration, with coordinates that are stored elsewhere.

    Raises:
        ValueError: anything a user gave that cannot be done, before any training.
    """
    rank = this_rank()
    tracking.check(options.wandb)
    if options.slots < 0:
        raise ValueError(f"slots is {options.slots}; expected at least 1, or 0 for what fits")
    if options.workers < 1:
        raise ValueError(f"workers is {options.workers}; expected at least 1")
    if not options.lease_seconds > 0:
        raise ValueError(f"lease_seconds is {options.lease_seconds:g}; expected more than 0")
    if options.workers > 1 and rank.count > 1:
        raise ValueError("workers are processes started one by one, torchrun starts its own; leave out one of them")
    together = getattr(config.training, "ddp", 1) != 1  # all ranks train one launch, not each its own
    workers = max(options.workers, 1 if together else rank.count)
    asked = cells or cells_of(config)
    path = located(options.store) if options.store else default_store(config, asked)
    stored = open_resumable(path) if path.exists() else None
    resuming = stored is not None
    if not options.dry_run:
        place_of(path).check_writable()
    rank.barrier()
    setup = prepare(config, asked, options, workers, stored)
    here = provenance(setup.device)
    check_same_machines(rank.gather(here))
    if stored is not None:
        check_same_run(path, stored.run, setup.run, changed_inputs(stored, setup.inputs, asked))
        check_same_arithmetic(stored, setup, here)
    if options.dry_run:
        if rank.index == 0:
            screen().print(dry_run_table(setup, stored))
        return path
    if options.workers > 1 and (stored is None or stored.run.replicates < setup.run.replicates):
        if not make_shared(setup, path, stored):
            return run_sweep(config, options, finish, cells)  # as another worker has made it
        stored = Store(path)
    # before the store is made: W&B may refuse
    identity = uuid4().hex if stored is None else stored.attributes.get("wandb_run", "")
    where = options.wandb, options.wandb_project, options.wandb_entity
    track = tracking.start(*where, setup.run.config, rank.index == 0, identity, path.name)
    shared = options.workers > 1
    with closing(open_or_create(setup, path, stored, rank, identity, shared, options.lease_seconds)) as writer:
        if not options.quiet and rank.index == 0:
            announce(setup, path, resuming)
        with hearing_signals():
            try:
                if together and rank.index > 0:
                    train_along(setup, writer)
                elif workers == 1:
                    writer.timed(*train_missing(setup, writer, None, 1, options.quiet, track))
                else:
                    with closing(Leases(writer.place, worker_name(setup.device), options.lease_seconds)) as leases:
                        took = train_missing(setup, writer, leases, workers, options.quiet or rank.index > 0, track)
                rank.barrier()
            except KeyboardInterrupt as stop:
                stop.add_note(kept(writer, workers) if rank.index == 0 else "")
                raise
    found: Mapping[str, Any] = {}
    if rank.index == 0 and (workers == 1 or last_to_leave(path, took, options.lease_seconds)) and finish is not None:
        found = finish(path, options.wandb != "off")
    track.finish(path, found)
    return path


def kept(store: Store, workers: int) -> str:
    """What an interrupted sweep has; other workers may still be writing."""
    done, planned = int((store.status == DONE).sum()), math.prod(store.run.shape)
    return f"{'at least ' if workers > 1 else ''}{done:,} of {planned:,} cells kept, the same command goes on"


def make_shared(setup: Setup, path: Where, stored: Store | None) -> bool:
    """Make or enlarge the store of a sweep that several processes begin at once; False where another just has."""
    with closing(place_of(path).creation_lock()):
        mine = Store(path).run.replicates == stored.run.replicates if stored is not None else not path.exists()
        if mine:
            open_or_create(setup, path, stored, Rank(0, 1), uuid4().hex).close()
        return mine


def last_to_leave(path: Where, took: tuple[float, int], seconds: float = LEASE_SECONDS) -> bool:
    """Wait until every process that trains a shared sweep has ended; True for the one that is to draw it.

    Args:
        took: of `train_missing`, which the store is told while nobody else writes to it.
        seconds: as `Place.lock`.
    """
    place = place_of(path)
    with closing(place.lock(wait=True, seconds=seconds)):
        Writer(path).timed(*took)
        return remove_leases(place)


def worker_name(device: "torch.device") -> str:
    """Machine, process and device."""
    return f"{platform.node()}, process {os.getpid()}, {device_name(device)}"


def open_resumable(path: Where) -> Store:
    """The store at a path, if a sweep can go on in it. Raises ValueError for one of the first format."""
    if store_attributes(path).get("format_version") == 1 < VERSION:
        raise ValueError(f"{path} has store format 1, which can be read but not resumed; give --store another path")
    return Store(path)


def prepare(config: SweepConfig, asked: Cells, options: RunOptions, workers: int, stored: Store | None) -> Setup:
    """Everything a sweep needs before it trains. Raises ValueError for anything that cannot be done.

    Cells of a store that are written as the asked ones keep their stored coordinates.
    """
    device = choose_device(options.device)
    cells = asked
    if stored is not None and str(asked) == str(stored.run.cells) and asked.columns.keys() == set(stored.run.names):
        cells = stored.run.cells
    run = resolve(config, device.type, cells)
    if stored is not None and stored.config.network != config.network:
        check_same_run(stored.path, stored.run, run)
    return run.config.workload.prepare(run, device, options, workers, stored)


def prepare_stored(store: Store, device: str) -> Setup:
    """What trains the cells of a store again. Raises ValueError where its inputs are no longer the same."""
    options = RunOptions(device=device)
    setup = store.config.workload.prepare(store.run, choose_device(device), options, 1, store)
    check_same_run(store.path, store.run, setup.run, changed_inputs(store, setup.inputs, None))
    return setup


def open_or_create(
    setup: Setup,
    path: Where,
    stored: Store | None,
    rank: Rank,
    wandb_run: str = "",
    shared: bool = False,
    lease_seconds: float = LEASE_SECONDS,
) -> Writer:
    """The store to write: a new one, which keeps W&B's id of the sweep, or the one to resume.

    The first rank holds the lock before any rank goes on; with others that are started like this process, if shared.
    """
    lock = None
    if rank.index == 0:
        if stored is None:
            attributes = {
                "provenance": provenance(setup.device),
                "exact": setup.exact,
                "inputs": dict(setup.inputs),
                "rows_per_launch": sum(chunk.stop - chunk.start for chunk in setup.launches[0]),
                "wandb_run": wandb_run,
            }
            steps = int(setup.plan.steps.max())
            create_store(path, setup.run, steps, setup.chunk_rows, attributes | setup.attributes)
        lock = place_of(path).lock(shared, seconds=lease_seconds)
        if lock.warning:
            warn(lock.warning)
        if not shared:
            remove_leases(place_of(path))
        if setup.run.replicates > Store(path).run.replicates:
            Writer(path).grow(setup.run.replicates, int(setup.plan.steps.max()))
    rank.barrier()
    return Writer(path, lock)


def check_same_arithmetic(stored: Store, setup: Setup, here: dict) -> None:
    """Raise ValueError when cells are missing, and by this provenance would have other arithmetic than those there."""
    other = other_arithmetic(stored.attributes["provenance"], here)
    missing = (stored.status == NOT_COMPUTED).any() or setup.run.replicates > stored.run.replicates
    if other and missing:
        raise ValueError(
            f"{stored.path} was begun {other}: the cells to come would have other bits; resume it there, or sweep "
            "into another --store"
        )


def check_same_machines(ranks: list[dict]) -> None:
    """Raise ValueError, on every rank, where one by its provenance computes with other arithmetic than the first."""
    for index, own in enumerate(ranks):
        other = other_arithmetic(ranks[0], own)
        if other:
            raise ValueError(
                f"rank 0 trains {other} on rank {index}: their cells would have other bits; expected ranks of one GPU "
                "model and one software stack"
            )


def announce(setup: Setup, path: Where, resuming: bool) -> None:
    """Say what is about to be trained, and how exact it is."""
    console = screen(stderr=True, soft_wrap=True)
    doing = "resuming" if resuming else "sweeping"
    times = f", {setup.run.replicates} replicates," if setup.run.replicates > 1 else ""
    console.print(f"{doing} {setup.run.cells}{times} into {path} on {device_name(setup.device)}")
    for line in setup.announce():
        console.print(line)


def with_replicates(config: SweepConfig, replicates: int) -> SweepConfig:
    """The same sweep over another number of seeds."""
    return replace(config, swept=replace(config.swept, replicates=replicates))
