"""The device's side of training: R slots, one micro-step of all of them, and what a slot shows at a mark.

Each slot holds one trajectory with its own step, position in the data, hyper-parameters and end, all on the
device. A micro-step is a fixed sequence of device work with no host synchronisation; on a GPU it is one CUDA
graph. `engine.scheduler` says what is in which slot.

A cell's numbers do not depend on its neighbours where every operator of the network is batch-invariant: that holds
on a GPU with the kernels of this project. On a CPU the same runs, side by side again, give the same bits.

Letters: R replica (slot), B batch (of one micro-step), T time, P flat parameters, S step, N row of a run's data,
n elements of a parameter.
"""

import ctypes
import gc
import platform
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as distributed
from torch import Tensor

from engine.config import Run, SweepConfig
from engine.data import IGNORED, Corpus, batch_order, rows_that_hold
from engine.evaluate import WHOLE_STACK, Probe
from engine.hyper import HYPER_PARAMETERS
from engine.measure import Reading, RowLosses, measurements_of
from engine.network import Network
from engine.optim import OPTIMIZERS, Step, by_group
from engine.plan import Mark, Trajectory, start_names
from engine.schedule import SCHEDULES, multiplier
from engine.scheduler import Ready, Scheduler
from engine.sharpness import critical_sharpness
from engine.split import Buckets, split_over
from engine.stack import Flat, Span, Stack, parameter_of
from kernels.accumulate import accumulate_
from kernels.ahead import compile_ahead
from kernels.gradient_norm import global_norm

LOW, HIGH = 0, -1  # priorities of CUDA streams
COMPUTE_BOUND = 2**24  # parameters: size above which GEMMs are compute-bound, so that updates beside them pay
INITIAL_CACHE = 4 * 2**30  # bytes of initial weights kept on the device, at most (or one seed's)
STARTS = 4  # last starts kept as slots hold them
ORDERS = 16  # last orders of data kept on the host


class Measured(NamedTuple):
    """What one mark of a trajectory measured; every cell of the mark gets it.

    values: by measurement. The weights behind it are still in `slot` while the consumer of `Trainer.train` holds it.
    """

    mark: Mark
    slot: int
    values: dict[str, Any]
    losses: np.ndarray


class Graphs:
    """The two pieces of device work: plain calls on a CPU, CUDA graphs on a GPU, an evaluation's for each count."""

    def __init__(self, step: Callable[[], None], evaluate: Callable[[int], None]) -> None:
        self.step: Callable[[], None] = step
        self.evaluate: Callable[[int], None] = evaluate

    def capture(self, counts: tuple[int, ...], digest: Callable[[], object]) -> None:
        """Compile every kernel, then capture all; they share memory, since none runs with another."""
        evaluations = {count: partial(self.evaluate, count) for count in counts}
        compile_ahead(self.step, *evaluations.values(), digest)
        stepping = capture(self.step)
        evaluating = {count: capture(each, sharing=stepping) for count, each in evaluations.items()}
        self.step = stepping.replay
        self.evaluate = lambda count: evaluating[count].replay()


class Trainer:
    """A stack of slots on one device, and everything a step of it reads and writes."""

    def __init__(
        self,
        run: Run,
        network: Network,
        corpus: Corpus,
        slots: int,
        device: torch.device,
        longest: int,
        rows: int,
    ) -> None:
        """Allocate the stack and its data on the device.

        Args:
            run: resolved.
            slots: R.
            longest: steps of the longest run these slots will hold.
            rows: of the data that a run of theirs reads, at most.
        """
        self.run_of, self.config, self.network = run, run.config, network
        self.device, self.slots, self.longest = device, slots, longest
        torch.set_float32_matmul_precision(matmul_precision(self.config.swept.precision))
        keep_freed_memory(device)
        training, family = self.config.training, self.config.family
        self.stack = make_stack(run, network, slots, device)
        self.optimizers = by_group(training.optimizer, family.groups)
        self.state = [
            {name: buffer[:, place] for name, (buffer, place) in own.items()} for own in self.state_buffers().values()
        ]
        self.initial: dict[int, Mapping[str, Tensor]] = {}
        self.flats: dict[tuple[float, ...], Flat] = {}
        self.starts: dict[tuple[float, ...], RowLosses] = {}

        self.largest_batch = int(run.values("batch").max())
        self.orders: dict[tuple[int, int], np.ndarray] = {}
        # the batch behind the last step is looked at by a measurement
        self.order_RN = torch.zeros(slots, rows + self.largest_batch, dtype=torch.int32, device=device)
        self.tokens = torch.from_numpy(corpus.tokens).to(device)
        self.targets = torch.from_numpy(corpus.targets).to(device)
        self.supervised = torch.from_numpy(corpus.supervised).to(device)
        self.micro_batch = training.micro_batch
        self.split = split_over(training.ddp, device)
        accumulates = self.largest_batch > self.micro_batch * self.split.count
        self.accumulator_RP = torch.zeros(self.stack.weight_RP.shape, device=device) if accumulates else None
        self.clips = bool((run.column("clip") > 0).any())

        # an empty slot: stop is 0, so it never trains; a slot waits, inactive, at its stop
        empty = {"step": 0, "stop": 0, "total": 1, "micro": 0, "micros": 1, "batch": 1, "nonfinite": -1}
        self.integers = torch.tensor(list(empty.values()), device=device)[:, None].repeat(1, slots)
        self.step_R, self.stop_R, self.total_R, self.micro_R = self.integers[:4]
        self.micros_R, self.batch_R, self.nonfinite_R = self.integers[4:]
        self.rates, self.names = hyper_rows(run, self.stack, self.optimizers)
        self.hyper = torch.zeros(len(self.names), slots, dtype=torch.float64, device=device)
        self.hyper_R = dict(zip(self.names, self.hyper, strict=True))
        self.seeds_R = torch.zeros(slots, dtype=torch.int64, device=device)
        self.broken_R = torch.zeros(slots, dtype=torch.int32, device=device)
        self.loss_R = torch.zeros(slots, device=device)
        self.losses_RS = torch.full((slots, longest), torch.nan, device=device)

        # Large networks on a GPU: an update of a parameter overlaps with the rest of the backward where its optimizer
        # may, unless clipping needs all gradients first. Products have precedence: an update runs where they leave
        # room on a multiprocessor.
        compute_bound = device.type == "cuda" and network.parameters >= COMPUTE_BOUND
        beside = compute_bound and any(map(self.overlaps, self.stack.spans)) and not self.clips
        self.optimizer_stream = torch.cuda.Stream(device, priority=LOW) if beside else None
        sums = device.type == "cuda" and self.split.count > 1
        self.sum_stream = torch.cuda.Stream(device, priority=HIGH) if sums else None
        forward = forward_names(run)
        self.probe = Probe(
            self.stack, corpus, network.tokenizer.token_bytes, self.micro_batch, family.row_losses, forward, device
        )
        self.graphs = Graphs(self.micro_step, self.probe.piece)
        if device.type == "cuda":
            first_1 = torch.zeros(1, dtype=torch.int64, device=device)
            self.graphs.capture((WHOLE_STACK, *self.probe.counts), lambda: self.stack.digest(first_1))

    def state_buffers(self) -> dict[str, dict[str, tuple[Tensor, slice]]]:
        """Each trained parameter's state: buffer [R, all of its optimizer's] and its own elements there, by name."""
        sizes: dict[tuple[str, str], int] = {}
        places: dict[str, dict[tuple[str, str], slice]] = {}
        for span in self.stack.spans:
            optimizer, places[span.name] = self.optimizers[span.group], {}
            for name, size in OPTIMIZERS[optimizer].init(span.shape, span.rows).items():
                start = sizes.get((optimizer, name), 0)
                places[span.name][optimizer, name] = slice(start, start + size)
                sizes[optimizer, name] = start + -(-size // 64) * 64
        buffers = {key: torch.zeros(self.slots, size, device=self.device) for key, size in sizes.items()}
        self.buffers = list(buffers.values())
        return {n: {key[1]: (buffers[key], place) for key, place in own.items()} for n, own in places.items()}

    # ---- one micro-step of every slot

    def gather(self) -> tuple[Tensor, Tensor, Tensor]:
        """The micro-batch of every slot: tokens, targets [R, B, T], and the targets of its whole batch [R]."""
        first_R = self.step_R * self.batch_R
        offset_B = torch.arange(self.micro_batch, device=self.device)
        within_RB = self.first_row()[:, None] + offset_B
        rows_RB = self.rows(first_R, within_RB)
        tokens_RBT = self.tokens[rows_RB]
        outside_RB = within_RB >= self.batch_R[:, None]
        targets_RBT = self.targets[rows_RB].masked_fill(outside_RB[:, :, None], IGNORED)
        whole_B = torch.arange(self.largest_batch, device=self.device).expand(self.slots, -1)
        counts_RB = self.supervised[self.rows(first_R, whole_B)].masked_fill(whole_B >= self.batch_R[:, None], 0)
        return tokens_RBT, targets_RBT, counts_RB.sum(1)

    def first_row(self) -> Tensor:
        """The place in each slot's batch of the first row of this rank's micro-batch, int64 [R]."""
        return (self.micro_R * self.split.count + self.split.index) * self.micro_batch

    def rows(self, first_R: Tensor, within_RB: Tensor) -> Tensor:
        """Corpus rows at some places of each slot's current batch, int64 [R, B]."""
        position_RB = (first_R[:, None] + within_RB).clamp(max=self.order_RN.shape[1] - 1)
        return self.order_RN.gather(1, position_RB).long()

    def active(self) -> Tensor:
        """Slots that train in this micro-step, bool [R]."""
        return (self.step_R < self.stop_R) & (self.nonfinite_R < 0)

    def updating(self, active_R: Tensor) -> Tensor:
        """Those of the active slots whose batch this micro-step completes, bool [R]."""
        return active_R & (self.micro_R + 1 == self.micros_R)

    def micro_step(self) -> None:
        """Forward, backward and, where a batch is complete, the update of every active slot."""
        active_R, fresh_R = self.active(), self.micro_R == 0
        update_R = self.updating(active_R)
        tokens_RBT, targets_RBT, count_R = self.gather()
        hyper_R = dict(zip(self.names, self.hyper.float(), strict=True))
        forward_R = {name: hyper_R[name] for name in self.probe.hyper_R}
        steps = self.steps_of_groups(hyper_R, update_R)

        def accumulated(span: Span, gradient: Tensor) -> Tensor:
            if self.accumulator_RP is None:
                return gradient
            piece = self.accumulator_RP[:, span.slice]
            accumulate_(piece, gradient, fresh_R, active_R)
            return piece

        batch = tokens_RBT, targets_RBT, forward_R, self.keys(), count_R
        spans, beside = self.stack.spans, self.optimizer_stream
        place_of = {span.name: place for place, span in enumerate(spans)}
        main = torch.cuda.current_stream() if self.device.type == "cuda" else None
        left: dict[int, Tensor] = {}
        kept: list[Tensor] = []  # keep alive until the streams join: the allocator may reuse it

        def ready(span: Span, gradient: Tensor) -> None:
            source = self.sum_stream or main
            if source is None or beside is None or not self.overlaps(span):
                left[place_of[span.name]] = gradient
                return
            kept.append(gradient)
            beside.wait_stream(source)
            with torch.cuda.stream(beside):
                self.update({place_of[span.name]: accumulated(span, gradient)}, span.group, steps[span.group])

        if self.split.count == 1:
            sum_R = self.stack.losses_and_gradients(*batch, ready)[0]
        else:
            buckets = Buckets(self.split, ready, self.sum_stream)
            sum_R = self.stack.losses_and_gradients(*batch, buckets.add)[0]
            buckets.flush()
            if main and self.sum_stream:
                main.wait_stream(self.sum_stream)
            (sum_R,) = self.split.sums([sum_R])
        if main and beside:
            main.wait_stream(beside)
        kept.clear()
        left = {place: accumulated(spans[place], left[place]) for place in sorted(left)}
        if self.clips:
            scale_R = self.clip_scale(list(left.values()))
            steps = {group: step._replace(scale_R=scale_R) for group, step in steps.items()}
        for group, step in steps.items():
            own = {place: gradient for place, gradient in left.items() if spans[place].group == group}
            self.update(own, group, step)
        left.clear()

        self.loss_R.copy_(torch.where(active_R, torch.where(fresh_R, sum_R, self.loss_R + sum_R), self.loss_R))
        loss_R = self.loss_R / count_R
        place_R1 = self.step_R.clamp(max=self.longest - 1)[:, None]
        self.losses_RS.scatter_(
            1, place_R1, torch.where(update_R[:, None], loss_R[:, None], self.losses_RS.gather(1, place_R1))
        )
        bad_R = update_R & (~torch.isfinite(loss_R) | (self.broken_R > 0))
        self.nonfinite_R.copy_(torch.where(bad_R, self.step_R, self.nonfinite_R))
        self.step_R.add_(update_R)
        self.micro_R.copy_(torch.where(update_R, 0, torch.where(active_R, self.micro_R + 1, self.micro_R)))

    def overlaps(self, span: Span) -> bool:
        """Whether a parameter's update may run beside the rest of the backward."""
        return OPTIMIZERS[self.optimizers[span.group]].overlaps

    def keys(self) -> Tensor:
        """What random numbers of this micro-step are keyed by: seed, step and first row of the batch, int64 [R, 3]."""
        return torch.stack([self.seeds_R, self.step_R, self.first_row()], 1)

    def steps_of_groups(self, hyper_R: dict[str, Tensor], update_R: Tensor) -> dict[str, Step]:
        """What each parameter group's optimizer needs for the slots whose batch is complete, clipping left out."""
        multiplier_R = multiplier(self.config.training.schedule, self.step_R, self.total_R, self.hyper_R)
        rates = (self.hyper[: len(self.rates)] * multiplier_R).float()
        scheduled_R = dict(zip(self.rates, rates, strict=True))
        count_R, prepared, steps = self.step_R + 1, {}, {}
        for group in dict.fromkeys(span.group for span in self.stack.spans):
            optimizer = OPTIMIZERS[self.optimizers[group]]
            sources = {name: self.run_of.source(name, group) for name in optimizer.hyper}
            own_R = {n: scheduled_R[s] if n == "lr" else hyper_R[s] for n, s in sources.items()}
            key = self.optimizers[group], *(s for n, s in sources.items() if n != "lr")
            if key not in prepared:
                prepared[key] = optimizer.prepare(own_R, count_R)
            steps[group] = Step(own_R, prepared[key], None, update_R, self.broken_R)
        return steps

    def clip_scale(self, gradients: list[Tensor]) -> Tensor:
        """The factor on every slot's gradient that holds its norm to the slot's limit, fp32 [R]."""
        norm_R, limit_R = global_norm(gradients).double(), self.hyper_R["clip"]
        # NaN norms give NaN factors: a comparison that fails must not hide them
        return torch.where(norm_R <= limit_R, 1.0, limit_R / norm_R).float()

    def update(self, gradients: dict[int, Tensor], group: str, step: Step) -> None:
        """The optimizer's step of some trained parameters of a group, by their place."""
        stack = self.stack
        parameters = [
            parameter_of(stack.spans[place], stack.weight_RP, stack.remainder_RP, gradient, self.state[place])
            for place, gradient in gradients.items()
        ]
        OPTIMIZERS[self.optimizers[group]].update(parameters, step)

    # ---- what the scheduler asks of a device

    def run(self, count: int) -> None:
        """Enqueue `count` micro-steps."""
        for _ in range(count):
            self.graphs.step()

    def fill(self, slot: int, trajectory: Trajectory) -> None:
        """Put a trajectory, at step 0, into a slot."""
        hyper = trajectory.hyper
        seed, batch = int(hyper["seed"]), int(hyper["batch"])
        self.stack.load(slot, self.flat_of(seed, hyper["init_scale"]))
        for buffer in self.buffers:
            buffer[slot] = 0
        stop = trajectory.marks[0].step
        integers = (0, stop, trajectory.total, 0, self.micro_steps(trajectory), batch, -1)
        self.integers[:, slot] = torch.tensor(integers).to(self.device)
        values = [hyper[name] for name in self.names]
        self.hyper[:, slot] = torch.tensor(values, dtype=torch.float64).to(self.device)
        if self.clips and hyper["clip"] == 0:
            self.hyper_R["clip"][slot] = torch.inf
        self.order_RN[slot] = torch.from_numpy(self.order_of(seed, hyper["unique_tokens"])).to(self.device)
        self.seeds_R[slot] = seed
        self.broken_R[slot] = 0
        self.losses_RS[slot] = torch.nan

    def order_of(self, seed: int, unique_tokens: float) -> np.ndarray:
        """The rows of the data that a run reads, in order, int32 [N]; the last few are kept."""
        counts_N = self.run_of.counts
        if counts_N is None:
            counts_N = np.full(len(self.tokens), self.tokens.shape[1], np.int32)
        unique = len(counts_N)
        if np.isfinite(unique_tokens):
            unique = int(rows_that_hold(np.array(unique_tokens), seed, counts_N))
        if (seed, unique) not in self.orders:
            if len(self.orders) >= ORDERS:
                self.orders.pop(next(iter(self.orders)))
            self.orders[seed, unique] = batch_order(seed, len(counts_N), self.order_RN.shape[1], unique)
        return self.orders[seed, unique]

    def stop_at(self, slot: int, step: int) -> None:
        """Let a slot train until it has taken `step` steps."""
        self.stop_R[slot] = step

    def nonfinite_steps(self) -> np.ndarray:
        """Each slot's first step whose loss or updated weights are not finite, -1 if none, int64 [R]."""
        return self.nonfinite_R.cpu().numpy()

    def micro_steps(self, trajectory: Trajectory) -> int:
        """Micro-steps a batch of a trajectory."""
        return -(-int(trajectory.hyper["batch"]) // (self.micro_batch * self.split.count))

    def measure(self, ready: list[Ready]) -> list[Measured]:
        """Measure slots at their marks; a slot that is no longer finite is measured for all that remain."""
        slots = torch.tensor([each.slot for each in ready], device=self.device)
        probes = self.probe.of_slots(slots, self.hyper_R, self.graphs)
        digests = self.stack.digest(slots).cpu().numpy().view(np.uint64)
        self.split.check_same(digests)
        traces = self.losses_RS[slots].cpu().numpy()
        wanted = measurements_of(self.run_of)
        measured = []
        for each, probe, digest, trace in zip(ready, probes, digests, traces, strict=True):
            hyper, start = each.trajectory.hyper, self.start_of(each.trajectory.hyper)
            for mark in each.marks:
                losses, stopped = trace[: mark.step], each.nonfinite_step
                steps = mark.step if stopped < 0 else stopped + 1
                batch, weights = int(hyper["batch"]), lambda slot=each.slot: self.stack.master_weights(slot)
                sharpness = partial(critical_sharpness, self, each.slot)
                reading = Reading(losses, steps, stopped, batch, probe, start, int(digest), weights, sharpness)
                workload = self.config.family.workload
                values = {name: own.compute[workload](reading) for name, own in wanted.items()}
                measured.append(Measured(mark, each.slot, values, losses))
        return measured

    def train(self, work: list[Trajectory], progress: Callable | None = None) -> Iterator[list[Measured]]:
        """Train every trajectory; yields what each poll measured."""
        self.scheduler: Scheduler[Measured] = Scheduler(self)
        yield from self.scheduler.train(work, progress)

    # ---- starts

    def flat_of(self, seed: int, scale: float) -> Flat:
        """The untrained weights of a seed and init_scale, as a slot holds them; the last few are kept."""
        key = -1 if self.network.same_start else seed, scale
        if key not in self.flats:
            if len(self.flats) >= STARTS:
                self.flats.pop(next(iter(self.flats)))
            self.flats[key] = self.stack.flatten(self.initial_of(seed), scale)
        return self.flats[key]

    def initial_of(self, seed: int) -> Mapping[str, Tensor]:
        """The initial weights of a seed, on the device while they are few, else made anew; those of a checkpoint, which
        are read one by one."""
        if self.network.same_start:
            return self.network.initial(seed)
        if seed not in self.initial:
            made = {name: weight.to(self.device) for name, weight in self.network.initial(seed).items()}
            if (len(self.initial) + 1) * self.network.parameters * 4 > INITIAL_CACHE:
                self.initial.clear()
            self.initial[seed] = made
        return self.initial[seed]

    def start_of(self, hyper: dict[str, float]) -> RowLosses:
        """Losses of the untrained weights on the probe, measured once for each start."""
        key = tuple(hyper[name] for name in start_names(self.run_of))
        if key not in self.starts:
            flat = self.flat_of(int(hyper["seed"]), hyper["init_scale"])
            self.starts[key] = self.probe.of_start(flat, hyper, self.graphs)
        return self.starts[key]


def make_stack(run: Run, network: Network, slots: int, device: torch.device) -> Stack:
    """The stack of a run: which parameters are frozen, and whether all replicas share them."""
    frozen = frozen_parameters(run.config, network)
    same_seed = network.same_start or len(run.values("seed")) == 1
    shared = same_seed and len(run.values("init_scale")) == 1
    dtype = torch.bfloat16 if run.config.swept.precision == "bf16" else torch.float32
    return Stack(network, slots, dtype, device, frozen, shared)


def frozen_parameters(config: SweepConfig, network: Network) -> set[str]:
    """Names of the parameters in frozen groups."""
    groups = config.training.freeze.split(",") if config.training.freeze else []
    return network.in_groups(groups, config.family.groups)


def forward_names(run: Run) -> tuple[str, ...]:
    """Hyper-parameters that the network's forward reads, without those that are off in every cell."""
    names = [name for name in run.config.family.hyper if HYPER_PARAMETERS[name].acts == "forward"]
    return tuple(name for name in names if (run.column(name) != HYPER_PARAMETERS[name].off).any())


def hyper_rows(run: Run, stack: Stack, optimizers: dict[str, str]) -> tuple[list[str], list[str]]:
    """Names of the slots' hyper-parameters: learning rates, which are scheduled, and all of them, those first."""
    rates, others = [], ["warmup", "clip", *SCHEDULES[run.config.training.schedule].hyper, *forward_names(run)]
    for group in dict.fromkeys(span.group for span in stack.spans):
        rates.append(run.source("lr", group))
        others += [run.source(name, group) for name in OPTIMIZERS[optimizers[group]].hyper if name != "lr"]
    rates = list(dict.fromkeys(rates))
    return rates, [*rates, *dict.fromkeys(others)]


def matmul_precision(precision: str) -> str:
    """torch's name for how fp32 matrix products are made."""
    return "high" if precision == "tf32" else "highest"


def keep_freed_memory(device: torch.device) -> None:
    """Let glibc keep freed memory instead of handing it back to the kernel after every operation.

    On a CPU the temporaries of a stacked step are megabytes each; mapping and clearing their pages anew
    takes several times as long as the arithmetic on them.
    """
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_threshold = -1, -3  # from malloc.h
        libc = ctypes.CDLL("libc.so.6")
        assert libc.mallopt(mmap_threshold, 2**30)
        assert libc.mallopt(trim_threshold, 2**31 - 1)


def capture(
    step: Callable[[], None], calls_before: int = 1, sharing: torch.cuda.CUDAGraph | None = None
) -> torch.cuda.CUDAGraph:
    """One call of `step` as a CUDA graph; it may share the memory of a graph that never runs with it.

    The calls before the capture load what is loaded at a first call, and run: here every slot is empty
    then, so nothing changes.
    """
    gc.collect()  # an earlier trainer's graph that died during the capture would end it
    side = torch.cuda.Stream(priority=HIGH)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(calls_before):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    pool = sharing.pool() if sharing else None
    mode = "thread_local" if distributed.is_initialized() else "global"  # NCCL's threads look at their events meanwhile
    with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode=mode):
        step()
    return graph
