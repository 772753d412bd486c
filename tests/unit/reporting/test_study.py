"""Documents of results: claims held against figures, and what is said where there are none."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from cocomix.common.errors import InputError
from cocomix.reporting.seeds import over_seeds
from study import Claim, Measured, Study, add_results, claim_verdicts, load_results, load_study, measure
from study_page import write_page
from write_results import main

CLAIM = (
    "title: a\nintroduction: b\nparts:\n"
    "- {{title: t, results: small, question: q, claims: [{{text: c, run: a, baseline: ntp, {}}}]}}"
)
ENVIRONMENT = {
    "date": "2026-01-02",
    "commit": "abc",
    "hardware": "an abacus",
    "versions": {"torch": "2"},
    "command": "cocomix run some.yaml",
}


def student(seed: int, losses: list[float], flops_per_token: int, preparation: dict[str, Any]) -> dict[str, Any]:
    tokens = [100.0, 200.0, 300.0]
    once = sum(made["flops"] for made in preparation.values())
    own = [at * flops_per_token for at in tokens]
    return {
        "method": "ntp",
        "seed": seed,
        "tokens": 300,
        "activated_parameters": 1_000_000,
        "training_flops_per_token": flops_per_token,
        "teacher_flops_per_token": 0,
        "training_flops": 300 * flops_per_token,
        "preparation": preparation,
        "metrics": {"loss": losses[-1], "bits_per_byte": 2.0},
        "curve": [{"tokens": at, "loss": loss} for at, loss in zip(tokens, losses, strict=True)],
        "costs": {
            "tokens": tokens,
            "student_flops": own,
            "all_flops": [once / 3 + each for each in own],
            "single_run_flops": [once + each for each in own],
            "seconds": [1.0, 2.0, 3.0],
        },
        "environment": ENVIRONMENT,
    }


@pytest.fixture
def results() -> dict[str, Any]:
    teacher = {"teacher": {"fingerprint": "t", "flops": 6e4}}
    students: dict[str, Any] = {}
    for seed in range(3):
        nudge = 0.01 * seed
        students[f"ntp, seed {seed}"] = student(seed, [4.0, 3.0, 2.8 + nudge], 100, {})
        students[f"good, seed {seed}"] = student(seed, [3.2, 2.6, 2.5 + nudge], 110, teacher)
        students[f"bad, seed {seed}"] = student(seed, [4.2, 3.4, 3.0 + nudge], 100, {})
        students[f"unsteady, seed {seed}"] = student(seed, [4.0, 3.0, 2.7 + 0.1 * seed], 100, {})
    groups = {name: [f"{name}, seed {seed}" for seed in range(3)] for name in ("ntp", "good", "bad", "unsteady")}
    for member in (*groups["good"], *groups["bad"], *groups["unsteady"]):
        students[member]["method"] = "cocomix"
    return {
        "name": "small",
        "students": students,
        "groups": groups,
        "comparisons": [{"baseline": "ntp"}],
        "teacher": {
            "tokens": 600,
            "stored_parameters": 1000,
            "training_flops_per_token": 100,
            "metrics": {"loss": 2.7, "bits_per_byte": 1.9},
        },
        "evaluations": {name: [] for name in students},
        "recipe": {"students": {}, "labels": {}},
        "environment": ENVIRONMENT,
        "showcase": {"text": "left out"},
    }


@pytest.fixture
def folder(tmp_path: Path, results: dict[str, Any]) -> Path:
    """A folder of documents with a study of two parts, of which the first was run."""
    report = tmp_path / "runs" / "small" / "report"
    report.mkdir(parents=True)
    (report / "results.json").write_text(json.dumps(results))
    claims = [
        {"text": "Good reaches ntp's loss with fewer tokens.", "run": "good", "baseline": "ntp", "measure": "tokens"},
        {"text": "Bad is better.", "run": "bad", "baseline": "ntp"},
    ]
    other = [{"text": "Nobody knows.", "run": "a", "baseline": "b"}]
    write_study(
        tmp_path,
        parts=[
            {"title": "First", "results": "small", "question": "Does it?", "claims": claims, "conclusion": "It does."},
            {"title": "Second", "results": "other", "question": "And this?", "claims": other},
        ],
    )
    return tmp_path


def write_study(folder: Path, **content: Any) -> None:
    (folder / "results").mkdir(exist_ok=True)
    study = {"title": "A study", "introduction": "What was asked.", "parts": [], **content}
    (folder / "results" / "study.yaml").write_text(yaml.safe_dump(study))


@pytest.mark.parametrize(
    ("run", "what", "below", "word"),
    [
        ("good", "loss", 0.0, "holds"),
        ("good", "tokens", -0.3, "holds"),
        ("good", "tokens", -0.9, "does not hold"),
        ("good", "student_flops", 0.0, "holds"),
        ("good", "all_flops", 0.0, "does not hold"),
        ("good", "single_run_flops", 0.0, "does not hold"),
        ("bad", "loss", 0.0, "does not hold"),
        ("bad", "tokens", 0.0, "not decided"),  # never gets there, so there is no figure to test
        ("unsteady", "loss", 0.0, "not decided"),
        ("unsteady", "tokens", 0.0, "not decided"),  # one seed of three gets there
    ],
)
def test_verdicts(results: dict[str, Any], run: str, what: str, below: float, word: str) -> None:
    assert decided(measure(results, run, "ntp", what), what, below) == word


def decided(found: Measured, what: str, below: float, **keys: Any) -> str:
    (word,) = claim_verdicts(Study("t", "i", [], **keys), [(Claim("c", "a", "b", what, below), found)])
    return word


@pytest.mark.parametrize(
    ("values", "what", "below", "word"),
    [
        ([-0.40, -0.38, -0.39], "tokens", -0.3, "holds"),
        ([-0.35, -0.38, -0.29], "tokens", -0.3, "not decided"),  # below 0 for sure, but not below the bound
        ([-0.20, -0.18, -0.19], "tokens", -0.3, "does not hold"),
        ([0.014, 0.015, 0.016], "loss", 0.05, "holds"),
        ([0.0, 0.0, 0.0], "loss", 0.0, "no difference of interest"),
        ([-0.001, -0.0012, -0.0011], "loss", 0.0, "no difference of interest"),  # below 0 for sure, but by too little
        ([-0.012, -0.014, -0.010], "loss", 0.0, "not decided"),
        ([-0.020, -0.021, -0.022], "loss", 0.0, "holds"),
        ([-0.020, -0.021, -0.022], "tokens", 0.0, "no difference of interest"),  # costs have another margin
        ([0.070, 0.071, 0.072], "tokens", 0.0, "does not hold"),
        ([-0.5], "loss", 0.0, "not decided"),  # one seed
    ],
)
def test_a_claim_is_about_its_bound_or_the_margin(values: list[float], what: str, below: float, word: str) -> None:
    assert decided(Measured(over_seeds(values), 3, 3), what, below) == word


def test_a_study_has_its_own_margins() -> None:
    found = Measured(over_seeds([-0.020, -0.021, -0.022]), 3, 3)
    assert decided(found, "loss", 0.0, loss_margin=0.05) == "no difference of interest"
    assert decided(found, "tokens", 0.0, cost_margin=0.01) == "holds"


def test_claims_are_corrected_for_their_number_and_a_reason_overrides_figures() -> None:
    strong, weak = (Measured(over_seeds(values), 3, 3) for values in ([-0.5, -0.501, -0.502], [-0.5, -0.3, -0.4]))
    claims = [Claim("c", "a", "b"), Claim("c", "a", "b"), Claim("c", "a", "b", confounded="no control")]
    study = Study("t", "i", [])
    assert claim_verdicts(study, [(claims[0], weak)]) == ["holds"]
    together = claim_verdicts(study, list(zip(claims, (strong, weak, weak), strict=True)) + [(claims[0], weak)] * 4)
    assert together == ["holds", "not decided", "not decided: no control", *["not decided"] * 4]


def test_what_was_made_elsewhere_has_no_cost_to_compare(folder: Path, results: dict[str, Any]) -> None:
    for name, each in results["students"].items():
        if name.startswith("good"):
            each["preparation"] = {"teacher": {"fingerprint": "t", "flops": None}}
    found = measure(results, "good", "ntp", "all_flops")
    assert (found.difference, found.unknown) == (None, ("teacher",))
    assert decided(found, "all_flops", 0.0) == "not decided"
    claim = {"text": "Cheap |\nin all.", "run": "good", "baseline": "ntp", "measure": "all_flops"}
    write_study(folder, parts=[{"title": "t", "results": "small", "question": "?", "claims": [claim]}])
    (folder / "results" / "small.json").write_text(json.dumps(results))
    page = write_page(load_study(folder), folder).read_text()
    assert r"| Cheap \| in all. | – | cost of teacher unknown | 3 seeds (same teacher) | not decided |" in re.sub(
        " +", " ", page
    )
    rows = rows_of(page)
    assert rows["good"][7:] == ["–", "–", "–"]
    details = (folder / "results-details.md").read_text()
    assert "Not counted, because the cost is unknown: teacher from elsewhere." in details


def test_a_page_has_the_figures_and_says_what_was_not_measured(folder: Path) -> None:
    add_results(load_study(folder), folder, [folder / "runs" / "small"])
    page = write_page(load_study(folder), folder).read_text()
    details = (folder / "results-details.md").read_text()
    rows = rows_of(page)
    assert rows["Good reaches ntp's loss with fewer tokens."][2:] == ["3 seeds (same teacher)", "holds"]
    assert rows["Bad is better."][2:] == ["3 seeds", "does not hold"]
    assert rows["Nobody knows."] == ["–", "–", "–", "not measured"]
    assert rows["ntp"][1] == "2.8100 ± 0.0100"
    good = rows["good"]
    assert good[1] == "2.5100 ± 0.0100"
    assert good[2].startswith("-0.3000 (")
    # 2.8 lies two thirds of the way from 3.2 to 2.6, so at 167 of 300 tokens, each a tenth dearer.
    assert good[3].startswith("-45.0%") and good[6].startswith("-39.5%")
    assert good[4] == "not reached in 0.00M"
    assert good[5] == "+155.0%"  # the teacher read 600 tokens, twice the baseline's
    # The teacher's 60,000 FLOPs against some 11,850 saved by each run.
    assert good[8].startswith("+160.5%")  # 60,000 of the teacher and 60.5 % of 30,000
    assert good[9] == "6 runs"
    assert rows["bad"][3] == "not reached" and rows["bad"][9] == "–"
    assert rows["bad"][4] == "+50.8%"  # ntp reaches 3.01 after 199 tokens
    assert "0.01 nats per token, 5% of a cost" in page and "for all measured claims together" in page
    assert ["good", "3.2000", "2.6000", "2.5100"] in list(map(cells_of, page.splitlines()))  # the loss by tokens
    assert "All seeds share the same teacher, so the effect" in details
    assert "`ntp`, on 300 tokens with 3.00e+04 FLOPs, reaches 2.0000. The teacher is the better model" in details
    assert "Not measured yet: `results/other.json` does not exist" in page
    assert "Seeds 0, 1, 2" in details and "an abacus" in details and "commit abc" in details
    assert (folder / "results" / "small.png").stat().st_size > 1000


def rows_of(page: str) -> dict[str, list[str]]:
    """Return the cells of each table row by its first cell; the first row of that name counts."""
    return {cells[0]: cells[1:] for cells in map(cells_of, reversed(page.splitlines())) if len(cells) > 1}


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_kept_results_leave_texts_out_and_the_page_comes_from_them_alone(folder: Path) -> None:
    add_results(load_study(folder), folder, [folder / "runs" / "small"])
    assert "showcase" not in json.loads((folder / "results" / "small.json").read_text())
    first = write_page(load_study(folder), folder).read_text()
    (folder / "runs" / "small" / "report" / "results.json").unlink()
    assert write_page(load_study(folder), folder).read_text() == first


def test_the_command_takes_results_in_and_writes_the_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--folder", str(folder), str(folder / "runs" / "small")])
    assert f"Wrote {folder / 'results.md'}" in capsys.readouterr().err
    assert "| good " in (folder / "results.md").read_text()
    with pytest.raises(SystemExit, match="2"):
        main(["--folder", str(folder / "runs")])
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and ": no " in error


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "holds no study: expected the keys title, introduction and parts"),
        ("[1, 2]", "holds no study"),
        ("title: a\nintroduction: b\nparts: [{title: t, results: small, question: q, clams: []}]", "clams"),
        (CLAIM.format("measure: joy"), "measure is 'joy'; expected one of loss, tokens, "),
        (CLAIM.format("below: .nan"), "below is nan; expected a number"),
        (CLAIM.format("below: much"), "below"),
        (CLAIM.format("below: 0") + "\nloss_margin: -1", "loss_margin is -1; expected a number from 0 "),
    ],
)
def test_a_study_that_cannot_be_read_is_said_in_a_line(folder: Path, content: str, said: str) -> None:
    (folder / "results" / "study.yaml").write_text(content)
    with pytest.raises(InputError, match=re.escape(said)) as error:
        load_study(folder)
    assert "\n" not in str(error.value) and str(error.value).count("study.yaml") == 1


def test_the_projects_own_page_is_what_its_results_say(tmp_path: Path) -> None:
    docs = Path(__file__).parents[3] / "docs"
    shutil.copytree(docs / "results", tmp_path / "results")
    page = write_page(load_study(tmp_path), tmp_path).read_text()
    assert page == (docs / "results.md").read_text()
    assert (tmp_path / "results-details.md").read_text() == (docs / "results-details.md").read_text()
    assert {path.name for path in (tmp_path / "results").iterdir()} == {p.name for p in (docs / "results").iterdir()}


def test_a_part_need_not_claim_anything(folder: Path) -> None:
    (folder / "results" / "study.yaml").write_text(
        "title: a\nintroduction: b\nparts: [{title: t, results: small, question: q, claims: }]"
    )
    assert "## Claims" not in write_page(load_study(folder), folder).read_text()


def test_results_that_cannot_be_used_are_said_and_none_is_kept(folder: Path, results: dict[str, Any]) -> None:
    study = load_study(folder)
    output, report = folder / "runs" / "small", folder / "runs" / "small" / "report" / "results.json"

    def refused(said: str) -> None:
        with pytest.raises(InputError, match=re.escape(said)):
            add_results(study, folder, [output])
        assert not list((folder / "results").glob("*.json"))

    report.write_text(json.dumps({**results, "name": "else"}))
    refused("is from recipe 'else', which the study does not use (small, other)")
    report.write_text(json.dumps({key: value for key, value in results.items() if key != "recipe"}))
    refused("is not a report of `cocomix run`: it has no recipe")
    report.write_text("{")
    refused("results.json is damaged")
    report.write_text(json.dumps({**results, "groups": {"ntp": results["groups"]["ntp"]}}))
    refused("has no student 'good', which a claim of the study names; it has ntp")
    fewer = {**results["groups"], "good": results["groups"]["good"][:2]}
    report.write_text(json.dumps({**results, "groups": fewer}))
    refused("seeds are compared in pairs, but differ between students (ntp: 0, 1, 2; good: 0, 1; ")
    report.unlink()
    refused("give the output folder of a recipe that `cocomix run` finished")


def test_kept_results_that_were_damaged_since_are_said(folder: Path) -> None:
    study = load_study(folder)
    (folder / "results" / "small.json").write_text("[]")
    with pytest.raises(InputError, match=r"small.json is not a report of `cocomix run`: it has no name, "):
        load_results(folder, study.parts[0])
