"""What every server of this package checks about a request: the name it is sent to, its sender, and its body."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from typing import NamedTuple
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import Receive, Scope

BODY_SECONDS = 20.0
"""Time limit for sending a request's body."""


class Refusal(Exception):
    """A request is refused, with an HTTP status."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Addresses(NamedTuple):
    """The names under which a server answers.

    Attributes:
        hosts: names that `Host` may have besides numeric addresses. A site that resolves its own name to this machine
            (DNS rebinding) sends that name.
        origin: host and port of the public address; None without a reverse proxy.
    """

    hosts: frozenset[str]
    origin: str | None

    @classmethod
    def of(cls, host: str, root_path: str | None = None) -> Addresses:
        """Return the names for a host to bind to and a public address."""
        public = urlsplit(root_path) if root_path else None
        names = ["localhost", host, socket.gethostname(), public.hostname if public else None]
        return cls(frozenset(name.lower() for name in names if name), public.netloc.lower() if public else None)

    def check(self, headers: Headers) -> None:
        """Refuse other hosts, and requests from pages of other sites."""
        host, origin = headers.get("host", ""), headers.get("origin")
        try:
            name = urlsplit(f"//{host}").hostname or ""
            sender = None if origin is None else urlsplit(origin).netloc.lower()
        except ValueError:
            raise Refusal(400, "the address of the request is not valid") from None
        if name not in self.hosts and not _is_numeric(name):
            raise Refusal(
                403, "this server does not answer to that host name; use its IP address, or start it with --host NAME"
            )
        if sender is not None and sender not in (host.lower(), self.origin):
            raise Refusal(403, "this server does not answer other sites")


def _is_numeric(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


async def read_body(scope: Scope, receive: Receive, max_bytes: int) -> bytes:
    """Read a body within the limits of size and time.

    Raises:
        Refusal: it is too large, too slow or incomplete.
    """
    length = Headers(scope=scope).get("content-length", "0")
    if not length.isdecimal() or int(length[:12]) > max_bytes:
        raise Refusal(413, f"the request is too large; the limit is {max_bytes:,} bytes")
    body, more = bytearray(), True
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Refusal(400, "the request is incomplete")
                body += message.get("body", b"")
                more = message.get("more_body", False)
                if len(body) > max_bytes:
                    raise Refusal(413, f"the request is too large; the limit is {max_bytes:,} bytes")
    except TimeoutError:
        raise Refusal(408, "the request took too long") from None
    return bytes(body)
