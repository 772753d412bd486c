"""Damage every file of finished stages and checkpoints: it is refused in one line, repaired, or changes nothing."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

import forked
from cocomix.cli.main import main
from cocomix.pipeline.stage import CLAIM_FILE
from tiny_run import PREPARED, Runner, once, tiny_recipe, write_text

pytestmark = pytest.mark.reliability
DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "bit flipped": lambda content: content[: len(content) // 2] + flipped(content[len(content) // 2 :]),
    "truncated": lambda content: content[: len(content) // 2],
    "emptied": lambda content: b"",
    "deleted": lambda content: None,
}


def flipped(content: bytes) -> bytes:
    return bytes([content[0] ^ 1]) + content[1:] if content else content


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny recipe."""

    def build(folder: Path) -> None:
        recipe = tiny_recipe(write_text(folder / "text"), folder / "out")
        runner = Runner(folder)
        runner.write(recipe)
        assert runner("run") == 0

    return once(tmp_path_factory, "reliability", build)


def student_files(folder: Path) -> dict[str, bytes]:
    """What must be equal: weights, losses per document, and labels."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".safetensors", ".npz")
    }


@contextmanager
def damaged(path: Path, how: str) -> Iterator[bool]:
    """Damage a file for a while; False if the damage changes nothing."""
    content = path.read_bytes()
    new = DAMAGES[how](content)
    if new is None:
        path.unlink()
    else:
        path.write_bytes(new)
    yield new != content
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def outcome(arguments: list[str], result: Callable[[], Any], expected: Any, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command and say how it ended: refused, equal, different, or traceback."""
    capsys.readouterr()
    try:
        code = main(arguments)
    except Exception as error:
        return f"traceback: {type(error).__name__}: {error}"
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cocomix: ")]
    if code == 2:
        return "refused" if said and all(len(line) < 600 for line in said) else f"refused without a line: {said}"
    return ("equal" if result() == expected else "different") if code == 0 else f"exit code {code}"


def report(found: dict[tuple[str, str], str]) -> None:
    table = Counter((how, result.partition(":")[0]) for (_, how), result in found.items())
    for (how, result), count in sorted(table.items()):
        print(f"{how:12} {result:12} {count}")
    wrong = {trial: result for trial, result in found.items() if result not in ("refused", "equal")}
    assert not wrong


def test_damaged_inputs_of_a_training(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A student is trained from damaged stages."""
    out = shutil.copytree(finished / "out", tmp_path / "out")
    shutil.rmtree(out / "students")
    recipe = yaml.safe_load((finished / "recipe.yaml").read_text()) | {"output": str(out)}
    recipe["training"]["max_tokens"] = 1024
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = ["train", str(tmp_path / "recipe.yaml"), "--only", "cocomix"]
    student = out / "students"
    assert main(command) == 0
    expected = student_files(student)
    found = {}
    for path in [path for stage in PREPARED for path in sorted((out / stage).rglob("*")) if path.is_file()]:
        for how in DAMAGES:
            shutil.rmtree(student, ignore_errors=True)
            with damaged(path, how) as changed:
                if changed:
                    name = path.relative_to(out).as_posix()
                    found[name, how] = outcome(command, lambda: student_files(student), expected, capsys)
    with capsys.disabled():
        report(found)


def test_damaged_runs_are_not_shown(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A finished student is compared and inspected."""
    students = shutil.copytree(finished / "out", tmp_path / "out") / "students"
    run, other = students / "cocomix", students / "ntp"
    commands = [
        ["compare", str(run), str(other), "--json"],
        ["inspect", "The river crosses the stone.", "--run", str(run), "--json"],
    ]
    found = {}
    for command in commands:
        capsys.readouterr()
        assert main(command) == 0
        expected = capsys.readouterr().out
        for path in sorted(path for path in run.rglob("*") if path.is_file()):
            for how in DAMAGES:
                with damaged(path, how) as changed:
                    if not changed:
                        continue
                    printed: list[str] = []
                    trial = f"{command[0]} {path.relative_to(run).as_posix()}", how
                    with pytest.MonkeyPatch.context() as patch:
                        for module in ("compare", "inspect"):
                            patch.setattr(f"cocomix.cli.{module}.show", printed.append)
                        found[trial] = outcome(command, lambda p=printed: "\n".join(p) + "\n", expected, capsys)
    with capsys.disabled():
        report(found)


def test_damaged_checkpoints(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A training that was killed resumes from damaged files."""
    out = shutil.copytree(finished / "out", tmp_path / "out")
    expected = student_files(out / "students" / "cocomix")
    shutil.rmtree(out / "students" / "cocomix")
    recipe = yaml.safe_load((finished / "recipe.yaml").read_text()) | {"output": str(out)}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = ["train", str(tmp_path / "recipe.yaml"), "--only", "cocomix"]
    process = forked.start(forked.command, command, log=tmp_path / "log")
    partial = out / "students" / "cocomix.partial"
    while not list(partial.glob("checkpoint-*/complete")):
        assert process.is_alive(), (tmp_path / "log").read_text()
    process.kill()
    process.join()
    killed = shutil.copytree(partial, tmp_path / "killed")
    found = {}
    for name in sorted(path.relative_to(killed).as_posix() for path in killed.rglob("*") if path.is_file()):
        for how in DAMAGES:
            for left in (partial, out / "students" / "cocomix"):
                shutil.rmtree(left, ignore_errors=True)
            shutil.copytree(killed, partial)
            with damaged(partial / name, how) as changed:
                if changed:
                    result = outcome(command, lambda: student_files(out / "students" / "cocomix"), expected, capsys)

                    found[name, how] = result
            shutil.rmtree(partial, ignore_errors=True)
    with capsys.disabled():
        report(found)
    assert CLAIM_FILE in {name for name, _ in found}
