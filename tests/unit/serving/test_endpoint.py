"""What clients get: the texts of `generate`, alone or together, and one clear line for what cannot be."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from cocomix import Steering, trace
from cocomix.inspection.generation import GenerationSettings, continuations
from cocomix.serving import engine, guard
from cocomix.serving.endpoint import MAX_BYTES
from served import serving

PROMPTS = ["w1 w2 w3", "w4", "w7 w8 w9 w10 w11 w12 w13 w14", "w20 w20"]
WISHES: list[list[str]] = [[], ["3=+9"], ["name:stones=off", "5==20"], ["7=x-4"]]
STEERINGS = [
    Steering(),
    Steering.add({3: 9.0}),
    Steering.suppress([4]) + Steering.set({5: 20.0}),
    Steering.scale({7: -4.0}),
]
GREEDY = {"temperature": 0, "max_tokens": 12}


def post(served: Any, path: str = "/completions", **body: Any) -> Any:
    answer = served.client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def text(served: Any, **body: Any) -> str:
    return post(served, **body)["choices"][0]["text"]


def events(served: Any, path: str = "/completions", **body: Any) -> list[dict[str, Any]]:
    with served.client.stream("POST", path, json=body | {"stream": True}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_steered_requests_at_once_get_what_generate_gives_each_alone(served, run):
    settings = GenerationSettings(max_new_tokens=12)
    pairs = [(prompt, number) for prompt in PROMPTS for number in range(len(WISHES))]
    expected = [continuations(run, prompt, settings, STEERINGS[number])[0] for prompt, number in pairs]
    assert len(set(expected)) > len(pairs) // 2

    def ask(pair: tuple[str, int]) -> str:
        return text(served, prompt=pair[0], steering=WISHES[pair[1]], **GREEDY)

    assert [ask(pair) for pair in pairs] == expected
    with ThreadPoolExecutor(len(pairs)) as clients:
        assert list(clients.map(ask, pairs)) == expected


def test_where_to_steer(served, run):
    settings = GenerationSettings(max_new_tokens=12)
    steering = Steering.set({5: 20.0}, positions="generated", after_choice=True)
    found = text(served, prompt=PROMPTS[0], steering="5==20", positions="generated", after_choice=True, **GREEDY)
    assert found == continuations(run, PROMPTS[0], settings, steering)[0]


def test_a_seed_decides_a_text_among_others_too(served):
    body = {"prompt": PROMPTS[0], "max_tokens": 12, "seed": 5, "top_p": 0.9}
    alone = text(served, **body)
    several = post(served, **body | {"prompt": PROMPTS[:2], "n": 2})["choices"]
    assert [choice["index"] for choice in several] == [0, 1, 2, 3]
    assert several[0]["text"] == alone != several[1]["text"]
    assert text(served, **body | {"seed": 6}) != alone
    assert text(served, **body | {"seed": None}) != text(served, **body | {"seed": None})


def test_a_stream_has_the_text_the_log_probabilities_and_the_concepts_of_the_answer(served):
    body = {"prompt": PROMPTS[:2], "logprobs": 2, "concepts": 1, "echo": True, "steering": ["3=+9"], **GREEDY}
    answer = post(served, **body)
    chunks = events(served, **body, stream_options={"include_usage": True})
    assert chunks[-1]["usage"] == answer["usage"] == {"prompt_tokens": 4, "completion_tokens": 24, "total_tokens": 28}
    assert len({chunk["id"] for chunk in chunks}) == 1
    for index, choice in enumerate(answer["choices"]):
        parts = [chunk["choices"][0] for chunk in chunks[:-1] if chunk["choices"][0]["index"] == index]
        assert len(parts) > 10
        assert "".join(part["text"] for part in parts) == choice["text"]
        for key in ("tokens", "token_logprobs", "top_logprobs"):
            assert [each for part in parts for each in part["logprobs"][key]] == choice["logprobs"][key]
        assert [part["finish_reason"] for part in parts[-2:]] == [None, choice["finish_reason"]] == [None, "length"]
        assert parts[-1]["concepts"] == choice["concepts"]


def test_log_probabilities_are_those_of_the_model(served, run):
    found = post(served, prompt=[5, 6, 7], logprobs=3, echo=True, **GREEDY)["choices"][0]
    scores = found["logprobs"]
    ids = [int(token.removeprefix("w")) for token in scores["tokens"]]
    logprobs = run.model(run.tokenizer(found["text"], return_tensors="pt")["input_ids"]).logits[0].log_softmax(-1)
    assert ids[:3] == [5, 6, 7]
    assert len(ids) == 15
    assert scores["token_logprobs"][0] is None
    expected = [logprobs[at, token].item() for at, token in enumerate(ids[1:])]
    assert scores["token_logprobs"][1:] == pytest.approx(expected, abs=1e-5)
    top = logprobs[4].topk(3)
    assert list(scores["top_logprobs"][5]) == [f"w{each}" for each in top.indices.tolist()]
    assert list(scores["top_logprobs"][5].values()) == pytest.approx(top.values.tolist(), abs=1e-5)
    scored = post(served, prompt=[5, 6, 7], logprobs=0, echo=True, max_tokens=0)["choices"][0]
    assert scored["text"] == "w5 w6 w7"
    assert scored["logprobs"]["token_logprobs"] == pytest.approx(scores["token_logprobs"][:3])


def test_concepts_are_those_of_a_trace(served, run):
    body = {"prompt": PROMPTS[0], "steering": ["3=+9"], **GREEDY}
    choice = post(served, concepts=True, **body)["choices"][0]
    expected = trace(
        run.model, run.tokenizer, f"{PROMPTS[0]} {choice['text'].strip()}", names=run.names, steering={3: 9.0}
    ).to_dict()["tokens"][2:-1]
    assert len(choice["concepts"]) == 12
    assert choice["concepts"][0]["concepts"][0]["name"] == "rivers"
    for found, wanted in zip(choice["concepts"], expected, strict=True):
        assert len(concepts := found.pop("concepts")) == 4
        assert found == pytest.approx({key: value for key, value in wanted.items() if key != "concepts"})
        assert concepts == [pytest.approx(each, abs=1e-9) for each in wanted["concepts"][:4]]


def test_stop_strings_and_the_end_of_text(served, run):
    words = text(served, prompt=PROMPTS[0], **GREEDY).split()
    at = max(words.index(word) for word in words)  # the last word that is new
    stop = f"{words[at - 1]} {words[at]}"
    stopped = post(served, prompt=PROMPTS[0], stop=[stop, "no such word"], **GREEDY)
    choice = stopped["choices"][0]
    assert (choice["text"].split(), choice["finish_reason"]) == (words[: at - 1], "stop")
    assert stopped["usage"]["completion_tokens"] == at + 1
    assert (
        "".join(each["choices"][0]["text"] for each in events(served, prompt=PROMPTS[0], stop=stop, **GREEDY))
        == (choice["text"])
    )
    sampled = {"temperature": 20, "max_tokens": 60, "n": 20, "seed": 0, "prompt": "w1", "logprobs": 0}
    ends = [choice for choice in post(served, **sampled)["choices"] if choice["finish_reason"] == "stop"]
    assert ends
    assert all(choice["logprobs"]["tokens"] == [*choice["text"].split(), "w52"] for choice in ends)


def test_the_official_client(served, run):
    client = openai.OpenAI(base_url=served.url, api_key="any", max_retries=0)
    assert [model.id for model in client.models.list()] == [client.models.retrieve("random").id] == ["random"]
    steering: dict[str, Any] = {"steering": ["name:rivers=+9"], "concepts": True}
    found = client.completions.create(
        model="random", prompt=PROMPTS[0], temperature=0, max_tokens=12, extra_body=steering
    )
    assert found.choices[0].text == text(served, prompt=PROMPTS[0], steering=["3=+9"], **GREEDY)
    assert found.choices[0].concepts[0]["concepts"][0]["concept_id"] == 3
    messages: Any = [
        {"role": "user", "content": "w1 w2"},
        {"role": "user", "content": [{"type": "text", "text": "w3"}]},
    ]
    chat: dict[str, Any] = {"model": "random", "messages": messages, "temperature": 0, "logprobs": True}
    answer = client.chat.completions.create(**chat, top_logprobs=1, max_completion_tokens=12, user="someone").choices[0]
    assert answer.message.content == text(served, prompt="w1 w2 w3 w9", **GREEDY)
    assert answer.finish_reason == "length"
    assert [each.top_logprobs[0].token for each in answer.logprobs.content] == answer.message.content.split()
    chunks = list(client.chat.completions.create(**chat, max_tokens=12, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer.message.content
    assert client.chat.completions.create(model="random", messages=messages, seed=0).usage.total_tokens <= 64
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'; this server has 'random'"):
        client.completions.create(model="gpt", prompt="w1")
    with pytest.raises(openai.BadRequestError, match="cannot read steering 'x'"):
        client.completions.create(model="random", prompt="w1", extra_body={"steering": ["x"]})


@pytest.mark.parametrize(
    ("path", "body", "line"),
    [
        ("/completions", {}, "prompt is None; expected a text, token ids, or a list of 1 to 64"),
        ("/completions", {"prompt": ""}, "the text has 0 tokens; this model reads 1 to 64"),
        ("/completions", {"prompt": [1, 99]}, "prompt has [1, 99]; expected a text, or token ids from 0 to 52"),
        ("/completions", {"prompt": [1, True]}, "prompt has [1, True]; expected"),
        ("/completions", {"prompt": "w1 " * 60}, "60 prompt tokens and 16 new ones (max_tokens) exceed this model's"),
        ("/completions", {"prompt": "w1", "max_tokens": 0}, "max_tokens is 0; expected 1 or more, or echo"),
        ("/completions", {"prompt": "w1", "temperature": "hot"}, "temperature is 'hot'; expected a number from 0"),
        ("/completions", {"prompt": "w1", "temperature": 1e-9}, "expected 0 (greedy), or 0.001 or more"),
        ("/completions", {"prompt": ["w1"] * 40, "n": 2}, "40 prompts with n 2 are more than 64 texts"),
        ("/completions", {"prompt": "w1", "stop": ["a"] * 5}, "expected up to 4 texts of 1 to 256 characters"),
        ("/completions", {"prompt": "w1", "stop": [""]}, "expected up to 4 texts of 1 to 256 characters"),
        ("/completions", {"prompt": "w1", "steer": ["3=+9"]}, "unknown key steer; did you mean 'steering'?"),
        ("/completions", {"prompt": "w1", "steering": ["99=+9"]}, "no concept 99 to steer: this model has 0 to 39"),
        ("/completions", {"prompt": "w1", "steering": {"3": 9}}, 'expected a list of texts such as "123=+4"'),
        ("/completions", {"prompt": "w1", "steering": ["name:fish=+9"]}, "fish"),
        ("/completions", {"prompt": "w1", "positions": "generated"}, "have no effect without steering"),
        ("/completions", {"prompt": "w1", "steering": ["3=+1"] * 257}, "steering has 257 operations, one for each"),
        ("/completions", {"prompt": "w1", "concepts": 6}, "concepts is 6; expected true, false, or a number"),
        ("/completions", {"prompt": "w1", "presence_penalty": 1}, "presence_penalty is not supported; leave it out"),
        ("/chat/completions", {"messages": []}, "messages is []; expected a list of objects with role and content"),
        ("/chat/completions", {"messages": [{"role": "user", "content": 5}]}, "expected a role, and text as content"),
        ("/chat/completions", {"messages": [{"role": "tool", "content": "w1"}]}, "not take these messages: no tools"),
        ("/chat/completions", {"messages": [{"role": "user", "content": "w1"}], "top_logprobs": 2}, "without logprobs"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(served, path, body, line):
    answer = served.client.post(path, json=body)
    assert answer.status_code == 400
    problem = answer.json()["error"]
    assert problem["type"] == "invalid_request_error"
    assert line in problem["message"]
    assert "\n" not in problem["message"]


def test_keys_that_ask_for_nothing_are_accepted(served):
    neutral = {"presence_penalty": 0, "logit_bias": {}, "best_of": 1, "suffix": None, "metadata": {"a": "b"}}
    assert text(served, prompt=PROMPTS[0], **neutral, **GREEDY) == text(served, prompt=PROMPTS[0], **GREEDY)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        ({"content": b"{", "method": "POST"}, 400),
        ({"content": b"[" * 100_000, "method": "POST"}, 400),
        ({"content": b"[]", "method": "POST"}, 400),
        ({"content": b" " * (MAX_BYTES + 1), "method": "POST"}, 413),
        ({"method": "GET"}, 405),
        ({"method": "GET", "url": "/other"}, 404),
        ({"method": "GET", "url": "/models/other"}, 404),
        ({"method": "GET", "url": "/models", "headers": {"host": "evil.example"}}, 403),
        ({"method": "GET", "url": "/models", "headers": {"origin": "http://evil.example"}}, 403),
    ],
)
def test_other_requests_are_refused(served, request_, status):
    answer = served.client.request(**{"url": "/completions", **request_})
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


def test_a_body_must_arrive_in_time(served, monkeypatch):
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.1)
    with socket.create_connection(("127.0.0.1", httpx.URL(served.url).port), timeout=10) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\n{")
        assert b" 408 " in client.recv(4096)


def test_a_model_without_a_chat_template(served, run, monkeypatch):
    monkeypatch.setattr(run.tokenizer, "chat_template", None)
    answer = served.client.post("/chat/completions", json={"messages": [{"role": "user", "content": "w1"}]})
    assert (
        "has no chat template, so it cannot answer messages; use /v1/completions" in answer.json()["error"]["message"]
    )


class Slow:
    """Lets the engine wait before each step."""

    def __init__(self, served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.steps, step = threading.Semaphore(0), 0, served.engine.batch.step

        def slow_step() -> Any:
            self.go.acquire()
            self.steps += 1
            return step()

        monkeypatch.setattr(served.engine.batch, "step", slow_step)


def until(condition: Any) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_its_text(served, monkeypatch, stream):
    slow = Slow(served, monkeypatch)
    with contextlib.suppress(httpx.ReadTimeout), httpx.Client(base_url=served.url, timeout=0.5) as client:
        client.post("/completions", json={"prompt": "w1", "max_tokens": 60, "temperature": 0, "stream": stream})
    until(lambda: served.engine.batch.rows[0].cancelled.is_set())
    slow.go.release()
    until(lambda: not served.engine.batch.rows)
    assert slow.steps == 1


def test_too_many_requests(served, monkeypatch):
    monkeypatch.setattr(engine, "WAITING", 1)
    answer = served.client.post("/completions", json={"prompt": "w1", "n": 2})
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
    assert answer.json()["error"]["type"] == "rate_limit_error"


def test_more_texts_than_run_at_once_wait(served, monkeypatch):
    expected = text(served, prompt="w1", **GREEDY)
    monkeypatch.setattr(served.engine, "rows", 3)
    monkeypatch.setattr(engine, "PROMPT_TOKENS", 2)
    assert [choice["text"] for choice in post(served, prompt=["w1"] * 20, **GREEDY)["choices"]] == [expected] * 20


def test_a_failure_of_the_model_is_answered_and_the_next_request_works(served, monkeypatch):
    def fail() -> Any:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(served.engine.batch, "step", fail)
        answer = served.client.post("/completions", json={"prompt": "w1"})
        assert answer.status_code == 500
        assert "the server failed (RuntimeError)" in answer.json()["error"]["message"]
        assert "RuntimeError" in events(served, prompt="w1")[-1]["error"]["message"]
    assert text(served, prompt="w1", **GREEDY)


def test_a_key_and_a_time_limit(run, monkeypatch):
    with contextlib.closing(serving(run, seconds=0.2, api_key="secret")) as server:
        served = next(server)
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
            answer = served.client.get("/models", headers=headers)
            assert (answer.status_code, answer.json()["error"]["type"]) == (401, "authentication_error")
        served.client.headers["authorization"] = "Bearer secret"
        assert served.client.get("/models").status_code == 200
        slow = Slow(served, monkeypatch)
        answer = served.client.post("/completions", json={"prompt": "w1"})
        assert answer.status_code == 504
        assert "the request took more than 0.2 seconds" in answer.json()["error"]["message"]
        assert "0.2 seconds" in events(served, prompt="w1")[-1]["error"]["message"]
        slow.go.release(1000)
