"""`cocomix app RUN`: the page in which a trained model is steered, read and looked up."""

from __future__ import annotations

import os
import time
from importlib.util import find_spec
from typing import Annotated

from cocomix.cli.options import QUICKSTART, CatalogFolder, Port, Run, option, setting
from cocomix.common.console import show, status, warn
from cocomix.common.errors import InputError

LOCAL = ("127.0.0.1", "localhost")
SECONDS = setting("cocomix.app.limits", "Limits", "seconds")


def app(
    run: Run = QUICKSTART,
    catalog: CatalogFolder = None,
    host: Annotated[str, option("HOST", "Where to serve.")] = LOCAL[0],
    port: Annotated[int | None, option("PORT", "Default: the first free port from 7860.", Port)] = None,
    root_path: Annotated[
        str | None, option("URL", "Public address behind a reverse proxy, such as https://example.com/cocomix.")
    ] = None,
    time_limit: Annotated[float, option("SECONDS", "Time limit of a generation.", SECONDS)] = 60.0,
) -> None:
    """Steer a model and search its concepts in a browser.

    The page is served until the command is interrupted.
    """
    # Set before gradio is imported, which would otherwise send analytics and look for its newest version.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    if find_spec("gradio") is None:
        raise InputError("the page needs gradio; install it with: pip install 'cocomix[app]'")

    from cocomix.app.limits import Limits
    from cocomix.app.playground import build_playground
    from cocomix.app.serving import check_address, check_root_path, serve
    from cocomix.inspection.runs import model_folder, open_run

    limits = Limits(seconds=time_limit)
    check_root_path(root_path)
    check_address(host, port)
    opened = open_run(model_folder(run), catalog)
    if opened.catalog is None:
        status(opened.no_catalog)
    page = build_playground(opened, limits)
    if host not in LOCAL:
        warn(f"Warning: the page is served on {host} without a password, to everybody who can reach it.")
    show(f"Page: {serve(page, host, port, root_path)}")
    status("Press Ctrl-C to stop.")
    try:
        wait()
    except KeyboardInterrupt:
        page.close(verbose=False)


def wait() -> None:
    """Wait for an interruption."""
    while True:
        time.sleep(3600)
