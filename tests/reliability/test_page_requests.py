"""Any request to the page gets a right answer or one clear line: no traceback, no internals, no hang."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import gradio as gr
import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from page_load import completed

from cocomix.app import guard
from cocomix.app.limits import Limits
from cocomix.app.playground import build_playground
from cocomix.app.requests import MAX_BYTES
from cocomix.app.serving import serve
from property_cases import CASES, Cases
from small_catalog import CONCEPTS, catalog_of

SECONDS = 30.0
REFUSED = {400, 403, 404, 405, 408, 413}
TYPE = {"content-type": "application/json"}
JOIN = "/gradio_api/queue/join"
PATHS = [
    "/",
    "/config",
    "/theme.css",
    "/gradio_api/queue/data",
    "/gradio_api/heartbeat/../../etc/passwd",
    "/gradio_api/file=/etc/passwd",
    "/gradio_api/proxy=http://127.0.0.1:1/",
    "/gradio_api/run/predict",
    "/gradio_api/call/generate",
    "/gradio_api/upload",
    "/gradio_api/cancel",
    "/gradio_api/reset",
    "/assets/../../config",
    "/assets/%2e%2e/%2e%2e/etc/passwd",
    "/static/img/undefined",
    JOIN,
]
FILE = {"path": "/etc/passwd", "url": "http://127.0.0.1:1/", "meta": {"_type": "gradio.FileData"}}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just(FILE),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
HEADERS = st.fixed_dictionaries(
    {},
    optional={
        "host": st.sampled_from(["127.0.0.1", "localhost:80", "evil.example", "[::1]", "a" * 300, ":", "127.0.0.1:x"]),
        "origin": st.sampled_from(["null", "http://evil.example", "http://127.0.0.1", "http://[", ""]),
        "content-type": st.sampled_from(["application/json", "text/plain", "multipart/form-data; boundary=x", "a"]),
        "x-forwarded-host": st.sampled_from(["evil.example", "a b", "["]),
        "x-forwarded-for": st.sampled_from(["1.2.3.4", "x", ""]),
    },
)
TEXTS = [
    "w1 w2 w3 w4",
    "5",
    "name 5",
    "\ud800",
    "x " * 3000,
    "tab=generate&prompt=w1&steer=5%3D%2B4&steer=7%3Doff&positions=2-&seed=x&top_p=nan&temperature=1e400",
    "tab=generate&steer=5%3D%2B4&steer=5%3Dx2&steer=name%3Aa%3D%2B1",
    "tab=read&text=%ff&concept=99",
    "tab=concepts&concept=5",
    "tab=concepts",
    "tab=x&" + "a=1&" * 70,
]
DROPPED = ["all", "generated", "0,3,5-9,12-", "9-3", "x", ""]
NUMBERS = st.none() | st.integers() | st.floats() | st.integers(1, 8) | st.floats(0, 2)


@pytest.fixture(scope="module")
def page(run_of) -> gr.Blocks:
    names = {number: f"name {number} <b>" for number in range(CONCEPTS)}
    contexts = {5: ("<i>before", " token", "after</i>")}
    return build_playground(run_of(catalog_of(names, contexts)), Limits(seconds=5, new_tokens=4))


@pytest.fixture(scope="module")
def address(page: gr.Blocks) -> Iterator[str]:
    recent, guard.RECENT = guard.RECENT, 10**9
    yield serve(page, "127.0.0.1", None).rstrip("/")
    page.close(verbose=False)
    guard.RECENT = recent


def value_of(component: gr.components.Component) -> st.SearchStrategy[Any]:
    """Values that a component can have."""
    choices = [choice for _, choice in getattr(component, "choices", [])] or [None]
    return {
        "slider": st.floats(-20, 20),
        "number": NUMBERS,
        "radio": st.sampled_from(choices),
        "dropdown": st.sampled_from(DROPPED if getattr(component, "allow_custom_value", False) else choices),
        "textbox": st.text(max_size=60) | st.sampled_from(TEXTS),
        "state": st.none(),
    }[component.get_block_name()]


@st.composite
def events(draw: st.DrawFn, page: gr.Blocks) -> dict[str, Any]:
    """A request to run a function, with values of which most fit."""
    number = draw(st.sampled_from([number for number, function in page.fns.items() if function.queue]))
    numbers = st.integers(-1, CONCEPTS).map(str)
    clicked = st.none() | st.dictionaries(
        st.sampled_from(["concept", "position", "context"]), numbers | st.text(max_size=5)
    )
    event: dict[str, Any] = {
        "fn_index": number,
        "trigger_id": page.fns[number].targets[0][0],
        "event_data": draw(clicked),
        "data": [draw(value_of(component)) for component in page.fns[number].inputs],
    }
    spoiled = draw(st.sampled_from([None, None, None, None, "value", *event, "batched", "session_hash"]))
    if spoiled == "value" and event["data"]:
        event["data"][draw(st.integers(0, len(event["data"]) - 1))] = draw(JSON)
    elif spoiled not in (None, "value"):
        event[spoiled] = draw(JSON)
    return event


def check_refusal(answer: httpx.Response) -> None:
    detail = answer.json()["detail"]
    assert isinstance(detail, str) and "\n" not in detail and len(detail) < 200
    assert "Traceback" not in answer.text and "/site-packages/" not in answer.text


@pytest.mark.parametrize("cases", CASES)
def test_requests_of_any_form(cases: Cases, page: gr.Blocks, address: str, capfd) -> None:
    large = st.sampled_from([b"[" * 5000, b" " * 10**6])
    bodies = JSON.map(json.dumps).map(str.encode) | st.binary(max_size=50) | large

    @cases.settings
    @given(st.sampled_from(["GET", "POST", "HEAD", "PUT", "OPTIONS"]), st.sampled_from(PATHS), HEADERS, bodies)
    def check(method: str, path: str, headers: dict[str, str], body: bytes) -> None:
        try:
            answer = client.request(method, path, headers=headers, content=body if method in ("POST", "PUT") else None)
        except (httpx.ReadError, httpx.WriteError):
            assert len(body) > MAX_BYTES  # the page closes the connection before it has received so much
            return
        assert answer.status_code in REFUSED | {200, 307}
        if answer.status_code in REFUSED and method != "HEAD" and "detail" in answer.text:
            check_refusal(answer)
        assert "root:" not in answer.text

    with httpx.Client(base_url=address, timeout=SECONDS) as client:
        check()
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("cases", CASES)
def test_events_with_any_values(cases: Cases, page: gr.Blocks, address: str, capfd) -> None:
    sessions, ran = itertools.count(), itertools.count()

    @cases.settings
    @given(events(page))
    def check(event: dict[str, Any]) -> None:
        body = json.dumps({"session_hash": f"s{next(sessions)}"} | event)
        answer = client.post(JOIN, content=body, headers=TYPE)
        if answer.status_code != 200:
            assert answer.status_code == 400
            check_refusal(answer)
            return
        ended = completed(client, json.loads(body)["session_hash"])
        next(ran)
        assert ended["success"], ended
        html = [each.get("value") if isinstance(each, dict) else each for each in ended["output"]["data"]]
        assert "<b>" not in str(html) and "<i>" not in str(html)

    with httpx.Client(base_url=address, timeout=SECONDS) as client:
        check()
    assert next(ran) > cases.count // 4, "most requests are refused"
    assert "Traceback" not in capfd.readouterr().err
