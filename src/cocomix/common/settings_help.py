"""Describe every key of a settings dataclass: its meaning, type, range and default."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
import typing
from collections.abc import Iterator
from typing import Any

from cocomix.common import settings

WIDTH = 100
NAME = "NAME"
"""Placeholder for names that the user chooses, such as those of students."""


def describe(section: Any, prefix: str = "--") -> Iterator[str]:
    """Yield one paragraph for each key of a dataclass and of the dataclasses inside it, in order."""
    descriptions = _descriptions(section)
    for field in dataclasses.fields(section):
        kind = settings.without_none(settings.kind_of(section, field.name))
        key = f"{prefix}{field.name}"
        if typing.get_origin(kind) is dict and dataclasses.is_dataclass(typing.get_args(kind)[1]):
            kind, key = typing.get_args(kind)[1], f"{key}.{NAME}"
        if dataclasses.is_dataclass(kind):
            yield f"{key[2:]}: {descriptions[field.name]}"
            yield from describe(kind, f"{key}.")
        else:
            about = (
                f"{descriptions[field.name]} ({'; '.join(filter(None, (settings.expected(kind), _default(field))))})"
            )
            yield f"  {key}\n" + textwrap.fill(about, WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 8)


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING:
        return "required" if field.default_factory is dataclasses.MISSING else ""
    return "" if field.default is None else f"default {field.default}"


def _descriptions(section: Any) -> dict[str, str]:
    """Return the description of each field from the docstring of a dataclass."""
    found: dict[str, str] = {}
    name = None
    for line in (inspect.getdoc(section) or "").splitlines():
        if entry := re.match(r" {4}(\w+): (.*)", line):
            name, found[entry[1]] = entry[1], entry[2]
        elif name is not None and line.startswith(" " * 8):
            found[name] += f" {line.strip()}"
        else:
            name = None
    return found
