"""How a token is chosen from what a network says; without torch, so that flags and help need none."""

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.6  # divides the logits (0: always the likeliest token)
    top_k: int = 50  # only the k likeliest tokens (0: all)
    top_p: float = 1.0  # of these only the likeliest, until their probabilities add up to p
    seed: int = 0  # of the random numbers

    def check(self) -> None:
        """Raise ValueError for a setting that chooses nothing."""
        if not (0 <= self.temperature < math.inf):
            raise ValueError(f"temperature is {self.temperature}; expected at least 0, which takes the likeliest token")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; expected at least 1, or 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; expected above 0 and at most 1, which is all tokens")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed is {self.seed}; expected a whole number from 0")

    def numbers(self, turn: int, count: int) -> np.ndarray:
        """One number in [0, 1) for each token of a turn of the conversation, fp32 [count]."""
        generator = np.random.Generator(np.random.Philox(key=np.array([self.seed, turn], np.uint64)))
        return generator.random(count, dtype=np.float32)


GREEDY = Sampling(temperature=0.0)
