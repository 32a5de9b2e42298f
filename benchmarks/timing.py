"""Timing on a GPU by CUDA-graph replays, and benchmark rows that say where they come from."""

import os
import shutil
import statistics
import subprocess
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

import torch
import triton

from benchmarks.rows import command_line, write_rows
from engine import provenance
from engine.command import user_errors

RESULTS = Path(__file__).with_name("results")


def enqueued(run: Callable[[], object], count: int = 1) -> Callable[[], float]:
    """Runs it `count` times and does not wait; what comes back waits, and says the milliseconds of one run."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        run()
    end.record()

    def wait() -> float:
        end.synchronize()
        return start.elapsed_time(end) / count

    return wait


def captured(calls: Sequence[Callable[[], object]], budget: float) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph that repeats all of `calls` until it takes about `budget` ms, and the calls in it."""

    def run() -> None:
        for call in calls:
            call()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
        rounds = max(1, min(50, round(budget / max(enqueued(run)(), 1e-3))))
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            run()
    return graph, rounds * len(calls)


def milliseconds_in_turn(
    ways: Sequence[Sequence[Callable[[], object]]], budget: float = 8.0, rounds: int = 5
) -> list[float]:
    """Median time of one call of each way to do the same, over replays of one CUDA graph a way.

    The calls of a way do the same work on different buffers, together larger than L2. The ways take turns without
    a pause: a GPU under full load runs faster just after a rest, which would favour whoever is measured then.
    """
    graphs = [captured(calls, budget) for calls in ways]
    turns = [[enqueued(graph.replay) for graph, _ in graphs] for _ in range(rounds + 1)]
    times = [[wait() for wait in turn] for turn in turns[1:]]
    return [statistics.median(way) / count for way, (_, count) in zip(zip(*times, strict=True), graphs, strict=True)]


def milliseconds(calls: Sequence[Callable[[], object]], budget: float = 8.0, replays: int = 5) -> float:
    """Median time of one call: `milliseconds_in_turn` of one way."""
    return milliseconds_in_turn([calls], budget, replays)[0]


def copy_terabytes() -> float:
    """Measured ceiling of memory traffic, TB/s read plus written: the faster of two ways to copy 2 GiB."""
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    ways = (lambda: target.copy_(source), lambda: torch.neg(source, out=target))
    return 2e-9 * source.nbytes / min(milliseconds([way], budget=20) for way in ways)


def card() -> dict[str, object]:
    """The SM clock in MHz, the power drawn in W, and whether the power limit holds the clock down, at this moment."""
    query = "clocks.sm,power.draw.instant,clocks_event_reasons.sw_power_cap"
    uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
    command = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    clock, power, capped = (text.strip() for text in said.split(","))
    return {"sm_mhz": int(clock), "power_w": round(float(power)), "at_power_limit": capped}


def commit() -> str:
    """The commit being measured, from $COMMIT where the tree travels without its history; '' where nothing says."""
    # rows appended before are no change of what is measured
    return os.environ.get("COMMIT", provenance.commit().rstrip("+"))


def ready(*programs: str) -> None:
    """Raise ValueError, before anything is measured, where it would fail: no GPU, no program, no room for rows."""
    if not torch.cuda.is_available():
        raise ValueError("this benchmark measures on a CUDA GPU, and torch finds none; run it where there is one")
    for program in programs:
        if shutil.which(program) is None:
            raise ValueError(f"this benchmark asks {program}, which is not installed; install it")
    if not os.access(RESULTS if RESULTS.exists() else RESULTS.parent, os.W_OK):
        raise ValueError(f"rows are appended in {RESULTS}, which cannot be written; run a copy of this project")


def append_rows(name: str, rows: list[dict[str, object]]) -> Path:
    """Appends rows, each with date, gpu, versions, commit and command, to results/`name`."""
    source = {
        "date": date.today().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit(),
        "command": command_line(),
    }
    return write_rows(RESULTS / name, source, rows)


def run_benchmarks(benchmarks: dict[str, Callable[[], list[dict]]], names: Sequence[str]) -> None:
    """The command of a file of kernel benchmarks: run the named ones, print their rows and append them."""
    with user_errors():
        ready()
    rows = []
    for name in names:
        rows += benchmarks[name]()
        torch.cuda.empty_cache()
    for r in rows:
        left = f"{r['kernel']:20}{r['case']:44}{r['ms']:9.4f} ms"
        print(f"{left}{r['rate']:9.2f} {r['unit']:8}{r['ratio']:6.2f} x {r['peer']}")
    print(f"rows appended to {append_rows('operators.csv', rows)}")
