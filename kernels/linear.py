"""Linear layers of a replica, alone or fused with what follows them.

Dimensions: R replica, N tokens (every leading dimension flattened), I input width, O output width,
F MLP width, D model width.

Residual adds are fused into the preceding GEMM's epilogue, and their gradients into the next norm's
backward. Every operator is stacked products (kernels/matmul.py) and the norm's kernels.
"""

import torch
import torch.nn.functional as functional
from torch import Tensor

from kernels.matmul import stacked_matmul
from kernels.norm import check_norm, layer_norm_reference, norm_op, one, rms_norm_reference, sum_and_norm_backward
from kernels.stacking import custom_operator, fold_vmap


def linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    """x W^T: x [..., I], weight_OI -> [..., O], all bf16 or all fp32.

    Accumulates in fp32. fp32 operands follow `torch.get_float32_matmul_precision`: "highest" is
    IEEE fp32, anything else tf32. Raises ValueError on other dtypes and on widths that differ.
    """
    form = linear_reference if x.device.type == "cpu" else linear_triton
    return form(x, weight_OI)


def linear_add_norm(
    x: Tensor,
    weight_OI: Tensor,
    residual: Tensor,
    norm_O: Tensor | None = None,
    eps: float = 1e-6,
    norm_bias_O: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(norm(y), y) of y = residual + x W^T: the residual stream is updated, and read by its next user.

    residual [..., O]; norm_O and eps as in `rms_norm`, with norm_bias_O as in `layer_norm`; the rest as `linear`. The
    residual add is fused into the GEMM's epilogue and rounded once; its gradient into the norm's backward.
    """
    form = linear_add_norm_reference if x.device.type == "cpu" else linear_add_norm_triton
    return form(x, weight_OI, residual, norm_O, eps, norm_bias_O)


def linear_relu2(x: Tensor, weight_OI: Tensor) -> Tensor:
    """relu(x W^T)^2 in one kernel; shapes as `linear`. Backward takes relu(h) = sqrt(result)."""
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
    """`linear` on the Triton kernels whatever the device."""
    return _one(linear_op(_tokens(x), weight_OI[None]), x)


def linear_add_norm_triton(
    x: Tensor,
    weight_OI: Tensor,
    residual: Tensor,
    norm_O: Tensor | None = None,
    eps: float = 1e-6,
    norm_bias_O: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`linear_add_norm` on the Triton kernels whatever the device."""
    check_norm(residual, norm_O, norm_bias_O)
    operands = _tokens(x), weight_OI[None], _tokens(residual)
    normed, y = linear_add_norm_op(*operands, one(norm_O), one(norm_bias_O), eps)
    return _one(normed, x), _one(y, x)


def linear_relu2_triton(x: Tensor, weight_OI: Tensor) -> Tensor:
    """`linear_relu2` on the Triton kernels whatever the device."""
    return _one(linear_relu2_op(_tokens(x), weight_OI[None]), x)


def relu2_mlp_norm_triton(
    x: Tensor, up_FD: Tensor, down_DF: Tensor, residual: Tensor, norm_D: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """`relu2_mlp_norm` on the Triton kernels whatever the device."""
    check_norm(residual, norm_D)
    operands = _tokens(x), up_FD[None], down_DF[None], _tokens(residual)
    normed, y, _ = relu2_mlp_norm_op(*operands, one(norm_D), eps)
    return _one(normed, x), _one(y, x)


def linear_reference(x: Tensor, weight_OI: Tensor) -> Tensor:
    """`linear` in plain differentiable torch."""
    return functional.linear(x, weight_OI)


def linear_add_norm_reference(
    x: Tensor,
    weight_OI: Tensor,
    residual: Tensor,
    norm_O: Tensor | None = None,
    eps: float = 1e-6,
    norm_bias_O: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`linear_add_norm` in plain differentiable torch."""
    y = residual + functional.linear(x, weight_OI)
    if norm_O is None or norm_bias_O is None:
        return rms_norm_reference(y, norm_O, eps), y
    return layer_norm_reference(y, norm_O, norm_bias_O, eps), y


def linear_relu2_reference(x: Tensor, weight_OI: Tensor) -> Tensor:
    """`linear_relu2` in plain differentiable torch."""
    return functional.linear(x, weight_OI).relu().square()


def relu2_mlp_norm_reference(
    x: Tensor, up_FD: Tensor, down_DF: Tensor, residual: Tensor, norm_D: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """`relu2_mlp_norm` in plain differentiable torch."""
    return linear_add_norm_reference(linear_relu2_reference(x, up_FD), down_DF, residual, norm_D, eps)


@custom_operator("fractal::matmul")
def _matmul_op(
    a: Tensor,
    b: Tensor,
    form: str,
    epilogue: str = "none",
    extra: Tensor | None = None,
    scale_R: Tensor | None = None,
) -> Tensor:
    """`stacked_matmul` as an operator, for the backward passes; shapes as there."""
    return stacked_matmul(a, b, form, epilogue, extra, scale_R)


@_matmul_op.register_fake
def _(a, b, form, epilogue="none", extra=None, scale_R=None):
    m = a.shape[2] if form == "tn" else a.shape[1]
    n = b.shape[1] if form == "nt" else b.shape[2]
    return a.new_empty((a.shape[0], m, n))


def gradients(ctx, dy_RNO: Tensor, x_RNI: Tensor, weight_ROI: Tensor, scale_R=None):
    """dX and dW of y = x W^T, where they are asked for; scale_R multiplies both."""
    dx = _matmul_op(dy_RNO, weight_ROI, "nn", scale_R=scale_R) if ctx.needs_input_grad[0] else None
    dw = _matmul_op(dy_RNO, x_RNI, "tn", scale_R=scale_R) if ctx.needs_input_grad[1] else None
    return dx, dw


@fold_vmap
@custom_operator("fractal::linear")
def linear_op(x_RNI: Tensor, weight_ROI: Tensor) -> Tensor:
    """`linear` of R replicas, y [R, N, O]."""
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
    x_RNI: Tensor,
    weight_ROI: Tensor,
    residual_RNO: Tensor,
    norm_RO: Tensor | None,
    norm_bias_RO: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`linear_add_norm` of R replicas, both results [R, N, O]."""
    y_RNO = stacked_matmul(x_RNI, weight_ROI, "nt", "add", residual_RNO)
    return norm_op(y_RNO, norm_RO, norm_bias_RO, eps), y_RNO


@linear_add_norm_op.register_fake
def _(x_RNI, weight_ROI, residual_RNO, norm_RO, norm_bias_RO, eps):
    y_RNO = torch.empty_like(residual_RNO, memory_format=torch.contiguous_format)
    return torch.empty_like(y_RNO), y_RNO


def _linear_add_norm_save(ctx, inputs, output):
    x_RNI, weight_ROI, _, norm_RO, norm_bias_RO, ctx.eps = inputs
    ctx.centred = norm_bias_RO is not None
    ctx.save_for_backward(x_RNI, weight_ROI, norm_RO, output[1])
    ctx.set_materialize_grads(False)  # the last layer's y goes nowhere: no zeros to read for it


def _linear_add_norm_backward(ctx, dnormed_RNO, dy_RNO):
    x_RNI, weight_ROI, norm_RO, y_RNO = ctx.saved_tensors
    dy_RNO, *dnorm = sum_and_norm_backward(dnormed_RNO, dy_RNO, y_RNO, norm_RO, ctx.centred, ctx.eps)
    return *gradients(ctx, dy_RNO, x_RNI, weight_ROI), dy_RNO, *dnorm, None


linear_add_norm_op.register_autograd(_linear_add_norm_backward, setup_context=_linear_add_norm_save)


@fold_vmap
@custom_operator("fractal::linear_relu2")
def linear_relu2_op(x_RNI: Tensor, weight_ROI: Tensor) -> Tensor:
    """`linear_relu2` of R replicas, y [R, N, O]."""
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
    """`relu2_mlp_norm` of R replicas, [R, N, D] twice, and the hidden units [R, N, F], which the backward reads."""
    hidden_RNF = stacked_matmul(x_RND, up_RFD, "nt", "relu2")
    y_RND = stacked_matmul(hidden_RNF, down_RDF, "nt", "add", residual_RND)
    return norm_op(y_RND, norm_RD, None, eps), y_RND, hidden_RNF


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
    dy_RND, dnorm_RD, _ = sum_and_norm_backward(dnormed_RND, dy_RND, y_RND, norm_RD, False, ctx.eps)
    dh_RNF = _matmul_op(dy_RND, down_RDF, "nn", "relu2_backward", hidden_RNF)
    dx_RND = _matmul_op(dh_RNF, up_RFD, "nn")
    dup_RFD = _matmul_op(dh_RNF, x_RND, "tn")
    ddown_RDF = _matmul_op(dy_RND, hidden_RNF, "tn")
    return dx_RND, dup_RFD, ddown_RDF, dy_RND, dnorm_RD, None


relu2_mlp_norm_op.register_autograd(_relu2_mlp_norm_backward, setup_context=_relu2_mlp_norm_save)
