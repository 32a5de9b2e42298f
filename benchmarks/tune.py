"""Measures tiles for every matrix product of the networks and writes kernels/tuned_tiles.json.

    python benchmarks/tune.py [network ...]

Networks are the keys of NETWORKS below; without any, all are tuned, and shapes of others keep their tiles. Run on
the GPU the table is for. A tile is kept only if its result agrees with torch.bmm.
"""

if __name__ == "__main__" and not __package__:
    import started  # noqa: F401  says how to start it where its packages are missing

from benchmarks.arguments import asked

TITLE = "Times every candidate tile of the stacked product and writes kernels/tuned_tiles.json."
TOKENS = 1024


def gpt(width: int, vocabulary: int) -> list[tuple[int, int]]:
    """(output, input) widths of qkv, output, up, down and vocabulary."""
    return [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width), (vocabulary, width)]


def llama(width: int, kv: int, mlp: int, vocabulary: int, queries: int = 0) -> list[tuple[int, int]]:
    """As `gpt`, with gate and up side by side; `kv` channels of keys, `queries` of queries where not the width."""
    queries = queries or width
    return [(queries + 2 * kv, width), (width, queries), (2 * mlp, width), (width, mlp), (vocabulary, width)]


# name: (replicas measured, (output, input) widths)
NETWORKS = {
    "d4": (64, gpt(256, 4096)),
    "d8": (32, gpt(512, 4096)),
    "d12": (16, gpt(768, 32768)),
    "d20": (8, gpt(1280, 65536)),
    "SmolLM2": (16, llama(576, 192, 1536, 49152)),
    "SmolLM2-360M": (8, llama(960, 320, 2560, 49152)),
    "Qwen2.5-0.5B": (5, llama(896, 128, 4864, 151936)),
    "Qwen3-0.6B": (4, llama(1024, 1024, 3072, 151936, queries=2048)),
    "Llama-1B": (3, llama(2048, 512, 8192, 128256)),
    "GPT-2": (16, gpt(768, 50257)),
}


if __name__ == "__main__":
    asked(TITLE, tuple(NETWORKS))  # before what takes seconds to import


import json
import math
import multiprocessing
import statistics
from collections.abc import Sequence
from functools import partial

import torch
from triton.runtime.errors import OutOfResources

from benchmarks.timing import append_rows, milliseconds_in_turn, ready
from engine.command import user_errors
from kernels.matmul import stacked_matmul
from kernels.tiles import SHAPES, TABLE, TUNED, Tile, default_tile, tile_key

CANDIDATES = [
    *SHAPES,
    Tile(128, 256, 64, 8, 4, residents=1, group_m=1),
    Tile(128, 256, 64, 8, 4, residents=1, group_m=2),
    Tile(128, 128, 64, 4, 3, residents=2, group_m=1),
    Tile(128, 128, 64, 4, 3, residents=2, group_m=2),
    Tile(128, 128, 64, 4, 3, residents=2, group_m=4),
    Tile(128, 256, 64, 8, 3, residents=1),
    Tile(256, 128, 64, 8, 4, residents=1),
    Tile(128, 128, 64, 8, 5, residents=1),
    Tile(128, 128, 64, 8, 5, residents=1, wide=True),
    Tile(128, 128, 64, 8, 2, residents=2, wide=True),
]


def problems(networks: Sequence[str] = tuple(NETWORKS)) -> list[tuple[str, int, str, int, int, int]]:
    """(network, replicas, form, m, n, k) of every product: forward, dX, dW."""
    found = []
    for name in networks:
        replicas, widths = NETWORKS[name]
        for o, i in widths:
            found.append((name, replicas, "nt", TOKENS, o, i))
            found.append((name, replicas, "nn", TOKENS, i, o))
            found.append((name, replicas, "tn", o, i, TOKENS))
    return found


def operands(replicas: int, form: str, m: int, n: int, k: int, dtype=torch.bfloat16):
    a = torch.randn((replicas, k, m) if form == "tn" else (replicas, m, k), device="cuda")
    b = torch.randn((replicas, n, k) if form == "nt" else (replicas, k, n), device="cuda")
    return a.to(dtype), b.to(dtype), torch.empty(replicas, m, n, device="cuda", dtype=dtype)


def rotated(replicas: int, form: str, m: int, n: int, k: int):
    """Enough sets of operands to outgrow a 50 MB L2 cache twice."""
    size = 2 * replicas * (m * k + k * n + m * n)
    return [operands(replicas, form, m, n, k) for _ in range(max(1, math.ceil(100e6 / size)))]


def bmm(a, b, out, form: str):
    return torch.bmm(a.mT if form == "tn" else a, b.mT if form == "nt" else b, out=out)


def compile_one(job: tuple[str, Tile]) -> str:
    """Into the on-disk cache, from a process of its own; says why where a tile does not fit."""
    form, tile = job
    try:
        for replicas in (2, 132):  # with half tiles behind the last whole wave, and without
            a, b, out = operands(replicas, form, 256, 256, 256)
            stacked_matmul(a, b, form, tile=tile, out=out)
    except (OutOfResources, RuntimeError) as error:
        return f"{form} {tuple(tile)}: {str(error)[:200]}"
    return ""


def worth_timing(tile: Tile, m: int, n: int) -> bool:
    """Whether a tile may win: wide ones only where whole ones do not fill the columns, small ones in small products."""
    if tile.wide:
        return n % tile.block_n > 0
    return tile.block_m > 64 or m * n <= 2**20


def check(form: str, sets, tile: Tile) -> None:
    a, b, out = sets[0]
    wanted = bmm(a, b, torch.empty_like(out), form).float()
    out.fill_(float("nan"))
    stacked_matmul(a, b, form, tile=tile, out=out)
    error = ((out.float() - wanted).norm() / wanted.norm()).item()
    assert error < 1e-2, f"{form} {tile} is off by {error:.3g}"


def main() -> None:
    """The command."""
    networks = asked(TITLE, tuple(NETWORKS))
    with user_errors():
        ready()
    jobs = [(form, tile) for form in ("nt", "nn", "tn") for tile in CANDIDATES]
    with multiprocessing.get_context("spawn").Pool(12) as pool:
        failures = pool.map(compile_one, jobs, chunksize=1)
    fitting = {job for job, failure in zip(jobs, failures, strict=True) if not failure}
    print("\n".join(filter(None, failures)))
    table, rows, gains = dict(TUNED), [], []
    for network, replicas, form, m, n, k in problems(networks):
        sets = rotated(replicas, form, m, n, k)
        tiles = [tile for tile in CANDIDATES if (form, tile) in fitting and worth_timing(tile, m, n)]
        for tile in tiles:
            check(form, sets, tile)
        ways = [[partial(bmm, a, b, out, form) for a, b, out in sets]]
        ways += [[partial(stacked_matmul, a, b, form, tile=tile, out=out) for a, b, out in sets] for tile in tiles]
        bmm_ms, *each = milliseconds_in_turn(ways)
        times = dict(zip(tiles, each, strict=True))
        for tile, ms in times.items():
            rows.append(
                {"network": network, "replicas": replicas, "form": form, "m": m, "n": n, "k": k}
                | tile._asdict()
                | {"ms": round(ms, 5), "bmm_ms": round(bmm_ms, 5), "ratio": round(bmm_ms / ms, 4)}
            )
        best = min(times, key=lambda tile: times[tile])
        table[tile_key(form, m, n, k, torch.bfloat16)] = best
        rule = times.get(default_tile(m, n), float("nan"))
        gains.append(bmm_ms / times[best])
        tflops = 2e-9 * replicas * m * n * k / times[best]
        print(
            f"{network:8}{form} {m:6}{n:6}{k:6} {tflops:6.0f} TFLOP/s  bmm/best "
            f"{bmm_ms / times[best]:5.2f}  rule/best {rule / times[best]:5.2f}  {tuple(best)}",
            flush=True,
        )
        del sets
    print(f"geometric mean of bmm / best: {statistics.geometric_mean(gains):.3f}")
    lines = [f"  {json.dumps(key)}: {json.dumps(list(tile))}" for key, tile in sorted(table.items())]
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")
    append_rows("tiles.csv", rows)


if __name__ == "__main__":
    main()
