"""One record to one document: a conversation in one of the known layouts, or a plain text.

Nothing that steers a reply is left out silently: what a chat template of roles and contents has no place for
(calls of tools, hidden reasoning, unknown roles) is refused with the record's place. Pictures are no text and
are left out: the networks read text.
"""

from typing import Any

from engine.tokenizer import Message

Record = dict[str, Any]

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
TURNS = ("messages", "conversations")
TURN_FIELDS = (("role", "content"), ("from", "value"))
PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("question", "answers"),
    ("question", "response"),
)
SYSTEM = ("system", "system_prompt")
WEIGHTS = ("weight", "train", "training")
CALLS = ("python", "python_output")
"""Kinds of parts of a reply, beside text, as nanochat's: a call of python, and what it printed."""
UNPLACED = ("tool_calls", "function_call", "tools", "functions", "reasoning_content", "thinking")
COLUMNS = {
    *TURNS,
    *(field for pair in PAIRS for field in pair),
    *SYSTEM,
    *UNPLACED,
    "input",
    "context",
    "texts",
    "text",
}
"""Every field of a record that is looked at."""
FIELDS = (
    "messages, conversations, prompt + completion, instruction + output, question + answer, texts (user + assistant), "
    "or text"
)


def to_document(record: Record, place: str) -> list[Message] | str:
    """A record's conversation as messages, or its plain text; ValueError naming the place.

    A field that is null is as good as absent. Layouts, the first that matches:

    - messages / conversations: turns of role + content (OpenAI) or from + value (ShareGPT); a reply whose `weight`
      is 0 or whose `train` is false is not learned, and its message gets "weight": 0; a content may be a list of parts
      of type text, whose texts become lines, and in a reply python and python_output, then it stays a list
    - prompt + completion, instruction (+ input) + output, question (+ context) + answer or answers (the first of
      them); prompt and completion may be lists of turns, then only the completion's replies are learned
    - texts: turns of user + assistant about a document (DocVQA as chat)
    - text

    A system or system_prompt beside them is the first message.
    """
    record = {field: value for field, value in record.items() if value is not None}
    _refuse_unplaced(record, place)
    messages = _conversation(record, place)
    if messages is None and "text" in record:
        return _text(record["text"], place, "text")
    if messages is None:
        raise ValueError(f"{place} has fields {sorted(record)}, expected {FIELDS}: rename the fields")
    for field in SYSTEM:
        if record.get(field):
            messages.insert(0, {"role": "system", "content": _text(record[field], place, field)})
    return messages


def _conversation(record: Record, place: str) -> list[Message] | None:
    for field in TURNS:
        if field in record:
            return _messages(record[field], place, field)
    for prompt, reply in PAIRS:
        if prompt in record and reply in record:
            return _exchange(record, prompt, reply, place)
    if "texts" in record:
        exchanges = _list_of(record["texts"], place, "texts")
        return [message for exchange in exchanges for message in _exchange(exchange, "user", "assistant", place)]
    return None


def _exchange(record: Any, prompt: str, reply: str, place: str) -> list[Message]:
    """A question and its reply; what belongs to the question is set off by a blank line."""
    if not isinstance(record, dict) or prompt not in record or reply not in record:
        raise ValueError(f"{place}: got {str(record)[:60]!r}, expected the fields {prompt} and {reply}: mend it")
    if isinstance(record[prompt], list) and isinstance(record[reply], list) and reply == "completion":
        given = [message | {"weight": 0} for message in _messages(record[prompt], place, prompt)]
        return given + _messages(record[reply], place, reply)
    before, after = {"question": (("context",), ()), "instruction": ((), ("input", "context"))}.get(prompt, ((), ()))
    parts = [_text(record[field], place, field) for field in (*before, prompt, *after) if field in record]
    answer = record[reply]
    if reply == "answers":
        answers = _list_of(answer.get("text") if isinstance(answer, dict) else answer, place, reply)
        if not answers:
            raise ValueError(f"{place}: answers is empty, expected at least one: remove the record")
        answer = answers[0]
    question = "\n\n".join(part for part in parts if part)
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": _text(answer, place, reply)},
    ]


def _messages(value: Any, place: str, field: str) -> list[Message]:
    return [_message(turn, place) for turn in _list_of(value, place, field)]


def _list_of(value: Any, place: str, field: str) -> list[Any]:
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        # `datasets` turns a list of turns that its metadata call a sequence into a turn of lists
        value = [dict(zip(value, turn, strict=True)) for turn in zip(*value.values(), strict=True)]
    if not isinstance(value, list):
        raise ValueError(f"{place}: {field} is {type(value).__name__}, expected a list: mend it")
    return value


def _message(turn: Any, place: str) -> Message:
    fields = [names for names in TURN_FIELDS if isinstance(turn, dict) and all(turn.get(n) is not None for n in names)]
    if not fields:
        raise ValueError(
            f"{place}: a turn is {str(turn)[:60]!r}, expected the fields role and content, or from and value: mend it"
        )
    role_field, text_field = fields[0]
    role = turn[role_field]
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"{place}: role {role!r} is unknown, expected one of {', '.join(ROLES)}: rename it")
    _refuse_unplaced(turn, place)
    message: Message = {"role": ROLES[role], "content": _content(turn[text_field], place, text_field, ROLES[role])}
    for field in WEIGHTS:
        weight = turn.get(field)
        if weight is None:
            continue
        if not isinstance(weight, bool | int | float) or weight not in (0, 1):
            raise ValueError(
                f"{place}: {field} {weight!r} of a turn is unknown, expected 0 or 1 (false or true): mend it"
            )
        if weight and message["role"] != "assistant":
            raise ValueError(
                f"{place}: {field} {weight!r} of a {message['role']} turn asks to learn it, but only an assistant's "
                f"are learned: set it to 0 or remove it"
            )
        if not weight:
            message["weight"] = 0
    return message


def text_of(message: Message) -> str:
    """All the text of a message, with that of its calls."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def refuse_calls(messages: list[Message], place: str) -> None:
    """ValueError for python calls, for tokenizers that have no marks for them."""
    for message in messages:
        if not isinstance(message["content"], str):
            raise ValueError(
                f"{place}: content has a python call, for which this tokenizer has no marks: write it into the text, "
                f"or give a checkpoint with nanochat's tokenizer"
            )


def refuse_empty(messages: list[Message], place: str) -> None:
    """ValueError for a conversation without turns, and for a user's or an assistant's turn without text."""
    if not messages:
        raise ValueError(f"{place}: the conversation has no turns, expected some: remove the record")
    for number, message in enumerate(messages, 1):
        if message["role"] != "system" and not text_of(message).strip():
            raise ValueError(
                f"{place}: turn {number} ({message['role']}) is empty, expected text: fill it or remove the record"
            )


def _refuse_unplaced(fields: Record, place: str) -> None:
    for field in UNPLACED:
        if fields.get(field) and fields[field] != "[]":
            raise ValueError(
                f"{place}: {field} is {str(fields[field])[:60]!r}, which chat templates of text have no place for: "
                f"write it into the content, or remove it"
            )


def _content(value: Any, place: str, field: str, role: str) -> Any:
    """A turn's text: itself, or the texts among its parts, a line each; its parts where some are calls."""
    if not isinstance(value, list):
        return _text(value, place, field)
    kinds = [part.get("type") if isinstance(part, dict) else None for part in value]
    if role == "assistant" and any(kind in CALLS for kind in kinds) and {*kinds} <= {"text", *CALLS}:
        of = f"a part of {field}"
        return [{"type": k, "text": _text(part.get("text"), place, of)} for k, part in zip(kinds, value, strict=True)]
    texts = []
    for kind, part in zip(kinds, value, strict=True):
        if kind == "text":
            texts.append(_text(part.get("text"), place, f"a part of {field}"))
        elif kind not in ("image", "image_url"):
            raise ValueError(f"{place}: a part of {field} is {str(part)[:60]!r}, expected a text or an image: mend it")
    return "\n".join(texts)


def _text(value: Any, place: str, field: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{place}: {field} is {type(value).__name__}, expected text: mend it")
    return value.encode(errors="replace").decode()
