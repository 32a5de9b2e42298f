"""RMS norm, alone or fused with the residual addition before it, with or without a weight.

R replica, N rows of one replica (all leading dimensions), D width.
"""

import torch


def rms_norm(x, weight=None, eps=1e-6):
    """x / sqrt(mean(x^2) + eps) over the last dimension, times `weight` where given.

    x: [..., D]; weight: [D] or None. Returns [..., D] in the dtype of x; float32 inside.
    """
    return rms_norm_reference(x, weight, eps)


def add_rms_norm(x, residual, weight=None, eps=1e-6):
    """(rms_norm(x + residual), x + residual): the residual stream is updated and read in one pass.

    x, residual: [..., D]; weight: [D] or None. The sum is rounded to the dtype of x before it is
    normed, so that the norm reads what the residual stream keeps.
    """
    return add_rms_norm_reference(x, residual, weight, eps)


def rms_norm_reference(x, weight=None, eps=1e-6):
    """`rms_norm` in plain differentiable torch."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        normed = normed * weight
    return normed.to(x.dtype)


def add_rms_norm_reference(x, residual, weight=None, eps=1e-6):
    """`add_rms_norm` in plain differentiable torch."""
    total = x + residual
    return rms_norm_reference(total, weight, eps), total
