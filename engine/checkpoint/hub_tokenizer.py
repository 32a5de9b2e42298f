"""Any tokenizer and chat template of a Hugging Face folder, through `transformers` (extra `hf`).

The mask is that of the template's generation marks where it has them. Where it has none, it covers
the assistant's spans: what the template writes behind the prompt for a reply, up to the mark that ends
it. Every span is verified against the whole rendered string, and a template that hides or rewrites a
reply is refused, since a wrong mask would train on the wrong text.
"""

import datetime
import hashlib
import json
import re
from collections.abc import Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.tokenizer import Message, Rendered, is_learned, letters_of_tokens

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
SPACE = "\u2581"  # how sentencepiece writes it
CLOCK = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
"""How a template comes by today's date: transformers gives it this function, and takes no other one for it."""
QUESTION, PROBE = "fractal-probe-question", "fractal-probe-reply"


class Written(NamedTuple):
    """A conversation as its template writes it, and first and last + 1 character of each reply that is learned."""

    text: str
    spans: list[tuple[int, int]]


def learned_tokens(ids: list[int], places: list[tuple[int, int]], spans: list[tuple[int, int]]) -> Rendered:
    """Tokens, and which have any part of some spans of characters; places: each token's own."""
    first, last = np.array(places, dtype=np.int64).reshape(-1, 2).T
    supervised = np.zeros(len(first), np.bool_)
    for begin, end in spans:
        supervised |= (last > begin) & (first < end)
    return np.array(ids, np.int32), supervised


class HubTokenizer:
    """A tokenizer of `transformers`, with the methods of `engine.tokenizer`'s classes."""

    calls = False
    date = ""
    """what a template takes for today, YYYY-MM-DD; '' for today itself"""

    def __init__(self, folder: Path):
        if find_spec("transformers") is None:
            raise ValueError(
                f"{folder} has a tokenizer that needs the package transformers: run `uv sync --extra hf`, or "
                f"`pip install transformers`"
            )
        from transformers import AutoTokenizer

        try:
            self.backend: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # of the library and of every file that it reads
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"{folder} holds no tokenizer that transformers reads ({reason}): fetch it again"
            ) from error
        if not self.backend.is_fast:
            raise ValueError(f"{folder} has a tokenizer without tokenizer.json, expected one: convert it")
        self.folder = folder
        self.template = self.backend.chat_template
        self.chats = isinstance(self.template, str)
        self.dated = self.chats and bool(CLOCK.search(self.template))
        described = self.backend.backend_tokenizer.to_str() + str(self.template)
        self.name = f"hf-{hashlib.sha256(described.encode()).hexdigest()[:16]}"
        self.vocabulary = max(self.backend.get_vocab().values()) + 1
        eos, pad = self.backend.eos_token_id, self.backend.pad_token_id
        self.boundary = [] if eos is None else [eos]
        self.padding = pad if pad is not None else eos if eos is not None else 0
        self.eos = eos if eos is not None else self.padding
        self.bos = self.backend.bos_token_id if self.backend.bos_token_id is not None else self.eos

    @cached_property
    def token_bytes(self) -> NDArray[np.int64]:
        """Bytes of text that each id stands for [vocabulary]; 0 for special tokens."""
        backend, special = self.backend.backend_tokenizer, self.backend.all_special_ids
        if "ByteLevel" in json.dumps(json.loads(backend.to_str())["decoder"]):
            lengths = letters_of_tokens(backend, self.vocabulary, special)
        else:
            lengths = np.zeros(self.vocabulary, np.int64)
            for piece, index in backend.get_vocab(with_added_tokens=False).items():
                lengths[index] = 1 if BYTE_PIECE.fullmatch(piece) else len(piece.replace(SPACE, " ").encode())
        for index, token in self.backend.added_tokens_decoder.items():
            lengths[index] = 0 if token.special else len(token.content.encode())
        return lengths

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False)

    def decode(self, tokens: Sequence[int]) -> str:
        """Marks are written out."""
        ids = list(map(int, tokens))
        return self.backend.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def document(self, text: str) -> Rendered:
        """The tokens and the end-of-text mark, where there is one; all are learned."""
        tokens = np.array([*self.encode(text), *self.boundary], dtype=np.int32)
        return tokens, np.ones(len(tokens), dtype=np.bool_)

    def render(self, messages: Sequence[Message]) -> Rendered:
        """(tokens, supervised) of one conversation, as its chat template writes it.

        The tokens are those of the whole rendered string. A token that a reply has any part of is the reply's.
        ValueError without a template, or where a reply is not found in what the template writes.
        """
        return self.encode_all([self.write(messages)])[0]

    def write(self, messages: Sequence[Message]) -> Written | Rendered:
        """A conversation for `encode_all`; ValueError as `render`. One with generation marks is rendered at once."""
        if not self.chats:
            raise ValueError(f"{self.folder} has no chat template: add one to its tokenizer_config.json")
        given = [{"role": message["role"], "content": message["content"]} for message in messages]
        learned = [is_learned(message) for message in messages if message["role"] == "assistant"]
        if GENERATION.search(self.template):
            rendered = self._apply(given, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
            mask = self._only(np.array(rendered["assistant_masks"], np.bool_), learned)
            return np.array(rendered["input_ids"], np.int32), mask
        text = self._apply(given, tokenize=False)
        return Written(text, [span for span, own in zip(self._spans(given, text), learned, strict=True) if own])

    def encode_all(self, documents: Sequence[Written | Rendered]) -> list[Rendered]:
        """What `render` gives, of many conversations, whose strings are encoded together, on all cores."""
        texts = [document.text for document in documents if isinstance(document, Written)]
        if not texts:
            return [document for document in documents if not isinstance(document, Written)]
        encoded = self.backend(texts, add_special_tokens=False, return_offsets_mapping=True)
        found = iter(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))
        return [
            learned_tokens(*next(found), document.spans) if isinstance(document, Written) else document
            for document in documents
        ]

    def _apply(self, messages: list[dict[str, Any]], **options: Any) -> Any:
        if self.dated and self.date:
            day = datetime.date.fromisoformat(self.date)
            options["chat_template"] = CLOCK.sub(lambda call: json.dumps(day.strftime(call[2])), self.template)
        try:
            return self.backend.apply_chat_template(messages, **options)
        except Exception as error:  # a template raises what it likes
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"the chat template of {self.folder} refuses a conversation ({reason}): mend it"
            ) from error

    def _only(self, mask: NDArray[np.bool_], learned: list[bool]) -> NDArray[np.bool_]:
        """The generation marks' mask without the replies that are not learned."""
        if all(learned):
            return mask
        number = np.diff(mask, prepend=False).cumsum() // 2  # of the reply a token is in, where it is in one
        if number[-1] + mask[-1] != len(learned):
            raise ValueError(
                f"the chat template of {self.folder} marks {number[-1] + mask[-1]} replies of {len(learned)}, so that "
                f"none can be left out: remove the weights of 0"
            )
        return mask & np.array([*learned, False])[number]

    def _spans(self, messages: list[dict[str, Any]], whole: str) -> list[tuple[int, int]]:
        """First and end character, in the rendered string, of what a model writes for each reply, end mark included.

        The conversation is rendered once more with words in the replies' places that occur nowhere else. What stands
        between these must stand between the replies too: with the replies put back, the string is the whole one.
        """
        replies = [message["content"] for message in messages if message["role"] == "assistant"]
        names = iter(words := [f"{PROBE}-{number}." for number in range(len(replies))])
        probed = self._apply(
            [m | {"content": next(names)} if m["role"] == "assistant" else m for m in messages], tokenize=False
        )
        if any(probed.count(word) != 1 for word in words):
            raise ValueError(self._without_spans)
        opening, lead, closing = self._around
        spans, place, rest = [], 0, probed
        for number, (word, reply) in enumerate(zip(words, replies, strict=True)):
            before, rest = rest.split(word)
            after = rest.split(words[number + 1])[0] if number + 1 < len(words) else rest
            start = place + len(before)
            forms = (reply, reply.strip(), reply.lstrip(), reply.rstrip())
            text = next((text for text in forms if whole.startswith(text + after, start)), None)
            if text is None or not whole.startswith(before, place):
                raise ValueError(
                    f"the chat template of {self.folder} does not show reply {number + 1} as it is: give a template "
                    f"with generation marks"
                )
            if opening and opening in before:
                lead = before[before.rindex(opening) + len(opening) :]
            place = start + len(text)
            ended = len(closing) if after.startswith(closing) else 0
            spans.append((start - (len(lead) if before.endswith(lead) else 0), place + ended))
        if whole[place:] != rest:
            raise ValueError(self._without_spans)
        return spans

    @property
    def _without_spans(self) -> str:
        return (
            f"the chat template of {self.folder} writes no assistant's span behind its prompt: give a template with "
            f"generation marks"
        )

    @cached_property
    def _around(self) -> tuple[str, str, str]:
        """What opens a reply where the template says so, what it writes behind the prompt of a lone reply, and what
        ends one."""
        question = [{"role": "user", "content": QUESTION}]
        prompt = self._apply(question, tokenize=False, add_generation_prompt=True)
        bare = self._apply(question, tokenize=False)
        answered = self._apply([*question, {"role": "assistant", "content": PROBE}], tokenize=False)
        at = answered.find(PROBE, len(prompt))
        if not answered.startswith(prompt) or at < 0:
            raise ValueError(self._without_spans)
        opening = prompt[len(bare) :] if prompt.startswith(bare) else ""
        return opening, answered[len(prompt) : at], answered[at + len(PROBE) :].rstrip()

    def save(self, folder: Path) -> None:
        """The files that `transformers` and `load_model` read."""
        self.backend.save_pretrained(folder)
