"""How fast a stack trains, beside the other ways to train the same networks: `uv run benchmarks/throughput.py`.

For every network: a plain eager loop, the best sequential loop (torch.compile and one CUDA graph a step),
torch.func.vmap with torch.compile, JAX's vmap with jit, and this project's stack at several numbers of
replicas R. Same weights, batches and numerics (see benchmarks/peers.py), 1,024 tokens a replica-step, each in
a process of its own on an otherwise idle GPU. Needs a CUDA GPU; JAX is left out where it is not installed.

The roofline is FLOPs / peak + 28 bytes a parameter / bandwidth, with nothing overlapped: plain AdamW with
bf16 gradients moves 28 bytes. It is reported twice, with the ceilings measured in the same run and with fixed
ones (733 TFLOP/s and 3.0 TB/s, one H100), so that runs can be compared.
"""

if __name__ == "__main__" and not __package__:
    import started  # noqa: F401  says how to start it where its packages are missing

import json
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from engine.command import parse, screen, user_errors


@dataclass(frozen=True)
class Options:
    """What to measure."""

    networks: str = "d4,d8,d12,d20"  # of d4, d8, d12, d20, gpt2-124m, qwen2.5-0.5b, llama-1b
    peers: str = "all"  # all (without jax_cudnn), none, or names: eager, sequential, vmap, jax, jax_cudnn
    replicas: str = ""  # numbers of replicas of our stack (default: the network's own)
    seconds: float = 1.5  # time spent on timed steps, each
    timeout: float = 180.0  # seconds after which a peer has failed
    plot: str = "results/throughput.png"  # where the plot goes


if __name__ == "__main__":
    parse(Options, __doc__.split("\n\n")[0])  # before what takes seconds to import

from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.arguments import check_positive
from benchmarks.random_runs import PUBLISHED
from benchmarks.timing import append_rows, ready
from engine.checkpoint.model import FAMILIES, ModelConfig, family_name, shapes_of
from engine.models.gpt import GPTConfig

PEERS = Path(__file__).with_name("peers.py")
CONTEXT, BATCH = 128, 8
BYTES = 28  # a parameter and step: bf16 gradient, fp32 master and moments, bf16 weight
FIXED = {"flops": 733e12, "bytes": 3.0e12}
SEQUENTIAL = ("eager", "sequential")
OTHERS = ("eager", "sequential", "vmap", "jax", "jax_cudnn")


class Case(NamedTuple):
    """A network, and the numbers of replicas to train: of our stack, and of others'."""

    shape: ModelConfig
    ours: tuple[int, ...]
    stacked: tuple[int, ...] = ()


def gpt_shape(depth: int, vocabulary: int) -> GPTConfig:
    """The GPT that benchmarks/peers.py makes of a depth and a vocabulary."""
    return GPTConfig(depth, 64 * depth, depth, depth, CONTEXT, vocabulary)


CASES = {
    "d4": Case(gpt_shape(4, 4096), (1, 64, 128, 256), (256,)),
    "d8": Case(gpt_shape(8, 4096), (32,), (32,)),
    "d12": Case(gpt_shape(12, 32768), (4, 16), (16,)),
    "d20": Case(gpt_shape(20, 65536), (6, 7, 8), (4,)),
    "gpt2-124m": Case(PUBLISHED["gpt2-124m"](CONTEXT), (16,)),
    "qwen2.5-0.5b": Case(PUBLISHED["qwen2.5-0.5b"](CONTEXT), (6,)),
    "llama-1b": Case(PUBLISHED["llama-1b"](CONTEXT), (3,)),
}


def names(text: str, known: tuple[str, ...], option: str) -> list[str]:
    """A comma-separated option, checked.

    Raises:
        ValueError: a name is not known.
    """
    chosen = [name.strip() for name in text.split(",")]
    for name in chosen:
        if name not in known:
            raise ValueError(f"--{option} names {name!r}, expected some of {', '.join(known)}")
    return chosen


def plan(options: Options) -> dict[str, list[tuple[str, int]]]:
    """The (peer, replicas) to measure for every network.

    Raises:
        ValueError: an option names what does not exist.
    """
    peers = names(options.peers, OTHERS, "peers") if options.peers not in ("all", "none") else []
    if options.peers == "all":
        peers = ["eager", "sequential", "vmap"] + (["jax"] if find_spec("jax") and find_spec("optax") else [])
    counts = options.replicas.split(",") if options.replicas else []
    if not all(text.strip().isdecimal() and int(text) for text in counts):
        raise ValueError(f"--replicas is {options.replicas!r}, expected whole numbers above 0 with commas between")
    work = {}
    for network in names(options.networks, tuple(CASES), "networks"):
        case = CASES[network]
        ours = [int(text) for text in counts] or case.ours
        lone = [(peer, 1) for peer in peers if peer in SEQUENTIAL]
        stacked = [(peer, count) for peer in peers if peer not in SEQUENTIAL for count in case.stacked]
        work[network] = lone + stacked + [("ours", count) for count in ours]
    return work


def run_peer(peer: str, timeout: float, **arguments: float | str) -> dict:
    """What a process of benchmarks/peers.py measured, or {"error": why it did not}."""
    command = [sys.executable, str(PEERS), "--peer", peer]
    for name, value in arguments.items():
        command += [f"--{name}", str(value)]
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {timeout:g} s"}
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        said = [line for line in lines if "Error" in line or "error:" in line] or lines or [f"exit {done.returncode}"]
        return {"error": said[-1][:200], "log": "\n".join(lines[-20:])}
    return json.loads(done.stdout.splitlines()[-1])


def roofline_ms(shape: ModelConfig, ceilings: dict[str, float]) -> float:
    """Milliseconds a replica-step at least takes, its arithmetic and AdamW's traffic one after the other."""
    flops, moved = work_of(shape)
    return 1e3 * (flops / ceilings["flops"] + moved / ceilings["bytes"])


def work_of(shape: ModelConfig) -> tuple[float, float]:
    """FLOPs and bytes of one replica-step."""
    parameters = sum(prod(sizes) for sizes in shapes_of(shape).values())
    flops_per_token = FAMILIES[family_name(shape)].module.flops_per_token
    return flops_per_token(shape) * CONTEXT * BATCH, float(parameters * BYTES)


def row_of(network: str, peer: str, replicas: int, result: dict, ceilings: dict[str, float]) -> dict:
    """A row of the table and of results/throughput.csv; ratios are put in by `with_ratios`."""
    shape = CASES[network].shape
    row = {"network": network, "peer": peer, "replicas": replicas}
    empty = (
        "replica_step_ms tokens_per_s tflops terabytes_per_s of_roofline_measured of_roofline_fixed peak_gib setup_s "
        "first_loss last_loss"
    )
    row |= dict.fromkeys(empty.split(), "")
    row |= {"matmul_tflops": round(ceilings["flops"] / 1e12, 1), "copy_terabytes_per_s": ceilings["bytes"] / 1e12}
    row |= {f"vs_{other}": "" for other in ("eager", "sequential", "vmap", "jax")}
    row["error"] = result.get("error", "")
    if row["error"]:
        return row
    ms = result["step_ms"] / replicas
    flops, moved = work_of(shape)
    return row | {
        "replica_step_ms": ms,
        "tokens_per_s": CONTEXT * BATCH / ms * 1e3,
        "tflops": flops / ms / 1e9,
        "terabytes_per_s": moved / ms / 1e9,
        "of_roofline_measured": roofline_ms(shape, ceilings) / ms,
        "of_roofline_fixed": roofline_ms(shape, FIXED) / ms,
        "peak_gib": result["peak_bytes"] / 2**30,
        "setup_s": result["setup_s"],
        "first_loss": result["first_loss"],
        "last_loss": result["last_loss"],
    }


def with_ratios(rows: list[dict]) -> list[dict]:
    """How many times faster every row is than each other way at its best; both forms of JAX count as one."""
    for other in ("eager", "sequential", "vmap", "jax"):
        best = [r["replica_step_ms"] for r in rows if r["peer"].split("_")[0] == other and not r["error"]]
        for row in rows:
            if best and not row["error"]:
                row[f"vs_{other}"] = min(best) / row["replica_step_ms"]
    return rows


def rounded(rows: list[dict]) -> list[dict]:
    """Figures to four significant digits, losses to six."""

    def figure(name: str, value: object) -> object:
        return float(f"{value:.{6 if 'loss' in name else 4}g}") if isinstance(value, float) else value

    return [{name: figure(name, value) for name, value in row.items()} for row in rows]


def table_of(network: str, rows: list[dict]) -> Table:
    """One network's rows for people."""
    case, first = CASES[network], rows[0]
    table = Table(
        title=f"{network}: {case.shape.width} wide, V {case.shape.vocabulary:,}; "
        f"{CONTEXT * BATCH:,} tokens a replica-step; measured ceilings {first['matmul_tflops']:.0f} TFLOP/s, "
        f"{first['copy_terabytes_per_s']:.2f} TB/s",
        title_justify="left",
    )
    columns = {
        "ms": ("replica_step_ms", ".4f"),
        "tokens/s": ("tokens_per_s", ",.0f"),
        "TFLOP/s": ("tflops", ".0f"),
        "TB/s": ("terabytes_per_s", ".2f"),
        "of roofline (measured)": ("of_roofline_measured", ".2f"),
        "(fixed)": ("of_roofline_fixed", ".2f"),
        "x eager": ("vs_eager", ".2f"),
        "x sequential": ("vs_sequential", ".2f"),
        "x vmap": ("vs_vmap", ".2f"),
        "x JAX": ("vs_jax", ".2f"),
        "peak GiB": ("peak_gib", ".1f"),
        "set-up s": ("setup_s", ".1f"),
    }
    table.add_column("peer")
    for title in ("R", *columns):
        table.add_column(title, justify="right")
    for row in rows:
        start = (row["peer"], str(row["replicas"]))
        if row["error"]:
            table.add_row(*start, "failed")
        else:
            table.add_row(*start, *("" if row[n] == "" else format(row[n], form) for n, form in columns.values()))
    return table


def draw(measured: dict[str, list[dict]], path: Path) -> None:
    """Bars of the fraction of the roofline reached, a group for each network; the figures are milliseconds."""
    colours = dict(zip(("ours", *OTHERS), ("C3", "0.6", "C0", "C2", "C1", "C4"), strict=True))
    groups = {network: [row for row in rows if not row["error"]] for network, rows in measured.items()}
    figure = Figure(figsize=(2 + 0.55 * sum(len(rows) + 1 for rows in groups.values()), 4), layout="constrained")
    axis = figure.subplots()
    ticks: dict[int, str] = {}
    for network, rows in groups.items():
        start = max(ticks, default=-2) + 2
        at = range(start, start + len(rows))
        heights = [row["of_roofline_measured"] for row in rows]
        drawn = axis.bar(at, heights, color=[colours[row["peer"]] for row in rows])
        axis.bar_label(drawn, [f"{row['replica_step_ms']:#.3g}" for row in rows], fontsize=8)
        middle = start + (len(rows) - 1) / 2
        axis.text(middle, 1.02, network, ha="center", weight="bold", transform=axis.get_xaxis_transform())
        ticks |= {x: f"{row['peer']}\nR = {row['replicas']}" for x, row in zip(at, rows, strict=True)}
    axis.set_xticks(list(ticks), list(ticks.values()), rotation=90, fontsize=8)
    axis.axhline(1, color="black", linewidth=1)
    axis.margins(x=0.02)
    axis.set_ylabel("of the roofline (bars)\nms a replica-step (figures)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    """The command."""
    options = parse(Options, __doc__.split("\n\n")[0])
    console = screen(soft_wrap=True, width=180)
    with user_errors():
        work = plan(options)
        check_positive(options, "seconds", "timeout")
        ready()
    ceilings = run_peer("ceilings", options.timeout)
    if "error" in ceilings:
        sys.exit(f"the ceilings could not be measured: {ceilings['error']}")
    measured = {}
    for network, pairs in work.items():
        case, rows = CASES[network], []
        for peer, replicas in pairs:
            shape: dict[str, Any] = {"context": CONTEXT, "batch": BATCH, "vocabulary": case.shape.vocabulary}
            shape |= {"network": network} if network in PUBLISHED else {"depth": case.shape.depth}
            result = run_peer(peer, options.timeout, replicas=replicas, seconds=options.seconds, **shape)
            row = row_of(network, peer, replicas, result, ceilings)
            took = row["error"] or f"{row['replica_step_ms']:.4f} ms a replica-step, set-up {row['setup_s']:.1f} s"
            console.print(f"{network} {peer} R={replicas}: {took}", result.get("log", ""), markup=False)
            rows.append(row)
        measured[network] = with_ratios(rows)
        append_rows("throughput.csv", rounded(rows))
        console.print(table_of(network, rows))
        draw(measured, Path(options.plot))
    console.print(f"plot: {options.plot}")


if __name__ == "__main__":
    main()
