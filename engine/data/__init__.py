"""Corpora as arrays of rows: read (`sources`), understand (`chat`), pack (`packing`), order (`order`), and all of it
in turn (`corpus`)."""

from engine.data.chat import to_document
from engine.data.corpus import Corpus, Tokenizer, check_vocabulary, load_corpus
from engine.data.order import batch_order, permutation, rows_that_hold
from engine.data.packing import IGNORED, pack
from engine.data.sources import Source, hub_source, read_source

__all__ = [
    "IGNORED",
    "Corpus",
    "Source",
    "Tokenizer",
    "batch_order",
    "check_vocabulary",
    "hub_source",
    "load_corpus",
    "pack",
    "permutation",
    "read_source",
    "rows_that_hold",
    "to_document",
]
