"""A nanochat-style GPT for one replica, sized by one depth knob.

Rotary positions, QK-norm, ReLU² MLP, RMSNorm without weights (also after the embedding), no
biases, an untied unembedding whose logits are soft-capped to ±15 by tanh. Every heavy operation
is a function of `kernels`, which brings its own vmap rule.

Each half of a layer takes the residual stream and its norm, and hands on both: the additions ride in the
product before and, backward, in the norm behind them, so no kernel only adds.

Shape letters: B batch, T time, D width, H heads, K head dim, F MLP width, V vocabulary, N = B·T.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.models import (
    Embedding,
    check_positive,
    check_shape,
    normal_weights,
    parameter_shapes,
    rotary_tables,
    uniform_weights,
)
from kernels.attention import qkv_attention
from kernels.embedding import embedding
from kernels.linear import linear, linear_add_norm, relu2_mlp_norm
from kernels.loss import linear_cross_entropy, linear_cross_entropy_by_row
from kernels.norm import rms_norm

ROTARY_BASE = 10_000.0
NORM_EPS = 1e-6
UNEMBEDDING_STD = 0.001


@dataclass(frozen=True)
class GPTConfig:
    depth: int
    """layers"""
    width: int
    """D, size of the residual stream"""
    heads: int
    """query heads H; the head dimension K is width / heads"""
    kv_heads: int
    """key and value heads, a divisor of heads"""
    context: int
    """T, tokens a row"""
    vocabulary: int
    """V, rows of the embedding and of the unembedding"""
    softcap: float = 15.0
    """logits are softcap · tanh(logits / softcap); 0 leaves them alone"""

    def __post_init__(self) -> None:
        check_positive(depth=self.depth, width=self.width, context=self.context, vocabulary=self.vocabulary)
        check_shape(self.width, self.heads, self.kv_heads)

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def mlp_width(self) -> int:
        return 4 * self.width


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        projected = (config.heads + 2 * config.kv_heads) * config.head_dim
        self.qkv = nn.Parameter(torch.empty(projected, config.width))
        self.output = nn.Parameter(torch.empty(config.width, config.width))

    def forward(self, normed_BTD: Tensor, x_BTD: Tensor, cos_TK2: Tensor, sin_TK2: Tensor) -> tuple[Tensor, Tensor]:
        qkv_BTC = linear(normed_BTD, self.qkv)
        heads, kv_heads = self.config.heads, self.config.kv_heads
        mixed_BTD = qkv_attention(qkv_BTC, cos_TK2, sin_TK2, heads, kv_heads, True, NORM_EPS)
        return linear_add_norm(mixed_BTD, self.output, x_BTD, None, NORM_EPS)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.up = nn.Parameter(torch.empty(config.mlp_width, config.width))
        self.down = nn.Parameter(torch.empty(config.width, config.mlp_width))

    def forward(self, normed_BTD: Tensor, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        return relu2_mlp_norm(normed_BTD, self.up, self.down, x_BTD, None, NORM_EPS)


class Layer(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.attention = Attention(config)
        self.mlp = MLP(config)

    def forward(self, normed_BTD: Tensor, x_BTD: Tensor, cos_TK2: Tensor, sin_TK2: Tensor) -> tuple[Tensor, Tensor]:
        return self.mlp(*self.attention(normed_BTD, x_BTD, cos_TK2, sin_TK2))


class GPT(nn.Module):
    """One replica. Build it under `torch.device("meta")` where weights come from outside;
    the rotary tables are made on `device` all the same."""

    cos_TK2: Tensor
    sin_TK2: Tensor

    def __init__(self, config: GPTConfig, device: torch.device | str = "cpu"):
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.depth))
        self.unembedding = Embedding(config.vocabulary, config.width)
        cos_TK2, sin_TK2 = rotary_tables(config.context, config.head_dim, ROTARY_BASE)
        self.register_buffer("cos_TK2", cos_TK2.to(device), persistent=False)
        self.register_buffer("sin_TK2", sin_TK2.to(device), persistent=False)

    def features(self, tokens_BT: Tensor) -> Tensor:
        """The normed residual stream [B, T, D] that the unembedding reads."""
        time = tokens_BT.shape[-1]
        cos_TK2, sin_TK2 = self.cos_TK2[:time], self.sin_TK2[:time]
        x_BTD = rms_norm(embedding(tokens_BT, self.embedding.weight), None, NORM_EPS)
        normed_BTD = rms_norm(x_BTD, None, NORM_EPS)
        for layer in self.layers:
            normed_BTD, x_BTD = layer(normed_BTD, x_BTD, cos_TK2, sin_TK2)
        return normed_BTD

    def forward(
        self, tokens_BT: Tensor, targets_BT: Tensor, hyper: Mapping[str, Tensor], key_2: Tensor, by_row: bool = False
    ) -> Tensor:
        """Summed loss, 0-dim fp32, over the targets that are not -100; by_row: each row's own [B], not smoothed.

        hyper: label_smoothing ε, 0-dim fp32: (1 - ε)·nll + ε·mean over V of -log p. key_2: seed and step; nothing is
        drawn.
        """
        features_BTD, head_VD = self.features(tokens_BT), self.unembedding.weight
        if by_row:
            return linear_cross_entropy_by_row(features_BTD, head_VD, targets_BT, self.config.softcap)
        x_ND, targets_N = features_BTD.flatten(0, 1), targets_BT.flatten()
        return linear_cross_entropy(x_ND, head_VD, targets_N, self.config.softcap, hyper["label_smoothing"])

    def logits(self, tokens_BT: Tensor) -> Tensor:
        """Soft-capped logits [B, T, V] in fp32; for checks, training never makes them."""
        logits_BTV = linear(self.features(tokens_BT), self.unembedding.weight).float()
        softcap = self.config.softcap
        return softcap * torch.tanh(logits_BTV / softcap) if softcap else logits_BTV


def parameter_groups(config: GPTConfig, name: str) -> tuple[str, ...]:
    """The group of a parameter: attention, mlp, embedding or unembedding."""
    return (name.split(".")[2] if name.startswith("layers.") else name.split(".")[0],)


def initial_weights(config: GPTConfig, seed: int) -> dict[str, Tensor]:
    """nanochat's scales: embedding N(0, 1), unembedding N(0, 0.001²), matrices that read the
    residual stream uniform with deviation 1/√D, matrices that write it zero. fp32, CPU."""
    with torch.device("meta"):
        shapes = parameter_shapes(GPT(config))
    weights = {}
    for name, shape in shapes.items():
        if name == "embedding.weight":
            weights[name] = normal_weights(seed, name, shape, 1.0)
        elif name == "unembedding.weight":
            weights[name] = normal_weights(seed, name, shape, UNEMBEDDING_STD)
        elif name.endswith((".output", ".down")):
            weights[name] = torch.zeros(shape)
        else:
            weights[name] = uniform_weights(seed, name, shape, config.width**-0.5)
    return weights


def flops_per_token(config: GPTConfig) -> float:
    """Training FLOPs a token: 6 a matrix weight, and 6·L·D·T for causal attention.

    With as many key-value heads as heads: 6·(12·L·D² + V·D) + 6·L·D·T.
    """
    projected = (config.heads + 2 * config.kv_heads) * config.head_dim
    matrices = config.depth * config.width * (projected + config.width + 2 * config.mlp_width)
    unembedding = config.vocabulary * config.width
    return 6.0 * (matrices + unembedding + config.depth * config.width * config.context)


def activation_bytes(config: GPTConfig, tokens: int, bytes_per_element: int) -> int:
    """Bytes of activations one replica holds at the peak of a micro-step of `tokens` tokens.

    A layer keeps the stream and its norm twice, q/k/v, the attention's output (with one fp32
    log-sum a head) and the MLP's hidden units after ReLU²; then the logits, which their gradient
    overwrites, and in the backward a gradient of hidden size. That is what the GPU kernels keep;
    plain torch on a CPU keeps up to twice as much.
    """
    projected = (config.heads + 2 * config.kv_heads) * config.head_dim
    layer = 5 * config.width + projected + config.mlp_width
    elements = config.depth * layer + config.vocabulary
    elements += config.mlp_width + 4 * config.width
    return tokens * (bytes_per_element * elements + 4 * config.depth * config.heads)
