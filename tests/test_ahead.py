"""Compiling ahead: on a driver that pretends to be a GPU, with Triton's real compiler, in a process of its own."""

import os
import subprocess
import sys

SCRIPT = """
import threading

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver


class Pretender:
    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, source, metadata):
        assert threading.current_thread() is not threading.main_thread()
        built.add(metadata.name)


driver.set_active(Pretender())
torch.cuda.current_device = lambda: 0
torch.cuda.set_device = lambda device: None
built, loaded, launched = set(), set(), []


def load(kernel):
    assert threading.current_thread() is threading.main_thread(), "Triton 3.6 mixes launchers that threads load"
    assert kernel.name in built
    loaded.add(kernel.name)
    kernel._run = lambda *arguments: launched.append(kernel.name)


CompiledKernel._init_handles = load

from kernels.activation import _relu2
from kernels.ahead import compile_ahead
from kernels.digest import digest_triton


def step():
    _relu2(torch.ones(1, 40))
    for width in (16, 48):  # the same compiled kernel, and whichever widths and types need their own
        digest_triton(torch.ones(2, width), None, torch.arange(2))
    digest_triton(torch.ones(2, 48).bfloat16(), torch.ones(2, 48).short(), torch.arange(2))


count = compile_ahead(step)
print("ahead:", count, sorted(loaded), launched)
missed = []
triton.knobs.runtime.jit_cache_hook = lambda **call: missed.append(call["repr"])
step()
print("after:", launched, missed)
assert compile_ahead(step) == 0
"""


def test_what_is_compiled_ahead_is_what_a_launch_looks_up(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    ahead, after = done.stdout.splitlines()
    assert ahead == "ahead: 3 ['_digest_kernel', '_relu2_kernel'] []", "nothing is launched before all are compiled"
    assert after == f"after: {['_relu2_kernel', *['_digest_kernel'] * 3]} []", "nothing is compiled at its launch"
