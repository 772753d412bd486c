"""Packages import only from the packages below them, and no files import each other in a circle."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROWS = [line.split("`")[1][:-1] for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines() if "/` |" in line]
"""The packages from top to bottom, as CONTRIBUTING lists them."""
FILES = {f"cocomix.{path.parent.name}.{path.stem}": path for path in (ROOT / "src" / "cocomix").glob("*/*.py")}


def imports(file: Path) -> set[str]:
    """Return what a file imports from this project, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            inside = f"cocomix.{file.parent.name}." if node.level else ""
            found |= {f"{inside}{node.module}", *(f"{inside}{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] == "cocomix"}


def test_imports_point_down_and_form_no_cycle() -> None:
    arrows = {name: imports(file) for name, file in FILES.items()}
    height = {package: -row for row, package in enumerate(ROWS)}
    assert height.keys() == {name.split(".")[1] for name in FILES}
    pairs = [(name, found) for name in FILES for found in arrows[name]]
    upward = [pair for pair in pairs if height[pair[0].split(".")[1]] < height.get((pair[1] + ".").split(".")[1], 1)]
    assert not upward
    list(TopologicalSorter({name: found & FILES.keys() for name, found in arrows.items()}).static_order())
