"""The activations of the two MLPs: SwiGLU on a fused gate/up projection, and squared ReLU.

R replica, N rows of one replica (all leading dimensions), F MLP width.
"""

import torch
import torch.nn.functional as F


def swiglu(gate_up):
    """silu(gate) * up of a fused projection (Shazeer 2020, arXiv:2002.05202).

    gate_up: [..., 2 F], the gate in the first F channels. Returns [..., F] in the same dtype;
    float32 inside.
    """
    return swiglu_reference(gate_up)


def relu2(x):
    """max(x, 0)^2 (So et al. 2021, arXiv:2109.08668). x: any shape; same shape and dtype back."""
    return relu2_reference(x)


def swiglu_reference(gate_up):
    """`swiglu` in plain differentiable torch."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def relu2_reference(x):
    """`relu2` in plain differentiable torch."""
    return F.relu(x).square()
