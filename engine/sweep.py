"""Train every cell of a grid and keep the results: `uv run engine/sweep.py --rows-per-launch 16`.

Read from the bottom up: `main` reads the arguments, `run_sweep` trains or resumes a grid.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
import torch.distributed as distributed
from rich.console import Console
from rich.table import Table

from engine import descent, plan, progress, tracking
from engine.command import parser, screen, user_errors, warn
from engine.config import PRESETS, SweepConfig, resolve
from engine.data import Corpus, check_vocabulary, load_corpus
from engine.network import Network, load_network
from engine.outcome import DONE, NOT_COMPUTED
from engine.provenance import other_arithmetic, provenance
from engine.store import Store, Writer, array_specs, check_same_configuration, check_same_data, create_store
from engine.trainer import Harvest, Trainer, bit_exact_at_any_width

MLP_FLOPS = 1088  # a point and step: 544 multiply-adds
FLUSH = 10.0  # seconds between two writes of an unfinished launch
CPU_MEMORY = 0.5  # share of the machine's memory a stack may take on a CPU
GPU_MEMORY = 0.9  # share of a GPU's free memory a stack may take
CPU_SLOTS, GPU_SLOTS = 64, 256  # replicas beyond which a wider stack gains nothing


@dataclass(frozen=True)
class RunOptions:
    """Where and how to run; none of it changes a cell."""

    store: str = ""  # the Zarr store to make or resume (default: results/<network>-<y axis>-<x axis>)
    device: str = "auto"  # cpu or cuda; auto: cuda if there is one
    slots: int = 0  # replicas trained at once (0: what fits)
    figures: bool = True  # draw the maps and print the summary at the end
    quiet: bool = False  # no progress
    dry_run: bool = False  # print launches, stacks, memory, FLOPs and a time estimate, then stop
    wandb: str = "off"  # off, offline or online
    wandb_project: str = "fractal-llm"  # W&B project
    wandb_entity: str = ""  # W&B entity (default: your own)


@dataclass(frozen=True)
class Rank:
    """This process among those torchrun started; launches are shared out, replicas never communicate."""

    index: int
    count: int

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.count > 1:
            distributed.barrier()


def this_rank() -> Rank:
    """The rank torchrun gave this process; (0, 1) without torchrun."""
    rank = Rank(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    if rank.count > 1 and not distributed.is_initialized():
        # ranks only wait for each other, the first to finish for as long as the last one trains
        distributed.init_process_group("gloo", timeout=timedelta(days=365))
    return rank


def choose_device(name: str) -> torch.device:
    """The torch device of `--device`. Raises ValueError for an unknown or absent one."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device is {name!r}, expected auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch finds no CUDA GPU; use --device cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def default_store(config: SweepConfig) -> Path:
    """results/<network>-<y axis>-<x axis>."""
    return Path("results", "-".join((config.network, *config.swept)))


@dataclass(frozen=True)
class Setup:
    """What any sweep needs before it trains."""

    config: SweepConfig
    device: torch.device
    rows_per_launch: int


@dataclass(frozen=True)
class LanguageSetup(Setup):
    """What a language model's sweep needs beyond that.

    slots: replicas trained at once. widest: trajectories of the largest launch. memory: bytes of one replica.
    """

    slots: int
    widest: int
    network: Network
    corpus: Corpus
    memory: plan.Memory


def prepare(config: SweepConfig, options: RunOptions, rank: Rank, stored: Store | None) -> Setup:
    """Load network and data, choose launches and slots. Raises ValueError before any training."""
    if options.slots < 0:
        raise ValueError(f"slots is {options.slots}, expected at least 1, or 0 for what fits")
    device = choose_device(options.device)
    config = resolve(config, device.type)
    if config.network == "mlp":
        descent.problems_of(config, [])
        config = adopt_rows(config, automatic_mlp_rows(config, rank, device), stored)
        return Setup(config, device, int(config.rows_per_launch))
    return prepare_language(config, options, rank, stored, device)


def prepare_language(
    config: SweepConfig, options: RunOptions, rank: Rank, stored: Store | None, device: torch.device
) -> LanguageSetup:
    """`prepare` for a language model."""
    network = load_network(config, device)
    corpus = load_corpus(
        config.data,
        config.data_config or None,
        config.split,
        network.tokenizer,
        config.context,
        config.validation_rows,
        config.data_rows or None,
    )
    check_vocabulary(corpus, network.vocabulary)
    shared_out = -(-config.grid.shape[0] // rank.count)
    config = adopt_rows(config, min(plan.automatic_rows(config, device.type), shared_out), stored)
    rows = int(config.rows_per_launch)

    element = 2 if config.precision == "bf16" else 4
    activations = network.activation_bytes(config.micro_batch * config.context, element)
    if device.type == "cpu":
        activations *= 2  # plain torch keeps intermediates that the kernels recompute
    memory = plan.replica_memory(config, network.parameters, activations)
    widest = max(len(plan.trajectories(config, launch)) for launch in plan.launches(config, rows))
    if stored is not None and not bit_exact_at_any_width(device):
        slots = stored.attributes["slots"]
        torch.set_num_threads(stored.attributes["provenance"]["threads"])
    else:
        fit = plan.slots_that_fit(memory, memory_budget(device))
        slots = min(options.slots or (CPU_SLOTS if device.type == "cpu" else GPU_SLOTS), fit, widest)
    return LanguageSetup(config, device, rows, slots, widest, network, corpus, memory)


def adopt_rows(config: SweepConfig, automatic: int, stored: Store | None) -> SweepConfig:
    """The configuration with its rows a launch; where they are automatic a resumed sweep keeps the store's.

    Raises:
        ValueError: the store holds a sweep of another configuration.
    """
    if config.rows_per_launch != "auto":
        rows = int(config.rows_per_launch)
    else:
        rows = int(stored.config.rows_per_launch) if stored is not None else automatic
    config = replace(config, rows_per_launch=str(min(rows, config.grid.shape[0])))
    if stored is not None:
        check_same_configuration(stored.path, stored.config, config)
    return config


def automatic_mlp_rows(config: SweepConfig, rank: Rank, device: torch.device) -> int:
    """Rows of 2^20 cells on a GPU, 2^12 on a CPU: seconds of work. At least one launch a rank."""
    rows, cols = config.grid.shape
    cells = 2**12 if device.type == "cpu" else 2**20
    return max(min(cells // cols, -(-rows // rank.count)), 1)


def memory_budget(device: torch.device) -> int:
    """Bytes a stack may take."""
    if device.type == "cpu":
        return int(CPU_MEMORY * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return int(GPU_MEMORY * torch.cuda.mem_get_info(device)[0])


# ---- training a launch, block by block


def put(block: dict[str, np.ndarray], harvest: Harvest, first_row: int) -> None:
    """Write one harvest into every cell of its mark."""
    for row, col in harvest.mark.cells:
        at = row - first_row, col
        for name in ("first_loss", "last_loss", "val_loss", "steps", "nonfinite_step", "weights_digest"):
            block[name][at] = getattr(harvest, name)
        if "losses" in block:
            block["losses"][at][: len(harvest.losses)] = harvest.losses
        block["status"][at] = DONE


def pending(work: list[plan.Trajectory], status: np.ndarray) -> list[plan.Trajectory]:
    """The trajectories with cells still to compute, their marks cut to those."""
    left = []
    for run in work:
        marks = tuple(m for m in run.marks if any(status[cell] == NOT_COMPUTED for cell in m.cells))
        if marks:
            left.append(replace(run, marks=marks))
    return left


def train_launch(setup: LanguageSetup, trainer: Trainer, writer: Writer, rows: range, watch: progress.Progress) -> None:
    """Train what is missing of some rows; write them now and then, and when they are complete."""
    config = setup.config
    block = {name: writer.read(name, rows=slice(rows.start, rows.stop)) for name in array_specs(config)}
    work = plan.trajectories(config, rows)
    if bit_exact_at_any_width(setup.device):
        # elsewhere bits depend on the company, and an interrupted launch is run again whole
        work = pending(work, writer.status)
    written = time.monotonic()
    for harvests in trainer.train(work, watch.tokens):
        for harvest in harvests:
            put(block, harvest, rows.start)
        watch.show(rows, block)
        if time.monotonic() - written > FLUSH:
            writer.write_rows(rows.start, block)
            written = time.monotonic()
    writer.write_rows(rows.start, block)


def missing_launches(setup: Setup, store: Store, rank: Rank) -> Iterator[range]:
    """This rank's launches that have cells to compute."""
    status = store.status
    for launch in plan.launches(setup.config, setup.rows_per_launch)[rank.index :: rank.count]:
        if (status[launch.start : launch.stop] == NOT_COMPUTED).any():
            yield launch


def train_grid(setup: Setup, writer: Writer, rank: Rank, options: RunOptions, track: tracking.Tracking) -> None:
    """Train every launch of this rank that the store does not hold yet."""
    config = setup.config
    todo = list(missing_launches(setup, writer, rank))
    if not todo:
        return
    stored = {name: writer.read(name) for name in progress.LABELLED}
    with progress.Progress(config, stored, todo, options.quiet or rank.index > 0) as watch:
        trainer = None
        for launch in todo:
            if isinstance(setup, LanguageSetup):
                trainer = trainer or Trainer(config, setup.network, setup.corpus, setup.slots, setup.device)
                train_launch(setup, trainer, writer, launch, watch)
            else:
                block = descent.train_rows(config, slice(launch.start, launch.stop), str(setup.device))
                block["status"] = np.full((len(launch), config.grid.shape[1]), DONE, np.uint8)
                writer.write_rows(launch.start, block)
                watch.show(launch, block)
            watch.launched(launch)
            track.launch(watch)


# ---- the whole sweep


def open_or_create(setup: Setup, path: Path, stored: Store | None, rank: Rank, wandb_run: str = "") -> Writer:
    """The store to write: a new one, which keeps W&B's id of the sweep, or one of the same configuration."""
    data_digest = setup.corpus.digest if isinstance(setup, LanguageSetup) else ""
    if rank.index == 0:
        if stored is None:
            extra: dict[str, Any] = {
                "provenance": provenance(setup.device),
                "exact": "at any width" if exact_at_any_width(setup) else "in the same launch",
                "data_digest": data_digest,
                "wandb_run": wandb_run,
            }
            if isinstance(setup, LanguageSetup):
                extra |= {"slots": setup.slots, "data": setup.corpus.description}
            create_store(path, setup.config, plan.longest(setup.config), setup.rows_per_launch, extra)
        else:
            check_same_data(stored, data_digest)
            check_same_arithmetic(stored, setup.device)
    # the other ranks write under the lock of the first, so not before it has it
    writer = Writer(path) if rank.index == 0 else None
    rank.barrier()
    return writer or Writer(path, lock=False)


def check_same_arithmetic(stored: Store, device: torch.device) -> None:
    """Raise ValueError when cells are missing, and would be trained with other arithmetic than those there."""
    other = other_arithmetic(stored.attributes["provenance"], provenance(device))
    if other and (stored.status == NOT_COMPUTED).any():
        raise ValueError(
            f"{stored.path} was begun {other}: the cells to come would have other bits; resume it there, or sweep "
            "into another --store"
        )


def exact_at_any_width(setup: Setup) -> bool:
    """Whether a cell's bits are the same whatever trains beside it; the mlp's cells never meet."""
    return not isinstance(setup, LanguageSetup) or bit_exact_at_any_width(setup.device)


def dry_run_table(setup: Setup, stored: Store | None) -> Table:
    """What a sweep would do, or what is left of one, without doing it."""
    config = setup.config
    table = Table(title="dry run: nothing is trained or stored", show_header=False, title_justify="left")
    rows, cols = config.grid.shape
    table.add_row("grid", f"{rows} x {cols} = {rows * cols:,} cells; y {config.grid.y}; x {config.grid.x}")
    launches = plan.launches(config, setup.rows_per_launch)
    left = launches if stored is None else list(missing_launches(setup, stored, Rank(0, 1)))
    held = f"; {len(left)} of them still to train" if stored is not None else ""
    table.add_row("launches", f"{len(launches)} of up to {setup.rows_per_launch} rows{held}")
    if isinstance(setup, LanguageSetup):
        flops, rate = describe_language_work(table, setup, left, stored)
    else:
        flops, rate = describe_mlp_work(table, setup, left)
    spread = "two cores; expect half to twice that" if setup.device.type == "cpu" else "an H100"
    table.add_row("time", f"about {progress.clock(flops / rate)} at {rate:.1g} FLOP/s, typical of {spread}")
    return table


def describe_mlp_work(table: Table, setup: Setup, left: list[range]) -> tuple[float, float]:
    """Rows of the dry run for the paper's network; FLOPs and a typical rate."""
    config = setup.config
    steps = sum(len(launch) for launch in left) * config.grid.x.points * config.steps
    flops = MLP_FLOPS * (config.minibatch or config.data_points) * steps
    table.add_row("work", f"{config.steps} steps a cell, {steps:,} in all, {flops:.3g} FLOPs")
    rate = 5e10 if setup.device.type == "cpu" else 5e13
    return flops, rate / 3 if config.precision == "fp64" else rate


def describe_language_work(
    table: Table, setup: LanguageSetup, left: list[range], stored: Store | None
) -> tuple[float, float]:
    """Rows of the dry run for a language model; FLOPs and a typical rate."""
    config, memory = setup.config, setup.memory
    work = [run for launch in left for run in plan.trajectories(config, launch)]
    if stored is not None and bit_exact_at_any_width(setup.device):
        work = pending(work, stored.status)
    cells = sum(len(mark.cells) for run in work for mark in run.marks)
    tokens = sum(run.steps * run.hyper["batch"] * config.context for run in work)
    # a batch that micro-batches do not divide is computed with masked rows; a held-out token is a third of a step's
    computed = sum(run.steps * -(-run.hyper["batch"] // config.micro_batch) for run in work) * config.micro_batch
    held_out = sum(len(run.marks) for run in work) * config.validation_rows / 3
    flops = (computed + held_out) * config.context * setup.network.flops_per_token
    table.add_row("trajectories", f"{len(work):,} runs serve {cells:,} cells")
    table.add_row("stack", f"{setup.slots} replicas at once (a launch holds up to {setup.widest} trajectories)")
    table.add_row("network", f"{config.network}, {setup.network.parameters:,} parameters, {config.precision}")
    table.add_row("data", setup.corpus.description)
    table.add_row(
        "memory",
        f"{memory.stack(setup.slots) / 2**30:.2f} GiB: a replica {memory.state / 2**20:.1f} MiB of state, "
        f"{memory.activations / 2**20:.1f} MiB of activations",
    )
    table.add_row("work", f"{tokens:,.0f} tokens to train on, {flops:.3g} FLOPs with held-out losses")
    return flops, 2e10 if setup.device.type == "cpu" else 2.5e14


def run_sweep(config: SweepConfig, options: RunOptions) -> Path:
    """Train (or resume) a whole grid into its store; the store's path.

    Raises:
        ValueError: anything a user gave that cannot be done, before any training.
    """
    rank = this_rank()
    console = screen(stderr=True, soft_wrap=True)
    tracking.check(options.wandb)
    path = Path(options.store) if options.store else default_store(resolve(config, "cpu"))
    stored = Store(path) if path.exists() else None
    rank.barrier()
    setup = prepare(config, options, rank, stored)
    if options.dry_run:
        if rank.index == 0:
            screen().print(dry_run_table(setup, stored))
        return path
    # before the store is made: W&B may refuse
    identity = uuid4().hex if stored is None else stored.attributes.get("wandb_run", "")
    where = options.wandb, options.wandb_project, options.wandb_entity
    track = tracking.start(*where, setup.config, rank.index == 0, identity, path.name)
    with closing(open_or_create(setup, path, stored, rank, identity)) as writer:
        if writer.lock is not None and writer.lock.warning:
            warn(writer.lock.warning)
        if not options.quiet and rank.index == 0:
            announce(setup, path, stored, console)
        train_grid(setup, writer, rank, options, track)
        rank.barrier()
    if rank.index == 0 and options.figures:
        # a process of its own: the engine does not import the analysis, which reads stores
        plot = Path(__file__).parent.parent / "analysis" / "plot.py"
        drawn = subprocess.run([sys.executable, str(plot), "--store", str(path)])
        if drawn.returncode:
            raise ValueError(f"all cells are stored, but the maps were not drawn; run analysis/plot.py --store {path}")
    track.finish(path)
    return path


def announce(setup: Setup, path: Path, stored: Store | None, console: Console) -> None:
    """Say what is about to be trained, and how exact it is."""
    rows, cols = setup.config.grid.shape
    doing = "resuming" if stored is not None else "sweeping"
    console.print(f"{doing} {rows} x {cols} cells into {path} on {provenance(setup.device)['device']}")
    if not isinstance(setup, LanguageSetup):
        return
    if setup.widest > setup.slots:
        console.print(
            f"a launch of {setup.rows_per_launch} rows is {setup.widest} trajectories; {setup.slots} replicas train at "
            "once and slots are refilled: the cells are the same"
        )
    if not exact_at_any_width(setup):
        console.print("on a CPU a cell's bits repeat when its launch is run again: `replay` does that")


@dataclass(frozen=True)
class Preset:
    """Where the defaults below come from."""

    preset: str = "default"  # default, or smollm2-sft: fine-tune SmolLM2-135M over lr x tokens


def check_fixed(config: SweepConfig, preset: SweepConfig) -> None:
    """Raise ValueError where a value is given to what an axis sweeps: it would say nothing."""
    for name in resolve(config, "cpu").swept:
        value = config.fixed(name)
        if value is not None and value != preset.fixed(name):
            raise ValueError(f"{name} is an axis, and --{name} is {value:g}; leave that out, or sweep something else")


def main() -> None:
    """The command."""
    first = parser("")
    first.add_arguments(Preset, dest="preset")
    chosen = first.parse_known_args([a for a in sys.argv[1:] if a not in ("-h", "--help")])[0].preset.preset
    with user_errors():
        if chosen not in PRESETS:
            raise ValueError(f"preset is {chosen!r}, expected one of {', '.join(PRESETS)}")
        reader = parser(
            "Train every cell of a grid of hyper-parameters, many at once, and map where training works and where "
            "it breaks. The same command again resumes; finished cells are never trained twice."
        )
        reader.add_arguments(Preset, dest="preset")
        reader.add_arguments(RunOptions, dest="options")
        reader.add_arguments(SweepConfig, dest="config", default=PRESETS[chosen])
        arguments = reader.parse_args()
        check_fixed(arguments.config, PRESETS[chosen])
        run_sweep(arguments.config, arguments.options)


if __name__ == "__main__":
    main()
