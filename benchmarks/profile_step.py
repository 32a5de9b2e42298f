"""Where a stacked training step spends its time: kernels of one step, by share.

`uv run benchmarks/profile_step.py --depth 4 --replicas 64` on a machine with a CUDA GPU.
"""

if __name__ == "__main__" and not __package__:
    import started  # noqa: F401  says how to start it where its packages are missing

import time
from dataclasses import dataclass
from functools import partial

from engine.command import parse, user_errors


@dataclass(frozen=True)
class Options:
    """Which step to look at."""

    network: str = ""  # a published shape in place of a gpt of --depth and --vocabulary, of benchmarks/random_runs.py
    depth: int = 4  # layers; width is 64 x depth
    vocabulary: int = 4096  # rows of the embedding
    replicas: int = 64  # R
    context: int = 128  # tokens a sequence
    batch: int = 8  # sequences a step
    precision: str = "bf16"  # bf16, tf32 or fp32
    rows: int = 25  # kernels listed


if __name__ == "__main__":
    parse(Options, __doc__.split("\n\n")[0])  # before what takes seconds to import

import torch

from benchmarks.arguments import check_positive
from benchmarks.random_runs import PUBLISHED, filled_trainer, gpt_run, random_network, run_of
from benchmarks.timing import append_rows, card, enqueued, ready
from engine.ranks import choose_device


def main() -> None:
    """The command."""
    options = parse(Options, __doc__.split("\n\n")[0])
    with user_errors():
        check_positive(options, "depth", "vocabulary", "replicas", "context", "batch", "rows")
        ready("nvidia-smi")
        device = choose_device("cuda")
        if options.network and options.network not in PUBLISHED:
            raise ValueError(
                f"got network {options.network!r}; expected one of {', '.join(PUBLISHED)}; change --network"
            )
        shape = gpt_run(options.depth, options.vocabulary, options.precision, options.context, options.batch)
    network = None
    if options.network:
        shape = run_of(options.precision, options.context, options.batch, "cuda", network="pretrained")
        network = random_network(PUBLISHED[options.network](options.context), device)
    trainer = filled_trainer(shape, options.replicas, device, network=network)
    trainer.run(5)
    torch.cuda.synchronize()
    one_step = partial(trainer.run, 1)
    rested = enqueued(one_step, 5)()
    # two seconds without a pause, the card looked at halfway; a step just after a rest is faster
    sustained = enqueued(one_step, round(2000 / rested))
    time.sleep(1)
    state = card()
    step = sustained()
    each = step / options.replicas
    print(f"{step:.3f} ms a step, {each:.4f} ms a replica-step, R = {options.replicas}")
    print("{sm_mhz} MHz, {power_w} W, held down by the power limit: {at_power_limit}".format(**state))
    row = {"ms_a_step": round(step, 3), "replicas": options.replicas, "ms_a_replica_step": round(each, 4)}
    append_rows("steps.csv", [row | state])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        trainer.run(3)
        torch.cuda.synchronize()
    kernels = sorted(profile.key_averages(), key=lambda k: -k.device_time_total)
    for kernel in kernels[: options.rows]:
        share = kernel.device_time_total / 3000
        print(f"{share:8.3f} ms  {kernel.count // 3:5d} calls  {kernel.key[:90]}")


if __name__ == "__main__":
    main()
