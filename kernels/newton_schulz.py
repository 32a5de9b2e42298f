"""Muon's orthogonalisation by Newton-Schulz iteration, batched over replicas and layers.

Dimensions: R every leading dimension flattened (replicas, layers), M rows, N columns.
"""

from torch import Tensor

A, B, C = 3.4445, -4.7750, 2.0315


def newton_schulz_reference(matrix: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """In the matrix's dtype; the Gram matrix is that of the shorter side."""
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    norm = x.float().square().sum((-2, -1), keepdim=True).sqrt()
    x = (x / (norm + eps)).to(matrix.dtype)
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = B * gram + C * (gram @ gram)
        x = A * x + polynomial @ x
    return x.mT if tall else x


def newton_schulz(matrix: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """About U V^T of matrix [..., M, N] = U S V^T, in the same shape and dtype.

    Singular values land in about [0.7, 1.2] after 5 steps. Source: Keller Jordan et al., "Muon: An
    optimizer for hidden layers in neural networks" (2024), quintic coefficients (3.4445, -4.7750,
    2.0315).
    """
    return newton_schulz_reference(matrix, steps, eps)
