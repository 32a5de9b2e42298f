"""The internals that small cases outside this project call, by the names they know."""

from engine.checkpoint import read_gguf, smollm2_file
from engine.data import hub_source, load_corpus, read_source, to_document
from engine.schedule import multiplier as factor
from engine.tokenizer import ByteTokenizer, SmolLM2Tokenizer

__all__ = [
    "ByteTokenizer",
    "SmolLM2Tokenizer",
    "factor",
    "hub_source",
    "load_corpus",
    "read_gguf",
    "read_source",
    "smollm2_file",
    "to_document",
]
