"""The slot engine: trains trajectories in the slots of a stack until all have been read off.

A stack has R slots. Each holds one trajectory with its own step, position in the data, hyper-parameters
and end, all on the device. One micro-step of every slot is a fixed sequence of device work with no
host synchronisation; on a GPU it is one CUDA graph. The host looks in now and then, reads off the
slots that have reached a mark or are no longer finite, and refills those that are finished.

A cell's numbers do not depend on its company where every operator of the network is invariant to the
number of replicas: that holds on a GPU with the kernels of this project. On a CPU the same launch,
run again, gives the same bits.

Letters: R replica (slot), E replica under evaluation, B batch (of one micro-step), T time, P flat
parameters, S step.
"""

import ctypes
import platform
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine import optim, plan
from engine.config import SweepConfig
from engine.data import IGNORED, Corpus, batch_order
from engine.network import Network
from engine.plan import Mark, Trajectory, largest_batch, longest, seeds
from engine.schedule import factor
from engine.stack import Span, Stack
from kernels.accumulate import accumulate_
from kernels.ahead import compile_ahead
from kernels.gradient_norm import global_norm

LOOK = 32  # micro-steps between two looks of the host, at most
IDLE = 0.03  # share of a stack's slots that may wait, finished, until the next look
LAST = 20  # steps that last_loss is the mean of
RATES = ("attention", "mlp", "embedding", "unembedding")
HYPER = (*RATES, "warmup", "weight_decay", "clip", "beta1", "beta2", "label_smoothing")
LOW, HIGH = 0, -1  # priorities of CUDA streams
BESIDE = 2**24  # parameters from which products are bound by arithmetic, so that updates beside them pay
RESIDENT = 4 * 2**30  # bytes of initial weights kept on the device, at most


class Harvest(NamedTuple):
    """What one mark of a trajectory measured; every cell of the mark gets it.

    The weights behind it are still in `slot` while the consumer of `Trainer.train` holds the harvest.
    """

    mark: Mark
    slot: int
    first_loss: float
    last_loss: float
    val_loss: float
    steps: int
    nonfinite_step: int
    weights_digest: int
    losses: np.ndarray


class Start(NamedTuple):
    """Where the last filled slot began: what of the hyper-parameters decides it, and the flat weights."""

    seed: int
    init_scale: float
    flat: tuple[Tensor, ...]


class Occupant(NamedTuple):
    """A trajectory in a slot and the index of its next mark."""

    trajectory: Trajectory
    mark: int


def matmul_precision(precision: str) -> str:
    """torch's name for how fp32 matrix products are made."""
    return "high" if precision == "tf32" else "highest"


class Trainer:
    """A stack of slots on one device, and everything a step of it reads and writes."""

    def __init__(
        self, config: SweepConfig, network: Network, corpus: Corpus, slots: int, device: torch.device, steps: int = 0
    ) -> None:
        """Allocate the stack and its data on the device.

        Args:
            config: resolved configuration.
            slots: R.
            steps: length of the longest run these slots will hold (0: of the whole sweep's).
        """
        torch.set_float32_matmul_precision(matmul_precision(config.precision))
        self.config, self.device, self.slots = config, device, slots
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        self.stack = Stack(network, slots, dtype, device)
        self.network = network
        keep_freed_memory(device)
        self.initial = {seed: network.initial(seed) for seed in seeds(config)}
        if len(self.initial) * network.parameters * 4 <= RESIDENT:
            self.initial = {seed: {n: w.to(device) for n, w in ws.items()} for seed, ws in self.initial.items()}
        self.start = Start(-1, 0.0, ())
        self.state = optim.adamw_init(self.stack) if config.optimizer == "adamw" else optim.sgd_init(self.stack)

        self.longest = steps or longest(config)
        self.largest_batch = largest_batch(config)
        length = self.longest * self.largest_batch
        self.seed_row = {seed: row for row, seed in enumerate(self.initial)}
        orders = [batch_order(seed, len(corpus.tokens), length) for seed in self.initial]
        self.order = torch.from_numpy(np.stack(orders)).to(device)
        self.tokens = torch.from_numpy(corpus.tokens).to(device)
        self.targets = torch.from_numpy(corpus.targets).to(device)
        self.supervised = torch.from_numpy(corpus.supervised).to(device)

        self.micro_batch = config.micro_batch
        self.accumulator_RP = self.stack.zeros() if self.largest_batch > self.micro_batch else None
        self.clips = config.clip > 0 or "clip" in config.swept

        # an empty slot: stop is 0, so it never trains; a slot waits, inactive, at its stop
        empty = {"step": 0, "stop": 0, "total": 1, "micro": 0, "micros": 1, "batch": 1, "seed": 0, "nonfinite": -1}
        self.whole = torch.tensor(list(empty.values()), device=device)[:, None].repeat(1, slots)
        self.step_R, self.stop_R, self.total_R, self.micro_R = self.whole[:4]
        self.micros_R, self.batch_R, self.seed_R, self.nonfinite_R = self.whole[4:]
        self.hyper = torch.zeros(len(HYPER), slots, dtype=torch.float64, device=device)
        self.hyper_R = dict(zip(HYPER, self.hyper, strict=True))
        self.broken_R = torch.zeros(slots, dtype=torch.int32, device=device)
        self.loss_R = torch.zeros(slots, device=device)
        self.losses_RS = torch.full((slots, self.longest), torch.nan, device=device)
        self.occupants: list[Occupant | None] = [None] * slots
        self.left = np.zeros(slots, dtype=np.int64)  # micro-steps until each slot's next mark, as the host knows
        self.tokens_each = np.zeros(slots)  # tokens a micro-step of each slot trains, masked rows left out
        self.trained = self.spent = 0  # slot micro-steps that trained, and all of them

        # held-out data in pieces of the shape that training has; the last is filled up with rows that do not count
        rows = -len(corpus.validation_tokens) % self.micro_batch
        shape = (-1, self.micro_batch, config.context)
        tokens = np.pad(corpus.validation_tokens, ((0, rows), (0, 0))).reshape(shape)
        targets = np.pad(corpus.validation_targets, ((0, rows), (0, 0)), constant_values=IGNORED).reshape(shape)
        self.validation_tokens = torch.from_numpy(tokens).to(device)
        self.validation_targets = torch.from_numpy(targets).to(device)
        self.validation_count = int((targets >= 0).sum())
        self.piece_1 = torch.zeros(1, dtype=torch.int64, device=device)  # the next one to evaluate
        evaluated = plan.evaluated_at_once(self.stack.weight_RP[0].nbytes, slots)
        self.evaluated_EP = torch.empty_like(self.stack.weight_RP[:evaluated])
        self.sum_E = torch.zeros(evaluated, device=device)

        # Large networks on a GPU: AdamW updates a parameter beside the rest of the backward, unless clipping needs all
        # gradients first. Products have precedence: an update runs where they leave room on a multiprocessor. SGD
        # comes after: its torch operations raise the version all weights share, which autograd takes for a mistake.
        large = device.type == "cuda" and network.parameters >= BESIDE
        beside = large and config.optimizer == "adamw" and not self.clips
        self.branch = torch.cuda.Stream(device, priority=LOW) if beside else None
        self.graph = self.evaluation = None
        if device.type == "cuda":
            first_1 = torch.zeros(1, dtype=torch.int64, device=device)
            compile_ahead(self.micro_step, self.evaluate_piece, lambda: self.stack.digest(first_1))
            self.graph = capture(self.micro_step)
            self.evaluation = capture(self.evaluate_piece, beside=self.graph)

    # ---- the device's side: one micro-step of every slot

    def gather(self) -> tuple[Tensor, Tensor, Tensor]:
        """The micro-batch of every slot: tokens, targets [R, B, T], and the targets of its whole batch [R]."""
        first_R = self.step_R * self.batch_R
        offset_B = torch.arange(self.micro_batch, device=self.device)
        within_RB = self.micro_R[:, None] * self.micro_batch + offset_B
        rows_RB = self.rows(first_R, within_RB)
        tokens_RBT = self.tokens[rows_RB]
        outside_RB = within_RB >= self.batch_R[:, None]
        targets_RBT = self.targets[rows_RB].masked_fill(outside_RB[:, :, None], IGNORED)
        whole_B = torch.arange(self.largest_batch, device=self.device).expand(self.slots, -1)
        counts_RB = self.supervised[self.rows(first_R, whole_B)].masked_fill(whole_B >= self.batch_R[:, None], 0)
        return tokens_RBT, targets_RBT, counts_RB.sum(1)

    def rows(self, first_R: Tensor, within_RB: Tensor) -> Tensor:
        """Corpus rows at some places of each slot's current batch, int64 [R, B]."""
        position_RB = (first_R[:, None] + within_RB).clamp(max=self.order.shape[1] - 1)
        return self.order[self.seed_R[:, None], position_RB].long()

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
        smoothing_R = self.hyper_R["label_smoothing"].float()
        update = self.update_of(update_R)

        def accumulated(span: Span, gradient: Tensor) -> Tensor:
            if self.accumulator_RP is None:
                return gradient
            piece = self.accumulator_RP[:, span.slice]
            accumulate_(piece, gradient, fresh_R, active_R)
            return piece

        batch = tokens_RBT, targets_RBT, smoothing_R, count_R
        if self.branch is None:
            sum_R, gradients = self.stack.losses_and_gradients(*batch)
            gradients = [accumulated(*each) for each in zip(self.stack.spans, gradients, strict=True)]
            if self.clips:
                update = update._replace(scale_R=self.clip_scale(gradients))
            for span, gradient in zip(self.stack.spans, gradients, strict=True):
                self.update(span, gradient, update)
        else:
            main, branch = torch.cuda.current_stream(), self.branch

            def update_beside(span: Span, gradient: Tensor) -> None:
                branch.wait_stream(main)
                with torch.cuda.stream(branch):
                    self.update(span, accumulated(span, gradient), update)

            sum_R, kept = self.stack.losses_and_gradients(*batch, update_beside)
            main.wait_stream(branch)
            del kept  # not before both streams have met: its memory would be used anew while the branch reads it

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

    def update_of(self, update_R: Tensor) -> optim.Update:
        """What the optimizer needs for the slots whose batch is complete, the factor of clipping left out."""
        warmup_R, config = self.hyper_R["warmup"], self.config
        factor_R = factor(config.schedule, self.step_R, self.total_R, warmup_R, config.decay, config.floor)
        rates = (self.hyper[: len(RATES)] * factor_R).float()
        hyper_R = dict(zip(HYPER, self.hyper.float(), strict=True))
        beta1_R, beta2_R = hyper_R["beta1"], hyper_R["beta2"]
        correction1_R, correction2_R = optim.corrections(beta1_R, beta2_R, self.step_R + 1)
        return optim.Update(
            rate_R=dict(zip(RATES, rates, strict=True)),
            decay_R=hyper_R["weight_decay"],
            beta1_R=beta1_R,
            beta2_R=beta2_R,
            correction1_R=correction1_R,
            correction2_R=correction2_R,
            scale_R=None,
            active_R=update_R,
            nonfinite_R=self.broken_R,
        )

    def clip_scale(self, gradients: list[Tensor]) -> Tensor:
        """The factor on every slot's gradient that holds its norm to the slot's limit, fp32 [R]."""
        norm_R, limit_R = global_norm(gradients).double(), self.hyper_R["clip"]
        # NaN norms give NaN factors: a comparison that fails must not hide them
        return torch.where(norm_R <= limit_R, 1.0, limit_R / norm_R).float()

    def update(self, span: Span, gradient: Tensor, update: optim.Update) -> None:
        """The optimizer's step of one parameter."""
        if isinstance(self.state, optim.AdamWState):
            optim.adamw_update(self.stack, self.state, span, gradient, update, self.config.eps)
        else:
            optim.sgd_update(self.stack, self.state, span, gradient, update, self.config.momentum)

    def run(self, count: int) -> None:
        """Enqueue `count` micro-steps."""
        for _ in range(count):
            self.micro_step() if self.graph is None else self.graph.replay()

    # ---- the host's side: filling, looking, reading off

    def fill(self, slot: int, trajectory: Trajectory) -> None:
        """Put a trajectory, at step 0, into a slot."""
        hyper = trajectory.hyper
        seed, batch = int(hyper["seed"]), int(hyper["batch"])
        if self.start[:2] != (seed, hyper["init_scale"]):
            flat = self.stack.flatten(self.initial[seed], hyper["init_scale"])
            self.start = Start(seed, hyper["init_scale"], flat)
        self.stack.load(slot, self.start.flat)
        for buffer in self.state:
            buffer[slot] = 0
        micros = self.micros(trajectory)
        stop = trajectory.marks[0].step
        whole = (0, stop, trajectory.total, 0, micros, batch, self.seed_row[seed], -1)
        self.whole[:, slot] = torch.tensor(whole).to(self.device)
        values = slot_hyper(hyper)
        self.hyper[:, slot] = torch.tensor([values[name] for name in HYPER], dtype=torch.float64).to(self.device)
        self.broken_R[slot] = 0
        self.losses_RS[slot] = torch.nan
        self.occupants[slot] = Occupant(trajectory, 0)
        self.left[slot] = trajectory.marks[0].step * micros
        self.tokens_each[slot] = batch * self.config.context / micros

    def train(
        self, work: list[Trajectory], progress: Callable[[float, float], None] = lambda trained, saved: None
    ) -> Iterator[list[Harvest]]:
        """Train every trajectory; yields what each look of the host read off.

        Args:
            work: trajectories; slots take them in order.
            progress: called after each look with the tokens trained since the last, and those that runs
                which broke will not need.
        """
        queue = list(reversed(work))
        for slot in range(self.slots):
            if queue:
                self.fill(slot, queue.pop())
        while any(self.occupants):
            count = self.next_look()
            self.run(count)
            running, saved = np.minimum(self.left, count), 0.0
            nonfinite_R = self.nonfinite_R.cpu().numpy()
            for slot, occupant in enumerate(self.occupants):
                if occupant and nonfinite_R[slot] >= 0:
                    trajectory, mark = occupant
                    micros = self.micros(trajectory)
                    stopped = int(nonfinite_R[slot]) + 1
                    running[slot] = self.left[slot] - (trajectory.marks[mark].step - stopped) * micros
                    saved += (trajectory.steps - stopped) * micros * self.tokens_each[slot]
            self.left -= running
            self.trained += int(running.sum())
            self.spent += count * self.slots
            progress(float(running @ self.tokens_each), saved)
            ready = [s for s, o in enumerate(self.occupants) if o and (self.left[s] == 0 or nonfinite_R[s] >= 0)]
            if ready:
                yield self.read_off(ready, nonfinite_R)
            for slot in ready:
                self.advance(slot, ended=nonfinite_R[slot] >= 0)
                if self.occupants[slot] is None and queue:
                    self.fill(slot, queue.pop())

    def next_look(self) -> int:
        """Micro-steps until the host should look again.

        As far as possible while the slots that reach their mark before then waste at most IDLE of the
        stack, at least to the first mark, at most LOOK.
        """
        left = np.sort(self.left[[o is not None for o in self.occupants]])
        count = left[0]
        for candidate in left[1:]:
            if np.maximum(candidate - left, 0).sum() > IDLE * candidate * len(left):
                break
            count = candidate
        return int(min(count, LOOK))

    def read_off(self, ready: list[int], nonfinite_R: np.ndarray) -> list[Harvest]:
        """Measure slots at their marks; a slot that is no longer finite is measured for all that remain."""
        slots = torch.tensor(ready, device=self.device)
        val = self.evaluate(slots).cpu().numpy()
        digest = self.stack.digest(slots).cpu().numpy().view(np.uint64)
        losses = self.losses_RS[slots].cpu().numpy()
        harvests = []
        for i, slot in enumerate(ready):
            trajectory, mark = self.occupant(slot)
            stopped = int(nonfinite_R[slot])
            marks = trajectory.marks[mark:] if stopped >= 0 else trajectory.marks[mark : mark + 1]
            for each in marks:
                trace = losses[i, : each.step]
                harvests.append(
                    Harvest(
                        each,
                        slot,
                        float(trace[0]),
                        float(trace[-LAST:].mean(dtype=np.float64)),
                        float(val[i]),
                        stopped + 1 if stopped >= 0 else each.step,
                        stopped,
                        int(digest[i]),
                        trace,
                    )
                )
        return harvests

    def occupant(self, slot: int) -> Occupant:
        """What a slot that is not empty holds."""
        occupant = self.occupants[slot]
        assert occupant is not None
        return occupant

    def micros(self, trajectory: Trajectory) -> int:
        """Micro-steps a batch of a trajectory."""
        return -(-int(trajectory.hyper["batch"]) // self.micro_batch)

    def advance(self, slot: int, ended: bool) -> None:
        """Send a slot on to its trajectory's next mark, or empty it."""
        trajectory, mark = self.occupant(slot)
        if ended or mark + 1 == len(trajectory.marks):
            self.occupants[slot] = None
            self.stop_R[slot] = 0
            self.left[slot] = 0
            return
        self.occupants[slot] = Occupant(trajectory, mark + 1)
        self.stop_R[slot] = trajectory.marks[mark + 1].step
        between = trajectory.marks[mark + 1].step - trajectory.marks[mark].step
        self.left[slot] = between * self.micros(trajectory)

    @torch.no_grad()
    def evaluate(self, slots: Tensor) -> Tensor:
        """Mean held-out loss of some slots' weights, fp32 [len(slots)], without label smoothing."""
        means = []
        for chosen in slots.split(len(self.evaluated_EP)):
            self.evaluated_EP[: len(chosen)] = self.stack.weight_RP[chosen]
            self.sum_E.zero_()
            self.piece_1.zero_()
            for _ in range(len(self.validation_tokens)):
                self.evaluate_piece(len(chosen)) if self.evaluation is None else self.evaluation.replay()
            means.append(self.sum_E[: len(chosen)] / self.validation_count)
        return torch.cat(means)

    @torch.no_grad()
    def evaluate_piece(self, count: int | None = None) -> None:
        """Add the next piece's losses to the sums of the first `count` sets of weights under evaluation (all)."""
        sum_E = self.sum_E[:count]
        weights = self.stack.views(self.evaluated_EP[:count])
        tokens_EBT = self.validation_tokens[self.piece_1].expand(len(sum_E), -1, -1)
        targets_EBT = self.validation_targets[self.piece_1].expand(len(sum_E), -1, -1)
        sum_E += self.stack.losses(weights, tokens_EBT, targets_EBT, torch.zeros_like(sum_E))
        self.piece_1.copy_((self.piece_1 + 1) % len(self.validation_tokens))


def slot_hyper(hyper: dict[str, float]) -> dict[str, float]:
    """A slot's hyper-parameters: the groups' learning rates resolved.

    lr.attention and lr.mlp follow lr.matrix, which like lr.embedding and lr.unembedding follows lr.
    """

    def first(*names: str) -> float:
        return next(hyper[name] for name in names if name in hyper)

    rates = {
        "attention": first("lr.attention", "lr.matrix", "lr"),
        "mlp": first("lr.mlp", "lr.matrix", "lr"),
        "embedding": first("lr.embedding", "lr"),
        "unembedding": first("lr.unembedding", "lr"),
    }
    own = ("warmup", "weight_decay", "beta1", "beta2", "clip", "label_smoothing")
    values = rates | {name: hyper[name] for name in own}
    values["clip"] = values["clip"] or np.inf
    return values


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
    step: Callable[[], None], calls_before: int = 1, beside: torch.cuda.CUDAGraph | None = None
) -> torch.cuda.CUDAGraph:
    """One call of `step` as a CUDA graph; it may share the memory of a graph `beside` that never runs with it.

    The calls before the capture load what is loaded at a first call, and run: here every slot is empty
    then, so nothing changes.
    """
    side = torch.cuda.Stream(priority=HIGH)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(calls_before):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=beside.pool() if beside else None, stream=side):
        step()
    return graph


def bit_exact_at_any_width(device: torch.device) -> bool:
    """Whether a cell's bits are the same at any number of replicas, or only in the same launch."""
    return device.type == "cuda"
