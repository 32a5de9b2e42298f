"""One matrix product of a stack of replicas, with what its epilogue may add.

Dimensions: R replica; M, N, K the sides of a matrix product c [M, N] = a [M, K] b [K, N].

One kernel computes every product, forward and backward, with the replica as the outermost part of
its grid. The order of every sum follows from one replica's shape and dtype (kernels/tiles.py), never
from R: tiles of the last wave may be taken by halves, which changes who adds, not in what order.
Transposed operands are read through their strides. On bf16 whose rows are whole 16-byte units the
tensor-map engine (TMA) moves the tiles, which also keeps reads inside one replica: what the kernels
name a_ptr, b_ptr, c_ptr, extra_ptr is then a tensor descriptor.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.stacking import dense_replicas, dot_precision
from kernels.tiles import Tile, tile_for

# The interpreter multiplies bf16 wrongly, so there the tiles are widened first.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.jit
def load_tile(
    source_ptr, replica, row, column, rows, columns, stride_R, stride_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """A tile [ROWS, COLUMNS] of one replica's matrix [rows, columns] from (row, column) on, zero outside of it."""
    if TMA:
        return source_ptr.load([replica, row, column]).reshape(ROWS, COLUMNS)
    else:
        i = tl.arange(0, ROWS)
        j = tl.arange(0, COLUMNS)
        corner = source_ptr + replica.to(tl.int64) * stride_R + row.to(tl.int64) * stride_row + column
        inside = (row + i < rows)[:, None] & (column + j < columns)[None, :]
        return tl.load(corner + i[:, None] * stride_row + j[None, :], mask=inside, other=0.0)


@triton.jit
def store_tile(
    target_ptr, tile, replica, row, column, rows, columns, stride_R, stride_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Store what `load_tile` loads; nothing outside of the matrix."""
    if TMA:
        target_ptr.store([replica, row, column], tile.reshape(1, ROWS, COLUMNS))
    else:
        i = tl.arange(0, ROWS)
        j = tl.arange(0, COLUMNS)
        corner = target_ptr + replica.to(tl.int64) * stride_R + row.to(tl.int64) * stride_row + column
        inside = (row + i < rows)[:, None] & (column + j < columns)[None, :]
        tl.store(corner + i[:, None] * stride_row + j[None, :], tile, mask=inside)


@triton.jit
def load_operand(
    source_ptr, replica, row, column, rows, columns, stride_R, stride_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    TRANSPOSED: tl.constexpr, TMA: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """A tile of an operand as the product reads it; TRANSPOSED: memory holds the transpose."""
    if TRANSPOSED:
        tile = load_tile(source_ptr, replica, column, row, columns, rows, stride_R, stride_row, COLUMNS, ROWS, TMA).T
    else:
        tile = load_tile(source_ptr, replica, row, column, rows, columns, stride_R, stride_row, ROWS, COLUMNS, TMA)
    return tile.to(tl.float32) if WIDEN else tile


@triton.jit
def _finish(
    product, c_ptr, extra_ptr, scale, replica, row, column, m, n, alpha, beta,
    c_R, c_row, extra_R, extra_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    EPILOGUE: tl.constexpr, SCALED: tl.constexpr, DTYPE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    if SCALED:
        product *= scale
    if EPILOGUE == "add":
        addend = load_tile(
            extra_ptr, replica, row, column, m, n, extra_R, extra_row, ROWS, COLUMNS, TMA
        ).to(tl.float32)  # fmt: skip
        product = alpha * product + beta * addend
    if EPILOGUE == "relu2":
        hidden = product.to(DTYPE).to(tl.float32)
        hidden = tl.where(hidden < 0, 0.0, hidden)  # keeps NaN
        product = hidden * hidden
    if EPILOGUE == "relu2_backward":
        squared = load_tile(
            extra_ptr, replica, row, column, m, n, extra_R, extra_row, ROWS, COLUMNS, TMA
        ).to(tl.float32)  # fmt: skip
        product = product.to(DTYPE).to(tl.float32) * (2 * tl.sqrt(squared))
    store_tile(c_ptr, product.to(DTYPE), replica, row, column, m, n, c_R, c_row, ROWS, COLUMNS, TMA)


@triton.jit
def _place(tile, m, n, BLOCK_M: tl.constexpr, COLUMNS: tl.constexpr, GROUP_M: tl.constexpr):
    """Replica, first row and first column of a tile."""
    tiles_m = tl.cdiv(m, BLOCK_M)
    tiles_n = tl.cdiv(n, COLUMNS)
    replica = tile // (tiles_m * tiles_n)
    tile = tile % (tiles_m * tiles_n)
    group = tile // (GROUP_M * tiles_n)
    group_rows = min(tiles_m - group * GROUP_M, GROUP_M)
    in_group = tile % (GROUP_M * tiles_n)
    row = (group * GROUP_M + in_group % group_rows) * BLOCK_M
    return replica, row, (in_group // group_rows) * COLUMNS


@triton.jit
def _tile(
    tile, a_ptr, b_ptr, b_half_ptr, c_ptr, extra_ptr, scale_ptr, m, n, k, alpha, beta,
    a_R, a_row, b_R, b_row, c_R, c_row, extra_R, extra_row,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    WIDE: tl.constexpr, FORM: tl.constexpr, EPILOGUE: tl.constexpr, SCALED: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr, TMA_STORE: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = BLOCK_N // 2
    replica, row, column = _place(tile, m, n, BLOCK_M, BLOCK_N + HALF if WIDE else BLOCK_N, GROUP_M)
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    third = tl.zeros((BLOCK_M, HALF), tl.float32)
    for step in range(0, tl.cdiv(k, BLOCK_K)):
        at = step * BLOCK_K
        a_tile = load_operand(a_ptr, replica, row, at, m, k, a_R, a_row, BLOCK_M, BLOCK_K, FORM == "tn", TMA, WIDEN)
        b_tile = load_operand(b_ptr, replica, at, column, k, n, b_R, b_row, BLOCK_K, BLOCK_N, FORM == "nt", TMA, WIDEN)
        product = tl.dot(a_tile, b_tile, product, input_precision=PRECISION)
        if WIDE:
            b_tile = load_operand(
                b_half_ptr, replica, at, column + BLOCK_N, k, n, b_R, b_row, BLOCK_K, HALF, FORM == "nt", TMA, WIDEN
            )  # fmt: skip
            third = tl.dot(a_tile, b_tile, third, input_precision=PRECISION)

    scale = tl.load(scale_ptr + replica) if SCALED else 1.0
    first, second = product.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1).split()
    _finish(
        first, c_ptr, extra_ptr, scale, replica, row, column, m, n, alpha, beta,
        c_R, c_row, extra_R, extra_row, BLOCK_M, HALF, EPILOGUE, SCALED, DTYPE, TMA_STORE,
    )  # fmt: skip
    _finish(
        second, c_ptr, extra_ptr, scale, replica, row, column + HALF, m, n, alpha, beta,
        c_R, c_row, extra_R, extra_row, BLOCK_M, HALF, EPILOGUE, SCALED, DTYPE, TMA_STORE,
    )  # fmt: skip
    if WIDE:
        _finish(
            third, c_ptr, extra_ptr, scale, replica, row, column + BLOCK_N, m, n, alpha, beta,
            c_R, c_row, extra_R, extra_row, BLOCK_M, HALF, EPILOGUE, SCALED, DTYPE, TMA_STORE,
        )  # fmt: skip


@triton.jit
def _half_tile(
    tile, right, a_ptr, b_half_ptr, c_ptr, extra_ptr, scale_ptr, m, n, k, alpha, beta,
    a_R, a_row, b_R, b_row, c_R, c_row, extra_R, extra_row,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    FORM: tl.constexpr, EPILOGUE: tl.constexpr, SCALED: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr, TMA_STORE: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """The left (right = 0) or right (right = 1) half of `_tile`'s columns, with the same bits."""
    HALF: tl.constexpr = BLOCK_N // 2
    replica, row, column = _place(tile, m, n, BLOCK_M, BLOCK_N, GROUP_M)
    column += right * HALF
    product = tl.zeros((BLOCK_M, HALF), tl.float32)
    for step in range(0, tl.cdiv(k, BLOCK_K)):
        at = step * BLOCK_K
        a_tile = load_operand(a_ptr, replica, row, at, m, k, a_R, a_row, BLOCK_M, BLOCK_K, FORM == "tn", TMA, WIDEN)
        b_tile = load_operand(
            b_half_ptr, replica, at, column, k, n, b_R, b_row, BLOCK_K, HALF, FORM == "nt", TMA, WIDEN
        )
        product = tl.dot(a_tile, b_tile, product, input_precision=PRECISION)
    scale = tl.load(scale_ptr + replica) if SCALED else 1.0
    _finish(
        product, c_ptr, extra_ptr, scale, replica, row, column, m, n, alpha, beta,
        c_R, c_row, extra_R, extra_row, BLOCK_M, HALF, EPILOGUE, SCALED, DTYPE, TMA_STORE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["whole", "halves"])  # with and without halves one compiled kernel each for any R
def _stacked_matmul_kernel(
    a_ptr, b_ptr, b_half_ptr, c_ptr, extra_ptr, scale_ptr, whole, halves, m, n, k, alpha, beta,
    a_R, a_row, b_R, b_row, c_R, c_row, extra_R, extra_row,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    WIDE: tl.constexpr, FORM: tl.constexpr, EPILOGUE: tl.constexpr, SCALED: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr, TMA_STORE: tl.constexpr,
    WIDEN: tl.constexpr, PERSISTENT: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """The first `whole` tiles, and as `halves` half tiles those behind them (HALVES: there are some)."""
    if PERSISTENT:
        # Flattened, the next tile's loads begin during this one's end. With the two products of a
        # wide tile the flattened loop would make the tensor cores wait for each instruction.
        for tile in tl.range(tl.program_id(0), whole, tl.num_programs(0), flatten=not WIDE):
            _tile(
                tile, a_ptr, b_ptr, b_half_ptr, c_ptr, extra_ptr, scale_ptr, m, n, k, alpha, beta,
                a_R, a_row, b_R, b_row, c_R, c_row, extra_R, extra_row,
                BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, WIDE, FORM, EPILOGUE, SCALED,
                DTYPE, PRECISION, TMA, TMA_STORE, WIDEN,
            )  # fmt: skip
        if HALVES:
            for half in tl.range(tl.program_id(0), halves, tl.num_programs(0), flatten=True):
                _half_tile(
                    whole + half // 2, half % 2, a_ptr, b_half_ptr, c_ptr, extra_ptr, scale_ptr, m, n, k, alpha, beta,
                    a_R, a_row, b_R, b_row, c_R, c_row, extra_R, extra_row,
                    BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, FORM, EPILOGUE, SCALED,
                    DTYPE, PRECISION, TMA, TMA_STORE, WIDEN,
                )  # fmt: skip
    else:
        _tile(
            tl.program_id(0), a_ptr, b_ptr, b_half_ptr, c_ptr, extra_ptr, scale_ptr, m, n, k, alpha, beta,
            a_R, a_row, b_R, b_row, c_R, c_row, extra_R, extra_row,
            BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, WIDE, FORM, EPILOGUE, SCALED,
            DTYPE, PRECISION, TMA, TMA_STORE, WIDEN,
        )  # fmt: skip


def _programs(tiles: int, tile: Tile, device: torch.device) -> tuple[int, int, int]:
    """Programs, tiles they take whole, and half tiles: the last wave is halved where that makes it half as long."""
    if not tile.residents:
        return tiles, tiles, 0
    processors = 4 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count
    places = processors * tile.residents
    rest = tiles % places
    halves = 2 * rest if 2 * rest <= places and not tile.wide else 0
    return (places if tiles >= places else max(rest, halves)), tiles - halves // 2, halves


def stacked_matmul(
    a: Tensor,
    b: Tensor,
    form: str,
    epilogue: str = "none",
    extra: Tensor | None = None,
    scale_R: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    tile: Tile | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """c [R, M, N] = epilogue(a b), bf16 or fp32, for every replica; `form` says how a and b are stored.

    "nt": a [R, M, K], b [R, N, K]; "nn": a [R, M, K], b [R, K, N]; "tn": a [R, K, M], b [R, K, N].
    Epilogues on the fp32 product p, first multiplied by scale_R [R] where given: "add" is
    alpha p + beta extra; "relu2" is relu(p)^2; "relu2_backward" is 2 p sqrt(extra), with extra
    [R, M, N] the result of "relu2". Replicas must be contiguous, their stride is free.
    """
    m, k = (a.shape[2], a.shape[1]) if form == "tn" else (a.shape[1], a.shape[2])
    n, b_k = (b.shape[1], b.shape[2]) if form == "nt" else (b.shape[2], b.shape[1])
    if a.dtype not in DTYPES or b.dtype != a.dtype:
        raise ValueError(
            f"got operands of {a.dtype} and {b.dtype}, expected both bfloat16 or both float32: "
            "cast them to one compute dtype"
        )
    if a.shape[0] != b.shape[0] or k != b_k:
        raise ValueError(
            f"got operands {tuple(a.shape)} and {tuple(b.shape)} in form {form!r}, expected equal "
            "replicas and inner width: check the layer's input width"
        )
    c = torch.empty((a.shape[0], m, n), dtype=a.dtype, device=a.device) if out is None else out
    if c.numel() == 0:
        return c
    precision = dot_precision()
    if tile is None:
        tile = tile_for(form, m, n, k, a.dtype, precision)
        if extra is not None:  # its tiles take shared memory too
            tile = tile._replace(stages=max(2, tile.stages - 1))
    # Decided by one replica's shape: a stack that is not aligned for TMA is copied, not rerouted.
    rows_whole = a.shape[2] % 8 == 0 and b.shape[2] % 8 == 0
    tma = a.dtype == torch.bfloat16 and rows_whole
    tma_store = tma and n % 8 == 0
    a, b = (aligned(operand) if tma else dense_replicas(operand) for operand in (a, b))
    if scale_R is not None:  # the gradient of a sum over replicas is one number seen R times
        scale_R = scale_R.contiguous()
    block_a = (tile.block_k, tile.block_m) if form == "tn" else (tile.block_m, tile.block_k)
    block_b = (tile.block_n, tile.block_k) if form == "nt" else (tile.block_k, tile.block_n)
    half_b = (tile.block_n // 2, tile.block_k) if form == "nt" else (tile.block_k, tile.block_n // 2)
    block_c = (tile.block_m, tile.block_n // 2)
    if extra is not None:
        extra = aligned(extra) if tma_store else dense_replicas(extra)
    tiles = c.shape[0] * triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.columns)
    programs, whole, halves = _programs(tiles, tile, a.device)
    other = c if extra is None else extra
    _stacked_matmul_kernel[(programs,)](
        described(a, block_a) if tma else a,
        described(b, block_b) if tma else b,
        described(b, half_b) if tma else b,
        described(c, block_c) if tma_store else c,
        described(other, block_c) if tma_store else other,
        scale_R,
        whole, halves, m, n, k, alpha, beta,
        a.stride(0), a.stride(1), b.stride(0), b.stride(1),
        c.stride(0), c.stride(1), other.stride(0), other.stride(1),
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP_M=tile.group_m,
        WIDE=tile.wide, FORM=form, EPILOGUE=epilogue, SCALED=scale_R is not None,
        DTYPE=DTYPES[a.dtype], PRECISION=precision, TMA=tma, TMA_STORE=tma_store,
        WIDEN=INTERPRETED, PERSISTENT=tile.residents > 0, HALVES=halves > 0,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return c


def aligned(operand: Tensor) -> Tensor:
    """The operand as the tensor-map engine takes it: 16-byte aligned base and replica stride."""
    operand = dense_replicas(operand)
    whole = operand.data_ptr() % 16 == 0 and operand.stride(0) % 8 == 0 and operand.stride(0) > 0
    return operand if whole else operand.clone(memory_format=torch.contiguous_format)


def described(operand: Tensor, block: tuple[int, int]) -> TensorDescriptor:
    """Tiles of `block` of an operand [R, rows, columns], for the tensor-map engine."""
    return TensorDescriptor(operand, list(operand.shape), list(operand.stride()), [1, block[0], block[1]])
