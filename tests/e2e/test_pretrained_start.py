"""Students that start from the weights of a pretrained model (`backbone.source`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from tiny_run import Runner, tiny_recipe, training

NEUTRAL_PAUSE = {"insert_layer": 1, "mixing": "add", "concept_slot": "concept"}
RESIDUAL = {"concept_slot": "residual"}
HIDDEN = {"insert_layer": 2, "content": "hidden_states", "mixing": "add", **RESIDUAL}


@pytest.fixture
def start(finished: Runner, text: Path, tmp_path: Path) -> Any:
    """A recipe whose students start from the finished run's teacher, unless `changes` say otherwise."""
    there = finished.folder / "out"

    def make(students: dict[str, Any], **changes: Any) -> Runner:
        runner = Runner(tmp_path)
        runner.write(
            {
                **tiny_recipe(text, tmp_path / "out"),
                "tokenizer": {"source": str(there / "teacher")},
                "teacher": {"source": str(there / "teacher")},
                "sae": {"source": str(there / "sae"), "teacher_layer": 1},
                "training": {**training(1024), "learning_rate": 1e-6, "tokens_per_evaluation": 1024},
                "students": students,
                **changes,
                "backbone": {"source": str(there / "teacher"), **changes.get("backbone", {})},
            }
        )
        return runner

    return make


def refusal(runner: Runner, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert runner("run") == 2
    assert not (runner.folder / "out" / "corpus").exists()
    return capsys.readouterr().err


def test_students_of_every_method_that_can_predict_at_first_what_the_source_does(
    start: Any, finished: Runner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    AutoModelForCausalLM.from_pretrained(finished.folder / "out" / "teacher").save_pretrained(source)
    runner = start(
        {
            "ntp": {"method": "ntp"},
            "pause": {"method": "pause", "mixer": NEUTRAL_PAUSE},
            "cocomix": {"method": "cocomix", "mixer": {"insert_layer": 1, "num_active_concepts": 8, **RESIDUAL}},
            "hidden": {"method": "cocomix", "mixer": HIDDEN},
        },
        backbone={"source": str(source)},
    )
    assert runner("run") == 0
    results = json.loads((runner.folder / "out" / "report" / "results.json").read_text())
    before = results["backbone"]["metrics"]["loss"]
    for name, student in results["students"].items():  # after steps too small to change anything
        assert student["metrics"]["loss"] == pytest.approx(before, rel=1e-4), name
    recorded = results["recipe"]["students"]["cocomix"]
    assert recorded["backbone"] == {"source": str(source)}
    assert recorded["mixer"]["slot_positions"] == "repeat"
    assert "start from the weights of `source`" in (runner.folder / "out" / "report" / "report.md").read_text()

    changed = AutoModelForCausalLM.from_pretrained(source)
    changed.transformer.ln_f.bias.data += 1
    changed.save_pretrained(source)
    capsys.readouterr()
    assert runner("run", "--students.ntp.learning_rate=1e-5", f"--output={tmp_path / 'out'}", "--seeds=[1]") == 2
    assert f"the backbone {source} has changed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("students", "changes", "words"),
    [
        ({"a": {"method": "ntp"}}, {"backbone": {"hidden_size": 64}}, "leave out hidden_size"),
        (
            {"a": {"method": "ntp", "match": "b"}, "b": {"method": "ntp"}},
            {},
            "match has no effect with backbone.source",
        ),
        ({"a": {"method": "mtp"}}, {}, "mtp cannot start from backbone.source"),
        ({"a": {"method": "ntp"}}, {"block_size": 64}, "reads at most 32 tokens"),
        ({"a": {"method": "ntp"}}, {"tokenizer": {"vocab_size": 300}}, "set tokenizer.source to the backbone's"),
        (
            {"a": {"method": "cocomix", "mixer": {"insert_layer": 1, "concept_slot": "concept"}}},
            {},
            "it must be 'residual'",
        ),
        ({"a": {"method": "ntp"}}, {"backbone": {"source": "nowhere"}}, "the model nowhere does not load"),
    ],
)
def test_what_cannot_start_from_pretrained_weights(
    start: Any, capsys: pytest.CaptureFixture[str], students: Any, changes: Any, words: str
) -> None:
    assert words in refusal(start(students, **changes), capsys)
