"""Stacks that train on random tokens: what the benchmarks of a step have in common."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from engine.checkpoint.model import FAMILIES, ModelConfig, family_name, make_module
from engine.config import Run, make_config, resolve
from engine.data import Corpus
from engine.models.gpt import GPTConfig
from engine.models.gpt2 import GPT2Config
from engine.models.llama import LlamaConfig
from engine.network import Network, describe
from engine.plan import Mark, Trajectory, hyper_of
from engine.step import Trainer
from engine.tokenizer import ByteTokenizer


def small_network(name: str, context: int, width: int = 256, vocabulary: int = 4096) -> ModelConfig:
    """A network of a family of checkpoints, by its name in SMALL: two layers, of nanochat four; width >= 32."""
    sizes: dict[str, Any] = {"width": width, "heads": 4, "context": context, "vocabulary": vocabulary}
    return SMALL[name](**sizes)


LLAMA = partial(LlamaConfig, depth=2, kv_heads=2, mlp_width=768)
NANOCHAT = partial(GPTConfig, depth=4, kv_heads=2, lambdas=True, window_pattern="SSSL", short_window=24)
SMALL: dict[str, Callable[..., ModelConfig]] = {
    "gpt2": partial(GPT2Config, depth=2, mlp_width=1024),
    "llama": partial(LLAMA, tied=False),
    "qwen2": partial(LLAMA, qkv_bias=True, output_bias=True),
    "qwen3": partial(LLAMA, head_size=32, qk_norm=True),
    "nanochat-2026-01": partial(NANOCHAT, value_gate=32),
    "nanochat-2026-03": partial(NANOCHAT, value_gate=12, value_gate_scale=3.0, qk_scale=1.2, smear=True),
}
# published shapes, by their context
PUBLISHED: dict[str, Callable[[int], ModelConfig]] = {
    "smollm2-135m": lambda context: LlamaConfig(30, 576, 9, 3, 1536, context, 49152, 1e5),
    "gpt2-124m": lambda context: GPT2Config(12, 768, 12, 3072, context, 50257),
    "qwen2.5-0.5b": lambda context: LlamaConfig(24, 896, 14, 2, 4864, context, 151936, 1e6, 1e-6, qkv_bias=True),
    "llama-1b": lambda context: LlamaConfig(16, 2048, 32, 8, 8192, context, 128256, 5e5),
}

LOWEST, HIGHEST = 1e-5, 1e-2  # learning rates of a filled stack
PROBE_ROWS = 16


def gpt_run(
    depth: int, vocabulary: int, precision: str, context: int = 128, batch: int = 8, device: str = "cuda"
) -> Run:
    """The resolved sweep of one GPT, its width 64 x depth."""
    return run_of(precision, context, batch, device, depth=depth, vocabulary=vocabulary)


def run_of(precision: str, context: int, batch: int, device: str, **more: Any) -> Run:
    """A resolved sweep, of the GPT where no other network is named."""
    x = f"tokens:log:{2 * context * batch}:1e9:2"
    return resolve(make_config(x=x, context=context, batch=batch, precision=precision, **more), device)


def network_of(run: Run, device: torch.device) -> Network:
    """The network of a run."""
    return run.config.family.build(run.config, device).grouped_for(run)


def random_network(shape: ModelConfig, device: torch.device) -> Network:
    """A network of a family of checkpoints, with the family's own random weights, over bytes."""
    family = FAMILIES[family_name(shape)].module
    weights = partial(family.initial_weights, shape)
    return describe(make_module(shape, device), family, shape, weights, ByteTokenizer())


def random_corpus(context: int, vocabulary: int, rows: int = 512) -> Corpus:
    """Uniformly random tokens, all supervised: the speed of a step does not depend on the text."""
    tokens = np.random.default_rng(0).integers(0, vocabulary, (rows, context + 1), dtype=np.int32)
    inputs, targets = tokens[:, :-1].copy(), tokens[:, 1:].copy()
    return Corpus(
        tokens=inputs,
        targets=targets,
        validation_tokens=inputs[:PROBE_ROWS],
        validation_targets=targets[:PROBE_ROWS],
        vocabulary=vocabulary,
        supervised=np.full(rows, context, np.int32),
        digest="",
        description="random tokens",
    )


def rates(replicas: int) -> np.ndarray:
    """A learning rate for every replica, float64 [R]."""
    return np.geomspace(LOWEST, HIGHEST, replicas)


def trajectory(run: Run, steps: int, cell: int = 0, **own: float) -> Trajectory:
    """A trajectory of a sweep's first cell with hyper-parameters of its own, and one mark."""
    hyper = {name: float(values[0]) for name, values in hyper_of(run, np.zeros(1, int)).items()}
    return Trajectory(hyper | own, steps, (Mark(steps, (cell,)),))


def filled_trainer(
    run: Run, replicas: int, device: torch.device, steps: int = 4096, network: Network | None = None
) -> Trainer:
    """A trainer whose slots all hold runs of `steps` steps at different learning rates, of the run's own network or
    another."""
    network = network or network_of(run, device)
    corpus = random_corpus(run.config.training.context, network.vocabulary)
    trainer = Trainer(run, network, corpus, replicas, device, steps, steps * int(run.values("batch").max()))
    for slot, rate in enumerate(rates(replicas)):
        trainer.fill(slot, trajectory(run, steps, lr=float(rate)))
    return trainer
