"""Requests, batches and stacks that are scored: every token once, each replica what it says alone."""

import random
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
from scoring import byte_model, loss_and_greedy, scorer_of, silent, words, write_items
from stacked import DEVICE
from tiny import tiny

from analysis.evaluate import chosen_cells, score_cells
from analysis.scores import stored_tasks
from analysis.tasks import load_tasks
from engine import score
from engine.api import run_sweep
from engine.checkpoint import LoadedModel
from engine.models.llama import LlamaConfig, initial_weights
from engine.options import RunOptions
from engine.score import Request, batches, cut_left, padded_length
from engine.store import open_store
from engine.tokenizer import ByteTokenizer


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return byte_model()


def test_every_scored_token_is_computed_once_in_a_batch_that_holds_its_row():
    source = random.Random(0)
    requests = []
    for _ in range(200):
        tokens = tuple(source.choices(range(3), k=source.randint(2, 120)))
        requests.append(Request(tokens, source.randint(1, len(tokens) - 1)))
    requests += [Request((1, 1, letter), 2) for letter in (5, 6, 7)]
    seen: dict[int, list[int]] = {}
    for batch in batches(requests, 128, 512, whole=True):
        assert batch.tokens_BT.size == 512 // batch.tokens_BT.shape[1] * batch.tokens_BT.shape[1]
        time = batch.tokens_BT.shape[1]
        for at, target, owner in zip(batch.at_N, batch.targets_N, batch.owner_N, strict=True):
            tokens, place = requests[owner].tokens, at % time
            row = batch.tokens_BT[at // time]
            assert tuple(row[: len(tokens) - 1]) == tokens[:-1] and tokens[place + 1] == target
            seen.setdefault(int(owner), []).append(int(place) + 1)
    assert seen == {n: list(range(each.first, len(each.tokens))) for n, each in enumerate(requests)}
    rows = sum((batch.tokens_BT[:, :2] == 1).all(1).sum() for batch in batches(requests[-3:], 128, 512, whole=False))
    assert rows == 1, "the lettered answers to one question are one row"


def test_rows_are_padded_to_few_lengths_of_which_a_batch_holds_whole_ones():
    lengths = sorted({padded_length(tokens, 2048) for tokens in range(1, 2049)})
    assert lengths == [32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048]
    assert all(6144 % length == 0 for length in lengths) and padded_length(40, 40) == 40


def test_longer_requests_lose_their_first_tokens_and_are_counted():
    fits, longer, far = Request(tuple(range(5)), 3), Request(tuple(range(8)), 6), Request(tuple(range(9)), 2)
    cut, count = cut_left([fits, longer, far], 4)
    assert cut == [fits, Request((3, 4, 5, 6, 7), 3), Request((4, 5, 6, 7, 8), 1)] and count == 2


def test_a_stack_says_what_each_of_its_weights_says_alone(model):
    others = [replace(model, weights={n: w * scale for n, w in model.weights.items()}) for scale in (1.0, 1.3, 0.7)]
    requests = [Request(tuple(model.tokenizer.encode(words(np.random.default_rng(n), 4))), 3) for n in range(20)]
    together = scorer_of(*others).score(requests)
    for place, each in enumerate(others):
        alone = scorer_of(each).score(requests)
        # on a CPU batched products sum in another order than lone ones
        np.testing.assert_allclose(together.logprobs[place], alone.logprobs[0], rtol=1e-5)
        assert (together.greedy[place] == alone.greedy[0]).all()


def test_empty_rows_and_places_that_fill_a_batch_up_change_nothing(model):
    requests = [Request(tuple(range(1, 4 + n)), 2) for n in range(40)]
    trimmed, whole = scorer_of(model), scorer_of(model)
    whole.whole = True
    one, other = trimmed.score(requests), whole.score(requests)
    # on a CPU a product of other height sums in another order
    np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=1e-5)
    assert (one.greedy == other.greedy).all()


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU has a test of its own")
def test_with_the_kernels_a_stack_has_the_bits_of_each_alone(monkeypatch):
    """On Triton's interpreter: every operator of the forward as a GPU would take it."""
    users = [import_module(f"engine.{name}") for name in ("models", "models.llama", "models.cache", "score")]
    for kernel in ("linear", "norm", "embedding", "attention", "activation", "loss"):
        for name, form in vars(import_module(f"kernels.{kernel}")).items():
            for user in users if name.endswith("_triton") else []:
                if hasattr(user, name.removesuffix("_triton")):
                    monkeypatch.setattr(user, name.removesuffix("_triton"), form)
    monkeypatch.setattr(score, "SLICE", 16)
    config = LlamaConfig(depth=1, width=32, heads=2, kv_heads=1, mlp_width=48, context=64, vocabulary=320)
    models = [LoadedModel("random", config, initial_weights(config, seed), ByteTokenizer()) for seed in range(3)]
    requests = [Request(tuple(range(3, 10 + n)), 4) for n in range(4)]

    def ask(*some) -> np.ndarray:
        scorer = scorer_of(*some)
        scorer.tokens, scorer.whole = 64, True
        return scorer.score(requests).logprobs

    together = ask(*models)
    assert [ask(each)[0].tobytes() for each in models] == [each.tobytes() for each in together]
    for request, logprob in zip(requests, together[0], strict=True):
        loss, _ = loss_and_greedy(models[0], list(request.tokens), request.first)
        # fp32 sums in another order
        assert logprob == pytest.approx(-loss * (len(request.tokens) - request.first), rel=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_on_a_gpu_a_stack_has_the_bits_of_each_alone(tmp_path, precision):
    config = tiny(tmp_path, x="tokens:linear:128:384:4", context=32, depth=2, width=64, heads=1, precision=precision)
    write_items(tmp_path)
    for name, cells in (("many", "3x4"), ("one", "1,2")):
        run_sweep(config, RunOptions(store=str(tmp_path / name), quiet=True, device="cuda"))
        store = open_store(tmp_path / name)
        score_cells(
            store, chosen_cells(store, cells), load_tasks(["core:several"], str(tmp_path), 0, None), "cuda", silent
        )
    many, one = (stored_tasks(open_store(tmp_path / name))[0] for name in ("many", "one"))
    for name in many.specs:
        assert many.read(name)[0, 1, 2].tobytes() == one.read(name)[0, 1, 2].tobytes(), name
