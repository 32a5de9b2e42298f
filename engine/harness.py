"""A replica of a stack as lm-evaluation-harness takes a model: it asks all replicas at once, and answers for one.

Imported only where the harness is: its classes are the base of ours.
"""

from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from engine.generate import Generator, replies
from engine.sampling import GREEDY
from engine.score import Request, Scorer, cut_left, encode

ROWS = {"cuda": 16, "cpu": 4}  # texts of each replica that are written at once
LONGEST = 256  # tokens that are generated where a task does not say how many


class Asked:
    """What a stack has been asked, so that its second replica finds the answers of the first one's requests."""

    def __init__(self, scorer: Scorer, tokenizer: Any) -> None:
        self.scorer, self.tokenizer = scorer, tokenizer
        self.ending = {tokenizer.eos, tokenizer.padding}
        self.cut = 0
        self.broken = np.zeros(scorer.replicas, bool)  # replicas that have answered NaN
        self.encoded: dict[str, list[int]] = {}
        self.answers: dict[Request, list[tuple[float, bool]]] = {}
        self.texts: dict[tuple[str, str], list[str]] = {}

    def encode(self, text: str) -> list[int]:
        """A text's tokens."""
        if text not in self.encoded:
            self.encoded[text] = encode(self.tokenizer, text)
        return self.encoded[text]

    def score(self, requests: list[Request]) -> list[list[tuple[float, bool]]]:
        """(log-probability, greedy) of every replica, a request each."""
        new = [each for each in dict.fromkeys(requests) if each not in self.answers]
        if new:
            fitting, cut = cut_left(new, self.scorer.context)
            self.cut += cut
            logprobs, greedy = self.scorer.score(fitting)
            self.broken |= np.isnan(logprobs).any(1)
            for index, request in enumerate(new):
                pairs = zip(logprobs[:, index].tolist(), greedy[:, index].tolist(), strict=True)
                self.answers[request] = list(pairs)
        return [self.answers[request] for request in requests]

    def generate(self, prompts: list[tuple[str, dict[str, Any]]]) -> list[list[str]]:
        """What every replica goes on with, greedily, up to what the task says ends it."""
        keys = [(text, repr(sorted(options.items()))) for text, options in prompts]
        of_length: dict[int, dict[tuple[str, str], tuple[list[int], list[str]]]] = {}
        for key, (text, options) in zip(keys, prompts, strict=True):
            if key not in self.texts:
                most = min(int(options.get("max_gen_toks", LONGEST)), self.scorer.context - 1)
                until = options.get("until") or []
                own = self.encode(text) or [self.tokenizer.bos]
                self.cut += len(own) > self.scorer.context - most
                stops = [until] if isinstance(until, str) else list(until)
                of_length.setdefault(most, {})[key] = own[most - self.scorer.context :], stops
        for most, asked in of_length.items():
            self.generate_alike(asked, most)
        return [self.texts[key] for key in keys]

    def generate_alike(self, asked: dict[tuple[str, str], tuple[list[int], list[str]]], most: int) -> None:
        """Texts of at most so many tokens behind prompts, which end at one of their stops, shorter prompts first."""
        rows, replicas = ROWS[self.scorer.device.type], self.scorer.replicas
        generator = Generator(self.scorer.model, self.scorer.weights(), rows, GREEDY, self.scorer.device)
        keys = sorted(asked, key=lambda key: len(asked[key][0]))
        for start in range(0, len(keys), rows):
            some = keys[start : start + rows]
            # rows that are missing repeat the last
            filled = [asked[key] for key in some + some[-1:] * (rows - len(some))]

            def stopped(row: int, tokens: list[int], filled: list[Any] = filled) -> bool:
                text = self.tokenizer.decode(tokens)
                return any(stop in text for stop in filled[row][1])

            texts, ends = [[prompt for prompt, _ in filled]] * replicas, [[self.ending] * rows] * replicas
            *_, said = replies(generator, texts, ends, most, stopped=stopped)
            self.broken |= [not all(reply.finite for reply in own) for own in said]
            for row, key in enumerate(some):
                self.texts[key] = [self.text_of(own[row].tokens, asked[key][1]) for own in said]

    def text_of(self, said: list[int], stops: list[str]) -> str:
        """A continuation before what ended it."""
        text = self.tokenizer.decode(said)
        for stop in filter(None, stops):
            text = text.split(stop)[0]
        return text


class CellModel(TemplateLM):
    """One replica."""

    def __init__(self, asked: Asked, replica: int) -> None:
        super().__init__()
        self.asked, self.replica = asked, replica

    @property
    def eot_token_id(self) -> int:
        """What ends a reply."""
        return self.asked.tokenizer.eos

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        return self.asked.tokenizer.bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """A text's tokens, without marks."""
        return self.asked.encode(string)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """As the harness defines it."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        return self.own(self.asked.score([Request((*before, *after), len(before)) for _, before, after in requests]))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """As the harness defines it: every token once, in windows of the context."""
        texts = [
            [
                Request((*before, *after), len(before))
                for before, after in map(
                    make_disjoint_window,
                    get_rolling_token_windows(
                        self.tok_encode(request.args[0]), self.prefix_token_id, self.asked.scorer.context, 1
                    ),
                )
            ]
            for request in requests
        ]
        answers = iter(self.own(self.asked.score([window for text in texts for window in text])))
        return [sum(next(answers)[0] for _ in text) for text in texts]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """As the harness defines it, always the likeliest token."""
        return self.own(self.asked.generate([request.args for request in requests]))

    def own(self, answers: list[list[Any]]) -> list[Any]:
        """This replica's."""
        return [each[self.replica] for each in answers]
