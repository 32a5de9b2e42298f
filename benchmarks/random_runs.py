"""Stacks that train on random tokens: what the benchmarks of a step have in common."""

import numpy as np
import torch
from engine.trainer import Trainer

from engine.config import SweepConfig, resolve
from engine.data import Corpus
from engine.network import load_network
from engine.plan import Mark, Trajectory, cell_hyper

LOWEST, HIGHEST = 1e-5, 1e-2  # learning rates of a filled stack


def gpt_config(
    depth: int, vocabulary: int, precision: str, context: int = 128, batch: int = 8, device: str = "cuda"
) -> SweepConfig:
    """The resolved configuration of one GPT, its width 64 x depth."""
    config = SweepConfig(
        x=f"tokens:log:{context * batch}:1e9:2",
        depth=depth,
        vocabulary=vocabulary,
        context=context,
        batch=batch,
        precision=precision,
    )
    return resolve(config, device)


def random_corpus(config: SweepConfig, vocabulary: int, rows: int = 512) -> Corpus:
    """Uniformly random tokens, all supervised: the speed of a step does not depend on the text."""
    tokens = np.random.default_rng(0).integers(0, vocabulary, (rows, config.context + 1), dtype=np.int32)
    inputs, targets = tokens[:, :-1].copy(), tokens[:, 1:].copy()
    return Corpus(
        tokens=inputs,
        targets=targets,
        validation_tokens=inputs[:16],
        validation_targets=targets[:16],
        vocabulary=vocabulary,
        supervised=np.full(rows, config.context, np.int32),
        digest="",
        description="random tokens",
    )


def rates(replicas: int) -> np.ndarray:
    """A learning rate for every replica, float64 [R]."""
    return np.geomspace(LOWEST, HIGHEST, replicas)


def filled_trainer(config: SweepConfig, replicas: int, device: torch.device, steps: int = 4096) -> Trainer:
    """A trainer whose slots all hold runs of `steps` steps at different learning rates."""
    network = load_network(config, device)
    trainer = Trainer(config, network, random_corpus(config, network.vocabulary), replicas, device, steps)
    hyper = cell_hyper(config, 0, 0)
    for slot, rate in enumerate(rates(replicas)):
        trainer.fill(slot, Trajectory(hyper | {"lr": float(rate)}, steps, (Mark(steps, ()),)))
    return trainer
