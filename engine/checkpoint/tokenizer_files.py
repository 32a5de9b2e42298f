"""Which tokenizer lies in a folder."""

import json
from pathlib import Path
from typing import Any

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
        fields = _nanochat_fields(file)
        return NanochatTokenizer.from_json(fields) if fields else HubTokenizer(place)
    if required:
        raise ValueError(f"{places[0]} holds no tokenizer, expected {PICKLE} or {HUB_FILES[0]}: give another folder")
    return None


def _nanochat_fields(file: Path) -> dict[str, Any] | None:
    """What a tokenizer.json holds where its marks are nanochat's, else None."""
    if not file.is_file():
        return None
    try:
        fields = json.loads(file.read_bytes())
        return fields if {token["content"] for token in fields["added_tokens"]} == set(MARKS) else None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no tokenizer of the library tokenizers ({error}): fetch it again") from error
