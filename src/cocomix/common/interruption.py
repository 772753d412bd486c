"""Signals that end a command: they raise at once or, while a block defers them, once the block has ended."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """A signal asked the command to end.

    Attributes:
        exit_code: exit code by which shells recognize the signal, such as 130 for SIGINT and 143 for SIGTERM.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_code = 128 + number


class _Deferral:
    """Whether signals are deferred, and the first that has arrived."""

    active = False
    number: int | None = None


def raise_on_signals() -> None:
    """Make SIGINT, SIGTERM and SIGHUP raise `Interrupted`, unless they are ignored, as by nohup."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _handle)


@contextmanager
def deferred() -> Iterator[None]:
    """Defer the first signal to the end of the block, which should end soon once `is_requested`; a second one raises.

    Raises:
        Interrupted: at the end of the block, if a signal has arrived.
    """
    _Deferral.active, _Deferral.number = True, None
    try:
        yield
    finally:
        _Deferral.active = False
    if _Deferral.number is not None:
        raise Interrupted(_Deferral.number)


def is_requested() -> bool:
    """Return whether a deferred signal has arrived."""
    return _Deferral.number is not None


def _handle(number: int, frame: FrameType | None) -> None:
    if not _Deferral.active or is_requested():
        raise Interrupted(number)
    _Deferral.number = number
