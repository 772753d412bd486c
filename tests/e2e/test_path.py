"""The whole path on a tiny recipe: what it leaves, and that it does nothing twice."""

from __future__ import annotations

import json
import re
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import load_from_disk
from transformers import AutoModelForCausalLM, AutoTokenizer

import cocomix
import write_results
from cocomix.cli.main import main
from cocomix.training.validation import evaluate_model
from tiny_run import Runner, tiny_recipe


@pytest.fixture(scope="module")
def results(finished: Runner) -> dict[str, Any]:
    return json.loads((finished.folder / "out" / "report" / "results.json").read_text())


def test_results_have_every_figure(results: dict[str, Any]) -> None:
    for name in ("ntp", "cocomix"):
        student = results["students"][name]
        assert student["tokens"] == 8192
        assert student["training_flops"] == 8192 * student["training_flops_per_token"] > 0
        assert student["timing"]["seconds"] > 0
        assert student["metrics"]["perplexity"] == pytest.approx(2.718281828 ** student["metrics"]["loss"])
        assert 0 < student["metrics"]["bits_per_byte"] < 8
        assert [point["tokens"] for point in student["curve"]] == [2048, 4096, 6144, 8192]
        assert student["curve"][-1]["loss"] < student["curve"][0]["loss"]
    metrics = results["students"]["cocomix"]["metrics"]
    assert metrics["concept_loss"] > 0
    assert 0 < metrics["concept_precision"] < 1
    assert 0 < metrics["constant_recall"] < metrics["concept_recall"] <= 1
    assert metrics["constant_recall"] < metrics["token_table_recall"] <= 1
    assert 0 <= metrics["concept_loss_floor"] < metrics["token_table_loss"]
    (comparison,) = results["comparisons"]
    assert (comparison["run"], comparison["baseline"]) == ("cocomix", "ntp")
    assert results["sae"]["quality"]["loss_recovered"] <= 1
    assert results["labels"]["labelled_share"] > 0.9


def test_only_a_recipes_absolute_source_names_a_folder_of_this_machine(catalogued: Path, finished: Runner) -> None:
    source = yaml.safe_load((finished.folder / "recipe.yaml").read_text())["corpus"]["source"]
    folders = [Path.home(), Path(source).parents[1], Path(cocomix.__file__).parents[2], Path(sys.prefix)]
    found = {
        str(path.relative_to(catalogued))
        for path in catalogued.rglob("*")
        if path.is_file() and any(f"{folder}/".encode() in path.read_bytes() for folder in folders)
    }
    records = {"corpus/stage.json", "teacher/run.json", "report/results.json"}
    assert found == records | {f"students/{name}/run.json" for name in ("ntp", "cocomix")}
    for name in found:
        rest = (catalogued / name).read_text().replace(f'"source": "{source}"', "")
        assert not any(f"{folder}/" in rest for folder in folders), name


def test_rows_that_a_token_does_not_read_are_not_activated(results: dict[str, Any]) -> None:
    ntp, mixed = (results["students"][name] for name in ("ntp", "cocomix"))
    assert ntp["activated_parameters"] == ntp["stored_parameters"]
    assert mixed["stored_parameters"] - mixed["activated_parameters"] == (64 - 8) * 16  # rows of `compress`


def test_report_is_a_page_with_its_picture_inside(finished: Runner) -> None:
    report = finished.folder / "out" / "report"
    page = (report / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert 'src="curves.png"' not in page
    assert (report / "curves.png").read_bytes().startswith(b"\x89PNG")
    text = (report / "report.md").read_text()
    for expected in (
        "One seed",
        "fraction of variance unexplained",
        "dead latents",
        "spliced in",
        "published settings",
    ):
        assert expected in text


def test_a_run_is_a_hugging_face_model(finished: Runner, results: dict[str, Any]) -> None:
    folder = finished.folder / "out" / "students" / "cocomix"
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert isinstance(model, cocomix.CoCoMixForCausalLM)
    labeled = load_from_disk(str(finished.folder / "out" / "labels" / "validation"))
    again = evaluate_model(model, labeled, batch_size=8)
    assert again["loss"] == pytest.approx(results["students"]["cocomix"]["metrics"]["loss"], rel=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("The river", return_tensors="pt")
    text = tokenizer.decode(model.generate(**prompt, max_new_tokens=4, do_sample=False)[0])
    assert text.startswith("The river")
    assert not list(folder.glob("checkpoint-*"))


def test_labels_are_the_corpus_with_one_more_column(finished: Runner) -> None:
    out = finished.folder / "out"
    for side in ("train", "validation"):
        packed = load_from_disk(str(out / "corpus" / side)).with_format("numpy")
        labeled = load_from_disk(str(out / "labels" / side)).with_format("numpy")
        assert (packed[:]["input_ids"] == labeled[:]["input_ids"]).all()
        ids = labeled[:]["concept_ids"]
        assert ids.shape == (len(packed), 32, 2)
        assert ids.max() < 64
        assert (ids[:, -1] == -100).all()
        assert str(labeled.features["concept_ids"].feature.feature.dtype) == "int16"
    assert len(list((out / "labels" / "train").glob("data-*.arrow"))) > 1


def test_labels_are_what_the_extractor_says(finished: Runner) -> None:
    out = finished.folder / "out"
    teacher = AutoModelForCausalLM.from_pretrained(out / "teacher")
    sae = cocomix.load_sae(out / "sae")
    extractor = cocomix.ConceptExtractor(teacher, sae, 1, labels_per_token=2, selection="attribution")
    rows = load_from_disk(str(out / "labels" / "train")).with_format("torch")[100:116]
    assert torch.equal(extractor(rows["input_ids"]).ids, rows["concept_ids"].long())


def test_a_second_run_does_nothing_and_says_so(finished: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (finished.folder / "out").rglob("*")}

    before = times()
    assert finished("run") == 0
    captured = capsys.readouterr()
    assert times() == before
    assert "Nothing to do" in captured.err
    assert "Things to try next" in captured.out
    assert finished("run", "--quiet", "--json") == 0
    assert capsys.readouterr().err == ""


def test_students_in_another_order_are_reported_in_it_and_not_trained_again(
    finished: Runner, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(finished.folder / "out", tmp_path / "out")
    trained = (out / "students" / "ntp" / "run.json").stat().st_mtime_ns
    content = tiny_recipe(text, out)
    content["students"] = dict(reversed(content["students"].items()))
    runner = Runner(tmp_path)
    runner.write(content)
    assert runner("run", "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert list(again["students"]) == ["cocomix", "ntp"]
    assert (out / "students" / "ntp" / "run.json").stat().st_mtime_ns == trained


def test_compare_reads_run_folders(
    finished: Runner, tmp_path: Path, results: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(finished.folder / "out" / "students" / name) for name in ("cocomix", "ntp")]
    assert main(["compare", *runs, "--output", str(tmp_path / "report"), "--json"]) == 0
    compared = json.loads(capsys.readouterr().out)
    assert compared["comparisons"] == results["comparisons"]
    assert (tmp_path / "report" / "report.html").is_file()


def test_a_report_is_written_again_from_the_finished_students(catalogued: Path, results: dict[str, Any]) -> None:
    shutil.rmtree(catalogued / "report")
    assert main(["report", str(catalogued / "students" / "ntp")]) == 0
    written = json.loads((catalogued / "report" / "results.json").read_text())
    assert {name: each["metrics"] for name, each in written["students"].items()} == {
        name: each["metrics"] for name, each in results["students"].items()
    }
    assert {*results} - {"environment"} <= {*written} and written["recipe"]["students"] == results["recipe"]["students"]
    assert written["environment"]["date"] == results["environment"]["date"]  # when it was measured
    shutil.rmtree(catalogued / "students" / "ntp")
    assert main(["report", str(catalogued)]) == 0
    assert [*json.loads((catalogued / "report" / "results.json").read_text())["students"]] == ["cocomix"]


def test_only_an_output_folder_has_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "no finished run in" in capsys.readouterr().err


def test_several_seeds_are_one_group_with_a_deviation(
    finished: Runner, tmp_path: Path, results: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Each student is trained once with each seed, what they learn from is made once, and their means are compared."""
    out = tmp_path / "out"
    for stage in ("corpus", "teacher", "sae", "labels"):
        shutil.copytree(finished.folder / "out" / stage, out / stage)
    assert finished("run", "--output", str(out), "--seeds", "[0, 1, 2]", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["groups"] == {name: [f"{name}, seed {seed}" for seed in range(3)] for name in ("ntp", "cocomix")}
    assert sorted(path.name for path in (out / "students").iterdir()) == [
        f"{name}-seed-{seed}" for name in ("cocomix", "ntp") for seed in range(3)
    ]
    losses = {
        name: [found["students"][member]["metrics"]["loss"] for member in found["groups"][name]]
        for name in ("ntp", "cocomix")
    }
    assert losses["ntp"][0] == results["students"]["ntp"]["metrics"]["loss"]  # seed 0 alone gave the same
    assert len(set(losses["ntp"])) == 3
    (comparison,) = found["comparisons"]
    apart = [ours - theirs for ours, theirs in zip(losses["cocomix"], losses["ntp"], strict=True)]
    assert comparison["loss_difference"] == pytest.approx(statistics.mean(apart))
    assert comparison["loss_over_seeds"]["mean"] == pytest.approx(statistics.mean(apart))
    assert comparison["loss_over_seeds"]["sd"] == pytest.approx(statistics.stdev(apart))
    low, high = comparison["documents"]["interval"]
    assert low < comparison["documents"]["difference"] < high
    # Over whole validation documents, so over the tokens that the losses at the end are means of.
    assert comparison["documents"]["difference"] == pytest.approx(comparison["loss_difference"], abs=1e-4)
    assert "± " in (out / "report" / "report.md").read_text()

    study = tmp_path / "docs" / "results" / "study.yaml"
    study.parent.mkdir(parents=True)
    claim = {"text": "It helps.", "run": "cocomix", "baseline": "ntp"}
    part = {"title": "Both", "results": found["name"], "question": "Does it help?", "claims": [claim]}
    study.write_text(yaml.safe_dump({"title": "A study", "introduction": "Of two.", "parts": [part]}))
    write_results.main(["--folder", str(tmp_path / "docs"), str(out)])
    page = re.sub(" +", " ", (tmp_path / "docs" / "results.md").read_text())  # cells are padded
    assert f"| {statistics.mean(losses['cocomix']):.4f} ± {statistics.stdev(losses['cocomix']):.4f} |" in page
    low, high = comparison["loss_over_seeds"]["interval"]
    assert f"| It helps. | – | {statistics.mean(apart):+.4f} ({low:+.4f} to {high:+.4f}) nats |" in page
    details = (tmp_path / "docs" / "results-details.md").read_text()
    assert "Teacher, " in details and "cocomix commit" in details


def test_stage_commands_stop_at_their_stage(recipe: Any) -> None:
    runner = recipe()
    out = runner.folder / "out"
    assert runner("data") == 0
    assert [path.name for path in out.iterdir()] == ["corpus"]
    assert runner("teacher") == 0
    assert {path.name for path in out.iterdir()} == {"corpus", "teacher"}
    assert runner("label") == 0
    assert {path.name for path in out.iterdir()} == {"corpus", "teacher", "sae", "labels"}


def test_only_trains_one_student_and_needs_no_labels_for_ntp(recipe: Any) -> None:
    runner = recipe(students={"ntp": {"method": "ntp"}, "cocomix": {"method": "ntp"}})
    assert runner("train", "--only", "ntp") == 0
    out = runner.folder / "out"
    assert {path.name for path in out.iterdir()} == {"corpus", "students"}
    assert [path.name for path in (out / "students").iterdir()] == ["ntp"]


def test_somebody_elses_teacher_and_sae_serve(finished: Runner, recipe: Any) -> None:
    """Given by their folders, they give the same corpus and the same labels as when they were made here."""
    there = finished.folder / "out"
    runner = recipe(
        tokenizer={"source": str(there / "teacher")},
        teacher={"source": str(there / "teacher")},
        sae={"source": str(there / "sae")},
    )
    assert runner("run") == 0
    out = runner.folder / "out"
    for side in ("train", "validation"):
        one, other = (load_from_disk(str(folder / "labels" / side)).with_format("numpy")[:] for folder in (there, out))
        assert (one["concept_ids"] == other["concept_ids"]).all()
    assert not (out / "teacher" / "model.safetensors").exists()
    assert "Teacher (`teacher`): validation loss" in (out / "report" / "report.md").read_text()


def test_token_files_of_the_published_code_serve(finished: Runner, recipe: Any, tmp_path: Path) -> None:
    there = finished.folder / "out"
    (tmp_path / "bin").mkdir()
    for side, name in (("train", "train.bin"), ("validation", "val.bin")):
        blocks = load_from_disk(str(there / "corpus" / side)).with_format("numpy")[:]["input_ids"]
        blocks.astype("<u2").tofile(tmp_path / "bin" / name)
    students = {"ntp": {"method": "ntp"}}
    tokenizer = {"source": str(there / "corpus" / "tokenizer")}
    runner = recipe(corpus={"source": str(tmp_path / "bin")}, tokenizer=tokenizer, students=students)
    assert runner("run") == 0
    info = [json.loads((folder / "corpus" / "corpus.json").read_text()) for folder in (there, runner.folder / "out")]
    assert info[0]["fingerprint"] == info[1]["fingerprint"]
    assert 0 < info[1]["bytes_per_token"] < 10
    results = json.loads((runner.folder / "out" / "report" / "results.json").read_text())
    assert results["corpus"]["documents"] is None
    assert results["comparisons"] == []


def test_bfloat16_trains_on_this_machine(finished: Runner, recipe: Any, results: dict[str, Any]) -> None:
    """Matrix products in bfloat16, losses near those in float32."""
    runner = recipe(students={"ntp": {"method": "ntp"}}, training={"precision": "bf16"})
    shutil.copytree(finished.folder / "out" / "corpus", runner.folder / "out" / "corpus")
    assert runner("train") == 0
    metrics = json.loads((runner.folder / "out" / "students" / "ntp" / "run.json").read_text())["metrics"]
    expected = results["students"]["ntp"]["metrics"]
    assert metrics["loss"] == pytest.approx(expected["loss"], rel=0.02)
    assert metrics["loss"] != expected["loss"]
