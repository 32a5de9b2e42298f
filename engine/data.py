"""Corpora as arrays of rows: read, render, mask, pack, hold out, and order.

Documents (conversations or plain texts) are shuffled once, the same for every seed; the first
fill the validation rows, the following ones the training rows, so the two never share a document
and a smaller corpus is a prefix of a larger one. The tokens of documents are concatenated and cut
every T tokens; a row's targets are its tokens one later. In a conversation only what the assistant
has to produce is a target (-100 elsewhere), in a plain text everything. A row without a target is
dropped: a batch of such rows has no loss, which is a fault of the data and no divergence.

Shape letters: N rows, T time (the context), B batch, S step.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.tokenizer import ByteTokenizer, Message, Rendered, SmolLM2Tokenizer

IGNORED = -100
SUFFIXES = (".txt", ".jsonl", ".parquet")
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
FIELDS = "messages, conversations, prompt + completion, question + answer, or text"
DOCUMENT_KEY = 0

Record = dict[str, Any]
Tokenizer = ByteTokenizer | SmolLM2Tokenizer


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


@dataclass(frozen=True)
class Source:
    """Records by index, each with the place to name when it is faulty."""

    count: int
    record: Callable[[int], Record]
    place: Callable[[int], str]


class Rows(NamedTuple):
    tokens_NT: NDArray[np.int32]
    targets_NT: NDArray[np.int32]
    dropped: int
    """rows without a target"""
    skipped: int
    """conversations without a reply"""
    read: int
    """tokens of the documents read"""


def load_corpus(
    data: str,
    data_config: str | None,
    split: str,
    tokenizer: Tokenizer,
    context: int,
    validation_rows: int,
    max_rows: int | None = None,
) -> Corpus:
    """Rows of `context` tokens of a corpus, with `validation_rows` rows held out.

    data is "chitchat" (the package chitchat-dataset), a .txt / .jsonl / .parquet file, a folder of
    them, or a dataset's name on the Hugging Face hub (with data_config and split). Records hold
    one of: messages, conversations, prompt + completion, question + answer, text. A .txt file's
    documents are its paragraphs. Reading stops after max_rows training rows.

    Raises ValueError for a missing or malformed file (with the line), records without a known
    field, data without an assistant's turn, a context longer than the data, too few rows.
    """
    if context < 1 or validation_rows < 0 or (max_rows is not None and max_rows < 1):
        raise ValueError(
            f"context {context}, validation rows {validation_rows}, max rows {max_rows}: expected "
            f"context and max rows of at least 1 and validation rows of at least 0: change them"
        )
    source = read_source(data, data_config or None, split)
    documents = _rendered_documents(source, tokenizer)
    validation = _fill(documents, tokenizer, context, validation_rows)
    training = _fill(documents, tokenizer, context, max_rows)
    _check_filled(data, context, validation_rows, validation, training)
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
        f"{supervised.mean() / context:.0%} supervised), {validation_rows:,} rows held out, "
        f"{training.dropped + validation.dropped:,} rows without a target dropped, "
        f"{training.skipped + validation.skipped:,} conversations without a reply skipped"
    )
    return Corpus(*arrays, tokenizer.vocabulary, supervised, digest.hexdigest(), description)


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


def permutation(key: int, counter: int, length: int) -> NDArray[np.int64]:
    """A permutation of range(length), a pure function of its arguments on every machine.

    The order of `length` raw Philox words under the key (key, counter); a tie, of probability
    length²/2⁶⁵, keeps the smaller index first.
    """
    words = np.random.Philox(key=np.array([key, counter], dtype=np.uint64)).random_raw(length)
    return np.argsort(words, kind="stable")


def batch_order(seed: int, rows: int, length: int) -> NDArray[np.int32]:
    """The row at each of the first `length` places of the data stream, [length] int32.

    Every epoch of `rows` places is a permutation of the rows by (seed, epoch), so place p depends
    on (seed, p) only; step s of a run with batch B takes places s·B … (s + 1)·B - 1.
    """
    epochs = -(-length // rows)
    order = [permutation(seed, epoch, rows) for epoch in range(epochs)]
    return np.concatenate([np.empty(0, np.int64), *order])[:length].astype(np.int32)


def read_source(data: str, data_config: str | None, split: str) -> Source:
    """The records of `data`; see load_corpus for what it may name and what is raised."""
    path = Path(data)
    if data == "chitchat":
        return _chitchat()
    if path.is_file():
        return _listed(_file_records(path))
    if path.is_dir():
        files = _folder_files(path, data_config, split)
        return _listed([record for file in files for record in _file_records(file)])
    if path.suffix in SUFFIXES or data.startswith((".", "/", "~")):
        raise ValueError(
            f"data {data} does not exist: give chitchat, a {', '.join(SUFFIXES)} file, a folder of them, or a hub name"
        )
    return hub_source(data, data_config, split)


def hub_source(name: str, data_config: str | None, split: str) -> Source:
    """A dataset as `datasets` loads it: a hub name, or a local folder of the hub's layout."""
    from datasets import load_dataset
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # its retries; the reason is said below
    try:
        rows = load_dataset(name, data_config, split=split)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"data {name} (config {data_config or 'none'}, split {split}) cannot be loaded: {reason}: "
            f"check the three names, or give a local file"
        ) from error
    return Source(len(rows), lambda index: rows[index], lambda index: f"{name} row {index}")


def _listed(records: list[tuple[str, Record]]) -> Source:
    return Source(len(records), lambda index: records[index][1], lambda index: records[index][0])


def _chitchat() -> Source:
    """BYU's Chit-Chat Challenge: 7,168 dialogues of two people (Myers et al. 2020).

    Whoever speaks second is the assistant; what one person says in a row is one message of lines.
    """
    text = resources.files("chitchat_dataset").joinpath("dataset.json").read_bytes()
    dialogues = list(json.loads(text).values())

    def record(index: int) -> Record:
        said = [line for turn in dialogues[index]["messages"] for line in turn]
        messages = []
        for sender, lines in itertools.groupby(said, key=lambda line: line["sender"]):
            role = "user" if sender == said[0]["sender"] else "assistant"
            messages.append({"role": role, "content": "\n".join(line["text"] for line in lines)})
        return {"messages": messages}

    return Source(len(dialogues), record, lambda index: f"chitchat dialogue {index}")


def _folder_files(folder: Path, data_config: str | None, split: str) -> list[Path]:
    """The folder's data files by name; in the hub's layout those of the config and the split
    (`[config/]train.jsonl`, `[config/]data/train-00000-of-00001.parquet`)."""
    if data_config is not None:
        if not (folder / data_config).is_dir():
            raise ValueError(f"data {folder} has no folder {data_config}: give another --data-config or none")
        folder = folder / data_config
    files = sorted(file for file in folder.rglob("*") if file.suffix in SUFFIXES)
    if not files:
        raise ValueError(f"data {folder} holds no {', '.join(SUFFIXES)} file: give another folder")
    of_split = [file for file in files if re.split(r"[-_.]", file.name)[0] == split]
    return of_split or files


def _file_records(file: Path) -> list[tuple[str, Record]]:
    """Every record of a file with its place."""
    if file.suffix == ".parquet":
        return _parquet_records(file)
    if file.suffix == ".jsonl":
        return _jsonl_records(file)
    if file.suffix != ".txt":
        raise ValueError(
            f"data {file} ends in {file.suffix or 'nothing'}, expected one of "
            f"{', '.join(SUFFIXES)}: convert or rename it"
        )
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text (byte {error.start}): convert it to UTF-8") from error
    paragraphs = [part for part in re.split(r"\n\s*\n", text) if part.strip()]
    return [(f"{file} paragraph {number}", {"text": part}) for number, part in enumerate(paragraphs, 1)]


def _jsonl_records(file: Path) -> list[tuple[str, Record]]:
    records = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        place = f"{file} line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{place} is not JSON ({error}): mend or remove it") from error
        if not isinstance(record, dict):
            raise ValueError(f"{place} is a JSON {type(record).__name__}, expected an object: mend or remove it")
        records.append((place, record))
    return records


def _parquet_records(file: Path) -> list[tuple[str, Record]]:
    import pyarrow
    from pyarrow import parquet

    try:
        rows = parquet.read_table(file).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(
            f"{file} is not a readable parquet file ({' '.join(str(error).split())}): write it anew"
        ) from error
    return [(f"{file} row {number}", row) for number, row in enumerate(rows)]


def to_document(record: Record, place: str) -> list[Message] | str:
    """A record's conversation as messages, or its plain text; ValueError naming the place."""
    if "messages" in record:
        turns = _list_of(record["messages"], place, "messages")
        return [_message(turn, "role", "content", place) for turn in turns]
    if "conversations" in record:
        turns = _list_of(record["conversations"], place, "conversations")
        return [_message(turn, "from", "value", place) for turn in turns]
    for prompt, reply in (("prompt", "completion"), ("question", "answer")):
        if prompt in record and reply in record:
            return [
                {"role": "user", "content": _text(record[prompt], place, prompt)},
                {"role": "assistant", "content": _text(record[reply], place, reply)},
            ]
    if "text" in record:
        return _text(record["text"], place, "text")
    raise ValueError(f"{place} has fields {sorted(record)}, expected {FIELDS}: rename the fields")


def _list_of(value: Any, place: str, field: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{place}: {field} is {type(value).__name__}, expected a list of turns: mend it")
    return value


def _message(turn: Any, role_field: str, text_field: str, place: str) -> Message:
    if not isinstance(turn, dict) or role_field not in turn or text_field not in turn:
        raise ValueError(
            f"{place}: a turn is {str(turn)[:60]!r}, expected the fields {role_field} and {text_field}: mend it"
        )
    role = turn[role_field]
    if role not in ROLES:
        raise ValueError(f"{place}: role {role!r} is unknown, expected one of {', '.join(ROLES)}: rename it")
    return {"role": ROLES[role], "content": _text(turn[text_field], place, text_field)}


def _text(value: Any, place: str, field: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{place}: {field} is {type(value).__name__}, expected text: mend it")
    return value.encode(errors="replace").decode()


def _rendered_documents(source: Source, tokenizer: Tokenizer) -> Iterator[Rendered]:
    """Documents in their fixed shuffled order; nothing of a conversation without a reply."""
    for index in map(int, permutation(DOCUMENT_KEY, DOCUMENT_KEY, source.count)):
        document = to_document(source.record(index), source.place(index))
        if isinstance(document, str):
            yield tokenizer.document(document)
        elif any(message["role"] == "assistant" for message in document):
            yield tokenizer.render(document)
        else:
            yield np.empty(0, np.int32), np.empty(0, np.bool_)


def _fill(documents: Iterator[Rendered], tokenizer: Tokenizer, context: int, wanted: int | None) -> Rows:
    """The first `wanted` rows with a target that the next documents give, or all there are.

    Takes whole documents from the iterator, so what is left in it shares none with these rows.
    """
    pieces: list[Rendered] = []
    read, skipped, exhausted = 0, 0, False
    needed = float("inf") if wanted is None else wanted * context + 1
    while True:
        while read < needed and not exhausted and wanted != 0:
            rendered = next(documents, None)
            if rendered is None:
                exhausted = True
            elif len(rendered[0]) == 0:
                skipped += 1
            else:
                pieces.append(rendered)
                read += len(rendered[0])
        tokens_NT, targets_NT = pack(pieces, context, tokenizer.padding, pad=exhausted)
        has_target_N = (targets_NT != IGNORED).any(axis=1)
        kept = int(has_target_N.sum())
        if exhausted or wanted is None or kept >= wanted:
            dropped = len(has_target_N) - kept
            tokens_NT, targets_NT = tokens_NT[has_target_N], targets_NT[has_target_N]
            return Rows(tokens_NT[:wanted], targets_NT[:wanted], dropped, skipped, read)
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


def _check_filled(data: str, context: int, validation_rows: int, validation: Rows, training: Rows) -> None:
    read = validation.read + training.read
    skipped = validation.skipped + training.skipped
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
    raise ValueError(
        f"data {data} gives {len(validation.tokens_NT) + len(training.tokens_NT)} rows of context "
        f"{context}, expected {validation_rows} to hold out and at least 1 to train on: give "
        f"fewer validation rows, a shorter context or more documents (split .txt by blank lines)"
    )
