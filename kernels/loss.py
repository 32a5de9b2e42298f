"""Output layer, soft cap and cross-entropy in one operator, without fp32 logits in memory.

Dimensions: R replica, N tokens, D model width, V vocabulary.

The stacked product writes the logits in the compute dtype; one program a token reads its row twice
(the second time mostly from L2) and, where gradients are wanted, overwrites it with the gradient
of the sum. Backward is then the two products of any linear layer, scaled by the upstream gradient.
"""

import torch
import torch.nn.functional as functional
import triton
import triton.language as tl
from torch import Tensor

from kernels.linear import gradients
from kernels.matmul import stacked_matmul
from kernels.ordered_sum import row_sums
from kernels.stacking import custom_operator, fold_vmap

IGNORED = -100
IN_REGISTERS = 8192  # the longest row that is read once
BLOCK = 4096  # of a longer row
LOG2E = tl.constexpr(1.4426950408889634)


def linear_cross_entropy(
    x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, softcap: float, label_smoothing: Tensor
) -> Tensor:
    """SUM of the cross-entropy (nats) over supervised targets, a 0-dim fp32 tensor.

    x_ND and weight_VD bf16 or fp32; targets_N int64 or int32, -100 ignored; label_smoothing e a
    0-dim fp32 tensor. A target's loss is (1 - e) * nll + e * mean over v of -log p_v. The logits
    x W^T, rounded to the compute dtype, pass through softcap * tanh(logits / softcap) where
    softcap > 0. With no supervised target the loss and its gradients are 0. Under
    `torch.no_grad` no gradient is computed.
    """
    on_cpu = x_ND.device.type == "cpu"
    form = linear_cross_entropy_reference if on_cpu else linear_cross_entropy_triton
    return form(x_ND, weight_VD, targets_N, softcap, label_smoothing)


def linear_cross_entropy_triton(
    x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, softcap: float, label_smoothing: Tensor
) -> Tensor:
    """`linear_cross_entropy` on the Triton kernels whatever the device."""
    loss_1, _ = linear_cross_entropy_op(
        x_ND[None],
        weight_VD[None],
        targets_N[None],
        label_smoothing[None],
        softcap,
        torch.is_grad_enabled(),
    )
    return loss_1.squeeze(0)


def linear_cross_entropy_reference(
    x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, softcap: float, label_smoothing: Tensor
) -> Tensor:
    """`linear_cross_entropy` in plain differentiable torch."""
    return token_losses_reference(x_ND, weight_VD, targets_N, softcap, label_smoothing).sum()


def linear_cross_entropy_by_row(x_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor, softcap: float) -> Tensor:
    """The sum of the cross-entropy (nats) over each row's supervised targets, fp32 [B]; no gradient, no smoothing.

    Otherwise as `linear_cross_entropy`: x_BTD and weight_VD bf16 or fp32, targets_BT int64 or int32.
    """
    on_cpu = x_BTD.device.type == "cpu"
    form = linear_cross_entropy_by_row_reference if on_cpu else linear_cross_entropy_by_row_triton
    return form(x_BTD, weight_VD, targets_BT, softcap)


def linear_cross_entropy_by_row_triton(x_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor, softcap: float) -> Tensor:
    """`linear_cross_entropy_by_row` on the Triton kernels whatever the device."""
    return linear_cross_entropy_by_row_op(x_BTD[None], weight_VD[None], targets_BT[None], softcap).squeeze(0)


def linear_cross_entropy_by_row_reference(
    x_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor, softcap: float
) -> Tensor:
    """`linear_cross_entropy_by_row` in plain torch."""
    x_ND, targets_N = x_BTD.flatten(0, 1), targets_BT.flatten()
    unsmoothed = torch.zeros((), dtype=torch.float32, device=x_BTD.device)
    losses_N = token_losses_reference(x_ND, weight_VD, targets_N, softcap, unsmoothed)
    return losses_N.unflatten(0, targets_BT.shape).sum(-1)


def logits_losses(logits_RNV: Tensor, targets_N: Tensor) -> Tensor:
    """The cross-entropy (nats) of every token under the logits of R replicas, fp32 [R, N]; no gradient.

    logits_RNV fp32, contiguous; targets_N int64 or int32, the same for all replicas, -100 ignored: a loss of 0.
    """
    form = logits_losses_reference if logits_RNV.device.type == "cpu" else logits_losses_triton
    return form(logits_RNV, targets_N)


def logits_losses_triton(logits_RNV: Tensor, targets_N: Tensor) -> Tensor:
    """`logits_losses`, one program a token."""
    replicas, tokens = logits_RNV.shape[:2]
    unsmoothed_R = torch.zeros(replicas, dtype=torch.float32, device=logits_RNV.device)
    targets_RN = targets_N.expand(replicas, tokens)
    return cross_entropy_(logits_RNV, targets_RN, unsmoothed_R, 0.0, False, tokens).view(replicas, tokens)


def logits_losses_reference(logits_RNV: Tensor, targets_N: Tensor) -> Tensor:
    """`logits_losses` in plain torch."""
    index_RN1 = targets_N.clamp(min=0).long()[:, None].expand(len(logits_RNV), -1, 1)
    logprobs_RN = logits_RNV.log_softmax(-1).gather(-1, index_RN1).squeeze(-1)
    return torch.where(targets_N == IGNORED, 0.0, -logprobs_RN)


def token_losses_reference(
    x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, softcap: float, label_smoothing: Tensor
) -> Tensor:
    """Every token's loss [N], 0 where it is not supervised."""
    logits_NV = functional.linear(x_ND, weight_VD)
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    if softcap > 0:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    valid_N = targets_N != IGNORED
    index_N = torch.where(valid_N, targets_N, 0).long()
    target_logit_N = logits_NV.gather(-1, index_N[:, None]).squeeze(-1)
    lse_N = torch.logsumexp(logits_NV, dim=-1)
    smoothed_N = (1 - label_smoothing) * target_logit_N + label_smoothing * logits_NV.mean(-1)
    return torch.where(valid_N, lse_N - smoothed_N, 0.0)


@triton.jit
def _capped(logits, SOFTCAP: tl.constexpr):
    """c tanh(x / c) as c - 2 c / (1 + e^(2 x / c)), by instructions that need no care for special cases."""
    if SOFTCAP > 0:
        root = tl.rsqrt(1 + tl.exp2(logits * (2 * LOG2E / SOFTCAP)))
        return SOFTCAP - (2 * SOFTCAP) * (root * root)
    else:
        return logits


@triton.jit
def _gradient(z, wanted, lse, SOFTCAP: tl.constexpr):
    """With respect to the logit whose capped value is z: its probability less the wanted one, through the cap."""
    gradient = tl.exp2((z - lse) * LOG2E) - wanted
    if SOFTCAP > 0:
        tanh = z * (1 / SOFTCAP)
        gradient *= 1 - tanh * tanh
    return gradient


@triton.jit
def _cross_entropy_kernel(
    logits_ptr, targets_ptr, smoothing_ptr, loss_ptr, tokens, vocabulary, ignored,
    SOFTCAP: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Loss and gradient of one token's row, whole blocks of it where EVEN."""
    # Under a soft cap of at most 40 no exponential of z - SOFTCAP overflows or vanishes in fp32, so
    # that the largest logit need not be found.
    BOUNDED: tl.constexpr = SOFTCAP > 0 and SOFTCAP <= 40
    token = tl.program_id(0).to(tl.int64)  # of all replicas
    smoothing = tl.load(smoothing_ptr + token // tokens)
    target = tl.load(targets_ptr + token).to(tl.int32)
    row_ptr = logits_ptr + token * vocabulary
    v = tl.arange(0, BLOCK)
    if target == ignored:
        tl.store(loss_ptr + token, 0.0)
        if GRADIENT:
            for start in range(0, vocabulary, BLOCK):
                tl.store(row_ptr + start + v, 0.0, mask=start + v < vocabulary)
    else:
        hit = _capped(tl.load(row_ptr + target).to(tl.float32), SOFTCAP)
        others = smoothing / vocabulary  # the wanted probability of any other token
        if ONE_BLOCK:  # the row stays in registers
            inside = EVEN | (v < vocabulary)
            z = _capped(tl.load(row_ptr + v, mask=inside, other=0.0).to(tl.float32), SOFTCAP)
            mean = tl.sum(tl.where(inside, z, 0.0), axis=0) / vocabulary
            peak = SOFTCAP if BOUNDED else tl.max(tl.where(inside, z, -float("inf")), axis=0)
            lse = peak + tl.log(tl.sum(tl.where(inside, tl.exp2((z - peak) * LOG2E), 0.0), axis=0))
            if GRADIENT:
                tl.debug_barrier()  # every thread has read the target's logit
                gradient = _gradient(z, others, lse, SOFTCAP)
                tl.store(row_ptr + v, gradient.to(logits_ptr.dtype.element_ty), mask=inside)
        else:
            peak = tl.full((), SOFTCAP if BOUNDED else -float("inf"), tl.float32)
            exponentials = tl.zeros((BLOCK,), tl.float32)
            total = tl.zeros((BLOCK,), tl.float32)
            for start in range(0, vocabulary, BLOCK):
                inside = EVEN | (start + v < vocabulary)
                z = _capped(tl.load(row_ptr + start + v, mask=inside, other=0.0).to(tl.float32), SOFTCAP)
                total += tl.where(inside, z, 0.0)
                if BOUNDED:
                    exponentials += tl.where(inside, tl.exp2((z - peak) * LOG2E), 0.0)
                else:
                    z = tl.where(inside, z, -float("inf"))
                    higher = tl.maximum(peak, tl.max(z, axis=0))
                    exponentials = exponentials * tl.exp2((peak - higher) * LOG2E) + tl.exp2((z - higher) * LOG2E)
                    peak = higher
            mean = tl.sum(total, axis=0) / vocabulary
            lse = peak + tl.log(tl.sum(exponentials, axis=0))
            if GRADIENT:
                tl.debug_barrier()  # every thread has read the target's logit
                for start in range(0, vocabulary, BLOCK):
                    inside = EVEN | (start + v < vocabulary)
                    z = _capped(tl.load(row_ptr + start + v, mask=inside, other=0.0).to(tl.float32), SOFTCAP)
                    gradient = _gradient(z, others, lse, SOFTCAP)
                    tl.store(row_ptr + start + v, gradient.to(logits_ptr.dtype.element_ty), mask=inside)
        if GRADIENT:
            tl.debug_barrier()  # the target's own comes last
            tl.store(
                row_ptr + target, _gradient(hit, others + (1 - smoothing), lse, SOFTCAP).to(logits_ptr.dtype.element_ty)
            )
        tl.store(loss_ptr + token, lse - ((1 - smoothing) * hit + smoothing * mean))


def cross_entropy_(
    logits_RNV: Tensor, targets_RN: Tensor, smoothing_R: Tensor, softcap: float, gradient: bool, rows: int = 1
) -> Tensor:
    """Loss sums [R * rows], each over a row of N / rows tokens.

    logits_RNV, contiguous, becomes the sums' gradient where `gradient`.
    """
    replicas, tokens, vocabulary = logits_RNV.shape
    loss_RN = torch.empty((replicas, tokens), dtype=torch.float32, device=logits_RNV.device)
    one_block = vocabulary <= IN_REGISTERS
    block = triton.next_power_of_2(vocabulary) if one_block else BLOCK
    _cross_entropy_kernel[(replicas * tokens,)](
        logits_RNV, targets_RN.contiguous(), smoothing_R.contiguous(), loss_RN, tokens, vocabulary,
        IGNORED, SOFTCAP=softcap, GRADIENT=gradient, BLOCK=block, ONE_BLOCK=one_block, EVEN=vocabulary % block == 0,
        num_warps=max(1, min(block // 512, 8)),
    )  # fmt: skip
    return row_sums(loss_RN.view(replicas * rows, -1))


@fold_vmap
@custom_operator("fractal::linear_cross_entropy_by_row")
def linear_cross_entropy_by_row_op(x_RBTD: Tensor, weight_RVD: Tensor, targets_RBT: Tensor, softcap: float) -> Tensor:
    """Loss sums [R, B]."""
    replicas, rows = targets_RBT.shape[:2]
    logits_RNV = stacked_matmul(x_RBTD.flatten(1, 2), weight_RVD, "nt")
    smoothing_R = torch.zeros(replicas, dtype=torch.float32, device=x_RBTD.device)
    sums = cross_entropy_(logits_RNV, targets_RBT.flatten(1, 2), smoothing_R, softcap, False, rows)
    return sums.unflatten(0, (replicas, rows))


@linear_cross_entropy_by_row_op.register_fake
def _(x_RBTD, weight_RVD, targets_RBT, softcap):
    return x_RBTD.new_empty(targets_RBT.shape[:2], dtype=torch.float32)


@fold_vmap
@custom_operator("fractal::linear_cross_entropy")
def linear_cross_entropy_op(
    x_RND: Tensor,
    weight_RVD: Tensor,
    targets_RN: Tensor,
    smoothing_R: Tensor,
    softcap: float,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Loss sums [R] and the gradient of each with respect to its logits ([R, 0, 0] if unasked)."""
    logits_RNV = stacked_matmul(x_RND, weight_RVD, "nt")
    loss_R = cross_entropy_(logits_RNV, targets_RN, smoothing_R, softcap, gradient)
    return loss_R, logits_RNV if gradient else logits_RNV.new_empty((logits_RNV.shape[0], 0, 0))


@linear_cross_entropy_op.register_fake
def _(x_RND, weight_RVD, targets_RN, smoothing_R, softcap, gradient):
    replicas = x_RND.shape[0]
    sides = (x_RND.shape[1], weight_RVD.shape[1]) if gradient else (0, 0)
    return smoothing_R.new_empty(replicas), x_RND.new_empty((replicas, *sides))


def _linear_cross_entropy_save(ctx, inputs, output):
    ctx.save_for_backward(output[1], inputs[0], inputs[1])
    ctx.set_materialize_grads(False)  # nothing flows back into the second result: make no zeros for it


def _linear_cross_entropy_backward(ctx, upstream_R, _):
    return *gradients(ctx, *ctx.saved_tensors, scale_R=upstream_R), None, None, None, None


linear_cross_entropy_op.register_autograd(_linear_cross_entropy_backward, setup_context=_linear_cross_entropy_save)
