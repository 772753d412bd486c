"""Read recipes: from a YAML file with command-line options, and from the records of runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cocomix.common import settings, strict_yaml
from cocomix.common.errors import CREDENTIALS, InputError
from cocomix.data.corpus import is_packed_folder
from cocomix.pipeline.recipe import Recipe
from cocomix.training.run import load_run, output_folder, run_folders


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file; `overrides` are command line options such as `--training.max_tokens=1000000`.

    Raises:
        InputError: no such file, not YAML, unknown keys, values of a wrong type or out of their range.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no recipe at {path}; give the path of a YAML file, e.g. recipes/quickstart.yaml")
    content = strict_yaml.load(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no recipe: expected keys such as name, output, corpus, students")
    return _completed(content, path, overrides)


def recorded_recipe(folder: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe that a run, or the first run of an output folder, recorded; its output is where the run is now.

    Raises:
        InputError: there is no run, this version cannot read its recipe, or an override is invalid.
    """
    run = run_folders(folder)[0]
    output = output_folder(run)
    return _completed({**load_run(run).recipe, "output": str(output)}, run, overrides)


def _completed(content: dict[str, Any], path: Path, overrides: Sequence[str]) -> Recipe:
    """Return the recipe of what `path` holds, with the overrides."""
    _, problems = settings.read(Recipe, content)
    lines = [f"{path}: {line}" for line in problems]
    given, command_line = _overrides(overrides)
    for key, value in given.items():
        _set(content, key.split("."), value)
    recipe, together = settings.read(Recipe, content)
    lines += [f"command line: {line}" for line in [*command_line, *together] if line not in problems]
    lines += [
        f"{key} is a URL with a user name or password, which records would keep; log in through the environment, "
        "such as HF_TOKEN"
        for key in _with_credentials(content)
    ]
    if lines:
        raise InputError("\n".join(lines))
    assert isinstance(recipe, Recipe)
    _complete_sources(recipe)
    return recipe


def _complete_sources(recipe: Recipe) -> None:
    """Expand `~` in every path that the recipe reads; a packed corpus comes with its tokenizer.

    `Pipeline` expands `~` in the output.
    """
    own = [student.backbone for student in recipe.students.values() if student.backbone is not None]
    parts: list[Any] = [
        recipe.corpus,
        recipe.tokenizer,
        recipe.teacher,
        recipe.sae,
        recipe.labels,
        recipe.backbone,
        *own,
    ]
    parts += recipe.corpus.sources or []
    for part, key in [*((part, "source") for part in parts), (recipe.corpus, "validation_source")]:
        if (source := getattr(part, key)) is not None:
            setattr(part, key, os.path.expanduser(source))
    if recipe.tokenizer.source is None and is_packed_folder(recipe.corpus.source):
        recipe.tokenizer.source = str(Path(recipe.corpus.source) / "tokenizer")


def recipe_of_run(content: dict[str, Any], folder: Path) -> Recipe:
    """Return the recipe recorded in the run.json of `folder`.

    Raises:
        InputError: this version cannot read it.
    """
    recipe, problems = settings.read(Recipe, content)
    if problems:
        raise InputError(f"the recipe of {folder}: {'; '.join(problems)}")
    assert isinstance(recipe, Recipe)
    recipe.require_known_methods()
    _complete_sources(recipe)
    return recipe


def _overrides(options: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the values of command-line options by their dotted keys, and a line for each invalid option."""
    given: dict[str, Any] = {}
    problems: list[str] = []
    rest = list(options)
    while rest:
        option = rest.pop(0)
        if not option.startswith("--"):
            problems.append(f"unexpected {option!r}; recipe keys are given as --key value")
            continue
        key, is_joined, written = option[2:].partition("=")
        if not is_joined:
            if not rest or rest[0].startswith("--"):
                problems.append(f"--{key} has no value")
                continue
            written = rest.pop(0)
        if key in given:
            problems.append(f"--{key} is given twice; leave one of them out")
        is_text = settings.accepts_text(settings.kind_of(Recipe, key)) and written != "null"
        given[key] = written if is_text else strict_yaml.parse(written, f"--{key}")
    return given, problems


def _with_credentials(content: Any, key: str = "") -> list[str]:
    """Return the dotted keys of the values that contain an address with a user name or password."""
    if isinstance(content, dict):
        return [each for name, value in content.items() for each in _with_credentials(value, f"{key}.{name}")]
    if isinstance(content, list):
        return [each for value in content for each in _with_credentials(value, key)]
    return [key.lstrip(".")] if isinstance(content, str) and CREDENTIALS.search(content) else []


def _set(content: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    """Set a key of nested dictionaries; values in the way that are not dictionaries are replaced."""
    for key in keys[:-1]:
        inner = content.get(key)
        content[key] = dict(inner) if isinstance(inner, dict) else {}
        content = content[key]
    content[keys[-1]] = value
