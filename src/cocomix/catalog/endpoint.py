"""Ask a language model behind an OpenAI-compatible endpoint, which the user provides, to name concepts."""

from __future__ import annotations

import http.client
import json
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from cocomix import files
from cocomix.catalog.rows import Concept, one_line, visible
from cocomix.catalog.search import Catalog
from cocomix.errors import InputError

ANSWERS_FILE = "names.jsonl"
"""In the catalogue's folder: what endpoints answered, a line each, as it came."""
API_KEY_VARIABLE = "COCOMIX_API_KEY"
"""Of its own, so that another service's key is never sent to an endpoint by oversight."""
MAX_NAME_LENGTH = 80
TIMEOUT_SECONDS = 120.0
WAITS_SECONDS = (1.0, 4.0, 15.0)
"""Before each further attempt, where an endpoint is overloaded or out of reach."""
MAX_NAMELESS = 3
"""Answers without a name, one after another, that an endpoint may give."""

_PROMPT = """\
Below are passages of text in which one feature of a language model is active, the strongest first. The token at \
which it is active is marked «like this». The feature also makes the model expect these tokens: {promoted}

{contexts}

What do the marked tokens, or what they stand for here, have in common? Answer with a name for the feature of at most \
6 words, and with nothing else."""


class _Refused(Exception):
    """An endpoint that will not answer, whatever is tried; or, `again`, one that may answer later."""

    def __init__(self, reason: str, again: bool) -> None:
        super().__init__(reason)
        self.again = again


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirection would take the key to somewhere that nobody named."""

    def redirect_request(self, *_: Any) -> None:
        return None


def name_by_endpoint(
    catalog: Catalog, url: str, model: str, api_key: str | None, concept_ids: Sequence[int]
) -> dict[int, str]:
    """Names that a language model gives to these concepts, by their contexts and the tokens that they promote.

    Each answer is appended to `names.jsonl` in the catalogue's folder as it comes. Concepts that the model named
    before are not asked for again, so that an interrupted attempt goes on. Concepts that are never active, or for
    which it answers without a name, are left out.

    Args:
        catalog: of these concepts.
        url: of an OpenAI-compatible service, up to and without /chat/completions.
        model: what the service calls it.
        api_key: sent as bearer token, and nowhere else; None where none is needed.
        concept_ids: in the order in which they are asked for.

    Raises:
        InputError: unknown concepts, or an endpoint that does not answer, or not with names.
    """
    _check_endpoint(url, api_key)
    path = catalog.folder / ANSWERS_FILE
    known = _read_answers(path, model)
    missing = [concept_id for concept_id in concept_ids if concept_id not in known]
    nameless = 0
    with path.open("a", encoding="utf-8") as answers:
        for concept in map(catalog.concept, tqdm(missing, desc="names", unit="concept", dynamic_ncols=True)):
            if not concept.contexts:
                continue
            name = _clean(_ask(url, model, api_key, prompt_for(concept)))
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
    """Raises InputError for what the libraries below would refuse with words that nobody expects, or with the key."""
    try:
        parts = urllib.parse.urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and url.isprintable() and " " not in url
    except ValueError:
        usable = False
    if not usable:
        raise InputError(f"endpoint is {url!r}; expected an address such as http://localhost:8000/v1")
    if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
        raise InputError(f"{API_KEY_VARIABLE} holds signs that no key has, such as a line end or one outside ASCII")


def _read_answers(path: Path, model: str) -> dict[int, str]:
    """What `model` answered before. A line that was cut off is removed, so that the next one starts afresh."""
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        files.write_text(path, whole)
    answers = {}
    for line in whole.split("\n"):
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
        ):  # written by something else: it is asked again
            continue
    return answers


def prompt_for(concept: Concept) -> str:
    """What a language model is asked about a concept."""
    contexts = [f"{visible(each.before)}«{visible(each.token)}»{visible(each.after)}" for each in concept.contexts]
    return _PROMPT.format(
        promoted=", ".join(f"'{visible(token)}'" for token in concept.promoted),
        contexts="\n".join(f"{number}. {text}" for number, text in enumerate(contexts, 1)),
    )


def _clean(answer: str) -> str:
    """The name in an answer: one line, without the reasoning before it, quotes, emphasis or a full stop."""
    answer = re.sub(r"^.*</think>", "", answer, flags=re.DOTALL)
    lines = [line.strip().strip("\"'`*“”«».").strip() for line in answer.splitlines()]
    name = one_line(next(filter(None, lines), ""))
    return name if len(name) <= MAX_NAME_LENGTH else name[: MAX_NAME_LENGTH - 1] + "…"


def _ask(url: str, model: str, api_key: str | None, prompt: str) -> str:
    """The answer to a prompt, tried again where the endpoint is overloaded or out of reach.

    Raises:
        InputError: no answer, in one line that does not hold the key.
    """
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": prompt}]}).encode()
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    request = urllib.request.Request(f"{url.rstrip('/')}/chat/completions", body, headers)
    for wait in (*WAITS_SECONDS, None):
        try:
            return _answer_of(_post(request))
        except _Refused as refused:
            if refused.again and wait is not None:
                time.sleep(wait)
                continue
            reason = str(refused).replace(api_key, "…") if api_key else str(refused)
            raise InputError(
                f"the endpoint {url} gave no name: {one_line(reason):.240}; names so far are kept"
            ) from None
    raise AssertionError("the last attempt returns or raises")


def _post(request: urllib.request.Request) -> bytes:
    try:
        try:
            with urllib.request.build_opener(_NoRedirects).open(request, timeout=TIMEOUT_SECONDS) as response:
                return response.read()
        except urllib.error.HTTPError as error:
            raise _refusal(error) from None
    except (OSError, http.client.HTTPException) as error:  # out of reach, too slow, or it hung up
        raise _Refused(str(getattr(error, "reason", error)), again=True) from None


def _refusal(error: urllib.error.HTTPError) -> _Refused:
    with error:
        said = error.read().decode(errors="replace")
    hint = f" (the key is read from {API_KEY_VARIABLE})" if error.code in (401, 403) else ""
    return _Refused(f"HTTP {error.code} {error.reason}{hint} {said}", again=error.code == 429 or error.code >= 500)


def _answer_of(body: bytes) -> str:
    """The text in a chat completion; empty if it holds none."""
    try:
        return str(json.loads(body)["choices"][0]["message"]["content"] or "")
    except (ValueError, TypeError, KeyError, IndexError, RecursionError):
        raise _Refused(f"not a chat completion: {body[:80]!r}", again=False) from None
