"""What a person sees. Progress goes to stderr, so that stdout holds results only."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

from tqdm.auto import tqdm

from cocomix.errors import InputError


def say(text: str) -> None:
    """A line of progress, without breaking a progress bar."""
    tqdm.write(text, file=sys.stderr)


def show(text: str) -> None:
    """Write a result to standard output.

    Raises:
        BrokenPipeError: nobody reads it any more, as with `| head`.
        InputError: it cannot be written.
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
    """Leave the progress bars as they are, so that what follows begins on a line of its own."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


def prepare_streams() -> None:
    """Make both streams usable: signs that they cannot encode are escaped, and a closed one is discarded."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _discard_output() -> None:
    """Let what is still buffered go nowhere, or Python would fail to write it once more when it exits."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


BOLD, DIM, RED, GREEN = 1, 2, 31, 32


def styled(text: str, *styles: int) -> str:
    """The text in these styles where a result goes to a terminal, unless NO_COLOR is set (no-color.org)."""
    if not styles or not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return text
    return f"\033[{';'.join(map(str, styles))}m{text}\033[0m"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose columns also line up in a terminal: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(cells: list[str]) -> str:
        padded = [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * width if column == 0 else "-" * (width - 1) + ":") for column, width in enumerate(widths)]
    return "\n".join([line(header), line(rule), *map(line, rows)])
