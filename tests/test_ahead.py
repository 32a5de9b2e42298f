"""Compiling ahead, on a driver that pretends to be a GPU, with Triton's real compiler."""

import pretend_gpu
import torch
import triton

from kernels.activation import relu2_op
from kernels.ahead import compile_ahead
from kernels.digest import digest_triton


def small_step():
    relu2_op(torch.ones(1, 40))
    for width in (16, 48):  # the same compiled kernel, and whichever widths and types need their own
        digest_triton(torch.ones(2, width), None, torch.arange(2))
    digest_triton(torch.ones(2, 48).bfloat16(), torch.ones(2, 48).short(), torch.arange(2))


def in_a_process():
    assert compile_ahead(small_step) == len(pretend_gpu.loaded) == 3
    assert not pretend_gpu.launched, "nothing is launched before all are compiled"
    missed = []
    triton.knobs.runtime.jit_cache_hook = lambda **call: missed.append(call["repr"])
    small_step()
    assert pretend_gpu.launched == ["_relu2_kernel", *["_digest_kernel"] * 3]
    assert not missed, "nothing is compiled at its launch"
    assert compile_ahead(small_step) == 0
    print("done")


def test_what_is_compiled_ahead_is_what_a_launch_looks_up(tmp_path):
    assert pretend_gpu.run("test_ahead", "in_a_process", tmp_path) == "done\n"
