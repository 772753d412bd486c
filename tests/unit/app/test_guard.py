"""What the server refuses before Gradio sees it."""

from __future__ import annotations

import json
from typing import Any

import gradio as gr
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from cocomix.app import guard
from cocomix.app.guard import HEADERS, Addresses, Guard, Refusal, Visitors
from cocomix.app.requests import MAX_BYTES

HOST = "127.0.0.1:7860"
TYPE = {"content-type": "application/json"}
JOIN = "/gradio_api/queue/join"
VALUES = ["text", 0.5, 1, None, "red", "add", "3-5"]


@pytest.fixture(scope="module")
def page() -> gr.Blocks:
    with gr.Blocks() as page:
        inputs = [gr.Textbox(), gr.Slider(-2, 2), gr.Number(), gr.State(), gr.Radio(["red", "blue"])]
        inputs += [gr.Dropdown(["add", "set"]), gr.Dropdown(["all"], allow_custom_value=True)]
        gr.Button().click(lambda *values: None, inputs, None)
        gr.Button().click(None, None, None, js="() => 1")
    return page


def client(page: gr.Blocks, root_path: str | None = None, base: str = f"http://{HOST}") -> TestClient:
    """Return a client of a server that returns whatever body it receives."""

    async def echo(request: Request) -> PlainTextResponse:
        return PlainTextResponse(f"{await request.body()!r} {request.url.query}")

    guards = [Middleware(Guard, page=page, addresses=Addresses.of("127.0.0.1", root_path))]
    return TestClient(Starlette(routes=[Route("/{rest:path}", echo, methods=["GET", "POST"])], middleware=guards), base)


def event(**changes: Any) -> dict[str, Any]:
    return {"fn_index": 0, "trigger_id": 5, "session_hash": "abc", "event_data": None, "data": VALUES} | changes


def test_the_page_gets_its_requests_and_the_browser_its_protection(page):
    answer = client(page).post(JOIN, json=event())
    assert (answer.status_code, json.loads(answer.text.strip()[2:-1])) == (200, event())
    for name, value in HEADERS.items():
        assert answer.headers[name] == value
    assert client(page).get("/?deep_link=../..").text == "b'' "  # Gradio would open that file
    assert client(page).get("/assets/index.js").status_code == 200
    for other in ("text/plain", "application/x-www-form-urlencoded"):
        assert client(page).post(JOIN, content=json.dumps(event()), headers={"content-type": other}).status_code == 400


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/gradio_api/file=/etc/passwd"),
        ("GET", "/gradio_api/proxy=http://evil.example/"),
        ("POST", "/gradio_api/upload"),
        ("POST", "/gradio_api/run/predict"),
        ("POST", "/gradio_api/call/generate"),
        ("POST", "/gradio_api/vibe-edit/"),
        ("GET", "/monitoring"),
        ("GET", "/gradio_api/heartbeat/a/b"),
        ("GET", "/gradio_api/queue/data?session_hash=unknown"),
        ("PUT", JOIN),
    ],
)
def test_nothing_else_is_served(page, method, path):
    answer = client(page).request(method, path, json=event() if method == "POST" else None)
    assert answer.status_code == 404
    assert answer.headers["content-security-policy"] == HEADERS["content-security-policy"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"data": [{"path": "http://127.0.0.1/", "meta": {"_type": "gradio.FileData"}}, *VALUES[1:]]}, "value 0"),
        ({"data": ["\ud800", *VALUES[1:]]}, "value 0"),
        ({"data": ["text", 2.5, *VALUES[2:]]}, "value 1"),
        ({"data": ["text", None, *VALUES[2:]]}, "value 1"),
        ({"data": ["text", 0, float("nan"), *VALUES[3:]]}, "value 2"),
        ({"data": ["text", 0, 10**400, *VALUES[3:]]}, "value 2"),
        ({"data": ["text", 0, 1, [1], *VALUES[4:]]}, "value 3"),
        ({"data": ["text", 0, 1, None, "green", *VALUES[5:]]}, "value 4"),
        ({"data": [*VALUES[:5], "x", "all"]}, "value 5"),
        ({"data": [*VALUES[:6], ["all"]]}, "value 6"),
        ({"data": VALUES[1:]}, "list of the 7 values"),
        ({"data": "text"}, "list of the 7 values"),
        ({"fn_index": 1}, "not a function of this page"),  # runs in the browser
        ({"fn_index": 2}, "not a function of this page"),
        ({"fn_index": [0]}, "not a function of this page"),
        ({"session_hash": "x" * 65}, "session_hash"),
        ({"session_hash": None}, "session_hash"),
        ({"trigger_id": "5"}, "trigger_id"),
        ({"event_data": {"a": {"path": "/etc/passwd"}}}, "event_data"),
        ({"batched": True}, "keys data, event_data"),
    ],
)
def test_values_that_no_browser_sends(page, changes, expected):
    answer = client(page).post(JOIN, content=json.dumps(event(**changes)), headers=TYPE)
    assert answer.status_code == 400
    assert expected in answer.json()["detail"]


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"[" * 100_000, b"\xff", b"1" * 5000])
def test_bodies_that_are_no_request(page, body):
    for path in (JOIN, "/gradio_api/cancel", "/gradio_api/reset"):
        assert client(page).post(path, content=body, headers=TYPE).status_code == 400


def test_an_event_can_be_ended(page):
    event = {"event_id": "2bb6", "session_hash": "abc", "fn_index": 0}
    assert client(page).post("/gradio_api/cancel", json=event).status_code == 200
    assert client(page).post("/gradio_api/cancel", json=event | {"fn_index": "0"}).status_code == 400
    assert client(page).post("/gradio_api/reset", json={"event_id": "2bb6"}).status_code == 200
    assert client(page).post("/gradio_api/reset", json=event).status_code == 400


def test_the_body_is_limited(page):
    assert client(page).post(JOIN, content=b" " * (MAX_BYTES + 1), headers=TYPE).status_code == 413
    assert client(page).post(JOIN, content=iter([b" " * 65_536] * 8), headers=TYPE).status_code == 413


@pytest.mark.parametrize(
    ("host", "status"),
    [
        (HOST, 200),
        ("localhost:1", 200),
        ("192.168.0.7", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example:7860", 403),
        ("", 403),
        ("[", 400),
    ],
)
def test_names_that_are_not_its_own(page, host, status):
    assert client(page).get("/", headers={"host": host}).status_code == status


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
def test_only_the_page_itself_may_ask(page, origin, status):
    headers = {} if origin is None else {"origin": origin}
    assert client(page).post(JOIN, json=event(), headers=headers).status_code == status


def test_a_public_address(page):
    public = client(page, "https://example.com/cocomix")
    for host in (HOST, "example.com"):
        headers = {"host": host, "origin": "https://example.com"}
        assert public.post(JOIN, json=event(), headers=headers).status_code == 200
    assert public.get("/", headers={"host": "evil.example"}).status_code == 403


def test_too_many_requests_are_answered_politely(page, monkeypatch):
    monkeypatch.setattr(guard, "RECENT", 3)
    visitor = client(page)
    assert [visitor.get("/").status_code for _ in range(4)] == [200, 200, 200, 503]
    refused = visitor.get("/")
    assert (refused.json()["detail"], refused.headers["retry-after"]) == (
        "the page is busy; try again in a few seconds",
        "5",
    )
    assert visitor.get("/assets/index.js").status_code == 503


def test_open_requests_are_limited(monkeypatch):
    monkeypatch.setattr(guard, "OPEN_PER_ADDRESS", 2)
    visitors = Visitors()
    visitors.enter("a", True)
    visitors.enter("a", True)
    with pytest.raises(Refusal, match="busy"):
        visitors.enter("a", False)
    visitors.enter("b", True)
    visitors.leave("a")
    visitors.enter("a", True)
    monkeypatch.setattr(guard, "OPEN", 3)
    with pytest.raises(Refusal, match="busy"):
        visitors.enter("c", True)
