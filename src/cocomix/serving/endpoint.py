"""The routes of the endpoint, as a Starlette application."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from cocomix.common.errors import InputError
from cocomix.inspection.runs import OpenRun
from cocomix.inspection.tracing import trace
from cocomix.serving.answers import ResponseFormat, error, usage
from cocomix.serving.engine import Busy, Engine
from cocomix.serving.guard import Addresses, Refusal, read_body
from cocomix.serving.requests import ParsedRequest, parse, read_chat, read_completion
from cocomix.serving.rows import Delta, Row, ScoredToken

MAX_BYTES = 1_000_000
"""Largest body."""
ROUTES = "this server answers GET /v1/models and POST /v1/completions and /v1/chat/completions"
EXPLAINING = 2
"""Number of texts whose concepts are traced at the same time."""


class Guard:
    """Middleware that rejects requests for other hosts, from other origins, or without the key.

    Args:
        app: the application.
        addresses: names under which the endpoint answers.
        api_key: key that each request must have; None for none.
    """

    def __init__(self, app: ASGIApp, addresses: Addresses, api_key: str | None) -> None:
        self.app, self.addresses, self.api_key = app, addresses, api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] == "http":
            try:
                self._check(Headers(scope=scope))
            except Refusal as refusal:
                await _refused(refusal)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _check(self, headers: Headers) -> None:
        self.addresses.check(headers)
        if self.api_key is None:
            return
        kind, _, key = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not secrets.compare_digest(key.encode(), self.api_key.encode()):
            raise Refusal(401, "the API key is missing or wrong; send it as Authorization: Bearer KEY")


class _Events(StreamingResponse):
    """A stream whose texts are generated no further once it ends, even if its client left before it began."""

    def __init__(self, content: AsyncIterator[str], rows: Sequence[Row]) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self.rows = rows

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            _cancel(self.rows)


class Endpoint:
    """Answers the requests of clients from the texts of an engine.

    Args:
        run: the served run.
        engine: engine with its model.
        seconds: time limit of a generation.
    """

    def __init__(self, run: OpenRun, engine: Engine, seconds: float) -> None:
        self.run, self.engine, self.seconds = run, engine, seconds
        self.name = run.name
        self.explaining = ThreadPoolExecutor(EXPLAINING)
        ends = run.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self.ends = frozenset({each for each in ends if each is not None} | {run.tokenizer.eos_token_id})

    def application(self, addresses: Addresses, api_key: str | None) -> Starlette:
        """Return the application."""
        routes = [
            Route("/v1/models", self._models),
            Route("/v1/models/{name}", self._models),
            Route("/v1/completions", self._answering(read_completion, chat=False), methods=["POST"]),
            Route("/v1/chat/completions", self._answering(read_chat, chat=True), methods=["POST"]),
        ]
        handlers: Any = {
            Refusal: lambda _, refusal: _refused(refusal),
            InputError: lambda _, problem: _refused(Refusal(400, str(problem))),
            HTTPException: lambda _, found: _refused(Refusal(found.status_code, f"{found.detail}; {ROUTES}")),
            Exception: lambda _, failure: _refused(Refusal(500, _failed(failure))),
        }
        guards = [Middleware(Guard, addresses=addresses, api_key=api_key)]
        return Starlette(routes=routes, middleware=guards, exception_handlers=handlers)

    async def _models(self, request: Request) -> Response:
        about = {"id": self.name, "object": "model", "created": 0, "owned_by": "cocomix"}
        about |= {"max_model_len": self.run.context_length}
        if "name" not in request.path_params:
            return JSONResponse({"object": "list", "data": [about]})
        self._check_model(request.path_params["name"])
        return JSONResponse(about)

    def _check_model(self, name: object) -> None:
        if name not in (None, self.name):
            raise Refusal(404, f"there is no model {str(name)[:80]!r}; this server has {self.name!r}")

    def _answering(self, read: Callable[[dict[str, Any], OpenRun], ParsedRequest], chat: bool) -> Callable[..., Any]:
        """Return the handler of a route whose requests `read` reads."""

        async def answer(request: Request) -> Response:
            given = parse(await read_body(request.scope, request.receive, MAX_BYTES))
            self._check_model(given.get("model"))
            asked = await run_in_threadpool(read, given, self.run)
            form = ResponseFormat(self.name, self.run.tokenizer, chat, asked.params.logprobs is not None)
            rows, deltas = self._submit(asked)
            if asked.stream:
                return _Events(self._stream(asked, form, rows, deltas), rows)
            return await self._complete(request, asked, form, rows, deltas)

        return answer

    def _submit(self, asked: ParsedRequest) -> tuple[list[Row], AsyncIterator[Delta]]:
        """Hand the texts of a request to the engine; return them, and an iterator over their output."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Delta | Exception]()

        def send(delta: Delta | Exception) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(queue.put_nowait, delta)

        prompts = [ids for ids in asked.prompts for _ in range(asked.n)]
        rows = [
            Row(index, ids, asked.params, asked.seed + index, self.engine.tokenizer, self.ends, send)
            for index, ids in enumerate(prompts)
        ]
        try:
            self.engine.submit(rows)
        except Busy:
            raise Refusal(429, "too many requests are waiting; try again in a few seconds") from None
        return rows, self._deltas(len(rows), queue, loop.time() + self.seconds)

    async def _deltas(
        self, running: int, queue: asyncio.Queue[Delta | Exception], deadline: float
    ) -> AsyncIterator[Delta]:
        """Yield what is new until all of the running texts have ended."""
        while running:
            try:
                async with asyncio.timeout_at(deadline):
                    delta = await queue.get()
            except TimeoutError:
                line = f"the request took more than {self.seconds:g} seconds; ask for fewer tokens"
                raise Refusal(504, line) from None
            if isinstance(delta, Exception):
                raise Refusal(500, _failed(delta))
            running -= delta.end is not None
            yield delta

    async def _complete(
        self,
        request: Request,
        asked: ParsedRequest,
        form: ResponseFormat,
        rows: Sequence[Row],
        deltas: AsyncIterator[Delta],
    ) -> Response:
        """Answer in one piece, unless the client leaves before."""

        async def answer() -> Response:
            found: list[list[Delta]] = [[] for _ in rows]
            async for delta in deltas:
                found[delta.choice].append(delta)
            texts = [_joined(parts) for parts in found]
            concepts = [await self._concepts(asked, row) for row in rows]
            return JSONResponse(form.complete(texts, concepts, _usage(asked, rows)))

        answering, leaving = asyncio.ensure_future(answer()), asyncio.ensure_future(_left(request.receive))
        try:
            await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
            return await answering if answering.done() else Response(status_code=499)
        finally:
            _cancel(rows)
            for task in (answering, leaving):
                task.cancel()

    async def _stream(
        self, asked: ParsedRequest, form: ResponseFormat, rows: Sequence[Row], deltas: AsyncIterator[Delta]
    ) -> AsyncIterator[str]:
        """Yield the chunks of an answer as server-sent events."""
        lengths = [0] * len(rows)
        try:
            for chunk in form.first_chunks(len(rows)):
                yield _event(chunk)
            async for delta in deltas:
                concepts = await self._concepts(asked, rows[delta.choice]) if delta.end else None
                yield _event(form.chunk(delta, concepts, lengths[delta.choice]))
                lengths[delta.choice] += len(delta.text)
            if asked.include_usage:
                yield _event(form.last_chunk(_usage(asked, rows)))
        except Refusal as refusal:
            yield _event(error(refusal.status, str(refusal)))
        yield "data: [DONE]\n\n"

    async def _concepts(self, asked: ParsedRequest, row: Row) -> list[dict[str, Any]] | None:
        """Return the concepts that each token of a finished text was predicted from; None if they are not wanted."""
        if not asked.concepts:
            return None
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.explaining, explain, self.run, row, asked.concepts)


def explain(run: OpenRun, row: Row, concepts: int) -> list[dict[str, Any]]:
    """Trace a finished text at the token before each generated one, and with `echo` at each of the prompt's.

    Args:
        run: the run.
        row: the text.
        concepts: number of the strongest concepts to return for each token, with their effects by ablation.
    """
    first = 0 if row.params.echo else row.prompt_length - 1
    places = range(first, len(row.ids) - 1)
    found = trace(
        run.model, run.tokenizer, row.ids, names=run.names, steering=row.steering, ablate=concepts, positions=places
    )
    return [
        asdict(token) | {"concepts": [asdict(each) for each in token.concepts[:concepts]]} for token in found.tokens
    ]


def _joined(parts: Sequence[Delta]) -> Delta:
    """Join the deltas of a text."""
    tokens: list[ScoredToken] = [token for part in parts for token in part.tokens]
    return Delta(parts[0].choice, "".join(part.text for part in parts), tokens, parts[-1].end)


def _usage(asked: ParsedRequest, rows: Sequence[Row]) -> dict[str, int]:
    return usage(sum(map(len, asked.prompts)), sum(row.new_tokens for row in rows))


def _event(content: object) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _failed(failure: Exception) -> str:
    return f"the server failed ({type(failure).__name__}); its terminal shows more"


def _cancel(rows: Sequence[Row]) -> None:
    for row in rows:
        row.cancelled.set()


async def _left(receive: Receive) -> None:
    """Wait until the client closes the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _refused(refusal: Refusal) -> JSONResponse:
    headers = {"retry-after": "1"} if refusal.status in (429, 503) else {}
    headers |= {"www-authenticate": "Bearer"} if refusal.status == 401 else {}
    return JSONResponse(error(refusal.status, str(refusal)), refusal.status, headers)
