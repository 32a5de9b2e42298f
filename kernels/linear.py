"""Linear layers of a stack of replicas: references, one stacked matrix product, its operators.

Dimensions: R replica, N tokens (every leading dimension flattened), I input width, O output width,
F MLP width, D model width; M, N, K the sides of a matrix product c [M, N] = a [M, K] b [K, N].

One kernel computes every product, forward and backward, with the replica as the outermost part of
its grid. The order of every sum follows from one replica's shape and dtype (kernels/tiles.py), never
from R: tiles of the last wave may be taken by halves, which changes who adds, not in what order.
Transposed operands are read through their strides. On bf16 whose rows are whole 16-byte units the
tensor-map engine (TMA) moves the tiles, which also keeps reads inside one replica.
"""

import os

import torch
import torch.nn.functional as functional
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.norm import check_norm, rms_norm_op, rms_norm_reference, sum_and_norm_backward
from kernels.stacking import custom_operator, dense_replicas, fold_vmap
from kernels.tiles import Tile, tile_for

# The interpreter multiplies bf16 wrongly, so there the tiles are widened first.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


# ---- one replica ---------------------------------------------------------------------------------


def linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    """x W^T: x [..., I], weight_OI -> [..., O], all bf16 or all fp32.

    Accumulates in fp32. fp32 operands follow `torch.get_float32_matmul_precision`: "highest" is
    IEEE fp32, anything else tf32. Raises ValueError on other dtypes and on widths that differ.
    """
    form = linear_reference if x.device.type == "cpu" else linear_triton
    return form(x, weight_OI)


def linear_add_norm(
    x: Tensor, weight_OI: Tensor, residual: Tensor, norm_O: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """(rms_norm(y), y) of y = residual + x W^T: the residual stream is updated, and read by its next user.

    residual [..., O]; norm_O and eps as in `rms_norm`; the rest as `linear`. The sum is made in the
    product's kernel and rounded once; backward, the two gradients of y meet in the norm's kernel.
    """
    form = linear_add_norm_reference if x.device.type == "cpu" else linear_add_norm_triton
    return form(x, weight_OI, residual, norm_O, eps)


def linear_relu2(x: Tensor, weight_OI: Tensor) -> Tensor:
    """relu(x W^T)^2 in one kernel; arguments as `linear`. Backward takes relu(h) = sqrt(result)."""
    form = linear_relu2_reference if x.device.type == "cpu" else linear_relu2_triton
    return form(x, weight_OI)


def relu2_mlp_norm(
    x: Tensor, up_FD: Tensor, down_DF: Tensor, residual: Tensor, norm_D: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """(rms_norm(y), y) of y = residual + relu(x up^T)^2 down^T: a ReLU-squared MLP without elementwise passes.

    x, residual [..., D] -> [..., D] twice; the same bits as `linear_add_norm` of `linear_relu2`.
    """
    form = relu2_mlp_norm_reference if x.device.type == "cpu" else relu2_mlp_norm_triton
    return form(x, up_FD, down_DF, residual, norm_D, eps)


def _tokens(x: Tensor) -> Tensor:
    return x.reshape(1, -1, x.shape[-1])


def _one(y_1NO: Tensor, x: Tensor) -> Tensor:
    return y_1NO.reshape(*x.shape[:-1], y_1NO.shape[-1])


def linear_triton(x: Tensor, weight_OI: Tensor) -> Tensor:
    return _one(linear_op(_tokens(x), weight_OI[None]), x)


def linear_add_norm_triton(
    x: Tensor, weight_OI: Tensor, residual: Tensor, norm_O: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    check_norm(residual, norm_O)
    norm_RO = None if norm_O is None else norm_O[None]
    normed, y = linear_add_norm_op(_tokens(x), weight_OI[None], _tokens(residual), norm_RO, eps)
    return _one(normed, x), _one(y, x)


def linear_relu2_triton(x: Tensor, weight_OI: Tensor) -> Tensor:
    return _one(linear_relu2_op(_tokens(x), weight_OI[None]), x)


def relu2_mlp_norm_triton(
    x: Tensor, up_FD: Tensor, down_DF: Tensor, residual: Tensor, norm_D: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    check_norm(residual, norm_D)
    norm_RD = None if norm_D is None else norm_D[None]
    normed, y, _ = relu2_mlp_norm_op(_tokens(x), up_FD[None], down_DF[None], _tokens(residual), norm_RD, eps)
    return _one(normed, x), _one(y, x)


def linear_reference(x: Tensor, weight_OI: Tensor) -> Tensor:
    return functional.linear(x, weight_OI)


def linear_add_norm_reference(
    x: Tensor, weight_OI: Tensor, residual: Tensor, norm_O: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    y = residual + functional.linear(x, weight_OI)
    return rms_norm_reference(y, norm_O, eps), y


def linear_relu2_reference(x: Tensor, weight_OI: Tensor) -> Tensor:
    return functional.linear(x, weight_OI).relu().square()


def relu2_mlp_norm_reference(
    x: Tensor, up_FD: Tensor, down_DF: Tensor, residual: Tensor, norm_D: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    return linear_add_norm_reference(linear_relu2_reference(x, up_FD), down_DF, residual, norm_D, eps)


# ---- the stacked matrix product ------------------------------------------------------------------


@triton.jit
def _load(
    source, replica, row, column, rows, columns, stride_R, stride_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    if TMA:
        return source.load([replica, row, column]).reshape(ROWS, COLUMNS)
    else:
        i = tl.arange(0, ROWS)
        j = tl.arange(0, COLUMNS)
        corner = source + replica.to(tl.int64) * stride_R + row.to(tl.int64) * stride_row + column
        inside = (row + i < rows)[:, None] & (column + j < columns)[None, :]
        return tl.load(corner + i[:, None] * stride_row + j[None, :], mask=inside, other=0.0)


@triton.jit
def _store(
    target, tile, replica, row, column, rows, columns, stride_R, stride_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    if TMA:
        target.store([replica, row, column], tile.reshape(1, ROWS, COLUMNS))
    else:
        i = tl.arange(0, ROWS)
        j = tl.arange(0, COLUMNS)
        corner = target + replica.to(tl.int64) * stride_R + row.to(tl.int64) * stride_row + column
        inside = (row + i < rows)[:, None] & (column + j < columns)[None, :]
        tl.store(corner + i[:, None] * stride_row + j[None, :], tile, mask=inside)


@triton.jit
def _operand(
    source, replica, row, column, rows, columns, stride_R, stride_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    TRANSPOSED: tl.constexpr, TMA: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """A tile of an operand as the product reads it; TRANSPOSED: memory holds the transpose."""
    if TRANSPOSED:
        tile = _load(source, replica, column, row, columns, rows, stride_R, stride_row, COLUMNS, ROWS, TMA).T
    else:
        tile = _load(source, replica, row, column, rows, columns, stride_R, stride_row, ROWS, COLUMNS, TMA)
    return tile.to(tl.float32) if WIDEN else tile


@triton.jit
def _finish(
    product, c, extra, scale, replica, row, column, m, n, alpha, beta,
    c_R, c_row, extra_R, extra_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    EPILOGUE: tl.constexpr, SCALED: tl.constexpr, DTYPE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    if SCALED:
        product *= scale
    if EPILOGUE == "add":
        addend = _load(
            extra, replica, row, column, m, n, extra_R, extra_row, ROWS, COLUMNS, TMA
        ).to(tl.float32)  # fmt: skip
        product = alpha * product + beta * addend
    if EPILOGUE == "relu2":
        hidden = product.to(DTYPE).to(tl.float32)
        hidden = tl.where(hidden < 0, 0.0, hidden)  # keeps NaN
        product = hidden * hidden
    if EPILOGUE == "relu2_backward":
        squared = _load(
            extra, replica, row, column, m, n, extra_R, extra_row, ROWS, COLUMNS, TMA
        ).to(tl.float32)  # fmt: skip
        product = product.to(DTYPE).to(tl.float32) * (2 * tl.sqrt(squared))
    _store(c, product.to(DTYPE), replica, row, column, m, n, c_R, c_row, ROWS, COLUMNS, TMA)


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
    tile, a, b, b_half, c, extra, scale_R, m, n, k, alpha, beta,
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
        a_tile = _operand(a, replica, row, at, m, k, a_R, a_row, BLOCK_M, BLOCK_K, FORM == "tn", TMA, WIDEN)
        b_tile = _operand(b, replica, at, column, k, n, b_R, b_row, BLOCK_K, BLOCK_N, FORM == "nt", TMA, WIDEN)
        product = tl.dot(a_tile, b_tile, product, input_precision=PRECISION)
        if WIDE:
            b_tile = _operand(
                b_half, replica, at, column + BLOCK_N, k, n, b_R, b_row, BLOCK_K, HALF, FORM == "nt", TMA, WIDEN
            )  # fmt: skip
            third = tl.dot(a_tile, b_tile, third, input_precision=PRECISION)

    scale = tl.load(scale_R + replica) if SCALED else 1.0
    first, second = product.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1).split()
    _finish(
        first, c, extra, scale, replica, row, column, m, n, alpha, beta,
        c_R, c_row, extra_R, extra_row, BLOCK_M, HALF, EPILOGUE, SCALED, DTYPE, TMA_STORE,
    )  # fmt: skip
    _finish(
        second, c, extra, scale, replica, row, column + HALF, m, n, alpha, beta,
        c_R, c_row, extra_R, extra_row, BLOCK_M, HALF, EPILOGUE, SCALED, DTYPE, TMA_STORE,
    )  # fmt: skip
    if WIDE:
        _finish(
            third, c, extra, scale, replica, row, column + BLOCK_N, m, n, alpha, beta,
            c_R, c_row, extra_R, extra_row, BLOCK_M, HALF, EPILOGUE, SCALED, DTYPE, TMA_STORE,
        )  # fmt: skip


@triton.jit
def _half_tile(
    tile, right, a, b_half, c, extra, scale_R, m, n, k, alpha, beta,
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
        a_tile = _operand(a, replica, row, at, m, k, a_R, a_row, BLOCK_M, BLOCK_K, FORM == "tn", TMA, WIDEN)
        b_tile = _operand(b_half, replica, at, column, k, n, b_R, b_row, BLOCK_K, HALF, FORM == "nt", TMA, WIDEN)
        product = tl.dot(a_tile, b_tile, product, input_precision=PRECISION)
    scale = tl.load(scale_R + replica) if SCALED else 1.0
    _finish(
        product, c, extra, scale, replica, row, column, m, n, alpha, beta,
        c_R, c_row, extra_R, extra_row, BLOCK_M, HALF, EPILOGUE, SCALED, DTYPE, TMA_STORE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["whole", "halves"])  # with and without halves one compiled kernel each for any R
def stacked_matmul_kernel(
    a, b, b_half, c, extra, scale_R, whole, halves, m, n, k, alpha, beta,
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
                tile, a, b, b_half, c, extra, scale_R, m, n, k, alpha, beta,
                a_R, a_row, b_R, b_row, c_R, c_row, extra_R, extra_row,
                BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, WIDE, FORM, EPILOGUE, SCALED,
                DTYPE, PRECISION, TMA, TMA_STORE, WIDEN,
            )  # fmt: skip
        if HALVES:
            for half in tl.range(tl.program_id(0), halves, tl.num_programs(0), flatten=True):
                _half_tile(
                    whole + half // 2, half % 2, a, b_half, c, extra, scale_R, m, n, k, alpha, beta,
                    a_R, a_row, b_R, b_row, c_R, c_row, extra_R, extra_row,
                    BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, FORM, EPILOGUE, SCALED,
                    DTYPE, PRECISION, TMA, TMA_STORE, WIDEN,
                )  # fmt: skip
    else:
        _tile(
            tl.program_id(0), a, b, b_half, c, extra, scale_R, m, n, k, alpha, beta,
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


DTYPES = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


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
    """c [R, M, N] = epilogue(a b) for every replica; `form` says how a and b are stored.

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
    precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    if tile is None:
        tile = tile_for(form, m, n, k, a.dtype, precision)
        if extra is not None:  # its tiles take shared memory too
            tile = tile._replace(stages=max(2, tile.stages - 1))
    # Decided by one replica's shape: a stack that is not aligned for TMA is copied, not rerouted.
    rows_whole = a.shape[2] % 8 == 0 and b.shape[2] % 8 == 0
    tma = a.dtype == torch.bfloat16 and rows_whole
    tma_store = tma and n % 8 == 0
    a, b = (_aligned(operand) if tma else dense_replicas(operand) for operand in (a, b))
    block_a = (tile.block_k, tile.block_m) if form == "tn" else (tile.block_m, tile.block_k)
    block_b = (tile.block_n, tile.block_k) if form == "nt" else (tile.block_k, tile.block_n)
    half_b = (tile.block_n // 2, tile.block_k) if form == "nt" else (tile.block_k, tile.block_n // 2)
    block_c = (tile.block_m, tile.block_n // 2)
    if extra is not None:
        extra = _aligned(extra) if tma_store else dense_replicas(extra)
    tiles = c.shape[0] * triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.columns)
    programs, whole, halves = _programs(tiles, tile, a.device)
    other = c if extra is None else extra
    stacked_matmul_kernel[(programs,)](
        _described(a, block_a) if tma else a,
        _described(b, block_b) if tma else b,
        _described(b, half_b) if tma else b,
        _described(c, block_c) if tma_store else c,
        _described(other, block_c) if tma_store else other,
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


def _aligned(operand: Tensor) -> Tensor:
    """The operand as the tensor-map engine takes it: 16-byte aligned base and replica stride."""
    operand = dense_replicas(operand)
    whole = operand.data_ptr() % 16 == 0 and operand.stride(0) % 8 == 0 and operand.stride(0) > 0
    return operand if whole else operand.clone(memory_format=torch.contiguous_format)


def _described(operand: Tensor, block: tuple[int, int]) -> TensorDescriptor:
    return TensorDescriptor(operand, list(operand.shape), list(operand.stride()), [1, block[0], block[1]])


# ---- stacked operators ---------------------------------------------------------------------------


@custom_operator("fractal::matmul")
def matmul_op(
    a: Tensor,
    b: Tensor,
    form: str,
    epilogue: str = "none",
    extra: Tensor | None = None,
    scale_R: Tensor | None = None,
) -> Tensor:
    return stacked_matmul(a, b, form, epilogue, extra, scale_R)


@matmul_op.register_fake
def _(a, b, form, epilogue="none", extra=None, scale_R=None):
    m = a.shape[2] if form == "tn" else a.shape[1]
    n = b.shape[1] if form == "nt" else b.shape[2]
    return a.new_empty((a.shape[0], m, n))


def gradients(ctx, dy_RNO: Tensor, x_RNI: Tensor, weight_ROI: Tensor, scale_R=None):
    """dX and dW of y = x W^T, where they are asked for; scale_R multiplies both."""
    dx = matmul_op(dy_RNO, weight_ROI, "nn", scale_R=scale_R) if ctx.needs_input_grad[0] else None
    dw = matmul_op(dy_RNO, x_RNI, "tn", scale_R=scale_R) if ctx.needs_input_grad[1] else None
    return dx, dw


@fold_vmap
@custom_operator("fractal::linear")
def linear_op(x_RNI: Tensor, weight_ROI: Tensor) -> Tensor:
    return stacked_matmul(x_RNI, weight_ROI, "nt")


@linear_op.register_fake
def _(x_RNI, weight_ROI):
    return x_RNI.new_empty((x_RNI.shape[0], x_RNI.shape[1], weight_ROI.shape[1]))


def _save_operands(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], inputs[1])


def _linear_backward(ctx, dy_RNO):
    return gradients(ctx, dy_RNO, *ctx.saved_tensors)


linear_op.register_autograd(_linear_backward, setup_context=_save_operands)


@fold_vmap
@custom_operator("fractal::linear_add_norm")
def linear_add_norm_op(
    x_RNI: Tensor, weight_ROI: Tensor, residual_RNO: Tensor, norm_RO: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    y_RNO = stacked_matmul(x_RNI, weight_ROI, "nt", "add", residual_RNO)
    return rms_norm_op(y_RNO, norm_RO, eps), y_RNO


@linear_add_norm_op.register_fake
def _(x_RNI, weight_ROI, residual_RNO, norm_RO, eps):
    y_RNO = torch.empty_like(residual_RNO, memory_format=torch.contiguous_format)
    return torch.empty_like(y_RNO), y_RNO


def _linear_add_norm_save(ctx, inputs, output):
    x_RNI, weight_ROI, _, norm_RO, ctx.eps = inputs
    ctx.save_for_backward(x_RNI, weight_ROI, norm_RO, output[1])
    ctx.set_materialize_grads(False)  # the last layer's y goes nowhere: no zeros to read for it


def _linear_add_norm_backward(ctx, dnormed_RNO, dy_RNO):
    x_RNI, weight_ROI, norm_RO, y_RNO = ctx.saved_tensors
    dy_RNO, dnorm_RO = sum_and_norm_backward(dnormed_RNO, dy_RNO, y_RNO, norm_RO, ctx.eps)
    return *gradients(ctx, dy_RNO, x_RNI, weight_ROI), dy_RNO, dnorm_RO, None


linear_add_norm_op.register_autograd(_linear_add_norm_backward, setup_context=_linear_add_norm_save)


@fold_vmap
@custom_operator("fractal::linear_relu2")
def linear_relu2_op(x_RNI: Tensor, weight_ROI: Tensor) -> Tensor:
    return stacked_matmul(x_RNI, weight_ROI, "nt", "relu2")


@linear_relu2_op.register_fake
def _(x_RNI, weight_ROI):
    return x_RNI.new_empty((x_RNI.shape[0], x_RNI.shape[1], weight_ROI.shape[1]))


def _linear_relu2_save(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output)


def _linear_relu2_backward(ctx, dy_RNO):
    x_RNI, weight_ROI, y_RNO = ctx.saved_tensors
    return gradients(ctx, dy_RNO * (2 * y_RNO.sqrt()), x_RNI, weight_ROI)


linear_relu2_op.register_autograd(_linear_relu2_backward, setup_context=_linear_relu2_save)


@fold_vmap
@custom_operator("fractal::relu2_mlp_norm")
def relu2_mlp_norm_op(
    x_RND: Tensor, up_RFD: Tensor, down_RDF: Tensor, residual_RND: Tensor, norm_RD: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(rms_norm(y), y, the hidden units after ReLU squared, which the backward reads)."""
    hidden_RNF = stacked_matmul(x_RND, up_RFD, "nt", "relu2")
    y_RND = stacked_matmul(hidden_RNF, down_RDF, "nt", "add", residual_RND)
    return rms_norm_op(y_RND, norm_RD, eps), y_RND, hidden_RNF


@relu2_mlp_norm_op.register_fake
def _(x_RND, up_RFD, down_RDF, residual_RND, norm_RD, eps):
    y_RND = torch.empty_like(residual_RND, memory_format=torch.contiguous_format)
    return torch.empty_like(y_RND), y_RND, x_RND.new_empty((*x_RND.shape[:2], up_RFD.shape[1]))


def _relu2_mlp_norm_save(ctx, inputs, output):
    *operands, _, norm_RD, ctx.eps = inputs
    ctx.save_for_backward(*operands, norm_RD, *output[1:])
    ctx.set_materialize_grads(False)  # nothing flows back into the hidden units: make no zeros for them


def _relu2_mlp_norm_backward(ctx, dnormed_RND, dy_RND, _):
    x_RND, up_RFD, down_RDF, norm_RD, y_RND, hidden_RNF = ctx.saved_tensors
    dy_RND, dnorm_RD = sum_and_norm_backward(dnormed_RND, dy_RND, y_RND, norm_RD, ctx.eps)
    dh_RNF = matmul_op(dy_RND, down_RDF, "nn", "relu2_backward", hidden_RNF)
    dx_RND = matmul_op(dh_RNF, up_RFD, "nn")
    dup_RFD = matmul_op(dh_RNF, x_RND, "tn")
    ddown_RDF = matmul_op(dy_RND, hidden_RNF, "tn")
    return dx_RND, dup_RFD, ddown_RDF, dy_RND, dnorm_RD, None


relu2_mlp_norm_op.register_autograd(_relu2_mlp_norm_backward, setup_context=_relu2_mlp_norm_save)
