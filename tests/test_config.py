"""Configurations: what `auto` stands for, what is refused, and what is stored."""

import json
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.command import parse
from engine.config import DEFAULT_AXES, NETWORKS, PRESETS, SweepConfig, automatic_micro_batch, resolve
from engine.grid import HYPER_PARAMETERS, attribute


@pytest.mark.parametrize("network", NETWORKS)
def test_a_resolved_configuration_resolves_to_itself(network):
    config = resolve(SweepConfig(network=network), "cpu")
    assert resolve(config, "cpu") == config
    assert resolve(config, "cuda") == config
    assert (config.y, config.x) == DEFAULT_AXES[network]


def test_a_configuration_survives_json_and_hashes_by_value():
    config = resolve(PRESETS["smollm2-sft"], "cuda")
    back = SweepConfig.from_json(json.loads(json.dumps(config.to_json())))
    assert back == config and back.hash == config.hash
    assert replace(config, lr=2e-3).hash != config.hash
    with pytest.raises(ValueError, match=r"unknown fields \['colour'\]"):
        SweepConfig.from_json(config.to_json() | {"colour": 1})


def test_precision_and_trace_follow_the_device_and_the_network():
    assert resolve(SweepConfig(), "cuda").precision == "bf16"
    assert resolve(SweepConfig(), "cpu").precision == "fp32"
    assert resolve(SweepConfig(network="mlp"), "cuda").precision == "fp32"
    assert resolve(SweepConfig(), "cpu").trace == "on"
    assert resolve(SweepConfig(network="mlp"), "cpu").trace == "off"


def test_depth_sets_width_and_heads_unless_they_are_given():
    deep = resolve(SweepConfig(depth=4), "cpu")
    assert (deep.width, deep.heads, deep.kv_heads) == (256, 4, 4)
    free = resolve(SweepConfig(depth=4, width=96, heads=3, kv_heads=1), "cpu")
    assert (free.width, free.heads, free.kv_heads) == (96, 3, 1)


def test_every_hyper_parameter_can_be_fixed_by_a_flag_of_its_name():
    for name in HYPER_PARAMETERS:
        read = parse(SweepConfig, "", arguments=[f"--{name}", "2"])
        assert read == replace(SweepConfig(), **{attribute(name): 2})


@given(st.integers(1, 300), st.integers(1, 300), st.integers(2, 6), st.integers(1, 600))
def test_micro_batches_cut_every_batch_in_few_pieces(low, extent, points, context):
    config = SweepConfig(y="lr:log:1:2:2", x=f"batch:linear:{low}:{low + extent}:{min(points, extent + 1)}")
    config = replace(config, context=context, tokens=1e12)
    micro = resolve(config, "cpu").micro_batch
    batches = config.values("batch").astype(int)
    assert 1 <= micro <= max(batches.max(), 1)
    assert micro * context <= max(4096, context)
    masked = -(-batches // micro) * micro - batches
    # rows of the last forward pass only, or as few as an even cut of the common divisor leaves
    assert ((masked * context < 1024) | (masked * (micro - 1) <= batches)).all()


def test_a_single_batch_is_cut_into_equal_pieces():
    for batch, context, micro in [(4, 64, 4), (64, 64, 64), (65, 64, 33), (100, 4096, 1), (7, 1024, 4)]:
        assert automatic_micro_batch(SweepConfig(*DEFAULT_AXES["gpt"], batch=batch, context=context)) == micro


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"network": "rnn"}, "network is 'rnn', expected one of gpt, smollm2, mlp"),
        ({"schedule": "step"}, "schedule is 'step', expected one of constant, cosine"),
        ({"optimizer": "lion"}, "optimizer is 'lion', expected one of adamw, sgd"),
        ({"precision": "fp64"}, "precision is 'fp64', expected one of bf16, tf32, fp32"),
        ({"trace": "yes"}, "trace is 'yes'"),
        ({"nonlinearity": "gelu"}, "nonlinearity is 'gelu'"),
        ({"rows_per_launch": "0"}, "rows_per_launch is '0', expected auto or a whole number >= 1"),
        ({"rows_per_launch": "many"}, "rows_per_launch is 'many'"),
        ({"x": "lr.0:log:1:2:3"}, "axis 'lr.0' does not apply to the network 'gpt'"),
        ({"network": "mlp", "x": "tokens:log:1:2:3"}, "axis 'tokens' does not apply to the network 'mlp'"),
        ({"width": 100, "heads": 3}, "width 100 is not divisible by heads 3"),
        ({"depth": 0}, "depth is 0, expected at least 1"),
        ({"context": 0}, "context is 0, expected at least 1"),
        ({"validation_rows": 0}, "validation_rows is 0, expected at least 1"),
        ({"data_rows": -1}, "data_rows is -1, expected at least 0"),
        ({"micro_batch": -1}, "micro_batch is -1, expected at least 0"),
        ({"batch": 0}, "batch is 0, expected a value in [1, 1000000]"),
        ({"lr": float("nan")}, "lr is nan, expected a value in [0, 1e+30]"),
        ({"lr_mlp": -1.0}, "lr.mlp is -1, expected a value in [0, 1e+30]"),
        ({"beta2": 1.0}, "beta2 is 1, expected a value in [0, 0.9999999]"),
        ({"momentum": 1.5}, "momentum is 1.5, expected a value in [0, 1]"),
        ({"floor": -0.1}, "floor is -0.1, expected a value in [0, 1]"),
        ({"eps": -1e-8}, "eps is -1e-08, expected"),
        ({"x": "tokens:log:100:1e4:4"}, "tokens starts at 100, below one step of 256 tokens"),
        ({"x": "seed:linear:0:1:2", "tokens": 100}, "tokens starts at 100, below one step of 256 tokens"),
        ({"x": "batch:linear:1:64:4", "tokens": 300}, "below one step of 4096 tokens"),
        ({"y": "lr:linear:1:1.000001:64"}, "neighbouring values are equal in float32"),
        ({"depth": 2, "network": "smollm2"}, "depth is 2, but the network 'smollm2' has none (it is for gpt)"),
        (
            {"context": 99, "network": "mlp"},
            "context is 99, but the network 'mlp' has none (it is for gpt and",
        ),
        ({"steps": 99}, "steps is 99, but the network 'gpt' has none (it is for mlp)"),
        ({"lr_0": 0.1}, "lr_0 is 0.1, but the network 'gpt' has none (it is for mlp)"),
        ({"x": "beta1:linear:0:0.9:4", "optimizer": "sgd"}, "axis beta1 changes nothing with --optimizer sgd"),
        ({"y": "lr.matrix:log:1:2:3", "lr_mlp": 0.1, "lr_attention": 0.1}, "axis lr.matrix changes nothing where"),
        ({"network": "mlp", "y": "lr:log:1:2:3", "lr_0": 1.0}, "axis lr changes nothing where lr.0 and lr.1 are given"),
        ({"network": "mlp", "problem": "no/such.npz"}, "problem file 'no/such.npz' does not exist"),
    ],
)
def test_a_bad_configuration_is_one_clear_line(changes, says):
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        resolve(replace(SweepConfig(), **changes), "cpu")
    assert "\n" not in str(error.value)
