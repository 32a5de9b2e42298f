"""What cells write before and after training: chosen, written greedily, kept in the store, and read by the report."""

import shutil
import sys
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch
from test_command import fails
from tiny import sweep, tiny

from analysis import report
from analysis.recommend import recommend
from analysis.samples import BROKEN, cut, default_places, main, read_samples, sample_notes
from engine import chat, replay
from engine.api import prepare_stored
from engine.outcome import Thresholds, trains
from engine.store import Store, open_store
from engine.tokenizer import ByteTokenizer, reply_prompt
from engine.tracking import cell_frame

PROMPTS = ["the cat", "<b>red</b>"]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    """5 x 2 cells on chats, sampled: the lower rates train, the higher ones break."""
    folder = tmp_path_factory.mktemp("samples")
    config = tiny(folder, y="lr:log:1e-3:1e30:5", x="tokens:linear:256:1024:2", context=32)
    made = sweep(config, folder / "s")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["samples", "--store", str(made.path), "--tokens", "9", "--prompts", *PROMPTS])
        main()
    return open_store(made.path)


def greedy(model, prompt: str, most: int) -> str:
    """A reply by the whole text at every token, without a cache."""
    tokens, ends = reply_prompt(ByteTokenizer(), [{"role": "user", "content": prompt}])
    reply: list[int] = []
    while len(reply) < most and not ends.intersection(reply):
        reply.append(int(model.logits(torch.tensor([tokens + reply]))[0, -1].argmax()))
    return chat.shown_text(ByteTokenizer().decode([token for token in reply if token not in ends]))


def test_a_cell_that_trains_and_one_that_breaks_are_chosen(store):
    places, labels = default_places(store), store.labels(Thresholds())
    assert set(places.values()) <= {"best", "at the border", "broken"} and {"best", "broken"} <= set(places.values())
    for place, why in places.items():
        trained = bool(trains(labels[place]))
        assert trained == (why != "broken"), (place, why)
    columns = {place[2] for place in places}
    assert len(columns) == 1, "they are told apart by their rate alone"


def test_texts_are_greedy_from_the_first_and_the_last_weights(store):
    samples, setup = read_samples(store), prepare_stored(store, "cpu")
    assert samples.prompts == PROMPTS and samples.form == "chat" and samples.tokens == 9
    assert {each.place: each.why for each in samples.cells} == default_places(store)
    for each in samples.cells:
        cell = int(np.ravel_multi_index(each.place, store.run.shape))
        assert each.start == [greedy(setup.start(cell), prompt, 9) for prompt in PROMPTS]
        finite = store.read("nonfinite_step")[each.place] < 0
        model = setup.replay(cell).model if finite else None
        assert each.end == [greedy(model, prompt, 9) if finite else BROKEN for prompt in PROMPTS]
    best = next(each for each in samples.cells if each.why == "best")
    assert best.start != best.end


@pytest.fixture
def copy(store, tmp_path):
    """The store again, to be written into."""
    return Path(shutil.copytree(store.path, tmp_path / "s"))


def test_a_cell_that_is_not_finite_says_so(copy, monkeypatch, capsys):
    words = ["--store", str(copy), "--tokens", "3", "--prompts", "a", "--cells", "4,1"]
    monkeypatch.setattr(sys, "argv", ["samples", *words])
    main()
    [sample] = read_samples(open_store(copy)).cells
    assert sample.place == (0, 4, 1) and sample.end == [BROKEN] and sample.start != [BROKEN]
    assert BROKEN in capsys.readouterr().out


def test_the_report_shows_them_and_trains_nothing(store, monkeypatch):
    monkeypatch.setattr("engine.api.prepare_stored", None)
    monkeypatch.setattr("sys.argv", ["report", "--store", str(store.path)])
    report.main()
    page = (store.figures / "report.html").read_text("utf-8")
    section = page.split('<h2 id="samples">')[1].split("</section>")[0]
    assert "<b>" not in section and "&lt;b&gt;red&lt;/b&gt;" in section
    samples = read_samples(store)
    for each in samples.cells:
        _, row, col = each.place
        assert unescape(section).count(f"{each.why}: {replay.cell_name(store, each.place)}") == 1
        command = f"uv run engine/replay.py --store {store.path} --row {row} --col {col}"
        assert f"{command}</code>" in section and f"{command} --save-weights cell.safetensors</code>" in section
        for text in (*each.start, *each.end):
            assert report.escape(text) in section
    assert "<svg" in section, "their losses"


def test_the_recommendation_quotes_its_cell(store):
    found, samples = recommend(store), read_samples(store)
    best = next(each for each in samples.cells if each.why == "best")
    (note,) = [note for note in found.notes() if "before training with" in note]
    assert note.startswith(f'Cell {best.place[1]},{best.place[2]} answers "the cat" before training with "')
    assert sample_notes(store, (best.place[1], 1 - best.place[2])) == [], "the other column was not sampled"
    assert cut("x" * 60) == "x" * 60 and cut("x" * 61) == "x" * 59 + "…"


def test_a_store_without_samples_has_no_such_section(copy, monkeypatch):
    (copy / "samples.json").unlink()
    made = open_store(copy)
    assert read_samples(made) is None
    monkeypatch.setattr("sys.argv", ["report", "--store", str(made.path)])
    report.main()
    assert "Before and after" not in (made.figures / "report.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--cells", "9,0"], "cell (9, 0) lies outside the grid of 5 rows and 2 columns"),
        (["--cells", "some"], "cells is 'some'; expected"),
        (["--tokens", "0"], "tokens is 0; expected at least 1"),
        (["--prompts", "x" * 40], "the prompt has 44 tokens with its marks, but the network reads 32"),
    ],
)
def test_what_cannot_be_sampled_is_one_line(store, capsys, words, says):
    kept = read_samples(store)
    assert says in fails(capsys, main, "samples.py", ["--store", str(store.path), *words])
    assert read_samples(store) == kept


def test_the_table_of_cells_says_what_was_trained_and_what_it_scores(copy):
    from analysis.scores import make_task
    from analysis.tasks import Scored

    made = open_store(copy)
    assert set(cell_frame(made)["start"]) == {"random"}

    class Task:
        name, items, digest, lower = "planted", 2, "0", ()

    start, right = (Scored({"acc": np.array(each)}, {"acc": np.mean(each)}) for each in ([0.0, 0.0], [1.0, 0.0]))
    make_task(made, Task(), start, {}).write({(0, 1, 1): (right, start)})
    frame = cell_frame(open_store(made.path))
    expected = np.full(made.run.shape, np.nan)
    expected[0, 1, 1] = 0.5
    assert np.array_equal(frame["planted/acc"].to_numpy(), expected.ravel(), equal_nan=True)
    assert frame["val_loss"].to_numpy() == pytest.approx(made.read("val_loss").ravel(), nan_ok=True)
