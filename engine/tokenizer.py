"""Text to tokens: bytes with a few chat marks, and the byte-pair encoding of SmolLM2.

Both classes offer the same things:

    name, vocabulary        what the digest of a corpus names; ids are below `vocabulary`
    calls                   whether there are marks for an assistant's python calls and their outputs
    dated                   whether what it writes of a conversation holds today's date, which `date` then fixes
    padding                 the id that fills an unfinished row (never a target)
    chats                   whether networks that it comes with reply in roles; None: if their data taught them
    bos, eos                the id before a text that nothing else stands before; the id that ends a reply
    token_bytes             bytes of text that each id stands for, int64 [vocabulary]; 0 for marks
    encode(text), decode(tokens)
    document(text)          tokens of one plain document with its boundary mark
    render(messages)        (tokens, supervised) of one conversation

Messages are {"role": "system" | "user" | "assistant", "content": str}. `supervised` is true
exactly on the tokens an assistant has to produce: its replies and the mark that ends each, save
replies with "weight": 0. Text is never read as a mark, whatever it contains.
"""

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

Message = dict[str, Any]
Rendered = tuple[NDArray[np.int32], NDArray[np.bool_]]

BYTE_MARKS = ("<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>")
REPLY = "fractal"
"""stands for the reply that is to come"""
BYTE_VOCABULARY = 320
"""256 bytes and 5 marks, padded to a multiple of 64."""


def _join(parts: Sequence[tuple[Sequence[int], bool]]) -> Rendered:
    """Concatenates pieces of tokens, each wholly supervised or wholly not."""
    tokens = np.concatenate([np.asarray(piece, dtype=np.int32) for piece, _ in parts])
    lengths = [len(piece) for piece, _ in parts]
    supervised = np.repeat(np.array([learned for _, learned in parts]), lengths)
    return tokens, supervised


def is_learned(message: Message) -> bool:
    """Whether a message is a reply that is learned."""
    return message["role"] == "assistant" and bool(message.get("weight", 1))


def letters_of_tokens(backend: Tokenizer, vocabulary: int, marks: Iterable[int]) -> NDArray[np.int64]:
    """`token_bytes` of a byte-level encoding, whose tokens are written with a letter for each byte."""
    lengths = np.zeros(vocabulary, np.int64)
    for token, index in backend.get_vocab(with_added_tokens=False).items():
        lengths[index] = len(token)
    lengths[list(marks)] = 0
    return lengths


def reply_prompt(tokenizer: Any, messages: Sequence[Message]) -> tuple[list[int], set[int]]:
    """Tokens behind which an assistant's reply begins, and the ids that end one.

    They are what the tokenizer writes before and behind a reply that stands for the one to come. Where it cuts
    conversations that are long, so that a longer reply changes nothing, the prompt is empty.
    """
    (tokens, supervised), (longer, _) = (
        tokenizer.render([*messages, {"role": "assistant", "content": reply}]) for reply in (REPLY, f"{REPLY} {REPLY}")
    )
    if len(tokens) == len(longer):
        return [], set()
    learned = np.flatnonzero(supervised)
    breaks = np.flatnonzero(np.diff(learned) > 1)
    first = int(learned[breaks[-1] + 1 if len(breaks) else 0])
    inside = set(tokenizer.encode(REPLY))
    return tokens[:first].tolist(), {int(tokens[learned[-1]]), tokenizer.eos, tokenizer.padding} - inside


def text_prompt(tokenizer: Any, messages: Sequence[Message]) -> tuple[list[int], set[int]]:
    """Tokens of a document that begins with the messages' contents, and the ids that end one."""
    text = "".join(message["content"] for message in messages)
    own, (document, _) = tokenizer.encode(text), tokenizer.document(text)
    opening = [tokenizer.bos] if document[0] == tokenizer.bos else []
    closing = {int(token) for token in document[len(opening) + len(own) :]}
    return [*opening, *own] or [tokenizer.bos], closing | {tokenizer.eos, tokenizer.padding}


PROMPTS = {"chat": reply_prompt, "text": text_prompt}
"""how a network is asked: by messages in roles, or to go on with a text"""


class ByteTokenizer:
    """UTF-8 bytes 0-255, then the marks of nanochat's conversations."""

    name, calls, chats, dated = "bytes", False, None, False
    vocabulary = BYTE_VOCABULARY
    bos, user_start, user_end, assistant_start, assistant_end = range(256, 256 + len(BYTE_MARKS))
    padding, eos = bos, assistant_end
    token_bytes = np.repeat(np.array([1, 0]), (256, BYTE_VOCABULARY - 256))

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        """Marks and unused ids are written out; bytes that are no UTF-8 become U+FFFD."""
        marks = dict(enumerate(BYTE_MARKS, start=256))
        pieces = (
            bytes([token]) if token < 256 else marks.get(token, f"<|{token}|>").encode() for token in map(int, tokens)
        )
        return b"".join(pieces).decode(errors="replace")

    def document(self, text: str) -> Rendered:
        """The opening mark and the bytes; all are learned."""
        return _join([([self.bos], True), (self.encode(text), True)])

    def render(self, messages: Sequence[Message]) -> Rendered:
        """bos, then each message between its role's marks.

        These marks know two roles: system messages open the user message that comes next, set off by a blank line,
        and are one of their own where a reply or the end comes first.
        """
        parts: list[tuple[Sequence[int], bool]] = [([self.bos], False)]

        def add_user(texts: list[str]) -> None:
            parts.append(([self.user_start, *self.encode("\n\n".join(texts)), self.user_end], False))

        system: list[str] = []
        for message in messages:
            if message["role"] == "system":
                system.append(message["content"])
            elif message["role"] == "user":
                add_user([*system, message["content"]])
                system = []
            else:
                if system:
                    add_user(system)
                    system = []
                parts.append(([self.assistant_start], False))
                parts.append(([*self.encode(message["content"]), self.assistant_end], is_learned(message)))
        if system:
            add_user(system)
        return _join(parts)


class SmolLM2Tokenizer:
    """SmolLM2's byte-pair encoding and its chat template (ChatML with a default system message).

    Built from the vocabulary and merges of its GGUF file. Digits are split one by one and the rest
    by GPT-2's pattern, as in the published tokenizer. The template is written out here because a
    rendered string cannot say which tokens are replies; a test compares it with the file's own.
    """

    name, calls, chats, dated = "smollm2", False, True, False
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"

    def __init__(self, tokens: Sequence[str], merges: Sequence[str]):
        ids = {token: index for index, token in enumerate(tokens)}
        pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
        self.backend = Tokenizer(models.BPE(vocab=ids, merges=pairs))
        self.backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        self.backend.decoder = decoders.ByteLevel()
        self.vocabulary = len(tokens)
        self.start, self.end = ids["<|im_start|>"], ids["<|im_end|>"]
        self.boundary = ids["<|endoftext|>"]
        self.padding, self.bos, self.eos = self.boundary, self.start, self.end
        self.newline = self.encode("\n")

    @cached_property
    def token_bytes(self) -> NDArray[np.int64]:
        return letters_of_tokens(self.backend, self.vocabulary, (self.start, self.end, self.boundary))

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text).ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Marks are written out; bytes that are no UTF-8 become U+FFFD."""
        return self.backend.decode(list(map(int, tokens)), skip_special_tokens=False)

    def document(self, text: str) -> Rendered:
        """The tokens and the end-of-text mark; all are learned."""
        return _join([(self.encode(text), True), ([self.boundary], True)])

    def render(self, messages: Sequence[Message]) -> Rendered:
        """`<|im_start|>role\\ncontent<|im_end|>\\n` for each message.

        What stands between two marks is encoded as a whole, as where the rendered string is tokenised: a header's
        line feed and line feeds that open the content may be one token, which belongs to the reply if any of it does.
        """
        if messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        parts: list[tuple[Sequence[int], bool]] = []
        for message in messages:
            header = message["role"] + "\n"
            encoded = self.backend.encode(header + message["content"])
            reply = sum(end <= len(header) for _, end in encoded.offsets)
            parts.append(([self.start, *encoded.ids[:reply]], False))
            parts.append(([*encoded.ids[reply:], self.end], is_learned(message)))
            parts.append((self.newline, False))
        return _join(parts)
