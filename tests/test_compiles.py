"""Every kernel of a training step, and every tuned product, compiles for an H100 and fits its shared memory.

All on a machine without one: the step runs on the CPU, with Triton's operators in place of their references, on a
driver that pretends to be a GPU. Launches are noted and left out, as `compile_ahead` does it, and the noted kernels go
through Triton's real compiler.
"""

from functools import partial
from importlib import import_module
from itertools import product

import pretend_gpu
import pytest
import torch

from benchmarks.random_runs import gpt_run, network_of, random_corpus
from benchmarks.tune import problems
from engine import step
from engine.checkpoint.model import make_module
from engine.config import resolve
from engine.evaluate import WHOLE_STACK
from engine.models import llama
from engine.network import describe
from engine.tokenizer import ByteTokenizer
from kernels import adamw, muon
from kernels.accumulate import accumulate_triton_
from kernels.activation import bias_gelu_backward_op, bias_gelu_op
from kernels.adamw import adamw_triton_
from kernels.ahead import compile_ahead
from kernels.attention import attention_backward_op, attention_op
from kernels.dropout import dropout_op
from kernels.gradient_norm import global_norm_triton
from kernels.matmul import stacked_matmul
from kernels.momentum import MomentumScalars, momentum_step_triton_
from kernels.newton_schulz import newton_schulz_triton
from kernels.norm import add_norm_op, norm_backward_op
from kernels.ordered_sum import column_sums_op
from kernels.scaled_sum import scaled_sum_backward_op, scaled_sum_op
from kernels.split_master import NAN_BITS
from kernels.tiles import TUNED, tile_key

EVERY = {"_norm_forward_kernel", "_norm_backward_kernel", "_digest_kernel"}
EVERY |= {"_gather_kernel", "_order_kernel", "_add_rows_kernel"}
EVERY |= {"_adamw_kernel", "_cross_entropy_kernel", "_stacked_matmul_kernel", "_sum_kernel"}
KINDS = {
    "gpt": {"_attention_forward_kernel", "_attention_backward_head_kernel"},
    "gpt in fp32, clipped, accumulated": {"_squares_kernel", "_root_of_sum_kernel", "_accumulate_kernel"},
    "llama": {"_swiglu_kernel", "_attention_forward_kernel", "_attention_backward_kernel"},
}
# T, heads, kv heads, head dim
LONG_CONTEXTS = [
    (4096, 12, 12, 64),
    (2048, 16, 8, 128),
    (1000, 4, 4, 20),  # heads that are no whole 16-byte units
]
LONG_KERNELS = {"_attention_turn_kernel", "_attention_blocks_forward_kernel"}
LONG_KERNELS |= {"_attention_blocks_queries_kernel", "_attention_blocks_keys_kernel"}


def use_kernels():
    """Operators by their kernels on the CPU too."""
    names = ("activation", "attention", "digest", "embedding", "linear", "loss", "norm", "ordered_sum", "scaled_sum")
    for name in names:
        module = import_module(f"kernels.{name}")
        for operator in [name.removesuffix("_triton") for name in vars(module) if name.endswith("_triton")]:
            setattr(module, f"{operator}_reference", getattr(module, f"{operator}_triton"))
    adamw.adamw_ = adamw.adamw_split_ = adamw_triton_
    step.global_norm, step.accumulate_ = global_norm_triton, accumulate_triton_


def compile_step(kind):
    use_kernels()
    cpu = torch.device("cpu")
    run = gpt_run(2, 4096, "bf16", device="cpu")
    if "fp32" in kind:
        run = resolve(
            run.config.change(precision="fp32", clip=1.0, batch=16, micro_batch=8, x="tokens:log:8192:1e9:2"), "cpu"
        )
    network, context = network_of(run, cpu), run.config.training.context
    if kind == "llama":
        shape = llama.LlamaConfig(2, 576, 9, 3, 1536, context, 4096)
        weights = partial(llama.initial_weights, shape)
        network = describe(make_module(shape, cpu), llama, shape, weights, ByteTokenizer())
    made = step.Trainer(run, network, random_corpus(context, network.vocabulary), 2, cpu, 16, 16)
    check_compiled(
        made.micro_step, partial(made.probe.piece, WHOLE_STACK), lambda: made.stack.digest(torch.tensor([1]))
    )


def compile_products():
    check_compiled(every_product)


def every_product():
    """Each tuned tile of forward, dX and dW, in the forms that do more than multiply too."""
    seen = set()
    for _, replicas, form, m, n, k in problems():
        choice = form, TUNED.get(tile_key(form, m, n, k, torch.bfloat16))
        if choice[1] is None or choice in seen:
            continue
        seen.add(choice)
        a = torch.empty((replicas, k, m) if form == "tn" else (replicas, m, k), dtype=torch.bfloat16)
        b = torch.empty((replicas, n, k) if form == "nt" else (replicas, k, n), dtype=torch.bfloat16)
        c = torch.empty(replicas, m, n, dtype=torch.bfloat16)
        for epilogue in {"nt": ("none", "add", "relu2"), "nn": ("none", "relu2_backward"), "tn": ("none",)}[form]:
            stacked_matmul(a, b, form, epilogue, c if epilogue in ("add", "relu2_backward") else None, out=c)


def compile_attention():
    check_compiled(*[partial(attention_both_ways, *shape) for shape in LONG_CONTEXTS])


def attention_both_ways(T, heads, kv_heads, K, window=None):
    qkv = torch.empty(2, 1, T, (heads + 2 * kv_heads) * K, dtype=torch.bfloat16)
    table = torch.empty(2, T, K // 2)
    settings = (heads, kv_heads, True, 1e-6, window)
    o, logsumexp = attention_op(qkv, table, table, *settings)
    attention_backward_op(o, qkv, table, table, o, logsumexp, *settings)


def compile_families():
    shapes = [(128, 4, 4, 64), (128, 2, 1, 32), (512, 2, 2, 64)]
    check_compiled(family_kernels, *[partial(attention_both_ways, *shape, window=shape[0] // 3) for shape in shapes])


def family_kernels():
    """What GPT-2, Qwen2 and the later generations of nanochat add to a step, forward and backward; windows apart."""
    for dtype, D in ((torch.bfloat16, 768), (torch.float32, 130)):
        x, vector, scale = (torch.empty(shape, dtype=dtype) for shape in ((2, 64, D), (2, D), (2, 64)))
        column_sums_op(x)
        bias_gelu_op(x, vector)
        bias_gelu_backward_op(x, x, vector)
        add_norm_op(x, x, vector, vector, 1e-5)
        norm_backward_op(x, x, x, vector, True, 1e-5)
        whole = x.view(2, 1, -1), scale[:, :1]
        for term, factor in (whole, (x, scale)):
            for terms in ((term, factor, term, factor), (term, None, term, factor), (term, factor, None, None)):
                scaled_sum_op(*terms)
                scaled_sum_backward_op(term, *(terms if terms[1] is not None else (None, *terms[1:])))


def compile_optimizers():
    check_compiled(optimizer_kernels)


def optimizer_kernels():
    """Muon's, Lion's and heavy ball's on split and plain masters, and dropout."""
    scalar, active, broken = torch.empty(2), torch.empty(2, dtype=torch.bool), torch.empty(2, dtype=torch.int32)
    for dtype, (rows, columns) in product((torch.bfloat16, torch.float32), ((256, 128), (128, 256))):
        x, wide = torch.empty(2, rows, columns, dtype=dtype), torch.empty(2, rows, columns)
        remainder = torch.empty(2, rows, columns, dtype=torch.int16) if dtype == torch.bfloat16 else None
        matrix = muon.Matrix(x, remainder, x, wide, None)
        scalars = muon.MuonScalars(scalar, scalar, scalar, scalar, None, active, broken)
        muon.nesterov_triton_(x, wide, x, scalars)
        muon.total_triton(muon.sums_of_squares_triton(x, rows=True))
        factors = muon.sums_of_squares_triton(x, rows=rows > columns)
        for factor, cautious in ((factors, True), (None, False)):
            muon.descend_triton_(matrix, x, factor, scalar, scalar, cautious, scalars)
        newton_schulz_triton(x)
        flat = [None if each is None else each.flatten(1) for each in (x, remainder, x, wide)]
        for beta1 in (scalar, None):
            own = MomentumScalars(scalar, scalar, beta1, scalar, scalar, active, broken)
            momentum_step_triton_(*flat, own)
        dropout_op(x, scalar, torch.empty(2, 3, dtype=torch.int64), 1)


def check_compiled(*steps):
    assert compile_ahead(*steps) == len(pretend_gpu.loaded)
    for kernel in pretend_gpu.loaded:
        assert kernel.metadata.shared <= pretend_gpu.SHARED_MEMORY, kernel.name
        if kernel.name == "_adamw_kernel":  # a choice between a NaN and the canonical one may be compiled away
            assert str(NAN_BITS.value) in kernel.asm["ptx"]
    print(*sorted({kernel.name for kernel in pretend_gpu.loaded}), sep="\n")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kernel_of_a_step_compiles_for_an_h100(tmp_path, kind):
    assert set(pretend_gpu.run("test_compiles", "compile_step", tmp_path, kind).split()) >= EVERY | KINDS[kind]


def test_every_tuned_product_compiles_for_an_h100(tmp_path):
    assert pretend_gpu.run("test_compiles", "compile_products", tmp_path) == "_stacked_matmul_kernel\n"


def test_attention_of_long_contexts_compiles_for_an_h100(tmp_path):
    assert set(pretend_gpu.run("test_compiles", "compile_attention", tmp_path).split()) == LONG_KERNELS


def test_what_other_families_add_compiles_for_an_h100(tmp_path):
    names = {"_sum_rows_kernel", "_add_blocks_kernel", "_sum_kernel", "_bias_gelu_kernel", "_norm_forward_kernel"}
    names |= {"_norm_backward_kernel", "_scaled_sum_kernel", "_scaled_sum_backward_kernel", "_attention_forward_kernel"}
    names |= {"_attention_backward_kernel", "_attention_backward_head_kernel", *LONG_KERNELS}
    assert set(pretend_gpu.run("test_compiles", "compile_families", tmp_path).split()) == names


def test_every_optimizers_kernels_and_dropout_compile_for_an_h100(tmp_path):
    names = {"_nesterov_kernel", "_squares_kernel", "_total_kernel", "_descend_kernel", "_symmetric_kernel"}
    names |= {"_stacked_matmul_kernel", "_momentum_kernel", "_dropout_kernel"}
    assert set(pretend_gpu.run("test_compiles", "compile_optimizers", tmp_path).split()) == names
