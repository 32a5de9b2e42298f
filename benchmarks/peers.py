"""The same GPT trained by other means, and by this project, each measured in a process of its own.

`python benchmarks/peers.py --peer vmap --depth 4 --vocabulary 4096 --replicas 64` prints one line of JSON;
`benchmarks/throughput.py` starts it for every peer and compares.

Every peer starts from the same weights, reads the same batches and does the same arithmetic: bf16
weights and activations, fp32 loss, AdamW on an fp32 master with fp32 moments, a learning rate for every
replica. Only how it is executed differs:

    eager        one replica after another, plain torch, fused AdamW
    sequential   one replica after another, torch.compile, the whole step one CUDA graph
    vmap         a stack by torch.func.vmap, torch.compile, the whole step one CUDA graph
    jax          a stack by jax.vmap under jit, steps in a lax.scan, buffers donated
    jax_cudnn    the same with cuDNN's attention
    ours         engine.step.Trainer

Of the published shapes of other families (--network) the engine's own network is trained, by torch's operators in
place of its kernels.

Letters: R replica, B batch, T time, D width, H heads, K head dim, V vocabulary, S step.
"""

if __name__ == "__main__" and not __package__:
    import started  # noqa: F401  says how to start it where its packages are missing

import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

from engine.command import parse, user_errors


@dataclass(frozen=True)
class Options:
    """Which peer to measure, on which network."""

    peer: str = "ours"  # eager, sequential, vmap, jax, jax_cudnn or ours; ceilings: what the GPU can do
    depth: int = 4  # layers; width is 64 x depth
    vocabulary: int = 4096  # rows of the embedding
    replicas: int = 64  # R
    context: int = 128  # tokens a sequence
    batch: int = 8  # sequences a step
    precision: str = "bf16"  # bf16 or fp32
    seconds: float = 2.0  # time to spend on timed steps
    device: str = "cuda"  # cuda or cpu
    network: str = ""  # gpt2-124m, qwen2.5-0.5b or llama-1b instead of such a GPT: eager, sequential and ours


if __name__ == "__main__":
    parse(Options, __doc__.split("\n\n")[0])  # before what takes seconds to import

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor

from benchmarks.arguments import check_positive
from benchmarks.random_runs import PUBLISHED, filled_trainer, random_corpus, random_network, rates, run_of
from benchmarks.timing import copy_terabytes, milliseconds
from engine.checkpoint.model import FAMILIES, ModelConfig, family_name, make_module
from engine.data import batch_order
from engine.models import rotary_tables
from engine.models.gpt import NORM_EPS, ROTARY_BASE, GPTConfig
from engine.ranks import choose_device
from engine.step import capture, matmul_precision

NAMES = ("ceilings", "eager", "sequential", "vmap", "jax", "jax_cudnn", "ours")
OF_FAMILIES = ("eager", "sequential", "ours")
BETA1, BETA2, EPS = 0.9, 0.95, 1e-8
STEPS = 1 << 15  # steps that a peer's batches and loss history are laid out for
SCANNED = 8  # steps JAX runs in one call
BLOCKS = 5  # timed blocks; the median counts


class Problem(NamedTuple):
    """What all peers train: shape of the network, first weights, corpus and the rows of every step."""

    shape: ModelConfig
    weights: dict[str, Tensor]
    tokens_NT: np.ndarray
    targets_NT: np.ndarray
    rows_SB: np.ndarray
    rates_R: np.ndarray


class Run(NamedTuple):
    """A peer that is ready to train.

    advance(n): enqueue n steps, a multiple of `chunk`; wait(): until they are done; losses(n): fp32
    [S, R] of the first n; peak_bytes(): largest device memory the peer's allocator had in use.
    """

    advance: Callable[[int], None]
    wait: Callable[[], None]
    losses: Callable[[int], np.ndarray]
    peak_bytes: Callable[[], int]
    chunk: int = 1


def make_problem(options: Options) -> Problem:
    """The problem that `ours` trains too, as numpy arrays and CPU tensors."""
    width, heads = 64 * options.depth, options.depth
    shape: ModelConfig = GPTConfig(options.depth, width, heads, heads, options.context, options.vocabulary)
    if options.network:
        shape = PUBLISHED[options.network](options.context)
    corpus = random_corpus(options.context, shape.vocabulary)
    rows_SB = batch_order(0, len(corpus.tokens), STEPS * options.batch).reshape(STEPS, options.batch)
    weights = FAMILIES[family_name(shape)].module.initial_weights(shape, 0)
    return Problem(shape, weights, corpus.tokens, corpus.targets, rows_SB, rates(options.replicas))


# ---- torch


def mean_loss(weights: dict[str, Tensor], tokens_BT: Tensor, targets_BT: Tensor, tables, norm, shape) -> Tensor:
    """The GPT of engine/models/gpt.py in plain torch, one replica: mean cross-entropy, 0-dim fp32.

    tables: cosines and sines of `rotary_tables`. norm: an RMS norm over the last dimension. shape: a GPTConfig.
    """
    x_BTD = norm(functional.embedding(tokens_BT.long(), weights["embedding.weight"]))
    for index in range(shape.depth):
        layer = f"layers.{index}"
        qkv_BTC = functional.linear(norm(x_BTD), weights[f"{layer}.attention.qkv"])
        mixed_BTD = attention(qkv_BTC, tables, norm, shape)
        x_BTD = x_BTD + functional.linear(mixed_BTD, weights[f"{layer}.attention.output"])
        hidden_BTF = functional.linear(norm(x_BTD), weights[f"{layer}.mlp.up"])
        x_BTD = x_BTD + functional.linear(functional.relu(hidden_BTF).square(), weights[f"{layer}.mlp.down"])
    logits_BTV = functional.linear(norm(x_BTD), weights["unembedding.weight"]).float()
    logits_BTV = shape.softcap * torch.tanh(logits_BTV / shape.softcap)
    return functional.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten().long())


def loss_of_module(shape: ModelConfig, device: torch.device) -> Callable[..., Tensor]:
    """The mean loss of the engine's own network for one replica, as `mean_loss`, in plain torch."""
    if device.type == "cuda":
        replace_kernels()
    network = make_module(shape, device)
    hyper = {"label_smoothing": torch.zeros((), device=device)}
    key_3 = torch.zeros(3, dtype=torch.int64, device=device)

    def mean(weights: dict[str, Tensor], tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        loss = torch.func.functional_call(network, weights, (tokens_BT, targets_BT, hyper, key_3))
        return loss / targets_BT.numel()

    return mean


def replace_kernels() -> None:
    """Put torch's operators in the place of all kernels of a forward in this process."""
    names = ("activation", "attention", "embedding", "linear", "loss", "norm", "ordered_sum", "scaled_sum")
    for module in [import_module(f"kernels.{name}") for name in names]:
        for name in [each for each in vars(module) if each.endswith("_triton")]:
            setattr(module, name, getattr(module, name.replace("_triton", "_reference")))
    vars(import_module("kernels.attention"))["qkv_attention_triton"] = fused_attention


def fused_attention(qkv_BTC, cos_TK2, sin_TK2, heads, kv_heads, qk_norm=False, eps=1e-6, window=None, qk_scale=1.0):
    """`kernels.attention.qkv_attention` without norm and window, by torch's operators."""
    assert not qk_norm and window is None and qk_scale == 1.0
    heads_BHTK = qkv_BTC.unflatten(-1, (heads + 2 * kv_heads, -1)).transpose(1, 2)
    q_BHTK, k_BGTK, v_BGTK = heads_BHTK.split([heads, kv_heads, kv_heads], dim=1)
    q_BHTK, k_BGTK = (rotate(each, (cos_TK2, sin_TK2)) for each in (q_BHTK, k_BGTK))
    mixed_BHTK = functional.scaled_dot_product_attention(q_BHTK, k_BGTK, v_BGTK, is_causal=True, enable_gqa=True)
    return mixed_BHTK.transpose(1, 2).flatten(2)


def attention(qkv_BTC: Tensor, tables, norm, shape: GPTConfig) -> Tensor:
    """Rotary positions, QK-norm and causal attention on a fused projection -> [B, T, D]."""
    q_BHTK, k_BHTK, v_BHTK = qkv_BTC.unflatten(-1, (3, shape.heads, shape.head_dim)).permute(2, 0, 3, 1, 4)
    q_BHTK, k_BHTK = norm(rotate(q_BHTK, tables)), norm(rotate(k_BHTK, tables))
    mixed_BHTK = functional.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True)
    return mixed_BHTK.transpose(1, 2).flatten(2)


def rotate(x_BHTK: Tensor, tables) -> Tensor:
    """Half-split rotary positions, computed in fp32."""
    cos_TK2, sin_TK2 = tables
    first, second = x_BHTK.float().chunk(2, dim=-1)
    rotated = torch.cat([first * cos_TK2 - second * sin_TK2, second * cos_TK2 + first * sin_TK2], dim=-1)
    return rotated.to(x_BHTK.dtype)


def fused_norm(x: Tensor) -> Tensor:
    """RMS norm over the last dimension as one operator: what eager torch does best."""
    return functional.rms_norm(x, x.shape[-1:], eps=NORM_EPS)


def open_norm(x: Tensor) -> Tensor:
    """RMS norm in elementary operations, which vmap batches and torch.compile fuses."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + NORM_EPS)).to(x.dtype)


def adamw_(masters, weights, firsts, seconds, gradients, rate, count) -> None:
    """AdamW in place on lists of tensors; rate broadcasts against a parameter, count is 0-dim fp64.

    Compiled, every parameter is one kernel that moves 28 bytes an element.
    """
    bias1, bias2 = (1 - BETA1**count).float(), (1 - BETA2**count).float()
    for master, weight, first, second, gradient in zip(masters, weights, firsts, seconds, gradients, strict=True):
        wide = gradient.float()
        first.mul_(BETA1).add_(wide, alpha=1 - BETA1)
        second.mul_(BETA2).addcmul_(wide, wide, value=1 - BETA2)
        master.sub_(rate * (first / bias1) / ((second / bias2).sqrt() + EPS))
        weight.copy_(master)


def loss_of_gpt(shape: GPTConfig, device: torch.device, compiled: bool) -> Callable[..., Tensor]:
    """`mean_loss` of the GPT, with the norm that suits best."""
    tables = tuple(table.to(device) for table in rotary_tables(shape.context, shape.head_dim, ROTARY_BASE))
    return partial(mean_loss, tables=tables, norm=open_norm if compiled else fused_norm, shape=shape)


def torch_peer(options: Options, dtype: torch.dtype, device: torch.device, stacked: bool, compiled: bool) -> Run:
    """One replica, or a stack of them by vmap, in plain torch.

    On a GPU `compiled` means torch.compile and one CUDA graph of the whole step; a CPU runs the same
    code eagerly.
    """
    # cuDNN's attention fails under vmap with torch.compile
    torch.backends.cuda.enable_cudnn_sdp(False)
    problem = make_problem(options)
    replicas = len(problem.rates_R) if stacked else 1
    masters = {}
    for name, values in problem.weights.items():
        values = values.to(device)
        masters[name] = values.repeat(replicas, 1, 1) if stacked else values.clone()
    weights = {name: master.to(dtype, copy=True).requires_grad_() for name, master in masters.items()}
    tokens_NT = torch.from_numpy(problem.tokens_NT).to(device)
    targets_NT = torch.from_numpy(problem.targets_NT).to(device)
    rows_SB = torch.from_numpy(problem.rows_SB).to(device)
    rate = torch.tensor(problem.rates_R, dtype=torch.float32, device=device)
    step = torch.zeros((), dtype=torch.int64, device=device)
    history = torch.full((STEPS, replicas), torch.nan, device=device)
    plain = [weight.detach() for weight in weights.values()]
    lists = list(masters.values())

    compile_ = partial(torch.compile, fullgraph=True, dynamic=False) if compiled and device.type == "cuda" else identity
    if isinstance(problem.shape, GPTConfig):
        one = loss_of_gpt(problem.shape, device, compiled)
    else:
        one = loss_of_module(problem.shape, device)
    loss_of = compile_(torch.func.vmap(one) if stacked else one)
    if compiled:
        firsts, seconds = [torch.zeros_like(m) for m in lists], [torch.zeros_like(m) for m in lists]
        rate = rate[:, None, None] if stacked else rate[0]
        update_ = compile_(adamw_)

        def update(gradients: list[Tensor]) -> None:
            update_(lists, plain, firsts, seconds, gradients, rate, step.double())
    else:
        optimizer = torch.optim.AdamW(
            lists, lr=float(problem.rates_R[0]), betas=(BETA1, BETA2), eps=EPS, weight_decay=0.0, fused=True
        )
        wide = [torch.empty_like(master) for master in lists]
        for master, gradient in zip(lists, wide, strict=True):
            master.grad = gradient

        def update(gradients: list[Tensor]) -> None:
            torch._foreach_copy_(wide, gradients)
            optimizer.step()
            torch._foreach_copy_(plain, lists)

    def train_step() -> None:
        rows_B = rows_SB[step[None]][0].long()
        tokens, targets = tokens_NT[rows_B], targets_NT[rows_B]
        if stacked:
            tokens, targets = tokens.repeat(replicas, 1, 1), targets.repeat(replicas, 1, 1)
        loss = loss_of(weights, tokens, targets)
        gradients = list(torch.autograd.grad(loss.sum(), list(weights.values())))
        with torch.no_grad():
            history.index_copy_(0, step[None], loss.detach().expand(replicas)[None])
            step.add_(1)
            update(gradients)

    advance = repeat(train_step)
    if compiled and device.type == "cuda":
        advance = repeat(capture(train_step, calls_before=2).replay)
    return torch_run(advance, lambda count: history[:count].cpu().numpy(), device)


def identity(function: Callable) -> Callable:
    return function


def repeat(step: Callable[[], None]) -> Callable[[int], None]:
    """n -> call `step` n times."""

    def advance(count: int) -> None:
        for _ in range(count):
            step()

    return advance


def torch_run(advance: Callable[[int], None], losses: Callable[[int], np.ndarray], device: torch.device) -> Run:
    """A Run whose waiting and memory are torch's."""
    if device.type == "cpu":
        return Run(advance, lambda: None, losses, lambda: 0)
    return Run(advance, torch.cuda.synchronize, losses, torch.cuda.max_memory_allocated)


def ours(options: Options, device: torch.device) -> Run:
    """The project's own stack, as a sweep trains it."""
    shape = options.precision, options.context, options.batch, device.type
    if options.network:
        run, network = run_of(*shape, network="pretrained"), random_network(make_problem(options).shape, device)
    else:
        run, network = run_of(*shape, depth=options.depth, vocabulary=options.vocabulary), None
    trainer = filled_trainer(run, options.replicas, device, STEPS, network)

    def losses(count: int) -> np.ndarray:
        # every slot took every step: none had stopped, so none was cheaper than it should be
        assert int(trainer.step_R.min()) >= count and int(trainer.nonfinite_R.max()) < 0
        return trainer.losses_RS[:, :count].T.cpu().numpy()

    return torch_run(trainer.run, losses, device)


# ---- JAX


def jax_peer(problem: Problem, precision: str, attention_by: str) -> Run:
    """A stack by jax.vmap under jit; attention_by is `jax.nn.dot_product_attention`'s implementation."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.95"
    import jax
    import jax.numpy as jnp
    import optax

    shape = problem.shape
    dtype = jnp.bfloat16 if precision == "bf16" else jnp.float32
    cos_TK2, sin_TK2 = (
        table.numpy()[:, None] for table in rotary_tables(shape.context, shape.head_dim, ROTARY_BASE)
    )  # [T, 1, K/2]: one head dimension to broadcast over
    tokens_NT, targets_NT, rows_SB = (
        jnp.asarray(array) for array in (problem.tokens_NT, problem.targets_NT, problem.rows_SB)
    )
    rates_R = jnp.asarray(problem.rates_R, jnp.float32)

    def norm(x):
        wide = x.astype(jnp.float32)
        return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + NORM_EPS)).astype(x.dtype)

    def linear(x, weight_OI):
        return jnp.einsum("...i,oi->...o", x, weight_OI)

    def rotate(x_BTHK):
        first, second = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
        turned = [first * cos_TK2 - second * sin_TK2, second * cos_TK2 + first * sin_TK2]
        return jnp.concatenate(turned, axis=-1).astype(x_BTHK.dtype)

    def loss_of(weights, tokens_BT, targets_BT):
        x_BTD = norm(weights["embedding.weight"][tokens_BT])
        for index in range(shape.depth):
            layer = f"layers.{index}"
            qkv_BTC = linear(norm(x_BTD), weights[f"{layer}.attention.qkv"])
            qkv = qkv_BTC.reshape(*tokens_BT.shape, 3, shape.heads, shape.head_dim)
            q_BTHK, k_BTHK = (norm(rotate(qkv[:, :, i])) for i in (0, 1))
            mixed_BTHK = jax.nn.dot_product_attention(
                q_BTHK, k_BTHK, qkv[:, :, 2], is_causal=True, implementation=attention_by
            )
            mixed_BTD = mixed_BTHK.reshape(x_BTD.shape)
            x_BTD = x_BTD + linear(mixed_BTD, weights[f"{layer}.attention.output"])
            hidden_BTF = jax.nn.relu(linear(norm(x_BTD), weights[f"{layer}.mlp.up"]))
            x_BTD = x_BTD + linear(hidden_BTF * hidden_BTF, weights[f"{layer}.mlp.down"])
        logits_BTV = linear(norm(x_BTD), weights["unembedding.weight"]).astype(jnp.float32)
        logits_BTV = shape.softcap * jnp.tanh(logits_BTV / shape.softcap)
        return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT).mean()

    def optimizer(rate):
        return optax.adamw(rate, b1=BETA1, b2=BETA2, eps=EPS, weight_decay=0.0)

    def one_replica(state, rate, tokens_BT, targets_BT):
        weights, master, moments = state
        loss, gradients = jax.value_and_grad(loss_of)(weights, tokens_BT, targets_BT)
        gradients = jax.tree.map(lambda gradient: gradient.astype(jnp.float32), gradients)
        updates, moments = optimizer(rate).update(gradients, moments, master)
        master = optax.apply_updates(master, updates)
        return (jax.tree.map(lambda m: m.astype(dtype), master), master, moments), loss

    def scan_step(carry, _):
        state, step = carry
        # every replica has rows of its own, which happen to be the same
        rows_RB = jnp.broadcast_to(rows_SB[step], (len(rates_R), rows_SB.shape[1]))
        state, loss_R = jax.vmap(one_replica)(state, rates_R, tokens_NT[rows_RB], targets_NT[rows_RB])
        return (state, step + 1), loss_R

    @partial(jax.jit, donate_argnums=0)
    def steps(carry):
        return jax.lax.scan(scan_step, carry, length=SCANNED)

    @jax.jit
    def start(weights):
        def replica(_):
            master = weights
            return jax.tree.map(lambda m: m.astype(dtype), master), master, optimizer(0.0).init(master)

        return jax.vmap(replica)(rates_R), jnp.zeros((), jnp.int32)

    carry = start({name: values.numpy() for name, values in problem.weights.items()})
    history = []

    def advance(count: int) -> None:
        nonlocal carry
        assert count % SCANNED == 0
        for _ in range(count // SCANNED):
            carry, loss_SR = steps(carry)
            history.append(loss_SR)

    def peak_bytes() -> int:
        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)

    return Run(
        advance,
        lambda: jax.block_until_ready(carry),
        lambda count: np.concatenate(history)[:count],
        peak_bytes,
        SCANNED,
    )


# ---- measuring


def build(options: Options) -> Run:
    """The peer that the options name, ready to train."""
    device = torch.device(options.device)
    torch.set_float32_matmul_precision(matmul_precision(options.precision))
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    match options.peer:
        case "ours":
            return ours(options, device)
        case "jax":
            return jax_peer(make_problem(options), options.precision, "xla")
        case "jax_cudnn":
            return jax_peer(make_problem(options), options.precision, "cudnn")
        case "eager":
            return torch_peer(options, dtype, device, stacked=False, compiled=False)
        case "sequential":
            return torch_peer(options, dtype, device, stacked=False, compiled=True)
        case "vmap":
            return torch_peer(options, dtype, device, stacked=True, compiled=True)
    raise AssertionError(options.peer)


def measure(options: Options) -> dict[str, float]:
    """Set-up seconds (to the end of the first steps, imports left out), ms a step, peak bytes, last mean loss."""
    begin = time.perf_counter()
    run = build(options)
    run.advance(run.chunk)
    run.wait()
    setup = time.perf_counter() - begin

    def seconds_for(count: int) -> float:
        started = time.perf_counter()
        run.advance(count)
        run.wait()
        return time.perf_counter() - started

    seconds_for(run.chunk)  # the clocks rise
    pace = seconds_for(run.chunk) / run.chunk
    chunks = max(1, min(round(options.seconds / BLOCKS / pace), STEPS // 8) // run.chunk)
    count = chunks * run.chunk
    seconds = statistics.median(seconds_for(count) for _ in range(BLOCKS)) / count
    losses_SR = run.losses(3 * run.chunk + BLOCKS * count)
    assert np.isfinite(losses_SR).all(), "a loss is not finite"
    return {
        "setup_s": setup,
        "step_ms": seconds * 1e3,
        "peak_bytes": run.peak_bytes(),
        "first_loss": float(losses_SR[0].mean()),
        "last_loss": float(losses_SR[-1].mean()),
    }


def ceilings() -> dict[str, float]:
    """What this GPU reaches: FLOP/s of an 8192^3 bf16 product, bytes/s of a large copy, read and written."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    product = milliseconds([lambda: torch.mm(a, b, out=out)], budget=300)
    return {"flops": 2 * 8192**3 / product * 1e3, "bytes": copy_terabytes() * 1e12}


def main() -> None:
    """The command."""
    options = parse(Options, __doc__.split("\n\n")[0])
    with user_errors():
        if options.peer not in NAMES:
            raise ValueError(f"peer is {options.peer!r}, expected one of {', '.join(NAMES)}")
        if options.precision not in ("bf16", "fp32"):
            raise ValueError(f"precision is {options.precision!r}, expected bf16 or fp32")
        if options.network and (
            options.network not in PUBLISHED or options.peer not in ("eager", "sequential", "ours")
        ):
            raise ValueError(
                f"network is {options.network!r} of peer {options.peer!r}, expected one of {', '.join(PUBLISHED)} of "
                f"{', '.join(OF_FAMILIES)}"
            )
        check_positive(options, "depth", "vocabulary", "replicas", "context", "batch", "seconds")
        choose_device("cuda" if options.peer == "ceilings" else options.device)
        if options.peer.startswith("jax") and not (find_spec("jax") and find_spec("optax")):
            raise ValueError(f"peer is {options.peer!r}, but jax or optax is not installed; install them")
    result = ceilings() if options.peer == "ceilings" else measure(options)
    print(json.dumps(asdict(options) | result))


if __name__ == "__main__":
    main()
