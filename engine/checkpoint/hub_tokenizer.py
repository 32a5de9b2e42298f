"""Any tokenizer and chat template of a Hugging Face folder, through `transformers` (extra `hf`).

The mask is that of the template's generation marks where it has them. Where it has none, it covers
the assistant's spans: what the template writes behind the prompt for a reply, up to the mark that ends
it. Every span is looked for in the whole rendered string, and a template that hides, moves or rewrites
a reply is refused, since a wrong mask would train on the wrong text.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from engine.tokenizer import Rendered

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
PROBE = "fractal-probe-reply"


class HubTokenizer:
    """A tokenizer of `transformers`, with the methods of `engine.tokenizer`'s classes."""

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
        described = self.backend.backend_tokenizer.to_str() + str(self.template)
        self.name = f"hf-{hashlib.sha256(described.encode()).hexdigest()[:16]}"
        self.vocabulary = max(self.backend.get_vocab().values()) + 1
        eos, pad = self.backend.eos_token_id, self.backend.pad_token_id
        self.boundary = [] if eos is None else [eos]
        self.padding = pad if pad is not None else eos if eos is not None else 0

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False)

    def decode(self, tokens: Sequence[int]) -> str:
        """Marks are written out."""
        return self.backend.decode(list(map(int, tokens)), skip_special_tokens=False)

    def document(self, text: str) -> Rendered:
        """The tokens and the end-of-text mark, where there is one; all are learned."""
        tokens = np.array([*self.encode(text), *self.boundary], dtype=np.int32)
        return tokens, np.ones(len(tokens), dtype=np.bool_)

    def render(self, messages: Sequence[Mapping[str, Any]]) -> Rendered:
        """(tokens, supervised) of one conversation, as its chat template writes it.

        ValueError without a template, or where a reply is not found in what the template writes.
        """
        if not isinstance(self.template, str):
            raise ValueError(f"{self.folder} has no chat template: add one to its tokenizer_config.json")
        given = [dict(message) for message in messages]
        if GENERATION.search(self.template):
            rendered = self.backend.apply_chat_template(
                given, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            return np.array(rendered["input_ids"], np.int32), np.array(rendered["assistant_masks"], np.bool_)
        whole = self._text(given)
        spans = [self._span(given, index, whole) for index, m in enumerate(given) if m["role"] == "assistant"]
        encoded = self.backend(whole, add_special_tokens=False, return_offsets_mapping=True)
        starts = np.array([start for start, _ in encoded["offset_mapping"]], dtype=np.int64)
        supervised = np.zeros(len(starts), np.bool_)
        for begin, end in spans:
            supervised |= (starts >= begin) & (starts < end)
        return np.array(encoded["input_ids"], np.int32), supervised

    def _text(self, messages: list[dict[str, Any]], prompt: bool = False) -> str:
        try:
            return self.backend.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        except Exception as error:  # a template raises what it likes
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"the chat template of {self.folder} refuses a conversation ({reason}): mend it"
            ) from error

    def _span(self, messages: list[dict[str, Any]], index: int, whole: str) -> tuple[int, int]:
        """First and end character of what a model writes for the reply at `index`, with the mark that ends it."""
        content = messages[index]["content"]
        before = self._text(messages[:index], prompt=True)
        lead, end = self._around(messages[:index])
        if whole.startswith(before):
            for text in (content, content.strip()):
                for opening in (lead, ""):
                    if whole.startswith(opening + text + end, len(before)):
                        return len(before), len(before) + len(opening + text + end)
        raise ValueError(
            f"the chat template of {self.folder} does not show reply {index} where its prompt ends: give a template "
            f"with generation marks"
        )

    def _around(self, before: list[dict[str, Any]]) -> tuple[str, str]:
        """What the template writes before a last reply, behind its prompt, and behind the reply to end it."""
        prompt = self._text(before, prompt=True)
        probed = self._text([*before, {"role": "assistant", "content": PROBE}])
        at = probed.find(PROBE, len(prompt))
        if not probed.startswith(prompt) or at < 0:
            raise ValueError(
                f"the chat template of {self.folder} writes no assistant's span behind its prompt: give a template "
                f"with generation marks"
            )
        return probed[len(prompt) : at], probed[at + len(PROBE) :].rstrip()

    def save(self, folder: Path) -> None:
        """The files that `transformers` and `load_model` read."""
        self.backend.save_pretrained(folder)
