"""Any request to the endpoint gets a right answer or one clear line: no traceback, no internals, no hang."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cocomix.serving.endpoint import MAX_BYTES
from property_cases import CASES, Cases
from served import Served, serving
from small_catalog import catalog_of

PATHS = [
    "/models",
    "/models/random",
    "/models/../../etc/passwd",
    "/completions",
    "/chat/completions",
    "/",
    "//",
    "/%00",
]
TEXT = st.text(max_size=12) | st.sampled_from(
    ["w1 w2 w3 w4", "\ud800", "w1 " * 70, "3=+9", "name:rivers=x2", "7=off", "5"]
)
SCALARS = st.none() | st.booleans() | st.integers(-2, 70) | st.integers() | st.floats() | TEXT
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["user", "tool"]), "content": TEXT | JSON})
FITTING: dict[str, st.SearchStrategy[Any]] = {
    "prompt": st.sampled_from(["w1 w2", [1, 2], ["w1", "w2 w3"], [[1], [2, 3]]]) | TEXT,
    "messages": st.lists(MESSAGE, max_size=3),
    "max_tokens": st.integers(0, 6),
    "temperature": st.sampled_from([0, 0.7, 1, 3]),
    "top_p": st.sampled_from([0.1, 0.9, 1]),
    "seed": st.integers(0, 9),
    "n": st.integers(1, 3),
    "stop": st.sampled_from(["w5", ["w1", "w2"]]) | TEXT,
    "stream": st.booleans(),
    "stream_options": st.just({"include_usage": True}),
    "logprobs": st.integers(0, 3) | st.booleans(),
    "top_logprobs": st.integers(0, 3),
    "echo": st.booleans(),
    "steering": st.lists(st.sampled_from(["3=+9", "name:rivers=x2", "7=off", "39==1", "3=+1e9", "x"]), max_size=3),
    "positions": st.sampled_from(["all", "generated", "0,2-", "x"]),
    "after_choice": st.booleans(),
    "concepts": st.booleans() | st.integers(0, 6),
    "model": st.sampled_from(["random", "random", "gpt"]),
    "presence_penalty": st.sampled_from([0, 1]),
}


@st.composite
def bodies(draw: st.DrawFn) -> dict[str, Any]:
    """A request, most of whose values fit."""
    keys = draw(st.sets(st.sampled_from(sorted(FITTING.keys() - {"prompt", "messages"})), max_size=5))
    body = {key: draw(FITTING[key]) for key in [*sorted(keys), draw(st.sampled_from(["prompt", "messages"]))]}
    if draw(st.integers(0, 3)) == 0:
        body[draw(st.sampled_from(sorted(FITTING)) | st.text(max_size=8))] = draw(JSON)
    return body


@pytest.fixture(scope="module")
def served(run_of) -> Iterator[Served]:
    run = run_of(catalog_of({3: "rivers", 4: "stones"}))
    run.tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}w9"
    yield from serving(run)


def check_refusal(answer: httpx.Response) -> None:
    message = answer.json()["error"]["message"]
    assert isinstance(message, str) and "\n" not in message and len(message) < 500
    assert "Traceback" not in answer.text and "/site-packages/" not in answer.text


@pytest.mark.parametrize("cases", CASES)
def test_bodies_with_any_values(cases: Cases, served: Served, capfd) -> None:
    answered = itertools.count()

    @cases.settings
    @given(bodies())
    def check(body: dict[str, Any]) -> None:
        path = "/chat/completions" if "messages" in body else "/completions"
        answer = served.client.post(path, content=json.dumps(body))
        if answer.status_code != 200:
            assert answer.status_code in (400, 404)
            check_refusal(answer)
            return
        next(answered)
        if body.get("stream") is True:
            assert answer.text.endswith("data: [DONE]\n\n")
            assert "error" not in answer.text
        else:
            assert all(choice["finish_reason"] in ("stop", "length") for choice in answer.json()["choices"])

    check()
    assert next(answered) > cases.count // 5, "most requests are refused"
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("cases", CASES)
def test_requests_of_any_form(cases: Cases, served: Served, capfd) -> None:
    content = (
        JSON.map(json.dumps).map(str.encode)
        | st.binary(max_size=50)
        | st.sampled_from([b"[" * 5000, b" " * 2 * MAX_BYTES])
    )
    hosts = st.sampled_from(["127.0.0.1", "localhost:80", "evil.example", "[::1]", "a" * 300, ":", "127.0.0.1:x"])
    origins = st.sampled_from(["null", "http://evil.example", "http://127.0.0.1", "http://[", ""])
    headers = st.fixed_dictionaries({}, optional={"host": hosts, "origin": origins, "content-type": st.just("a")})

    @cases.settings
    @given(st.sampled_from(["GET", "POST", "HEAD", "PUT", "OPTIONS"]), st.sampled_from(PATHS), headers, content)
    def check(method: str, path: str, headers: dict[str, str], body: bytes) -> None:
        try:
            answer = served.client.request(method, path, headers=headers, content=body)
        except (httpx.ReadError, httpx.WriteError):
            assert len(body) > MAX_BYTES  # the endpoint closes the connection before it has received so much
            return
        assert answer.status_code in {200, 307, 400, 403, 404, 405, 413}
        if answer.status_code >= 400 and method != "HEAD":
            check_refusal(answer)
        assert "root:" not in answer.text

    check()
    assert "Traceback" not in capfd.readouterr().err
