"""MkDocs hooks: write the reference pages from the code, and add the files outside `docs/` that the pages link to."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import cocomix
from cocomix.cli import main
from cocomix.common import settings
from cocomix.pipeline.recipe import Recipe

ROOT = Path(__file__).parents[1]
LINKED = (
    "recipes/**/*.yaml",
    "examples/*",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "CITATION.cff",
    "constraints.txt",
    "Dockerfile",
)
"""Files outside `docs/` that the site holds a copy of."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the home page, the generated pages and copies of the linked files."""
    generated = {
        "index.md": (ROOT / "README.md").read_text().replace("](docs/", "]("),
        "reference/recipe.md": recipe_page(),
        "reference/command-line.md": command_line_page(),
        "reference/python.md": python_page(),
        "reference/compatibility.md": compatibility_page(),
    }
    for path in (path for pattern in LINKED for path in sorted(ROOT.glob(pattern))):
        generated[path.relative_to(ROOT).as_posix()] = path.read_text().replace("](docs/", "](")
    for name, content in generated.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links that leave `docs/` at the copies that the site holds."""
    folder = os.path.dirname(page.file.src_uri)

    def moved(link: re.Match[str]) -> str:
        path = os.path.normpath(os.path.join(folder, link[1]))
        return f"]({os.path.relpath(path.removeprefix('../'), folder or '.')}" if path.startswith("../") else link[0]

    return re.sub(r"\]\((\.\./[^)#]+)", moved, markdown)


def recipe_page() -> str:
    """Return a table of keys for each section of a recipe, from the dataclasses and their docstrings."""
    introduction = (
        "Each heading is a section, each table lists its keys. Every key is also an option of the commands that take "
        "a recipe, with its section: `--training.max_tokens 1000000`. `NAME` stands for the name of a student."
    )
    return "\n\n".join(["# Recipe keys", introduction, *_section(Recipe, "")]) + "\n"


def _section(section: Any, prefix: str) -> Iterator[str]:
    """Yield the heading and table of a dataclass, then those of the dataclasses inside it."""
    about, meanings = _docstring(section)
    yield f"## {prefix.rstrip('.')}\n\n{about}" if prefix else "## Top level"
    rows, inner = ["| key | meaning | value | default |", "|---|---|---|---|"], []
    for field in dataclasses.fields(section):
        kind, key = settings.without_none(settings.kind_of(section, field.name)), field.name
        if typing.get_origin(kind) is dict and dataclasses.is_dataclass(typing.get_args(kind)[1]):
            kind, key = typing.get_args(kind)[1], f"{key}.NAME"
        if dataclasses.is_dataclass(kind):
            inner.append((kind, f"{prefix}{key}."))
        cells = (f"`{key}`", meanings[field.name], *_values(kind, field))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    yield "\n".join(rows)
    for kind, key in inner:
        yield from _section(kind, key)


def _values(kind: Any, field: dataclasses.Field[Any]) -> tuple[str, str]:
    """Return the values that a key takes and its default, in words."""
    if dataclasses.is_dataclass(kind):
        return "a section", ""
    if field.default is not dataclasses.MISSING:
        return settings.expected(kind), "" if field.default is None else f"`{field.default}`"
    empty = field.default_factory is not dataclasses.MISSING
    return settings.expected(kind), f"`{field.default_factory()}`" if empty else "required"


def _docstring(section: Any) -> tuple[str, dict[str, str]]:
    """Return the text of a dataclass's docstring, and the meaning of each of its fields."""
    text, meanings = [], {}
    for part in griffe.Docstring(typing.cast(str, section.__doc__)).parse("google", warn_missing_types=False):
        if part.kind is griffe.DocstringSectionKind.text:
            text.append(part.value)
        else:
            meanings |= {each.name: " ".join(each.description.split()) for each in part.value}
    return "\n\n".join(text), meanings


def command_line_page() -> str:
    """Return the help of every command."""
    texts = (f"## {name}\n\n```text\n{text}\n```" for name, text in main.help_texts().items())
    return "\n\n".join(["# Command line", *texts]) + "\n"


def python_page() -> str:
    """Return the public names of the package, from their docstrings."""
    names = sorted(cocomix.__all__, key=str.lower)
    return "\n\n".join(["# Python API", *(f"::: cocomix.{name}" for name in names)]) + "\n"


def compatibility_page() -> str:
    """Return the table of the tools that students were tried in, from the results of `make test-compat`."""
    introduction = (
        "Small students, interleaved and with `mixing: add`, in tools of the field. `make test-compat` tries them on a "
        "CPU and writes this table; `make test-vllm` tries vLLM ([Serving engines](../python.md#serving-engines))."
    )
    rows = ["| tool | version | tried | result |", "|---|---|---|---|"]
    for row in json.loads((ROOT / "docs" / "compatibility.json").read_text()):
        rows.append(f"| {row['tool']} | {row['version']} | {row['tried']} | {row['result']} |")
    return "\n\n".join(["# Compatibility", introduction, "\n".join(rows)]) + "\n"
