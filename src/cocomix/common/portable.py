"""Paths in records and reports, without this machine's folders or its user's name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HUB_PREFIX = "hf:"
SOURCES = ("source", "validation_source")
"""Recipe keys that may hold a path."""


def with_tilde(source: str) -> str:
    """Replace the home folder by `~`; a recipe with the result can be run again."""
    prefix, path = (HUB_PREFIX, source.removeprefix(HUB_PREFIX)) if source.startswith(HUB_PREFIX) else ("", source)
    home = os.path.expanduser("~").rstrip("/")
    if home and (path == home or path.startswith(home + "/")):
        return f"{prefix}~{path.removeprefix(home)}"
    return source


def short(source: str | Path) -> str:
    """Shorten an absolute path to its part below the working directory, or else to its last component.

    A working directory above the home folder does not count, because the user's name would remain.
    """
    text = str(source)
    prefix, text = (HUB_PREFIX, text.removeprefix(HUB_PREFIX)) if text.startswith(HUB_PREFIX) else ("", text)
    path = Path(text).expanduser()
    if not path.is_absolute():
        return prefix + text
    here, home = Path.cwd(), Path("~").expanduser()
    is_below = path.is_relative_to(here) and here not in home.parents
    return prefix + (str(path.relative_to(here)) if is_below else path.name)


def short_apart(paths: Sequence[Path]) -> list[str]:
    """Shorten several paths to the fewest last components that keep them distinct."""
    found = [short(path) for path in paths]
    length = 1
    while len(set(found)) < len({path.absolute() for path in paths}):
        length += 1
        found = ["/".join(path.absolute().parts[-length:]) for path in paths]
    return found


def short_argument(argument: str) -> str:
    """Shorten a command-line argument, or the value of `--key=value`."""
    key, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return key + equals + short(value)


def recipe_record(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return recipe settings for a record: a short `output`, and sources with `~`, so that they can be run again."""
    found: dict[str, Any] = {}
    for key, value in recipe.items():
        if isinstance(value, dict):
            found[key] = recipe_record(value)
        elif isinstance(value, list):
            found[key] = [recipe_record(each) if isinstance(each, dict) else each for each in value]
        elif isinstance(value, str) and key in SOURCES:
            found[key] = with_tilde(value)
        else:
            found[key] = short(value) if key == "output" else value
    return found
