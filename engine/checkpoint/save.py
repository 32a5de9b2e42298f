"""Checkpoints out: a folder that `transformers` reads where it has the network, and `load_model` always.

A network that `transformers` has no class for (of nanochat all but the plainest with exact rotary
tables) is written under our names, with our configuration in config.json.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save, save_file
from tokenizers import AddedToken, Tokenizer
from torch import Tensor

from engine.checkpoint.huggingface import CONFIG, WEIGHTS, fields_of, layout_of, read_json
from engine.checkpoint.model import FAMILIES, LoadedModel, ModelConfig, family_name, shapes_of
from engine.checkpoint.tensors import Source, join, read_safetensors, split
from engine.files import replace_file
from engine.models.llama import RotaryScaling
from engine.tokenizer import ByteTokenizer, SmolLM2Tokenizer

OURS = "fractal"


def save_model(
    folder: str | Path,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    tokenizer: Any = None,
    chat_template: str | None = None,
) -> None:
    """Writes config.json, model.safetensors and the tokenizer's files into a folder, made if it is missing.

    chat_template: Jinja text for a tokenizer that has none of its own (SmolLM2's). ValueError where
    the folder above is missing.
    """
    folder = Path(folder)
    check_above(folder)
    folder.mkdir(exist_ok=True)
    fields = fields_of(config)
    if fields is None:
        fields, tensors = our_fields(config), split(weights, {name: Source((name,)) for name in weights})
    else:
        tensors = split(weights, layout_of(config))
    dtypes = {tensor.dtype for tensor in tensors.values()}
    name = str(dtypes.pop() if len(dtypes) == 1 else torch.float32).removeprefix("torch.")
    fields = fields | {"dtype": name, "torch_dtype": name}
    if isinstance(tokenizer, ByteTokenizer):
        fields["tokenizer"] = tokenizer.name
    elif isinstance(tokenizer, SmolLM2Tokenizer):
        save_smollm2_tokenizer(folder, tokenizer, chat_template)
    elif tokenizer is not None:
        tokenizer.save(folder)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def our_fields(config: ModelConfig, tokenizer: Any = None) -> dict[str, Any]:
    """config.json of a network under our names; of tokenizers it says only that it is bytes."""
    named = {"tokenizer": tokenizer.name} if isinstance(tokenizer, ByteTokenizer) else {}
    return {"model_type": OURS, "family": family_name(config), "config": asdict(config)} | named


def load_ours(folder: Path, file: Path | None) -> LoadedModel:
    """What `save_model` or `save_safetensors` wrote under our names: a folder's, or a file's with its configuration in
    a .json of its name or config.json beside it.

    ValueError for a missing or foreign configuration, and for tensors that are missing, cut or foreign.
    """
    beside = file.with_suffix(".json") if file and file.with_suffix(".json").is_file() else folder / CONFIG
    fields = read_json(beside)
    if fields.get("model_type") != OURS or fields.get("family") not in FAMILIES:
        raise ValueError(f"{beside} is no configuration of this engine: give the file that was saved with the weights")
    given = dict(fields.get("config", {}))
    if given.get("rotary_scaling"):
        given["rotary_scaling"] = RotaryScaling(**given["rotary_scaling"])
    try:
        config = FAMILIES[fields["family"]].config(**given)
    except TypeError as error:
        raise ValueError(f"{beside} has other fields than this engine's ({error}): save the model again") from error
    shapes = shapes_of(config)
    source = file or folder / WEIGHTS
    if not source.is_file():
        raise ValueError(f"{source} does not exist: give a whole checkpoint")
    weights = join(read_safetensors(source), {name: Source((name,)) for name in shapes}, shapes, source)
    tokenizer = ByteTokenizer() if fields.get("tokenizer") == ByteTokenizer.name else None
    return LoadedModel(str(file or folder), config, weights, tokenizer)


def save_smollm2_tokenizer(folder: Path, tokenizer: SmolLM2Tokenizer, chat_template: str | None) -> None:
    """tokenizer.json with the marks of its conversations, and tokenizer_config.json with the template."""
    backend = Tokenizer.from_str(tokenizer.backend.to_str())
    marks = [backend.id_to_token(index) for index in (tokenizer.boundary, tokenizer.start, tokenizer.end)]
    backend.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    backend.save(str(folder / "tokenizer.json"))
    fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": marks[1],
        "eos_token": marks[2],
        "pad_token": marks[2],
        "unk_token": marks[0],
        "chat_template": chat_template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def save_safetensors(
    path: str | Path, weights: Mapping[str, Tensor], config: ModelConfig | None = None, tokenizer: Any = None
) -> None:
    """Writes {name: tensor} to a .safetensors file, and the configuration, if given, to a .json of its name.

    Each is written whole or not at all; ValueError as `check_destination`.
    """
    check_destination(path)
    replace_file(path, save({name: weight.contiguous().cpu() for name, weight in weights.items()}))
    if config is not None:
        replace_file(
            Path(path).with_suffix(".json"), json.dumps(our_fields(config, tokenizer), indent=2).encode() + b"\n"
        )


def names_file(path: str | Path) -> bool:
    """Whether weights saved to a path are one file: a .safetensors file, device or pipe; else they are a folder."""
    path = Path(path)
    return path.suffix == ".safetensors" or (path.exists() and not path.is_dir())


def check_destination(path: str | Path) -> None:
    """ValueError where weights cannot be saved: the folder above is missing, or the place is taken by something else.

    A device or pipe may have any name.
    """
    path = Path(path)
    check_above(Path(os.path.realpath(path)))
    other = path.suffix[1:].isalpha() and path.suffix != ".safetensors"
    if (other and not path.exists()) or (path.is_file() and path.suffix != ".safetensors"):
        raise ValueError(f"got {path}, expected a name that ends in .safetensors, or that of a new folder: rename it")
    if path.is_dir() and (names_file(path) or any(path.iterdir())):
        raise ValueError(f"{path} is a folder with something in it: give the name of a new one, or of a file to write")


def check_above(path: Path) -> None:
    """ValueError where the folder that is to hold a path is missing."""
    if not path.parent.is_dir():
        raise ValueError(f"folder {path.parent} does not exist, cannot write {path.name}: make it first")
