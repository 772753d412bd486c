"""Open a run and serve it until the process is asked to end."""

from __future__ import annotations

import socket
from pathlib import Path

import uvicorn
from transformers import PreTrainedTokenizerFast

from cocomix.common.errors import InputError
from cocomix.inspection.runs import OpenRun, open_model, open_run
from cocomix.serving.endpoint import Endpoint
from cocomix.serving.engine import Engine
from cocomix.serving.guard import Addresses

CONNECTIONS = 512
"""Maximum number of open connections; more are answered with HTTP 503."""
IDLE_SECONDS = 30
"""How long an idle connection is kept."""
ENDING_SECONDS = 10
"""Time limit for running requests at shutdown."""


def open_served(folder: Path, catalog: Path | None) -> OpenRun:
    """Open any trained model, and the catalog of its concepts if it mixes some in.

    Raises:
        InputError: there is no such model, it has no fast tokenizer, or the catalog does not fit.
    """
    run = open_model(folder)
    if getattr(run.config, "mixes_concepts", False):
        run = open_run(folder, catalog)
    elif catalog is not None:
        raise InputError(f"--catalog was given, but the model in {folder} mixes in no concepts; leave it out")
    if not isinstance(run.tokenizer, PreTrainedTokenizerFast):
        raise InputError(
            f"the tokenizer of {folder} is a {type(run.tokenizer).__name__}, which cannot stream text; "
            "save it as a fast tokenizer (tokenizer.json)"
        )
    return run


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that listens there. Raises InputError if it cannot."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server((str(address[0]), int(address[1])), family=family, backlog=CONNECTIONS)
    except (OSError, UnicodeError) as error:  # the latter for invalid host names
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot serve on {host}, port {port}: {reason}; give another --host or --port") from None


def serve(run: OpenRun, listening: socket.socket, host: str, api_key: str | None, seconds: float) -> None:
    """Serve a run until a signal arrives; running requests may then finish.

    Args:
        run: result of `open_served`.
        listening: result of `bind`.
        host: name that was bound to.
        api_key: key that each request must have; None for none.
        seconds: time limit of a generation.
    """
    engine = Engine(run)
    endpoint = Endpoint(run, engine, seconds)
    config = uvicorn.Config(
        endpoint.application(Addresses.of(host), api_key),
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=ENDING_SECONDS,
    )
    try:
        uvicorn.Server(config).run(sockets=[listening])
    finally:
        engine.close()
