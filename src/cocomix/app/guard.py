"""Refuse what the page itself never requests, before Gradio sees it, and protect what the browser shows."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from typing import Any
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cocomix.app.requests import CANCEL_KEYS, MAX_BYTES, RESET_KEYS, check_end, check_event
from cocomix.common.errors import InputError
from cocomix.serving.guard import Addresses, Refusal, read_body

# With this policy the browser blocks whatever the page or Gradio would load from or send to another site.
POLICY = "; ".join(
    (
        "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:",
        "connect-src 'self'",
        "form-action 'self'",
        "frame-ancestors 'self'",
        "base-uri 'self'",
        "object-src 'none'",
    )
)
HEADERS = {
    "content-security-policy": POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
# All that the page requests. Gradio also serves files, fetches addresses, and runs functions without their queue.
FILES = re.compile(r"/(assets|static)/.+|/theme\.css|/favicon\.ico")
STREAM = "/gradio_api/queue/data"
BODIES: dict[str, Callable[[Any, bytes], None]] = {
    "/gradio_api/queue/join": check_event,
    "/gradio_api/cancel": lambda _page, body: check_end(CANCEL_KEYS, body),
    "/gradio_api/reset": lambda _page, body: check_end(RESET_KEYS, body),
}
"""What checks the body of each request that has one, given the page."""
ROUTES = re.compile(rf"{FILES.pattern}|/|{STREAM}|/config|/gradio_api/(app_id|startup-events|heartbeat/[\w-]{{1,64}})")

OPEN, OPEN_PER_ADDRESS = 768, 256
"""Maximum number of requests that are open at the same time. A browser tab keeps up to two open."""
RECENT, WINDOW_SECONDS = 500, 10.0
"""Maximum number of requests of an address within a window of time, without the page's own files."""


class Visitors:
    """Count the open and the recent requests of each address."""

    def __init__(self) -> None:
        self.open: Counter[str] = Counter()
        self.recent: Counter[str] = Counter()
        self.window_end = 0.0

    def enter(self, address: str, counted: bool) -> None:
        """Admit a request. `counted` is False for files of the page, of which a visit loads many.

        Raises:
            Refusal: there are too many.
        """
        if (now := time.monotonic()) > self.window_end:
            self.recent.clear()
            self.window_end = now + WINDOW_SECONDS
        self.recent[address] += counted
        too_many = self.open.total() >= OPEN or self.open[address] >= OPEN_PER_ADDRESS
        if too_many or self.recent[address] > RECENT:
            raise Refusal(503, "the page is busy; try again in a few seconds")
        self.open[address] += 1

    def leave(self, address: str) -> None:
        """End a request."""
        self.open[address] -= 1
        if not self.open[address]:
            del self.open[address]


class Guard:
    """Middleware that checks each request, and adds the security headers to each response.

    Args:
        app: the application.
        page: Gradio's page, whose functions the requests run.
        addresses: the names under which the page is served.
    """

    def __init__(self, app: ASGIApp, page: Any, addresses: Addresses) -> None:
        self.app, self.page, self.addresses = app, page, addresses
        self.visitors = Visitors()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        address = (scope.get("client") or ("",))[0]
        protected = _protected(send)
        try:
            self.addresses.check(Headers(scope=scope))
            self.visitors.enter(address, not FILES.fullmatch(scope["path"]))
        except Refusal as refusal:
            await _respond(refusal, scope, receive, protected)
            return
        try:
            receive = await self._checked(scope, receive)
            query = scope["query_string"] if scope["path"] == STREAM else b""  # the page's other routes need none
            await self.app({**scope, "query_string": query}, receive, protected)
        except Refusal as refusal:
            await _respond(refusal, scope, receive, protected)
        finally:
            self.visitors.leave(address)

    async def _checked(self, scope: Scope, receive: Receive) -> Receive:
        """Check route and body, and return what receives the body again.

        Raises:
            Refusal: the page sends no such request.
        """
        method, path = scope["method"], scope["path"]
        if method == "POST" and path in BODIES:
            if Headers(scope=scope).get("content-type", "").partition(";")[0] != "application/json":
                raise Refusal(400, "the request is not JSON")  # forms of other sites cannot send JSON
            body = await read_body(scope, receive, MAX_BYTES)
            try:
                BODIES[path](self.page, body)
            except InputError as problem:
                raise Refusal(400, str(problem)) from None
            return _replayed(body, receive)
        if method not in ("GET", "HEAD") or not ROUTES.fullmatch(path):
            raise Refusal(404, "the page has nothing there, and accepts no files")
        if path == STREAM and not self._is_known(scope["query_string"]):
            raise Refusal(404, "there is no such session")
        return receive

    def _is_known(self, query: bytes) -> bool:
        """Whether this is the query of a session with a request; for others, Gradio would fail while it answers."""
        try:
            sessions = parse_qs(query.decode("ascii"), max_num_fields=4).get("session_hash", [])
        except ValueError:
            return False
        return len(sessions) == 1 and sessions[0] in self.page._queue.pending_messages_per_session


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Return a function that receives the body once more, and then what else arrives."""
    messages: Iterable[Message] = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def again() -> Message:
        for message in messages:
            return message
        return await receive()

    return again


def _protected(send: Send) -> Callable[[Message], Awaitable[None]]:
    async def send_protected(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(HEADERS)
        await send(message)

    return send_protected


async def _respond(refusal: Refusal, scope: Scope, receive: Receive, send: Send) -> None:
    """Send a refusal, in the form in which Gradio's own are sent. The rest of the request is not read."""
    headers = {"connection": "close"} | ({"retry-after": "5"} if refusal.status == 503 else {})
    await JSONResponse({"detail": str(refusal)}, refusal.status, headers)(scope, receive, send)
