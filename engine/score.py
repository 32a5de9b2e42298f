"""Scores of many weights of one network on the same texts: one stacked forward for all of them.

A request is a text's tokens and the first of them that is scored. Requests whose input is the same are one row, as the
lettered answers to a question are. Rows are sorted by length and padded to one of a few, so many to a batch that it
holds the same number of tokens: on a GPU every product has one shape. Only the positions that predict a scored token
are unembedded, in fp32.

On a GPU a replica's scores do not depend on the others, as everywhere in the stack; on a CPU there is one replica.

Letters: R replica, B rows, T time, D width, V vocabulary, N positions.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, vmap

from engine.checkpoint import LoadedModel
from engine.checkpoint.model import Method, make_module, shapes_of
from engine.network import describe
from engine.stack import Stack
from engine.step import matmul_precision
from kernels.ahead import compile_ahead
from kernels.loss import IGNORED, logits_losses

SHORTEST = 32  # tokens of the shortest padded row
BATCH_TOKENS = {"cuda": 3072, "cpu": 1024}  # of one replica's batch; 3072 is a multiple of every length up to 1,024
SLICE = 512  # positions whose logits are made at once
GPU_MEMORY = 0.6  # share of the free memory that a stack may take
WIDEST = 64  # replicas from which a wider stack gains nothing


class Request(NamedTuple):
    """Tokens of a text, and which of them is the first that is scored: at least 1, what stands before is given."""

    tokens: tuple[int, ...]
    first: int


class Answers(NamedTuple):
    """What each replica says to each request [R, request].

    logprobs: summed log-probability of the scored tokens, float64, NaN where the network is. greedy: whether each of
    them is the likeliest.
    """

    logprobs: np.ndarray
    greedy: np.ndarray


class Batch(NamedTuple):
    """Rows that are computed at once. at: flat places in [B, T] of the N predictions; owner: their requests."""

    tokens_BT: np.ndarray
    at_N: np.ndarray
    targets_N: np.ndarray
    owner_N: np.ndarray


def encode(tokenizer: Any, text: str) -> list[int]:
    """A text's tokens. Raises ValueError where the tokenizer cannot express it."""
    tokens = tokenizer.encode(text)
    if "".join(tokenizer.decode(tokens).split()) != "".join(text.split()):
        raise ValueError(
            f"the tokenizer {tokenizer.name} cannot express {text[:60]!r} of an item; expected text that it reads "
            "back: leave that task out"
        )
    return tokens


def cut_left(requests: Sequence[Request], context: int) -> tuple[list[Request], int]:
    """Requests whose input fits the context, the longer ones without their first tokens; how many were longer.

    Of a scored part that is longer than the context, only its last tokens are scored.
    """
    longer = [max(len(request.tokens) - 1 - context, 0) for request in requests]
    cut = [Request(r.tokens[off:], max(r.first - off, 1)) for r, off in zip(requests, longer, strict=True)]
    return cut, sum(map(bool, longer))


def padded_length(tokens: int, context: int) -> int:
    """The next of 32, 48, 64, 96, 128, …, at most the context."""
    length = SHORTEST
    while length < tokens:
        length += length // 2 if length & (length - 1) == 0 else length // 3
    return min(length, context)


def batches(requests: Sequence[Request], context: int, tokens: int, whole: bool) -> Iterator[Batch]:
    """Batches that hold every request, the longest first.

    Args:
        tokens: of a batch, about.
        whole: whether the last batch of a length is filled up with empty rows.
    """
    owners: dict[tuple[int, ...], list[int]] = {}
    for index, request in enumerate(requests):
        owners.setdefault(request.tokens[:-1], []).append(index)
    of_length: dict[int, list[tuple[int, ...]]] = {}
    for row in sorted(owners, key=len, reverse=True):
        of_length.setdefault(padded_length(len(row), context), []).append(row)
    for length, rows in of_length.items():
        size = max(tokens // length, 1)
        for start in range(0, len(rows), size):
            chosen = rows[start : start + size]
            tokens_BT = np.zeros((size if whole else len(chosen), length), np.int64)
            at, targets, owner = [], [], []
            for place, row in enumerate(chosen):
                tokens_BT[place, : len(row)] = row
                for index in owners[row]:
                    scored = requests[index].tokens[requests[index].first :]
                    at.append(place * length + np.arange(len(row) - len(scored), len(row)))
                    targets.append(np.array(scored, np.int64))
                    owner.append(np.full(len(scored), index))
            yield Batch(tokens_BT, np.concatenate(at), np.concatenate(targets), np.concatenate(owner))


class Scorer:
    """A stack of weights of one network, and what they say to requests."""

    def __init__(self, model: LoadedModel, replicas: int, precision: str, device: torch.device) -> None:
        """Allocate.

        Args:
            model: of which the network and its longest context are taken.
            precision: bf16, tf32 or fp32.
        """
        self.model, self.context, self.device, self.replicas = model, model.config.context, device, replicas
        self.precision = precision
        module = make_module(model.config, device)
        network = describe(module, model.family, model.config, lambda seed: model.weights, model.tokenizer)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.stack = Stack(network, replicas, dtype, device)
        self.tokens = BATCH_TOKENS[device.type]
        self.whole = device.type == "cuda"  # a CPU computes no rows that are empty
        self.compiled: set[int] = set()  # lengths whose kernels are there
        self.modules = {name: Method(module, name) for name in ("features", "logits_of")}

    def load(self, slot: int, weights: Mapping[str, Tensor]) -> None:
        """Put weights into one slot."""
        self.stack.load(slot, self.stack.flatten(weights, 1.0))

    def call(self, name: str, x: Tensor) -> Tensor:
        """A method of the network, of each replica's own x."""
        module = self.modules[name]
        views = self.stack.views(self.stack.weight_RP, self.stack.spans)
        named = {f"network.{key}": view for key, view in views.items()}
        return vmap(lambda weights, own: functional_call(module, weights, (own,)))(named, x)

    def features(self, tokens_BT: np.ndarray) -> Tensor:
        """What each replica's head reads of the same tokens [R, B T, D]."""
        tokens = torch.from_numpy(tokens_BT).to(self.device)
        return self.call("features", tokens.expand(self.replicas, -1, -1)).flatten(1, 2)

    def judge(self, features_RND: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        """Losses of some targets, and whether each is the likeliest token, [R, N] each."""
        logits_RNV = self.call("logits_of", features_RND)
        index_RN1 = targets_N.clamp(min=0)[:, None].expand(self.replicas, -1, 1)
        return logits_losses(logits_RNV, targets_N), logits_RNV.gather(-1, index_RN1).squeeze(-1) >= logits_RNV.amax(-1)

    def rehearse(self, length: int) -> None:
        """A batch of empty rows and a slice of it, for the kernels that it takes."""
        features_RND = self.features(np.zeros((max(self.tokens // length, 1), length), np.int64))
        nothing_N = torch.zeros(SLICE, dtype=torch.int64, device=self.device)
        self.judge(features_RND[:, nothing_N], nothing_N)

    @torch.no_grad()
    def score(self, requests: Sequence[Request]) -> Answers:
        """Answers of every replica. Requests must fit the context (`cut_left`)."""
        # fp32 products are the head's: of features and weights in bf16 those of tf32 are exact, and ten times as fast
        torch.set_float32_matmul_precision("high" if self.precision == "bf16" else matmul_precision(self.precision))
        planned = list(batches(requests, self.context, self.tokens, self.whole))
        if self.device.type == "cuda":
            new = {batch.tokens_BT.shape[1] for batch in planned} - self.compiled
            compile_ahead(*(partial(self.rehearse, length) for length in sorted(new)))
            self.compiled |= new
        owners, losses, hits = [], [], []
        for batch in planned:
            features_RND = self.features(batch.tokens_BT)
            missing = -len(batch.at_N) % SLICE if self.whole else 0
            at_N = torch.from_numpy(np.pad(batch.at_N, (0, missing))).to(self.device)
            targets_N = torch.from_numpy(np.pad(batch.targets_N, (0, missing), constant_values=IGNORED)).to(self.device)
            for at, targets in zip(at_N.split(SLICE), targets_N.split(SLICE), strict=True):
                loss_RN, hit_RN = self.judge(features_RND[:, at], targets)
                losses.append(loss_RN)
                hits.append(hit_RN)
            owners.append(np.pad(batch.owner_N, (0, missing), constant_values=len(requests)))
        owner = np.concatenate(owners)
        all_losses, all_hits = (torch.cat(each, 1).cpu().numpy() for each in (losses, hits))
        sums = np.stack([np.bincount(owner, loss, len(requests) + 1) for loss in all_losses.astype(np.float64)])
        misses = np.stack([np.bincount(owner, ~hit, len(requests) + 1) for hit in all_hits])
        return Answers(-sums[:, : len(requests)], misses[:, : len(requests)] == 0)

    def weights(self) -> list[dict[str, Tensor]]:
        """Each replica's weights by name, as they lie in the stack."""
        views = self.stack.views(self.stack.weight_RP, self.stack.spans)
        return [{name: view[replica] for name, view in views.items()} for replica in range(self.replicas)]


def stack_width(model: LoadedModel, precision: str, device: torch.device, wanted: int) -> int:
    """Replicas that are scored at once: as many as are wanted and fit; one on a CPU, whose bits depend on the stack."""
    if device.type == "cpu":
        return 1
    config, element = model.config, 2 if precision == "bf16" else 4
    parameters = sum(torch.Size(shape).numel() for shape in shapes_of(config).values())
    # weights, an fp32 copy of the head, a slice's logits three times, and two layers' activations
    head = 4 * config.vocabulary * (config.width + 3 * SLICE)
    layers = 2 * model.family.activation_bytes(config, BATCH_TOKENS["cuda"], element) // config.depth
    free = GPU_MEMORY * torch.cuda.mem_get_info(device)[0]
    return max(min(wanted, WIDEST, int(free // (4 * parameters + head + layers))), 1)
