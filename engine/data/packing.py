"""Documents to rows of one length: all tokens in a row and cut, or whole documents by best fit.

Shape letters: N rows, T time (the context).
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.tokenizer import Rendered

IGNORED = -100
BUFFER = 100
"""Documents among which best-fit packing chooses."""


class Rows(NamedTuple):
    tokens_NT: NDArray[np.int32]
    targets_NT: NDArray[np.int32]
    dropped: int
    """rows without a target"""
    documents: int
    """documents read for these rows"""
    read: int
    """tokens of those documents"""


def cut_rows(documents: Iterator[Rendered], context: int, padding: int, wanted: int | None) -> Rows:
    """The first `wanted` rows with a target that the next documents give, or all there are.

    Takes whole documents from the iterator, so what is left in it shares none with these rows.
    """
    pieces: list[Rendered] = []
    read, exhausted = 0, False
    needed = float("inf") if wanted is None else wanted * context + 1
    while True:
        while read < needed and not exhausted and wanted != 0:
            rendered = next(documents, None)
            if rendered is None:
                exhausted = True
            else:
                pieces.append(rendered)
                read += len(rendered[0])
        tokens_NT, targets_NT = pack(pieces, context, padding, pad=exhausted)
        has_target_N = (targets_NT != IGNORED).any(axis=1)
        kept = int(has_target_N.sum())
        if exhausted or wanted is None or kept >= wanted:
            dropped = len(has_target_N) - kept
            tokens_NT, targets_NT = tokens_NT[has_target_N], targets_NT[has_target_N]
            return Rows(tokens_NT[:wanted], targets_NT[:wanted], dropped, len(pieces), read)
        needed += (wanted - kept) * context


def pack(pieces: list[Rendered], context: int, padding: int, pad: bool) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Rows [N, T] of inputs and targets of the concatenated pieces.

    Row n holds tokens n·T … (n + 1)·T - 1 and as targets the tokens one later, so each token but
    the first is a target once. The unfinished last row is padded, or left out without `pad`.
    """
    tokens = np.concatenate([np.empty(0, np.int32), *(piece for piece, _ in pieces)])
    supervised = np.concatenate([np.empty(0, np.bool_), *(mask for _, mask in pieces)])
    pairs = max(0, len(tokens) - 1)
    rows = -(-pairs // context) if pad else pairs // context
    cut = rows * context
    missing = max(0, cut - pairs)
    tokens = np.concatenate([tokens, np.full(missing, padding, np.int32)])
    supervised = np.concatenate([supervised, np.zeros(missing, np.bool_)])
    targets = np.where(supervised, tokens, np.int32(IGNORED))[1 : cut + 1]
    return tokens[:cut].reshape(rows, context), targets.reshape(rows, context)


def best_fit_pieces(documents: Iterator[Rendered], capacity: int) -> Iterator[list[Rendered]]:
    """The documents of each row in turn, at most `capacity` tokens together.

    A row takes the longest of the next 100 documents that still fits (the earliest of equals) until none does
    (nanochat's scripts/chat_sft.py). A document longer than a row is cut to it.
    """
    waiting: list[Rendered] = []
    exhausted = False
    while True:
        row: list[Rendered] = []
        space = capacity
        while True:
            while len(waiting) < BUFFER and not exhausted:
                rendered = next(documents, None)
                if rendered is None:
                    exhausted = True
                else:
                    waiting.append((rendered[0][:capacity], rendered[1][:capacity]))
            fitting = [place for place, (tokens, _) in enumerate(waiting) if len(tokens) <= space]
            if not fitting:
                break
            longest = max(fitting, key=lambda place: len(waiting[place][0]))
            row.append(waiting.pop(longest))
            space -= len(row[-1][0])
        if not row:
            return
        yield row


def best_fit_rows(rows: Iterator[list[Rendered]], context: int, padding: int, wanted: int | None) -> Rows:
    """The first `wanted` rows with a target, or all there are, of `best_fit_pieces` of T + 1 tokens.

    Their ends are padded; a document is in one row only.
    """
    tokens, targets = [np.empty((0, context), np.int32)], [np.empty((0, context), np.int32)]
    dropped, documents, read = 0, 0, 0
    while wanted is None or len(tokens) <= wanted:
        row = next(rows, None)
        if row is None:
            break
        documents += len(row)
        read += sum(len(piece) for piece, _ in row)
        missing = context + 1 - sum(len(piece) for piece, _ in row)
        end = (np.full(missing, padding, np.int32), np.zeros(missing, np.bool_))
        tokens_1T, targets_1T = pack([*row, end], context, padding, pad=True)
        if (targets_1T != IGNORED).any():
            tokens.append(tokens_1T)
            targets.append(targets_1T)
        else:
            dropped += 1
    return Rows(np.concatenate(tokens), np.concatenate(targets), dropped, documents, read)
