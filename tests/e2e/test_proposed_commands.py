"""Every command that a run proposes at its end works, for a run on text and with options of one's own."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from cocomix.cli import app
from cocomix.cli.main import main
from tiny_run import Runner, finished_run, tiny_recipe


@pytest.fixture
def own(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """A finished run whose recipe file asks for another SAE, so that its options are needed."""
    runner = finished_run(tmp_path_factory, "finished", lambda output: tiny_recipe(text, output))
    content = tiny_recipe(text, runner.folder / "out")
    content["sae"]["d_sae"] = 32
    runner.write(content)
    return runner


def proposed(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    _, _, steps = capsys.readouterr().out.partition("Things to try next:")
    return [shlex.split(line) for line in steps.splitlines() if line.startswith("    ")]


def test_every_proposed_command_runs(own: Runner, monkeypatch, capsys) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(app, "wait", stop)
    options = ("--sae.d_sae", "64", "--name", "my run")
    assert own("run", *options) == 0
    commands = proposed(capsys)
    assert [command[1] for command in commands] == ["concepts", "inspect", "generate", "app", "evaluate", "run"]
    for command in commands:
        assert main(command[1:]) == 0, shlex.join(command)
    assert "next token, steered" in capsys.readouterr().out
    output = own.folder / "out"
    assert {path.name for path in (output / "students").iterdir()} == {"ntp", "cocomix", "cocomix-add"}
    results = json.loads((output / "report" / "results.json").read_text())
    assert list(results["students"]) == ["ntp", "cocomix", "cocomix-add"] and results["name"] == "my run"

    assert own("run", *options, "--students.cocomix-add", commands[-1][-1]) == 0
    named = proposed(capsys)
    assert [command[1] for command in named] == ["concepts", "inspect", "generate", "app", "evaluate"]
    assert main(named[0][1:]) == main(named[2][1:]) == 0
    assert "name:" in shlex.join(named[2])
