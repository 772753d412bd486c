"""Handle Ctrl-C while the libraries of a command load, which takes seconds. This module imports none of them."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

INTERRUPTED = 130
"""Exit code of an interrupted command."""


def is_command() -> bool:
    """Return whether this process was started as `cocomix` or `python -m cocomix`."""
    called = sys.orig_argv
    as_module = "-m" in called and called[called.index("-m") + 1 :][:1] == ["cocomix"]
    return as_module or os.path.basename(sys.argv[0]) == "cocomix"


def exit_quietly_while_loading() -> None:
    """In a process that was started as a command, let Ctrl-C exit with one line until the command runs.

    The default handler raises in the middle of a library, which may turn the interruption into some other error.
    """
    if is_command():
        signal.signal(signal.SIGINT, _exit)


def raise_interruptions() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _exit:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _exit(number: int, frame: FrameType | None) -> None:
    os.write(2, b"\ncocomix: interrupted while starting; nothing was changed\n")
    os._exit(INTERRUPTED)
