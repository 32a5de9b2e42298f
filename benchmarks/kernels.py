"""Each kernel against what torch, cuBLAS or a copy does with the same data, in the same run.

    python benchmarks/kernels.py [name ...]

Names are the keys of BENCHMARKS below; without any, all run. Prints a table and appends its rows to
benchmarks/results/kernels.csv. `work` is TFLOP/s for matrix products, else TB/s of the bytes that must
move; `ratio` is the peer's time over the kernel's.
"""

import statistics
import sys
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.timing import append_rows, copy_terabytes, milliseconds
from benchmarks.tune import TOKENS, bmm, layers, problems, rotated
from kernels.adamw import accumulate_, adamw_, adamw_split_, global_norm
from kernels.linear import linear_add_op, linear_op, linear_relu2_op, relu2_mlp_op, stacked_matmul
from kernels.loss import cross_entropy_
from kernels.newton_schulz import newton_schulz, newton_schulz_reference

PARAMETERS = 1 << 28  # of all replicas, for the memory-bound kernels


def row(kernel: str, case: str, ms: float, work: float, unit: str, peer: str, peer_ms: float) -> dict:
    figures = dict(ms=round(ms, 5), work=round(work, 4), unit=unit)
    return (
        dict(kernel=kernel, case=case)
        | figures
        | dict(peer=peer, peer_ms=round(peer_ms, 5), ratio=round(peer_ms / ms, 4))
    )


def measure_linear() -> list[dict]:
    """Every product of every network against torch.bmm, both timed twice and in turn."""
    rows = []
    for network, replicas, form, m, n, k in problems():
        sets = rotated(replicas, form, m, n, k)
        ours = [partial(stacked_matmul, a, b, form, out=out) for a, b, out in sets]
        theirs = [partial(bmm, a, b, out, form) for a, b, out in sets]
        times = [(milliseconds(ours), milliseconds(theirs)) for _ in range(2)]
        ms, bmm_ms = (statistics.mean(pair) for pair in zip(*times, strict=True))
        case = f"{network} R={replicas} {dict(nt='y', nn='dX', tn='dW')[form]} {m}x{n}x{k}"
        tflops = 2e-9 * replicas * m * n * k / ms
        rows.append(row("linear bf16", case, ms, tflops, "TFLOP/s", "torch.bmm", bmm_ms))
    mean = statistics.geometric_mean([r["ratio"] for r in rows])
    print(f"linear bf16: geometric mean of bmm / ours over {len(rows)} products: {mean:.3f}")
    return rows


def measure_fused_linear() -> list[dict]:
    """Fused epilogues, and fp32, against bmm and the elementwise operations after it."""
    rows = []
    for network, replicas, d in (("d4", 64, 256), ("d12", 16, 768)):
        x, residual = (torch.randn(replicas, TOKENS, d, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        up = torch.randn(replicas, 4 * d, d, device="cuda", dtype=torch.bfloat16) / d**0.5
        down = torch.randn(replicas, d, 4 * d, device="cuda", dtype=torch.bfloat16) / d**0.5
        hidden = linear_relu2_op(x, up)
        cases = {
            "linear_relu2": (lambda: linear_relu2_op(x, up), lambda: torch.bmm(x, up.mT).relu().square()),
            "linear_add": (
                lambda: linear_add_op(hidden, down, residual),
                lambda: residual + torch.bmm(hidden, down.mT),
            ),
            "relu2_mlp": (
                lambda: relu2_mlp_op(x, up, down, residual),
                lambda: residual + torch.bmm(torch.bmm(x, up.mT).relu().square(), down.mT),
            ),
        }
        for name, (ours, theirs) in cases.items():
            flops = 2 * replicas * TOKENS * 4 * d * d * (2 if name == "relu2_mlp" else 1)
            ms = milliseconds([ours])
            case = f"{network} R={replicas}"
            rows.append(row(name, case, ms, flops / ms * 1e-9, "TFLOP/s", "bmm + torch", milliseconds([theirs])))
        wide, weight = x.float(), up.float()
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            ms = milliseconds([lambda: linear_op(wide, weight)])
            peer_ms = milliseconds([lambda: torch.bmm(wide, weight.mT)])
            case = f"{network} R={replicas} {TOKENS}x{4 * d}x{d}"
            tflops = 2e-9 * replicas * TOKENS * 4 * d * d / ms
            rows.append(row(f"linear fp32 {precision}", case, ms, tflops, "TFLOP/s", "torch.bmm", peer_ms))
        torch.set_float32_matmul_precision("highest")
    return rows


def measure_loss() -> list[dict]:
    """The row kernel against reading and writing the logits once; torch's eager fp32 cross-entropy beside."""
    rows = []
    for network, replicas, _, vocabulary, _ in [layer for layer in layers() if layer[3] >= 4096]:
        if network == "d8":
            continue
        logits = torch.randn(replicas, TOKENS, vocabulary, device="cuda", dtype=torch.bfloat16)
        targets = torch.randint(vocabulary, (replicas, TOKENS), device="cuda")
        smoothing = torch.zeros(replicas, device="cuda")
        for softcap in (0.0, 15.0):
            ms = milliseconds([lambda c=softcap: cross_entropy_(logits, targets, smoothing, c, True)])
            case = f"{network} R={replicas} V={vocabulary} softcap={softcap:g}"
            copy_ms = 2 * logits.nbytes / copy_terabytes() * 1e-9
            rows.append(row("cross_entropy", case, ms, 2e-9 * logits.nbytes / ms, "TB/s", "copy", copy_ms))
    return rows


def measure_adamw() -> list[dict]:
    """AdamW plain and split, the norm and accumulation against the copy bandwidth and torch's fused AdamW."""
    replicas = 16
    n = PARAMETERS // replicas
    shape = (replicas, n)
    gradient = torch.randn(shape, device="cuda").bfloat16()
    master, first, second = (torch.zeros(shape, device="cuda") for _ in range(3))
    weight, remainder = master.bfloat16(), master.to(torch.int16)
    scalars = [torch.full((replicas,), value, device="cuda") for value in (1e-3, 0.1, 0.9, 0.95, 0.5, 0.5)]
    active = torch.ones(replicas, dtype=torch.bool, device="cuda")
    nonfinite = torch.zeros(replicas, dtype=torch.int32, device="cuda")
    rest = (*scalars, 1e-8, None, active, nonfinite)
    copy = copy_terabytes()
    print(f"copy: {copy:.3f} TB/s")
    cases = {
        "adamw": (28, partial(adamw_, master, gradient, weight, first, second, *rest)),
        "adamw_split": (26, partial(adamw_split_, remainder, gradient, weight, first, second, *rest)),
        "global_norm": (2, partial(global_norm, [gradient])),
        "accumulate": (10, partial(accumulate_, master, gradient, ~active, active)),
    }
    rows = []
    for name, (size, call) in cases.items():
        ms = milliseconds([call], budget=40)
        floor = size * PARAMETERS / copy * 1e-9
        rows.append(
            row(name, f"{replicas} x {n} bf16 gradient", ms, size * PARAMETERS / ms * 1e-9, "TB/s", "copy", floor)
        )
    parameter = torch.nn.Parameter(master.clone())
    parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.AdamW([parameter], fused=True, capturable=True)
    fused_ms = milliseconds([optimizer.step], budget=40)
    ms = rows[0]["ms"]
    rows.append(
        row(
            "adamw",
            "against fused torch, which keeps no bf16 weight",
            ms,
            28 * PARAMETERS / ms * 1e-9,
            "TB/s",
            "torch fused",
            fused_ms,
        )
    )
    return rows


def measure_newton_schulz() -> list[dict]:
    rows = []
    for case, shape in (("d4 R=64", (64, 1024, 256)), ("d12 R=16", (16, 3072, 768))):
        matrix = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        side, length = min(shape[1:]), max(shape[1:])
        flops = 5 * shape[0] * (4 * side * side * length + 2 * side**3)
        ms = milliseconds([lambda m=matrix: newton_schulz(m)])
        peer_ms = milliseconds([lambda m=matrix: newton_schulz_reference(m)])
        rows.append(
            row("newton_schulz", f"{case} {shape[1]}x{shape[2]}", ms, flops / ms * 1e-9, "TFLOP/s", "torch", peer_ms)
        )
    return rows


BENCHMARKS: dict[str, Callable[[], list[dict]]] = {
    "linear": measure_linear,
    "fused_linear": measure_fused_linear,
    "loss": measure_loss,
    "adamw": measure_adamw,
    "newton_schulz": measure_newton_schulz,
}


def main() -> None:
    unknown = set(sys.argv[1:]) - set(BENCHMARKS)
    if unknown:
        sys.exit(f"got {sorted(unknown)}, expected names among {list(BENCHMARKS)}")
    rows = []
    for name in sys.argv[1:] or BENCHMARKS:
        rows += BENCHMARKS[name]()
        torch.cuda.empty_cache()
    for r in rows:
        print(
            f"{r['kernel']:20}{r['case']:44}{r['ms']:9.4f} ms {r['work']:8.2f} {r['unit']:8}{r['ratio']:6.2f} x {r['peer']}"
        )
    print(f"rows appended to {append_rows('kernels.csv', rows)}")


if __name__ == "__main__":
    main()
