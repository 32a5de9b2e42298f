"""The products of a stack of matrices with their own transposes: half of the tiles, each stored twice.

Dimensions: K matrix of the stack, M side of the product, N what is summed over.

Tiles on and below the diagonal are computed; one below it is stored transposed above it too. Tiles follow from one
matrix's shape and dtype, so products are batch-invariant.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.matmul import DTYPES, INTERPRETED, aligned, described, load_operand, load_tile, store_tile
from kernels.stacking import dense_replicas, dot_precision
from kernels.tiles import Tile

SQUARE = Tile(128, 128, 64, 8, 4, residents=1)
SMALL = Tile(64, 64, 32, 4, 3)  # fp32, and sides below a whole tile


@triton.jit
def _piece(
    product, c_ptr, mirror_ptr, extra_ptr, diagonal, matrix, row, column, m, alpha, beta,
    c_K, c_row, extra_K, extra_row,
    BLOCK: tl.constexpr, HALF: tl.constexpr, ADD: tl.constexpr, DTYPE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Finish half of a tile's columns, and store them, and their transpose on the other side of the diagonal."""
    if ADD:
        addend = load_tile(extra_ptr, matrix, row, column, m, m, extra_K, extra_row, BLOCK, HALF, TMA)
        product = alpha * product + beta * addend.to(tl.float32)
    piece = product.to(DTYPE)
    store_tile(c_ptr, piece, matrix, row, column, m, m, c_K, c_row, BLOCK, HALF, TMA)
    # a tile on the diagonal has no other side: it is sent below the last row, where nothing is stored. No branch,
    # which would keep the loop over tiles from being flattened.
    across = tl.where(diagonal, m, column)
    store_tile(mirror_ptr, piece.T, matrix, across, row, m, m, c_K, c_row, HALF, BLOCK, TMA)


@triton.jit
def _symmetric_tile(
    tile, a_ptr, c_ptr, mirror_ptr, extra_ptr, m, n, alpha, beta, a_K, a_row, c_K, c_row, extra_K, extra_row,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, TALL: tl.constexpr, ADD: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr, TMA_STORE: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = BLOCK // 2
    side = tl.cdiv(m, BLOCK)
    in_matrix = side * (side + 1) // 2
    matrix = tile // in_matrix
    tile = tile % in_matrix
    # the tile's row r is the last one with r (r + 1) / 2 <= tile; the root may be off by a rounding
    r = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) * 0.5).to(tl.int32)
    r = tl.where((r + 1) * (r + 2) // 2 <= tile, r + 1, r)
    r = tl.where(r * (r + 1) // 2 > tile, r - 1, r)
    row = r * BLOCK
    column = (tile - r * (r + 1) // 2) * BLOCK
    product = tl.zeros((BLOCK, BLOCK), tl.float32)
    for step in range(0, tl.cdiv(n, BLOCK_N)):
        at = step * BLOCK_N
        left = load_operand(a_ptr, matrix, row, at, m, n, a_K, a_row, BLOCK, BLOCK_N, TALL, TMA, WIDEN)
        right = load_operand(a_ptr, matrix, at, column, n, m, a_K, a_row, BLOCK_N, BLOCK, not TALL, TMA, WIDEN)
        product = tl.dot(left, right, product, input_precision=PRECISION)
    first, second = product.reshape(BLOCK, 2, HALF).permute(0, 2, 1).split()
    diagonal = row == column
    _piece(
        first, c_ptr, mirror_ptr, extra_ptr, diagonal, matrix, row, column, m, alpha, beta,
        c_K, c_row, extra_K, extra_row, BLOCK, HALF, ADD, DTYPE, TMA_STORE,
    )  # fmt: skip
    _piece(
        second, c_ptr, mirror_ptr, extra_ptr, diagonal, matrix, row, column + HALF, m, alpha, beta,
        c_K, c_row, extra_K, extra_row, BLOCK, HALF, ADD, DTYPE, TMA_STORE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tiles"])
def _symmetric_kernel(
    a_ptr, c_ptr, mirror_ptr, extra_ptr, tiles, m, n, alpha, beta, a_K, a_row, c_K, c_row, extra_K, extra_row,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, TALL: tl.constexpr, ADD: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr, TMA_STORE: tl.constexpr, WIDEN: tl.constexpr,
    PERSISTENT: tl.constexpr,
):  # fmt: skip
    if PERSISTENT:
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            _symmetric_tile(
                tile, a_ptr, c_ptr, mirror_ptr, extra_ptr, m, n, alpha, beta, a_K, a_row, c_K, c_row,
                extra_K, extra_row, BLOCK, BLOCK_N, TALL, ADD, DTYPE, PRECISION, TMA, TMA_STORE, WIDEN,
            )  # fmt: skip
    else:
        _symmetric_tile(
            tl.program_id(0), a_ptr, c_ptr, mirror_ptr, extra_ptr, m, n, alpha, beta, a_K, a_row, c_K, c_row,
            extra_K, extra_row, BLOCK, BLOCK_N, TALL, ADD, DTYPE, PRECISION, TMA, TMA_STORE, WIDEN,
        )  # fmt: skip


def symmetric_product(
    a: Tensor,
    tall: bool = False,
    extra: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    tile: Tile | None = None,
) -> Tensor:
    """c [K, M, M] = alpha a a^T + beta extra, for every matrix of a stack, bf16 or fp32.

    a: [K, M, N], or [K, N, M] of which a^T a is made where `tall`. extra: [K, M, M], symmetric, or None, which leaves
    alpha out. c is symmetric bit for bit.
    """
    matrices = a.shape[0]
    m, n = (a.shape[2], a.shape[1]) if tall else (a.shape[1], a.shape[2])
    c = torch.empty((matrices, m, m), dtype=a.dtype, device=a.device)
    if tile is None:
        tile = SQUARE if a.dtype == torch.bfloat16 and m > 64 else SMALL
    tma = a.dtype == torch.bfloat16 and a.shape[2] % 8 == 0
    tma_store = tma and m % 8 == 0
    a = aligned(a) if tma else dense_replicas(a)
    if extra is not None:
        extra = aligned(extra) if tma_store else dense_replicas(extra)
    other = c if extra is None else extra
    block, half = tile.block_m, tile.block_m // 2
    side = triton.cdiv(m, block)
    tiles = matrices * side * (side + 1) // 2
    programs = tiles
    if tile.residents:
        processors = 4 if INTERPRETED else torch.cuda.get_device_properties(a.device).multi_processor_count
        programs = min(tiles, processors * tile.residents)
    _symmetric_kernel[(programs,)](
        described(a, (tile.block_k, block) if tall else (block, tile.block_k)) if tma else a,
        described(c, (block, half)) if tma_store else c,
        described(c, (half, block)) if tma_store else c,
        described(other, (block, half)) if tma_store else other,
        tiles, m, n, alpha, beta,
        a.stride(0), a.stride(1), c.stride(0), c.stride(1), other.stride(0), other.stride(1),
        BLOCK=block, BLOCK_N=tile.block_k, TALL=tall, ADD=extra is not None, DTYPE=DTYPES[a.dtype],
        PRECISION=dot_precision(), TMA=tma, TMA_STORE=tma_store, WIDEN=INTERPRETED, PERSISTENT=tile.residents > 0,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return c
