"""An added optimizer: Lion's rule (Chen et al. 2023, arXiv:2302.06675). Mirrors engine/optim.py."""

from math import prod

import torch

from engine.optim import Optimizer

MIRRORS = ("engine/optim.py",)


def update(parameter, gradient_Rn, state, step) -> None:
    """p = p (1 - lr wd) - lr sign(beta1 m + (1 - beta1) g);  m = beta2 m + (1 - beta2) g."""
    lr, decay, beta1, beta2 = (step.hyper_R[name][:, None] for name in ("lr", "weight_decay", "beta1", "beta2"))
    gradient, momentum = step.gradient(gradient_Rn), state["momentum"]
    direction = torch.sign(beta1 * momentum + (1 - beta1) * gradient)
    parameter.write(parameter.master() * (1 - lr * decay) - lr * direction, step)
    moved = beta2 * momentum + (1 - beta2) * gradient
    momentum.copy_(torch.where(step.active_R[:, None], moved, momentum))


LION = Optimizer(
    "the sign of a momentum",
    ("lr", "weight_decay", "beta1", "beta2"),
    lambda shape: {"momentum": prod(shape)},
    update,
)
