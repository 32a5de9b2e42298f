"""Tiles of a fused qkv projection, and rotary embedding with QK norm on the way in and out.

T time, K head dim, HALF and FULL: half of it and all of it, padded to powers of two; ROW: elements between times.

The halves that rotary pairs are separate tiles, so that it needs no shuffle.
"""

import triton
import triton.language as tl


@triton.jit
def load_rotated(x_ptr, cos_ptr, sin_ptr, time, eps, T, K, ROW, HALF: tl.constexpr, QK_NORM: tl.constexpr):
    """Both halves of q or k [times, HALF] after rotary and norm, in the dtype of x, and the norm's 1 / rms."""
    half = tl.arange(0, HALF)
    inside = (time < T)[:, None] & (half < K // 2)[None, :]
    x_at = x_ptr + time[:, None] * ROW + half[None, :]
    table_at = time[:, None] * (K // 2) + half[None, :]
    x1 = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(x_at + K // 2, mask=inside, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + table_at, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + table_at, mask=inside, other=0.0)
    y1 = x1 * cos - x2 * sin
    y2 = x2 * cos + x1 * sin
    scale = tl.full([time.shape[0]], 1.0, tl.float32)
    if QK_NORM:
        scale = 1.0 / tl.sqrt(tl.sum(y1 * y1 + y2 * y2, 1) / K + eps)
        y1 *= scale[:, None]
        y2 *= scale[:, None]
    return y1.to(x_ptr.dtype.element_ty), y2.to(x_ptr.dtype.element_ty), scale


@triton.jit
def store_unrotated(
    dy1, dy2, y1, y2, scale, dx_ptr, cos_ptr, sin_ptr, time, T, K, ROW, HALF: tl.constexpr, QK_NORM: tl.constexpr
):
    """Take the gradient of `load_rotated`'s halves back through norm and rotary, and store it."""
    if QK_NORM:
        along = (tl.sum(dy1 * y1.to(tl.float32) + dy2 * y2.to(tl.float32), 1) / K)[:, None]
        dy1 = scale[:, None] * (dy1 - y1.to(tl.float32) * along)
        dy2 = scale[:, None] * (dy2 - y2.to(tl.float32) * along)
    half = tl.arange(0, HALF)
    inside = (time < T)[:, None] & (half < K // 2)[None, :]
    table_at = time[:, None] * (K // 2) + half[None, :]
    cos = tl.load(cos_ptr + table_at, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + table_at, mask=inside, other=0.0)
    dx_at = dx_ptr + time[:, None] * ROW + half[None, :]
    tl.store(dx_at, dy1 * cos + dy2 * sin, mask=inside)
    tl.store(dx_at + K // 2, dy2 * cos - dy1 * sin, mask=inside)


@triton.jit
def visible(k_time, q_time, T: tl.constexpr, WINDOW: tl.constexpr):
    """Which keys a query sees: those up to itself, not more than WINDOW before it (T: all)."""
    seen = k_time <= q_time
    if WINDOW < T:
        seen = seen & (q_time - k_time <= WINDOW)
    return seen


@triton.jit
def load_rows(x_ptr, time, T, K, ROW, FULL):
    column = tl.arange(0, FULL)
    inside = (time < T)[:, None] & (column < K)[None, :]
    return tl.load(x_ptr + time[:, None] * ROW + column[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(x, x_ptr, time, T, K, ROW, FULL):
    column = tl.arange(0, FULL)
    inside = (time < T)[:, None] & (column < K)[None, :]
    tl.store(x_ptr + time[:, None] * ROW + column[None, :], x, mask=inside)
