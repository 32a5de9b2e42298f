"""Checkpoints as a sweep takes them: every format is trained, resumed, replayed, saved and loaded back.

The checkpoints are small random ones, written by transformers, in nanochat's own layout, or by this engine.
"""

import datetime
import re

import numpy as np
import pytest
import test_huggingface as hub
import test_nanochat as nanochat
import torch
from safetensors.torch import load_file, save_file
from tiny import forget, write_chat
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from engine import checkpoint, language
from engine import sweep as train
from engine.api import prepare_stored
from engine.checkpoint import load_model, save_safetensors
from engine.checkpoint.nanochat_tokenizer import NanochatTokenizer
from engine.models import gpt
from engine.options import read_arguments
from engine.replay import compare, replay_cell, save_weights
from engine.store import open_store
from engine.sweep import main as sweep_main
from engine.tokenizer import ByteTokenizer

transformers = hub.transformers
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save_tokenizer(folder, letters="abcdefghijklmnopqrstuvwxyz"):
    """A tokenizer of letters with a chat template, as transformers saves it."""
    backend = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate([*letters, "Ġ"])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    marks = ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
    backend.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def write_hub(folder, name):
    hub.make(name).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def write_nanochat(folder, name):
    generation = nanochat.GENERATIONS[name]
    nanochat.write(folder, nanochat.make_tensors(generation), generation)
    (folder / "tokenizer").mkdir()
    NanochatTokenizer.of_bytes().save_pickle(folder / "tokenizer")
    return folder


def write_ours(folder):
    config = gpt.GPTConfig(depth=2, width=32, heads=2, kv_heads=1, context=24, vocabulary=320)
    folder.mkdir()
    save_safetensors(folder / "w.safetensors", gpt.initial_weights(config, 0), config, ByteTokenizer())
    return folder / "w.safetensors"


FORMATS = {
    "qwen2": lambda folder: write_hub(folder, "qwen2"),
    "gpt2": lambda folder: write_hub(folder, "gpt2"),
    "nanochat of 2026-01-11": lambda folder: write_nanochat(folder, "2026-01-11"),
    "nanochat of 2026-03-14": lambda folder: write_nanochat(folder, "2026-03-14"),
    "ours": write_ours,
}


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    data = write_chat(tmp_path_factory.mktemp("data") / "chat.jsonl")
    return {
        "data": str(data),
        "context": 8,
        "batch": 2,
        "data_rows": 24,
        "validation_rows": 4,
        "device": "cpu",
        "y": "lr:log:1e-4:1e-1:2",
        "x": "tokens:linear:32:96:2",
    }


@pytest.mark.parametrize("kind", FORMATS)
def test_a_checkpoint_is_swept_resumed_replayed_saved_and_loaded_back(tmp_path, flags, kind):
    path = FORMATS[kind](tmp_path / "model")
    swept = train(store=str(tmp_path / "s"), model=str(path), **flags)
    assert np.isfinite(swept["val_loss"].values).all()
    model, store = load_model(path), open_store(tmp_path / "s")
    assert store.attributes["inputs"]["model"] == model.digest
    forget(store.path, 1)
    again = train(store=str(tmp_path / "s"), model=str(path), **flags)
    assert again["weights_digest"].values.tolist() == swept["weights_digest"].values.tolist()
    replay = replay_cell(store, 1, 1, "cpu")
    assert compare(store, 1, 1, replay) == ""
    save_weights(str(tmp_path / "cell"), replay)
    loaded = load_model(tmp_path / "cell", softcap=getattr(model.config, "softcap", None))
    assert (loaded.config.context, loaded.config.depth) == (model.config.context, model.config.depth)
    ids, mask = loaded.tokenizer.render(
        [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    )
    assert loaded.tokenizer.decode(ids[mask]).startswith("sat")
    ids = torch.from_numpy(ids).long()[None]
    moved = (loaded.logits(ids) - model.logits(ids)).abs().max()
    assert moved > 1e-3
    save_weights(str(tmp_path / "cell.safetensors"), replay)
    # a rotation by minus the angle, as transformers has it, rounds otherwise
    again_logits = load_model(tmp_path / "cell.safetensors").logits(ids)
    torch.testing.assert_close(again_logits, loaded.logits(ids), rtol=0, atol=1e-4)
    if kind in hub.NETWORKS:
        network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "cell")
        torch.testing.assert_close(hub.logits_of(network, ids), loaded.logits(ids), **hub.CLOSE)


def test_a_sweep_starts_from_the_checkpoints_own_loss(tmp_path, flags):
    path = write_hub(tmp_path / "model", "qwen3")
    swept = train(store=str(tmp_path / "s"), model=str(path), **flags)
    setup = prepare_stored(open_store(tmp_path / "s"), "cpu")
    network = transformers.AutoModelForCausalLM.from_pretrained(path)
    tokens, targets = (
        torch.from_numpy(a).long() for a in (setup.corpus.validation_tokens, setup.corpus.validation_targets)
    )
    logits_BTV = hub.logits_of(network, tokens)
    expected = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), targets.flatten(), ignore_index=-100)
    # fp32 sums in another order
    np.testing.assert_allclose(swept["val_first"].values, expected.item(), rtol=1e-4)


def test_a_store_goes_on_with_no_other_checkpoint_but_with_the_same_at_another_place(tmp_path, flags):
    path = write_hub(tmp_path / "model", "tinyllama")
    train(store=str(tmp_path / "s"), model=str(path), **flags)
    path.rename(tmp_path / "moved")
    train(store=str(tmp_path / "s"), model=str(tmp_path / "moved"), **flags)
    with pytest.raises(ValueError, match="model does not exist: give a folder"):
        replay_cell(open_store(tmp_path / "s"), 0, 0, "cpu")
    (tmp_path / "moved").rename(path)
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"][3] += 1e-3
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="holds a sweep with model of other content"):
        train(store=str(tmp_path / "s"), model=str(path), **flags)
    with pytest.raises(ValueError, match="holds a sweep with model of other content"):
        replay_cell(open_store(tmp_path / "s"), 0, 0, "cpu")


def test_a_store_goes_on_another_day_where_the_chat_template_prints_the_date(tmp_path, flags, monkeypatch):
    class Another(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime(2031, 5, 6, tzinfo=tz)

    path = write_hub(tmp_path / "model", "tinyllama")
    template = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    set_template(path, template + "{{ date_string | lower }}" + TEMPLATE)
    train(store=str(tmp_path / "s"), model=str(path), **flags)
    first = open_store(tmp_path / "s")
    assert first.config.training.date == datetime.datetime.now(datetime.UTC).date().isoformat()
    forget(first.path, 1)
    monkeypatch.setattr(language, "datetime", Another)
    again = train(store=str(tmp_path / "s"), model=str(path), **flags)
    assert (again["status"].values == 1).all()
    assert compare(first, 1, 1, replay_cell(open_store(tmp_path / "s"), 1, 1, "cpu")) == ""
    train(store=str(tmp_path / "t"), model=str(path), **flags)
    assert open_store(tmp_path / "t").config.training.date == "2031-05-06"
    with pytest.raises(ValueError, match="holds a sweep with date='2031-05-06', got '2030-01-01'"):
        train(store=str(tmp_path / "t"), model=str(path), **flags, date="2030-01-01")
    with pytest.raises(ValueError, match="date is '6 May'; expected a day as YYYY-MM-DD"):
        train(store=str(tmp_path / "u"), model=str(path), **flags, date="6 May")
    set_template(path, TEMPLATE)
    with pytest.raises(ValueError, match="date is 2030-01-01, but no data of this network print it"):
        train(store=str(tmp_path / "u"), model=str(path), **flags, date="2030-01-01")


def set_template(path, template):
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(path)


def test_groups_of_later_nanochats_are_swept_and_refused_where_there_are_none(tmp_path, flags):
    path = write_nanochat(tmp_path / "model", "2026-03-14")
    axes = {"y": "lr.value_embeddings:log:1e-3:1e-1:2", "x": "lr.smear:log:1e-3:1e-1:2"}
    fixed = {"tokens": 64, "lr.x0_lambdas": 0.0, "lr": 0.0}
    swept = train(store=str(tmp_path / "s"), model=str(path), **{**flags, **axes, **fixed})
    assert len(np.unique(swept["weights_digest"].values)) == 4
    before, after = load_model(path).weights, replay_cell(open_store(tmp_path / "s"), 0, 0, "cpu").weights
    moved = {name for name, weight in after.items() if not torch.equal(weight, before[name].float())}
    trained = {name for name in after if name.startswith(("value_embeddings", "smear", "backout"))}
    assert moved == trained
    other = write_hub(tmp_path / "llama", "tinyllama")
    for changed in ({"y": "lr.smear:log:1e-3:1e-1:2"}, {"lr.value_embeddings": 0.1}):
        with pytest.raises(ValueError, match=r"changes nothing: no trained tensor of .*llama.* takes it"):
            train(store=str(tmp_path / "t"), model=str(other), **{**flags, **changed})
    own = {f"lr.{group}": 0.1 for group in ("attention", "mlp", "embedding", "unembedding")}
    with pytest.raises(ValueError, match="lr changes nothing: no trained tensor"):
        train(store=str(tmp_path / "t"), model=str(other), **{**flags, **own})
    assert not (tmp_path / "t").exists()


def no_tokenizer(path):
    for file in path.glob("token*"):
        file.unlink()


def not_finite(path):
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "more", "says"),
    [
        (no_tokenizer, [], "has no tokenizer: put its files into the folder, or give --tokenizer"),
        (lambda path: save_tokenizer(path, map(chr, range(200, 300))), [], "a tokenizer of 104 ids .* of 96, expected"),
        (not_finite, [], "holds final_norm with values that are not finite"),
        (lambda path: None, ["--softcap", "20"], "got softcap 20, but .* has no soft cap: leave it out"),
        (lambda path: None, ["--context", "65", "--x", "tokens:linear:1e3:2e3:2"], "context 65 .* than the model's 64"),
        (lambda path: None, ["--network", "gpt"], "--model is for pretrained, not 'gpt'"),
        (lambda path: None, ["--network", "smollm2"], "but the network is 'smollm2'; leave out one"),
        (lambda path: None, ["--depth", "2"], "--depth is for gpt.*, not 'pretrained'"),
        (lambda path: (path / "config.json").unlink(), [], "holds neither config.json nor model_NNNNNN.pt"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_cannot_be_trained_is_one_line_before_a_store_is_made(
    tmp_path, flags, capsys, spoil, more, says
):
    path = write_hub(tmp_path / "model", "tinyllama")
    spoil(path)
    words = [word for name, value in flags.items() if f"--{name}" not in more for word in (f"--{name}", str(value))]
    with pytest.raises(SystemExit) as end:
        sweep_main([*words, "--model", str(path), "--store", str(tmp_path / "s"), "--nofigures", *more])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
    assert re.search(says, said), said
    assert not (tmp_path / "s").exists()


def test_a_model_too_large_for_the_device_is_refused_by_arithmetic(tmp_path, flags, monkeypatch):
    path = write_hub(tmp_path / "model", "tinyllama")
    monkeypatch.setattr(language, "memory_budget", lambda device: 2**17)
    monkeypatch.setattr(
        checkpoint.model.LoadedModel, "digest", property(lambda model: pytest.fail("weights were read"))
    )
    with pytest.raises(ValueError, match=r"one replica needs .* GiB, the device offers"):
        train(store=str(tmp_path / "s"), model=str(path), **flags)
    assert not (tmp_path / "s").exists()


def test_nanochats_recipe_takes_the_width_and_the_groups_of_the_checkpoint(tmp_path, flags):
    path = write_nanochat(tmp_path / "late", "2026-03-14")
    words = ["--preset", "nanochat-sft", "--data", flags["data"], "--context", "8", "--batch", "2", "--tokens", "64"]
    words += ["--y", "lr.matrix:log:1e-3:1e-1:2", "--x", "lr.unembedding:log:1e-3:1e-1:2", "--validation-rows", "4"]
    config, _ = read_arguments("", [*words, "--model", str(path)])
    narrower = (64 / 768) ** -0.5
    rates = {name: config.value(f"lr.{name}") for name in ("embedding", "value_embeddings", "x0_lambdas", "smear")}
    assert rates == pytest.approx(
        {n: 0.8 * narrower * rate for n, rate in zip(rates, (0.2, 0.1, 0.5, 0.2), strict=True)}
    )
    assert config.value("beta2.unembedding") == 0.96 and config.value("eps.smear") == 1e-10
    assert config.training.optimizer == "adamw,matrix=normuon" and config.value("decay") == 0.5
    assert "lr.unembedding" not in config.hyper and "lr.matrix" not in config.hyper
    sweep_main([*words, "--model", str(path), "--device", "cpu", "--store", str(tmp_path / "s"), "--nofigures"])
    assert np.isfinite(open_store(tmp_path / "s").read("val_loss")).all()
    early = write_nanochat(tmp_path / "early", "2025-10")
    config, _ = read_arguments("", [*words, "--model", str(early)])
    assert not [name for name in config.hyper if name.endswith(("smear", "value_embeddings", "lambdas"))]
    config, _ = read_arguments("", ["--preset", "fractal-sft", "--model", str(early)])
    assert (config.training.freeze, config.training.schedule, config.value("warmup")) == ("embedding", "cosine", 0.06)
    assert (config.training.context, config.value("tokens"), config.value("weight_decay")) == (1024, 250_000, 0.1)


RECIPE = ["--preset", "nanochat-sft", "--context", "8", "--batch", "2", "--tokens", "64", "--validation-rows", "4"]
RECIPE += ["--device", "cpu", "--nofigures", "--data-rows", "24"]


@pytest.mark.parametrize(
    ("kind", "column", "vectors"),
    [("tinyllama", "unembedding", 7), ("qwen2", "embedding", 10), ("gpt2", "embedding", 26)],
)
def test_nanochats_recipe_trains_norms_and_biases_of_other_families_by_adamw(
    tmp_path, flags, capsys, kind, column, vectors
):
    path = write_hub(tmp_path / "model", kind)
    words = [*RECIPE, "--data", flags["data"], "--y", "lr.matrix:log:1e-3:1e-1:2", "--model", str(path)]
    if column == "unembedding":
        words += ["--x", "lr.unembedding:log:1e-3:1e-1:2"]
    else:  # the recipe's own axis
        config, _ = read_arguments("", words)
        assert config.swept.x.startswith("lr.embedding:") and config.value("beta2.embedding") == 0.96
        words += ["--x", "lr.embedding:log:1e-3:1e-1:2"]
    sweep_main([*words, "--store", str(tmp_path / "s")])
    said = " ".join(capsys.readouterr().err.split())
    assert f"{vectors} norms and biases are the group vector, trained by adamw" in said
    assert ("embedding and unembedding are tied here" in said) == (column == "embedding")
    store = open_store(tmp_path / "s")
    assert np.isfinite(store.read("val_loss")).all() and len(np.unique(store.read("weights_digest"))) == 4
    replay = replay_cell(store, 1, 1, "cpu")
    assert compare(store, 1, 1, replay) == ""
    before = load_model(path).weights
    assert all(not torch.equal(weight, before[name].float()) for name, weight in replay.weights.items())


def test_vectors_are_a_group_of_their_own_where_something_is_given_for_them(tmp_path, flags):
    path = write_hub(tmp_path / "model", "gpt2")
    before = load_model(path).weights
    vectors = {name for name in before if name.endswith(("norm", "bias"))}
    axes = {"y": "lr.attention:log:1e-3:1e-1:2", "x": "lr.mlp:log:1e-3:1e-1:2", "tokens": 64}
    for more, still in (({"lr.vector": 0.0}, vectors), ({"freeze": "vector"}, vectors), ({"freeze": "mlp"}, set())):
        changed = {**flags, **axes, **more}
        if more.get("freeze") == "mlp":  # its norms and biases with it, though they are trained by themselves
            changed |= {"x": "lr.embedding:log:1e-3:1e-1:2", "optimizer": "adamw,attention=muon"}
            still = {name for name in before if ".mlp." in name}
        store = tmp_path / str(len(list(tmp_path.iterdir())))
        train(store=str(store), model=str(path), **changed)
        after = replay_cell(open_store(store), 0, 0, "cpu").weights
        assert {name for name in before if torch.equal(after[name], before[name].float())} == still, more


def test_without_an_optimizer_of_matrices_norms_follow_the_matrix_they_feed(tmp_path, flags):
    path = write_hub(tmp_path / "model", "tinyllama")
    own = {f"lr.{group}": 0.0 for group in ("attention", "embedding", "unembedding")}
    train(store=str(tmp_path / "s"), model=str(path), **{**flags, "y": "lr.mlp:log:1e-3:1e-1:2"}, **own)
    before, after = load_model(path).weights, replay_cell(open_store(tmp_path / "s"), 0, 0, "cpu").weights
    moved = {name for name in before if not torch.equal(after[name], before[name].float())}
    assert moved == {name for name in before if ".mlp." in name}
    with pytest.raises(
        ValueError, match=r"muon of group 'vector' takes matrices.*give that group another one, vector=ad"
    ):
        train(store=str(tmp_path / "t"), model=str(path), **flags, optimizer="muon,embedding=adamw,unembedding=adamw")


def test_a_soft_cap_is_asked_for_only_where_the_tensors_leave_it_open(tmp_path):
    opened = write_nanochat(tmp_path / "open", "2026-01-16")
    assert load_model(opened, softcap=20).config.softcap == 20
    with pytest.raises(ValueError, match="got softcap 18, but nanochat had 15 or 20 with the tensors of"):
        load_model(opened, softcap=18)
    closed = write_nanochat(tmp_path / "closed", "2025-10")
    with pytest.raises(ValueError, match=r"got softcap 20, but .*closed has a soft cap of 15: leave it out"):
        load_model(closed, softcap=20)
