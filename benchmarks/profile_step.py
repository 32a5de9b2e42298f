"""Where a stacked training step spends its time: kernels of one step, by share.

`uv run benchmarks/profile_step.py --depth 4 --replicas 64` on a machine with a CUDA GPU.
"""

from dataclasses import dataclass

import numpy as np
import torch

from engine.command import parse, user_errors
from engine.config import SweepConfig, resolve
from engine.data import Corpus
from engine.network import load_network
from engine.plan import Mark, Trajectory, cell_hyper
from engine.sweep import choose_device
from engine.trainer import Trainer


@dataclass(frozen=True)
class Options:
    """Which step to look at."""

    depth: int = 4  # layers; width is 64 x depth
    vocabulary: int = 4096  # rows of the embedding
    replicas: int = 64  # R
    context: int = 128  # tokens a sequence
    batch: int = 8  # sequences a step
    precision: str = "bf16"  # bf16, tf32 or fp32
    rows: int = 25  # kernels listed


def random_corpus(config: SweepConfig, vocabulary: int, rows: int = 512) -> Corpus:
    """Uniformly random tokens, all supervised: the speed of a step does not depend on the text."""
    tokens = np.random.default_rng(0).integers(0, vocabulary, (rows, config.context + 1), dtype=np.int32)
    inputs, targets = tokens[:, :-1].copy(), tokens[:, 1:].copy()
    supervised = np.full(rows, config.context, np.int32)
    return Corpus(
        tokens=inputs,
        targets=targets,
        validation_tokens=inputs[:16],
        validation_targets=targets[:16],
        vocabulary=vocabulary,
        supervised=supervised,
        digest="",
        description="random tokens",
    )


def filled_trainer(config: SweepConfig, replicas: int, device: torch.device, steps: int = 4096) -> Trainer:
    """A trainer whose slots all hold runs of `steps` steps at different learning rates."""
    network = load_network(config, device)
    trainer = Trainer(config, network, random_corpus(config, network.vocabulary), replicas, device, steps)
    hyper = cell_hyper(config, 0, 0)
    for slot, rate in enumerate(np.geomspace(1e-5, 1e-2, replicas)):
        trainer.fill(slot, Trajectory(hyper | {"lr": float(rate)}, steps, (Mark(steps, ()),)))
    return trainer


def main() -> None:
    """The command."""
    options = parse(Options, __doc__.split("\n\n")[0])
    with user_errors():
        device = choose_device("cuda")
        config = resolve(
            SweepConfig(
                x="tokens:log:1e5:1e6:2",
                depth=options.depth,
                vocabulary=options.vocabulary,
                context=options.context,
                batch=options.batch,
                precision=options.precision,
            ),
            "cuda",
        )
    trainer = filled_trainer(config, options.replicas, device)
    trainer.run(5)
    torch.cuda.synchronize()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    trainer.run(20)
    end.record()
    torch.cuda.synchronize()
    step = begin.elapsed_time(end) / 20
    print(f"{step:.3f} ms a step, {step / options.replicas:.4f} ms a replica-step, R = {options.replicas}")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        trainer.run(3)
        torch.cuda.synchronize()
    kernels = sorted(profile.key_averages(), key=lambda k: -k.device_time_total)
    for kernel in kernels[: options.rows]:
        share = kernel.device_time_total / 3000
        print(f"{share:8.3f} ms  {kernel.count // 3:5d} calls  {kernel.key[:90]}")


if __name__ == "__main__":
    main()
