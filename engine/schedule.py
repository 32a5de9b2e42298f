"""Learning-rate schedules as functions of device tensors: every replica is at its own step.

Sources: cosine, Loshchilov & Hutter 2017 (arXiv:1608.03983); wsd, Hu et al. 2024 (arXiv:2404.06395).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

SLACK = 1 - 1e-9  # absorbs float error: 0.07 * 100 is 7.000000000000001


@dataclass(frozen=True)
class Schedule:
    """How the learning rate falls after its warm-up.

    multiplier: (step_R, total_R, warm_R, hyper_R), float64 [R] each: the step about to be taken, counted from 0;
    steps of the whole run; those of them that warm up; and the hyper-parameters named in `hyper`. Returns what the
    peak is multiplied by, float64 [R].
    """

    help: str
    multiplier: "Callable[[Tensor, Tensor, Tensor, Mapping[str, Tensor]], Tensor]"
    hyper: tuple[str, ...] = ()
    needs_horizon: bool = True
    """whether a step's rate depends on how many steps are still to come"""


def constant(step_R: "Tensor", total_R: "Tensor", warm_R: "Tensor", hyper_R: "Mapping[str, Tensor]") -> "Tensor":
    """1 at every step."""
    import torch

    return torch.ones_like(step_R)


def cosine(step_R: "Tensor", total_R: "Tensor", warm_R: "Tensor", hyper_R: "Mapping[str, Tensor]") -> "Tensor":
    """Half a cosine from 1 to `floor`."""
    import torch

    floor_R = hyper_R["floor"]
    return floor_R + (1 - floor_R) * 0.5 * (1 + torch.cos(torch.pi * behind(step_R, total_R, warm_R)))


def wsd(step_R: "Tensor", total_R: "Tensor", warm_R: "Tensor", hyper_R: "Mapping[str, Tensor]") -> "Tensor":
    """1, then linearly to `floor` over the last share `decay` of the steps."""
    left_R = (total_R - step_R) / (hyper_R["decay"] * total_R).clamp(min=1)
    return hyper_R["floor"] + (1 - hyper_R["floor"]) * left_R.clamp(0, 1)


def linear(step_R: "Tensor", total_R: "Tensor", warm_R: "Tensor", hyper_R: "Mapping[str, Tensor]") -> "Tensor":
    """Linearly from 1 to 0."""
    return 1 - behind(step_R, total_R, warm_R)


def behind(step_R: "Tensor", total_R: "Tensor", warm_R: "Tensor") -> "Tensor":
    """Share of the steps after warm-up that lie behind: 0 at the first, just below 1 at the last."""
    return ((step_R - warm_R) / (total_R - warm_R).clamp(min=1)).clamp(0, 1)


SCHEDULES: dict[str, Schedule] = {
    "constant": Schedule("the peak throughout", constant, needs_horizon=False),
    "cosine": Schedule("half a cosine down to floor", cosine, ("floor",)),
    "wsd": Schedule("warm-up, stable, decay: linearly to floor over the last steps", wsd, ("decay", "floor")),
    "linear": Schedule("linearly to zero", linear),
}


def multiplier(schedule: str, step_R: "Tensor", total_R: "Tensor", hyper_R: "Mapping[str, Tensor]") -> "Tensor":
    """What the peak learning rate is multiplied by at a step, float64 [R].

    Args:
        schedule: a name of SCHEDULES.
        step_R: the step about to be taken, counted from 0, int64 [R].
        total_R: steps of the whole run, int64 [R].
        hyper_R: float64 [R] each: `warmup`, the share of the steps spent rising linearly from peak / warm-up steps
            to the peak, and what the schedule itself reads.
    """
    import torch

    step_R, total_R = step_R.double(), total_R.double()
    warm_R = torch.ceil(hyper_R["warmup"] * total_R * SLACK)
    rise_R = torch.where(step_R < warm_R, (step_R + 1) / warm_R.clamp(min=1), 1.0)
    fall_R = SCHEDULES[schedule].multiplier(step_R, total_R, warm_R, hyper_R)
    return torch.where(step_R < warm_R, rise_R, fall_R)
