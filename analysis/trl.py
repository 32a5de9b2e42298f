"""A cell's run as arguments of another trainer: TRL's SFTConfig (transformers' TrainingArguments with a length).

What is printed is what was trained; what TRL cannot do alike is refused, or said in `NOTES`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from engine.config import hyper_names
from engine.hyper import HYPER_PARAMETERS
from engine.plan import hyper_of
from engine.schedule import SLACK
from engine.store import Store

Hyper = Mapping[str, float]

# schedule -> (hyper-parameters, steps) -> (lr_scheduler_type, its own arguments)
SCHEDULERS: dict[str, Callable[[Hyper, int], tuple[str, dict[str, Any]]]] = {
    "constant": lambda hyper, steps: ("constant_with_warmup" if hyper["warmup"] else "constant", {}),
    "cosine": lambda hyper, steps: ("cosine_with_min_lr", {"min_lr_rate": hyper["floor"]}),
    "linear": lambda hyper, steps: ("linear", {}),
    "wsd": lambda hyper, steps: (
        "warmup_stable_decay",
        {"num_decay_steps": round(hyper["decay"] * steps), "min_lr_ratio": hyper["floor"], "decay_type": "linear"},
    ),
}
SAID = {
    "lr", "tokens", "batch", "seed", "warmup", "decay", "floor", "clip", "weight_decay", "beta1", "beta2", "eps",
    "label_smoothing",
}  # fmt: skip
PACKINGS = {"cut": "wrapped", "best-fit": "bfd"}
NOTES = (
    "of conversations only replies were learned: assistant_only_loss=True",
    "biases and norms decay here as all weights do; TRL leaves them out where weight_decay is not 0",
)
LATE = "here the warm-up's first step has 1 / warmup_steps of the rate, in TRL none: it runs one step behind"


def trl_arguments(store: Store, cell: tuple[int, ...]) -> dict[str, Any]:
    """SFTConfig's arguments for a cell [*cells] of a store's first replicate.

    Raises:
        ValueError: a run that TRL cannot repeat: no language model, another optimizer than AdamW on all parameters,
            values of parameter groups, a hyper-parameter or a schedule that it has not.
    """
    config, flat = store.config, int(np.ravel_multi_index((0, *cell), store.run.shape))
    if "tokens" not in config.workload.hyper(config):
        raise ValueError(f"{store.path} is a sweep of {config.network!r}, which TRL does not train; leave out --as trl")
    hyper = {name: float(values[0]) for name, values in hyper_of(store.run, np.array([flat])).items()}
    training, steps = config.training, int(store.config.workload.plan(store.run).steps.ravel()[flat])
    groups = [name for name in store.run.given if "." in name]
    unsaid = [name for name in hyper_names(config) if name not in SAID and "." not in name]
    other = [f"{name} {hyper[name]:g}" for name in unsaid if hyper[name] != HYPER_PARAMETERS[name].default]
    other += [
        f"{name} {value}"
        for name, value, legal in (
            ("optimizer", training.optimizer, ("adamw",)),
            ("freeze", training.freeze, ("",)),
            ("schedule", training.schedule, tuple(SCHEDULERS)),
            ("groups' own values", ", ".join(sorted(groups)), ("",)),
        )
        if value not in legal
    ]
    if other:
        raise ValueError(f"{store.path} has {'; '.join(other)}, which TRL's arguments cannot say; leave out --as trl")
    scheduler, own = SCHEDULERS[training.schedule](hyper, steps)
    return {
        "learning_rate": hyper["lr"],
        "per_device_train_batch_size": int(hyper["batch"]),
        "gradient_accumulation_steps": 1,
        "max_steps": steps,
        "lr_scheduler_type": scheduler,
        "lr_scheduler_kwargs": own,
        "warmup_steps": int(np.ceil(hyper["warmup"] * steps * SLACK)),
        "optim": "adamw_torch",
        "weight_decay": hyper["weight_decay"],
        "adam_beta1": hyper["beta1"],
        "adam_beta2": hyper["beta2"],
        "adam_epsilon": hyper["eps"],
        "max_grad_norm": hyper["clip"],
        "label_smoothing_factor": hyper["label_smoothing"],
        "max_length": training.context,
        "packing": True,
        "packing_strategy": PACKINGS[training.packing],
        "bf16": config.swept.precision == "bf16",
        "seed": int(hyper["seed"]),
    }


def trl_text(arguments: Mapping[str, Any]) -> str:
    """The arguments as Python that can be pasted, with what differs as comments."""
    notes = [*NOTES[: 2 if arguments["weight_decay"] else 1], *([LATE] if arguments["warmup_steps"] else [])]
    lines = [f"    {name}={value!r}," for name, value in arguments.items()]
    return "\n".join(["SFTConfig(", *lines, ")", *(f"# {note}" for note in notes)])
