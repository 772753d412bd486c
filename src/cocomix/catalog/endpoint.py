"""Name concepts with a language model behind an OpenAI-compatible endpoint, which the user provides."""

from __future__ import annotations

import asyncio
import json
import re
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import httpx

from cocomix.catalog.rows import Concept
from cocomix.catalog.search import Catalog
from cocomix.common import files
from cocomix.common.console import one_line, progress_bar, visible
from cocomix.common.errors import InputError

ANSWERS_FILE = "names.jsonl"
"""Names from endpoints, one JSON object per line, in the folder of the catalog."""
API_KEY_VARIABLE = "COCOMIX_API_KEY"
"""A separate variable, so that another service's key is never sent to an endpoint by mistake."""
MAX_NAME_LENGTH = 80
TIMEOUT_SECONDS = 120.0
"""Time limit of a request, from the connection to the last byte of the answer."""
MAX_ANSWER_BYTES = 1_000_000
WAITS_SECONDS = (1.0, 4.0, 15.0)
"""Delays between attempts when an endpoint is overloaded or unreachable."""
MAX_NAMELESS = 3
"""Number of consecutive answers without a name after which to stop."""

_PROMPT = """\
Below are passages of text in which one feature of a language model is active, the strongest first. The token at \
which it is active is marked «like this». The feature also makes the model expect these tokens: {promoted}

{contexts}

What do the marked tokens, or what they stand for here, have in common? Answer with a name for the feature of at most \
6 words, and with nothing else."""


class _NoAnswer(Exception):
    """The endpoint gave no answer; the reason may contain the key."""


def name_by_endpoint(
    catalog: Catalog, url: str, model: str, api_key: str | None, concept_ids: Sequence[int]
) -> dict[int, str]:
    """Ask a language model to name concepts, from their contexts and the tokens they promote.

    Each answer is appended to `names.jsonl` in the catalog folder as it arrives. Concepts that the model has already
    named are not asked for again, so an interrupted call can be resumed. Concepts that are never active, or whose
    answer contains no name, are left out.

    Args:
        catalog: holds the concepts.
        url: base URL of an OpenAI-compatible service, up to but excluding /chat/completions.
        model: name of the model at that service.
        api_key: sent as bearer token to that service only; None if it needs no key.
        concept_ids: concepts to name, in this order.

    Raises:
        InputError: a concept is unknown, or the endpoint is unreachable, refuses, or gives no names.
    """
    _check_endpoint(url, api_key)
    path = catalog.folder / ANSWERS_FILE
    known = _read_answers(path, model)
    missing = [concept_id for concept_id in concept_ids if concept_id not in known]
    nameless = 0
    with path.open("a", encoding="utf-8") as answers:
        for concept in map(catalog.concept, progress_bar(missing, desc="names", unit="concept")):
            if not concept.contexts:
                continue
            try:
                name = _clean(_ask(url, api_key, model, prompt_for(concept)))
            except _NoAnswer as error:
                reason = str(error).replace(api_key, "…") if api_key else str(error)
                raise InputError(
                    f"the endpoint {url} gave no name: {one_line(reason):.240}; the names so far are kept"
                ) from None
            nameless = 0 if name else nameless + 1
            if nameless == MAX_NAMELESS:
                raise InputError(f"the endpoint {url} answered {nameless} times without a name; try another model")
            if name:
                known[concept.concept_id] = name
                record = {"index": concept.concept_id, "description": name, "model": model}
                answers.write(json.dumps(record, ensure_ascii=False) + "\n")
                answers.flush()
    return {concept_id: known[concept_id] for concept_id in concept_ids if concept_id in known}


def _check_endpoint(url: str, api_key: str | None) -> None:
    """Raise InputError for addresses and keys that the client would refuse with an unclear or revealing message."""
    try:
        parts = urllib.parse.urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and url.isprintable() and " " not in url
        usable = usable and not (parts.query or parts.fragment)
    except ValueError:
        usable = False
    if "@" in url:
        raise InputError(f"the endpoint's address contains a user name or password; set {API_KEY_VARIABLE} instead")
    if not usable:
        raise InputError(f"endpoint is {url!r}; expected an address such as http://localhost:8000/v1")
    if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
        raise InputError(
            f"{API_KEY_VARIABLE} is not a valid key: it contains a line break or a character outside ASCII"
        )


def _read_answers(path: Path, model: str) -> dict[int, str]:
    """Read the names that `model` gave before. An incomplete last line is removed from the file."""
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8", errors="replace")
    complete = text[: text.rfind("\n") + 1]
    if complete != text:
        files.write_text(path, complete)
    answers = {}
    for line in complete.split("\n"):
        try:
            record = json.loads(line)
            if record["model"] == model:
                answers[int(record["index"])] = str(record["description"])
        except (
            ValueError,
            TypeError,
            KeyError,
            OverflowError,
            RecursionError,
        ):  # not a line of ours: ask again
            continue
    return answers


def prompt_for(concept: Concept) -> str:
    """Build the question about a concept."""
    contexts = [f"{visible(each.before)}«{visible(each.token)}»{visible(each.after)}" for each in concept.contexts]
    return _PROMPT.format(
        promoted=", ".join(f"'{visible(token)}'" for token in concept.promoted),
        contexts="\n".join(f"{number}. {text}" for number, text in enumerate(contexts, 1)),
    )


def _clean(answer: str) -> str:
    """Extract the name from an answer: its first line after any reasoning, without quotes, emphasis and period."""
    answer = re.sub(r"^.*</think>", "", answer, flags=re.DOTALL)
    lines = [line.strip().strip("\"'`*“”«».").strip() for line in answer.splitlines()]
    name = one_line(next(filter(None, lines), ""))
    return name if len(name) <= MAX_NAME_LENGTH else name[: MAX_NAME_LENGTH - 1] + "…"


class _Response(NamedTuple):
    """Status code, reason phrase and body of an HTTP response."""

    status: int
    phrase: str
    body: bytes


def _ask(url: str, api_key: str | None, model: str, prompt: str) -> str:
    """Return the answer to `prompt`, which may be empty. Retry while the endpoint is overloaded or unreachable.

    Raises:
        _NoAnswer: with the reason from the endpoint or the connection.
    """
    request = {"model": model, "messages": [{"role": "user", "content": prompt}]}
    for wait in (*WAITS_SECONDS, None):
        try:
            response = asyncio.run(_post(f"{url.rstrip('/')}/chat/completions", api_key, request))
        except TimeoutError:
            retry, reason = True, f"no complete answer within {TIMEOUT_SECONDS:g} seconds"
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            retry, reason = True, f"the connection failed ({str(error) or type(error).__name__})"
        else:
            if response.status == 200:
                return _content(response.body)
            retry = response.status == 429 or response.status >= 500
            hint = f" (the key is read from {API_KEY_VARIABLE})" if response.status in (401, 403) else ""
            text = response.body.decode(errors="replace")
            reason = f"HTTP {response.status} {response.phrase}{hint} {text}"
        if not retry or wait is None:
            raise _NoAnswer(reason)
        time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


async def _post(url: str, api_key: str | None, request: Mapping[str, object]) -> _Response:
    """Send a request, and read the response within the limits of time and size."""
    headers = {"accept-encoding": "identity"} | ({"authorization": f"Bearer {api_key}"} if api_key else {})
    async with (
        asyncio.timeout(TIMEOUT_SECONDS),
        httpx.AsyncClient(follow_redirects=True, timeout=None) as client,
        client.stream("POST", url, headers=headers, json=request) as response,
    ):
        body = bytearray()
        async for piece in response.aiter_raw():
            body += piece
            if len(body) > MAX_ANSWER_BYTES:
                raise _NoAnswer(f"its answer exceeds {MAX_ANSWER_BYTES:,} bytes")
        return _Response(response.status_code, response.reason_phrase, bytes(body))


def _content(body: bytes) -> str:
    """Return the text of a chat completion; _NoAnswer if it is invalid."""
    try:
        return str(json.loads(body)["choices"][0]["message"]["content"] or "")
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise _NoAnswer(f"no chat completion ({type(error).__name__}: {error})") from None
