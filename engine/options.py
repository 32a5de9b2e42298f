"""The arguments of a sweep: a request out of flags, which follow from the declarations."""

import sys
from argparse import SUPPRESS
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, fields
from io import StringIO
from typing import Any

from engine.command import fail, parser, spellings, warn
from engine.config import PRESETS, SweepConfig, Swept, fit_preset, hyper_names, make_config
from engine.family import FAMILIES, VECTORS, family_of, spelt_out
from engine.grid import Axis
from engine.hyper import HYPER_PARAMETERS, rule_of
from engine.optim import OPTIMIZERS
from engine.place import Where
from engine.schedule import SCHEDULES
from engine.workload import COUNTS, WORKLOADS, workload_of

# what a sweep does with its store when it is through, told whether W&B tracks it; what W&B's summary says then
Finish = Callable[[Where, bool], Mapping[str, Any]]


@dataclass(frozen=True)
class RunOptions:
    """Where and how to run; none of it changes a cell."""

    store: str = ""  # a folder, s3://, gs:// or az://bucket/path (default: results/<network>-<axes>-<data>-<hash>)
    device: str = "auto"  # cpu or cuda; auto: cuda if there is one
    rows_per_launch: str = "auto"  # grid rows trained at once; auto: about 16 runs on a CPU, all that fit on a GPU
    workers: int = 1  # processes that train this sweep together, each started by this command, on any machine
    fsdp: bool = False  # shard a replica's state over ranks: says what it would take, since a stack cannot
    lease_seconds: float = 60.0  # of several workers: without a sign of life for so long one counts as lost
    slots: int = 0  # replicas trained at once (0: what fits; on a CPU, waves of half a minute)
    figures: bool = True  # draw the maps and print the summary at the end
    quiet: bool = False  # no progress
    dry_run: bool = False  # print launches, stacks, memory, FLOPs and a time estimate, then stop
    wandb: str = "off"  # off, offline or online
    wandb_project: str = "fractal-llm"  # W&B project
    wandb_entity: str = ""  # W&B entity (default: your own)


def read_arguments(description: str, arguments: Sequence[str] | None = None) -> tuple[SweepConfig, RunOptions]:
    """The sweep that a command line asks for. Its flags depend on --preset, --network and --model, read first.

    Raises:
        ValueError: a preset or network that does not exist, or values that do not belong together.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    first = parser("", add_help=False)
    for name in ("preset", "network", "model"):
        first.add_argument(f"--{name}", default="")
    chosen, _ = first.parse_known_args([each for each in given if each not in ("-h", "--help")])
    if chosen.preset and chosen.preset not in PRESETS:
        raise ValueError(f"preset is {chosen.preset!r}; expected one of {', '.join(PRESETS)}")
    preset = PRESETS[chosen.preset or "default"]
    network, own = spelt_out(chosen.network, {"model": chosen.model})
    if not (chosen.network or chosen.model):
        network = preset.network
    family = family_of(network)
    if network != preset.network:
        preset = make_config(network, **{name: value for name, value in own.items() if value})
    if any("." in name for name in preset.hyper) and not {"-h", "--help"} & set(given):
        preset = fit_to_checkpoint(preset, chosen.model)
    reader = parser(description, usage="%(prog)s [options]", epilog=examples(network))
    reader.legal = {"optimizer": OPTIMIZERS, "schedule": SCHEDULES, "precision": family.precisions, "count": COUNTS}
    group = reader.add_argument_group("Which network")
    group.add_argument(
        "--preset", metavar="str", default="default", help=f"where the defaults below come from: {', '.join(PRESETS)}"
    )
    known = "; ".join(f"{name}: {each.help}" for name, each in FAMILIES.items())
    group.add_argument("--network", metavar="str", default=network, help=known)
    reader.add_arguments(Swept, dest="swept", default=preset.swept)
    if fields(family.options):
        reader.add_arguments(family.options, dest="shape", default=preset.shape)
    reader.add_arguments(workload_of(family).options, dest="training", default=preset.training)
    add_hyper(reader, preset)
    reader.add_arguments(RunOptions, dest="options")
    found, unknown = reader.parse_known_args(given)
    if unknown:
        refuse_other_networks(unknown, network)
        reader.error(f"unrecognized arguments: {' '.join(unknown)}")
    values = {name: value for name, value in vars(found).items() if name in every_name(family) and value is not None}
    parts = (found.swept, getattr(found, "shape", preset.shape), found.training)
    flat = {field.name: getattr(part, field.name) for part in parts for field in fields(part)}
    swept = [Axis.parse(axis).name for axis in (found.swept.y, found.swept.x) if axis]
    said = {*swept, *values}
    followed = {name for name, rule in HYPER_PARAMETERS.items() if rule.follows and said.issuperset(rule.follows)}
    hyper = {name: value for name, value in preset.hyper.items() if name not in {*swept, *followed}}
    return make_config(network, **flat, **(hyper | values)), found.options


def fit_to_checkpoint(preset: SweepConfig, model: str) -> SweepConfig:
    """A preset with values by parameter group, for the checkpoint that is given, or its own."""
    from engine.checkpoint import load_model  # brings torch, which --help does not need

    with redirect_stderr(StringIO()):  # what is said of a checkpoint is said once, where its sweep is prepared
        loaded = load_model(model or preset.shape.model)
    own = [loaded.family.parameter_groups(loaded.config, name) for name in loaded.weights]
    groups = {first for first, *_ in own}
    tied = {second: first for first, *rest in own for second in rest if second != VECTORS}
    fitted = fit_preset(preset, loaded.config.width, groups, tied)
    for second, first in tied.items():
        warn(f"{first} and {second} are tied here: the recipe's values and axes of {second} are those of {first}")
    return fitted


def every_name(family: Any) -> list[str]:
    """Every hyper-parameter a family's sweeps may have, whatever their optimizer and schedule."""
    names = []
    for name, rule in HYPER_PARAMETERS.items():
        names.append(name)
        names += [f"{name}.{group}" for group in family.groups if rule.by_group]
    return names


def add_hyper(reader: Any, preset: SweepConfig) -> None:
    """A flag for every hyper-parameter; help for those the sweep reads, of groups' only for the learning rate."""
    group = reader.add_argument_group(
        "Hyper-parameters", "each may be an axis instead; those of an optimizer also by parameter group, as lr is"
    )
    read = hyper_names(preset)
    for name in every_name(preset.family):
        rule = rule_of(name)
        base, _, own = name.partition(".")
        text = f"{rule.help}{f' of {own}' if own else ''}"
        if rule.high <= 1:
            text += f", {rule.low:g} to {rule.high:g}"
        if name in preset.hyper or (rule.has_default and not own):
            text += f" (default: {preset.hyper.get(name, rule.default):g})"
        shown = name in read and (not own or base == "lr")
        group.add_argument(*spellings(name), dest=name, type=float, default=None, help=text if shown else SUPPRESS)


def examples(network: str) -> str:
    """The end of the help page: a command for every network, and the flags that only others have."""
    lines = [
        "An axis is name:scale:low:high:points, scale log or lin. Every network's own map:",
        "",
    ]
    for name, family in FAMILIES.items():
        y, x = family.axes
        lines.append(f"  --network {name} --y {y} --x {x}")
        kinds = (family.options, workload_of(family).options)
        ours = (FAMILIES[network].options, workload_of(FAMILIES[network]).options)
        own = [spellings(f.name)[0] for kind in kinds if kind not in ours for f in fields(kind)]
        own += [f"--{each}" for each in family.hyper if each not in FAMILIES[network].hyper]
        lines += [f"      which has {', '.join(own)}"] if own else []
    return "\n".join(lines)


def refuse_other_networks(unknown: list[str], network: str) -> None:
    """End the program, in one line, for a flag that only other networks have."""
    flag = unknown[0].split("=")[0]
    name = flag.lstrip("-").replace("-", "_")
    having = [
        other
        for other, family in FAMILIES.items()
        if name in {f.name for kind in (family.options, WORKLOADS[family.workload].options) for f in fields(kind)}
        or name in every_name(family)
    ]
    if having and network not in having:
        fail(f"{flag} is for {' and '.join(having)}, not {network!r}; leave it out, or choose another --network")
