"""The live page: cells appear while a sweep runs, in every tab, and nothing but the page is served."""

import http.client
import socket
import threading
import time

import pytest
from browser import Browser, needs_chromium
from synthetic import language_store
from tiny import setup, sweep, tiny

from analysis import report
from analysis.classify import Labelling
from analysis.serve import BURST, Live, bound, server
from engine.api import open_or_create
from engine.ranks import Rank

ROWS, COLUMNS = 16, 4


@pytest.fixture
def serving():
    """Serves stores, each on a port of its own, until the test is over."""
    running = []

    def start(path) -> int:
        own, listening = server(Live(path, Labelling())), bound(0)
        thread = threading.Thread(target=own.run, kwargs={"sockets": [listening]})
        thread.start()
        running.append((own, thread, listening))
        return listening.getsockname()[1]

    yield start
    for own, thread, listening in running:
        own.should_exit = True
        thread.join(20)
        listening.close()


def ask(port: int, path: str, host: str = "", method: str = "GET") -> http.client.HTTPResponse:
    """One answer, to a path as it is written."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.putrequest(method, path, skip_host=True)
    connection.putheader("Host", host or f"127.0.0.1:{port}")
    connection.endheaders()
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer


@needs_chromium
def test_cells_appear_in_every_tab_within_five_seconds_while_a_sweep_runs(tmp_path, serving):
    config, path = tiny(tmp_path, y=f"lr:log:1e-3:1e1:{ROWS}"), tmp_path / "s"
    open_or_create(setup(config, rows_per_launch="1"), path, None, Rank(0, 1)).close()
    with Browser(tmp_path / "profile") as browser:
        tabs = [browser.tab(f"http://127.0.0.1:{serving(path)}/")]
        tabs.append(browser.tab(tabs[0].run("location.href")))
        text, seen, over = "document.getElementById('state').textContent", [], threading.Event()
        for tab in tabs:
            tab.wait(f"{text} === '0 of {ROWS * COLUMNS} cells'")

        def watch() -> None:
            while not over.is_set():
                seen.append([tab.run(text) for tab in tabs])
                time.sleep(0.2)

        watcher = threading.Thread(target=watch)
        watcher.start()
        sweep(config, path, rows_per_launch="1")
        over.set()
        watcher.join(20)
        counts = {int(text.split()[0]) for texts in seen for text in texts}
        assert counts & set(range(1, ROWS * COLUMNS)), f"cells appear while the others still train: {sorted(counts)}"
        for tab in tabs:
            tab.wait(f"{text} === '{ROWS * COLUMNS} of {ROWS * COLUMNS} cells'", seconds=5)
            assert "one draw" in tab.run("document.getElementById('answer-text').textContent")


def test_nothing_but_the_page_and_its_map_is_served_and_only_to_this_machine(tmp_path, serving):
    port = serving(language_store(tmp_path / "s", 8, 6).path)
    assert ask(port, "/").status == 200 and ask(port, "/map.json", f"localhost:{port}").status == 200
    for path in (
        "/zarr.json",
        "/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/..%2f..%2fetc/passwd",
        "//etc/passwd",
    ):
        assert ask(port, path).status == 404, path
    assert ask(port, "/", "evil.example").status == 400, "DNS rebinding"
    assert ask(port, "/", method="POST").status == 405
    headers = ask(port, "/").headers
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"


def test_floods_are_refused_and_the_page_is_there_again_after_them(tmp_path, serving):
    port = serving(language_store(tmp_path / "s", 8, 6).path)
    answers = [ask(port, "/nothing").status for _ in range(int(BURST) + 150)]
    assert answers[0] == 404 and 429 in answers
    time.sleep(1)
    assert ask(port, "/").status == 200
    with socket.create_connection(("127.0.0.1", port)) as endless:
        endless.sendall(b"GET /" + b"a" * 100_000)
        assert b" 400 " in endless.recv(1000).splitlines()[0]


@pytest.mark.parametrize(("port", "said"), [("taken", "cannot be had"), ("70000", "expected 0 to 65535")])
def test_a_port_that_is_taken_or_none_is_one_line(tmp_path, monkeypatch, capsys, port, said):
    store = language_store(tmp_path / "s", 6, 4)
    with bound(0) as taken:
        number = str(taken.getsockname()[1]) if port == "taken" else port
        monkeypatch.setattr("sys.argv", ["report", "--store", str(store.path), "--serve", "--port", number])
        with pytest.raises(SystemExit) as stopped:
            report.main()
    [line] = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and said in line
