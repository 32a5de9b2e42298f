"""The tile of every stacked matrix product: a function of one replica's shape and dtype alone.

`benchmarks/tune.py` measures the candidates and writes kernels/tuned_tiles.json; shapes that are
not in it follow a rule. Nothing here sees the number of replicas, so a replica's bits do not depend
on its company.

A form names how the operands are stored: a first, b second, `n` as the product reads it
(a [M, K], b [K, N]) and `t` transposed (a [K, M], b [N, K]).
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    residents: int = 0  # persistent programs a multiprocessor; 0: one program a tile
    halves: bool = False  # finish and store in two halves: half the shared memory for it
    store: bool = True  # write the result through the tensor-map engine
    group_m: int = 8  # rows of tiles that share columns of b while both are in L2


TABLE = Path(__file__).with_name("tuned_tiles.json")
TUNED = {key: Tile(*values) for key, values in json.loads(TABLE.read_text()).items()} if TABLE.exists() else {}


def tile_key(form: str, m: int, n: int, k: int, dtype: torch.dtype) -> str:
    return f"{form} {m}x{n}x{k} {str(dtype).removeprefix('torch.')}"


def tile_for(form: str, m: int, n: int, k: int, dtype: torch.dtype, precision: str) -> Tile:
    """The tile of one replica's product a [m, k] times b [k, n]."""
    if dtype == torch.float32:
        if precision == "ieee":  # multiply-adds on the ordinary units: registers bound the tile
            return Tile(64, 64, 16, 4, 2)
        return Tile(64, 128, 32, 4, 3) if min(m, n) > 64 else Tile(64, 64, 32, 4, 3)
    tuned = TUNED.get(tile_key(form, m, n, k, dtype))
    return tuned if tuned is not None else default_tile(m, n, k)


def default_tile(m: int, n: int, k: int) -> Tile:
    """Large tiles where a replica fills them, smaller ones where they would stand half empty."""
    if m <= 64 or n <= 64:
        return Tile(64, 64, 64, 4, 4)
    if m >= 512 and n >= 512 and k >= 512:
        return Tile(128, 256, 64, 8, 3, residents=1, halves=True)
    return Tile(128, 128, 64, 8, 3)
