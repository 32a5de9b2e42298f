"""nanochat's checkpoints of every generation, against an independent plain-torch statement of each.

The reference below shares nothing with the engine: it works on nanochat's own tensor names, with
functions of torch, and takes each generation's constants from the table GENERATIONS.
"""

import json
import pickle
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.nn import functional

from engine.checkpoint import LoadedModel, load_model, save_model, save_nanochat
from engine.models import gpt
from engine.tokenizer import ByteTokenizer

WIDTH, HEADS, KV_HEADS, DEPTH, ROWS = 64, 4, 2, 5, 320
VOCABULARY = 300  # padded to 320


class Generation(NamedTuple):
    lambdas: bool = False
    gate: int = 0
    smear: bool = False
    base: float = 1e4
    cap: float = 15.0
    scale: float = 1.0
    window: int = ROWS
    gate_scale: float = 0.0
    rounded: bool = True
    pattern: str | None = "SSSL"


GENERATIONS = {
    "2025-10": Generation(pattern=None),
    "2026-01-11": Generation(lambdas=True, window=160),
    "2026-01-16": Generation(lambdas=True, gate=32, window=160, gate_scale=2.0),
    "2026-03-02": Generation(lambdas=True, gate=32, window=160, gate_scale=2.0, cap=20.0, rounded=False),
    # ceil(320 / 3 / 128) · 128 and ceil(320 / 4 / 128) · 128
    "2026-03-09": Generation(True, 12, False, 1e5, 15.0, 1.15, 128, 3.0, False),
    "2026-03-14": Generation(True, 12, True, 1e5, 15.0, 1.2, 128, 3.0, False),
    "2026-03-14-long": Generation(True, 12, True, 1e5, 15.0, 1.2, 128, 3.0, False, "L"),
}


def make_tensors(generation, seed=0, padded=320):
    """Random tensors under nanochat's names; the embeddings in bf16 as nanochat keeps them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, std=0.25):
        return std * torch.randn(shape, generator=generator)

    head_dim = WIDTH // HEADS
    tensors = {"transformer.wte.weight": normal(padded, WIDTH, std=1.0).bfloat16()}
    tensors["lm_head.weight"] = normal(padded, WIDTH)
    for index in range(DEPTH):
        layer = f"transformer.h.{index}"
        tensors[f"{layer}.attn.c_q.weight"] = normal(WIDTH, WIDTH)
        tensors[f"{layer}.attn.c_k.weight"] = normal(KV_HEADS * head_dim, WIDTH)
        tensors[f"{layer}.attn.c_v.weight"] = normal(KV_HEADS * head_dim, WIDTH)
        tensors[f"{layer}.attn.c_proj.weight"] = normal(WIDTH, WIDTH)
        tensors[f"{layer}.mlp.c_fc.weight"] = normal(4 * WIDTH, WIDTH, std=0.15)
        tensors[f"{layer}.mlp.c_proj.weight"] = normal(WIDTH, 4 * WIDTH, std=0.1)
        if generation.gate and index % 2 == (DEPTH - 1) % 2:
            tensors[f"{layer}.attn.ve_gate.weight"] = normal(KV_HEADS, generation.gate, std=0.5)
            tensors[f"value_embeds.{index}.weight"] = normal(padded, KV_HEADS * head_dim, std=1.0).bfloat16()
    if generation.lambdas:
        tensors["resid_lambdas"] = 1 + normal(DEPTH)
        tensors["x0_lambdas"] = normal(DEPTH)
    if generation.smear:
        tensors["smear_gate.weight"] = normal(1, 24)
        tensors["smear_lambda"] = normal(1, std=1.0)
        tensors["backout_lambda"] = normal(1, std=1.0)
    return tensors


def reference_logits(tensors, generation, ids):
    """What nanochat computes in fp32, head by head."""
    t = {name: tensor.float() for name, tensor in tensors.items()}
    head_dim, length = WIDTH // HEADS, ids.shape[1]
    frequency = 1.0 / generation.base ** (torch.arange(0, head_dim, 2).float() / head_dim)
    angle = torch.arange(length).float()[:, None] * frequency[None]
    cos, sin = angle.cos(), angle.sin()
    if generation.rounded:
        cos, sin = cos.to(torch.bfloat16).float(), sin.to(torch.bfloat16).float()

    def norm(x):
        return functional.rms_norm(x, (x.shape[-1],))

    def rotated(x):  # [B, T, K], by minus the angle
        first, second = x[..., : head_dim // 2], x[..., head_dim // 2 :]
        return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)

    x = norm(t["transformer.wte.weight"][ids])
    if generation.smear:
        gate = t["smear_lambda"] * torch.sigmoid(x[..., :24] @ t["smear_gate.weight"].T)
        before = torch.zeros_like(x)
        before[:, 1:] = x[:, :-1]
        x = x + gate * before
    start, middle = x, None
    for index in range(DEPTH):
        layer = f"transformer.h.{index}"
        if generation.lambdas:
            x = x * t["resid_lambdas"][index] + start * t["x0_lambdas"][index]
        letter = (generation.pattern or "L")[index % len(generation.pattern or "L")]
        reach = generation.window if letter == "S" and index < DEPTH - 1 else length
        h = norm(x)
        q, k, v = (h @ t[f"{layer}.attn.c_{letter}.weight"].T for letter in "qkv")
        if f"value_embeds.{index}.weight" in t:
            gate = torch.sigmoid(h[..., : generation.gate] @ t[f"{layer}.attn.ve_gate.weight"].T)
            values = t[f"value_embeds.{index}.weight"][ids]
            v = v + (generation.gate_scale * gate).repeat_interleave(head_dim, dim=-1) * values
        outputs = []
        for head in range(HEADS):
            group = head // (HEADS // KV_HEADS)
            mine, shared = (slice(n * head_dim, (n + 1) * head_dim) for n in (head, group))
            qh = norm(rotated(q[..., mine])) * generation.scale
            kh = norm(rotated(k[..., shared])) * generation.scale
            scores = qh @ kh.transpose(1, 2) / head_dim**0.5
            scores = (
                scores
                + torch.full_like(scores, -torch.inf).triu(1)
                + torch.full_like(scores, -torch.inf).tril(-reach - 1)
            )
            output = torch.softmax(scores, dim=-1) @ v[..., shared]
            outputs.append(output)
        x = x + torch.cat(outputs, dim=-1) @ t[f"{layer}.attn.c_proj.weight"].T
        x = x + functional.relu(norm(x) @ t[f"{layer}.mlp.c_fc.weight"].T).square() @ t[f"{layer}.mlp.c_proj.weight"].T
        if index == DEPTH // 2:
            middle = x
    if generation.smear:
        x = x - t["backout_lambda"] * middle
    logits = (norm(x) @ t["lm_head.weight"].T)[..., :VOCABULARY]
    return generation.cap * torch.tanh(logits / generation.cap)


def write(folder, tensors, generation, step=100, prefix=""):
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({prefix + name: tensor for name, tensor in tensors.items()}, folder / f"model_{step:06d}.pt")
    fields = {"sequence_len": ROWS, "vocab_size": VOCABULARY, "n_layer": DEPTH, "n_head": HEADS}
    fields |= {"n_kv_head": KV_HEADS, "n_embd": WIDTH}
    if generation.pattern:
        fields["window_pattern"] = generation.pattern
    (folder / f"meta_{step:06d}.json").write_text(json.dumps({"step": step, "model_config": fields}))
    return folder


def some_ids(length=ROWS):
    return torch.randint(VOCABULARY, (1, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", GENERATIONS)
def test_logits_of_every_generation_are_the_references(name, tmp_path):
    generation = GENERATIONS[name]
    tensors = make_tensors(generation)
    folder = write(tmp_path, tensors, generation, prefix="_orig_mod.")
    model = load_model(folder, softcap=20 if generation.cap == 20 else None)
    ids = some_ids()
    expected = reference_logits(tensors, generation, ids)
    logits = model.logits(ids)
    assert logits.shape == (1, ROWS, VOCABULARY)
    assert expected.std() > 0.5
    # fp32 sums in another order over five layers
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    # every piece of the generation carries a signal: without it the logits are far off
    for change in ({"base": 3e4}, {"rounded": not generation.rounded}, {"scale": 1.1}, {"window": 96}):
        if change.get("window") and "S" not in (generation.pattern or ""):
            continue
        other = reference_logits(tensors, generation._replace(**change), ids)
        assert (other - expected).abs().max() > 2e-3, change


def test_the_open_soft_cap_is_announced_in_one_line(tmp_path, capsys):
    generation = GENERATIONS["2026-01-16"]
    folder = write(tmp_path, make_tensors(generation), generation)
    assert load_model(folder).config.softcap == 15
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "soft cap 15" in said
    assert "20" in said
    assert "2026-03-02 … 03-09" in said
    assert load_model(folder, softcap=20).config.softcap == 20
    assert capsys.readouterr().err == ""


def test_the_highest_step_is_taken_and_a_file_names_another(tmp_path):
    generation = GENERATIONS["2025-10"]
    folder = tmp_path / "base_checkpoints" / "d5"
    late, early = make_tensors(generation, 2), make_tensors(generation, 1)
    write(folder, late, generation, step=1000)
    write(folder, early, generation, step=200)
    for path, tensors in ((folder, late), (tmp_path, late), (folder / "model_000200.pt", early)):
        weight = load_model(path).weights["layers.0.attention.output"]
        assert torch.equal(weight, tensors["transformer.h.0.attn.c_proj.weight"])
    write(tmp_path / "chatsft_checkpoints" / "d5", early, generation)
    with pytest.raises(ValueError, match=r"holds 2 checkpoints \(base_checkpoints/d5, chatsft_checkpoints/d5\): give"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", GENERATIONS)
def test_what_is_saved_is_loaded_again(name, tmp_path):
    generation = GENERATIONS[name]
    model = load_model(write(tmp_path / "theirs", make_tensors(generation), generation), softcap=generation.cap)
    save_model(tmp_path / "ours", model.config, model.weights)
    save_nanochat(tmp_path / "again", 7, model)
    for folder in ("ours", "again"):
        again = load_model(tmp_path / folder, softcap=generation.cap)
        assert again.config == model.config
        assert all(torch.equal(again.weights[n], w) for n, w in model.weights.items())


def test_the_first_d20_has_its_published_size():
    from engine.checkpoint.model import shapes_of
    from engine.checkpoint.nanochat import infer_config

    fields = {"sequence_len": 2048, "vocab_size": 65536, "n_layer": 20, "n_head": 10, "n_kv_head": 10, "n_embd": 1280}
    config = infer_config(fields, {}, "d20", None)
    assert sum(int(np.prod(shape)) for shape in shapes_of(config).values()) == 560_988_160


def spoilt(tensors, **changes):
    changed = {name.replace("__", "."): value for name, value in changes.items()}
    return {name: tensor for name, tensor in (tensors | changed).items() if tensor is not None}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("2025-10", {"lm_head__weight": None}, "lacks tensor lm_head.weight"),
        ("2025-10", {"engram": torch.ones(2)}, "holds tensor engram, which no network"),
        (
            "2025-10",
            {"lm_head__weight": torch.ones(700, WIDTH)},
            r"tensor lm_head.weight of shape \[700, 64\], expected \[300",
        ),
        ("2026-01-16", {"resid_lambdas": None}, "ve_gate.weight without resid_lambdas"),
        ("2026-03-14", {"smear_gate__weight": torch.ones(1, 32)}, r"tensor smear_gate.weight of shape \[1, 32\]"),
        (
            "2026-01-16",
            {"transformer__h__0__attn__ve_gate__weight": torch.ones(2, 16)},
            "is 16 wide, expected 12 or 32",
        ),
        (
            "2026-01-11",
            {"value_embeds__0__weight": torch.ones(320, 32)},
            "holds tensor value_embeds.0.weight, which no",
        ),
        ("2026-03-14", {"backout_lambda": None}, "lacks tensor backout_lambda"),
    ],
)
def test_a_checkpoint_that_cannot_be_placed_is_refused_with_the_tensor(tmp_path, name, changes, message):
    generation = GENERATIONS[name]
    folder = write(tmp_path, spoilt(make_tensors(generation), **changes), generation)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


class Hostile:
    """Unpickled as it stands it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_hostile_or_cut_pt_file_runs_nothing(tmp_path):
    generation = GENERATIONS["2025-10"]
    folder = write(tmp_path / "model", make_tensors(generation), generation)
    file = folder / "model_000100.pt"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model_000100\.pt is cut, or holds more than tensors"):
        load_model(folder)
    torch.save({"lm_head.weight": Hostile(tmp_path / "made")}, file)
    with pytest.raises(ValueError, match=r"model_000100\.pt is cut, or holds more than tensors"):
        load_model(folder)
    file.write_bytes(pickle.dumps(Hostile(tmp_path / "made")))
    with pytest.raises(ValueError, match=r"model_000100\.pt is cut, or holds more than tensors"):
        load_model(folder)
    assert not (tmp_path / "made").exists()
    torch.save([torch.ones(3)], file)
    with pytest.raises(ValueError, match="is no table of tensors by name"):
        load_model(folder)


def test_a_meta_file_without_its_shape_is_refused(tmp_path):
    generation = GENERATIONS["2025-10"]
    folder = write(tmp_path, make_tensors(generation), generation)
    (folder / "meta_000100.json").write_text('{"model_config": {"n_layer": 5}}')
    with pytest.raises(ValueError, match="lacks sequence_len in model_config"):
        load_model(folder)
    (folder / "meta_000100.json").unlink()
    with pytest.raises(ValueError, match=r"meta_000100\.json does not exist"):
        load_model(folder)


def test_a_network_of_the_engine_is_saved_for_transformers_and_loaded_with_its_bytes(tmp_path):
    """The engine turns pairs the other way than nanochat, so the halves of q and k are swapped in the file."""
    transformers = pytest.importorskip("transformers", reason="package transformers, the reference, is not installed")
    config = gpt.GPTConfig(depth=2, width=32, heads=4, kv_heads=2, context=24, vocabulary=320)
    weights = {n: w + 0.2 * torch.randn(w.shape) for n, w in gpt.initial_weights(config, 0).items()}
    model = LoadedModel("engine", config, weights, ByteTokenizer())
    save_model(tmp_path, config, weights, ByteTokenizer())
    ids = some_ids(24)
    again = load_model(tmp_path)
    network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(network(ids).logits, model.logits(ids), rtol=0, atol=1e-4)
    torch.testing.assert_close(again.logits(ids), model.logits(ids), rtol=0, atol=1e-4)
    assert isinstance(again.tokenizer, ByteTokenizer)


def test_bytes_are_saved_as_a_tokenizer_of_nanochat(tmp_path):
    tiktoken = pytest.importorskip("tiktoken", reason="package tiktoken, the reference, is not installed")
    generation = GENERATIONS["2025-10"]
    model = load_model(write(tmp_path / "theirs", make_tensors(generation), generation))
    save_nanochat(tmp_path / "ours", 1, replace(model, tokenizer_found=ByteTokenizer()))
    with (tmp_path / "ours" / "tokenizer" / "tokenizer.pkl").open("rb") as file:
        encoding = pickle.load(file)
    assert isinstance(encoding, tiktoken.Encoding)
    assert encoding.encode_ordinary("a\n é") == ByteTokenizer().encode("a\n é")
    lengths = torch.load(tmp_path / "ours" / "tokenizer" / "token_bytes.pt")
    assert lengths.tolist() == [1] * 256 + [0] * 9
    messages = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat <|bos|>"}]
    (ids, mask), (expected, expected_mask) = (
        tokenizer.render(messages) for tokenizer in (load_model(tmp_path / "ours").tokenizer, ByteTokenizer())
    )
    assert ids.tolist() == expected.tolist()
    assert mask.tolist() == expected_mask.tolist()


def test_what_nanochat_has_not_is_not_saved_as_its(tmp_path):
    generation = GENERATIONS["2026-03-14"]
    model = load_model(write(tmp_path, make_tensors(generation), generation))
    with pytest.raises(
        ValueError, match=r"nanochat's network of these tensors has qk_scale 1\.2, got 1\.3: use save_model"
    ):
        save_nanochat(tmp_path / "other", 1, replace(model, config=replace(model.config, qk_scale=1.3)))
