"""Text of a stack of weights: cached logits are those of the whole text, and a replica's text is its own."""

import numpy as np
import pytest
import torch
from test_models import CASES, GPT_CONFIG, LATER_GPT_CONFIG, random_weights

from engine import generate
from engine.checkpoint import LoadedModel
from engine.checkpoint.model import FAMILIES, family_name, make_module
from engine.generate import BROKEN, Generator, choose
from engine.sampling import GREEDY, Sampling

CONFIGS = {case.id: case.values[2] for case in CASES}
CPU = torch.device("cpu")


def model_of(config, seed: int) -> LoadedModel:
    """A network whose every path carries a signal."""
    return LoadedModel("test", config, random_weights(make_module(config), seed))


def generator_of(models: list[LoadedModel], sampling: Sampling = GREEDY, rows: int = 1) -> Generator:
    return Generator(models[0], [model.weights for model in models], rows, sampling, CPU)


def text_of(config, seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(config.vocabulary, size=length).tolist()


def close_to(logits: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal within fp32 rounding: products of a token and of a whole row are summed in another order."""
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_every_family_has_a_case_here():
    # one that is added is written into CASES of test_models.py, and is then held to write text
    assert {family_name(config) for config in CONFIGS.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_logits_are_those_of_the_whole_text(name, monkeypatch):
    # pieces and buffers so small that a text of 11 tokens needs several, of rows that are not equally long
    monkeypatch.setattr(generate, "PIECE", 3)
    monkeypatch.setattr(generate, "FEWEST", 2)
    config = CONFIGS[name]
    models = [model_of(config, seed) for seed in range(2)]
    texts = [[text_of(config, 10 * replica + row, 4 + 3 * row) for row in range(3)] for replica in range(2)]
    generator = generator_of(models, rows=3)
    logits_RBV = generator.read([[text[:-2] for text in own] for own in texts])
    for place in (-2, -1):  # then a token at a time
        for replica, own in enumerate(texts):
            for row, text in enumerate(own):
                whole = models[replica].logits(torch.tensor([text]))[0]
                close_to(logits_RBV[replica, row], whole[place - 1])
        generator.make_room(generator.places + 1)
        tokens_RB1 = torch.tensor([[[text[place]] for text in own] for own in texts])
        with torch.no_grad():
            logits_RBV = generator.advance(tokens_RB1, torch.ones(2, 3, dtype=torch.int64))


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_text_is_the_argmax_of_every_token_of_the_text(name):
    config, model = CONFIGS[name], model_of(CONFIGS[name], 0)
    prompt = text_of(config, 1, 3)
    written = [tokens[0][0] for tokens in generator_of([model]).generate([[prompt]], 100)]
    assert len(prompt) + len(written) == config.context, "it goes on until the context is full"
    forced = model.logits(torch.tensor([prompt + written]))[0].argmax(-1).tolist()
    assert written == forced[len(prompt) - 1 : -1]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.0, top_k=9, top_p=0.8, seed=3)])
def test_a_replica_writes_the_same_text_in_any_stack(sampling):
    models = [model_of(LATER_GPT_CONFIG, seed) for seed in range(4)]
    prompts = [[text_of(LATER_GPT_CONFIG, seed, 2 + seed)] for seed in range(4)]
    stacked = list(generator_of(models, sampling).generate(prompts, 6))
    for replica in range(4):
        alone = list(generator_of([models[replica]], sampling).generate([prompts[replica]], 6))
        assert [step[0] for step in alone] == [step[replica] for step in stacked]


def test_the_same_seed_writes_the_same_text_and_another_one_another():
    model, prompt = model_of(GPT_CONFIG, 0), text_of(GPT_CONFIG, 0, 2)

    def write(seed: int, turn: int = 0) -> list:
        return list(generator_of([model], Sampling(temperature=2.0, seed=seed)).generate([[prompt]], 9, turn))

    assert write(0) == write(0)
    assert write(0) != write(1) and write(0) != write(0, turn=1)


def test_a_replica_that_breaks_says_so_and_its_neighbour_writes_on():
    models = [model_of(LATER_GPT_CONFIG, seed) for seed in range(2)]
    models[0].weights["layers.1.mlp.down"][3, 5] = float("nan")
    prompts = [[text_of(LATER_GPT_CONFIG, 0, 3)]] * 2
    stacked = list(generator_of(models).generate(prompts, 5))
    alone = list(generator_of(models[1:]).generate(prompts[1:], 5))
    assert [step[0] for step in stacked] == [[BROKEN]] * 5
    assert [step[1] for step in stacked] == [step[0] for step in alone]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_second_text_is_read_from_where_it_differs(name):
    config = CONFIGS[name]
    models = [model_of(config, seed) for seed in range(2)]
    generator = generator_of(models, Sampling(temperature=1.5, seed=1))
    first = [[text_of(config, 5, 6)], [text_of(config, 6, 3)]]
    said = [[*own[0], *(step[r][0] for step in generator.generate(first, 3))] for r, own in enumerate(first)]
    second = [[[*said[0][:7], 1]], [[2, *said[1]]]]
    fresh = generator_of(models)
    close_to(generator.read(second), fresh.read(second))
    assert generator.seen == fresh.seen and torch.equal(generator.length_RB, fresh.length_RB)


def test_what_a_broken_text_left_does_not_break_the_next_one():
    generator = generator_of([model_of(GPT_CONFIG, 0)])
    text = [[text_of(GPT_CONFIG, 0, 8)]]
    expected = generator.read(text)
    for buffer_RBSC in generator.past.values():
        buffer_RBSC[:, :, 4:] = float("nan")
    other = [[[*text[0][0][:4], 0, 1, 2]]]
    assert generator.read(other).isfinite().all()
    close_to(generator.read(text), expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_one_stacked_forward_writes_what_replicas_write_one_after_another(name):
    # the GPU's form, on the CPU
    config = CONFIGS[name]
    models = [model_of(config, seed) for seed in range(3)]
    prompts = [[text_of(config, seed, 2 + seed), text_of(config, 9, 3)] for seed in range(3)]
    stacked, single = generator_of(models, rows=2), generator_of(models, rows=2)
    stacked.stacked = True
    assert not single.stacked
    assert list(stacked.generate(prompts, 5)) == list(single.generate(prompts, 5))
    close_to(stacked.read(prompts), single.read(prompts))


def chosen_by_definition(logits: np.ndarray, number: float, sampling: Sampling) -> int:
    """What `choose` says it does, one token after another in float64."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))[: sampling.top_k or None]
    weights = np.exp((logits[order] - logits[order[0]]) / sampling.temperature)
    shares, kept, sum_of_kept = weights / weights.sum(), [], 0.0
    for token, share in zip(order, shares, strict=True):
        if sum_of_kept >= sampling.top_p:
            break
        kept.append((token, share))
        sum_of_kept += share
    running = 0.0
    for token, share in kept:
        running += share / sum_of_kept
        if running > number:
            return token
    return kept[-1][0]


@pytest.mark.parametrize("top_k", [0, 1, 5, 100])
@pytest.mark.parametrize("top_p", [1.0, 0.7, 1e-6])
@pytest.mark.parametrize("temperature", [0.6, 3.0])
def test_tokens_are_chosen_by_the_definition(top_k, top_p, temperature):
    random = np.random.default_rng(0)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    logits_NV = random.normal(size=(40, 30)).round(1)  # rounded: some are equal
    for number in random.random(10, dtype=np.float32):
        found = choose(torch.tensor(logits_NV, dtype=torch.float32), torch.tensor(number), sampling).tolist()
        assert found == [chosen_by_definition(logits_V, float(number), sampling) for logits_V in logits_NV]


def test_chosen_tokens_come_as_often_as_their_shares():
    logits_V = torch.tensor([2.0, 1.0, 0.0, -1.0])
    numbers_N = torch.from_numpy(Sampling(seed=7).numbers(0, 20_000))
    found = choose(logits_V.expand(20_000, -1), numbers_N[:, None], Sampling(temperature=1.0, top_k=0))
    shares = logits_V.softmax(-1)
    counted = torch.bincount(found, minlength=4) / len(numbers_N)
    error = (shares * (1 - shares) / len(numbers_N)).sqrt()
    assert ((counted - shares).abs() < 4 * error).all()


@pytest.mark.parametrize("sampling", [GREEDY, Sampling()])
def test_logits_that_are_not_finite_choose_nothing(sampling):
    logits_NV = torch.tensor([[0.0, 1.0, 2.0], [0.0, float("nan"), 2.0], [float("inf"), 0.0, 0.0]])
    assert choose(logits_NV, torch.tensor(0.0), sampling).tolist() == [2, BROKEN, BROKEN]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: captures a CUDA graph")
@pytest.mark.parametrize("name", CONFIGS)
def test_the_captured_step_writes_the_text_of_teacher_forcing(name, monkeypatch):
    monkeypatch.setattr(generate, "FEWEST", 4)  # captured anew where buffers grow
    config, model = CONFIGS[name], model_of(CONFIGS[name], 0)
    prompt = text_of(config, 1, 3)
    generator = Generator(model, [model.weights], 1, GREEDY, torch.device("cuda"))
    written = [tokens[0][0] for tokens in generator.generate([[prompt]], 100)]
    forced = model.logits(torch.tensor([prompt + written]))[0].argmax(-1).tolist()
    assert written == forced[len(prompt) - 1 : -1]
