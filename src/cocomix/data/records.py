"""Read records sequentially, so that every error names the file and the record."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from cocomix.common.errors import InputError, error_message

T = TypeVar("T")


def numbered(records: Iterable[T], name: str, unit: str) -> Iterator[tuple[int, T]]:
    """Number records from 1, and convert errors of their reader to an `InputError` of one line.

    Args:
        records: iterable that reads a file or a stream lazily.
        name: name of the file or stream, for messages.
        unit: name of a record, for messages: `line`, `row` or `record`.

    Raises:
        InputError: the reader failed.
    """
    number, source = 0, iter(records)
    while True:
        try:
            record = next(source)
        except StopIteration:
            return
        except InputError:
            raise
        except Exception as error:  # decompressors, Arrow and the Hub's readers raise many types
            raise InputError(
                f"{name} cannot be read after {unit} {number} ({error_message(error)}): is it damaged or truncated?"
            ) from error
        number += 1
        yield number, record


def json_lines(lines: Iterable[bytes], name: str) -> Iterator[tuple[int, Any]]:
    """Parse numbered JSON lines; blank lines are skipped.

    Lines are bytes, because only a line feed ends a line: JSON strings may contain other line separators.

    Raises:
        InputError: a line is not JSON, or Python's parser cannot read it.
    """
    for number, line in numbered(lines, name, "line"):
        if line.isspace():
            continue
        try:
            yield number, json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:  # nested too deeply, or a number with thousands of digits
            raise InputError(
                f"{name}, line {number} is not readable JSON ({error_message(error)}): give one JSON object per line"
            ) from error
