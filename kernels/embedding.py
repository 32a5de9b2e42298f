"""Token embedding with a backward that adds each token's gradients in token order.

R replica, B batch, T time, N tokens of one replica (B T), V vocabulary, D width.

The backward sorts a replica's N tokens by (id, position), which needs no sort: a token's place is
the number of tokens before it in that order, counted by comparing all pairs. The program at the
first place of an id then adds that id's gradients one after the other, in float32, and writes the
row once: no atomics, and an order that depends on the replica's tokens alone.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.stacking import custom_operator, dense_replicas, fold_vmap

MAX_WIDTH = 16384


def embedding(tokens_BT: Tensor, weight_VD: Tensor) -> Tensor:
    """Rows of `weight_VD` at `tokens_BT`.

    tokens_BT: int64 or int32 [B, T], each in [0, V); weight_VD: [V, D]. Returns [B, T, D]. A token
    outside the vocabulary raises IndexError on the CPU and gives a row of NaN on a GPU, where
    nothing waits for the host. On a GPU D <= 16384, ValueError otherwise.
    """
    if weight_VD.device.type == "cpu":
        return embedding_reference(tokens_BT, weight_VD)
    return embedding_triton(tokens_BT, weight_VD)


def embedding_triton(tokens_BT: Tensor, weight_VD: Tensor) -> Tensor:
    """`embedding` on the Triton kernels whatever the device."""
    if weight_VD.shape[-1] > MAX_WIDTH:
        raise ValueError(
            f"embedding got width {weight_VD.shape[-1]}, expected at most {MAX_WIDTH}: use a narrower network"
        )
    return embedding_op(tokens_BT[None], weight_VD[None]).squeeze(0)


def embedding_reference(tokens_BT: Tensor, weight_VD: Tensor) -> Tensor:
    """`embedding` in plain differentiable torch."""
    return F.embedding(tokens_BT, weight_VD)


@fold_vmap
@custom_operator("fractal::embedding")
def embedding_op(tokens_RBT: Tensor, weight_RVD: Tensor) -> Tensor:
    """`embedding` of R replicas, y [R, B, T, D]."""
    R, V, D = weight_RVD.shape
    tokens_RBT, weight_RVD = dense_replicas(tokens_RBT), dense_replicas(weight_RVD)
    y_RBTD = weight_RVD.new_empty(*tokens_RBT.shape, D)
    N = tokens_RBT[0].numel()
    tiles = _tiles(D)
    _gather_kernel[(R * triton.cdiv(N, tiles["ROWS"]),)](
        tokens_RBT, weight_RVD, y_RBTD, tokens_RBT.stride(0), weight_RVD.stride(0), N=N, V=V, D=D, **tiles
    )
    return y_RBTD


@embedding_op.register_fake
def _(tokens_RBT, weight_RVD):
    return weight_RVD.new_empty(*tokens_RBT.shape, weight_RVD.shape[-1])


@custom_operator("fractal::embedding_backward")
def embedding_backward_op(dy_RBTD: Tensor, tokens_RBT: Tensor, vocabulary: int) -> Tensor:
    """The gradient of the weight [R, V, D]."""
    R, _, _, D = dy_RBTD.shape
    tokens_RBT = dense_replicas(tokens_RBT)
    N = tokens_RBT[0].numel()
    order_RN = torch.empty(R, N, dtype=torch.int32, device=dy_RBTD.device)
    count_RN = torch.empty_like(order_RN)
    rows = 32
    _order_kernel[(R * triton.cdiv(N, rows),)](
        tokens_RBT, order_RN, count_RN, tokens_RBT.stride(0), N=N, V=vocabulary, ROWS=rows, COLUMNS=128, num_warps=8
    )
    dweight_RVD = dy_RBTD.new_zeros(R, vocabulary, D)
    _add_rows_kernel[(R * N,)](
        dy_RBTD.contiguous(),
        tokens_RBT,
        order_RN,
        count_RN,
        dweight_RVD,
        tokens_RBT.stride(0),
        N=N,
        V=vocabulary,
        D=D,
        WIDTH=triton.next_power_of_2(D),
        num_warps=1 if D <= 512 else 4,
    )
    return dweight_RVD


@embedding_backward_op.register_fake
def _(dy_RBTD, tokens_RBT, vocabulary):
    return dy_RBTD.new_empty(dy_RBTD.shape[0], vocabulary, dy_RBTD.shape[-1])


def _embedding_save(ctx, inputs, output):
    tokens_RBT, weight_RVD = inputs
    ctx.vocabulary = weight_RVD.shape[1]
    ctx.save_for_backward(tokens_RBT)


def _embedding_backward(ctx, dy_RBTD):
    return None, embedding_backward_op(dy_RBTD, *ctx.saved_tensors, ctx.vocabulary)


embedding_op.register_autograd(_embedding_backward, setup_context=_embedding_save)


def _tiles(D):
    width = triton.next_power_of_2(D)
    return {"ROWS": max(1, 2048 // width), "WIDTH": width, "num_warps": 4}


@triton.jit
def _gather_kernel(
    tokens_ptr,
    weight_ptr,
    y_ptr,
    tokens_stride,
    weight_stride,
    N: tl.constexpr,
    V: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    blocks: tl.constexpr = (N + ROWS - 1) // ROWS
    replica = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    token = tl.load(tokens_ptr + replica * tokens_stride + row, mask=row < N, other=-1).to(tl.int64)
    known = ((token >= 0) & (token < V))[:, None] & (column < D)[None, :]
    weight_at = replica * weight_stride + token[:, None] * D + column[None, :]
    y = tl.load(weight_ptr + weight_at, mask=known, other=float("nan"))
    y_at = (replica * N + row)[:, None] * D + column[None, :]
    tl.store(y_ptr + y_at, y, mask=(row < N)[:, None] & (column < D)[None, :])


@triton.jit
def _known(token, V):
    """A token as int32, -1 outside the vocabulary."""
    return tl.where((token >= 0) & (token < V), token, -1).to(tl.int32)


@triton.jit
def _order_kernel(
    tokens_ptr,
    order_ptr,
    count_ptr,
    tokens_stride,
    N: tl.constexpr,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """order[place] = the position of the token at this place; count[place] = how many share its id, at
    the first place of a known id, else 0."""
    blocks: tl.constexpr = (N + ROWS - 1) // ROWS
    replica = (tl.program_id(0) // blocks).to(tl.int64)
    tokens_ptr += replica * tokens_stride
    position = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    token = _known(tl.load(tokens_ptr + position, mask=position < N, other=-1), V)
    place_UC = tl.zeros([ROWS, COLUMNS], tl.int32)
    earlier_UC = tl.zeros([ROWS, COLUMNS], tl.int32)
    same_UC = tl.zeros([ROWS, COLUMNS], tl.int32)
    for start in range(0, N, COLUMNS):
        other_position = start + tl.arange(0, COLUMNS)
        inside = (other_position < N)[None, :]
        other = _known(tl.load(tokens_ptr + other_position, mask=other_position < N, other=-1), V)
        equal = (other[None, :] == token[:, None]) & inside
        place_UC += ((other[None, :] < token[:, None]) & inside).to(tl.int32)
        earlier_UC += (equal & (other_position[None, :] < position[:, None])).to(tl.int32)
        same_UC += equal.to(tl.int32)
    place, earlier, same = tl.sum(place_UC, 1), tl.sum(earlier_UC, 1), tl.sum(same_UC, 1)
    place += earlier
    tl.store(order_ptr + replica * N + place, position, mask=position < N)
    first = (earlier == 0) & (token >= 0)
    tl.store(count_ptr + replica * N + place, tl.where(first, same, 0), mask=position < N)


@triton.jit
def _add_rows_kernel(
    dy_ptr,
    tokens_ptr,
    order_ptr,
    count_ptr,
    dweight_ptr,
    tokens_stride,
    N: tl.constexpr,
    V: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Program (replica, place): at the first place of an id, the sum of its gradients in token order."""
    replica = (tl.program_id(0) // N).to(tl.int64)
    place = tl.program_id(0) % N
    order_ptr += replica * N + place
    count = tl.load(count_ptr + replica * N + place)
    if count > 0:
        token = tl.load(tokens_ptr + replica * tokens_stride + tl.load(order_ptr)).to(tl.int64)
        column = tl.arange(0, WIDTH)
        total = tl.zeros([WIDTH], tl.float32)
        for occurrence in range(count):
            position = tl.load(order_ptr + occurrence)
            dy_at = (replica * N + position) * D + column
            total += tl.load(dy_ptr + dy_at, mask=column < D, other=0.0).to(tl.float32)
        tl.store(dweight_ptr + (replica * V + token) * D + column, total, mask=column < D)
