"""What the power limit of the card does to products, to AdamW and to both side by side: `uv run benchmarks/power.py`.

Each case is timed twice: for some 25 ms after a second of rest, and for two and a half seconds without a pause, while
`nvidia-smi` is asked four times for clock and power. The products are those of a 768 wide network with 16 replicas.
"""

if __name__ == "__main__" and not __package__:
    import started  # noqa: F401  says how to start it where its packages are missing

from benchmarks.arguments import asked

if __name__ == "__main__":
    asked(__doc__)  # before what takes seconds to import


import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from benchmarks.operators import adamw_buffers
from benchmarks.timing import append_rows, card, enqueued, ready
from benchmarks.tune import bmm, rotated
from engine.command import user_errors
from engine.step import HIGH, LOW
from kernels.matmul import stacked_matmul

REPLICAS = 16
PARAMETERS = 14_125_056  # a replica, 226M in all: about as long as the products
PRODUCTS = 24
SHAPES = (("nn", 1024, 768, 3072), ("nt", 1024, 2304, 768), ("tn", 768, 3072, 1024))
BURST, SUSTAINED, LOOKS = 5, 2.5, 4  # replays, seconds, looks at the card

Call = Callable[[], object]


def products(call: Callable, form: str, m: int, n: int, k: int) -> list[Call]:
    """PRODUCTS calls over sets of operands that outgrow L2 together."""
    sets = rotated(REPLICAS, form, m, n, k)
    return [partial(call, *sets[i % len(sets)]) for i in range(PRODUCTS)]


def side_by_side(first: list[Call], second: list[Call]) -> torch.cuda.CUDAGraph:
    """A graph of two branches, the first with precedence."""
    branches = [(torch.cuda.Stream(priority=p), calls) for p, calls in ((HIGH, first), (LOW, second))]

    def run() -> None:
        main = torch.cuda.current_stream()
        for stream, calls in branches:
            stream.wait_stream(main)
            with torch.cuda.stream(stream):
                for call in calls:
                    call()
        for stream, _ in branches:
            main.wait_stream(stream)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def watch() -> list[dict[str, object]]:
    """Looks at the card, spread over the time that a sustained run takes."""
    looks = []
    for _ in range(LOOKS):
        time.sleep(SUSTAINED / (LOOKS + 2))
        looks.append(card())
    return looks


def measure(case: str, first: list[Call], second: list[Call]) -> dict[str, object]:
    """A row of results/power.csv."""
    graph = side_by_side(first, second)
    time.sleep(1)
    rested = enqueued(graph.replay, BURST)()
    with ThreadPoolExecutor() as beside:  # to enqueue can take as long as to run
        watching = beside.submit(watch)
        sustained = enqueued(graph.replay, round(1000 * SUSTAINED / rested))()
        looks = watching.result()
    return {
        "case": case,
        "ms_rested": round(rested, 3),
        "ms_sustained": round(sustained, 3),
        "sm_mhz": " ".join(str(look["sm_mhz"]) for look in looks),
        "power_w": " ".join(str(look["power_w"]) for look in looks),
        "at_power_limit": statistics.mode(str(look["at_power_limit"]) for look in looks),
    }


def main() -> None:
    """The command."""
    with user_errors():
        ready("nvidia-smi")
    step = adamw_buffers(REPLICAS, PARAMETERS).split
    rows = [measure("AdamW", [], [step])]
    for form, m, n, k in SHAPES:
        shape = f"{PRODUCTS} x {form} {m}x{n}x{k}"
        stacked = products(lambda a, b, out, form=form: stacked_matmul(a, b, form, out=out), form, m, n, k)
        rows.append(measure(shape, stacked, []))
        rows.append(measure(f"{shape} beside AdamW", stacked, [step]))
        rows.append(measure(f"{shape} by torch.bmm", products(partial(bmm, form=form), form, m, n, k), []))
    for row in rows:
        times = f"{row['ms_rested']:8} ms rested, {row['ms_sustained']:8} ms sustained"
        print(f"{row['case']:44}{times}; {row['sm_mhz']} MHz; {row['power_w']} W")
    append_rows("power.csv", rows)


if __name__ == "__main__":
    main()
