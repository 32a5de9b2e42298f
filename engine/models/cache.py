"""How a forward goes on behind a text: what earlier tokens left, and attention over it.

A family's forward is written once. Given a cache it takes only the tokens that follow, reads what those before them
left, and leaves the same of its own: nothing is written here, so that vmap and a CUDA graph take it as it is
(engine/generate.py owns the memory). What is kept, and how much of it, is what the forward extends the cache by: no
family declares it.

B batch row, T new tokens, S places of the cache, D width, H query heads, G key/value heads, K head dim, C channels.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from kernels.attention import qkv_attention, rotate_reference
from kernels.norm import rms_norm


class Cache:
    """What the tokens before these left, of a row each the first `length_B`, and what these leave.

    past: rows [B, S, C] by site, none of a site that has left nothing yet; new: rows [B, T, C] of these tokens.
    """

    def __init__(self, length_B: Tensor, past: Mapping[str, Tensor]) -> None:
        self.length_B, self.past = length_B, past
        self.new: dict[str, Tensor] = {}

    def extend(self, site: str, rows_BTC: Tensor) -> Tensor:
        """Keep what these tokens leave at a site; what earlier ones left there, [B, S, C]."""
        assert site not in self.new, f"{site} keeps two things"
        self.new[site] = rows_BTC
        return self.past.get(site, rows_BTC[:, :0])


def places(tokens_BT: Tensor, context: int, cache: Cache | None) -> slice | Tensor:
    """Positions of tokens, as an index of a table: the first T, or behind a cache [B, T].

    Tokens that only fill up a row may lie beyond the context; they are given its last position.
    """
    if cache is None:
        return slice(tokens_BT.shape[-1])
    time_T = torch.arange(tokens_BT.shape[-1], device=tokens_BT.device)
    return (cache.length_B[:, None] + time_T).clamp(max=context - 1)


def previous(x_BTD: Tensor, site: str, cache: Cache | None) -> Tensor:
    """For every token the x of the one before it, 0 before the first."""
    first_B1D = torch.zeros_like(x_BTD[:, :1])
    if cache is not None:
        before_BSD = torch.cat([first_B1D, cache.extend(site, x_BTD)], dim=1)
        first_B1D = before_BSD.gather(1, cache.length_B[:, None, None].expand(-1, -1, x_BTD.shape[-1]))
    return torch.cat([first_B1D, x_BTD[:, :-1]], dim=1)


def attention(
    qkv_BTC: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    kv_heads: int,
    layer: int,
    cache: Cache | None,
    qk_norm: bool = False,
    eps: float = 1e-6,
    window: int | None = None,
    qk_scale: float = 1.0,
) -> Tensor:
    """`kernels.attention.qkv_attention` in which a token sees itself, what the cache holds, and of both only the
    `window` tokens before it.

    Without a cache it is the kernel itself; else plain torch, which keeps the scores [B, H, T, S + T]. cos, sin:
    [T, K/2], or [B, T, K/2] behind a cache, which keeps rotated keys and values. Returns [B, T, H K] in the dtype of
    qkv.
    """
    time = qkv_BTC.shape[-2]
    if cache is None:
        return qkv_attention(qkv_BTC, cos, sin, heads, kv_heads, qk_norm, eps, window, qk_scale)
    head_dim = qkv_BTC.shape[-1] // (heads + 2 * kv_heads)
    wide = qkv_BTC.to(torch.promote_types(qkv_BTC.dtype, torch.float32)).unflatten(-1, (-1, head_dim))
    q_BTHK, k_BTGK, v_BTGK = wide.split([heads, kv_heads, kv_heads], dim=-2)
    turned = []
    for x in (q_BTHK, k_BTGK):
        y = rotate_reference(x, cos, sin)
        turned.append(rms_norm(y, None, eps) if qk_norm else y)
    q_BTGHK, k_BTGK = turned[0].unflatten(-2, (kv_heads, -1)), turned[1]

    time_T = torch.arange(time, device=qkv_BTC.device)
    kv_BSC = cache.extend(f"layer {layer}", torch.cat([k_BTGK, v_BTGK], dim=-2).flatten(-2))
    k_BSGK, v_BSGK = kv_BSC.unflatten(-1, (2 * kv_heads, -1)).split(kv_heads, dim=-2)
    place_S = torch.arange(kv_BSC.shape[1], device=qkv_BTC.device)
    age_BTS = cache.length_B[:, None, None] + time_T[:, None] - place_S
    filled_B1S = place_S < cache.length_B[:, None, None]
    # keys, values, and how long before each query they were
    seen = [(k_BSGK, v_BSGK, torch.where(filled_B1S, age_BTS, -1)[:, None, None])]
    seen.append((k_BTGK, v_BTGK, time_T[:, None] - time_T))
    scores = []
    for k, _, age in seen:
        hidden = age < 0 if window is None else (age < 0) | (age > window)
        own = torch.einsum("btghk,bsgk->bghts", q_BTGHK, k) * (qk_scale**2 * head_dim**-0.5)
        scores.append(own.masked_fill(hidden, float("-inf")))
    weights = torch.cat(scores, dim=-1).softmax(-1).split([k.shape[1] for k, _, _ in seen], dim=-1)
    mixed = [torch.einsum("bghts,bsgk->btghk", own, v) for own, (_, v, _) in zip(weights, seen, strict=True)]
    return sum(mixed[1:], mixed[0]).flatten(-3).to(qkv_BTC.dtype)
