"""What a person sees. Progress goes to stderr, so that stdout holds results only."""

from __future__ import annotations

import os
import sys

from tqdm.auto import tqdm


def say(text: str) -> None:
    """A line of progress, without breaking a progress bar."""
    tqdm.write(text, file=sys.stderr)


def show(text: str) -> None:
    """A result."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


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
