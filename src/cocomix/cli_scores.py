"""`cocomix evaluate concepts RUN` and `cocomix evaluate steering RUN`: what a model's concepts are good for."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING

from cocomix.cli_options import OptionParser, number
from cocomix.console import say, show
from cocomix.errors import InputError
from cocomix.settings import kind_of

if TYPE_CHECKING:
    from cocomix.evaluation.record import Evaluation
    from cocomix.steering.runs import OpenRun

COMMANDS = {
    "concepts": "how well a model predicts its concepts, and what its loss is without what it mixes in",
    "steering": "whether turning a concept up turns it up in the text, by the judgement of the model's own teacher",
}

SCALES = (2.0, 4.0, 8.0, 16.0)
"""Factors that are tried unless others are given."""


def run(arguments: Sequence[str]) -> int:
    """Run one of `COMMANDS` and add what it found to the model's `evaluation.json`; returns the exit code.

    Raises:
        InputError: no such model, one without concepts, what they came from is gone, or a setting out of its range.
    """
    options = _parser().parse_args(arguments)

    from cocomix.evaluation.record import EVALUATION_FILE, add_evaluations
    from cocomix.evaluation.tables import evaluation_tables

    found = (_concepts if options.command == "concepts" else _steering)(options)
    add_evaluations(options.run, [found])
    if options.json:
        show(json.dumps(asdict(found), indent=2))
    else:
        show("\n\n".join(evaluation_tables({options.run.name: [asdict(found)]})))
        say(f"Kept in {options.run / EVALUATION_FILE}")
    return 0


def _concepts(options: argparse.Namespace) -> Evaluation:
    from cocomix.evaluation.prediction import ConceptSettings, evaluate_concepts
    from cocomix.origins import learned_labels

    opened = _opened(options.run)
    labelled = learned_labels(opened) if opened.config.content == "concepts" else None
    given = {field.name: getattr(options, field.name) for field in fields(ConceptSettings)}
    settings = ConceptSettings(**{name: value for name, value in given.items() if value is not None})
    return evaluate_concepts(opened, labelled, settings)


def _steering(options: argparse.Namespace) -> Evaluation:
    from cocomix.steering.experiment import PICTURES, score_steering
    from cocomix.steering.score import ScoreSettings

    given = {field.name: getattr(options, field.name) for field in fields(ScoreSettings)}
    if options.operation == "scale" and options.strengths is None:
        given["strengths"] = SCALES
    settings = ScoreSettings(**{name: value for name, value in given.items() if value is not None})
    opened = _opened(options.run)
    if not opened.config.mixes_concepts:
        raise InputError(f"the model in {options.run} mixes no concepts in, so there are none to turn up")
    found = score_steering(opened, settings)
    say(f"Picture: {options.run / PICTURES[settings.operation]}")
    return found


def _opened(folder: Path) -> OpenRun:
    """Open the run of a model with a mixer.

    Raises:
        InputError: there is no run, or the model mixes nothing.
    """
    from cocomix.evaluation.record import check_evaluations
    from cocomix.models.configuration import CoCoMixConfig
    from cocomix.steering.runs import open_model
    from cocomix.training.run import RUN_FILE

    opened = open_model(folder)
    check_evaluations(folder)
    if opened.record is None:
        raise InputError(f"{folder} has no {RUN_FILE}, so nothing says what its concepts are; give a run of cocomix")
    if not isinstance(opened.config, CoCoMixConfig):
        raise InputError(
            f"{folder} was trained with {opened.record.method}, which mixes nothing in; give a run of cocomix"
        )
    if opened.config.mixing == "none" and opened.config.content != "concepts":
        raise InputError(f"{folder} mixes nothing in and predicts no concepts; give another run")
    return opened


def _parser() -> argparse.ArgumentParser:
    from cocomix.evaluation.prediction import ConceptSettings
    from cocomix.steering.score import ScoreSettings

    parser = OptionParser(prog="cocomix evaluate")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=COMMANDS[name], description=COMMANDS[name])
        command.add_argument("run", metavar="RUN", type=Path, help="folder of a trained model")
        command.add_argument("--json", action="store_true", help="print the results as JSON")
        return command

    concepts = add("concepts")
    for name, about in (
        ("limit", "only so many blocks of validation text"),
        ("batch-size", "blocks read at once (default: 16)"),
    ):
        kind = kind_of(ConceptSettings, name.replace("-", "_"))
        concepts.add_argument(f"--{name}", metavar="N", type=number(kind), help=about)
    concepts.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of matrix products")
    steering = add("steering")
    for name, metavar, about in (
        ("concepts", "N", "to turn up, as many of each frequency band (default: 32)"),
        ("prompts", "N", "beginnings of validation text that are gone on with (default: 4)"),
        (
            "strengths",
            "S,...",
            "in standard deviations of the concept logits (default: 1,2,4,8), or factors (2,4,8,16)",
        ),
        (
            "teacher-strengths",
            "S,...",
            "of the decoder direction, in lengths of the residual stream (default: 0.125,0.25,0.5,1)",
        ),
        ("named-tokens", "N,...", "how many tokens the prompt names (default: 1,2,4,8)"),
        ("prompt-tokens", "N", "of a prompt, at most a quarter of the context (default: 16)"),
        ("new-tokens", "N", "written after it, at most a quarter of the context (default: 32)"),
        ("seed", "N", "of concepts, prompts and texts (default: 0)"),
        ("batch-size", "N", "texts written at once (default: 64)"),
    ):
        kind = kind_of(ScoreSettings, name.replace("-", "_"))
        steering.add_argument(f"--{name}", metavar=metavar, type=number(kind), help=about)
    steering.add_argument(
        "--operation", choices=("add", "scale"), help="on the concept logit (default: add; the paper scales)"
    )
    return parser
