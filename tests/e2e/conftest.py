"""Tiny runs: one finished run that tests look at, and new ones that they spoil."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tiny_run import Runner, finished_run, once, tiny_recipe, write_text


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return once(tmp_path_factory, "corpus", lambda folder: write_text(folder / "text")) / "text"


@pytest.fixture(scope="session")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """The tiny recipe, run once to its end for all tests that look at the result."""
    return finished_run(tmp_path_factory, "finished", lambda output: tiny_recipe(text, output))


@pytest.fixture(scope="session")
def catalogued(finished: Runner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished run with its catalogue."""

    def build(folder: Path) -> None:
        shutil.copytree(finished.folder / "out", folder / "out")
        assert finished("concepts", "--output", str(folder / "out"), "--catalog.contexts", "3") == 0

    return (
        shutil.copytree(once(tmp_path_factory, "catalogued", build), tmp_path_factory.mktemp("own") / "catalogued")
        / "out"
    )


@pytest.fixture
def recipe(text: Path, tmp_path: Path) -> Callable[..., Runner]:
    """A runner of the tiny recipe in a folder of its own, changed as the test asks for."""

    def make(**changes: Any) -> Runner:
        content = tiny_recipe(text, tmp_path / "out")
        for key, value in changes.items():
            merged = isinstance(value, dict) and key in content and key != "students"
            content[key] = {**content[key], **value} if merged else value
        runner = Runner(tmp_path)
        runner.write(content)
        return runner

    return make
