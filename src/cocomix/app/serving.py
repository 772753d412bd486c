"""Serve the page, by default only to this machine, and prevent it from loading anything from other sites."""

from __future__ import annotations

import os
import socket
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cocomix.common.errors import InputError

# With this policy the browser blocks whatever the page or Gradio would load from or send to another site.
POLICY = "; ".join(
    (
        "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'self'",
        "object-src 'none'",
    )
)


class OnlyFromHere:
    """Add the content security policy to every response; refuse uploads and requests from pages of other sites."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [("content-security-policy", POLICY), ("referrer-policy", "no-referrer")]
                encoded = [(name.encode(), value.encode()) for name, value in headers]
                message = {**message, "headers": [*message.get("headers", []), *encoded]}
            await send(message)

        refusal = _refusal(Headers(scope=scope)) if scope["type"] == "http" else None
        await (refusal or self.app)(scope, receive, with_policy)


def _refusal(headers: Headers) -> PlainTextResponse | None:
    """Return the response that refuses a request with these headers; None if it is allowed."""
    origin = headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != headers.get("host"):
        return PlainTextResponse("this page does not answer other sites", status_code=403)
    # Gradio accepts and stores uploads even if a page has no component for them.
    if headers.get("content-type", "").strip().lower().startswith("multipart/"):
        return PlainTextResponse("this page does not accept files", status_code=405)
    return None


def check_address(host: str, port: int | None) -> None:
    """Raise InputError unless the page can be served there."""
    try:
        if ":" in host:
            raise OSError("Gradio does not support IPv6 addresses")
        family, *_, address = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0]
        socket.create_server((str(address[0]), int(address[1])), family=family).close()
    except (OSError, UnicodeError) as error:  # the latter for invalid host names
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"cannot serve on {host}, port {port or 'any'}: {reason}; give another --host or --port"
        ) from None


def serve(page: Any, host: str, port: int | None) -> str:
    """Serve a page in background threads, and return its address.

    Args:
        page: result of `build_playground`.
        host: name or address to bind to.
        port: port to bind to; by default the first free one from 7860 on.
    """
    from cocomix.app.playground import STYLE, theme

    for name in ("GRADIO_ANALYTICS_ENABLED", "HF_HUB_ENABLE_TELEMETRY"):
        os.environ[name] = "False"
    _, local, _ = page.launch(
        server_name=host,
        server_port=port,
        theme=theme(),
        css_paths=STYLE,
        app_kwargs={"middleware": [Middleware(OnlyFromHere)]},
        share=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        run_history=False,
        footer_links=[],
        inbrowser=False,
        quiet=True,
        prevent_thread_lock=True,
    )
    return str(local)
