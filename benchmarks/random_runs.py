"""Stacks that train on random tokens: what the benchmarks of a step have in common."""

import numpy as np
import torch

from engine.config import Run, make_config, resolve
from engine.data import Corpus
from engine.network import Network
from engine.plan import Mark, Trajectory, hyper_of
from engine.step import Trainer

LOWEST, HIGHEST = 1e-5, 1e-2  # learning rates of a filled stack
PROBE_ROWS = 16


def gpt_run(
    depth: int, vocabulary: int, precision: str, context: int = 128, batch: int = 8, device: str = "cuda"
) -> Run:
    """The resolved sweep of one GPT, its width 64 x depth."""
    config = make_config(
        x=f"tokens:log:{2 * context * batch}:1e9:2",
        depth=depth,
        vocabulary=vocabulary,
        context=context,
        batch=batch,
        precision=precision,
    )
    return resolve(config, device)


def network_of(run: Run, device: torch.device) -> Network:
    """The network of a run."""
    return run.config.family.build(run.config, device).grouped_for(run)


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


def filled_trainer(run: Run, replicas: int, device: torch.device, steps: int = 4096) -> Trainer:
    """A trainer whose slots all hold runs of `steps` steps at different learning rates."""
    network = network_of(run, device)
    corpus = random_corpus(run.config.training.context, network.vocabulary)
    trainer = Trainer(run, network, corpus, replicas, device, steps, steps * int(run.values("batch").max()))
    for slot, rate in enumerate(rates(replicas)):
        trainer.fill(slot, trajectory(run, steps, lr=float(rate)))
    return trainer
