"""The Llama family for one replica: RMSNorm with weights, grouped-query attention, SwiGLU.

Touvron et al. 2023; with biases on q, k and v it is Qwen2, with norms on the heads of q and k
Qwen3. `engine.checkpoint` loads weights into it. Matrices are fused as the kernels want them: q, k,
v are the rows of one `qkv`, gate and up of one `gate_up`. Rotary positions turn half-split pairs
(i, i + K/2), as Hugging Face's weights expect.

Shape letters: B batch, T time, D width, H heads, K head dim, F MLP width, V vocabulary, N = B·T.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from engine.family import VECTORS
from engine.models import (
    Dropout,
    Embedding,
    check_positive,
    check_shape,
    dropout_of,
    linear_drop_add_norm,
    norm_heads,
    normal_weights,
    parameter_shapes,
    qkv_rows,
    rotary_tables,
    rows_of,
    shorter_context,
)
from engine.models.cache import Cache, attention, places
from kernels.activation import swiglu
from kernels.embedding import embedding
from kernels.linear import linear
from kernels.loss import linear_cross_entropy, linear_cross_entropy_by_row
from kernels.norm import rms_norm
from kernels.ordered_sum import add_bias

NO_SOFTCAP = 0.0


@dataclass(frozen=True)
class RotaryScaling:
    """Llama 3's stretch of the slow rotary frequencies (Grattafiori et al. 2024, arXiv:2407.21783)."""

    factor: float
    """divides the frequencies whose wave is longer than original_context / low_factor tokens"""
    low_factor: float
    high_factor: float
    """frequencies whose wave is shorter than original_context / high_factor tokens stay"""
    original_context: int
    """tokens a row before the stretch"""

    def apply(self, frequency_K2: NDArray[np.float64]) -> NDArray[np.float64]:
        """The stretched frequencies; between the two wave lengths the two are mixed linearly."""
        waves = self.original_context * frequency_K2 / (2 * np.pi)
        kept = np.clip((waves - self.low_factor) / (self.high_factor - self.low_factor), 0.0, 1.0)
        return frequency_K2 * (kept + (1 - kept) / self.factor)


@dataclass(frozen=True)
class LlamaConfig:
    depth: int
    """layers"""
    width: int
    """D, size of the residual stream"""
    heads: int
    """query heads H; the head dimension K is width / heads"""
    kv_heads: int
    """key and value heads, a divisor of heads"""
    mlp_width: int
    """F, hidden units of the MLP"""
    context: int
    """T, the longest row the network takes"""
    vocabulary: int
    """V, rows of the embedding"""
    rotary_base: float = 10_000.0
    """base of the rotary frequencies"""
    norm_eps: float = 1e-5
    """added to the mean square in every RMSNorm"""
    tied: bool = True
    """whether the embedding is the unembedding too"""
    head_size: int | None = None
    """K where it is not width / heads"""
    qkv_bias: bool = False
    """whether q, k and v have biases"""
    output_bias: bool = False
    """whether the attention's output has a bias"""
    qk_norm: bool = False
    """whether the heads of q and k are normed, with weights, before they are rotated"""
    rotary_scaling: RotaryScaling | None = None
    """how the rotary frequencies are stretched"""

    def __post_init__(self) -> None:
        check_positive(
            depth=self.depth,
            width=self.width,
            mlp_width=self.mlp_width,
            context=self.context,
            vocabulary=self.vocabulary,
        )
        check_shape(self.width, self.heads, self.kv_heads, self.head_size)

    @property
    def head_dim(self) -> int:
        return self.head_size or self.width // self.heads

    def with_context(self, context: int) -> "LlamaConfig":
        """The same network for shorter rows; ValueError beyond what it was trained for."""
        return shorter_context(self, context)


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.config = config
        self.layer = layer
        projected = (config.heads + 2 * config.kv_heads) * config.head_dim
        self.norm = nn.Parameter(torch.empty(config.width))
        self.qkv = nn.Parameter(torch.empty(projected, config.width))
        self.output = nn.Parameter(torch.empty(config.width, config.heads * config.head_dim))
        if config.qkv_bias:
            self.qkv_bias = nn.Parameter(torch.empty(projected))
        if config.output_bias:
            self.output_bias = nn.Parameter(torch.empty(config.width))
        if config.qk_norm:
            self.q_norm = nn.Parameter(torch.empty(config.head_dim))
            self.k_norm = nn.Parameter(torch.empty(config.head_dim))

    def forward(
        self,
        normed_BTD: Tensor,
        x_BTD: Tensor,
        next_norm_D: Tensor,
        cos: Tensor,
        sin: Tensor,
        drop: Dropout | None,
        cache: Cache | None,
    ) -> tuple[Tensor, Tensor]:
        config = self.config
        qkv_BTC = linear(normed_BTD, self.qkv)
        if config.qkv_bias:
            qkv_BTC = add_bias(qkv_BTC, self.qkv_bias)
        if config.qk_norm:
            qkv_BTC = norm_heads(qkv_BTC, config.heads, config.kv_heads, self.q_norm, self.k_norm, config.norm_eps)
        mixed_BTD = attention(qkv_BTC, cos, sin, config.heads, config.kv_heads, self.layer, cache)
        eps, site, bias = config.norm_eps, 1 + 2 * self.layer, self.output_bias if config.output_bias else None
        return linear_drop_add_norm(mixed_BTD, self.output, x_BTD, next_norm_D, eps, drop, site, bias)


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.norm_eps = config.norm_eps
        self.norm = nn.Parameter(torch.empty(config.width))
        self.gate_up = nn.Parameter(torch.empty(2 * config.mlp_width, config.width))
        self.down = nn.Parameter(torch.empty(config.width, config.mlp_width))

    def forward(
        self, normed_BTD: Tensor, x_BTD: Tensor, next_norm_D: Tensor, drop: Dropout | None
    ) -> tuple[Tensor, Tensor]:
        hidden_BTF = swiglu(linear(normed_BTD, self.gate_up))
        site = 2 + 2 * self.layer
        return linear_drop_add_norm(hidden_BTF, self.down, x_BTD, next_norm_D, self.norm_eps, drop, site)


class Layer(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.attention = Attention(config, layer)
        self.mlp = MLP(config, layer)

    def forward(
        self,
        normed_BTD: Tensor,
        x_BTD: Tensor,
        next_norm_D: Tensor,
        cos: Tensor,
        sin: Tensor,
        drop: Dropout | None,
        cache: Cache | None,
    ) -> tuple[Tensor, Tensor]:
        normed_BTD, x_BTD = self.attention(normed_BTD, x_BTD, self.mlp.norm, cos, sin, drop, cache)
        return self.mlp(normed_BTD, x_BTD, next_norm_D, drop)


class Llama(nn.Module):
    """One replica. Build it under `torch.device("meta")` where weights come from outside;
    the rotary tables are made on `device` all the same."""

    cos_TK2: Tensor
    sin_TK2: Tensor

    def __init__(self, config: LlamaConfig, device: torch.device | str = "cpu"):
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(config.depth))
        self.final_norm = nn.Parameter(torch.empty(config.width))
        if not config.tied:
            self.unembedding = Embedding(config.vocabulary, config.width)
        stretch = config.rotary_scaling.apply if config.rotary_scaling else None
        cos_TK2, sin_TK2 = rotary_tables(config.context, config.head_dim, config.rotary_base, stretch)
        self.register_buffer("cos_TK2", cos_TK2.to(device), persistent=False)
        self.register_buffer("sin_TK2", sin_TK2.to(device), persistent=False)

    def head_VD(self) -> Tensor:
        return self.embedding.weight if self.config.tied else self.unembedding.weight

    def features(self, tokens_BT: Tensor, drop: Dropout | None = None, cache: Cache | None = None) -> Tensor:
        """The normed residual stream [B, T, D] that the head reads; drop: behind the embedding and each half of a
        layer; cache: what the tokens before these left."""
        at = places(tokens_BT, self.config.context, cache)
        cos, sin = self.cos_TK2[at], self.sin_TK2[at]
        x_BTD = embedding(tokens_BT, self.embedding.weight)
        if drop is not None:
            x_BTD = drop(x_BTD, 0)
        # the residual stream is normed where it is updated, with the weight of whoever reads it next
        norms: list[Any] = [layer.attention.norm for layer in self.layers] + [self.final_norm]
        normed_BTD = rms_norm(x_BTD, norms[0], self.config.norm_eps)
        for layer, next_norm_D in zip(self.layers, norms[1:], strict=True):
            normed_BTD, x_BTD = layer(normed_BTD, x_BTD, next_norm_D, cos, sin, drop, cache)
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


def parameter_groups(config: LlamaConfig, name: str) -> tuple[str, ...]:
    """The groups of a parameter: attention, mlp, embedding or unembedding; of norms and biases also vector.

    A norm's weight goes with the matrix it feeds; the final norm goes with the embedding, which
    is the head where it is tied, and then in both groups.
    """
    if name.endswith(("norm", "bias")):
        return name.split(".")[2] if name.startswith("layers.") else "embedding", VECTORS
    if name.startswith("layers."):
        return (name.split(".")[2],)
    if name == "embedding.weight" and config.tied:
        return "embedding", "unembedding"
    return ("unembedding",) if name == "unembedding.weight" else ("embedding",)


def fused_rows(config: LlamaConfig, name: str) -> tuple[tuple[int, int], ...]:
    """Rows of q, k and v, and of gate and up, in their fused projections."""
    if name.endswith(".gate_up"):
        return rows_of(config.mlp_width, config.mlp_width)
    return qkv_rows(config.heads, config.kv_heads, config.head_dim) if name.endswith(".qkv") else ()


def initial_weights(config: LlamaConfig, seed: int) -> dict[str, Tensor]:
    """Norms 1, biases 0, everything else N(0, 1/D) (SmolLM2's own initial deviation). fp32, CPU."""
    with torch.device("meta"):
        shapes = parameter_shapes(Llama(config))
    weights = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            weights[name] = torch.zeros(shape) if name.endswith("_bias") else torch.ones(shape)
        else:
            weights[name] = normal_weights(seed, name, shape, config.width**-0.5)
    return weights


def flops_per_token(config: LlamaConfig) -> float:
    """Training FLOPs a token: 6 a matrix weight (the head's too), 6·L·D·T for attention."""
    mixed = config.heads * config.head_dim
    projected = mixed + 2 * config.kv_heads * config.head_dim
    matrices = config.depth * config.width * (projected + mixed + 3 * config.mlp_width)
    unembedding = config.vocabulary * config.width
    return 6.0 * (matrices + unembedding + config.depth * mixed * config.context)


def activation_bytes(config: LlamaConfig, tokens: int, bytes_per_element: int) -> int:
    """Bytes of activations one replica holds at the peak of a micro-step of `tokens` tokens.

    A layer keeps the stream and its norm twice, q/k/v, the attention's output (with one fp32
    log-sum a head), gate, up and their product; then the logits, which their gradient overwrites,
    and in the backward the gradients of gate, up and product. That is what the GPU kernels keep;
    plain torch on a CPU keeps up to twice as much.
    """
    mixed = config.heads * config.head_dim
    projected = mixed + 2 * config.kv_heads * config.head_dim
    layer = 4 * config.width + mixed + projected * (1 + config.qk_norm) + 3 * config.mlp_width
    elements = config.depth * layer + config.vocabulary
    elements += 3 * config.mlp_width + 4 * config.width
    return tokens * (bytes_per_element * elements + 4 * config.depth * config.heads)
