"""`cocomix serve RUN`: a trained model behind the interface of OpenAI's clients."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated

from cocomix.cli.options import CatalogFolder, Port, Run, option
from cocomix.common.console import show, status, warn
from cocomix.common.errors import InputError
from cocomix.common.settings import Range

Seconds = Annotated[float, Range(1, 86400)]
LOCAL = ("127.0.0.1", "localhost", "::1")
NEEDED = ("starlette", "uvicorn", "jinja2")


def serve(
    run: Run,
    catalog: CatalogFolder = None,
    host: Annotated[str, option("HOST", "Where to serve.")] = LOCAL[0],
    port: Annotated[int, option("PORT", "Port to listen on.", Port)] = 8000,
    api_key: Annotated[str | None, option("KEY", "Answer only requests with this key.")] = None,
    time_limit: Annotated[float, option("SECONDS", "Time limit of a generation.", Seconds)] = 300.0,
) -> None:
    """Serve a model to OpenAI-compatible clients.

    POST /v1/completions and /v1/chat/completions take `steering` and `concepts` besides OpenAI's own keys. Requests
    that arrive at the same time are batched. The command runs until it is interrupted.
    """
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise InputError(f"serving needs {missing[0]}; install it with: pip install 'cocomix[serve]'")

    from cocomix.inspection.runs import model_folder
    from cocomix.serving.server import bind, open_served
    from cocomix.serving.server import serve as serve_run

    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key != ""):
        raise InputError("--api-key is empty or has characters that no HTTP header can hold; give letters and digits")
    opened = open_served(model_folder(run), catalog)
    with bind(host, port) as listening:
        _ = opened.model  # loads before the address is shown
        if host not in LOCAL and api_key is None:
            warn(f"Warning: {opened.name} is served on {host} without a key, to everybody who can reach it.")
        show(f"Endpoint: http://{f'[{host}]' if ':' in host else host}:{port}/v1")
        status("Press Ctrl-C to stop.")
        try:
            serve_run(opened, listening, host, api_key, time_limit)
        except KeyboardInterrupt:  # how the server ends
            return
