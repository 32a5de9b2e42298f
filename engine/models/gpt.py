"""nanochat's GPT for one replica, sized by one depth knob, in every generation that its checkpoints have.

Rotary positions, QK-norm, ReLU² MLP, RMSNorm without weights (also after the embedding), no
biases, an untied unembedding whose logits are soft-capped to ±15 by tanh. Every heavy operation
is a function of `kernels`, which brings its own vmap rule.

What later generations add is off by default: learned multipliers of the residual stream and of the
first layer's input (`lambdas`), gated value embeddings in every second layer, the last one included,
sliding windows, and a smear (a gated addition of the previous token's embedding) with a backout
(a multiple of the stream behind the middle layer, taken off at the end).

Each half of a layer takes the residual stream and its norm, and hands on both: the additions ride in the
product before and, backward, in the norm behind them, so no kernel only adds.

Shape letters: B batch, T time, D width, H heads, K head dim, F MLP width, V vocabulary, N = B·T.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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
    rotary_tables,
    shorter_context,
    uniform_weights,
)
from engine.models.cache import Cache, attention, places, previous
from kernels.embedding import embedding
from kernels.linear import linear, linear_relu2, relu2_mlp_norm
from kernels.loss import linear_cross_entropy, linear_cross_entropy_by_row
from kernels.norm import rms_norm
from kernels.scaled_sum import scaled_sum

ROTARY_BASE = 10_000.0
NORM_EPS = 1e-6
UNEMBEDDING_STD = 0.001
SMEAR_CHANNELS = 24


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
    mlp_units: int = 0
    """F where it is not 4 · width"""
    norm_eps: float = NORM_EPS
    """added to the mean square in every RMSNorm"""
    rotary_base: float = ROTARY_BASE
    """base of the rotary frequencies"""
    rotary_reversed: bool = False
    """pairs turn by minus their angle, as in nanochat"""
    rotary_rounded: bool = False
    """cosines and sines of fp32 angles rounded to bf16, as in nanochat before March 2026"""
    qk_scale: float = 1.0
    """multiplies q and k after their norm"""
    window_pattern: str = "L"
    """S (short) and L (the whole row), repeated over the layers; the last layer is always L"""
    short_window: int = 0
    """earlier tokens that a token of an S layer sees"""
    lambdas: bool = False
    """whether a layer reads residual_lambda · x + x0_lambda · (the first layer's input)"""
    value_gate: int = 0
    """channels that the gate of a value embedding reads; 0 is none"""
    value_gate_scale: float = 2.0
    """multiplies the sigmoid of that gate"""
    smear: bool = False
    """whether there are a smear and a backout"""

    def __post_init__(self) -> None:
        check_positive(depth=self.depth, width=self.width, context=self.context, vocabulary=self.vocabulary)
        check_shape(self.width, self.heads, self.kv_heads)
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise ValueError(f"window pattern {self.window_pattern!r}, expected letters S and L: change it")

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def mlp_width(self) -> int:
        return self.mlp_units or 4 * self.width

    def with_context(self, context: int) -> "GPTConfig":
        """The same network, with its windows, for shorter rows; ValueError beyond its own."""
        return shorter_context(self, context)

    def window(self, layer: int) -> int | None:
        """Earlier tokens that a token of this layer sees, None for all."""
        letter = self.window_pattern[layer % len(self.window_pattern)]
        return self.short_window if letter == "S" and layer < self.depth - 1 else None

    def has_values(self, layer: int) -> bool:
        """Whether this layer has a value embedding."""
        return self.value_gate > 0 and layer % 2 == (self.depth - 1) % 2


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.config = config
        self.layer = layer
        self.window = config.window(layer)
        projected = (config.heads + 2 * config.kv_heads) * config.head_dim
        self.qkv = nn.Parameter(torch.empty(projected, config.width))
        self.output = nn.Parameter(torch.empty(config.width, config.width))
        if config.has_values(layer):
            self.value_gate = nn.Parameter(torch.empty(config.kv_heads, config.value_gate))

    def forward(
        self,
        normed_BTD: Tensor,
        x_BTD: Tensor,
        values_BTC: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        drop: Dropout | None,
        cache: Cache | None,
    ) -> tuple[Tensor, Tensor]:
        config = self.config
        heads, kv_heads, eps = config.heads, config.kv_heads, config.norm_eps
        qkv_BTC = linear(normed_BTD, self.qkv)
        if values_BTC is not None:
            qkv_BTC = self.add_values(qkv_BTC, normed_BTD, values_BTC)
        mixed_BTD = attention(
            qkv_BTC, cos, sin, heads, kv_heads, self.layer, cache, True, eps, self.window, config.qk_scale
        )
        return linear_drop_add_norm(mixed_BTD, self.output, x_BTD, None, eps, drop, 1 + 2 * self.layer)

    def add_values(self, qkv_BTC: Tensor, normed_BTD: Tensor, values_BTC: Tensor) -> Tensor:
        """v plus the token's value embedding, gated a head (Zhou et al. 2024, arXiv:2410.17897)."""
        gate_BTG = torch.sigmoid(linear(normed_BTD[..., : self.config.value_gate], self.value_gate))
        gate_BTG = self.config.value_gate_scale * gate_BTG
        qk_BTC, v_BTC = qkv_BTC.split([qkv_BTC.shape[-1] - values_BTC.shape[-1], values_BTC.shape[-1]], dim=-1)
        v_BTGK, values_BTGK = (each.unflatten(-1, (gate_BTG.shape[-1], -1)) for each in (v_BTC, values_BTC))
        return torch.cat([qk_BTC, scaled_sum(v_BTGK, None, values_BTGK, gate_BTG).flatten(-2)], dim=-1)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.norm_eps = config.norm_eps
        self.up = nn.Parameter(torch.empty(config.mlp_width, config.width))
        self.down = nn.Parameter(torch.empty(config.width, config.mlp_width))

    def forward(self, normed_BTD: Tensor, x_BTD: Tensor, drop: Dropout | None) -> tuple[Tensor, Tensor]:
        if drop is None:
            return relu2_mlp_norm(normed_BTD, self.up, self.down, x_BTD, None, self.norm_eps)
        hidden_BTF = linear_relu2(normed_BTD, self.up)
        return linear_drop_add_norm(hidden_BTF, self.down, x_BTD, None, self.norm_eps, drop, 2 + 2 * self.layer)


class Layer(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.attention = Attention(config, layer)
        self.mlp = MLP(config, layer)

    def forward(
        self,
        normed_BTD: Tensor,
        x_BTD: Tensor,
        values_BTC: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        drop: Dropout | None,
        cache: Cache | None,
    ) -> tuple[Tensor, Tensor]:
        return self.mlp(*self.attention(normed_BTD, x_BTD, values_BTC, cos, sin, drop, cache), drop)


class GPT(nn.Module):
    """One replica. Build it under `torch.device("meta")` where weights come from outside;
    the rotary tables are made on `device` all the same."""

    cos_TK2: Tensor
    sin_TK2: Tensor

    def __init__(self, config: GPTConfig, device: torch.device | str = "cpu"):
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(config.depth))
        self.unembedding = Embedding(config.vocabulary, config.width)
        if config.lambdas:
            self.residual_lambdas = nn.Parameter(torch.empty(config.depth))
            self.x0_lambdas = nn.Parameter(torch.empty(config.depth))
        value_layers = [layer for layer in range(config.depth) if config.has_values(layer)]
        if value_layers:
            values = config.kv_heads * config.head_dim
            self.value_embeddings = nn.ModuleDict({str(n): Embedding(config.vocabulary, values) for n in value_layers})
        if config.smear:
            self.smear_gate = nn.Parameter(torch.empty(1, SMEAR_CHANNELS))
            self.smear_lambda = nn.Parameter(torch.empty(1))
            self.backout_lambda = nn.Parameter(torch.empty(1))
        cos_TK2, sin_TK2 = gpt_rotary_tables(config)
        self.register_buffer("cos_TK2", cos_TK2.to(device), persistent=False)
        self.register_buffer("sin_TK2", sin_TK2.to(device), persistent=False)

    def features(self, tokens_BT: Tensor, drop: Dropout | None = None, cache: Cache | None = None) -> Tensor:
        """The normed residual stream [B, T, D] that the unembedding reads; drop: behind the embedding and each half
        of a layer; cache: what the tokens before these left."""
        config, eps = self.config, self.config.norm_eps
        at = places(tokens_BT, config.context, cache)
        cos, sin = self.cos_TK2[at], self.sin_TK2[at]
        x_BTD = rms_norm(embedding(tokens_BT, self.embedding.weight), None, eps)
        if drop is not None:
            x_BTD = drop(x_BTD, 0)
        if config.smear:
            gate_BT = torch.sigmoid(linear(x_BTD[..., :SMEAR_CHANNELS], self.smear_gate)).squeeze(-1)
            gate_BT = scaled_sum(gate_BT, self.smear_lambda[0])
            x_BTD = scaled_sum(x_BTD, None, previous(x_BTD, "smear", cache), gate_BT)
        x0_BTD = middle_BTD = x_BTD
        normed_BTD = rms_norm(x_BTD, None, eps)
        for index, layer in enumerate(self.layers):
            values_BTC = None
            if config.lambdas:
                x_BTD = scaled_sum(x_BTD, self.residual_lambdas[index], x0_BTD, self.x0_lambdas[index])
                normed_BTD = rms_norm(x_BTD, None, eps)
            if config.has_values(index):
                table: Any = self.value_embeddings[str(index)]
                values_BTC = embedding(tokens_BT, table.weight)
            normed_BTD, x_BTD = layer(normed_BTD, x_BTD, values_BTC, cos, sin, drop, cache)
            if index == config.depth // 2:
                middle_BTD = x_BTD
        if config.smear:
            normed_BTD = rms_norm(scaled_sum(x_BTD, None, middle_BTD, -self.backout_lambda[0]), None, eps)
        return normed_BTD

    def forward(
        self, tokens_BT: Tensor, targets_BT: Tensor, hyper: Mapping[str, Tensor], key_3: Tensor, by_row: bool = False
    ) -> Tensor:
        """Summed loss, 0-dim fp32, over the targets that are not -100; by_row: each row's own [B], not smoothed.

        hyper: label_smoothing ε, 0-dim fp32: (1 - ε)·nll + ε·mean over V of -log p; dropout, where any is dropped.
        key_3: seed, step and first row of the batch, int64, by which it is drawn; by row nothing is.
        """
        drop = None if by_row else dropout_of(hyper, key_3)
        features_BTD, head_VD = self.features(tokens_BT, drop), self.unembedding.weight
        if by_row:
            return linear_cross_entropy_by_row(features_BTD, head_VD, targets_BT, self.config.softcap)
        x_ND, targets_N = features_BTD.flatten(0, 1), targets_BT.flatten()
        return linear_cross_entropy(x_ND, head_VD, targets_N, self.config.softcap, hyper["label_smoothing"])

    def logits(self, tokens_BT: Tensor) -> Tensor:
        """Soft-capped logits [B, T, V] in fp32; training never makes them."""
        return self.logits_of(self.features(tokens_BT))

    def logits_of(self, features: Tensor) -> Tensor:
        """Soft-capped logits [..., V] of some features [..., D], by an fp32 product."""
        logits, softcap = linear(features.float(), self.unembedding.weight.float()), self.config.softcap
        return softcap * torch.tanh(logits / softcap) if softcap else logits


def gpt_rotary_tables(config: GPTConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, K/2] of the configured base, direction and rounding, fp32, CPU."""
    if config.rotary_rounded:  # angles in fp32, as nanochat takes them: rounding to bf16 enlarges a last bit
        index_K2 = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")
        frequency_K2 = 1.0 / (config.rotary_base ** (index_K2 / config.head_dim))
        angle_TK2 = torch.outer(torch.arange(config.context, dtype=torch.float32, device="cpu"), frequency_K2)
        cos_TK2, sin_TK2 = (table.bfloat16().float() for table in (angle_TK2.cos(), angle_TK2.sin()))
    else:
        cos_TK2, sin_TK2 = rotary_tables(config.context, config.head_dim, config.rotary_base)
    return cos_TK2, -sin_TK2 if config.rotary_reversed else sin_TK2


def parameter_groups(config: GPTConfig, name: str) -> tuple[str, ...]:
    """The group of a parameter: attention, mlp, embedding or unembedding; of later generations' value_embeddings,
    residual_lambdas, x0_lambdas or smear (with the backout)."""
    if name.startswith("layers."):
        return (name.split(".")[2],)
    return ("smear",) if name.startswith(("smear_", "backout_")) else (name.split(".")[0],)


def fused_rows(config: GPTConfig, name: str) -> tuple[tuple[int, int], ...]:
    """Rows of q, k and v in their fused projection."""
    return qkv_rows(config.heads, config.kv_heads, config.head_dim) if name.endswith(".qkv") else ()


def initial_weights(config: GPTConfig, seed: int) -> dict[str, Tensor]:
    """nanochat's scales: embedding N(0, 1), unembedding N(0, 0.001²), matrices that read the
    residual stream uniform with deviation 1/√D, matrices that write it zero. Of what later
    generations add: value embeddings as those matrices, their gates zero, residual_lambdas 1,
    x0_lambdas 0.1, smear_lambda 0, backout_lambda 0.2. fp32, CPU."""
    constants = {"residual_lambdas": 1.0, "x0_lambdas": 0.1, "smear_lambda": 0.0, "backout_lambda": 0.2}
    with torch.device("meta"):
        shapes = parameter_shapes(GPT(config))
    weights = {}
    for name, shape in shapes.items():
        if name == "embedding.weight":
            weights[name] = normal_weights(seed, name, shape, 1.0)
        elif name == "unembedding.weight":
            weights[name] = normal_weights(seed, name, shape, UNEMBEDDING_STD)
        elif name in constants:
            weights[name] = torch.full(shape, constants[name])
        elif name.endswith((".output", ".down", ".value_gate")):
            weights[name] = torch.zeros(shape)
        else:
            weights[name] = uniform_weights(seed, name, shape, config.width**-0.5)
    return weights


def flops_per_token(config: GPTConfig) -> float:
    """Training FLOPs a token: 6 a matrix weight, and 6·L·D·T for causal attention.

    With as many key-value heads as heads: 6·(12·L·D² + V·D) + 6·L·D·T. Windows are counted as
    whole rows, the gates of later generations not at all.
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
    if config.lambdas:  # the sum that it reads
        layer += config.width
    elements = config.depth * layer + config.vocabulary
    if config.smear:  # the stream before and behind it, the tokens before, and what is left of the backout
        elements += 4 * config.width
    for index in range(config.depth):
        if config.has_values(index):
            elements += config.kv_heads * config.head_dim
    elements += config.mlp_width + 4 * config.width
    return tokens * (bytes_per_element * elements + 4 * config.depth * config.heads)
