"""Attention whose context spans several blocks of keys: what `kernels/attention.py` launches there.

Dimensions: R replica, B batch, T time, D width (H K), H query heads, G key/value heads, K head dim,
C channels of the fused projection ((H + 2 G) K, ordered q, k, v), P a head dim padded (2 HALF).

Every key meets many blocks of queries, so a pass before turns q and k once (rotary and norm) into
[row, head, T, P]; the loops then read whole tiles by tensor descriptors, which fill with zeros what
lies outside a context or a head, and hand them to the tensor cores as they are. The halves that
rotary pairs lie in P at 0 and HALF, so an accumulator of P columns splits in registers.

A program owns one block: of queries (forward, dq) or of keys (dk and dv, of all query heads in its
group). It sums in one order, whatever the number of rows: scores are computed twice in the backward,
and no sum crosses programs. Blocks on the diagonal are masked, the others are not.
"""

import torch
import torch.nn.functional as functional
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.rotary import load_rotated, load_rows, store_rows, store_unrotated, visible
from kernels.stacking import dot_precision

LOG2E = tl.constexpr(1.4426950408889634)
TURNED_ROWS = 32  # times that one program turns


def forward_tiles(K: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """(queries, keys, warps, stages) of a program, from one replica's head dim and dtype alone."""
    return (64, 64, 4, 3) if dtype == torch.bfloat16 else _fp32_tiles()


def queries_tiles(K: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """As `forward_tiles`, for dq."""
    if dtype == torch.bfloat16:
        return (64, 64, 4, 3) if K <= 64 else (128, 64, 8, 3)
    return _fp32_tiles()


def keys_tiles(K: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """As `forward_tiles`, for dk and dv."""
    if dtype == torch.bfloat16:
        return (64, 64, 4, 3) if K <= 64 else (32, 64, 4, 3)
    return _fp32_tiles()


def _fp32_tiles() -> tuple[int, int, int, int]:
    return (64, 64, 8, 1) if dot_precision() == "tf32" else (32, 32, 4, 1)


def forward_blocks(
    qkv_RBTC: Tensor, tables: tuple, o_RBTD: Tensor, logsumexp_RBHT: Tensor, eps: float, shape: dict
) -> None:
    """Fill o and its logsumexp, to base 2; `tables` and `shape` as the kernels of `kernels/attention.py` take them."""
    T, H, G = shape["T"], shape["H"], shape["G"]
    block_q, block_k, warps, stages = forward_tiles(shape["K"], qkv_RBTC.dtype)
    k_turned = _turned(qkv_RBTC, tables, eps, shape, first=H)
    _attention_blocks_forward_kernel[(o_RBTD[..., 0, 0].numel() * H * triton.cdiv(T, block_q),)](
        qkv_RBTC,
        *tables,
        _heads(k_turned, block_k),
        _heads(_split(qkv_RBTC, H + 2 * G), block_k),
        o_RBTD,
        logsumexp_RBHT,
        eps,
        **shape,
        **_sizes(shape["K"], block_q, block_k),
        num_warps=warps,
        num_stages=stages,
    )


def backward_blocks(
    qkv_RBTC: Tensor,
    tables: tuple,
    o_RBTD: Tensor,
    do_RBTD: Tensor,
    logsumexp_RBHT: Tensor,
    dqkv_RBTC: Tensor,
    eps: float,
    shape: dict,
) -> None:
    """Fill the gradient of qkv."""
    T, K, H, G = shape["T"], shape["K"], shape["H"], shape["G"]
    rows = o_RBTD[..., 0, 0].numel()
    turned = _turned(qkv_RBTC, tables, eps, shape, first=0)
    qkv_split, do_split = _split(qkv_RBTC, H + 2 * G), _split(do_RBTD, H)
    delta_RBHT = torch.empty_like(logsumexp_RBHT)

    block_q, block_k, warps, stages = queries_tiles(K, qkv_RBTC.dtype)
    _attention_blocks_queries_kernel[(rows * H * triton.cdiv(T, block_q),)](
        qkv_RBTC,
        *tables,
        _heads(turned, block_k),
        _heads(qkv_split, block_k),
        o_RBTD,
        do_RBTD,
        logsumexp_RBHT,
        delta_RBHT,
        dqkv_RBTC,
        eps,
        **shape,
        **_sizes(K, block_q, block_k),
        num_warps=warps,
        num_stages=stages,
    )
    block_q, block_k, warps, stages = keys_tiles(K, qkv_RBTC.dtype)
    _attention_blocks_keys_kernel[(rows * G * triton.cdiv(T, block_k),)](
        qkv_RBTC,
        *tables,
        _heads(turned, block_q),
        _heads(do_split, block_q),
        logsumexp_RBHT,
        delta_RBHT,
        dqkv_RBTC,
        eps,
        **shape,
        **_sizes(K, block_q, block_k),
        num_warps=warps,
        num_stages=stages,
    )


def _turned(qkv_RBTC: Tensor, tables: tuple, eps: float, shape: dict, first: int) -> Tensor:
    """q and k [row, head, T, P] after rotary and norm, from the head `first` on."""
    T, K, heads = shape["T"], shape["K"], shape["H"] + shape["G"] - first
    rows = qkv_RBTC[..., 0, 0].numel()
    half = _half(K)
    turned = qkv_RBTC.new_empty(rows, heads, T, 2 * half)
    _attention_turn_kernel[(rows * triton.cdiv(T, TURNED_ROWS),)](
        qkv_RBTC, *tables, turned, eps, **shape, FIRST=first, ROWS=TURNED_ROWS, HALF=half, num_warps=4
    )
    return turned


def _split(x: Tensor, heads: int) -> Tensor:
    """x [R, B, T, heads K] as [row, head, T, K], in place unless its heads are no whole 16-byte units."""
    split = x.flatten(0, 1).unflatten(-1, (heads, -1)).transpose(1, 2)
    missing = -split.shape[-1] % (16 // x.element_size())
    return functional.pad(split, (0, missing)) if missing else split


def _heads(x: Tensor, times: int) -> TensorDescriptor:
    """Tiles [times, P] of x [row, head, T, channel], zero outside of it."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, times, 2 * _half(x.shape[-1])])


def _half(K: int) -> int:
    return max(16, triton.next_power_of_2(-(-K // 2)))


def _sizes(K: int, block_q: int, block_k: int) -> dict:
    return {"BLOCK_Q": block_q, "BLOCK_K": block_k, "HALF": _half(K), "PRECISION": dot_precision()}


@triton.jit
def _tile(heads_ptr, row, head, time, TIMES: tl.constexpr, P: tl.constexpr):
    return heads_ptr.load([row, head, time, 0]).reshape(TIMES, P)


@triton.jit
def _joined(y1, y2):
    """Halves [times, HALF] side by side, [times, P]."""
    return tl.join(y1, y2).permute(0, 2, 1).reshape(y1.shape[0], 2 * y1.shape[1])


@triton.jit
def _halves(y):
    """The halves of [times, P]."""
    return y.reshape(y.shape[0], 2, y.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def _attention_turn_kernel(
    qkv_ptr, cos_ptr, sin_ptr, cos_stride, sin_stride, turned_ptr, eps,
    B: tl.constexpr, T: tl.constexpr, K: tl.constexpr, H: tl.constexpr, G: tl.constexpr,
    QK_NORM: tl.constexpr, SCALE: tl.constexpr, WINDOW: tl.constexpr,
    FIRST: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Program (row, block of times): q and k of all heads from FIRST on."""
    C: tl.constexpr = (H + 2 * G) * K
    HEADS: tl.constexpr = H + G - FIRST
    blocks = tl.cdiv(T, ROWS)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    time = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    x_ptr = qkv_ptr + row * T * C + FIRST * K
    at = turned_ptr + row * HEADS * T * (2 * HALF) + time[:, None] * (2 * HALF) + tl.arange(0, HALF)[None, :]
    inside = (time < T)[:, None] & (tl.arange(0, HALF) >= 0)[None, :]
    for _head in range(HEADS):
        y1, y2, _scale = load_rotated(
            x_ptr, cos_ptr + row // B * cos_stride, sin_ptr + row // B * sin_stride, time, eps, T, K, C, HALF, QK_NORM
        )
        tl.store(at, y1, mask=inside)
        tl.store(at + HALF, y2, mask=inside)
        x_ptr += K
        at += T * (2 * HALF)


@triton.jit
def _key_blocks(block, T: tl.constexpr, WINDOW: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """For a block of queries: the first key that one of them sees, the first that all see, and the diagonal's first."""
    first = block * BLOCK_Q // BLOCK_K * BLOCK_K
    edge, whole = 0, 0
    if WINDOW < T:
        edge = max(0, block * BLOCK_Q - WINDOW) // BLOCK_K * BLOCK_K
        whole = min(first, tl.cdiv(max(0, (block + 1) * BLOCK_Q - 1 - WINDOW), BLOCK_K) * BLOCK_K)
    return edge, whole, first


@triton.jit
def _forward_loop(
    q, o, largest, total, k_ptr, v_ptr, row, k_head, v_head, q_time, start, stop,
    T: tl.constexpr, SCALE: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_K: tl.constexpr, P: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax of a block of queries over the keys in [start, stop)."""
    for at in range(start, stop, BLOCK_K):
        k = _tile(k_ptr, row, k_head, at, BLOCK_K, P)
        v = _tile(v_ptr, row, v_head, at, BLOCK_K, P)
        s = tl.dot(q, k.T, input_precision=PRECISION)
        if MASKED:
            k_time = at + tl.arange(0, BLOCK_K)
            s = tl.where(visible(k_time[None, :], q_time[:, None], T, WINDOW), s, float("-inf"))
        previous = largest
        largest = tl.maximum(previous, tl.max(s, 1) * (SCALE * LOG2E))
        p = tl.exp2(s * (SCALE * LOG2E) - largest[:, None])
        shrink = tl.exp2(previous - largest)
        total = total * shrink + tl.sum(p, 1)
        o = tl.dot(p.to(v.dtype), v, o * shrink[:, None], input_precision=PRECISION)
    return o, largest, total


@triton.jit
def _attention_blocks_forward_kernel(
    qkv_ptr, cos_ptr, sin_ptr, cos_stride, sin_stride, k_ptr, v_ptr, o_ptr, logsumexp_ptr, eps,
    B: tl.constexpr, T: tl.constexpr, K: tl.constexpr, H: tl.constexpr, G: tl.constexpr,
    QK_NORM: tl.constexpr, SCALE: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (row, query head, block of queries); k_ptr: turned keys, v_ptr: the whole projection."""
    C: tl.constexpr = (H + 2 * G) * K
    P: tl.constexpr = 2 * HALF
    blocks = tl.cdiv(T, BLOCK_Q)
    # Last blocks first: they see the most keys and should not start last.
    block = blocks - 1 - tl.program_id(0) % blocks
    head = tl.program_id(0) // blocks % H
    row = tl.program_id(0) // (blocks * H)
    kv_head = head // (H // G)
    wide = row.to(tl.int64)
    q_time = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q1, q2, _scale = load_rotated(
        qkv_ptr + wide * T * C + head * K, cos_ptr + wide // B * cos_stride, sin_ptr + wide // B * sin_stride,
        q_time, eps, T, K, C, HALF, QK_NORM,
    )  # fmt: skip
    q = _joined(q1, q2)
    o = tl.zeros([BLOCK_Q, P], tl.float32)
    largest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    edge, whole, first = _key_blocks(block, T, WINDOW, BLOCK_Q, BLOCK_K)
    o, largest, total = _forward_loop(
        q, o, largest, total, k_ptr, v_ptr, row, kv_head, H + G + kv_head, q_time, whole, first,
        T, SCALE, WINDOW, BLOCK_K, P, False, PRECISION,
    )  # fmt: skip
    o, largest, total = _forward_loop(
        q, o, largest, total, k_ptr, v_ptr, row, kv_head, H + G + kv_head, q_time, first, min(T, (block + 1) * BLOCK_Q),
        T, SCALE, WINDOW, BLOCK_K, P, True, PRECISION,
    )  # fmt: skip
    if WINDOW < T:  # last: by now every query has seen a key, itself, so that none of its maxima is infinite
        o, largest, total = _forward_loop(
            q, o, largest, total, k_ptr, v_ptr, row, kv_head, H + G + kv_head, q_time, edge, whole,
            T, SCALE, WINDOW, BLOCK_K, P, True, PRECISION,
        )  # fmt: skip
    store_rows(o / total[:, None], o_ptr + wide * T * H * K + head * K, q_time, T, K, H * K, P)
    tl.store(logsumexp_ptr + (wide * H + head) * T + q_time, largest + tl.log2(total), mask=q_time < T)  # base 2


@triton.jit
def _queries_loop(
    q, do, dq, logsumexp, delta, k_ptr, v_ptr, row, k_head, v_head, q_time, start, stop,
    T: tl.constexpr, SCALE: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_K: tl.constexpr, P: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of a block of queries, summed over the keys in [start, stop)."""
    for at in range(start, stop, BLOCK_K):
        k = _tile(k_ptr, row, k_head, at, BLOCK_K, P)
        v = _tile(v_ptr, row, v_head, at, BLOCK_K, P)
        s = tl.dot(q, k.T, input_precision=PRECISION)
        dp = tl.dot(do, v.T, input_precision=PRECISION)
        p = tl.exp2(s * (SCALE * LOG2E) - logsumexp[:, None])
        ds = p * (dp - delta[:, None])
        if MASKED:
            k_time = at + tl.arange(0, BLOCK_K)
            ds = tl.where(visible(k_time[None, :], q_time[:, None], T, WINDOW), ds, 0.0)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def _attention_blocks_queries_kernel(
    qkv_ptr, cos_ptr, sin_ptr, cos_stride, sin_stride, k_ptr, v_ptr, o_ptr, do_ptr, logsumexp_ptr, delta_ptr,
    dqkv_ptr, eps,
    B: tl.constexpr, T: tl.constexpr, K: tl.constexpr, H: tl.constexpr, G: tl.constexpr,
    QK_NORM: tl.constexpr, SCALE: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (row, query head, block of queries): dq, and delta = sum(do * o) for the keys."""
    C: tl.constexpr = (H + 2 * G) * K
    P: tl.constexpr = 2 * HALF
    blocks = tl.cdiv(T, BLOCK_Q)
    block = blocks - 1 - tl.program_id(0) % blocks
    head = tl.program_id(0) // blocks % H
    row = tl.program_id(0) // (blocks * H)
    k_head, v_head = H + head // (H // G), H + G + head // (H // G)
    wide = row.to(tl.int64)
    cos_ptr += wide // B * cos_stride
    sin_ptr += wide // B * sin_stride
    q_ptr = qkv_ptr + wide * T * C + head * K
    upstream_at = wide * T * H * K + head * K
    logsumexp_ptr += (wide * H + head) * T
    delta_ptr += (wide * H + head) * T

    q_time = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q1, q2, _scale = load_rotated(q_ptr, cos_ptr, sin_ptr, q_time, eps, T, K, C, HALF, QK_NORM)
    q = _joined(q1, q2)
    do = load_rows(do_ptr + upstream_at, q_time, T, K, H * K, P)
    o = load_rows(o_ptr + upstream_at, q_time, T, K, H * K, P)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta_ptr + q_time, delta, mask=q_time < T)
    logsumexp = tl.load(logsumexp_ptr + q_time, mask=q_time < T, other=0.0)
    dq = tl.zeros([BLOCK_Q, P], tl.float32)
    edge, whole, first = _key_blocks(block, T, WINDOW, BLOCK_Q, BLOCK_K)
    dq = _queries_loop(
        q, do, dq, logsumexp, delta, k_ptr, v_ptr, row, k_head, v_head, q_time, whole, first,
        T, SCALE, WINDOW, BLOCK_K, P, False, PRECISION,
    )  # fmt: skip
    dq = _queries_loop(
        q, do, dq, logsumexp, delta, k_ptr, v_ptr, row, k_head, v_head, q_time, first, min(T, (block + 1) * BLOCK_Q),
        T, SCALE, WINDOW, BLOCK_K, P, True, PRECISION,
    )  # fmt: skip
    if WINDOW < T:
        dq = _queries_loop(
            q, do, dq, logsumexp, delta, k_ptr, v_ptr, row, k_head, v_head, q_time, edge, whole,
            T, SCALE, WINDOW, BLOCK_K, P, True, PRECISION,
        )  # fmt: skip
    dq1, dq2 = _halves(dq * SCALE)
    # Loaded again for the norm's gradient rather than held in registers through the loops.
    q1, q2, q_scale = load_rotated(q_ptr, cos_ptr, sin_ptr, q_time, eps, T, K, C, HALF, QK_NORM)
    dq_ptr = dqkv_ptr + wide * T * C + head * K
    store_unrotated(dq1, dq2, q1, q2, q_scale, dq_ptr, cos_ptr, sin_ptr, q_time, T, K, C, HALF, QK_NORM)


@triton.jit
def _keys_loop(
    k, v, dk, dv, q_ptr, do_ptr, logsumexp_ptr, delta_ptr, row, head, k_time, start, stop,
    T: tl.constexpr, SCALE: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_Q: tl.constexpr, P: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of keys, summed over the queries of one head in [start, stop).

    Scores are held transposed, [keys, queries], so that p and ds feed the dots for dv and dk from registers.
    """
    for at in range(start, stop, BLOCK_Q):
        q_time = at + tl.arange(0, BLOCK_Q)
        q = _tile(q_ptr, row, head, at, BLOCK_Q, P)
        do = _tile(do_ptr, row, head, at, BLOCK_Q, P)
        logsumexp = tl.load(logsumexp_ptr + q_time, mask=q_time < T, other=0.0)
        delta = tl.load(delta_ptr + q_time, mask=q_time < T, other=0.0)
        s = tl.dot(k, q.T, input_precision=PRECISION)
        dp = tl.dot(v, do.T, input_precision=PRECISION)
        p = tl.exp2(s * (SCALE * LOG2E) - logsumexp[None, :])
        if MASKED:
            seen = visible(k_time[:, None], q_time[None, :], T, WINDOW)
            p = tl.where(seen, p, 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        if MASKED:  # a masked p of 0 times a gradient that is not finite
            ds = tl.where(seen, ds, 0.0)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _attention_blocks_keys_kernel(
    qkv_ptr, cos_ptr, sin_ptr, cos_stride, sin_stride, q_ptr, do_ptr, logsumexp_ptr, delta_ptr, dqkv_ptr, eps,
    B: tl.constexpr, T: tl.constexpr, K: tl.constexpr, H: tl.constexpr, G: tl.constexpr,
    QK_NORM: tl.constexpr, SCALE: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (row, kv head, block of keys): dk and dv, summed over query heads and times."""
    C: tl.constexpr = (H + 2 * G) * K
    P: tl.constexpr = 2 * HALF
    GROUP: tl.constexpr = H // G
    blocks = tl.cdiv(T, BLOCK_K)
    block = tl.program_id(0) % blocks  # first blocks first: the most queries see them
    kv_head = tl.program_id(0) // blocks % G
    row = tl.program_id(0) // (blocks * G)
    wide = row.to(tl.int64)
    cos_ptr += wide // B * cos_stride
    sin_ptr += wide // B * sin_stride
    k_at = wide * T * C + (H + kv_head) * K
    v_at = k_at + G * K

    k_time = block * BLOCK_K + tl.arange(0, BLOCK_K)
    k1, k2, _scale = load_rotated(qkv_ptr + k_at, cos_ptr, sin_ptr, k_time, eps, T, K, C, HALF, QK_NORM)
    k = _joined(k1, k2)
    v = load_rows(qkv_ptr + v_at, k_time, T, K, C, P)
    dk = tl.zeros([BLOCK_K, P], tl.float32)
    dv = tl.zeros([BLOCK_K, P], tl.float32)
    # Queries on the diagonal end with the first whole block of queries behind this block of keys.
    first = block * BLOCK_K // BLOCK_Q * BLOCK_Q
    later = min(T, tl.cdiv((block + 1) * BLOCK_K, BLOCK_Q) * BLOCK_Q)
    whole, stop = T, T
    if WINDOW < T:  # from `whole` on some queries are too late for the first key, from `stop` on all for the last
        whole = max(later, min(T, (block * BLOCK_K + WINDOW + 1) // BLOCK_Q * BLOCK_Q))
        stop = min(T, (block + 1) * BLOCK_K + WINDOW)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        vectors_at = (wide * H + head) * T
        dk, dv = _keys_loop(
            k, v, dk, dv, q_ptr, do_ptr, logsumexp_ptr + vectors_at, delta_ptr + vectors_at, row, head, k_time,
            first, later, T, SCALE, WINDOW, BLOCK_Q, P, True, PRECISION,
        )  # fmt: skip
        dk, dv = _keys_loop(
            k, v, dk, dv, q_ptr, do_ptr, logsumexp_ptr + vectors_at, delta_ptr + vectors_at, row, head, k_time,
            later, whole, T, SCALE, WINDOW, BLOCK_Q, P, False, PRECISION,
        )  # fmt: skip
        if WINDOW < T:
            dk, dv = _keys_loop(
                k, v, dk, dv, q_ptr, do_ptr, logsumexp_ptr + vectors_at, delta_ptr + vectors_at, row, head, k_time,
                whole, stop, T, SCALE, WINDOW, BLOCK_Q, P, True, PRECISION,
            )  # fmt: skip
    store_rows(dv, dqkv_ptr + v_at, k_time, T, K, C, P)
    dk1, dk2 = _halves(dk * SCALE)
    k1, k2, k_scale = load_rotated(qkv_ptr + k_at, cos_ptr, sin_ptr, k_time, eps, T, K, C, HALF, QK_NORM)
    store_unrotated(dk1, dk2, k1, k2, k_scale, dqkv_ptr + k_at, cos_ptr, sin_ptr, k_time, T, K, C, HALF, QK_NORM)
