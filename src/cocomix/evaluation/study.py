"""A study: questions, the results that answer them, and claims that the figures are held against.

A folder of documents has `results/study.yaml`, which says what is asked, and beside it `results/NAME.json` of each
recipe that answers. From these alone `cocomix report FOLDER` writes `FOLDER/results.md`, so weights need not be kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import ArgumentError, ArgumentParser

from cocomix import files, strict_yaml
from cocomix.errors import InputError
from cocomix.evaluation.costs import AXES, PREPARED
from cocomix.evaluation.report_folder import RESULTS
from cocomix.evaluation.seeds import Curve, SeedDifference, cost_difference, loss_difference
from cocomix.evaluation.verdicts import COST_MARGIN, LOSS_MARGIN, MarginTest, Verdict, verdicts

STUDY_FILE = "study.yaml"
LOSS = "loss"
MEASURES = (LOSS, *AXES)
REQUIRED = ("name", "students", "groups", "comparisons", "evaluations", "recipe", "environment")
"""Of a recipe's results."""
LEFT_OUT = ("showcase", "inputs")
"""Of a recipe's results: sample texts, and what only tells whether they are up to date."""


@dataclass
class Claim:
    """What somebody says of two ways of training.

    Args:
        text: the claim.
        run: the way that it is about.
        baseline: the other one.
        measure: loss, the difference at the end; or one of `AXES`, the difference in what it costs to reach the
            baseline's final loss, as a share.
        below: the claim is that the difference is below this. At 0, the study's margin decides what is of interest;
            any other bound is what is of interest itself.
        confounded: why these figures cannot decide the claim, whatever they are.
    """

    text: str
    run: str
    baseline: str
    measure: str = LOSS
    below: float = 0.0
    confounded: str = ""


@dataclass
class Part:
    """A question, and the recipe whose results answer it.

    Args:
        title: heading.
        results: name of the recipe, so of its file.
        question: what is asked, and what was expected.
        claims: what the figures are held against.
        conclusion: what follows, in words; no figure is checked there.
        teacher_tokens: tokens that the teacher was trained on, if it was trained elsewhere and that is known.
    """

    title: str
    results: str
    question: str
    claims: list[Claim] | None = None
    conclusion: str = ""
    teacher_tokens: int | None = None


@dataclass
class Study:
    """A document of results.

    Args:
        title: heading.
        introduction: Markdown.
        parts: in order.
        loss_margin: smallest difference of interest between losses, nats per token.
        cost_margin: smallest difference of interest between costs, as a share of the baseline's.
    """

    title: str
    introduction: str
    parts: list[Part]
    loss_margin: float = LOSS_MARGIN
    cost_margin: float = COST_MARGIN

    def margin(self, claim: Claim) -> float:
        """Half the width of the interval around the claim's bound that is of no interest."""
        if claim.below:
            return 0.0
        return self.loss_margin if claim.measure == LOSS else self.cost_margin


@dataclass(frozen=True)
class Measured:
    """One of `MEASURES` of a way of training against another.

    Attributes:
        difference: over seeds; None where a seed does not reach the baseline's loss, or a cost is not known.
        reached: seeds that reach it; all where the measure is the loss.
        seeds: pairs.
        at_most: whether the difference is an upper bound.
        unknown: what was made elsewhere, at a cost that nobody wrote down.
    """

    difference: SeedDifference | None
    reached: int
    seeds: int
    at_most: bool = False
    unknown: tuple[str, ...] = ()


def load_study(folder: Path) -> Study:
    """The study of a folder of documents.

    Raises:
        InputError: there is none, or it asks for something that cannot be measured.
    """
    path = folder / "results" / STUDY_FILE
    if not path.is_file():
        raise InputError(f"no {path}: give a folder whose results/{STUDY_FILE} says what the study asks, e.g. docs")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Study, as_positional=False)
    content = strict_yaml.load(path)
    try:
        if not isinstance(content, dict):
            raise ValueError("holds no study: expected the keys title, introduction and parts")
        study = Study(**vars(parser.instantiate(parser.parse_object(content))))
    except (ArgumentError, TypeError, ValueError) as error:
        raise InputError(f"{path}: {' '.join(str(error).split())}") from None
    for name in ("loss_margin", "cost_margin"):
        if not 0 <= getattr(study, name) < math.inf:
            raise InputError(f"{path}: {name} is {getattr(study, name)}; expected a number that is not negative")
    for part in study.parts:
        if Path(part.results).name != part.results:
            raise InputError(f"{path}: results is {part.results!r}; expected the name of a recipe, which names a file")
    for claim in (claim for part in study.parts for claim in part.claims or []):
        if claim.measure not in MEASURES:
            raise InputError(f"{path}: measure is {claim.measure!r}; expected one of {', '.join(MEASURES)}")
        if not math.isfinite(claim.below):
            raise InputError(f"{path}: below is {claim.below}; expected a number")
    return study


def add_results(study: Study, folder: Path, outputs: list[Path]) -> None:
    """Keep the results of finished recipes, given by their output folders, beside the study, without texts.

    Raises:
        InputError: one of them has no report, or one that the study does not ask for or cannot use; none is kept then.
    """
    kept: dict[Path, dict[str, Any]] = {}
    for output in outputs:
        path = output / "report" / RESULTS
        if not path.is_file():
            raise InputError(f"no {path}: give the output folder of a recipe that `cocomix run` has ended")
        results = _read(path)
        part = next((part for part in study.parts if part.results == results["name"]), None)
        if part is None:
            asked = ", ".join(part.results for part in study.parts)
            raise InputError(f"{path} is of {results['name']!r}, which no part of the study asks for ({asked})")
        _check(results, part, path)
        kept[_kept(folder, part)] = {key: value for key, value in results.items() if key not in LEFT_OUT}
    for path in kept:
        if path.exists():
            _read(path)  # nothing but earlier results is replaced
    for path, results in kept.items():
        files.write_json(path, results)


def load_results(folder: Path, part: Part) -> dict[str, Any] | None:
    """What a part's recipe found; None if it was not run yet.

    Raises:
        InputError: it cannot be used: damaged, other seeds for one student than for another, or without a student
            that is claimed something of.
    """
    path = _kept(folder, part)
    if not path.is_file():
        return None
    results = _read(path)
    _check(results, part, path)
    return results


def _kept(folder: Path, part: Part) -> Path:
    return folder / "results" / f"{part.results}.json"


def _read(path: Path) -> dict[str, Any]:
    results = files.read_json(path)
    missing = [key for key in REQUIRED if key not in results] if isinstance(results, dict) else list(REQUIRED)
    if missing:
        raise InputError(f"{path} is not what `cocomix run` writes: it has no {', '.join(missing)}")
    return results


def _check(results: dict[str, Any], part: Part, path: Path) -> None:
    groups = results["groups"]
    seeds = {name: sorted(results["students"][member]["seed"] for member in groups[name]) for name in groups}
    if len({tuple(each) for each in seeds.values()}) > 1:
        told = "; ".join(f"{name}: {', '.join(map(str, each))}" for name, each in seeds.items())
        raise InputError(f"{path}: seeds are compared in pairs, but differ between students ({told})")
    for claim in part.claims or []:
        for name in (claim.run, claim.baseline):
            if name not in groups:
                raise InputError(
                    f"{path} has no student {name!r}, of which the study claims something; it has {', '.join(groups)}"
                )
            if claim.measure != LOSS and claim.measure not in results["students"][groups[name][0]]["costs"]:
                raise InputError(
                    f"{path} has no costs by {claim.measure}, of which the study claims something: it was written by "
                    "an earlier version; run the recipe's report again"
                )


def curves(results: dict[str, Any], group: str, axis: str) -> list[Curve]:
    """The trainings of a group, by seed, with what they cost by one of `AXES`."""
    runs = sorted((results["students"][member] for member in results["groups"][group]), key=lambda run: run["seed"])
    return [Curve(np.array(run["costs"][axis]), np.array([point["loss"] for point in run["curve"]])) for run in runs]


def measure(results: dict[str, Any], run: str, baseline: str, what: str) -> Measured:
    """One of `MEASURES` of a group against another."""
    if what == LOSS:
        loss = loss_difference(curves(results, run, "tokens"), curves(results, baseline, "tokens"))
        return Measured(loss, loss.seeds, loss.seeds)
    cost = cost_difference(curves(results, run, what), curves(results, baseline, what))
    unknown = tuple(sorted(unknown_costs(results, run) | unknown_costs(results, baseline)))
    if what in PREPARED and unknown:
        return Measured(None, cost.reached, cost.seeds, unknown=unknown)
    return Measured(cost.difference, cost.reached, cost.seeds, cost.at_most)


def unknown_costs(results: dict[str, Any], group: str) -> set[str]:
    """What was made elsewhere of the things that a group learns from."""
    run = results["students"][results["groups"][group][0]]
    return {kind for kind, made in run["preparation"].items() if made["flops"] is None}


CLAIM_VERDICTS = {
    Verdict.LOWER: "holds",
    Verdict.HIGHER: "does not hold",
    Verdict.SAME: str(Verdict.SAME),
    Verdict.UNDECIDED: str(Verdict.UNDECIDED),
}
"""What a verdict on a difference says of the claim that it is below a bound."""


def claim_verdicts(study: Study, claims: Sequence[tuple[Claim, Measured]]) -> list[str]:
    """The verdicts on the measured claims of a study, corrected for their number."""
    decided = verdicts([_test(study, claim, found) for claim, found in claims])
    return [
        f"{Verdict.UNDECIDED}: {claim.confounded}" if claim.confounded else CLAIM_VERDICTS[verdict]
        for (claim, _), verdict in zip(claims, decided, strict=True)
    ]


def _test(study: Study, claim: Claim, found: Measured) -> MarginTest | None:
    return None if found.difference is None else found.difference.test(claim.below, study.margin(claim))
