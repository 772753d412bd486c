"""A study: questions, the results that answer them, and claims that are tested against the results.

`FOLDER/results/study.yaml` holds the questions and claims; `FOLDER/results/NAME.json` holds the results of the recipe
NAME. `write_results.py` needs only these files, so the weights of the runs can be deleted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cocomix.common import files, settings, strict_yaml
from cocomix.common.errors import InputError
from cocomix.common.settings import Count, LossWeight, Prose, Share
from cocomix.evaluation.verdicts import COST_MARGIN, LOSS_MARGIN, MarginTest, Verdict, verdicts
from cocomix.reporting.costs import AXES, single_run_flops
from cocomix.reporting.report_folder import RESULTS
from cocomix.reporting.seeds import Curve, SeedDifference, cost_difference, loss_difference
from cocomix.training.run import Run

_RECORDED = {each.name for each in dataclasses.fields(Run)} - {"name", "recipe"}
STUDY_FILE = "study.yaml"
LOSS = "loss"
MEASURES = (LOSS, *AXES)
PREPARED = ("all_flops", "single_run_flops")
"""Measures that include the preparation of teacher, SAE and labels."""
REQUIRED = ("name", "students", "groups", "comparisons", "evaluations", "recipe", "environment")
"""Keys that a recipe's results must have."""
LEFT_OUT = ("showcase", "inputs")
"""Keys of a recipe's results that are not copied: sample texts, and fingerprints that detect outdated results."""


@dataclass
class Claim:
    """A claim that compares one group of runs with another.

    Args:
        text: the claim in words.
        run: name of the group that the claim is about.
        baseline: name of the group that it is compared with.
        measure: `loss`, the difference between the final losses; or one of `AXES`, the relative difference in the cost
            of reaching the baseline's final loss.
        below: the claim is that the difference is below this bound. At 0, the study's margin applies; any other bound
            is tested without a margin.
        confounded: why these figures cannot decide the claim, whatever they are.
        paper: what the paper says of it, in a few words; empty if it does not.
    """

    text: Prose
    run: str
    baseline: str
    measure: str = LOSS
    below: float = 0.0
    confounded: str = ""
    paper: str = ""


@dataclass
class Part:
    """A question and the recipe whose results answer it.

    Args:
        title: heading.
        results: name of the recipe; also the name of its file in `results`.
        question: what is asked, and what was expected.
        claims: claims to test against the results.
        conclusion: what follows, in words; figures in it are not checked.
        teacher_tokens: training tokens of a teacher that was trained elsewhere, if known.
        minor: whether the section is on the page of details.
    """

    title: str
    results: str
    question: Prose
    claims: list[Claim] | None = None
    conclusion: Prose | None = None
    teacher_tokens: Count | None = None
    minor: bool = False


@dataclass
class Study:
    """A page of results.

    Args:
        title: heading.
        introduction: Markdown text below the heading.
        parts: the sections, in order.
        loss_margin: smallest loss difference of interest, nats per token.
        cost_margin: smallest cost difference of interest, as a share of the baseline's cost.
    """

    title: str
    introduction: Prose
    parts: list[Part]
    loss_margin: LossWeight = LOSS_MARGIN
    cost_margin: Share = COST_MARGIN

    def margin(self, claim: Claim) -> float:
        """Return the smallest difference of interest from the claim's bound."""
        if claim.below:
            return 0.0
        return self.loss_margin if claim.measure == LOSS else self.cost_margin


@dataclass(frozen=True)
class Measured:
    """The difference between two groups of runs in one of `MEASURES`.

    Attributes:
        difference: mean and interval over seeds; None if a seed does not reach the baseline's loss or a cost is
            unknown.
        reached: number of seeds that reach the baseline's loss; all of them if the measure is the loss.
        seeds: number of seed pairs.
        at_most: whether the difference is an upper bound.
        unknown: artifacts from elsewhere whose cost was not recorded.
    """

    difference: SeedDifference | None
    reached: int
    seeds: int
    at_most: bool = False
    unknown: tuple[str, ...] = ()


def load_study(folder: Path) -> Study:
    """Read `results/study.yaml` in `folder`.

    Raises:
        InputError: the file is missing or invalid, or a claim has an unknown measure.
    """
    path = folder / "results" / STUDY_FILE
    if not path.is_file():
        raise InputError(f"no {path}: give a folder that contains results/{STUDY_FILE}, such as docs")
    content = strict_yaml.load(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no study: expected the keys title, introduction and parts")
    study, problems = settings.read(Study, content)
    if problems:
        raise InputError(f"{path}: {'; '.join(problems)}")
    for part in study.parts:
        if Path(part.results).name != part.results:
            raise InputError(f"{path}: results is {part.results!r}; expected a recipe's name, without a folder")
    for claim in (claim for part in study.parts for claim in part.claims or []):
        if claim.measure not in MEASURES:
            raise InputError(f"{path}: measure is {claim.measure!r}; expected one of {', '.join(MEASURES)}")
    return study


def add_results(study: Study, folder: Path, outputs: list[Path]) -> None:
    """Copy the results of finished recipes next to the study, without sample texts.

    Args:
        study: the study that needs the results.
        folder: the study's folder.
        outputs: output folders of the recipes.

    Raises:
        InputError: an output folder has no report, or one that the study does not need or cannot use. Nothing is
            copied then.
    """
    copies: dict[Path, dict[str, Any]] = {}
    for output in outputs:
        path = output / "report" / RESULTS
        if not path.is_file():
            raise InputError(f"no {path}: give the output folder of a recipe that `cocomix run` finished")
        results = _read(path)
        part = next((part for part in study.parts if part.results == results["name"]), None)
        if part is None:
            needed = ", ".join(part.results for part in study.parts)
            raise InputError(f"{path} is from recipe {results['name']!r}, which the study does not use ({needed})")
        _check(results, part, path)
        copies[_path(folder, part)] = {key: value for key, value in results.items() if key not in LEFT_OUT}
    for path in copies:
        if path.exists():
            _read(path)  # only earlier results may be replaced
    for path, results in copies.items():
        files.write_json(path, results)


def load_results(folder: Path, part: Part) -> dict[str, Any] | None:
    """Load the results of a part's recipe; None if there are none yet.

    Raises:
        InputError: the results are damaged, have different seeds for different students, or lack a student that a
            claim names.
    """
    path = _path(folder, part)
    if not path.is_file():
        return None
    results = _read(path)
    _check(results, part, path)
    return results


def _path(folder: Path, part: Part) -> Path:
    return folder / "results" / f"{part.results}.json"


def _read(path: Path) -> dict[str, Any]:
    results = files.read_json(path)
    missing = [key for key in REQUIRED if key not in results] if isinstance(results, dict) else list(REQUIRED)
    if missing:
        raise InputError(f"{path} is not a report of `cocomix run`: it has no {', '.join(missing)}")
    for name, student in results["students"].items():
        if "single_run_flops" not in student["costs"]:  # results of older versions
            run = Run(name=name, recipe={}, **{key: student[key] for key in _RECORDED})
            student["costs"]["single_run_flops"] = single_run_flops(run, []).tolist()
    return results


def _check(results: dict[str, Any], part: Part, path: Path) -> None:
    groups = results["groups"]
    seeds = {name: sorted(results["students"][member]["seed"] for member in groups[name]) for name in groups}
    if len({tuple(each) for each in seeds.values()}) > 1:
        listed = "; ".join(f"{name}: {', '.join(map(str, each))}" for name, each in seeds.items())
        raise InputError(f"{path}: seeds are compared in pairs, but differ between students ({listed})")
    for claim in part.claims or []:
        for name in (claim.run, claim.baseline):
            if name not in groups:
                raise InputError(
                    f"{path} has no student {name!r}, which a claim of the study names; it has {', '.join(groups)}"
                )
            if claim.measure != LOSS and claim.measure not in results["students"][groups[name][0]]["costs"]:
                raise InputError(
                    f"{path} has no costs by {claim.measure}, which a claim of the study names: an earlier version "
                    "wrote it; run the recipe again to renew its report"
                )


def curves(results: dict[str, Any], group: str, axis: str) -> list[Curve]:
    """Return the validation curves of a group's runs, ordered by seed, with costs along one of `AXES`."""
    runs = sorted((results["students"][member] for member in results["groups"][group]), key=lambda run: run["seed"])
    return [Curve(np.array(run["costs"][axis]), np.array([point["loss"] for point in run["curve"]])) for run in runs]


def measure(results: dict[str, Any], run: str, baseline: str, what: str) -> Measured:
    """Compare two groups by one of `MEASURES`."""
    if what == LOSS:
        loss = loss_difference(curves(results, run, "tokens"), curves(results, baseline, "tokens"))
        return Measured(loss, loss.seeds, loss.seeds)
    cost = cost_difference(curves(results, run, what), curves(results, baseline, what))
    unknown = tuple(sorted(unknown_costs(results, run) | unknown_costs(results, baseline)))
    if what in PREPARED and unknown:
        return Measured(None, cost.reached, cost.seeds, unknown=unknown)
    return Measured(cost.difference, cost.reached, cost.seeds, cost.at_most)


def unknown_costs(results: dict[str, Any], group: str) -> set[str]:
    """Return the kinds of artifacts with unknown cost that a group learns from."""
    run = results["students"][results["groups"][group][0]]
    return {kind for kind, artifact in run["preparation"].items() if artifact["flops"] is None}


CLAIM_VERDICTS = {
    Verdict.LOWER: "holds",
    Verdict.HIGHER: "does not hold",
    Verdict.SAME: str(Verdict.SAME),
    Verdict.UNDECIDED: str(Verdict.UNDECIDED),
}
"""The verdict on a claim that a difference is below a bound, by the verdict on the difference."""


def claim_verdicts(study: Study, claims: Sequence[tuple[Claim, Measured]]) -> list[str]:
    """Return a verdict for each measured claim of a study, corrected for their number."""
    decided = verdicts([_test(study, claim, found) for claim, found in claims])
    return [
        f"{Verdict.UNDECIDED}: {claim.confounded}" if claim.confounded else CLAIM_VERDICTS[verdict]
        for (claim, _), verdict in zip(claims, decided, strict=True)
    ]


def _test(study: Study, claim: Claim, found: Measured) -> MarginTest | None:
    return None if found.difference is None else found.difference.test(claim.below, study.margin(claim))
