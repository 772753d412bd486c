"""Concepts get names from their tokens, from files, and from endpoints that fail in every way."""

from __future__ import annotations

import dataclasses
import gzip
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pyarrow as pa
import pytest

from cocomix import InputError
from cocomix.catalog import endpoint as endpoint_module
from cocomix.catalog.endpoint import ANSWERS_FILE, API_KEY_VARIABLE, name_by_endpoint, prompt_for
from cocomix.catalog.naming import NamingResult, apply_names, default_name, name_concepts, read_names
from cocomix.catalog.rows import CATALOG_FILE, INFO_FILE, SCHEMA, CatalogInfo, Concept, Context, write_rows
from cocomix.catalog.search import Catalog, open_catalog
from cocomix.common import files

KEY = "sk-very-secret-0123456789"


@pytest.mark.parametrize(
    ("promoted", "name"),
    [
        ([" fire", "Fire", " flame", "FLAME", " burn", " heat"], "fire · flame · burn"),
        ([" the"], "the"),
        (["\n", "\n\n", " ", "\t"], "⏎ · ⏎⏎ · ␣"),
        (["\x00", "\u200b", "a"], r"\x00 · \u200b · a"),
        (["\ufffd", " \ufffd\ufffd", " é"], "é"),
        (["\ufffd", "\ufffd"], "\ufffd"),
        (["<|endoftext|>", "."], "<|endoftext|> · ."),
    ],
)
def test_a_default_name_is_made_of_the_first_distinct_tokens(promoted, name):
    assert default_name(promoted) == name


# Files

NEURONPEDIA = [
    {"modelId": "gpt2-small", "layer": "6-res-jb", "index": "3", "description": " words about\nfire "},
    {"index": 3, "description": "a second one"},
    {"index": "1", "description": None, "typeName": "x"},
    {"index": "1", "description": "lakes"},
]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plain.json", json.dumps({"3": "words about fire", "1": "lakes"})),
        ("list.json", json.dumps(NEURONPEDIA)),
        ("lines.jsonl", "\n".join(map(json.dumps, NEURONPEDIA)) + "\n\n"),
        ("list.json.gz", json.dumps(NEURONPEDIA)),
        ("lines.jsonl.gz", "\n".join(map(json.dumps, NEURONPEDIA))),
    ],
)
def test_names_are_read_in_every_form(name, content, tmp_path):
    path = tmp_path / name
    path.write_bytes(gzip.compress(content.encode()) if name.endswith(".gz") else content.encode())
    assert read_names(path) == {3: "words about fire", 1: "lakes"}


def test_a_single_line_of_an_export_is_no_plain_file(tmp_path):
    (tmp_path / "one.jsonl").write_text(json.dumps(NEURONPEDIA[0]))
    assert read_names(tmp_path / "one.jsonl") == {3: "words about fire"}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not json",
        b"12",
        b"null",
        b"{}",
        b'["a"]',
        b"[[1, 2]]",
        b'[{"index": "x", "description": "a"}]',
        b'[{"index": 1}]',
        b'{"a": "b"}',
        b'{"1": 2}',
        b'{"1": " "}',
        b'{"-1": "a"}',
        b'[{"index": Infinity, "description": "a"}]',
        b'[{"index": 1.5, "description": "a"}]',
        b'[{"index": true, "description": "a"}]',
        b'{"1_0": "a"}',
        b"[" * 50_000,
        b"\xff\xfe\x00",
    ],
)
@pytest.mark.parametrize("ending", [".json", ".json.gz"])
def test_files_without_names_are_refused_in_one_line(content, ending, tmp_path):
    path = tmp_path / f"names{ending}"
    path.write_bytes(gzip.compress(content) if ending == ".json.gz" else content)
    with pytest.raises(InputError, match="expected") as error:
        read_names(path)
    assert "\n" not in str(error.value)


def test_only_a_line_feed_ends_a_line_of_names(tmp_path):
    rows = {0: "a heading\u2028and what follows", 1: "line\x85end", 2: "\x0c feed"}
    lines = [json.dumps({"index": index, "description": text}, ensure_ascii=False) for index, text in rows.items()]
    path = tmp_path / "names.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    assert read_names(path) == {0: "a heading and what follows", 1: "line end", 2: "feed"}
    path.write_text("\n".join([*lines, '{"index": 3}']), encoding="utf-8")
    with pytest.raises(InputError, match=r'names.jsonl, line 4: entry 1 lacks "index" or "description"'):
        read_names(path)
    path.write_text("\n".join([*lines, '{"index": 3']), encoding="utf-8")
    with pytest.raises(InputError, match=r"names.jsonl, line 4 is not readable JSON"):
        read_names(path)


def test_missing_and_cut_off_files_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"nothing.json cannot be read \(.*No such file"):
        read_names(tmp_path / "nothing.json")
    whole = gzip.compress(json.dumps({str(number): "a name" * number for number in range(99)}).encode())
    for damaged in (whole[: len(whole) // 2], whole[:30] + bytes(30) + whole[60:], b"no gzip"):
        (tmp_path / "names.json.gz").write_bytes(damaged)
        with pytest.raises(InputError, match="expected"):
            read_names(tmp_path / "names.json.gz")


def test_names_are_put_into_the_catalog(catalog):
    apply_names(catalog.folder, {2: "lakes", 0: "fire"}, "names.json")
    after = open_catalog(catalog.folder)
    assert after.names == {0: "fire", 1: "token 1", 2: "lakes", 3: "token 3", 4: "token 4"}
    assert [after.concept(i).name_source for i in range(3)] == ["names.json", "promoted tokens", "names.json"]
    assert after.concept(0).contexts == catalog.concept(0).contexts


def test_names_of_another_sae_are_refused_and_change_nothing(catalog):
    before = (catalog.folder / CATALOG_FILE).read_bytes()
    with pytest.raises(InputError, match=r"2 of 3 names from names.json are of concepts .* such as 99 \(it has 5\)"):
        apply_names(catalog.folder, {0: "fire", 5: "a", 99: "b"}, "names.json")
    assert (catalog.folder / CATALOG_FILE).read_bytes() == before


def test_renaming_from_a_file(catalog, tmp_path):
    (tmp_path / "mine.json").write_text('{"1": "lakes"}')
    assert name_concepts(catalog.folder, tmp_path / "mine.json") == NamingResult("mine.json", 1, 4)


# Endpoints


class Endpoint(HTTPServer):
    """Answers with what `script` says, a (status, body) or a name, in turn; then with `name N`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script: list[tuple[int, bytes] | str] = []
        self.seconds_per_byte = 0.0
        self.requests: list[dict] = []
        self.keys: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        assert self.path == "/v1/chat/completions"
        self.server.requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.server.keys.append(self.headers["Authorization"])
        answer = self.server.script.pop(0) if self.server.script else f"name {len(self.server.requests)}"
        if isinstance(answer, str):
            answer = 200, json.dumps({"choices": [{"message": {"content": answer}}]}).encode()
        self.send_response(answer[0])
        if answer[0] == 307:
            self.send_header("Location", answer[1].decode())
        self.send_header("Content-Length", str(len(answer[1])))
        self.end_headers()
        for byte in answer[1] if self.server.seconds_per_byte else []:
            time.sleep(self.server.seconds_per_byte)
            self.wfile.write(bytes([byte]))
        if not self.server.seconds_per_byte:
            self.wfile.write(answer[1])

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving() -> Iterator[Endpoint]:
    with Endpoint() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def endpoint(monkeypatch) -> Iterator[Endpoint]:
    monkeypatch.setattr(endpoint_module, "WAITS_SECONDS", (0.0, 0.0, 0.0))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("HF_TOKEN", "hf_of_another_service")
    with serving() as server:
        yield server


@pytest.fixture
def made(tmp_path) -> Callable[[list[Concept]], Catalog]:
    """made([concept(), …]): a catalog of just these, numbered in this order."""

    def make(concepts: list[Concept]) -> Catalog:
        rows = [dataclasses.asdict(concept) | {"concept_id": number} for number, concept in enumerate(concepts)]
        write_rows(tmp_path / CATALOG_FILE, [pa.Table.from_pylist(rows, schema=SCHEMA)])
        info = CatalogInfo(len(rows), "sae", len(rows), 100, 2, 100, 1, contexts=10, context_tokens=4)
        files.write_json(tmp_path / INFO_FILE, dataclasses.asdict(info))
        return open_catalog(tmp_path)

    return make


@pytest.fixture
def catalog(made: Callable[..., Catalog]) -> Catalog:
    """Five concepts, of which 4 is never active and 3 is a label most often."""

    def concept(number: int) -> Concept:
        contexts = [] if number == 4 else [Context(f"before {number}", f" token{number}", " after", 1.0, "", 0, 0)]
        return Concept(
            number, f"token {number}", "promoted tokens", 0.1, 1, 1, number, 0.1, [" p"], [1], [" s"], [-1], contexts
        )

    return made([concept(number) for number in range(5)])


def test_an_endpoint_names_the_concepts_that_are_labels_most_often(catalog, endpoint, monkeypatch):
    monkeypatch.setenv(API_KEY_VARIABLE, KEY)
    endpoint.script = ['<think>hm\n"x"</think>\n\n **"Open fires."**\nBecause …', "Lakes and rivers"]
    result = name_concepts(catalog.folder, endpoint=endpoint.url + "/", model="small", limit=3)
    assert result == NamingResult("endpoint small", 2, 3)
    after = open_catalog(catalog.folder)
    assert (after.names[3], after.names[2], after.names[1]) == ("Open fires", "Lakes and rivers", "token 1")
    assert endpoint.keys == [f"Bearer {KEY}"] * 2
    assert [request["model"] for request in endpoint.requests] == ["small"] * 2
    assert endpoint.requests[0]["messages"] == [{"role": "user", "content": prompt_for(catalog.concept(3))}]
    for path in catalog.folder.iterdir():
        assert KEY.encode() not in path.read_bytes()


def test_a_redirection_does_not_take_the_key_to_another_service(catalog, endpoint):
    with serving() as other:
        endpoint.script = [(307, f"{other.url}/chat/completions".encode())]
        assert name_by_endpoint(catalog, endpoint.url, "small", KEY, [0]) == {0: "name 1"}
    assert (endpoint.keys, other.keys) == ([f"Bearer {KEY}"], [None])


def test_a_prompt_shows_contexts_and_promoted_tokens(catalog):
    prompt = prompt_for(catalog.concept(2))
    assert "1. before 2« token2» after" in prompt
    assert "' p'" in prompt


@pytest.mark.parametrize("status", [500, 429, 503])
def test_an_overloaded_endpoint_is_asked_again(status, catalog, endpoint):
    endpoint.script = [(status, b"busy"), (status, b"busy"), "fire"]
    assert name_by_endpoint(catalog, endpoint.url, "small", None, [0]) == {0: "fire"}
    assert endpoint.keys == [None] * 3


def test_an_endpoint_that_stays_overloaded_is_given_up(catalog, endpoint):
    endpoint.script = [(500, b"busy")] * 4
    with pytest.raises(
        InputError, match=r"gave no name: HTTP 500 Internal Server Error busy; the names so far are kept"
    ):
        name_by_endpoint(catalog, endpoint.url, "small", None, [0])
    assert len(endpoint.requests) == 4


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            (401, f'{{"error":\n "bad key {KEY}"}}'.encode()),
            r"HTTP 401 Unauthorized \(the key is read from COCOMIX_API",
        ),
        ((400, b"[1]"), r"HTTP 400 Bad Request \[1\]"),
        ((200, b"[1]"), "no chat completion"),
        ((200, b" " * 1_000_001), "its answer exceeds 1,000,000 bytes"),
        ((200, b"<html>"), "no chat completion"),
        ((200, b'{"choices": []}'), "no chat completion"),
        ((200, b"\xff\xff"), "no chat completion"),
    ],
)
def test_an_answer_that_will_not_mend_is_one_line_without_the_key(answer, message, catalog, endpoint):
    endpoint.script = [answer]
    with pytest.raises(InputError, match=message) as error:
        name_by_endpoint(catalog, endpoint.url, "small", KEY, [0])
    assert len(endpoint.requests) == 1
    assert "\n" not in str(error.value)
    assert KEY not in str(error.value)


@pytest.mark.parametrize(
    "line", ["{", "[]", "7", '{"index": 0, "model": "small"}', '{"index": "x", "description": "y", "model": "small"}']
)
def test_a_line_of_something_else_among_the_answers_is_passed_over(line, catalog, endpoint):
    (catalog.folder / ANSWERS_FILE).write_text(f"{line}\n")
    endpoint.script = ["fire"]
    assert name_by_endpoint(catalog, endpoint.url, "small", None, [0]) == {0: "fire"}
    assert len(endpoint.requests) == 1


def test_an_interrupted_attempt_goes_on_without_asking_again(catalog, endpoint):
    endpoint.script = ["fire", "lakes", (401, b"")]
    with pytest.raises(InputError, match="401"):
        name_concepts(catalog.folder, endpoint=endpoint.url, model="small")
    answers = catalog.folder / ANSWERS_FILE
    assert len(answers.read_text().splitlines()) == 2
    with answers.open("a") as file:
        file.write('{"index": 1, "descr')  # as a killed process leaves it
    name_concepts(catalog.folder, endpoint=endpoint.url, model="small")
    assert open_catalog(catalog.folder).names == {0: "name 5", 1: "name 4", 2: "lakes", 3: "fire", 4: "token 4"}
    assert len(endpoint.requests) == 5
    assert read_names(answers) == {0: "name 5", 1: "name 4", 2: "lakes", 3: "fire"}
    name_by_endpoint(catalog, endpoint.url, "other", None, [0])
    assert len(endpoint.requests) == 6


def test_answers_without_a_name_are_passed_over_but_not_for_ever(catalog, endpoint):
    endpoint.script = ["", '"."', "fire", "  "]
    assert name_by_endpoint(catalog, endpoint.url, "small", None, range(4)) == {2: "fire"}
    endpoint.script = ["", "", ""]
    with pytest.raises(InputError, match="answered 3 times without a name; try another model"):
        name_by_endpoint(catalog, endpoint.url, "small", None, range(4))


def test_an_endless_answer_is_given_up(catalog, endpoint, monkeypatch):
    monkeypatch.setattr(endpoint_module, "TIMEOUT_SECONDS", 0.2)
    endpoint.seconds_per_byte = 0.05
    with pytest.raises(InputError, match=r"gave no name: no complete answer within 0\.2 seconds"):
        name_by_endpoint(catalog, endpoint.url, "small", None, [0])


def test_a_password_in_the_address_is_refused_without_showing_it(catalog):
    for url in ("https://me:secret@example.com/v1", "http://me:secret@[x"):
        with pytest.raises(InputError, match="contains a user name or password; set COCOMIX_API_KEY") as error:
            name_by_endpoint(catalog, url, "small", None, [0])
        assert "secret" not in str(error.value)


def test_a_long_answer_is_cut(catalog, endpoint):
    endpoint.script = ["word " * 50]
    (name,) = name_by_endpoint(catalog, endpoint.url, "small", None, [0]).values()
    assert len(name) == 80


def test_an_endpoint_out_of_reach_is_one_line(catalog, endpoint):
    url = endpoint.url
    endpoint.server_close()
    with pytest.raises(InputError, match=r"gave no name: the connection failed"):
        name_by_endpoint(catalog, url, "small", None, [0])


@pytest.mark.parametrize("url", ["file:///etc/passwd", "localhost:8000", "http://", "http://[x", "http://a b/"])
def test_an_address_that_is_none_is_refused(url, catalog):
    with pytest.raises(InputError, match=r"endpoint is .*; expected an address such as"):
        name_by_endpoint(catalog, url, "small", None, [0])


def test_a_key_that_cannot_be_sent_is_refused_without_showing_it(catalog):
    with pytest.raises(InputError, match="COCOMIX_API_KEY is not a valid key") as error:
        name_by_endpoint(catalog, "http://localhost", "small", KEY + "\n", [0])
    assert KEY not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of --names and --endpoint"),
        ({"names_file": Path("a"), "endpoint": "http://a"}, "give one of --names and --endpoint"),
        ({"names_file": Path("a"), "limit": 3}, "go with --endpoint"),
        ({"endpoint": "http://a"}, "give --model"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message, catalog):
    with pytest.raises(InputError, match=message):
        name_concepts(catalog.folder, **options)
