"""Gradient descent of the paper's network: every cell's whole training run at once, on a GPU or a CPU.

R cell (one training run), Q problem, N data point, K network input (16), H hidden unit (16), S step,
B point of a minibatch, P flat parameters (272: W0 row by row, then W1).

Early exit. When a step leaves every weight of a cell as it was (bit for bit, or NaN as before), the full
batch step, a function of the weights alone, has reached a fixed point: all later losses equal this
one and the weights stay. With minibatches the step also depends on the draw; there a cell is settled when all
its weights are NaN, which no update undoes. A program whose cells are all settled skips the data
points of its remaining steps and repeats the loss; all outputs are those of the full loop. A non-finite loss
alone settles nothing: a squared error may overflow and come back.
"""

import torch
from torch import Tensor

from kernels.descent_triton import descend_triton
from kernels.two_layer import DTYPES, WIDTH, Descent


def descend(
    x_QNK: Tensor,
    y_QN: Tensor,
    w0_QKH: Tensor,
    w1_QH: Tensor,
    lr0_R: Tensor,
    lr1_R: Tensor,
    offset_R: Tensor,
    problem_R: Tensor,
    *,
    steps: int,
    nonlinearity: str = "tanh",
    precision: str = "fp32",
    minibatch_QSB: Tensor | None = None,
    offset_every_step: bool = False,
    keep_losses: bool = False,
    keep_weights: bool = False,
) -> Descent:
    """Train every cell for `steps` steps.

    Args:
        x_QNK, y_QN: inputs and targets of each problem, float32 or (fp64) float64.
        w0_QKH, w1_QH: initial weights of each problem.
        lr0_R, lr1_R: learning rate of each layer, one a cell, in the same dtype.
        offset_R: constant added to W0 before the first step, or with `offset_every_step` before each.
        problem_R: int32 index of each cell's problem.
        nonlinearity: tanh, relu or identity.
        precision: fp32 (IEEE), tf32x3 (matrix products on tensor cores, three TF32 products each; plain
            fp32 on a CPU) or fp64.
        minibatch_QSB: int32 data points of each step's gradient; None: all of them. The loss is
            measured on all of them either way.

    A cell's bits depend on nothing but the cell (see the heads of `kernels.descent_triton` and `kernels.descent_cpu`).
    """
    dtype = DTYPES[precision]
    for tensor in (x_QNK, y_QN, w0_QKH, w1_QH, lr0_R, lr1_R, offset_R):
        assert tensor.dtype == dtype, (tensor.dtype, precision)
        assert tensor.is_contiguous()
    assert w0_QKH.shape[1:] == (WIDTH, WIDTH), w0_QKH.shape
    assert x_QNK.shape[2] == w1_QH.shape[1] == WIDTH, (x_QNK.shape, w1_QH.shape)
    assert problem_R.dtype == torch.int32
    assert minibatch_QSB is None or minibatch_QSB.shape[1] >= steps
    problem = (x_QNK, y_QN, w0_QKH, w1_QH, lr0_R, lr1_R, offset_R, problem_R, steps, nonlinearity)
    options = (minibatch_QSB, offset_every_step, keep_losses, keep_weights)
    if x_QNK.device.type == "cpu":
        from kernels.descent_cpu import descend_cpu  # half a second, which sweeps of language models need not wait for

        return descend_cpu(*problem, *options)
    return descend_triton(*problem, *options, precision=precision)
