"""A loaded checkpoint: configuration, weights by our names, tokenizer, and logits."""

from dataclasses import dataclass, replace
from functools import cached_property
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from engine.models import gpt, gpt2, llama, parameter_shapes

ModelConfig = gpt.GPTConfig | gpt2.GPT2Config | llama.LlamaConfig


class FamilyFile(NamedTuple):
    """A file of engine/models and its two classes."""

    module: ModuleType
    config: type
    network: type[nn.Module]


FAMILIES = {
    "gpt": FamilyFile(gpt, gpt.GPTConfig, gpt.GPT),
    "gpt2": FamilyFile(gpt2, gpt2.GPT2Config, gpt2.GPT2),
    "llama": FamilyFile(llama, llama.LlamaConfig, llama.Llama),
}


def family_name(config: ModelConfig) -> str:
    """The key of FAMILIES of a configuration."""
    return next(name for name, family in FAMILIES.items() if type(config) is family.config)


def is_loadable(config: Any) -> bool:
    """Whether `load_model` knows a configuration's network."""
    return any(type(config) is family.config for family in FAMILIES.values())


def make_module(config: ModelConfig) -> nn.Module:
    """The network with parameters on the meta device and its tables on the CPU."""
    with torch.device("meta"):
        return FAMILIES[family_name(config)].network(config)


def shapes_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter."""
    return parameter_shapes(make_module(config))


@dataclass(frozen=True)
class LoadedModel:
    path: str
    """what was loaded"""
    config: ModelConfig
    weights: dict[str, Tensor]
    """parameters by our names, on the CPU, in the dtype they are stored in"""
    tokenizer_found: Any = None
    """the tokenizer, None without one"""
    chat_template: str | None = None
    """the Jinja template of its conversations, where the checkpoint has one"""

    @property
    def family(self) -> ModuleType:
        """The family's file of engine/models."""
        return FAMILIES[family_name(self.config)].module

    @cached_property
    def module(self) -> nn.Module:
        """The network for one replica, parameters on the meta device."""
        return make_module(self.config)

    @property
    def tokenizer(self) -> Any:
        """What the checkpoint's vocabulary stands for, as in `engine.tokenizer`; ValueError without one."""
        if self.tokenizer_found is None:
            raise ValueError(f"{self.path} has no tokenizer: put its tokenizer files into the folder")
        return self.tokenizer_found

    def with_context(self, context: int) -> "LoadedModel":
        """The same model for shorter rows; ValueError beyond what it was trained for."""
        config = self.config.with_context(context)
        weights = dict(self.weights)
        if "positions.weight" in weights:
            weights["positions.weight"] = weights["positions.weight"][:context]
        return replace(self, config=config, weights=weights)

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """Logits float32 [B, T, V] of ids int64 [B, T], computed in float32 on the CPU.

        ValueError where a row is longer than the context or an id is beyond the vocabulary.
        """
        if ids.dim() != 2 or ids.shape[1] > self.config.context:
            raise ValueError(
                f"got ids {list(ids.shape)}, expected [B, T], T at most {self.config.context}: cut the rows"
            )
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.config.vocabulary:
            raise ValueError(
                f"got ids {int(ids.min())} to {int(ids.max())}, expected ids below the vocabulary of "
                f"{self.config.vocabulary}: use the model's own tokenizer"
            )
        named = {f"network.{name}": weight.float() for name, weight in self.weights.items()}
        return functional_call(_Logits(self.module), named, (ids,))


class _Logits(nn.Module):
    """A network whose forward gives logits, as `functional_call` wants it."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network: Any = network

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return self.network.logits(tokens_BT)
