"""What the tests of scoring share: a tiny network, its stack, items, and losses by hand."""

import json
from pathlib import Path

import numpy as np
import torch
from tiny import WORDS

from engine.checkpoint import LoadedModel
from engine.models.gpt import GPTConfig, initial_weights
from engine.score import Scorer
from engine.tokenizer import ByteTokenizer

CPU = torch.device("cpu")
silent = str.upper  # told what is done, says nothing


def words(source: np.random.Generator, count: int) -> str:
    """Some words, one after another."""
    return " ".join(source.choice(WORDS, count))


def write_items(folder: Path) -> Path:
    """A file of every kind of line in a folder, always the same ones."""
    source = np.random.default_rng(0)
    lines = {
        "several": lambda: {
            "query": words(source, 3),
            "choices": [words(source, count) for count in (2, 1, 4)],
            "gold": int(source.integers(3)),
        },
        "contexts": lambda: {
            "context_options": [words(source, 3), words(source, 2)],
            "continuation": words(source, 2),
            "gold": int(source.integers(2)),
        },
        "one": lambda: {"context": words(source, 3) + " ", "continuation": words(source, 1)},
    }
    for name, line in lines.items():
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(line()) for _ in range(12)), "utf-8")
    return folder


def byte_model() -> LoadedModel:
    """A byte-level network of sharp opinions, with a context that holds every item."""
    config = GPTConfig(depth=1, width=16, heads=1, kv_heads=1, context=256, vocabulary=320)
    weights = initial_weights(config, 3)
    weights["unembedding.weight"] = torch.randn(320, 16, generator=torch.Generator().manual_seed(0))
    return LoadedModel("random", config, weights, ByteTokenizer())


def scorer_of(*models, precision="fp32") -> Scorer:
    scorer = Scorer(models[0], len(models), precision, CPU)
    for slot, each in enumerate(models):
        scorer.load(slot, each.weights)
    return scorer


def loss_and_greedy(model, tokens, start: int):
    """Mean loss of the tokens from `start` on, and whether each is the likeliest, from whole logits."""
    logits = model.logits(torch.tensor([tokens]))[0, :-1].log_softmax(-1)
    targets = torch.tensor(tokens[1:])
    losses = -logits.gather(1, targets[:, None])[:, 0]
    return float(losses[start - 1 :].mean()), bool((logits.argmax(-1) == targets)[start - 1 :].all())
