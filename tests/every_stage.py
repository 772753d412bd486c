"""A recipe with every kind of stage, and what must be equal if a fault disturbed it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny_run import tiny_recipe, training

MEASURED = ("timing", "second", "environment", "output")
"""Parts of the names of figures that differ between any two runs."""
DRAWN = ("state.json", "SHA256SUMS", "curves.png", "report.html", "report.md", "README.md")
"""Files with random names of `datasets`, and files whose contents follow from others."""


def small_recipe(text: Path, output: Path) -> dict[str, Any]:
    """Every kind of stage, as short as possible."""
    recipe = tiny_recipe(text, output)
    short = {**training(4096), "tokens_per_evaluation": 1024}
    recipe["teacher"]["training"] = recipe["training"] = short
    recipe["sae"]["training_tokens"] = 4096
    recipe["students"]["kd"] = {"method": "kd", "distillation": {"top_k": 5}}
    recipe["catalog"] = {"contexts": 3}
    return recipe


def result(output: Path) -> dict[str, Any]:
    """Everything that must be equal: the bytes of files, and the figures in JSON files."""
    found: dict[str, Any] = {}
    for path in sorted(
        path for path in output.rglob("*") if path.is_file() and path.name not in DRAWN and path.suffix != ".lock"
    ):
        name = path.relative_to(output).as_posix()
        found[name] = figures(json.loads(path.read_text())) if path.suffix == ".json" else path.read_bytes()
    return found


def figures(value: Any) -> Any:
    """The figures of a record that do not measure time or name the machine."""
    if isinstance(value, dict):
        return {key: figures(inner) for key, inner in value.items() if not any(word in key for word in MEASURED)}
    return [figures(inner) for inner in value] if isinstance(value, list) else value
