"""nanochat's tokenizer: a byte-pair encoding with nine marks, kept in a pickle of tiktoken's Encoding.

A pickle can run anything, so it is read by a reader that makes one inert object of one name, tiktoken's
Encoding, and refuses every other name before it is looked up. What the object would be built of (a
pattern, ranks of byte strings, marks) is checked and becomes an encoder of `tokenizers`, which gives
the same ids as tiktoken (tested) and needs no tiktoken.
"""

import hashlib
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from engine.tokenizer import Message, Rendered, is_learned

MARKS = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)
MAX_TOKENS = 2048
"""a conversation is cut behind so many"""
PARTS = {"python": ("<|python_start|>", "<|python_end|>"), "python_output": ("<|output_start|>", "<|output_end|>")}

Encoding = tuple[str, dict[bytes, int], dict[str, int]]


class _Encoding:
    """What stands for tiktoken's class while it is read: it keeps the state and does nothing."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("tiktoken.core", "Encoding"):
            return _Encoding
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_pickle(file: Path) -> Encoding:
    """Pattern, ranks and marks of a pickled tiktoken Encoding; nothing of the pickle is run.

    ValueError where the pickle is anything else.
    """
    with file.open("rb") as opened:
        try:
            read = _Reader(opened).load()
        except Exception as error:  # a hostile pickle raises what it likes
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"{file} is no pickled tiktoken Encoding ({reason}): give nanochat's own tokenizer.pkl"
            ) from error
    state = read.state if isinstance(read, _Encoding) else None
    if not isinstance(state, dict):
        raise ValueError(f"{file} holds no tiktoken Encoding with its ranks: give nanochat's own tokenizer.pkl")
    pattern, ranks, marks = (state.get(name) for name in ("pat_str", "mergeable_ranks", "special_tokens"))
    if not isinstance(pattern, str) or not _table(ranks, bytes) or not _table(marks, str):
        raise ValueError(
            f"{file} holds an Encoding without pattern, ranks and marks: give nanochat's own tokenizer.pkl"
        )
    assert isinstance(ranks, dict) and isinstance(marks, dict)
    ids = [*ranks.values(), *marks.values()]
    lacking = [mark for mark in MARKS if mark not in marks]
    if lacking or len(set(ids)) != len(ids) or min(ids) < 0 or any(bytes([byte]) not in ranks for byte in range(256)):
        reason = f"lacks {lacking[0]}" if lacking else "gives an id twice or lacks a byte"
        raise ValueError(f"{file} {reason}: give nanochat's own tokenizer.pkl")
    return pattern, ranks, marks


def _table(value: Any, kind: type) -> bool:
    """Whether a value is a dict of whole numbers by keys of one kind, and nothing derived from them."""
    return type(value) is dict and all(type(key) is kind and type(number) is int for key, number in value.items())


def byte_letters() -> dict[int, str]:
    """GPT-2's printable letter of every byte, by which `tokenizers` writes byte strings."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def make_backend(pattern: str, ranks: Mapping[bytes, int], marks: Mapping[str, int]) -> Tokenizer:
    """An encoder of `tokenizers` with tiktoken's rule: of all neighbours whose join has a rank, the lowest first."""
    letters = byte_letters()
    spelt = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = [
        (spelt[token[:cut]], spelt[token[cut:]])
        for token in sorted(ranks, key=ranks.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    vocabulary = {spelt[token]: rank for token, rank in ranks.items()} | dict(marks)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # what the pattern does not match is dropped, as tiktoken does
            pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    return backend


class NanochatTokenizer:
    """nanochat's encoding and its chat rendering, with the methods of `engine.tokenizer`'s classes."""

    calls = chats = True
    dated = False

    def __init__(self, pattern: str, ranks: dict[bytes, int], marks: dict[str, int]):
        """pattern: splits a text. ranks: id of each byte string. marks: id of each mark, the nine at least."""
        self.pattern, self.ranks, self.marks = pattern, ranks, marks
        self.backend = make_backend(pattern, ranks, marks)
        self.backend.encode_special_tokens = True  # marks in a text are text
        self.name = f"nanochat-{hashlib.sha256(self.backend.to_str().encode()).hexdigest()[:16]}"
        self.vocabulary = max(*ranks.values(), *marks.values()) + 1
        self.padding = self.bos = marks["<|bos|>"]
        self.eos = marks["<|assistant_end|>"]
        self.token_bytes = np.zeros(self.vocabulary, np.int64)
        self.token_bytes[list(ranks.values())] = [len(token) for token in ranks]

    @classmethod
    def from_pickle(cls, file: Path) -> "NanochatTokenizer":
        """Of a tokenizer.pkl; ValueError for another pickle."""
        return cls(*read_pickle(file))

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "NanochatTokenizer":
        """Of a tokenizer.json that `save` wrote; KeyError for another."""
        bytes_of = {letter: byte for byte, letter in byte_letters().items()}
        vocabulary = fields["model"]["vocab"]
        marks = {token["content"]: token["id"] for token in fields["added_tokens"]}
        ranks = {bytes(map(bytes_of.__getitem__, t)): rank for t, rank in vocabulary.items() if t not in marks}
        return cls(fields["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"], ranks, marks)

    @classmethod
    def of_bytes(cls) -> "NanochatTokenizer":
        """Every byte its own token, with the ids of `engine.tokenizer.ByteTokenizer`."""
        return cls(r"[\s\S]", {bytes([byte]): byte for byte in range(256)}, {m: 256 + n for n, m in enumerate(MARKS)})

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Marks are written out; bytes that are no UTF-8 become U+FFFD."""
        return self.backend.decode(list(map(int, tokens)), skip_special_tokens=False)

    def document(self, text: str) -> Rendered:
        """bos and the tokens; all are learned."""
        tokens = np.array([self.padding, *self.encode(text)], dtype=np.int32)
        return tokens, np.ones(len(tokens), dtype=np.bool_)

    def render(self, messages: Sequence[Message]) -> Rendered:
        """(tokens, supervised) of one conversation, at most 2,048 of them.

        bos, then each message between its role's marks. A first system message opens the user message
        behind it, a blank line between. An assistant's content is a text or a list of parts {"type":
        "text" | "python" | "python_output", "text": str}. Trained on are its texts, its python calls
        with their marks, and the mark that ends it, save replies with "weight": 0. ValueError for roles that do
        not take turns.
        """
        messages = list(messages)
        if messages and messages[0]["role"] == "system":
            if len(messages) < 2 or messages[1]["role"] != "user":
                raise ValueError("a conversation has a system message and no user message behind it: add one")
            opening = f"{messages[0]['content']}\n\n{messages[1]['content']}"
            messages = [{"role": "user", "content": opening}, *messages[2:]]
        pieces: list[tuple[Sequence[int], bool]] = [([self.padding], False)]
        for index, message in enumerate(messages):
            role = "assistant" if index % 2 else "user"
            if message["role"] != role:
                raise ValueError(f"message {index} is from {message['role']!r}, expected {role!r}: let them take turns")
            pieces.append(([self.marks[f"<|{role}_start|>"]], False))
            learned = is_learned(message)
            pieces += self._content(message["content"], role, learned)
            pieces.append(([self.marks[f"<|{role}_end|>"]], learned))
        tokens = np.concatenate([np.asarray(piece, dtype=np.int32) for piece, _ in pieces])
        supervised = np.repeat([learned for _, learned in pieces], [len(piece) for piece, _ in pieces])
        return tokens[:MAX_TOKENS], supervised[:MAX_TOKENS]

    def _content(self, content: Any, role: str, learned: bool) -> list[tuple[Sequence[int], bool]]:
        if isinstance(content, str):
            return [(self.encode(content), learned)]
        if role == "user" or not isinstance(content, list):
            raise ValueError(f"a {role}'s content is {type(content).__name__}, expected text: mend the conversation")
        pieces: list[tuple[Sequence[int], bool]] = []
        for part in content:
            kind, tokens = part["type"], self.encode(part["text"])
            if kind != "text" and kind not in PARTS:
                raise ValueError(f"a part is of type {kind!r}, expected text, python or python_output: rename it")
            if kind in PARTS:
                start, end = PARTS[kind]
                tokens = [self.marks[start], *tokens, self.marks[end]]
            pieces.append((tokens, learned and kind != "python_output"))
        return pieces

    def save(self, folder: Path) -> None:
        """tokenizer.json, which `transformers` and `load_model` read."""
        self.backend.save(str(folder / "tokenizer.json"))

    def save_pickle(self, folder: Path) -> None:
        """tokenizer.pkl, which unpickles to tiktoken's Encoding, and token_bytes.pt, the bytes of every token."""
        state = {
            "name": "rustbpe",
            "pat_str": self.pattern,
            "mergeable_ranks": self.ranks,
            "special_tokens": self.marks,
        }
        body = pickle.dumps(state, protocol=3)[2:-1]  # without the protocol and the stop
        (folder / "tokenizer.pkl").write_bytes(b"\x80\x03ctiktoken.core\nEncoding\n)\x81" + body + b"b.")
        torch.save(torch.from_numpy(self.token_bytes).int(), folder / "token_bytes.pt")
