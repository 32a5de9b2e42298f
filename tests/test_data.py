"""Text to rows: what is learned, what is lost, what is held out, and in which order it comes."""

import json
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from engine.data import (
    IGNORED,
    Corpus,
    batch_order,
    check_vocabulary,
    hub_source,
    load_corpus,
    pack,
    permutation,
    read_source,
    to_document,
)
from engine.data.corpus import parse_mix
from engine.data.packing import best_fit_pieces
from engine.tokenizer import BYTE_MARKS, ByteTokenizer, SmolLM2Tokenizer

pytestmark = pytest.mark.usefixtures("cache")
BYTES = ByteTokenizer()
EVALS = Path(__file__).parents[2] / "shared" / "evals"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Keeps the Arrow files of `datasets` out of the home."""
    monkeypatch.setattr("engine.data.sources._cache_folder", lambda datasets: str(tmp_path / "arrow"))


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
messages = st.lists(
    st.builds(
        lambda role, content: {"role": role, "content": content},
        st.sampled_from(["system", "user", "assistant"]),
        texts,
    ),
    min_size=1,
    max_size=6,
)


def small_smollm2_tokenizer():
    """SmolLM2's construction over the 256 byte symbols and two merges."""
    from tokenizers.pre_tokenizers import ByteLevel

    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    symbols = sorted(ByteLevel.alphabet())
    return SmolLM2Tokenizer([*marks, *symbols, "th", "the"], ["t h", "th e"])


SMALL_BPE = small_smollm2_tokenizer()
TOKENIZERS = pytest.mark.parametrize("tokenizer", [BYTES, SMALL_BPE], ids=["bytes", "bpe"])


def chat(turns):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]}


def write_jsonl(file, records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


def chats(count):
    return [chat([f"question {i} " + "?" * (i % 7), f"answer {i} " + "!" * (i % 11)]) for i in range(count)]


def load(data, context=16, validation_rows=2, tokenizer=BYTES, **options) -> Corpus:
    options = {"data_config": None, "split": "train"} | options
    return load_corpus(str(data), tokenizer=tokenizer, context=context, validation_rows=validation_rows, **options)


# Tokenizers


@TOKENIZERS
@given(text=texts)
def test_decoding_gives_the_text_back(tokenizer, text):
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert all(0 <= token < tokenizer.vocabulary for token in tokens)


@TOKENIZERS
@given(conversation=messages)
def test_the_mask_is_on_replies_and_their_end_marks_only(tokenizer, conversation):
    tokens, supervised = tokenizer.render(conversation)
    end = BYTE_MARKS[-1] if tokenizer is BYTES else "<|im_end|>"
    replies = [m["content"] for m in conversation if m["role"] == "assistant"]
    assert len(tokens) == len(supervised)
    assert tokenizer.decode(tokens[supervised]) == "".join(reply + end for reply in replies)


def test_bytes_are_rendered_between_the_marks_of_their_roles():
    conversation = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
    ]
    assert BYTES.decode(BYTES.render(conversation)[0]) == (
        "<|bos|><|user_start|>Be kind.\n\nHi<|user_end|><|assistant_start|>Hello<|assistant_end|>"
    )
    assert BYTES.vocabulary % 64 == 0


def test_merges_are_applied():
    assert len(SMALL_BPE.encode("the")) == 1
    assert len(SMALL_BPE.encode("12")) == 2


# Packing


@given(
    lengths=st.lists(st.integers(0, 9), max_size=12),
    context=st.integers(1, 7),
    seed=st.integers(0, 99),
)
def test_packing_loses_no_token_and_repeats_none(lengths, context, seed):
    random = np.random.default_rng(seed)
    pieces = [(random.integers(1, 99, n, dtype=np.int32), random.random(n) < 0.5) for n in lengths]
    stream = np.concatenate([np.empty(0, np.int32), *(tokens for tokens, _ in pieces)])
    learned = np.concatenate([np.empty(0, np.bool_), *(mask for _, mask in pieces)])
    tokens_NT, targets_NT = pack(pieces, context, padding=0, pad=True)
    pairs = max(0, len(stream) - 1)
    assert tokens_NT.shape == targets_NT.shape == (-(-pairs // context), context)
    padded = np.concatenate([stream, np.zeros(tokens_NT.size + 1, np.int32)])
    assert tokens_NT.flatten().tolist() == padded[: tokens_NT.size].tolist()
    expected = np.where(learned, stream, IGNORED)[1:]
    assert targets_NT.flatten()[:pairs].tolist() == expected.tolist()
    assert (targets_NT.flatten()[pairs:] == IGNORED).all()
    whole_NT, _ = pack(pieces, context, padding=0, pad=False)
    assert np.array_equal(whole_NT, tokens_NT[: pairs // context])


def test_a_target_is_the_next_token_of_its_row(tmp_path):
    corpus = load(write_jsonl(tmp_path / "chat.jsonl", chats(40)))
    inner, targets = corpus.tokens[:, 1:], corpus.targets[:, :-1]
    assert ((targets == inner) | (targets == IGNORED)).all()
    assert corpus.tokens.dtype == corpus.targets.dtype == corpus.supervised.dtype == np.int32
    assert corpus.supervised.tolist() == (corpus.targets != IGNORED).sum(1).tolist()
    assert corpus.supervised.min() > 0


def test_every_reply_is_learned_once(tmp_path):
    records = chats(40)
    corpus = load(write_jsonl(tmp_path / "chat.jsonl", records), context=5, validation_rows=0)
    learned = BYTES.decode(corpus.targets[corpus.targets != IGNORED])
    replies = [record["messages"][1]["content"] + BYTE_MARKS[-1] for record in records]
    assert sorted(learned.split(BYTE_MARKS[-1])[:-1]) == sorted(reply.removesuffix(BYTE_MARKS[-1]) for reply in replies)


def test_plain_text_is_learned_whole(tmp_path):
    file = tmp_path / "plain.txt"
    file.write_text("\n\n".join(f"paragraph number {i}" for i in range(9)) + "\n")
    corpus = load(file, context=8, validation_rows=1)
    assert (corpus.targets[:-1] != IGNORED).all()


def test_rows_without_a_target_are_dropped_and_counted(tmp_path):
    records = [chat(["a long question " * 9, "yes"]) for _ in range(8)]
    corpus = load(write_jsonl(tmp_path / "chat.jsonl", records), context=8, validation_rows=1)
    every = load(write_jsonl(tmp_path / "chat.jsonl", records), context=8, validation_rows=0)
    assert (corpus.targets != IGNORED).any(axis=1).all()
    length = len(BYTES.render(records[0]["messages"])[0])
    rows = -(-(8 * length - 1) // 8)
    assert f"{rows - len(every.tokens)} rows without a target dropped" in every.description


@given(lengths=st.lists(st.integers(1, 14), max_size=250), context=st.integers(1, 9))
def test_best_fit_rows_hold_every_document_once_and_whole(lengths, context):
    documents = [(np.full(n, i, np.int32), np.ones(n, np.bool_)) for i, n in enumerate(lengths)]
    rows = list(best_fit_pieces(iter(documents), context + 1))
    numbers = sorted(int(tokens[0]) for row in rows for tokens, _ in row)
    assert numbers == list(range(len(lengths)))
    for row in rows:
        assert 1 <= sum(len(tokens) for tokens, _ in row) <= context + 1
        assert all(len(tokens) == min(lengths[tokens[0]], context + 1) for tokens, _ in row)
    if len(lengths) <= 100:  # all are in the buffer: no later document fits into what an earlier row left
        for earlier, row in enumerate(rows):
            space = context + 1 - sum(len(tokens) for tokens, _ in row)
            assert all(len(tokens) > space for later in rows[earlier + 1 :] for tokens, _ in later)


def test_best_fit_packing_pads_and_masks_the_ends_of_rows(tmp_path):
    records = [{"text": "a" * n} for n in (3, 5, 9)]
    data = write_jsonl(tmp_path / "text.jsonl", records)
    corpus = load(data, context=10, validation_rows=0, packing="best-fit")
    a, bos = ord("a"), BYTES.bos
    assert corpus.tokens.tolist() == [[bos, *[a] * 9], [bos, *[a] * 5, bos, *[a] * 3]]
    assert corpus.targets.tolist() == [[*[a] * 9, IGNORED], [*[a] * 5, bos, *[a] * 3, IGNORED]]
    assert (corpus.documents, corpus.document_tokens, corpus.documents_in_all) == (3, 20, 3)
    with pytest.raises(ValueError, match="packing is 'best', expected one of cut, best-fit"):
        load(data, packing="best")


@pytest.mark.parametrize("packing", ["cut", "best-fit"])
def test_either_packing_holds_out_whole_documents_and_grows_by_appending(tmp_path, packing):
    data = write_jsonl(tmp_path / "text.jsonl", [{"text": f"#{i}#" * (1 + i % 5)} for i in range(90)])
    full, part = load(data, 24, 7, packing=packing), load(data, 24, 7, packing=packing, max_rows=9)
    assert np.array_equal(part.tokens, full.tokens[:9])
    assert len(full.validation_tokens) == 7
    assert not documents_of(full.validation_tokens) & documents_of(full.tokens)


# Mixtures


def test_a_mixture_takes_documents_by_weight_until_a_source_ends(tmp_path):
    for word in ("A", "B"):
        write_parquet(tmp_path / f"{word}.parquet", [{"text": f"{word}{i:03}#"} for i in range(100)])
    mix = f"{tmp_path}/A.parquet:3,{tmp_path}/B.parquet:1"
    corpus = load(mix, context=6, validation_rows=0)
    text = BYTES.decode(corpus.tokens.flatten())
    assert corpus.documents in (133, 134)
    for documents in range(4, 130):
        start = "".join(text.split("#")[:documents])
        assert abs(start.count("A") - 0.75 * documents) <= 1
    assert load(mix, context=6, validation_rows=0).digest == corpus.digest


def test_colons_in_names_are_the_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_mix(r"C:\chats\a.jsonl") == [(r"C:\chats\a.jsonl", 1)]
    assert parse_mix(r"C:\a.jsonl:0.7,D:\b.parquet:3e-1") == [(r"C:\a.jsonl", 0.7), (r"D:\b.parquet", 0.3)]
    assert parse_mix("lr:2/a:1.jsonl:0.7,b:2:0.3") == [("lr:2/a:1.jsonl", 0.7), ("b:2", 0.3)]
    assert parse_mix("b:2") == [("b", 2)]
    (tmp_path / "b:2").mkdir()
    assert parse_mix("b:2") == [("b:2", 1)], "what exists under the whole name is meant"


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ("a.jsonl:1,b.jsonl", r"'b.jsonl' has no weight above 0, expected NAME:WEIGHT"),
        ("a.jsonl:0,b.jsonl:1", r"'a.jsonl:0' has no weight above 0"),
        ("a.jsonl:1,b.jsonl:1e", r"'b.jsonl:1e' has no weight above 0"),
        ("a.jsonl:1,./a.jsonl:1", r"names a source twice"),
        ("a.jsonl:1,b.jsonl:1", r"data b.jsonl does not exist"),
    ],
)
def test_a_mixture_that_cannot_be_taken_is_refused(tmp_path, monkeypatch, mix, message):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", chats(40))
    with pytest.raises(ValueError, match=message):
        load(mix)


# Held-out rows, smaller corpora, digests


def documents_of(tokens_NT):
    """The numbers of the documents that rows show a whole number of."""
    text = "\n".join(BYTES.decode(row) for row in tokens_NT)
    return {word for word in text.split("#") if word.isdigit()}


@pytest.mark.parametrize("max_rows", [None, 5])
def test_held_out_rows_share_no_document_with_training_rows(tmp_path, max_rows):
    records = [{"text": f"#{i}#" * 9} for i in range(60)]
    corpus = load(write_jsonl(tmp_path / "text.jsonl", records), 24, 7, max_rows=max_rows)
    assert len(corpus.validation_tokens) == 7
    held_out, trained = documents_of(corpus.validation_tokens), documents_of(corpus.tokens)
    assert held_out
    assert trained
    assert not held_out & trained


def test_a_smaller_corpus_is_the_start_of_a_larger_one(tmp_path):
    data = write_jsonl(tmp_path / "chat.jsonl", chats(80))
    full = load(data)
    for max_rows in (1, 7, 50):
        part = load(data, max_rows=max_rows)
        assert np.array_equal(part.tokens, full.tokens[:max_rows])
        assert np.array_equal(part.targets, full.targets[:max_rows])
        assert np.array_equal(part.validation_tokens, full.validation_tokens)


def test_the_digest_names_the_arrays_and_the_tokenizer(tmp_path):
    data = write_jsonl(tmp_path / "chat.jsonl", chats(80))
    first = load(data, max_rows=9)
    assert first.digest == load(data, max_rows=9).digest
    others = [load(data, max_rows=8), load(data, context=15, max_rows=9)]
    others.append(load(data, max_rows=9, validation_rows=1))
    others.append(load(data, max_rows=9, tokenizer=SMALL_BPE))
    assert len({corpus.digest for corpus in [first, *others]}) == 5


# Order


@given(seed=st.integers(0, 2**32), rows=st.integers(1, 40), lengths=st.tuples(*[st.integers(0, 99)] * 2))
def test_a_longer_order_only_extends_a_shorter_one(seed, rows, lengths):
    short, long = (batch_order(seed, rows, length) for length in sorted(lengths))
    assert short.dtype == np.int32
    assert len(long) == max(lengths)
    assert np.array_equal(short, long[: len(short)])


@given(seed=st.integers(0, 2**32), rows=st.integers(1, 40))
def test_every_epoch_visits_every_row_once(seed, rows):
    epochs = batch_order(seed, rows, 3 * rows).reshape(3, rows)
    assert (np.sort(epochs, axis=1) == np.arange(rows)).all()


def test_orders_differ_between_seeds_and_epochs():
    orders = [batch_order(seed, 100, 200).reshape(2, 100) for seed in range(3)]
    epochs = [tuple(epoch) for order in orders for epoch in order]
    assert len(set(epochs)) == 6


def test_a_permutation_is_the_same_on_every_machine():
    assert permutation(3, 1, 8).tolist() == [7, 3, 5, 6, 4, 0, 2, 1]


# Sources


def test_chitchat_alternates_and_the_second_speaker_answers():
    source = read_source("chitchat", None, "train")
    assert source.count == 7168
    for index in range(0, 7168, 97):
        roles = [message["role"] for message in to_document(source.record(index), "")]
        assert roles[0] == "user"
        assert all(left != right for left, right in pairwise(roles))


def test_chitchat_is_packed_and_held_out():
    corpus = load("chitchat", context=64, validation_rows=16, max_rows=100)
    assert corpus.tokens.shape == (100, 64)
    assert corpus.validation_targets.shape == (16, 64)
    assert "100 rows of 64 tokens" in corpus.description
    assert "\n" not in corpus.description
    check_vocabulary(corpus, BYTES.vocabulary)


RECORDS = [
    ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}),
    ({"prompt": "q", "completion": "a"}),
    ({"question": "q", "answer": "a", "source": "x"}),
    ({"instruction": "q", "input": "", "output": "a"}),
    ({"question": "q", "answers": ["a", "b"]}),
    ({"texts": [{"user": "q", "assistant": "a"}]}),
    ({"messages": {"role": ["user", "assistant"], "content": ["q", "a"]}}),
    ({"messages": None, "text": None, "prompt": "q", "completion": "a"}),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: next(iter(record)))
def test_known_layouts_give_the_same_conversation(record):
    assert to_document(record, "") == RECORDS[0]["messages"]
    assert to_document({"text": "plain"}, "") == "plain"


def test_what_belongs_to_a_question_is_placed_with_it():
    user = {"role": "user", "content": "q\n\nmore"}
    reply = {"role": "assistant", "content": "a"}
    assert to_document({"instruction": "q", "input": "more", "output": "a"}, "") == [user, reply]
    assert to_document({"context": "q", "question": "more", "answers": {"text": ["a"]}}, "") == [user, reply]
    parts = [{"type": "text", "text": "q\n"}, {"type": "image"}, {"type": "text", "text": "more"}]
    assert to_document({"messages": [{"role": "user", "content": parts}, reply]}, "") == [user, reply]
    system = {"role": "system", "content": "s"}
    assert to_document({"system_prompt": "s", "question": "q\n\nmore", "response": "a"}, "") == [system, user, reply]
    given = {"prompt": [user, reply, user], "completion": [reply]}
    asked = [message | {"weight": 0} for message in (user, reply, user)]
    assert to_document(given, "") == [*asked, reply]


@TOKENIZERS
@pytest.mark.parametrize("unlearned", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}], ids=str)
def test_a_reply_of_weight_0_is_read_and_not_learned(tokenizer, unlearned):
    turns = chat(["q", "WRONG", "q", "RIGHT"])["messages"]
    plain = tokenizer.render(turns)
    turns[1] |= unlearned
    turns[3] |= {"weight": 1, "train": True}
    turns[0] |= {"weight": None, "train": False}
    tokens, supervised = tokenizer.render(to_document({"messages": turns}, ""))
    assert np.array_equal(tokens, plain[0])
    assert tokenizer.decode(tokens[supervised]).startswith("RIGHT<|")


def test_a_conversation_whose_replies_all_weigh_0_is_skipped(tmp_path):
    unlearned = chat(["q", "a"])
    unlearned["messages"][1]["weight"] = 0
    corpus = load(write_jsonl(tmp_path / "chat.jsonl", [unlearned, *chats(40)]), validation_rows=0)
    assert "1 conversations without a reply skipped" in corpus.description


USER, SYSTEM, REPLY = ({"role": role, "content": role[0].upper()} for role in ("user", "system", "assistant"))


@pytest.mark.parametrize(
    ("conversation", "rendered"),
    [
        ([SYSTEM, USER, REPLY], "<u>S\n\nU</u><a>A</a>"),
        ([SYSTEM, SYSTEM, USER, REPLY], "<u>S\n\nS\n\nU</u><a>A</a>"),
        ([SYSTEM, REPLY], "<u>S</u><a>A</a>"),
        ([USER, SYSTEM, REPLY, USER, REPLY], "<u>U</u><u>S</u><a>A</a><u>U</u><a>A</a>"),
        ([USER, REPLY, SYSTEM], "<u>U</u><a>A</a><u>S</u>"),
    ],
)
def test_system_text_stands_before_the_reply_it_steers(conversation, rendered):
    marks = zip(("", "<u>", "</u>", "<a>", "</a>"), BYTE_MARKS, strict=True)
    text = BYTES.decode(BYTES.render(conversation)[0])
    for short, mark in marks:
        text = text.replace(mark, short)
    assert text == rendered


def test_headers_and_contents_are_encoded_as_one_string():
    line_feeds = SmolLM2Tokenizer([*map(SMALL_BPE.backend.id_to_token, range(SMALL_BPE.vocabulary)), "ĊĊ"], ["Ċ Ċ"])
    tokens, supervised = line_feeds.render([SYSTEM, USER | {"content": "\n\n?"}, REPLY | {"content": "\n\n!"}])
    both = line_feeds.backend.token_to_id("ĊĊ")
    assert tokens.tolist().count(both) == 2
    # the token that ends the header begins the reply, so it is learned
    assert tokens[supervised].tolist() == [both, *line_feeds.encode("\n!"), line_feeds.end]


def test_text_that_is_no_unicode_becomes_question_marks():
    assert to_document({"text": json.loads('"a\\ud800b"')}, "") == "a?b"


def test_the_same_records_give_the_same_corpus_from_any_container(tmp_path):
    records = chats(30)
    jsonl = write_jsonl(tmp_path / "chat.jsonl", records)
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "chat.parquet")
    folder = tmp_path / "folder"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", records[:10])
    write_jsonl(folder / "b.jsonl", records[10:])
    hub = tmp_path / "hub"
    (hub / "short").mkdir(parents=True)
    parquet.write_table(pyarrow.Table.from_pylist(records), hub / "short" / "train-00000-of-00001.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(records[:1]), hub / "short" / "test-00000-of-00001.parquet")
    digests = {load(data).digest for data in (jsonl, tmp_path / "chat.parquet", folder)}
    digests.add(load(hub, data_config="short").digest)
    assert len(digests) == 1


def test_a_dataset_comes_through_datasets(tmp_path):
    folder = tmp_path / "hub"
    (folder / "short").mkdir(parents=True)
    write_jsonl(folder / "short" / "train.jsonl", chats(5))
    write_jsonl(folder / "short" / "test.jsonl", chats(2))
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: short\n  data_files:\n"
        "  - split: train\n    path: short/train.jsonl\n  - split: test\n    path: short/test.jsonl\n---\n"
    )
    source = hub_source(str(folder), "short", "train")
    assert [source.record(i) for i in range(source.count)] == chats(5)
    assert hub_source(str(folder), "short", "test").count == 2
    assert source.place(3).endswith("hub row 3")
    with pytest.raises(ValueError, match=r"cannot be loaded: .*split.*: check the three names"):
        hub_source(str(folder), "short", "validation")
    with pytest.raises(ValueError, match=r"nothing \(config none, split train\) cannot be loaded"):
        hub_source(str(tmp_path / "nothing"), None, "train")


@pytest.mark.skipif(not EVALS.is_dir(), reason="../shared/evals is absent")
def test_real_questions_are_rendered_and_masked(tmp_path):
    items = [json.loads(line) for line in (EVALS / "arc_easy.jsonl").read_text().splitlines()]
    records = [{"prompt": item["query"], "completion": item["choices"][item["gold"]]} for item in items]
    corpus = load(write_jsonl(tmp_path / "arc.jsonl", records), 128, 8, max_rows=200)
    learned = BYTES.decode(corpus.targets[corpus.targets != IGNORED])
    answers = {record["completion"] for record in records}
    replies = learned.split(BYTE_MARKS[-1])[:-1]
    assert len(replies) > 50
    assert set(replies) <= answers


# Which files are data: what `datasets` would load


def first_words(data, split="train"):
    source = read_source(str(data), None, split)
    documents = [to_document(source.record(i), source.place(i)) for i in range(source.count)]
    return {(d if isinstance(d, str) else d[0]["content"]).split()[0] for d in documents}


def write_parquet(file, records):
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(records), file)


def words(word, count=3):
    return [chat([f"{word} {i}", "reply"]) for i in range(count)]


@pytest.mark.parametrize("name", ["folder", "2024 [raw] *"])
def test_splits_are_whole_names(tmp_path, name):
    for split in ("train_sft", "test_sft", "train_gen"):
        write_parquet(tmp_path / name / "data" / f"{split}-00000-of-00001-a3ec.parquet", words(split))
    assert first_words(tmp_path / name, "train_sft") == {"train_sft"}
    for absent in ("train", "sft", "", "train_sft[:1]"):
        with pytest.raises(ValueError, match=r"has no split .*, but test_sft, train_gen, train_sft: give one"):
            read_source(str(tmp_path / name), None, absent)


@pytest.mark.parametrize(
    "beside",
    [
        ".hidden.jsonl",
        "._chat.jsonl",
        ".ipynb_checkpoints/chat-checkpoint.jsonl",
        "_draft.jsonl",
        "_temporary/0/part.jsonl",
        "__pycache__/chat.jsonl",
        "named.jsonl/.keep",
        "LICENSE.txt",
        "requirements.txt",
        "README.md",
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "txt"])
def test_what_lies_beside_data_is_no_data(tmp_path, beside, suffix):
    other = tmp_path / "folder" / beside
    other.parent.mkdir(parents=True)
    other.write_bytes(b"\x00\x05\x16\x07 no data")
    data = tmp_path / "folder" / f"chat.{suffix}"
    if suffix == "parquet":
        write_parquet(data, words("data"))
    else:
        data.write_text("data here" if suffix == "txt" else json.dumps(words("data")[0]))
    assert first_words(tmp_path / "folder") == {"data"}


def test_records_among_more_texts_are_not_left_unread(tmp_path):
    write_jsonl(tmp_path / "chat.jsonl", chats(3))
    for name in ("LICENSE.txt", "requirements-dev.txt"):
        (tmp_path / name).write_text("no data")
    assert read_source(str(tmp_path), None, "train").count == 3
    for name in ("one.txt", "two.txt"):
        (tmp_path / name).write_text("some notes")
    with pytest.raises(ValueError, match=r"holds chat.jsonl beside more .txt files \(one.txt, two.txt\): give .*chat"):
        read_source(str(tmp_path), None, "train")


def test_other_files_are_read_as_datasets_reads_them(tmp_path):
    (tmp_path / "a.csv").write_text("question,answer,id\nwhy,so,1\n")
    assert first_words(tmp_path) == {"why"}


def test_columns_that_are_not_needed_do_not_matter(tmp_path):
    beyond = pyarrow.array([2**62] * 9, pyarrow.timestamp("us"))
    table = pyarrow.Table.from_pylist(chats(9))
    parquet.write_table(table.append_column("created", beyond), tmp_path / "a.parquet")
    parquet.write_table(table.append_column("created", pyarrow.array(["then"] * 9)), tmp_path / "b.parquet")
    source = read_source(str(tmp_path), None, "train")
    assert [source.record(i) for i in range(18)] == chats(9) * 2
    assert [source.place(i).split("/")[-1] for i in (8, 9)] == ["a.parquet row 8", "b.parquet row 0"]


def test_texts_that_look_like_dates_stay_texts(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"question": "When?", "answer": "2024-01-01"}])
    assert read_source(str(tmp_path), None, "train").record(0)["answer"] == "2024-01-01"


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_compressed_records_are_those_of_the_plain_file(tmp_path, suffix):
    records = chats(20)
    plain = write_jsonl(tmp_path / "chat.jsonl", records)
    packed = tmp_path / f"chat.jsonl.{suffix}"
    with pyarrow.output_stream(str(packed)) if suffix == "gz" else pyarrow.output_stream(packed, "zstd") as stream:
        stream.write(b"\n" + Path(plain).read_bytes())
    source = read_source(str(packed), None, "train")
    assert [source.record(i) for i in range(source.count)] == records
    assert source.place(0).endswith(f"chat.jsonl.{suffix} line 2")
    assert load(packed).digest == load(plain).digest
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"chat.jsonl.{suffix} cannot be unpacked .*: write it anew"):
        read_source(str(packed), None, "train")


def test_records_are_parsed_when_asked_for(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n\n{"text": \n{"text": "last"}\n')
    source = read_source(str(tmp_path / "a.jsonl"), None, "train")
    assert [source.record(i)["text"] for i in (0, 2)] == ["first", "last"]
    with pytest.raises(ValueError, match=r"a.jsonl line 3 is not JSON"):
        source.record(1)


def test_a_missing_home_does_not_matter(tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", Path("/dev/null/home/datasets"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    write_parquet(tmp_path / "a.parquet", chats(3))
    assert read_source(str(tmp_path / "a.parquet"), None, "train").count == 3


def test_datasets_is_imported_only_where_it_is_needed(tmp_path):
    data = write_jsonl(tmp_path / "a.jsonl", chats(40))
    program = (
        "import sys; from engine.data import load_corpus; from engine.tokenizer import ByteTokenizer;"
        f"load_corpus({data!r}, None, 'train', ByteTokenizer(), 16, 1);"
        "assert not {'datasets', 'pyarrow', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# What a user may get wrong


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"role": "user", "content": "q", "weight": 1}], r"weight 1 of a user turn asks to learn it.*: set it to 0"),
        ([{"role": "assistant", "content": "a", "weight": 0.5}], r"weight 0.5 of a turn is unknown, expected 0 or 1"),
        ([{"role": "assistant", "content": "a", "train": "no"}], r"train 'no' of a turn is unknown, expected 0 or 1"),
        ([{"role": "assistant", "content": "a", "tool_calls": [{}]}], r"tool_calls is .* no place for: write"),
        ([{"role": ["user"], "content": "a"}], r"role \['user'\] is unknown"),
        ([{"role": "user", "content": [{"type": "audio"}]}], r"a part of content is .*audio.*, expected a text"),
        ([{"role": "user", "content": " "}, {"role": "assistant", "content": "a"}], r"turn 1 \(user\) is empty"),
        ([], r"line 1: the conversation has no turns, expected some: remove"),
    ],
)
def test_a_turn_that_cannot_be_placed_is_refused_by_its_place(tmp_path, records, message):
    with pytest.raises(ValueError, match=r"a.jsonl line 1: .*|" + message) as error:
        load(write_jsonl(tmp_path / "a.jsonl", [{"messages": records}]))
    assert re.search(message, str(error.value))


@pytest.mark.parametrize("empty", ["", " "])
def test_an_empty_name_is_not_the_current_folder(tmp_path, monkeypatch, empty):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "chat.jsonl", chats(40))
    with pytest.raises(ValueError, match="data is empty, expected chitchat"):
        load(empty)


@pytest.mark.parametrize("options", [{"split": "test"}, {"data_config": "short"}], ids=str)
def test_options_that_a_source_ignores_are_refused(tmp_path, options):
    for data in ("chitchat", write_jsonl(tmp_path / "chat.jsonl", chats(40))):
        with pytest.raises(ValueError, match=r"has no configurations and no splits, got config .*: leave out"):
            load(data, **options)


def damaged(file, start):
    content = bytearray(file.read_bytes())
    content[start : start + 200] = bytes(range(200))
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: damaged(d / "b.parquet", 10), r"b.parquet cannot be loaded: "),
        (lambda d: (d / "b.parquet").write_bytes(b"PAR1"), r"b.parquet is not a readable parquet file"),
        (
            lambda d: write_parquet(d / "b.parquet", [{"text": "x"}]),
            r"b.parquet has fields \['text'\], but .*a.parquet",
        ),
        (
            lambda d: (d / "README.md").write_text("---\nconfigs: [\n---\n"),
            r"cannot be loaded: while parsing .* README",
        ),
        (lambda d: (d / "README.md").write_text("---\nconfigs: 3\n---\n"), r"Expected configs to be a list, .* README"),
        (lambda d: [d.joinpath(f"{i}.zip").write_bytes(b"PK\3\4") for i in range(3)], r"cannot be loaded: .* zip"),
        (lambda d: [d.joinpath(f"{i}.json").write_text("[{") for i in range(3)], r"0.json cannot be loaded: "),
    ],
    ids=["page", "footer", "fields", "yaml", "configs", "zip", "json"],
)
def test_errors_of_libraries_are_one_line_that_names_the_file(tmp_path, spoil, message):
    for name in ("a", "b"):
        write_parquet(tmp_path / "d" / f"{name}.parquet", chats(40))
    spoil(tmp_path / "d")
    with pytest.raises(ValueError, match=message) as error:
        read_source(str(tmp_path / "d"), None, "train")
    assert "\n" not in str(error.value)


def test_a_record_that_python_cannot_hold_is_named(tmp_path):
    turn = pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string()), ("at", pyarrow.timestamp("us"))])
    turns = pyarrow.array([[{"role": "user", "content": "q", "at": 2**62}]], pyarrow.list_(turn))
    parquet.write_table(pyarrow.table({"messages": turns}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet row 0 cannot be read \(date value out of range\): mend"):
        read_source(str(tmp_path / "a.parquet"), None, "train").record(0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": \n', r"a.jsonl line 2 is not JSON \(.*\): mend"),
        ("a.jsonl", "[" * 200_000, r"a.jsonl line 1 is nested too deeply or too large: mend"),
        ("a.jsonl", b'{"text": "\xe9"}', r"a.jsonl line 1 is not JSON \(.*utf-8.*\): mend"),
        ("a.jsonl", "\n[1]\n", r"a.jsonl line 2 is a JSON list, expected an object: mend"),
        ("a.jsonl", '{"body": "x"}\n', r"line 1 has fields \['body'\], expected messages, .*text: rename"),
        ("a.jsonl", '{"text": 3}\n', r"line 1: text is int, expected text: mend"),
        ("a.jsonl", '{"messages": "x"}\n', r"line 1: messages is str, expected a list: mend"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}\n', r"line 1: a turn is .* role and content"),
        (
            "a.jsonl",
            '{"messages": [{"role": "bot", "content": ""}]}\n',
            r"line 1: role 'bot' is unknown, expected one of system, .*: rename",
        ),
        ("a.jsonl", json.dumps(chat(["only a question"])) + "\n", r"no assistant turn in its 1 conv"),
        ("a.txt", "four", r"context 16 is longer than the data .* \(5 tokens\): give a shorter"),
        ("a.txt", "", r"a.txt holds no text: give data"),
        ("a.txt", "one paragraph only " * 9, r"rows of context 16, expected 2 to hold out and at least 1"),
        ("a.txt", b"\xff\xfe", r"a.txt is not UTF-8 text \(byte 0\): convert"),
        ("a.parquet", "no parquet", r"a.parquet is not a readable parquet file \(.*\): write"),
        ("a.csv", "x", r"a.csv ends in .csv, expected one of .txt, .jsonl, .parquet .*: convert"),
    ],
)
def test_a_faulty_file_is_named_with_its_place(tmp_path, name, content, message):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as error:
        load(file)
    assert "\n" not in str(error.value)


def test_missing_data_is_named(tmp_path):
    for missing in ("absent.jsonl", "./absent", str(tmp_path / "absent")):
        with pytest.raises(ValueError, match=r"absent.* does not exist: give chitchat, a .txt"):
            load(missing)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no .txt, .jsonl, .parquet .*file: give"):
        load(tmp_path / "empty")
    full = tmp_path / "full"
    full.mkdir()
    write_jsonl(full / "chat.jsonl", chats(9))
    with pytest.raises(ValueError, match="full has no configuration and no folder fine, but default: give another"):
        load(full, data_config="fine")


def test_impossible_sizes_are_refused():
    for options in ({"context": 0}, {"validation_rows": -1}, {"max_rows": 0}):
        with pytest.raises(ValueError, match="expected context and max rows of at least 1"):
            load("chitchat", **options)


def test_more_held_out_rows_than_the_data_have_are_refused(tmp_path):
    data = write_jsonl(tmp_path / "chat.jsonl", chats(20))
    with pytest.raises(ValueError, match=r"expected 1000 to hold out .*: give fewer validation rows"):
        load(data, validation_rows=1000)


def test_a_token_beyond_the_models_vocabulary_is_refused(tmp_path):
    corpus = load(write_jsonl(tmp_path / "chat.jsonl", chats(40)))
    check_vocabulary(corpus, BYTES.assistant_end + 1)
    with pytest.raises(ValueError, match=r"token id 260 .* vocabulary of 256: give .* at least 320"):
        check_vocabulary(corpus, 256)
