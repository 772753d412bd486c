"""`cocomix app RUN`: the page in which a trained model is steered, read and looked up."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from cocomix.cli_options import OptionParser, number
from cocomix.console import say, show
from cocomix.errors import InputError
from cocomix.settings import Range, kind_of

COMMAND = "app"
SUMMARY = "steer a model, read with it and look up its concepts, in a browser"
Port = Annotated[int, Range(1, 2**16 - 1)]
LOCAL = ("127.0.0.1", "localhost")


def run(arguments: Sequence[str]) -> int:
    """Serve the page until it is interrupted; returns the exit code.

    Raises:
        InputError: no gradio, no such model, a model without concepts, a port that is taken.
    """
    options = _parser().parse_args(arguments[1:])
    # Before gradio is imported: it would announce itself, and ask for its newest version.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    if find_spec("gradio") is None:
        raise InputError("the page needs gradio; install it with: pip install 'cocomix[app]'")

    from cocomix.app.limits import Limits
    from cocomix.app.playground import build_playground
    from cocomix.app.serving import check_address, serve
    from cocomix.steering.runs import open_run

    limits = Limits(seconds=options.time_limit)
    check_address(options.host, options.port)
    opened = open_run(options.run, options.catalog)
    if opened.catalog is None:
        say("No concept catalogue beside this run: concepts have numbers only. `cocomix concepts RECIPE` makes one.")
    page = build_playground(opened, limits)
    if options.host not in LOCAL:
        say(
            f"Warning: the page is served on {options.host}, to everybody who can reach this machine there, and asks "
            "for no password."
        )
    show(f"Page: {serve(page, options.host, options.port)}")
    say("Ctrl-C ends it.")
    try:
        wait()
    except KeyboardInterrupt:
        page.close(verbose=False)
    return 0


def wait() -> None:
    """For an interruption."""
    while True:
        time.sleep(3600)


def _parser() -> argparse.ArgumentParser:
    from cocomix.app.limits import Limits

    parser = OptionParser(prog="cocomix app", description=SUMMARY)
    parser.add_argument(
        "run",
        metavar="RUN",
        nargs="?",
        type=Path,
        help="folder of the trained model (default: the quickstart's cocomix student)",
    )
    parser.add_argument(
        "--catalog", metavar="FOLDER", type=Path, help="its concept catalogue (default: that of its recipe)"
    )
    parser.add_argument("--host", metavar="HOST", default=LOCAL[0], help=f"where to serve (default: {LOCAL[0]})")
    parser.add_argument(
        "--port", metavar="PORT", type=number(Port), help="default: the first that is free from 7860 on"
    )
    parser.add_argument(
        "--time-limit",
        metavar="SECONDS",
        type=number(kind_of(Limits, "seconds")),
        default=60.0,
        help="of a generation (default: 60)",
    )
    return parser
