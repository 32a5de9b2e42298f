"""Which tokenizer lies in a folder."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from engine.checkpoint.hub_tokenizer import HubTokenizer
from engine.checkpoint.nanochat_tokenizer import MARKS, NanochatTokenizer

PICKLE = "tokenizer.pkl"
HUB_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def load_tokenizer(places: list[Path], required: bool) -> Any:
    """The tokenizer at the first place (folder or file) that has one, None if none has and it is not required.

    ValueError for files that hold no tokenizer.
    """
    for place in places:
        if place.is_file():
            place = place.parent if place.suffix == ".json" else place
        pickled = place if place.is_file() else place / PICKLE
        if pickled.is_file():
            return NanochatTokenizer.from_pickle(pickled)
        if not any((place / name).is_file() for name in HUB_FILES):
            continue
        file = place / "tokenizer.json"
        return NanochatTokenizer(Tokenizer.from_file(str(file))) if _is_nanochat(file) else HubTokenizer(place)
    if required:
        raise ValueError(f"{places[0]} holds no tokenizer, expected {PICKLE} or {HUB_FILES[0]}: give another folder")
    return None


def _is_nanochat(file: Path) -> bool:
    """Whether a tokenizer.json has exactly nanochat's marks."""
    if not file.is_file():
        return False
    try:
        added = json.loads(file.read_bytes())["added_tokens"]
        return {token["content"] for token in added} == set(MARKS)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no tokenizer of the library tokenizers ({error}): fetch it again") from error
