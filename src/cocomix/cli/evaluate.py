"""`cocomix evaluate [concepts | steering] RUN`: measure a trained model on text, on tasks, and its concepts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cocomix.cli.options import Json, Run, given, option, separated, setting
from cocomix.common.console import show, status
from cocomix.common.errors import InputError
from cocomix.common.settings import Batch, Count, Seed

if TYPE_CHECKING:
    from cocomix.evaluation.record import Evaluation
    from cocomix.inspection.runs import OpenRun

SCALES = (2.0, 4.0, 8.0, 16.0)
"""Default factors of `evaluate steering --operation scale`."""
TEXT = "Text"
TASKS = "Tasks (pip install 'cocomix[eval]')"
Precision = Annotated[Literal["fp32", "bf16"], typer.Option(help="Precision of matrix products.")]


def evaluate(
    run: Run,
    limit: Annotated[int | None, option("N", "Only the first N documents, and items of each task.", Count)] = None,
    precision: Precision = "fp32",
    batch_size: Annotated[int, option("N", "Sequences per batch.", Batch)] = 8,
    as_json: Json = False,
    text: Annotated[
        str | None, option("SOURCE", "File, folder or hf:NAME, as corpus.source of a recipe.", panel=TEXT)
    ] = None,
    text_field: Annotated[
        str | None, option("NAME", "Field of records that holds the text (default: text).", panel=TEXT)
    ] = None,
    window: Annotated[
        int | None, option("N", "Tokens per window (default: as in training).", Count, panel=TEXT)
    ] = None,
    stride: Annotated[
        int | None, option("N", "Tokens that each window scores (default: half a window).", Count, panel=TEXT)
    ] = None,
    tasks: Annotated[str | None, option("NAME,...", "Tasks, groups or tags of the harness.", panel=TASKS)] = None,
    tasks_path: Annotated[Path | None, option("FOLDER", "Your own task definitions.", panel=TASKS)] = None,
) -> None:
    """Evaluate a trained model on text and on benchmark tasks.

    The tasks are those of lm-evaluation-harness. The default text is the validation documents of the model's own
    corpus. Results are added to RUN/evaluation.json. `evaluate concepts` and `evaluate steering` measure its concepts.
    """
    windowed = [name for name, value in (("--window", window), ("--stride", stride)) if value is not None]
    if windowed and tasks is not None and text is None:
        raise InputError(f"{', '.join(windowed)} has no effect on --tasks; leave it out, or give --text too")
    if text is None and text_field is not None:
        raise InputError("--text-field has no effect without --text; name the text, or leave it out")
    if tasks is None and tasks_path is not None:
        raise InputError("--tasks-path has no effect without --tasks; name the tasks, or leave it out")

    from cocomix.evaluation.harness import TaskSettings, evaluate_tasks, plan_tasks
    from cocomix.evaluation.record import add_evaluations, check_evaluations
    from cocomix.evaluation.text import TextSettings, evaluate_text
    from cocomix.inspection.runs import model_folder, open_model

    run = model_folder(run)
    opened = open_model(run)
    check_evaluations(run)
    common: dict[str, Any] = {"limit": limit, "batch_size": batch_size, "precision": precision}
    plan = None
    if tasks is not None:
        plan = plan_tasks(TaskSettings(separated("--tasks", tasks, "piqa,arc_easy"), tasks_path, **common))
    evaluations = []
    if text is not None or plan is None:
        chosen = given(text_field=text_field, window=window, stride=stride)
        evaluations.append(evaluate_text(opened, TextSettings(text, **chosen, **common)))
        add_evaluations(run, evaluations)
    if plan is not None:
        on_tasks = evaluate_tasks(opened, plan)
        add_evaluations(run, on_tasks)
        evaluations += on_tasks
    records = [asdict(each) for each in evaluations]
    _show(run, records, records, as_json)


def evaluate_concepts(
    run: Run,
    limit: Annotated[int | None, option("N", "Only the first N blocks of validation text.", Count)] = None,
    batch_size: Annotated[int | None, option("N", "Blocks per batch (default: 16).", Batch)] = None,
    precision: Precision = "fp32",
    as_json: Json = False,
) -> None:
    """Measure how well a model predicts its concepts.

    Its loss without what it mixes in is measured too. Results are added to RUN/evaluation.json.
    """
    from cocomix.evaluation.prediction import ConceptSettings
    from cocomix.evaluation.prediction import evaluate_concepts as measure
    from cocomix.pipeline.origins import learned_labels

    opened = _open(run)
    run = opened.folder
    labels = learned_labels(opened) if opened.config.content == "concepts" else None
    settings = ConceptSettings(**given(limit=limit, batch_size=batch_size, precision=precision))
    _add_and_show(run, measure(opened, labels, settings), as_json)


_score = partial(setting, "cocomix.evaluation.steering_score", "ScoreSettings")


def evaluate_steering(
    run: Run,
    concepts: Annotated[
        int | None, option("N", "Concepts to steer, spread over the frequency bands (default: 32).", _score("concepts"))
    ] = None,
    prompts: Annotated[int | None, option("N", "Number of validation prompts (default: 4).", Count)] = None,
    strengths: Annotated[
        Sequence[float] | None,
        option(
            "S,...",
            "In standard deviations of the concept logits (default: 1,2,4,8), or factors (default: 2,4,8,16).",
            _score("strengths"),
        ),
    ] = None,
    teacher_strengths: Annotated[
        Sequence[float] | None,
        option(
            "S,...",
            "Of the decoder direction, in lengths of the residual stream (default: 0.125,0.25,0.5,1).",
            _score("teacher_strengths"),
        ),
    ] = None,
    named_tokens: Annotated[
        Sequence[int] | None,
        option("N,...", "How many tokens the prompt names (default: 1,2,4,8).", _score("named_tokens")),
    ] = None,
    prompt_tokens: Annotated[
        int | None, option("N", "Tokens of a prompt, at most a quarter of the context (default: 16).", Count)
    ] = None,
    new_tokens: Annotated[
        int | None, option("N", "Tokens to generate, at most a quarter of the context (default: 32).", Count)
    ] = None,
    seed: Annotated[int | None, option("N", "Random seed (default: 0).", Seed)] = None,
    batch_size: Annotated[int | None, option("N", "Texts per batch (default: 64).", Batch)] = None,
    operation: Annotated[Literal["add", "scale"], typer.Option(help="On the concept logit; the paper scales.")] = "add",
    as_json: Json = False,
) -> None:
    """Measure whether steering shows in the generated text.

    The model's own teacher is the judge. Results are added to RUN/evaluation.json.
    """
    from cocomix.evaluation.steering_experiment import PICTURES, score_steering
    from cocomix.evaluation.steering_score import ScoreSettings

    if operation == "scale" and strengths is None:
        strengths = SCALES
    options = given(
        concepts=concepts,
        prompts=prompts,
        strengths=strengths,
        operation=operation,
        teacher_strengths=teacher_strengths,
        named_tokens=named_tokens,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        seed=seed,
        batch_size=batch_size,
    )
    settings = ScoreSettings(**options)
    opened = _open(run)
    run = opened.folder
    if not opened.config.mixes_concepts:
        raise InputError(f"the model in {run} mixes no concepts in, so there are none to steer")
    score = score_steering(opened, settings)
    status(f"Picture: {run / PICTURES[settings.operation]}")
    _add_and_show(run, score, as_json)


def _open(folder: Path) -> OpenRun:
    """Open the run of a model with a mixer.

    Raises:
        InputError: there is no run, or the model mixes nothing.
    """
    from cocomix.evaluation.record import check_evaluations
    from cocomix.inspection.runs import model_folder, open_model
    from cocomix.models.configuration import CoCoMixConfig
    from cocomix.training.run import RUN_FILE

    folder = model_folder(folder)
    opened = open_model(folder)
    check_evaluations(folder)
    if opened.record is None:
        raise InputError(f"{folder} has no {RUN_FILE}, which describes its concepts; give a run of cocomix")
    if not isinstance(opened.config, CoCoMixConfig):
        raise InputError(
            f"{folder} was trained with {opened.record.method}, which mixes nothing in; give a run of cocomix"
        )
    if opened.config.mixing == "none" and opened.config.content != "concepts":
        raise InputError(f"{folder} mixes nothing in and predicts no concepts; give another run")
    return opened


def _add_and_show(run: Path, evaluation: Evaluation, as_json: bool) -> None:
    from cocomix.evaluation.record import add_evaluations

    add_evaluations(run, [evaluation])
    record = asdict(evaluation)
    _show(run, [record], record, as_json)


def _show(run: Path, evaluations: list[dict[str, Any]], as_printed: Any, as_json: bool) -> None:
    from cocomix.common.document import plain_text
    from cocomix.evaluation.record import EVALUATION_FILE
    from cocomix.reporting.tables import evaluation_tables

    if as_json:
        show(json.dumps(as_printed, indent=2))
    else:
        show("\n\n".join(map(plain_text, evaluation_tables({run.resolve().name: evaluations}))))
        status(f"Saved in {run / EVALUATION_FILE}")
