"""README and docs: every command and option exists; tutorials and Python blocks run as printed."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from cocomix.cli.main import command_tree
from cocomix.cli.options import RecipeCommand
from cocomix.pipeline.recipe import Recipe

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TUTORIALS = ("own-text", "own-teacher-and-sae", "steer-a-model")
WITH_PYTHON = ("README.md", "docs/concepts.md", "docs/python.md", "docs/steering.md")
SMALL = {
    "corpus.max_documents": 24,
    "corpus.validation_fraction": 0.1,
    "teacher.training": {"max_tokens": 20480, "tokens_per_evaluation": 20480},
    "sae.training_tokens": 8192,
    "training": {"max_tokens": 10240, "tokens_per_evaluation": 5120},
}
"""Settings of a quickstart whose model has the shape of the real one."""
SHORTER = {"cocomix evaluate steering": "--concepts 2 --prompts 1 --new-tokens 4"}
"""Options that shorten commands which take minutes."""
PLACEHOLDERS = ("|", "...", "…")
SERVER_SECONDS = 120


class Block(NamedTuple):
    """A fenced block: its language, its content, and the text before it, back to the block before."""

    language: str
    content: str
    before: str


def fenced_blocks(page: Path) -> list[Block]:
    found, end = [], 0
    text = page.read_text()
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        found.append(Block(match[1], match[2], text[end : match.start()]))
        end = match.end()
    return found


def command_lines(page: Path) -> Iterator[str]:
    """Yield what the page shows as a command: in blocks for the shell, in indented lists, and in `code`."""
    text = page.read_text().replace("\\\n", " ")
    shells = "".join(block.content for block in fenced_blocks(page) if block.language == "sh")
    yield from re.findall(r"^(?:\S*/bin/|.*-m )?(cocomix .*)$", shells, re.MULTILINE)
    yield from re.findall(r"^ {4}(?:\S*/bin/|.*-m )?(cocomix .*)$", text, re.MULTILINE)
    yield from re.findall(r"`(cocomix [^`]+)`", text)


def problems_of(line: str) -> list[str]:
    """List what is wrong with a command: its name, or one of its options."""
    tree = command_tree()
    words = shlex.split(re.split(r"\s{2,}|\s+#", line.replace("[", "").replace("]", ""))[0].replace("'", " "))[1:]
    if not words or words[0].startswith("-"):
        return []
    names = [" ".join(words[:count]) for count in (2, 1) if " ".join(words[:count]) in tree.commands]
    if not names:
        return [f"{line}: no command {words[0]}"]
    command = tree.commands[names[0]]
    known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    sections = {field.name for field in dataclasses.fields(Recipe)}
    unknown = []
    for word in words:
        option = word.partition("=")[0]
        is_key = isinstance(command, RecipeCommand) and option[2:].partition(".")[0] in sections
        if option.startswith("--") and option not in known and not is_key and option != "--KEY":
            unknown.append(f"{line}: {names[0]} has no option {option}")
    return unknown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_command_and_option_exists(page: Path) -> None:
    if page.name == "log.md":  # history: commands as they were
        return
    assert [problem for line in command_lines(page) for problem in problems_of(line)] == []


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a checkout after a (smaller) quickstart, with the text `~/texts`."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("recipes", "examples", "docs", "README.md"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv").symlink_to(sys.prefix)
    texts = folder / "texts"
    texts.mkdir()
    for number, source in enumerate(sorted((ROOT / "src").rglob("*.py"))[:60]):
        (texts / f"{number}.txt").write_text(source.read_text())
    options = [f"--{name}={value}" for name, value in flattened(SMALL)]
    shell(folder, shlex.join(["cocomix", "quickstart", *options]))
    return folder


def flattened(settings: dict[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def environment(folder: Path) -> dict[str, str]:
    binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {
        **os.environ,
        "HOME": str(folder),
        "PATH": binaries,
        "OMP_NUM_THREADS": "1",
        "TQDM_DISABLE": "1",
        "MPLBACKEND": "agg",
    }


def shell(folder: Path, command: str) -> str:
    """Run a command in `folder`; return what it prints."""
    found = subprocess.run(
        ["bash", "-euc", command], cwd=folder, env=environment(folder), capture_output=True, text=True
    )
    assert found.returncode == 0, f"{command}\n{found.stdout}\n{found.stderr}"
    return found.stdout


def serve(folder: Path, command: str, announcement: str) -> None:
    """Run a command that serves until it is stopped; wait for its announcement."""
    started = time.monotonic()
    with subprocess.Popen(
        ["bash", "-euc", f"exec {command}"], cwd=folder, env=environment(folder), stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        try:
            assert announcement in server.stdout.readline()
            assert time.monotonic() - started < SERVER_SECONDS
        finally:
            server.terminate()


def changed(recipe: str, lines: str) -> str:
    """Return a recipe with some top-level keys replaced."""
    return yaml.safe_dump(yaml.safe_load(recipe) | yaml.safe_load(lines))


def run_block(block: Block, folder: Path) -> None:
    """Do with a block what the page tells the reader to do with it."""
    if block.language == "yaml":
        (name,) = re.findall(r"[Ss]ave (?:this|the recipe) as `(\S+\.yaml)`", block.before) or [None]
        if name is None:
            return  # part of a recipe
        if "Change these lines" in block.before:
            block = block._replace(content=changed((folder / "my-labels.yaml").read_text(), block.content))
        (folder / name).write_text(block.content)
    elif block.language == "python":
        found = subprocess.run(
            [sys.executable, "-c", block.content], cwd=folder, env=environment(folder), capture_output=True, text=True
        )
        assert found.returncode == 0, f"{block.content}\n{found.stderr}"
    elif block.language == "sh":
        for line in block.content.splitlines():
            if "pip install" in line:
                continue  # the environment of the tests has all extras
            if line.startswith("cocomix app"):
                serve(folder, line, "Page: ")
                continue
            shorter = next((options for start, options in SHORTER.items() if line.startswith(start)), "")
            shell(folder, f"{line.partition('  #')[0]} {shorter}")


@pytest.mark.slow
@pytest.mark.parametrize("name", TUTORIALS)
def test_a_tutorial_runs_as_printed(name: str, checkout: Path) -> None:
    blocks = fenced_blocks(ROOT / "docs" / "tutorials" / f"{name}.md")
    assert {"sh", "python"} <= {block.language for block in blocks}
    for block in blocks:
        run_block(block, checkout)


@pytest.mark.slow
def test_the_notebook_runs(checkout: Path) -> None:
    cells = json.loads((ROOT / "examples" / "first_steps.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 3
    run_block(Block("python", "\n".join(code), ""), checkout)


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_PYTHON)
def test_python_blocks_run_as_printed(page: str, checkout: Path) -> None:
    """The blocks of a page run one after another in one process, as a reader would paste them."""
    blocks = [block.content for block in fenced_blocks(ROOT / page) if block.language == "python"]
    assert blocks
    run_block(Block("python", "\n".join(blocks), ""), checkout)
