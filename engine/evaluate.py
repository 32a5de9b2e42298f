"""The probe: losses of some slots' weights on the held-out sequences, each sequence's own.

Where most slots are at a mark the whole stack is evaluated where it lies; else the weights of those slots are copied
and evaluated in powers of two, so that a few slots do not cost as much as many.

Letters: R replica (slot), E replica whose weights were copied, B sequences of one piece, T time, P flat and F frozen
parameters.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from engine.data import IGNORED, Corpus
from engine.hyper import rule_of
from engine.measure import RowLosses
from engine.plan import evaluated_at_once
from engine.stack import Flat, Stack

if TYPE_CHECKING:
    from engine.step import Graphs

WHOLE_STACK = 0  # in place of a number of copied sets of weights


class Probe:
    """The held-out sequences on the device, and buffers for copied weights whose losses on them are measured.

    Sequences are evaluated in pieces of at most a micro-batch; the last is filled up with rows that do not count.
    """

    def __init__(
        self,
        stack: Stack,
        corpus: Corpus,
        token_bytes: np.ndarray,
        micro_batch: int,
        by_row: bool,
        hyper: tuple[str, ...],
        device: torch.device,
    ) -> None:
        """Allocate.

        Args:
            token_bytes: bytes of text that each id stands for; those beyond it stand for none.
            by_row: whether the network's forward gives each row's loss; else a piece is one row.
            hyper: hyper-parameters that the forward reads.
        """
        self.stack, self.by_row = stack, by_row
        rows = len(corpus.validation_tokens)
        piece = min(micro_batch, rows) if by_row else 1
        missing = -rows % piece
        shape = (-1, piece, corpus.validation_tokens.shape[1])
        tokens = np.pad(corpus.validation_tokens, ((0, missing), (0, 0)))
        targets = np.pad(corpus.validation_targets, ((0, missing), (0, 0)), constant_values=IGNORED)
        learned = targets[:rows] != IGNORED
        self.supervised = learned.sum(1)
        ids = targets[:rows][learned]
        self.text_bytes = int(token_bytes[ids[ids < len(token_bytes)]].sum())
        self.tokens = torch.from_numpy(tokens.reshape(shape)).to(device)
        self.targets = torch.from_numpy(targets.reshape(shape)).to(device)
        evaluated = evaluated_at_once(stack.weight_RP[0].nbytes, stack.replicas)
        self.counts = tuple(2**power for power in reversed(range(evaluated.bit_length())))
        # Slots at a mark from which the whole stack is evaluated; on a CPU, where idle slots cost as much, all.
        self.most = -(-3 * stack.replicas // 4) if device.type == "cuda" else stack.replicas
        self.weight_EP = torch.empty_like(stack.weight_RP[: self.counts[0]])
        self.frozen_EF = stack.frozen_RF if stack.shares_frozen else torch.empty_like(stack.frozen_RF[: self.counts[0]])
        self.hyper_R = {name: torch.zeros(stack.replicas, device=device) for name in hyper}
        self.key_R3 = torch.zeros(stack.replicas, 3, dtype=torch.int64, device=device)
        self.sums_RPB = torch.zeros(stack.replicas, *self.tokens.shape[:2], device=device)
        self.place_1 = torch.zeros(1, dtype=torch.int64, device=device)  # the next piece

    @torch.no_grad()
    def of_slots(self, slots: Tensor, hyper_R: Mapping[str, Tensor], graphs: "Graphs") -> list[RowLosses]:
        """Losses of some slots' weights, each with its own hyper-parameters in the forward."""
        if len(slots) >= self.most:
            for name, buffer_R in self.hyper_R.items():
                buffer_R.copy_(self.at_evaluation(name, hyper_R[name]))
            measured = self.run(WHOLE_STACK, graphs)
            return [measured[slot] for slot in slots.tolist()]
        measured = []
        for count in self.counts:
            while len(slots) >= count:
                chosen, slots = slots[:count], slots[count:]
                self.weight_EP[:count] = self.stack.weight_RP[chosen]
                if not self.stack.shares_frozen:
                    self.frozen_EF[:count] = self.stack.frozen_RF[chosen]
                for name, buffer_R in self.hyper_R.items():
                    buffer_R[:count] = self.at_evaluation(name, hyper_R[name][chosen])
                measured += self.run(count, graphs)
        return measured

    @torch.no_grad()
    def of_start(self, flat: Flat, hyper: Mapping[str, float], graphs: "Graphs") -> RowLosses:
        """Losses of one set of weights, evaluated in the shape of the most copies."""
        self.weight_EP.copy_(flat.weight_P.expand_as(self.weight_EP))
        self.frozen_EF.copy_(flat.frozen_F.expand_as(self.frozen_EF))
        for name, buffer_R in self.hyper_R.items():
            buffer_R.copy_(self.at_evaluation(name, torch.full_like(buffer_R, hyper[name])))
        return self.run(self.counts[0], graphs)[0]

    def at_evaluation(self, name: str, value: Tensor) -> Tensor:
        """A forward's hyper-parameter on the probe."""
        fixed = rule_of(name).at_evaluation
        return value.float() if fixed is None else torch.full_like(value, fixed, dtype=torch.float32)

    def run(self, count: int, graphs: "Graphs") -> list[RowLosses]:
        """Evaluate every piece on the first `count` copied sets of weights, or the whole stack."""
        self.place_1.zero_()
        for _ in range(len(self.tokens)):
            graphs.evaluate(count)
        sums = self.sums_RPB[: count or None].flatten(1)[:, : len(self.supervised)].double().cpu().numpy()
        return [RowLosses(each, self.supervised, self.text_bytes) for each in sums]

    @torch.no_grad()
    def piece(self, count: int) -> None:
        """Put the next piece's losses in their place, of the first `count` copied sets of weights or of the stack."""
        stack, first = self.stack, slice(count or None)
        copied = count != WHOLE_STACK
        weights = stack.views(self.weight_EP[first], stack.spans) if copied else stack.weights
        frozen = stack.frozen(self.frozen_EF[first] if copied and not stack.shares_frozen else stack.frozen_RF)
        sums_RPB, key_R3 = self.sums_RPB[first], self.key_R3[first]
        tokens_RBT = self.tokens[self.place_1].expand(len(key_R3), -1, -1)
        targets_RBT = self.targets[self.place_1].expand(len(key_R3), -1, -1)
        hyper_R = {name: buffer_R[first] for name, buffer_R in self.hyper_R.items()}
        options = {"by_row": True} if self.by_row else {}
        sums = stack.losses(weights, frozen, tokens_RBT, targets_RBT, hyper_R, key_R3, **options)
        sums_RPB.index_copy_(1, self.place_1, sums.view(len(key_R3), 1, -1))
        self.place_1.copy_((self.place_1 + 1) % len(self.tokens))
