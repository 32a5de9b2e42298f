"""nanochat's checkpoints: model_NNNNNN.pt with meta_NNNNNN.json (github.com/karpathy/nanochat).

The meta file states shape and window pattern; which generation of the network the weights are of
is told by the tensors there are:

    tensors                      rotary base  cap  q, k scale  S window      value gate
    none of the others           1e4, bf16    15   1           whole row     -
    resid_lambdas, x0_lambdas    1e4, bf16    15   1           T / 2         -
    ve_gate, 32 wide             1e4, bf16    15   1           T / 2         2 sigmoid
    ve_gate, 32 wide             1e4          20   1           T / 2         2 sigmoid
    ve_gate, 12 wide             1e5          15   1.15        T / 3 up 128  3 sigmoid
    ve_gate, smear_gate          1e5          15   1.2         T / 4 up 128  3 sigmoid

The third and the fourth cannot be told apart: 2026-01-16 … 03-02 and 03-02 … 03-09. `bf16` says that
cosines and sines are rounded to it, as they were before March 2026.
"""

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.checkpoint.huggingface import read_json
from engine.checkpoint.model import LoadedModel, shapes_of
from engine.checkpoint.nanochat_tokenizer import NanochatTokenizer
from engine.checkpoint.tensors import Layout, Source, Stored, in_memory, join, split
from engine.models.gpt import SMEAR_CHANNELS, GPTConfig
from engine.tokenizer import ByteTokenizer

COMPILED = "_orig_mod."
TILE = 128
TORCH_EPS = torch.finfo(torch.float32).eps  # of torch's rms_norm where none is given
WEEK_OF_20 = "2026-03-02 … 03-09"


def checkpoint_folder(path: Path) -> Path:
    """The one folder with a model_NNNNNN.pt at or below a path; ValueError where there is none or are several."""
    if any(path.glob("model_*.pt")):
        return path
    found = sorted({file.parent for pattern in ("*/model_*.pt", "*/*/model_*.pt") for file in path.glob(pattern)})
    if not found:
        raise ValueError(f"{path} holds neither config.json nor model_NNNNNN.pt: give the folder of a checkpoint")
    if len(found) > 1:
        places = ", ".join(str(folder.relative_to(path)) for folder in found)
        raise ValueError(f"{path} holds {len(found)} checkpoints ({places}): give the folder of one")
    return found[0]


def load_nanochat(folder: Path, file: Path | None, softcap: float | None) -> LoadedModel:
    """The model of a nanochat folder: of `file`, or of the highest step.

    Says on the standard error which soft cap it takes where the file leaves it open. ValueError for a
    file that is cut, or tensors that no generation has.
    """
    if file is None:
        steps = {int(m[1]): f for f in folder.glob("model_*.pt") if (m := re.fullmatch(r"model_(\d+)\.pt", f.name))}
        if not steps:
            raise ValueError(f"{folder} holds no model_NNNNNN.pt: give the folder of a checkpoint")
        file = steps[max(steps)]
    meta = file.with_name(file.name.replace("model_", "meta_")).with_suffix(".json")
    fields = read_json(meta).get("model_config")
    if not isinstance(fields, dict):
        raise ValueError(f"{meta} has no model_config: give a whole checkpoint")
    stored = in_memory(read_pt(file))
    config = infer_config(fields, stored, file, softcap)
    weights = join(stored, layout_of(config), shapes_of(config), file)
    return LoadedModel(str(folder), config, weights)


def read_pt(file: Path) -> dict[str, Tensor]:
    """Tensors by name, mapped from the file, without a compiled module's prefix; nothing else is read."""
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, torch.serialization.pickle.UnpicklingError) as error:
        reason = str(error).split("\n")[0][:200]
        raise ValueError(f"{file} is cut, or holds more than tensors ({reason}): fetch it again") from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ValueError(f"{file} is no table of tensors by name: give a model_NNNNNN.pt")
    return {name.removeprefix(COMPILED): tensor for name, tensor in tensors.items()}


def infer_config(fields: dict[str, Any], stored: dict[str, Stored], file: Path, softcap: float | None) -> GPTConfig:
    """The configuration of the generation that has these tensors; ValueError naming one that none has."""
    names = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
    missing = [name for name in names if not isinstance(fields.get(name), int)]
    if missing:
        raise ValueError(f"the meta file of {file} lacks {missing[0]} in model_config: give a whole checkpoint")
    context = fields["sequence_len"]
    lambdas = "resid_lambdas" in stored
    smear = "smear_gate.weight" in stored
    gate = next((name for name in sorted(stored) if name.endswith(".attn.ve_gate.weight")), None)
    gate_width = stored[gate].shape[-1] if gate else 0

    def refuse(name: str, reason: str) -> ValueError:
        return ValueError(f"{file} is of no generation of nanochat that this engine has: tensor {name} {reason}")

    if gate and not lambdas:
        raise refuse(gate, "without resid_lambdas")
    if gate and gate_width not in (12, 32):
        raise refuse(gate, f"is {gate_width} wide, expected 12 or 32")
    if smear and (gate_width != 12 or stored["smear_gate.weight"].shape != (1, SMEAR_CHANNELS)):
        raise refuse(
            "smear_gate.weight", f"of shape {list(stored['smear_gate.weight'].shape)} beside a gate of {gate_width}"
        )
    left_open = gate_width == 32
    if left_open and softcap not in (None, 15, 20):
        raise ValueError(
            f"got softcap {softcap:g}, but nanochat had 15 or 20 with the tensors of {file}: give one of them"
        )
    if left_open and softcap is None:
        print(
            f"{file}: soft cap 15 taken; nanochat's of {WEEK_OF_20} has the same tensors and 20: give softcap 20 then",
            file=sys.stderr,
        )
    new = gate_width == 12
    divisor = 4 if smear else 3
    if new:
        short = -(-context // (divisor * TILE)) * TILE
    else:
        short = context // 2 if lambdas else context
    return GPTConfig(
        depth=fields["n_layer"],
        width=fields["n_embd"],
        heads=fields["n_head"],
        kv_heads=fields["n_kv_head"],
        context=context,
        vocabulary=fields["vocab_size"],
        softcap=20.0 if left_open and softcap == 20 else 15.0,
        norm_eps=TORCH_EPS,
        rotary_base=100_000.0 if new else 10_000.0,
        rotary_reversed=True,
        rotary_rounded=not new and not (left_open and softcap == 20),
        qk_scale=(1.2 if smear else 1.15) if new else 1.0,
        window_pattern=(fields.get("window_pattern") or "L").upper(),
        short_window=short,
        lambdas=lambdas,
        value_gate=gate_width,
        value_gate_scale=3.0 if new else 2.0,
        smear=smear,
    )


def layout_of(config: GPTConfig) -> Layout:
    """Which of nanochat's tensors our parameters are."""
    layout = {
        "embedding.weight": Source(("transformer.wte.weight",), padded=True),
        "unembedding.weight": Source(("lm_head.weight",), padded=True),
    }
    rows = (config.heads * config.head_dim, config.kv_heads * config.head_dim, config.kv_heads * config.head_dim)
    for index in range(config.depth):
        ours, theirs = f"layers.{index}", f"transformer.h.{index}"
        layout[f"{ours}.attention.qkv"] = Source(tuple(f"{theirs}.attn.c_{letter}.weight" for letter in "qkv"), rows)
        layout[f"{ours}.attention.output"] = Source((f"{theirs}.attn.c_proj.weight",))
        layout[f"{ours}.mlp.up"] = Source((f"{theirs}.mlp.c_fc.weight",))
        layout[f"{ours}.mlp.down"] = Source((f"{theirs}.mlp.c_proj.weight",))
        if config.has_values(index):
            layout[f"{ours}.attention.value_gate"] = Source((f"{theirs}.attn.ve_gate.weight",))
            layout[f"value_embeddings.{index}.weight"] = Source((f"value_embeds.{index}.weight",), padded=True)
    if config.lambdas:
        layout["residual_lambdas"] = Source(("resid_lambdas",))
        layout["x0_lambdas"] = Source(("x0_lambdas",))
    if config.smear:
        layout["smear_gate"] = Source(("smear_gate.weight",))
        layout["smear_lambda"] = Source(("smear_lambda",))
        layout["backout_lambda"] = Source(("backout_lambda",))
    return layout


def save_nanochat(folder: str | Path, step: int, model: LoadedModel) -> None:
    """Writes model_NNNNNN.pt, meta_NNNNNN.json and tokenizer/ as nanochat does, into a folder, made if it is missing.

    ValueError for a network that nanochat does not have: the written files are those of the generation
    that `infer_config` finds in them.
    """
    config = model.config
    if not isinstance(config, GPTConfig):
        raise ValueError(f"{model.path} is no network of nanochat, cannot save it so: use save_model")
    tensors = split(model.weights, layout_of(config))
    fields = {
        "sequence_len": config.context,
        "vocab_size": config.vocabulary,
        "n_layer": config.depth,
        "n_head": config.heads,
        "n_kv_head": config.kv_heads,
        "n_embd": config.width,
        "window_pattern": config.window_pattern,
    }
    file = Path(folder) / f"model_{step:06d}.pt"
    found = infer_config(fields, in_memory(tensors), file, config.softcap)
    if found != config:
        other = next(f.name for f in dataclasses.fields(config) if getattr(found, f.name) != getattr(config, f.name))
        raise ValueError(
            f"nanochat's network of these tensors has {other} {getattr(found, other)}, got {getattr(config, other)}: "
            f"use save_model"
        )
    file.parent.mkdir(exist_ok=True)
    torch.save(tensors, file)
    meta = {"step": step, "model_config": fields}
    tokenizer = model.tokenizer_found
    tokenizer = NanochatTokenizer.of_bytes() if isinstance(tokenizer, ByteTokenizer) else tokenizer
    if isinstance(tokenizer, NanochatTokenizer):
        (file.parent / "tokenizer").mkdir(exist_ok=True)
        tokenizer.save_pickle(file.parent / "tokenizer")
    file.with_name(f"meta_{step:06d}.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
