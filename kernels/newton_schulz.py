"""Muon's orthogonalisation by Newton-Schulz iteration, batched over replicas and layers.

Dimensions: R every leading dimension flattened (replicas, layers), M rows, N columns.
"""

from torch import Tensor

from kernels.gradient_norm import global_norm_triton
from kernels.matmul import stacked_matmul

A, B, C = 3.4445, -4.7750, 2.0315


def newton_schulz(matrix: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """About U V^T of matrix [..., M, N] = U S V^T, in the same shape and dtype (bf16 or fp32).

    Singular values land in about [0.7, 1.2] after 5 steps. A matrix's result has the same bits in
    any batch. Source: Keller Jordan et al., "Muon: An optimizer for hidden layers in neural
    networks" (2024), quintic coefficients (3.4445, -4.7750, 2.0315).
    """
    form = newton_schulz_reference if matrix.device.type == "cpu" else newton_schulz_triton
    return form(matrix, steps, eps)


def newton_schulz_reference(matrix: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """`newton_schulz` in plain differentiable torch."""
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    norm = x.float().square().sum((-2, -1), keepdim=True).sqrt()
    x = (x / (norm + eps)).to(matrix.dtype)
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = B * gram + C * (gram @ gram)
        x = A * x + polynomial @ x
    return x.mT if tall else x


def newton_schulz_triton(matrix: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """Three stacked products a step, on the shorter side's Gram matrix, without transposes."""
    matrix_RMN = matrix.reshape(-1, *matrix.shape[-2:])
    rows, columns = matrix_RMN.shape[1:]
    norm_R = global_norm_triton([matrix_RMN.flatten(1)])
    x_RMN = (matrix_RMN / (norm_R + eps)[:, None, None]).to(matrix_RMN.dtype)
    for _ in range(steps):
        gram = stacked_matmul(x_RMN, x_RMN, "tn" if rows > columns else "nt")
        polynomial = stacked_matmul(gram, gram, "nn", "add", gram, alpha=C, beta=B)
        left, right = (x_RMN, polynomial) if rows > columns else (polynomial, x_RMN)
        x_RMN = stacked_matmul(left, right, "nn", "add", x_RMN, alpha=1.0, beta=A)
    return x_RMN.view(matrix.shape)
