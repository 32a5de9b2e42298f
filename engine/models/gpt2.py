"""GPT-2 for one replica: learned positions, LayerNorm, GELU, biases (Radford et al. 2019).

q, k, v are the rows of one `qkv`, as in the published weights, whose matrices are stored transposed
(`engine.checkpoint` turns them). Attention is the rotary kernel with an angle of zero.

Shape letters: B batch, T time, D width, H heads, K head dim, F MLP width, V vocabulary, N = B·T.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engine.family import VECTORS
from engine.models import (
    Dropout,
    Embedding,
    check_positive,
    check_shape,
    dropout_of,
    linear_drop_add_norm,
    normal_weights,
    parameter_shapes,
    qkv_rows,
    shorter_context,
)
from engine.models.cache import Cache, attention, places
from kernels.activation import bias_gelu
from kernels.embedding import embedding
from kernels.linear import linear
from kernels.loss import linear_cross_entropy, linear_cross_entropy_by_row
from kernels.norm import layer_norm
from kernels.ordered_sum import add_bias

NO_SOFTCAP = 0.0
INITIAL_STD = 0.02


@dataclass(frozen=True)
class GPT2Config:
    depth: int
    """layers"""
    width: int
    """D, size of the residual stream"""
    heads: int
    """heads H; the head dimension K is width / heads"""
    mlp_width: int
    """F, hidden units of the MLP"""
    context: int
    """T, the longest row the network takes, rows of the position table"""
    vocabulary: int
    """V, rows of the embedding"""
    norm_eps: float = 1e-5
    """added to the variance in every LayerNorm"""
    tied: bool = True
    """whether the embedding is the unembedding too"""

    def __post_init__(self) -> None:
        check_positive(
            depth=self.depth,
            width=self.width,
            mlp_width=self.mlp_width,
            context=self.context,
            vocabulary=self.vocabulary,
        )
        check_shape(self.width, self.heads, self.heads)

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    def with_context(self, context: int) -> "GPT2Config":
        """The same network for shorter rows; ValueError beyond what it was trained for."""
        return shorter_context(self, context)


class NextNorm(NamedTuple):
    """Weight and bias of the layer norm that reads the residual stream next."""

    weight_D: Tensor
    bias_D: Tensor


class Attention(nn.Module):
    def __init__(self, config: GPT2Config, layer: int):
        super().__init__()
        self.config = config
        self.layer = layer
        self.norm = nn.Parameter(torch.empty(config.width))
        self.norm_bias = nn.Parameter(torch.empty(config.width))
        self.qkv = nn.Parameter(torch.empty(3 * config.width, config.width))
        self.qkv_bias = nn.Parameter(torch.empty(3 * config.width))
        self.output = nn.Parameter(torch.empty(config.width, config.width))
        self.output_bias = nn.Parameter(torch.empty(config.width))

    def forward(
        self,
        normed_BTD: Tensor,
        x_BTD: Tensor,
        after: NextNorm,
        cos: Tensor,
        sin: Tensor,
        drop: Dropout | None,
        cache: Cache | None,
    ) -> tuple[Tensor, Tensor]:
        heads, eps, site = self.config.heads, self.config.norm_eps, 1 + 2 * self.layer
        qkv_BTC = add_bias(linear(normed_BTD, self.qkv), self.qkv_bias)
        mixed_BTD = attention(qkv_BTC, cos, sin, heads, heads, self.layer, cache)
        return linear_drop_add_norm(
            mixed_BTD, self.output, x_BTD, after.weight_D, eps, drop, site, self.output_bias, after.bias_D
        )


class MLP(nn.Module):
    def __init__(self, config: GPT2Config, layer: int):
        super().__init__()
        self.layer = layer
        self.norm_eps = config.norm_eps
        self.norm = nn.Parameter(torch.empty(config.width))
        self.norm_bias = nn.Parameter(torch.empty(config.width))
        self.up = nn.Parameter(torch.empty(config.mlp_width, config.width))
        self.up_bias = nn.Parameter(torch.empty(config.mlp_width))
        self.down = nn.Parameter(torch.empty(config.width, config.mlp_width))
        self.down_bias = nn.Parameter(torch.empty(config.width))

    def forward(
        self, normed_BTD: Tensor, x_BTD: Tensor, after: NextNorm, drop: Dropout | None
    ) -> tuple[Tensor, Tensor]:
        hidden_BTF = bias_gelu(linear(normed_BTD, self.up), self.up_bias)
        site = 2 + 2 * self.layer
        return linear_drop_add_norm(
            hidden_BTF, self.down, x_BTD, after.weight_D, self.norm_eps, drop, site, self.down_bias, after.bias_D
        )


class Layer(nn.Module):
    def __init__(self, config: GPT2Config, layer: int):
        super().__init__()
        self.attention = Attention(config, layer)
        self.mlp = MLP(config, layer)

    def forward(
        self,
        normed_BTD: Tensor,
        x_BTD: Tensor,
        after: NextNorm,
        cos: Tensor,
        sin: Tensor,
        drop: Dropout | None,
        cache: Cache | None,
    ) -> tuple[Tensor, Tensor]:
        between = NextNorm(self.mlp.norm, self.mlp.norm_bias)
        normed_BTD, x_BTD = self.attention(normed_BTD, x_BTD, between, cos, sin, drop, cache)
        return self.mlp(normed_BTD, x_BTD, after, drop)


class GPT2(nn.Module):
    """One replica. Build it under `torch.device("meta")` where weights come from outside;
    the tables of the zero rotation are made on `device` all the same."""

    cos_TK2: Tensor
    sin_TK2: Tensor

    def __init__(self, config: GPT2Config, device: torch.device | str = "cpu"):
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocabulary, config.width)
        self.positions = Embedding(config.context, config.width)
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(config.depth))
        self.final_norm = nn.Parameter(torch.empty(config.width))
        self.final_norm_bias = nn.Parameter(torch.empty(config.width))
        if not config.tied:
            self.unembedding = Embedding(config.vocabulary, config.width)
        shape = (config.context, config.head_dim // 2)
        self.register_buffer("cos_TK2", torch.ones(shape, device="cpu").to(device), persistent=False)
        self.register_buffer("sin_TK2", torch.zeros(shape, device="cpu").to(device), persistent=False)

    def head_VD(self) -> Tensor:
        return self.embedding.weight if self.config.tied else self.unembedding.weight

    def features(self, tokens_BT: Tensor, drop: Dropout | None = None, cache: Cache | None = None) -> Tensor:
        """The normed residual stream [B, T, D] that the head reads; drop: behind the embedding and each half of a
        layer, as in the original, whose dropout of attention weights is left out; cache: what the tokens before
        these left."""
        at = places(tokens_BT, self.config.context, cache)
        cos, sin, positions = self.cos_TK2[at], self.sin_TK2[at], self.positions.weight[at]
        x_BTD = embedding(tokens_BT, self.embedding.weight)
        if cache is None:  # the bias of a whole row
            x_BTD = add_bias(x_BTD.flatten(1), positions.flatten()).view(x_BTD.shape)
        else:  # every row has its own
            x_BTD = x_BTD + positions
        if drop is not None:
            x_BTD = drop(x_BTD, 0)
        # the residual stream is normed where it is updated, with the weights of whoever reads it next
        readers: list[Any] = [layer.attention for layer in self.layers]
        norms = [NextNorm(reader.norm, reader.norm_bias) for reader in readers]
        norms.append(NextNorm(self.final_norm, self.final_norm_bias))
        normed_BTD = layer_norm(x_BTD, *norms[0], self.config.norm_eps)
        for layer, after in zip(self.layers, norms[1:], strict=True):
            normed_BTD, x_BTD = layer(normed_BTD, x_BTD, after, cos, sin, drop, cache)
        return normed_BTD

    def forward(
        self, tokens_BT: Tensor, targets_BT: Tensor, hyper: Mapping[str, Tensor], key_3: Tensor, by_row: bool = False
    ) -> Tensor:
        """Summed loss, 0-dim fp32, over the targets that are not -100; by_row: each row's own [B], not smoothed.

        hyper: label_smoothing ε, 0-dim fp32: (1 - ε)·nll + ε·mean over V of -log p; dropout, where any is dropped.
        key_3: seed, step and first row of the batch, int64, by which it is drawn; by row nothing is.
        """
        drop = None if by_row else dropout_of(hyper, key_3)
        features_BTD, head_VD = self.features(tokens_BT, drop), self.head_VD()
        if by_row:
            return linear_cross_entropy_by_row(features_BTD, head_VD, targets_BT, NO_SOFTCAP)
        x_ND, targets_N = features_BTD.flatten(0, 1), targets_BT.flatten()
        return linear_cross_entropy(x_ND, head_VD, targets_N, NO_SOFTCAP, hyper["label_smoothing"])

    def logits(self, tokens_BT: Tensor) -> Tensor:
        """Logits [B, T, V] in fp32; training never makes them."""
        return self.logits_of(self.features(tokens_BT))

    def logits_of(self, features: Tensor) -> Tensor:
        """Logits [..., V] of some features [..., D], by an fp32 product."""
        return linear(features.float(), self.head_VD().float())


def parameter_groups(config: GPT2Config, name: str) -> tuple[str, ...]:
    """The groups of a parameter: attention, mlp, embedding or unembedding; of norms and biases also vector.

    A norm and a bias go with the matrix they feed or follow, positions and final norm with the embedding.
    """
    if name.endswith(("norm", "bias")):
        return name.split(".")[2] if name.startswith("layers.") else "embedding", VECTORS
    if name.startswith("layers."):
        return (name.split(".")[2],)
    if name == "embedding.weight" and config.tied:
        return "embedding", "unembedding"
    return ("unembedding",) if name == "unembedding.weight" else ("embedding",)


def fused_rows(config: GPT2Config, name: str) -> tuple[tuple[int, int], ...]:
    """Rows of q, k and v in their fused projection."""
    return qkv_rows(config.heads, config.heads, config.head_dim) if name.endswith(".qkv") else ()


def initial_weights(config: GPT2Config, seed: int) -> dict[str, Tensor]:
    """GPT-2's: N(0, 0.02²), what writes the residual stream divided by √(2 L); norms 1, biases 0. fp32, CPU."""
    with torch.device("meta"):
        shapes = parameter_shapes(GPT2(config))
    weights = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            weights[name] = torch.zeros(shape) if name.endswith("_bias") else torch.ones(shape)
        else:
            writes = name.endswith((".output", ".down"))
            std = INITIAL_STD * (2 * config.depth) ** -0.5 if writes else INITIAL_STD
            weights[name] = normal_weights(seed, name, shape, std)
    return weights


def flops_per_token(config: GPT2Config) -> float:
    """Training FLOPs a token: 6 a matrix weight (the head's too), 6·L·D·T for attention."""
    matrices = config.depth * config.width * (4 * config.width + 2 * config.mlp_width)
    unembedding = config.vocabulary * config.width
    return 6.0 * (matrices + unembedding + config.depth * config.width * config.context)


def activation_bytes(config: GPT2Config, tokens: int, bytes_per_element: int) -> int:
    """Bytes of activations one replica holds at the peak of a micro-step of `tokens` tokens.

    A layer keeps the stream and its norm twice, q/k/v, the attention's output
    (with one fp32 log-sum a head), the hidden units before and after GELU; then the logits,
    which their gradient overwrites, and in the backward two gradients of hidden size.
    """
    layer = 8 * config.width + 2 * config.mlp_width
    elements = config.depth * layer + config.vocabulary + 2 * config.mlp_width + 4 * config.width
    return tokens * (bytes_per_element * elements + 4 * config.depth * config.heads)
