"""S3 on the loopback, as moto speaks it, that fails as networks do."""

import logging
import random
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

HANG = 1.0  # seconds that an answer takes which does not come in time


class Faulty:
    """A server's application (WSGI) some of whose requests fail.

    share: of all requests. unconditional: whether If-None-Match is ignored, as some stores do. failed: how often each
    kind of failure has happened.
    """

    def __init__(self) -> None:
        self.app, self.random, self.guard = (
            DomainDispatcherApplication(create_backend_app),
            random.Random(0),
            threading.Lock(),
        )
        self.kinds = [self.refused, self.answer_lost, self.cut_off, self.hanging]
        self.share, self.unconditional = 0.0, False
        self.failed = {kind.__name__: 0 for kind in self.kinds}

    def __call__(self, environ: dict[str, Any], start: Callable) -> Iterable[bytes]:
        """Answer one request, or fail."""
        if self.unconditional:
            environ.pop("HTTP_IF_NONE_MATCH", None)
        with self.guard:
            fails = self.random.random() < self.share
            kind = self.random.choice(self.kinds)
            self.failed[kind.__name__] += fails
        return kind(environ, start) if fails else self.app(environ, start)

    def refused(self, environ: dict[str, Any], start: Callable) -> Iterable[bytes]:
        """The server has other worries, and does nothing."""
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        start("500 Internal Server Error", [])
        return []

    def answer_lost(self, environ: dict[str, Any], start: Callable) -> Iterable[bytes]:
        """The request comes through; its answer does not."""
        list(self.app(environ, lambda *_: None))
        return self.closed(environ)

    def cut_off(self, environ: dict[str, Any], start: Callable) -> Iterable[bytes]:
        """The line is cut in the middle of what is sent."""
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0) // 2)
        return self.closed(environ)

    def hanging(self, environ: dict[str, Any], start: Callable) -> Iterable[bytes]:
        """The request comes through; its answer comes too late."""
        answer = list(self.app(environ, lambda *_: None))
        time.sleep(HANG)
        return self.closed(environ) or answer

    def closed(self, environ: dict[str, Any]) -> list[bytes]:
        """End the connection."""
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        raise ConnectionAbortedError("as this test asks")


@contextmanager
def serving(bucket: str) -> Iterator[tuple[str, Faulty]]:
    """The address of a server with one bucket, and what makes it fail."""
    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    faulty = Faulty()
    server = make_server("127.0.0.1", 0, faulty, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.port}"
    with urllib.request.urlopen(urllib.request.Request(f"{address}/{bucket}", method="PUT")):
        pass
    yield address, faulty
    server.shutdown()
    thread.join()
    server.server_close()
