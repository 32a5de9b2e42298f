"""The workload of stacked language models: what they are trained on, in how many slots, launch by launch.

Data, network and plan make a `Setup`; its trainer is allocated at the first launch and kept.
"""

import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from rich.table import Table

from engine import plan
from engine.amount import amount_of, amount_words, epochs_words
from engine.checkpoint import LoadedModel
from engine.command import warn
from engine.config import Run
from engine.data import Corpus, check_vocabulary, load_corpus
from engine.family import VECTORS
from engine.hyper import rule_of
from engine.network import Network
from engine.optim import OPTIMIZERS, by_group
from engine.plan import Launch, Memory, Plan, Trajectory, Work
from engine.split import split_over
from engine.stack import spans_of
from engine.step import Trainer, forward_names, frozen_parameters
from engine.workload import COUNTS, Replay, check_steps

CPU_MEMORY = 0.5  # share of the machine's memory a stack may take on a CPU
GPU_MEMORY = 0.9  # share of a GPU's free memory a stack may take
CPU_SLOTS, GPU_SLOTS = 64, 256  # replicas beyond which a wider stack gains nothing
CPU_FLOPS = 2e10  # a second, typical of two cores
# Fitted to a replica's share of steps on an H100: d4 to d20, d12 at a context of 2,048 and SmolLM2, all within 6%
# (benchmarks/LOG.md). Training's FLOPs and the probe's, and bytes moved, a second; bytes moved for a parameter, and for
# a byte of activations.
STEP_FLOPS, PROBE_FLOPS, GPU_BYTES = 630e12, 330e12, 3.0e12
PARAMETER_BYTES, ACTIVATION_BYTES = 20, 5.6
WAVE_SECONDS = 30.0  # that a wave (or one run) may take on a CPU by CPU_FLOPS: what an interruption costs, at most


@dataclass
class LanguageSetup:
    """A language model's sweep, ready to train."""

    run: Run
    plan: Plan
    device: torch.device
    network: Network
    corpus: Corpus
    memory: Memory
    chunk_rows: int
    launches: list[Launch]
    slots: int
    """replicas trained at once"""
    wave: int
    """runs that train together, start to end, where their bits depend on each other; 0: slots are refilled"""
    widest: int
    """trajectories of the largest launch"""
    trainer: Trainer | None = field(default=None)

    @property
    def exact(self) -> str:
        """What a cell's bits depend on."""
        if batch_invariant(self.run, self.device):
            return "at any width"
        return "in the same wave" if self.wave else "in the same launch"

    @property
    def width(self) -> int:
        """Runs that train at once."""
        return self.slots

    @property
    def inputs(self) -> dict[str, str]:
        """Digests of what decides a cell."""
        model = {} if self.network.loaded is None else {"model": self.network.loaded.digest}
        return {"data": self.corpus.digest} | model

    @property
    def attributes(self) -> dict[str, Any]:
        """What the store says of it."""
        probe = (self.corpus.validation_targets >= 0).sum()
        given = {"amount": amount_of(self.corpus), "data": self.corpus.description}
        given["start"] = self.run.config.family.origin(self.run.config.shape)
        return {"slots": self.slots, "wave": self.wave, "probe_tokens": int(probe)} | given

    def new_trainer(self, slots: int, longest: int | None = None) -> Trainer:
        """A trainer of these data."""
        longest = longest or int(self.plan.steps.max())
        return Trainer(self.run, self.network, self.corpus, slots, self.device, longest, most_rows(self.plan))

    def train(
        self, launch: Launch, status: np.ndarray, progress: Callable[[float, float], None]
    ) -> Iterator[list[tuple[np.ndarray, dict[str, np.ndarray]]]]:
        """Train what is missing of a launch; yields what each poll measured, as (flat cells, measurements).

        Where the device's memory does not hold the slots, half as many go on: with what is not measured yet where
        cells are batch-invariant, else with the whole launch again. Raises ValueError where not even one fits.
        """
        exact = batch_invariant(self.run, self.device)
        left = self.to_train(launch, status)
        while len(left):
            todo = left
            try:
                self.trainer = self.trainer or self.new_trainer(self.slots)
                for wave in self.waves(todo):
                    for measured in self.trainer.train(wave, self.counted(progress)):
                        if exact:
                            left = np.setdiff1d(left, [cell for each in measured for cell in each.mark.cells])
                        yield [(np.array(each.mark.cells), each.values) for each in measured]
                return
            except torch.OutOfMemoryError:
                self.trainer = None
            if self.run.config.training.ddp > 1:  # the others wait for this rank with all their slots
                raise ValueError(
                    f"{self.slots} replicas do not fit into this rank's memory; expected fewer: give --slots"
                )
            self.halve_slots(exact)

    def halve_slots(self, exact: bool) -> None:
        """Go on with half as many slots, and say so. Raises ValueError where there was one."""
        if self.slots == 1:
            raise ValueError("one replica does not fit into the device's memory; lower --context or --micro-batch")
        gc.collect()
        torch.cuda.empty_cache()
        before, self.slots = self.slots, self.slots // 2
        then = "with the same bits" if exact else "its launch begins again, and its bits are those of that width"
        warn(f"{before} replicas do not fit into the device's memory: {self.slots} train at once, {then}")

    def waves(self, cells: np.ndarray) -> list[list[Trajectory]]:
        """The runs that serve some cells, as they are given to the slots: each wave when the one before has ended."""
        runs = self.plan.work_in(cells).trajectories()
        size = self.wave or max(len(runs), 1)
        return [runs[start : start + size] for start in range(0, len(runs), size)]

    def to_train(self, launch: Launch, status: np.ndarray) -> np.ndarray:
        """Those missing; where bits depend on the wave, the cells of every wave that misses some."""
        missing = self.plan.missing(launch, status)
        if batch_invariant(self.run, self.device):
            return missing
        waves = [cells_of(wave) for wave in self.waves(self.plan.cells_in(launch))]
        return np.sort(np.concatenate([missing[:0], *(cells for cells in waves if np.isin(cells, missing).any())]))

    def counted(self, progress: Callable[[float, float], None]) -> Callable:
        """Steps of trajectories as tokens."""

        def tokens(steps: list[tuple[Trajectory, float]]) -> float:
            return sum(run.hyper["batch"] * count for run, count in steps) * self.run.config.training.context

        return lambda trained, saved: progress(tokens(trained), tokens(saved))

    def replay(self, cell: int) -> Replay:
        """Train one cell again: alone where it is batch-invariant, else its wave until it has been measured."""
        return next(self.replays(np.array([cell])))[1]

    def replays(self, cells: np.ndarray) -> Iterator[tuple[list[int], Replay]]:
        """Train some cells (flat indices) again, side by side; yields those of one mark when it has been measured.

        Where cells are batch-invariant they alone are trained, else the waves that hold them, each until all of its
        own are measured.
        """
        exact, left = batch_invariant(self.run, self.device), set(cells.tolist())
        waves = self.waves(cells) if exact else [w for each in self.launches for w in self.waves_with(each, left)]
        for wave in waves:
            trainer = self.new_trainer(min(self.slots, len(wave)) if exact else self.slots)
            wanted = left & set(cells_of(wave).tolist())
            for measured in trainer.train(wave):
                for each in measured:
                    own = [cell for cell in each.mark.cells if cell in wanted]
                    if own:
                        digest = int(each.values["weights_digest"])
                        weights, export = trainer.stack.master_weights(each.slot), self.network.export
                        yield own, Replay(each.losses, digest, weights, export and export(weights))
                    wanted -= set(own)
                if not wanted:
                    break
            assert not wanted, "a wave holds no trajectory that serves its cells"
            del trainer  # before the next one takes its memory

    def waves_with(self, launch: Launch, cells: set[int]) -> list[list[Trajectory]]:
        """The waves of a launch in which some cells are."""
        return [
            wave for wave in self.waves(self.plan.cells_in(launch)) if not cells.isdisjoint(cells_of(wave).tolist())
        ]

    def start(self, cell: int) -> LoadedModel:
        """The untrained weights of a cell (flat index), of a network that a checkpoint format has."""
        hyper = {name: float(values[0]) for name, values in plan.hyper_of(self.run, np.array([cell])).items()}
        weights = self.network.initial(int(hyper["seed"]))
        scaled = {n: w.float() * hyper["init_scale"] if w.dim() > 1 else w.float() for n, w in weights.items()}
        assert self.network.export is not None
        return self.network.export(scaled)

    def describe(self, table: Table, left: list[Launch], status: np.ndarray) -> float:
        """Add rows of the dry run to a table; the seconds it will take about."""
        run, training, memory = self.run, self.run.config.training, self.memory
        parts = [self.to_train(each, status) for each in left]
        work = [self.plan.work_in(cells) for cells in parts]
        cells, runs = sum(map(len, parts)), sum(len(each.runs) for each in work)
        tokens = sum(each.costs.sum() for each in work)
        table.add_row("trajectories", f"{runs:,} runs serve {cells:,} cells")
        table.add_row("stack", f"{self.slots} replicas at once (a launch holds up to {self.widest} trajectories)")
        table.add_row(
            "network", f"{run.config.title}, {self.network.parameters:,} parameters, {run.config.swept.precision}"
        )
        table.add_row("data", self.corpus.description)
        table.add_row("epochs", epochs_words(self.plan, amount_of(self.corpus)))
        table.add_row(
            "memory",
            f"{memory.stack(self.slots) / 2**30:.2f} GiB: a replica {memory.state / 2**20:.1f} MiB of state, "
            f"{memory.activations / 2**20:.1f} MiB of activations; shared {memory.shared / 2**20:.1f} MiB",
        )
        marks = sum(len(each.marks) for each in work)
        probed = marks * len(self.corpus.validation_tokens) * training.context / 3
        flops = (tokens + probed) * self.network.flops_per_token
        table.add_row("work", f"{tokens:,.0f} tokens to train on, {flops:.3g} FLOPs with the probe's")
        return sum(self.seconds(each) for each in work)

    def seconds(self, work: Work) -> float:
        """What some runs take about: slots times steps until the last has ended, and the probe at every mark."""
        if not len(work.runs):
            return 0.0
        training = self.run.config.training
        micro = -(-self.plan.cost.ravel()[work.longest] / training.context // rows_at_once(self.run)).astype(int)
        steps = np.sort(work.lengths * np.abs(micro))[::-1].tolist()
        slots = min(self.slots, len(steps))
        tokens = training.micro_batch * training.context
        probe = len(work.marks) * len(self.corpus.validation_tokens) * training.context / 3
        if self.device.type == "cpu":
            trained = slots * plan.makespan(steps, slots) * tokens
            return (trained + probe) * self.network.flops_per_token / CPU_FLOPS
        moved = PARAMETER_BYTES * self.network.parameters + ACTIVATION_BYTES * self.memory.activations
        step = tokens * self.network.flops_per_token / STEP_FLOPS + moved / GPU_BYTES
        return slots * plan.makespan(steps, slots) * step + probe * self.network.flops_per_token / PROBE_FLOPS

    def announce(self) -> list[str]:
        """Lines for the start of a sweep."""
        training = self.run.config.training
        amount = amount_of(self.corpus)
        lines = [f"data: {amount_words(training.data, amount)}; epochs: {epochs_words(self.plan, amount)}"]
        if self.widest > self.slots:
            how = "each wave when the one before has ended" if self.wave else "and slots are refilled"
            lines.append(f"a launch is {self.widest} trajectories; {self.slots} replicas train at once, {how}")
        frozen, groups = frozen_parameters(self.run.config, self.network), self.network.groups
        for name in frozen:
            if len(groups[name]) > 1 and VECTORS not in groups[name]:
                lines.append(f"{name} is tied: it is frozen in its groups {' and '.join(groups[name])}")
        vectors = [name for name, own in groups.items() if own[0] == VECTORS and name not in frozen]
        if vectors:
            optimizer = by_group(training.optimizer, self.run.config.family.groups)[VECTORS]
            lines.append(f"{len(vectors)} norms and biases are the group {VECTORS}, trained by {optimizer}")
        if training.ddp > 1:
            lines.append(f"{training.ddp} ranks share every batch; a cell's bits are those of that number of ranks")
        if not batch_invariant(self.run, self.device):
            lines.append("a cell's bits repeat when the runs beside it are run again: `replay` does that")
        return lines


def counts_of(corpus: Corpus, count: str) -> np.ndarray | None:
    """What each row adds to `tokens`, int32 [N]; None: its context."""
    return getattr(corpus, COUNTS[count]) if COUNTS[count] else None


def check_unique(run: Run, corpus: Corpus) -> None:
    """Raise ValueError where a run is to see more unique tokens than there are."""
    unique = run.column("unique_tokens")
    most = unique[np.isfinite(unique)].max(initial=0)
    there = corpus.tokens.size if run.counts is None else int(run.counts.sum())
    if most > there:
        raise ValueError(
            f"unique_tokens goes up to {most:,.0f}, but the data have {there:,} ({run.config.training.count}) in "
            f"{len(corpus.tokens):,} rows; expected at most as many: lower it, or raise --data-rows (0: all)"
        )


def most_rows(made: Plan) -> int:
    """Rows of the data that a run reads, at most."""
    return int((made.steps * made.run.column("batch")).max())


def batch_invariant(run: Run, device: torch.device) -> bool:
    """Whether a cell's bits are the same at any number of replicas, or only beside the same others."""
    return device.type == "cuda" and run.config.family.batch_invariant


def cells_of(runs: list[Trajectory]) -> np.ndarray:
    """Flat indices of the cells that some runs serve."""
    return np.array([cell for run in runs for mark in run.marks for cell in mark.cells])


def prepare(run: Run, device: torch.device, options: Any, ranks: int, stored: Any) -> LanguageSetup:
    """Load network and data, plan, choose launches and slots.

    Args:
        options: engine.options.RunOptions.
        ranks: processes that share the launches.
        stored: the store that is resumed, or None.

    Raises:
        ValueError: what the user gave cannot be trained; before any training.
    """
    split = split_over(run.config.training.ddp, device)
    network = run.config.family.build(run.config, device).grouped_for(run)
    run = with_date(run, network, stored)
    check_groups(run, network)
    check_batching(run, network)
    made = plan.plan_runs(run)
    training = run.config.training
    if not training.validation_rows:
        rows = stored.config.training.validation_rows if stored is not None else plan.automatic_probe_rows(made)
        training = replace(training, validation_rows=rows)
        run = replace(run, config=replace(run.config, training=training))
        made = replace(made, run=run)
    if training.validation_rows < 2:
        raise ValueError("validation_rows is 1; expected at least 2, or 0 for automatic: one row has no standard error")
    corpus = load_corpus(
        training.data,
        training.data_config or None,
        training.split,
        network.tokenizer,
        training.context,
        training.validation_rows,
        training.data_rows or None,
        training.packing,
    )
    check_vocabulary(corpus, network.vocabulary)
    counts = counts_of(corpus, training.count)
    if counts is not None:  # budgets that the data decide are planned now, with the data
        run = replace(run, counts=counts)
        made = plan.plan_runs(run)
        check_steps(run)
    check_unique(run, corpus)
    exact = batch_invariant(run, device)
    chunk_rows, rows = launch_rows(made, device, options.rows_per_launch, ranks, stored, exact)
    launches = plan.launches(made, chunk_rows, rows, exact)
    memory = memory_of(made, network, corpus, device)
    if options.fsdp:
        raise ValueError(no_fsdp(run, network, memory, memory_budget(device)))
    works = [made.work_in(made.cells_in(launch)) for launch in launches]
    widest = max(works, key=lambda work: len(work.runs))
    wave = 0
    if stored is not None and not exact:
        # a store without waves is of a version whose launches refilled their slots
        slots, wave = stored.attributes["slots"], stored.attributes.get("wave", 0)
        torch.set_num_threads(stored.attributes["provenance"]["threads"])
    else:
        fit = split.least(plan.slots_that_fit(memory, memory_budget(device)))
        most = cpu_slots(works, network) if device.type == "cpu" else GPU_SLOTS
        slots = plan.even_slots(widest.lengths, min(options.slots or most, fit))
        wave = slots if device.type == "cpu" else 0
    return LanguageSetup(
        run, made, device, network, corpus, memory, chunk_rows, launches, slots, wave, len(widest.runs)
    )


def with_date(run: Run, network: Network, stored: Any) -> Run:
    """The run with the day that its chat template prints as today, so that its data are the same on any other.

    It is the one given, the store's, or today's; the network's tokenizer takes it. Raises ValueError for a date that
    nothing prints.
    """
    training = run.config.training
    tokenizer: Any = network.tokenizer
    if not tokenizer.dated:
        if training.date:
            raise ValueError(f"date is {training.date}, but no data of this network print it; leave it out")
        return run
    today = datetime.now(UTC).date().isoformat() if stored is None else stored.config.training.date
    tokenizer.date = training.date or today
    return replace(run, config=replace(run.config, training=replace(training, date=tokenizer.date)))


def cpu_slots(works: list[Work], network: Network) -> int:
    """Slots of a CPU, so few that a wave of the longest runs lasts at most WAVE_SECONDS."""
    longest = max(work.costs.max() for work in works) * network.flops_per_token / CPU_FLOPS
    return min(max(int(WAVE_SECONDS / longest), 1), CPU_SLOTS)


def launch_rows(made: Plan, device: torch.device, asked: str, ranks: int, stored: Any, exact: bool) -> tuple[int, int]:
    """Rows of a stored chunk, and of a launch.

    Raises:
        ValueError: `asked` is no number, or is not the store's where bits depend on the launch.
    """
    rows = made.run.cells.shape[0]
    if asked != "auto" and (not asked.isdecimal() or int(asked) < 1):
        raise ValueError(f"rows_per_launch is {asked!r}; expected auto or a whole number >= 1")
    if stored is not None:
        chunk = stored.chunk_rows
        if exact:
            return chunk, plan.automatic_launch_rows(made, chunk, ranks) if asked == "auto" else int(asked)
        launch = int(stored.attributes["rows_per_launch"])
        if asked not in ("auto", str(launch)):
            raise ValueError(
                f"rows_per_launch is {asked}, but {stored.path} was begun with {launch}, on which a cell's bits depend "
                "here; leave it out, or sweep into another --store"
            )
        return chunk, launch
    chunk = min(plan.automatic_chunk_rows(made, device.type), plan.shared_rows(rows, ranks))
    if asked != "auto":
        chunk = min(int(asked), rows, chunk if exact else rows)
        return chunk, int(asked)
    return chunk, plan.automatic_launch_rows(made, chunk, ranks) if exact else chunk


def check_groups(run: Run, network: Network) -> None:
    """Raise ValueError for a group's value that no trained tensor takes: a tied unembedding's, momentum under AdamW."""
    frozen = frozen_parameters(run.config, network)
    if len(frozen) == len(network.shapes):
        raise ValueError(f"freeze is {run.config.training.freeze!r}, which leaves nothing to train; freeze less")
    groups = {own[0] for name, own in network.groups.items() if name not in frozen}
    chosen = by_group(run.config.training.optimizer, run.config.family.groups)
    check_matrices(run, network, chosen, frozen)
    for name in run.given:
        base, _, group = name.partition(".")
        takers = [each for each in sorted(groups) if run.source(base, each) == name]
        if not takers and (group or (name in run.names and rule_of(name).by_group)):
            raise ValueError(
                f"{name} changes nothing: no trained tensor of {run.config.title!r} takes it (a tied one follows its "
                f"first group); the groups are {', '.join(sorted(groups))}"
            )
        if group and not any(base in OPTIMIZERS[chosen[each]].hyper for each in takers):
            raise ValueError(
                f"{name} changes nothing: {', '.join(takers)} is trained by {chosen[takers[0]]}, which has no {base}; "
                f"leave it out, or give that group another --optimizer"
            )


def check_matrices(run: Run, network: Network, chosen: dict[str, str], frozen: set[str]) -> None:
    """Raise ValueError for a group with a vector or a table of tokens whose optimizer takes matrices only."""
    tables = network.tables
    for name, (group, *_) in network.groups.items():
        shape, optimizer = network.shapes[name], chosen[group]
        if OPTIMIZERS[optimizer].matrices_only and name not in frozen and (len(shape) != 2 or name in tables):
            what = "a table with a row for each token" if name in tables else f"no matrix, its shape is {shape}"
            raise ValueError(
                f"optimizer {optimizer} of group {group!r} takes matrices between hidden units, but {name} is {what}; "
                f"give that group another one, {group}=adamw in --optimizer"
            )


def check_batching(run: Run, network: Network) -> None:
    """Raise ValueError naming the operator for which torch.func.vmap has no rule, by one tiny step of two replicas.

    Networks whose operators are all this project's need no trial.
    """
    if run.config.family.batch_invariant:
        return
    weights = {name: torch.stack([weight] * 2).requires_grad_() for name, weight in network.initial(0).items()}
    tokens_RBT = torch.zeros(2, 1, run.config.training.context, dtype=torch.int64)
    hyper_R = {name: torch.zeros(2) for name in forward_names(run)}

    def one(weights, tokens_BT, hyper, key):
        return torch.func.functional_call(network.module, weights, (tokens_BT, tokens_BT, hyper, key))

    try:
        losses = torch.func.vmap(one)(weights, tokens_RBT, hyper_R, torch.zeros(2, 3, dtype=torch.int64))
        losses.sum().backward()
    except RuntimeError as error:  # torch has no class of its own for this
        text = " ".join(str(error).split())
        if "vmap" not in text and "Batching rule" not in text:
            raise
        raise ValueError(
            f"network {run.config.network!r} cannot be stacked: {text[:300]}; write that operator out in ones that "
            "torch.func.vmap maps"
        ) from error


def no_fsdp(run: Run, network: Network, memory: Memory, budget: int) -> str:
    """Why a replica's state is not sharded over ranks, and the arithmetic of it."""
    gib, ranks = 2**30, int(os.environ.get("WORLD_SIZE", 1))
    sharded = memory.shared + memory.state / ranks + memory.activations + memory.weights
    return (
        f"--fsdp: {run.config.title} has {memory.state / network.parameters:.1f} bytes of state a parameter, so one "
        f"replica takes {memory.stack(1) / gib:.2f} GiB where this device offers {budget / gib:.2f}, and sharded would "
        f"take {sharded / gib:.2f} on each of {ranks} ranks; expected a network that fits alone, since FSDP shards the "
        "parameters that a module owns, and a stack's are slices of flat tensors under vmap, which DTensor has no rule "
        "for: leave --fsdp out; where it does not fit, lower --depth, --context or --micro-batch, or take --optimizer "
        "lion or sgd (4 bytes a parameter less)"
    )


def rows_at_once(run: Run) -> int:
    """Rows of a batch that a micro-step takes, on all ranks that share it."""
    return run.config.training.micro_batch * run.config.training.ddp


def memory_of(made: Plan, network: Network, corpus: Corpus, device: torch.device) -> Memory:
    """Bytes a stack needs on the device.

    A replica: fp32 master (with bf16 compute: bf16 weight and 16-bit remainder), its optimizers' fp32 state, a gradient
    in the compute precision (and its sum over ranks), an fp32 accumulator where batches are cut, its loss trace, its
    order of the data; frozen parameters that are not shared. Shared: data, initial weights kept, frozen parameters
    otherwise.
    """
    run, config = made.run, made.run.config
    compute = 2 if config.swept.precision == "bf16" else 4
    names = frozen_parameters(config, network)
    optimizers = by_group(config.training.optimizer, config.family.groups)
    spans = spans_of(network, [name for name in network.shapes if name not in names])
    trained = spans[-1].slice.stop
    frozen = network.parameters - trained if names else 0
    same_seed = network.same_start or len(run.values("seed")) == 1
    shared_frozen = same_seed and len(run.values("init_scale")) == 1
    batch = int(run.values("batch").max())
    accumulator = 4 if batch > rows_at_once(run) else 0
    gradients = compute if config.training.ddp == 1 else 2 * compute  # this rank's, and their sum
    states = sum(OPTIMIZERS[optimizers[span.group]].state_bytes(span.shape, span.rows) for span in spans)
    longest = int(made.steps.max())
    state = trained * (4 + gradients + accumulator) + states + 4 * (longest + most_rows(made) + batch)
    state += 0 if shared_frozen else frozen * compute
    tokens = config.training.micro_batch * config.training.context
    activations = network.activation_bytes(tokens, compute)
    if device.type == "cpu":
        activations *= 2  # plain torch keeps intermediates that the kernels recompute
    seeds = len(run.values("seed"))
    initial = min(1 if network.same_start else seeds, max(2**32 // (4 * network.parameters), 1))
    shared = corpus.tokens.nbytes * 2 + initial * 4 * network.parameters
    shared += frozen * compute if shared_frozen else 0
    return Memory(shared, state, activations, network.parameters * compute)


def memory_budget(device: torch.device) -> int:
    """Bytes a stack may take."""
    if device.type == "cpu":
        return int(CPU_MEMORY * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return int(GPU_MEMORY * torch.cuda.mem_get_info(device)[0])
