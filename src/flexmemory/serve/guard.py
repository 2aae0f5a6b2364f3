"""What stands before every request: a server that runs a model for one person at one machine.

A page of another site can send requests to 127.0.0.1, and with a name that it lets point there (DNS rebinding) it can
read the answers. So only requests to a known host are served, only a page of ours can change anything, and what a body
may hold is bounded before it is read. Every response forbids the browser to load anything from elsewhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES = 1 << 20
"""Of a request; texts and edits are far smaller."""
BODY_S = 30
"""Seconds that a body may take to arrive."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
"""On every response, refusals too."""


class Guard:
    """Refuses what no page of ours would send, and adds `HEADERS` to every response."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        hosts: Iterable[str] | None = LOOPBACK,
        max_body_bytes: int = MAX_BODY_BYTES,
        refuse: Callable[[int, str], Response] | None = None,
    ) -> None:
        """Stand before `app`.

        Args:
            app: What is served.
            hosts: Names or addresses, without port, under which it is reached; None for any.
            max_body_bytes: Longest body of a request.
            refuse: Makes the answer of a status and a sentence; `refused` by default.
        """
        self.app = app
        self.hosts = None if hosts is None else frozenset(hosts)
        self.max_body_bytes = max_body_bytes
        self._refuse = refuse or refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        refusal = self.refusal(scope["method"], Headers(scope=scope))
        if refusal is not None:
            await self._refuse(*refusal)(scope, receive, send_guarded)
            return
        try:
            async with asyncio.timeout(BODY_S):
                body = await read_body(receive, limit=self.max_body_bytes)
        except TimeoutError:
            await self._refuse(408, f"the body did not arrive within {BODY_S} s")(scope, receive, send_guarded)
            return
        if body is None:
            await self._refuse(413, self._too_large)(scope, receive, send_guarded)
            return
        await self.app(scope, _replayed(body, receive), send_guarded)

    def refusal(self, method: str, headers: Headers) -> tuple[int, str] | None:
        """Status and reason why a request is not served, or None."""
        host = headers.get("host", "")
        if self.hosts is not None and host_name(host) not in self.hosts:
            return 403, f"host {host[:100]!r} is not served here; open the address that the command printed"
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if origin is not None and origin != f"http://{host}":
            return 403, "requests from pages of other origins are refused"
        if site is not None and site not in ("same-origin", "none") and (method != "GET" or _is_read(headers)):
            return 403, "requests from pages of other sites are refused"
        if method not in ("GET", "HEAD", "POST"):
            return 405, f"method {method} is not known here; expected GET or POST"
        if method == "POST" and headers.get("content-type", "").split(";")[0] != "application/json":
            return 415, "the body should be application/json"
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > self.max_body_bytes:
            return 413, self._too_large
        return None

    @property
    def _too_large(self) -> str:
        return f"the body is larger than {self.max_body_bytes} bytes"


def refused(status: int, reason: str) -> JSONResponse:
    """The form of every error: {"error": one sentence}."""
    return JSONResponse({"error": reason}, status_code=status)


def host_name(host: str) -> str:
    """The name or address in a Host header, without port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()


def _is_read(headers: Headers) -> bool:
    """Whether another site's page wants the content, rather than to lead the person here by a link."""
    return headers.get("sec-fetch-mode") != "navigate"


async def read_body(receive: Receive, *, limit: int) -> bytes | None:
    """The whole body, or None where it is larger than `limit` bytes (a chunked one announces no length)."""
    body = bytearray()
    more = True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > limit:
            return None
    return bytes(body)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A receiver that gives `body` first."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
