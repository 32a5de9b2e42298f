"""Each thing is declared once: a network, an optimizer, a hyper-parameter and a measurement are added from files of
their own, and go through sweep, resume, replay, labels, picture and report.

What the added ones needed to touch is what the README says.
"""

import re
from pathlib import Path

import numpy as np
import pytest
import toy_hyper
import toy_measurement
import toy_network
import toy_optimizer
from tiny import forget, write_chat

from analysis.maps import analyse
from analysis.plot import draw_store
from analysis.report import Labelling, report_html
from engine import sweep as train
from engine.family import FAMILIES
from engine.hyper import HYPER_PARAMETERS
from engine.measure import MEASUREMENTS
from engine.optim import OPTIMIZERS
from engine.options import read_arguments
from engine.outcome import DONE, Thresholds, measured
from engine.replay import compare, replay_cell
from engine.store import open_store

ROOT = Path(__file__).parent.parent
TOYS = {
    "network": toy_network.MIRRORS,
    "optimizer": toy_optimizer.MIRRORS,
    "hyper-parameter": toy_hyper.MIRRORS,
    "measurement": toy_measurement.MIRRORS,
}


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    """The four added ones, in the dicts that everything reads at call time."""
    monkeypatch.setitem(HYPER_PARAMETERS, "leak", toy_hyper.LEAK)
    monkeypatch.setitem(OPTIMIZERS, "signum", toy_optimizer.SIGNUM)
    monkeypatch.setitem(FAMILIES, "lstm", toy_network.FAMILY)
    monkeypatch.setitem(MEASUREMENTS, "weight_norm", toy_measurement.WEIGHT_NORM)


@pytest.fixture
def flags(tmp_path) -> dict:
    data = write_chat(tmp_path / "chat.jsonl")
    return {
        "data": str(data),
        "context": 8,
        "batch": 2,
        "data_rows": 24,
        "validation_rows": 4,
        "device": "cpu",
        "tokens": 96,
    }


SWEEPS = {
    "all four": {"network": "lstm", "optimizer": "signum", "y": "lr:log:1e-3:1e-1:3", "x": "leak:linear:0:0.9:3"},
    "a group's axis": {"network": "lstm", "y": "lr.recurrent:log:1e-3:1:2", "x": "weight_decay:lin:0:1:3"},
    "another network": {
        "width": 16,
        "optimizer": "signum,embedding=sgd",
        "y": "lr:log:1e-3:1e1:2",
        "x": "beta1:lin:0:0.9:3",
    },
}


@pytest.mark.parametrize("kind", SWEEPS)
def test_an_added_piece_is_swept_resumed_replayed_labelled_drawn_and_reported(tmp_path, flags, kind):
    path = tmp_path / "s"
    dataset = train(store=str(path), replicates=2, **SWEEPS[kind], **flags)
    whole = {name: dataset[name].values for name in dataset.data_vars}
    assert set(whole["label"].ravel()) <= {
        "converged",
        "marginal",
        "undertrained",
        "worsened",
        "collapsed",
        "nonfinite",
    }
    assert np.isfinite(whole["weight_norm"][np.isfinite(whole["val_loss"])]).all()
    store = open_store(path)
    assert store.attributes["exact"] == "in the same wave"
    forget(path, 1)
    train(store=str(path), replicates=2, **SWEEPS[kind], **flags)
    store = open_store(path)
    assert (store.status == DONE).all()
    for name in ("losses", "weights_digest", "weight_norm", "val_loss"):
        assert store.read(name).tobytes() == whole[name].tobytes(), name
    assert compare(store, 1, 2, replay_cell(store, 1, 2, "cpu", 1), 1) == ""
    assert measured(store.labels(Thresholds())).all()
    draw_store(path)
    assert (path / "figures" / "map.png").stat().st_size > 10_000
    page = report_html(analyse(store.replicate(0), Labelling(), None), Labelling())
    assert store.config.network in page and "norm of the final weights" in page


def test_digests_of_an_added_optimizer_are_its_own(tmp_path, flags):
    digests = {}
    every = [name for name, optimizer in OPTIMIZERS.items() if not optimizer.matrices_only]
    for name in every:
        swept = {"network": "lstm", "optimizer": name, "y": "lr:log:1e-3:1e-2:2", "x": "weight_decay:lin:0:1:2"}
        digests[name] = train(store=str(tmp_path / name), **swept, **flags)["weights_digest"].values.ravel()
    assert len(np.unique(np.concatenate(list(digests.values())))) == 4 * len(every)


def test_flags_of_added_pieces_follow(capsys):
    config, _ = read_arguments("", ["--network", "lstm", "--cells", "4", "--leak", "0.5", "--optimizer", "signum"])
    assert config.shape.cells == 4 and config.value("leak") == 0.5
    with pytest.raises(SystemExit):
        read_arguments("", ["--network", "lstm", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "an LSTM over bytes" in said and "share of the hidden state" in said and "hidden units" in said


def test_the_readme_names_the_files_that_were_mirrored():
    table = (ROOT / "README.md").read_text("utf-8").partition("**Where to add**")[2]
    named = dict(re.findall(r"^\| ([a-z-]+) \| (.+) \|$", table, re.MULTILINE))
    for piece, files in TOYS.items():
        assert tuple(re.findall(r"`([a-z_]+/[a-z_/]+(?:\.py)?)", named[piece])) == files, piece
