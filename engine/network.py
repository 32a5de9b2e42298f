"""One network as the engine sees it: a module for one replica and what goes with it."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine import checkpoint
from engine.config import SweepConfig
from engine.data import Tokenizer
from engine.models import Embedding, gpt, llama, parameter_shapes
from engine.tokenizer import ByteTokenizer


class Network(NamedTuple):
    """A network and its surroundings.

    module: `forward(tokens_BT, targets_BT, hyper, key) -> summed loss`, 0-dim fp32, parameters on the meta device;
    hyper holds the family's forward hyper-parameters, 0-dim fp32 each, key is (seed, step, first row of the batch),
    int64 [3]. shapes: of its parameters. groups: the groups of each, the one whose hyper-parameters it takes first; a
    tied tensor has two.
    initial: seed -> fp32 CPU weights. tokenizer: what its vocabulary stands for. flops_per_token: of training.
    activation_bytes: (tokens, bytes per element) -> bytes a replica. same_start: whether `initial` is the same for
    every seed. fused: rows (first, last + 1) of the matrices that lie in one parameter.
    """

    module: nn.Module
    shapes: dict[str, tuple[int, ...]]
    groups: dict[str, tuple[str, ...]]
    initial: Callable[[int], dict[str, Tensor]]
    tokenizer: Tokenizer
    vocabulary: int
    flops_per_token: float
    activation_bytes: Callable[[int, int], int]
    same_start: bool = False
    fused: Mapping[str, tuple[tuple[int, int], ...]] = {}

    @property
    def parameters(self) -> int:
        """Parameters of one replica."""
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())

    @property
    def tables(self) -> set[str]:
        """Names of the parameters that are tables, with a row for each token or position."""
        kinds = Embedding, nn.Embedding
        return {f"{name}.weight" for name, module in self.module.named_modules() if isinstance(module, kinds)}

    def in_groups(self, groups: list[str], parents: Mapping[str, str]) -> set[str]:
        """Parameters of some groups, or of groups whose parent is among them."""
        return {name for name, own in self.groups.items() if any(g in groups or parents.get(g) in groups for g in own)}


def load_smollm2(config: SweepConfig, device: torch.device | str) -> Network:
    """The pretrained network; its start is the same for every seed."""
    shape, weights, tokenizer = checkpoint.load_smollm2(config.training.context)
    with torch.device("meta"):
        module = llama.Llama(shape, device)
    network = describe(module, llama, shape, lambda seed: weights, tokenizer)
    return network._replace(same_start=True)


def make_gpt(config: SweepConfig, device: torch.device | str) -> Network:
    """A network of the configuration's shape over bytes."""
    own, tokenizer = config.shape, ByteTokenizer()
    vocabulary = own.vocabulary or tokenizer.vocabulary
    if vocabulary < tokenizer.vocabulary:
        raise ValueError(
            f"vocabulary {vocabulary} is smaller than the byte tokenizer's {tokenizer.vocabulary}; raise --vocabulary"
        )
    shape = gpt.GPTConfig(own.depth, own.width, own.heads, own.kv_heads, config.training.context, vocabulary)
    with torch.device("meta"):
        module = gpt.GPT(shape, device)
    return describe(module, gpt, shape, partial(gpt.initial_weights, shape), tokenizer)


def describe(module: nn.Module, family, shape, initial, tokenizer) -> Network:
    """A Network out of a model file's common functions."""
    shapes = parameter_shapes(module)
    heads, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    parts = ((0, heads), (heads, heads + keys), (heads + keys, heads + 2 * keys))
    return Network(
        module,
        shapes,
        {name: family.parameter_groups(shape, name) for name in shapes},
        initial,
        tokenizer,
        shape.vocabulary,
        family.flops_per_token(shape),
        partial(family.activation_bytes, shape),
        fused={name: parts for name in shapes if name.endswith(".qkv")},
    )
