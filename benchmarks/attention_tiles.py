"""Times the attention kernels over tile sizes: the source of the table in kernels/attention.py.

    python benchmarks/attention_tiles.py

Prints a line a tile and appends rows to benchmarks/results/attention_tiles.csv; TB/s counts each
input once and each output once. The fastest tiles were written into `_forward_tiles` and
`_backward_tiles` by hand.

R replica, B batch, T time, H query heads, G key/value heads, K head dim.
"""

from functools import partial

import torch
from triton.runtime.errors import OutOfResources

import kernels.attention as attention
from benchmarks.timing import append_rows, milliseconds

# name: R, B, T, H, G, K, qk_norm
SHAPES = {
    "d4": (64, 8, 128, 4, 4, 64, True),
    "d12": (16, 8, 128, 12, 12, 64, True),
    "smollm2": (16, 8, 128, 9, 3, 64, False),
    "K=128": (16, 8, 128, 6, 6, 128, True),
    "T=512": (8, 2, 512, 12, 12, 64, True),
    "T=2048": (4, 1, 2048, 12, 12, 64, True),
}
# queries, keys, warps, stages
SHORT = [(128, 128, 8, 1), (128, 128, 4, 1), (64, 128, 8, 1), (64, 128, 4, 1), (32, 128, 8, 1), (32, 128, 4, 1)]
LONG = [(128, 64, 8, 2), (128, 64, 4, 2), (64, 64, 4, 1), (64, 64, 4, 2), (64, 64, 8, 2), (64, 128, 8, 2)]


def time_shape(name: str) -> list[dict]:
    R, B, T, H, G, K, qk_norm = SHAPES[name]
    qkv = torch.randn(R, B, T, (H + 2 * G) * K, device="cuda", dtype=torch.bfloat16)
    upstream = torch.randn(R, B, T, H * K, device="cuda", dtype=torch.bfloat16)
    angle = torch.rand(T, K // 2, device="cuda").expand(R, -1, -1)
    settings = (H, G, qk_norm, 1e-6)
    forward = partial(attention._attention, qkv, angle.cos(), angle.sin(), *settings)
    o, logsumexp = forward()
    backward = partial(attention._attention_backward, upstream, qkv, angle.cos(), angle.sin(), o, logsumexp, *settings)
    rows = []
    for kernel, call, moved in (
        ("forward", forward, qkv.nbytes + o.nbytes),
        ("backward", backward, 2 * qkv.nbytes + o.nbytes),
    ):
        for tiles in SHORT if T <= 128 else LONG:
            attention._forward_tiles = attention._backward_tiles = lambda T, K, dtype, tiles=tiles: attention._cut(
                tiles, T, K
            )
            try:
                ms = milliseconds([call])
            except OutOfResources as reason:
                print(f"{name:10}{kernel:10}{tiles}: {reason}")
                continue
            print(f"{name:10}{kernel:10}{tiles!s:20}{ms:9.4f} ms{moved / ms * 1e-9:7.2f} TB/s")
            keys = dict(zip(("block_q", "block_k", "num_warps", "num_stages"), tiles, strict=True))
            rows.append({"kernel": kernel, "case": name} | keys | {"ms": round(ms, 5)})
    return rows


if __name__ == "__main__":
    print(f"rows appended to {append_rows('attention_tiles.csv', [r for name in SHAPES for r in time_shape(name)])}")
