"""One network as the engine sees it: a module for one replica and what goes with it."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine import checkpoint
from engine.config import SweepConfig
from engine.data import Tokenizer
from engine.models import gpt, llama, parameter_shapes
from engine.tokenizer import ByteTokenizer


class Network(NamedTuple):
    """A network and its surroundings.

    module: `forward(tokens_BT, targets_BT, label_smoothing) -> summed loss`, parameters on the meta
    device. shapes: of its parameters. groups: learning-rate group of each. initial: seed -> fp32 CPU
    weights. tokenizer: what its vocabulary stands for. flops_per_token: of training.
    activation_bytes: (tokens, bytes per element) -> bytes a replica.
    """

    module: nn.Module
    shapes: dict[str, tuple[int, ...]]
    groups: dict[str, str]
    initial: Callable[[int], dict[str, Tensor]]
    tokenizer: Tokenizer
    vocabulary: int
    flops_per_token: float
    activation_bytes: Callable[[int, int], int]

    @property
    def parameters(self) -> int:
        """Parameters of one replica."""
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())


def load_network(config: SweepConfig, device: torch.device | str) -> Network:
    """The network a configuration names.

    Raises:
        ValueError: its shape is not legal, its vocabulary is smaller than the tokenizer's, or its
            checkpoint is not installed.
    """
    return load_smollm2(config, device) if config.network == "smollm2" else make_gpt(config, device)


def load_smollm2(config: SweepConfig, device: torch.device | str) -> Network:
    """The pretrained network; its start is the same for every seed."""
    shape, weights, tokenizer = checkpoint.load_smollm2(config.context)
    with torch.device("meta"):
        module = llama.Llama(shape, device)
    return describe(module, llama, shape, lambda seed: weights, tokenizer)


def make_gpt(config: SweepConfig, device: torch.device | str) -> Network:
    """A network of the configuration's shape over bytes."""
    tokenizer = ByteTokenizer()
    vocabulary = config.vocabulary or tokenizer.vocabulary
    if vocabulary < tokenizer.vocabulary:
        raise ValueError(
            f"vocabulary {vocabulary} is smaller than the byte tokenizer's {tokenizer.vocabulary}; raise --vocabulary"
        )
    shape = gpt.GPTConfig(config.depth, config.width, config.heads, config.kv_heads, config.context, vocabulary)
    with torch.device("meta"):
        module = gpt.GPT(shape, device)
    return describe(module, gpt, shape, partial(gpt.initial_weights, shape), tokenizer)


def describe(module: nn.Module, family, shape, initial, tokenizer) -> Network:
    """A Network out of a model file's common functions."""
    shapes = parameter_shapes(module)
    return Network(
        module,
        shapes,
        {name: family.parameter_group(name) for name in shapes},
        initial,
        tokenizer,
        shape.vocabulary,
        family.flops_per_token(shape),
        partial(family.activation_bytes, shape),
    )
