"""Documents of results: claims held against figures, and what is said where there are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cocomix.cli import main
from cocomix.errors import InputError
from cocomix.evaluation.study import Claim, add_results, load_results, load_study, verdict
from cocomix.evaluation.study_page import write_page

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
        "metrics": {"loss": losses[-1]},
        "curve": [{"tokens": at, "loss": loss} for at, loss in zip(tokens, losses, strict=True)],
        "costs": {
            "tokens": tokens,
            "student_flops": own,
            "all_flops": [once / 3 + each for each in own],
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
    return {
        "name": "small",
        "students": students,
        "groups": groups,
        "comparisons": [{"baseline": "ntp"}],
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
    ("claim", "word"),
    [
        (Claim("", "good", "ntp"), "holds"),
        (Claim("", "good", "ntp", "tokens", at_most=-0.3), "holds"),
        (Claim("", "good", "ntp", "tokens", at_most=-0.9), "does not hold"),
        (Claim("", "good", "ntp", "student_flops"), "holds"),
        (Claim("", "good", "ntp", "all_flops"), "does not hold"),
        (Claim("", "bad", "ntp"), "does not hold"),
        (Claim("", "bad", "ntp", "tokens"), "does not hold"),  # never reaches it
        (Claim("", "unsteady", "ntp"), "not decided"),
    ],
)
def test_verdicts(results: dict[str, Any], claim: Claim, word: str) -> None:
    assert verdict(results, claim).word == word


def test_of_one_seed_nothing_is_decided_in_favour(results: dict[str, Any]) -> None:
    results["groups"] = {name: members[:1] for name, members in results["groups"].items()}
    assert verdict(results, Claim("", "good", "ntp")).word == "not decided"


def test_a_page_has_the_figures_and_says_what_was_not_measured(folder: Path) -> None:
    add_results(folder, [folder / "runs" / "small"])
    page = write_page(load_study(folder), folder).read_text()
    rows = {cells[0]: cells[1:] for cells in map(cells_of, page.splitlines()) if len(cells) > 1}
    assert rows["Good reaches ntp's loss with fewer tokens."][1] == "holds"
    assert rows["Bad is better."][1] == "does not hold"
    assert rows["Nobody knows."] == ["–", "not measured"]
    assert rows["ntp"][1] == "2.8100 ± 0.0100"
    good = rows["good"]
    assert good[1] == "2.5100 ± 0.0100"
    assert good[2].startswith("-0.3000 (")
    # 2.8 lies two thirds of the way from 3.2 to 2.6, so at 167 of 300 tokens, each a tenth dearer.
    assert good[3].startswith("-45.0%") and good[4].startswith("-39.5%")
    # The teacher's 60,000 FLOPs against some 11,850 saved by each run.
    assert good[6] == "6 runs"
    assert rows["bad"][3] == "not reached" and rows["bad"][6] == "–"
    assert "Not measured yet: there is no `results/other.json`" in page
    assert (
        "seeds 0, 1, 2" in page and "an abacus" in page and "commit abc" in page and "`cocomix run some.yaml`" in page
    )
    assert (folder / "results" / "small.png").stat().st_size > 1000


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_kept_results_leave_texts_out_and_the_page_comes_from_them_alone(folder: Path) -> None:
    add_results(folder, [folder / "runs" / "small"])
    assert "showcase" not in json.loads((folder / "results" / "small.json").read_text())
    first = write_page(load_study(folder), folder).read_text()
    (folder / "runs" / "small" / "report" / "results.json").unlink()
    assert write_page(load_study(folder), folder).read_text() == first


def test_the_command_takes_results_in_and_writes_the_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(folder), str(folder / "runs" / "small")]) == 0
    assert f"Written: {folder / 'results.md'}" in capsys.readouterr().err
    assert "| good " in (folder / "results.md").read_text()
    assert main(["report", str(folder / "runs")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("cocomix: no ")


def test_mistakes_are_said_in_a_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no .*study.yaml: give a folder"):
        load_study(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"has no report/results.json; give the output folder"):
        add_results(folder, [tmp_path / "runs"])
    add_results(folder, [folder / "runs" / "small"])
    part = {"title": "t", "results": "small", "question": "?"}
    write_study(folder, parts=[{**part, "claims": [{"text": "c", "run": "a", "baseline": "ntp", "measure": "joy"}]}])
    with pytest.raises(InputError, match=r"measure is 'joy'; expected one of loss, tokens, "):
        load_study(folder)
    write_study(folder, parts=[{**part, "claims": [{"text": "c", "run": "a", "baseline": "ntp"}]}])
    with pytest.raises(InputError, match=r"'a' is no student of small \(ntp, good, bad, unsteady\)"):
        load_results(folder, load_study(folder).parts[0])
    write_study(folder, parts=[{**part, "clams": []}])
    with pytest.raises(InputError, match=r"study.yaml: .*clams"):
        load_study(folder)
