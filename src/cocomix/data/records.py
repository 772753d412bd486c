"""Read records one after another, so that every fault names the file and the record where it occurred."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from cocomix.errors import InputError

T = TypeVar("T")


def numbered(records: Iterable[T], name: str, unit: str) -> Iterator[tuple[int, T]]:
    """Count records from 1 and turn whatever their reader raises into one line.

    Args:
        records: an iterable that reads a file or a stream lazily.
        name: of what is read, for messages.
        unit: of a record, for messages: `line`, `row` or `record`.

    Raises:
        InputError: the reader failed after some record.
    """
    number, source = 0, iter(records)
    while True:
        try:
            record = next(source)
        except StopIteration:
            return
        except InputError:
            raise
        except Exception as error:  # decompressors, Arrow and the hub's readers raise many types
            raise InputError(
                f"{name} cannot be read after {unit} {number} ({reason(error)}): is it damaged or cut short?"
            ) from error
        number += 1
        yield number, record


def json_lines(lines: Iterable[bytes], name: str) -> Iterator[tuple[int, Any]]:
    """Parse JSON lines, each with its number; blank lines are skipped.

    Takes bytes, since only a line feed ends a line: text may hold other line separators within a JSON string.

    Raises:
        InputError: a line is not JSON, or Python's parser gives up on it.
    """
    for number, line in numbered(lines, name, "line"):
        if line.isspace():
            continue
        try:
            yield number, json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:  # nested too deep, or a number of thousands of digits
            raise InputError(
                f"{name}, line {number} is not JSON that can be read ({reason(error)}): give one JSON object per line"
            ) from error


def reason(error: Exception) -> str:
    """The message of an error in one line of bounded length."""
    return f"{' '.join(str(error).split()) or type(error).__name__:.300}"
