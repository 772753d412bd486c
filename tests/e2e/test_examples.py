"""The examples run, on any run."""

from __future__ import annotations

import json
import re
import runpy
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import cocomix

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SAID = {
    "find_concepts": "labels on ",
    "read_concepts": "sum to the continuous vectors",
    "steer_text": "The most probable next tokens after 'river'",
}


@pytest.mark.parametrize("name", SAID)
def test_an_example_runs(name, catalogued, monkeypatch, capsys):
    run = catalogued / "students" / "cocomix"
    monkeypatch.setattr("sys.argv", [name, str(run), "river"])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert SAID[name] in said
    if name == "steer_text":
        assert len(re.findall(r"its tokens have \d.*, and steered \d.*\n\+ 12: ", said)) == 3


def test_a_teacher_and_an_sae_of_your_own(text, tmp_path, monkeypatch):
    """With 2 steps of training each."""
    example = EXAMPLES / "make_teacher_and_sae.py"
    code, changed = re.subn(r"range\(\d+\)", "range(2)", example.read_text(encoding="utf-8"))
    assert changed == 2
    monkeypatch.setattr("sys.argv", [example.name, str(text), str(tmp_path)])
    exec(compile(code, example, "exec"), {"__name__": "__main__"})
    sae = cocomix.load_sae(tmp_path / "sae")
    assert (sae.d_in, sae.d_sae, sae.k, sae.teacher_layer) == (64, 256, 8, 2)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "teacher").config.hidden_size == 64


def test_labels_of_your_own_are_learned(finished, recipe, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished.folder / "out" / "corpus", tmp_path / "out" / "corpus")
    labels = tmp_path / "labels"
    monkeypatch.setattr("sys.argv", ["write_labels", str(tmp_path / "out" / "corpus"), str(labels)])
    runpy.run_path(str(EXAMPLES / "write_labels.py"), run_name="__main__")
    assert f"labels: {{source: {labels}, selection: external, labels_per_token: 1}}" in capsys.readouterr().out
    own = {"source": str(labels), "selection": "external", "labels_per_token": 1}
    runner = recipe(labels=own, training={"max_tokens": 4096})
    assert runner("train", "--only", "cocomix") == 0
    run = json.loads((tmp_path / "out" / "students" / "cocomix" / "run.json").read_text())
    assert run["metrics"]["concept_recall"] > 0 and run["preparation"]["labels"]["flops"] is None


def test_every_example_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*SAID, "make_teacher_and_sae", "write_labels"}
