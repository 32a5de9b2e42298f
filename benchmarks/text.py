"""How fast a checkpoint writes, alone and beside others, and whether it writes the same: `uv run benchmarks/text.py`.

Greedily first, against the argmax of the whole text (computed on the CPU, without a cache); then sampled, in stacks of
several replicas whose other weights are noisy ones, against the text of the replica alone. The rate is that of the
second half of the tokens, behind compiling and capturing.
"""

if __name__ == "__main__" and not __package__:
    import started  # noqa: F401  says how to start it where its packages are missing

import time
from dataclasses import dataclass

from engine.command import parse, user_errors
from engine.sampling import GREEDY, Sampling


@dataclass(frozen=True)
class Options:
    """What writes, and how much."""

    model: str = "smollm2"  # as the sweep's --model
    prompt: str = "What is gravity?"  # what it is asked
    tokens: int = 200  # of a text
    replicas: int = 8  # of the largest stack
    device: str = "cuda"  # cuda, or cpu to try the benchmark itself


if __name__ == "__main__":
    parse(Options, __doc__.split("\n\n")[0])  # before what takes seconds to import

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from benchmarks.arguments import check_positive
from benchmarks.timing import append_rows, ready
from engine.chat import form_of
from engine.checkpoint import LoadedModel, load_model
from engine.generate import Generator
from engine.ranks import choose_device
from engine.tokenizer import PROMPTS

NOISE = 0.02  # of the other replicas' weights, relative


class Writer:
    """One network and one prompt; its rows gather."""

    def __init__(self, model: LoadedModel, prompt: list[int], tokens: int, device: torch.device) -> None:
        self.model, self.prompt, self.tokens, self.device = model, prompt, tokens, device
        self.rows: list[dict[str, object]] = []

    def write(self, weights: Sequence[Mapping[str, Tensor]], sampling: Sampling) -> list[list[int]]:
        """The text of each of some weights in a stack, timed."""
        generator = Generator(self.model, weights, 1, sampling, self.device)
        told, texts = [time.perf_counter()], []
        for tokens in generator.generate([[self.prompt]] * len(weights), self.tokens):
            texts.append([token for (token,) in tokens])
            told.append(time.perf_counter())
        steady = told[len(told) // 2 :]
        rate = (len(steady) - 1) / (steady[-1] - steady[0])
        self.rows.append(
            {
                "model": self.model.path,
                "replicas": len(weights),
                "temperature": sampling.temperature,
                "tokens": len(texts),
                "first_s": round(told[1] - told[0], 2),
                "tokens_per_second": round(rate, 1),
                "of_all": round(rate * len(weights), 1),
                "agree": "",
                "with": "",
            }
        )
        return [list(text) for text in zip(*texts, strict=True)]

    def agrees(self, same: int, with_what: str) -> None:
        """Say of the last row how many of its tokens agree, and with what."""
        self.rows[-1] |= {"agree": same, "with": with_what}


def measure(options: Options) -> list[dict[str, object]]:
    """Rows of results/text.csv: alone and greedy, alone and sampled, in a stack."""
    check_positive(options, "tokens", "replicas")
    device = choose_device(options.device)
    model = load_model(options.model)
    asked = [{"role": "user", "content": options.prompt}]
    prompt, _ = PROMPTS[form_of(model.tokenizer, None)](model.tokenizer, asked)
    writer, weights = Writer(model, prompt, options.tokens, device), model.fp32_weights
    (greedy,) = writer.write([weights], GREEDY)
    forced = model.logits(torch.tensor([prompt + greedy]))[0].argmax(-1).tolist()[len(prompt) - 1 : -1]
    writer.agrees(agreeing(greedy, forced), "teacher forcing on the CPU")

    sampling = Sampling(temperature=0.8, top_k=50, top_p=0.95, seed=1)
    (alone,) = writer.write([weights], sampling)
    (again,) = writer.write([weights], sampling)
    writer.agrees(agreeing(again, alone), "the same again")
    random = torch.Generator().manual_seed(0)
    others = [
        {name: w * (1 + NOISE * torch.randn(w.shape, generator=random)) for name, w in weights.items()}
        for _ in range(options.replicas - 1)
    ]
    place = options.replicas // 2
    stack = writer.write([*others[:place], weights, *others[place:]], sampling)
    writer.agrees(agreeing(stack[place], alone), "alone")
    return writer.rows


def agreeing(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens up to the first that differs."""
    differ = [place for place, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]
    return differ[0] if differ else len(one)


def main() -> None:
    """The command."""
    options = parse(Options, __doc__.split("\n\n")[0])
    with user_errors():
        if options.device != "cpu":
            ready()
        rows = measure(options)
    for row in rows:
        said = (
            "{replicas} replicas at temperature {temperature}: first token after {first_s} s, then {tokens_per_second} "
        )
        print((said + "tokens/s, {of_all} of all").format(**row))
        if row["with"]:
            print("  {agree} of {tokens} tokens agree with {with}".format(**row))
    if options.device != "cpu":
        print(f"rows appended to {append_rows('text.csv', rows)}")


if __name__ == "__main__":
    main()
