"""The page works behind a reverse proxy that serves it under a path prefix, with another name than its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from page_load import completed

from cocomix.app.limits import Limits
from cocomix.app.playground import build_playground
from cocomix.app.serving import serve
from small_catalog import catalog_of

PREFIX = "/cocomix"


class Proxy(ThreadingHTTPServer):
    """Forward requests without their prefix to `target`, and keep its answers' headers."""

    target = ""


class _Handler(BaseHTTPRequestHandler):
    server: Proxy

    def do_GET(self) -> None:
        assert self.path.startswith(PREFIX)
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
        url = self.server.target + self.path.removeprefix(PREFIX)
        with httpx.stream(self.command, url, headers=headers, content=body, timeout=30) as answer:
            self.send_response(answer.status_code)
            for name in ("content-type", "content-security-policy"):
                self.send_header(name, answer.headers.get(name, ""))
            self.end_headers()
            for piece in answer.iter_bytes():
                self.wfile.write(piece)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def public(run_of) -> Iterator[str]:
    """The public address of a page."""
    with Proxy(("127.0.0.1", 0), _Handler) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, args=(0.01,))
        thread.start()
        address = f"http://localhost:{proxy.server_port}{PREFIX}"
        page = build_playground(run_of(catalog_of({})), Limits())
        assert serve(page, "127.0.0.1", None, address) == address
        proxy.target = page.local_url.rstrip("/")
        yield address
        page.close(verbose=False)
        proxy.shutdown()
        thread.join()


def test_a_page_under_a_prefix(public: str) -> None:
    origin = {"origin": public.removesuffix(PREFIX)}
    with httpx.Client(base_url=public, timeout=30, headers=origin) as client:
        assert client.get("/config").json()["root"] == public
        assert f'"root":"{public}"' in client.get("/").text
        search = {"fn_index": 0, "trigger_id": None, "session_hash": "s", "data": ["7"], "event_data": "7"}
        assert client.post("/gradio_api/queue/join", json=search).status_code == 200
        assert 'data-concept="7"' in completed(client, "s")["output"]["data"][0]
        other = client.post("/gradio_api/queue/join", json=search, headers={"origin": "http://evil.example"})
        assert other.status_code == 403
