"""The page of a study: tables, curves and verdicts, each with where its figures come from."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from cocomix import files
from cocomix.console import table
from cocomix.evaluation.report import bullets, plot_curves, settings_table
from cocomix.evaluation.seeds import SeedDifference
from cocomix.evaluation.study import LOSS, Claim, Part, Study, Verdict, difference, load_results, verdict
from cocomix.evaluation.tables import evaluation_tables
from cocomix.evaluation.wording import preparation_flops, provenance_lines

COLUMNS = {"tokens": "tokens", "student_flops": "FLOPs", "all_flops": "FLOPs, all"}
PAGE = "results.md"
READING = (
    "Loss: validation, nats per token, mean ± standard deviation over seeds. Tokens and FLOPs: what it costs to reach "
    "the final loss of `{baseline}`, against what that cost; *FLOPs* are those of the student's own training, *all* "
    "adds what its teacher computes meanwhile and an equal part of teacher, SAE and labels, shared by the runs of this "
    "table that learn from them. In brackets: 95 % intervals (Student's t) of differences paired by seed. *Pays from*: "
    "how many such runs have to share teacher, SAE and labels until all of it together takes fewer FLOPs than "
    "`{baseline}` alone."
)


def write_page(study: Study, folder: Path) -> Path:
    """Write the page into `folder` and a picture of the curves of each part into `folder/results`; returns the page.

    Raises:
        InputError: as `load_results`.
    """
    found = [load_results(folder, part) for part in study.parts]
    lines = [
        f"# {study.title}",
        "<!-- Written by `cocomix report`; change results/study.yaml instead. -->",
        study.introduction.strip(),
    ]
    if claims := [claim for part, results in zip(study.parts, found, strict=True) for claim in _rows(part, results)]:
        lines += ["## Claims", table(["claim", "measured", "verdict"], claims)]
    for part, results in zip(study.parts, found, strict=True):
        lines += [f"## {part.title}", part.question.strip()]
        if results is None:
            lines.append(f"Not measured yet: there is no `results/{part.results}.json`.")
            continue
        lines += _part(part, results)
        plot_curves(results, folder / "results" / f"{part.results}.png")
    files.write_text(folder / PAGE, "\n\n".join(lines) + "\n")
    return folder / PAGE


def _part(part: Part, results: dict[str, Any]) -> list[str]:
    baseline = _baseline(results)
    lines = [_table(results, baseline), READING.format(baseline=baseline)]
    lines.append(f"![Validation loss by tokens and by FLOPs](results/{part.results}.png)")
    if measured := _one_per_group(results):
        lines += evaluation_tables(measured)
    if part.conclusion:
        lines.append(part.conclusion.strip())
    if settings := settings_table(results["recipe"]):
        lines.append(settings)
    return [*lines, bullets([*provenance_lines(results), *_provenance(results)])]


def _baseline(results: dict[str, Any]) -> str:
    """As in `compare_runs`: what its comparisons are against, or the only group."""
    return results["comparisons"][0]["baseline"] if results["comparisons"] else next(iter(results["groups"]))


def _table(results: dict[str, Any], baseline: str) -> str:
    header = ["student", "activated", "loss", f"− {baseline}", *COLUMNS.values(), "pays from"]
    rows = []
    for name, members in results["groups"].items():
        runs = [results["students"][member] for member in members]
        losses = [run["metrics"]["loss"] for run in runs]
        scatter = f" ± {stdev(losses):.4f}" if len(losses) > 1 else ""
        row = [name, f"{runs[0]['activated_parameters'] / 1e6:.3f}M", f"{fmean(losses):.4f}{scatter}"]
        if name == baseline:
            rows.append([*row, *[""] * (len(header) - len(row))])
            continue
        row.append(_loss(difference(results, name, baseline, LOSS)))
        row += [_share(difference(results, name, baseline, axis)) for axis in COLUMNS]
        rows.append([*row, _pays_from(results, name, baseline)])
    return table(header, rows)


def _loss(found: SeedDifference | None) -> str:
    assert found is not None, "losses always differ by something"
    interval = f" ({found.interval[0]:+.4f} to {found.interval[1]:+.4f})" if found.interval else ""
    return f"{found.mean:+.4f}{interval}"


def _share(found: SeedDifference | None) -> str:
    if found is None:
        return "not reached"
    interval = f" ({found.interval[0]:+.1%} to {found.interval[1]:+.1%})" if found.interval else ""
    return f"{found.mean:+.1%}{interval}"


def _pays_from(results: dict[str, Any], name: str, baseline: str) -> str:
    """Runs that must share what is made before, until a run and its part of it cost less than the baseline."""
    run, other = (results["students"][results["groups"][group][0]] for group in (name, baseline))
    tokens = difference(results, name, baseline, "tokens")
    made = sum(each["flops"] or 0.0 for each in run["preparation"].values())
    if tokens is None or not run["preparation"]:
        return "–"
    per_token = run["training_flops_per_token"] + run["teacher_flops_per_token"]
    saved = other["training_flops"] - (1 + tokens.mean) * other["tokens"] * per_token
    return f"{int(made // saved) + 1:,} runs" if saved > 0 else "never"


def _rows(part: Part, results: dict[str, Any] | None) -> list[list[str]]:
    """Of the table of claims."""
    if results is None:
        return [[claim.text, "–", "not measured"] for claim in part.claims]
    return [
        [claim.text, _measured(claim, found), found.word]
        for claim in part.claims
        for found in [verdict(results, claim)]
    ]


def _measured(claim: Claim, found: Verdict) -> str:
    if claim.measure == LOSS:
        return f"{_loss(found.difference)} nats"
    return f"{_share(found.difference)} {COLUMNS.get(claim.measure, claim.measure)}"


def _one_per_group(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Evaluations of all runs that have any."""
    return {name: found for name, found in results["evaluations"].items() if found}


def _provenance(results: dict[str, Any]) -> list[str]:
    """Where the figures come from, each kind once."""
    environments = [student["environment"] for student in results["students"].values()]

    def each(key: str) -> str:
        return ", ".join(dict.fromkeys(str(environment[key] or "unknown") for environment in environments))

    seeds = ", ".join(str(seed) for seed in sorted({student["seed"] for student in results["students"].values()}))
    versions = ", ".join(f"{name} {version}" for name, version in environments[0]["versions"].items())
    dates = sorted(environment["date"] for environment in environments)
    made = ", ".join(f"{name} {value:.2e}" for name, value in preparation_flops(results).items())
    found = [
        f"Command `{results['environment']['command']}`; seeds {seeds}; trained {dates[0]} to {dates[-1]} on "
        f"{each('hardware')}; cocomix commit {each('commit')}; {versions}."
    ]
    return [*([f"FLOPs spent once: {made}."] if made else []), *found]
