"""Times the attention kernels over tile sizes: the source of the table in kernels/attention.py.

    python benchmarks/attention_tiles.py

Prints a line a tile and appends rows to benchmarks/results/attention_tiles.csv; TB/s counts each
input once and each output once. The fastest tiles were written into `_forward_tiles` and
`_backward_tiles` by hand.

R replica, B batch, T time, H query heads, G key/value heads, K head dim.
"""

if __name__ == "__main__" and not __package__:
    import started  # noqa: F401  says how to start it where its packages are missing

from benchmarks.arguments import asked

TITLE = "Times the candidate tiles of the attention kernels."


if __name__ == "__main__":
    asked(TITLE)  # before what takes seconds to import


from functools import partial

import torch
from triton.runtime.errors import OutOfResources

import kernels.attention as attention
from benchmarks.timing import append_rows, milliseconds, ready
from engine.command import user_errors

# name: R, B, T, H, G, K, qk_norm
SHAPES = {
    "d4": (64, 8, 128, 4, 4, 64, True),
    "d12": (16, 8, 128, 12, 12, 64, True),
    "smollm2": (16, 8, 128, 9, 3, 64, False),
    "K=128": (16, 8, 128, 6, 6, 128, True),
    "T=512": (8, 2, 512, 12, 12, 64, True),
    "T=2048": (4, 1, 2048, 12, 12, 64, True),
}
COLUMNS = ("block_q", "block_k", "num_warps", "num_stages", "max_registers")
# queries, keys, warps, stages, cap on registers a thread (0: none)
SHORT = [
    (128, 128, 8, 1, 0),
    (128, 128, 8, 1, 128),
    (128, 128, 4, 1, 0),
    (64, 128, 8, 1, 0),
    (64, 128, 4, 1, 0),
    (32, 128, 8, 1, 0),
    (32, 128, 4, 1, 0),
]
LONG = [
    (128, 64, 8, 2, 0),
    (128, 64, 4, 2, 0),
    (64, 64, 4, 1, 0),
    (64, 64, 4, 2, 0),
    (64, 64, 4, 2, 168),
    (64, 64, 8, 2, 0),
    (64, 128, 8, 2, 0),
]


def use(tiles: tuple[int, ...]) -> None:
    """Make both passes of attention use these tiles, and no pairs of half blocks, which have one tile."""

    def chosen(T, K, dtype):
        cap = {"maxnreg": tiles[4]} if tiles[4] else {}
        return attention.cut_tiles(tiles[:4], T, K) | cap

    attention.forward_tiles = attention.backward_tiles = chosen
    attention.half_block = lambda *_: 0


def time_shape(name: str) -> list[dict]:
    R, B, T, H, G, K, qk_norm = SHAPES[name]
    qkv = torch.randn(R, B, T, (H + 2 * G) * K, device="cuda", dtype=torch.bfloat16)
    upstream = torch.randn(R, B, T, H * K, device="cuda", dtype=torch.bfloat16)
    angle = torch.rand(T, K // 2, device="cuda").expand(R, -1, -1)
    settings = (H, G, qk_norm, 1e-6)
    tables = angle.cos(), angle.sin()
    forward = partial(attention.attention_op, qkv, *tables, *settings)
    o, logsumexp = forward()
    backward = partial(attention.attention_backward_op, upstream, qkv, *tables, o, logsumexp, *settings)
    rows = []
    for kernel, call, moved in (
        ("forward", forward, qkv.nbytes + o.nbytes),
        ("backward", backward, 2 * qkv.nbytes + o.nbytes),
    ):
        for tiles in SHORT if T <= 128 else LONG:
            use(tiles)
            try:
                ms = milliseconds([call])
            except OutOfResources as reason:
                print(f"{name:10}{kernel:10}{tiles}: {reason}")
                continue
            print(f"{name:10}{kernel:10}{tiles!s:24}{ms:9.4f} ms{moved / ms * 1e-9:7.2f} TB/s")
            keys = dict(zip(COLUMNS, tiles, strict=True))
            rows.append({"kernel": kernel, "case": name} | keys | {"ms": round(ms, 5)})
    return rows


def main() -> None:
    """The command."""
    with user_errors():
        ready()
    print(f"rows appended to {append_rows('attention_tiles.csv', [r for name in SHAPES for r in time_shape(name)])}")


if __name__ == "__main__":
    main()
