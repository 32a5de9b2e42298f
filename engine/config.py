"""What a sweep is: every field that decides a cell's numbers, and nothing else.

`SweepConfig` is stored whole in the store's attributes; two sweeps with equal configurations give
equal cells on one GPU model and one software stack. Options that only say where and how to run
(store path, W&B, device, progress) live beside the command, in `sweep.RunOptions`.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
from simple_parsing import field

from engine.grid import HYPER_PARAMETERS, Grid, attribute

SCHEDULES = ("constant", "cosine", "wsd", "linear")
NETWORKS = ("gpt", "smollm2", "mlp")
OPTIMIZERS = ("adamw", "sgd")
PRECISIONS = {"gpt": ("bf16", "tf32", "fp32"), "smollm2": ("bf16", "tf32", "fp32"), "mlp": ("fp32", "tf32x3", "fp64")}
NONLINEARITIES = ("tanh", "relu", "identity")
# fields that `resolve` works out from others where they are not given
DERIVED = ("width", "heads", "kv_heads", "micro_batch", "rows_per_launch", "trace", "data_points")
# fields that only some networks have, beside their hyper-parameters
FIELDS_OF = {
    ("gpt",): "depth width heads kv_heads vocabulary",
    ("gpt", "smollm2"): "context data data_config split data_rows validation_rows optimizer momentum eps schedule "
    "floor decay micro_batch",
    ("mlp",): "steps nonlinearity data_points minibatch offset_every_step problem",
}
DEFAULT_AXES = {
    "gpt": ("lr:log:1e-4:1e1:32", "tokens:log:1e3:6e4:32"),
    "smollm2": ("lr:log:1e-6:1e-1:16", "tokens:log:1e3:64e3:16"),
    "mlp": ("lr.0:log:1e-3:1e6:64", "lr.1:log:1e-3:1e6:64"),
}


@dataclass(frozen=True)
class SweepConfig:
    """The swept axes, the network, its data and its fixed hyper-parameters."""

    y: str = ""  # rows: name:scale:low:high:points (default: lr, or lr.0 for the mlp)
    x: str = ""  # columns, written alike (default: tokens, or lr.1 for the mlp)

    network: str = "gpt"  # gpt (nanochat-style, random start), smollm2 (pretrained 135M) or mlp (the paper's)
    depth: int = 1  # gpt: number of layers; sets width and heads unless they are given
    width: int = 0  # gpt: model width (0: 64 * depth)
    heads: int = 0  # gpt: attention heads (0: width / 64)
    kv_heads: int = 0  # gpt: key/value heads (0: as many as heads)
    context: int = 64  # tokens a sequence (smollm2: at most 2048)
    vocabulary: int = 0  # gpt: rows of the embedding (0: the tokenizer's)

    data: str = "chitchat"  # chitchat (the package), a .txt, .jsonl or .parquet file, a folder, or a hub name
    data_config: str = ""  # configuration name of a hub data set
    split: str = "train"  # split of a hub data set
    data_rows: int = 16384  # sequences taken from the data, always the same ones (0: all of them)
    validation_rows: int = 16  # held-out sequences behind val_loss

    optimizer: str = "adamw"  # adamw or sgd
    momentum: float = 0.0  # sgd: momentum
    eps: float = 1e-8  # adamw: epsilon
    schedule: str = "constant"  # constant, cosine, wsd (warm-up, stable, decay) or linear (to zero)
    floor: float = 0.0  # cosine and wsd: last learning rate as a share of the peak
    decay: float = 0.2  # wsd: share of the steps spent decaying
    precision: str = "auto"  # bf16, tf32 or fp32 (mlp: fp32, tf32x3 or fp64); auto: bf16 on a GPU, else fp32
    micro_batch: int = 0  # sequences a forward pass; larger batches accumulate gradients (0: chosen from the batches)
    rows_per_launch: str = "auto"  # grid rows trained at once; auto: some 16 runs on a CPU, 64 MiB of traces on a GPU
    trace: str = "auto"  # on: store every step's loss; off; auto: on except for the mlp

    lr: float = 1e-3  # learning rate
    lr_matrix: float | None = field(default=None, alias="--lr.matrix")  # learning rate of attention and mlp matrices
    lr_attention: float | None = field(default=None, alias="--lr.attention")  # learning rate of attention matrices
    lr_mlp: float | None = field(default=None, alias="--lr.mlp")  # learning rate of mlp matrices
    lr_embedding: float | None = field(default=None, alias="--lr.embedding")  # learning rate of the embedding
    lr_unembedding: float | None = field(default=None, alias="--lr.unembedding")  # learning rate of the unembedding
    tokens: float = 16384.0  # tokens trained on; steps = ceil(tokens / (batch * context))
    batch: int = 4  # sequences a step
    warmup: float = 0.0  # share of the steps spent warming up linearly
    weight_decay: float = 0.0  # decoupled weight decay
    beta1: float = 0.9  # adamw: decay of the first moment
    beta2: float = 0.95  # adamw: decay of the second moment
    clip: float = 0.0  # largest gradient norm (0: no clipping)
    init_scale: float = 1.0  # factor on every initial weight matrix
    label_smoothing: float = 0.0  # share of the target spread over the vocabulary
    seed: int = 0  # seed of the initial weights and the data order

    steps: int = 500  # mlp: gradient descent steps
    nonlinearity: str = "tanh"  # mlp: tanh, relu or identity
    data_points: int = 0  # mlp: training points (0: 272, or 16 for the identity network)
    minibatch: int = 0  # mlp: points a step, drawn with replacement (0: the full batch)
    offset: float = 0.0  # mlp: constant added to the first layer's initial weights
    offset_every_step: bool = False  # mlp: add the offset at each step, as the public notebook does
    problem: str = ""  # mlp: .npz with X, Y, W0, W1 (and minibatch_index) instead of the seed's
    lr_0: float | None = field(default=None, alias="--lr.0")  # mlp: learning rate of the first layer
    lr_1: float | None = field(default=None, alias="--lr.1")  # mlp: learning rate of the second layer

    @property
    def grid(self) -> Grid:
        """The two axes, parsed."""
        return Grid.parse(self.y, self.x)

    @property
    def swept(self) -> tuple[str, str]:
        """Names of the y and the x axis."""
        return self.grid.y.name, self.grid.x.name

    def fixed(self, name: str) -> float | None:
        """The fixed value of a hyper-parameter (None: follows `lr`)."""
        return getattr(self, attribute(name))

    def values(self, name: str) -> np.ndarray:
        """Every value a hyper-parameter takes in the sweep, float64: its axis, or the one it is fixed at."""
        for axis in (self.grid.y, self.grid.x):
            if axis.name == name:
                return axis.values
        return np.array([self.fixed(name)], dtype=np.float64)

    def to_json(self) -> dict:
        """Every field, as stored in the store's attributes."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: dict) -> "SweepConfig":
        """Read back `to_json`; fields this version does not know are an error."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(stored) - known)
        if unknown:
            raise ValueError(f"the stored configuration has unknown fields {unknown}; it comes from another version")
        return cls(**stored)

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of the canonical JSON of every field."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()


def resolve(config: SweepConfig, device: str) -> SweepConfig:
    """Fill in what `auto`, 0 and '' stand for, except rows_per_launch; check every field.

    Raises:
        ValueError: a field's value is not legal, in one line.
    """
    expect("network", config.network, NETWORKS)
    y, x = DEFAULT_AXES[config.network]
    config = replace(config, y=config.y or y, x=config.x or x)
    if config.precision == "auto":
        automatic = "fp32" if config.network == "mlp" or device == "cpu" else "bf16"
        config = replace(config, precision=automatic)
    if config.trace == "auto":
        config = replace(config, trace="off" if config.network == "mlp" else "on")
    if config.network == "gpt":
        config = resolve_shape(config)
    if config.network == "mlp" and config.data_points == 0:
        config = replace(config, data_points=16 if config.nonlinearity == "identity" else 272)
    check(config)
    if config.micro_batch == 0 and config.network != "mlp":
        config = replace(config, micro_batch=automatic_micro_batch(config))
    return config


def resolve_shape(config: SweepConfig) -> SweepConfig:
    """Width, heads and key/value heads of a gpt given by its depth."""
    at_least("depth", config.depth, 1)
    for name in ("width", "heads", "kv_heads", "vocabulary"):
        at_least(name, getattr(config, name), 0)
    width = config.width or 64 * config.depth
    heads = config.heads or max(width // 64, 1)
    if width % heads:
        raise ValueError(f"width {width} is not divisible by heads {heads}; change --width or --heads")
    return replace(config, width=width, heads=heads, kv_heads=config.kv_heads or heads)


def automatic_micro_batch(config: SweepConfig) -> int:
    """Sequences a forward pass: the batches' common divisor, cut evenly where it exceeds 4,096 tokens.

    A function of the configuration alone, never of the number of replicas or the free memory, so a
    cell's sums are cut at the same places whatever machine or launch trains it. Where the common
    divisor is below 1,024 tokens, too few to fill a GPU, rows are masked instead.
    """
    batches = config.values("batch").astype(int)
    divisor = int(np.gcd.reduce(batches))
    enough = max(1024 // config.context, 1)
    if divisor < enough:
        return min(int(batches.max()), enough)
    pieces = -(-divisor // max(4096 // config.context, 1))
    return -(-divisor // pieces)


def check(config: SweepConfig) -> None:
    """Raise ValueError in one line for the first field that is not legal."""
    grid = config.grid
    check_fields_apply(config)
    expect("precision", config.precision, PRECISIONS[config.network])
    expect("schedule", config.schedule, SCHEDULES)
    expect("optimizer", config.optimizer, OPTIMIZERS)
    expect("trace", config.trace, ("on", "off"))
    expect("nonlinearity", config.nonlinearity, NONLINEARITIES)
    rows = config.rows_per_launch
    if rows != "auto" and (not rows.isdecimal() or int(rows) < 1):
        raise ValueError(f"rows_per_launch is {rows!r}, expected auto or a whole number >= 1")
    for axis in (grid.y, grid.x):
        if config.network not in HYPER_PARAMETERS[axis.name].networks:
            known = [n for n, rule in HYPER_PARAMETERS.items() if config.network in rule.networks]
            raise ValueError(
                f"axis {axis.name!r} does not apply to the network {config.network!r}; it has {', '.join(known)}"
            )
        if why := without_effect(config, axis.name):
            raise ValueError(f"axis {axis.name} changes nothing {why}; sweep something else, or change that")
        axis.check_spacing(config.precision)
    for name, rule in HYPER_PARAMETERS.items():
        value = config.fixed(name)
        if value is not None and not rule.low <= value <= rule.high:
            raise ValueError(f"{name} is {value:g}, expected a value in [{rule.low:g}, {rule.high:.7g}]")
    for name, low in (
        ("context", 1),
        ("eps", 0),
        ("micro_batch", 0),
        ("validation_rows", 1),
        ("steps", 1),
        ("minibatch", 0),
        ("data_rows", 0),
        ("data_points", 0),
    ):
        at_least(name, getattr(config, name), low)
    for name in ("momentum", "floor", "decay"):
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name} is {getattr(config, name):g}, expected a value in [0, 1]")
    if config.problem and not Path(config.problem).is_file():
        raise ValueError(f"problem file {config.problem!r} does not exist; give an .npz with X, Y, W0 and W1")
    if config.network != "mlp":
        check_tokens(config)


def check_fields_apply(config: SweepConfig) -> None:
    """A field that the network does not have must be left alone."""
    networks = {name: of for of, names in FIELDS_OF.items() for name in names.split()}
    networks |= {attribute(name): rule.networks for name, rule in HYPER_PARAMETERS.items()}
    del networks["init_scale"]  # the mlp's is fixed
    for own in fields(SweepConfig):
        value = getattr(config, own.name)
        if config.network not in networks.get(own.name, NETWORKS) and value != own.default:
            raise ValueError(
                f"{own.name} is {value!r}, but the network {config.network!r} has none (it is for "
                f"{' and '.join(networks[own.name])}); leave it out, or choose another --network"
            )


def without_effect(config: SweepConfig, name: str) -> str:
    """Why a hyper-parameter changes nothing in this sweep, '' where it does."""
    given = {n for n in HYPER_PARAMETERS if config.fixed(n) is not None} | set(config.swept)
    if name in ("beta1", "beta2") and config.optimizer == "sgd":
        return "with --optimizer sgd"
    if name == "lr.matrix" and {"lr.attention", "lr.mlp"} <= given:
        return "where lr.attention and lr.mlp are given"
    if name == "lr" and config.network == "mlp" and {"lr.0", "lr.1"} <= given:
        return "where lr.0 and lr.1 are given"
    return ""


def check_tokens(config: SweepConfig) -> None:
    """Every cell must have at least one whole step of tokens."""
    tokens = config.values("tokens").min()
    step = int(config.values("batch").max()) * config.context
    if tokens < step:
        raise ValueError(
            f"tokens starts at {tokens:g}, below one step of {step} tokens (batch x context); "
            "raise tokens, or lower --batch or --context"
        )


def expect(name: str, value: str, legal: tuple[str, ...]) -> None:
    """Raise ValueError unless the value is one of the legal ones."""
    if value not in legal:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(legal)}")


def at_least(name: str, value: float, low: float) -> None:
    """Raise ValueError unless value >= low."""
    if not value >= low:
        raise ValueError(f"{name} is {value:g}, expected at least {low:g}")


PRESETS: dict[str, SweepConfig] = {
    "default": SweepConfig(),
    "smollm2-sft": SweepConfig(
        network="smollm2",
        y="lr:log:1e-6:1e-1:16",
        x="tokens:log:1024:65536:16",
        context=128,
        batch=8,
        beta2=0.999,
        data_rows=4096,
        validation_rows=32,
    ),
}
