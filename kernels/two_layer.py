"""The paper's two-layer network: its sizes, what one training run of it leaves behind, and how that is computed.

R cell (one training run), S step, P flat parameters (272: W0 row by row, then W1).

The network is y^ = phi(X W0 / sqrt(n)) W1 / n with n = 16, phi(z) = tanh(sqrt(2) z), sqrt(2) relu(z)
or z, mean squared error and plain gradient descent with one constant learning rate a layer
(Sohl-Dickstein 2024, "The boundary of neural network trainability is fractal", arXiv:2402.06184).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.digest import digest_reference, mix

WIDTH = 16  # inputs and hidden units
PARAMETERS = WIDTH * WIDTH + WIDTH
TAIL = 20  # steps at the end over which the convergence measure and last_loss average
CAP = 1e6  # a loss ratio above this, or not finite, counts as this
SLOPE = 2.0**0.5 / 4  # sqrt(2) / sqrt(n)
DTYPES = {"fp32": torch.float32, "tf32x3": torch.float32, "fp64": torch.float64}


class Descent(NamedTuple):
    """What a training run leaves behind, one entry a cell.

    v_s = loss_s / loss_0, where loss_s is the full-batch loss at the weights before update s (so v_0 = 1);
    v_s that is not finite or above 1e6 counts as 1e6. `measure` is -sum(v) if the mean of the last 20 v is
    below 1 (converged) and +sum(1/v) otherwise.
    """

    measure_R: Tensor  # float64, converged cells negative
    first_loss_R: Tensor  # float64, loss before any update
    last_loss_R: Tensor  # float64, mean of the last 20 losses (of all, if fewer)
    nonfinite_step_R: Tensor  # int32, first step whose loss is not finite; -1 if none
    weights_digest_R: Tensor  # int64, order-independent digest of the final weights (see `digest`)
    losses_RS: Tensor | None  # float32, every step's loss, where asked for
    weights_RP: Tensor | None  # final weights, where asked for


def digest(weights_RP: Tensor) -> Tensor:
    """64-bit digest of each row of float32 or float64 weights, as the kernels compute it. [R, P] -> int64 [R].

    float32: `kernels.digest`. float64: the 64 bits are mixed once, the index is added and the sum mixed
    again. The mixed elements are added modulo 2^64, so no order matters; all NaNs count as one.
    """
    if weights_RP.dtype == torch.float32:
        return digest_reference(weights_RP, None, torch.arange(len(weights_RP), device=weights_RP.device))
    bits_RP = weights_RP.contiguous().view(torch.int64).masked_fill(weights_RP.isnan(), 0x7FF8 << 48)
    return mix(mix(bits_RP) + torch.arange(weights_RP.shape[1], device=weights_RP.device)).sum(1)


def measure(losses_RS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Convergence measure (see `Descent`), mean of the last 20 losses and first non-finite step of each row.

    [R, S] -> float64 [R], float64 [R], int32 [R].
    """
    losses_RS = losses_RS.double()
    ratio_RS = losses_RS / losses_RS[:, :1]
    v_RS = torch.where(ratio_RS <= CAP, ratio_RS, CAP)  # NaN fails the test too
    converged_R = v_RS[:, -TAIL:].mean(1) < 1
    measure_R = torch.where(converged_R, -v_RS.sum(1), (1 / v_RS).sum(1))
    nonfinite_RS = ~losses_RS.isfinite()
    step_R = torch.where(nonfinite_RS.any(1), nonfinite_RS.int().argmax(1), -1)
    return measure_R, losses_RS[:, -TAIL:].mean(1), step_R.int()
