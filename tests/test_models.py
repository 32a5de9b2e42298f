"""The networks: one replica, what vmap makes of it, and the numbers that describe it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.func import functional_call, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from engine.models import gpt, gpt2, llama, normal_weights, parameter_shapes, rotary_tables

GPT_CONFIG = gpt.GPTConfig(depth=2, width=24, heads=4, kv_heads=2, context=12, vocabulary=37)
LLAMA_CONFIG = llama.LlamaConfig(
    depth=2, width=24, heads=4, kv_heads=2, mlp_width=40, context=12, vocabulary=37, rotary_base=1e5
)
SCALING = llama.RotaryScaling(factor=4.0, low_factor=1.0, high_factor=4.0, original_context=64)
QWEN_CONFIG = replace(
    LLAMA_CONFIG, head_size=8, qkv_bias=True, output_bias=True, qk_norm=True, rotary_scaling=SCALING, tied=False
)
LATER_GPT_CONFIG = replace(
    GPT_CONFIG,
    depth=3,
    width=32,
    rotary_base=1e5,
    rotary_reversed=True,
    qk_scale=1.2,
    window_pattern="SL",
    short_window=4,
    lambdas=True,
    value_gate=12,
    value_gate_scale=3.0,
    smear=True,
)
GPT2_CONFIG = gpt2.GPT2Config(depth=2, width=24, heads=4, mlp_width=40, context=12, vocabulary=37)
CASES = [
    pytest.param(gpt, gpt.GPT, GPT_CONFIG, id="gpt"),
    pytest.param(llama, llama.Llama, LLAMA_CONFIG, id="llama-tied"),
    pytest.param(llama, llama.Llama, replace(LLAMA_CONFIG, tied=False), id="llama-untied"),
    pytest.param(llama, llama.Llama, QWEN_CONFIG, id="llama-biases-qk-norm"),
    pytest.param(gpt, gpt.GPT, LATER_GPT_CONFIG, id="gpt-2026"),
    pytest.param(gpt2, gpt2.GPT2, GPT2_CONFIG, id="gpt2"),
]
KEY = torch.zeros(3, dtype=torch.int64)


def smoothed(smoothing) -> tuple:
    """What a forward takes after the targets."""
    return {"label_smoothing": torch.as_tensor(smoothing)}, KEY


def build(network, config):
    with torch.device("meta"):
        return network(config)


def random_weights(module, seed, std=0.3):
    """Weights without the zeros of the initial ones, so that every path carries a signal."""
    return {n: normal_weights(seed, n, shape, std) for n, shape in parameter_shapes(module).items()}


def random_batch(config, seed, rows=3):
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, config.context)
    tokens_BT = torch.randint(config.vocabulary, shape, generator=generator, dtype=torch.int32)
    targets_BT = torch.randint(config.vocabulary, shape, generator=generator, dtype=torch.int32)
    ignored_BT = torch.rand(shape, generator=generator) < 0.4
    return tokens_BT, targets_BT.masked_fill(ignored_BT, -100)


def logits_of(module, weights, tokens_BT):
    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = module

        def forward(self, tokens_BT):
            return self.network.logits(tokens_BT)

    return functional_call(Logits(), {f"network.{n}": w for n, w in weights.items()}, (tokens_BT,))


@pytest.mark.parametrize(("family", "network", "config"), CASES)
def test_a_stacked_row_equals_a_lone_run(family, network, config):
    module = build(network, config)
    lone = [random_weights(module, seed) for seed in range(3)]
    batches = [random_batch(config, seed) for seed in range(3)]
    smoothing_R = torch.tensor([0.0, 0.1, 0.3])
    stacked = {n: torch.stack([w[n] for w in lone]).requires_grad_() for n in lone[0]}
    tokens_RBT = torch.stack([tokens for tokens, _ in batches])
    targets_RBT = torch.stack([targets for _, targets in batches])

    def one_replica(weights, tokens_BT, targets_BT, smoothing):
        return functional_call(module, weights, (tokens_BT, targets_BT, *smoothed(smoothing)))

    loss_R = vmap(one_replica)(stacked, tokens_RBT, targets_RBT, smoothing_R)
    gradients = torch.autograd.grad(loss_R.sum(), list(stacked.values()))
    for r, weights in enumerate(lone):
        weights = {n: w.clone().requires_grad_() for n, w in weights.items()}
        loss = one_replica(weights, *batches[r], smoothing_R[r])
        # fp32 products of a batched and of a lone call may be summed in another order.
        torch.testing.assert_close(loss_R[r], loss, rtol=1e-5, atol=0.0)
        for stacked_gradient, gradient in zip(
            gradients, torch.autograd.grad(loss, list(weights.values())), strict=True
        ):
            scale = float(gradient.abs().max())
            torch.testing.assert_close(stacked_gradient[r], gradient, rtol=1e-4, atol=1e-5 * scale)


# torch's own operators that a step may have: copies, views, and one value from as many of the same element
ELEMENTWISE = {
    "add",
    "sub",
    "neg",
    "mul",
    "div",
    "where",
    "sqrt",
    "sigmoid",
    "sigmoid_backward",
    "ones_like",
    "zeros_like",
}
COPIES = {"cat", "clone", "expand", "select", "select_backward", "slice", "slice_backward", "split", "squeeze"}
COPIES |= {
    "unsqueeze",
    "view",
    "_unsafe_view",
    "_reshape_alias",
    "detach",
    "zeros",
    "full",
    "new_zeros",
    "new_empty_strided",
}
COPIES |= {"copy_", "transpose", "permute", "as_strided", "alias", "_to_copy", "stack", "unbind", "split_with_sizes"}
COPIES |= {"ones_like", "zeros_like"}


class Operators(TorchDispatchMode):
    """Notes the name of every operator that is called, kernels' own insides left out."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(function.name().split(".")[0])
        return function(*args, **(kwargs or {}))


def stacked_losses(module, weights, tokens_RBT, targets_RBT, dropout):
    def one_replica(weights, tokens_BT, targets_BT, rate):
        hyper = {"label_smoothing": rate} | ({"dropout": rate} if dropout else {})
        return functional_call(module, weights, (tokens_BT, targets_BT, hyper, KEY.to(rate.device)))

    rate_R = torch.full(tokens_RBT.shape[:1], 0.1, device=tokens_RBT.device)
    return vmap(one_replica)(weights, tokens_RBT, targets_RBT, rate_R)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize(("family", "network", "config"), CASES)
def test_whatever_sums_over_a_replica_is_an_operator_of_the_kernels(family, network, config, dropout):
    """So that no sum's order can depend on the stack. Tensors without values call what they would on a GPU."""
    module = build(network, config).to("meta")
    weights = {n: torch.empty(3, *w.shape, device="meta").requires_grad_() for n, w in module.named_parameters()}
    tokens_RBT = torch.empty(3, 2, config.context, dtype=torch.int64, device="meta")
    upstream_R = torch.ones(3, device="meta")
    with Operators() as operators:
        loss_R = stacked_losses(module, weights, tokens_RBT, tokens_RBT, dropout)
        torch.autograd.grad(loss_R, list(weights.values()), upstream_R)
    assert {"fractal::linear", "fractal::matmul", "fractal::attention_backward"} <= operators.seen
    plain = {name.removeprefix("aten::") for name in operators.seen if name.startswith("aten::")}
    assert plain <= ELEMENTWISE | COPIES


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "network", "config"), CASES)
def test_on_a_gpu_a_stacked_row_has_the_bits_of_a_lone_one(family, network, config, dtype):
    with torch.device("meta"):
        module = network(config, "cuda")
    lone = [random_weights(module, seed) for seed in range(5)]
    weights = {n: torch.stack([each[n] for each in lone]).to("cuda", dtype) for n in lone[0]}
    batches = [random_batch(config, seed) for seed in range(5)]

    def bits(replicas):
        own = {n: w[replicas].requires_grad_() for n, w in weights.items()}
        tokens_RBT, targets_RBT = (torch.stack([batches[r][i] for r in replicas]).cuda() for i in (0, 1))
        loss_R = stacked_losses(module, own, tokens_RBT, targets_RBT, True)
        return [loss_R.detach(), *torch.autograd.grad(loss_R.sum(), list(own.values()))]

    five = bits([0, 1, 2, 3, 4])
    for replicas in ([0], [3], [4, 1]):
        assert all(torch.equal(one, each[replicas]) for one, each in zip(bits(replicas), five, strict=True))


@pytest.mark.parametrize(("family", "network", "config"), CASES)
def test_the_loss_is_the_sum_of_cross_entropies_of_the_logits(family, network, config):
    module = build(network, config)
    weights = random_weights(module, 0)
    tokens_BT, targets_BT = random_batch(config, 0)
    logits_BTV = logits_of(module, weights, tokens_BT).double().numpy()
    expected = 0.0
    for row, time in np.argwhere(targets_BT.numpy() != -100):
        logits_V = logits_BTV[row, time]
        expected += np.log(np.exp(logits_V).sum()) - logits_V[targets_BT[row, time]]
    loss = functional_call(module, weights, (tokens_BT, targets_BT, *smoothed(0.0)))
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-5)  # fp32 sums against fp64


@pytest.mark.parametrize(("family", "network", "config"), CASES)
def test_dropout_acts_behind_the_embedding_and_each_half_of_a_layer(family, network, config, monkeypatch):
    module, batch = build(network, config), random_batch(config, 0)
    weights = random_weights(module, 0)

    def loss(rate, step=0, **options):
        hyper = {"label_smoothing": torch.tensor(0.0)} | ({} if rate is None else {"dropout": torch.tensor(rate)})
        return functional_call(module, weights, (*batch, hyper, torch.tensor([1, step, 0])), options)

    torch.testing.assert_close(loss(0.0), loss(None), rtol=1e-6, atol=0)
    assert loss(0.5) == loss(0.5) != loss(None)
    assert loss(0.5, step=1) != loss(0.5)
    assert torch.equal(loss(0.5, by_row=True), loss(None, by_row=True))
    sites = []
    monkeypatch.setattr("engine.models.dropout", lambda x, rate, key_3, site: sites.append(site) or x)
    loss(0.5)
    assert sites == list(range(1 + 2 * config.depth))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("family", "network", "config"), CASES)
def test_label_smoothing_is_that_of_torch(family, network, config, smoothing):
    module = build(network, config)
    weights = random_weights(module, 1)
    tokens_BT, targets_BT = random_batch(config, 1)
    logits_BTV = logits_of(module, weights, tokens_BT)
    expected = torch.nn.functional.cross_entropy(
        logits_BTV.flatten(0, 1),
        targets_BT.flatten().long(),
        label_smoothing=smoothing,
        reduction="sum",
    )
    loss = functional_call(module, weights, (tokens_BT, targets_BT, *smoothed(smoothing)))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize(("family", "network", "config"), CASES)
def test_without_a_target_loss_and_gradients_are_zero(family, network, config):
    module = build(network, config)
    weights = {n: w.requires_grad_() for n, w in random_weights(module, 2).items()}
    tokens_BT, targets_BT = random_batch(config, 2)
    targets_BT = torch.full_like(targets_BT, -100)
    loss = functional_call(module, weights, (tokens_BT, targets_BT, *smoothed(0.1)))
    gradients = torch.autograd.grad(loss, list(weights.values()))
    assert loss.item() == 0.0
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize(("family", "network", "config"), CASES)
def test_a_token_does_not_see_later_ones(family, network, config):
    module = build(network, config)
    weights = random_weights(module, 3)
    tokens_BT, _ = random_batch(config, 3)
    changed_BT = tokens_BT.clone()
    changed_BT[:, 7:] = (changed_BT[:, 7:] + 1) % config.vocabulary
    logits_BTV, others_BTV = (logits_of(module, weights, x) for x in (tokens_BT, changed_BT))
    assert torch.equal(logits_BTV[:, :7], others_BTV[:, :7])
    assert not torch.equal(logits_BTV[:, 7:], others_BTV[:, 7:])


@pytest.mark.parametrize(("family", "network", "config"), CASES)
def test_a_shorter_row_gives_the_logits_of_the_longer_ones_start(family, network, config):
    module = build(network, config)
    weights = random_weights(module, 4)
    tokens_BT, _ = random_batch(config, 4)
    full, start = (logits_of(module, weights, x) for x in (tokens_BT, tokens_BT[:, :5]))
    torch.testing.assert_close(full[:, :5], start, rtol=1e-5, atol=1e-5)  # other matrix shapes


def test_gpt_logits_stay_under_the_soft_cap():
    module = build(gpt.GPT, GPT_CONFIG)
    logits = logits_of(module, random_weights(module, 5, std=5.0), random_batch(GPT_CONFIG, 5)[0])
    assert logits.abs().max() <= GPT_CONFIG.softcap
    assert logits.abs().max() > 0.9 * GPT_CONFIG.softcap


def test_rotary_turns_a_pair_by_position_times_its_frequency():
    cos_TK2, sin_TK2 = rotary_tables(context=5, head_dim=4, base=100.0)
    for position in range(5):
        for pair, frequency in enumerate((1.0, 0.1)):
            assert cos_TK2[position, pair] == np.float32(np.cos(position * frequency))
            assert sin_TK2[position, pair] == np.float32(np.sin(position * frequency))


@pytest.mark.parametrize(("family", "network", "config"), CASES)
def test_a_module_on_the_meta_device_has_real_rotary_tables(family, network, config):
    module = build(network, config)
    assert all(weight.is_meta for weight in module.parameters())
    assert {buffer.device.type for buffer in module.buffers()} == {"cpu"}


@pytest.mark.parametrize(("family", "network", "config"), CASES)
def test_initial_weights_depend_on_seed_and_name_only(family, network, config):
    first, again, other = (family.initial_weights(config, seed) for seed in (7, 7, 8))
    deeper = family.initial_weights(replace(config, depth=config.depth + 2), 7)
    assert {n: tuple(w.shape) for n, w in first.items()} == parameter_shapes(build(network, config))
    for name, weight in first.items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, again[name])
        if family is not gpt2 or not name.endswith((".output", ".down")):  # those scale with the depth
            assert torch.equal(weight, deeper[name][: len(weight)])
        constant = bool((weight == weight.flatten()[0]).all())
        assert constant or not torch.equal(weight, other[name])
    drawn = [w.flatten()[:8] for w in first.values() if len(w.flatten().unique()) > 1]
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


def test_initial_scales_are_those_of_nanochat():
    config = gpt.GPTConfig(depth=2, width=128, heads=2, kv_heads=2, context=8, vocabulary=512)
    weights = gpt.initial_weights(config, 0)
    # The deviation of 16,384 or more draws is within 2% of its own (three of its errors).
    assert weights["embedding.weight"].std().item() == pytest.approx(1.0, rel=0.02)
    assert weights["unembedding.weight"].std().item() == pytest.approx(0.001, rel=0.02)
    for layer in range(2):
        for name in ("attention.qkv", "mlp.up"):
            matrix = weights[f"layers.{layer}.{name}"]
            assert matrix.std().item() == pytest.approx(128**-0.5, rel=0.02)
            assert matrix.abs().max() <= (3 / 128) ** 0.5
        for name in ("attention.output", "mlp.down"):
            assert (weights[f"layers.{layer}.{name}"] == 0).all()


@pytest.mark.parametrize(("depth", "vocabulary", "millions"), [(4, 4096, 5.2), (12, 32768, 135), (20, 65536, 561)])
def test_parameters_and_flops_follow_the_formulas(depth, vocabulary, millions):
    width = 64 * depth
    config = gpt.GPTConfig(depth, width, depth, depth, 128, vocabulary)
    shapes = parameter_shapes(build(gpt.GPT, config)).values()
    parameters = sum(int(np.prod(shape)) for shape in shapes)
    matrices = 12 * depth * width**2
    assert parameters == matrices + 2 * vocabulary * width
    assert parameters / 1e6 == pytest.approx(millions, rel=0.01)
    attention = 6 * depth * width * 128
    assert gpt.flops_per_token(config) == 6 * (matrices + vocabulary * width) + attention


def test_flops_of_llama_count_every_matrix_and_the_tied_head():
    shapes = parameter_shapes(build(llama.Llama, LLAMA_CONFIG))
    matrices = sum(int(np.prod(shape)) for shape in shapes.values() if len(shape) == 2)
    attention = 6 * LLAMA_CONFIG.depth * LLAMA_CONFIG.width * LLAMA_CONFIG.context
    assert llama.flops_per_token(LLAMA_CONFIG) == 6 * matrices + attention


@pytest.mark.parametrize(("family", "network", "config"), CASES)
def test_activations_grow_with_tokens_and_hold_the_logits(family, network, config):
    one, ten = (family.activation_bytes(config, tokens, 2) for tokens in (64, 640))
    assert ten == 10 * one
    wider = replace(config, vocabulary=config.vocabulary + 1000)
    assert family.activation_bytes(wider, 64, 2) - one >= 1000 * 64 * 2


@pytest.mark.parametrize(("family", "network", "config"), CASES)
def test_every_parameter_has_a_group(family, network, config):
    groups = {name: family.parameter_groups(config, name) for name in parameter_shapes(build(network, config))}
    tied = getattr(config, "tied", False)
    assert groups["embedding.weight"] == (("embedding", "unembedding") if tied else ("embedding",)), (
        "a tied one has two"
    )
    assert groups["layers.1.attention.qkv"] == groups["layers.0.attention.output"] == ("attention",)
    assert groups["layers.1.mlp.down"] == ("mlp",)
    named = {"attention", "mlp", "embedding"} | (set() if tied else {"unembedding"})
    if config is LATER_GPT_CONFIG:
        named |= {"residual_lambdas", "x0_lambdas", "smear", "value_embeddings"}
    assert {own[0] for own in groups.values()} == named


@pytest.mark.parametrize("config", [GPT_CONFIG, LLAMA_CONFIG], ids=["gpt", "llama"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5, "kv_heads": 5}, "width 24 is not divisible by heads 5: choose a multiple"),
        ({"heads": 8, "kv_heads": 2}, "head dimension 3 .* is odd"),
        ({"kv_heads": 3}, "heads 4 is not a multiple of kv_heads 3: choose a divisor"),
        ({"depth": 0}, "depth is 0, expected at least 1"),
        ({"context": -1}, "context is -1, expected at least 1"),
        ({"vocabulary": 0}, "vocabulary is 0, expected at least 1"),
    ],
)
def test_an_impossible_shape_is_refused(config, change, message):
    with pytest.raises(ValueError, match=message):
        replace(config, **change)


def test_a_context_beyond_the_pretrained_one_is_refused():
    assert LLAMA_CONFIG.with_context(5).context == 5
    with pytest.raises(ValueError, match="context 13 is longer than the model's 12: give"):
        LLAMA_CONFIG.with_context(13)
