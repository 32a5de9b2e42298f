"""Causal attention on a fused qkv projection: split, rotary, optional QK norm, softmax, all replicas.

R replica, B batch, T time, D width (H K), H query heads, G key/value heads, K head dim,
C channels of the fused projection ((H + 2 G) K, ordered q, k, v).

Rotary and norm cost a few operations on tiles that are loaded anyway, so every kernel redoes them
and nothing but the output and the logsumexp is kept. A program owns one (replica, batch row, kv
head, block of times) and loops over the query heads of its group, so no sum crosses programs and
no atomics are needed. Where all keys fit one block (T <= 128 in bf16) a single backward kernel
yields dq, dk and dv, in three causal pairs of half blocks where no kv head is shared; contexts of
several blocks go to `kernels/attention_blocks.py`. The halves of the head dimension are separate
tiles: rotary then needs no shuffle, and q k^T is two dots.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_blocks import backward_blocks, forward_blocks
from kernels.rotary import load_rotated, load_rows, store_rows, store_unrotated, visible
from kernels.stacking import custom_operator, dense_replicas, dot_precision, fold_vmap

DTYPES = (torch.bfloat16, torch.float32)
MAX_TIME = 4096
MAX_HEAD_DIM = 128


def qkv_attention(
    qkv_BTC: Tensor,
    cos_TK2: Tensor,
    sin_TK2: Tensor,
    heads: int,
    kv_heads: int,
    qk_norm: bool = False,
    eps: float = 1e-6,
    window: int | None = None,
    qk_scale: float = 1.0,
) -> Tensor:
    """Causal self-attention of one replica, straight from its fused qkv projection.

    q and k are rotated (half-split: y1 = x1 cos - x2 sin, y2 = x2 cos + x1 sin), then, if
    `qk_norm`, divided by their root mean square over the head dimension (no weight, `eps` inside
    the root); both are multiplied by `qk_scale`; softmax scale 1 / sqrt(K); query heads share kv heads in
    groups of H / G. A token sees itself and the `window` tokens before it, None: all of them.

    qkv_BTC: [B, T, (H + 2 G) K]; cos_TK2, sin_TK2: float32 [T, K / 2]. Returns [B, T, H K] in the
    dtype of qkv. On a GPU: bfloat16 or float32 (float32 products as
    `torch.get_float32_matmul_precision` says), T <= 4096, even K <= 128; ValueError otherwise.
    """
    _check(qkv_BTC, cos_TK2, sin_TK2, heads, kv_heads, window)
    form = qkv_attention_reference if qkv_BTC.device.type == "cpu" else qkv_attention_triton
    return form(qkv_BTC, cos_TK2, sin_TK2, heads, kv_heads, qk_norm, eps, window, qk_scale)


def qkv_attention_triton(
    qkv_BTC: Tensor,
    cos_TK2: Tensor,
    sin_TK2: Tensor,
    heads: int,
    kv_heads: int,
    qk_norm: bool = False,
    eps: float = 1e-6,
    window: int | None = None,
    qk_scale: float = 1.0,
) -> Tensor:
    """`qkv_attention` on the Triton kernels whatever the device."""
    tables = cos_TK2[None], sin_TK2[None]
    o_RBTD, _ = attention_op(qkv_BTC[None], *tables, heads, kv_heads, qk_norm, eps, window, qk_scale)
    return o_RBTD.squeeze(0)


def qkv_attention_reference(
    qkv_BTC: Tensor,
    cos_TK2: Tensor,
    sin_TK2: Tensor,
    heads: int,
    kv_heads: int,
    qk_norm: bool = False,
    eps: float = 1e-6,
    window: int | None = None,
    qk_scale: float = 1.0,
) -> Tensor:
    """`qkv_attention` in plain differentiable torch, at least float32 inside."""
    B, T, C = qkv_BTC.shape
    K = C // (heads + 2 * kv_heads)
    group = heads // kv_heads
    wide = qkv_BTC.to(torch.promote_types(qkv_BTC.dtype, torch.float32))
    q_BTHK, k_BTGK, v_BTGK = wide.view(B, T, -1, K).split([heads, kv_heads, kv_heads], dim=2)
    q_BTHK = rotate_reference(q_BTHK, cos_TK2, sin_TK2)
    k_BTGK = rotate_reference(k_BTGK, cos_TK2, sin_TK2)
    if qk_norm:
        q_BTHK = q_BTHK * torch.rsqrt(q_BTHK.square().mean(-1, keepdim=True) + eps)
        k_BTGK = k_BTGK * torch.rsqrt(k_BTGK.square().mean(-1, keepdim=True) + eps)
    # The query heads of one kv head are stacked along time: one matrix product a kv head.
    q_BGNK = q_BTHK.transpose(1, 2).reshape(B, kv_heads, group * T, K)
    scores_BGNT = q_BGNK @ k_BTGK.permute(0, 2, 3, 1) * (qk_scale**2 * K**-0.5)
    time_T = torch.arange(T, device=qkv_BTC.device)
    age_TT = time_T[:, None] - time_T
    hidden_TT = (age_TT < 0) | (age_TT > (T if window is None else window))
    scores_BHTT = scores_BGNT.reshape(B, heads, T, T).masked_fill(hidden_TT, float("-inf"))
    probabilities_BGNT = scores_BHTT.softmax(-1).reshape(B, kv_heads, group * T, T)
    o_BGNK = probabilities_BGNT @ v_BTGK.transpose(1, 2)
    o_BTHK = o_BGNK.reshape(B, heads, T, K).transpose(1, 2)
    return o_BTHK.reshape(B, T, heads * K).to(qkv_BTC.dtype)


def rotate_reference(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Every head rotated by its time's angles, cos and sin [T, K / 2], or [B, T, K / 2] of each row's own times."""
    x1, x2 = x_BTHK.chunk(2, dim=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


def _check(qkv_BTC, cos_TK2, sin_TK2, heads, kv_heads, window):
    T, C = qkv_BTC.shape[-2:]
    K = C // (heads + 2 * kv_heads)
    if heads % kv_heads or K * (heads + 2 * kv_heads) != C or K % 2:
        raise ValueError(
            f"attention got {C} qkv channels for {heads} heads and {kv_heads} kv heads, expected "
            "(heads + 2 kv_heads) * an even head dim, with heads a multiple of kv_heads"
        )
    if cos_TK2.shape != (T, K // 2) or sin_TK2.shape != (T, K // 2):
        raise ValueError(
            f"attention got rotary tables {tuple(cos_TK2.shape)} and {tuple(sin_TK2.shape)}, "
            f"expected ({T}, {K // 2}): cut them to the context and half the head dim"
        )
    if window is not None and window < 0:
        raise ValueError(f"attention got a window of {window}, expected at least 0, or None: a token sees itself")
    if qkv_BTC.device.type == "cpu":
        return
    if qkv_BTC.dtype not in DTYPES or T > MAX_TIME or K > MAX_HEAD_DIM:
        raise ValueError(
            f"attention got {qkv_BTC.dtype}, context {T}, head dim {K}; the GPU kernels take bfloat16 "
            f"or float32, context <= {MAX_TIME}, head dim <= {MAX_HEAD_DIM}: use one of these"
        )


@fold_vmap
@custom_operator("fractal::attention")
def attention_op(
    qkv_RBTC: Tensor,
    cos_RTK2: Tensor,
    sin_RTK2: Tensor,
    heads: int,
    kv_heads: int,
    qk_norm: bool,
    eps: float,
    window: int | None = None,
    qk_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`qkv_attention` of R replicas, o [R, B, T, H K], and its logsumexp [R, B, H, T] to base 2."""
    R, B, T, C = qkv_RBTC.shape
    K = C // (heads + 2 * kv_heads)
    o_RBTD = qkv_RBTC.new_empty(R, B, T, heads * K)
    logsumexp_RBHT = qkv_RBTC.new_empty(R, B, heads, T, dtype=torch.float32)
    qkv_RBTC, tables = qkv_RBTC.contiguous(), _tables(cos_RTK2, sin_RTK2)
    shape = _shape(B, T, K, heads, kv_heads, qk_norm, window, qk_scale)
    if one_block(qkv_RBTC.dtype) >= T:
        tiles = forward_tiles(T, K, qkv_RBTC.dtype)
        grid = (R * B * kv_heads * triton.cdiv(T, tiles["BLOCK_Q"]),)
        _attention_forward_kernel[grid](qkv_RBTC, *tables, o_RBTD, logsumexp_RBHT, eps, **shape, **tiles)
    else:
        forward_blocks(qkv_RBTC, tables, o_RBTD, logsumexp_RBHT, eps, shape)
    return o_RBTD, logsumexp_RBHT


@attention_op.register_fake
def _(qkv_RBTC, cos_RTK2, sin_RTK2, heads, kv_heads, qk_norm, eps, window=None, qk_scale=1.0):
    R, B, T, C = qkv_RBTC.shape
    o_RBTD = qkv_RBTC.new_empty(R, B, T, C // (heads + 2 * kv_heads) * heads)
    return o_RBTD, qkv_RBTC.new_empty(R, B, heads, T, dtype=torch.float32)


@custom_operator("fractal::attention_backward")
def attention_backward_op(
    do_RBTD: Tensor,
    qkv_RBTC: Tensor,
    cos_RTK2: Tensor,
    sin_RTK2: Tensor,
    o_RBTD: Tensor,
    logsumexp_RBHT: Tensor,
    heads: int,
    kv_heads: int,
    qk_norm: bool,
    eps: float,
    window: int | None = None,
    qk_scale: float = 1.0,
) -> Tensor:
    """The gradient of qkv [R, B, T, C]."""
    R, B, T, C = qkv_RBTC.shape
    K = C // (heads + 2 * kv_heads)
    dqkv_RBTC = torch.empty_like(qkv_RBTC, memory_format=torch.contiguous_format)
    qkv_RBTC, do_RBTD = qkv_RBTC.contiguous(), do_RBTD.contiguous()
    tables = _tables(cos_RTK2, sin_RTK2)
    shape = _shape(B, T, K, heads, kv_heads, qk_norm, window, qk_scale)
    half = half_block(T, K, heads, kv_heads, qkv_RBTC.dtype)
    if half:
        tiles = cut_tiles((half, half, 4, 1), T, K)
        _attention_backward_head_kernel[(R * B * heads,)](
            qkv_RBTC, *tables, o_RBTD, do_RBTD, logsumexp_RBHT, dqkv_RBTC, eps, **shape, **tiles
        )
    elif one_block(qkv_RBTC.dtype) >= T:
        tiles = backward_tiles(T, K, qkv_RBTC.dtype)
        _attention_backward_kernel[(R * B * kv_heads,)](
            qkv_RBTC, *tables, do_RBTD, logsumexp_RBHT, dqkv_RBTC, eps, **shape, **tiles
        )
    else:
        backward_blocks(qkv_RBTC, tables, o_RBTD, do_RBTD, logsumexp_RBHT, dqkv_RBTC, eps, shape)
    return dqkv_RBTC


@attention_backward_op.register_fake
def _(do_RBTD, qkv_RBTC, *_):
    return torch.empty_like(qkv_RBTC, memory_format=torch.contiguous_format)


def _attention_save(ctx, inputs, output):
    qkv_RBTC, cos_RTK2, sin_RTK2, *ctx.settings = inputs
    ctx.save_for_backward(qkv_RBTC, cos_RTK2, sin_RTK2, *output)
    ctx.set_materialize_grads(False)  # nothing flows back into the second result: make no zeros for it


def _attention_backward(ctx, do_RBTD, _):
    return attention_backward_op(do_RBTD, *ctx.saved_tensors, *ctx.settings), *[None] * (2 + len(ctx.settings))


attention_op.register_autograd(_attention_backward, setup_context=_attention_save)


def _tables(cos_RTK2, sin_RTK2):
    cos_RTK2, sin_RTK2 = dense_replicas(cos_RTK2), dense_replicas(sin_RTK2)
    return cos_RTK2, sin_RTK2, cos_RTK2.stride(0), sin_RTK2.stride(0)


def _shape(B, T, K, heads, kv_heads, qk_norm, window, qk_scale):
    sizes = {"B": B, "T": T, "K": K, "H": heads, "G": kv_heads, "QK_NORM": qk_norm}
    # a window of T is none: no code of the kernels asks for it
    window = T if window is None or window >= T - 1 else window
    return sizes | {"SCALE": qk_scale * qk_scale / math.sqrt(K), "WINDOW": window}


def one_block(dtype):
    """The longest context whose keys are one block."""
    if dtype == torch.bfloat16:
        return 128
    return 64 if dot_precision() == "tf32" else 32


def forward_tiles(T, K, dtype):
    """Tile sizes of a context of one block, from one replica's shape and dtype alone."""
    keys = one_block(dtype)
    if dtype == torch.bfloat16:
        return cut_tiles((64 if K <= 64 else 128, keys, 4, 1), T, K)
    return cut_tiles((keys, keys, 8 if keys == 64 else 4, 1), T, K)


def backward_tiles(T, K, dtype):
    """As `forward_tiles`; smaller query blocks, since five products share the registers."""
    keys = one_block(dtype)
    if dtype == torch.bfloat16:
        return cut_tiles((128 if K <= 64 else 32, keys, 8, 1), T, K)
    return cut_tiles((keys, keys, 8 if keys == 64 else 4, 1), T, K)


def half_block(T, K, heads, kv_heads, dtype):
    """Times in a half block where the backward goes by pairs of them, else 0."""
    half = 64 if dtype == torch.bfloat16 else 32
    return half if heads == kv_heads and half < T <= 2 * half and K <= 64 else 0


def cut_tiles(tiles, T, K):
    """(BLOCK_Q, BLOCK_K, warps, stages) as a kernel takes them, cut to the context and the head dim."""
    block_q, block_k, num_warps, num_stages = tiles
    time = max(16, triton.next_power_of_2(T))
    return {
        "BLOCK_Q": min(time, block_q),
        "BLOCK_K": min(time, block_k),
        "HALF": max(16, triton.next_power_of_2(K // 2)),
        "FULL": max(16, triton.next_power_of_2(K)),
        "PRECISION": dot_precision(),
        "num_warps": num_warps if time > 32 else 4,
        "num_stages": num_stages,
    }


@triton.jit
def _attention_forward_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    cos_stride,
    sin_stride,
    o_ptr,
    logsumexp_ptr,
    eps,
    B: tl.constexpr,
    T: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    QK_NORM: tl.constexpr,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HALF: tl.constexpr,
    FULL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (replica, batch row, kv head, query block) of a context whose keys are one block."""
    C: tl.constexpr = (H + 2 * G) * K
    GROUP: tl.constexpr = H // G
    LOG2E: tl.constexpr = 1.4426950408889634
    blocks = tl.cdiv(T, BLOCK_Q)
    # Last blocks first: they see the most keys and should not start last.
    block = blocks - 1 - tl.program_id(0) % blocks
    kv_head = tl.program_id(0) // blocks % G
    row = (tl.program_id(0) // (blocks * G)).to(tl.int64)  # (replica, batch row)
    cos_ptr += row // B * cos_stride
    sin_ptr += row // B * sin_stride
    qkv_ptr += row * T * C
    k_ptr = qkv_ptr + (H + kv_head) * K
    v_ptr = qkv_ptr + (H + G + kv_head) * K
    o_ptr += row * T * H * K
    logsumexp_ptr += row * H * T

    q_time = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    k_time = tl.arange(0, BLOCK_K)
    k1, k2, _k = load_rotated(k_ptr, cos_ptr, sin_ptr, k_time, eps, T, K, C, HALF, QK_NORM)
    v = load_rows(v_ptr, k_time, T, K, C, FULL)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        q1, q2, _q = load_rotated(qkv_ptr + head * K, cos_ptr, sin_ptr, q_time, eps, T, K, C, HALF, QK_NORM)
        s = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
        s = tl.dot(q2, tl.trans(k2), s, input_precision=PRECISION)
        s = tl.where(visible(k_time[None, :], q_time[:, None], T, WINDOW), s, float("-inf"))
        largest = tl.max(s, 1) * (SCALE * LOG2E)
        p = tl.exp2(s * (SCALE * LOG2E) - largest[:, None])
        total = tl.sum(p, 1)
        o = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        store_rows(o / total[:, None], o_ptr + head * K, q_time, T, K, H * K, FULL)
        tl.store(logsumexp_ptr + head * T + q_time, largest + tl.log2(total), mask=q_time < T)  # base 2


@triton.jit
def _attention_backward_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    cos_stride,
    sin_stride,
    do_ptr,
    logsumexp_ptr,
    dqkv_ptr,
    eps,
    B: tl.constexpr,
    T: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    QK_NORM: tl.constexpr,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HALF: tl.constexpr,
    FULL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (replica, batch row, kv head) of a context whose keys are one block: dq, dk and dv.

    Scores are held transposed, [keys, queries], so that p and ds feed the dots for dv and dk from
    registers.
    """
    C: tl.constexpr = (H + 2 * G) * K
    GROUP: tl.constexpr = H // G
    LOG2E: tl.constexpr = 1.4426950408889634
    kv_head = tl.program_id(0) % G
    row = (tl.program_id(0) // G).to(tl.int64)
    cos_ptr += row // B * cos_stride
    sin_ptr += row // B * sin_stride
    qkv_ptr += row * T * C
    dqkv_ptr += row * T * C
    do_ptr += row * T * H * K
    logsumexp_ptr += row * H * T
    k_at = (H + kv_head) * K
    v_at = (H + G + kv_head) * K

    k_time = tl.arange(0, BLOCK_K)
    k1, k2, k_scale = load_rotated(qkv_ptr + k_at, cos_ptr, sin_ptr, k_time, eps, T, K, C, HALF, QK_NORM)
    v = load_rows(qkv_ptr + v_at, k_time, T, K, C, FULL)
    dk1 = tl.zeros([BLOCK_K, HALF], tl.float32)
    dk2 = tl.zeros([BLOCK_K, HALF], tl.float32)
    dv = tl.zeros([BLOCK_K, FULL], tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        for start in range(0, T, BLOCK_Q):
            q_time = start + tl.arange(0, BLOCK_Q)
            q1, q2, q_scale = load_rotated(qkv_ptr + head * K, cos_ptr, sin_ptr, q_time, eps, T, K, C, HALF, QK_NORM)
            do = load_rows(do_ptr + head * K, q_time, T, K, H * K, FULL)
            logsumexp = tl.load(logsumexp_ptr + head * T + q_time, mask=q_time < T, other=0.0)
            s = tl.dot(k1, tl.trans(q1), input_precision=PRECISION)
            s = tl.dot(k2, tl.trans(q2), s, input_precision=PRECISION)
            p = tl.exp2(s * (SCALE * LOG2E) - logsumexp[None, :])
            seen = visible(k_time[:, None], q_time[None, :], T, WINDOW)
            p = tl.where(seen, p, 0.0)
            p = p.to(v.dtype)
            dv = tl.dot(p, do, dv, input_precision=PRECISION)
            dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
            delta = tl.sum(p * dp, 0)
            ds = tl.where(seen, p * (dp - delta[None, :]), 0.0).to(v.dtype)
            dk1 = tl.dot(ds, q1, dk1, input_precision=PRECISION)
            dk2 = tl.dot(ds, q2, dk2, input_precision=PRECISION)
            dq1 = tl.dot(tl.trans(ds), k1, input_precision=PRECISION) * SCALE
            dq2 = tl.dot(tl.trans(ds), k2, input_precision=PRECISION) * SCALE
            dq_ptr = dqkv_ptr + head * K
            store_unrotated(dq1, dq2, q1, q2, q_scale, dq_ptr, cos_ptr, sin_ptr, q_time, T, K, C, HALF, QK_NORM)
    store_rows(dv, dqkv_ptr + v_at, k_time, T, K, C, FULL)
    dk1 *= SCALE
    dk2 *= SCALE
    store_unrotated(dk1, dk2, k1, k2, k_scale, dqkv_ptr + k_at, cos_ptr, sin_ptr, k_time, T, K, C, HALF, QK_NORM)


@triton.jit
def _pair(
    k1, k2, v, q1, q2, do, logsumexp, delta, k_time, q_time,
    T: tl.constexpr, SCALE: tl.constexpr, WINDOW: tl.constexpr, DIAGONAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """p and the scores' gradient ds [keys, queries] of one block of keys and one of queries, in the dtype of v."""
    LOG2E: tl.constexpr = 1.4426950408889634
    s = tl.dot(k1, tl.trans(q1), input_precision=PRECISION)
    s = tl.dot(k2, tl.trans(q2), s, input_precision=PRECISION)
    dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    p = tl.exp2(s * (SCALE * LOG2E) - logsumexp[None, :])
    ds = p * (dp - delta[None, :])
    if DIAGONAL or WINDOW < T:
        seen = visible(k_time[:, None], q_time[None, :], T, WINDOW)
        p = tl.where(seen, p, 0.0)
        ds = tl.where(seen, ds, 0.0)
    return p.to(v.dtype), ds.to(v.dtype)


@triton.jit
def _load_upstream(o_ptr, do_ptr, logsumexp_ptr, time, T, K, ROW, FULL: tl.constexpr):
    """do, the logsumexp and delta = sum(do * o) of a block of queries."""
    do = load_rows(do_ptr, time, T, K, ROW, FULL)
    o = load_rows(o_ptr, time, T, K, ROW, FULL)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    return do, tl.load(logsumexp_ptr + time, mask=time < T, other=0.0), delta


@triton.jit
def _attention_backward_head_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    cos_stride,
    sin_stride,
    o_ptr,
    do_ptr,
    logsumexp_ptr,
    dqkv_ptr,
    eps,
    B: tl.constexpr,
    T: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    QK_NORM: tl.constexpr,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HALF: tl.constexpr,
    FULL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (replica, batch row, head of a network with H = G): dq, dk and dv of T <= 2 BLOCK times.

    Three causal block pairs, ordered so that only one block's dq and one's dk and dv are held at a time.
    """
    C: tl.constexpr = 3 * H * K
    head = tl.program_id(0) % H
    row = (tl.program_id(0) // H).to(tl.int64)
    cos_ptr += row // B * cos_stride
    sin_ptr += row // B * sin_stride
    q_ptr = qkv_ptr + row * T * C + head * K
    k_ptr = q_ptr + H * K
    v_ptr = k_ptr + H * K
    dq_ptr = dqkv_ptr + row * T * C + head * K
    dk_ptr = dq_ptr + H * K
    dv_ptr = dk_ptr + H * K
    o_ptr += row * T * H * K + head * K
    do_ptr += row * T * H * K + head * K
    logsumexp_ptr += (row * H + head) * T

    early = tl.arange(0, BLOCK_K)
    late = BLOCK_K + early
    # late queries, late keys
    q1, q2, q_scale = load_rotated(q_ptr, cos_ptr, sin_ptr, late, eps, T, K, C, HALF, QK_NORM)
    do, logsumexp, delta = _load_upstream(o_ptr, do_ptr, logsumexp_ptr, late, T, K, H * K, FULL)
    k1, k2, k_scale = load_rotated(k_ptr, cos_ptr, sin_ptr, late, eps, T, K, C, HALF, QK_NORM)
    v = load_rows(v_ptr, late, T, K, C, FULL)
    p, ds = _pair(k1, k2, v, q1, q2, do, logsumexp, delta, late, late, T, SCALE, WINDOW, True, PRECISION)
    store_rows(tl.dot(p, do, input_precision=PRECISION), dv_ptr, late, T, K, C, FULL)
    dk1 = tl.dot(ds, q1, input_precision=PRECISION) * SCALE
    dk2 = tl.dot(ds, q2, input_precision=PRECISION) * SCALE
    dq1 = tl.dot(tl.trans(ds), k1, input_precision=PRECISION)
    dq2 = tl.dot(tl.trans(ds), k2, input_precision=PRECISION)
    store_unrotated(dk1, dk2, k1, k2, k_scale, dk_ptr, cos_ptr, sin_ptr, late, T, K, C, HALF, QK_NORM)
    # late queries, early keys
    k1, k2, k_scale = load_rotated(k_ptr, cos_ptr, sin_ptr, early, eps, T, K, C, HALF, QK_NORM)
    v = load_rows(v_ptr, early, T, K, C, FULL)
    p, ds = _pair(k1, k2, v, q1, q2, do, logsumexp, delta, early, late, T, SCALE, WINDOW, False, PRECISION)
    dv = tl.dot(p, do, input_precision=PRECISION)
    dk1 = tl.dot(ds, q1, input_precision=PRECISION)
    dk2 = tl.dot(ds, q2, input_precision=PRECISION)
    dq1 = tl.dot(tl.trans(ds), k1, dq1, input_precision=PRECISION) * SCALE
    dq2 = tl.dot(tl.trans(ds), k2, dq2, input_precision=PRECISION) * SCALE
    store_unrotated(dq1, dq2, q1, q2, q_scale, dq_ptr, cos_ptr, sin_ptr, late, T, K, C, HALF, QK_NORM)
    # early queries, early keys
    q1, q2, q_scale = load_rotated(q_ptr, cos_ptr, sin_ptr, early, eps, T, K, C, HALF, QK_NORM)
    do, logsumexp, delta = _load_upstream(o_ptr, do_ptr, logsumexp_ptr, early, T, K, H * K, FULL)
    p, ds = _pair(k1, k2, v, q1, q2, do, logsumexp, delta, early, early, T, SCALE, WINDOW, True, PRECISION)
    store_rows(tl.dot(p, do, dv, input_precision=PRECISION), dv_ptr, early, T, K, C, FULL)
    dk1 = tl.dot(ds, q1, dk1, input_precision=PRECISION) * SCALE
    dk2 = tl.dot(ds, q2, dk2, input_precision=PRECISION) * SCALE
    dq1 = tl.dot(tl.trans(ds), k1, input_precision=PRECISION) * SCALE
    dq2 = tl.dot(tl.trans(ds), k2, input_precision=PRECISION) * SCALE
    store_unrotated(dq1, dq2, q1, q2, q_scale, dq_ptr, cos_ptr, sin_ptr, early, T, K, C, HALF, QK_NORM)
    store_unrotated(dk1, dk2, k1, k2, k_scale, dk_ptr, cos_ptr, sin_ptr, early, T, K, C, HALF, QK_NORM)
