"""A headless Chromium, driven over a pipe by its DevTools protocol; no port, no network, no other package."""

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium found; install Debian's package chromium to run this test"
)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--window-size=1280,1000",
    "--remote-debugging-pipe",
)


class Browser:
    """One process of Chromium, ended by `with`; `tab` opens pages in it."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        # it reads commands from descriptor 3 and answers on 4
        redirected = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        command = ["bash", "-c", redirected, CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(command, pass_fds=(theirs_in, theirs_out), stdout=quiet, stderr=quiet)
        os.close(theirs_in)
        os.close(theirs_out)
        self.reader, self.writer = os.fdopen(ours_in, "rb"), os.fdopen(ours_out, "wb")
        self.sent, self.unread = 0, b""

    def call(self, method: str, session: str = "", **parameters: Any) -> dict[str, Any]:
        """One command's result; events are passed over. Raises AssertionError where the browser refuses."""
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": parameters}
        self.writer.write(json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        self.writer.flush()
        while True:
            while b"\0" not in self.unread:
                self.unread += os.read(self.reader.fileno(), 1 << 20)
            text, _, self.unread = self.unread.partition(b"\0")
            answer = json.loads(text)
            if answer.get("id") == self.sent:
                assert "error" not in answer, answer["error"]
                return answer["result"]

    def tab(self, address: str) -> "Tab":
        """A page at an address."""
        return Tab(self, address)

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *error: object) -> None:
        self.call("Browser.close")
        self.process.wait(20)
        self.reader.close()
        self.writer.close()


class Tab:
    """One page."""

    def __init__(self, browser: Browser, address: str) -> None:
        self.browser = browser
        target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        browser.call(
            "Page.navigate", self.session, url=address
        )  # answers when the page has taken the blank one's place
        self.wait("document.readyState === 'complete' && document.body.dataset.ready === 'yes'")

    def run(self, script: str) -> Any:
        """The value of an expression, a promise's once it is kept."""
        named = {"expression": script, "awaitPromise": True, "returnByValue": True}
        found = self.browser.call("Runtime.evaluate", self.session, **named)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, script: str, seconds: float = 20) -> None:
        """Until an expression is true, looked at every 50 ms. Raises AssertionError after so many seconds."""
        held = (
            f"new Promise(held => {{ const end = Date.now() + {1000 * seconds}; (function look() {{"
            f" if ({script}) held(true); else if (Date.now() > end) held(false); else setTimeout(look, 50); }})(); }})"
        )
        assert self.run(held), f"not within {seconds} s: {script}"

    def press(self, key: str) -> None:
        """Press and release a key."""
        for kind in ("keyDown", "keyUp"):
            self.browser.call("Input.dispatchKeyEvent", self.session, type=kind, key=key)

    def picture(self) -> bytes:
        """The page as a PNG."""
        return base64.b64decode(self.browser.call("Page.captureScreenshot", self.session, format="png")["data"])
