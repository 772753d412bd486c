"""A training method needs an objective and one entry in METHODS: the lines in CONTRIBUTING.md are executed here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cocomix.cli.main import main
from cocomix.pipeline.methods import METHODS
from tiny_run import Runner, tiny_recipe

CONTRIBUTING = Path(__file__).parents[2] / "CONTRIBUTING.md"


def test_a_new_method_is_planned_trained_and_compared(
    finished: Runner,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    section = CONTRIBUTING.read_text(encoding="utf-8").split("## Add a training method")[1]
    before = dict(METHODS)
    try:
        exec(section.split("```python\n")[1].split("```")[0], {})
        (added,) = METHODS.keys() - before
        recipe = tiny_recipe(text, tmp_path / "out")
        recipe["students"] = {"ntp": {"method": "ntp"}, "new": {"method": added}}
        path = Runner(tmp_path).write(recipe)
        shutil.copytree(finished.folder / "out" / "corpus", tmp_path / "out" / "corpus")
        capsys.readouterr()

        assert main(["plan", str(path), "--gpus", "1", "--json"]) == 0
        flops = [student["flops"] for student in json.loads(capsys.readouterr().out)["students"]]
        assert flops[0] == flops[1]

        assert main(["run", str(path), "--json"]) == 0
        results = json.loads(capsys.readouterr().out)
    finally:
        METHODS.clear()
        METHODS.update(before)
    run = results["students"]["new"]
    assert run["method"] == added
    assert run["training_flops_per_token"] == results["students"]["ntp"]["training_flops_per_token"]
    assert run["metrics"]["loss"] != results["students"]["ntp"]["metrics"]["loss"]
    assert "new" in (tmp_path / "out" / "report" / "report.md").read_text(encoding="utf-8")
