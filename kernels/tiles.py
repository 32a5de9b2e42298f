"""The tile of every stacked matrix product: a function of one replica's shape and dtype alone.

`benchmarks/tune.py` measures the candidates and writes kernels/tuned_tiles.json; shapes that are
not in it follow a rule. Nothing here sees the number of replicas, so products are
batch-invariant.

A form names how the operands are stored: a first, b second, `n` as the product reads it
(a [M, K], b [K, N]) and `t` transposed (a [K, M], b [N, K]).
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """A tile of block_m x block_n results, or of block_m x 1.5 block_n where `wide`.

    Results are finished and stored in pieces of block_n / 2 columns, so that their shared memory
    leaves room for one stage more.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    residents: int = 0  # persistent programs a multiprocessor; 0: one program a tile
    wide: bool = False
    group_m: int = 8  # rows of tiles that share columns of b while both are in L2

    @property
    def columns(self) -> int:
        return self.block_n * 3 // 2 if self.wide else self.block_n


TABLE = Path(__file__).with_name("tuned_tiles.json")
TUNED = {key: Tile(*values) for key, values in json.loads(TABLE.read_text("utf-8")).items()} if TABLE.exists() else {}


def tile_key(form: str, m: int, n: int, k: int, dtype: torch.dtype) -> str:
    """The table's key of one replica's product a [m, k] times b [k, n]."""
    return f"{form} {m}x{n}x{k} {str(dtype).removeprefix('torch.')}"


def tile_for(form: str, m: int, n: int, k: int, dtype: torch.dtype, precision: str) -> Tile:
    """The tile of one replica's product a [m, k] times b [k, n]."""
    if dtype == torch.float32:
        if precision == "ieee":  # multiply-adds on the ordinary units: registers bound the tile
            return Tile(64, 128, 16, 4, 2) if n > 64 else Tile(64, 64, 16, 2, 2)
        return Tile(64, 128, 32, 4, 3) if min(m, n) > 64 else Tile(64, 64, 32, 4, 3)
    tuned = TUNED.get(tile_key(form, m, n, k, dtype))
    return tuned if tuned is not None else default_tile(m, n)


# Tiles for bf16 with the share of the largest tile's rate that each reaches when it is full.
SHAPES = {
    Tile(128, 256, 64, 8, 4, residents=1): 1.0,
    Tile(128, 128, 64, 8, 4, residents=1, wide=True): 0.85,
    Tile(128, 128, 64, 4, 3, residents=2): 0.96,
    Tile(64, 128, 64, 4, 4, residents=2): 0.75,
    Tile(64, 64, 64, 4, 4, residents=2): 0.6,
}


def default_tile(m: int, n: int) -> Tile:
    """The tile that loses least to its own rate and to the parts of it outside [m, n]."""

    def rate(tile: Tile) -> float:
        padded_m = -(-m // tile.block_m) * tile.block_m
        padded_n = -(-n // tile.columns) * tile.columns
        return SHAPES[tile] * m * n / (padded_m * padded_n)

    return max(SHAPES, key=rate)
