"""Propose what to try after a run: commands that fit its options, its text and its students."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from cocomix.cli.options import program
from cocomix.common import files

if TYPE_CHECKING:
    from cocomix.catalog.search import Catalog
    from cocomix.pipeline.methods import StudentConfig
    from cocomix.pipeline.recipe import Recipe

NEW_TOKENS = 40
"""Tokens that `generate` writes by default."""


def next_steps(results: dict[str, Any], recipe: Recipe, command: Sequence[str]) -> str:
    """Return what to try after a run, each with a command.

    Args:
        results: results of the run.
        recipe: its recipe.
        command: its command line, without the name of the program: a command, its arguments, and options of the recipe.
    """
    from cocomix.data.sources import PYTHON_STDLIB

    folder = files.located(recipe.replicated()[0].output)
    steps = [*_about_concepts(results["showcase"], recipe, folder, command)] if results.get("showcase") else []
    steps = steps or [("Evaluate its first student", ["evaluate", str(folder)])]
    if recipe.corpus.source == PYTHON_STDLIB:
        own = ["--corpus.source", "PATH/TO/YOUR/TEXT", "--output", f"{recipe.output}-mine"]
        steps.append(("The same on text of yours", [*_without(command, own[::2]), *own]))
    lines = (f"  {purpose}:\n    {program()} {shlex.join(step)}" for purpose, step in steps)
    return "\n".join(["\nThings to try next:", *lines])


def _about_concepts(
    shown: dict[str, Any], recipe: Recipe, folder: Path, command: Sequence[str]
) -> Iterator[tuple[str, list[str]]]:
    """Yield the purposes and commands for the student whose concepts the report shows."""
    student, catalog = shown["student"], _catalog(folder / "catalog")
    run, steered = str(folder / "students" / student), shown.get("steered")
    if catalog is None:
        yield "Name the concepts", ["concepts", run]
    elif shown["best"]:
        yield "Look at a concept that it predicts well", ["concepts", "show", run, str(shown["best"][0]["concept_id"])]
    if steered is not None:
        yield "See which concepts it mixes in", ["inspect", run, steered["prompt"]]
    if steered is not None and steered["concepts"]:
        spec = f"{_reference(steered['concepts'][0], catalog)}=+{steered['strength']:g}"
        room = recipe.block_size // 2  # the prompt takes at most half of the context
        length = ["--max-new-tokens", str(room)] if room < NEW_TOKENS else []
        yield "Raise a concept", ["generate", run, steered["prompt"], "--steer", spec, "--compare", *length]
    yield "Do all this in a browser", ["app", run]
    yield "Measure how well concepts are predicted and used", ["evaluate", "concepts", run]
    name = next(name for name in recipe.students if student == name or student.startswith(f"{name}-seed-"))
    if other := _other_mixing(recipe.students[name]):
        mixing, settings = other
        if f"{name}-{mixing}" not in recipe.students:
            option = [f"--students.{name}-{mixing}", settings]
            yield f"Compare it with mixing {mixing}, from the same teacher, SAE and labels", [*command, *option]


def _catalog(folder: Path) -> Catalog | None:
    """Open the catalog in a folder; None if there is none."""
    from cocomix.catalog.rows import INFO_FILE
    from cocomix.catalog.search import open_catalog

    return open_catalog(folder) if (folder / INFO_FILE).is_file() else None


def _reference(concept: dict[str, Any], catalog: Catalog | None) -> str:
    """Return how `--steer` takes a concept: by its name where that is unique and begins like a word, or its number."""
    number, name = concept["concept_id"], concept["name"]
    is_unique = catalog is not None and catalog.named(name) == [number] and "=" not in name
    return f"name:{name}" if is_unique and name[:1].isalnum() else str(number)


def _other_mixing(student: StudentConfig) -> tuple[str, str] | None:
    """Return the other way to mix and, as an option's value, the student with it; None if it does not fit."""
    from cocomix.pipeline.methods import MixerConfig

    mixer = student.mixer or MixerConfig()
    mixing = "interleave" if mixer.mixing == "add" else "add"
    changed = dataclasses.replace(student, mixer=dataclasses.replace(mixer, mixing=mixing))
    if changed.problems():
        return None
    return mixing, yaml.safe_dump(_given(changed), default_flow_style=True, sort_keys=False, width=10**6).strip()


def _given(settings: Any) -> dict[str, Any]:
    """Return the settings that differ from their defaults, as nested dictionaries."""
    given: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value != field.default:
            given[field.name] = _given(value) if dataclasses.is_dataclass(value) else value
    return given


def _without(command: Sequence[str], options: Sequence[str]) -> list[str]:
    """Return a command line without these options and their values."""
    kept: list[str] = []
    rest = iter(command)
    for word in rest:
        name, joined, _ = word.partition("=")
        words = [word, next(rest)] if word.startswith("--") and not joined else [word]
        kept += words if name not in options else []
    return kept
