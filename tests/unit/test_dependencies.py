"""The third-party packages that `src` imports are those that pyproject.toml declares."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DEVELOPMENT = {"dev", "docs", "compat"}
INSTALLED = packages_distributions()
PACKAGES_OF_EXTRAS = {"app", "serving"}
"""Subpackages that are only imported where their extra is installed."""
LOADED_BY_TRANSFORMERS = {"trackio", "tensorboard"}  # for `report_to`


def names(requirements: list[str]) -> set[str]:  # without extras and versions
    return {re.match(r"[\w.-]+", each)[0].lower().replace("_", "-") for each in requirements}


def imports(node: ast.AST, functions: bool) -> set[str]:
    """Modules that `node` imports; without `functions`, only those imported at run time when the module is."""
    if isinstance(node, ast.Import):
        return {alias.name.partition(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        return set() if node.level else {node.module.partition(".")[0]}
    deferred = isinstance(node, ast.FunctionDef) or (
        isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
    )
    return set().union(*(imports(each, functions) for each in ast.iter_child_nodes(node) if functions or not deferred))


def distributions(files: list[Path], functions: bool) -> set[str]:
    modules = set().union(*(imports(ast.parse(file.read_text()), functions) for file in files))
    third_party = modules - sys.stdlib_module_names - {"cocomix"}
    return names([INSTALLED.get(module, [module])[0] for module in third_party])


def test_imports_and_declared_dependencies_agree():
    files = sorted((ROOT / "src").rglob("*.py"))
    core = [file for file in files if file.parent.name not in PACKAGES_OF_EXTRAS]
    required = names(PROJECT["dependencies"])
    extras = PROJECT["optional-dependencies"]
    optional = names([each for extra in extras.keys() - DEVELOPMENT for each in extras[extra]])
    assert distributions(files, functions=True) == (required | optional) - LOADED_BY_TRANSFORMERS
    assert distributions(core, functions=False) <= required


def test_every_requirement_is_locked():
    """`make lock` writes the lock files; torch is left out."""
    extras = PROJECT["optional-dependencies"]
    inside = [each for extra in ("sae", "eval", "track", "app", "serve") for each in extras[extra]]
    wanted = {"core": [], "dev": [*extras["dev"], *inside], "docs": extras["docs"]}
    for name, more in wanted.items():
        locked = {line.split("==")[0] for line in (ROOT / "locks" / f"{name}.txt").read_text().splitlines()}
        assert names([*PROJECT["dependencies"], *more]) - locked <= {"torch", "cocomix"}, f"{name}: run make lock"
