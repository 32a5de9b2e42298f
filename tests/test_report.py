"""The report is one file that works without a network, looked at in headless Chromium where there is one."""

import base64
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image
from synthetic import julia_measure, language_store, two_layer_store

from analysis import page, report
from analysis.charts import chart_ticks, label_places
from analysis.page import indexed, packed
from analysis.report import json_in_html

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


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


def chromium(tmp_path, address: str, *arguments: str) -> str:
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=4000", *arguments, address]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium found; install Debian's package chromium to run this test")
def test_the_page_works_in_a_browser(tmp_path, monkeypatch):
    store = language_store(tmp_path / "s", 32, 16)
    path = write(monkeypatch, store)
    address = f"{path.as_uri()}#cells=5,3;20,10&layer=0"
    page = chromium(tmp_path, address, "--dump-dom")
    assert 'data-ready="yes"' in page  # the script ran to its end
    assert "Row 20, column 10" in page
    assert f"uv run engine/replay.py --store {store.path} --row 20 --col 10" in page
    picture = tmp_path / "page.png"
    chromium(tmp_path, address, f"--screenshot={picture}", "--window-size=1280,900")
    pixels = np.array(Image.open(picture).convert("RGB"))
    for code, colour in enumerate(((11, 85, 159), (166, 35, 28))):  # converged, nonfinite
        assert (np.abs(pixels.astype(int) - colour).max(-1) < 3).sum() > 1000, code
