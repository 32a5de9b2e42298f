"""The activations of the two MLPs: SwiGLU on a fused gate/up projection, and squared ReLU.

R replica, F MLP width. Elementwise, so the kernels need not tell replicas apart.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from kernels.stacking import custom_operator, fold_vmap

BLOCK = 1024  # elements a program holds at once


def swiglu(gate_up):
    """silu(gate) * up of a fused projection (Shazeer 2020, arXiv:2002.05202).

    gate_up: [..., 2 F], the gate in the first F channels. Returns [..., F] in the same dtype;
    float32 inside.
    """
    return swiglu_reference(gate_up) if gate_up.device.type == "cpu" else swiglu_triton(gate_up)


def relu2(x):
    """max(x, 0)^2 (So et al. 2021, arXiv:2109.08668). x: any shape; same shape and dtype back."""
    return relu2_reference(x) if x.device.type == "cpu" else relu2_triton(x)


def swiglu_triton(gate_up):
    """`swiglu` on the Triton kernels whatever the device."""
    if gate_up.shape[-1] % 2:
        raise ValueError(f"swiglu got {gate_up.shape[-1]} channels, expected an even number: gate and up side by side")
    return _swiglu(gate_up[None]).squeeze(0)


def relu2_triton(x):
    """`relu2` on the Triton kernels whatever the device."""
    return _relu2(x[None]).squeeze(0)


def swiglu_reference(gate_up):
    """`swiglu` in plain differentiable torch."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def relu2_reference(x):
    """`relu2` in plain differentiable torch."""
    return F.relu(x).square()


@custom_operator("fractal::swiglu")
def _swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    width = gate_up.shape[-1] // 2
    y = gate_up.new_empty(*gate_up.shape[:-1], width)
    grid = (triton.cdiv(y.numel(), BLOCK),)
    _swiglu_kernel[grid](gate_up.contiguous(), y, y.numel(), WIDTH=width, BLOCK=BLOCK)
    return y


@custom_operator("fractal::swiglu_backward")
def _swiglu_backward(dy: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    dgate_up = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
    grid = (triton.cdiv(dy.numel(), BLOCK),)
    _swiglu_backward_kernel[grid](
        dy.contiguous(), gate_up.contiguous(), dgate_up, dy.numel(), WIDTH=dy.shape[-1], BLOCK=BLOCK
    )
    return dgate_up


@custom_operator("fractal::relu2")
def _relu2(x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    _relu2_kernel[(triton.cdiv(x.numel(), BLOCK),)](x.contiguous(), y, x.numel(), BLOCK=BLOCK)
    return y


@custom_operator("fractal::relu2_backward")
def _relu2_backward(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    _relu2_backward_kernel[(triton.cdiv(x.numel(), BLOCK),)](
        dy.contiguous(), x.contiguous(), dx, x.numel(), BLOCK=BLOCK
    )
    return dx


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


_swiglu.register_autograd(lambda ctx, dy: _swiglu_backward(dy, *ctx.saved_tensors), setup_context=_save)
_relu2.register_autograd(lambda ctx, dy: _relu2_backward(dy, *ctx.saved_tensors), setup_context=_save)
fold_vmap(_swiglu)
fold_vmap(_relu2)


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
