"""Replicates: each seed with its own teacher, SAE and labels, in one report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cocomix.cli.main import main


def test_each_replicate_has_its_own_teacher_and_all_are_one_comparison(
    recipe: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = recipe(replicates=2)
    monkeypatch.chdir(runner.folder)
    assert runner("teacher", "--output", "out") == 0
    capsys.readouterr()
    assert runner("run", "--output", "out", "--json") == 0
    printed = capsys.readouterr()
    results = json.loads(printed.out)
    assert "Replicate 2 of 2: out/replicate-1" in printed.err
    assert results["groups"] == {name: [f"{name}, seed {seed}" for seed in (0, 1)] for name in ("ntp", "cocomix")}
    packed = runner.folder / "out" / "replicate-1" / "corpus" / "train"
    assert packed.readlink() == Path("../../replicate-0/corpus/train") and packed.is_dir()
    for kind in ("teacher", "sae", "labels"):
        found = {results["students"][f"cocomix, seed {seed}"]["preparation"][kind]["fingerprint"] for seed in (0, 1)}
        assert len(found) == 2
    assert len({each["validation"] for each in results["students"].values()}) == 1
    report = (runner.folder / "out" / "report" / "report.md").read_text()
    assert "over 2 replicates" in report and "Over replicates: " in report
    before = json.loads((runner.folder / "out" / "report" / "results.json").read_text())
    assert main(["report", str(runner.folder / "out" / "replicate-1" / "students" / "ntp")]) == 0
    again = json.loads((runner.folder / "out" / "report" / "results.json").read_text())
    for key in ("groups", "comparisons", "inputs", "recipe"):
        assert again[key] == before[key]
    assert "Each seed is a replicate with its own teacher, SAE and labels" in report

    assert runner("run", "--output", "out") == 0
    assert capsys.readouterr().err.count("Nothing to do") == 2
    assert main(["export", "out", "--to", "bundle"]) == main(["compare", "out.tar.gz", "--json"]) == 0
    assert '"comparisons"' in capsys.readouterr().out

    assert runner("run", "--output", "out", "--seeds", "[0, 1]") == 2
    assert "replicates has its own seeds" in capsys.readouterr().err
