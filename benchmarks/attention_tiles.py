"""Times the attention kernels over tile sizes: the source of the tiles in kernels/attention*.py.

    python benchmarks/attention_tiles.py [case ...]

Cases are the keys of SHAPES below; without any, all run. Each candidate replaces the tile of one pass, the others
stay; all take turns. Prints a line a candidate and appends rows to benchmarks/results/attention_tiles.csv; beside
them torch's cuDNN and FlashAttention-2 on the same heads, without projection, rotary and norm. TFLOP/s counts the
causal half of 4 T^2 K a head forward, and 2.5 times that backward. The fastest tiles were written down by hand.

R replica, B batch, T time, H query heads, G key/value heads, K head dim.
"""

if __name__ == "__main__" and not __package__:
    import started  # noqa: F401  says how to start it where its packages are missing

from benchmarks.arguments import asked

TITLE = "Times the candidate tiles of the attention kernels."
# name: R, B, T, H, G, K, qk_norm
SHAPES = {
    "d4": (64, 8, 128, 4, 4, 64, True),
    "d12": (16, 8, 128, 12, 12, 64, True),
    "smollm2": (29, 8, 128, 9, 3, 64, False),
    "K=128": (16, 8, 128, 6, 6, 128, True),
    "T=256": (16, 4, 256, 12, 12, 64, True),
    "T=512": (16, 2, 512, 12, 12, 64, True),
    "T=1024": (16, 1, 1024, 12, 12, 64, True),
    "T=2048": (8, 2, 2048, 12, 12, 64, True),
    "T=2048 K=128": (8, 1, 2048, 16, 8, 128, True),
    "T=2048 smollm2": (8, 2, 2048, 9, 3, 64, False),
    "T=4096": (8, 1, 4096, 12, 12, 64, True),
}


if __name__ == "__main__":
    asked(TITLE, tuple(SHAPES))  # before what takes seconds to import


from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.timing import append_rows, milliseconds_in_turn, ready
from engine.command import user_errors
from kernels import attention, attention_blocks
from kernels.ahead import compile_ahead

Tiles = tuple[int, int, int, int]  # queries, keys, warps, stages
# (what the pass is called, where its tile is chosen): candidates
ONE_BLOCK: dict[tuple[str, str], list[Tiles]] = {
    ("forward", "forward_tiles"): [(128, 128, 8, 1), (128, 128, 4, 1), (64, 128, 4, 1)],
    ("backward", "backward_tiles"): [(128, 128, 8, 1), (64, 128, 8, 1), (32, 128, 8, 1), (32, 128, 4, 1)],
}
BLOCKS: dict[tuple[str, str], list[Tiles]] = {
    ("forward", "forward_tiles"): [
        (128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (128, 64, 4, 2),
        (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2),
    ],
    ("backward", "queries_tiles"): [
        (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2),
    ],
    ("backward", "keys_tiles"): [
        (64, 128, 8, 2), (64, 128, 8, 3), (32, 128, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3), (32, 64, 4, 2),
        (32, 64, 4, 3), (64, 64, 8, 2),
    ],
}  # fmt: skip


def calls(name: str) -> tuple[dict[str, Callable[[], object]], dict[str, Callable[[], object]]]:
    """Ours and the peers', forward and backward, on random data of a case."""
    R, B, T, H, G, K, qk_norm = SHAPES[name]
    qkv = torch.randn(R, B, T, (H + 2 * G) * K, device="cuda", dtype=torch.bfloat16)
    upstream = torch.randn(R, B, T, H * K, device="cuda", dtype=torch.bfloat16)
    angle = torch.rand(T, K // 2, device="cuda").expand(R, -1, -1)
    settings = (angle.cos(), angle.sin(), H, G, qk_norm, 1e-6)
    o, logsumexp = attention.attention_op(qkv, *settings)
    ours: dict[str, Callable[[], object]] = {
        "forward": partial(attention.attention_op, qkv, *settings),
        "backward": partial(
            attention.attention_backward_op, upstream, qkv, *settings[:2], o, logsumexp, *settings[2:]
        ),
    }  # fmt: skip
    heads = qkv.flatten(0, 1).unflatten(-1, (-1, K)).transpose(1, 2)
    q, k, v = (part.contiguous().requires_grad_() for part in heads.split([H, G, G], 1))
    upstream = upstream.flatten(0, 1).unflatten(-1, (H, K)).transpose(1, 2)
    peers: dict[str, Callable[[], object]] = {}
    for peer, backend in (("cuDNN", SDPBackend.CUDNN_ATTENTION), ("FlashAttention-2", SDPBackend.FLASH_ATTENTION)):
        forward = partial(scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=H > G)
        peers[f"forward by {peer}"] = partial(with_backend, backend, forward)
        peers[f"both by {peer}"] = partial(with_backend, backend, forward, (q, k, v), upstream)
    return ours, peers


def with_backend(backend: SDPBackend, forward: Callable, inputs: tuple = (), upstream: Tensor | None = None) -> None:
    """torch's attention by one of its backends, with the gradients of `inputs` where there are any."""
    with sdpa_kernel(backend), torch.set_grad_enabled(bool(inputs)):
        o = forward()
        if inputs:
            torch.autograd.grad(o, inputs, upstream)


def with_tile(call: Callable, choice: str, tile: Tiles, one_block: bool) -> object:
    """One call with another tile in one of its passes, and no pairs of half blocks, which have one tile."""
    module = attention if one_block else attention_blocks
    before, half = getattr(module, choice), attention.half_block
    chosen = (lambda T, K, dtype: attention.cut_tiles(tile, T, K)) if one_block else (lambda K, dtype: tile)
    setattr(module, choice, chosen)
    attention.half_block = lambda *_: 0
    try:
        return call()
    finally:
        setattr(module, choice, before)
        attention.half_block = half


def time_case(name: str) -> list[dict]:
    R, B, T, H, _, K, _ = SHAPES[name]
    ours, peers = calls(name)
    one_block = T <= 128
    ways: dict[tuple[str, str, Tiles | None], Callable[[], object]] = {}
    ways |= {(kind, "as chosen", None): call for kind, call in ours.items()}
    ways |= {(kind, "", None): call for kind, call in peers.items()}
    for (kind, choice), tiles in (ONE_BLOCK if one_block else BLOCKS).items():
        for tile in tiles:
            ways[kind, choice, tile] = partial(with_tile, ours[kind], choice, tile, one_block)
    compile_ahead(*ways.values())
    rows = []
    times = milliseconds_in_turn([[call] for call in ways.values()])
    for (kind, choice, asked_tile), ms in zip(ways, times, strict=True):
        products = {"forward": 1, "backward": 2.5, "both": 3.5}[kind.split()[0]]
        teraflops = products * 2e-9 * R * B * H * T * T * K / ms
        named = f"{kind} {choice}".strip()
        label = "x".join(map(str, asked_tile)) if asked_tile else ""
        print(f"{name:16}{named:32}{label:20}{ms:9.4f} ms{teraflops:7.0f} TFLOP/s", flush=True)
        columns = ("block_q", "block_k", "num_warps", "num_stages")
        sizes: dict[str, object] = dict(zip(columns, asked_tile or (0, 0, 0, 0), strict=True))
        rows.append({"kernel": named, "case": name} | sizes | {"max_registers": 0, "ms": round(ms, 5)})
    return rows


def main() -> None:
    """The command."""
    names = asked(TITLE, tuple(SHAPES))
    with user_errors():
        ready()
    print(f"rows appended to {append_rows('attention_tiles.csv', [r for name in names for r in time_case(name)])}")


if __name__ == "__main__":
    main()
