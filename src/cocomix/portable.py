"""Paths as records and reports hold them: nothing of this machine's folders or of its user's name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HUB_PREFIX = "hf:"
SOURCES = ("source", "validation_source")
"""Keys of a recipe's sections that may hold a path."""


def with_tilde(source: str) -> str:
    """A path with `~` for the home folder, which a recipe may hold again; anything else as it is."""
    prefix, path = (HUB_PREFIX, source.removeprefix(HUB_PREFIX)) if source.startswith(HUB_PREFIX) else ("", source)
    home = os.path.expanduser("~").rstrip("/")
    if home and (path == home or path.startswith(home + "/")):
        return f"{prefix}~{path.removeprefix(home)}"
    return source


def short(source: str | Path) -> str:
    """A relative path as it is; of an absolute one what lies below the working folder, else its last part."""
    text = str(source)
    prefix, text = (HUB_PREFIX, text.removeprefix(HUB_PREFIX)) if text.startswith(HUB_PREFIX) else ("", text)
    path = Path(text).expanduser()
    if not path.is_absolute():
        return prefix + text
    here = Path.cwd()
    return prefix + (str(path.relative_to(here)) if path.is_relative_to(here) else path.name)


def short_apart(paths: Sequence[Path]) -> list[str]:
    """Short forms of several paths that differ where the paths do: from their common folder if one is elsewhere."""
    found = [short(path) for path in paths]
    if len(set(found)) == len(set(paths)):
        return found
    absolute = [str(path.absolute()) for path in paths]
    common = os.path.commonpath([os.path.dirname(path) for path in absolute])
    return [os.path.relpath(path, common) for path in absolute]


def short_argument(argument: str) -> str:
    """An argument of a command, or the value of `--key=value`, as `short` has it."""
    key, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return key + equals + short(value)


def recipe_record(recipe: dict[str, Any]) -> dict[str, Any]:
    """Recipe settings as a record holds them: `output` short; sources with `~`, so that they can be run again."""
    found: dict[str, Any] = {}
    for key, value in recipe.items():
        if isinstance(value, dict):
            found[key] = recipe_record(value)
        elif isinstance(value, str) and key in SOURCES:
            found[key] = with_tilde(value)
        else:
            found[key] = short(value) if key == "output" else value
    return found
