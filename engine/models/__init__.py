"""Networks, one file each, written for ONE replica; torch.func.vmap makes the stack.

A network file holds a frozen config, an `nn.Module`, and functions of the same names:

    parameter_group(name)              the learning-rate group of a parameter
    initial_weights(config, seed)      {name: fp32 CPU tensor}
    flops_per_token(config)            FLOPs to train on one token
    activation_bytes(config, tokens, bytes_per_element)

The module's own parameters only say names and shapes: weights come in through
`torch.func.functional_call`, so modules are built on the meta device. This file holds what the
networks share.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor, nn


class Embedding(nn.Module):
    """A [V, D] table; holds the weight of an embedding or of an untied unembedding."""

    def __init__(self, vocabulary: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, width))


def weight_generator(seed: int, name: str) -> np.random.Generator:
    """The random numbers of one parameter: a function of the seed and the parameter's name only.

    Philox (Salmon et al. 2011) keyed by (seed, first 8 bytes of the name's SHA-256), so that
    adding a layer, or training in another slot, changes no other parameter's first values.
    """
    name_key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    key = np.array([seed, name_key], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def normal_weights(seed: int, name: str, shape: tuple[int, ...], std: float) -> Tensor:
    """N(0, std²) fp32 on the CPU."""
    values = weight_generator(seed, name).standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(values).mul_(std)


def uniform_weights(seed: int, name: str, shape: tuple[int, ...], std: float) -> Tensor:
    """Uniform on ±√3·std, whose standard deviation is std; fp32 on the CPU."""
    values = weight_generator(seed, name).random(shape, dtype=np.float32)
    return torch.from_numpy(values).mul_(2.0).sub_(1.0).mul_(3.0**0.5 * std)


def parameter_shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter, in the order of the module."""
    return {name: tuple(weight.shape) for name, weight in network.named_parameters()}


def rotary_tables(context: int, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, K/2], fp32, of position · base^(-2i/K) (Su et al. 2021).

    Computed in float64 on the host whatever the default device is, so that every machine has the
    same tables.
    """
    frequency = base ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    angle = np.outer(np.arange(context, dtype=np.float64), frequency)
    cos_TK2, sin_TK2 = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    return torch.from_numpy(cos_TK2), torch.from_numpy(sin_TK2)


def check_shape(width: int, heads: int, kv_heads: int) -> None:
    """ValueError unless the heads divide the width, their dimension is even, and groups fit."""
    if heads < 1 or width % heads:
        raise ValueError(f"width {width} is not divisible by heads {heads}: choose a multiple of the heads")
    if width // heads % 2:
        raise ValueError(
            f"head dimension {width // heads} (width {width} / heads {heads}) is odd, rotary "
            f"embedding needs an even one: change width or heads"
        )
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"heads {heads} is not a multiple of kv_heads {kv_heads}: choose a divisor of the heads")


def check_positive(**values: int) -> None:
    """ValueError naming the first value below 1."""
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1: give a positive {name}")
