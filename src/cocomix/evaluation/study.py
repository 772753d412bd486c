"""A study: questions, the results that answer them, and claims that the figures are held against.

A folder of documents has `results/study.yaml`, which says what is asked, and beside it `results/NAME.json` of each
recipe that answers. From these alone `cocomix report FOLDER` writes `FOLDER/results.md`, so weights need not be kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jsonargparse import ArgumentError, ArgumentParser

from cocomix import files
from cocomix.errors import InputError
from cocomix.evaluation.costs import AXES
from cocomix.evaluation.report import RESULTS
from cocomix.evaluation.seeds import Curve, SeedDifference, cost_difference, loss_difference

STUDY_FILE = "study.yaml"
LOSS = "loss"
MEASURES = (LOSS, *AXES)
LEFT_OUT = ("showcase", "inputs")
"""Of a recipe's results: sample texts, and what only tells whether they are up to date."""


@dataclass
class Claim:
    """What somebody says of two ways of training.

    Args:
        text: the claim.
        run: the way that it is about.
        baseline: the other one.
        measure: loss, the difference at the end; or tokens, student_flops, all_flops or seconds, the difference in what
            it costs to reach the baseline's final loss, as a share.
        at_most: the claim is about a difference of this or less.
    """

    text: str
    run: str
    baseline: str
    measure: str = LOSS
    at_most: float = 0.0


@dataclass
class Part:
    """A question, and the recipe whose results answer it.

    Args:
        title: heading.
        results: name of the recipe, so of its file.
        question: what is asked, and what was expected.
        claims: what the figures are held against.
        conclusion: what follows, in words; no figure is checked there.
    """

    title: str
    results: str
    question: str
    claims: list[Claim] = field(default_factory=list)
    conclusion: str = ""


@dataclass
class Study:
    """A document of results.

    Args:
        title: heading.
        introduction: Markdown.
        parts: in order.
    """

    title: str
    introduction: str
    parts: list[Part]


@dataclass(frozen=True)
class Verdict:
    """A claim held against figures.

    Attributes:
        difference: what was measured; None where the baseline's loss is never reached.
        word: `holds`, `does not hold`, or `not decided` where chance between seeds leaves both open.
    """

    difference: SeedDifference | None
    word: str


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
    try:
        study = Study(**vars(parser.instantiate(parser.parse_object(yaml.safe_load(path.read_text(encoding="utf-8"))))))
    except (ArgumentError, yaml.YAMLError, TypeError, ValueError) as error:
        raise InputError(f"{path}: {' '.join(str(error).split())}") from None
    for claim in (claim for part in study.parts for claim in part.claims):
        if claim.measure not in MEASURES:
            raise InputError(f"{path}: measure is {claim.measure!r}; expected one of {', '.join(MEASURES)}")
    return study


def add_results(folder: Path, runs: list[Path]) -> None:
    """Keep the results of finished recipes, given by their output folders, beside the study, without texts.

    Raises:
        InputError: one of them has no report yet.
    """
    for run in runs:
        if not (run / "report" / RESULTS).is_file():
            raise InputError(
                f"{run} has no report/{RESULTS}; give the output folder of a recipe that `cocomix run` ended"
            )
    for run in runs:
        results = files.read_json(run / "report" / RESULTS)
        kept = {key: value for key, value in results.items() if key not in LEFT_OUT}
        files.write_json(folder / "results" / f"{results['name']}.json", kept)


def load_results(folder: Path, part: Part) -> dict[str, Any] | None:
    """What a part's recipe found; None if it was not run yet.

    Raises:
        InputError: a claim is about a student that the recipe has not.
    """
    path = folder / "results" / f"{part.results}.json"
    if not path.is_file():
        return None
    results = files.read_json(path)
    for claim in part.claims:
        for name in (claim.run, claim.baseline):
            if name not in results["groups"]:
                known = ", ".join(results["groups"])
                raise InputError(f"{folder}/results/{STUDY_FILE}: {name!r} is no student of {part.results} ({known})")
    return results


def curves(results: dict[str, Any], group: str, axis: str) -> list[Curve]:
    """The trainings of a group, by seed, with what they cost by one of `AXES`."""
    runs = sorted((results["students"][member] for member in results["groups"][group]), key=lambda run: run["seed"])
    return [Curve(np.array(run["costs"][axis]), np.array([point["loss"] for point in run["curve"]])) for run in runs]


def difference(results: dict[str, Any], run: str, baseline: str, measure: str) -> SeedDifference | None:
    """One of `MEASURES` of a group against another; None where its baseline's loss is never reached."""
    if measure == LOSS:
        return loss_difference(curves(results, run, "tokens"), curves(results, baseline, "tokens"))
    return cost_difference(curves(results, run, measure), curves(results, baseline, measure))


def verdict(results: dict[str, Any], claim: Claim) -> Verdict:
    """Whether a claim holds: its bound is met on average, and chance between seeds does not explain the direction."""
    found = difference(results, claim.run, claim.baseline, claim.measure)
    if found is None:
        return Verdict(None, "does not hold")
    if found.mean > claim.at_most and (found.interval is None or found.interval[0] > claim.at_most):
        return Verdict(found, "does not hold")
    if found.mean <= claim.at_most and found.interval is not None and found.interval[1] < 0:
        return Verdict(found, "holds")
    return Verdict(found, "not decided")
