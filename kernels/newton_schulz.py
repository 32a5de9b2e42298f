"""The polar factor of every matrix of a stack by odd polynomials of degree 5: products only.

A step is x <- a x + (b G + c G^2) x with G the Gram matrix of the shorter side. Started at a spectral norm of at
most 1, some steps bring all singular values near 1.

Dimensions: K matrix of the stack (replicas, layers), M rows, N columns.
"""

from torch import Tensor

from kernels.matmul import stacked_matmul
from kernels.symmetric import symmetric_product

Coefficients = tuple[tuple[float, float, float], ...]

# Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024): steep at 0, and the
# singular values end in about [0.7, 1.2]
QUINTIC: Coefficients = ((3.4445, -4.7750, 2.0315),) * 5

# Amsel et al., "The Polar Express" (2025), arXiv:2505.16932: the best polynomial of each of five steps, with a safety
# factor of 0.02 and a cushion of 2
POLAR_EXPRESS: Coefficients = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def newton_schulz(x_KMN: Tensor, coefficients: Coefficients = QUINTIC) -> Tensor:
    """About U V^T of every matrix U S V^T of spectral norm at most 1, [K, M, N] in its dtype (bf16 or fp32).

    coefficients: (a, b, c) of each step. A matrix's result has the same bits in any stack.
    """
    form = newton_schulz_reference if x_KMN.device.type == "cpu" else newton_schulz_triton
    return form(x_KMN, coefficients)


def newton_schulz_reference(x_KMN: Tensor, coefficients: Coefficients = QUINTIC) -> Tensor:
    """`newton_schulz` in plain torch."""
    tall = x_KMN.shape[-2] > x_KMN.shape[-1]
    x = x_KMN.mT if tall else x_KMN
    for a, b, c in coefficients:
        gram = x @ x.mT
        polynomial = b * gram + c * (gram @ gram)
        x = a * x + polynomial @ x
    return x.mT if tall else x


def newton_schulz_triton(x_KMN: Tensor, coefficients: Coefficients = QUINTIC) -> Tensor:
    """Three stacked products a step, two of them symmetric, on the shorter side's Gram matrix, without transposes."""
    tall = x_KMN.shape[1] > x_KMN.shape[2]
    for a, b, c in coefficients:
        gram = symmetric_product(x_KMN, tall)
        polynomial = symmetric_product(gram, extra=gram, alpha=c, beta=b)
        left, right = (x_KMN, polynomial) if tall else (polynomial, x_KMN)
        x_KMN = stacked_matmul(left, right, "nn", "add", x_KMN, alpha=1.0, beta=a)
    return x_KMN
