"""`cocomix evaluate concepts|steering` on finished runs, and what the report shows of concepts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cocomix.cli.main import main
from cocomix.evaluation.record import EVALUATION_FILE
from tiny_run import Runner, rewrite

SMALL = ("--concepts", "4", "--prompts", "2", "--strengths", "2,8", "--teacher-strengths", "1", "--named-tokens", "3")


@pytest.fixture
def output(finished: Runner, tmp_path: Path) -> Path:
    """A copy of the finished run, to add evaluations to, in another place than its recipe says."""
    return shutil.copytree(finished.folder / "out", tmp_path / "moved")


@pytest.fixture
def results(finished: Runner) -> dict[str, Any]:
    return json.loads((finished.folder / "out" / "report" / "results.json").read_text())


def evaluate(capsys: pytest.CaptureFixture[str], what: str, run: Path, *options: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["evaluate", what, str(run), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def refusal(capsys: pytest.CaptureFixture[str], what: str, run: Path, *options: str) -> str:
    capsys.readouterr()
    assert main(["evaluate", what, str(run), *options]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    return line


def kept(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / EVALUATION_FILE).read_text())["evaluations"]


def test_concepts_agree_with_what_training_measured(output: Path, results: dict[str, Any], capsys) -> None:
    run, metrics = output / "students" / "cocomix", results["students"]["cocomix"]["metrics"]
    found = evaluate(capsys, "concepts", run, "--batch-size", "1")
    assert kept(run) == [found]
    figures = found["figures"]
    assert figures["bands"][0]["recall"] == pytest.approx(metrics["concept_recall"])
    assert sum(band["labels"] for band in figures["bands"][1:]) == figures["bands"][0]["labels"]
    assert list(figures["channel"]) == ["own", "zeroed", "of another position", "of another text"]
    blocks = figures["blocks"] - figures["blocks"] % 2  # none alone
    assert figures["channel"]["own"] == pytest.approx(
        metrics["loss"], rel=1e-5 if blocks == figures["blocks"] else 0.05
    )
    limited = evaluate(capsys, "concepts", run, "--limit", "4")
    assert limited["figures"]["blocks"] == 4
    assert [each["settings"]["limit"] for each in kept(run)] == [None, 4]
    assert main(["evaluate", "concepts", str(run), "--limit", "4"]) == 0
    shown = capsys.readouterr().out
    assert "cocomix (first 4 blocks)" in shown and "precision@A" in shown and "of another text" in shown


def test_of_a_pause_vector_only_its_use_can_be_told(recipe, capsys) -> None:
    runner = recipe(students={"pause": {"method": "pause", "mixer": {"insert_layer": 1}}})
    assert runner("run") == 0
    run = runner.folder / "out" / "students" / "pause"
    figures = evaluate(capsys, "concepts", run)["figures"]
    assert figures["bands"] is None
    assert figures["channel"]["own"] == pytest.approx(figures["channel"]["of another text"])
    assert (
        refusal(capsys, "steering", run) == f"cocomix: the model in {run} mixes no concepts in, so there are none to "
        "steer"
    )


def test_steering_is_scored_against_unsteered_text_and_a_control(output: Path, capsys) -> None:
    run = output / "students" / "cocomix"
    found = evaluate(capsys, "steering", run, *SMALL)
    assert kept(run) == [found]
    assert (run / "steering.png").read_bytes().startswith(b"\x89PNG")
    assert (found["settings"]["prompt_tokens"], found["settings"]["new_tokens"]) == (8, 8)  # quarters of the context
    arms = found["figures"]["arms"]
    assert [[point["strength"] for point in arm["points"]] for arm in arms] == [[2, 8], [1], [3]]
    for number, point in enumerate(point for arm in arms for point in arm["points"]):
        low, high = point["gain"]["interval"]
        assert low <= point["gain"]["mean"] <= high, number
        assert point["specific"]["mean"] == pytest.approx(point["gain"]["mean"] - point["control"]["mean"])
        assert point["perplexity"] > 1 and 0 < point["distinct_1"] <= 1
    concepts = found["figures"]["concepts"]
    assert len(concepts) == 4 and all(each["concept"] != each["control"] for each in concepts)
    for arm in arms:
        gains = [each["gains"][arm["name"]] for each in concepts]
        for number, point in enumerate(arm["points"]):
            assert point["gain"]["mean"] == pytest.approx(sum(each[number] for each in gains) / 4)
    again = evaluate(capsys, "steering", run, *SMALL)
    assert again["figures"] == found["figures"]
    other = evaluate(capsys, "steering", run, *SMALL, "--seed", "1")
    assert [each["concept"] for each in other["figures"]["concepts"]] != [each["concept"] for each in concepts]
    assert len(kept(run)) == 2


def test_scaling_is_another_measurement_and_both_are_in_the_report(output: Path, finished: Runner, capsys) -> None:
    run = output / "students" / "cocomix"
    few = (*SMALL[:4], "--teacher-strengths", "1", "--named-tokens", "1")
    found = evaluate(capsys, "steering", run, *few, "--operation", "scale")
    assert [point["strength"] for point in found["figures"]["arms"][0]["points"]] == [2, 4, 8, 16]
    evaluate(capsys, "concepts", run)
    assert finished("run", "--output", str(output)) == 0
    report = (output / "report" / "report.md").read_text()
    assert "concept logit, scale (4 concepts × 2 prompts)" in report and "precision@A" in report


def test_a_teacher_with_another_tokenizer_reads_the_text(finished: Runner, recipe, capsys) -> None:
    out = finished.folder / "out"
    runner = recipe(
        teacher={"source": str(out / "teacher")},
        sae={"source": str(out / "sae"), "teacher_layer": 1},
        corpus={"max_documents": 60},
        tokenizer={"vocab_size": 258},
        labels={"alignment": "characters"},
        students={"cocomix": {"method": "cocomix", "mixer": {"insert_layer": 1, "num_active_concepts": 8}}},
    )
    assert runner("run") == 0
    run = runner.folder / "out" / "students" / "cocomix"
    figures = evaluate(capsys, "steering", run, *SMALL)["figures"]
    assert all(point["perplexity"] > 1 for arm in figures["arms"] for point in arm["points"])
    shown = json.loads((runner.folder / "out" / "report" / "results.json").read_text())["showcase"]
    assert all(each["contexts"] and each["name"] for each in shown["best"])


@pytest.mark.parametrize("what", ["concepts", "steering"])
def test_what_cannot_be_scored_is_told_in_one_line(output: Path, tmp_path: Path, capsys, what: str) -> None:
    run, plain = output / "students" / "cocomix", output / "students" / "ntp"
    assert f"{plain} was trained with ntp, which mixes nothing in" in refusal(capsys, what, plain)
    assert "no model in nowhere" in refusal(capsys, what, Path("nowhere"))
    alone = shutil.copytree(run, tmp_path / "alone" / "students" / "cocomix")
    assert "no labeled corpus at" in refusal(capsys, what, alone)
    (alone / "run.json").unlink()
    assert "has no run.json, which describes its concepts" in refusal(capsys, what, alone)
    preparation = json.loads((run / "run.json").read_text())["preparation"]
    preparation["labels"]["fingerprint"] = "0"
    rewrite(run / "run.json", preparation=preparation)
    assert "the labels of" in (line := refusal(capsys, what, run)) and "changed since it was trained" in line
    assert not (run / EVALUATION_FILE).exists()
    (run / EVALUATION_FILE).write_text("[]")
    assert "does not hold evaluations" in refusal(capsys, what, run)


def test_another_teacher_or_sae_is_refused(output: Path, capsys) -> None:
    run, weights = output / "students" / "cocomix", output / "teacher" / "model.safetensors"
    tensors = load_file(weights)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name] + torch.ones(())}, weights, metadata={"format": "pt"})
    assert f"the teacher {output / 'teacher'} has changed" in refusal(capsys, "steering", run, *SMALL)
    save_file(tensors, weights, metadata={"format": "pt"})
    shutil.rmtree(output / "sae")
    assert str(output / "sae") in refusal(capsys, "steering", run, *SMALL)
    shutil.rmtree(output / "teacher")
    assert "the teacher of" in refusal(capsys, "steering", run, *SMALL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--concepts", "65"), "65 concepts cannot be scored: only"),
        (("--prompts", "1000", "--concepts", "4"), "1000 prompts are wanted, but only"),
        (("--strengths", "-1"), "is -1; expected a number above 0"),
    ],
)
def test_settings_that_do_not_fit(finished: Runner, capsys, options: tuple[str, ...], message: str) -> None:
    assert message in refusal(capsys, "steering", finished.folder / "out" / "students" / "cocomix", *options)
    assert "--limit is 0" in refusal(
        capsys, "concepts", finished.folder / "out" / "students" / "cocomix", "--limit", "0"
    )


def test_the_report_shows_the_best_concepts_a_trace_and_next_tokens(results: dict[str, Any], finished: Runner) -> None:
    shown = results["showcase"]
    assert shown["student"] == "cocomix" and 1 <= len(shown["best"]) <= 10
    scores = [2 / (1 / each["precision"] + 1 / each["recall"]) for each in shown["best"]]
    assert scores == sorted(scores, reverse=True)
    assert all(each["name"] and each["contexts"] for each in shown["best"])
    assert 6 <= len(shown["trace"]) <= 16 and all(len(step["concepts"]) == 3 for step in shown["trace"])
    rises = [each["steered"] - each["plain"] for each in shown["steered"]["concepts"]]
    assert rises == sorted(rises, reverse=True) and rises[-1] > 0
    text = (finished.folder / "out" / "report" / "report.md").read_text()
    for expected in (
        "## Concepts of `cocomix`",
        "### One sentence of validation text",
        "### The next token, plain and steered",
    ):
        assert expected in text


def test_the_report_takes_the_names_of_the_catalogue(output: Path, finished: Runner, tmp_path: Path, results) -> None:
    assert finished("concepts", "--output", str(output)) == 0
    concept = results["showcase"]["best"][0]["concept_id"]
    names = tmp_path / "names.json"
    names.write_text(json.dumps({concept: "<b>rivers | & stones</b>"}))
    assert main(["concepts", "name", "--names", str(names), "--catalog", str(output / "catalog")]) == 0
    assert finished("run", "--output", str(output)) == 0
    again = json.loads((output / "report" / "results.json").read_text())["showcase"]
    assert again["best"][0]["name"] == "<b>rivers | & stones</b>"
    page = (output / "report" / "report.html").read_text()
    assert "&lt;b&gt;rivers | &amp; stones&lt;/b&gt;" in page
