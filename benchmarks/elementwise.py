"""Attention, norms, activations, embedding and digest: ours against torch or the copy bandwidth.

    python benchmarks/elementwise.py [name ...]

Names are NAMES below; without any, all run. Same table, columns and file as
benchmarks/operators.py. Bytes are the fewest that must move: each input read and each output written once.

R replica, B batch, T time, D width, H query heads, G key/value heads, K head dim, F MLP width,
V vocabulary.
"""

if __name__ == "__main__" and not __package__:
    import started  # noqa: F401  says how to start it where its packages are missing

from benchmarks.arguments import asked

TITLE = "Attention, norm, activation, embedding and digest kernels against torch and the copy bandwidth."
NAMES = ("attention", "elementwise")


if __name__ == "__main__":
    asked(TITLE, NAMES)  # before what takes seconds to import


from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.operators import row
from benchmarks.timing import copy_terabytes, milliseconds, run_benchmarks
from kernels.activation import relu2, swiglu
from kernels.attention import qkv_attention
from kernels.digest import digest
from kernels.embedding import embedding
from kernels.norm import add_rms_norm, rms_norm


class Shape(NamedTuple):
    """One network's layer at the tokens of one step."""

    name: str
    R: int
    B: int
    T: int
    H: int
    G: int
    K: int
    qk_norm: bool
    F: int
    V: int

    @property
    def label(self) -> str:
        return f"{self.name} R={self.R} B={self.B} T={self.T} H={self.H} G={self.G} K={self.K}"


SHAPES = [
    Shape("d4", 64, 8, 128, 4, 4, 64, True, 1024, 4096),
    Shape("d12", 16, 8, 128, 12, 12, 64, True, 3072, 32768),
    Shape("smollm2", 16, 8, 128, 9, 3, 64, False, 1536, 49152),
    Shape("d12 long", 8, 1, 1024, 12, 12, 64, True, 3072, 32768),
]


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_()


def forward_backward(function: Callable, inputs: list[torch.Tensor]) -> Callable[[], object]:
    """A call that runs the function and its gradients for all inputs that need one."""
    leaves = [x for x in inputs if x.requires_grad]
    results = function(*inputs)
    upstream = [torch.randn_like(y) for y in (results if isinstance(results, tuple) else [results])]
    return lambda: torch.autograd.grad(function(*inputs), leaves, upstream)


def torch_attention(qkv, cos, sin, shape: Shape):
    """Rotary, norm and scaled_dot_product_attention (flash) as separate calls over R * B rows."""
    R, B, T, H, G, K = shape[1:7]
    heads = qkv.view(R * B, T, H + 2 * G, K).transpose(1, 2)
    q, k, v = heads.split([H, G, G], dim=1)

    def turn(x):
        x1, x2 = x.chunk(2, dim=-1)
        x = torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)
        return F.rms_norm(x, (K,)) if shape.qk_norm else x

    o = F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True, enable_gqa=H != G)
    return o.transpose(1, 2).reshape(R, B, T, H * K)


def measure_attention() -> list[dict]:
    """Against rotary, norm and flash attention in separate calls; forward, and forward with backward."""
    rows = []
    for shape in SHAPES:
        R, B, T, H, G, K = shape[1:7]
        qkv = normal(R, B, T, (H + 2 * G) * K)
        angle = torch.arange(T, device="cuda")[:, None] * 1e4 ** -torch.linspace(0, 1, K // 2, device="cuda")
        cos, sin = angle.cos(), angle.sin()
        one = partial(qkv_attention, heads=H, kv_heads=G, qk_norm=shape.qk_norm)
        ours = torch.func.vmap(one, in_dims=(0, None, None))
        our_inputs = [qkv, cos, sin]
        theirs = partial(torch_attention, shape=shape)
        their_inputs = [qkv, cos.bfloat16(), sin.bfloat16()]
        peer = "torch rotary + norm + flash"
        read, written = qkv.nbytes, qkv.nbytes * H // (H + 2 * G)
        with torch.no_grad():
            ms, peer_ms = milliseconds([partial(ours, *our_inputs)]), milliseconds([partial(theirs, *their_inputs)])
        work = (read + written) * 1e-12
        rows.append(row("attention forward", shape.label, ms, work, "TB/s", peer, peer_ms))
        ms = milliseconds([forward_backward(ours, our_inputs)])
        peer_ms = milliseconds([forward_backward(theirs, their_inputs)])
        work = (3 * read + 2 * written) * 1e-12
        rows.append(row("attention fwd+bwd", shape.label, ms, work, "TB/s", peer, peer_ms))
    return rows


def measure_elementwise() -> list[dict]:
    """Norms, activations and embedding, forward with backward, against the time of copying their bytes."""
    copy = copy_terabytes()
    print(f"copy: {copy:.3f} TB/s")
    rows = []
    for shape in SHAPES[:3]:
        R, B, T, H, _, K = shape[1:7]
        D = H * K
        x, residual, weight = normal(R, B, T, D), normal(R, B, T, D), normal(R, D)
        gate_up, hidden = normal(R, B, T, 2 * shape.F), normal(R, B, T, shape.F)
        tokens = torch.randint(shape.V, (R, B, T), device="cuda")
        table = normal(R, shape.V, D)
        small, wide = x.nbytes, hidden.nbytes
        # (name, tensors read and written forward + backward, function, inputs)
        cases: list[tuple[str, int, Callable, list[torch.Tensor]]] = [
            ("rms_norm", 5 * small, rms_norm, [x]),
            ("rms_norm weight", 5 * small, rms_norm, [x, weight]),
            ("add_rms_norm", 8 * small, add_rms_norm, [x, residual]),
            ("add_rms_norm weight", 8 * small, add_rms_norm, [x, residual, weight]),
            ("swiglu", 8 * wide, swiglu, [gate_up]),
            ("relu2", 5 * wide, relu2, [hidden]),
            ("embedding", 3 * small + table.nbytes, embedding, [tokens, table]),
        ]
        for name, moved, function, inputs in cases:
            ms = milliseconds([forward_backward(torch.func.vmap(function), inputs)])
            case, floor = f"{shape.name} R={R} D={D} F={shape.F} V={shape.V}", moved / copy * 1e-9
            rows.append(row(f"{name} fwd+bwd", case, ms, moved * 1e-12, "TB/s", "copy", floor))
    weights = torch.randn(8, 1 << 26, device="cuda")
    ms = milliseconds([lambda: digest(weights)])
    floor = weights.nbytes / copy * 1e-9
    rows.append(row("digest", "8 x 67108864 fp32", ms, weights.nbytes * 1e-12, "TB/s", "copy", floor))
    return rows


BENCHMARKS: dict[str, Callable[[], list[dict]]] = dict(
    zip(NAMES, (measure_attention, measure_elementwise), strict=True)
)


if __name__ == "__main__":
    run_benchmarks(BENCHMARKS, asked(TITLE, NAMES))
