"""Text of many weights of one network, a token of every one at each step: one stack, cached keys, one CUDA graph.

What the forward of a family keeps of its tokens (`engine.models.cache`) lies in buffers that grow with the text. On a
GPU the step of one token, with the choice of the next, is captured once per size of the buffers. Everything is
computed in fp32. A token is chosen by one number that depends on the seed, the turn and the token's place alone, the
same for every replica, so that a replica's text does not depend on the others.

R replica, B row (a text), T time, S places of the buffers, V vocabulary, C channels.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils._pytree import tree_map

from engine.checkpoint import LoadedModel
from engine.checkpoint.model import make_module
from engine.models.cache import Cache
from engine.sampling import Sampling

PIECE = 128  # tokens of a prompt that are read at once
FEWEST = 256  # places of the buffers, to begin with
BROKEN = -1  # in place of a token: the logits are not finite


def choose(logits_V: Tensor, number: Tensor, sampling: Sampling) -> Tensor:
    """The next token of logits [..., V] by a number in [0, 1), 0-dim or [..., 1]; BROKEN where a logit is not finite.

    Tokens are ordered by their logits, of equal ones the lower id first. The first `top_k` remain, and of these the
    shortest beginning whose probabilities add up to `top_p` or more; the token is the first at which their running
    sum, as a share of the whole, exceeds the number.
    """
    finite = logits_V.isfinite().all(-1)
    if not sampling.temperature:
        return logits_V.argmax(-1).where(finite, BROKEN)
    ordered_V, token_V = logits_V.sort(stable=True, dim=-1, descending=True)
    if sampling.top_k:
        ordered_V, token_V = ordered_V[..., : sampling.top_k], token_V[..., : sampling.top_k]
    share_V = (ordered_V / sampling.temperature).softmax(-1)
    share_V = share_V.where(share_V.cumsum(-1) - share_V < sampling.top_p, 0.0)
    sum_V = share_V.cumsum(-1)
    place_1 = (sum_V <= number * sum_V[..., -1:]).sum(-1, keepdim=True).clamp(max=sum_V.shape[-1] - 1)
    return token_V.gather(-1, place_1).squeeze(-1).where(finite, BROKEN)


class Continuation(nn.Module):
    """A network whose forward gives the logits behind each row's last token, and what the row's tokens leave."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, tokens_BT: Tensor, last_B: Tensor, length_B: Tensor, past: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits [B, V] of the `last_B`th tokens, fp32, and the cache's new rows [B, T, C] by site."""
        network, cache = self.network, Cache(length_B, past)
        features_BTD = network.features(tokens_BT, None, cache)  # type: ignore[operator]
        index_B1D = last_B[:, None, None].expand(-1, 1, features_BTD.shape[-1])
        return network.logits_of(features_BTD.gather(1, index_B1D)[:, 0]), cache.new  # type: ignore[operator]


class Generator:
    """R sets of weights of one network that go on with B texts each."""

    def __init__(
        self,
        model: LoadedModel,
        weights: Sequence[Mapping[str, Tensor]],
        rows: int,
        sampling: Sampling,
        device: torch.device,
    ) -> None:
        """Load weights.

        Args:
            model: of which the network is taken.
            weights: of each replica, by name.
            rows: texts of each.
        """
        torch.set_float32_matmul_precision("highest")
        self.context, self.device, self.sampling = model.config.context, device, sampling
        self.shape = len(weights), rows
        # on a CPU one after another takes less time than a stack of small products (benchmarks/LOG.md)
        self.stacked = device.type != "cpu"
        self.module = Continuation(make_module(model.config, device))
        self.weights = {
            f"network.{name}": torch.stack([own[name].float() for own in weights]).to(device) for name in weights[0]
        }
        self.length_RB = torch.zeros(self.shape, dtype=torch.int64, device=device)
        self.token_RB = torch.zeros(self.shape, dtype=torch.int64, device=device)
        self.number = torch.zeros((), device=device)
        self.past: dict[str, Tensor] = {}
        self.places = 0
        self.seen: list[list[list[int]]] = [[[] for _ in range(rows)] for _ in weights]
        self.graph: torch.cuda.CUDAGraph | None = None

    def forward(self, tokens_RBT: Tensor, last_RB: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits [R, B, V] behind some tokens of each row, and what the tokens leave."""

        def one_replica(weights, tokens_BT, last_B, length_B, past):
            return functional_call(self.module, weights, (tokens_BT, last_B, length_B, past))

        given = (self.weights, tokens_RBT, last_RB, self.length_RB, self.past)
        if self.stacked:
            return vmap(one_replica)(*given)
        found = [one_replica(*tree_map(itemgetter(replica), given)) for replica in range(self.shape[0])]
        return tree_map(lambda *own: torch.stack(own), *found)

    def make_room(self, places: int) -> None:
        """Buffers of at least so many places, with what is in them; their shapes are those of one token's rows."""
        if places <= self.places:
            return
        places = max(FEWEST, 1 << (places - 1).bit_length())
        _, rows = self.forward(self.token_RB[..., None], torch.zeros_like(self.token_RB))
        for site, row_RB1C in rows.items():
            buffer_RBSC = row_RB1C.new_zeros(*self.shape, places, row_RB1C.shape[-1])
            if site in self.past:
                buffer_RBSC[:, :, : self.places] = self.past[site]
            self.past[site] = buffer_RBSC
        self.places, self.graph = places, None

    def advance(self, tokens_RBT: Tensor, count_RB: Tensor) -> Tensor:
        """Read the first `count_RB` tokens of each row; logits [R, B, V] behind the last of them."""
        logits_RBV, rows = self.forward(tokens_RBT, (count_RB - 1).clamp(min=0))
        time_T = torch.arange(tokens_RBT.shape[-1], device=self.device)
        row_RB = torch.arange(self.length_RB.numel(), device=self.device).view(self.shape)
        place = ((row_RB * self.places + self.length_RB)[..., None] + time_T).flatten()
        for site, rows_RBTC in rows.items():
            self.past[site].flatten(0, 2).index_copy_(0, place, rows_RBTC.flatten(0, 2))
        self.length_RB += count_RB
        return logits_RBV

    @torch.no_grad()
    def read(self, texts: Sequence[Sequence[Sequence[int]]]) -> Tensor:
        """Logits [R, B, V] behind each replica's texts, of which what it has read before is not read again.

        texts: tokens [R][B], at least one each and no more than the context.
        """
        left = []
        for replica, own in enumerate(texts):
            for row, text in enumerate(own):
                assert 0 < len(text) <= self.context, "a text is empty or longer than the context"
                kept = min(shared_length(self.seen[replica][row], text), len(text) - 1)
                self.length_RB[replica, row] = kept
                self.seen[replica][row] = list(text)
                for buffer_RBSC in self.past.values():
                    buffer_RBSC[replica, row, kept:] = 0  # a hidden NaN would still be multiplied, by 0
                left.append(list(text[kept:]))
        self.make_room(max(len(text) for own in texts for text in own) + PIECE)
        logits_RBV = None
        while any(left):
            # on a GPU every length is a kernel of its own
            time = PIECE if self.device.type == "cuda" else min(PIECE, max(map(len, left)))
            tokens = torch.tensor([[*text[:time], *[0] * (time - len(text))] for text in left])
            count_RB = torch.tensor([min(len(text), time) for text in left], device=self.device).view(self.shape)
            found_RBV = self.advance(tokens.view(*self.shape, time).to(self.device), count_RB)
            logits_RBV = found_RBV if logits_RBV is None else found_RBV.where(count_RB[..., None] > 0, logits_RBV)
            left = [text[time:] for text in left]
        assert logits_RBV is not None
        return logits_RBV

    @torch.no_grad()
    def step(self) -> None:
        """Read the token of each row, and choose the next one."""
        tokens_RB1 = self.token_RB.clamp(min=0)[..., None]  # a row without one goes on with whatever is token 0
        logits_RBV = self.advance(tokens_RB1, torch.ones_like(self.length_RB))
        self.token_RB.copy_(choose(logits_RBV, self.number, self.sampling))

    def run_step(self) -> None:
        """`step`, on a GPU as one graph, captured where the buffers are new."""
        if self.device.type != "cuda":
            self.step()
            return
        if self.graph is None:
            kept = self.length_RB.clone(), self.token_RB.clone()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.step()  # compiles the kernels
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.step()
            for buffer, value in zip((self.length_RB, self.token_RB), kept, strict=True):
                buffer.copy_(value)
        self.graph.replay()

    def generate(self, texts: Sequence[Sequence[Sequence[int]]], most: int, turn: int = 0) -> Iterator[list[list[int]]]:
        """The next token of each replica's texts, step by step: [R][B], BROKEN where the logits are not finite.

        Ends behind `most` tokens, or where a text fills the context. Whoever iterates stops it earlier.
        """
        numbers = torch.from_numpy(self.sampling.numbers(turn, most)).to(self.device)
        most = min(most, self.context - max(len(text) for own in texts for text in own))
        with torch.no_grad():
            self.token_RB.copy_(choose(self.read(texts), numbers[0], self.sampling))
        tokens: list[list[int]] = []
        for place in range(most):
            if place:
                for own, next_B in zip(self.seen, tokens, strict=True):
                    for text, token in zip(own, next_B, strict=True):
                        text.append(token)
                self.make_room(max(len(text) for own in self.seen for text in own) + 1)
                self.number.copy_(numbers[place])
                self.run_step()
            tokens = self.token_RB.tolist()
            yield tokens


def shared_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts begin with in common."""
    pairs = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


@dataclass
class Reply:
    """What a replica has written behind one text so far. finite: whether its logits were."""

    tokens: list[int] = field(default_factory=list)
    over: bool = False
    finite: bool = True


def replies(
    generator: Generator,
    texts: Sequence[Sequence[Sequence[int]]],
    ends: Sequence[Sequence[set[int]]],
    most: int,
    turn: int = 0,
    stopped: Callable[[int, list[int]], bool] | None = None,
) -> Iterator[list[list[Reply]]]:
    """What each replica writes behind its texts [R][B], of at most `most` tokens, until all are over.

    The same objects before the first step and after each.

    Args:
        ends: ids that end a reply, [R][B].
        stopped: (row, tokens) -> whether a reply ends with what it says.
    """
    said = [[Reply() for _ in own] for own in texts]
    yield said
    for tokens in generator.generate(texts, most, turn):
        for own, ends_B, next_B in zip(said, ends, tokens, strict=True):
            for row, (reply, end, token) in enumerate(zip(own, ends_B, next_B, strict=True)):
                if reply.over:
                    continue
                reply.finite = token != BROKEN
                reply.over = token in end or not reply.finite
                if not reply.over:
                    reply.tokens.append(token)
                    reply.over = stopped is not None and stopped(row, reply.tokens)
        yield said
        if all(reply.over for own in said for reply in own):
            break
