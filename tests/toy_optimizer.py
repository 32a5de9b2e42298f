"""An added optimizer: Signum (Bernstein et al. 2018, arXiv:1802.04434). Mirrors engine/optim.py."""

from math import prod

import torch

from engine.optim import Optimizer

MIRRORS = ("engine/optim.py",)


def update(parameters, step) -> None:
    """m = beta1 m + (1 - beta1) g;  p = p (1 - lr wd) - lr sign(m)."""
    lr, decay, beta1 = (step.hyper_R[name][:, None] for name in ("lr", "weight_decay", "beta1"))
    for parameter in parameters:
        momentum = parameter.state["momentum"]
        moved = beta1 * momentum + (1 - beta1) * step.gradient(parameter.gradient_Rn)
        parameter.write(parameter.master() * (1 - lr * decay) - lr * torch.sign(moved), step)
        momentum.copy_(torch.where(step.active_R[:, None], moved, momentum))


SIGNUM = Optimizer(
    "the sign of a momentum",
    ("lr", "weight_decay", "beta1"),
    lambda shape, rows: {"momentum": prod(shape)},
    update,
)
