"""The probe: losses of some slots' weights on the held-out sequences, each sequence's own.

Letters: E replica under evaluation, B sequences of one piece, T time, N sequence, F frozen parameters.
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


class Probe:
    """The held-out sequences on the device, and buffers for the weights whose losses on them are measured.

    Sequences are evaluated in pieces of at most a micro-batch; the last is filled up with rows that do not count.
    """

    def __init__(
        self, stack: Stack, corpus: Corpus, micro_batch: int, by_row: bool, hyper: tuple[str, ...], device: torch.device
    ) -> None:
        """Allocate.

        Args:
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
        self.counts = (targets[:rows] != IGNORED).sum(1)
        self.tokens = torch.from_numpy(tokens.reshape(shape)).to(device)
        self.targets = torch.from_numpy(targets.reshape(shape)).to(device)
        evaluated = evaluated_at_once(stack.weight_RP[0].nbytes, stack.replicas)
        self.weight_EP = torch.empty_like(stack.weight_RP[:evaluated])
        self.frozen_EF = stack.frozen_RF if stack.shares_frozen else torch.empty_like(stack.frozen_RF[:evaluated])
        self.hyper_E = {name: torch.zeros(evaluated, device=device) for name in hyper}
        self.key_E3 = torch.zeros(evaluated, 3, dtype=torch.int64, device=device)
        self.sums_EPB = torch.zeros(evaluated, *self.tokens.shape[:2], device=device)
        self.place_1 = torch.zeros(1, dtype=torch.int64, device=device)  # the next piece

    @torch.no_grad()
    def of_slots(self, slots: Tensor, hyper_R: Mapping[str, Tensor], graphs: "Graphs") -> list[RowLosses]:
        """Losses of some slots' weights, each with its own hyper-parameters in the forward."""
        measured = []
        for chosen in slots.split(len(self.weight_EP)):
            count = len(chosen)
            self.weight_EP[:count] = self.stack.weight_RP[chosen]
            if not self.stack.shares_frozen:
                self.frozen_EF[:count] = self.stack.frozen_RF[chosen]
            for name, value_E in self.hyper_E.items():
                value_E[:count] = self.at_evaluation(name, hyper_R[name][chosen])
            measured += self.run(count, graphs)
        return measured

    @torch.no_grad()
    def of_start(self, flat: Flat, hyper: Mapping[str, float], graphs: "Graphs") -> RowLosses:
        """Losses of one set of weights, evaluated in the shape of a full set of slots."""
        self.weight_EP.copy_(flat.weight_P.expand_as(self.weight_EP))
        self.frozen_EF.copy_(flat.frozen_F.expand_as(self.frozen_EF))
        for name, value_E in self.hyper_E.items():
            value_E.copy_(self.at_evaluation(name, torch.full_like(value_E, hyper[name])))
        return self.run(len(self.weight_EP), graphs)[0]

    def at_evaluation(self, name: str, value: Tensor) -> Tensor:
        """A forward's hyper-parameter on the probe."""
        fixed = rule_of(name).at_evaluation
        return value.float() if fixed is None else torch.full_like(value, fixed, dtype=torch.float32)

    def run(self, count: int, graphs: "Graphs") -> list[RowLosses]:
        """Evaluate every piece on the first `count` sets of weights."""
        self.place_1.zero_()
        for _ in range(len(self.tokens)):
            graphs.evaluate(count)
        sums = self.sums_EPB[:count].flatten(1)[:, : len(self.counts)].double().cpu().numpy()
        return [RowLosses(each, self.counts) for each in sums]

    @torch.no_grad()
    def piece(self, count: int | None = None) -> None:
        """Put the next piece's losses in their place, for the first `count` sets of weights (all)."""
        weights = self.stack.views(self.weight_EP[:count], self.stack.spans)
        frozen = self.stack.frozen(self.frozen_EF if self.stack.shares_frozen else self.frozen_EF[:count])
        evaluated = len(self.weight_EP[:count])
        tokens_EBT = self.tokens[self.place_1].expand(evaluated, -1, -1)
        targets_EBT = self.targets[self.place_1].expand(evaluated, -1, -1)
        hyper_E = {name: value_E[:count] for name, value_E in self.hyper_E.items()}
        options = {"by_row": True} if self.by_row else {}
        sums = self.stack.losses(weights, frozen, tokens_EBT, targets_EBT, hyper_E, self.key_E3[:count], **options)
        self.sums_EPB[:count].index_copy_(1, self.place_1, sums.view(evaluated, 1, -1))
        self.place_1.copy_((self.place_1 + 1) % len(self.tokens))
