"""Configurations: what `auto` stands for, what is refused, and what is stored."""

import json
import math
import re
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import setup, tiny

from engine.config import PRESETS, Run, cells_of, make_config, resolve
from engine.family import FAMILIES
from engine.hyper import HYPER_PARAMETERS, sources
from engine.language import check_matrices
from engine.optim import OPTIMIZERS, by_group
from engine.options import read_arguments
from engine.plan import automatic_micro_batch
from engine.store import config_from


@pytest.mark.parametrize("network", FAMILIES)
def test_a_resolved_configuration_resolves_to_itself(network):
    run = resolve(make_config(network), "cpu")
    assert resolve(run.config, "cpu").config == run.config
    assert resolve(run.config, "cuda").config == run.config
    assert run.names == tuple(axis.split(":")[0] for axis in FAMILIES[network].axes)


def test_a_configuration_survives_json_and_hashes_by_value():
    config = resolve(PRESETS["smollm2-sft"].change(**{"lr.mlp": 0.1}), "cuda").config
    back = config_from(json.loads(json.dumps(config.flat())))
    assert back == config and back.hash == config.hash
    assert config.change(eps=2e-3).hash != config.hash
    with pytest.raises(ValueError, match="has no such field"):
        config_from(config.flat() | {"colour": 1})


def test_precision_and_trace_follow_the_device_and_the_network():
    assert resolve(make_config(), "cuda").config.swept.precision == "bf16"
    assert resolve(make_config(), "cpu").config.swept.precision == "fp32"
    assert resolve(make_config("two_layer"), "cuda").config.swept.precision == "fp32"
    assert resolve(make_config(), "cpu").config.swept.trace == "on"
    assert resolve(make_config("mlp"), "cpu").config.swept.trace == "off"


def test_depth_sets_width_and_heads_unless_they_are_given():
    deep = resolve(make_config(depth=4), "cpu").config.shape
    assert (deep.width, deep.heads, deep.kv_heads) == (256, 4, 4)
    free = resolve(make_config(depth=4, width=96, heads=3, kv_heads=1), "cpu").config.shape
    assert (free.width, free.heads, free.kv_heads) == (96, 3, 1)


def test_a_groups_value_follows_its_parents_then_the_plain_one():
    groups = FAMILIES["gpt"].groups
    assert sources("lr", "attention", groups) == ["lr.attention", "lr.matrix", "lr"]
    assert sources("beta1", "embedding", groups) == ["beta1.embedding", "beta1"]
    config = make_config(lr=1.0, **{"lr.matrix": 2.0, "lr.mlp": 3.0, "weight_decay.embedding": 0.5})
    asked = ("lr.mlp", "lr.attention", "lr.embedding", "weight_decay.embedding", "weight_decay.mlp")
    assert [config.value(name) for name in asked] == [3.0, 2.0, 1.0, 0.5, 0.0]


def test_replicates_are_seeds_one_after_another():
    run = resolve(make_config(seed=7, replicates=3), "cpu")
    assert run.column("seed").ravel().tolist() == [7, 8, 9] and run.shape == (3, 32, 32)


def test_optimizers_combine_by_parameter_group():
    groups = FAMILIES["gpt"].groups
    assert set(by_group("sgd", groups).values()) == {"sgd"}
    assert by_group("adamw,matrix=sgd,mlp=adamw", groups)["attention"] == "sgd"
    assert by_group("adamw,matrix=sgd,mlp=adamw", groups)["mlp"] == "adamw"
    for text, says in (("adam", "optimizer is 'adam'"), ("sgd,head=adamw", "has 'head=adamw'"), ("sgd,x", "has 'x'")):
        with pytest.raises(ValueError, match=says):
            by_group(text, groups)


def test_every_hyper_parameter_can_be_fixed_by_a_flag_of_its_name():
    given = ["--optimizer", "adamw,embedding=sgd,mlp=normuon", "--schedule", "wsd"]
    read = {name for optimizer in OPTIMIZERS.values() for name in optimizer.hyper} | {
        "warmup",
        "decay",
        "floor",
        "clip",
    }
    for name in (*read, "tokens", "batch", "seed", "init_scale", "label_smoothing", "dropout"):
        value = HYPER_PARAMETERS[name].low + 1
        config, _ = read_arguments("", [*given, f"--{name}", str(value)])
        assert config.hyper == {name: value}, name


@given(st.integers(1, 300), st.integers(1, 300), st.integers(2, 6), st.integers(1, 600))
def test_micro_batches_cut_every_batch_in_few_pieces(low, extent, points, context):
    x = f"batch:linear:{low}:{low + extent}:{min(points, extent + 1)}"
    run = resolve(make_config(y="lr:log:1:2:2", x=x, context=context, tokens=1e12), "cpu")
    micro = run.config.training.micro_batch
    batches = run.values("batch").astype(int)
    assert 1 <= micro <= max(batches.max(), 1)
    assert micro * context <= max(4096, context)
    masked = -(-batches // micro) * micro - batches
    # rows of the last forward pass only, or as few as an even cut of the common divisor leaves
    assert ((masked * context < 1024) | (masked * (micro - 1) <= batches)).all()


def test_a_single_batch_is_cut_into_equal_pieces():
    for batch, context, micro in [(4, 64, 4), (64, 64, 64), (65, 64, 33), (100, 4096, 1), (7, 1024, 4)]:
        run = resolve(make_config(batch=batch, context=context, x="lr.mlp:log:1:2:2", tokens=1e9), "cpu")
        assert automatic_micro_batch(run) == run.config.training.micro_batch == micro


BAD = [
    ({"network": "rnn"}, "network is 'rnn'; expected one of gpt, pretrained, two_layer"),
    ({"schedule": "step"}, "schedule is 'step'; expected one of constant, cosine"),
    ({"optimizer": "adagrad"}, "optimizer is 'adagrad'; expected one of adamw, sgd"),
    ({"precision": "fp64"}, "precision is 'fp64'; expected one of bf16, tf32, fp32"),
    ({"trace": "yes"}, "trace is 'yes'"),
    ({"network": "two_layer", "nonlinearity": "gelu"}, "nonlinearity is 'gelu'"),
    ({"x": "lr.0:log:1:2:3"}, "axis 'lr.0' changes nothing in this sweep of 'gpt'"),
    ({"network": "two_layer", "x": "tokens:log:1:2:3"}, "axis 'tokens' changes nothing in this sweep of 'two_layer'"),
    ({"width": 100, "heads": 3}, "width 100 is not divisible by heads 3"),
    ({"depth": 0}, "depth is 0; expected at least 1"),
    ({"context": 0}, "context is 0; expected at least 1"),
    ({"validation_rows": -1}, "validation_rows is -1; expected at least 0"),
    ({"data_rows": -1}, "data_rows is -1; expected at least 0"),
    ({"micro_batch": -1}, "micro_batch is -1; expected at least 0"),
    ({"data": " "}, "data is empty; expected chitchat"),
    ({"packing": "loose"}, "packing is 'loose'; expected one of cut, best-fit"),
    ({"freeze": "head"}, "freeze has 'head'; expected some of matrix"),
    ({"replicates": 0}, "replicates is 0; expected at least 1"),
    ({"replicates": 2, "x": "seed:linear:0:1:2"}, "replicates is 2, but the seed is swept"),
    ({"batch": 0}, "batch is 0; expected a value in [1, 1000000]"),
    ({"batch": 1.5}, "batch is 1.5; expected a whole number"),
    ({"y": "seed:linear:0:1:2", "lr": float("nan")}, "lr is nan; expected a value in [0, 1e+30]"),
    ({"lr.mlp": -1.0}, "lr.mlp is -1; expected a value in [0, 1e+30]"),
    ({"beta2": 1.0}, "beta2 is 1; expected a value in [0, 0.9999999]"),
    ({"optimizer": "sgd", "momentum": 1.5}, "momentum is 1.5; expected a value in [0, 1]"),
    ({"schedule": "cosine", "floor": -0.1}, "floor is -0.1; expected a value in [0, 1]"),
    ({"eps": -1e-8}, "eps is -1e-08; expected"),
    ({"floor": 0.1}, "floor is 0.1, but this sweep of 'gpt' does not read it"),
    ({"momentum": 0.9}, "momentum is 0.9, but this sweep of 'gpt' does not read it"),
    ({"schedule": "wsd", "warmup": 0.9, "decay": 0.2}, "warmup and decay are 1.1 of the steps together"),
    ({"x": "tokens:log:100:1e4:4"}, "tokens starts at 100, below two steps of 256 tokens"),
    ({"x": "seed:linear:0:1:2", "tokens": 256}, "tokens starts at 256, below two steps of 256 tokens"),
    ({"x": "batch:linear:1:64:4", "tokens": 300}, "below two steps of 4096 tokens"),
    ({"y": "lr:linear:1:1.000001:64"}, "neighbouring values are equal in float32"),
    ({"depth": 2, "network": "smollm2"}, "depth is 2, but the network 'pretrained' has no such field"),
    ({"depth": 2, "model": "a/b"}, "depth is 2, but the network 'pretrained' has no such field"),
    ({"model": "a/b", "network": "smollm2"}, "model is 'a/b', but the network is 'smollm2'; leave out one of the two"),
    ({"model": "a/b", "network": "gpt"}, "model is 'a/b', but the network 'gpt' has no such field"),
    ({"model": " "}, "model is empty; expected a checkpoint's folder, file or name on the hub"),
    ({"context": 99, "network": "two_layer"}, "context is 99, but the network 'two_layer' has no such field"),
    ({"steps": 99}, "steps is 99, but the network 'gpt' has no such field"),
    ({"lr.0": 0.1}, "lr.0 is 0.1, but this sweep of 'gpt' does not read it"),
    ({"lr": 0.1}, "lr is an axis, and --lr is 0.1; leave out one of the two"),
    ({"x": "beta1:linear:0:0.9:4", "optimizer": "sgd"}, "axis 'beta1' changes nothing in this sweep"),
    (
        {"y": "lr.matrix:log:1:2:3", "lr.mlp": 0.1, "lr.attention": 0.1},
        "axis lr.matrix changes nothing: no parameter group",
    ),
    ({"y": "lr.embedding:log:1:2:3", "freeze": "embedding"}, "axis lr.embedding changes nothing: no parameter group"),
    ({"network": "two_layer", "y": "lr:log:1:2:3", "lr.0": 1.0}, "axis lr changes nothing: no parameter group"),
    ({"network": "two_layer", "problem": "no/such.npz"}, "problem file 'no/such.npz' does not exist"),
    ({"points": "p.csv", "y": "lr:log:1:2:3"}, "points are given beside an axis"),
    (
        {"x": "epochs:linear:1:4:4", "unique_tokens": 1e4, "tokens": 2e4},
        "epochs, tokens, unique_tokens are all given; expected all but one",
    ),
    ({"count": "words"}, "count is 'words'; expected one of tokens, supervised"),
    ({"points": "no/such.csv"}, "points file 'no/such.csv' does not exist"),
]


@pytest.mark.parametrize(("changes", "says"), BAD)
def test_a_bad_configuration_is_one_clear_line(changes, says):
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        resolve(make_config(**changes), "cpu")
    assert "\n" not in str(error.value)


def test_a_run_is_what_a_configuration_and_its_cells_make():
    run = resolve(make_config(y="lr:log:1e-3:1:4", x="batch:linear:1:3:3", tokens=1e5), "cpu")
    assert isinstance(run, Run) and run.shape == (1, 4, 3)
    assert run.values("batch").tolist() == [1, 2, 3] and run.values("tokens").tolist() == [1e5]
    assert run.given == {"lr", "batch", "tokens"}


def test_the_third_of_tokens_unique_tokens_and_epochs_follows():
    def values(**given):
        run = resolve(make_config(y="lr:log:1e-3:1:2", **given), "cpu")
        return [run.values(name).tolist() for name in ("tokens", "unique_tokens", "epochs")]

    x = "batch:linear:1:2:2"
    assert values(x=x, unique_tokens=1e3, epochs=4) == [[4000], [1000], [4]]
    assert values(x="epochs:log:1:4:3", tokens=4096) == [[4096], [1024, 2048, 4096], [1, 2, 4]]
    assert values(x="tokens:linear:4096:8192:2", unique_tokens=1024) == [[4096, 8192], [1024], [4, 8]]
    assert values(x=x, unique_tokens=1024) == [[16384], [1024], [16]], "tokens has a default"
    assert values(x=x, tokens=4096)[:2] == [[4096], [math.inf]], "whatever there is"


def test_a_groups_value_that_its_optimizer_does_not_read_is_refused(tmp_path):
    mixed = {"optimizer": "adamw,embedding=sgd"}
    with pytest.raises(
        ValueError, match=r"momentum\.mlp changes nothing: mlp is trained by adamw, which has no momentum"
    ):
        setup(tiny(tmp_path, **mixed, **{"momentum.mlp": 0.9}))
    assert setup(tiny(tmp_path, **mixed, **{"momentum.embedding": 0.9})).slots


@pytest.mark.parametrize(
    ("optimizer", "group", "what"),
    [
        ("muon", "embedding", "embedding.weight is a table with a row for each token"),
        ("adamw,unembedding=normuon", "unembedding", "unembedding.weight is a table with a row for each token"),
    ],
)
def test_muon_of_anything_but_matrices_is_refused(tmp_path, optimizer, group, what):
    with pytest.raises(ValueError, match=f"of group '{group}' takes matrices between hidden units, but {what}"):
        setup(tiny(tmp_path, optimizer=optimizer))
    assert setup(tiny(tmp_path, optimizer=optimizer, freeze="embedding,unembedding")).slots


def test_a_vector_is_no_matrix(tmp_path):
    network = SimpleNamespace(tables=set(), groups={"norm": ("mlp",)}, shapes={"norm": (4,)})
    run = resolve(tiny(tmp_path, optimizer="adamw,mlp=muon"), "cpu")
    with pytest.raises(
        ValueError, match=r"of group 'mlp' takes matrices .* but norm is no matrix, its shape is \(4,\)"
    ):
        check_matrices(run, network, {"mlp": "muon"}, set())


def test_an_axis_of_tokens_says_what_is_counted():
    for count, words in (("tokens", "training tokens"), ("supervised", "supervised tokens")):
        cells = cells_of(make_config(count=count, x="tokens:log:1e3:1e4:4"))
        assert (cells.x.long_name, cells.y.long_name) == (words, "learning rate")
        assert cells.coordinates()["tokens"][2]["long_name"] == words
