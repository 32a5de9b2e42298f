"""Talk to a cell of a sweep, or to a checkpoint: `uv run engine/chat.py --store S --row I --col J`.

The cell is trained again, since nothing but its measurements was kept. What a chat template has taught roles answers
in them; any other network goes on with the text. `--compare 1,2 3,4` lets several cells answer at once, in one stack.
"""

if __name__ == "__main__" and not __package__:
    import started  # noqa: F401  says how to start it where its packages are missing

import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich.live import Live
from rich.table import Table

from engine.command import parse, screen, user_errors, warn
from engine.replay import cell_models, cell_name, check_text, language_setup, place_of
from engine.sampling import Sampling
from engine.tokenizer import PROMPTS, reply_prompt

if TYPE_CHECKING:
    from engine.checkpoint import LoadedModel
    from engine.data import Corpus
    from engine.generate import Reply
    from engine.store import Store

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""characters that would steer the terminal"""
ROOM = 4  # a conversation leaves a reply at least one in so many tokens of the context


@dataclass(frozen=True, kw_only=True)
class Options(Sampling):
    """Who is asked, and how."""

    store: str = ""  # a sweep's store, for one of its cells
    row: int = -1  # row of the cell, from 0; of a list of points, the point
    col: int = 0  # column of the cell, from 0
    replicate: int = 0  # replicate of the cell, from 0
    compare: list[str] = field(default_factory=list)  # several cells instead, row,column each: 1,2 3,4
    model: str = ""  # a checkpoint instead of a store, as the sweep's --model takes it
    prompt: str = ""  # what is asked, once; without it, a conversation is read from the terminal
    form: str = "auto"  # chat: in roles; text: the network goes on with it; auto: as it was taught
    tokens: int = 256  # of a reply, at most
    device: str = "auto"  # cpu or cuda; auto: cuda if there is one


class Speaker(NamedTuple):
    """One set of weights that answers: what it is called, and why it cannot, or its weights."""

    name: str
    broken: str = ""
    model: "LoadedModel | None" = None


# ---- who is asked


def chosen_places(store: "Store", options: Options) -> list[tuple[int, ...]]:
    """The cells that are asked for, in [replicate, *cells]. Raises ValueError for any that is none."""
    if not options.compare:
        if options.row < 0:
            raise ValueError("no cell is named; expected --row and --col of one, or --compare with several")
        return [place_of(store, options.row, options.col, options.replicate)]
    if options.row >= 0:
        raise ValueError("got --row beside --compare; expected one of them: give that cell to --compare too")
    places = []
    for each in options.compare:
        if not re.fullmatch(r"\d+(,\d+)?", each):
            raise ValueError(f"compare is {each!r}; expected row,column of each cell, such as 1,2 3,4")
        row, _, col = each.partition(",")
        places.append(place_of(store, int(row), int(col or 0), options.replicate))
    return list(dict.fromkeys(places))


def cell_speakers(store: "Store", places: Sequence[tuple[int, ...]], options: Options) -> tuple[list[Speaker], str]:
    """The cells of a store, trained again where their weights are finite, and the form of what they were taught."""
    broken = {place: int(store.read("nonfinite_step")[place]) for place in places}
    whole, models, form = [place for place in places if broken[place] < 0], {}, "text"
    if whole:
        began, setup = time.perf_counter(), language_setup(store, options.device)
        start = setup.start(int(np.ravel_multi_index(whole[0], store.run.shape)))
        form = form_of(start.tokenizer, setup.corpus)
        check_prompt(start, form if options.form == "auto" else options.form, options.prompt)
        models = cell_models(store, setup, whole)
        counted = cell_name(store, whole[0]) if len(whole) == 1 else f"{len(whole)} cells"
        took = f"; trained again ({time.perf_counter() - began:.1f} s)"
        screen(stderr=True, soft_wrap=True).print(counted + took, style="dim")
    said = "no text: its loss is not finite since step {}"
    return [
        Speaker(cell_name(store, place), said.format(broken[place]) if broken[place] >= 0 else "", models.get(place))
        for place in places
    ], form


def form_of(tokenizer: Any, corpus: "Corpus | None") -> str:
    """Whether a network was taught to reply (chat): by its chat template, or by the data it was trained on here."""
    taught = bool(tokenizer.chats)
    if tokenizer.chats is None and corpus is not None:
        prompt, _ = reply_prompt(tokenizer, [{"role": "user", "content": ""}])
        taught = bool((corpus.tokens == prompt[-1]).any())
    return "chat" if taught else "text"


# ---- asking


def shown_text(text: str) -> str:
    """A network's text without characters that would steer a terminal."""
    return CONTROL.sub(UNFINISHED, text)


def check_prompt(model: "LoadedModel", form: str, text: str) -> None:
    """Raise ValueError where a message alone does not fit the context; a text is cut."""
    if form == "text":
        return
    prompt, _ = reply_prompt(model.tokenizer, [{"role": "user", "content": text}])
    if not 0 < len(prompt) < model.config.context:
        raise ValueError(
            f"the prompt has {len(prompt) or 'too many'} tokens with its marks, but the network reads "
            f"{model.config.context} and writes into the same; give a shorter one"
        )


class Conversation:
    """What has been said so far by and to each of several speakers, all of one network."""

    def __init__(self, models: Sequence["LoadedModel"], form: str, options: Options, device: str) -> None:
        """Load the weights into one stack.

        Args:
            form: chat or text.
        """
        from engine.generate import Generator
        from engine.ranks import choose_device

        self.model, self.form, self.most = models[0], form, options.tokens
        self.tokenizer, self.context = self.model.tokenizer, self.model.config.context
        weights = [model.weights for model in models]
        self.generator = Generator(models[0], weights, 1, options, choose_device(device))
        self.messages: list[list[dict[str, Any]]] = [[] for _ in models]
        self.turn = 0
        self.note = ""  # what of the last prompt was not read

    def prompt_of(self, replica: int) -> tuple[list[int], set[int]]:
        """What a speaker reads, and what ends its reply; the oldest messages are left out where they do not fit."""
        messages = self.messages[replica]
        most = self.context - max(self.context // ROOM, 1)
        while True:
            prompt, ends = PROMPTS[self.form](self.tokenizer, messages)
            if 0 < len(prompt) <= most:
                return prompt, ends
            if self.form == "text" or len(messages) == 1:
                break
            del messages[:2]
            self.note = f"[the oldest messages are no longer read: the context is {self.context} tokens]"
        if self.form == "text":
            self.note = f"[only the last {most} of {len(prompt)} tokens are read: the context is {self.context}]"
            prompt = prompt[-most:]
        return prompt, ends

    def ask(self, text: str) -> Iterator[list[str]]:
        """Every speaker's reply so far, longer from step to step; the last ones are remembered.

        Raises ValueError where the text does not fit the context.
        """
        from engine.generate import replies

        check_prompt(self.model, self.form, text)
        self.note = ""
        for messages in self.messages:
            messages.append({"role": "user", "content": text})
        read = [self.prompt_of(replica) for replica in range(len(self.messages))]
        asked, ends = [[prompt] for prompt, _ in read], [[own] for _, own in read]
        said: list[Reply] = []
        for step in replies(self.generator, asked, ends, self.most, self.turn):
            said = [reply for (reply,) in step]
            yield [self.shown(reply, reply.over) for reply in said]
        self.turn += 1
        for reply, messages in zip(said, self.messages, strict=True):
            messages.append({"role": "assistant", "content": self.tokenizer.decode(reply.tokens)})
        longest = max(len(prompt) for prompt, _ in read) + max(len(reply.tokens) for reply in said)
        full = f"[the context of {self.context} tokens is full]" if longest >= self.context else ""
        yield [self.shown(reply, True, "" if reply.over else full) for reply in said]

    def shown(self, reply: "Reply", done: bool, note: str = "") -> str:
        """A reply as text that no later token changes, with what is to be said about it."""
        text = self.tokenizer.decode(reply.tokens)
        text = text if done else text.rstrip(UNFINISHED)
        note = note if reply.finite else "[no more text: its logits are not finite]"
        return shown_text(text) + (f" {note}" if note else "")


# ---- the command


def show(conversation: Conversation, speakers: Sequence[Speaker], text: str) -> None:
    """Ask, and stream the replies: one as it comes, several side by side."""
    console = screen(soft_wrap=len(speakers) == 1)
    whole = [speaker for speaker in speakers if not speaker.broken]
    replies = conversation.ask(text)
    if len(speakers) == 1:
        printed = ""
        for (reply,) in replies:
            new = reply.removeprefix(printed)
            console.print(new, end="")
            console.file.flush()
            printed = reply
        console.print()
    else:
        live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        said: list[str] = []
        with live or nullcontext():
            for said in replies:
                if live:
                    live.update(side_by_side(speakers, whole, said), refresh=True)
        if not live:
            console.print(side_by_side(speakers, whole, said))
    if conversation.note:
        screen(stderr=True, soft_wrap=True).print(conversation.note, style="dim")


def side_by_side(speakers: Sequence[Speaker], whole: Sequence[Speaker], replies: Sequence[str]) -> Table:
    """A column a speaker, and what it says."""
    said = dict(zip([speaker.name for speaker in whole], replies, strict=True))
    table = Table(expand=True)
    for speaker in speakers:
        table.add_column(speaker.name, ratio=1, overflow="fold")
    table.add_row(*[f"[{speaker.broken}]" if speaker.broken else said[speaker.name] for speaker in speakers])
    return table


def prompts(options: Options) -> Iterator[str]:
    """What is asked: the prompt, or lines from the terminal until it ends."""
    if options.prompt:
        yield options.prompt
        return
    asking = sys.stdin.isatty()
    while True:
        if asking:
            screen(stderr=True).print("> ", end="", style="bold")
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


def find_speakers(options: Options) -> tuple[list[Speaker], str]:
    """Who is asked, and the form in which. Raises ValueError where nobody is, or two are meant at once."""
    if bool(options.store) == bool(options.model):
        raise ValueError("expected --store with a cell, or --model with a checkpoint: give one of them")
    if options.form not in ("auto", *PROMPTS):
        raise ValueError(f"form is {options.form!r}; expected one of auto, {', '.join(PROMPTS)}")
    if options.tokens < 1:
        raise ValueError(f"tokens is {options.tokens}; expected at least 1")
    options.check()
    if options.model:
        from engine.checkpoint import load_model

        model = load_model(options.model)
        return [Speaker(options.model, "", model)], form_of(model.tokenizer, None)
    from engine.store import open_store

    store = open_store(options.store)
    check_text(store)
    return cell_speakers(store, chosen_places(store, options), options)


def main() -> None:
    """The command."""
    options = parse(Options, __doc__.split("\n\n")[0])
    with user_errors():
        speakers, taught = find_speakers(options)
        models = [speaker.model for speaker in speakers if speaker.model is not None]
        if not models:
            for speaker in speakers:
                screen(soft_wrap=True).print(f"{speaker.name}; {speaker.broken}")
            return
        form = taught if options.form == "auto" else options.form
        conversation = Conversation(models, form, options, options.device)
        try:
            for text in prompts(options):
                answer(conversation, speakers, text, once=bool(options.prompt))
        except KeyboardInterrupt as stop:
            stop.add_note("")  # nothing is lost that the same command would go on with
            raise


def answer(conversation: Conversation, speakers: Sequence[Speaker], text: str, once: bool) -> None:
    """Show the replies to one prompt; one that cannot be answered ends a conversation only where it is all of it."""
    try:
        show(conversation, speakers, text)
    except ValueError as error:
        if once:
            raise
        warn(str(error))


if __name__ == "__main__":
    main()
