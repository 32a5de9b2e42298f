"""Each kernel against what torch, cuBLAS or a copy does with the same data, in the same run.

    python benchmarks/operators.py [name ...]

Names are NAMES below; without any, all run. Prints a table and appends its rows to
benchmarks/results/operators.csv. `rate` is TFLOP/s for matrix products, else TB/s of
the bytes that must move; `ratio` is the peer's time over the kernel's.
"""

if __name__ == "__main__" and not __package__:
    import started  # noqa: F401  says how to start it where its packages are missing

from benchmarks.arguments import asked

TITLE = "Matrix, loss, optimizer and Newton-Schulz kernels against cuBLAS, torch and the copy bandwidth."
NAMES = ("linear", "fused_linear", "loss", "adamw", "newton_schulz")


if __name__ == "__main__":
    asked(TITLE, NAMES)  # before what takes seconds to import


import statistics
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.timing import copy_terabytes, milliseconds, milliseconds_in_turn, run_benchmarks
from benchmarks.tune import TOKENS, bmm, problems, rotated
from kernels.accumulate import accumulate_
from kernels.adamw import AdamWScalars, adamw_, adamw_split_
from kernels.gradient_norm import global_norm
from kernels.linear import linear_op, linear_relu2_op
from kernels.loss import cross_entropy_
from kernels.matmul import stacked_matmul
from kernels.newton_schulz import newton_schulz, newton_schulz_reference
from kernels.split_master import split_master

PARAMETERS = 1 << 28  # of all replicas, for the memory-bound kernels


def row(kernel: str, case: str, ms: float, work: float, unit: str, peer: str, peer_ms: float) -> dict:
    """One line of the table: `work` is what one call does, in 1e12 operations or bytes."""
    rate = work / ms * 1e3
    figures = {"ms": round(ms, 5), "rate": round(rate, 4), "unit": unit}
    against = {"peer": peer, "peer_ms": round(peer_ms, 5), "ratio": round(peer_ms / ms, 4)}
    return {"kernel": kernel, "case": case} | figures | against


def measure_linear() -> list[dict]:
    """Every product of every network against torch.bmm, in turn."""
    rows = []
    names = {"nt": "y", "nn": "dX", "tn": "dW"}
    for network, replicas, form, m, n, k in problems():
        sets = rotated(replicas, form, m, n, k)
        ours = [partial(stacked_matmul, a, b, form, out=out) for a, b, out in sets]
        theirs = [partial(bmm, a, b, out, form) for a, b, out in sets]
        ms, bmm_ms = milliseconds_in_turn([ours, theirs])
        case = f"{network} R={replicas} {names[form]} {m}x{n}x{k}"
        rows.append(row("linear bf16", case, ms, 2e-12 * replicas * m * n * k, "TFLOP/s", "bmm", bmm_ms))
    mean = statistics.geometric_mean([r["ratio"] for r in rows])
    print(f"linear bf16: geometric mean of bmm / ours over {len(rows)} products: {mean:.3f}")
    return rows


def measure_fused_linear() -> list[dict]:
    """Fused epilogues against bmm and the elementwise operations around it; fp32 against bmm."""
    return [
        line
        for network, replicas, d in (("d4", 64, 256), ("d12", 16, 768))
        for line in fused_linear_rows(f"{network} R={replicas}", replicas, d)
    ]


def fused_linear_rows(case: str, replicas: int, d: int) -> list[dict]:
    def normal(*shape):
        return torch.randn(shape, device="cuda").bfloat16()

    x, residual = normal(replicas, TOKENS, d), normal(replicas, TOKENS, d)
    up, down = normal(replicas, 4 * d, d) / d**0.5, normal(replicas, d, 4 * d) / d**0.5
    hidden = linear_relu2_op(x, up)
    cases = {
        "linear_relu2": (
            lambda: linear_relu2_op(x, up),
            lambda: torch.bmm(x, up.mT).relu().square(),
        ),
        "linear_add": (
            lambda: stacked_matmul(hidden, down, "nt", "add", residual),
            lambda: residual + torch.bmm(hidden, down.mT),
        ),
        "relu2_backward": (
            lambda: stacked_matmul(x, down, "nn", "relu2_backward", hidden),
            lambda: torch.bmm(x, down) * (2 * hidden.sqrt()),
        ),
    }
    work = 2e-12 * replicas * TOKENS * 4 * d * d
    rows = [
        row(name, case, milliseconds([ours]), work, "TFLOP/s", "bmm + torch", milliseconds([theirs]))
        for name, (ours, theirs) in cases.items()
    ]
    wide, weight = x.float(), up.float()
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        ms = milliseconds([lambda: linear_op(wide, weight)])
        bmm_ms = milliseconds([lambda: torch.bmm(wide, weight.mT)])
        rows.append(row(f"linear fp32 {precision}", case, ms, work, "TFLOP/s", "bmm", bmm_ms))
    torch.set_float32_matmul_precision("highest")
    return rows


def measure_loss() -> list[dict]:
    """The row kernel against a copy of the logits, which also reads and writes them once."""
    cases = [("d4", 64, 4096), ("d12", 16, 32768), ("d20", 5, 65536), ("SmolLM2", 16, 49152)]
    return [line for case in cases for line in loss_rows(*case)]


def loss_rows(network: str, replicas: int, vocabulary: int) -> list[dict]:
    logits = torch.randn(replicas, TOKENS, vocabulary, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(logits)
    targets = torch.randint(vocabulary, (replicas, TOKENS), device="cuda")
    smoothing = torch.zeros(replicas, device="cuda")
    copy_ms = milliseconds([lambda: target.copy_(logits)])
    rows = []
    for softcap in (0.0, 15.0):
        ms = milliseconds([partial(cross_entropy_, logits, targets, smoothing, softcap, True)])
        case = f"{network} R={replicas} V={vocabulary} softcap={softcap:g}"
        rows.append(row("cross_entropy", case, ms, 2e-12 * logits.nbytes, "TB/s", "copy", copy_ms))
    return rows


class Buffers(NamedTuple):
    """What one AdamW step reads and writes, its master whole and split."""

    master: Tensor
    remainder: Tensor
    gradient: Tensor
    weight: Tensor
    first: Tensor
    second: Tensor
    scalars: AdamWScalars

    def plain(self) -> None:
        """The step on the whole master."""
        adamw_(self.master, self.gradient, self.weight, self.first, self.second, self.scalars)

    def split(self) -> None:
        """The step on the split master."""
        adamw_split_(self.remainder, self.gradient, self.weight, self.first, self.second, self.scalars)


def adamw_buffers(replicas: int, n: int) -> Buffers:
    """Random ones of one parameter, bf16 weights."""
    gradient = torch.randn(replicas, n, device="cuda").bfloat16()
    master, first, second = (torch.rand(replicas, n, device="cuda") for _ in range(3))
    weight, remainder = split_master(master)
    rate, decay, beta1, beta2, correction1, correction2, eps = (
        torch.full((replicas,), value, device="cuda") for value in (1e-3, 0.1, 0.9, 0.95, 2.0, 1.4, 1e-8)
    )
    active = torch.ones(replicas, dtype=torch.bool, device="cuda")
    nonfinite = torch.zeros(replicas, dtype=torch.int32, device="cuda")
    scalars = AdamWScalars(rate, decay, beta1, beta2, correction1, correction2, eps, None, active, nonfinite)
    return Buffers(master, remainder, gradient, weight, first, second, scalars)


def measure_adamw() -> list[dict]:
    """AdamW plain and split, the norm and accumulation against the copy bandwidth and torch's fused AdamW."""
    replicas = 16
    n = PARAMETERS // replicas
    buffers = adamw_buffers(replicas, n)
    master, gradient, active = buffers.master, buffers.gradient, buffers.scalars.active_R
    copy = copy_terabytes()
    print(f"copy: {copy:.3f} TB/s")
    cases: dict[str, tuple[int, Callable[[], object]]] = {
        "adamw": (28, buffers.plain),
        "adamw_split": (26, buffers.split),
        "global_norm": (2, partial(global_norm, [gradient])),
        "accumulate": (10, partial(accumulate_, master, gradient, ~active, active)),
    }
    case = f"{replicas} x {n}"
    rows = []
    for name, (size, call) in cases.items():
        terabytes = 1e-12 * size * PARAMETERS
        ms = milliseconds([call], budget=40)
        rows.append(row(name, case, ms, terabytes, "TB/s", "copy", terabytes / copy * 1e3))
    parameter = torch.nn.Parameter(master.clone())
    parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.AdamW([parameter], fused=True, capturable=True)
    fused_ms = milliseconds([optimizer.step], budget=40)  # 28 bytes too: fp32 gradient, no bf16 weight
    rows.append(row("adamw", case, rows[0]["ms"], 28e-12 * PARAMETERS, "TB/s", "torch fused", fused_ms))
    return rows


def measure_newton_schulz() -> list[dict]:
    rows = []
    cases = {
        "d4 R=64": (64, 1024, 256),
        "d12 R=16": (16, 3072, 768),
        "d12 R=16, 6 layers": (96, 3072, 768),
        "d12 R=16, 24 matrices": (384, 768, 768),
    }
    for case, shape in cases.items():
        matrix = torch.nn.functional.normalize(torch.randn(shape, device="cuda").flatten(1)).view(shape).bfloat16()
        side, length = min(shape[1:]), max(shape[1:])
        work = 5e-12 * shape[0] * (4 * side * side * length + 2 * side**3)
        ms, torch_ms = (milliseconds([partial(form, matrix)]) for form in (newton_schulz, newton_schulz_reference))
        rows.append(row("newton_schulz", f"{case} {shape[1]}x{shape[2]}", ms, work, "TFLOP/s", "torch", torch_ms))
    return rows


BENCHMARKS: dict[str, Callable[[], list[dict]]] = dict(
    zip(NAMES, (measure_linear, measure_fused_linear, measure_loss, measure_adamw, measure_newton_schulz), strict=True)
)


if __name__ == "__main__":
    run_benchmarks(BENCHMARKS, asked(TITLE, NAMES))
