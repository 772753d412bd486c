"""Errors that the user can correct."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

CREDENTIALS = re.compile(r"(?<=://)[^/\s@]+@")
"""The user name and password in a URL."""
LONGEST_MESSAGE = 300


class InputError(ValueError):
    """An invalid input that the user can correct.

    The message is one line: what was given, what was expected, and what to change. The command line prints it without
    a traceback and exits with 2. Python callers catch it as a `ValueError`. A bug in the program never raises this
    error. User names and passwords in addresses are left out of the message.
    """

    def __init__(self, message: str) -> None:
        super().__init__(CREDENTIALS.sub("…@", message))


class UnreachableError(InputError):
    """A remote source could not be fetched."""


def error_message(error: Exception) -> str:
    """Return the message of a library's error, or else its type, on one line of bounded length."""
    return f"{' '.join(str(error).split()) or type(error).__name__:.{LONGEST_MESSAGE}}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'X'?` for the known word closest to `word`, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
