"""What cells write before and after training: `uv run analysis/samples.py --store S`.

The chosen cells are trained again, and with the weights they started from they go on with the same prompts, greedily.
The texts are kept in the store, where the report reads them; cells that were sampled before are replaced.
"""

if __name__ == "__main__" and not __package__:
    import started  # noqa: F401  says how to start it where its packages are missing

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from analysis.evaluate import boundary_cells, chosen_cells, starts_of
from analysis.recommend import recommend
from engine.command import parse, screen, user_errors
from engine.grid import Grid
from engine.outcome import Thresholds, measured, trains
from engine.replay import check_text
from engine.store import Store, open_store

if TYPE_CHECKING:
    from engine.checkpoint import LoadedModel

KEY = "samples.json"
QUESTIONS = ("Hello! How are you?", "What is the capital of France?", "Write a sentence about rain.")
SHOWN = 60  # letters of a text in a sentence
BROKEN = "(not finite: no text)"
STACK = 4  # weights that write at once; more would fill a laptop's memory
Place = tuple[int, ...]
"""a cell in [replicate, *cells]"""


@dataclass(frozen=True)
class Sample:
    """What one cell writes: a text a prompt, before training and after it."""

    place: Place
    why: str  # it was chosen
    start: list[str]
    end: list[str]


@dataclass(frozen=True)
class Samples:
    """The texts that a store keeps, all greedy."""

    prompts: list[str]
    form: str  # chat: the prompts are a user's messages; text: they are gone on with
    tokens: int  # of a text, at most
    cells: list[Sample]


def read_samples(store: Store) -> Samples | None:
    """What is kept; None without samples."""
    kept = store.place.get(KEY)
    if kept is None:
        return None
    fields = json.loads(kept)
    cells = [Sample(**{**each, "place": tuple(each["place"])}) for each in fields.pop("cells")]
    return Samples(cells=cells, **fields)


def write_samples(store: Store, samples: Samples) -> None:
    """Keep them, in place of others."""
    store.place.put(KEY, json.dumps(asdict(samples), indent=1, ensure_ascii=False).encode())


def cut(text: str) -> str:
    """The beginning of a text."""
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"


def sample_notes(store: Store, cell: tuple[int, ...] | None) -> list[str]:
    """What a cell writes behind the first prompt, before training and after; [] where it has not been sampled."""
    samples = read_samples(store)
    if samples is None or cell is None:
        return []
    where, prompt = ",".join(map(str, cell)), samples.prompts[0]
    texts = [(each.start[0], each.end[0]) for each in samples.cells if each.place[1:] == cell]
    quoted = [[cut(" ".join(text.split())) for text in both] for both in texts[:1]]
    return [f'Cell {where} answers "{prompt}" before training with "{a}", after it with "{b}".' for a, b in quoted]


def default_places(store: Store) -> dict[Place, str]:
    """The recommended cell of the first replicate, the last that trains on the way up from it, and a broken one.

    The broken one is the last of that way whose weights are finite, else the first that breaks.

    Raises:
        ValueError: nothing is recommended, and nothing breaks.
    """
    found: dict[Place, str] = {}
    best = recommend(store).cell()
    if best is not None:
        found[(0, *best)] = "best"
    labels = store.labels(Thresholds())[0]
    broken = measured(labels) & ~trains(labels)
    if isinstance(store.run.cells, Grid):
        column = best[1] if best is not None else 0
        for cell in (cell for cell in boundary_cells(store) if cell[1] == column and not broken[cell]):
            found.setdefault((0, *cell), "at the border")
        inside = np.zeros_like(broken)
        inside[:, column] = True
        broken = broken & inside if (broken & inside).any() else broken
    writes = broken & (store.read("nonfinite_step", 0) < 0)
    chosen = np.argwhere(writes if writes.any() else broken)
    if len(chosen):
        found.setdefault((0, *map(int, chosen[-1 if writes.any() else 0])), "broken")
    if not found:
        raise ValueError(f"{store.path} has no cell that trains or breaks; expected measured ones: give --cells")
    return found


def sample(store: Store, places: dict[Place, str], prompts: Sequence[str], most: int, device: str) -> Samples:
    """What cells write, trained again.

    Raises:
        ValueError: a store whose cells write no text, or no prompt that fits the context.
    """
    from engine.chat import check_prompt, form_of
    from engine.replay import cell_models, language_setup

    setup = language_setup(store, device)
    flat = {place: int(np.ravel_multi_index(place, store.run.shape)) for place in places}
    finite = [place for place in places if store.read("nonfinite_step")[place] < 0]
    start_of = starts_of(store, np.array(list(flat.values())))
    starts = {
        start_of[cell]: setup.start(cell) for cell in dict(zip(start_of.values(), start_of, strict=True)).values()
    }
    first = next(iter(starts.values()))
    form = form_of(first.tokenizer, setup.corpus)
    for prompt in prompts:
        check_prompt(first, form, prompt)
    before = dict(zip(starts, texts_of(list(starts.values()), form, prompts, most, setup.device), strict=True))
    models = cell_models(store, setup, finite)
    after = dict(zip(models, texts_of(list(models.values()), form, prompts, most, setup.device), strict=True))
    nothing = [BROKEN] * len(prompts)
    cells = [
        Sample(place, why, before[start_of[flat[place]]], after.get(place, nothing)) for place, why in places.items()
    ]
    return Samples(list(prompts), form, most, cells)


def texts_of(
    models: Sequence["LoadedModel"], form: str, prompts: Sequence[str], most: int, device: Any
) -> list[list[str]]:
    """What each model writes behind each prompt, greedily."""
    from engine.chat import shown_text
    from engine.generate import Generator, replies
    from engine.sampling import GREEDY
    from engine.tokenizer import PROMPTS

    written: list[list[str]] = []
    for first in range(0, len(models), STACK):
        some = models[first : first + STACK]
        tokenizer, context = some[0].tokenizer, some[0].config.context
        asked = [PROMPTS[form](tokenizer, [{"role": "user", "content": prompt}]) for prompt in prompts]
        texts = [prompt[-(context - 1) :] for prompt, _ in asked]
        generator = Generator(some[0], [model.weights for model in some], len(texts), GREEDY, device)
        *_, said = replies(generator, [texts] * len(some), [[ends for _, ends in asked]] * len(some), most)
        for own in said:
            written.append([shown_text(tokenizer.decode(each.tokens)) if each.finite else BROKEN for each in own])
    return written


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which cells write, and behind what."""

    store: str  # path of the sweep's store
    cells: str = ""  # a list (`1,2 3,4`), best (of each column), boundary (default: best, broken, at the border)
    prompts: list[str] = field(default_factory=list)  # what they go on with (default: three of its own)
    tokens: int = 48  # of a text, at most
    device: str = "auto"  # cpu or cuda; auto: cuda if there is one


def samples_table(samples: Samples) -> Table:
    """A row a cell and prompt."""
    table = Table(show_lines=True)
    for name in ("cell", "prompt", "before", "after"):
        table.add_column(name, overflow="fold")
    for each in samples.cells:
        for prompt, start, end in zip(samples.prompts, each.start, each.end, strict=True):
            table.add_row(f"{','.join(map(str, each.place[1:]))} ({each.why})", prompt, start, end)
    return table


def main() -> None:
    """Sample, keep and show."""
    options = parse(Options, "What cells write before and after training, kept in the store for its report.")
    with user_errors():
        if options.tokens < 1:
            raise ValueError(f"tokens is {options.tokens}; expected at least 1")
        store = open_store(options.store)
        check_text(store)
        if options.cells:
            places = dict.fromkeys(chosen_cells(store, options.cells, 1), "chosen")
        else:
            places = default_places(store)
        made = sample(store, places, options.prompts or QUESTIONS, options.tokens, options.device)
        write_samples(store, made)
        screen().print(samples_table(made))


if __name__ == "__main__":
    main()
