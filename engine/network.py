"""One network as the engine sees it: a module for one replica and what goes with it."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine.checkpoint import LoadedModel, load_model
from engine.checkpoint.model import make_module
from engine.config import Run, SweepConfig
from engine.data import Tokenizer
from engine.family import VECTORS
from engine.models import Embedding, gpt, parameter_shapes
from engine.optim import OPTIMIZERS, by_group
from engine.tokenizer import ByteTokenizer


class Network(NamedTuple):
    """A network and its surroundings.

    module: `forward(tokens_BT, targets_BT, hyper, key) -> summed loss`, 0-dim fp32, parameters on the meta device;
    hyper holds the family's forward hyper-parameters, 0-dim fp32 each, key is (seed, step, first row of the batch),
    int64 [3]. shapes: of its parameters. groups: the groups of each, the one whose hyper-parameters it takes first; a
    tied tensor has two, and so has a vector (a norm's weight, a bias).
    initial: seed -> CPU weights. tokenizer: what its vocabulary stands for. flops_per_token: of training.
    activation_bytes: (tokens, bytes per element) -> bytes a replica. same_start: whether `initial` is the same for
    every seed. fused: rows (first, last + 1) of the matrices that lie in one parameter. loaded: the checkpoint it is
    of. export: trained weights -> the model to save, None where no checkpoint format has it.
    """

    module: nn.Module
    shapes: dict[str, tuple[int, ...]]
    groups: dict[str, tuple[str, ...]]
    initial: Callable[[int], Mapping[str, Tensor]]
    tokenizer: Tokenizer
    vocabulary: int
    flops_per_token: float
    activation_bytes: Callable[[int, int], int]
    same_start: bool = False
    fused: Mapping[str, tuple[tuple[int, int], ...]] = {}
    loaded: LoadedModel | None = None
    export: Callable[[Mapping[str, Tensor]], LoadedModel] | None = None

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

    def grouped_for(self, run: Run) -> "Network":
        """The network as a run groups it: its vectors by themselves where an optimizer takes matrices only, or where
        the run names their group."""
        optimizer = run.config.training.optimizer
        chosen = by_group(optimizer, run.config.family.groups).values()
        named = [part.partition("=")[0] for part in optimizer.split(",")]
        named += [name.partition(".")[2] for name in run.given]
        if VECTORS not in named and not any(OPTIMIZERS[each].matrices_only for each in chosen):
            return self
        return self._replace(
            groups={name: tuple(sorted(own, key=lambda g: g != VECTORS)) for name, own in self.groups.items()}
        )


def load_pretrained(config: SweepConfig, device: torch.device | str) -> Network:
    """The network of a checkpoint; its start is the same for every seed."""
    own = config.shape
    model = load_model(own.model, own.softcap, own.tokenizer or None)
    shorter = model.with_context(config.training.context)
    module = make_module(shorter.config, device)
    network = describe(module, model.family, shorter.config, lambda seed: shorter.weights, model.tokenizer)
    return network._replace(same_start=True, loaded=model, export=model.with_weights)


def make_gpt(config: SweepConfig, device: torch.device | str) -> Network:
    """A network of the configuration's shape over bytes."""
    own, tokenizer = config.shape, ByteTokenizer()
    vocabulary = own.vocabulary or tokenizer.vocabulary
    if vocabulary < tokenizer.vocabulary:
        raise ValueError(
            f"vocabulary {vocabulary} is smaller than the byte tokenizer's {tokenizer.vocabulary}; raise --vocabulary"
        )
    shape = gpt.GPTConfig(own.depth, own.width, own.heads, own.kv_heads, config.training.context, vocabulary)
    network = describe(make_module(shape, device), gpt, shape, partial(gpt.initial_weights, shape), tokenizer)
    return network._replace(export=lambda weights: LoadedModel(config.title, shape, weights, tokenizer))


def describe(module: nn.Module, family, shape, initial, tokenizer) -> Network:
    """A Network out of a model file's common functions."""
    shapes = parameter_shapes(module)
    fused = {name: family.fused_rows(shape, name) for name in shapes}
    return Network(
        module,
        shapes,
        {name: family.parameter_groups(shape, name) for name in shapes},
        initial,
        tokenizer,
        shape.vocabulary,
        family.flops_per_token(shape),
        partial(family.activation_bytes, shape),
        fused={name: rows for name, rows in fused.items() if rows},
    )
