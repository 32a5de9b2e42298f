"""The paper's network for one replica: y^ = phi(X W0 / sqrt(n)) W1 / n, n = 16, 272 parameters, no biases.

Sweeps train it through the fused `kernels.descent`; this form trains through the general stack of vmapped
replicas, and is what the kernel is checked against. N data point, K input, H hidden unit.
"""

import math

import torch
from torch import nn

WIDTH = 16


class MLP(nn.Module):
    """One hidden layer of 16 units on 16 inputs, mean-field scaling.

    Args:
        nonlinearity: tanh (of sqrt(2) z), relu (sqrt(2) times it) or identity.
    """

    def __init__(self, nonlinearity: str = "tanh") -> None:
        super().__init__()
        self.nonlinearity = nonlinearity
        self.w0 = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.w1 = nn.Parameter(torch.randn(WIDTH, 1))

    def forward(self, x_NK: torch.Tensor) -> torch.Tensor:
        """Predictions [N, 1] for inputs [N, 16]."""
        z_NH = x_NK @ self.w0 / math.sqrt(WIDTH)
        if self.nonlinearity == "tanh":
            z_NH = torch.tanh(math.sqrt(2) * z_NH)
        elif self.nonlinearity == "relu":
            z_NH = math.sqrt(2) * torch.relu(z_NH)
        return z_NH @ self.w1 / WIDTH

    def loss(self, x_NK: torch.Tensor, y_N1: torch.Tensor) -> torch.Tensor:
        """Mean squared error, 0-dim."""
        return (self(x_NK) - y_N1).square().mean()
