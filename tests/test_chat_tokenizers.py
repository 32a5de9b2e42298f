"""Tokenizers that come with a checkpoint: nanochat's pickle and any chat template of transformers."""

import copyreg
import itertools
import json
import os
import pickle
import struct

import numpy as np
import pytest
import torch

from engine.checkpoint import load_model
from engine.checkpoint.hub_tokenizer import HubTokenizer
from engine.checkpoint.nanochat_tokenizer import MARKS, NanochatTokenizer, read_pickle
from engine.checkpoint.tokenizer_files import load_tokenizer
from engine.data import IGNORED, corpus, load_corpus
from engine.tokenizer import REPLY, ByteTokenizer, reply_prompt

tiktoken = pytest.importorskip("tiktoken", reason="package tiktoken, the reference, is not installed")
transformers = pytest.importorskip("transformers", reason="package transformers, the reference, is not installed")
transformers.utils.logging.set_verbosity_error()

# nanochat's, with digits by one or two
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
TEXTS = [
    "What is 12345 + 678? It's the cat's and WE'LL see.\n\n  indented\tand  spaced   ",
    "naïve wörld 🙂🙃 日本語 ﬁ ٣٤٥ don't",
    "",
    " ",
    "\r\n\r\n x",
    "<|assistant_end|> the text <|bos|>",
    "thethethe the there theirs aaaaaaaaaaa",
]


def train_ranks(size=420):
    """Byte-pair ranks learned from a small text by joining the most frequent neighbours."""
    words = [
        tuple(bytes([b]) for b in word.encode())
        for word in (" the cat sat on their there mat aaaaaaaa don't 日本" * 3).split(" ")
    ]
    words += [(b" ", *word) for word in words]
    ranks = {bytes([byte]): byte for byte in range(256)}
    while len(ranks) < size:
        counts = {}
        for word in words:
            for pair in itertools.pairwise(word):
                counts[pair] = counts.get(pair, 0) + 1
        if not counts:
            break
        best = max(counts, key=lambda pair: (counts[pair], pair))
        ranks.setdefault(b"".join(best), len(ranks))
        joined = []
        for word in words:
            pieces, at = [], 0
            while at < len(word):
                step = 2 if word[at : at + 2] == best else 1
                pieces.append(b"".join(word[at : at + step]))
                at += step
            joined.append(tuple(pieces))
        words = joined
    return ranks


@pytest.fixture(scope="module")
def encoding():
    ranks = train_ranks()
    marks = {mark: len(ranks) + n for n, mark in enumerate(MARKS)}
    return tiktoken.Encoding("rustbpe", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=marks)


@pytest.fixture(scope="module")
def folder(encoding, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(encoding))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer([folder], required=True)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_tiktoken(encoding, tokenizer, text):
    assert tokenizer.encode(text) == encoding.encode_ordinary(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ids_of_random_text_are_those_of_tiktoken(encoding, tokenizer):
    random = np.random.default_rng(0)
    letters = [*"aehtrisn dcmo'\n 0123456789.,é日🙂", "the", " the", "their", "don't"]
    for _ in range(200):
        text = "".join(random.choice(letters, random.integers(1, 60)))
        assert tokenizer.encode(text) == encoding.encode_ordinary(text)
    assert tokenizer.vocabulary == encoding.n_vocab


def test_a_saved_tokenizer_is_loaded_with_the_same_ids(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = load_tokenizer([tmp_path], required=True)
    assert isinstance(again, NanochatTokenizer)
    assert again.marks == tokenizer.marks
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text)


def test_a_conversation_is_rendered_as_nanochat_does(encoding, tokenizer):
    def mark(name):
        return encoding.encode_single_token(f"<|{name}|>")

    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "6 * 7?"},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "Let me see: "},
                {"type": "python", "text": "6 * 7"},
                {"type": "python_output", "text": "42"},
                {"type": "text", "text": "It is 42."},
            ],
        },
        {"role": "user", "content": "Thanks"},
        {"role": "assistant", "content": "Bye"},
    ]
    o = encoding.encode_ordinary
    expected = [
        ([mark("bos"), mark("user_start"), *o("Be brief.\n\n6 * 7?"), mark("user_end"), mark("assistant_start")], 0),
        ([*o("Let me see: "), mark("python_start"), *o("6 * 7"), mark("python_end")], 1),
        ([mark("output_start"), *o("42"), mark("output_end")], 0),
        ([*o("It is 42."), mark("assistant_end")], 1),
        ([mark("user_start"), *o("Thanks"), mark("user_end"), mark("assistant_start")], 0),
        ([*o("Bye"), mark("assistant_end")], 1),
    ]
    ids, mask = tokenizer.render(messages)
    assert ids.tolist() == [token for piece, _ in expected for token in piece]
    assert mask.tolist() == [bool(learned) for piece, learned in expected for _ in piece]


def test_a_long_conversation_is_cut_at_2048(tokenizer):
    messages = [{"role": "user", "content": "the cat " * 900}, {"role": "assistant", "content": "sat " * 900}]
    ids, mask = tokenizer.render(messages)
    assert len(ids) == len(mask) == 2048
    assert mask[-1]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "assistant", "content": "x"}], "message 0 is from 'assistant', expected 'user'"),
        ([{"role": "system", "content": "x"}], "a system message and no user message behind it"),
        ([{"role": "user", "content": [1]}], "a user's content is list, expected text"),
        (
            [{"role": "user", "content": "x"}, {"role": "assistant", "content": [{"type": "image", "text": ""}]}],
            "'image'",
        ),
    ],
)
def test_a_conversation_nanochat_has_no_marks_for_is_refused(tokenizer, messages, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.render(messages)


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def global_of(module, name):
    return b"c" + f"{module}\n{name}\n".encode()


def short(text):
    """The opcode of a short text."""
    return b"\x8c" + struct.pack("B", len(text)) + text.encode()


def hostile_pickles(made):
    """Pickles that would make the file `made`, by every road there is to a call."""
    path = str(made)
    command = f"touch {path}"
    encoding = b"ctiktoken.core\nEncoding\n"
    return {
        "reduce": pickle.dumps(Call(os.system, command)),
        "protocol 0": pickle.dumps(Call(os.system, command), protocol=0),
        "builtin": pickle.dumps(Call(eval, f"open({path!r}, 'w')")),
        "inside the state": pickle.dumps({"pat_str": Call(open, path, "w")}),
        "getattr": pickle.dumps(Call(getattr, "", "join")),
        "copyreg": pickle.dumps(Call(copyreg._reconstructor, object, object, None)),
        "stack global": b"\x80\x04" + short("os") + short("system") + b"\x93" + short(command) + b"\x85R.",
        "instance": b"(" + b"V" + command.encode() + b"\nios\nsystem\n.",
        "module attribute": global_of("tiktoken.core", "Encoding.__init__.__globals__") + b".",
        "another of its module": global_of("tiktoken.core", "functools") + b".",
        "method of the class": global_of("tiktoken.core", "Encoding.__subclasses__") + b")R.",
        "called with arguments": encoding + b"(V" + command.encode() + b"\ntR.",
        "extension": b"\x80\x02\x82\x01.",
        "persistent": b"Pos\n.",
        "not a pickle": b"\x00\x01\x02",
        "empty": b"",
        "only a dict": pickle.dumps({"pat_str": PATTERN, "mergeable_ranks": {}, "special_tokens": {}}),
        "a registered name": b"\x80\x02" + encoding + b")\x81V" + b"gpt2\nb.",
    }  # fmt: skip


@pytest.mark.parametrize("name", hostile_pickles("x"))
def test_of_a_hostile_pickle_nothing_is_run(tmp_path, name):
    made = tmp_path / "made"
    file = tmp_path / "tokenizer.pkl"
    file.write_bytes(hostile_pickles(made)[name])
    with pytest.raises(ValueError, match=r"tokenizer.pkl (is no pickled|holds no) tiktoken Encoding") as caught:
        read_pickle(file)
    assert "\n" not in str(caught.value)
    assert not made.exists()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"pat_str": PATTERN}, "without pattern, ranks and marks"),
        ({"pat_str": PATTERN, "mergeable_ranks": {"a": 1}, "special_tokens": {}}, "without pattern, ranks and marks"),
        ({"pat_str": PATTERN, "mergeable_ranks": {b"a": 1}, "special_tokens": {}}, r"lacks <\|bos\|>"),
        (
            {"pat_str": PATTERN, "mergeable_ranks": {b"a": 1}, "special_tokens": {m: n for n, m in enumerate(MARKS)}},
            "gives an id twice or lacks a byte",
        ),
    ],
)
def test_an_encoding_that_is_not_nanochats_is_refused(tmp_path, state, message):
    file = tmp_path / "tokenizer.pkl"
    plain = tiktoken.Encoding.__new__(tiktoken.Encoding)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiktoken.Encoding, "__getstate__", lambda self: state)
        file.write_bytes(pickle.dumps(plain))
    with pytest.raises(ValueError, match=message):
        read_pickle(file)


def test_nanochats_tokenizer_is_found_beside_above_or_where_it_is_given(tmp_path):
    from test_nanochat import GENERATIONS, make_tensors, write

    generation = GENERATIONS["2025-10"]
    place = write(tmp_path / "base_checkpoints" / "d5", make_tensors(generation), generation)
    small = {bytes([byte]): byte for byte in range(256)}
    marks = {mark: 256 + n for n, mark in enumerate(MARKS)}
    fitting = tiktoken.Encoding("small", pat_str=PATTERN, mergeable_ranks=small, special_tokens=marks)
    assert load_model(place).tokenizer_found is None
    for spot in (place / "tokenizer", tmp_path / "tokenizer", place):
        spot.mkdir(exist_ok=True)
        (spot / "tokenizer.pkl").write_bytes(pickle.dumps(fitting))
        assert load_model(place).tokenizer.encode("a the") == [97, 32, 116, 104, 101]
        (spot / "tokenizer.pkl").unlink()
    beyond = {mark: 300 + n for mark, n in marks.items()}
    wide = tiktoken.Encoding("wide", pat_str=PATTERN, mergeable_ranks=small, special_tokens=beyond)
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(wide))
    with pytest.raises(
        ValueError, match="has a tokenizer of 565 ids for a vocabulary of 300, expected at most as many"
    ):
        load_model(place, tokenizer=tmp_path)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GENERATING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST]"
    "{% else %} {{ m['content'] | trim }} <|im_end|>{% endif %}{% endfor %}"
)
THINKING = (  # as Qwen3: an empty thought before the last reply only
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.last %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA31 = (  # as Llama 3.1 and later
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}{%- set date_string = '26 Jul 2024' %}"
    "{%- endif %}{%- endif %}"
    "<|im_start|>system\nToday Date: {{ date_string }}<|im_end|>" + CHATML
)
CLOCK = "<|im_start|>system\nIt is {{ strftime_now('%Y-%m-%d') }}.<|im_end|>" + CHATML
DEAF = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}\n{% endif %}{% endfor %}"
SHOUTING = CHATML.replace("m['content']", "m['content'] | upper")
CONVERSATION = [
    {"role": "user", "content": "Where is the cat?"},
    {"role": "assistant", "content": "On the mat. the cat"},
    {"role": "user", "content": "On the mat. the cat"},
    {"role": "assistant", "content": " It's there 🙂 "},
]


def hub_tokenizer(folder, template):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = template
    fast.save_pretrained(folder)
    return HubTokenizer(folder)


@pytest.mark.parametrize("template", [CHATML, GENERATING])
def test_conversations_encoded_together_are_those_encoded_alone(tmp_path, template, monkeypatch):
    tokenizer = hub_tokenizer(tmp_path, template)
    talks = [CONVERSATION[: 2 * (n % 2) + 2] + [CONVERSATION[0]] * (n % 3) for n in range(9)]
    together = tokenizer.encode_all([tokenizer.write(talk) for talk in talks])
    for (ids, mask), talk in zip(together, talks, strict=True):
        alone, alone_mask = tokenizer.render(talk)
        assert ids.tolist() == alone.tolist() and mask.tolist() == alone_mask.tolist()
    lines = [json.dumps({"messages": talk}) for talk in talks] + [json.dumps({"text": "the cat"})]
    (tmp_path / "talks.jsonl").write_text("\n".join(lines))
    digests = set()
    for size in (1, 4, 64):
        monkeypatch.setattr(corpus, "TOGETHER", size)
        digests.add(load_corpus(str(tmp_path / "talks.jsonl"), None, "train", tokenizer, 16, 2).digest)
    assert len(digests) == 1


@pytest.mark.parametrize(("template", "says"), [(LLAMA31, "Today Date: 03 Feb 2025"), (CLOCK, "It is 2025-02-03.")])
def test_a_template_prints_the_date_that_it_is_given(tmp_path, template, says):
    tokenizer = hub_tokenizer(tmp_path, template)
    assert tokenizer.dated and says not in tokenizer.decode(tokenizer.render(CONVERSATION)[0])
    tokenizer.date = "2025-02-03"
    ids, mask = tokenizer.render(CONVERSATION)
    assert says in tokenizer.decode(ids)
    assert tokenizer.decode(ids[mask]) == "On the mat. the cat<|im_end|> It's there 🙂 <|im_end|>"
    marked = hub_tokenizer(tmp_path, template.replace(CHATML, GENERATING))
    marked.date = "2025-02-03"
    assert says in tokenizer.decode(marked.render(CONVERSATION)[0])
    assert not hub_tokenizer(tmp_path, CHATML).dated


@pytest.mark.parametrize(
    ("template", "learned"),
    [
        (CHATML, "On the mat. the cat<|im_end|> It's there 🙂 <|im_end|>"),
        (GENERATING, "On the mat. the cat<|im_end|> It's there 🙂 <|im_end|>"),
        (LLAMA2, " On the mat. the cat <|im_end|> It's there 🙂 <|im_end|>"),
        (THINKING, "On the mat. the cat<|im_end|><think>\n\n</think>\n\n It's there 🙂 <|im_end|>"),
    ],
    ids=["chatml", "generation marks", "llama2", "thinking"],
)
def test_ids_are_the_templates_and_the_mask_covers_the_replies(tmp_path, template, learned):
    tokenizer = hub_tokenizer(tmp_path, template)
    ids, mask = tokenizer.render(CONVERSATION)
    expected = tokenizer.backend.apply_chat_template(CONVERSATION, tokenize=True, return_dict=True)["input_ids"]
    assert ids.tolist() == expected
    assert tokenizer.decode(ids[mask]) == learned
    assert tokenizer.render(CONVERSATION[:1])[1].sum() == 0


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (DEAF, "writes no assistant's span behind its prompt"),
        (SHOUTING, "writes no assistant's span"),
        ("{{ raise_exception('no roles') }}", r"refuses a conversation \(no roles\)"),
        (None, "has no chat template"),
        (CHATML.replace("m['content']", "m['content'] | replace('the', 'a')"), "does not show reply 1"),
    ],
)
def test_a_template_without_the_assistants_spans_is_refused(tmp_path, template, message):
    tokenizer = hub_tokenizer(tmp_path, template)
    with pytest.raises(ValueError, match=message) as caught:
        tokenizer.render(CONVERSATION)
    assert "\n" not in str(caught.value)


# Templates of published models. What a model has to write is between < and > here: without these they are the template;
# with generation marks for them, transformers makes the mask by which ours is judged.
QWEN2 = (
    "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>"
    '\n\' }}{%- endif %}{%- for message in messages %}{%- if (message.role == "user") or '
    "(message.role == \"system\" and not loop.first) %}{{- '<|im_start|>' + message.role + '\n' + message.content + "
    "'<|im_end|>' + '\n' }}{%- elif message.role == 'assistant' and not message.tool_calls %}"
    "{{- '<|im_start|>assistant\n' }}<{{- message.content + '<|im_end|>' }}>{{- '\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set header = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n' %}{% if loop.index0 == 0 %}{% set header = bos_token + header %}"
    "{% endif %}{{ header }}{% if message['role'] == 'assistant' %}<{{ message['content'] | trim + '<|eot_id|>' }}>"
    "{% else %}{{ message['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou "
    "are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + "
    "message['role'] + '\n'}}{% if message['role'] == 'assistant' %}<{{ message['content'] + '<|im_end|>' }}>"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + "
    "eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n' }}<{{ message['content'] + eos_token }}>"
    "{{ '' }}\n{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n"
    "{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + "
    "message['content'] + ' [/INST]' }}{% else %}<{{ message['content'] + eos_token }}>{{ ' ' }}{% endif %}{% endfor %}"
)
MISTRAL3 = (  # the system message moves to the last question
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}{%- set turns = messages[1:] %}"
    "{%- else %}{%- set turns = messages %}{%- endif %}{{- bos_token }}{%- for message in turns %}"
    "{%- if message['role'] == 'user' %}{%- if loop.last and system is defined %}{{- '[INST] ' + system + '\n\n' + "
    "message['content'] + '[/INST]' }}{%- else %}{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}"
    "{%- else %}<{{- ' ' + message['content'] | trim + eos_token }}>{%- endif %}{%- endfor %}"
)
TALKS = [
    [*CONVERSATION, {"role": "user", "content": "\n\nindented"}, {"role": "assistant", "content": "\n\n  so is this "}],
    [{"role": "system", "content": "Be brief."}, *CONVERSATION[:2], *CONVERSATION[:2]],
    [{"role": "user", "content": "[/INST] assistant\n"}, {"role": "assistant", "content": "[INST] <|user|>\nuser 12"}],
]


def trained_tokenizer(folder, template, spaces):
    """Merges learned from text, so that a header's end and a content's start may be one token; bytes or Llama's ▁."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    text = [f"user\n\nthe cat{space}is on the mat assistant\n It's there [INST] [/INST]" for space in (" ", "\n\n")]
    alphabet = [*pre_tokenizers.ByteLevel.alphabet(), "▁", "\n"]
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    if spaces:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
    own = {"special_tokens": ["<unk>"], "initial_alphabet": alphabet, "show_progress": False}
    backend.train_from_iterator(text * 9, trainers.BpeTrainer(vocab_size=420, **own))
    marks = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>")
    fast.add_special_tokens({"additional_special_tokens": marks})
    fast.chat_template = template
    fast.save_pretrained(folder)
    return HubTokenizer(folder)


def test_the_bytes_of_every_tokenizers_ids_are_those_of_their_text(tmp_path):
    kinds = {
        "bytes": ByteTokenizer(),
        "smollm2": load_model("smollm2").tokenizer,
        "nanochat": NanochatTokenizer(PATTERN, train_ranks(), {mark: 420 + n for n, mark in enumerate(MARKS)}),
        "hub, bytes": trained_tokenizer(tmp_path / "bytes", CHATML, spaces=False),
        "hub, spaces": trained_tokenizer(tmp_path / "spaces", CHATML, spaces=True),
    }
    for name, tokenizer in kinds.items():
        text = "It's on the mat\n\nthe cat" if name == "hub, spaces" else TEXTS[0] + TEXTS[1]
        lengths, ids = tokenizer.token_bytes, tokenizer.encode(text)
        assert len(lengths) == tokenizer.vocabulary and (lengths >= 0).all(), name
        # Llama's encoding sets a space before a text
        assert lengths[ids].sum() == len(text.encode()) + (name == "hub, spaces"), name
        replies, mask = tokenizer.render(CONVERSATION[:2])
        assert lengths[replies[mask]].sum() <= len(CONVERSATION[1]["content"].encode()) + 1, name  # marks are no text


@pytest.mark.parametrize("spaces", [False, True], ids=["bytes", "spaces"])
@pytest.mark.parametrize("name", ["QWEN2", "LLAMA3", "SMOLLM2", "ZEPHYR", "MISTRAL", "MISTRAL3"])
def test_published_templates_are_masked_as_transformers_masks_them_by_marks(tmp_path, name, spaces):
    template = globals()[name]
    plain = template.replace("<{{", "{{").replace("}}>", "}}")
    marked = template.replace("<{{", "{% generation %}{{").replace("}}>", "}}{% endgeneration %}")
    tokenizer = trained_tokenizer(tmp_path, plain, spaces)
    for talk in TALKS:
        if name == "MISTRAL" and talk[0]["role"] == "system":
            with pytest.raises(ValueError, match=r"refuses a conversation \(roles must alternate\)"):
                tokenizer.render(talk)
            continue
        ids, mask = tokenizer.render(talk)
        options = {"tokenize": True, "return_dict": True}
        assert ids.tolist() == tokenizer.backend.apply_chat_template(talk, **options)["input_ids"]
        judged = tokenizer.backend.apply_chat_template(
            talk, chat_template=marked, return_assistant_tokens_mask=True, **options
        )
        assert ids.tolist() == judged["input_ids"]
        assert mask.tolist() == [bool(each) for each in judged["assistant_masks"]]
        assert 0 < mask.sum() < len(mask)


@pytest.mark.parametrize("spaces", [False, True], ids=["bytes", "spaces"])
@pytest.mark.parametrize("name", ["QWEN2", "LLAMA3", "SMOLLM2", "ZEPHYR", "MISTRAL", "MISTRAL3", "THINKING"])
def test_what_stands_before_a_reply_is_the_templates_own_prompt(tmp_path, name, spaces):
    tokenizer = trained_tokenizer(tmp_path, globals()[name].replace("<{{", "{{").replace("}}>", "}}"), spaces)
    for talk in (TALKS[0][:3], TALKS[2][:1], [{"role": "user", "content": REPLY}]):
        prompt, ends = reply_prompt(tokenizer, talk)
        options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
        assert prompt == tokenizer.backend.apply_chat_template(talk, **options)["input_ids"]
        ids, mask = tokenizer.render([*talk, {"role": "assistant", "content": "the mat"}])
        last = int(ids[mask][-1])
        assert last in ends and tokenizer.eos in ends and not ends.intersection(tokenizer.encode("the mat is there"))


def test_what_stands_before_a_reply_of_nanochat_and_smollm2(tokenizer):
    prompt, ends = reply_prompt(tokenizer, CONVERSATION[:3])
    assert tokenizer.decode(prompt) == (
        "<|bos|><|user_start|>Where is the cat?<|user_end|><|assistant_start|>On the mat. the cat<|assistant_end|>"
        "<|user_start|>On the mat. the cat<|user_end|><|assistant_start|>"
    )
    assert ends == {tokenizer.eos, tokenizer.padding}
    assert reply_prompt(tokenizer, [{"role": "user", "content": "a b " * 2000}]) == ([], set()), "cut before the reply"
    smollm2 = load_model("smollm2").tokenizer
    prompt, ends = reply_prompt(smollm2, CONVERSATION[:1])
    assert smollm2.decode(prompt).endswith("<|im_start|>user\nWhere is the cat?<|im_end|>\n<|im_start|>assistant\n")
    assert ends == {smollm2.end, smollm2.boundary}


@pytest.mark.parametrize("template", [CHATML, GENERATING], ids=["spans", "generation marks"])
def test_replies_of_weight_0_are_not_learned(tmp_path, template):
    tokenizer = hub_tokenizer(tmp_path, template)
    for number, left in ((1, " It's there 🙂 <|im_end|>"), (3, "On the mat. the cat<|im_end|>")):
        talk = [m | {"weight": 0} if n == number else m for n, m in enumerate(CONVERSATION)]
        ids, mask = tokenizer.render(talk)
        assert tokenizer.decode(ids[mask]) == left


def test_replies_of_weight_0_are_not_learned_by_nanochat_either(tokenizer):
    talk = [m | {"weight": 0} if n == 1 else m for n, m in enumerate(CONVERSATION)]
    ids, mask = tokenizer.render(talk)
    assert tokenizer.decode(ids[mask]) == " It's there 🙂 <|assistant_end|>"


def test_python_calls_in_a_file_are_learned_with_their_marks_and_their_outputs_are_not(tokenizer, tmp_path):
    parts = [("text", "Let me see: "), ("python", "6 * 7"), ("python_output", "42"), ("text", "It is 42.")]
    reply = {"role": "assistant", "content": [{"type": kind, "text": text} for kind, text in parts]}
    file = tmp_path / "calls.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "6 * 7?"}, reply]}))
    corpus = load_corpus(str(file), None, "train", tokenizer, 64, 0)
    learned = corpus.targets[corpus.targets != IGNORED]
    expected = "Let me see: <|python_start|>6 * 7<|python_end|>It is 42.<|assistant_end|>"
    assert tokenizer.decode(learned) == expected
    with pytest.raises(
        ValueError, match=r"calls.jsonl line 1: content has a python call, for which this tokenizer has"
    ):
        load_corpus(str(file), None, "train", ByteTokenizer(), 64, 0)


def test_a_conversation_that_the_tokenizer_refuses_is_named_by_its_place(tokenizer, tmp_path):
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": [CONVERSATION[0], CONVERSATION[0], CONVERSATION[1]]}))
    with pytest.raises(ValueError, match=r"chat.jsonl line 1: message 1 is from 'user', expected 'assistant'"):
        load_corpus(str(file), None, "train", tokenizer, 8, 0)


def test_a_tokenizer_beyond_the_vocabulary_is_refused(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    hub_tokenizer(tmp_path, CHATML)
    with pytest.raises(ValueError, match="a tokenizer of 258 ids for a vocabulary of 96, expected at most as many"):
        load_model(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer"):
        load_model(tmp_path)


def test_a_hub_folder_renders_and_is_saved_again(tmp_path):
    from engine.checkpoint import save_model

    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "theirs")
    hub_tokenizer(tmp_path / "theirs", CHATML)
    model = load_model(tmp_path / "theirs")
    ids, mask = model.tokenizer.render(CONVERSATION)
    assert model.logits(torch.from_numpy(ids).long()[None]).shape == (1, len(ids), 300)
    save_model(tmp_path / "ours", model.config, model.weights, model.tokenizer)
    again_ids, again_mask = load_model(tmp_path / "ours").tokenizer.render(CONVERSATION)
    assert again_ids.tolist() == ids.tolist()
    assert again_mask.tolist() == mask.tolist()
