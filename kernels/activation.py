"""The activations of the MLPs: SwiGLU on a fused gate/up projection, squared ReLU, and GELU behind a bias.

R replica, N rows of one replica, F MLP width. Elementwise, so the kernels need not tell replicas apart, but for the
bias, whose gradient is an ordered sum over a replica's rows.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.ordered_sum import column_sums_op
from kernels.stacking import custom_operator, dense_replicas, fold_vmap

BLOCK = 1024  # elements a program holds at once


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of a fused projection (Shazeer 2020, arXiv:2002.05202).

    gate_up: [..., 2 F], the gate in the first F channels. Returns [..., F] in the same dtype;
    float32 inside.
    """
    return swiglu_reference(gate_up) if gate_up.device.type == "cpu" else swiglu_triton(gate_up)


def relu2(x: Tensor) -> Tensor:
    """max(x, 0)^2 (So et al. 2021, arXiv:2109.08668). x: any shape; same shape and dtype back."""
    return relu2_reference(x) if x.device.type == "cpu" else relu2_triton(x)


def bias_gelu(x: Tensor, bias_F: Tensor) -> Tensor:
    """GELU of x + bias by its tanh form (Hendrycks and Gimpel 2016, arXiv:1606.08415), as GPT-2 has it.

    x: [..., F], bias_F: [F]. Returns [..., F] in the dtype of x; float32 inside.
    """
    return bias_gelu_reference(x, bias_F) if x.device.type == "cpu" else bias_gelu_triton(x, bias_F)


def swiglu_triton(gate_up: Tensor) -> Tensor:
    """`swiglu` on the Triton kernels whatever the device."""
    if gate_up.shape[-1] % 2:
        raise ValueError(f"swiglu got {gate_up.shape[-1]} channels, expected an even number: gate and up side by side")
    return swiglu_op(gate_up[None]).squeeze(0)


def relu2_triton(x: Tensor) -> Tensor:
    """`relu2` on the Triton kernels whatever the device."""
    return relu2_op(x[None]).squeeze(0)


def bias_gelu_triton(x: Tensor, bias_F: Tensor) -> Tensor:
    """`bias_gelu` on the Triton kernels whatever the device."""
    if bias_F.shape != x.shape[-1:]:
        raise ValueError(f"bias_gelu got a bias {tuple(bias_F.shape)}, expected ({x.shape[-1]},): one value a channel")
    return bias_gelu_op(x.reshape(1, -1, x.shape[-1]), bias_F[None]).reshape(x.shape)


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """`swiglu` in plain differentiable torch."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def relu2_reference(x: Tensor) -> Tensor:
    """`relu2` in plain differentiable torch."""
    return F.relu(x).square()


def bias_gelu_reference(x: Tensor, bias_F: Tensor) -> Tensor:
    """`bias_gelu` in plain differentiable torch."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.gelu(x.to(wide) + bias_F, approximate="tanh").to(x.dtype)


@fold_vmap
@custom_operator("fractal::swiglu")
def swiglu_op(gate_up: Tensor) -> Tensor:
    """`swiglu` of R replicas, [R, ..., 2 F] -> [R, ..., F]."""
    width = gate_up.shape[-1] // 2
    y = gate_up.new_empty(*gate_up.shape[:-1], width)
    grid = (triton.cdiv(y.numel(), BLOCK),)
    _swiglu_kernel[grid](gate_up.contiguous(), y, y.numel(), WIDTH=width, BLOCK=BLOCK)
    return y


@swiglu_op.register_fake
def _(gate_up):
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@custom_operator("fractal::swiglu_backward")
def swiglu_backward_op(dy: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient of gate_up [R, ..., 2 F] from dy [R, ..., F]."""
    dgate_up = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
    grid = (triton.cdiv(dy.numel(), BLOCK),)
    _swiglu_backward_kernel[grid](
        dy.contiguous(), gate_up.contiguous(), dgate_up, dy.numel(), WIDTH=dy.shape[-1], BLOCK=BLOCK
    )
    return dgate_up


@swiglu_backward_op.register_fake
def _(dy, gate_up):
    return torch.empty_like(gate_up, memory_format=torch.contiguous_format)


def _save_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _swiglu_backward(ctx, dy):
    return swiglu_backward_op(dy, *ctx.saved_tensors)


swiglu_op.register_autograd(_swiglu_backward, setup_context=_save_inputs)


@fold_vmap
@custom_operator("fractal::relu2")
def relu2_op(x: Tensor) -> Tensor:
    """`relu2` of R replicas, [R, ...] -> [R, ...]."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    _relu2_kernel[(triton.cdiv(x.numel(), BLOCK),)](x.contiguous(), y, x.numel(), BLOCK=BLOCK)
    return y


@relu2_op.register_fake
def _(x):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@custom_operator("fractal::relu2_backward")
def relu2_backward_op(dy: Tensor, x: Tensor) -> Tensor:
    """The gradient of x from dy, both [R, ...]."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    _relu2_backward_kernel[(triton.cdiv(x.numel(), BLOCK),)](
        dy.contiguous(), x.contiguous(), dx, x.numel(), BLOCK=BLOCK
    )
    return dx


@relu2_backward_op.register_fake
def _(dy, x):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _relu2_backward(ctx, dy):
    return relu2_backward_op(dy, *ctx.saved_tensors)


relu2_op.register_autograd(_relu2_backward, setup_context=_save_inputs)


@fold_vmap
@custom_operator("fractal::bias_gelu")
def bias_gelu_op(x_RNF: Tensor, bias_RF: Tensor) -> Tensor:
    """`bias_gelu` of R replicas."""
    return _bias_gelu(x_RNF, bias_RF, None)


@bias_gelu_op.register_fake
def _(x_RNF, bias_RF):
    return torch.empty_like(x_RNF, memory_format=torch.contiguous_format)


@custom_operator("fractal::bias_gelu_backward")
def bias_gelu_backward_op(dy_RNF: Tensor, x_RNF: Tensor, bias_RF: Tensor) -> Tensor:
    """The gradient of x + bias [R, N, F]."""
    return _bias_gelu(x_RNF, bias_RF, dy_RNF)


@bias_gelu_backward_op.register_fake
def _(dy_RNF, x_RNF, bias_RF):
    return torch.empty_like(x_RNF, memory_format=torch.contiguous_format)


def _bias_gelu(x_RNF, bias_RF, dy_RNF):
    """The forward, or with dy the backward."""
    R, N, width = x_RNF.shape
    y_RNF = torch.empty_like(x_RNF, memory_format=torch.contiguous_format)
    bias_RF = dense_replicas(bias_RF)
    dy_RNF = None if dy_RNF is None else dy_RNF.contiguous()
    _bias_gelu_kernel[(R * N, triton.cdiv(width, BLOCK))](
        x_RNF.contiguous(), bias_RF, dy_RNF, y_RNF, bias_RF.stride(0), N=N, WIDTH=width, BLOCK=BLOCK
    )
    return y_RNF


def _bias_gelu_backward(ctx, dy_RNF):
    dx_RNF = bias_gelu_backward_op(dy_RNF, *ctx.saved_tensors)
    return dx_RNF, column_sums_op(dx_RNF)


bias_gelu_op.register_autograd(_bias_gelu_backward, setup_context=_save_inputs)


@triton.jit
def _bias_gelu_kernel(
    x_ptr, bias_ptr, dy_ptr, y_ptr, bias_stride, N: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """Program (row of a replica, block of its channels): x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3), which is
    x (1 + tanh u) / 2; with dy, dy times its derivative."""
    ROOT: tl.constexpr = 0.7978845608028654
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    x = tl.load(x_ptr + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(bias_ptr + row // N * bias_stride + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(2.0 * ROOT * (x + 0.044715 * x * x * x))
    if dy_ptr is None:
        y = x * sigmoid
    else:
        slope = 2.0 * ROOT * (1.0 + 3.0 * 0.044715 * x * x)
        dy = tl.load(dy_ptr + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
        y = dy * (sigmoid + x * sigmoid * (1.0 - sigmoid) * slope)
    tl.store(y_ptr + row * WIDTH + column, y, mask=inside)


@triton.jit
def _locate(size, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Elements of y this program holds, where their gates lie in gate_up, and which of them exist."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    row = start // WIDTH
    element = tl.arange(0, BLOCK)
    rows_on = ((start - row * WIDTH).to(tl.int32) + element) // WIDTH
    y_at = start + element
    return y_at, y_at + (row + rows_on) * WIDTH, y_at < size


@triton.jit
def _swiglu_kernel(gate_up_ptr, y_ptr, size, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    y_at, gate_at, inside = _locate(size, WIDTH, BLOCK)
    gate = tl.load(gate_up_ptr + gate_at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + gate_at + WIDTH, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + y_at, gate * tl.sigmoid(gate) * up, mask=inside)


@triton.jit
def _swiglu_backward_kernel(dy_ptr, gate_up_ptr, dgate_up_ptr, size, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    y_at, gate_at, inside = _locate(size, WIDTH, BLOCK)
    dy = tl.load(dy_ptr + y_at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_up_ptr + gate_at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + gate_at + WIDTH, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    tl.store(dgate_up_ptr + gate_at, dy * up * (sigmoid + silu * (1.0 - sigmoid)), mask=inside)
    tl.store(dgate_up_ptr + gate_at + WIDTH, dy * silu, mask=inside)


@triton.jit
def _relu2_kernel(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    x = tl.where(x < 0.0, 0.0, x)  # keeps NaN, which a maximum would drop
    tl.store(y_ptr + at, x * x, mask=at < size)


@triton.jit
def _relu2_backward_kernel(dy_ptr, x_ptr, dx_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dy = tl.load(dy_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(dx_ptr + at, tl.where(x < 0.0, 0.0, 2.0 * x * dy), mask=at < size)
