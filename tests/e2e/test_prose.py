"""The whole path on English prose, with both kinds of backbone."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from cocomix.cli.main import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("model_type", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_prose(prose: Path, model_type: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {
        "corpus.source": prose / "train",
        "teacher.backbone.model_type": model_type,
        "backbone.model_type": model_type,
        "corpus.max_documents": 12,
        "training.max_tokens": 49152,
        "training.tokens_per_evaluation": 24576,
        "output": tmp_path / "out",
    }
    arguments = [f"--{key}={value}" for key, value in options.items()]
    assert main(["run", str(ROOT / "recipes" / "prose.yaml"), *arguments, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)

    students = results["students"]
    assert list(students) == ["ntp", "cocomix", "cocomix-add", "cocomix-published"]
    uniform = math.log(results["corpus"]["packed"]["vocab_size"])
    for name, student in students.items():
        assert student["tokens"] == 49152
        assert student["metrics"]["loss"] < uniform - 0.5, name
        first, *_, last = (point["loss"] for point in student["curve"])
        assert last < first, name
    for name in ("cocomix", "cocomix-published"):
        ratio = students["ntp"]["activated_parameters"] / students[name]["activated_parameters"]
        assert abs(ratio - 1) <= 0.02
    assert students["cocomix-add"]["training_flops"] < students["cocomix"]["training_flops"]
    # Concepts are learnt: far better than guessing 16 of 256, and better than at the first evaluation.
    for name in ("cocomix", "cocomix-add", "cocomix-published"):
        metrics, first = students[name]["metrics"], students[name]["curve"][0]
        assert metrics["concept_recall"] > metrics["constant_recall"] > 16 / 256
        assert metrics["concept_loss"] < min(math.log(256), first["concept_loss"])
    quality = results["sae"]["quality"]
    assert 0 < quality["fraction_variance_unexplained"] < 0.5
    assert quality["loss_recovered"] > 0.8
    assert results["labels"]["labelled_share"] == pytest.approx(127 / 128, abs=0.01)
