"""Runs of earlier commits open: the archive in tests/older_runs was written by the commit that it is named after."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

import cocomix
from cocomix.cli.main import main
from cocomix.common import files
from cocomix.data.packing import load_packed
from cocomix.models.loading import load_causal_lm
from cocomix.training.run import load_run
from cocomix.training.validation import evaluate_model

LEFT_OUT = {"concept_slot": "residual", "concept_loss_weight": "1.0"}
"""Settings that the recipes leave out, with the defaults of their time."""
ARCHIVES = sorted((Path(__file__).parents[1] / "older_runs").glob("*.tar.xz"))


@pytest.fixture(params=ARCHIVES, ids=[path.name.split(".")[0] for path in ARCHIVES])
def older(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with tarfile.open(request.param) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "out"


def test_a_run_of_an_earlier_commit_is_finished_compared_read_and_steered(
    older: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded = files.read_json(older / "report" / "results.json")["students"]
    assert main(["run", "recipe.yaml"]) == 2
    assert "student.mixer.concept_slot is 'residual' there, 'concept' here" in capsys.readouterr().err
    options = [part for key, value in LEFT_OUT.items() for part in (f"--students.cocomix.mixer.{key}", value)]
    assert main(["run", "recipe.yaml", "--json", *options]) == 0
    printed = capsys.readouterr()
    assert "Nothing to do" in printed.err
    students = json.loads(printed.out)["students"]
    assert {name: each["metrics"] for name, each in students.items()} == {
        name: each["metrics"] for name, each in recorded.items()
    }

    validation = load_packed(older / "corpus").validation
    for name in students:
        folder = older / "students" / name
        loss = evaluate_model(load_causal_lm(str(folder)).eval(), validation, 8)["loss"]
        assert loss == pytest.approx(load_run(folder).metrics["loss"], abs=1e-5)

    assert main(["inspect", "The river holds", "--run", "out/students/cocomix", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
    model = cocomix.CoCoMixForCausalLM.from_pretrained(older / "students" / "cocomix")
    assert model.config.insert_layer == 1
