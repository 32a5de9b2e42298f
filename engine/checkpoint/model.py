"""A loaded checkpoint: configuration, weights by our names, tokenizer, and logits."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from engine.checkpoint.tensors import Weights
from engine.models import gpt, gpt2, llama, parameter_shapes

ModelConfig = gpt.GPTConfig | gpt2.GPT2Config | llama.LlamaConfig

POSITIONS = "positions.weight"
"""the one parameter whose shape depends on the context"""


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


def make_module(config: ModelConfig, device: torch.device | str = "cpu") -> nn.Module:
    """The network with parameters on the meta device and its tables on `device`."""
    with torch.device("meta"):
        return FAMILIES[family_name(config)].network(config, device)


def shapes_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter."""
    return parameter_shapes(make_module(config))


@dataclass(frozen=True)
class LoadedModel:
    path: str
    """what was loaded"""
    config: ModelConfig
    weights: Mapping[str, Tensor]
    """parameters by our names, on the CPU, in the dtype they are stored in; of a file each is read when asked for"""
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
            raise ValueError(f"{self.path} has no tokenizer: put its files into the folder, or give --tokenizer")
        return self.tokenizer_found

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of what the network computes: its configuration and every weight, whatever file holds them.

        ValueError naming a parameter that is not finite.
        """
        fields = {"family": family_name(self.config), "config": asdict(self.config)}
        digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
        for name in self.weights:
            weight = self.weights[name].detach().contiguous()
            if not torch.isfinite(weight).all():
                raise ValueError(f"{self.path} holds {name} with values that are not finite: give a whole checkpoint")
            digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
            digest.update(weight.view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def with_context(self, context: int) -> "LoadedModel":
        """The same model for shorter rows; ValueError beyond what it was trained for."""
        config, weights = self.config.with_context(context), self.weights
        if POSITIONS in weights:
            readers = {name: partial(weights.__getitem__, name) for name in weights}
            weights = Weights(readers | {POSITIONS: lambda: self.weights[POSITIONS][:context]})
        return replace(self, config=config, weights=weights)

    def with_weights(self, trained: Mapping[str, Tensor]) -> "LoadedModel":
        """The same model with other weights, which may be those of shorter rows: later positions stay as they are."""
        weights = dict(trained)
        if POSITIONS in weights:
            rows = weights[POSITIONS]
            weights[POSITIONS] = torch.cat([rows, self.weights[POSITIONS][len(rows) :].to(rows.dtype)])
        return replace(self, weights=weights)

    @cached_property
    def fp32_weights(self) -> dict[str, Tensor]:
        """Every parameter in float32, kept."""
        return {name: weight.float() for name, weight in self.weights.items()}

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
        named = {f"network.{name}": weight for name, weight in self.fp32_weights.items()}
        return functional_call(Method(self.module, "logits"), named, (ids,))


class Method(nn.Module):
    """A network whose forward is another of its methods, as `functional_call` wants it; parameters are `network.`'s."""

    def __init__(self, network: nn.Module, name: str):
        super().__init__()
        self.network, self.name = network, name

    def forward(self, *arguments: Tensor) -> Tensor:
        return getattr(self.network, self.name)(*arguments)
