"""The report is one file that works without a network, looked at in headless Chromium where there is one."""

import base64
import io
import json
import re
from html import escape

import numpy as np
import pytest
from browser import Browser, needs_chromium
from PIL import Image
from synthetic import julia_measure, language_store, two_layer_store, write_store

from analysis import page, report
from analysis.charts import chart_ticks, label_places
from analysis.colours import LABEL_COLOURS
from analysis.page import indexed, packed
from analysis.recommend import recommend
from analysis.report import json_in_html
from engine.config import make_config
from engine.outcome import LABELS, MEANINGS, Thresholds


def write(monkeypatch, store, *arguments):
    monkeypatch.setattr("sys.argv", ["report", "--store", str(store.path), *map(str, arguments)])
    report.main()
    return store.figures / "report.html"


def page_data(html: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)[1])


def unpack(entry: dict) -> np.ndarray:
    return np.frombuffer(base64.b64decode(entry["bytes"]), entry["dtype"])


def test_json_cannot_leave_its_script_element():
    value = {"name": "</script><!--<script>alert(1)&amp;", "number": 0.1}
    text = json_in_html(value)
    assert not set("<>&") & set(text)
    assert json.loads(text) == value


def test_arrays_survive_packing():
    array = np.array([[1.5, np.nan], [-np.inf, 3]], np.float32)
    assert np.array_equal(unpack(packed(array)), array.ravel(), equal_nan=True)
    assert indexed(np.array([0, 0.5, 1, 2, np.nan])).tolist() == [1, 128, 254, 255, 0]


def test_chart_ticks_are_round_and_names_do_not_overlap():
    assert [round(10**t, 6) for t in chart_ticks(0, 1.2)] == [1, 2, 5, 10]
    assert chart_ticks(0.5, 4) == [1, 2, 3, 4]
    places = label_places([(10.0, "a"), (12.0, "b"), (50.0, "c")])
    assert places == {"a": 10, "b": 24, "c": 50}


def test_the_page_holds_every_number_and_no_address(tmp_path, monkeypatch):
    store = language_store(tmp_path / "s", 32, 16)
    html = write(monkeypatch, store).read_text()
    data = page_data(html)
    assert data["shape"] == [32, 16]
    for name in ("first_loss", "last_loss", "val_loss", "steps", "nonfinite_step"):
        assert np.array_equal(unpack(data["arrays"][name]), store.read(name).ravel(), equal_nan=True)
    steps = unpack(data["traces"]["step"])
    losses = unpack(data["traces"]["losses"]).reshape(32, 16, -1)
    assert np.array_equal(losses, store.read("losses")[:, :, steps], equal_nan=True)
    assert not re.search(r"https?://|@import|src=", html)
    assert not re.search(r"\{\{\w+\}\}", html)
    for part in (
        "straight line",
        "best rate",
        "one seed, one draw",
        "Not measured",
        "configuration hash",
        "early warning",
    ):
        assert part in html


def test_text_from_the_store_is_escaped(tmp_path, monkeypatch):
    folder = tmp_path / "<img src=x onerror=alert(1)>&'s"
    store = two_layer_store(folder, julia_measure(24))
    html = write(monkeypatch, store).read_text()
    assert "<img" not in html
    assert "onerror=alert(1)&gt;&amp;" in html
    assert page_data(html)["store"].startswith("'")  # quoted for the shell


def test_large_maps_and_long_traces_are_thinned(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "MOST_CELLS", 16)
    monkeypatch.setattr(page, "MOST_LOSSES", 1000)
    store = language_store(tmp_path / "s", 32, 32)
    html = write(monkeypatch, store).read_text()
    data = page_data(html)
    assert "every 2th row" in html
    assert data["shape"] == [16, 16]
    assert data["stride"] == 2
    thin = data["traces"]["row_stride"]
    assert thin > 1
    steps = unpack(data["traces"]["step"])
    losses = unpack(data["traces"]["losses"]).reshape(-1, -(-16 // thin), len(steps))
    assert np.array_equal(losses, store.read("losses")[:: 2 * thin, :: 2 * thin][:, :, steps], equal_nan=True)


def test_a_map_without_a_boundary_says_so(tmp_path, monkeypatch):
    html = write(monkeypatch, two_layer_store(tmp_path / "s", -np.ones((12, 12)))).read_text()
    assert "there is no dimension" in html
    assert "a map of a learning rate against something else" in html


def test_too_few_seeds_for_a_law_are_said(tmp_path, monkeypatch):
    html = write(monkeypatch, language_store(tmp_path / "s", 12, 3)).read_text()
    assert "LR50 needs 8, LR90 16" in html


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """A report in a browser, and its store."""
    folder = tmp_path_factory.mktemp("report")
    store = language_store(folder / "s", 32, 16)
    with pytest.MonkeyPatch.context() as patch:
        path = write(patch, store)
    with Browser(folder / "profile") as browser:
        yield browser.tab(f"{path.as_uri()}#cells=5,3;20,10&layer=0"), store


@needs_chromium
def test_the_page_works_in_a_browser(opened):
    tab, store = opened
    assert tab.run("document.getElementById('where').textContent") == "Row 20, column 10"
    replay = tab.run("document.getElementById('replay').textContent")
    assert replay == f"uv run engine/replay.py --store {store.path} --row 20 --col 10"
    pixels = np.array(Image.open(io.BytesIO(tab.picture())).convert("RGB")).astype(int)
    for name in ("converged", "nonfinite"):
        colour = [int(LABEL_COLOURS[name][i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(pixels - colour).max(-1) < 3).sum() > 1000, name


@needs_chromium
def test_the_map_is_reached_and_read_by_keys(opened):
    tab, _ = opened
    tab.run("document.getElementById('map').focus()")
    tab.press("ArrowRight")
    before = tab.run("document.getElementById('where').textContent")
    for key in ("ArrowUp", "ArrowRight", "ArrowRight"):
        tab.press(key)
    row, column = map(int, re.findall(r"\d+", before))
    assert tab.run("document.getElementById('where').textContent") == f"Row {row + 1}, column {column + 2}"
    tab.press("Enter")
    tab.press("+")
    assert tab.run("view.scale") == 1.5 and tab.run("chosen.length") == 3
    tab.press("0")
    assert tab.run("view.scale") == 1


@needs_chromium
def test_axe_finds_no_violation_with_every_part_open(opened):
    axe = pytest.importorskip("axe_core_python.base")
    tab, _ = opened
    tab.run("document.querySelectorAll('details').forEach(each => { each.open = true; })")
    tab.run(axe.AXE_FILE_PATH.read_text("utf-8") + ";0")
    found = tab.run("axe.run().then(r => r.violations.map(v => [v.id, v.nodes.map(n => n.html).slice(0, 2)]))")
    assert found == []


def test_the_answer_comes_first_and_every_label_is_defined_where_it_is_shown(tmp_path, monkeypatch):
    store = language_store(tmp_path / "s", 16, 8)
    html = write(monkeypatch, store).read_text()
    answer = html.index(escape(recommend(store.store).sentence()))
    assert answer < html.index('id="map"') < html.index("How it was measured") < html.index("Boundary dimension")
    for code in np.unique(store.labels(Thresholds())):
        assert MEANINGS[LABELS[code]] in html
    assert "One seed (0): one draw." in html


def test_the_answer_has_the_thresholds_of_the_map(tmp_path, monkeypatch):
    store = language_store(tmp_path / "s", 16, 8)
    widest = recommend(store.store, Thresholds(moved=0.4))
    assert [column.trains for column in widest.columns] != [column.trains for column in recommend(store.store).columns]
    row = widest.row(widest.columns[-1])
    html = write(monkeypatch, store, "--moved", "0.4").read_text()
    assert "".join(f"<td>{escape(cell)}</td>" for cell in row) in html


def test_p_train_is_a_map_where_there_are_several_seeds(tmp_path, monkeypatch):
    rate, breaks = np.geomspace(1e-3, 10, 6)[:, None], 10.0 ** np.arange(-2, 2)[:, None, None]
    loss = np.where(rate < breaks, 4.0, 9.0) * np.ones((4, 6, 3))
    config = make_config(y="lr:log:1e-3:10:6", x="tokens:log:1e3:6e4:3", replicates=4, trace="off")
    arrays = {"first_loss": 5.5, "val_first": 5.5, "val_loss": loss, "last_loss": loss, "loss_min": 3, "loss_max": 9}
    data = page_data(write(monkeypatch, write_store(tmp_path / "s", config, arrays)).read_text())
    assert [layer["name"] for layer in data["layers"]][-1] == "P(train), 4 seeds"
    share = unpack(data["arrays"]["trained"]).reshape(6, 3)
    assert share == pytest.approx((loss < 5).mean(0))
    assert data["y"]["name"] == "learning rate"


def test_a_map_of_128_by_128_cells_with_traces_stays_small(tmp_path, monkeypatch):
    path = write(monkeypatch, language_store(tmp_path / "s", 128, 128))
    assert path.stat().st_size < 15e6
