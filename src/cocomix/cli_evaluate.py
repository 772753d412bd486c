"""`cocomix evaluate RUN`: a trained model on text and on the tasks of lm-evaluation-harness."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cocomix import cli_scores
from cocomix.cli_options import OptionParser, number
from cocomix.console import say, show
from cocomix.errors import InputError
from cocomix.settings import kind_of

PRECISIONS = ("fp32", "bf16")


def run(arguments: Sequence[str]) -> int:
    """Evaluate one model, show what was measured and add it to the model's `evaluation.json`; returns the exit code.

    Raises:
        InputError: no such model, text or task, or settings that do not fit.
    """
    if arguments and arguments[0] in cli_scores.COMMANDS:
        return cli_scores.run(arguments)
    options = _parser().parse_args(arguments)
    _check(options)

    from cocomix.evaluation.harness import TaskSettings, evaluate_tasks, plan_tasks
    from cocomix.evaluation.record import EVALUATION_FILE, add_evaluations, check_evaluations
    from cocomix.evaluation.tables import evaluation_tables
    from cocomix.evaluation.text import TextSettings, evaluate_text
    from cocomix.steering.runs import open_model

    opened = open_model(options.run)
    check_evaluations(options.run)
    common = {key: getattr(options, key) for key in ("limit", "batch_size", "precision")}
    plan = None
    if options.tasks is not None:
        names = [name.strip() for name in options.tasks.split(",") if name.strip()]
        if not names:
            raise InputError(f"--tasks names no task: {options.tasks!r}; give some, as in --tasks piqa,arc_easy")
        plan = plan_tasks(TaskSettings(names, options.tasks_path, **common))
    found = []
    if options.text is not None or plan is None:
        text = TextSettings(options.text, options.text_field, options.window, options.stride, **common)
        found.append(evaluate_text(opened, text))
        add_evaluations(options.run, found)
    if plan is not None:
        of_tasks = evaluate_tasks(opened, plan)
        add_evaluations(options.run, of_tasks)
        found += of_tasks
    if options.json:
        show(json.dumps([asdict(each) for each in found], indent=2))
    else:
        show("\n\n".join(evaluation_tables({options.run.name: [asdict(each) for each in found]})))
        say(f"Kept in {options.run / EVALUATION_FILE}")
    return 0


def _check(options: argparse.Namespace) -> None:
    """Raise InputError for options that have no effect together."""
    of_text = [f"--{name.replace('_', '-')}" for name in ("window", "stride") if getattr(options, name) is not None]
    if of_text and options.tasks is not None and options.text is None:
        raise InputError(f"{', '.join(of_text)} has no effect on --tasks; leave it out, or give --text too")
    if options.tasks is None and options.tasks_path is not None:
        raise InputError("--tasks-path has no effect without --tasks; name the tasks, or leave it out")


def _parser() -> argparse.ArgumentParser:
    from cocomix.evaluation.text import TextSettings

    def in_range(field: str) -> Callable[[str], Any]:
        return number(kind_of(TextSettings, field))

    parser = OptionParser(
        prog="cocomix evaluate",
        description="Evaluate a trained model on text (by default the validation documents of its own corpus) and on "
        "tasks of lm-evaluation-harness; what was measured is kept in RUN/evaluation.json.",
        epilog="Also: cocomix evaluate concepts RUN, cocomix evaluate steering RUN.",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a trained model")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument(
        "--limit", metavar="N", type=in_range("limit"), help="only so many documents, and items of each task"
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of matrix products (default: fp32)")
    parser.add_argument(
        "--batch-size", metavar="N", type=in_range("batch_size"), default=8, help="sequences read at once (default: 8)"
    )
    text = parser.add_argument_group("text")
    text.add_argument("--text", metavar="SOURCE", help="file, folder or hf:NAME, as corpus.source of a recipe")
    text.add_argument("--text-field", metavar="NAME", default="text", help="field of records that holds the text")
    text.add_argument(
        "--window", metavar="N", type=in_range("window"), help="tokens read at once (default: as in training)"
    )
    text.add_argument(
        "--stride", metavar="N", type=in_range("stride"), help="tokens that a window counts (default: half a window)"
    )
    tasks = parser.add_argument_group("tasks (pip install 'cocomix[eval]')")
    tasks.add_argument("--tasks", metavar="NAME,...", help="tasks, groups or tags of the harness")
    tasks.add_argument("--tasks-path", metavar="FOLDER", type=Path, help="task definitions of your own")
    return parser
