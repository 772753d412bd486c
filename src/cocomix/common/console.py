"""Print to the terminal: progress to stderr, results to stdout."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Iterable
from enum import IntEnum
from pathlib import Path
from typing import Any, TypeAlias

from tqdm import std
from tqdm.auto import tqdm

from cocomix.common.errors import InputError

SECONDS_BETWEEN_LINES = 30.0
"""How often progress is printed if stderr is not a terminal."""


class Verbosity(IntEnum):
    """How much a command prints to stderr."""

    QUIET = 0
    NORMAL = 1
    VERBOSE = 2


class _Verbosity:
    level = Verbosity.NORMAL


def set_verbosity(level: Verbosity) -> None:
    """Choose how much `status` and progress bars print in this process."""
    _Verbosity.level = level


def verbosity() -> Verbosity:
    """Return how much this process prints."""
    return _Verbosity.level


def status(text: str) -> None:
    """Print a line of progress to stderr without breaking a progress bar, unless the command is quiet."""
    if verbosity() > Verbosity.QUIET:
        warn(text)


def warn(text: str) -> None:
    """Print a line to stderr without breaking a progress bar, in quiet commands too."""
    tqdm.write(text, file=sys.stderr)


class _ProgressLines(std.tqdm):
    """A progress bar that prints plain lines, for files."""

    printed = 0.0

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        now = self._time()  # type: ignore[attr-defined]
        if now - max(self.printed, self.start_t) >= SECONDS_BETWEEN_LINES:
            self.fp.write(f"{self}\n")
            self.fp.flush()
            self.printed = now

    def clear(self, nolock: bool = False) -> None:
        """Leave the lines that were printed."""

    def close(self) -> None:
        if not self.disable:
            self.disable = True
            self._decr_instances(self)  # type: ignore[attr-defined]


ProgressBar: TypeAlias = "std.tqdm[Any]"


def has_terminal() -> bool:
    """Return whether stderr is a terminal or a notebook, which show progress bars."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def progress_bar(iterable: Iterable[Any] | None = None, desc: str | None = None, **options: Any) -> ProgressBar:
    """Return a tqdm bar; if stderr is not a terminal, one that prints a plain line every half minute."""
    options["disable"] = options.get("disable", False) or verbosity() == Verbosity.QUIET
    if has_terminal():
        return tqdm(iterable, desc, dynamic_ncols=True, **options)
    options |= {"delay": SECONDS_BETWEEN_LINES, "mininterval": SECONDS_BETWEEN_LINES, "ncols": 0}
    return _ProgressLines(iterable, desc, **options)


def show(text: str) -> None:
    """Print a result to stdout.

    Raises:
        BrokenPipeError: the reader has closed the pipe, as with `| head`.
        InputError: stdout cannot be written.
    """
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except OSError as error:
        _discard_output()
        if isinstance(error, BrokenPipeError):
            raise
        raise InputError(f"the results cannot be written to standard output: {error.strerror}") from None


def end_progress_bars() -> None:
    """Close the progress bars where they are, so that the next output starts on a new line."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


def prepare_streams() -> None:
    """Escape characters that stdout or stderr cannot encode, and replace a closed stream by one that discards."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _discard_output() -> None:
    """Discard the buffered output, which Python would otherwise fail to write again when it exits."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


BOLD, DIM, RED, GREEN = 1, 2, 31, 32


def styled(text: str, *styles: int) -> str:
    """Style text if stdout is a terminal and NO_COLOR is unset (no-color.org)."""
    if not styles or not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return text
    return f"\033[{';'.join(map(str, styles))}m{text}\033[0m"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Format a Markdown table whose columns line up in a terminal: the first to the left, the others to the right."""
    # A rule needs a hyphen in addition to the colon that aligns its column.
    widths = [max(2, *(len(row[column]) for row in [header, *rows])) for column in range(len(header))]

    def line(cells: list[str]) -> str:
        padded = [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * width if column == 0 else "-" * (width - 1) + ":") for column, width in enumerate(widths)]
    return "\n".join([line(header), line(rule), *map(line, rows)])


_SIGNS = {"\n": "⏎", "\r": "⏎", "\t": "⇥", "\u00a0": " "}


def visible(text: str) -> str:
    """Return the text on one line, without characters that control a terminal."""
    text = text.replace("\r\n", "\n")
    return "".join(
        char if char.isprintable() else _SIGNS.get(char) or char.encode("unicode_escape").decode() for char in text
    )


def compact(text: str) -> str:
    """Return the text on one line, with each run of three or more blanks, tabs or line breaks as ␣×11."""
    return re.sub(r"([ ␣⏎⇥])\1{2,}", lambda run: f"{run[1].replace(' ', '␣')}×{len(run[0])}", visible(text))


def one_line(text: str) -> str:
    """Return the text on one line, with each run of whitespace replaced by a space."""
    return visible(" ".join(text.split()))
