"""The live page of a running sweep, from its store, on the loopback: `uv run analysis/report.py --store S --serve`.

Three addresses and no files: the page, its map as JSON, nothing else. The map is computed once a change of the store,
however many tabs ask. Requests under another host's name (DNS rebinding) are refused, as are floods.
"""

import json
import socket
import time
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from analysis.classify import Labelling
from analysis.maps import analyse
from analysis.page import page_data
from analysis.report import answer_html, labels_html, report_html
from engine.command import screen
from engine.store import open_map

if TYPE_CHECKING:
    from starlette.applications import Starlette

LOOPBACK = "127.0.0.1"
HOSTS = [LOOPBACK, "localhost"]
RATE, BURST = 50.0, 100.0  # requests a second that are answered, and at once: a dozen tabs ask for one a second each
CONNECTIONS = 64
LONGEST_HEAD = 16_384  # bytes of a request before its end
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


class Live:
    """A store's page and map as they are now."""

    def __init__(self, path: str | Path, labelling: Labelling) -> None:
        """Raises ValueError where there is no store with a map."""
        self.path, self.labelling, self.lock = path, labelling, Lock()
        self.found = analyse(open_map(path, labelling.replicate), labelling, None)
        self.at, self.fresh = "", b""

    def stamp(self) -> str:
        """What changes whenever a cell is stored."""
        place = self.found.store.place
        return str(hash((place.get("zarr.json"), tuple(sorted(place.items("status/c"))))))

    def map(self) -> tuple[str, bytes]:
        """The stamp, and the map as JSON."""
        with self.lock:
            now = self.stamp()
            if now != self.at:
                self.found = analyse(open_map(self.path, self.labelling.replicate), self.labelling, None)
                sections = {"answer": answer_html(self.found), "labels": labels_html(self.found.codes)}
                values = page_data(self.found, live=True) | {"sections": sections, "stamp": now}
                self.fresh = json.dumps(values, allow_nan=False).encode()
                self.at = now
            return self.at, self.fresh

    def page(self) -> str:
        """The whole page."""
        self.map()
        with self.lock:
            return report_html(self.found, self.labelling, live=True)


class Flood:
    """Answers RATE requests a second and refuses the rest (ASGI middleware)."""

    def __init__(self, app: Any) -> None:
        self.app, self.left, self.last = app, BURST, time.monotonic()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass one request on, or refuse it."""
        from starlette.responses import PlainTextResponse

        now = time.monotonic()
        self.left, self.last = min(self.left + RATE * (now - self.last), BURST), now
        if scope["type"] == "http" and self.left < 1:
            await PlainTextResponse("too many requests", 429, {"Retry-After": "1"})(scope, receive, send)
            return
        self.left -= 1
        await self.app(scope, receive, send)


def application(live: Live) -> "Starlette":
    """The page at /, the map at /map.json."""
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, Response
    from starlette.routing import Route

    def page(request: Request) -> Response:
        return HTMLResponse(live.page(), headers=HEADERS)

    def fresh_map(request: Request) -> Response:
        stamp, values = live.map()
        if request.query_params.get("since") == stamp:
            return Response(status_code=204, headers=HEADERS)
        return Response(values, media_type="application/json", headers=HEADERS)

    guards = [Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS, www_redirect=False), Middleware(Flood)]
    return Starlette(routes=[Route("/", page), Route("/map.json", fresh_map)], middleware=guards)


def bound(port: int) -> socket.socket:
    """A socket that listens on the loopback. Raises ValueError for a port that is taken or none."""
    if not 0 <= port <= 65535:
        raise ValueError(f"port is {port}; expected 0 to 65535 (0: any that is free)")
    taken = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((LOOPBACK, port))
        taken.listen(CONNECTIONS)
    except OSError as error:
        taken.close()
        raise ValueError(f"port {port} cannot be had ({error.strerror}); give another --port, or 0 for any") from None
    return taken


def server(live: Live) -> Any:
    """uvicorn, ready to run on a socket. Raises ValueError where it is not installed."""
    try:
        import uvicorn
    except ImportError:
        raise ValueError("--serve needs starlette and uvicorn; install them with uv sync --extra serve") from None
    return uvicorn.Server(
        uvicorn.Config(
            application(live),
            http="h11",
            ws="none",
            log_level="warning",
            server_header=False,
            limit_concurrency=CONNECTIONS,
            timeout_keep_alive=5,
            h11_max_incomplete_event_size=LONGEST_HEAD,
        )
    )


def serve(path: str | Path, labelling: Labelling, port: int) -> None:
    """Show a store until Ctrl-C.

    Raises:
        ValueError: no store, a port that is taken, or the extra packages are missing.
    """
    own = server(Live(path, labelling))
    with bound(port) as listening:
        screen().print(f"live: http://{LOOPBACK}:{listening.getsockname()[1]}/ (Ctrl-C ends it)", soft_wrap=True)
        with suppress(KeyboardInterrupt):
            own.run(sockets=[listening])
