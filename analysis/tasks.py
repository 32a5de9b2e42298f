"""Tasks: what cells are asked, and how their answers are scored, item by item.

A name stands for a task of lm-evaluation-harness (package lm_eval), or for a file NAME.jsonl in a folder, asked as the
harness would. `core:NAME` asks such a file as nanochat's CORE does, `letters:NAME` as its ChatCORE does, and `core` is
a whole bundle, of which core.yaml and eval_meta_data.csv say what is asked and what guessing gets. A line of a file is

    {"query", "choices", "gold"}                      several answers to one text
    {"context_options", "continuation", "gold"}       one continuation of several texts
    {"context", "continuation"}                       one continuation of one text
"""

import csv
import hashlib
import json
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from engine.scores import Scored

if TYPE_CHECKING:
    from engine.score import Request, Scorer

KINDS = (("query", "choices", "gold"), ("context_options", "continuation", "gold"), ("context", "continuation"))
ORDER, SHOTS_SEED = 1337, 1234  # nanochat's: of the items, and with an item's number of its examples
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LETTERS_BASELINE = 0.25  # nanochat's, whatever the number of choices
CENTRED = "centred"  # accuracy between what guessing gets (0) and 1
MEAN = {"aggregation": "mean", "higher_is_better": True}


class Result(NamedTuple):
    """What a stack scores: one a replica; requests that were longer than the context, and cut from the left."""

    scored: list[Scored]
    cut: int


class Task(Protocol):
    """What is asked."""

    @property
    def name(self) -> str:
        """By which it was asked for."""

    @property
    def items(self) -> int:
        """How many."""

    @property
    def digest(self) -> str:
        """SHA-256 of what is asked and how it is scored."""

    @property
    def lower(self) -> Sequence[str]:
        """Measures that are better the lower they are."""

    def score(self, scorer: "Scorer", tokenizer: Any) -> Result:
        """Ask every replica. Raises ValueError for an item that the tokenizer cannot express."""


def load_tasks(names: Sequence[str], folder: str, limit: int, shots: int | None) -> list[Task]:
    """The tasks of some names.

    Args:
        folder: of jsonl files, or a bundle; '' for the harness's own tasks, which come from the hub.
        limit: items a task, at most; 0 for all.
        shots: examples before each item; None for the task's own number.

    Raises:
        ValueError: a task or a file that is not there, or whose lines are none of KINDS; the package is missing.
    """
    if not names or limit < 0 or (shots or 0) < 0:
        raise ValueError(f"got {len(names)} tasks, limit {limit}, shots {shots}; expected a task and none below 0")
    if folder and not Path(folder).is_dir():
        raise ValueError(f"tasks-from is {folder!r}; expected a folder of .jsonl files")
    found: list[Task] = []
    hub = []
    for name in names:
        form, _, file = name.rpartition(":")
        if name == "core":
            found += bundle(Path(folder), limit, shots)
        elif form:
            if form not in FORMS or not folder:
                raise ValueError(
                    f"task is {name!r}; expected core:NAME or letters:NAME of a file in --tasks-from, or a name alone"
                )
            found.append(FORMS[form](name, read_items(Path(folder), file), limit, shots))
        elif folder:
            found.append(HarnessTask(local_task(name, read_items(Path(folder), name), shots), limit))
        else:
            hub.append(name)
    if hub:
        found += [HarnessTask(task, limit) for task in hub_tasks(hub, shots)]
    doubles = {task.name for task in found if sum(each.name == task.name for each in found) > 1}
    if doubles:
        raise ValueError(f"task {', '.join(sorted(doubles))} is given twice; expected each once")
    return found


def read_items(folder: Path, name: str) -> list[dict[str, Any]]:
    """The lines of a file, each checked."""
    file = folder / f"{name}.jsonl"
    if not file.is_file():
        there = ", ".join(sorted(each.stem for each in folder.glob("*.jsonl"))) or "none"
        raise ValueError(f"task {name!r} has no {file}; expected one of the files there ({there})")
    items: list[dict[str, Any]] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} line {number} is not JSON ({error}); mend it") from error
        kind = next((kind for kind in KINDS if isinstance(item, dict) and set(kind) <= item.keys()), None)
        if kind is None or (items and not set(kind) <= items[0].keys()):
            expected = " or ".join("/".join(kind) for kind in KINDS)
            raise ValueError(f"{file} line {number} has other fields; expected {expected}, all lines alike")
        options = item.get(kind[1] if kind == KINDS[0] else kind[0])
        if "gold" in kind and not (isinstance(item["gold"], int) and 0 <= item["gold"] < len(options)):
            raise ValueError(f"{file} line {number} has gold {item['gold']!r}; expected an index of {len(options)}")
        items.append(item)
    if not items:
        raise ValueError(f"{file} is empty; expected an item a line")
    return items


# ---- lm-evaluation-harness


@contextmanager
def quiet_harness() -> Iterator[None]:
    """The harness without its progress bars and remarks. Raises ValueError where the package is missing."""
    if find_spec("lm_eval") is None:
        raise ValueError("tasks need the package lm_eval: run `uv sync --extra eval`, or `pip install lm_eval`")
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        logger.setLevel(level)


def local_task(name: str, items: list[dict[str, Any]], shots: int | None) -> Any:
    """The harness's task of a file's items; accuracy by log-probability, and by its mean over characters."""
    config: dict[str, Any] = {"task": name, "test_split": "test", "num_fewshot": shots or 0, "target_delimiter": " "}
    if shots:
        config |= {"fewshot_split": "test"}
    choices = {"output_type": "multiple_choice", "metric_list": [{"metric": "acc"} | MEAN]}
    if "choices" in items[0]:
        config |= choices | {"doc_to_text": "query", "doc_to_choice": "choices", "doc_to_target": "gold"}
        config["metric_list"] = [{"metric": metric} | MEAN for metric in ("acc", "acc_norm")]
    elif "context_options" in items[0]:
        # the harness's partial evaluation: the text is the index of the right one
        config |= choices | {"doc_to_text": "gold", "doc_to_choice": "context_options", "doc_to_target": "continuation"}
    else:
        config |= {"output_type": "loglikelihood", "doc_to_text": "context", "doc_to_target": "continuation"}
        worse = {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
        config["metric_list"] = [{"metric": "acc"} | MEAN, worse]
    with quiet_harness():
        import datasets
        from lm_eval.api.task import ConfigurableTask

        rows = datasets.Dataset.from_list(items)
        return ConfigurableTask(config=config | {"custom_dataset": lambda **_: {"test": rows}})


def hub_tasks(names: Sequence[str], shots: int | None) -> list[Any]:
    """The harness's own tasks."""
    with quiet_harness():
        from lm_eval.tasks import TaskManager

        try:
            found = TaskManager().load(list(names))["tasks"].values()
        except Exception as error:  # of the harness, of datasets, and of whatever a task's own code asks
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"tasks {', '.join(names)} cannot be loaded ({reason}); check the names and the way to the hub, or "
                "give files by --tasks-from"
            ) from error
    if shots is not None:
        for task in found:
            task.set_config(key="num_fewshot", value=shots)
    return list(found)


class HarnessTask:
    """A task of the harness."""

    def __init__(self, task: Any, limit: int) -> None:
        self.task, self.limit, self.name = task, limit or None, str(task.task_name)
        with quiet_harness():
            task.build_all_requests(limit=self.limit, rank=0, world_size=1)
        asked = [(each.doc_id, each.idx, each.request_type, each.args) for each in task.instances]
        metrics = sorted(task.aggregation())
        self.lower = sorted(name for name, higher in task.higher_is_better().items() if not higher)
        self.items = len({each.doc_id for each in task.instances})
        self.digest = digest_of([metrics, asked])

    def score(self, scorer: "Scorer", tokenizer: Any) -> Result:
        """Ask every replica, and let the harness score each."""
        from engine.harness import Asked, CellModel

        asked = Asked(scorer, tokenizer)
        scored = []
        with quiet_harness():
            from lm_eval.evaluator import evaluate

            given = {"tasks": {self.name: self.task}, "groups": {}, "group_map": {}}
            for replica in range(scorer.replicas):
                found = evaluate(CellModel(asked, replica), given, limit=self.limit, bootstrap_iters=0)
                assert found is not None
                own = scored_of(found["results"][self.name], found["samples"][self.name])
                scored.append(own.nothing() if asked.broken[replica] else own)
        return Result(scored, asked.cut)


def scored_of(results: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> Scored:
    """What the harness found, by measure; a filter other than none is part of a measure's name."""
    total, items = {}, {}
    for key, value in results.items():
        metric, comma, by = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
            name = metric if by == "none" else f"{metric}_{by}"
            total[name] = float(value)
            own = [sample[metric] for sample in samples if sample["filter"] == by and metric in sample]
            if own and all(isinstance(each, int | float | np.number) for each in own):
                items[name] = np.array(own, np.float64)
    return Scored(items, total)


# ---- nanochat's forms


@dataclass(frozen=True)
class Form:
    """A task whose requests are its own tokens: `ask` gives an item's, `right` which of the answers are right."""

    name: str
    digest: str
    items: int
    ask: "Callable[[Any], list[list[Request]]]"
    """tokenizer -> requests of every item"""
    right: Callable[[int, np.ndarray, np.ndarray], bool]
    """(item, mean log-probability of a token of each request, whether each is greedy) -> whether it is right"""
    baseline: float
    """what guessing gets"""
    lower: tuple[str, ...] = ()

    def score(self, scorer: "Scorer", tokenizer: Any) -> Result:
        """Ask every replica."""
        from engine.score import cut_left

        asked = self.ask(tokenizer)
        counts = [len(requests) for requests in asked]
        requests, cut = cut_left([request for item in asked for request in item], scorer.context)
        lengths = np.array([len(request.tokens) - request.first for request in requests])
        answers = scorer.score(requests)
        ends = np.cumsum(counts)
        scored = []
        for logprobs, greedy in zip(answers.logprobs / lengths, answers.greedy, strict=True):
            parts = zip(np.split(logprobs, ends[:-1]), np.split(greedy, ends[:-1]), strict=True)
            right = np.array([float(self.right(item, *part)) for item, part in enumerate(parts)])
            accuracy = float(right.mean())
            centred = (accuracy - self.baseline) / (1 - self.baseline)
            own = Scored({"acc": right}, {"acc": accuracy, CENTRED: centred})
            scored.append(own.nothing() if np.isnan(logprobs).any() else own)
        return Result(scored, cut)


def core_task(
    name: str,
    items: list[dict[str, Any]],
    limit: int,
    shots: int | None,
    delimiter: str = " ",
    baseline: float | None = None,
) -> Form:
    """nanochat's CORE (`core_eval.py`, after Li et al. 2024, arXiv:2406.11794).

    Items in the order of Random(1337); before item i the examples of Random(1234 + i). Right is the answer of the
    lowest mean loss, or a continuation whose every token is the likeliest.

    Args:
        baseline: what guessing gets; default one in the number of answers.
    """
    items = shuffled(items, ORDER)[: limit or None]
    shots = shots or 0
    if shots >= len(items):
        raise ValueError(f"task {name} has {len(items)} items and {shots} shots; expected fewer shots than items")
    if baseline is None:
        options = items[0].get("choices", items[0].get("context_options"))
        baseline = 1 / len(options) if options else 0.0

    def ask(tokenizer: Any) -> "list[list[Request]]":
        return [core_requests(tokenizer, items, index, shots, delimiter) for index in range(len(items))]

    def right(index: int, mean: np.ndarray, greedy: np.ndarray) -> bool:
        gold = items[index].get("gold")
        return bool(greedy[0]) if gold is None else int(mean.argmax()) == gold

    return Form(name, digest_of(["core", items, shots, delimiter, baseline]), len(items), ask, right, baseline)


def shuffled(items: list[Any], seed: int) -> list[Any]:
    """The items in the order of `random.Random(seed).shuffle`."""
    items = list(items)
    random.Random(seed).shuffle(items)
    return items


def core_requests(
    tokenizer: Any, items: list[dict[str, Any]], index: int, shots: int, delimiter: str
) -> "list[Request]":
    """The requests of one item: what is scored begins where its texts part, or ends where they meet again."""
    from engine.score import Request, encode

    item = items[index]
    others = [place for place in range(len(items)) if place != index]
    chosen = random.Random(SHOTS_SEED + index).sample(others, shots)
    examples = "".join(f"{core_text(items[place], delimiter)}\n\n" for place in chosen)
    texts = [examples + text for text in core_texts(item, delimiter)]
    tokens = [(tokenizer.padding, *encode(tokenizer, text)) for text in texts]
    if "context_options" in item:
        same = common(*[each[::-1] for each in tokens])
        return [Request(each, max(len(each) - same, 1)) for each in tokens]
    if "choices" in item:
        same = common(*tokens)
        return [Request(each, min(same, len(each) - 1)) for each in tokens]
    before = (examples + item["context"].strip() + delimiter).strip()
    start = 1 + len(encode(tokenizer, before))
    return [Request(tokens[0], min(start, len(tokens[0]) - 1))]


def core_texts(item: Mapping[str, Any], delimiter: str) -> list[str]:
    """An item with each of its answers."""
    if "choices" in item:
        return [item["query"] + delimiter + choice for choice in item["choices"]]
    if "context_options" in item:
        return [context + delimiter + item["continuation"] for context in item["context_options"]]
    return [item["context"].strip() + delimiter + item["continuation"]]


def core_text(item: Mapping[str, Any], delimiter: str) -> str:
    """An item with its right answer."""
    return core_texts(item, delimiter)[item.get("gold", 0)]


def common(*sequences: Sequence[int]) -> int:
    """How many first elements all sequences share."""
    same = 0
    for each in zip(*sequences, strict=False):
        if len(set(each)) > 1:
            break
        same += 1
    return same


def letters_task(name: str, items: list[dict[str, Any]], limit: int, shots: int | None) -> Form:
    """nanochat's ChatCORE of several answers: the likeliest letter opens the reply to a question that lists them."""
    if "choices" not in items[0] or shots:
        raise ValueError(f"task {name} asks for a letter; expected choices and no shots")
    items = items[: limit or None]

    def ask(tokenizer: Any) -> "list[list[Request]]":
        return [letter_requests(tokenizer, item) for item in items]

    def right(index: int, mean: np.ndarray, greedy: np.ndarray) -> bool:
        return int(mean.argmax()) == items[index]["gold"]

    return Form(name, digest_of(["letters", items]), len(items), ask, right, LETTERS_BASELINE)


def letter_requests(tokenizer: Any, item: Mapping[str, Any]) -> "list[Request]":
    """A conversation up to each letter that may open its reply. Raises ValueError where a letter is no token there."""
    from engine.score import Request

    letters = LETTERS[: len(item["choices"])]
    listed = "".join(f"- {choice}={letter}\n" for letter, choice in zip(letters, item["choices"], strict=True))
    question = (
        f"Multiple Choice question: {item['query']}\n{listed}\nRespond only with the letter of the correct answer."
    )
    requests = []
    for letter in letters:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": letter}]
        tokens, supervised = tokenizer.render(messages)
        first = int(supervised.argmax())
        requests.append(Request(tuple(tokens[: first + 1].tolist()), first))
    if len({each.tokens[:-1] for each in requests}) > 1 or len({each.tokens for each in requests}) < len(requests):
        raise ValueError(f"the chat template of {tokenizer.name} has no token of its own for each letter; leave it out")
    return requests


FORMS: dict[str, Callable[..., Form]] = {"core": core_task, "letters": letters_task}


def bundle(folder: Path, limit: int, shots: int | None) -> list[Form]:
    """Every task of nanochat's bundle."""
    import yaml

    said, guessed = folder / "core.yaml", folder / "eval_meta_data.csv"
    if not said.is_file() or not guessed.is_file():
        raise ValueError(
            f"task core needs {said} and {guessed.name} beside it; expected nanochat's eval_bundle as --tasks-from, or "
            "core:NAME of one file"
        )
    with guessed.open(encoding="utf-8", newline="") as file:
        baselines = {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in csv.DictReader(file)}
    found = []
    for each in yaml.safe_load(said.read_text(encoding="utf-8"))["icl_tasks"]:
        path = Path(each["dataset_uri"])
        items = read_items(folder / "eval_data" / path.parent, path.stem)
        own = each["num_fewshot"][0] if shots is None else shots
        delimiter = each.get("continuation_delimiter", " ")
        label = each["label"]
        found.append(core_task(f"core:{label}", items, limit, own, delimiter, baselines[label]))
    return found


def digest_of(value: Any) -> str:
    """SHA-256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
