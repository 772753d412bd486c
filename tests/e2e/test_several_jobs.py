"""`--jobs`: students train in processes of their own, and give what they give one after the other."""

from __future__ import annotations

import json
from typing import Any

import pytest


def test_students_that_train_at_the_same_time(recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    students = {"corpus": {"method": "ntp"}, "wild": {"method": "ntp", "learning_rate": 100.0}}
    short = {"max_tokens": 2048, "tokens_per_evaluation": 2048, "max_grad_norm": 0}
    runner = recipe(students=students, seeds=[0, 1], training=short)
    assert runner("train", "--only", "corpus-seed-1") == 0
    alone = json.loads((runner.folder / "out" / "students" / "corpus-seed-1" / "run.json").read_text())
    assert runner("train", "--only", "corpus-seed-0,none", "--jobs", "2") == 2
    assert "--only is 'none'" in capsys.readouterr().err
    assert runner("train", "--only", ",") == 2
    assert "--only is ',', an empty list" in capsys.readouterr().err
    (runner.folder / "out" / "students" / "corpus-seed-1").rename(runner.folder / "alone")

    assert runner("run", "--jobs", "2", "--quiet") == 2
    error = capsys.readouterr().err
    assert "[student wild-seed-0] cocomix: " in error and "tokens/s" not in error
    assert "cocomix: student wild-seed-1 failed (exit code 2); its message is above" in error
    together = json.loads((runner.folder / "out" / "students" / "corpus-seed-1" / "run.json").read_text())
    assert together["curve"] == alone["curve"]
    assert together["recipe"] == alone["recipe"]

    assert runner("run", "--students.wild.learning_rate", "0.001", "--jobs", "2", "--json") == 0
    printed = capsys.readouterr()
    assert "[student corpus" not in printed.err  # finished before
    assert json.loads(printed.out)["groups"]["wild"] == ["wild, seed 0", "wild, seed 1"]
