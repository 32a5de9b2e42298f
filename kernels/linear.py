"""Linear layers of a stack of replicas: one replica's function, its reference, the stacked kernel.

Dimensions: R replica, N tokens (every leading dimension flattened), I input width, O output width,
F MLP width, D model width.
"""

import torch.nn.functional as functional
from torch import Tensor


def linear_reference(x: Tensor, weight_OI: Tensor) -> Tensor:
    return functional.linear(x, weight_OI)


def linear_relu2_reference(x: Tensor, weight_OI: Tensor) -> Tensor:
    return functional.linear(x, weight_OI).relu().square()


def linear_add_reference(x: Tensor, weight_OI: Tensor, residual: Tensor) -> Tensor:
    return residual + functional.linear(x, weight_OI)


def relu2_mlp_reference(x: Tensor, up_FD: Tensor, down_DF: Tensor, residual: Tensor) -> Tensor:
    return residual + functional.linear(linear_relu2_reference(x, up_FD), down_DF)


def linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    """x [..., I] times weight_OI transposed -> [..., O], in their common dtype."""
    return linear_reference(x, weight_OI)


def linear_relu2(x: Tensor, weight_OI: Tensor) -> Tensor:
    """relu(x W^T)^2: x [..., I], weight_OI -> [..., O]."""
    return linear_relu2_reference(x, weight_OI)


def linear_add(x: Tensor, weight_OI: Tensor, residual: Tensor) -> Tensor:
    """residual + x W^T: x [..., I], weight_OI, residual [..., O] -> [..., O]."""
    return linear_add_reference(x, weight_OI, residual)


def relu2_mlp(x: Tensor, up_FD: Tensor, down_DF: Tensor, residual: Tensor) -> Tensor:
    """residual + relu(x up^T)^2 down^T, a ReLU-squared MLP without elementwise passes."""
    return relu2_mlp_reference(x, up_FD, down_DF, residual)
