"""The examples run, on any run."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SAID = {
    "find_concepts": "labels on ",
    "read_concepts": "sum to the continuous vectors",
    "steer_text": "distribution moves by",
}


@pytest.mark.parametrize("name", SAID)
def test_an_example_runs(name, catalogued, monkeypatch, capsys):
    run = catalogued / "students" / "cocomix"
    monkeypatch.setattr("sys.argv", [name, str(run), "river"])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert SAID[name] in said
    if name == "steer_text":
        moved = [float(each) for each in re.findall(r"moves by (\d\.\d+)", said)]
        assert len(moved) == 3 and max(moved) > 0.001  # it changes what comes next


def test_every_example_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == SAID.keys()
