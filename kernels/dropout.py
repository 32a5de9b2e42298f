"""Dropout whose random numbers are a function of what they fall on: seed, step, site in the network, row, element.

R replica, B rows of a micro-batch, n elements of one row. The generator is Philox 4x32-10 (Salmon et al. 2011,
"Parallel random numbers: as easy as 1, 2, 3"), keyed by (seed, step); its counter is (quad of elements, row of the
batch, site, 0). Neither the slot nor the cut of a batch into micro-batches enters, and the backward draws again what
the forward drew instead of keeping it. Kernel and reference agree bit for bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.stacking import custom_operator, fold_vmap

QUADS = 256  # a program draws for four elements each
MASK = 0xFFFFFFFF
ROUNDS = 10
MULTIPLY = (0xD2511F53, 0xCD9E8D57)
RAISE = (0x9E3779B9, 0xBB67AE85)


def dropout(x: Tensor, rate: Tensor, key_3: Tensor, site: int) -> Tensor:
    """x / (1 - rate) with a share `rate` of its elements zero, in x's dtype (Srivastava et al. 2014).

    x: [B, ...]. rate: 0-dim fp32 in [0, 1); 0 changes no bit. key_3: int64, seed, step, and which row of the step's
    batch x[0] is; each below 2^32. site: which dropout of the network this is. An element is dropped where its 32
    random bits are below rate * 2^32.
    """
    return (dropout_reference if x.device.type == "cpu" else dropout_triton)(x, rate, key_3, site)


def dropout_triton(x: Tensor, rate: Tensor, key_3: Tensor, site: int) -> Tensor:
    """`dropout` on the Triton kernel whatever the device."""
    return dropout_op(x[None], rate[None], key_3[None], site).squeeze(0)


def dropout_reference(x: Tensor, rate: Tensor, key_3: Tensor, site: int) -> Tensor:
    """`dropout` in plain differentiable torch."""
    n = x[0].numel()
    quad_Q = torch.arange(-(-n // 4), device=x.device)
    row_B1 = key_3[2] + torch.arange(len(x), device=x.device)[:, None]
    bits_BQ4 = torch.stack(philox_reference(key_3[0], key_3[1], quad_Q + 0 * row_B1, row_B1 + 0 * quad_Q, site), -1)
    kept = bits_BQ4.flatten(-2)[:, :n].reshape(x.shape) >= rate.double() * 2.0**32
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.where(kept, x.to(wide) * (1 / (1 - rate)).to(wide), 0.0).to(x.dtype)


def philox_reference(key0: Tensor, key1: Tensor, counter0: Tensor, counter1: Tensor, site: int) -> list[Tensor]:
    """Four words of 32 random bits, int64 of the counters' shape, at the counter (counter0, counter1, site, 0)."""
    c0, c1, c2, c3 = counter0, counter1, torch.full_like(counter0, site), torch.zeros_like(counter0)
    for _ in range(ROUNDS):
        # products of 32 bits wrap in int64, which leaves their bits as they are
        high, low = MULTIPLY[1] * c2, MULTIPLY[0] * c0
        c0, c2 = ((high >> 32) & MASK) ^ c1 ^ key0, ((low >> 32) & MASK) ^ c3 ^ key1
        c1, c3 = high & MASK, low & MASK
        key0, key1 = (key0 + RAISE[0]) & MASK, (key1 + RAISE[1]) & MASK
    return [c0, c1, c2, c3]


@fold_vmap
@custom_operator("fractal::dropout")
def dropout_op(x_RBn: Tensor, rate_R: Tensor, key_R3: Tensor, site: int) -> Tensor:
    """`dropout` of R replicas, x [R, B, ...], rate fp32 [R], key int64 [R, 3]; of a gradient it is the backward too."""
    x_RBn = x_RBn.contiguous()
    y_RBn = torch.empty_like(x_RBn)
    replicas, rows = x_RBn.shape[:2]
    n = x_RBn[0, 0].numel()
    _dropout_kernel[(triton.cdiv(n, 4 * QUADS), rows, replicas)](
        x_RBn, y_RBn, rate_R.contiguous(), key_R3.contiguous(), site, n, QUADS=QUADS, num_warps=4
    )
    return y_RBn


@dropout_op.register_fake
def _(x_RBn, rate_R, key_R3, site):
    return torch.empty_like(x_RBn, memory_format=torch.contiguous_format)


def _dropout_save(ctx, inputs, output):
    _, rate_R, key_R3, ctx.site = inputs
    ctx.save_for_backward(rate_R, key_R3)


def _dropout_backward(ctx, dy_RBn):
    return dropout_op(dy_RBn, *ctx.saved_tensors, ctx.site), None, None, None


dropout_op.register_autograd(_dropout_backward, setup_context=_dropout_save)


@triton.jit(do_not_specialize=["site"])
def _dropout_kernel(x_ptr, y_ptr, rate_ptr, key_ptr, site, n, QUADS: tl.constexpr):
    replica, row = tl.program_id(2).to(tl.int64), tl.program_id(1)
    rate = tl.load(rate_ptr + replica)
    key = tl.load(key_ptr + replica * 3) | (tl.load(key_ptr + replica * 3 + 1) << 32)
    quad = tl.program_id(0) * QUADS + tl.arange(0, QUADS)
    row_in_batch = (tl.load(key_ptr + replica * 3 + 2) + row).to(tl.int32)
    zero = quad * 0
    b0, b1, b2, b3 = tl.philox(key, quad, zero + row_in_batch, zero + site, zero)
    bits = tl.join(tl.join(b0, b2), tl.join(b1, b3)).reshape(4 * QUADS)
    element = tl.program_id(0) * 4 * QUADS + tl.arange(0, 4 * QUADS)
    at = (replica * tl.num_programs(1) + row) * n + element
    x = tl.load(x_ptr + at, mask=element < n, other=0.0).to(tl.float32)
    kept = bits.to(tl.int64) >= (rate * 4294967296.0).to(tl.int64)
    y = tl.where(kept, x * tl.div_rn(1.0, 1.0 - rate), 0.0)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=element < n)
