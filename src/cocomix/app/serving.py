"""Serve the page, by default only to this machine."""

from __future__ import annotations

import os
import socket
from typing import Any
from urllib.parse import urlsplit

from starlette.middleware import Middleware

from cocomix.app.guard import Addresses, Guard
from cocomix.common.errors import InputError

SESSIONS = 256
"""Maximum number of visitors whose state is kept; the oldest are forgotten first."""


def check_root_path(root_path: str | None) -> None:
    """Raise InputError unless this is None or an address such as https://example.com/cocomix."""
    if root_path is None:
        return
    try:
        parts = urlsplit(root_path)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and root_path.isprintable()
        usable = usable and not (parts.query or parts.fragment or parts.username or " " in root_path)
    except ValueError:
        usable = False
    if not usable:
        raise InputError(
            f"--root-path is {root_path!r}; expected the public address, such as https://example.com/cocomix"
        )


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


def serve(page: Any, host: str, port: int | None, root_path: str | None = None) -> str:
    """Serve a page in background threads, and return its address.

    Args:
        page: result of `build_playground`.
        host: name or address to bind to.
        port: port to bind to; by default the first free one from 7860 on.
        root_path: public address behind a reverse proxy, which forwards requests without its path prefix.
    """
    from cocomix.app.playground import STYLE, theme

    for name in ("GRADIO_ANALYTICS_ENABLED", "HF_HUB_ENABLE_TELEMETRY"):
        os.environ[name] = "False"
    _, local, _ = page.launch(
        server_name=host,
        server_port=port,
        theme=theme(),
        css_paths=STYLE,
        app_kwargs={"middleware": [Middleware(Guard, page=page, addresses=Addresses.of(host, root_path))]},
        root_path=root_path,
        state_session_capacity=SESSIONS,
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
    return root_path or str(local)
