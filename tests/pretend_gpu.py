"""A driver that pretends to be an H100, in a process of its own: Triton compiles for it, nothing is launched."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver

SHARED_MEMORY = 232448  # bytes a program may have on an H100

built: set[str] = set()  # names of the kernels whose launcher was built
loaded: list[CompiledKernel] = []
launched: list[str] = []  # names, in order


class Pretender:
    """What Triton asks a driver while it compiles."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, source, metadata):
        assert threading.current_thread() is not threading.main_thread()
        built.add(metadata.name)


def load(kernel: CompiledKernel) -> None:
    """In place of loading a kernel's code onto a GPU."""
    assert threading.current_thread() is threading.main_thread(), "Triton 3.6 mixes launchers that threads load"
    assert kernel.name in built
    loaded.append(kernel)
    kernel._run = lambda *arguments: launched.append(kernel.name)


def install() -> None:
    """Put it in place, before kernels are imported."""
    driver.set_active(Pretender())
    CompiledKernel._init_handles = load
    torch.cuda.current_device = lambda: 0
    torch.cuda.set_device = lambda device: None
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=132)


def run(test: str, function: str, cache: Path, *arguments: str) -> str:
    """What a function of a test file prints in a process that pretends; any warning there is an error."""
    code = f"import sys, pretend_gpu; pretend_gpu.install(); import {test}; {test}.{function}(*sys.argv[1:])"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-W", "error", "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout
