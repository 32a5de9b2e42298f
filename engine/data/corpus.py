"""Corpora as arrays of rows: read, render, mask, pack, hold out.

Documents (conversations or plain texts) are shuffled once, the same for every seed; the first
fill the validation rows, the following ones the training rows, so the two never share a document
and a smaller corpus is a prefix of a larger one. The tokens of documents are concatenated and cut
every T tokens, or whole documents are packed into rows by best fit; a row's targets are its tokens
one later. In a conversation only what the assistant has to produce is a target (-100 elsewhere), in
a plain text everything. A row without a target is dropped: a batch of such rows has no loss, which
is a fault of the data and no divergence.

Shape letters: N rows, T time (the context).
"""

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from engine.data.chat import refuse_calls, refuse_empty, to_document
from engine.data.order import permutation
from engine.data.packing import IGNORED, Rows, best_fit_pieces, best_fit_rows, cut_rows
from engine.data.sources import Source, read_source
from engine.tokenizer import ByteTokenizer, Message, Rendered, SmolLM2Tokenizer, is_learned

DOCUMENT_KEY = 0
TOGETHER = 64  # documents whose text is encoded at once, where the tokenizer can
PACKINGS = ("cut", "best-fit")

Tokenizer = ByteTokenizer | SmolLM2Tokenizer


@runtime_checkable
class EncodesTogether(Protocol):
    """A tokenizer that encodes many documents faster than one after another: what it writes of each, then all."""

    def write(self, messages: Sequence[Message]) -> Any: ...

    def encode_all(self, documents: Sequence[Any]) -> list[Rendered]: ...


@dataclass(frozen=True)
class Corpus:
    tokens: NDArray[np.int32]
    """[N, T] inputs"""
    targets: NDArray[np.int32]
    """[N, T] the token after each input, -100 where it is not learned"""
    validation_tokens: NDArray[np.int32]
    """[N', T] inputs of documents that no training row holds"""
    validation_targets: NDArray[np.int32]
    vocabulary: int
    """ids of the tokenizer are below it"""
    supervised: NDArray[np.int32]
    """[N] targets in each row, at least 1"""
    digest: str
    """SHA-256 of the tokenizer's name and the four arrays, hexadecimal"""
    description: str
    """one line for people"""
    documents: int = 0
    """documents read for the training rows"""
    document_tokens: int = 0
    """tokens of those documents; an epoch of a run is N·T tokens, the rows as they are"""
    documents_in_all: int = 0
    """records of the source, whether read or not"""


class Documents:
    """Rendered documents in their fixed shuffled order; conversations that teach nothing are skipped and counted."""

    def __init__(self, sources: list[tuple[Source, float]], tokenizer: Tokenizer):
        self.skipped = 0
        self.count = sum(source.count for source, _ in sources)
        self._rendered = self._in_order(sources, tokenizer)

    def __iter__(self) -> Iterator[Rendered]:
        return self._rendered

    def _in_order(self, sources: list[tuple[Source, float]], tokenizer: Tokenizer) -> Iterator[Rendered]:
        render: Any = tokenizer.render
        finish: Any = list
        together = 1
        if isinstance(tokenizer, EncodesTogether):
            render, finish, together = tokenizer.write, tokenizer.encode_all, TOGETHER
        waiting: list[Any] = []
        for source, index in _mixed(sources):
            if len(waiting) == together:
                yield from finish(waiting)
                waiting = []
            document = to_document(source.record(index), source.place(index))
            if isinstance(document, str):
                waiting.append(tokenizer.document(document))
                continue
            if not source.empty_turns:
                refuse_empty(document, source.place(index))
            if not tokenizer.calls:
                refuse_calls(document, source.place(index))
            if any(map(is_learned, document)):
                try:
                    waiting.append(render(document))
                except ValueError as error:  # of roles and templates, which know no place
                    raise ValueError(f"{source.place(index)}: {error}") from error
            else:
                self.skipped += 1
        yield from finish(waiting)


def load_corpus(
    data: str,
    data_config: str | None,
    split: str,
    tokenizer: Tokenizer,
    context: int,
    validation_rows: int,
    max_rows: int | None = None,
    packing: str = "cut",
) -> Corpus:
    """Rows of `context` tokens of a corpus, with `validation_rows` rows held out.

    data is "chitchat" (the package chitchat-dataset), a .txt / .jsonl / .jsonl.gz / .jsonl.zst / .parquet file, a
    folder or a dataset's name on the Hugging Face hub as `datasets` reads them (with data_config and split), or several
    of these with weights, `a.jsonl:0.7,b.parquet:0.3`: documents are then taken in these shares until one source has no
    more. The layouts of records are those of `to_document`; a .txt file's documents are its paragraphs. Reading stops
    after max_rows training rows. packing is "cut" (all tokens in a row, cut every T tokens) or "best-fit" (whole
    documents in rows of T + 1 tokens, their ends padded and not learned).

    Raises ValueError for a missing or malformed file (with the line), records without a known
    field, data without an assistant's turn, a context longer than the data, too few rows, and a split or
    data_config that the source has not.
    """
    if context < 1 or validation_rows < 0 or (max_rows is not None and max_rows < 1):
        raise ValueError(
            f"context {context}, validation rows {validation_rows}, max rows {max_rows}: expected "
            f"context and max rows of at least 1 and validation rows of at least 0: change them"
        )
    if packing not in PACKINGS:
        raise ValueError(f"packing is {packing!r}, expected one of {', '.join(PACKINGS)}: choose one")
    parts = parse_mix(data)
    documents = Documents(
        [(read_source(part, data_config or None, split), weight) for part, weight in parts], tokenizer
    )
    rendered = iter(documents)
    if packing == "cut":
        validation = cut_rows(rendered, context, tokenizer.padding, validation_rows)
        training = cut_rows(rendered, context, tokenizer.padding, max_rows)
    else:
        pieces = best_fit_pieces(rendered, context + 1)
        validation = best_fit_rows(pieces, context, tokenizer.padding, validation_rows)
        training = best_fit_rows(pieces, context, tokenizer.padding, max_rows)
    _check_filled(data, context, validation_rows, validation, training, documents.skipped)
    arrays = (
        training.tokens_NT,
        training.targets_NT,
        validation.tokens_NT,
        validation.targets_NT,
    )
    supervised = (training.targets_NT != IGNORED).sum(axis=1, dtype=np.int32)
    digest = hashlib.sha256(tokenizer.name.encode())
    for array in arrays:
        digest.update(str(array.shape).encode())
        digest.update(array.tobytes())
    rows = len(supervised)
    description = (
        f"{data}: {rows:,} rows of {context} tokens ({rows * context:,} tokens, "
        f"{supervised.mean() / context:.0%} supervised) of {training.documents:,} documents, "
        f"{validation_rows:,} rows held out, "
        f"{training.dropped + validation.dropped:,} rows without a target dropped, "
        f"{documents.skipped:,} conversations without a reply skipped"
    )
    return Corpus(
        *arrays,
        tokenizer.vocabulary,
        supervised,
        digest.hexdigest(),
        description,
        training.documents,
        training.read,
        documents.count,
    )


def parse_mix(data: str) -> list[tuple[str, float]]:
    """The sources `data` names and their weights: one of weight 1, or the parts of `a.jsonl:0.7,b.parquet:0.3`.

    Raises ValueError for a part without a weight above 0, and for a source named twice, whose documents would be both
    held out and trained on.
    """
    matches = [re.fullmatch(r"(.+):([0-9.eE+-]+)", part) for part in data.split(",")]
    if Path(data).exists() or not any(matches):
        return [(data, 1.0)]
    parts = []
    for part, match in zip(data.split(","), matches, strict=True):
        try:
            weight = float(match[2]) if match else 0.0
        except ValueError:
            weight = 0.0
        if match is None or not 0 < weight < math.inf:
            raise ValueError(f"data {data}: {part!r} has no weight above 0, expected NAME:WEIGHT for each: give it one")
        parts.append((match[1], weight))
    if len({Path(name).resolve() for name, _ in parts}) < len(parts):
        raise ValueError(f"data {data} names a source twice, expected each once: add up its weights")
    return parts


def check_vocabulary(corpus: Corpus, vocabulary: int) -> None:
    """ValueError if the corpus holds a token id that a model of this vocabulary has no row for."""
    largest = int(max(corpus.tokens.max(), corpus.targets.max()))
    if len(corpus.validation_tokens):
        largest = max(largest, int(corpus.validation_tokens.max()), int(corpus.validation_targets.max()))
    if largest >= vocabulary:
        raise ValueError(
            f"token id {largest} of the data is beyond the model's vocabulary of {vocabulary}: "
            f"give a vocabulary of at least {corpus.vocabulary}"
        )


def _mixed(sources: list[tuple[Source, float]]) -> Iterator[tuple[Source, int]]:
    """Source and index of every document in order: each source shuffled by itself, and of any number of documents
    each source has given its weight's share, to one; it ends with the first source that has no more."""
    orders = [permutation(DOCUMENT_KEY, number, source.count) for number, (source, _) in enumerate(sources)]
    given = [0] * len(sources)
    while True:
        number = min(range(len(sources)), key=lambda n: ((given[n] + 1) / sources[n][1], n))
        if given[number] == sources[number][0].count:
            return
        yield sources[number][0], int(orders[number][given[number]])
        given[number] += 1


def _check_filled(
    data: str, context: int, validation_rows: int, validation: Rows, training: Rows, skipped: int
) -> None:
    read = validation.read + training.read
    if read == 0 and skipped:
        raise ValueError(
            f"data {data} has no assistant turn in its {skipped} conversations, nothing to learn: "
            f"give data with replies"
        )
    if len(training.tokens_NT) and len(validation.tokens_NT) == validation_rows:
        return
    if read == 0:
        raise ValueError(f"data {data} holds no text: give data with some")
    if read <= context:
        raise ValueError(
            f"context {context} is longer than the data {data} ({read} tokens): give a shorter context or more data"
        )
    dropped = validation.dropped + training.dropped
    more = f" with a target (and {dropped} without)" if dropped else ""
    raise ValueError(
        f"data {data} gives {len(validation.tokens_NT) + len(training.tokens_NT)} rows of context "
        f"{context}{more}, expected {validation_rows} to hold out and at least 1 to train on: give "
        f"fewer validation rows, a shorter context or more documents (split .txt by blank lines)"
    )
