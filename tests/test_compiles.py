"""Every kernel of a training step compiles for an H100 and fits its shared memory, on a machine without one.

The step runs on the CPU with Triton's operators in place of their references, on a driver that pretends to be a GPU:
launches are noted and left out, as `compile_ahead` does it, and the noted kernels go through Triton's real compiler.
"""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import sys
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver

SHARED_MEMORY = 232448  # bytes a program may have on an H100


class Pretender:
    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, source, metadata):
        pass


driver.set_active(Pretender())
torch.cuda.current_device = lambda: 0
torch.cuda.set_device = lambda device: None
torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=132)
compiled = {}


def load(kernel):
    compiled.setdefault(kernel.name, []).append(kernel.metadata.shared)
    kernel._run = lambda *arguments: None


CompiledKernel._init_handles = load

for name in ("activation", "attention", "digest", "embedding", "linear", "loss", "norm"):
    module = import_module("kernels." + name)
    for operator in [n.removesuffix("_triton") for n in vars(module) if n.endswith("_triton")]:
        setattr(module, operator + "_reference", getattr(module, operator + "_triton"))

from benchmarks.random_runs import gpt_config, random_corpus
from engine import optim, trainer
from engine.models import llama
from engine.network import describe, load_network
from engine.tokenizer import ByteTokenizer
from kernels import adamw
from kernels.ahead import compile_ahead

optim.adamw_ = optim.adamw_split_ = adamw.launch_adamw_
trainer.global_norm, trainer.accumulate_ = adamw.launch_global_norm, adamw.launch_accumulate_

kind = sys.argv[1]
cpu = torch.device("cpu")
config = gpt_config(2, 4096, "fp32" if kind == "gpt, fp32, clipped, accumulated" else "bf16")
if config.precision == "fp32":
    config = replace(config, clip=1.0, batch=16, micro_batch=8)
network = load_network(config, cpu)
if kind == "llama":
    shape = llama.LlamaConfig(2, 576, 9, 3, 1536, config.context, 4096)
    with torch.device("meta"):
        module = llama.Llama(shape, cpu)
    network = describe(module, llama, shape, lambda seed: llama.initial_weights(shape, seed), ByteTokenizer())
made = trainer.Trainer(config, network, random_corpus(config, network.vocabulary), 2, cpu, 16)
count = compile_ahead(made.micro_step, made.evaluate_piece, lambda: made.stack.digest(torch.tensor([1])))
assert count == sum(map(len, compiled.values()))
too_large = {name: shared for name, shared in compiled.items() if max(shared) > SHARED_MEMORY}
assert not too_large, too_large
print(*sorted(compiled), sep="\\n")
"""

ALL = {"_forward_kernel", "_backward_kernel", "_digest_kernel", "_gather_kernel", "_order_kernel", "_add_rows_kernel"}
ALL |= {"adamw_kernel", "cross_entropy_kernel", "stacked_matmul_kernel", "sum_kernel"}
KINDS = {
    "gpt": {"_backward_head_kernel"},
    "gpt, fp32, clipped, accumulated": {"squares_kernel", "root_of_sum_kernel", "accumulate_kernel"},
    "llama": set(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kernel_of_a_step_compiles_for_an_h100(tmp_path, kind):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-W", "error", "-c", SCRIPT, kind]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) >= ALL | KINDS[kind]
