"""Ctrl-C while the libraries of a command load, which takes seconds. Imported before them, so it imports none."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

INTERRUPTED = 130


def end_quietly_while_loading() -> None:
    """In a process that was started as `cocomix`, let Ctrl-C end it in one line until `main` takes over.

    The default handler raises in the middle of a library, which may turn the interruption into some other error.
    """
    if _is_command():
        signal.signal(signal.SIGINT, _end)


def interruption_is_an_exception() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_command() -> bool:
    called = sys.orig_argv
    as_module = "-m" in called and called[called.index("-m") + 1 :][:1] == ["cocomix"]
    return as_module or os.path.basename(sys.argv[0]) == "cocomix"


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"\ncocomix: interrupted while it was starting; nothing was done\n")
    os._exit(INTERRUPTED)
