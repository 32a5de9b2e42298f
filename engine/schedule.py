"""Learning-rate schedules as functions of device tensors: every replica is at its own step."""

import torch
from torch import Tensor


def factor(schedule: str, step_R: Tensor, total_R: Tensor, warmup_R: Tensor, decay: float, floor: float) -> Tensor:
    """What the peak learning rate is multiplied by at a step.

    Args:
        schedule: constant, cosine, wsd (warm-up, stable, decay) or linear (to zero).
        step_R: the step about to be taken, counted from 0, int64 [R].
        total_R: steps of the whole run, int64 [R].
        warmup_R: share of the steps spent rising linearly from peak / warm-up steps to peak, float64 [R].
        decay: wsd: share of the steps spent falling linearly from the peak to the floor.
        floor: cosine and wsd: factor at the end of the run.

    Returns:
        float64 [R]. Sources: cosine, Loshchilov & Hutter 2017 (arXiv:1608.03983); wsd, Hu et al. 2024
        (arXiv:2404.06395).
    """
    step_R, total_R = step_R.double(), total_R.double()
    warm_R = torch.ceil(warmup_R * total_R * (1 - 1e-9))  # 0.07 * 100 is 7.000000000000001
    rise_R = torch.where(step_R < warm_R, (step_R + 1) / warm_R.clamp(min=1), 1.0)
    if schedule == "constant":
        return rise_R
    # share of the steps after warm-up that lie behind: 0 at the first, just below 1 at the last
    behind_R = ((step_R - warm_R) / (total_R - warm_R).clamp(min=1)).clamp(0, 1)
    if schedule == "cosine":
        fall_R = floor + (1 - floor) * 0.5 * (1 + torch.cos(torch.pi * behind_R))
    elif schedule == "wsd":
        left_R = (total_R - step_R) / (decay * total_R).clamp(min=1)
        fall_R = floor + (1 - floor) * left_R.clamp(0, 1)
    else:
        assert schedule == "linear", schedule
        fall_R = 1 - behind_R
    return torch.where(step_R < warm_R, rise_R, fall_R)
