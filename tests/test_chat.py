"""The command that talks: cells and checkpoints answer, broken ones say so, and what cannot be asked is one line."""

import sys
from io import StringIO
from types import SimpleNamespace

import pytest
import torch
from test_command import fails
from tiny import sweep, tiny

from engine.chat import form_of, main
from engine.checkpoint import load_model
from engine.config import make_config
from engine.replay import check_text, replay_cell, save_weights
from engine.store import Store
from engine.store_v1 import StoreV1
from engine.tokenizer import REPLY, ByteTokenizer, reply_prompt, text_prompt

MARKS = ByteTokenizer


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    """4 x 2 cells on chats; the uppermost rows break."""
    folder = tmp_path_factory.mktemp("chat")
    config = tiny(folder, y="lr:log:1e-2:1e30:4", x="tokens:linear:256:1024:2", context=32)
    return sweep(config, folder / "s")


@pytest.fixture(scope="module")
def saved(store, tmp_path_factory):
    """A cell as a checkpoint."""
    path = str(tmp_path_factory.mktemp("saved") / "cell")
    save_weights(path, replay_cell(store, 0, 1, "cpu"))
    return path


def said(monkeypatch, capsys, *words: str, typed: str = "") -> str:
    """What the command prints."""
    monkeypatch.setattr(sys, "argv", ["chat.py", "--device", "cpu", *words])
    monkeypatch.setattr(sys, "stdin", StringIO(typed))
    capsys.readouterr()
    main()
    return capsys.readouterr().out


def test_a_cell_says_what_its_saved_weights_say(store, saved, monkeypatch, capsys):
    # greedily, in the form in which it was taught, which only the store knows of bytes
    words = ["--temperature", "0", "--prompt", "the cat"]
    text = said(monkeypatch, capsys, "--store", str(store.path), "--row", "0", "--col", "1", *words)
    assert text == said(monkeypatch, capsys, "--model", saved, "--form", "chat", *words)
    model, (prompt, ends) = load_model(saved), reply_prompt(ByteTokenizer(), [{"role": "user", "content": "the cat"}])
    reply: list[int] = []
    while len(prompt) + len(reply) < 32 and not ends.intersection(reply):  # without a cache
        reply.append(int(model.logits(torch.tensor([prompt + reply]))[0, -1].argmax()))
    assert text.startswith(ByteTokenizer().decode([token for token in reply if token not in ends]))


def test_cells_side_by_side_say_what_each_says_alone(store, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "400")
    words = ["--store", str(store.path), "--prompt", "red mat", "--seed", "5", "--temperature", "0.9"]
    table = said(monkeypatch, capsys, *words, "--compare", "0,1", "3,0", "0,0")
    assert "converged" in table and "[no text: its loss is not finite since step" in table
    for col in ("0", "1"):
        alone = said(monkeypatch, capsys, *words, "--row", "0", "--col", col)
        assert " ".join(alone.split()) in " ".join(table.split())


def test_a_broken_cell_is_one_line(store, monkeypatch, capsys):
    text = said(monkeypatch, capsys, "--store", str(store.path), "--row", "3", "--col", "1", "--prompt", "red")
    assert text.count("\n") == 1 and text.startswith("cell (3, 1): learning rate 1e+30, training tokens 1,024; ")
    assert "no text: its loss is not finite since step" in text


def test_a_conversation_goes_on_without_what_does_not_fit(store, saved, monkeypatch, capsys):
    words = ["--model", saved, "--form", "chat", "--temperature", "0", "--tokens", "4"]
    typed = "the cat\n\nred mat\n" + "x" * 40 + "\nrain\n"
    monkeypatch.setattr(sys, "argv", ["chat.py", "--device", "cpu", *words])
    monkeypatch.setattr(sys, "stdin", StringIO(typed))
    main()
    out, err = capsys.readouterr()
    assert out.count("\n") == 3, "three lines were answered, an empty one passed over"
    assert "warning: the prompt has 44 tokens with its marks, but the network reads 32" in err
    assert "[the oldest messages are no longer read: the context is 32 tokens]" in err


def test_a_text_goes_on_behind_its_last_tokens(saved, monkeypatch, capsys):
    words = ["--model", saved, "--temperature", "0"]
    longer = "y" * 50 + "the cat sat on a red mat"
    shorter = said(monkeypatch, capsys, *words, "--form", "text", "--prompt", longer[-24:])
    assert shorter == said(monkeypatch, capsys, *words, "--prompt", longer[-40:]), "without a template: text"
    monkeypatch.setattr(sys, "argv", ["chat.py", *words, "--prompt", longer])
    main()
    assert "[only the last 24 of 75 tokens are read: the context is 32]" in capsys.readouterr().err


def test_an_interrupted_conversation_has_nothing_to_go_on_with(saved, monkeypatch, capsys):
    def interrupted(options):
        yield "the cat"
        raise KeyboardInterrupt

    monkeypatch.setattr("engine.chat.prompts", interrupted)
    monkeypatch.setattr(sys, "argv", ["chat.py", "--model", saved, "--tokens", "2"])
    with pytest.raises(SystemExit) as end:
        main()
    out, err = capsys.readouterr()
    assert end.value.code == 130 and out and not err


def test_a_reply_does_not_steer_the_terminal(saved, monkeypatch, capsys):
    monkeypatch.setattr(ByteTokenizer, "decode", lambda self, tokens: "\x1b[2J\x9b1m" + "é\n" * len(tokens))
    text = said(monkeypatch, capsys, "--model", saved, "--prompt", "a", "--tokens", "2")
    assert text.startswith("\ufffd[2J\ufffd1mé\n") and "\x1b" not in text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "expected --store with a cell, or --model with a checkpoint"),
        (["--store", "S", "--model", "smollm2"], "give one of them"),
        (["--store", "S"], "no cell is named; expected --row and --col of one, or --compare"),
        (["--store", "S", "--row", "0", "--compare", "0,1"], "got --row beside --compare"),
        (["--store", "S", "--row", "4"], "cell (4, 0) lies outside the grid of 4 rows and 2 columns"),
        (["--store", "S", "--compare", "0,0", "1,2"], "cell (1, 2) lies outside the grid"),
        (["--store", "S", "--compare", "1;2"], "compare is '1;2'; expected row,column of each cell"),
        (["--store", "S", "--row", "0", "--replicate", "1"], "lies outside the grid of 4 rows and 2 columns and 1 rep"),
        (["--store", "S", "--row", "0", "--prompt", "x" * 40], "the prompt has 44 tokens with its marks, but the net"),
        (["--store", "nowhere", "--row", "0"], "nowhere"),
        (["--model", "nowhere"], "nowhere does not exist"),
        (["--model", "M", "--temperature", "-1"], "temperature is -1.0; expected at least 0"),
        (["--model", "M", "--temperature", "nan"], "temperature is nan"),
        (["--model", "M", "--top-k", "-2"], "top_k is -2; expected at least 1, or 0"),
        (["--model", "M", "--top-p", "0"], "top_p is 0.0; expected above 0"),
        (["--model", "M", "--seed", "-1"], "seed is -1; expected a whole number from 0"),
        (["--model", "M", "--tokens", "0"], "tokens is 0; expected at least 1"),
        (["--model", "M", "--form", "poem"], "form is 'poem'; expected one of auto, chat, text"),
        (["--model", "M", "--device", "tpu"], "device is 'tpu'"),
    ],
)
def test_what_cannot_be_asked_is_one_line(store, saved, capsys, monkeypatch, words, says):
    monkeypatch.setattr("engine.chat.cell_speakers", known_cells(saved))
    there = {"S": str(store.path), "M": saved}
    words = [there.get(word, word) for word in words]
    assert says in fails(capsys, main, "chat.py", ["--prompt", "a", *words])


def known_cells(saved: str):
    """Cells without training them again: this test asks what is said of faults."""
    from engine.chat import Speaker

    return lambda store, places, options: ([Speaker("cell", "", load_model(saved)) for _ in places], "chat")


def test_a_store_without_text_is_refused():
    paper = SimpleNamespace(path="S", config=make_config(network="two_layer"))
    with pytest.raises(ValueError, match="S is of network two_layer, which has no text"):
        check_text(paper)
    old = object.__new__(StoreV1)
    old.path = "S"
    with pytest.raises(ValueError, match="S has store format 1, whose cells are not replayed"):
        check_text(old)


def test_bytes_are_taught_their_form_by_the_data(tmp_path, store):
    from engine.api import prepare_stored

    assert form_of(ByteTokenizer(), prepare_stored(store, "cpu").corpus) == "chat"
    assert form_of(ByteTokenizer(), None) == "text"
    plain = tmp_path / "plain.txt"
    plain.write_text("\n\n".join("the cat sat on a red mat while rain fell over stones" for _ in range(60)))
    text = sweep(tiny(tmp_path, data=str(plain)), tmp_path / "s")
    assert form_of(ByteTokenizer(), prepare_stored(text, "cpu").corpus) == "text"


def test_a_prompt_is_all_that_stands_before_a_reply():
    tokenizer = ByteTokenizer()
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    prompt, ends = reply_prompt(tokenizer, messages)
    assert tokenizer.decode(prompt) == (
        "<|bos|><|user_start|>a<|user_end|><|assistant_start|>b<|assistant_end|><|user_start|>c<|user_end|><|assistant_start|>"
    )
    assert ends == {MARKS.assistant_end, MARKS.bos}
    asked = [{"role": "user", "content": REPLY}]
    assert tokenizer.decode(reply_prompt(tokenizer, asked)[0]).count(REPLY) == 1
    assert text_prompt(tokenizer, [{"role": "user", "content": "ab"}]) == (
        [MARKS.bos, 97, 98],
        {MARKS.assistant_end, MARKS.bos},
    )
    assert text_prompt(tokenizer, []) == ([MARKS.bos], {MARKS.assistant_end, MARKS.bos})
