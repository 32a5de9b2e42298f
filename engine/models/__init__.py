"""Networks, one file each, written for ONE replica; torch.func.vmap makes the stack.

A network file holds a frozen config, an `nn.Module`, and functions of the same names:

    parameter_groups(config, name)     the groups of a parameter: two where it is tied, or a norm or bias
    fused_rows(config, name)           rows of the matrices that lie in one parameter, () where it is one
    initial_weights(config, seed)      {name: fp32 CPU tensor}
    flops_per_token(config)            FLOPs to train on one token
    activation_bytes(config, tokens, bytes_per_element)

and of the module

    forward(tokens, targets, hyper, key, by_row)   the loss
    features(tokens, dropout, cache)               what the head reads; with a `cache`, of the tokens that follow it
    logits_of(features)                            fp32

The module's own parameters only say names and shapes: weights come in through
`torch.func.functional_call`, so modules are built on the meta device. Whatever sums over a replica's
rows, forward or backward, is an operator of `kernels`: that is what makes a network batch-invariant.
This file holds what the networks share.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kernels.dropout import dropout
from kernels.linear import linear, linear_add_norm
from kernels.norm import add_layer_norm, add_rms_norm, rms_norm
from kernels.ordered_sum import add_bias


class Embedding(nn.Module):
    """A [V, D] table; holds the weight of an embedding or of an untied unembedding."""

    def __init__(self, vocabulary: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, width))


class Dropout(NamedTuple):
    """The dropouts of one forward: their rate, 0-dim fp32, and seed, step and first row of the batch, int64 [3]."""

    rate: Tensor
    key_3: Tensor

    def __call__(self, x: Tensor, site: int) -> Tensor:
        """x with elements dropped by random numbers of their own at each site."""
        return dropout(x, self.rate, self.key_3, site)


def dropout_of(hyper: Mapping[str, Tensor], key_3: Tensor) -> Dropout | None:
    """The dropouts of a forward that has a rate for them."""
    return Dropout(hyper["dropout"], key_3) if "dropout" in hyper else None


def linear_drop_add_norm(
    x: Tensor,
    weight_OI: Tensor,
    residual: Tensor,
    norm_O: Tensor | None,
    eps: float,
    drop: Dropout | None,
    site: int,
    bias_O: Tensor | None = None,
    norm_bias_O: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`kernels.linear.linear_add_norm` of a layer that may have a bias, which is dropped with its product.

    With a dropout the product is rounded before it is added, so that a rate of 0 beside others is no dropout but for
    that.
    """
    if drop is None:
        residual = residual if bias_O is None else add_bias(residual, bias_O)
        return linear_add_norm(x, weight_OI, residual, norm_O, eps, norm_bias_O)
    product = linear(x, weight_OI)
    dropped = drop(product if bias_O is None else add_bias(product, bias_O), site)
    if norm_O is None or norm_bias_O is None:
        return add_rms_norm(dropped, residual, norm_O, eps)
    return add_layer_norm(dropped, residual, norm_O, norm_bias_O, eps)


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


def rows_of(*heights: int) -> tuple[tuple[int, int], ...]:
    """First row and last + 1 of matrices of some heights that lie one after another."""
    ends = list(accumulate(heights))
    return tuple(zip([0, *ends[:-1]], ends, strict=True))


def qkv_rows(heads: int, kv_heads: int, head_dim: int) -> tuple[tuple[int, int], ...]:
    """Rows of q, k and v in the fused projection."""
    return rows_of(heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)


def rotary_tables(
    context: int,
    head_dim: int,
    base: float,
    stretch: Callable[[NDArray[np.float64]], NDArray[np.float64]] | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, K/2], fp32, of position · base^(-2i/K) (Su et al. 2021).

    stretch maps the frequencies [K/2] to others. Computed in float64 on the host whatever the
    default device is, so that every machine has the same tables.
    """
    frequency = base ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if stretch is not None:
        frequency = stretch(frequency)
    angle = np.outer(np.arange(context, dtype=np.float64), frequency)
    cos_TK2, sin_TK2 = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    return torch.from_numpy(cos_TK2), torch.from_numpy(sin_TK2)


def norm_heads(qkv_BTC: Tensor, heads: int, kv_heads: int, q_norm_K: Tensor, k_norm_K: Tensor, eps: float) -> Tensor:
    """The fused projection [B, T, (H + 2 G) K] with every head of q and k normed over its K channels.

    Before the rotation, which keeps a head's norm; q_norm_K and k_norm_K are the norms' weights [K].
    """
    q_BTC, k_BTC, v_BTC = qkv_BTC.split([n * q_norm_K.shape[-1] for n in (heads, kv_heads, kv_heads)], dim=-1)
    normed = [
        rms_norm(x_BTC.unflatten(-1, (-1, norm_K.shape[-1])), norm_K, eps).flatten(-2)
        for x_BTC, norm_K in ((q_BTC, q_norm_K), (k_BTC, k_norm_K))
    ]
    return torch.cat([*normed, v_BTC], dim=-1)


def check_shape(width: int, heads: int, kv_heads: int, head_dim: int | None = None) -> None:
    """ValueError unless the heads divide the width (where no head dimension is given), their dimension is
    even, and groups fit."""
    if heads < 1 or (head_dim is None and width % heads):
        raise ValueError(f"width {width} is not divisible by heads {heads}: choose a multiple of the heads")
    if head_dim is not None and (head_dim < 2 or head_dim % 2):
        raise ValueError(f"head dimension {head_dim} is odd or below 2, rotary embedding needs pairs: change head_size")
    if head_dim is None and width // heads % 2:
        raise ValueError(
            f"head dimension {width // heads} (width {width} / heads {heads}) is odd, rotary "
            f"embedding needs an even one: change width or heads"
        )
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"heads {heads} is not a multiple of kv_heads {kv_heads}: choose a divisor of the heads")


def shorter_context(config: Any, context: int) -> Any:
    """The same configuration for shorter rows; ValueError beyond the rows it was trained for."""
    if context > config.context:
        raise ValueError(
            f"context {context} is longer than the model's {config.context}: give a context of at most {config.context}"
        )
    return replace(config, context=context)


def check_positive(**values: int) -> None:
    """ValueError naming the first value below 1."""
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1: give a positive {name}")
