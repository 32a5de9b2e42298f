"""Causal attention on a fused qkv projection: split, rotary, optional QK norm, softmax, all replicas.

R replica, B batch, T time, D width (H K), H query heads, G key/value heads, K head dim,
C channels of the fused projection ((H + 2 G) K, ordered q, k, v).
"""

import torch


def qkv_attention(qkv_BTC, cos_TK2, sin_TK2, heads, kv_heads, qk_norm=False, eps=1e-6):
    """Causal self-attention of one replica, straight from its fused qkv projection.

    q and k are rotated (half-split: y1 = x1 cos - x2 sin, y2 = x2 cos + x1 sin), then, if
    `qk_norm`, divided by their root mean square over the head dimension (no weight, `eps` inside
    the root); softmax scale 1 / sqrt(K); query heads share kv heads in groups of H / G.

    qkv_BTC: [B, T, (H + 2 G) K]; cos_TK2, sin_TK2: float32 [T, K / 2]. Returns [B, T, H K] in the
    dtype of qkv.
    """
    return qkv_attention_reference(qkv_BTC, cos_TK2, sin_TK2, heads, kv_heads, qk_norm, eps)


def qkv_attention_reference(qkv_BTC, cos_TK2, sin_TK2, heads, kv_heads, qk_norm=False, eps=1e-6):
    """`qkv_attention` in plain differentiable torch, at least float32 inside."""
    B, T, C = qkv_BTC.shape
    K = C // (heads + 2 * kv_heads)
    group = heads // kv_heads
    wide = qkv_BTC.to(torch.promote_types(qkv_BTC.dtype, torch.float32))
    q_BTHK, k_BTGK, v_BTGK = wide.view(B, T, -1, K).split([heads, kv_heads, kv_heads], dim=2)
    q_BTHK = _rotate_reference(q_BTHK, cos_TK2, sin_TK2)
    k_BTGK = _rotate_reference(k_BTGK, cos_TK2, sin_TK2)
    if qk_norm:
        q_BTHK = q_BTHK * torch.rsqrt(q_BTHK.square().mean(-1, keepdim=True) + eps)
        k_BTGK = k_BTGK * torch.rsqrt(k_BTGK.square().mean(-1, keepdim=True) + eps)
    # The query heads of one kv head are stacked along time: one matrix product a kv head.
    q_BGNK = q_BTHK.transpose(1, 2).reshape(B, kv_heads, group * T, K)
    scores_BGNT = q_BGNK @ k_BTGK.permute(0, 2, 3, 1) * K**-0.5
    later_TT = torch.ones(T, T, dtype=torch.bool, device=qkv_BTC.device).triu(1)
    scores_BHTT = scores_BGNT.reshape(B, heads, T, T).masked_fill(later_TT, float("-inf"))
    probabilities_BGNT = scores_BHTT.softmax(-1).reshape(B, kv_heads, group * T, T)
    o_BGNK = probabilities_BGNT @ v_BTGK.transpose(1, 2)
    o_BTHK = o_BGNK.reshape(B, heads, T, K).transpose(1, 2)
    return o_BTHK.reshape(B, T, heads * K).to(qkv_BTC.dtype)


def _rotate_reference(x_BTHK, cos_TK2, sin_TK2):
    x1, x2 = x_BTHK.chunk(2, dim=-1)
    cos, sin = cos_TK2[:, None], sin_TK2[:, None]
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)
