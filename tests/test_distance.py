"""Distance to the border and what scores have to do with it, on planted maps and planted relations."""

import numpy as np
import pytest
from tiny import sweep, tiny

from analysis import distance
from analysis.distance import cell_distances, findings, relation, resolution, signed_distance
from analysis.evaluate import Thresholds
from engine.config import make_config


def planted(seeds: int, cells_a_side: int, slope: float, by_rate: float, noise: float, random) -> tuple:
    """Cells over a border that moves with the column: distance, ranks of the rate, and scores
    slope * distance + by_rate * log LR + noise [seed, cell]."""
    log_lr, column = (each.ravel() for each in np.meshgrid(*[np.arange(cells_a_side)] * 2, indexing="ij"))
    border = cells_a_side * (0.4 + 0.3 * np.sin(3.0 * column / cells_a_side))
    far = border - log_lr
    scores = slope * far + by_rate * log_lr + noise * random.normal(size=(seeds, len(far)))
    return far, log_lr[None].astype(float), scores


# ---- distances


def test_a_straight_border_lies_where_p_crosses_one_half():
    y, x = np.linspace(-4, 0, 41), np.linspace(3, 5, 5)
    share = np.repeat(np.clip(0.5 - 2.5 * (y + 1.53), 0, 1)[:, None], 5, axis=1)
    far = signed_distance(share, y, x)
    # P is linear around the crossing, so interpolation is exact
    np.testing.assert_allclose(far, np.repeat(-(y + 1.53)[:, None], 5, axis=1), atol=1e-12)


def test_of_one_seed_the_border_lies_midway_between_the_cells_that_part():
    share = np.array([[1.0], [1.0], [0.0]]).repeat(2, axis=1)
    far = signed_distance(share, np.array([0.0, 0.5, 1.0]), np.array([0.0, 1.0]))
    np.testing.assert_allclose(far[:, 0], [0.75, 0.25, -0.25])


def test_a_round_border_is_as_far_as_its_radius_says():
    y = x = np.linspace(-1, 1, 81)
    radius = np.hypot(*np.meshgrid(y, x, indexing="ij"))
    far = signed_distance(np.clip(0.5 + 4 * (0.6 - radius), 0, 1), y, x)
    # points of the border lie on the grid's lines, up to half a step apart
    assert np.abs(far - (0.6 - radius)).max() < 0.01
    share = np.where(radius < 0.6, 1.0, 0.0)
    share[0, 0] = np.nan
    assert np.isnan(signed_distance(share, y, x)[0, 0])


def test_where_there_is_no_border_there_is_no_distance(tmp_path):
    with pytest.raises(ValueError, match="one side"):
        signed_distance(np.ones((3, 3)), np.arange(3.0), np.arange(3.0))
    store = sweep(tiny(tmp_path, x="tokens:linear:32:96:2"), tmp_path / "s")
    with pytest.raises(ValueError, match="axis tokens is linear"):
        cell_distances(store, Thresholds())
    (tmp_path / "p.csv").write_text("lr,tokens\n1e-2,64\n1e-1,48\n")
    points = tiny(tmp_path).change(y="", x="", tokens=None, points=str(tmp_path / "p.csv"))
    with pytest.raises(ValueError, match="list of points"):
        cell_distances(sweep(points, tmp_path / "points"), Thresholds())


# ---- relations


@pytest.mark.parametrize("sign", [1, -1])
def test_a_planted_relation_is_found_with_its_sign(sign):
    random = np.random.default_rng(1)
    far, rate, scores = planted(4, 6, sign, 0.5, 1.0, random)
    found = relation("planted", far, rate, scores, False)
    assert sign * found.partial > 0.5 and found.p < 0.01
    assert min(sign * found.low, sign * found.high) > 0


def test_what_comes_of_the_rate_alone_is_not_taken_for_the_border():
    random = np.random.default_rng(2)
    far, rate, scores = planted(4, 6, 0.0, 1.0, 0.5, random)
    found = relation("by rate", far, rate, scores, False)
    assert found.plain < -0.7, "the distance falls as the rate rises"
    assert abs(found.partial) < 0.3 and found.p > 0.05


def test_of_no_relation_one_in_twenty_is_found():
    random, found = np.random.default_rng(3), 0
    for _ in range(200):
        far, rate, scores = planted(3, 5, 0.0, 1.0, 1.0, random)
        found += relation("none", far, rate, scores, False, draws=200).p < 0.05
    assert 1 <= found <= 22, "binomial: 99.9% of 200 at 0.05"


def test_items_shared_by_cells_are_resampled_together():
    random = np.random.default_rng(4)
    far, rate, ability = planted(3, 6, 0.2, 0.0, 0.0, random)
    ease = random.normal(size=300) * 2
    luck = random.random((3, 1, 300))  # an item falls the same way in all cells of a seed
    items = (luck < 1 / (1 + np.exp(-(ability[:, :, None] + ease)))).astype(float)
    found = relation("items", far, rate, items, True)
    assert found.items == 300 and found.low <= found.partial <= found.high and found.p < 0.01
    told = resolution("items", items)
    assert told.lone == pytest.approx(100 * 1.96 / (2 * 300**0.5))
    assert told.paired < 0.7 * told.apart, "paired differences resolve more"


def test_independent_items_resolve_no_more_in_pairs():
    random = np.random.default_rng(5)
    items = (random.random((2, 20, 500)) < 0.5).astype(float)
    told = resolution("coins", items)
    assert told.lone == pytest.approx(4.38, abs=0.01), "500 items: ±4.4 points"
    assert told.paired == pytest.approx(told.apart, rel=0.05) and told.noise > 0.7
    assert "500 items of coins: one score is known to ±4.4 points" in told.sentence()


def test_too_few_cells_and_cells_of_one_column_tell_nothing():
    far = np.linspace(-1, 1, 9)
    with pytest.raises(ValueError, match="known in 5 cells"):
        relation("few", far[:5], np.arange(5.0)[None], far[None, :5], False)
    with pytest.raises(ValueError, match="the distance is the rate's own"):
        relation("one column", far, np.arange(9.0)[None], far[None], False)


# ---- a store


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A sweep with a border, some of whose cells have scores of a task that are planted."""
    from analysis.scores import find_task, make_task
    from analysis.tasks import Scored

    folder = tmp_path_factory.mktemp("sweep")
    store = sweep(tiny(folder, y="lr:log:1e-3:1e3:8", x="tokens:log:32:512:5", replicates=2), folder / "s")

    class Task:
        name, items, digest, lower = "planted", 40, "0", ()

    random, start = np.random.default_rng(0), Scored({"acc": np.zeros(40)}, {"acc": 0.0})
    far = cell_distances(store, Thresholds())
    made = make_task(store, Task(), start, {})
    for place in np.argwhere(np.ones(store.run.shape)):
        right = (random.random(40) < 1 / (1 + np.exp(-far[tuple(place[1:])]))).astype(float)
        made.write({tuple(place): (Scored({"acc": right}, {"acc": right.mean()}), start)})
    assert find_task(store, Task()) is not None
    return store


def test_a_store_with_scores_says_what_they_have_to_do_with_the_distance(scored, monkeypatch, capsys):
    found = findings(scored, Thresholds())
    assert [each.name for each in found.relations] == ["held-out loss", "planted"]
    score = found.relations[1]
    assert score.seeds == 2 and score.items == 40 and score.plain > 0.5
    monkeypatch.setattr("sys.argv", ["distance.py", "--store", str(scored.path)])
    distance.main()
    said = capsys.readouterr().out
    assert "held-out loss" in said and "40 items of planted" in said
    assert (scored.figures / "distance.png").stat().st_size > 10_000


def test_report_and_recommendation_show_scores_and_distance(scored, tmp_path):
    from analysis.classify import Labelling
    from analysis.export import export
    from analysis.maps import analyse
    from analysis.recommend import recommend
    from analysis.report import write_report

    found = recommend(scored)
    cell = ",".join(map(str, found.cell()))
    score, far = found.notes()[-2:]
    assert score.startswith(f"Cell {cell} scores: planted: acc 0.") and "0 before training (difference +0." in score
    assert far.startswith("It lies 0.") and "decades inside the border" in far
    write_report(tmp_path / "r.html", Labelling(), analyse(scored.replicate(0), Labelling(), None), distance=True)
    page = (tmp_path / "r.html").read_text("utf-8")
    assert "planted: acc" in page and "decades inside the border" in page and "40 items of planted" in page
    assert "free of log LR: rank correlation" in page
    export(scored, tmp_path / "cells.csv")
    (name,) = [each for each in (tmp_path / "cells.csv").read_text("utf-8").splitlines()[0].split(",") if "/" in each]
    assert name.strip('"') == "planted/acc"


def test_a_store_that_has_no_border_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    config = make_config("two_layer", y="lr.0:log:1e-3:1e-2:2", x="lr.1:log:1e-3:1e-2:2", steps=4)
    store = sweep(config, tmp_path / "s")
    monkeypatch.setattr("sys.argv", ["distance.py", "--store", str(store.path)])
    with pytest.raises(SystemExit) as end:
        distance.main()
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1 and "one side" in err
