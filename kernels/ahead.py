"""Compile every kernel of a step before its first run, on all cores at once.

Triton compiles a kernel when it is first launched, so a step with dozens of them waits for each in turn.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from triton import AsyncCompileMode, knobs
from triton.runtime import driver


def compile_ahead(*steps: Callable[[], object]) -> int:
    """Compile the Triton kernels that `steps` launch, and load them; the number of kernels.

    The steps run once with every launch of a kernel that is not compiled yet left out, and the others made. What
    the missing ones should have filled holds arbitrary bits then: a step must bear that, and take no index from it.
    """
    wanted = {}

    def note(*, fn, compile, **_):
        wanted[fn.name, compile["key"]] = fn.jit_function, compile["specialization_data"]
        return True  # neither compile nor launch

    previous, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, note
    try:
        for step in steps:
            step()
    finally:
        knobs.runtime.jit_cache_hook = previous
    # the compiler waits for its assembler and for the host's C compiler, so threads are enough
    device = torch.cuda.current_device()
    with ThreadPoolExecutor(os.cpu_count(), initializer=torch.cuda.set_device, initargs=(device,)) as pool:
        with AsyncCompileMode(pool):
            compiling = [function.preload(specialization) for function, specialization in wanted.values()]
        kernels = list(pool.map(_build_launcher, compiling))
    loaded = [kernel.run for kernel in kernels]  # the property loads the launcher and the code
    return len(loaded)


def _build_launcher(compiling):
    """The kernel once compiled, its launcher's library on disk.

    The launcher made here is not kept. Triton 3.6 loads every launcher as a Python module of one name, so a thread
    that loads one can exchange the function of another that a second thread has loaded but not yet read.
    """
    kernel = compiling.result()
    driver.active.launcher_cls(kernel.src, kernel.metadata)
    return kernel
