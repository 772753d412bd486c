"""An endpoint in a thread, as the command serves it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import httpx
import uvicorn

from cocomix.inspection.runs import OpenRun
from cocomix.serving.endpoint import Endpoint
from cocomix.serving.engine import Engine
from cocomix.serving.guard import Addresses
from cocomix.serving.server import bind


class Served(NamedTuple):
    """A running endpoint."""

    url: str
    client: httpx.Client
    engine: Engine


def serving(run: OpenRun, seconds: float = 60.0, **options: Any) -> Iterator[Served]:
    """Serve a run until the generator is closed."""
    engine = Engine(run)
    application = Endpoint(run, engine, seconds).application(Addresses.of("127.0.0.1"), options.get("api_key"))
    server = uvicorn.Server(uvicorn.Config(application, log_level="error", timeout_graceful_shutdown=1))
    listening = bind("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    try:
        while not server.started:
            time.sleep(0.01)
        with httpx.Client(base_url=url, timeout=30) as client:
            yield Served(url, client, engine)
    finally:
        server.should_exit = True
        thread.join()
        engine.close()
        listening.close()
