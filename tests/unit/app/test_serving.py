"""What the server refuses before Gradio sees it."""

from __future__ import annotations

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from cocomix.app.serving import POLICY, OnlyFromHere

HOST = "127.0.0.1:7860"


@pytest.fixture
def client() -> TestClient:
    """Of a server that takes whatever is posted."""
    route = Route("/gradio_api/{rest:path}", lambda request: PlainTextResponse("taken"), methods=["GET", "POST"])
    return TestClient(Starlette(routes=[route], middleware=[Middleware(OnlyFromHere)]), f"http://{HOST}")


def test_files_are_refused(client):
    answer = client.post("/gradio_api/upload", files={"files": b"x"})
    assert (answer.status_code, answer.text) == (405, "this page does not accept files")
    assert answer.headers["content-security-policy"] == POLICY
    assert client.post("/gradio_api/upload", content=b"", headers={"content-type": "Multipart/Mixed"}).is_error


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        (None, 200),
        (f"http://{HOST}", 200),
        ("http://evil.example", 403),
        ("http://127.0.0.1:1", 403),
        ("null", 403),
        ("", 403),
    ],
)
def test_only_the_page_itself_may_ask(client, origin, status):
    headers = {} if origin is None else {"origin": origin}
    answer = client.post("/gradio_api/queue/join", json={}, headers=headers)
    assert answer.status_code == status
    assert answer.headers["content-security-policy"] == POLICY
